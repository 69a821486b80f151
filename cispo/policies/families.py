"""The families of policies."""

from __future__ import annotations

import torch

from cispo.policies.dense.model import HFPolicy
from cispo.policies.dense.short_step import _LLAMA_LIKE, LlamaStep
from cispo.policies.minimax.model import LightningPolicy
from cispo.policies.minimax.short_step import LightningStep
from cispo.policies.policy import Policy, ShortStep


def short_step(policy: Policy) -> ShortStep | None:
    """The policy's step in few operations; None where it has none: other models, and below float32, which rounds."""
    if policy.lm_head_weight.dtype != torch.float32:
        return None
    if isinstance(policy, LightningPolicy):
        return LightningStep(policy)
    if isinstance(policy, HFPolicy) and type(policy.model).__name__ in _LLAMA_LIKE:
        return LlamaStep(policy) if policy.model.config.hidden_act == "silu" else None
    return None
