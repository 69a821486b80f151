"""The shape of a hybrid policy: one record a kind of block, read from a family's config.json.

config.json --a family's parse--> HybridConfig(layers=(LayerConfig(mixer, mlp), ...)) --> model.HybridPolicy
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from cispo.policies.hybrid.names import Names
from cispo.policies.moe import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention with rotary positions (arXiv 2305.13245)."""

    name: ClassVar[str] = "self_attn"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gate: bool = False
    """q_proj gives [q | gate] interleaved per head; the output is multiplied by sigmoid(gate)."""
    qk_norm: Literal["head", "joint"] | None = None
    """RMSNorm of queries and keys, each head by itself or all heads as one vector."""
    bias: bool = False
    """Biases of q_proj, k_proj and v_proj."""
    output_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """The indexer of sparse attention (DeepSeek-V3.2): each query sees the `top_k` keys of the highest scores."""

    num_heads: int
    head_dim: int
    top_k: int
    interleaved_rotary: bool = False
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""

    name: ClassVar[str] = "self_attn"
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rotary: Literal["pairs", "half"] | None
    """Dims that turn together: neighbours, i with i + half, or none: positions are unknown to the layer."""
    scale: float
    """Of the scores."""
    latent_norm_eps: float
    bias: bool = False
    indexer: IndexerConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GDNConfig:
    """Gated DeltaNet (arXiv 2412.06464): a decay a head, an output gate of SiLU."""

    name: ClassVar[str] = "linear_attn"
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    fused: bool
    """Projections as Qwen3-Next has them, q, k, v, z and b, a interleaved per key head; else one matrix each."""
    norm_eps: float

    @property
    def channels(self) -> int:
        """Of the convolution: q, k and v of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class KDAConfig:
    """Kimi Delta Attention (arXiv 2510.26692, section 3): a decay a channel, an output gate of sigmoid."""

    name: ClassVar[str] = "self_attn"
    num_heads: int
    head_dim: int
    conv_width: int
    norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningMixerConfig:
    """Lightning attention with a grouped output norm and a sigmoid gate (Ling and Ring 2.5)."""

    name: ClassVar[str] = "self_attn"
    num_heads: int
    head_dim: int
    slopes: tuple[float, ...]
    """Decay of each head: the state shrinks by exp(-slope) a token."""
    rotary: bool
    qk_norm: bool
    scale: float
    """Of the queries."""
    norm_groups: int
    """Equal parts of the output, each with its own mean square."""
    norm_eps: float


MixerConfig: TypeAlias = GQAConfig | MLAConfig | GDNConfig | KDAConfig | LightningMixerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLPConfig:
    """One SwiGLU."""

    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """A mixture of SwiGLU experts."""

    width: int
    routing: Routing
    shared_width: int = 0
    """Of all shared experts together; 0 for none."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by a sigmoid of the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One block: a mixer of tokens, then an MLP."""

    mixer: MixerConfig
    mlp: DenseMLPConfig | MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Rotary frequencies for contexts beyond the trained ones (arXiv 2309.00071, section 3)."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Of cos and sin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions, one table for all layers (arXiv 2104.09864)."""

    dim: int
    """Rotated dims of a head, the first or the last as the mixer has it."""
    theta: float
    yarn: Yarn | None = None

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, dim / 2] float32."""
        angles = positions.float()[:, None, None] * self._frequencies(positions.device)
        factor = 1.0 if self.yarn is None else self.yarn.attention_factor
        return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)

    def _frequencies(self, device: torch.device) -> Tensor:
        """[dim / 2] float32."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        frequencies = 1.0 / self.theta**exponents
        if self.yarn is None:
            return frequencies
        low, high = (self._turning_dim(turns, self.yarn) for turns in (self.yarn.beta_fast, self.yarn.beta_slow))
        if self.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        steps = torch.arange(self.dim // 2, dtype=torch.float32, device=device)
        ramp = ((steps - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        return frequencies / self.yarn.factor * ramp + frequencies * (1 - ramp)

    def _turning_dim(self, turns: float, yarn: Yarn) -> float:
        """The dim, as a real number, that turns so often over the original context."""
        ratio = yarn.original_positions / (turns * 2 * math.pi)
        return self.dim * math.log(ratio) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """Shape of one hybrid policy, and the names of its weights."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    centred_norms: bool = False
    """Norms of blocks, queries and keys multiply by 1 + weight."""
    rotary: Rotary | None
    """None where no layer has positions."""
    tie_word_embeddings: bool = False
    heads: tuple[LayerConfig, ...] = ()
    """The layer of each head of multi-token prediction that config.json names and `mtp` can run."""
    runs_heads: bool = False
    """Whether the heads are modules of the policy; else their weights are kept aside."""
    names: Names
    raw: Mapping[str, Any] = field(repr=False)
    """The config.json's content, written back as it is."""

    @property
    def predictors(self) -> tuple[LayerConfig, ...]:
        """The layer of each head that is a module of the policy."""
        return self.heads if self.runs_heads else ()
