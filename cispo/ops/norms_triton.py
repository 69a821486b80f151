"""The kernels of `norms`: a program a row, whose values stay in registers from the first operand to the last result."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# A kernel is launched as kernel[grid](...), and its values are Triton's; the checker sees plain functions and numbers.

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    alpha: float,
    beta: float,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norms.residual_norm`."""
    residual, branch = _rows(residual), _rows(branch)
    rows, size = residual.shape
    parts = 1
    if shares is not None:
        parts, shares, branch = shares.shape[1], shares.contiguous(), branch.contiguous().flatten(1)
    assert branch.shape == (rows, parts * size) and residual.dtype == branch.dtype and weight.is_contiguous()
    total, normed = _like(residual), _like(residual)
    if rows:
        residual_norm_kernel[(rows,)](
            residual, branch, shares, weight, total, normed, residual.stride(0), branch.stride(0), alpha, beta, eps,
            PARTS=parts, N=size, **_constants(size),
        )  # fmt: skip
    return total, normed


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norms.gated_norm`."""
    x, gate = _rows(x), _rows(gate)
    assert x.shape == gate.shape and x.dtype == gate.dtype and weight.is_contiguous()
    out = _like(x)
    rows, size = x.shape
    if rows:
        gated_norm_kernel[(rows,)](
            x, gate, weight, out, x.stride(0), gate.stride(0), eps, N=size, **_constants(size)
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """A part of a joint projection is taken as it is: only the last axis has to be dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _constants(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BN": block, "num_warps": max(1, min(16, block // 512))}


@triton.jit
def _norm(x, weight, eps, i, inside, N: tl.constexpr):
    """The norm of a float32 row, zero outside, rounded to the weight's dtype."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    scaled = x * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    return scaled.to(weight.dtype.element_ty)


@triton.jit
def residual_norm_kernel(
    residual, branch, shares, weight, total, normed, residual_row, branch_row, alpha, beta, eps,
    PARTS: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row of x = alpha * residual + beta * branch and of its norm; total and normed are dense.

    A row of `branch` is its parts one after another, each with its share.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    inside = i < N
    b_residual = tl.load(residual + row * residual_row + i, mask=inside, other=0.0).to(tl.float32)
    branch += row * branch_row + i
    b_branch = tl.load(branch, mask=inside, other=0.0).to(tl.float32)
    if shares is not None:
        b_branch *= tl.load(shares + row * PARTS)
        for part in tl.static_range(1, PARTS):
            share = tl.load(shares + row * PARTS + part)
            b_branch += tl.load(branch + part * N, mask=inside, other=0.0).to(tl.float32) * share
        b_branch = b_branch.to(total.dtype.element_ty).to(tl.float32)
    scaled = (b_branch * beta).to(total.dtype.element_ty).to(tl.float32)
    x = (scaled + b_residual * alpha).to(total.dtype.element_ty)
    tl.store(total + row * N + i, x, mask=inside)
    tl.store(normed + row * N + i, _norm(x.to(tl.float32), weight, eps, i, inside, N), mask=inside)


@triton.jit
def gated_norm_kernel(x, gate, weight, out, x_row, gate_row, eps, N: tl.constexpr, BN: tl.constexpr):
    """One row of sigmoid(gate) * norm(x); out is dense."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    inside = i < N
    b_x = tl.load(x + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + row * gate_row + i, mask=inside, other=0.0).to(tl.float32)
    opened = (1 / (1 + tl.exp(-b_gate))).to(out.dtype.element_ty).to(tl.float32)
    product = opened * _norm(b_x, weight, eps, i, inside, N).to(tl.float32)
    tl.store(out + row * N + i, product.to(out.dtype.element_ty), mask=inside)
