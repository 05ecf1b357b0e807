"""scripts/compare_official.py with what needs no clone: our methods keep what kvpress keeps on a random model."""

from pathlib import Path

import pytest
import torch

from kvbench.models.config import named_config
from kvbench.models.load import load_model

pytestmark = pytest.mark.integration("kvpress")


@pytest.fixture(scope="module")
def layers():
    model = load_model(named_config("tiny-random", device="cpu")).model
    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
        import compare_official

        generator = torch.Generator().manual_seed(1)
        input_ids = torch.randint(3, 250, (1, 8 + 256 + 256 + 4), generator=generator)  # whole tiles for Compactor
        yield compare_official, compare_official.observed(model, input_ids, input_ids[:, :4], [0, 1])


@pytest.mark.parametrize("budget", [0.5, 0.35])
@pytest.mark.parametrize("name", ["keydiff", "lagkv", "chunkkv", "compactor"])
def test_the_same_slots_and_scores_as_kvpress(layers, name, budget):
    compare_official, observed = layers
    for layer in observed:
        with torch.no_grad():
            outcome = compare_official.METHODS[name][0](layer, budget)
        assert outcome.agreement >= (0.97 if name == "lagkv" else 1.0)  # its ranks are tied between partitions
        assert outcome.error < 1e-4
