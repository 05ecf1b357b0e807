"""`python -m kvbench.fetch` against a local stand-in for the hub: whole, killed, damaged, hostile, twice at once."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
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


def zip_bytes(files: dict[str, bytes], stored: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def environment(hub: HubServer, cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KVBENCH_", "XDG_"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "KVBENCH_OFFICIAL_URL": f"{hub.url}/config",
        "KVBENCH_CACHE": str(cache / "kvbench"),
        "HF_HOME": str(cache / "hf"),
        "no_proxy": "127.0.0.1",
        **more,
    }


def start(hub: HubServer, cache: Path, *names: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "kvbench.fetch", *names],
        env=environment(hub, cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(hub: HubServer, cache: Path, *names: str, **more: str) -> tuple[int, str, str]:
    process = start(hub, cache, *names, **more)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def error_line(err: str) -> str:
    """The one line that starts with "kvbench:"; nothing may follow it, and no traceback come before."""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("kvbench: "), err
    return last


def test_a_whole_task_arrives_and_is_not_fetched_twice(hub: HubServer, tmp_path: Path) -> None:
    content = zip_bytes({"qasper/validation.jsonl": b'{"a": 1}\n', "qasper/test.jsonl": b'{"b": 2}\n', "x.py": b"1"})
    hub.files[QASPER] = content
    code, out, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 0, err
    folder = Path(json.loads(out.splitlines()[-1])["zeroscrolls/qasper"])
    assert (folder / "qasper" / "validation.jsonl").read_bytes() == b'{"a": 1}\n'
    assert not (folder / "x.py").exists()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["source"]["commit"] == COMMIT
    assert not list((tmp_path / "kvbench" / "downloads").iterdir())
    asked = len(hub.requests)
    assert fetch(hub, tmp_path, "zeroscrolls/qasper", HF_HUB_OFFLINE="1")[0] == 0
    assert len(hub.requests) == asked


def test_a_large_file_is_followed_to_where_the_hub_keeps_it(hub: HubServer, tmp_path: Path) -> None:
    content = zip_bytes({"qasper/validation.jsonl": b"{}\n", "qasper/test.jsonl": b"{ }\n"})
    hub.files["/content/abc"] = content
    hub.etags["/content/abc"] = "another-etag"
    hub.redirects[QASPER] = "/content/abc"
    code, out, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 0, err
    folder = Path(json.loads(out.splitlines()[-1])["zeroscrolls/qasper"])
    source = json.loads((folder / MANIFEST).read_text())["source"]
    assert (source["commit"], source["sha256"]) == (COMMIT, hashlib.sha256(content).hexdigest())
    assert len(hub.ranges("/content/abc")) == 1


def test_a_missing_manifest_or_a_shortened_file_is_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": b"{}\n", "qasper/test.jsonl": b"{ }\n"})
    folder = Path(json.loads(fetch(hub, tmp_path, "zeroscrolls/qasper")[1])["zeroscrolls/qasper"])
    (folder / "qasper" / "test.jsonl").write_bytes(b"")
    assert fetch(hub, tmp_path, "zeroscrolls/qasper")[0] == 0
    assert (folder / "qasper" / "test.jsonl").read_bytes() == b"{ }\n"
    (folder / MANIFEST).unlink()
    assert fetch(hub, tmp_path, "zeroscrolls/qasper")[0] == 0
    assert len(hub.ranges("qasper.zip")) == 3


def test_a_killed_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    noise = os.urandom(25 * 2**20)  # more than two of the chunks in which the hub's client writes
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": noise, "qasper/test.jsonl": b"{}\n"}, stored=True)
    hub.stall_after_bytes = 24 * 2**20
    process = start(hub, tmp_path, "zeroscrolls/qasper")
    partial = tmp_path / "kvbench" / "downloads"
    deadline = time.monotonic() + 600
    while sum(file.stat().st_size for file in partial.glob("*.partial")) < 2**20:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=600)
    had = sum(file.stat().st_size for file in partial.glob("*.partial"))
    hub.stall_after_bytes = None
    code, out, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 0, err
    folder = Path(json.loads(out.splitlines()[-1])["zeroscrolls/qasper"])
    assert (folder / "qasper" / "validation.jsonl").read_bytes() == noise
    assert hub.ranges("qasper.zip") == [None, f"bytes={had}-"]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub: HubServer, tmp_path: Path) -> None:
    content = zip_bytes({"qasper/validation.jsonl": os.urandom(4096), "qasper/test.jsonl": b"{}\n"})
    hub.files[QASPER] = content
    hub.ignore_range = True
    name = hashlib.sha256(
        f"{hub.url}{QASPER} {hashlib.sha256(content).hexdigest()} {len(content)}".encode()
    ).hexdigest()
    downloads = tmp_path / "kvbench" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / f"{name[:16]}-qasper.zip.partial").write_bytes(b"wrong start")
    code, _, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 0, err
    assert hub.ranges("qasper.zip") == ["bytes=11-"]


def test_wrong_content_is_told_from_the_checksum_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": b"{}\n", "qasper/test.jsonl": b"{}\n"})
    hub.etags[QASPER] = "0" * 64
    code, _, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 2
    assert "the server names 000" in error_line(err)
    assert not list((tmp_path / "kvbench" / "downloads").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_bytes({"qasper/validation.jsonl": b"{}\n" * 9999})[:-70], "damaged or cut short"),
        (b"<html>not a zip</html>", "damaged or cut short"),
        (zip_bytes({"../../outside.jsonl": b"{}\n"}), "leaves the folder"),
        (zip_bytes({"qasper/validation.jsonl": b" " * 2**24}), "zip bomb"),
        (zip_bytes({"qasper/validation.jsonl": b"{}\n"}), "lacks qasper/test.jsonl"),
    ],
    ids=["truncated", "html", "outside", "bomb", "missing split"],
)
def test_a_bad_archive_is_one_error_line_and_leaves_nothing(
    hub: HubServer, tmp_path: Path, content: bytes, message: str
) -> None:
    hub.files[QASPER] = content
    code, _, err = fetch(hub, tmp_path, "zeroscrolls/qasper")
    assert code == 2
    assert message in error_line(err)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file() and "hf" not in file.parts}
    assert left <= {".qasper.lock"}


def test_two_processes_download_once(hub: HubServer, tmp_path: Path) -> None:
    hub.files[QASPER] = zip_bytes({"qasper/validation.jsonl": os.urandom(2**20), "qasper/test.jsonl": b"{}\n"})
    hub.stall_after_bytes = 2**10  # hold the first until the second waits at the lock
    first = start(hub, tmp_path, "zeroscrolls/qasper")
    deadline = time.monotonic() + 600
    while not hub.ranges("qasper.zip"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
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
    code, out, err = fetch(hub, tmp_path, "longbench", HF_HUB_OFFLINE="1")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    for part in ("longbench is not in the cache", "HF_HUB_OFFLINE is set", "python -m kvbench.fetch", "data.root=DIR"):
        assert part in error_line(err)
    assert not hub.requests


def test_a_dead_server_is_one_error_line(hub: HubServer, tmp_path: Path) -> None:
    code, _, err = fetch(hub, tmp_path, "longbench", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2
    assert "cannot be had" in error_line(err)


def longbench_zip() -> bytes:
    return zip_bytes({f"data/{dataset}.jsonl": f'{{"dataset": "{dataset}"}}\n'.encode() for dataset in ROWS})


def test_other_official_prompts_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.files[DATA_ZIP] = longbench_zip()
    hub.files |= {f"/config/{name}": b"{}" for name in OFFICIAL_SHA256}
    code, _, err = fetch(hub, tmp_path, "longbench")
    assert code == 2
    assert "this is not the pinned file" in error_line(err)
    assert not hub.ranges("data.zip")  # 114 MB that nobody could use


def test_longbench_arrives_with_its_official_prompts(hub: HubServer, tmp_path: Path, shared_data: Path) -> None:
    hub.files[DATA_ZIP] = longbench_zip()
    hub.files |= {
        f"/config/{name}": (shared_data / "longbench_official" / name).read_bytes() for name in OFFICIAL_SHA256
    }
    code, out, err = fetch(hub, tmp_path, "longbench")
    assert code == 0, err
    folder = Path(json.loads(out.splitlines()[-1])["longbench"])
    assert len(list((folder / "data").glob("*.jsonl"))) == 34
    assert (folder / "config" / "dataset2prompt.json").is_file()


def test_a_file_in_the_hub_cache_needs_no_network(hub: HubServer, tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "datasets--tau--zero_scrolls"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    cached = snapshot / "qasper.zip"
    cached.write_bytes(zip_bytes({"qasper/validation.jsonl": b"{}\n", "qasper/test.jsonl": b"{ }\n"}))
    code, _, err = fetch(hub, tmp_path, "zeroscrolls/qasper", HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert cached.is_file()
