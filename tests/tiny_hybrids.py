"""Tiny random checkpoints of the hybrid families, written by transformers, one entry a family in TINY.

Four layers, vocabulary 64, about half a million parameters. Weights are drawn so that mistakes show: initialiser 0.08,
norm weights off their neutral value, correction biases that change the choice of experts, decays from weak to strong.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests import ling_reference  # a model type that transformers lacks

VOCAB = 64

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
GDN: dict[str, Any] = {
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
QWEN_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
}
DEEPSEEK: dict[str, Any] = {
    **MLA,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 48,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_parameters": dict(ROPE),
}
DEEPSEEK_ADDED: dict[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
DEEPSEEK_MTP = ("model.layers.4.eh_proj.weight", "model.layers.4.shared_head.norm.weight")
LING: dict[str, Any] = {
    **MLA,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000.0,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": None,
    "num_experts": 8,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "layer_group_size": 4,
    "group_norm_size": 2,
    "use_qk_norm": True,
}
# transformers' base class moves rotary keys elsewhere when it saves.
LING_ADDED: dict[str, Any] = {"partial_rotary_factor": 0.5, "rope_theta": 600000.0, "score_function": "sigmoid"}
QWEN_MTP = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
# With gated DeltaNet and this initialiser transformers itself is 1.2e-5 to 3.9e-5 from float64, as the policy is.
GDN_TOLERANCE = 3e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A family's checkpoint: transformers' config, and keys that are added to config.json after saving."""

    model_type: str
    config: dict[str, Any]
    added: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    """Of log-probabilities against transformers in float32."""
    kept: tuple[str, ...] = ()
    """Names of tensors of multi-token prediction, as checkpoints of the family have them."""
    kept_config: dict[str, Any] = field(default_factory=dict)
    """The keys of config.json by which the family knows them."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Beginnings of names that transformers writes otherwise than the release -> the release's."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """A config.json's content."""
        return {"model_type": self.model_type, **COMMON, **self.config, **self.added}


TINY = {
    "minimax_m2": Tiny(
        model_type="minimax_m2",
        config={
            "head_dim": 32,
            "intermediate_size": 64,
            "rms_norm_eps": 1e-6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
        added={
            "rotary_dim": 16,
            "rope_theta": 10000.0,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "attn_type_list": [1] * 4,
        },
        kept=("model.layers.4.eh_proj.weight", "model.layers.4.self_attn.q_proj.weight"),
        kept_config={"use_mtp": True, "num_mtp_modules": 1},
    ),
    "qwen3_next": Tiny(model_type="qwen3_next", config={**GDN, **QWEN_MOE}, tolerance=GDN_TOLERANCE, kept=QWEN_MTP),
    "qwen3_5": Tiny(
        model_type="qwen3_5_text", config={**GDN, "intermediate_size": 128}, tolerance=GDN_TOLERANCE, kept=QWEN_MTP
    ),
    "qwen3_5_moe": Tiny(
        model_type="qwen3_5_moe_text", config={**GDN, **QWEN_MOE}, tolerance=GDN_TOLERANCE, kept=QWEN_MTP
    ),
    "kimi_linear": Tiny(
        model_type="kimi_linear",
        config={
            **MLA,
            "rms_norm_eps": 1e-5,
            "q_lora_rank": None,
            "num_local_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "linear_head_dim": 32,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
        renamed={"model.layers.0.block_sparse_moe.": "model.layers.0.mlp."},
    ),
    "deepseek_v3": Tiny(model_type="deepseek_v3", config=DEEPSEEK, added=DEEPSEEK_ADDED, kept=DEEPSEEK_MTP),
    "deepseek_v32": Tiny(
        model_type="deepseek_v32",
        config={**DEEPSEEK, "index_topk": 16, "index_head_dim": 32, "index_n_heads": 4},
        added=DEEPSEEK_ADDED,
        kept=DEEPSEEK_MTP,
    ),
    "ling": Tiny(
        model_type=ling_reference.LingConfig.model_type,
        config=LING,
        added=LING_ADDED,
        kept=("model.layers.4.eh_proj.weight", "model.layers.4.final_layernorm.weight"),
        kept_config={"num_nextn_predict_layers": 1},
    ),
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

# Other values of the families' keys, and further model types of the same blocks.
VARIANTS = {
    "qwen3_next, a dense layer, biases, tied": Tiny(
        model_type="qwen3_next",
        config={
            **GDN,
            **QWEN_MOE,
            "mlp_only_layers": [1],
            "intermediate_size": 80,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
        tolerance=GDN_TOLERANCE,
    ),
    "qwen3_next, one key head, every second layer dense, yarn": Tiny(
        model_type="qwen3_next",
        config={
            **GDN,
            **QWEN_MOE,
            "linear_num_key_heads": 1,
            "linear_value_head_dim": 16,
            "decoder_sparse_step": 2,
            "intermediate_size": 80,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
        },
        tolerance=GDN_TOLERANCE,
    ),
    "ling, layers behind the last group, latents of queries, no norms": Tiny(
        model_type=ling_reference.LingConfig.model_type,
        config={
            **LING,
            "num_hidden_layers": 5,
            "layer_group_size": 3,
            "q_lora_rank": 24,
            "use_qk_norm": False,
            "group_norm_size": 1,
            "num_shared_experts": 2,
        },
        added=LING_ADDED,
    ),
    "mixtral": Tiny(
        model_type="mixtral",
        config={
            "rms_norm_eps": 1e-5,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": ROPE,
        },
    ),
    "qwen2_moe": Tiny(
        model_type="qwen2_moe",
        config={
            **EXPERTS,
            "intermediate_size": 80,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [2],
            "rope_parameters": ROPE,
        },
    ),
    "qwen3_moe": Tiny(
        model_type="qwen3_moe",
        config={**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "rope_parameters": ROPE},
    ),
    "olmoe": Tiny(
        model_type="olmoe",
        config={
            "rms_norm_eps": 1e-5,
            "intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "rope_parameters": ROPE,
        },
    ),
    "glm4_moe": Tiny(
        model_type="glm4_moe",
        config={
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "use_qk_norm": True,
            "intermediate_size": 80,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """transformers' model in float32, in evaluation mode."""
    tiny = {**TINY, **VARIANTS}[family]
    config = AutoConfig.for_model(tiny.model_type, **{**COMMON, **tiny.config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    draw_weights(model, seed)
    return with_stable_ties(model.eval())


def with_stable_ties(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its indexers with the rule that equal scores are taken from the lowest position on."""
    for name, module in model.named_modules():
        if name.endswith("indexer"):
            module.forward = functools.partial(_stable, module.forward)
    return model


def _stable(forward: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
    def topk(scores: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, order = scores.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), order.narrow(dim, 0, k)))

    with mock.patch.object(torch.Tensor, "topk", topk):
        return forward(*args, **kwargs)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Moves the special weights of a model with an initialiser of 0.08 to where mistakes show."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            parameter.copy_(torch.linspace(-3.0, 1.0, parameter.numel()).view(parameter.shape))
        elif name.endswith("dt_bias"):
            parameter.copy_(noise - 1.0)
        elif "conv1d" in name:
            parameter.copy_(noise * 0.4)
        elif parameter.ndim == 1:  # norms, around 1 or zero-centred, and biases
            parameter.add_(noise * 0.2)
        elif name.endswith("mlp.gate.weight"):
            parameter.copy_(noise * 0.3)
        elif "indexer" in name:
            parameter.copy_(noise * 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)


def save(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Writes the checkpoint through transformers; returns the model."""
    model = build(family, seed)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **{**TINY, **VARIANTS}[family].added}, indent=1))
    return model
