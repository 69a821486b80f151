"""config.json of released checkpoints: the family that takes each, and its size as the model's page says it."""

from __future__ import annotations

from typing import Any

import pytest

from cispo.errors import UserError
from cispo.policies.hybrid.config import GDNConfig, GQAConfig
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.hybrid.shares import check_ranks, parameters_of_rank
from cispo.policies.loading import shape_of

MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax",  # as published: the older family's
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {"quant_method": "fp8"},
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (MINIMAX_M2, 229),
        (QWEN3_NEXT, 79.7),
        (QWEN3_MOE, 30.5),
        (MIXTRAL, 46.7),
        (OLMOE, 6.92),
        (DEEPSEEK_V3, 671),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_sizes_are_those_of_the_releases(config: dict[str, Any], billions: float) -> None:
    """Without the layers of multi-token prediction, to three figures; no memory is allocated."""
    policy = shape_of(config)
    assert isinstance(policy, HybridPolicy)
    assert float(f"{sum(p.numel() for p in policy.parameters()) / 1e9:.3g}") == billions
    written = policy.hf_config()
    assert written["architectures"] == config["architectures"]
    assert shape_of(written).hf_config() == written


@pytest.mark.parametrize(
    ("config", "ranks", "gib"),
    [(DEEPSEEK_V3, 8, 160.9), (MINIMAX_M2, 8, 55.3), (QWEN3_NEXT, 2, 74.8), (QWEN3_NEXT, 8, 19.7), (MIXTRAL, 4, 22.1)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_weights_of_a_rank_of_an_engine(config: dict[str, Any], ranks: int, gib: float) -> None:
    """In bfloat16: an equal part, but for embedding and head, which every rank has, and key heads that ranks share."""
    policy = shape_of(config)
    assert round(2 * parameters_of_rank(policy, ranks) / 2**30, 1) == gib
    with pytest.raises(UserError, match="^rollout.tensor_parallel 7 does not divide the policy's "):
        check_ranks(policy, 7)
    check_ranks(policy, ranks)


def test_layers_of_the_releases() -> None:
    """Every fourth layer of Qwen3-Next is softmax; a quarter of its heads turns, half of MiniMax-M2's."""
    following, minimax = shape_of({**QWEN3_NEXT, "num_experts": 16}), shape_of({**MINIMAX_M2, "num_local_experts": 8})
    assert isinstance(following, HybridPolicy) and isinstance(minimax, HybridPolicy)
    kinds = [type(layer.mixer) for layer in following.config.layers]
    assert kinds == [GDNConfig, GDNConfig, GDNConfig, GQAConfig] * 12
    assert following.config.rotary is not None and following.config.rotary.dim == 64
    assert minimax.config.rotary is not None and minimax.config.rotary.dim == 64
    assert minimax.config.rotary.theta == 5e6 and minimax.hf_config()["model_type"] == "minimax_m2"
    assert "quantization_config" not in minimax.hf_config()
    assert minimax.keeps("model.layers.64.eh_proj.weight") and not minimax.keeps("model.layers.61.mlp.gate.weight")


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (QWEN3_NEXT, {"num_key_value_heads": 3}, "num_attention_heads 16 is not a multiple of num_key_value_heads 3"),
        (QWEN3_NEXT, {"linear_num_key_heads": None}, "lacks 'linear_num_key_heads'"),
        (QWEN3_NEXT, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 48"),
        (QWEN3_NEXT, {"layer_types": ["mamba"] * 48}, "layer_types holds 'mamba'; it takes 'linear_attention' and"),
        (QWEN3_NEXT, {"layer_types": 3}, "layer_types 3 must be a list"),
        (QWEN3_NEXT, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 turns 384 dims: .* up to 256"),
        (QWEN3_NEXT, {"partial_rotary_factor": 0.005}, "partial_rotary_factor 0.005 turns 1 dims"),
        (QWEN3_NEXT, {"rope_scaling": {"rope_type": "llama3"}}, "rope_type 'llama3' is not supported"),
        (
            QWEN3_NEXT,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings None must be",
        ),
        (QWEN3_NEXT, {"rope_scaling": "yarn"}, "rope_parameters 'yarn' must be a mapping"),
        (QWEN3_NEXT, {"rope_theta": 0}, "rope_theta 0 must be a number above 0"),
        (QWEN3_NEXT, {"mlp_only_layers": "all"}, "mlp_only_layers 'all' must be a list of layers"),
        (QWEN3_NEXT, {"norm_topk_prob": 1}, "norm_topk_prob 1 must be true or false"),
        (QWEN3_NEXT, {"num_experts_per_tok": 513}, "num_experts_per_tok 513 must be from 1 to 512"),
        (MINIMAX_M2, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported by MiniMax-M2 policies"),
        (MINIMAX_M2, {"qk_norm_type": "per_head"}, "qk_norm_type 'per_head' is not supported"),
        (MINIMAX_M2, {"attn_type_list": [0] * 62}, "attn_type_list .* is not supported"),
        (MINIMAX_M2, {"use_qk_norm": False}, "use_qk_norm False is not supported"),
        (MINIMAX_M2, {"num_local_experts": True}, "num_local_experts True must be a whole number of at least 1"),
        (MINIMAX_M2, {"rms_norm_eps": None, "head_dim": "wide"}, "head_dim 'wide' must be a whole number"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window 4096 is not supported by mixtral policies: set it to null"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        (MIXTRAL, {"num_attention_heads": 24}, "hidden_size 4096 is not a multiple of num_attention_heads 24"),
        (MIXTRAL, {"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported by olmoe policies, only null"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window 4096 is not supported"),
        (QWEN3_MOE, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.get("model_type", value))[:60],
)
def test_values_without_meaning_are_one_sentence(config: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shape_of({**config, **changed})
    assert "\n" not in str(caught.value)
