"""Tiny policies of every kind and the helpers that the policy tests share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.policies.policy import Policy

# H = 6 is no power of two, two key-value heads, factors that are not 1, softmax in the middle.
MINIMAX: dict[str, Any] = {
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "linear_attn_alpha_factor": 1.3,
    "linear_attn_beta_factor": 0.7,
    "full_attn_alpha_factor": 0.8,
    "full_attn_beta_factor": 1.9,
    "mlp_alpha_factor": 1.4,
    "mlp_beta_factor": 0.6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
ORIGINAL: dict[str, Any] = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_theta": 10000000,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attn_type_list": [0, 1, 0],
    "postnorm": True,
    "rms_norm_eps": 1e-5,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
DENSE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
QWEN3 = {"model_type": "qwen3", "tie_word_embeddings": True, **DENSE}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **DENSE}
EVERY_KIND = pytest.mark.parametrize(
    "config",
    [
        MINIMAX,
        {**MINIMAX, "tie_word_embeddings": True},
        {**ORIGINAL, "initializer_range": 0.08, "shared_intermediate_size": 1, "postnorm": False},
        QWEN3,
        LLAMA,
    ],
    ids=["minimax", "minimax tied", "original", "qwen3", "llama"],
)


def tokens_of(length: int, vocab: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed))


def bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def logprobs(policy: Policy, tokens: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Log-probabilities [T, V] of packed documents of these lengths (one document by default)."""
    lengths = lengths or [len(tokens)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = policy(tokens, positions, bounds(lengths)).hidden
    return F.linear(hidden, policy.lm_head_weight).log_softmax(-1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= tolerance
