"""Qwen3-Next, and the text models of Qwen3.5 and Qwen3.6: gated DeltaNet and gated softmax layers, 3 to 1.

    model_type            projections of DeltaNet     MLP
    qwen3_next            fused, per key head         softmax-routed experts and a gated shared expert; some dense
    qwen3_5_text          one matrix each             dense
    qwen3_5_moe_text      one matrix each             as qwen3_next, no dense ones

Block norms, and those of queries and keys, multiply by 1 + weight; the output norm of DeltaNet by its weight. Released
checkpoints of Qwen3.5 are vision-language ("qwen3_5", "qwen3_5_moe"): their text model is loaded, and written as a text
model. Text has one position a token, so that the interleaved sections of their rotary table are all the same.

Sources: transformers 5.19 models/qwen3_next, models/qwen3_5 and models/qwen3_5_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cispo.errors import UserError
from cispo.policies.hybrid.config import DenseMLPConfig, GDNConfig, GQAConfig, HybridConfig, LayerConfig, MoEConfig
from cispo.policies.hybrid.names import Names
from cispo.policies.hybrid.reading import Reader
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig

_TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""The text model in each vision-language one."""
_ARCHITECTURES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}

_NAMES = Names(
    renamed={".mlp.shared_experts.": ".mlp.shared_expert."},
    prefixes=("model.", "model.language_model.", "language_model.model.", "language_model."),
    skipped=r"(.*\.inv_freq$|(model\.)?visual\.)",
    kept=r"(model\.)?mtp\.",
)


def matches(config: HFConfig) -> bool:
    return config.get("model_type") in (*_ARCHITECTURES, *_TEXT_TYPES)


def text_config(config: HFConfig) -> dict[str, Any]:
    """The text model's config.json. Raises UserError where a vision-language one has no text_config."""
    kind = config["model_type"]
    if kind not in _TEXT_TYPES:
        return {**config, "architectures": [_ARCHITECTURES[kind]]}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"the policy's config lacks 'text_config', the language model of model_type {kind!r}")
    kind = _TEXT_TYPES[kind]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return {
        **text,
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "tie_word_embeddings": tied,
    }


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    text = text_config(config)
    read = Reader(text, "Qwen3-Next and Qwen3.5")
    read.only("hidden_act", "silu")
    read.only("sliding_window", False)
    layers = read.size("num_hidden_layers")
    head_dim = read.size("head_dim", 256)
    heads, kv_heads = read.heads("num_attention_heads", "num_key_value_heads")
    eps = read.number("rms_norm_eps", 1e-6)
    bias = read.flag("attention_bias", False)
    softmax = GQAConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        gate=read.flag("attn_output_gate", True),
        qk_norm="head",
        bias=bias,
        output_bias=bias,
    )
    value_heads, key_heads = read.heads("linear_num_value_heads", "linear_num_key_heads")
    linear = GDNConfig(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=read.size("linear_key_head_dim", 128),
        value_dim=read.size("linear_value_head_dim", 128),
        conv_width=read.size("linear_conv_kernel_dim", 4, least=2),
        fused=text["model_type"] == "qwen3_next",
        norm_eps=eps,
    )
    mixers = {"linear_attention": linear, "full_attention": softmax}
    mlps = _mlps(read, layers)
    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layers=tuple(
            LayerConfig(mixer=mixers[kind], mlp=mlp) for kind, mlp in zip(_kinds(read, layers), mlps, strict=True)
        ),
        norm_eps=eps,
        centred_norms=True,
        rotary=read.rotary(head_dim, factor=0.25),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        names=_NAMES,
        raw=text,
    )


def _kinds(read: Reader, layers: int) -> tuple[str, ...]:
    kinds = read.kinds("layer_types", ("linear_attention", "full_attention"), layers)
    if kinds is not None:
        return kinds
    interval = read.size("full_attention_interval", 4)
    return tuple("linear_attention" if (number + 1) % interval else "full_attention" for number in range(layers))


def _mlps(read: Reader, layers: int) -> list[DenseMLPConfig | MoEConfig]:
    """Each layer's MLP."""
    kind = read.config["model_type"]
    experts = 0 if kind == "qwen3_5_text" else read.size("num_experts", least=0)
    sparse = read.sparse_layers(layers) if kind == "qwen3_next" else (True,) * layers
    return [
        _moe(read, experts) if on and experts else DenseMLPConfig(width=read.size("intermediate_size")) for on in sparse
    ]


def _moe(read: Reader, experts: int) -> MoEConfig:
    routing = Routing(
        num_experts=experts,
        top_k=read.size("num_experts_per_tok"),
        normalised=read.flag("norm_topk_prob", True),
    )
    return MoEConfig(
        width=read.size("moe_intermediate_size"),
        routing=read.check_routing(routing, "num_experts"),
        shared_width=read.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )
