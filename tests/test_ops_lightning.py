"""Chunked lightning attention against the token recurrence, in float64 and float32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from cispo.ops.lightning import lightning_attention, lightning_decode, lightning_prefill
from cispo.ops.lightning_tiles import TILES, tiles_of
from cispo.ops.reference import lightning_attention_recurrence

HEADS, DIM = 3, 8
# The steepest slope of a 64-head model, an ordinary one, and one so flat that exp(-s) is 1 in bfloat16.
SLOPES = torch.tensor([0.917, 0.06, 1e-5])
LENGTHS = {
    "ragged": [5, 17, 1, 130, 64, 33],
    "empty documents": [0, 3, 0, 0, 70, 0],
    "one-token documents": [1, 1, 1, 1],
    "equal and short": [25] * 12,
    "one long among short": [9] * 20 + [300],
    "a whole number of chunks": [128],
    "one token": [1],
    "only an empty document": [0],
    "no document": [],
}


Qkv = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def make(lengths: list[int], dtype: torch.dtype) -> tuple[Qkv, Tensor, Tensor]:
    """q, k, v [T, H, D], cu_seqlens [S + 1] and an initial state [S, H, D, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), HEADS, DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    state = torch.randn(len(lengths), HEADS, DIM, DIM, generator=generator, dtype=torch.float64).to(dtype)
    return (q, k, v), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), state


def convert(qkv: Qkv, function: Callable[[Tensor], Tensor]) -> Qkv:
    q, k, v = map(function, qkv)
    return q, k, v


def outputs_and_gradients(attend: Attend, qkv: Qkv, state: Tensor | None) -> list[Tensor]:
    """Outputs and final states, and the gradients of a random projection of both."""
    q, k, v = convert(qkv, lambda x: x.clone().requires_grad_())
    state = None if state is None else state.clone().requires_grad_()
    output, final = attend(q, k, v, state)
    assert final is not None
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=output.dtype)
    for x in (output, final):
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
    leaves = [x for x in (q, k, v, state) if x is not None]
    # Without a token the recurrence touches no leaf: its gradient is zero.
    none = [None] * len(leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else none
    zeros = [torch.zeros_like(x) for x in leaves]
    return [output.detach(), final.detach(), *(z if g is None else g for z, g in zip(zeros, gradients, strict=True))]


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64, 100])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_chunked_equals_recurrence_in_float64(lengths: list[int], chunk_size: int, with_state: bool) -> None:
    """1e-10: both sum the same float64 terms in another order, over at most 300 tokens."""
    qkv, cu_seqlens, state = make(lengths, torch.float64)
    initial = state if with_state else None
    chunked = outputs_and_gradients(
        lambda q, k, v, s: lightning_attention(q, k, v, SLOPES, cu_seqlens, s, True, chunk_size), qkv, initial
    )
    recurrent = outputs_and_gradients(
        lambda q, k, v, s: lightning_attention_recurrence(q, k, v, SLOPES, cu_seqlens, s), qkv, initial
    )
    for ours, theirs in zip(chunked, recurrent, strict=True):
        assert ours.shape == theirs.shape
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[5, 17, 1, 130, 64, 33], [1500], [25] * 12])
def test_float32_is_within_1e5_of_the_float64_recurrence(lengths: list[int]) -> None:
    """Relative to the largest value: sums over up to 1,500 tokens of mixed sign."""
    qkv, cu_seqlens, state = make(lengths, torch.float64)
    exact = outputs_and_gradients(
        lambda q, k, v, s: lightning_attention_recurrence(q, k, v, SLOPES, cu_seqlens, s), qkv, state
    )
    single = outputs_and_gradients(
        lambda q, k, v, s: lightning_attention(q, k, v, SLOPES, cu_seqlens, s, True),
        convert(qkv, Tensor.float),
        state.float(),
    )
    for ours, theirs in zip(single, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_bfloat16_is_computed_in_float32() -> None:
    """Only the inputs and the output are rounded, so the result is the rounded float32 result, bit for bit."""
    qkv, cu_seqlens, _ = make([40, 200], torch.bfloat16)
    output, state = lightning_attention(*qkv, SLOPES, cu_seqlens, output_final_state=True)
    wide, wide_state = lightning_attention(*convert(qkv, Tensor.float), SLOPES, cu_seqlens, output_final_state=True)
    assert output.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    assert wide_state is not None
    assert torch.equal(output, wide.bfloat16())
    assert torch.equal(state, wide_state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = lightning_attention(*convert(qkv, Tensor.float), SLOPES, cu_seqlens)
    assert torch.equal(inside, wide)


def test_packed_equals_separate() -> None:
    lengths = LENGTHS["ragged"]
    qkv, cu_seqlens, state = make(lengths, torch.float64)
    output, final = lightning_attention(*qkv, SLOPES, cu_seqlens, state, True)
    assert final is not None
    for i, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
        alone = convert(qkv, lambda x, part=slice(start, start + length): x[part])
        one = torch.tensor([0, length], dtype=torch.int32)
        expected, expected_state = lightning_attention(*alone, SLOPES, one, state[i : i + 1], True)
        torch.testing.assert_close(output[start : start + length], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(final[i : i + 1], expected_state, rtol=1e-10, atol=1e-10)


def test_nothing_crosses_documents() -> None:
    """NaN in one document must not reach another, forward or backward (0 * NaN would)."""
    qkv, cu_seqlens, _ = make([30, 40, 100], torch.float64)
    for x in qkv:
        x[30:70] = float("nan")
        x.requires_grad_()
    output, _ = lightning_attention(*qkv, SLOPES, cu_seqlens)
    kept = torch.cat([output[:30], output[70:]])
    assert torch.isfinite(kept).all()
    kept.sum().backward()
    for x in qkv:
        assert x.grad is not None
        assert torch.isfinite(x.grad[:30]).all() and torch.isfinite(x.grad[70:]).all()
        assert x.grad[:30].abs().max() > 0


@pytest.mark.parametrize("split", [0, 1, 15, 16, 63, 64, 65, 99, 150])
def test_continuation_from_any_point_equals_one_pass(split: int) -> None:
    """Chunked prefill: the state after `split` tokens carries everything. Two documents are split at once."""
    lengths = [150, 150]
    qkv, cu_seqlens, _ = make(lengths, torch.float64)
    whole, whole_state = lightning_attention(*qkv, SLOPES, cu_seqlens, output_final_state=True)
    two = convert(qkv, lambda x: x.view(2, 150, HEADS, DIM))
    state, parts = None, []
    for part in (slice(0, split), slice(split, 150)):
        piece = convert(two, lambda x, part=part: x[:, part].flatten(0, 1))
        bounds = torch.tensor([0, 1, 2], dtype=torch.int32) * len(range(150)[part])
        output, state = lightning_attention(*piece, SLOPES, bounds, state, True)
        parts.append(output.view(2, -1, HEADS, DIM))
    torch.testing.assert_close(torch.cat(parts, 1).flatten(0, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-10)


def test_steep_slopes_and_long_documents_stay_finite() -> None:
    """e^{+s j} would overflow float32 from s j = 88 on; a slope of 5 over 2,000 tokens reaches 10,000."""
    (q, k, v), cu_seqlens, _ = make([2000], torch.float32)
    slopes = torch.tensor([5.0, 0.9, 0.0])
    output, state = lightning_attention(q, k, v, slopes, cu_seqlens, output_final_state=True)
    exact, exact_state = lightning_attention_recurrence(q.double(), k.double(), v.double(), slopes, cu_seqlens)
    assert torch.isfinite(output).all() and state is not None and torch.isfinite(state).all()
    assert (output - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (state - exact_state).abs().max() <= 1e-5 * exact_state.abs().max()


def test_prefill_and_decode_by_slot_equal_one_pass() -> None:
    """Two prompts of 30 and 1 tokens, then five tokens each, beside padding; other slots keep what they hold."""
    lengths, prompts = [35, 6], [30, 1]
    qkv, cu_seqlens, _ = make(lengths, torch.float64)
    whole, whole_state = lightning_attention(*qkv, SLOPES, cu_seqlens, output_final_state=True)
    cache = torch.full((5, HEADS, DIM, DIM), 7.0, dtype=torch.float64)
    slots, fresh = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([True, True])
    starts = cu_seqlens[:-1].tolist()
    q, k, v = convert(qkv, lambda x: torch.cat([x[s : s + n] for s, n in zip(starts, prompts, strict=True)]))
    bounds = torch.tensor([0, *accumulate(prompts)], dtype=torch.int32)
    outputs = [lightning_prefill(q, k, v, SLOPES, bounds, cache, slots, fresh)]
    padded = torch.tensor([3, -1, 1], dtype=torch.int32)
    for t in range(5):
        rows = [starts[0] + prompts[0] + t, 0, starts[1] + prompts[1] + t]
        q, k, v = convert(qkv, lambda x, rows=rows: x[rows])
        out = lightning_decode(q, k, v, SLOPES, cache, padded)
        assert not out[1].any()
        outputs.append(out[[0, 2]])
    order = [*range(30), 35, *(i for t in range(5) for i in (30 + t, 36 + t))]
    torch.testing.assert_close(torch.cat(outputs), whole[order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cache[slots.long()], whole_state, rtol=1e-10, atol=1e-10)
    assert bool((cache[[0, 2, 4]] == 7).all())


def test_a_card_has_tiles_of_its_own() -> None:
    """In bfloat16, where the table has them: other cards, dtypes and head dimensions take the tiles of any card."""
    assert tiles_of("NVIDIA H200", "dk_dv", torch.bfloat16, 256).overlapped
    for card, dtype, dim in (
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 256),
        ("NVIDIA H200", torch.float32, 256),
        ("NVIDIA H200", torch.bfloat16, 32),
    ):
        assert tiles_of(card, "dk_dv", dtype, dim) == TILES[dtype][dim]
        assert not TILES[dtype][dim].overlapped
