"""Recurrent states in vLLM's cache, at little cost to the host.

    StateLayer (one slot a sequence) -> StateSpec -> StateManager
    metadata of a step -> Batch: the slots of its sequences, once for all layers

vLLM sorts the layers of its cache into groups of one size and one kind, and asks each group's manager about every
sequence in every step. The manager of the states has nothing to look up once a sequence has its slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The sequences of a step in one holder: the decodes, then the prefills."""

    decodes: int
    tokens: int
    """Of both, without padding."""
    slots: Tensor
    """[S]."""
    fresh: Tensor
    """[S] bool: sequences without a token before this step. Their slot holds the state of its last owner.

    That includes prompts of one token, which vLLM counts among the decodes, and the padding of a CUDA graph.
    """
    bounds: Tensor
    """[prefills + 1]: the start of each prefill among the prefills' tokens, then their number."""

    @classmethod
    def of(cls, metadata: LinearAttentionMetadata) -> Batch:
        decodes, sequences = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
        assert metadata.num_decode_tokens == decodes, "speculative decoding is not supported"
        starts = metadata.query_start_loc[: sequences + 1]
        return cls(
            decodes=decodes,
            tokens=decodes + metadata.num_prefill_tokens,
            slots=metadata.state_indices_tensor[:sequences].contiguous(),
            fresh=metadata.seq_lens[:sequences] <= starts.diff(),
            bounds=starts[decodes:] - starts[decodes],
        )

    @property
    def prefills(self) -> int:
        return len(self.slots) - self.decodes


def batches_of(layers: Sequence[StateLayer]) -> list[Batch]:
    """The step's sequences in each of the layers; empty in vLLM's dummy runs, which have none."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return []
    found = [metadata[layer.prefix] for layer in layers]
    # Layers of one group of the cache share the object.
    batches: dict[int, Batch] = {}
    for group in found:
        assert isinstance(group, LinearAttentionMetadata)
        if id(group) not in batches:
            batches[id(group)] = Batch.of(group)
    return [batches[id(group)] for group in found]
