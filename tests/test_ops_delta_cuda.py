"""The delta rule's and the convolution's kernels against their recurrences: by slot, and flash-linear-attention's.

    TRITON_INTERPRET=1 python -m pytest tests/test_ops_delta_cuda.py

The interpreter, on a CPU, runs the kernels by slot in float32; bfloat16, CUDA graphs and fla need a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.convolution import convolve, convolve_decode, convolve_prefill
from cispo.ops.delta import DELTA, delta_decode, delta_prefill
from cispo.ops.reference import convolution_recurrence, delta_recurrence

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
SIZES = [(2, 4, 128, 128), (3, 3, 96, 40), (1, 2, 256, 64)] if GPU else [(2, 4, 8, 12), (3, 3, 5, 9)]
"""Key heads, value heads, K, V."""
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
"""Of |ours - exact| / |exact| over a tensor; inputs are rounded to the dtype before both, states stay float32.

A GPU's exp is off by up to 2e-7, and 70 tokens multiply it up.
"""
LENGTHS = {
    "ragged": [5, 17, 1, 70, 33],
    "empty documents": [0, 3, 0, 0, 40, 0],
    "one-token documents": [1, 1, 1, 1],
    "only an empty document": [0],
    "no document": [],
}
KINDS = ["per head", "per channel"]

# Loosely typed: the tests hand over five inputs at once.
recurrence: Callable[..., tuple[Tensor, Tensor]] = delta_recurrence
prefill: Callable[..., Tensor] = delta_prefill
decode: Callable[..., Tensor] = delta_decode


def make(
    lengths: Sequence[int], size: tuple[int, int, int, int], kind: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """float64 inputs on the CPU, rounded to `dtype` but for decays and betas; cu_seqlens; states."""
    generator = torch.Generator().manual_seed(0)
    groups, heads, key, value = size
    tokens = sum(lengths)
    q, k = (F.normalize(torch.randn(tokens, groups, key, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(tokens, heads, value, generator=generator)
    g = -12 * torch.rand((tokens, heads, key) if kind == "per channel" else (tokens, heads), generator=generator) ** 4
    beta = torch.rand(tokens, heads, generator=generator)
    state = torch.randn(len(lengths), heads, key, value, generator=generator)
    rounded = [x.to(dtype) for x in (q * key**-0.5, k, v)]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return [x.double() for x in (*rounded, g, beta)], bounds, state.double()


def place(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inputs as a layer gives them: q, k, v in `dtype`, sliced out of one wider tensor where shapes allow it."""
    q, k, v = (x.to(DEVICE, dtype) for x in inputs[:3])
    wide = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)
    parts = wide.split((q[0].numel(), k[0].numel(), v[0].numel()) if len(q) else (0, 0, 0), 1) if len(q) else (q, k, v)
    sliced = [part.view(x.shape) for part, x in zip(parts, (q, k, v), strict=True)]
    return [*sliced, *(x.to(DEVICE, torch.float32) for x in inputs[3:])]


def check(ours: Tensor, exact: Tensor, limit: float, name: str = "") -> None:
    assert ours.shape == exact.shape and torch.isfinite(ours).all(), name
    error = (ours.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error <= limit, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_prefill_by_slot(lengths: list[int], size: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    """Every second document is fresh and its slot holds NaN; unused slots are left alone."""
    inputs, bounds, state = make(lengths, size, kind, dtype)
    documents = len(lengths)
    fresh = torch.arange(documents) % 2 == 0
    slots = torch.arange(documents).flip(0) + 1
    cache = torch.full((documents + 2, *state.shape[1:]), torch.nan)
    cache[slots] = torch.where(fresh[:, None, None, None], torch.nan, state.float())
    start = torch.where(fresh[:, None, None, None], 0.0, state.float().double())
    exact, states = recurrence(*inputs, bounds, start)
    there = cache.to(DEVICE)
    output = prefill(
        *place(inputs, dtype), bounds.to(DEVICE), there, slots.int().to(DEVICE), fresh.to(DEVICE), backend="triton"
    )
    assert output.dtype == dtype
    check(output, exact, LIMITS[dtype], "output")
    check(there[slots.to(DEVICE)], states, LIMITS[torch.float32], "states")
    assert there[0].isnan().all() and there[-1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode_by_slot(size: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    """Three steps; the second sequence is fresh in the first over a slot of NaN, and the last row is padding."""
    steps = [make([1] * 4, size, kind, dtype)[0] for _ in range(3)]
    for number, step in enumerate(steps):
        step[2] = step[2].roll(number, -1)
    _, bounds, state = make([1] * 4, size, kind, dtype)
    slots, fresh = torch.tensor([5, 0, 2, -1]), torch.tensor([False, True, False, False])
    cache = torch.full((6, *state.shape[1:]), torch.nan)
    cache[5], cache[2] = state[0].float(), state[2].float()
    there = cache.to(DEVICE)
    start = torch.where(fresh[:3, None, None, None], 0.0, state[:3].float().double())
    for number, inputs in enumerate(steps):
        exact, start = recurrence(*(x[:3] for x in inputs), bounds[:4], start)
        first = fresh.to(DEVICE) if number == 0 else None
        output = decode(*place(inputs, dtype), there, slots.to(DEVICE), first, backend="triton")
        check(output[:3], exact, LIMITS[dtype], f"output {number}")
        check(there[slots[:3].to(DEVICE)], start, LIMITS[torch.float32], f"states {number}")
        assert not output[3].any()
    assert there[1].isnan().all() and there[3:5].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_decoding_have_the_same_arithmetic(kind: str) -> None:
    """A prompt at once, or token by token: one state with the same tiles, but for multiplications fused with sums."""
    from cispo.ops import delta_triton

    inputs, bounds, state = make([6], SIZES[0], kind, torch.float32)
    placed = place(inputs, torch.float32)
    caches = [state.float().to(DEVICE) for _ in range(2)]
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    run: dict[str, Callable[..., Tensor]] = {"prefill": delta_triton.prefill, "decode": delta_triton.decode}
    tiles = delta_triton.PREFILL
    whole = run["prefill"](*placed, bounds.to(DEVICE), caches[0], slots, tiles=tiles)
    single = [run["decode"](*(x[t : t + 1] for x in placed), caches[1], slots, tiles=tiles) for t in range(6)]
    check(torch.cat(single), whole.double().cpu(), 5e-7 if GPU else 0, "outputs")
    check(caches[1], caches[0].double().cpu(), 5e-7 if GPU else 0, "states")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_by_slot(width: int, dtype: torch.dtype) -> None:
    """A prefill and two decode steps; a fresh sequence over NaN, and padding."""
    generator = torch.Generator().manual_seed(0)
    channels, lengths = 300, [5, 1, 0]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    weight, x = draw(channels, width), draw(6, channels)
    state = draw(3, width - 1, channels).float()
    slots, fresh = torch.tensor([4, 0, 2]), torch.tensor([False, True, False])
    cache = torch.full((6, width - 1, channels), torch.nan)
    cache[4], cache[2] = state[0], state[2]
    there = cache.to(DEVICE)
    start = torch.where(fresh[:, None, None], 0.0, state.double())
    exact, start = convolution_recurrence(x.double(), weight.double(), bounds, start)
    output = convolve_prefill(
        x.to(DEVICE), weight.to(DEVICE), bounds.to(DEVICE), there, slots.int().to(DEVICE), fresh.to(DEVICE)
    )
    check(output, exact, LIMITS[dtype], "prefill")
    for number in range(2):
        x = draw(4, channels + 7)[:, :channels]
        fresh, padded = torch.tensor([number == 0, False, False, False]), torch.tensor([4, 0, 2, -1])
        start = torch.where(fresh[:3, None, None], 0.0, start)
        exact, start = convolution_recurrence(x[:3].double(), weight.double(), torch.arange(4), start)
        output = convolve_decode(
            x.to(DEVICE), weight.to(DEVICE), there, padded.int().to(DEVICE), fresh.to(DEVICE), backend="triton"
        )
        check(output[:3], exact, LIMITS[dtype], f"decode {number}")
        assert not output[3].any() and torch.equal(there[slots.to(DEVICE)].double().cpu(), start)
    if width > 1:
        assert there[1].isnan().all() and there[3].isnan().all() and there[5].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_convolution_of_packed_documents(lengths: list[int], with_state: bool, width: int, dtype: torch.dtype) -> None:
    """Outputs, final states and every gradient, x a slice of a wider projection."""
    generator = torch.Generator().manual_seed(0)
    channels, tokens = 70, sum(lengths)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    inputs = [draw(tokens, channels + 3)[:, 3:], draw(channels, width)]
    inputs += [draw(len(lengths), width - 1, channels).float()] if with_state else []
    grads = [draw(tokens, channels), draw(len(lengths), width - 1, channels)]
    results = []
    for exact in (True, False):
        leaves = [(x.double() if exact else x.to(DEVICE)).requires_grad_() for x in inputs]
        x, weight, *state = leaves
        if exact:
            outputs = convolution_recurrence(x, weight, bounds, *state)
        else:
            outputs = convolve(x, weight, bounds.to(DEVICE), state[0] if state else None, True, backend="triton")
        y, final = outputs
        assert final is not None
        pairs = [(o, g.to(o)) for o, g in zip((y, final), grads, strict=True) if o.requires_grad]
        found = [None] * len(leaves)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        results.append(
            [y.detach(), final.detach(), *(z if f is None else f for f, z in zip(found, zeros, strict=True))]
        )
    for mine, theirs, name in zip(results[1], results[0], ("y", "states", "dx", "dw", "d states"), strict=False):
        if theirs.numel():
            check(mine, theirs, LIMITS[dtype], name)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_a_decode_step(kind: str) -> None:
    """Replays follow the values of inputs, slots and fresh."""
    size = SIZES[0]
    inputs, _, state = make([1] * 4, size, kind, torch.bfloat16)
    placed = [x.clone() for x in place(inputs, torch.bfloat16)]
    channels = placed[2][0].numel()
    weight = torch.randn(channels, 4, device=DEVICE)
    cache, window = state.float().to(DEVICE), torch.randn(4, 3, channels, device=DEVICE)
    slots, fresh = torch.arange(4, device=DEVICE), torch.zeros(4, dtype=torch.bool, device=DEVICE)

    def step() -> Tensor:
        mixed = convolve_decode(placed[2].flatten(1), weight, window, slots, fresh).view_as(placed[2])
        return decode(placed[0], placed[1], mixed, placed[3], placed[4], cache, slots, fresh)

    saved = cache.clone(), window.clone()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    slots.copy_(torch.tensor([3, 1, -1, 0]))
    fresh.copy_(torch.tensor([True, False, False, False]))
    results = []
    for run in (graph.replay, step):
        cache.copy_(saved[0])
        window.copy_(saved[1])
        result = run()
        results.append(((output if result is None else result).clone(), cache.clone(), window.clone()))
    for replayed, eager in zip(*results, strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.skipif(not GPU, reason="a host read shows on a GPU alone")
@pytest.mark.parametrize("kind", KINDS)
def test_serving_reads_nothing_back(kind: str) -> None:
    inputs, bounds, state = make([5, 1, 30], SIZES[0], kind, torch.bfloat16)
    placed, bounds, cache = place(inputs, torch.bfloat16), bounds.to(DEVICE), state.float().to(DEVICE)
    slots, fresh = torch.arange(3, device=DEVICE), torch.zeros(3, dtype=torch.bool, device=DEVICE)
    x, weight = torch.randn(36, 64, device=DEVICE), torch.randn(64, 4, device=DEVICE)
    window = torch.zeros(3, 3, 64, device=DEVICE)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            prefill(*placed, bounds, cache, slots, fresh)
            decode(*(t[:3] for t in placed), cache, slots, fresh)
            convolve_prefill(x, weight, bounds, window, slots, fresh)
            convolve_decode(x[:3], weight, window, slots, fresh)
            convolve(x, weight, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[5, 17, 1, 170, 0, 333], [0, 1, 0]], ids=["ragged", "one token"])
def test_training_forms(lengths: list[int], kind: str, dtype: torch.dtype) -> None:
    """Outputs, final states and every gradient of the form that a GPU chooses: chunks in float32, fla in bfloat16."""
    if dtype == torch.bfloat16 and find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    inputs, bounds, state = make(lengths, (2, 4, 64, 64), kind, dtype)
    exact_leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    leaves = [x.detach().clone().requires_grad_() for x in (*place(inputs, dtype), state.float().to(DEVICE))]
    exact = recurrence(*exact_leaves[:5], bounds, exact_leaves[5])
    output, final = DELTA.packed(*leaves[:5], bounds.to(DEVICE), leaves[5], True)
    assert final is not None
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in exact]
    expected = torch.autograd.grad(exact, exact_leaves, grads)
    found = torch.autograd.grad((output, final), leaves, [grads[0].to(output), grads[1].to(final)])
    names = ("output", "final state", "dq", "dk", "dv", "dg", "dbeta", "d initial state")
    for mine, theirs, name in zip((output, final, *found), (*exact, *expected), names, strict=True):
        check(mine.detach(), theirs.detach(), 5 * LIMITS[dtype], name)
