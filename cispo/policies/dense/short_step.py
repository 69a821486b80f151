"""A decode step of Llama-like models in few operations (`policies.short_step`).

x -> norm -> attention -> + x -> norm -> SwiGLU -> + x      a layer; each row is a sequence
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.policies.attention import Attention
from cispo.policies.dense.model import HFPolicy
from cispo.policies.layers import signed_sine, turned
from cispo.policies.policy import Policy, PolicyOutput
from cispo.policies.short_step import Norm, ShortStep, norm_of, rms_norm

_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def short_step(policy: Policy) -> ShortStep | None:
    """The step of a Llama-like model; None for any other."""
    assert isinstance(policy, HFPolicy)
    known = type(policy.model).__name__ in _LLAMA_LIKE and policy.model.config.hidden_act == "silu"
    return LlamaStep(policy) if known else None


class _LlamaLayer(NamedTuple):
    """The parameters of one layer."""

    input_norm: Norm
    qkv: _Merged
    queries: int
    """Heads."""
    keys: int
    o: _Linear
    q_norm: Norm | None
    k_norm: Norm | None
    head_dim: int
    scale: float
    mlp_norm: Norm
    gate_up: _Merged
    down: _Linear


class LlamaStep:
    """For transformers' Llama and those built like it, with or without biases and norms of queries and keys."""

    def __init__(self, policy: HFPolicy) -> None:
        base: Any = policy.model.base_model
        self._embed, self._rotary, self._norm = base.embed_tokens.weight, base.rotary_emb, norm_of(base.norm)
        self._layers = [_llama_layer(layer) for layer in base.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> PolicyOutput:
        x = F.embedding(tokens, self._embed)
        cos, sin = (table[0, :, None] for table in self._rotary(x, positions[None]))
        sin = signed_sine(sin)
        for layer in self._layers:
            x = x + _llama_attention(layer, rms_norm(x, layer.input_norm), cos, sin, attention)
            normed = rms_norm(x, layer.mlp_norm)
            gate, up = layer.gate_up(normed).chunk(2, -1)
            x = x + F.linear(F.silu(gate, inplace=True).mul_(up), *layer.down)
        return PolicyOutput(rms_norm(x, self._norm))


def _llama_attention(layer: _LlamaLayer, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
    # Queries and keys in one tensor: one norm and one rotation for both.
    dim, heads = layer.head_dim, layer.queries
    both, v = layer.qkv(x).unflatten(-1, (-1, dim)).split([heads + layer.keys, layer.keys], 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        weights = layer.q_norm.weight.expand(heads, dim), layer.k_norm.weight.expand(layer.keys, dim)
        both = rms_norm(both, Norm(torch.cat(weights), layer.q_norm.eps))
    both = turned(both, cos, sin)
    attended = attention.softmax(both[:, :heads], both[:, heads:], v, layer.scale)
    return F.linear(attended.flatten(1), *layer.o)


def _llama_layer(layer: Any) -> _LlamaLayer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return _LlamaLayer(
        input_norm=norm_of(layer.input_layernorm),
        qkv=_Merged(attention.q_proj, attention.k_proj, attention.v_proj),
        queries=attention.q_proj.out_features // attention.head_dim,
        keys=attention.k_proj.out_features // attention.head_dim,
        o=_linear_of(attention.o_proj),
        q_norm=norm_of(attention.q_norm) if normed else None,
        k_norm=norm_of(attention.k_norm) if normed else None,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        mlp_norm=norm_of(layer.post_attention_layernorm),
        gate_up=_Merged(mlp.gate_proj, mlp.up_proj),
        down=_linear_of(mlp.down_proj),
    )


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _Merged:
    """Linear modules that read the same rows, as one product; their weights are copied again where one has changed."""

    def __init__(self, *modules: nn.Linear) -> None:
        self._parts = [_linear_of(module) for module in modules]
        self._versions: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        """[n, d] to [n, all outputs]."""
        versions = [tensor._version for part in self._parts for tensor in part if tensor is not None]
        if versions != self._versions:
            weights, biases = zip(*self._parts, strict=True)
            self._weight = torch.cat(weights)
            self._bias = None if biases[0] is None else torch.cat(biases)
            self._versions = versions
        return F.linear(x, self._weight, self._bias)


def _linear_of(module: nn.Linear) -> _Linear:
    return _Linear(module.weight, module.bias)
