"""GPU hours that each table of the paper needs, from measured speed: the table in docs/scale.md.

    python scripts/gpu_hours.py                      all experiments of configs/experiment
    python scripts/gpu_hours.py --by-task longbench  one of them, task by task

Seconds for a sample with n arms, from one speed document (rows 2, 3 and 7 of `scripts/bench_speed.py`, 3,500 tokens):

    prefill and fork     measured for 3,500 tokens, x prompt tokens / 3,500
    generation           (new tokens - 1) x (step of seven arms + (n - 7) x what one more arm costs a token)
    gold answer          at most 64 tokens x the share of a step that reads caches: its rows ride in the same batch

It is an upper bound where answers stop before their limit or prompts are shorter than the cut. Loading the model,
compiling and capturing (about a minute a process) come on top.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.metrics.longbench import ROWS
from kvbench.paper import ExperimentPart, experiment_names, experiment_parts, merged_plans
from kvbench.plan import Plan
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.ruler import Ruler
from kvbench.tasks.zeroscrolls import ZeroScrolls

SPEED = Path(__file__).resolve().parent.parent / "results" / "speed"
MODELS = {"llama2-7b-chat": "h100_llama2_7b.json", "llama2-13b-chat": "h100_llama2_13b.json"}
CHARACTERS_PER_TOKEN = 4

NEW_TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "2wikimqa": 32, "gov_report": 512, "multi_news": 512,
    "trec": 64, "triviaqa": 32, "passage_retrieval_en": 32,
}  # fmt: skip
"""Generation limits of LongBench's config/dataset2maxlen.json at commit 2e00731f, for the data sets of the paper."""

RULER_NEW_TOKENS = 128  # of its needle tasks; the others have 30 to 120
ZEROSCROLLS_VALIDATION_ROWS = 20  # "about 20 rows", see kvbench/tasks/zeroscrolls.py


@dataclass(frozen=True)
class Speed:
    """What was measured on one GPU for one model, prompts of 3,500 tokens.

    Attributes:
        device: name of the GPU.
        prompt_tokens: of the measurement.
        fork_s: prefill of a prompt and compression into seven arms, seconds.
        step_s: one decode step of seven arms, seconds.
        arm_token_s: what one more arm adds, per new token, seconds.
        cache_share: share of a step's bytes that are caches, not weights.
        sample_s: one sample with seven arms and 128 new tokens, seconds; not used but to check the sum.
    """

    device: str
    prompt_tokens: int
    fork_s: float
    step_s: float
    arm_token_s: float
    cache_share: float
    sample_s: float

    @classmethod
    def of(cls, document: dict[str, Any]) -> Speed:
        """Take the numbers out of a document of `scripts/bench_speed.py`."""
        rows = {(row["row"], row["case"]): row for row in document["rows"] if row["row"] in (2, 3, 7)}
        fork, step = rows[2, "3,500 tokens"], rows[3, "3,500 tokens"]
        one_more = rows[7, "3,500 tokens, 128 new"]
        cache_bytes = sum(step["details"]["cache_bytes"].values())
        return cls(
            device=document["device"],
            prompt_tokens=3500,
            fork_s=fork["seconds"]["forked"]["p50"],
            step_s=step["details"]["step_seconds"],
            arm_token_s=one_more["value"] * one_more["seconds"]["full"]["p50"] / 128,
            cache_share=cache_bytes / (cache_bytes + step["details"]["weight_bytes"]),
            sample_s=one_more["seconds"]["arms"]["p50"],
        )

    def seconds(self, prompt_tokens: int, new_tokens: int, gold_tokens: int, n_arms: int) -> float:
        """Seconds for one sample, as the top of this file says."""
        step_s = self.step_s + (n_arms - 7) * self.arm_token_s
        prefill_s = self.fork_s * prompt_tokens / self.prompt_tokens
        return prefill_s + (new_tokens - 1) * step_s + gold_tokens * self.cache_share * step_s


def workload(plan: Plan) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of each sample of a plan, without reading benchmark data."""
    limit = plan.model.max_prompt_tokens or sys.maxsize
    if isinstance(plan.task, LongBench):
        return [(limit, NEW_TOKENS[plan.task.dataset])] * ROWS[plan.task.dataset]
    if isinstance(plan.task, ZeroScrolls):
        return [(limit, plan.task.max_new_tokens)] * ZEROSCROLLS_VALIDATION_ROWS
    if isinstance(plan.task, Ruler):
        return [(min(limit, plan.task.length), RULER_NEW_TOKENS)] * plan.task.n_samples
    return [(min(limit, len(s.prompt) // CHARACTERS_PER_TOKEN), s.max_new_tokens) for s in plan.task.samples()]


def plan_hours(plan: Plan, speed: Speed) -> float:
    """GPU hours of one plan."""
    n_arms = len(plan.arms)
    return sum(speed.seconds(prompt, new, plan.gold_tokens, n_arms) for prompt, new in workload(plan)) / 3600


def table(parts: dict[str, list[ExperimentPart]], speeds: dict[str, Speed]) -> list[str]:
    """Lines of a Markdown table: one row for each experiment, and one for all of them together.

    Args:
        parts: parts by experiment, of one model: the others have the same tasks and arms.
        speeds: by model.
    """
    lines = [
        "| experiment | tasks | samples | arms | " + " | ".join(f"{model}, hours" for model in speeds) + " |",
        "|---|---|---|---|" + "---|" * len(speeds),
    ]
    lines += [_row(name, [part.plan for part in group], speeds) for name, group in parts.items()]
    everything = merged_plans([part for group in parts.values() for part in group])
    return [*lines, _row("all, on shared prefills", everything, speeds)]


def _row(name: str, plans: list[Plan], speeds: dict[str, Speed]) -> str:
    arms = sorted({len(plan.arms) for plan in plans})
    cells = [
        name,
        str(len(plans)),
        f"{sum(len(workload(plan)) for plan in plans):,}",
        str(arms[0]) if len(arms) == 1 else f"{arms[0]} to {arms[-1]}",
        *(f"{sum(plan_hours(plan, speed) for plan in plans):.2f}" for speed in speeds.values()),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by-task", metavar="EXPERIMENT", default=None, help="this experiment, task by task")
    options = parser.parse_args()
    speeds = {model: Speed.of(json.loads((SPEED / file).read_text())) for model, file in MODELS.items()}
    names = [options.by_task] if options.by_task else [name for name in experiment_names() if name != "demo_tables"]
    model = next(iter(speeds))
    parts = {name: experiment_parts(name, [model]) for name in names}
    if options.by_task:
        parts = {part.task: [part] for part in parts[options.by_task]}
    print("\n".join(table(parts, speeds)))
    for model, speed in speeds.items():
        computed = speed.seconds(3500, 128, 0, 7)
        print(
            f"{model} on {speed.device}: 7 arms, 3,500 tokens, 128 new: {computed:.3f} s by this arithmetic, "
            f"{speed.sample_s:.3f} s measured"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
