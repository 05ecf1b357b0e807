import pytest

from kvbench.errors import ConfigError
from kvbench.tasks.base import Mix
from kvbench.tasks.synthetic import FewShot, PassKey


def test_parts_take_turns_and_keep_their_limits():
    mix = Mix(tasks={"a": PassKey(limit=2), "b": FewShot(limit=4)})
    assert [s.dataset for s in mix.samples()] == ["passkey", "fewshot", "passkey", "fewshot", "fewshot", "fewshot"]
    assert [s for s in mix.samples() if s.dataset == "fewshot"] == FewShot(limit=4).samples()
    mix = Mix(tasks={"a": PassKey(), "b": FewShot()}, limit=4)
    assert [s.dataset for s in mix.samples()] == ["passkey", "fewshot"] * 2


def test_no_parts_and_a_sample_that_occurs_twice_are_refused():
    with pytest.raises(ConfigError, match=r"sample passkey-1024-0\.1-0-0 occurs twice"):
        Mix(tasks={"a": PassKey(), "b": PassKey(limit=1)}).samples()
    with pytest.raises(ConfigError, match="mixes 0 tasks"):
        Mix().samples()
