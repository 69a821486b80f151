"""Lightning attention on a GPU: plans and launches the kernels, forward, backward and by slot for an engine.

Where one program a document, head and block of value dims fills the GPU, a direction is one launch that reads every
operand once. Otherwise documents are cut into segments: a first launch leaves the addition of each to the state, and
the programs of the second start from the decayed sum of those before them. Nothing is read back to the host, and the
tiles come from a table of cards (`lightning_tiles`), not from a search at run time. On an H200 bfloat16 has the kernel
of `lightning_overlap`.
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
from cispo.ops.lightning_tiles import TILES, Pass, Tiles, tiles_of

# A shorter segment would spend more on its incoming state than on its tokens.
_SHORTEST_SEGMENT = 256


class _Plan(NamedTuple):
    """The cut of one direction: tokens a segment, slots for documents' segments, whether one may have several."""

    segment: int
    slots: int
    split: bool
    tiles: Tiles


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
    plan = _plan(q, len(cu_seqlens) - 1, "out", segment)
    local = _local(k, v, slopes, cu_seqlens, plan, backwards=False)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    states = _States(cache, cache, slots, fresh, local)
    _launch("out", (q, k, v), None, (out, None), slopes, cu_seqlens, states, plan)
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    silu: bool = False,
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
            D=dim, BD=padded, BV=block, SILU=silu, num_warps=4,
        )  # fmt: skip
    return out


class _Context(Context, Protocol):
    segment: int | None
    """As asked for."""
    own_segment: int
    """Of the outputs' pass."""


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
        plan = _plan(q, documents, "out", segment)
        local = _local(k, v, slopes, cu_seqlens, plan, backwards=False)
        states = _States(initial, final, None, None, local)
        _launch("out", (q, k, v), None, (out, None), slopes, cu_seqlens, states, plan)
        ctx.save_for_backward(q, k, v, slopes, cu_seqlens, initial, local)
        ctx.segment, ctx.own_segment = segment, plan.segment
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, cu_seqlens, initial, local = ctx.saved_tensors
        grad, final_grad = (None if g is None else g.contiguous() for g in grads)
        grad = torch.zeros_like(q, memory_format=torch.contiguous_format) if grad is None else grad
        initial_grad = _new_states(q, len(cu_seqlens) - 1) if ctx.needs_input_grad[5] else None
        dq = query_gradient((q, k, v), grad, slopes, cu_seqlens, ctx.own_segment, initial, local)
        dk, dv = key_value_gradients((q, k, v), grad, slopes, cu_seqlens, ctx.segment, final_grad, initial_grad)
        return dq, dk, dv, None, None, initial_grad, None, None


def query_gradient(
    qkv: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    segment: int | None = None,
    initial: Tensor | None = None,
    local: Tensor | None = None,
) -> Tensor:
    """dq [T, H, D]; `local` is what segments of `segment` tokens add to the state, as the outputs' pass left it."""
    dq = torch.empty_like(grad)
    plan = _plan(qkv[0], len(cu_seqlens) - 1, "dq", segment)
    if plan.split and local is None:
        local = _local(qkv[1], qkv[2], slopes, cu_seqlens, plan, backwards=False)
    _launch("dq", qkv, grad, (dq, None), slopes, cu_seqlens, _States(initial, None, None, None, local), plan)
    return dq


def key_value_gradients(
    qkv: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    segment: int | None = None,
    final_grad: Tensor | None = None,
    initial_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv [T, H, D]; writes the gradient of the initial states where there is a place for it."""
    dk, dv = torch.empty_like(grad), torch.empty_like(grad)
    plan = _plan(qkv[0], len(cu_seqlens) - 1, "dk_dv", segment)
    local = _local(qkv[0], grad, slopes, cu_seqlens, plan, backwards=True)
    states = _States(final_grad, initial_grad, None, None, local)
    _launch("dk_dv", qkv, grad, (dk, dv), slopes, cu_seqlens, states, plan)
    return dk, dv


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
    programs, constants = _programs(q, plan.tiles, plan.slots * (2 if mode == "dk_dv" else 1))
    if not programs:
        return
    strides = [x.stride(0) for x in (states.incoming, states.outgoing) if x is not None]
    assert len(set(strides)) < 2, "incoming and outgoing states are laid out alike"
    kernel = attend_kernel
    if plan.tiles.overlapped:
        from cispo.ops.lightning_overlap import overlapped_kernel

        kernel = overlapped_kernel
        constants["STAGES"] = constants.pop("num_stages")
        # For the copy engine's descriptors, which programs write; Triton keeps the function by thread.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
    kernel[(programs,)](
        *qkv, grad, *outs, slopes, cu_seqlens, *states, len(cu_seqlens) - 1, heads, plan.segment,
        q.stride(0), q.stride(1), strides[0] if strides else 0, MODE=mode, **constants,
    )  # fmt: skip


def _local(k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor, plan: _Plan, backwards: bool) -> Tensor | None:
    """The addition of each segment but a document's last to the state, [., H, D, D]; None where none is cut."""
    if not plan.split:
        return None
    local = _new_states(k, k.shape[0] // plan.segment)
    tiles = TILES[k.dtype][_padded(k)] if plan.tiles.overlapped else plan.tiles
    programs, constants = _programs(k, tiles, plan.slots)
    local_kernel[(programs,)](
        k, v, slopes, cu_seqlens, local, len(cu_seqlens) - 1, k.shape[1], plan.segment,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), BACKWARDS=backwards, **constants,
    )  # fmt: skip
    return local


def _check_cache(cache: Tensor, q: Tensor) -> None:
    assert cache.dtype == torch.float32 and cache.shape[1:] == (*q.shape[1:], q.shape[2])
    assert not len(cache) or cache[0].is_contiguous()


def _new_states(like: Tensor, count: int) -> Tensor:
    _, heads, dim = like.shape
    return torch.empty(count, heads, dim, dim, dtype=torch.float32, device=like.device)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are if they are like-strided views with dense rows (a split qkv is), else copies.

    The copy engine reads from multiples of 16 bytes: rows that are such have to begin there.
    """
    first = tensors[0].stride()
    row = 16 if tensors[0].shape[2] * tensors[0].element_size() % 16 == 0 else 1
    whole = all(stride * tensors[0].element_size() % row == 0 for stride in first[:2])
    if whole and first[-1] == 1 and all(x.stride() == first and x.data_ptr() % row == 0 for x in tensors):
        return tensors
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _plan(q: Tensor, documents: int, kind: Pass, segment: int | None) -> _Plan:
    tokens, heads, dim = q.shape
    padded, (card, processors) = _padded(q), _card(q.device)
    if dim * q.element_size() % 16:  # no rows for the copy engine
        card = ""
    tiles = tiles_of(card, kind, q.dtype, padded)
    # dq starts from the states that the outputs' pass left, so both have the same segments.
    chunk = max(tiles_of(card, x, q.dtype, padded).chunk for x in (("dk_dv",) if kind == "dk_dv" else ("out", "dq")))
    programs = (2 if kind == "dk_dv" else 1) * heads * triton.cdiv(dim, min(tiles.block, padded))
    # As many segments as the multiprocessors have room for at once: more would only add to the states that start one.
    parts = max(1, min(processors * tiles.resident // programs, tokens // _SHORTEST_SEGMENT))
    wanted = segment or triton.cdiv(tokens, parts)
    segment = max(1, triton.cdiv(wanted, chunk)) * chunk
    # Without a cut, the grid's slots are the documents.
    split = segment < tokens
    slots = tokens // segment + documents if split else documents
    return _Plan(segment, slots, split, tiles)


def _programs(q: Tensor, tiles: Tiles, slots: int) -> tuple[int, dict[str, int]]:
    """Programs of so many slots, and a kernel's constants."""
    _, heads, dim = q.shape
    padded = _padded(q)
    block = min(tiles.block, padded)
    constants = {"D": dim, "BT": tiles.chunk, "BD": padded, "BV": block}
    constants |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return slots * heads * triton.cdiv(dim, block), constants


def _padded(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[2]))


@lru_cache
def _card(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors; under the interpreter, on a CPU, there is one."""
    if device.type != "cuda":
        return "", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
