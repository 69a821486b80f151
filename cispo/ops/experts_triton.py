"""The kernels of `experts`: a program an expert and a block of output columns, which takes its tokens block by block.

    weights [BN, BK] x tokens [BK, BM], summed over BK in float32: columns are the product's long side, tokens its short

A step of few tokens is bound by reading the weights, each of them once: programs are many and narrow, and each finds
the tokens of its expert itself, which saves the launch that would sort them.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# A kernel is launched as kernel[grid](...), and its values are Triton's; the checker sees plain functions and numbers.

from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


class Tiles(NamedTuple):
    """A program's output columns and columns summed at a time; its warps and pipeline stages."""

    columns: int
    depth: int
    warps: int
    stages: int


GATE_UP = Tiles(64, 64, 4, 4)
DOWN = Tiles(64, 128, 4, 4)


def expert_rows(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    chosen: Tensor,
    gate_up_tiles: Tiles = GATE_UP,
    down_tiles: Tiles = DOWN,
) -> Tensor:
    """`experts.expert_rows`."""
    experts, hidden, width = down_proj.shape
    tokens, k = chosen.shape
    assert x.shape == (tokens, hidden) and gate_up_proj.shape == (experts, 2 * width, hidden)
    assert x.dtype == gate_up_proj.dtype == down_proj.dtype
    x, chosen = x.contiguous(), chosen.contiguous()
    assert gate_up_proj.is_contiguous() and down_proj.is_contiguous()
    inner = torch.empty(tokens * k, width, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, k, hidden, dtype=x.dtype, device=x.device)
    if tokens:
        _launch(x, gate_up_proj, chosen, inner, k, width, gate_up_tiles, gated=True)
        _launch(inner, down_proj, chosen, out, 1, hidden, down_tiles, gated=False)
    return out


def weigh_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """`experts.weigh_rows`."""
    tokens, k, size = rows.shape
    rows, weights = rows.contiguous(), weights.contiguous()
    out = torch.empty(tokens, size, dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(size))
    if tokens:
        weigh_kernel[(tokens, triton.cdiv(size, block))](rows, weights, out, K=k, N=size, BN=block, num_warps=4)
    return out


def _launch(
    x: Tensor, weight: Tensor, chosen: Tensor, out: Tensor, spread: int, columns: int, tiles: Tiles, *, gated: bool
) -> None:
    """Row r of `out` is that of the expert chosen[r], of row r // spread of x."""
    experts, depth, rows = len(weight), weight.shape[2], chosen.numel()
    # Twice the mean of an expert's rows: a second block of them would read the weights once more.
    block = min(64, max(16, triton.next_power_of_2(2 * rows // experts)))
    product_kernel[(triton.cdiv(columns, tiles.columns) * experts,)](
        x, weight, chosen, out, rows, experts, columns, depth, SPREAD=spread, GATED=gated,
        EVEN=columns % tiles.columns == 0 and depth % tiles.depth == 0, ROWS=max(64, triton.next_power_of_2(rows)),
        BM=block, BN=tiles.columns, BK=tiles.depth, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])  # one kernel for most sizes of a step
def product_kernel(
    x, weight, chosen, out, rows, experts, columns, depth, SPREAD: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A block of columns of one expert's rows: x W^T, or silu(x W^T) * (x V^T) with V behind W."""
    blocks = tl.cdiv(columns, BN)
    block, expert = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    every, i = tl.arange(0, ROWS), tl.arange(0, BM)
    own = (tl.load(chosen + every, mask=every < rows, other=-1) == expert).to(tl.int32)
    count, place = tl.sum(own, 0), tl.cumsum(own, 0) - 1
    n, k = block * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside = (n < columns)[:, None]
    w_at = weight + expert.to(tl.int64) * (2 if GATED else 1) * columns * depth + n[:, None] * depth + k[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    for first in range(0, count, BM):
        found = (own[None, :] == 1) & (place[None, :] == first + i[:, None])
        row, there = tl.sum(tl.where(found, every[None, :], 0), 1), first + i < count
        x_at = x + (row // SPREAD)[:, None].to(tl.int64) * depth + k[None, :]
        total = tl.zeros((BN, BM), tl.float32)
        other = tl.zeros((BN, BM), tl.float32)
        for start in range(0, depth, BK):
            if EVEN:
                b_x = tl.load(x_at + start, mask=there[:, None], other=0.0)
                b_w = tl.load(w_at + start)
            else:
                known = (k < depth - start)[None, :]
                b_x = tl.load(x_at + start, mask=there[:, None] & known, other=0.0)
                b_w = tl.load(w_at + start, mask=inside & known, other=0.0)
            total = tl.dot(b_w, tl.trans(b_x), total, input_precision="ieee")
            if GATED:
                v_at = w_at + columns * depth + start
                if EVEN:
                    b_v = tl.load(v_at)
                else:
                    b_v = tl.load(v_at, mask=inside & (k < depth - start)[None, :], other=0.0)
                other = tl.dot(b_v, tl.trans(b_x), other, input_precision="ieee")
        result = total.to(dtype)
        if GATED:
            gate, up = result.to(tl.float32), other.to(dtype).to(tl.float32)
            opened = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
            result = (opened * up).to(dtype)
        out_at = out + row[None, :].to(tl.int64) * columns + n[:, None]
        tl.store(out_at, result, mask=there[None, :] & inside)


@triton.jit
def weigh_kernel(rows, weights, out, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """A block of one token's mixture."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows + (token * K + j) * N + i, mask=i < N, other=0.0).to(tl.float32)
        total += row * tl.load(weights + token * K + j).to(tl.float32)
    tl.store(out + token * N + i, total.to(out.dtype.element_ty), mask=i < N)
