"""Decode steps in few operations: what a policy of a million parameters waits for is Python and torch's own overhead.

    x -> norm -> attention -> + x -> norm -> SwiGLU or experts -> + x      a layer; every row a sequence of its own

The same arithmetic as the policies' modules, in float32, on their own parameters: an update in place is seen at once.
`tests/test_torch_sampler.py` holds each kind against its modules. Any other policy steps through `Policy.attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.policies.attention import Attention
from cispo.policies.base import Policy
from cispo.policies.hf import HFPolicy
from cispo.policies.layers import RMSNorm, apply_rotary, rotary_table, signed_sine, turned
from cispo.policies.lightning import Layer, LightningAttention, LightningPolicy, SoftmaxAttention
from cispo.policies.moe import FEW_TOKENS, MoE

ShortStep = Callable[[Tensor, Tensor, Attention], Tensor]
"""(tokens [n] int64, positions [n] int64, attention) to the hidden states after the final norm, [n, d]."""

_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def short_step(policy: Policy) -> ShortStep | None:
    """The policy's step in few operations; None where it has none: other models, and below float32, which rounds."""
    if policy.lm_head_weight.dtype != torch.float32:
        return None
    if isinstance(policy, LightningPolicy):
        return LightningStep(policy)
    if isinstance(policy, HFPolicy) and type(policy.model).__name__ in _LLAMA_LIKE:
        return LlamaStep(policy) if policy.model.config.hidden_act == "silu" else None
    return None


class LightningStep:
    """For `LightningPolicy`."""

    def __init__(self, policy: LightningPolicy) -> None:
        self._config, self._embed = policy.config, policy.embed_tokens.weight
        self._layers = [layer for layer in policy.layers if isinstance(layer, Layer)]
        self._norm = _norm_of(policy.norm)
        self._norms = [(_norm_of(n.input_layernorm), _norm_of(n.post_attention_layernorm)) for n in self._layers]
        self._mixers = [_mixer_of(layer.self_attn) for layer in self._layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        x = F.embedding(tokens, self._embed)
        rotary = rotary_table(positions, self._config.rotary_dim, self._config.rope_theta)
        for layer, mixer, (first, second) in zip(self._layers, self._mixers, self._norms, strict=True):
            normed = _rms_norm(x, first)
            x = layer.residual(x, normed, mixer(normed, rotary, attention), layer.attention_factors)
            normed = _rms_norm(x, second)
            x = layer.residual(x, normed, layer.mix_experts(normed, _experts)[0], layer.mlp_factors)
        return _rms_norm(x, self._norm)


class _Lightning:
    def __init__(self, module: LightningAttention) -> None:
        self.heads, self.dim, self.slopes = module.num_heads, module.head_dim, module.slopes
        self.qkv, self.gate, self.out = module.qkv_proj.weight, module.output_gate.weight, module.out_proj.weight
        self.norm = _norm_of(module.norm)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        heads = F.silu(F.linear(x, self.qkv), inplace=True).view(-1, self.heads, 3 * self.dim)
        q, k, v = heads.split(self.dim, -1)
        attended = _rms_norm(attention.lightning(q, k, v, self.slopes).flatten(1), self.norm)
        return F.linear(attended.mul_(F.linear(x, self.gate).sigmoid_()), self.out)


class _Softmax:
    def __init__(self, module: SoftmaxAttention) -> None:
        self.dim = module.head_dim
        self.q, self.k, self.v, self.o = (
            p.weight for p in (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
        )

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        q, k, v = (F.linear(x, weight).unflatten(-1, (-1, self.dim)) for weight in (self.q, self.k, self.v))
        attended = attention.softmax(apply_rotary(q, *rotary), apply_rotary(k, *rotary), v)
        return F.linear(attended.flatten(1), self.o)


def _mixer_of(module: Any) -> _Lightning | _Softmax:
    return _Lightning(module) if isinstance(module, LightningAttention) else _Softmax(module)


def _experts(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`MoE.forward` where all experts compute all rows: without the copy of the weights that one product would need."""
    experts = moe.experts
    if len(x) > FEW_TOKENS or len(experts.gate_up_proj) > 2 * moe.gate.top_k:
        return moe(x)
    probs = F.linear(x, moe.gate.weight).softmax(-1)
    values, chosen = probs.topk(moe.gate.top_k, -1)
    shares = torch.zeros_like(probs).scatter_(1, chosen, values / values.sum(-1, keepdim=True))
    gate, up = (
        F.linear(x, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (len(experts.gate_up_proj), 2, -1)).unbind(2)
    )
    inner = F.silu(gate).mul_(up).mul_(shares[..., None]).transpose(0, 1)
    return torch.bmm(inner, experts.down_proj.transpose(1, 2)).sum(0), probs, chosen


class _Norm(NamedTuple):
    weight: Tensor
    eps: Tensor
    """A scalar, so that it is added in the operation that squares and divides."""


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _Merged:
    """Linear modules that read the same rows, as one product; their weights are copied again where one has changed."""

    def __init__(self, *modules: Any) -> None:
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


class _LlamaLayer(NamedTuple):
    """The parameters of one layer."""

    input_norm: _Norm
    qkv: _Merged
    queries: int
    """Heads."""
    keys: int
    o: _Linear
    q_norm: _Norm | None
    k_norm: _Norm | None
    head_dim: int
    scale: float
    mlp_norm: _Norm
    gate_up: _Merged
    down: _Linear


class LlamaStep:
    """For transformers' Llama and those built like it, with or without biases and norms of queries and keys."""

    def __init__(self, policy: HFPolicy) -> None:
        base: Any = policy.model.base_model
        self._embed, self._rotary, self._norm = base.embed_tokens.weight, base.rotary_emb, _norm_of(base.norm)
        self._layers = [_llama_layer(layer) for layer in base.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        x = F.embedding(tokens, self._embed)
        cos, sin = (table[0, :, None] for table in self._rotary(x, positions[None]))
        sin = signed_sine(sin)
        for layer in self._layers:
            x = x + _llama_attention(layer, _rms_norm(x, layer.input_norm), cos, sin, attention)
            normed = _rms_norm(x, layer.mlp_norm)
            gate, up = layer.gate_up(normed).chunk(2, -1)
            x = x + F.linear(F.silu(gate, inplace=True).mul_(up), *layer.down)
        return _rms_norm(x, self._norm)


def _llama_attention(layer: _LlamaLayer, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
    # Queries and keys in one tensor: what is done to both is done once.
    dim, heads = layer.head_dim, layer.queries
    both, v = layer.qkv(x).unflatten(-1, (-1, dim)).split([heads + layer.keys, layer.keys], 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        weights = layer.q_norm.weight.expand(heads, dim), layer.k_norm.weight.expand(layer.keys, dim)
        both = _rms_norm(both, _Norm(torch.cat(weights), layer.q_norm.eps))
    both = turned(both, cos, sin)
    attended = attention.softmax(both[:, :heads], both[:, heads:], v, layer.scale)
    return F.linear(attended.flatten(1), *layer.o)


def _llama_layer(layer: Any) -> _LlamaLayer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return _LlamaLayer(
        input_norm=_norm_of(layer.input_layernorm),
        qkv=_Merged(attention.q_proj, attention.k_proj, attention.v_proj),
        queries=attention.q_proj.out_features // attention.head_dim,
        keys=attention.k_proj.out_features // attention.head_dim,
        o=_linear_of(attention.o_proj),
        q_norm=_norm_of(attention.q_norm) if normed else None,
        k_norm=_norm_of(attention.k_norm) if normed else None,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        mlp_norm=_norm_of(layer.post_attention_layernorm),
        gate_up=_Merged(mlp.gate_proj, mlp.up_proj),
        down=_linear_of(mlp.down_proj),
    )


def _linear_of(module: Any) -> _Linear:
    return _Linear(module.weight, module.bias)


def _norm_of(module: Any) -> _Norm:
    assert isinstance(module, RMSNorm)
    return _Norm(module.weight, torch.tensor(module.eps))


def _rms_norm(x: Tensor, norm: _Norm) -> Tensor:
    """`layers.RMSNorm` for a few rows: on a CPU F.rms_norm is a dozen operations."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(norm.eps, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(norm.weight)
