"""Grouped-query attention of the hybrid families: with or without an output gate, norms of queries and keys, biases.

q (, gate), k, v = projections(x) -> norms of q, k -> rotary -> softmax -> * sigmoid(gate) -> o_proj
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cispo.policies.attention import Attention
from cispo.policies.hybrid.config import GQAConfig
from cispo.policies.layers import apply_rotary


class GQA(nn.Module):
    """`GQAConfig` as a mixer; rotary turns the first dims of each head, dim i with dim i + half."""

    def __init__(self, hidden: int, config: GQAConfig, norm: Callable[[int], nn.Module]) -> None:
        """`norm` makes a norm of the policy's kind, of a given size."""
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries * (2 if config.gate else 1), bias=config.bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.output_bias)
        joint = config.qk_norm == "joint"
        self.q_norm = norm(queries if joint else config.head_dim) if config.qk_norm else None
        self.k_norm = norm(keys if joint else config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        dim, gate = self.config.head_dim, None
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x).unflatten(-1, (-1, dim))
        if self.config.gate:
            q, gate = (part.flatten(1) for part in q.unflatten(-1, (-1, 2 * dim)).chunk(2, -1))
        if self.config.qk_norm == "joint" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim))
        if self.config.qk_norm == "head" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        attended = attention.softmax(q, k, v).flatten(1)
        return self.o_proj(attended if gate is None else attended * torch.sigmoid(gate))
