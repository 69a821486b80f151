"""Recurrent states in vLLM's cache, at little cost to the host.

    StateLayer (one slot a sequence) -> StateSpec -> StateManager

vLLM sorts the layers of its cache into groups of one size and one kind, and asks each group's manager about every
sequence in every step. The manager of the states has nothing to look up once a sequence has its slot.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


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


class StateLayer(nn.Module, MambaBase):
    """To vLLM one layer of its cache, with a slot a sequence; a subclass gives dtype and shape of a slot."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, f"two layers named {prefix}"
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, MambaSpec) or spec.mamba_cache_mode != "none" or spec.num_speculative_blocks:
            return spec
        KVCacheSpecRegistry.get_manager_class(spec)  # vLLM registers its own first, and only into an empty registry
        KVCacheSpecRegistry.register(StateSpec, StateManager, uniform_type_base_spec=MambaSpec)
        return StateSpec(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)})
