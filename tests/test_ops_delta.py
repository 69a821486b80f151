"""The gated delta rule in chunks, and the short convolution, against their recurrences: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.convolution import CONVOLUTION, convolve, convolve_decode, convolve_prefill, convolve_step
from cispo.ops.delta import DELTA, delta_decode, delta_prefill
from cispo.ops.reference import convolution_recurrence, delta_recurrence

HEADS, KEY, VALUE, CHANNELS, WIDTH = 4, 8, 6, 5, 4
KINDS = ["per head", "per channel"]
LENGTHS = {
    "ragged": [5, 17, 1, 130, 64, 33],
    "empty documents": [0, 3, 0, 0, 70, 0],
    "one-token documents": [1, 1, 1, 1],
    "equal and short": [25] * 8,
    "a whole number of chunks": [128],
    "one token": [1],
    "only an empty document": [0],
    "no document": [],
}

Op = Callable[..., tuple[Tensor, Tensor | None]]
# Loosely typed: the tests hand over five inputs at once.
rule: Op = DELTA.packed
recurrence: Callable[..., tuple[Tensor, Tensor]] = delta_recurrence
prefill: Callable[..., Tensor] = delta_prefill
decode: Callable[..., Tensor] = delta_decode


def bounds_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(lengths: Sequence[int], kind: str, groups: int = HEADS) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, g, beta in float64, cu_seqlens and initial states; decays from none at all to exp(-12) a token."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k = (F.normalize(draw(tokens, groups, KEY), dim=-1) for _ in range(2))
    shape = (tokens, HEADS, KEY) if kind == "per channel" else (tokens, HEADS)
    g = -12 * torch.rand(shape, dtype=torch.float64) ** 4
    beta = torch.rand(tokens, HEADS, dtype=torch.float64)
    inputs = [q * KEY**-0.5, k, draw(tokens, HEADS, VALUE), g, beta]
    return inputs, bounds_of(lengths), draw(len(lengths), HEADS, KEY, VALUE)


def outputs_and_gradients(op: Op, inputs: Sequence[Tensor], state: Tensor | None) -> list[Tensor]:
    """Outputs and final states, and the gradients of a random projection of both; op takes (*inputs, state)."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *(() if state is None else (state,)))]
    output, final = op(*leaves, *([None] if state is None else []))
    assert final is not None
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in (output, final):
        loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    # Without a token the recurrence touches no leaf: its gradient is zero.
    none = [None] * len(leaves)
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else none
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return [output.detach(), final.detach(), *gradients]


def check(ours: Sequence[Tensor | None], theirs: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest value of each tensor."""
    for number, (mine, exact) in enumerate(zip(ours, theirs, strict=True)):
        assert mine is not None and mine.shape == exact.shape and torch.isfinite(mine).all(), number
        if exact.numel():
            error = (mine.double() - exact.double()).abs().max()
            assert error <= tolerance * exact.abs().max().clamp(min=1e-3), f"{number}: {float(error):.1e}"


def test_hand_worked_numbers() -> None:
    """One head, K = V = 2, scale 2^-1/2, in both forms: the numbers were worked out without a program."""
    q = torch.tensor([[1, 0], [1, 1], [0, 2]], dtype=torch.float64)
    k = torch.tensor([[3, 4], [0, 1], [1, 0]], dtype=torch.float64)
    q, k = (F.normalize(x, dim=-1)[:, None] for x in (q, k))
    v = torch.tensor([[1, 2], [2, 0], [0, 1]], dtype=torch.float64)[:, None]
    beta = torch.tensor([1, 0.5, 1], dtype=torch.float64)[:, None]
    half = log(0.5)
    heads = (
        torch.tensor([0, half, half], dtype=torch.float64),
        [[0.424264, 0.848528], [0.75, 0.5], [0.424264, 0.141421]],
        [[0, 1], [0.6, 0.2]],
    )
    channels = (
        torch.tensor([[0, 0], [half, 0], [0, half]], dtype=torch.float64),
        [[0.424264, 0.848528], [0.85, 0.7], [0.494975, 0.282843]],
        [[0, 1], [0.7, 0.4]],
    )
    for decays, outputs, final in (heads, channels):
        g = decays[:, None]
        for op in (recurrence, lambda *x: rule(*x, output_final_state=True)):
            o, state = op(q * 2**-0.5, k, v, g, beta, bounds_of([3]))
            assert state is not None
            torch.testing.assert_close(o[:, 0], torch.tensor(outputs, dtype=torch.float64), rtol=0, atol=1e-6)
            torch.testing.assert_close(state[0, 0], torch.tensor(final, dtype=torch.float64), rtol=0, atol=1e-12)


def test_hand_worked_convolution() -> None:
    """w = (.5, -1, 2, 1), x = 1..5: 1, 4, 6, 8.5, 11 before SiLU; a second document starts again."""
    x, weight = torch.tensor([1.0, 2, 3, 4, 5, 7, 1])[:, None], torch.tensor([[0.5, -1, 2, 1]])
    sums = torch.tensor([1, 4, 6, 8.5, 11, 7, 15])[:, None]
    for op in (convolution_recurrence, lambda *x: convolve(*x, output_final_state=True)):
        y, states = op(x, weight, bounds_of([5, 2]))
        assert states is not None
        torch.testing.assert_close(y, sums * torch.sigmoid(sums))
        assert states[:, :, 0].tolist() == [[3, 4, 5], [0, 7, 1]]


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_chunks_equal_the_recurrence_in_float64(lengths: list[int], kind: str, with_state: bool) -> None:
    """1e-11: the same float64 terms in another order; every chunk size from a token on, every input's gradient."""
    inputs, cu_seqlens, state = make(lengths, kind, groups=2)
    initial = state if with_state else None
    exact = outputs_and_gradients(lambda *x: recurrence(*x[:5], cu_seqlens, x[5]), inputs, initial)
    for chunk in (1, 4, 64):
        ours = outputs_and_gradients(
            lambda *x, c=chunk: rule(*x[:5], cu_seqlens, x[5], True, chunk_size=c), inputs, initial
        )
        check(ours, exact, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_2e6_of_the_float64_recurrence(kind: str) -> None:
    """Relative to the largest value; 1,000 tokens in a document, and documents around a chunk."""
    inputs, cu_seqlens, state = make([1000, 63, 64, 65, 1], kind)
    with torch.no_grad():
        exact = recurrence(*inputs, cu_seqlens, state)
        ours = rule(*(x.float() for x in inputs), cu_seqlens, state.float(), True)
    check(ours, exact, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_decay_costs_the_next_tokens_no_digits(kind: str) -> None:
    """e^-3000 at the chunk's start, then almost none: a difference of running sums in float32 would keep 4 digits."""
    inputs, cu_seqlens, state = make([64], kind)
    inputs[3] = inputs[3].new_full(inputs[3].shape, -1e-3)
    inputs[3][1] = -3000
    exact = outputs_and_gradients(lambda *x: recurrence(*x[:5], cu_seqlens, x[5]), inputs, state)
    ours = outputs_and_gradients(
        lambda *x: rule(*x[:5], cu_seqlens, x[5], True), [x.float() for x in inputs], state.float()
    )
    check(ours, exact, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_keys_without_decay(kind: str) -> None:
    """All keys alike and beta 1: the system of a chunk is at its worst, and each token overwrites the last one."""
    inputs, cu_seqlens, state = make([100], kind)
    inputs[1] = inputs[1][:1].expand_as(inputs[1])
    inputs[3], inputs[4] = torch.zeros_like(inputs[3]), torch.ones_like(inputs[4])
    exact = recurrence(*inputs, cu_seqlens, state)
    ours = rule(*(x.float() for x in inputs), cu_seqlens, state.float(), True)
    check(ours, exact, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_document(kind: str) -> None:
    """Outputs, final states and gradients of the documents beside it are the same to the bit."""
    inputs, cu_seqlens, state = make([20, 70, 9], kind)
    conv_state, weight = draw(3, WIDTH - 1, CHANNELS), draw(CHANNELS, WIDTH)
    x = draw(99, CHANNELS)
    clean, dirty = slice(20, 90), [20, 89]
    for op, tensors, initial in (
        (lambda *a: rule(*a[:5], cu_seqlens, a[5], True), inputs, state),
        (lambda *a: convolve(a[0], weight, cu_seqlens, a[1], True), [x], conv_state),
    ):
        before = outputs_and_gradients(op, tensors, initial)
        spoiled = [t.clone() for t in tensors]
        for t in spoiled:
            t[dirty[0] - 1], t[dirty[1] + 1] = torch.nan, torch.nan
        bad = initial.clone()
        bad[0], bad[2] = torch.nan, torch.nan
        after = outputs_and_gradients(op, spoiled, bad)
        for number, (mine, theirs) in enumerate(zip(after, before, strict=True)):
            own = slice(1, 2) if number in (1, len(before) - 1) else clean
            assert torch.equal(mine[own], theirs[own]), number


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_computed_in_float32(kind: str) -> None:
    """Only inputs and output are rounded: the result is the rounded float32 result, bit for bit, autocast or not."""
    inputs, cu_seqlens, _ = make([40, 90], kind)
    rounded = [x.bfloat16() for x in inputs]
    output, state = rule(*rounded, cu_seqlens, output_final_state=True)
    wide, wide_state = rule(*(x.float() for x in rounded), cu_seqlens, output_final_state=True)
    assert state is not None and wide_state is not None and state.dtype == torch.float32
    assert torch.equal(output, wide.bfloat16()) and torch.equal(state, wide_state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rule(*(x.float() for x in rounded), cu_seqlens)[0], wide)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_one_call(kind: str) -> None:
    """A prompt, tokens one by one, a continuation in chunks: states in place, every output that of one call."""
    inputs, cu_seqlens, state = make([90, 90], kind, groups=2)
    exact, exact_state = recurrence(*inputs, cu_seqlens, state)
    rows = [x.unflatten(0, (2, 90)) for x in inputs]
    outputs = [torch.empty(2, 0, HEADS, VALUE, dtype=torch.float64)]
    start = 0
    for size in (30, 1, 1, 17, 1, 40):
        part = [x[:, start : start + size] for x in rows]
        if size == 1:
            held = state
            outputs.append(DELTA.step(*(x[:, 0] for x in part), state)[:, None])
            assert state is held
        else:
            o, final = DELTA.packed(*(x.flatten(0, 1) for x in part), bounds_of([size] * 2), state, True)
            assert final is not None
            outputs.append(o.unflatten(0, (2, size)))
            state = final
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1).flatten(0, 1), exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, exact_state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_by_slot(kind: str) -> None:
    """Slots in any order, a stale NaN under a fresh document, unused slots untouched, padding without output."""
    lengths = [7, 1, 40]
    inputs, cu_seqlens, _ = make(lengths, kind)
    fresh, slots = torch.tensor([True, False, True]), torch.tensor([4, 1, 2], dtype=torch.int32)
    cache = draw(6, HEADS, KEY, VALUE)
    cache[4], cache[2], cache[5] = torch.nan, torch.nan, torch.nan
    kept = cache.clone()
    start = torch.where(fresh[:, None, None, None], 0.0, cache[slots.long()])
    exact, states = recurrence(*inputs, cu_seqlens, start)
    output = prefill(*inputs, cu_seqlens, cache, slots, fresh)
    check([output, cache[slots.long()]], [exact, states], 1e-11)

    tokens, _, _ = make([3], kind)
    exact, after = recurrence(*tokens, bounds_of([1, 1, 1]), cache[torch.tensor([1, 0, 4])].clone())
    cache[3] = torch.nan
    blank = recurrence(*(x[1:2] for x in tokens), bounds_of([1]))
    slots, fresh = torch.tensor([1, 3, 4, -1]), torch.tensor([False, True, False, False])
    padded = [torch.cat((x, torch.full_like(x[:1], torch.nan))) for x in tokens]
    output = decode(*padded, cache, slots, fresh)
    check([output[[0, 2]], cache[[1, 4]]], [exact[[0, 2]], after[[0, 2]]], 1e-11)
    check([output[1:2], cache[3:4]], [*blank], 1e-11)
    assert not output[3].any() and torch.equal(cache[0], kept[0]) and cache[5].isnan().all()


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_convolution_equals_the_recurrence(lengths: list[int], width: int, with_state: bool) -> None:
    torch.manual_seed(0)
    inputs = [draw(sum(lengths), CHANNELS), draw(CHANNELS, width)]
    initial, cu_seqlens = draw(len(lengths), width - 1, CHANNELS) if with_state else None, bounds_of(lengths)
    exact = outputs_and_gradients(lambda x, w, s: convolution_recurrence(x, w, cu_seqlens, s), inputs, initial)
    ours = outputs_and_gradients(lambda x, w, s: convolve(x, w, cu_seqlens, s, True), inputs, initial)
    check(ours, exact, 1e-12)


def test_convolution_in_bfloat16_rounds_inputs_and_outputs_alone() -> None:
    torch.manual_seed(0)
    x, weight, cu_seqlens = draw(30, CHANNELS).bfloat16(), draw(CHANNELS, WIDTH).bfloat16(), bounds_of([2, 28])
    y, states = convolve(x, weight, cu_seqlens, output_final_state=True)
    wide, wide_states = convolve(x.float(), weight.float(), cu_seqlens, output_final_state=True)
    assert states is not None and wide_states is not None and states.dtype == torch.float32
    assert torch.equal(y, wide.bfloat16()) and torch.equal(states, wide_states)


def test_convolution_steps_equal_one_call() -> None:
    """A prompt shorter than the window, then tokens one by one."""
    torch.manual_seed(0)
    x, weight, cu_seqlens = draw(2, 12, CHANNELS), draw(CHANNELS, WIDTH), bounds_of([12, 12])
    exact, final = convolution_recurrence(x.flatten(0, 1), weight, cu_seqlens)
    y, states = CONVOLUTION.packed(x[:, :2].flatten(0, 1), weight, bounds_of([2, 2]), output_final_state=True)
    assert states is not None
    outputs = [y.unflatten(0, (2, 2)), *(convolve_step(x[:, t], weight, states)[:, None] for t in range(2, 12))]
    torch.testing.assert_close(torch.cat(outputs, 1).flatten(0, 1), exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(states, final)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_by_slot(width: int) -> None:
    torch.manual_seed(0)
    weight, cache, lengths = draw(CHANNELS, width), draw(6, width - 1, CHANNELS), [7, 1, 0]
    x = draw(sum(lengths), CHANNELS)
    cache[4], cache[5] = torch.nan, torch.nan
    kept = cache.clone()
    slots, fresh = torch.tensor([4, 1, 2], dtype=torch.int32), torch.tensor([True, False, False])
    start = torch.where(fresh[:, None, None], 0.0, cache[slots.long()])
    exact, states = convolution_recurrence(x, weight, bounds_of(lengths), start)
    output = convolve_prefill(x, weight, bounds_of(lengths), cache, slots, fresh)
    check([output, cache[slots.long()]], [exact, states], 1e-12)

    x = draw(4, CHANNELS)
    cache[3], x[3] = torch.nan, torch.nan
    slots, fresh = torch.tensor([1, 3, 4, -1]), torch.tensor([False, True, False, False])
    start = torch.where(fresh[:3, None, None], 0.0, cache[slots[:3]])
    exact, states = convolution_recurrence(x[:3], weight, bounds_of([1, 1, 1]), start)
    output = convolve_decode(x, weight, cache, slots, fresh)
    check([output[:3], cache[slots[:3]]], [exact, states], 1e-12)
    assert not output[3].any() and torch.equal(cache[0], kept[0]) and cache[5].isnan().all()
