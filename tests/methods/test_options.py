"""Options outside their range are refused by name, budgets that a method cannot keep too; group reductions by hand."""

import pytest
import torch
from policy_inputs import make_layer

from kvbench.errors import BudgetError, ConfigError
from kvbench.methods.adakv import AdaKV
from kvbench.methods.base import reduce_groups
from kvbench.methods.cam import CaM
from kvbench.methods.d2o import D2O
from kvbench.methods.expected_attention import ExpectedAttention
from kvbench.methods.full import Full
from kvbench.methods.grkv import GRKV
from kvbench.methods.h2o import H2O
from kvbench.methods.keepkv import KeepKV
from kvbench.methods.knorm import Knorm
from kvbench.methods.kvmerger import KVMerger
from kvbench.methods.kvmerger_plus import KVMergerPlus
from kvbench.methods.options import require_bool, require_choice, require_count, require_number
from kvbench.methods.pyramidkv import PyramidKV
from kvbench.methods.registry import load_policies
from kvbench.methods.snapkv import SnapKV
from kvbench.methods.streaming_llm import StreamingLLM
from kvbench.methods.tova import TOVA

MISTAKES = [
    (AdaKV, {"base": H2O()}, r"base=H2O\(.*\) scores no keys: give a method of"),
    (AdaKV, {"floor_share": 1.1}, r"adakv\.floor_share=1\.1 is not a number from 0 to 1: give one, e\.g\. "),
    (CaM, {"start_share": 1.0}, r"start_share=1\.0 is not a number from 0 to 1 except 1: give one"),
    (CaM, {"merge_tokens": 0}, "merge_tokens=0 is not an integer of at least 1"),
    (ExpectedAttention, {"future_tokens": 0}, "future_tokens=0 is not an integer of at least 1"),
    (ExpectedAttention, {"epsilon": -1}, "epsilon=-1 is not a number of at least 0"),
    (ExpectedAttention, {"epsilon": float("inf")}, "epsilon=inf is not a number of at least 0"),
    (Full, {"budget": 0.5}, r"budget=0\.5 with method full"),
    (GRKV, {"base": H2O()}, "does not choose slots by scores, once, in each layer: give a method of"),
    (GRKV, {"base": Full()}, "does not choose slots by scores, once, in each layer"),
    (GRKV, {"refit": "keys"}, "refit='keys' is not one of both, values, none"),
    (H2O, {"budget": 0}, r"budget=0 is not in \(0, 1\]: give the fraction of the cache to keep, e\.g\. 0\.35"),
    (H2O, {"budget": float("nan")}, r"budget=nan is not in"),
    (H2O, {"budget": True}, r"budget=True is not in"),
    (H2O, {"group_reduce": "median"}, "group_reduce='median' is not one of mean, max, first"),
    (H2O, {"recent_share": -0.1}, r"recent_share=-0\.1 is not a number from 0 to 1"),
    (H2O, {"normalise_by_count": "yes"}, "normalise_by_count='yes' is not true or false"),
    (KeepKV, {"threshold": 1.5}, r"threshold=1\.5 is not a number from -1 to 1"),
    (KeepKV, {"recent_share": -0.1}, r"recent_share=-0\.1 is not a number from 0 to 1"),
    (KeepKV, {"start_tokens": -1}, "start_tokens=-1 is not an integer of at least 0"),
    (KeepKV, {"merge": 1}, "merge=1 is not true or false"),
    (Knorm, {"recent_tokens": 1.5}, r"recent_tokens=1\.5 is not an integer of at least 0"),
    (KVMerger, {"budget_mode": "ratio"}, "budget_mode='ratio' is not one of exact, threshold"),
    (KVMerger, {"linkage": "complete"}, "linkage='complete' is not one of chain, anchor"),
    (KVMerger, {"scope": "model"}, "scope='model' is not one of head, layer"),
    (KVMerger, {"sigma": 0.0}, r"sigma=0\.0 is not a number above 0: give one, e\.g\. sigma=5\.0"),
    (KVMerger, {"pivot": "first"}, "pivot='first' is not one of attention, random, last"),
    (KVMerger, {"value_scale": "sum"}, "value_scale='sum' is not one of count, mean, log_bias"),
    (KVMerger, {"whole_first_layers": -1}, "whole_first_layers=-1 is not an integer of at least 0"),
    (KVMerger, {"topk_fraction": 2.0}, r"topk_fraction=2\.0 is not a number from 0 to 1 or null"),
    (KVMergerPlus, {"kernel_tokens": 4}, "kernel_tokens=4 is not an integer of at least 1, odd so that"),
    (KVMergerPlus, {"refit": "keys"}, "refit='keys' is not one of values, both, none"),
    (KVMergerPlus, {"ridge": 0.0}, r"ridge=0\.0 is not a number above 0"),
    (PyramidKV, {"beta": 0}, "beta=0 is not an integer of at least 1"),
    (SnapKV, {"kernel_tokens": 4}, "kernel_tokens=4 is not an integer of at least 1, odd"),
    (SnapKV, {"pooling": "sum"}, "pooling='sum' is not one of max, avg"),
    (TOVA, {"keep_newest": "no"}, "keep_newest='no' is not true or false"),
]  # fmt: skip
TOO_SMALL = [
    (AdaKV(budget=0.2), 100, "20 slots; snapkv needs at least 33"),
    (CaM(budget=0.1), 30, "3 slots; cam needs at least 4"),
    (D2O(budget=0.35), 100, "140 slots per KV head; d2o needs 300 for 3 whole layers"),
    (H2O(budget=0.02), 180, r"budget 0\.02 of 180 tokens = 3 slots; h2o needs at least 4"),
    (KeepKV(budget=0.125), 40, "5 slots; keepkv needs at least 6"),
    (Knorm(budget=0.2, recent_tokens=8), 40, "8 slots; knorm needs at least 9"),
    (Knorm(budget=0.2, whole_first_layers=2), 40, r"32 slots per KV head; knorm needs 80 for 2 whole .*whole_first"),
    (KVMergerPlus(budget=0.2), 15, r"budget 0\.2 of 15 tokens = 3 slots; kvmerger_plus needs at least 4"),
    (PyramidKV(budget=0.2), 40, "8 slots; pyramidkv needs at least 9"),
    (SnapKV(budget=0.2), 150, r"budget 0\.2 of 150 tokens = 30 slots; snapkv needs at least 33"),
    (StreamingLLM(budget=0.1), 40, "4 slots; streaming_llm needs at least 5"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "options", "message"), MISTAKES, ids=lambda value: getattr(value, "name", None))
def test_an_option_out_of_range_is_named_with_value_limit_and_example(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        policy(**options)


@pytest.mark.parametrize(("policy", "n_tokens", "message"), TOO_SMALL, ids=lambda value: getattr(value, "name", None))
def test_a_budget_too_small_is_named_with_slots_and_limit(policy, n_tokens, message):
    with pytest.raises(BudgetError, match=message):
        policy.layer_budgets(n_tokens, 4)


@pytest.mark.parametrize("policy", [p for p in load_policies().values() if p().needs], ids=lambda policy: policy.name)
def test_what_the_prefill_did_not_observe_is_named(policy):
    layer = make_layer(2, 2, 60)
    layer.column_sums = layer.window_attention = None
    layer.extras = {}
    with pytest.raises(ValueError, match="was not observed by the prefill: add it to the method's needs"):
        policy().compress(layer, 40)


def test_checks_for_options_that_no_annotation_describes():
    for inside in (0.0, 1, 0.5):
        require_number("share", inside, 0.0, 1.0)
    require_count("n", 3, minimum=3)
    require_choice("mode", "a", ("a", "b"))
    require_bool("merge", False)
    for value in (-0.1, 1.1, float("nan"), True, "0.5", None):
        with pytest.raises(ConfigError, match=r"share=.* is not in \[0, 1\]"):
            require_number("share", value, 0.0, 1.0)
    for value in (2, 3.0, True, "3"):
        with pytest.raises(ConfigError, match="is not an integer >= 3"):
            require_count("n", value, minimum=3)
    with pytest.raises(ConfigError, match=r"share=0.0 is not in \(0, 1\]"):
        require_number("share", 0.0, 0.0, 1.0, include_low=False)
    with pytest.raises(ConfigError, match=r"share=1.0 is not in \[0, 1\)"):
        require_number("share", 1.0, 0.0, 1.0, include_high=False)
    with pytest.raises(ConfigError, match="mode='c' is not one of a, b"):
        require_choice("mode", "c", ("a", "b"))
    with pytest.raises(ConfigError, match="merge=1 is not true or false"):
        require_bool("merge", 1)


def test_group_reductions():
    scores = torch.tensor([[1.0, 5.0], [3.0, 1.0], [0.0, 0.0], [2.0, 4.0]])
    assert reduce_groups(scores, 2, "mean").tolist() == [[2.0, 3.0], [1.0, 2.0]]
    assert reduce_groups(scores, 2, "sum").tolist() == [[4.0, 6.0], [2.0, 4.0]]
    assert reduce_groups(scores, 2, "max").tolist() == [[3.0, 5.0], [2.0, 4.0]]
    assert reduce_groups(scores, 2, "first").tolist() == [[1.0, 5.0], [0.0, 0.0]]
    with pytest.raises(ConfigError, match="group_reduce='median' is not one of mean, max, first"):
        reduce_groups(scores, 2, "median")
