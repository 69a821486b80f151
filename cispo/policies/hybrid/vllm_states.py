"""The recurrent states of a policy in vLLM's cache.

    StateHolder: to vLLM one recurrent layer, one slot a sequence; in a slot the states of several layers, one after
    another, float32

A slot is one flat row, which vLLM copies as a whole when it caches a prefix ("align"): the windows of convolutions
together with the states of their recurrences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import MambaSpec

from cispo.policies.hybrid.vllm_plan import Plan, StatePlace
from cispo.policies.vllm_slots import StateLayer


class StateHolder(StateLayer):
    """Slots [N, floats] float32; registered with vLLM under `prefix`."""

    def __init__(self, plan: Plan, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        self.floats = plan.slot_floats

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def get_state_shape(self) -> tuple[tuple[int, ...]]:
        return ((self.floats,),)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def rows(self, place: StatePlace) -> Tensor:
        """The states of one recurrence, [slots, floats]: dense but for the first stride."""
        (slots,) = self.kv_cache
        return slots[:, place.offset : place.offset + place.floats]


class StateBackend(LinearAttentionBackend):
    """vLLM's linear attention with slots at a fixed address."""

    @staticmethod
    def get_builder_cls() -> type[LinearAttentionMetadataBuilder]:
        return StateMetadataBuilder


class StateMetadataBuilder(LinearAttentionMetadataBuilder):
    """Keeps the slots of a step where a captured CUDA graph reads them.

    With a prefix cache vLLM gathers them into a new tensor in every step.
    """

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        sequences = vllm_config.scheduler_config.max_num_seqs
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.slots = torch.zeros(max(sequences, captured), dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LinearAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        found = metadata.state_indices_tensor
        if len(found) <= len(self.slots):
            metadata.state_indices_tensor = self.slots[: len(found)].copy_(found, non_blocking=True)
        return metadata
