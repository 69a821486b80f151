"""Mixtures of experts with grouped-query attention in every layer: one entry a model_type.

    model_type    queries, keys                              router                    besides
    mixtral       plain                                      softmax                   -
    qwen2_moe     biases                                     softmax                   gated shared expert; dense layers
    qwen3_moe     norms per head                             softmax                   dense layers
    olmoe         norms over all heads                       softmax                   -
    glm4_moe      biases, norms per head, half of it turns   sigmoid, bias, groups     shared expert; first layers dense

Qwen and OLMoE divide by the sum of the chosen experts' weights only where norm_topk_prob says so. Source: transformers
5.19 models/<model_type>.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cispo.errors import UserError
from cispo.policies.hybrid.config import DenseMLPConfig, GQAConfig, HybridConfig, LayerConfig, MoEConfig
from cispo.policies.hybrid.names import W123, Names, layers_after
from cispo.policies.hybrid.reading import Reader
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """The parts in which a model_type differs from another."""

    architecture: str
    experts: Callable[[Reader], MoEConfig]
    sparse: Callable[[Reader, int], tuple[bool, ...]] = lambda read, layers: (True,) * layers
    """Which of so many layers have experts."""
    names: Callable[[Reader, int], Names] = lambda read, layers: Names(renamed=_SHARED)
    qk_norm: Callable[[Reader], Literal["head", "joint"] | None] = lambda read: None
    bias: Callable[[Reader], tuple[bool, bool]] = lambda read: (False, False)
    """Of q, k and v, and of the output."""
    theta: float = 10000.0
    rotated: float = 1.0
    """Share of a head's dims that turn, where no key says it."""
    heads: bool = False
    """Whether releases have heads of multi-token prediction (`mtp`)."""


_SHARED = {".mlp.shared_experts.": ".mlp.shared_expert."}


def _mixtral_experts(read: Reader) -> MoEConfig:
    read.only("router_jitter_noise", 0.0)
    routing = Routing(num_experts=read.size("num_local_experts"), top_k=read.size("num_experts_per_tok"))
    return MoEConfig(width=read.size("intermediate_size"), routing=read.check_routing(routing, "num_local_experts"))


def _softmax_experts(read: Reader, width: str) -> MoEConfig:
    # transformers 5 writes num_local_experts for some of them, and reads either.
    experts = "num_experts" if read.get("num_local_experts") is None else "num_local_experts"
    routing = Routing(
        num_experts=read.size(experts),
        top_k=read.size("num_experts_per_tok"),
        normalised=read.flag("norm_topk_prob", False),
    )
    return MoEConfig(width=read.size(width), routing=read.check_routing(routing, experts))


def _olmoe_experts(read: Reader) -> MoEConfig:
    read.only("clip_qkv")
    return _softmax_experts(read, "intermediate_size")


def _qwen2_experts(read: Reader) -> MoEConfig:
    moe = _softmax_experts(read, "moe_intermediate_size")
    shared = read.size("shared_expert_intermediate_size")
    return MoEConfig(width=moe.width, routing=moe.routing, shared_width=shared, shared_gate=True)


def _glm_experts(read: Reader) -> MoEConfig:
    width = read.size("moe_intermediate_size")
    routing = Routing(
        num_experts=read.size("n_routed_experts"),
        top_k=read.size("num_experts_per_tok"),
        scores="sigmoid",
        corrected=True,
        normalised=read.flag("norm_topk_prob", True),
        scale=read.number("routed_scaling_factor", 1.0),
        groups=read.size("n_group", 1),
        kept_groups=read.size("topk_group", 1),
    )
    return MoEConfig(
        width=width,
        routing=read.check_routing(routing, "n_routed_experts"),
        shared_width=width * read.size("n_shared_experts", 1),
    )


def _after_first(read: Reader, layers: int) -> tuple[bool, ...]:
    dense = read.size("first_k_dense_replace", 1, least=0)
    return tuple(number >= dense for number in range(layers))


_KINDS = {
    "mixtral": _Kind(
        architecture="MixtralForCausalLM",
        experts=_mixtral_experts,
        names=lambda read, layers: Names(experts=W123, moe="block_sparse_moe"),
        theta=1e6,
    ),
    "qwen2_moe": _Kind(
        architecture="Qwen2MoeForCausalLM",
        experts=_qwen2_experts,
        sparse=Reader.sparse_layers,
        bias=lambda read: (read.flag("qkv_bias", True), False),
    ),
    "qwen3_moe": _Kind(
        architecture="Qwen3MoeForCausalLM",
        experts=lambda read: _softmax_experts(read, "moe_intermediate_size"),
        sparse=Reader.sparse_layers,
        qk_norm=lambda read: "head",
        bias=lambda read: (read.flag("attention_bias", False), read.flag("attention_bias", False)),
    ),
    "olmoe": _Kind(
        architecture="OlmoeForCausalLM",
        experts=_olmoe_experts,
        qk_norm=lambda read: "joint",
        bias=lambda read: (read.flag("attention_bias", False), read.flag("attention_bias", False)),
    ),
    "glm4_moe": _Kind(
        architecture="Glm4MoeForCausalLM",
        experts=_glm_experts,
        sparse=_after_first,
        names=lambda read, layers: Names(kept=layers_after(layers, read.size("num_nextn_predict_layers", 1, least=0))),
        qk_norm=lambda read: "head" if read.flag("use_qk_norm", False) else None,
        bias=lambda read: (read.flag("attention_bias", False), False),
        rotated=0.5,
        heads=True,
    ),
}


def matches(config: HFConfig) -> bool:
    return config.get("model_type") in _KINDS


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    kind = _KINDS[config["model_type"]]
    read = Reader(config, config["model_type"])
    read.only("hidden_act", "silu")
    _refuse_windows(read)
    layers, hidden = read.size("num_hidden_layers"), read.size("hidden_size")
    heads, kv_heads = read.heads("num_attention_heads", "num_key_value_heads")
    if read.get("head_dim") is None and hidden % heads:
        raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = read.size("head_dim", hidden // heads)
    bias, output_bias = kind.bias(read)
    mixer = GQAConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=kind.qk_norm(read),
        bias=bias,
        output_bias=output_bias,
    )
    heads = read.size("num_nextn_predict_layers", 0, least=0) if kind.heads else 0
    sparse = kind.sparse(read, layers + heads)
    moe = kind.experts(read)
    mlps = [moe if on else DenseMLPConfig(width=read.size("intermediate_size")) for on in sparse]
    blocks = tuple(LayerConfig(mixer=mixer, mlp=mlp) for mlp in mlps)
    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        layers=blocks[:layers],
        heads=blocks[layers:],
        norm_eps=read.number("rms_norm_eps"),
        rotary=read.rotary(head_dim, theta=kind.theta, factor=kind.rotated),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        names=kind.names(read, layers),
        raw={**config, "architectures": [kind.architecture]},
    )


def _refuse_windows(read: Reader) -> None:
    """Raises UserError for attention in a sliding window; Qwen's keep the key of one that is off."""
    window = read.get("sliding_window")
    if window and read.flag("use_sliding_window", "use_sliding_window" not in read.config):
        raise UserError(f"sliding_window {window!r:.80} is not supported by {read.family} policies: set it to null")
    kinds = read.get("layer_types")
    if isinstance(kinds, list | tuple) and any(kind != "full_attention" for kind in kinds):
        raise UserError(f"layer_types {kinds!r:.80} is not supported by {read.family} policies, only 'full_attention'")
