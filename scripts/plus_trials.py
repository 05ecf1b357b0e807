"""Trials behind KVMerger Plus: one prefill for all arms, then the continuation forced in a single chunk per arm.

    python scripts/plus_trials.py --texts PATH/longbench_samples --half dev --kinds text --samples 8 --out dev.csv
    python scripts/plus_trials.py --kinds tasks --half held --set model=smollm2-135m model.max_prompt_tokens=7000 \
        data.root=PATH/longbench_samples data.official=PATH/longbench_official --gold-tokens 64 --out held.csv
    python scripts/plus_report.py dev.csv

Kinds: "text" takes 2,048 tokens of a LongBench context (never written anywhere) and forces the next ones; "passkey",
"fewshot" and "niah" take about 1,500 tokens of our synthetic tasks and force the gold answer; "tasks" are LongBench's
prompts as the benchmark asks them. A text or prompt belongs to the "dev" or the "held" half by the parity of the first
byte of SHA-256 of its first 1,000 characters; a synthetic sample by its seed. The CSV has one line per sample and arm,
scores only; samples that it already holds are skipped.

Forcing a chunk equals decoding token by token for methods that act once. H2O and CaM also evict while decoding; here
they do not, and their caches grow like everyone's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvbench.config import composed
from kvbench.methods.base import CompressedLayer
from kvbench.methods.full import Full
from kvbench.methods.registry import build_policy
from kvbench.models.load import LoadedModel, load_model
from kvbench.models.prompt import encode_sample
from kvbench.plan import build_plan
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.fused import LayerFork
from kvbench.runtime.observe import prefill
from kvbench.runtime.requests import Arm, Request, model_shape
from kvbench.tasks.base import Task
from kvbench.tasks.synthetic import FewShot, NeedleInHaystack, PassKey

DATASETS = ("gov_report", "multi_news", "narrativeqa", "qasper", "multifieldqa_en")
DATASETS += ("2wikimqa", "hotpotqa", "musique", "qmsum")
PROMPT_TOKENS, MIN_CHARACTERS, CHARACTERS = 2048, 11_000, 14_000
SEEDS = {"dev": 100, "held": 200, "all": 200}
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
ENGLISH = ("qasper", "multifieldqa_en", "narrativeqa", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum")
ENGLISH += ("multi_news", "trec", "triviaqa", "samsum", "passage_retrieval_en", "lcc", "repobench-p")
MIN_TOKENS, ROWS = 600, 32  # shortest prompt of a data set, and continuations in one batch
FIELDS = ("kind", "half", "sample", "arm", "budget", "prompt_tokens", "gold_tokens", "kl", "nll", "full_nll", "bytes")
METHODS = ("h2o", "snapkv", "kvmerger_bias", "kvmerger_plus")


@dataclass(frozen=True)
class Item:
    """One prompt and the tokens forced after it; `name` is what the CSV calls it."""

    name: str
    ids: tuple[int, ...]
    gold: tuple[int, ...]


class ForcedChunk:
    """Attention context for several arms' continuations as rows of one batch: each row has its own prefix.

    Args:
        prefixes: per row one compressed layer for each layer of the model.
    """

    def __init__(self, prefixes: Sequence[Sequence[CompressedLayer]]):
        self.prefixes = prefixes

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
        sliding_window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend over each row's prefix and causally over the chunk; shapes as `AttentionContext.attend`."""
        n_tokens, group = query.shape[2], query.shape[1] // key.shape[1]
        outputs = torch.empty_like(query)
        for row, layers in enumerate(self.prefixes):
            prefix = layers[layer_index]
            n_slots = prefix.keys.shape[1]
            slots, new = torch.arange(n_slots, device=query.device), torch.arange(n_tokens, device=query.device)
            bias = query.new_zeros(key.shape[1], n_slots) if prefix.bias is None else prefix.bias.to(query)
            if prefix.lengths is not None:
                bias = bias.masked_fill(slots >= prefix.lengths.unsqueeze(1), -torch.inf)
            seen = bias[:, None, None].expand(-1, -1, n_tokens, -1)
            future = query.new_zeros(n_tokens, n_tokens).masked_fill(new > new.unsqueeze(1), -torch.inf)
            mask = torch.cat([seen, future.expand(key.shape[1], 1, -1, -1)], -1)
            grouped = query[row].unflatten(0, (-1, group))
            logits = grouped @ torch.cat([prefix.keys, key[row]], 1).mT.unsqueeze(1) * scaling + mask
            output = logits.softmax(-1) @ torch.cat([prefix.values, value[row]], 1).unsqueeze(1)
            outputs[row] = output.flatten(0, 1)
        return outputs.transpose(1, 2)


def log_probs(loaded: LoadedModel, item: Item, prefixes: list[list[CompressedLayer]]) -> Iterator[Tensor]:
    """Log-probabilities `(n_gold - 1, V)` after each gold token but the last, one tensor per arm."""
    for start in range(0, len(prefixes), ROWS):
        rows = prefixes[start : start + ROWS]
        ids = torch.tensor([item.gold[:-1]], device=loaded.device).expand(len(rows), -1)
        positions = torch.arange(len(item.ids), len(item.ids) + ids.shape[1], device=loaded.device)
        with attention_implementation(loaded.model):
            hidden = loaded.model.model(
                input_ids=ids, position_ids=positions.expand(len(rows), -1), attention_context=ForcedChunk(rows),
                use_cache=False,
            ).last_hidden_state  # fmt: skip
        for row in hidden:
            yield loaded.model.lm_head(row).float().log_softmax(-1)


@torch.inference_mode()
def trial(loaded: LoadedModel, item: Item, arms: Sequence[Arm]) -> Iterator[dict[str, object]]:
    """Measure all arms on one sample.

    Yields:
        Per arm: mean KL(full || arm) and mean NLL over the forced tokens but the first (which the prefill decides), the
        full cache's NLL, and the bytes of slots and bias at 2 bytes a number and 4 a bias.
    """
    reference = Arm.of(Full())
    job = Request(0, item.ids, len(item.ids), item.gold, tuple(arms), reference, (), 0)
    everyone = [reference, *arms]
    prefixes: list[list[CompressedLayer]] = [[] for _ in everyone]
    shape = model_shape(loaded)
    fork = LayerFork(
        [arm.policy for arm in everyone],
        len(item.ids),
        shape["n_layers"],
        lambda arm, _, kept: prefixes[arm].append(kept),
    )
    prefill(loaded, job, everyone, fork)
    targets = torch.tensor(item.gold[1:], device=loaded.device).unsqueeze(1)
    rows = log_probs(loaded, item, prefixes)
    full = next(rows)
    for arm, layers, row in zip(arms, prefixes[1:], rows, strict=True):
        slot_bytes = [4 * shape["head_dim"] + (4 if layer.bias is not None else 0) for layer in layers]
        yield {
            "arm": arm.key,
            "budget": arm.policy.budget,
            "prompt_tokens": len(item.ids),
            "gold_tokens": len(targets),
            "kl": round(float((full.exp() * (full - row)).sum(-1).mean()), 6),
            "nll": round(float(-row.gather(1, targets).mean()), 6),
            "full_nll": round(float(-full.gather(1, targets).mean()), 6),
            "bytes": sum(layer.n_slots * size for layer, size in zip(layers, slot_bytes, strict=True)),
        }


def text_items(loaded: LoadedModel, folder: Path, half: str, gold_tokens: int) -> Iterator[Item]:
    """Beginnings of contexts in this half, one data set after the other in turn; texts seen before are left out."""
    rows: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    for dataset in DATASETS:
        for number, line in enumerate((folder / f"{dataset}.jsonl").read_text(encoding="utf-8").splitlines()):
            context = json.loads(line)["context"]
            digest = hashlib.sha256(context[:1000].encode()).digest()
            if len(context) >= MIN_CHARACTERS and digest not in seen and (digest[0] % 2 == 0) == (half == "dev"):
                rows.setdefault(dataset, []).append((f"{dataset}-{number}", context))
            seen.add(digest)
    for turn in range(max(map(len, rows.values()))):
        for name, context in (texts[turn] for texts in rows.values() if turn < len(texts)):
            ids = loaded.tokenizer(context[:CHARACTERS], add_special_tokens=False)["input_ids"]
            if len(ids) > PROMPT_TOKENS + gold_tokens:
                yield Item(
                    name, tuple(ids[:PROMPT_TOKENS]), tuple(ids[PROMPT_TOKENS : PROMPT_TOKENS + gold_tokens + 1])
                )


def synthetic_items(loaded: LoadedModel, kind: str, half: str, n_samples: int) -> Iterator[Item]:
    """Samples of a synthetic task with this half's seed, questions included, and their answers' tokens."""
    seed, lengths, per_cell = SEEDS[half], (1536,), -(-n_samples // len(DEPTHS))
    task: Task
    if kind == "passkey":
        task = PassKey(depths=DEPTHS, samples_per_cell=per_cell, seed=seed, lengths=lengths)
    elif kind == "niah":
        task = NeedleInHaystack(depths=DEPTHS, samples_per_cell=per_cell, seed=seed, lengths=lengths)
    else:
        task = FewShot(lengths=lengths, samples_per_length=n_samples, seed=seed)
    for sample in task.all_samples():
        space = " " if sample.answer_prefix and not sample.answer_prefix[-1].isspace() else ""
        gold = loaded.tokenizer.encode(space + sample.answers[0], add_special_tokens=False)
        yield Item(sample.id, encode_sample(sample, loaded).input_ids, tuple(gold))


def task_items(loaded: LoadedModel, half: str, settings: Sequence[str], gold_tokens: int) -> Iterator[Item]:
    """LongBench prompts of this half, one data set after the other in turn, and their first answers' tokens."""
    rows: list[list[Item]] = []
    for dataset in ENGLISH:
        plan = build_plan(composed([f"task=longbench/{dataset}", "method=full", *settings]))
        rows.append([])
        for sample in plan.task.all_samples():
            digest = hashlib.sha256(sample.prompt[:1000].encode()).digest()
            if half == "all" or (digest[0] % 2 == 0) == (half == "dev"):
                gold = loaded.tokenizer.encode(sample.answers[0], add_special_tokens=False)[:gold_tokens]
                ids = encode_sample(sample, loaded).input_ids
                if len(gold) > 1 and len(ids) >= MIN_TOKENS:
                    rows[-1].append(Item(f"{dataset}-{sample.id}", ids, tuple(gold)))
    for turn in range(max(map(len, rows))):
        yield from (items[turn] for items in rows if turn < len(items))


def make_arms(methods: Sequence[str], budgets: Sequence[float]) -> list[Arm]:
    """Arms from "name" or "name:option=value:option=value" at every budget."""
    arms = []
    for method in methods:
        name, *pairs = method.split(":")
        options = {}
        for option, value in (pair.split("=") for pair in pairs):
            options[option] = value if value.isidentifier() else json.loads(value)
        arms += [Arm.of(build_policy(name, {**options, "budget": budget})) for budget in budgets]
    return arms


def main() -> None:
    """Run trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="folder of LongBench rows")
    parser.add_argument("--half", choices=("dev", "held", "all"), default="dev")
    parser.add_argument("--kinds", nargs="+", default=["text"], choices=("text", "passkey", "fewshot", "niah", "tasks"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="samples of each kind to pass over first")
    parser.add_argument("--gold-tokens", type=int, default=128)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=["model=smollm2-135m", "model.device=cpu"], help="Hydra overrides")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new sample after this time")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    loaded = load_model(build_plan(composed(["task=demo", "method=full", *arguments.set])).model)
    arms = make_arms(arguments.methods, arguments.budgets)
    out: Path = arguments.out
    done = set()
    if out.exists():
        with out.open(newline="") as file:
            done = {(line["kind"], line["sample"], line["arm"]) for line in csv.DictReader(file)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        items = {
            kind: text_items(loaded, arguments.texts, arguments.half, arguments.gold_tokens)
            if kind == "text"
            else task_items(loaded, arguments.half, arguments.set, arguments.gold_tokens)
            if kind == "tasks"
            else synthetic_items(loaded, kind, arguments.half, arguments.skip + arguments.samples)
            for kind in arguments.kinds
        }
        for number in range(
            arguments.skip + arguments.samples
        ):  # the kinds in turn, so that an interrupted run has some of each
            for kind, source in items.items():
                late = time.monotonic() > deadline
                if late or (item := next(source, None)) is None or number < arguments.skip:
                    continue
                left = [arm for arm in arms if (kind, item.name, arm.key) not in done]
                for measured in trial(loaded, item, left) if left else ():
                    writer.writerow({"kind": kind, "half": arguments.half, "sample": item.name, **measured})
                file.flush()


if __name__ == "__main__":
    main()
