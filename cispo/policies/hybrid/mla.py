"""Multi-head latent attention (arXiv 2405.04434, section 2.1), with or without positions, and DSA's indexer.

    x -> [q_a -> norm -> q_b | q] -> q = [nope | rope] a head
    x -> kv_a -> [latent | rope]; latent -> norm -> kv_b -> [k_nope | v] a head; k = [k_nope | rope shared by all heads]
    x, normed q_a -> indexer -> Index, with which attention is `sparse_softmax`

Keys and values are expanded from the latents before attention sees them. The absorbed form, scores against the latents
themselves, is the same function: its products are larger, and it pays only where a cache of latents is read, which is
vLLM's (`vllm_latents`).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.ops.expansion import Absorbed, Expansion
from cispo.ops.sparse_attention import Index
from cispo.policies.attention import Attention, latent_attention
from cispo.policies.hybrid.config import IndexerConfig, MLAConfig
from cispo.policies.layers import RMSNorm, apply_rotary

RotaryTable: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin, [T, 1, half of the rotated dims]."""


class MultiHeadLatentAttention(nn.Module):
    """out(attention(q, k, v)) of one layer; scores are multiplied by `config.scale`."""

    def __init__(self, hidden: int, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        queries, bias = config.num_heads * (config.nope_dim + config.rope_dim), config.bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        expanded = config.num_heads * (config.nope_dim + config.value_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.value_dim, hidden, bias=bias)
        if config.indexer is None:
            self.indexer = None
        else:
            assert config.q_lora_rank is not None, "an indexer reads the queries' latents"
            self.indexer = Indexer(hidden, config.q_lora_rank, config.indexer)

    def forward(self, x: Tensor, attention: Attention, rotary: RotaryTable | None) -> Tensor:
        """x [T, d] to [T, d]; `rotary` turns the rope dims of queries and keys, None where `config.rotary` is None."""
        config = self.config
        latent_q = x if config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))
        q = (self.q_proj if config.q_lora_rank is None else self.q_b_proj)(latent_q)
        q = q.unflatten(-1, (config.num_heads, -1))
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.rope_dim], -1)
        k_rope = k_rope[:, None]
        if config.rotary is not None:
            assert rotary is not None
            q_nope, q_rope = q.split([config.nope_dim, config.rope_dim], -1)
            pairs = config.rotary == "pairs"
            q = torch.cat([q_nope, turn(q_rope, rotary, pairs=pairs)], -1)
            k_rope = turn(k_rope, rotary, pairs=pairs)
        index = None if self.indexer is None else self.indexer(x, latent_q, rotary)
        latents = self.kv_a_layernorm(latent), k_rope
        attended = latent_attention(attention, q, latents, self.expansion, config.scale, index)
        return self.o_proj(attended.flatten(1))

    @property
    def expansion(self) -> Expansion:
        """Keys and values of `forward`'s latents; one a pass, since FSDP and adapters replace parameters."""
        absorbed = Absorbed(queries=self._absorb, values=self._sum_values)
        return Expansion(self._expand, tuple(self.kv_b_proj.parameters()), absorbed)

    def _expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, H, nope + rope] and values [n, H, value_dim] of normed latents [n, R] and k_rope [n, 1, rope]."""
        config = self.config
        expanded = self.kv_b_proj(latent).unflatten(-1, (config.num_heads, -1))
        k_nope, v = expanded.split([config.nope_dim, config.value_dim], -1)
        return torch.cat([k_nope, k_rope.expand(-1, config.num_heads, -1)], -1), v

    def _absorb(self, q: Tensor) -> Tensor:
        """q [T, H, nope + rope] to queries of latents [T, H, R + rope]."""
        q_nope, q_rope = q.split([self.config.nope_dim, self.config.rope_dim], -1)
        return torch.cat([torch.einsum("thn,hnr->thr", q_nope, self._up[0]), q_rope], -1)

    def _sum_values(self, latent: Tensor) -> Tensor:
        """Sums of weighted latents [T, H, R] to [T, H, value_dim]."""
        return torch.einsum("thr,hvr->thv", latent, self._up[1])

    @property
    def _up(self) -> tuple[Tensor, Tensor]:
        """The weight of keys [H, nope, R] and that of values [H, value_dim, R]: views, which follow weight updates."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.config.num_heads, -1))
        k_up, v_up = weight.split([self.config.nope_dim, self.config.value_dim], 1)
        return k_up, v_up


class Indexer(nn.Module):
    """DSA's lightning indexer (arXiv 2512.02556, section 2.1): frozen, since a selection has no gradient.

    The published code puts a Hadamard transform, which is orthogonal, and fp8 before the products; neither is here.
    """

    def __init__(self, hidden: int, q_lora_rank: int, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(q_lora_rank, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(hidden, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, config.norm_eps)
        self.weights_proj = nn.Linear(hidden, config.num_heads, bias=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor, latent_q: Tensor, rotary: RotaryTable | None) -> Index:
        """x [T, d] and the queries' normed latents [T, q_lora_rank]; `rotary` turns the first dims of every head."""
        config, keys = self.config, self.k_norm(self.wk(x))[:, None]
        queries = self.wq_b(latent_q).unflatten(-1, (config.num_heads, config.head_dim))
        if rotary is not None:
            queries, keys = (turn(y, rotary, pairs=config.interleaved_rotary) for y in (queries, keys))
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = F.linear(x.to(wide), self.weights_proj.weight.to(wide))
        scale = config.num_heads**-0.5 * config.head_dim**-0.5
        return Index(queries=queries, keys=keys[:, 0], weights=weights * scale, top_k=config.top_k)


def turn(x: Tensor, rotary: RotaryTable, *, pairs: bool) -> Tensor:
    """Rotates the first dims of x [T, heads, D]: `pairs` are neighbours (2i, 2i + 1), else i goes with i + half.

    Rotated pairs come out as halves, all first members before all second ones: queries and keys alike, so that their
    products are those of neighbours.
    """
    if not pairs:
        return apply_rotary(x, *rotary)
    rotated = 2 * rotary[0].shape[-1]
    halves = x[..., :rotated].unflatten(-1, (-1, 2)).mT.flatten(-2)
    return apply_rotary(halves if rotated == x.shape[-1] else torch.cat([halves, x[..., rotated:]], -1), *rotary)
