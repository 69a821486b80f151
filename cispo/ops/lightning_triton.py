"""Lightning attention on a GPU: plans and launches the kernels, forward, backward and by slot for an engine.

Where one program a document, head and block of value dims fills the GPU, a direction is one launch that reads every
operand once. Otherwise documents are cut into segments: a first launch leaves the addition of each to the state, and
the programs of the second start from the decayed sum of those before them. Nothing is read back to the host, and the
tiles come from a table, not from a search at run time.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...); without Triton the checker sees a plain function.

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cispo.ops.autograd import Context
from cispo.ops.lightning_kernels import attend_kernel, decode_kernel, local_kernel


class Tiles(NamedTuple):
    """A program's tokens a chunk, block of value dims, warps, pipeline stages; programs a multiprocessor."""

    chunk: int
    block: int
    warps: int
    stages: int
    resident: int


# By padded head dimension, measured on an H100. float32 products run on the ordinary units, out of registers: larger
# tiles would spill.
TILES = {
    torch.bfloat16: {
        16: Tiles(64, 16, 4, 3, 2),
        32: Tiles(64, 32, 4, 3, 2),
        64: Tiles(64, 64, 4, 3, 1),
        128: Tiles(64, 64, 4, 3, 1),
        256: Tiles(32, 64, 8, 3, 1),
    },
    torch.float32: {
        16: Tiles(16, 16, 4, 1, 2),
        32: Tiles(16, 32, 4, 1, 2),
        64: Tiles(16, 32, 4, 1, 2),
        128: Tiles(16, 16, 8, 1, 1),
        256: Tiles(16, 16, 8, 1, 1),
    },
}
# dk and dv: their programs are neighbours and read the same rows, and two on a multiprocessor beat a deeper pipeline.
PAIRED_TILES = {(torch.bfloat16, 128): Tiles(64, 64, 4, 2, 2)}

# A shorter segment would spend more on its incoming state than on its tokens.
_SHORTEST_SEGMENT = 256


class _Plan(NamedTuple):
    """The cut of one direction: tokens a segment, slots for documents' segments, whether one may have several."""

    segment: int
    slots: int
    split: bool
    programs: int
    constants: dict[str, int]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    segment: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`lightning.lightning_attention` in bfloat16 or true float32; tests set the tokens a `segment`."""
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape, "q, k and v are alike"
    return _Attend.apply(q, k, v, slopes, cu_seqlens, initial_state, output_final_state, segment)  # type: ignore[return-value]


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    segment: int | None = None,
) -> Tensor:
    """`lightning.lightning_prefill`."""
    _check_cache(cache, q)
    q, k, v = _aligned(q, k, v)
    plan = _plan(q, len(cu_seqlens) - 1, 1, segment)
    local = _local(k, v, slopes, cu_seqlens, plan, backwards=False)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    states = _States(cache, cache, slots, fresh, local)
    _launch("out", (q, k, v), None, (out, None), slopes, cu_seqlens, states, plan)
    return out


def decode(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cache: Tensor, slots: Tensor, fresh: Tensor | None = None
) -> Tensor:
    """`lightning.lightning_decode` in one launch that depends on no value in a tensor."""
    _check_cache(cache, q)
    q, k, v = _aligned(q, k, v)
    tokens, heads, dim = q.shape
    padded = max(16, triton.next_power_of_2(dim))
    block = min(32, padded)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if tokens:
        decode_kernel[(tokens * heads * triton.cdiv(dim, block),)](
            q, k, v, out, slopes, cache, slots, fresh, heads, q.stride(0), q.stride(1), cache.stride(0),
            D=dim, BD=padded, BV=block, num_warps=4,
        )  # fmt: skip
    return out


class _Context(Context, Protocol):
    segment: int | None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        cu_seqlens: Tensor,
        initial: Tensor | None,
        output_final: bool,
        segment: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = _aligned(q, k, v)
        initial = None if initial is None else initial.float().contiguous()
        documents = len(cu_seqlens) - 1
        final = _new_states(q, documents) if output_final else None
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        plan = _plan(q, documents, 1, segment)
        local = _local(k, v, slopes, cu_seqlens, plan, backwards=False)
        states = _States(initial, final, None, None, local)
        _launch("out", (q, k, v), None, (out, None), slopes, cu_seqlens, states, plan)
        ctx.save_for_backward(q, k, v, slopes, cu_seqlens, initial, local)
        ctx.segment = segment
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, cu_seqlens, initial, local = ctx.saved_tensors
        grad, final_grad = (None if g is None else g.contiguous() for g in grads)
        grad = torch.zeros_like(q, memory_format=torch.contiguous_format) if grad is None else grad
        dq, dk, dv = (torch.empty_like(grad) for _ in range(3))
        documents = len(cu_seqlens) - 1
        initial_grad = _new_states(q, documents) if ctx.needs_input_grad[5] else None

        states = _States(initial, None, None, None, local)
        plan = _plan(q, documents, 1, ctx.segment)
        _launch("dq", (q, k, v), grad, (dq, None), slopes, cu_seqlens, states, plan)
        plan = _plan(q, documents, 2, ctx.segment)
        local = _local(q, grad, slopes, cu_seqlens, plan, backwards=True)
        states = _States(final_grad, initial_grad, None, None, local)
        _launch("dk_dv", (q, k, v), grad, (dk, dv), slopes, cu_seqlens, states, plan)
        return dq, dk, dv, None, None, initial_grad, None, None


class _States(NamedTuple):
    """The states of documents that a launch reads and writes; all optional."""

    incoming: Tensor | None
    outgoing: Tensor | None
    owners: Tensor | None
    fresh: Tensor | None
    local: Tensor | None


def _launch(
    mode: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    grad: Tensor | None,
    outs: tuple[Tensor, Tensor | None],
    slopes: Tensor,
    cu_seqlens: Tensor,
    states: _States,
    plan: _Plan,
) -> None:
    q, heads = qkv[0], qkv[0].shape[1]
    if not plan.programs:
        return
    strides = [x.stride(0) for x in (states.incoming, states.outgoing) if x is not None]
    assert len(set(strides)) < 2, "incoming and outgoing states are laid out alike"
    attend_kernel[(plan.programs,)](
        *qkv, grad, *outs, slopes, cu_seqlens, *states, len(cu_seqlens) - 1, heads, plan.segment,
        q.stride(0), q.stride(1), strides[0] if strides else 0, MODE=mode, **plan.constants,
    )  # fmt: skip


def _local(k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor, plan: _Plan, backwards: bool) -> Tensor | None:
    """The addition of each segment but a document's last to the state, [., H, D, D]; None where none is cut."""
    if not plan.split:
        return None
    local = _new_states(k, k.shape[0] // plan.segment)
    local_kernel[(plan.programs // (2 if backwards else 1),)](
        k, v, slopes, cu_seqlens, local, len(cu_seqlens) - 1, k.shape[1], plan.segment,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), BACKWARDS=backwards, **plan.constants,
    )  # fmt: skip
    return local


def _check_cache(cache: Tensor, q: Tensor) -> None:
    assert cache.dtype == torch.float32 and cache.shape[1:] == (*q.shape[1:], q.shape[2])
    assert not len(cache) or cache[0].is_contiguous()


def _new_states(like: Tensor, count: int) -> Tensor:
    _, heads, dim = like.shape
    return torch.empty(count, heads, dim, dim, dtype=torch.float32, device=like.device)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are if they are like-strided views with dense rows (a split qkv is), else copies."""
    first = tensors[0].stride()
    if first[-1] == 1 and all(x.stride() == first for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def _plan(q: Tensor, documents: int, jobs: int, segment: int | None) -> _Plan:
    tokens, heads, dim = q.shape
    padded = max(16, triton.next_power_of_2(dim))
    tiles = TILES[q.dtype][padded]
    if jobs == 2:
        tiles = PAIRED_TILES.get((q.dtype, padded), tiles)
    block = min(tiles.block, padded)
    programs = jobs * heads * triton.cdiv(dim, block)
    # As many segments as the multiprocessors have room for at once: more would only add to the states that start one.
    parts = max(1, min(_processors(q.device) * tiles.resident // programs, tokens // _SHORTEST_SEGMENT))
    wanted = segment or triton.cdiv(tokens, parts)
    segment = max(1, triton.cdiv(wanted, tiles.chunk)) * tiles.chunk
    # Without a cut, the grid's slots are the documents.
    split = segment < tokens
    slots = tokens // segment + documents if split else documents
    constants = {"D": dim, "BT": tiles.chunk, "BD": padded, "BV": block}
    constants |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return _Plan(segment, slots, split, slots * programs, constants)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; under the interpreter, on a CPU, there is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
