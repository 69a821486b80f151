"""DeepSeek-V3 (arXiv 2412.19437) and V3.2 (arXiv 2512.02556): latent attention, and in V3.2 an indexer a layer.

    model_type      attention                           MLP
    deepseek_v3     MLA, neighbouring dims rotated      the first layers dense, then group-limited sigmoid routing
    deepseek_v32    the same over the indexer's keys    as deepseek_v3

A latent's norm has an eps of its own, 1e-6, in the published code. Released weights are fp8 and are refused by name: a
policy is trained from a bfloat16 copy; the config.json that is written has no `quantization_config`.

Sources: config.json of deepseek-ai/DeepSeek-V3 and -V3.2-Exp; transformers 5.19 models/deepseek_v3 and deepseek_v32.
"""

from __future__ import annotations

from typing import Literal

from cispo.errors import UserError
from cispo.policies.hybrid.config import (
    DenseMLPConfig,
    HybridConfig,
    IndexerConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    Rotary,
)
from cispo.policies.hybrid.names import Names, layers_after
from cispo.policies.hybrid.reading import Reader, yarn_scale
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM"}

LATENT_NORM_EPS = 1e-6
"""Eps of the norms of latents: the class default of the published code, not rms_norm_eps."""


def matches(config: HFConfig) -> bool:
    return config.get("model_type") in ARCHITECTURES


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    kind = config["model_type"]
    read = Reader(config, "DeepSeek")
    read.only("hidden_act", "silu")
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    read.only("mlp_bias", False)
    read.only("num_key_value_heads", read.size("num_attention_heads"))
    layers = read.size("num_hidden_layers")
    rope_dim = read.size("qk_rope_head_dim")
    rotary = read.rotary(rope_dim)
    if rotary.dim != rope_dim:
        raise UserError(f"partial_rotary_factor leaves {rotary.dim} of qk_rope_head_dim {rope_dim}: all are rotated")
    mixer = latent_attention(
        read,
        rotary="pairs" if kind == "deepseek_v32" or read.flag("rope_interleave", True) else "half",
        factor=score_factor(read, rotary),
        bias=read.flag("attention_bias", False),
        indexer=_indexer(read, rope_dim) if kind == "deepseek_v32" else None,
    )
    dense = DenseMLPConfig(width=read.size("intermediate_size"))
    routing = Routing(
        num_experts=read.size("n_routed_experts"),
        top_k=read.size("num_experts_per_tok"),
        scores="sigmoid",
        corrected=True,
        normalised=read.flag("norm_topk_prob", True),
        scale=read.number("routed_scaling_factor"),
        groups=read.size("n_group"),
        kept_groups=read.size("topk_group"),
    )
    width = read.size("moe_intermediate_size")
    sparse = MoEConfig(
        width=width,
        routing=read.check_routing(routing, "n_routed_experts"),
        shared_width=width * read.size("n_shared_experts", 1, least=0),
    )
    mlps = {"dense": dense, "sparse": sparse}
    heads = read.size("num_nextn_predict_layers", 0, least=0)
    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layers=tuple(LayerConfig(mixer=mixer, mlp=mlps[kind]) for kind in mlp_kinds(read, layers, dense=3)),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rotary=rotary,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        heads=tuple(
            LayerConfig(mixer=mixer, mlp=mlps[kind]) for kind in mlp_kinds(read, layers, dense=3, heads=heads)[layers:]
        ),
        names=Names(kept=layers_after(layers, read.size("num_nextn_predict_layers", 1, least=0))),
        raw={
            **{key: value for key, value in config.items() if key != "quantization_config"},
            "architectures": [ARCHITECTURES[kind]],
        },
    )


def latent_attention(
    read: Reader,
    *,
    rotary: Literal["pairs", "half"] | None,
    factor: float = 1.0,
    bias: bool = False,
    indexer: IndexerConfig | None = None,
) -> MLAConfig:
    """The record of latent attention; scores are divided by the root of a query's size and multiplied by `factor`."""
    nope_dim, rope_dim = read.size("qk_nope_head_dim"), read.size("qk_rope_head_dim")
    rank = read.get("q_lora_rank")
    if indexer is not None and rank is None:
        raise UserError("the policy's config lacks 'q_lora_rank': an indexer reads the queries' latents")
    return MLAConfig(
        num_heads=read.size("num_attention_heads"),
        q_lora_rank=None if rank is None else read.size("q_lora_rank"),
        kv_lora_rank=read.size("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=read.size("v_head_dim"),
        rotary=rotary,
        scale=(nope_dim + rope_dim) ** -0.5 * factor,
        latent_norm_eps=LATENT_NORM_EPS,
        bias=bias,
        indexer=indexer,
    )


def mlp_kinds(read: Reader, layers: int, *, dense: int, heads: int = 0) -> tuple[str, ...]:
    """The MLP of each layer, then of each head, dense or sparse: `mlp_layer_types`, of which heads have the last, or
    else the first `first_k_dense_replace` are dense.

    `dense` is the number without that key.
    """
    kinds = read.kinds("mlp_layer_types", ("dense", "sparse"), layers)
    if kinds is not None:
        return kinds + kinds[-1:] * heads
    first, every = read.size("first_k_dense_replace", dense, least=0), read.size("moe_layer_freq", 1)
    return tuple("dense" if number < first or number % every else "sparse" for number in range(layers + heads))


def score_factor(read: Reader, rotary: Rotary) -> float:
    """Growth of the scores with a longer context (YaRN): that of queries times that of keys."""
    everywhere = read.rope().get("mscale_all_dim")
    if rotary.yarn is None or not isinstance(everywhere, int | float):
        return 1.0
    return yarn_scale(rotary.yarn.factor, everywhere) ** 2


def _indexer(read: Reader, rope_dim: int) -> IndexerConfig:
    head_dim = read.size("index_head_dim")
    if head_dim < rope_dim:
        raise UserError(
            f"index_head_dim {head_dim} is less than qk_rope_head_dim {rope_dim}, the dims that are rotated"
        )
    return IndexerConfig(
        num_heads=read.size("index_n_heads"),
        head_dim=head_dim,
        top_k=read.size("index_topk"),
        interleaved_rotary=read.flag("indexer_rope_interleave", False),
    )
