"""RMSNorm joined with the operations beside it, without gradient: one launch each for an engine's decode step.

    residual_norm    x = alpha * residual + beta * branch,  norm(x)        between a branch of a layer and the next one
    gated_norm       sigmoid(gate) * norm(x)                               behind lightning attention

norm(x) = x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467). Every result that the
learner's layers round to their dtype is rounded here too: the branch, the branch times beta, the sum, the sigmoid, the
norm and the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cispo.ops.backend import Backend, choose_backend


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    shares: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """x = alpha * residual + beta * branch and its norm; all [T, n] of one dtype, weight [n].

    With `shares` [T, k] float32 the branch is [T, k, n], and the sum of its rows by their shares counts.
    """
    if choose_backend(backend, residual, branch, weight) == "triton":
        from cispo.ops import norms_triton

        return norms_triton.residual_norm(residual, branch, weight, eps, alpha, beta, shares)
    if shares is not None:
        branch = (branch * shares[..., None]).sum(1).to(branch.dtype)
    total = torch.add(branch if beta == 1 else beta * branch, residual, alpha=alpha)
    return total, _norm(total, weight, eps)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: Backend | None = None) -> Tensor:
    """sigmoid(gate) * norm(x); x, gate and the result [T, n] of one dtype, weight [n]."""
    if choose_backend(backend, x, gate, weight) == "triton":
        from cispo.ops import norms_triton

        return norms_triton.gated_norm(x, gate, weight, eps)
    return torch.sigmoid(gate) * _norm(x, weight, eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)
