"""Layers that policies share: RMSNorm, rotary embedding, packed softmax attention, SwiGLU.

Activations are flat: [T, d] or [T, heads, D], with cu_seqlens [S + 1] saying where documents start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


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
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax attention inside each document, [T, H, D]; nothing crosses from one document to another.

    q [T, H, D]; k, v [T, K, D] with H a multiple of K (arXiv 2305.13245); cu_seqlens [S + 1], documents may be
    empty; scale is 1 / sqrt(D) where None. Documents are padded on the right: the causal mask alone keeps padding out.
    """
    lengths, starts, tokens = cu_seqlens.diff().long(), cu_seqlens[:-1].long(), len(q)
    if not tokens:
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    q, k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (q, k, v))
    outputs, owners = [], []
    for documents in _similar_lengths(lengths):
        steps = torch.arange(int(lengths[documents].max()), device=q.device)
        # The token of each padded position; the row of zeros that was just appended where a document has ended.
        token = torch.where(steps < lengths[documents, None], starts[documents, None] + steps, tokens)
        padded = [x.index_select(0, token.flatten()).unflatten(0, token.shape) for x in (q, k, v)]
        outputs.append(_attend(padded[0], padded[1], padded[2], scale).flatten(0, 1))
        owners.append(token.flatten())
    owner = torch.cat(owners)
    place = torch.empty(tokens + 1, dtype=torch.long, device=q.device)
    place[owner] = torch.arange(len(owner), device=q.device)
    return torch.cat(outputs).index_select(0, place[:tokens])


def _similar_lengths(lengths: Tensor) -> list[Tensor]:
    """Documents in groups whose lengths are within a factor of two, so that padding at most doubles a group."""
    groups = []
    upper = int(lengths.max()) if len(lengths) else 0
    while upper > 0:
        group = ((lengths <= upper) & (lengths > upper // 2)).nonzero().squeeze(1)
        if len(group):
            groups.append(group)
        upper //= 2
    return groups


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of a padded batch, [documents, width, heads, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
