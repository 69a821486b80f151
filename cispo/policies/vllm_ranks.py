"""The ranks of tensor parallelism inside a worker of vLLM."""

from __future__ import annotations

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from cispo.policies.shares import Ranks


def vllm_ranks() -> Ranks:
    """This worker among those of its engine."""
    return Ranks(
        number=get_tensor_model_parallel_rank(),
        count=get_tensor_model_parallel_world_size(),
        sum=tensor_model_parallel_all_reduce,
    )
