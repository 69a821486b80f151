"""The lightning layers' states in vLLM's cache, several layers in one slot of a sequence (`policies.vllm_slots`).

At 512 sequences of a small model a step waits for the managers of the cache's groups. With as many holders as there are
softmax layers there are two groups, where a layer of its own for each state would make four or more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator

from cispo.policies.minimax.config import LightningConfig
from cispo.policies.vllm_slots import StateLayer


class LightningStates(StateLayer):
    """The states of several lightning layers, [layers, H, D, D] float32 a sequence: to vLLM, one layer of its cache."""

    def __init__(self, config: LightningConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        self.state_dtype = state_dtype(vllm_config)
        self.state_shape = state_shape(config, get_tensor_model_parallel_world_size())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.state_dtype

    def get_state_shape(self) -> tuple[tuple[int, ...]]:
        return self.state_shape

    def of(self, place: int) -> Tensor:
        """The cache of one layer, [slots, H, D, D]: dense but for its first stride."""
        (states,) = self.kv_cache
        return states[:, place]


def states_per_holder(config: LightningConfig) -> tuple[int, int]:
    """(holders, lightning layers of each): as many holders as there are softmax layers, or fewer; at least one."""
    lightning = sum(config.lightning_layers)
    each = -(-lightning // max(len(config.lightning_layers) - lightning, 1))
    return -(-lightning // max(each, 1)), each


def state_dtype(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    return MambaStateDtypeCalculator.linear_attention_state_dtype(
        vllm_config.model_config.dtype, vllm_config.cache_config.mamba_cache_dtype
    )


def state_shape(config: LightningConfig, ranks: int) -> tuple[tuple[int, ...]]:
    return ((states_per_holder(config)[1], config.num_heads // ranks, config.head_dim, config.head_dim),)
