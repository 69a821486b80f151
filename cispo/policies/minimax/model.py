"""The MiniMax-01 policy: lightning and softmax attention layers, each followed by a mixture of experts.

    tokens [T] -> embed -> { norm -> attention -> norm -> experts } x L -> norm -> hidden [T, d]

The conventions of the two dialects are in `config`. A residual is alpha * residual + beta * branch; with
postnorm the residual is the normalised input (arXiv 2501.08313, section 2.2.3), else the input itself.

Decay slopes are computed from the config in float32 and are neither parameters nor buffers: casting the policy does
not touch them and a checkpoint does not hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cispo.ops.lightning import LIGHTNING
from cispo.policies.attention import Attention
from cispo.policies.layers import RMSNorm, SwiGLU, apply_rotary, rotary_table
from cispo.policies.minimax.config import (
    LIGHTNING_NORM_EPS,
    LightningConfig,
    dump_config,
    parse_config,
    shared_size_of_weights,
)
from cispo.policies.minimax.names import disk_names, place_of
from cispo.policies.moe import MoE
from cispo.policies.policy import HFConfig, Place, Policy, PolicyOutput, RouterOutput, with_memory

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that are carried from load to save; the shape does not depend on them."""

RunExperts = Callable[[MoE, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""`MoE.forward`, or another form of the same arithmetic."""


class LightningAttention(nn.Module):
    """Gated lightning attention: out(sigmoid(gate(x)) * norm(attention(silu(qkv(x)))))."""

    def __init__(self, config: LightningConfig, layer: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.norm = RMSNorm(inner, LIGHTNING_NORM_EPS)
        with torch.device("cpu"):  # real values also where the weights are built on the meta device
            self.slopes = config.slopes(layer)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        if self.slopes.device != x.device:
            self.slopes = self.slopes.to(x.device)
        # Interleaved per head: q, k and v of head 0, then of head 1, ...
        heads = F.silu(self.qkv_proj(x)).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        q, k, v = heads.split(self.head_dim, dim=-1)
        attended = attention.recurrent(LIGHTNING, q, k, v, self.slopes)
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(attended.flatten(1)))


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, attention: Attention, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = attention.softmax(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)
        return self.o_proj(attended.flatten(1))


class Layer(nn.Module):
    """One block: attention, then experts, each behind a norm and a weighted residual."""

    def __init__(self, config: LightningConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.lightning = config.lightning_layers[layer]
        self.self_attn = LightningAttention(config, layer) if self.lightning else SoftmaxAttention(config)
        self.mlp = MoE(hidden, config.intermediate_size, config.num_experts, config.experts_per_token)
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.shared_mlp = SwiGLU(hidden, config.shared_size) if config.shared_size else None
        self.coefficient = nn.Linear(hidden, 1, bias=False) if config.shared_size else None
        self.postnorm = config.postnorm
        self.attention_factors = config.attention_factors(layer)
        self.mlp_factors = config.mlp_alpha, config.mlp_beta

    def forward(
        self, x: Tensor, attention: Attention, cos: Tensor, sin: Tensor, routes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d], routes [T, k] or None, to x [T, d] and the router's probs [T, E] and chosen [T, k]."""
        normed = self.input_layernorm(x)
        rotary = () if self.lightning else (cos, sin)
        x = self.residual(x, normed, self.self_attn(normed, attention, *rotary), self.attention_factors)
        normed = self.post_attention_layernorm(x)
        branch, probs, chosen = self.mix_experts(normed, routes=routes)
        return self.residual(x, normed, branch, self.mlp_factors), probs, chosen

    def mix_experts(
        self, normed: Tensor, run: RunExperts = MoE.__call__, routes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The second branch [T, d], of routed and shared experts, and the router's probs and chosen."""
        branch, probs, chosen = run(self.mlp, normed, routes)
        if self.shared_mlp is not None and self.coefficient is not None:
            wide = torch.promote_types(normed.dtype, torch.float32)
            share = torch.sigmoid(F.linear(normed.to(wide), self.coefficient.weight.to(wide))).to(normed.dtype)
            branch = branch * (1 - share) + self.shared_mlp(normed) * share
        return branch, probs, chosen

    def residual(self, x: Tensor, normed: Tensor, branch: Tensor, factors: tuple[float, float]) -> Tensor:
        alpha, beta = factors
        return torch.add(beta * branch, normed if self.postnorm else x, alpha=alpha)


class LightningPolicy(Policy):
    """A MiniMax-01 model: packed tokens in, hidden states and router outputs out."""

    read_as_matrices = ("coefficient",)

    def __init__(self, config: LightningConfig, special_tokens: HFConfig) -> None:
        """`special_tokens` may hold other keys, which are ignored: a config.json as it is, say."""
        super().__init__()
        self.config = config
        self.special_tokens = {k: v for k, v in special_tokens.items() if k in SPECIAL_TOKENS}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def lm_head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def router_shape(self) -> tuple[int, int]:
        return len(self.layers), self.config.num_experts

    def attend(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routes: Tensor | None = None
    ) -> PolicyOutput:
        cos, sin = rotary_table(positions, self.config.rotary_dim, self.config.rope_theta)
        x = self.embed_tokens(tokens)
        router = []
        for number, layer in enumerate(self.layers):
            inputs = x, attention, cos, sin, None if routes is None else routes[:, number]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                outputs = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
                assert outputs is not None
            else:
                outputs = layer(*inputs)
            x, probs, chosen = outputs
            router.append(RouterOutput(probs, chosen))
        return PolicyOutput(self.norm(x), tuple(router))

    def hf_config(self) -> dict[str, Any]:
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        return {**dump_config(self.config), **self.special_tokens, "dtype": dtype}

    def place_of(self, name: str) -> Place | None:
        """Takes the names of Hugging Face (experts one by one or fused) and of the original."""
        place = place_of(name)
        tied = self.lm_head is None and place is not None and place.parameter == "lm_head.weight"
        return None if tied else place

    def disk_places(self) -> Iterator[tuple[str, Place]]:
        for name, _ in self.named_parameters():
            yield from disk_names(name, self.config.num_experts)


def build(config: HFConfig, folder: Path | None, dtype: torch.dtype) -> LightningPolicy:
    """A policy with undefined weights on torch's default device; `folder` holds the weights that it will get, if any.

    Raises UserError where the config has no meaning in this family.
    """
    device = torch.get_default_device()
    shared_size = None if folder is None else shared_size_of_weights(folder)
    with torch.device("meta"):  # no time spent on torch's own initial weights
        policy = LightningPolicy(parse_config(config, shared_size=shared_size), config).to(dtype)
    return with_memory(policy, device)
