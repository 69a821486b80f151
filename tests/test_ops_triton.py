"""The kernels against the float64 definitions: float32 in Triton's interpreter on a CPU, float32 and bfloat16 on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_ops_triton.py

The interpreter multiplies bfloat16 bit patterns as if they were integers, so bfloat16 needs a GPU. Gluon has none:
`gluon_stand_in` runs its kernel as plain Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cispo.ops.lightning import lightning_attention, lightning_decode, lightning_prefill
from cispo.ops.lightning_tiles import Pass, Tiles
from cispo.ops.logprobs import fused_token_loss, token_logprobs
from cispo.ops.reference import lightning_attention_recurrence
from tests.gluon_stand_in import Launcher

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from cispo.ops import lightning_tiles, lightning_triton, logprobs_triton  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
DIMS = [16, 64, 96, 128, 256] if GPU else [8, 24]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of |ours - exact| / |exact| over a tensor; the inputs are rounded to the dtype before both."""

HEADS = 3
SLOPES = torch.tensor([0.917, 0.06, 1e-5])
LENGTHS = {
    "ragged": [5, 17, 1, 70, 33],
    "empty documents": [0, 3, 0, 0, 40, 0],
    "one-token documents": [1, 1, 1, 1],
    "one token": [1],
    "only an empty document": [0],
    "no document": [],
}

Qkv = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def chunk_of(dim: int, dtype: torch.dtype) -> int:
    padded = max(16, 1 << (dim - 1).bit_length())
    return lightning_tiles.tiles_of("", "out", dtype, padded).chunk


OVERLAPPED = {
    16: Tiles(16, 16, 1, 2, 1, True),
    32: Tiles(16, 16, 1, 3, 1, True),
    256: Tiles(16, 128, 8, 2, 1, True),
}
"""In plain Python, float32. A GPU has the tiles of an H200, in bfloat16."""


@pytest.fixture(params=["plain", "overlapped"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either kernel, with the tiles of any card, or those of one that overlaps."""
    card: dict[tuple[Pass, int], Tiles] = {}
    if request.param == "overlapped" and GPU:
        card = lightning_tiles.CARDS["H200"]
    elif request.param == "overlapped":
        monkeypatch.setitem(lightning_tiles.TILES, torch.float32, OVERLAPPED)
        file = Path(lightning_tiles.__file__).with_name("lightning_overlap.py")
        stand_in = SimpleNamespace(overlapped_kernel=Launcher(file, "overlapped_kernel"))
        monkeypatch.setitem(sys.modules, "cispo.ops.lightning_overlap", stand_in)
    monkeypatch.setattr(lightning_tiles, "CARDS", {"": card})


def make(lengths: list[int], dim: int, dtype: torch.dtype) -> tuple[Qkv, Tensor, Tensor]:
    """q, k, v [T, H, D], cu_seqlens [S + 1], states [S, H, D, D]; float64 on the CPU, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), HEADS, dim, generator=generator).to(dtype).double() for _ in range(3))
    state = torch.randn(len(lengths), HEADS, dim, dim, generator=generator).double()
    return (q, k, v), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), state


def place(qkv: Qkv, dtype: torch.dtype) -> Qkv:
    q, k, v = (x.to(DEVICE, dtype) for x in qkv)
    return q, k, v


def outputs_and_gradients(attend: Attend, qkv: Qkv, state: Tensor | None) -> list[Tensor]:
    """Outputs, final states, and the gradients of q, k, v and the state for the same random gradients of both."""
    leaves = [x.clone().requires_grad_() for x in (*qkv, state) if x is not None]
    q, k, v = leaves[:3]
    output, final = attend(q, k, v, leaves[3] if state is not None else None)
    assert final is not None
    generator = torch.Generator().manual_seed(1)
    # What is rounded to bfloat16 on one side is rounded on the other.
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (output, final)]
    results = [output.detach(), final.detach()]
    if output.requires_grad or final.requires_grad:
        pairs = [(x, g) for x, g in zip((output, final), grads, strict=True) if x.requires_grad]
        found = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    else:
        found = [None] * len(leaves)
    return results + [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def check(ours: Tensor, exact: Tensor, limit: float, name: str = "") -> None:
    assert ours.shape == exact.shape and torch.isfinite(ours).all(), name
    error = (ours.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error <= limit, f"{name}: {float(error):.1e}"


def check_all(qkv: Qkv, cu_seqlens: Tensor, state: Tensor | None, dtype: torch.dtype) -> None:
    """Documents whole, and cut so that every chunk is a segment of its own."""
    exact = outputs_and_gradients(
        lambda q, k, v, s: lightning_attention_recurrence(q, k, v, SLOPES, cu_seqlens, s), qkv, state
    )
    slopes, bounds = SLOPES.to(DEVICE), cu_seqlens.to(DEVICE)
    there = None if state is None else state.to(DEVICE, torch.float32)
    names = ("output", "final state", "dq", "dk", "dv", "d initial state")
    for segment in (None, 1):
        ours = outputs_and_gradients(
            lambda q, k, v, s, n=segment: lightning_triton.attend(q, k, v, slopes, bounds, s, True, n),
            place(qkv, dtype),
            there,
        )
        assert ours[0].dtype == ours[2].dtype == dtype and ours[1].dtype == torch.float32
        for mine, theirs, name in zip(ours, exact, names, strict=False):
            check(mine, theirs, LIMITS[dtype], f"{name}, segment {segment}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.usefixtures("form")
def test_equals_the_recurrence(lengths: list[int], with_state: bool, dtype: torch.dtype) -> None:
    """Outputs, final states and every gradient."""
    qkv, cu_seqlens, state = make(lengths, DIMS[0], dtype)
    check_all(qkv, cu_seqlens, state if with_state else None, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.usefixtures("form")
def test_lengths_around_a_chunk(dim: int, dtype: torch.dtype) -> None:
    chunk = chunk_of(dim, dtype)
    qkv, cu_seqlens, state = make([chunk - 1, chunk, chunk + 1, 2 * chunk + 1], dim, dtype)
    check_all(qkv, cu_seqlens, state, dtype)


@pytest.mark.skipif(GPU, reason="its head dimension is among those above")
@pytest.mark.parametrize("form", ["overlapped"], indirect=True)
@pytest.mark.usefixtures("form")
def test_a_wide_state_lends_its_place_to_the_output() -> None:
    """Half a state of head dimension 256 leaves room for one tile of values, and for none of the output."""
    qkv, cu_seqlens, state = make([33, 0, 16], 256, torch.float32)
    check_all(qkv, cu_seqlens, state, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_one_result_is_differentiated(dtype: torch.dtype) -> None:
    """Autograd hands down None for a result that the loss does not use."""
    qkv, cu_seqlens, state = make([20, 9], DIMS[0], dtype)
    slopes, bounds = SLOPES.to(DEVICE), cu_seqlens.to(DEVICE)
    for used in (0, 1):
        exact = [x.clone().requires_grad_() for x in (*qkv, state)]
        ours = [x.to(DEVICE, torch.float32 if i == 3 else dtype).requires_grad_() for i, x in enumerate((*qkv, state))]
        reference = lightning_attention_recurrence(exact[0], exact[1], exact[2], SLOPES, cu_seqlens, exact[3])[used]
        result = lightning_triton.attend(ours[0], ours[1], ours[2], slopes, bounds, ours[3], True)[used]
        assert result is not None
        expected = torch.autograd.grad(reference.sum(), exact, allow_unused=True)
        for mine, theirs in zip(torch.autograd.grad(result.sum(), ours), expected, strict=True):
            check(mine, torch.zeros_like(mine).double().cpu() if theirs is None else theirs, LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [0, 1, 15, 16, 17, 40])
@pytest.mark.usefixtures("form")
def test_chained_calls_equal_one_call(split: int, dtype: torch.dtype) -> None:
    qkv, cu_seqlens, _ = make([40], DIMS[0], dtype)
    exact, exact_state = lightning_attention_recurrence(*qkv, SLOPES, cu_seqlens)
    q, k, v = place(qkv, dtype)
    state, parts = None, []
    for part in (slice(0, split), slice(split, 40)):
        bounds = torch.tensor([0, len(range(40)[part])], dtype=torch.int32, device=DEVICE)
        output, state = lightning_triton.attend(q[part], k[part], v[part], SLOPES.to(DEVICE), bounds, state, True)
        parts.append(output)
    assert state is not None
    check(torch.cat(parts), exact, LIMITS[dtype])
    check(state, exact_state, LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segment", [None, 16], ids=["whole", "cut"])
@pytest.mark.usefixtures("form")
def test_views_of_one_projection_need_no_copy(segment: int | None, dtype: torch.dtype) -> None:
    """q, k and v as the policy has them, split from [T, H, 3D], forward and backward."""
    qkv, cu_seqlens, _ = make([5, 40], 16, dtype)
    joint = torch.cat(place(qkv, dtype), -1).requires_grad_()
    q, k, v = joint.split(16, -1)
    output, _ = lightning_triton.attend(q, k, v, SLOPES.to(DEVICE), cu_seqlens.to(DEVICE), None, False, segment)
    (grad,) = torch.autograd.grad(output.sum(), joint)
    leaves = [x.requires_grad_() for x in qkv]
    exact, _ = lightning_attention_recurrence(leaves[0], leaves[1], leaves[2], SLOPES, cu_seqlens)
    check(output.detach(), exact.detach(), LIMITS[dtype])
    check(grad, torch.cat(torch.autograd.grad(exact.sum(), leaves), -1), LIMITS[dtype])


@pytest.mark.usefixtures("form")
def test_nothing_crosses_documents() -> None:
    qkv, cu_seqlens, _ = make([30, 20, 25], DIMS[0], torch.float32)
    q, k, v = place(qkv, torch.float32)
    for x in (q, k, v):
        x[30:50] = float("nan")
        x.requires_grad_()
    output, _ = lightning_triton.attend(q, k, v, SLOPES.to(DEVICE), cu_seqlens.to(DEVICE), segment=16)
    kept = torch.cat([output[:30], output[50:]])
    kept.sum().backward()
    assert torch.isfinite(kept).all()
    for x in (q, k, v):
        assert x.grad is not None and torch.isfinite(torch.cat([x.grad[:30], x.grad[50:]])).all()


@pytest.mark.parametrize("segment", [None, 64], ids=["whole", "cut"])
@pytest.mark.usefixtures("form")
def test_steep_slopes_and_long_documents_stay_finite(segment: int | None) -> None:
    """A slope of 5 over 400 tokens reaches 2,000: e^{+s j} would overflow float32 from s j = 88 on."""
    qkv, cu_seqlens, _ = make([400], DIMS[0], torch.float32)
    slopes = torch.tensor([5.0, 0.9, 0.0])
    exact, exact_state = lightning_attention_recurrence(*qkv, slopes, cu_seqlens)
    q, k, v = place(qkv, torch.float32)
    output, state = lightning_triton.attend(
        q, k, v, slopes.to(DEVICE), cu_seqlens.to(DEVICE), None, output_final_state=True, segment=segment
    )
    assert state is not None
    check(output, exact, 1e-5)
    check(state, exact_state, 1e-5)


def make_cache(dim: int, slots: int) -> Tensor:
    """[slots, H, D, D] with padding between slots, as an engine's page has."""
    pages = torch.randn(slots, HEADS * dim * dim + 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return pages.as_strided((slots, HEADS, dim, dim), (pages.stride(0), dim * dim, dim, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segment", [None, 16], ids=["whole", "cut"])
@pytest.mark.usefixtures("form")
def test_prefill_by_slot(segment: int | None, dtype: torch.dtype) -> None:
    """States come from and go to the documents' slots; fresh documents start from zero; other slots stay untouched."""
    dim = DIMS[-2]
    qkv, cu_seqlens, _ = make([21, 0, 1, 40], dim, dtype)
    cache, slots = make_cache(dim, 7), torch.tensor([5, 2, 0, 3], dtype=torch.int32)
    fresh = torch.tensor([False, False, True, True])
    before = cache.double().cpu()
    state = before[slots.long()] * ~fresh[:, None, None, None]
    exact, exact_state = lightning_attention_recurrence(*qkv, SLOPES, cu_seqlens, state)
    q, k, v = place(qkv, dtype)
    where = (SLOPES.to(DEVICE), cu_seqlens.to(DEVICE), cache, slots.to(DEVICE), fresh.to(DEVICE))
    check(lightning_triton.prefill(q, k, v, *where, segment=segment), exact, LIMITS[dtype])
    after = cache.double().cpu()
    check(after[slots.long()], exact_state, LIMITS[dtype])
    assert torch.equal(after[[1, 4, 6]], before[[1, 4, 6]])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_steps_equal_the_full_forward(dtype: torch.dtype, backend) -> None:
    """Prefill of 3 tokens, then a token a step, of two sequences among padding; the second one starts at its first."""
    dim, steps = DIMS[-1], 6
    qkv, _, _ = make([2 * steps], dim, dtype)
    bounds = torch.tensor([0, steps, 2 * steps], dtype=torch.int32)
    exact, exact_state = lightning_attention_recurrence(*qkv, SLOPES, bounds)
    q, k, v = (x.view(2, steps, HEADS, dim) for x in place(qkv, dtype))
    cache, slopes = make_cache(dim, 4), SLOPES.to(DEVICE)
    one = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    slot, yes = torch.tensor([2], device=DEVICE), torch.tensor([True], device=DEVICE)
    outputs = [lightning_prefill(q[0, :3], k[0, :3], v[0, :3], slopes, one, cache, slot, yes, backend=backend)]
    for t in range(3):
        new = torch.tensor([False, False, t == 0], device=DEVICE)
        slots = torch.tensor([2, -1, 1], dtype=torch.int32, device=DEVICE)
        tokens = [torch.stack([x[0, t + 3], x[0, 0], x[1, t]]) for x in (q, k, v)]
        out = lightning_decode(tokens[0], tokens[1], tokens[2], slopes, cache, slots, new, backend=backend)
        assert not out[1].any()
        outputs += [out[:1], out[2:]]
    check(torch.cat([outputs[0], *outputs[1::2]]), exact[:steps], LIMITS[dtype])
    check(torch.cat(outputs[2::2]), exact[steps : steps + 3], LIMITS[dtype])
    check(cache[2], exact_state[0], LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_decode_takes_silu_as_it_reads(dim: int, dtype: torch.dtype) -> None:
    """Of q, k and v as they lie in a projection, between other columns; rounded as torch's own SiLU rounds."""
    joint = torch.randn(5, HEADS * 3 * dim + 7, generator=torch.Generator().manual_seed(3)).mul(4).to(DEVICE, dtype)
    joint[:, HEADS * 3 * dim :] = torch.nan
    qkv = joint[:, : HEADS * 3 * dim].unflatten(-1, (HEADS, 3 * dim))
    cache, slopes = make_cache(dim, 6), SLOPES.to(DEVICE)
    slots = torch.tensor([3, -1, 0, 5, 1], dtype=torch.int32, device=DEVICE)
    fresh = torch.tensor([False, False, True, True, False], device=DEVICE)
    expected = cache.clone()
    q, k, v = torch.nn.functional.silu(qkv).split(dim, -1)
    wanted = lightning_decode(q, k, v, slopes, expected, slots, fresh, backend="torch")
    for backend in ("torch", "triton"):
        states = cache.clone()
        q, k, v = qkv.split(dim, -1)
        out = lightning_decode(q, k, v, slopes, states, slots, fresh, silu=True, backend=backend)
        check(out, wanted.double().cpu(), LIMITS[dtype])
        check(states, expected.double().cpu(), 1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_graph_of_a_decode_step_follows_its_slots() -> None:
    dim = 128
    (q, k, v), _, _ = make([4], dim, torch.bfloat16)
    q, k, v = place((q, k, v), torch.bfloat16)
    cache, slots = make_cache(dim, 6), torch.tensor([0, 1, 2, -1], dtype=torch.int32, device=DEVICE)
    slopes, fresh = SLOPES.to(DEVICE), torch.zeros(4, dtype=torch.bool, device=DEVICE)
    lightning_decode(q, k, v, slopes, cache.clone(), slots, fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lightning_decode(q, k, v, slopes, cache, slots, fresh)
    slots.copy_(torch.tensor([5, -1, 3, 4]))
    fresh.copy_(torch.tensor([True, False, False, True]))
    expected = cache.clone()
    graph.replay()
    wanted = lightning_decode(q, k, v, slopes, expected, slots, fresh, backend="torch")
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(cache, expected, rtol=1e-5, atol=1e-5)


def test_dispatch_follows_device_and_dtype() -> None:
    """float64 takes the torch form on any device."""
    (q, k, v), cu_seqlens, _ = make([50], 16, torch.float32)
    exact, _ = lightning_attention(q, k, v, SLOPES, cu_seqlens)
    there = place((q, k, v), torch.float64)
    on_device, _ = lightning_attention(*there, SLOPES.to(DEVICE), cu_seqlens.to(DEVICE))
    assert on_device.dtype == torch.float64
    torch.testing.assert_close(on_device.cpu(), exact, rtol=1e-12, atol=1e-12)
    q, k, v = place((q, k, v), torch.float32)
    ours, _ = lightning_attention(q, k, v, SLOPES.to(DEVICE), cu_seqlens.to(DEVICE), backend="triton")
    check(ours, exact, 1e-5)


def head_case(rows: int, vocabulary: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator) * scale
    weight = torch.randn(vocabulary, 24, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["token_logprobs", "fused_token_loss"])
@pytest.mark.parametrize("scale", [0.3, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (20, 300), (33, 128), (0, 50)])
def test_head_equals_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, scale: float, fused: bool, dtype: torch.dtype
) -> None:
    """Slices of 64: targets in every slice, a last one that is not full; peaked rows move their reference."""
    monkeypatch.setattr(logprobs_triton, "_SLICE", 64)
    hidden, weight, targets, grad = head_case(rows, vocabulary, scale)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(exact[0] @ exact[1].T / 0.7, -1)
    wanted = logp.gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((wanted * grad).sum(), exact)
    ours = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()
    targets, grad = targets.to(DEVICE), grad.to(DEVICE)
    if fused:
        loss, logprobs, entropy = fused_token_loss(
            *ours, targets, lambda x, _, part: x * grad[part], temperature=0.7, chunk_rows=8, backend="triton"
        )
        torch.testing.assert_close(loss.double().cpu(), (wanted * grad.cpu()).sum().detach(), rtol=1e-4, atol=1e-4)
    else:
        logprobs, entropy = token_logprobs(*ours, targets, temperature=0.7, chunk_rows=8, backend="triton")
        loss = (logprobs * grad).sum()
    # Not 1: the factor from above must arrive.
    got = torch.autograd.grad(2 * loss, ours)
    assert logprobs.dtype == torch.float32 and got[0].dtype == dtype
    # Logits reach 400: 400 * 2^-24 in float32, whichever the operands.
    torch.testing.assert_close(logprobs.detach().double().cpu(), wanted.detach(), rtol=1e-5, atol=1e-4)
    exact_entropy = -(logp.exp() * logp).sum(-1).detach()
    torch.testing.assert_close(entropy.double().cpu(), exact_entropy, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(got, expected, strict=True):
        check(mine, 2 * theirs, 2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(not GPU, reason="TF32 is a mode of GPUs")
def test_float32_head_never_uses_tf32() -> None:
    hidden, weight, targets, _ = (x.to(DEVICE) for x in head_case(64, 500, 1.0))
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        logprobs, _ = token_logprobs(hidden, weight, targets)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert float((logprobs.double() - exact).abs().max()) < 2e-5
