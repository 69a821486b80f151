"""Experts by kernels that multiply with the policy's own two weights, in bfloat16 on a GPU: vLLM's, or ours for few."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import fused_experts, override_config

from cispo.ops.experts import FEW_TOKENS, expert_rows, weigh_rows
from cispo.policies.expert_tiles import ExpertShape, expert_tiles


def run_experts(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """`moe.Experts.forward`: weights [T, k] float32, chosen [T, k] int32."""
    if len(x) <= FEW_TOKENS:
        return weigh_rows(expert_rows(x, gate_up_proj, down_proj, chosen), weights)
    experts, hidden, width = down_proj.shape
    shape = ExpertShape(experts, hidden, width, chosen.shape[1])
    tiles = expert_tiles(_card(x.device), shape, len(x))
    if tiles is None:
        return fused_experts(x, gate_up_proj, down_proj, weights, chosen)
    with override_config(tiles.config):
        return fused_experts(x, gate_up_proj, down_proj, weights, chosen)


@lru_cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
