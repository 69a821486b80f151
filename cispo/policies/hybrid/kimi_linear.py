"""Kimi-Linear (arXiv 2510.26692): Kimi Delta Attention and latent attention without positions, 3 to 1.

Two spellings of its config.json are in use, the release's and transformers'; both are read, the release's first, and
both are written. The first MLP is dense: "mlp" on disk, the mixtures "block_sparse_moe". transformers 5.19 writes the
dense one as "block_sparse_moe" too, which is read as well. A latent's norm has the eps 1e-6 of the published code's
class, not rms_norm_eps.

Sources: config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct; transformers 5.19 models/kimi_linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cispo.errors import UserError
from cispo.policies.hybrid.config import DenseMLPConfig, HybridConfig, KDAConfig, LayerConfig, MoEConfig
from cispo.policies.hybrid.deepseek import latent_attention, mlp_kinds
from cispo.policies.hybrid.names import W123, Names, layers_after
from cispo.policies.hybrid.reading import Reader
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig

ARCHITECTURE = "KimiLinearForCausalLM"

_SPELLINGS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
"""The release's key -> transformers'."""
_LINEAR_SPELLINGS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""Those in the release's linear_attn_config."""
_KINDS = {"kda_layers": "linear_attention", "full_attn_layers": "full_attention"}


def matches(config: HFConfig) -> bool:
    return config.get("model_type") == "kimi_linear"


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    raw = _both_spellings(config)
    read = Reader(raw, "Kimi-Linear")
    read.only("hidden_act", "silu")
    read.only("moe_router_activation_func", "sigmoid")
    read.only("mla_use_nope", True)
    read.only("num_key_value_heads", read.size("num_attention_heads"))
    layers, eps = read.size("num_hidden_layers"), read.number("rms_norm_eps", 1e-5)
    linear = KDAConfig(
        num_heads=read.size("linear_num_heads"),
        head_dim=read.size("linear_head_dim"),
        conv_width=read.size("linear_conv_kernel_dim", 4, least=2),
        norm_eps=eps,
    )
    latent = latent_attention(read, rotary=None, bias=read.flag("attention_bias", False))
    mixers = {"linear_attention": linear, "full_attention": latent}
    kinds = read.kinds("layer_types", tuple(mixers), layers)
    if kinds is None:
        raise UserError("the policy's config lacks 'linear_attn_config', or 'layer_types'")
    routing = Routing(
        num_experts=read.size("num_experts"),
        top_k=read.size("num_experts_per_token"),
        scores="sigmoid",
        corrected=True,
        normalised=read.flag("moe_renormalize", True),
        scale=read.number("routed_scaling_factor"),
        groups=read.size("num_expert_group", 1),
        kept_groups=read.size("topk_group", 1),
    )
    width = read.size("moe_intermediate_size")
    sparse = MoEConfig(
        width=width,
        routing=read.check_routing(routing, "num_experts"),
        shared_width=width * read.size("num_shared_experts", 1, least=0),
    )
    mlps = {"dense": DenseMLPConfig(width=read.size("intermediate_size")), "sparse": sparse}
    mlp_of_layer = mlp_kinds(read, layers, dense=1)
    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layers=tuple(
            LayerConfig(mixer=mixers[kind], mlp=mlps[mlp]) for kind, mlp in zip(kinds, mlp_of_layer, strict=True)
        ),
        norm_eps=eps,
        rotary=None,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        names=Names(
            experts=W123,
            moe="block_sparse_moe",
            kept=layers_after(layers, read.size("num_nextn_predict_layers", 0, least=0)),
        ),
        raw={
            **raw,
            "architectures": [ARCHITECTURE],
            "mlp_layer_types": list(mlp_of_layer),
        },
    )


def _both_spellings(config: HFConfig) -> dict[str, Any]:
    """The config.json's content under the release's keys and under transformers'; the release's win."""
    raw = dict(config)
    for theirs, ours in _SPELLINGS.items():
        value = config.get(theirs)
        value = config.get(ours) if value is None else value
        if value is not None:
            raw[theirs] = raw[ours] = value
    linear = config.get("linear_attn_config") or {}
    if not isinstance(linear, Mapping):
        raise UserError(f"linear_attn_config {linear!r:.80} must be a mapping")
    linear = dict(linear)
    for theirs, ours in _LINEAR_SPELLINGS.items():
        value = linear.get(theirs)
        value = config.get(ours) if value is None else value
        if value is not None:
            linear[theirs] = raw[ours] = value
    kinds = _layer_types(linear, Reader(config, "Kimi-Linear").size("num_hidden_layers"))
    if kinds is not None:
        raw["layer_types"] = kinds
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        linear |= {key: [n + 1 for n, one in enumerate(kinds) if one == kind] for key, kind in _KINDS.items()}
    return {**raw, "linear_attn_config": linear}


def _layer_types(linear: Mapping[str, object], layers: int) -> list[str] | None:
    """transformers' layer_types from the lists of layers, counted from 1; None without them."""
    if not any(key in linear for key in _KINDS):
        return None
    found: dict[int, str] = {}
    for key, kind in _KINDS.items():
        numbers = linear.get(key, [])
        if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
            raise UserError(f"linear_attn_config.{key} {numbers!r:.80} must be a list of layers, counted from 1")
        found |= dict.fromkeys(numbers, kind)
    if sorted(found) != list(range(1, layers + 1)):
        raise UserError(f"linear_attn_config names the layers {sorted(found)!r:.80}, num_hidden_layers is {layers}")
    return [found[number] for number in range(1, layers + 1)]
