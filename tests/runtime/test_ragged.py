"""RaggedCache: what is written is what is attended to, and decoding through it equals transformers' DynamicCache."""

import math
import weakref

import pytest
import torch
from cache_cases import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    OldestOut,
    Scores,
    Whole,
    add_prompt,
    decode,
    make_cache,
    make_model,
)
from transformers import Cache, DynamicCache

from kvbench.errors import ConfigError
from kvbench.methods.base import CompressedLayer, LayerStates
from kvbench.runtime.cache import RaggedCache


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that nobody wrote holds NaN, so reading it cannot go unnoticed."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def relative_rms(actual, expected):
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("n_kv_heads", [2, 6])
@torch.no_grad()
def test_full_rows_of_different_lengths_decode_like_dynamic_cache(n_kv_heads):
    model = make_model(n_kv_heads)
    cache = make_cache(model)
    lengths, n_new = [11, 40, 23], 9
    expected, tokens = [], torch.randint(97, (3, n_new))
    for row, length in enumerate(lengths):
        prompt = torch.randint(97, (1, length))
        past = DynamicCache()
        model(prompt, past_key_values=past, use_cache=True)
        add_prompt(cache, Whole(), past, length, n_new)
        reference = [model(t.view(1, 1), past_key_values=past, use_cache=True).logits[0, -1] for t in tokens[row]]
        expected.append(torch.stack(reference))
    expected = torch.stack(expected)
    actual = decode(model, cache, tokens)
    assert (actual.argmax(-1) == expected.argmax(-1)).all()
    assert relative_rms(actual, expected) < 1e-5
    assert cache.get_seq_length() == max(lengths) + n_new
    assert cache.position_ids.flatten().tolist() == [length + n_new for length in lengths]
    assert cache.backends == {"torch"}


@torch.no_grad()
def test_stepping_row_equals_sliding_window_over_the_last_slots():
    """OldestOut keeps the last m tokens, so it must agree with attention over explicitly sliced keys and values."""
    model = make_model(2)
    cache = make_cache(model)
    n_tokens, n_new, policy = 20, 17, OldestOut(budget=0.4)
    prompt, tokens = torch.randint(97, (1, n_tokens)), torch.randint(97, (2, n_new))
    past = DynamicCache()
    model(prompt, past_key_values=past, use_cache=True)
    add_prompt(cache, policy, past, n_tokens, n_new)
    add_prompt(cache, Whole(), past, n_tokens, n_new)
    window = policy.budget_tokens(n_tokens)
    for layer in past.layers:
        layer.keys, layer.values = layer.keys[:, :, -window:], layer.values[:, :, -window:]
    expected = []
    for index, token in enumerate(tokens[0]):
        position = torch.tensor([[n_tokens + index]])
        out = model(token.view(1, 1), position_ids=position, past_key_values=past, use_cache=True)
        expected.append(out.logits[0, -1])
        for layer in past.layers:
            layer.keys, layer.values = layer.keys[:, :, -window:], layer.values[:, :, -window:]
    actual = decode(model, cache, tokens)
    assert relative_rms(actual[0], torch.stack(expected)) < 1e-5


@torch.no_grad()
def test_keep_rows_and_clear():
    model = make_model(2)
    cache = make_cache(model)
    tokens = torch.randint(97, (3, 8))
    pasts, lengths, rows = [], [9, 14, 30], []
    for length in lengths:
        past = DynamicCache()
        model(torch.randint(97, (1, length)), past_key_values=past, use_cache=True)
        pasts.append(past)

    def fill():
        for past, length, policy in zip(pasts, lengths, (Whole(), OldestOut(budget=0.5), Whole()), strict=True):
            rows.append(add_prompt(cache, policy, past, length, 8))

    fill()
    alone = decode(model, cache, tokens)
    address = cache._layers[0].keys.storage.data_ptr()
    key = cache.graph_key
    cache.clear()
    assert cache.rows == 0
    assert cache.get_seq_length() == 0
    fill()
    assert (cache._layers[0].keys.storage.data_ptr(), cache.graph_key) == (address, key)
    first = decode(model, cache, tokens[:, :3])
    cache.keep_rows([2, 1])
    assert cache.rows == 2
    second = decode(model, cache, tokens[[2, 1], 3:6])
    row = add_prompt(cache, Whole(), pasts[0], lengths[0], 8)  # a newcomer while the others are under way
    third = decode(model, cache, torch.cat((tokens[[2, 1], 6:], tokens[:1, :2])))
    assert row == 2
    assert relative_rms(first, alone[:, :3]) < 1e-5
    assert relative_rms(second, alone[[2, 1], 3:6]) < 1e-5
    assert relative_rms(third, torch.cat((alone[[2, 1], 6:], alone[:1, :2]))) < 1e-5


def random_layer(n_kv_heads, n_slots, head_dim=HEAD_DIM, dtype=torch.float32, **parts):
    keys, values = torch.randn(2, n_kv_heads, n_slots, head_dim).to(dtype)
    return CompressedLayer(keys, values, torch.arange(n_slots).expand(n_kv_heads, -1), **parts)


def dense(query, keys, values, scaling, bias=0.0):
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
    cache.write(0, cache.add_row(Whole(), 12, room), layer)
    cache.write(0, cache.add_row(Whole(), 7, room), random_layer(n_kv_heads, 7))
    assert cache.row_slots(0) == [sum(lengths)]
    assert cache._layers[0].keys.used == sum(lengths) + n_kv_heads * room + n_kv_heads * (7 + room)
    seen = [(layer.keys[h, :n], layer.values[h, :n]) for h, n in enumerate(lengths)]
    for _ in range(room):
        query, new = torch.randn(2, N_HEADS, 1, HEAD_DIM), torch.randn(2, 2, n_kv_heads, 1, HEAD_DIM)
        cache.update(new[0], new[1], 0)
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
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    short, long = random_layer(2, 5), random_layer(2, 9)
    cache.write(0, cache.add_row(Whole(), 5, 2), short)
    cache.write(0, cache.add_row(Whole(), 9, 20), long)
    for _ in range(6):
        new = torch.randn(2, 2, 2, 1, HEAD_DIM)
        cache.update(new[0], new[1], 0)
        cache.attend(0, new[0], new[0], new[1], 1.0)
        cache.advance()
    kept = cache._layer(0).read(cache._blocks(1)[0], cache._grown[1])
    assert torch.equal(kept.keys[:, :9], long.keys)
    assert cache._plans[0].lengths.tolist() == [[6, 6], [15, 15]]
    assert cache._plans[0].grown == [1, 6]


@pytest.mark.parametrize(("budget", "steps"), [(1.0, False), (0.5, True), (0.35, True)])
def test_bytes_stay_within_one_percent_of_the_budget(budget, steps):
    """MHA, fp16, D = 128, 3,500 tokens: target 5 of the speed sheet."""
    n_tokens, n_heads, head_dim = 3500, 4, 128
    policy = OldestOut(budget=budget) if steps else Whole()
    cache = RaggedCache(2, n_heads, n_heads, head_dim, torch.float16)
    row = cache.add_row(policy, n_tokens, 128)
    for index in range(2):
        keys = torch.zeros(n_heads, n_tokens, head_dim, dtype=torch.float16)
        states = LayerStates(keys, keys, index, 2, n_heads)
        cache.write(index, row, policy.compress(states, policy.budget_tokens(n_tokens)))
    full = 2 * 2 * n_heads * n_tokens * head_dim * 2
    ratio = cache.row_bytes(row) / (budget * full)
    slots = math.floor(budget * n_tokens)
    expected = 2 * n_heads * slots * head_dim * 4
    if steps:
        expected = 2 * (n_heads * (slots + 1) * (head_dim * 4 + 4) + 8)
    assert cache.row_bytes(row) == expected
    assert 0.999 <= ratio <= 1.01
    assert cache.row_slots(row) == [n_heads * slots] * 2
    room = 1 if steps else 128
    assert cache._layers[0].keys.used == n_heads * (slots + room)


def test_reserve_fixes_the_addresses():
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    cache.reserve([2000])
    for _ in range(3):
        cache.write(0, cache.add_row(Whole(), 50, 8), random_layer(2, 50))
    arena = cache._layers[0].keys
    assert (len(arena.storage), arena.moves) == (2048, 1)
    kept = arena.storage[:50].clone()
    cache.write(0, cache.add_row(Whole(), 900, 8), random_layer(2, 900))
    assert (len(arena.storage), arena.moves) == (2304, 2)
    assert torch.equal(arena.storage[:50], kept)


@pytest.mark.parametrize("clear", [True, False])
def test_the_storage_of_a_grown_arena_is_let_go_of(clear):
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    cache.write(0, cache.add_row(Whole(), 50, 8), random_layer(2, 50))
    cache.prepare()
    old = [weakref.ref(arena.storage) for arena in (cache._layers[0].keys, cache._layers[0].values)]
    if clear:
        cache.clear()
    cache.write(0, cache.add_row(Whole(), 900, 8), random_layer(2, 900))
    assert [reference() for reference in old] == [None, None]
    cache.prepare()


def test_the_graph_key_tells_when_a_captured_step_is_stale():
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    cache.reserve([2000])

    def batch(*lengths, room=8):
        cache.clear()
        for length in lengths:
            cache.write(0, cache.add_row(Whole(), length, room), random_layer(2, length))
        return cache.graph_key

    first = batch(250, 100)
    assert batch(250, 100) == first
    assert batch(300, 30) == first  # other lengths, same launch grid
    assert batch(250, 100, 100) != first
    assert batch(250, 100) == first
    assert batch(1250, 100) != first  # the pools have moved
    assert batch(250, 100) != first


def test_is_a_transformers_cache():
    cache = RaggedCache(N_LAYERS, 2, 2, HEAD_DIM, torch.float32)
    assert isinstance(cache, Cache)
    assert not cache.is_compileable
    assert cache.get_mask_sizes(1, 0) == (1, 0)
    assert cache.is_sliding == [False] * N_LAYERS
    with pytest.raises(TypeError, match="keep_rows"):
        cache.reorder_cache(torch.tensor([0]))


def test_refusals():
    cache = RaggedCache(2, 2, 2, HEAD_DIM, torch.float32, max_rows=2)
    with pytest.raises(RuntimeError, match="no rows"):
        cache.prepare()
    row = cache.add_row(Whole(), 5, 2)
    with pytest.raises(ValueError, match=r"keys have shape \(2, 5, 8\)"):
        cache.write(0, row, random_layer(2, 5, head_dim=8))
    with pytest.raises(ValueError, match="float16"):
        cache.write(0, row, random_layer(2, 5, dtype=torch.float16))
    with pytest.raises(ValueError, match="bias has shape"):
        cache.write(0, row, random_layer(2, 5, bias=torch.zeros(2, 4)))
    cache.write(0, row, random_layer(2, 5))
    with pytest.raises(ValueError, match="written already"):
        cache.write(0, row, random_layer(2, 5))
    with pytest.raises(RuntimeError, match=r"lacks layers \[1\]"):
        cache.prepare()
    stepping = cache.add_row(OldestOut(), 5, 2)
    with pytest.raises(ValueError, match="ragged"):
        cache.write(0, stepping, random_layer(2, 5, lengths=torch.tensor([5, 4])))
    with pytest.raises(ConfigError, match="max_rows=2"):
        cache.add_row(Whole(), 5, 2)
    with pytest.raises(ValueError, match="distinct"):
        cache.keep_rows([0, 0])
    cache.keep_rows([0])
    with pytest.raises(ValueError, match="room_tokens=0"):
        cache.add_row(Whole(), 5, 0)
    with pytest.raises(ConfigError, match="no multiple"):
        RaggedCache(1, 3, 2, HEAD_DIM, torch.float32)


def test_replayed_steps_are_counted_by_the_device():
    """A replayed graph runs only the device's half of `advance`; the host catches up when the batch changes."""
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    for length in (5, 7):
        cache.write(0, cache.add_row(Whole(), length, 6), random_layer(2, length))
    cache.prepare()
    for _ in range(4):
        cache.advance_device()
    cache.keep_rows([1])
    cache.prepare()
    assert cache.position_ids.tolist() == [[11]]
    assert cache._plans[0].lengths.tolist() == [[11, 11]]
    assert cache._plans[0].grown == [4]


def test_written_in_inference_mode_and_decoded_outside():
    cache = RaggedCache(1, 2, 2, HEAD_DIM, torch.float32)
    with torch.inference_mode():
        layer = random_layer(2, 6, state=Scores(torch.zeros(2, 6), torch.tensor(7)))
        cache.write(0, cache.add_row(OldestOut(), 6, 3), layer)
        cache.prepare()
    with torch.no_grad():
        new = torch.randn(1, 2, 1, HEAD_DIM)
        cache.update(new, new, 0)
        cache.attend(0, new, new, new, 1.0)
        cache.advance()
    assert torch.equal(cache._layer(0).keys.storage[0], new[0, 0, 0])
    assert cache.position_ids.tolist() == [[7]]


def test_backends_agree_on_growing_stepping_biased_and_ragged_rows(triton_device):
    """OldestOut has no one-launch step, so the Triton backend hands it views of its attention buffer."""
    caches = {}
    for backend in ("torch", "triton"):
        cache = caches[backend] = RaggedCache(1, 4, 2, HEAD_DIM, torch.float32, backend)
        torch.manual_seed(0)
        rows = [
            (OldestOut(), 5, {"state": Scores(torch.zeros(2, 5), torch.tensor(7))}),
            (Whole(), 9, {"bias": torch.randn(2, 9)}),
            (OldestOut(), 3, {"state": Scores(torch.zeros(2, 3), torch.tensor(7))}),
            (Whole(), 6, {"lengths": torch.tensor([6, 2])}),
        ]
        for policy, length, parts in rows:
            layer = random_layer(2, length, **parts)
            for name in ("keys", "values", "bias", "lengths"):
                if getattr(layer, name) is not None:
                    setattr(layer, name, getattr(layer, name).to(triton_device))
            if layer.state is not None:
                layer.state = Scores(layer.state.scores.to(triton_device), layer.state.seed.to(triton_device))
            cache.write(0, cache.add_row(policy, length, 4), layer)
    for _ in range(4):
        query, new = (
            torch.randn(4, 4, 1, HEAD_DIM).to(triton_device),
            torch.randn(2, 4, 2, 1, HEAD_DIM).to(triton_device),
        )
        outputs = []
        for cache in caches.values():
            cache.update(new[0], new[1], 0)
            outputs.append(cache.attend(0, query, new[0], new[1], 0.25))
            cache.advance()
        assert relative_rms(outputs[1], outputs[0]) < 1e-6
    states = [[slots.state.scores for _, slots in cache._plans[0].steps.values()] for cache in caches.values()]
    assert len(states[0]) == len(states[1]) == 2
    assert all(relative_rms(b, a) < 1e-6 for a, b in zip(*states, strict=True))
    assert caches["triton"].backends == {"triton"}
    assert caches["triton"].capturable
    assert not caches["torch"].capturable
