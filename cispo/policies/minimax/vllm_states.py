"""The lightning layers' states in vLLM's cache, at little cost to the host.

    LightningStates (several layers, one slot a sequence) -> StateSpec -> StateManager

vLLM sorts the layers of its cache into groups of one size and one kind, and asks each group's manager about every
sequence in every step: at 512 sequences of a small model a step waits for that. With as many holders as there
are softmax layers there are two groups, where a layer of its own for each state would make four or more, and the
manager of the states has nothing to look up once a sequence has its slot.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from cispo.policies.minimax.config import LightningConfig


class StateSpec(MambaSpec):
    """One slot a sequence, from its first token to its last: no prefix cache, no speculation."""


class StateManager(MambaManager):
    """Gives a sequence its slot once."""

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        return (
            0 if self.req_to_blocks.get(request_id) else super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        )

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        return [] if self.req_to_blocks.get(request_id) else super().allocate_new_blocks(request_id, *args, **kwargs)

    def remove_skipped_blocks(self, *args: object, **kwargs: object) -> None:
        pass


class LightningStates(nn.Module, MambaBase):
    """The states of several lightning layers, [layers, H, D, D] float32 a sequence: to vLLM, one layer of its cache."""

    def __init__(self, config: LightningConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.state_dtype = state_dtype(vllm_config)
        self.state_shape = state_shape(config, get_tensor_model_parallel_world_size())
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, f"two layers named {prefix}"
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.state_dtype

    def get_state_shape(self) -> tuple[tuple[int, ...]]:
        return self.state_shape

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, MambaSpec) or spec.mamba_cache_mode != "none" or spec.num_speculative_blocks:
            return spec
        KVCacheSpecRegistry.get_manager_class(spec)  # vLLM registers its own first, and only into an empty registry
        KVCacheSpecRegistry.register(StateSpec, StateManager, uniform_type_base_spec=MambaSpec)
        return StateSpec(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)})

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
