"""Ling and Ring 2.5 by their equations, as a model that transformers loads and saves: a test's reference.

transformers has no such model. Names are those of the checkpoints; the recurrence runs token by token, neighbouring
dims rotate as complex numbers, experts are modules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LingConfig(PreTrainedConfig):
    """Any keys; those that the tests give."""

    model_type = "bailing_moe_v2_5"


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    """RMSNorm, with a mean square for each of `groups` equal parts."""

    def __init__(self, size: int, eps: float = 1e-6, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(*x.shape[:-1], self.groups, -1)
        return self.weight * (parts / (parts.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()).view(x.shape)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights, [T, k] each."""
        c, scores = self.config, torch.sigmoid(x @ self.weight.T)
        ranked = scores + self.get_buffer("expert_bias")
        best = ranked.view(len(x), c.n_group, -1).sort(-1, descending=True).values[..., :2].sum(-1)
        out = best.sort(-1).indices[:, : c.n_group - c.topk_group]
        for group in range(c.n_group):
            part = slice(group * c.num_experts // c.n_group, (group + 1) * c.num_experts // c.n_group)
            ranked[:, part] = ranked[:, part].masked_fill((out == group).any(-1, keepdim=True), -torch.inf)
        chosen = ranked.sort(-1, descending=True).indices[:, : c.num_experts_per_tok]
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor


class Mixture(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(SwiGLU(hidden, width) for _ in range(config.num_experts))
        self.shared_experts = SwiGLU(hidden, width * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        output = self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            output = output + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return output


class Latent(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, hidden, heads = config, config.hidden_size, config.num_attention_heads
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank:
            self.q_a_proj, self.q_a_layernorm = linear(hidden, config.q_lora_rank), Norm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, heads * size)
        else:
            self.q_proj = linear(hidden, heads * size)
        self.kv_a_proj_with_mqa = linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(config.kv_lora_rank)
        self.kv_b_proj = linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.dense = linear(heads * config.v_head_dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.view(len(x), heads, -1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(len(x), heads, -1)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        scores = torch.einsum("thd,shd->hts", q_nope, k_nope)
        scores = scores + torch.einsum("thd,sd->hts", self.turn(q_rope), self.turn(k_rope[:, None])[:, 0])
        scores = scores / (c.qk_nope_head_dim + c.qk_rope_head_dim) ** 0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("hts,shd->thd", probs, v).flatten(1))

    def turn(self, x: Tensor) -> Tensor:
        """Neighbours as complex numbers, turned by position times theta^(-2i / dims)."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        frequencies = self.config.rope_theta ** (-torch.arange(pairs.shape[-1]) / pairs.shape[-1])
        angles = torch.arange(len(x))[:, None, None] * frequencies
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Lightning(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        heads, inner = config.num_attention_heads, config.num_attention_heads * config.head_dim
        self.query_key_value, self.g_proj = linear(hidden, 3 * inner), linear(hidden, inner)
        if config.use_qk_norm:
            self.query_layernorm = Norm(config.head_dim, config.rms_norm_eps)
            self.key_layernorm = Norm(config.head_dim, config.rms_norm_eps)
        self.g_norm = Norm(inner, config.rms_norm_eps, config.group_norm_size)
        self.dense = linear(inner, hidden)
        # The number of heads is a power of two here.
        factor = 1 - layer / (config.num_hidden_layers - 1) + 1e-5
        self.decays = [2.0 ** (-8.0 * (head + 1) / heads) * factor for head in range(heads)]

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        q, k, v = self.query_key_value(x).view(len(x), 3, c.num_attention_heads, -1).unbind(1)
        if c.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = self.turn(q), self.turn(k)
        keep = torch.exp(-torch.tensor(self.decays))[:, None, None]
        state, outputs = torch.zeros(c.num_attention_heads, c.head_dim, c.head_dim), []
        for token in range(len(x)):
            state = keep * state + k[token, :, :, None] * v[token, :, None]
            outputs.append(torch.einsum("hk,hkv->hv", q[token], state) / c.head_dim**0.5)
        return self.dense(self.g_norm(torch.stack(outputs).flatten(1)) * torch.sigmoid(self.g_proj(x)))

    def turn(self, x: Tensor) -> Tensor:
        """Dim i with dim i + half, of the first `partial_rotary_factor` dims."""
        size = int(self.config.head_dim * self.config.partial_rotary_factor)
        half = size // 2
        angles = torch.arange(len(x))[:, None, None] * self.config.rope_theta ** (-torch.arange(half) / half)
        first, second, rest = x.split([half, half, x.shape[-1] - size], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class Block(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, group, layers = config.hidden_size, config.layer_group_size, config.num_hidden_layers
        latent = (layer + 1) % group == 0 or layer >= layers // group * group
        self.input_layernorm = Norm(hidden, config.rms_norm_eps)
        self.attention = Latent(config) if latent else Lightning(config, layer)
        self.post_attention_layernorm = Norm(hidden, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = SwiGLU(hidden, config.intermediate_size) if dense else Mixture(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LingForCausalLM(PreTrainedModel):
    config_class = LingConfig

    def __init__(self, config: LingConfig) -> None:
        super().__init__(config)
        self.model = Trunk(config)
        self.lm_head = linear(self.config.hidden_size, self.config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | Gate):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Of one sequence, [1, T]."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids[0]))[None])


AutoConfig.register(LingConfig.model_type, LingConfig)
AutoModelForCausalLM.register(LingConfig, LingForCausalLM)
