"""`python -m kvbench.fetch` against a local stand-in for the hub: whole, killed, damaged, hostile, twice at once."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, serve

from kvbench.metrics.longbench import ROWS
from kvbench.paths import MANIFEST
from kvbench.tasks.data import LONGBENCH_REVISION, OFFICIAL_SHA256

QASPER = "/datasets/tau/zero_scrolls/resolve/main/qasper.zip"
DATA_ZIP = f"/datasets/THUDM/LongBench/resolve/{LONGBENCH_REVISION}/data.zip"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve() as server:
        yield server


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def start(hub: HubServer, cache: Path, *names: str, **more: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KVBENCH_", "XDG_"))}
    places = {"KVBENCH_CACHE": str(cache / "kvbench"), "HF_HOME": str(cache / "hf"), "no_proxy": "127.0.0.1"}
    addresses = {"HF_ENDPOINT": hub.url, "KVBENCH_OFFICIAL_URL": f"{hub.url}/config"}
    command, environment = [sys.executable, "-m", "kvbench.fetch", *names], {**kept, **places, **addresses, **more}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(hub: HubServer, cache: Path, name: str, **more: str) -> Path:
    """Fetch one name; the folder that the command prints."""
    process = start(hub, cache, name, **more)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return Path(json.loads(out.splitlines()[-1])[name])


def refusal(hub: HubServer, cache: Path, name: str, **more: str) -> str:
    """The one line that starts with "kvbench:" and ends a failed fetch; no traceback, no result."""
    process = start(hub, cache, name, **more)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, "")
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("kvbench: "), err
    assert len(lines) == 1 or "HF_HUB_OFFLINE" not in more
    return lines[-1]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not reached():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


TWO_SPLITS = zip_bytes({"qasper/validation.jsonl": b"{}\n", "qasper/test.jsonl": b"{ }\n", "x.py": b"1"})


def test_a_whole_task_arrives_and_is_fetched_again_only_if_something_is_missing(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER] = TWO_SPLITS
    folder = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert (folder / "qasper" / "validation.jsonl").read_bytes() == b"{}\n"
    assert not (folder / "x.py").exists()
    source = json.loads((folder / MANIFEST).read_text())["source"]
    assert (source["commit"], source["sha256"]) == (COMMIT, hashlib.sha256(TWO_SPLITS).hexdigest())
    assert not list((tmp_path / "kvbench" / "downloads").iterdir())
    fetch(hub, tmp_path, "zeroscrolls/qasper", HF_HUB_OFFLINE="1")
    (folder / "qasper" / "test.jsonl").write_bytes(b"")
    fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert (folder / "qasper" / "test.jsonl").read_bytes() == b"{ }\n"
    (folder / MANIFEST).unlink()
    fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert len(hub.ranges("qasper.zip")) == 3


def test_a_large_file_is_followed_to_where_the_hub_keeps_it(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/content/abc"], hub.etags["/content/abc"] = TWO_SPLITS, "another-etag"
    hub.redirects[QASPER] = "/content/abc"
    source = json.loads((fetch(hub, tmp_path, "zeroscrolls/qasper") / MANIFEST).read_text())["source"]
    assert (source["commit"], source["sha256"]) == (COMMIT, hashlib.sha256(TWO_SPLITS).hexdigest())
    assert len(hub.ranges("/content/abc")) == 1


def test_a_killed_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    noise = os.urandom(25 * 2**20)  # more than two of the chunks in which the hub's client writes
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": noise, "qasper/test.jsonl": b"{}\n"}, zipfile.ZIP_STORED)
    hub.stall_after_bytes = 24 * 2**20

    def had_bytes() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "kvbench" / "downloads").glob("*.partial"))

    process = start(hub, tmp_path, "zeroscrolls/qasper")
    wait_until(lambda: had_bytes() >= 2**20, process)
    process.kill()
    process.communicate(timeout=600)
    had, hub.stall_after_bytes = had_bytes(), None
    folder = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert (folder / "qasper" / "validation.jsonl").read_bytes() == noise
    assert hub.ranges("qasper.zip") == [None, f"bytes={had}-"]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER], hub.ignore_range = TWO_SPLITS, True
    content = f"{hub.url}{QASPER} {hashlib.sha256(TWO_SPLITS).hexdigest()} {len(TWO_SPLITS)}"
    downloads = tmp_path / "kvbench" / "downloads"
    downloads.mkdir(parents=True)
    name = f"{hashlib.sha256(content.encode()).hexdigest()[:16]}-qasper.zip.partial"
    (downloads / name).write_bytes(b"wrong start")
    fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert hub.ranges("qasper.zip") == ["bytes=11-"]


def test_wrong_content_is_told_from_the_checksum_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER], hub.etags[QASPER] = TWO_SPLITS, "0" * 64
    assert "the server names 000" in refusal(hub, tmp_path, "zeroscrolls/qasper")
    assert not list((tmp_path / "kvbench" / "downloads").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_bytes({"qasper/validation.jsonl": b"{}\n" * 9999})[:-70], "damaged or cut short"),
        (zip_bytes({"../../outside.jsonl": b"{}\n"}), "leaves the folder"),
        (zip_bytes({"qasper/validation.jsonl": b"{}\n"}), "lacks qasper/test.jsonl"),
    ],
    ids=["truncated", "outside", "missing split"],
)
def test_a_bad_archive_is_one_error_line_and_leaves_nothing(
    hub: HubServer, tmp_path: Path, content: bytes, message: str
) -> None:
    hub.files[QASPER] = content
    assert message in refusal(hub, tmp_path, "zeroscrolls/qasper")
    left = {file.name for file in tmp_path.rglob("*") if file.is_file() and "hf" not in file.parts}
    assert left <= {".qasper.lock"}


def test_two_processes_download_once(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": os.urandom(2**20), "qasper/test.jsonl": b"{}\n"})
    hub.stall_after_bytes = 2**10  # hold the first until the second waits at the lock
    first = start(hub, tmp_path, "zeroscrolls/qasper")
    wait_until(lambda: bool(hub.ranges("qasper.zip")), first)
    second = start(hub, tmp_path, "zeroscrolls/qasper")
    assert second.stderr is not None
    assert "another process is fetching" in second.stderr.readline()
    hub.stall_after_bytes = None
    hub.release.set()  # the first connection breaks; the client goes on with a range
    outcomes = [process.communicate(timeout=600) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outcomes
    starts = [wanted for wanted in hub.ranges("qasper.zip") if wanted is None or wanted == "bytes=0-"]
    assert len(starts) <= 2  # the first attempt, and at most its retry from the start
    assert sum(method == "HEAD" for method, _, _ in hub.requests) == 1


def test_offline_and_not_cached_is_one_line_with_the_remedy(hub: HubServer, tmp_path: Path) -> None:
    for name in ("longbench", "zeroscrolls/qasper"):
        line = refusal(hub, tmp_path, name, HF_HUB_OFFLINE="1")
        for part in (f"{name} is not in the cache", "HF_HUB_OFFLINE is set", "-m kvbench.fetch", "data.root=DIR"):
            assert part in line
    assert not hub.requests
    dead = "http://127.0.0.1:9"
    assert "cannot be had" in refusal(hub, tmp_path, "longbench", HF_ENDPOINT=dead, KVBENCH_OFFICIAL_URL=dead)


LONGBENCH_ZIP = zip_bytes({f"data/{dataset}.jsonl": f'{{"dataset": "{dataset}"}}\n'.encode() for dataset in ROWS})


def test_other_official_prompts_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {DATA_ZIP: LONGBENCH_ZIP, **{f"/config/{name}": b"{}" for name in OFFICIAL_SHA256}}
    assert "this is not the pinned file" in refusal(hub, tmp_path, "longbench")
    assert not hub.ranges("data.zip")  # 114 MB that nobody could use


def test_longbench_arrives_with_its_official_prompts(hub: HubServer, tmp_path: Path, shared_data: Path) -> None:
    official = {name: (shared_data / "longbench_official" / name).read_bytes() for name in OFFICIAL_SHA256}
    hub.files = {DATA_ZIP: LONGBENCH_ZIP, **{f"/config/{name}": content for name, content in official.items()}}
    folder = fetch(hub, tmp_path, "longbench")
    assert len(list((folder / "data").glob("*.jsonl"))) == 34
    assert (folder / "config" / "dataset2prompt.json").is_file()


def test_a_file_in_the_hub_cache_needs_no_network(hub: HubServer, tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "datasets--tau--zero_scrolls"
    cached = repo / "snapshots" / COMMIT / "qasper.zip"
    cached.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    cached.write_bytes(TWO_SPLITS)
    fetch(hub, tmp_path, "zeroscrolls/qasper", HF_HUB_OFFLINE="1")
    assert cached.is_file()
