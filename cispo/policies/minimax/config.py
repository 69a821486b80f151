"""The MiniMax-01 family's configuration: one dataclass, two conventions, read from either's config.json.

Two dialects describe the same family and differ in more than names. The *convention* is the dialect of a folder:

    original   model_type or architectures name MiniMaxM1 / MiniMaxText01 (the official checkpoints), or neither is
               given and `attn_type_list` is present
    hf         Hugging Face's `minimax` (MiniMaxForCausalLM)

| item                | original                                        | hf                                   |
| head slopes         | ALiBi: a power of two, else interpolated        | 2^(-8(h+1)/H) for every H            |
| layer factor        | 1 - l/(L-1) + 1e-5                              | 1 - l/(L-1+1e-5) + 1e-5              |
| rotary              | the first rotary_dim of head_dim                | the whole head_dim                   |
| residual            | postnorm true: after the norm; false: before it | always after the norm                |
| shared expert       | shared_intermediate_size > 0, gated by a sigmoid | none                                |

Both: RMSNorm with eps 1e-6 on the lightning output, SiLU on q, k and v, no scale and no rotary in lightning layers.
Sources: modeling_minimax_m1.py of MiniMax-AI/MiniMax-M1; transformers 5.19 models/minimax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cispo.errors import UserError
from cispo.policies.policy import HFConfig

Convention = Literal["hf", "original"]

LIGHTNING_NORM_EPS = 1e-6
"""Eps of the RMSNorm after lightning attention: the class default of both implementations, not rms_norm_eps."""

_ORIGINAL_NAMES = ("minimaxm1", "minimaxtext01")
_HF_NAMES = ("minimax",)

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rotary_dim", "num_local_experts", "num_experts", "num_experts_per_tok", "max_position_embeddings"
)  # fmt: skip

ORIGINAL_KEYS = {
    "linear_attn_alpha": "layernorm_linear_attention_alpha",
    "linear_attn_beta": "layernorm_linear_attention_beta",
    "full_attn_alpha": "layernorm_full_attention_alpha",
    "full_attn_beta": "layernorm_full_attention_beta",
    "mlp_alpha": "layernorm_mlp_alpha",
    "mlp_beta": "layernorm_mlp_beta",
}
HF_KEYS = {
    "linear_attn_alpha": "linear_attn_alpha_factor",
    "linear_attn_beta": "linear_attn_beta_factor",
    "full_attn_alpha": "full_attn_alpha_factor",
    "full_attn_beta": "full_attn_beta_factor",
    "mlp_alpha": "mlp_alpha_factor",
    "mlp_beta": "mlp_beta_factor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningConfig:
    """Shape and conventions of one MiniMax-01 policy.

    Example: LightningConfig(vocab_size=64, hidden_size=128, intermediate_size=96, num_heads=4, num_kv_heads=4,
    head_dim=32, lightning_layers=(True, True, True, False))
    """

    convention: Convention = "hf"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lightning_layers: tuple[bool, ...]
    """One entry a layer: True is lightning attention, False softmax attention."""
    num_experts: int = 8
    experts_per_token: int = 2
    shared_size: int = 0
    """Width of the shared expert, 0 for none (original convention only)."""
    rotary_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    postnorm: bool = True
    linear_attn_alpha: float = 1.0
    linear_attn_beta: float = 1.0
    full_attn_alpha: float = 1.0
    full_attn_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.lightning_layers)

    def slopes(self, layer: int) -> torch.Tensor:
        """Decay slopes of one layer, [num_heads] float32; the state decays by exp(-slope) a token."""
        factor = self._layer_factor(layer)
        return torch.tensor([s * factor for s in self._head_slopes()], dtype=torch.float64).float()

    def _head_slopes(self) -> list[float]:
        if self.convention == "original":
            return alibi_slopes(self.num_heads)
        return [2.0 ** (-8.0 * (h + 1) / self.num_heads) for h in range(self.num_heads)]

    def _layer_factor(self, layer: int) -> float:
        # With one layer the original divides by zero: the Hugging Face form is finite there.
        if self.convention == "original" and self.num_layers > 1:
            return 1 - layer / (self.num_layers - 1) + 1e-5
        return 1 - layer / (self.num_layers - 1 + 1e-5) + 1e-5

    def attention_factors(self, layer: int) -> tuple[float, float]:
        """(alpha, beta) of the attention residual: x = alpha * residual + beta * attention."""
        if self.lightning_layers[layer]:
            return self.linear_attn_alpha, self.linear_attn_beta
        return self.full_attn_alpha, self.full_attn_beta


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes (arXiv 2108.12409) as MiniMax uses them, for any number of heads.

    A power of two n: 2^(-8(h+1)/n). Otherwise the slopes of the power below, then every second one of twice that.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power == num_heads:
        return slopes
    return slopes + alibi_slopes(2 * power)[0::2][: num_heads - power]


def is_lightning_config(config: HFConfig) -> bool:
    """Whether a config.json describes a policy of this family."""
    return _convention(config) is not None


def _convention(config: HFConfig) -> Convention | None:
    names = [str(config.get("model_type") or ""), *(config.get("architectures") or [])]
    plain = [n.lower().replace("_", "").replace("-", "").removesuffix("forcausallm") for n in names if n]
    if any(n in _ORIGINAL_NAMES for n in plain):
        return "original"
    if any(n in _HF_NAMES for n in plain):
        return "hf"
    if not plain and "attn_type_list" in config:
        return "original"
    return None


def parse_config(config: HFConfig, *, shared_size: int | None = None) -> LightningConfig:
    """Reads a config.json of either dialect.

    `shared_size` is the shared expert's width as the weights have it: the original code builds that expert with
    intermediate_size and uses shared_intermediate_size only as a switch.

    Raises UserError where a key is missing or its value has no meaning in this family.
    """
    convention = _convention(config)
    if convention is None:
        raise UserError(f"model_type {config.get('model_type')!r} is not a MiniMax-01 policy")
    try:
        heads, hidden, layers = (config[k] for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        vocab, intermediate = config["vocab_size"], config["intermediate_size"]
    except KeyError as error:
        raise UserError(f"the policy's config lacks {error.args[0]!r}") from None
    if config.get("sliding_window"):
        raise UserError(
            f"sliding_window {config['sliding_window']} is not supported by the lightning policy: set it to null"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not supported by the lightning policy, only 'silu'")
    for key in _SIZES:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{key} {value!r:.80} must be a whole number above 0")
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported by the lightning policy, only 'default'")
    shared_size = _shared_size(config, convention, intermediate, shared_size)
    parsed = LightningConfig(
        convention=convention,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or (heads if convention == "original" else 8),
        head_dim=head_dim,
        lightning_layers=_layer_kinds(config, convention, layers),
        num_experts=config.get("num_local_experts") or config.get("num_experts") or 8,
        experts_per_token=config.get("num_experts_per_tok", 2),
        shared_size=shared_size,
        rotary_dim=(config.get("rotary_dim") or head_dim) if convention == "original" else head_dim,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 1e6),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        postnorm=bool(config.get("postnorm", False)) if convention == "original" else True,
        max_position_embeddings=config.get("max_position_embeddings", 4096 * 32),
        initializer_range=config.get("initializer_range", 0.02),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    keys = ORIGINAL_KEYS if convention == "original" else HF_KEYS
    factors = {ours: float(config[theirs]) for ours, theirs in keys.items() if theirs in config}
    parsed = replace(parsed, **factors)
    _check(parsed)
    return parsed


def _layer_kinds(config: HFConfig, convention: Convention, layers: int) -> tuple[bool, ...]:
    key = "attn_type_list" if convention == "original" else "layer_types"
    kinds = config.get(key)
    if kinds is None:
        if convention == "original":
            raise UserError("the policy's config lacks 'attn_type_list' (0 lightning, 1 softmax)")
        # Hugging Face's default when layer_types is absent: softmax first, alternating.
        return tuple(i % 2 == 1 for i in range(layers))
    if not isinstance(kinds, list | tuple):
        raise UserError(f"{key} {kinds!r:.80} must be a list with an entry for each layer")
    if len(kinds) != layers:
        raise UserError(f"{key} has {len(kinds)} entries for num_hidden_layers {layers}")
    meaning = {0: True, 1: False} if convention == "original" else {"linear_attention": True, "full_attention": False}
    unknown = [k for k in kinds if k not in meaning]
    if unknown:
        raise UserError(f"{key} holds {unknown[0]!r}; it takes {' and '.join(repr(k) for k in meaning)}")
    return tuple(meaning[k] for k in kinds)


def _shared_size(config: HFConfig, convention: Convention, intermediate: int, from_weights: int | None) -> int:
    if convention == "hf" or not config.get("shared_intermediate_size"):
        return 0
    mode = config.get("shared_moe_mode", "sigmoid")
    if mode != "sigmoid":
        raise UserError(f"shared_moe_mode {mode!r} is not supported, only 'sigmoid'")
    return from_weights or intermediate


def _check(config: LightningConfig) -> None:
    for key, value in (("rms_norm_eps", config.rms_norm_eps), ("rope_theta", config.rope_theta)):
        if not value > 0:
            raise UserError(f"{key} {value} must be above 0")
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.rotary_dim > config.head_dim or config.rotary_dim % 2:
        raise UserError(f"rotary_dim {config.rotary_dim} must be even and at most head_dim {config.head_dim}")
    if not 1 <= config.experts_per_token <= config.num_experts:
        raise UserError(
            f"num_experts_per_tok {config.experts_per_token} must be from 1 to num_local_experts {config.num_experts}"
        )


def dump_config(config: LightningConfig) -> dict[str, Any]:
    """The config.json of a policy, in the dialect of its convention; `parse_config` reads it back unchanged."""
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "sliding_window": None,
    }
    if config.convention == "original":
        return {
            "architectures": ["MiniMaxM1ForCausalLM"],
            "model_type": "minimax_m1",
            **common,
            "attn_type_list": [0 if lightning else 1 for lightning in config.lightning_layers],
            "rotary_dim": config.rotary_dim,
            "rope_theta": config.rope_theta,
            "postnorm": config.postnorm,
            "shared_intermediate_size": config.shared_size,
            "shared_moe_mode": "sigmoid",
            **{theirs: getattr(config, ours) for ours, theirs in ORIGINAL_KEYS.items()},
        }
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        **common,
        "layer_types": ["linear_attention" if lightning else "full_attention" for lightning in config.lightning_layers],
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **{theirs: getattr(config, ours) for ours, theirs in HF_KEYS.items()},
    }


def shared_size_of_weights(folder: Path) -> int | None:
    """Width of the shared expert in the safetensors files of a folder; None where they hold none."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                if name.endswith("shared_mlp.gate_proj.weight"):
                    return weights.get_slice(name).get_shape()[0]
    return None
