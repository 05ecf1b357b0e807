"""The fetched benchmark data: which files, from where, verified how, and where they are kept.

    <cache>/data/longbench/data/<id>.jsonl          all of LongBench and LongBench-E
    <cache>/data/longbench/config/*.json            official prompts and lengths
    <cache>/data/zeroscrolls/<task>/<split>.jsonl   one folder per task

Sources: hub data sets THUDM/LongBench (its data.zip) and tau/zero_scrolls (a zip per task); the configuration files are
those of the LongBench repository at `OFFICIAL_COMMIT`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbench.errors import DataError
from kvbench.paths import cache_folder, ensure_folder
from kvbench.tasks.archive import unpack
from kvbench.tasks.download import HubFile, hub_file, web_file

logger = logging.getLogger(__name__)

LONGBENCH_REPO = "THUDM/LongBench"
LONGBENCH_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
LONGBENCH_DATASETS = (
    "narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader",
    "gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count",
    "passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p",
)  # fmt: skip
LONGBENCH_E_DATASETS = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip

OFFICIAL_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
OFFICIAL_URL = f"https://raw.githubusercontent.com/THUDM/LongBench/{OFFICIAL_COMMIT}/LongBench/config"
OFFICIAL_SHA256 = {
    "dataset2prompt.json": "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    "dataset2maxlen.json": "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
    "model2maxlen.json": "2405c0b85b215a504fb6a8f69c4982db7e2be2d53d177c69891cdcf0fe78f3ce",
}

ZEROSCROLLS_REPO = "tau/zero_scrolls"
ZEROSCROLLS_REVISION = "main"  # its files changed in 2025; the manifest records commit and checksum of what was fetched
ZEROSCROLLS_TEST_QUESTIONS = {
    "gov_report": 500, "summ_screen_fd": 337, "qmsum": 281, "squality": 260, "qasper": 500, "narrative_qa": 500,
    "quality": 500, "musique": 500, "space_digest": 500, "book_sum_sort": 500,
}  # fmt: skip
ZEROSCROLLS_TASKS = tuple(ZEROSCROLLS_TEST_QUESTIONS)


def longbench_folder() -> Path:
    """Folder with `data/<id>.jsonl` and `config/*.json`, fetched on first use.

    `KVBENCH_OFFICIAL_URL` replaces the address of the folder of configuration files, `HF_ENDPOINT` that of the hub.

    Raises:
        DataError: if it is not there and cannot be fetched.
    """
    identity = {"repo": LONGBENCH_REPO, "revision": LONGBENCH_REVISION, "official": OFFICIAL_SHA256}

    def write(folder: Path) -> dict[str, Any]:
        archive = hub_file(LONGBENCH_REPO, "data.zip", LONGBENCH_REVISION)
        base = os.environ.get("KVBENCH_OFFICIAL_URL", OFFICIAL_URL).rstrip("/")
        (folder / "config").mkdir()
        for name, sha256 in OFFICIAL_SHA256.items():
            (folder / "config" / name).write_bytes(web_file(f"{base}/{name}", sha256))
        ids = [*LONGBENCH_DATASETS, *(f"{dataset}_e" for dataset in LONGBENCH_E_DATASETS)]
        return _unpacked(archive, folder, [f"data/{dataset}.jsonl" for dataset in ids])

    folder = cache_folder() / "data" / "longbench"
    return _fetched(folder, identity, write, "longbench", "data.root=DIR data.official=DIR")


def zeroscrolls_folder(task: str) -> Path:
    """Folder with `<task>/{validation,test}.jsonl`, fetched on first use.

    Args:
        task: one of `ZEROSCROLLS_TASKS`.

    Raises:
        DataError: if it is not there and cannot be fetched.
    """
    identity = {"repo": ZEROSCROLLS_REPO, "revision": ZEROSCROLLS_REVISION, "task": task}
    wanted = [f"{task}/{split}.jsonl" for split in ("validation", "test")]

    def write(folder: Path) -> dict[str, Any]:
        return _unpacked(hub_file(ZEROSCROLLS_REPO, f"{task}.zip", ZEROSCROLLS_REVISION), folder, wanted)

    folder = cache_folder() / "data" / "zeroscrolls" / task
    return _fetched(folder, identity, write, f"zeroscrolls/{task}", "data.root=DIR")


def _fetched(
    folder: Path, identity: dict[str, Any], write: Callable[[Path], dict[str, Any]], what: str, settings: str
) -> Path:
    try:
        return ensure_folder(
            folder, identity, write, lambda: logger.warning("another process is fetching %s; waiting for it", what)
        )
    except DataError as error:
        raise DataError(
            f"{what} is not in the cache and cannot be fetched: {error}. Run `python -m kvbench.fetch {what}` where "
            f"there is a network and copy {folder} here, or set {settings}"
        ) from None


def _unpacked(archive: HubFile, folder: Path, wanted: list[str]) -> dict[str, Any]:
    """Unpack a zip of the hub into `folder`; returns what the manifest keeps about it."""
    try:
        missing = sorted(set(wanted) - set(unpack(archive.path, folder, ".jsonl")))
        if missing:
            raise DataError(f"{archive.url} lacks {', '.join(missing[:5])}: has its layout changed?")
    finally:  # a refused archive goes too, so that the next call fetches it anew
        if archive.temporary:
            archive.path.unlink()
    return {"url": archive.url, "commit": archive.commit, "sha256": archive.sha256}
