"""RaggedCache: what is written is what is attended to; decoding through it equals transformers' DynamicCache."""

import math
import re
import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from policy_inputs import relative_rms
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvbench.errors import ConfigError
from kvbench.methods.base import CONSTANT, CompressedLayer, LayerStates, Policy
from kvbench.methods.full import Full
from kvbench.runtime.attention import attention_implementation
from kvbench.runtime.cache import RaggedCache

N_HEADS, HEAD_DIM, N_LAYERS = 6, 16, 3
SHAPE = (1, 2, 2, HEAD_DIM, torch.float32)


@dataclass
class Scores:
    scores: torch.Tensor
    seed: torch.Tensor = field(metadata=CONSTANT)


@dataclass(frozen=True, kw_only=True)
class OldestOut(Policy):
    """Keeps the last slots; a new token replaces the oldest. State counts attention, as H2O's does."""

    name: ClassVar[str] = "oldest_out"
    steps: ClassVar[bool] = True

    def compress(self, layer, budget_tokens):
        kept = slice(layer.n_tokens - budget_tokens, None)
        state = Scores(torch.zeros(layer.n_kv_heads, budget_tokens), torch.tensor(7))
        return CompressedLayer(layer.keys[:, kept], layer.values[:, kept], state=state)

    def step(self, slots, attention):
        n_heads, n_slots, _ = slots.keys.shape
        assert slots.state.scores.shape == (n_heads, n_slots)
        assert (slots.state.scores[:, -1] == 0).all()
        assert int(slots.state.seed) == 7
        slots.state.scores += attention.unflatten(0, (n_heads, -1)).mean(1)
        slots.move_new_token((slots.step_index % (n_slots - 1)).view(1))


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that nobody wrote holds NaN, so reading it cannot go unnoticed."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def random_layer(n_kv_heads, n_slots, head_dim=HEAD_DIM, dtype=torch.float32, **parts):
    keys, values = torch.randn(2, n_kv_heads, n_slots, head_dim).to(dtype)
    return CompressedLayer(keys, values, **parts)


def put(cache, n_slots, room, policy=None, **parts):
    """Add a row of one layer with random slots."""
    layer = random_layer(cache.n_kv_heads, n_slots, **parts)
    cache.write(0, cache.add_row(policy or Full(), n_slots, room), layer)
    return layer


# ---- through a model -------------------------------------------------------------------------------------------------


def make_model(n_kv_heads):
    torch.manual_seed(n_kv_heads)
    config = LlamaConfig(
        vocab_size=97, hidden_size=N_HEADS * HEAD_DIM, intermediate_size=64, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=n_kv_heads, max_position_embeddings=256,
        attn_implementation="eager", initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), RaggedCache(N_LAYERS, N_HEADS, n_kv_heads, HEAD_DIM, torch.float32)


def read(model, n_tokens):
    """What the model keeps of a random prompt."""
    past = DynamicCache()
    model(torch.randint(97, (1, n_tokens)), past_key_values=past, use_cache=True)
    return past


def add_prompt(cache, policy, past, room_tokens):
    n_tokens = past.get_seq_length()
    row = cache.add_row(policy, n_tokens, room_tokens)
    for index, layer in enumerate(past.layers):
        states = LayerStates(layer.keys[0], layer.values[0], index, len(past.layers), cache.n_query_heads)
        cache.write(index, row, policy.compress(states, policy.budget_tokens(n_tokens)))
    return row


@torch.no_grad()
def decode(model, cache, tokens):
    """Feed `tokens (B, n)` one by one; returns the logits `(B, n, vocabulary)`."""
    logits = []
    with attention_implementation(model):
        for column in tokens.unbind(1):
            ids = {"input_ids": column[:, None], "position_ids": cache.position_ids}
            out = model(**ids, past_key_values=cache, use_cache=True, attention_context=cache)
            assert out.past_key_values is cache
            cache.advance()
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("n_kv_heads", [2, 6])
@torch.no_grad()
def test_full_rows_of_different_lengths_decode_like_dynamic_cache(n_kv_heads):
    model, cache = make_model(n_kv_heads)
    lengths, n_new = [11, 40, 23], 9
    expected, tokens = [], torch.randint(97, (3, n_new))
    for length, row in zip(lengths, tokens, strict=True):
        past = read(model, length)
        add_prompt(cache, Full(), past, n_new)
        reference = [model(t.view(1, 1), past_key_values=past, use_cache=True).logits[0, -1] for t in row]
        expected.append(torch.stack(reference))
    expected = torch.stack(expected)
    actual = decode(model, cache, tokens)
    assert (actual.argmax(-1) == expected.argmax(-1)).all()
    assert relative_rms(actual, expected) < 1e-5
    assert cache.get_seq_length() == max(lengths) + n_new
    assert cache.position_ids.flatten().tolist() == [length + n_new for length in lengths]
    assert cache.kernels_used == {"torch"}


@torch.no_grad()
def test_stepping_row_equals_sliding_window_over_the_last_slots():
    """OldestOut keeps the last m tokens, so it must agree with attention over explicitly sliced keys and values."""
    model, cache = make_model(2)
    n_tokens, n_new, policy = 20, 17, OldestOut(budget=0.4)
    tokens, past = torch.randint(97, (2, n_new)), read(model, n_tokens)
    add_prompt(cache, policy, past, n_new)
    add_prompt(cache, Full(), past, n_new)
    window = policy.budget_tokens(n_tokens)
    expected = []
    for index, token in enumerate(tokens[0]):
        for layer in past.layers:
            layer.keys, layer.values = layer.keys[:, :, -window:], layer.values[:, :, -window:]
        position = torch.tensor([[n_tokens + index]])
        out = model(token.view(1, 1), position_ids=position, past_key_values=past, use_cache=True)
        expected.append(out.logits[0, -1])
    assert relative_rms(decode(model, cache, tokens)[0], torch.stack(expected)) < 1e-5


@torch.no_grad()
def test_keep_rows_and_clear():
    model, cache = make_model(2)
    tokens, pasts = torch.randint(97, (3, 8)), [read(model, length) for length in (9, 14, 30)]

    def fill():
        for past, policy in zip(pasts, (Full(), OldestOut(budget=0.5), Full()), strict=True):
            add_prompt(cache, policy, past, 8)

    fill()
    alone = decode(model, cache, tokens)
    address, key = cache._layers[0].keys.storage.data_ptr(), cache.graph_key
    cache.clear()
    assert (cache.rows, cache.get_seq_length()) == (0, 0)
    fill()
    assert (cache._layers[0].keys.storage.data_ptr(), cache.graph_key) == (address, key)
    first = decode(model, cache, tokens[:, :3])
    cache.keep_rows([2, 1])
    assert cache.rows == 2
    second = decode(model, cache, tokens[[2, 1], 3:6])
    assert add_prompt(cache, Full(), pasts[0], 8) == 2  # a newcomer while the others are under way
    third = decode(model, cache, torch.cat((tokens[[2, 1], 6:], tokens[:1, :2])))
    assert relative_rms(first, alone[:, :3]) < 1e-5
    assert relative_rms(second, alone[[2, 1], 3:6]) < 1e-5
    assert relative_rms(third, torch.cat((alone[[2, 1], 6:], alone[:1, :2]))) < 1e-5


# ---- layer by layer --------------------------------------------------------------------------------------------------


def dense(query, keys, values, scaling, bias):
    """`(H, D)` query over `(H, n, D)`: the textbook formula in fp64."""
    logits = torch.einsum("hd,hnd->hn", query.double(), keys.double()) * scaling + bias
    return torch.einsum("hn,hnd->hd", logits.softmax(-1), values.double())


@pytest.mark.parametrize("with_bias", [False, True])
def test_ragged_heads_are_stored_without_padding(with_bias):
    torch.manual_seed(0)
    n_kv_heads, lengths, room = 3, [5, 12, 1], 4
    bias = torch.randn(n_kv_heads, 12) if with_bias else None
    layer = random_layer(n_kv_heads, 12, lengths=torch.tensor(lengths), bias=bias)
    for head, length in enumerate(lengths):  # padding must never be read
        layer.keys[head, length:] = float("nan")
        layer.values[head, length:] = float("nan")
    cache = RaggedCache(1, N_HEADS, n_kv_heads, HEAD_DIM, torch.float32)
    cache.write(0, cache.add_row(Full(), 12, room), layer)
    put(cache, 7, room)
    assert cache.row_slots(0) == [sum(lengths)]
    assert cache._layers[0].keys.used == sum(lengths) + n_kv_heads * room + n_kv_heads * (7 + room)
    seen = [(layer.keys[h, :n], layer.values[h, :n]) for h, n in enumerate(lengths)]
    for _ in range(room):
        query, new = torch.randn(2, N_HEADS, 1, HEAD_DIM), torch.randn(2, 2, n_kv_heads, 1, HEAD_DIM)
        output = cache.attend(0, query, new[0], new[1], 0.3)
        cache.advance()
        assert output.shape == (2, 1, N_HEADS, HEAD_DIM)
        for head, length in enumerate(lengths):
            keys, values = (torch.cat((seen[head][i], new[i][0, head])) for i in (0, 1))
            seen[head] = (keys, values)
            shift = torch.zeros(len(keys))
            if bias is not None:
                shift[:length] = bias[head, :length]
            queries = slice(head * 2, head * 2 + 2)
            expected = dense(query[0, queries, 0], keys.expand(2, -1, -1), values.expand(2, -1, -1), 0.3, shift)
            assert relative_rms(output[0, 0, queries], expected) < 1e-6


def test_a_row_past_its_room_harms_no_other():
    cache = RaggedCache(*SHAPE)
    put(cache, 5, 2)
    long = put(cache, 9, 20)
    for _ in range(6):
        new = torch.randn(2, 2, 2, 1, HEAD_DIM)
        cache.attend(0, new[0], new[0], new[1], 1.0)
        cache.advance()
    assert torch.equal(cache._layers[0].read(cache._blocks(1)[0], 6).keys[:, :9], long.keys)
    assert cache._plans[0].lengths.tolist() == [[6, 6], [15, 15]]
    assert cache._plans[0].grown == [1, 6]


@pytest.mark.parametrize(("budget", "steps"), [(1.0, False), (0.5, True), (0.35, True)])
def test_bytes_stay_within_one_percent_of_the_budget(budget, steps):
    """MHA, fp16, D = 128, 3,500 tokens: target 5 of the speed sheet."""
    n_tokens, n_heads, head_dim = 3500, 4, 128
    policy = OldestOut(budget=budget) if steps else Full()
    cache = RaggedCache(2, n_heads, n_heads, head_dim, torch.float16)
    past, keys = DynamicCache(), torch.zeros(1, n_heads, n_tokens, head_dim, dtype=torch.float16)
    for index in range(2):
        past.update(keys, keys, index)
    row = add_prompt(cache, policy, past, 128)
    full = 2 * 2 * n_heads * n_tokens * head_dim * 2
    slots = math.floor(budget * n_tokens)
    expected = 2 * n_heads * slots * head_dim * 4
    if steps:
        expected = 2 * (n_heads * (slots + 1) * (head_dim * 4 + 4) + 8)
    assert cache.row_bytes(row) == expected
    assert 0.999 <= cache.row_bytes(row) / (budget * full) <= 1.01
    assert cache.row_slots(row) == [n_heads * slots] * 2
    assert cache._layers[0].keys.used == n_heads * (slots + (1 if steps else 128))


def test_reserve_fixes_the_addresses():
    cache = RaggedCache(*SHAPE)
    cache.reserve([2000])
    for _ in range(3):
        put(cache, 50, 8)
    pool = cache._layers[0].keys
    assert (len(pool.storage), pool.moves) == (2048, 1)
    kept = pool.storage[:50].clone()
    put(cache, 900, 8)
    assert (len(pool.storage), pool.moves) == (2304, 2)
    assert torch.equal(pool.storage[:50], kept)


@pytest.mark.parametrize("clear", [True, False])
def test_the_storage_of_a_grown_pool_is_let_go_of(clear):
    cache = RaggedCache(*SHAPE)
    put(cache, 50, 8)
    cache.prepare()
    old = [weakref.ref(pool.storage) for pool in (cache._layers[0].keys, cache._layers[0].values)]
    if clear:
        cache.clear()
    put(cache, 900, 8)
    assert [reference() for reference in old] == [None, None]
    cache.prepare()


def test_the_graph_key_tells_when_a_captured_step_is_stale():
    cache = RaggedCache(*SHAPE)
    cache.reserve([2000])

    def batch(*lengths):
        cache.clear()
        for length in lengths:
            put(cache, length, 8)
        return cache.graph_key

    first = batch(250, 100)
    assert batch(250, 100) == first
    assert batch(300, 30) == first  # other lengths, same launch grid
    assert batch(250, 100, 100) != first
    assert batch(250, 100) == first
    assert batch(1250, 100) != first  # the pools have moved
    assert batch(250, 100) != first


def test_is_a_transformers_cache():
    cache = RaggedCache(*SHAPE)
    assert isinstance(cache, Cache)
    assert not cache.is_compileable
    assert cache.get_mask_sizes(1, 0) == (1, 0)
    assert cache.is_sliding == [False]
    with pytest.raises(TypeError, match="keep_rows"):
        cache.reorder_cache(torch.tensor([0]))


def test_refusals():
    cache = RaggedCache(2, 2, 2, HEAD_DIM, torch.float32, max_rows=2)
    with pytest.raises(RuntimeError, match="no rows"):
        cache.prepare()
    row = cache.add_row(Full(), 5, 2)
    for options, message in (
        ({"head_dim": 8}, r"keys have shape \(2, 5, 8\)"),
        ({"dtype": torch.float16}, "float16"),
        ({"bias": torch.zeros(2, 4)}, "bias has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.write(0, row, random_layer(2, 5, **options))
    cache.write(0, row, random_layer(2, 5))
    with pytest.raises(ValueError, match="written already"):
        cache.write(0, row, random_layer(2, 5))
    with pytest.raises(RuntimeError, match=r"lacks layers \[1\]"):
        cache.prepare()
    stepping = cache.add_row(OldestOut(budget=0.5), 5, 2)
    with pytest.raises(ValueError, match="ragged"):
        cache.write(0, stepping, random_layer(2, 5, lengths=torch.tensor([5, 4])))
    with pytest.raises(ConfigError, match="max_rows=2"):
        cache.add_row(Full(), 5, 2)
    with pytest.raises(ValueError, match="distinct"):
        cache.keep_rows([0, 0])
    cache.keep_rows([0])
    with pytest.raises(ValueError, match="room_tokens=0"):
        cache.add_row(Full(), 5, 0)
    with pytest.raises(ConfigError, match="no multiple"):
        RaggedCache(1, 3, 2, HEAD_DIM, torch.float32)


def test_replayed_steps_are_counted_by_the_device():
    """A replayed graph runs only the device's half of `advance`; the host catches up when the batch changes."""
    cache = RaggedCache(*SHAPE)
    put(cache, 5, 6)
    put(cache, 7, 6)
    cache.prepare()
    for _ in range(4):
        cache.advance_device()
    cache.keep_rows([1])
    assert cache.position_ids.tolist() == [[11]]
    assert (cache._plans[0].lengths.tolist(), cache._plans[0].grown) == ([[11, 11]], [4])


def test_written_in_inference_mode_and_decoded_outside():
    cache = RaggedCache(*SHAPE)
    with torch.inference_mode():
        put(cache, 6, 3, OldestOut(), state=Scores(torch.zeros(2, 6), torch.tensor(7)))
        cache.prepare()
    new = torch.randn(1, 2, 1, HEAD_DIM)
    cache.attend(0, new, new, new, 1.0)
    cache.advance()
    assert torch.equal(cache._layers[0].keys.storage[0], new[0, 0, 0])
    assert cache.position_ids.tolist() == [[7]]


def test_kernels_agree_on_growing_stepping_biased_and_ragged_rows(triton_device):
    """OldestOut has no one-launch step, so the Triton version hands it views of its attention buffer."""
    caches = {name: RaggedCache(1, 4, 2, HEAD_DIM, torch.float32, name) for name in ("torch", "triton")}
    with torch.device(triton_device):
        for cache in caches.values():
            torch.manual_seed(0)
            put(cache, 5, 4, OldestOut(), state=Scores(torch.zeros(2, 5), torch.tensor(7)))
            put(cache, 9, 4, bias=torch.randn(2, 9))
            put(cache, 3, 4, OldestOut(), state=Scores(torch.zeros(2, 3), torch.tensor(7)))
            put(cache, 6, 4, lengths=torch.tensor([6, 2]))
        for _ in range(4):
            query, (keys, values) = torch.randn(4, 4, 1, HEAD_DIM), torch.randn(2, 4, 2, 1, HEAD_DIM)
            outputs = [cache.attend(0, query, keys, values, 0.25) for cache in caches.values()]
            for cache in caches.values():
                cache.advance()
            assert relative_rms(outputs[1], outputs[0]) < 1e-6
    states = [[slots.state.scores for _, slots in cache._plans[0].steps.values()] for cache in caches.values()]
    assert len(states[0]) == len(states[1]) == 2
    assert all(relative_rms(b, a) < 1e-6 for a, b in zip(*states, strict=True))
    assert caches["triton"].kernels_used == {"triton"}
    assert [cache.capturable for cache in caches.values()] == [False, True]


# ---- rows that grow and are chosen anew ------------------------------------------------------------------------------

PROMPTS = [5, 9, 7]
KINDS = ["plain", "bias", "ragged", "state"]


def filled(kind, which, **room):
    """Two layers, four query and two KV heads; rows with the prompts `which`, in that order."""
    rows = RaggedCache(2, 4, 2, HEAD_DIM, torch.float32, "torch", max_rows=len(which))
    for index in which:
        rows.add_row(OldestOut() if kind == "state" else Full(), PROMPTS[index], **room)
    for layer in range(2):
        for row, index in enumerate(which):
            torch.manual_seed(10 * index + layer)
            n_slots = PROMPTS[index]
            kept = random_layer(2, n_slots, bias=torch.randn(2, n_slots) if kind in ("bias", "ragged") else None)
            if kind == "ragged":
                kept.lengths = torch.tensor([n_slots - 2, n_slots])
            if kind == "state":
                kept.state = Scores(torch.zeros(2, n_slots), torch.tensor(7))
            rows.write(layer, row, kept)
    return rows


def step(rows, which, token):
    """One token for every row; what it is depends on the prompt the row began with and on the step alone."""
    outputs = []
    rows.make_room()
    for layer in range(2):
        new = []
        for index in which:
            torch.manual_seed(1000 * token + 10 * index + layer)
            new.append(torch.randn(8, 1, HEAD_DIM))
        keys, values, query = torch.stack(new).split([2, 2, 4], 1)
        outputs.append(rows.attend(layer, query, keys, values, 0.5))
    rows.advance()
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_rows_are_as_if_they_had_been_there_from_the_start(kind):
    which = [0, 1, 2]
    rows = filled(kind, which)
    for token in range(3):
        step(rows, which, token)
    rows.choose([2, 0, 2])
    chosen = [2, 0, 2]
    expected = filled(kind, chosen)
    for token in range(3):
        step(expected, chosen, token)
    for token in range(3, 7):
        torch.testing.assert_close(step(rows, chosen, token), step(expected, chosen, token))
    rows.choose([0])
    assert rows.rows == 1
    torch.testing.assert_close(step(rows, [2], 7), step(expected, chosen, 7)[:, :1])
    assert rows.get_seq_length() == PROMPTS[2] + 8


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_made_whenever_it_is_used_up(kind):
    which = [1, 0]
    ample = filled(kind, which)
    tight = filled(kind, which, room_tokens=3)
    for token in range(11):
        torch.testing.assert_close(step(tight, which, token), step(ample, which, token))
    assert tight.get_seq_length() == ample.get_seq_length() == 9 + 11


def test_copied_rows_are_independent():
    rows = filled("plain", [0, 1])
    step(rows, [0, 1], 0)
    rows.choose([0, 0])
    twins = step(rows, [0, 0], 1)
    torch.testing.assert_close(twins[:, 0], twins[:, 1])
    apart = step(rows, [0, 2], 2)  # they get different tokens now
    assert not torch.equal(apart[:, 0], apart[:, 1])
    reference = filled("plain", [0])
    for token in range(3):
        expected = step(reference, [0], token)
    torch.testing.assert_close(apart[:, :1], expected)


def test_choosing_all_rows_in_order_copies_nothing_and_others_are_refused():
    rows = filled("plain", [0, 1])
    step(rows, [0, 1], 0)
    layer = rows._layers[0]
    rows.choose([0, 1])
    assert rows._layers[0] is layer
    for chosen in ([0, 2], [0, 1, 0]):
        with pytest.raises(ValueError, match=re.escape(f"rows {chosen} are not at most 2 indices below 2")):
            rows.choose(chosen)
