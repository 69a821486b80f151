"""Ling and Ring 2.5 (BailingMoeV2_5): lightning attention and latent attention, 7 to 1, group-limited sigmoid routing.

    layer l of L, groups of G      l + 1 a multiple of G, or behind the last whole group: latent; others: lightning
    decay of head h in layer l     slope(h) * (1 - l / (L - 1) + 1e-5), slopes as in MiniMax-01 (arXiv 2401.04658)
    rotary                         lightning: the first half of each head, i with i + half; latent: neighbours

Sources: config.json and the model's own code in inclusionAI/Ring-V2.5; vLLM 0.32 models/bailing_moe_linear. Held
against a reference of the same equations, not against released weights, which leaves open:

    the layer's factor     vLLM and SGLang count l from 0, as here; the model's own code has l - 1, as from a framework
                           that counts from 1: decays differ by the part 1 / (L - 1) of a slope
    eps of latents' norms  1e-6, the default of the model's own code; vLLM has rms_norm_eps, the same in the release
"""

from __future__ import annotations

from cispo.errors import UserError
from cispo.policies.hybrid.config import DenseMLPConfig, HybridConfig, LayerConfig, LightningMixerConfig, MoEConfig
from cispo.policies.hybrid.deepseek import latent_attention, score_factor
from cispo.policies.hybrid.names import Names, layers_after
from cispo.policies.hybrid.reading import Reader
from cispo.policies.minimax.config import alibi_slopes
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig

ARCHITECTURE = "BailingMoeV2_5ForCausalLM"

_MODEL_TYPES = ("bailing_moe_v2_5", "bailing_hybrid")


def matches(config: HFConfig) -> bool:
    return config.get("model_type") in _MODEL_TYPES or ARCHITECTURE in (config.get("architectures") or [])


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    read = Reader(config, "Ling")
    read.only("hidden_act", "silu")
    read.only("score_function", "sigmoid")
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    read.only("rope_interleave", True)
    for key in ("use_bias", "use_qkv_bias", "linear_silu", "use_linear_silu"):
        read.only(key, False)
    layers, group = read.size("num_hidden_layers"), read.size("layer_group_size")
    heads, head_dim = read.size("num_attention_heads"), read.size("head_dim", 128)
    rope_dim, eps = read.size("qk_rope_head_dim"), read.number("rms_norm_eps", 1e-6)
    rotary = read.rotary(head_dim, theta=600000.0, factor=0.5)
    if rotary.dim != rope_dim:
        raise UserError(
            f"qk_rope_head_dim {rope_dim} must be {rotary.dim}, partial_rotary_factor of head_dim {head_dim}"
        )
    groups = read.size("group_norm_size", 1)
    if heads * head_dim % groups:
        raise UserError(f"group_norm_size {groups} does not divide {heads * head_dim}, the width of all heads")
    latent = latent_attention(read, rotary="pairs", factor=score_factor(read, rotary))
    dense, sparse = DenseMLPConfig(width=read.size("intermediate_size")), _experts(read)
    first = read.size("first_k_dense_replace", 0, least=0)

    def layer(number: int) -> LayerConfig:
        mlp = dense if number < first else sparse
        if (number + 1) % group == 0 or number >= layers // group * group:
            return LayerConfig(mixer=latent, mlp=mlp)
        factor = 1 - number / max(layers - 1, 1) + 1e-5
        lightning = LightningMixerConfig(
            num_heads=heads,
            head_dim=head_dim,
            slopes=tuple(slope * factor for slope in alibi_slopes(heads)),
            rotary=True,
            qk_norm=read.flag("use_qk_norm", False),
            scale=head_dim**-0.5,
            norm_groups=groups,
            norm_eps=eps,
        )
        return LayerConfig(mixer=lightning, mlp=mlp)

    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layers=tuple(map(layer, range(layers))),
        norm_eps=eps,
        rotary=rotary,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        names=Names(
            renamed={
                "embed_tokens.": "word_embeddings.",
                ".self_attn.o_proj.": ".attention.dense.",
                ".self_attn.": ".attention.",
                ".e_score_correction_bias": ".expert_bias",
            },
            kept=layers_after(layers, read.size("num_nextn_predict_layers", 0, least=0)),
        ),
        raw={
            **{key: value for key, value in config.items() if key != "quantization_config"},
            "architectures": [ARCHITECTURE],
        },
    )


def _experts(read: Reader) -> MoEConfig:
    routing = Routing(
        num_experts=read.size("num_experts"),
        top_k=read.size("num_experts_per_tok"),
        scores="sigmoid",
        corrected=read.flag("moe_router_enable_expert_bias", True),
        normalised=read.flag("norm_topk_prob", True),
        scale=read.number("routed_scaling_factor", 1.0),
        groups=read.size("n_group", 1),
        kept_groups=read.size("topk_group", 1),
    )
    width = read.size("moe_intermediate_size")
    return MoEConfig(
        width=width,
        routing=read.check_routing(routing, "num_experts"),
        shared_width=read.size("moe_shared_expert_intermediate_size", width)
        * read.size("num_shared_experts", 0, least=0),
    )
