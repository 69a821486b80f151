"""MiniMax-M2: softmax layers with norms over all heads of queries and keys, partial rotary, sigmoid-routed experts.

Sources: config.json of MiniMaxAI/MiniMax-M2; transformers 5.19 models/minimax_m2. The correction bias lies beside the
router on disk, and in it here.
"""

from __future__ import annotations

from cispo.policies.hybrid.config import GQAConfig, HybridConfig, LayerConfig, MoEConfig
from cispo.policies.hybrid.names import W123, Names, layers_after
from cispo.policies.hybrid.reading import Reader
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig

ARCHITECTURE = "MiniMaxM2ForCausalLM"


def matches(config: HFConfig) -> bool:
    return config.get("model_type") == "minimax_m2" or ARCHITECTURE in (config.get("architectures") or [])


def parse(config: HFConfig) -> HybridConfig:
    """Raises UserError where a key is missing or its value has no meaning in the family."""
    read = Reader(config, "MiniMax-M2")
    read.only("hidden_act", "silu")
    read.only("scoring_func", "sigmoid")
    read.only("qk_norm_type", "per_layer")
    read.only("use_qk_norm", True)
    read.only("sliding_window", False)
    read.only("shared_intermediate_size", 0)
    layers = read.size("num_hidden_layers")
    read.only("attn_type_list", [1] * layers)
    heads, kv_heads = read.heads("num_attention_heads", "num_key_value_heads", 8)
    head_dim = read.size("head_dim", 128)
    rotary_dim = read.size("rotary_dim", head_dim)
    experts = read.size("num_local_experts", 256)
    routing = Routing(
        num_experts=experts,
        top_k=read.size("num_experts_per_tok", 8),
        scores="sigmoid",
        corrected=read.flag("use_routing_bias", True),
    )
    mlp = MoEConfig(width=read.size("intermediate_size"), routing=read.check_routing(routing, "num_local_experts"))
    mixer = GQAConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, qk_norm="joint")
    rotary = read.rotary(head_dim, theta=5e6, factor=rotary_dim / head_dim)
    predicted = read.size("num_mtp_modules", 0, least=0) if read.flag("use_mtp", False) else 0
    return HybridConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layers=(LayerConfig(mixer=mixer, mlp=mlp),) * layers,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rotary=rotary,
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        names=Names(
            experts=W123,
            moe="block_sparse_moe",
            renamed={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
            kept=layers_after(layers, predicted),
        ),
        raw={
            **config,
            "model_type": "minimax_m2",
            "architectures": [ARCHITECTURE],
            # Both spellings: transformers writes the factor alone, vLLM reads the dims and theta alone.
            "rotary_dim": rotary.dim,
            "rope_theta": rotary.theta,
            "rope_parameters": {
                **read.rope(),
                "rope_theta": rotary.theta,
                "partial_rotary_factor": rotary.dim / head_dim,
            },
        },
    )
