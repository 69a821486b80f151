"""Gated lightning attention of Ling and Ring 2.5 (arXiv 2401.04658 for the recurrence).

    x -> q, k, v -> norms of q, k -> rotary -> state <- exp(-slope) state + k^T v -> grouped norm * sigmoid(g) -> out

The MiniMax-01 policy has a lightning layer of its own: interleaved projections, SiLU, no positions, one norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cispo.ops.lightning import LIGHTNING
from cispo.policies.attention import Attention
from cispo.policies.hybrid.config import LightningMixerConfig
from cispo.policies.layers import RMSNorm, apply_rotary


class Lightning(nn.Module):
    """`LightningMixerConfig` as a mixer; rotary turns the first dims of each head, dim i with dim i + half."""

    def __init__(self, hidden: int, config: LightningMixerConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        self.query_key_value = nn.Linear(hidden, 3 * inner, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_layernorm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.g_proj = nn.Linear(hidden, inner, bias=False)
        self.g_norm = GroupedRMSNorm(inner, config.norm_groups, config.norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        with torch.device("cpu"):  # real values also where the weights are built on the meta device
            self.slopes = torch.tensor(config.slopes, dtype=torch.float64).float()

    def forward(self, x: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [T, d] to [T, d]."""
        config = self.config
        if self.slopes.device != x.device:
            self.slopes = self.slopes.to(x.device)
        q, k, v = self.query_key_value(x).unflatten(-1, (3, config.num_heads, -1)).unbind(1)
        if self.query_layernorm is not None and self.key_layernorm is not None:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        if config.rotary:
            assert rotary is not None
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        attended = attention.recurrent(LIGHTNING, q * config.scale, k, v, self.slopes)
        return self.o_proj(self.g_norm(attended.flatten(1)) * torch.sigmoid(self.g_proj(x)))


class GroupedRMSNorm(nn.Module):
    """RMSNorm with a mean square for each of `groups` equal parts of the last axis, and one weight for all of it."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        parts = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        normed = parts * (parts.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed.flatten(-2) * self.weight).to(x.dtype)
