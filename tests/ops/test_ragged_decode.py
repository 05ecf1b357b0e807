"""Ragged decode attention, torch and Triton version on the same inputs, against the textbook formula in fp64."""

import itertools

import pytest
import torch
from policy_inputs import relative_rms

from kvbench.ops.ragged_decode import Blocks, DecodePlan, ragged_decode

NAN = float("nan")


def make_plan(lengths, n_heads, n_kv_heads, head_dim, dtype=torch.float32, device="cpu", biased=(), wanted=(), room=3):
    """Rows of `lengths` (a number, or one per head); whatever must not be read is NaN."""
    per_head = [[n] * n_kv_heads if isinstance(n, int) else list(n) for n in lengths]
    total = sum(n + room for row in per_head for n in row)
    (keys, values), bias = torch.full((2, total, head_dim), NAN), torch.full((total,), NAN)
    offsets, blocks, attention_offsets, n_attention, start = [], [], [], 0, 0
    for row, row_lengths in enumerate(per_head):
        first_bias = start if row in biased else -1
        blocks.append(Blocks(start, row_lengths, room, not isinstance(lengths[row], int), first_bias))
        offsets.append([])
        for n in row_lengths:
            offsets[-1].append(start)
            filled = slice(start, start + n + 1)
            keys[filled], values[filled] = torch.randn(2, n + 1, head_dim)
            bias[filled] = torch.randn(n + 1) if row in biased else NAN
            start += n + room
        attention_offsets.append(n_attention if row in wanted else -1)
        n_attention += n_heads * (row_lengths[0] + 1) if row in wanted else 0
    attention = torch.full((n_attention,), NAN, device=device) if wanted else None
    views = {}
    for row in wanted:
        span = n_heads * (per_head[row][0] + 1)
        views[row] = attention[attention_offsets[row] :][:span].view(n_heads, -1)
    bias_offsets = [firsts if row in biased else [-1] * n_kv_heads for row, firsts in enumerate(offsets)]
    return DecodePlan(
        keys=keys.to(device, dtype), values=values.to(device, dtype), offsets=torch.tensor(offsets, device=device),
        lengths=torch.tensor(per_head, dtype=torch.int32, device=device), bias=bias.to(device) if biased else None,
        bias_offsets=torch.tensor(bias_offsets, device=device), attention=attention,
        attention_offsets=torch.tensor(attention_offsets, device=device), attention_views=views,
        max_slots=max(n for row in per_head for n in row) + room, blocks=blocks, grown=[0] * len(blocks),
        layer_index=0, policies=[None] * len(blocks), step_index=torch.zeros(len(blocks), dtype=torch.int64),
    )  # fmt: skip


def textbook(query, plan, scaling, softcap=None):
    """Output `(B, H, D)` fp64 and one `(H_k, G, n)` attention list per row, head by head from the device tables."""
    n_rows, n_heads, head_dim = query.shape
    n_kv_heads = plan.offsets.shape[1]
    grouped = query.double().view(n_rows, n_kv_heads, -1, head_dim)
    output, attention = torch.zeros_like(grouped), []
    for row in range(n_rows):
        attention.append([])
        for head in range(n_kv_heads):
            first, n = int(plan.offsets[row, head]), int(plan.lengths[row, head]) + 1
            logits = grouped[row, head] @ plan.keys[first : first + n].double().T * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if plan.bias_offsets[row, head] >= 0:
                logits += plan.bias[int(plan.bias_offsets[row, head]) :][:n].double()
            attention[row].append(logits.softmax(-1))
            output[row, head] = attention[row][head] @ plan.values[first : first + n].double()
    return output.view(n_rows, n_heads, head_dim), attention


TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

CASES = [
    pytest.param([1, 37, 130], 4, 4, 64, (), (1,), id="mha"),
    pytest.param([200, 5], 9, 3, 64, (0,), (0, 1), id="groups-of-3-with-bias"),
    pytest.param([70, 70], 8, 2, 80, (0, 1), (), id="head-dim-80"),
    pytest.param([3, 65], 8, 1, 128, (), (0,), id="group-of-8"),
    pytest.param([[3, 90], 64, [150, 1]], 6, 2, 64, (2,), (1,), id="ragged-heads"),
    pytest.param([[3, 90], 64], 2, 2, 80, (0,), (), id="ragged-heads-mha"),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("lengths", "n_heads", "n_kv_heads", "head_dim", "biased", "wanted"), CASES)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_decode(kernels, lengths, n_heads, n_kv_heads, head_dim, biased, wanted, dtype, request):
    decode, device = ragged_decode, "cpu"
    if kernels == "triton":
        device = request.getfixturevalue("triton_device")
        if device.type == "cpu" and dtype == torch.bfloat16 and n_heads != n_kv_heads:
            pytest.skip("Triton's interpreter multiplies the bit patterns of bf16 in tl.dot: needs a GPU")
        from kvbench.ops.ragged_decode_triton import ragged_decode as decode
    torch.manual_seed(0)
    plan = make_plan(lengths, n_heads, n_kv_heads, head_dim, dtype, device, biased, wanted)
    query = torch.randn(len(lengths), n_heads, head_dim).to(device, dtype)
    scaling = head_dim**-0.5
    expected, expected_attention = textbook(query, plan, scaling)
    output, attention = decode(query, plan, scaling, wanted)
    assert output.dtype == dtype
    assert output.shape == query.shape
    for row in range(len(lengths)):
        assert relative_rms(output[row], expected[row]) < TOLERANCES[dtype]
    assert sorted(attention) == sorted(wanted)
    for row, weights in attention.items():
        assert weights.dtype == torch.float32
        assert weights.shape == (n_heads, lengths[row] + 1)
        assert relative_rms(weights, torch.cat(expected_attention[row])) < TOLERANCES[dtype]


def test_soft_capped_logits():
    torch.manual_seed(0)
    plan = make_plan([30, [3, 9]], 4, 2, 16, biased=(0,), wanted=(0,))
    query = torch.randn(2, 4, 16) * 4
    expected, expected_attention = textbook(query, plan, 0.5, softcap=2.0)
    output, attention = ragged_decode(query, plan, 0.5, (0,), softcap=2.0)
    assert relative_rms(output, expected) < 2e-6
    assert relative_rms(attention[0], torch.cat(expected_attention[0])) < 2e-6
    assert relative_rms(ragged_decode(query, plan, 0.5)[0], expected) > 0.1


def test_attention_of_ragged_heads_is_refused():
    plan = make_plan([[3, 9]], 2, 2, 16)
    with pytest.raises(ValueError, match="ragged"):
        ragged_decode(torch.randn(1, 2, 16), plan, 0.25, (0,))


def test_query_of_any_layout(triton_device):
    """Models hand over transposed views: `(B, 1, H, D)` memory seen as `(B, H, D)`."""
    from kvbench.ops import ragged_decode_triton as decode_triton

    plan = make_plan([20, 4], 4, 2, 16, device=triton_device)
    query = torch.randn(4, 2, 16).to(triton_device).transpose(0, 1)
    expected, _ = textbook(query.contiguous(), plan, 0.25)
    for decode in (ragged_decode, decode_triton.ragged_decode):
        assert relative_rms(decode(query, plan, 0.25)[0], expected) < 2e-6


def test_write_token(triton_device):
    from kvbench.ops.ragged_decode_triton import write_token

    plan = make_plan([[3, 7], 5], 2, 2, 80, device=triton_device)
    before = plan.keys.clone()
    new_keys = torch.randn(2, 1, 2, 80).to(triton_device).transpose(1, 2)
    new_values = torch.randn(2, 2, 1, 80).to(triton_device)
    write_token(new_keys, new_values, plan)
    slots = (plan.offsets + plan.lengths).view(-1)
    assert torch.equal(plan.keys[slots], new_keys.reshape(4, 80))
    assert torch.equal(plan.values[slots], new_values.reshape(4, 80))
    others = torch.ones(len(before), dtype=torch.bool)
    others[slots.cpu()] = False
    assert torch.equal(plan.keys[others.to(triton_device)].nan_to_num(), before[others.to(triton_device)].nan_to_num())


@pytest.mark.usefixtures("triton_device")
def test_split_size():
    from kvbench.ops.ragged_decode_triton import MAX_SPLITS, split_slots

    for n_blocks, n_slots in itertools.product([3, 32, 448], [1, 64, 3628, 131072]):
        slots = split_slots(n_blocks, n_slots)
        assert slots & (slots - 1) == 0
        assert slots >= max(64, n_slots / MAX_SPLITS)
