"""The gated delta rule on a GPU from and to the slots of a cache: one kernel, token by token, for prompts and decoding.

    program     one document, value head and block of value dims; its state stays in registers
    token       S <- Diag(e^g) S ;  u = beta (v - S^T k) ;  S <- S + k u^T ;  o = S^T q        all in float32

Prompts and decoding have the same arithmetic, but for the order of sums over key dims, which follows the tile. Value
dims are independent of each other: narrow blocks make enough programs to hide the latency of a token. Nothing is read
back to the host.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# A kernel is launched as kernel[grid](...), and its values are Triton's; the checker sees plain functions and numbers.

from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


class Tiles(NamedTuple):
    """A program's block of value dims, and its warps."""

    block: int
    warps: int


PREFILL = Tiles(8, 1)
"""A warp a program: sums over key dims need no barrier."""
DECODE = Tiles(32, 4)
"""Whole sectors of each row of the state: a step is bound by memory."""


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    tiles: Tiles = PREFILL,
) -> Tensor:
    """`delta.delta_prefill`; negative slots are padding with outputs of zero."""
    return _launch(q, k, v, g, beta, cu_seqlens, cache, slots, fresh, tiles)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None = None,
    tiles: Tiles = DECODE,
) -> Tensor:
    """`delta.delta_decode` in one launch that depends on no value in a tensor."""
    return _launch(q, k, v, g, beta, None, cache, slots, fresh, tiles)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    cache: Tensor,
    slots: Tensor,
    fresh: Tensor | None,
    tiles: Tiles,
) -> Tensor:
    heads, key, value = v.shape[1], k.shape[2], v.shape[2]
    assert cache.dtype == torch.float32 and cache.shape[1:] == (heads, key, value)
    assert not len(cache) or cache[0].is_contiguous()
    # Slices of a projection are taken as they are: only the last axis has to be dense.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    g = g if g.ndim == 2 or g.stride(-1) == 1 else g.contiguous()
    slots, fresh = slots.contiguous(), None if fresh is None else fresh.contiguous().view(torch.uint8)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block = min(tiles.block, triton.next_power_of_2(value))
    programs = len(slots) * heads * triton.cdiv(value, block)
    if programs:
        delta_kernel[(programs,)](
            q, k, v, g, beta, out, cu_seqlens, cache, slots, fresh, heads, heads // k.shape[1],
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            g.stride(0), g.stride(1), beta.stride(0), beta.stride(1), cache.stride(0),
            K=key, V=value, BK=triton.next_power_of_2(key), BV=block, PER_CHANNEL=g.ndim == 3, num_warps=tiles.warps,
        )  # fmt: skip
    return out


@triton.jit
def delta_kernel(
    q, k, v, g, beta, out, cu_seqlens, cache, slots, fresh, heads, ratio,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, slot_stride,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """The tokens of one document, head and block of value dims; without cu_seqlens document i is token i."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, document = rest % heads, (rest // heads).to(tl.int64)
    begin, tokens = document, 1
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + document).to(tl.int64)
        tokens = (tl.load(cu_seqlens + document + 1) - begin).to(tl.int32)
    keys, values = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    of_keys, of_values = keys < K, values < V
    q += begin * q_row + head // ratio * q_head + keys
    k += begin * k_row + head // ratio * k_head + keys
    v += begin * v_row + head * v_head + values
    g += begin * g_row + head * g_head
    beta += begin * beta_row + head * beta_head
    out += (begin * heads + head) * V + values
    slot = tl.load(slots + document).to(tl.int64)
    used = slot >= 0
    inside = of_keys[:, None] & of_values[None, :]
    place = cache + tl.maximum(slot, 0) * slot_stride + head * K * V + (keys[:, None] * V + values[None, :])
    known = inside & used
    if fresh is not None:
        # Not read at all: a product with zero would keep the NaN of the slot's last owner.
        known = known & (tl.load(fresh + document) == 0)
    state = tl.load(place, mask=known, other=0.0)
    b_q, b_k, b_v, decay, b_beta = _load(q, k, v, g, beta, keys, of_keys, of_values, tokens > 0, PER_CHANNEL)
    for t in range(tokens):
        q += q_row
        k += k_row
        v += v_row
        g += g_row
        beta += beta_row
        # The next token's inputs are on their way while this one's update waits for its sums.
        n_q, n_k, n_v, n_decay, n_beta = _load(
            q, k, v, g, beta, keys, of_keys, of_values, t + 1 < tokens, PER_CHANNEL
        )  # fmt: skip
        state *= decay
        update = b_beta * (b_v - tl.sum(b_k[:, None] * state, 0))
        state += b_k[:, None] * update[None, :]
        b_o = tl.where(used, tl.sum(b_q[:, None] * state, 0), 0.0)
        tl.store(out, b_o.to(out.dtype.element_ty), mask=of_values)
        out += heads * V
        b_q, b_k, b_v, decay, b_beta = n_q, n_k, n_v, n_decay, n_beta
    tl.store(place, state, mask=inside & used)


@triton.jit
def _load(q, k, v, g, beta, keys, of_keys, of_values, exists, PER_CHANNEL: tl.constexpr):
    """A token's q and k [BK], v [BV], decay [BK, 1] or a number, and beta, in float32."""
    b_q = tl.load(q, mask=of_keys & exists, other=0.0).to(tl.float32)
    b_k = tl.load(k, mask=of_keys & exists, other=0.0).to(tl.float32)
    b_v = tl.load(v, mask=of_values & exists, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        decay = tl.exp(tl.load(g + keys, mask=of_keys & exists, other=0.0).to(tl.float32))[:, None]
    else:
        decay = tl.exp(tl.load(g, mask=exists, other=0.0).to(tl.float32))
    return b_q, b_k, b_v, decay, tl.load(beta, mask=exists, other=0.0).to(tl.float32)
