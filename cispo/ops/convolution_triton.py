"""The short convolution on a GPU: packed documents forward and backward, and one token by slot for an engine.

    forward     y = silu(z),  z_t = sum_{j < W} w_{W-1-j} x_{t-j}
    backward    dz = dy silu'(z), with z once more;  dw_{W-1-j} = sum_t dz_t x_{t-j}, in partial sums        one kernel
                dx_t = sum_j w_{W-1-j} dz_{t+j} while t + j is in the document                               another

A program has a tile of tokens and channels; the W shifted rows of a tile come out of the cache. Sums are float32.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# A kernel is launched as kernel[grid](...), and its values are Triton's; the checker sees plain functions and numbers.

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from cispo.ops.autograd import Context

_TOKENS, _CHANNELS = 32, 64
"""The tile of a program."""
_BLOCK = 256
"""Channels of a program that decodes."""


def convolve(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, documents: Tensor, places: Tensor, initial_state: Tensor | None
) -> Tensor:
    """The outputs of `convolution.convolve`; documents and places [T]: each token's document, and its index in it."""
    return _Convolve.apply(x, weight, cu_seqlens, documents.int(), places.int(), initial_state)  # type: ignore[return-value]


def decode(x: Tensor, weight: Tensor, cache: Tensor, slots: Tensor, fresh: Tensor | None = None) -> Tensor:
    """`convolution.convolve_decode` in one launch that depends on no value in a tensor."""
    sequences, channels = x.shape
    width = weight.shape[1]
    assert cache.shape[1:] == (width - 1, channels) and (not len(cache) or cache[0].is_contiguous())
    x = x if x.stride(1) == 1 else x.contiguous()
    slots, fresh = slots.contiguous(), None if fresh is None else fresh.contiguous().view(torch.uint8)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = sequences * triton.cdiv(channels, _BLOCK)
    if programs:
        decode_kernel[(programs,)](
            x, weight, out, cache, slots, fresh, x.stride(0), weight.stride(0), weight.stride(1), cache.stride(0),
            C=channels, W=width, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        cu_seqlens: Tensor,
        documents: Tensor,
        places: Tensor,
        initial: Tensor | None,
    ) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        initial = None if initial is None else initial.contiguous()
        (tokens, channels), width = x.shape, weight.shape[1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            forward_kernel[_grid(x)](
                x, weight, documents, places, initial, out, tokens, x.stride(0), weight.stride(0), weight.stride(1),
                C=channels, W=width, BT=_TOKENS, BC=_CHANNELS, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, cu_seqlens, documents, places, initial)
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cu_seqlens, documents, places, initial = ctx.saved_tensors
        (tokens, channels), width = x.shape, weight.shape[1]
        grid, grad = _grid(x), grads[0].contiguous()
        sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        partial = torch.empty(grid[0], width, channels, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(sums, dtype=x.dtype)
        if sums.numel():
            sums_kernel[grid](
                grad, x, weight, documents, places, initial, sums, partial, tokens,
                x.stride(0), weight.stride(0), weight.stride(1),
                C=channels, W=width, BT=_TOKENS, BC=_CHANNELS, num_warps=4,
            )  # fmt: skip
            inputs_kernel[grid](
                sums, weight, places, dx, tokens, weight.stride(0), weight.stride(1),
                C=channels, W=width, BT=_TOKENS, BC=_CHANNELS, num_warps=4,
            )  # fmt: skip
        dweight = partial.sum(0).t().to(weight.dtype)
        dinitial = None
        if initial is not None and ctx.needs_input_grad[5]:
            dinitial = _states_gradient(sums, weight, cu_seqlens).to(initial.dtype)
        return dx, dweight, None, None, None, dinitial


def _states_gradient(sums: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S, W - 1, C]: the token at place p reads state i with tap i - p."""
    starts, lengths, taps = cu_seqlens[:-1].long(), cu_seqlens.diff(), weight.t().float()
    grad = sums.new_zeros(len(starts), len(taps) - 1, sums.shape[1])
    for place in range(len(taps) - 1 if len(sums) else 0):
        rows = sums[(starts + place).clamp(max=len(sums) - 1)]
        rows = torch.where((place < lengths)[:, None], rows, 0)
        grad[:, place:] += rows[:, None] * taps[: len(taps) - 1 - place]
    return grad


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], _TOKENS), triton.cdiv(x.shape[1], _CHANNELS)


@triton.jit
def _tile(documents, places, tokens, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """The first row, its place in the tile [BT], documents and places of the rows; channels [BC]; which exist."""
    first = tl.program_id(0).to(tl.int64) * BT
    i, channels = tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = first + i < tokens
    document = tl.load(documents + first + i, mask=inside, other=0)
    place = tl.load(places + first + i, mask=inside, other=0)
    return first, i, document, place, channels, inside[:, None] & (channels < C)[None, :]


@triton.jit
def _earlier(
    x, states, first, i, document, place, channels, valid, back: tl.constexpr, x_row, C: tl.constexpr, W: tl.constexpr
):
    """The inputs `back` tokens before the rows, [BT, BC]: the document's own, or its state's, or zero."""
    # The offsets within the tile are the same for every `back`; only the base moves.
    rows = x + (first - back) * x_row + (i[:, None] * x_row + channels[None, :])
    value = tl.load(rows, mask=valid & (place >= back)[:, None], other=0.0).to(tl.float32)
    if states is not None:
        if back > 0:
            index = document.to(tl.int64) * (W - 1) + (W - 1 - back) + place
            older = valid & (place < back)[:, None]
            value += tl.load(states + index[:, None] * C + channels[None, :], mask=older, other=0.0).to(tl.float32)
    return value


@triton.jit
def _tap(weight, channels, number, weight_row, weight_tap, C: tl.constexpr):
    at = weight + channels * weight_row + number * weight_tap
    return tl.load(at, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x, weight, documents, places, states, out, tokens, x_row, weight_row, weight_tap,
    C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, i, document, place, channels, valid = _tile(documents, places, tokens, C, BT, BC)
    total = tl.zeros((BT, BC), tl.float32)
    for back in tl.static_range(W):
        value = _earlier(x, states, first, i, document, place, channels, valid, back, x_row, C, W)
        total += value * _tap(weight, channels, W - 1 - back, weight_row, weight_tap, C)[None, :]
    y = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
    tl.store(out + first * C + (i[:, None] * C + channels[None, :]), y, mask=valid)


@triton.jit
def sums_kernel(
    grad, x, weight, documents, places, states, sums, partial, tokens, x_row, weight_row, weight_tap,
    C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient dz of the sums [T, C] and its part in that of the weight, partial [tiles of tokens, W, C]."""
    first, i, document, place, channels, valid = _tile(documents, places, tokens, C, BT, BC)
    total = tl.zeros((BT, BC), tl.float32)
    for back in tl.static_range(W):
        value = _earlier(x, states, first, i, document, place, channels, valid, back, x_row, C, W)
        total += value * _tap(weight, channels, W - 1 - back, weight_row, weight_tap, C)[None, :]
    tile = i[:, None] * C + channels[None, :]
    gate = tl.sigmoid(total)
    dz = tl.load(grad + first * C + tile, mask=valid, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
    tl.store(sums + first * C + tile, dz, mask=valid)
    partial += tl.program_id(0).to(tl.int64) * W * C + channels
    for back in tl.static_range(W):
        value = _earlier(x, states, first, i, document, place, channels, valid, back, x_row, C, W)
        tl.store(partial + (W - 1 - back) * C, tl.sum(dz * value, 0), mask=channels < C)


@triton.jit
def inputs_kernel(
    sums, weight, places, dx, tokens, weight_row, weight_tap,
    C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx from dz: a later token has this one among its inputs if it is in the same document."""
    first = tl.program_id(0).to(tl.int64) * BT
    i, channels = tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (channels < C)[None, :]
    tile = i[:, None] * C + channels[None, :]
    total = tl.zeros((BT, BC), tl.float32)
    for ahead in tl.static_range(W):
        later = first + ahead + i
        same = tl.load(places + later, mask=later < tokens, other=-1) >= ahead
        dz = tl.load(sums + (first + ahead) * C + tile, mask=same[:, None] & inside, other=0.0)
        total += dz * _tap(weight, channels, W - 1 - ahead, weight_row, weight_tap, C)[None, :]
    tl.store(dx + first * C + tile, total.to(dx.dtype.element_ty), mask=(first + i < tokens)[:, None] & inside)


@triton.jit
def decode_kernel(
    x, weight, out, cache, slots, fresh, x_row, weight_row, weight_tap, slot_stride,
    C: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and block of channels; negative slots are padding."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    block, sequence = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    inside = channels < C
    out += sequence * C + channels
    slot = tl.load(slots + sequence).to(tl.int64)
    if slot < 0:
        tl.store(out, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
        return
    known = inside
    if fresh is not None:
        # Not read at all: a product with zero would keep the NaN of the slot's last owner.
        known = inside & (tl.load(fresh + sequence) == 0)
    state = cache + slot * slot_stride + channels
    newest = tl.load(x + sequence * x_row + channels, mask=inside, other=0.0).to(tl.float32)
    total = newest * _tap(weight, channels, W - 1, weight_row, weight_tap, C)
    for place in tl.static_range(W - 1):
        older = tl.load(state + place * C, mask=known, other=0.0).to(tl.float32)
        total += older * _tap(weight, channels, place, weight_row, weight_tap, C)
        if place > 0:
            # The row before has been read already, by the same thread.
            tl.store(state + (place - 1) * C, older.to(cache.dtype.element_ty), mask=inside)
    if W > 1:
        tl.store(state + (W - 2) * C, newest.to(cache.dtype.element_ty), mask=inside)
    tl.store(out, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside)
