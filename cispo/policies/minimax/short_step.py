"""A decode step of the MiniMax-01 policy in few operations (`policies.short_step`).

x -> norm -> attention -> + residual -> norm -> experts -> + residual      a layer; each row is a sequence
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.lightning import LIGHTNING
from cispo.policies.attention import Attention
from cispo.policies.layers import apply_rotary, rotary_table
from cispo.policies.minimax.model import Layer, LightningAttention, LightningPolicy, SoftmaxAttention
from cispo.policies.moe import FEW_TOKENS, MoE
from cispo.policies.policy import PolicyOutput, RouterOutput
from cispo.policies.short_step import norm_of, rms_norm


class LightningStep:
    """For `LightningPolicy`."""

    def __init__(self, policy: LightningPolicy) -> None:
        self._config, self._embed = policy.config, policy.embed_tokens.weight
        self._layers = [layer for layer in policy.layers if isinstance(layer, Layer)]
        self._norm = norm_of(policy.norm)
        self._norms = [(norm_of(n.input_layernorm), norm_of(n.post_attention_layernorm)) for n in self._layers]
        self._mixers = [_mixer_of(layer.self_attn) for layer in self._layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention) -> PolicyOutput:
        x = F.embedding(tokens, self._embed)
        rotary = rotary_table(positions, self._config.rotary_dim, self._config.rope_theta)
        router = []
        for layer, mixer, (first, second) in zip(self._layers, self._mixers, self._norms, strict=True):
            normed = rms_norm(x, first)
            x = layer.residual(x, normed, mixer(normed, rotary, attention), layer.attention_factors)
            normed = rms_norm(x, second)
            branch, probs, chosen = layer.mix_experts(normed, _experts)
            x = layer.residual(x, normed, branch, layer.mlp_factors)
            router.append(RouterOutput(probs, chosen))
        return PolicyOutput(rms_norm(x, self._norm), tuple(router))


class _Lightning:
    def __init__(self, module: LightningAttention) -> None:
        self.heads, self.dim = module.num_heads, module.head_dim
        self.qkv, self.gate, self.out = module.qkv_proj.weight, module.output_gate.weight, module.out_proj.weight
        self.slopes = module.slopes.to(self.qkv.device)
        self.norm = norm_of(module.norm)

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        heads = F.silu(F.linear(x, self.qkv), inplace=True).view(-1, self.heads, 3 * self.dim)
        q, k, v = heads.split(self.dim, -1)
        attended = rms_norm(attention.recurrent(LIGHTNING, q, k, v, self.slopes).flatten(1), self.norm)
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


def _mixer_of(module: LightningAttention | SoftmaxAttention) -> _Lightning | _Softmax:
    return _Lightning(module) if isinstance(module, LightningAttention) else _Softmax(module)


def _experts(moe: MoE, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`MoE.forward` where all experts compute all rows: without the copy of the weights that one product would need."""
    experts = moe.experts
    few = len(x) <= FEW_TOKENS and len(experts.gate_up_proj) <= 2 * moe.gate.top_k
    if routes is not None or not few or x.dtype != torch.float32:
        return moe(x, routes)
    probs = F.linear(x, moe.gate.weight).softmax(-1)
    values, chosen = probs.topk(moe.gate.top_k, -1)
    shares = torch.zeros_like(probs).scatter_(1, chosen, values / values.sum(-1, keepdim=True))
    gate, up = (
        F.linear(x, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (len(experts.gate_up_proj), 2, -1)).unbind(2)
    )
    inner = F.silu(gate).mul_(up).mul_(shares[..., None]).transpose(0, 1)
    return torch.bmm(inner, experts.down_proj.transpose(1, 2)).sum(0), probs, chosen
