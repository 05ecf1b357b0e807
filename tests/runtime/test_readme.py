"""The README's and the how-to's snippets, run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from small_decoders import build, padded, prompt

import kvbench
from kvbench.models.random_llama import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEEP = {"num_hidden_layers": 12}  # KVMerger leaves three layers whole by default


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_s_snippet(capsys):
    (code,) = [block for block in blocks("README.md") if "kvbench.compress" in block]
    model, inputs = build("llama", **DEEP), {"input_ids": prompt(60)}
    names = {"model": model, "inputs": inputs}
    exec(code, names)
    with kvbench.compress(model, kvbench.KVMerger(budget=0.35)):
        assert torch.equal(names["output"], model.generate(**inputs, max_new_tokens=64))
    assert "kvmerger, budget 0.35 requested, 0.3500 measured in 12 of 12 layers" in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("docs/api.md"), ids=lambda code: code.splitlines()[0].lstrip("# "))
def test_the_how_to_s_snippets(code):
    prompts = [prompt(60, seed=1), prompt(50, seed=2)]
    names = {
        "kvbench": kvbench,
        "model": build("llama", **DEEP),
        "inputs": {"input_ids": prompt(60)},
        "batch": padded(prompts),
        "tokenizer": byte_tokenizer(512),
    }
    exec(code, names)
