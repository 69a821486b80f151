"""Mixers by the gated delta rule: gated DeltaNet (GDN) and Kimi Delta Attention (KDA).

    x -> q, k, v -> convolution -> l2 norm of q, k -> delta rule with decay exp(g), rate beta -> norm * gate -> out

    GDN    g [T, H] = -exp(A_log) softplus(a + dt_bias), a decay a head        gate silu(z)
    KDA    g [T, H, K], a decay a channel                                      gate sigmoid

Decays are computed in float32 at least, from weights that stay so (`model.FLOAT32`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.ops.convolution import CONVOLUTION
from cispo.ops.delta import DELTA
from cispo.policies.attention import Attention
from cispo.policies.hybrid.config import GDNConfig, KDAConfig
from cispo.policies.layers import RMSNorm

_L2_EPS = 1e-6


def l2_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """x / |x| * scale over the last axis, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + _L2_EPS).rsqrt() * scale).to(x.dtype)


def log_decay(step: Tensor, rate_log: Tensor) -> Tensor:
    """-exp(rate_log) * softplus(step), at least float32 and at most 0."""
    return -rate_log.to(step.dtype).exp() * F.softplus(step)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ShortConvolution(nn.Module):
    """The weight of a depthwise convolution, [C, 1, W] as checkpoints have it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


class GDN(nn.Module):
    """`GDNConfig` as a mixer: value head h has the keys of head h // (H_v / H_k)."""

    def __init__(self, hidden: int, config: GDNConfig) -> None:
        super().__init__()
        self.config = config
        heads, inner = config.num_value_heads, config.num_value_heads * config.value_dim
        if config.fused:
            self.in_proj_qkvz = nn.Linear(hidden, config.channels + inner, bias=False)
            self.in_proj_ba = nn.Linear(hidden, 2 * heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(hidden, config.channels, bias=False)
            self.in_proj_z = nn.Linear(hidden, inner, bias=False)
            self.in_proj_b = nn.Linear(hidden, heads, bias=False)
            self.in_proj_a = nn.Linear(hidden, heads, bias=False)
        self.conv1d = ShortConvolution(config.channels, config.conv_width)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(config.value_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        c = self.config
        qkv, z, b, a = self._fused(x) if c.fused else self._separate(x)
        qkv = attention.recurrent(CONVOLUTION, qkv, self.conv1d.weight.squeeze(1))
        keys = c.num_key_heads * c.key_dim
        q, k, v = qkv.split([keys, keys, c.num_value_heads * c.value_dim], -1)
        q, k = (part.unflatten(-1, (c.num_key_heads, c.key_dim)) for part in (q, k))
        g = log_decay(_wide(a) + self.dt_bias, self.A_log)
        beta = torch.sigmoid(_wide(b))
        v = v.unflatten(-1, (c.num_value_heads, c.value_dim))
        o = attention.recurrent(DELTA, l2_norm(q, c.key_dim**-0.5), l2_norm(k), v, g, beta)
        gated = self.norm(o) * F.silu(_wide(z)).to(o.dtype)
        return self.out_proj(gated.flatten(1))

    def _fused(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q|k|v [T, C], z [T, H, V], b and a [T, H], from rows [q | k | v | z] and [b | a] of each key head."""
        c = self.config
        each = c.num_value_heads // c.num_key_heads
        sizes = [c.key_dim, c.key_dim, each * c.value_dim, each * c.value_dim]
        q, k, v, z = self.in_proj_qkvz(x).unflatten(-1, (c.num_key_heads, -1)).split(sizes, -1)
        b, a = self.in_proj_ba(x).unflatten(-1, (c.num_key_heads, -1)).chunk(2, -1)
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], -1)
        return qkv, z.flatten(1).unflatten(-1, (-1, c.value_dim)), b.flatten(1), a.flatten(1)

    def _separate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.in_proj_z(x).unflatten(-1, (-1, self.config.value_dim))
        return self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x)


class KDA(nn.Module):
    """`KDAConfig` as a mixer; decays and output gate come through projections of low rank."""

    def __init__(self, hidden: int, config: KDAConfig) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.num_heads, config.head_dim
        inner = heads * dim
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.q_conv1d = ShortConvolution(inner, config.conv_width)
        self.k_conv1d = ShortConvolution(inner, config.conv_width)
        self.v_conv1d = ShortConvolution(inner, config.conv_width)
        self.f_a_proj = nn.Linear(hidden, dim, bias=False)
        self.f_b_proj = nn.Linear(dim, inner, bias=False)
        self.A_log = nn.Parameter(torch.empty(1, 1, heads, 1))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, dim, bias=False)
        self.g_b_proj = nn.Linear(dim, inner, bias=False)
        self.o_norm = RMSNorm(dim, config.norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = self.config.num_heads, self.config.head_dim
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        taps = torch.cat([conv.weight.squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        q, k, v = attention.recurrent(CONVOLUTION, qkv, taps).unflatten(-1, (3, *heads)).unbind(1)
        step = _wide(self.f_b_proj(self.f_a_proj(x))) + self.dt_bias
        g = log_decay(step.unflatten(-1, heads), self.A_log.view(-1, 1))
        beta = torch.sigmoid(_wide(self.b_proj(x)))
        o = attention.recurrent(DELTA, l2_norm(q, self.config.head_dim**-0.5), l2_norm(k), v, g, beta)
        z = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, heads)
        gated = self.o_norm(o) * torch.sigmoid(_wide(z)).to(o.dtype)
        return self.o_proj(gated.flatten(1))
