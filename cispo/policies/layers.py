"""Layers that policies share: RMSNorm, rotary embedding, SwiGLU. Activations are flat: [T, d] or [T, heads, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.ops.autograd import Context


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:
            # One kernel, float32 inside for every dtype; on a CPU it would round before the weight.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = _RMSNorm.apply(x.to(wide), self.weight.to(wide), self.eps)
        return normed.to(x.dtype)  # type: ignore[union-attr]


class CentredRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last axis, in float32: the weight is zero where the norm is neutral."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        if x.is_cuda:
            return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)
        return _RMSNorm.apply(x.to(wide), weight, self.eps).to(x.dtype)  # type: ignore[union-attr]


class _RMSNorm(torch.autograd.Function):
    """In the fewest passes over x: F.rms_norm is a dozen operations on a CPU, and two and a half times as long.

    With r = 1 / rms(x) the gradient of x is r g w - x r^3 mean(g w x).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight, scale) = grads, ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        means = torch.mv(products, weight).view_as(scale).div_(-x.shape[-1])
        grad_x = (grad * weight).mul_(scale).addcmul_(x, means.mul_(scale**3))
        return grad_x, torch.mv(products.mT, scale.flatten()), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, rotary_dim / 2] float32 of position * theta^(-2i / rotary_dim) (arXiv 2104.09864)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.float()[:, None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] dims of x [T, heads, D], dim i with dim i + half; the rest pass through."""
    rotated = 2 * cos.shape[-1]
    turned = rotate(x[..., :rotated], torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    return (turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], -1)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dim i of x [T, heads, D] with dim i + D / 2; cos and sin [T, 1, D] hold every angle twice."""
    return _Rotation.apply(x, cos, sin)  # type: ignore[return-value]


class _Rotation(torch.autograd.Function):
    """Three passes over x, and three over its gradient, which is rotated back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        signed = signed_sine(sin)
        ctx.save_for_backward(cos, signed)
        return turned(x, cos, signed)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        return turned(grads[0], cos, -signed), None, None


def signed_sine(sin: Tensor) -> Tensor:
    """The sine that `turned` takes, [..., D], of one that has every angle twice: the first half is negated."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def turned(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """x * cos + swap(x) * signed: swap exchanges the halves of the last axis."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed)
