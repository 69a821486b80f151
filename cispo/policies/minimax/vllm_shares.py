"""Tensor parallelism of the lightning policy in vLLM: a rank's share of each weight, and a norm over all heads.

vLLM's own layers cut projections and the vocabulary. Here are the rest: experts by their width, the shared expert too,
and the norm of a lightning layer, with the mean square over every rank's heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.utils import set_weight_attrs

from cispo.errors import UserError
from cispo.policies.minimax.config import LightningConfig
from cispo.policies.policy import Place


class ShardedRMSNorm(nn.Module):
    """RMSNorm over all heads where each rank holds some of them: the mean square is that of all ranks."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size // get_tensor_model_parallel_world_size()))
        set_weight_attrs(self.weight, {"weight_loader": load_rows})

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        square = tensor_model_parallel_all_reduce(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(square / self.size + self.eps) * self.weight.float()).to(x.dtype)


def share(weight: Tensor, dim: int) -> Tensor:
    """This rank's part of a whole weight."""
    return weight.chunk(get_tensor_model_parallel_world_size(), dim)[get_tensor_model_parallel_rank()]


def load_expert(param: Tensor, loaded_weight: Tensor, place: Place | None = None) -> None:
    """Copies one expert's part, or all experts at once; vLLM's reloading needs the first name to be `param`."""
    if place is not None:
        target = place.of(param.data)
        weight = share(loaded_weight, 1 if place.half is None else 0)
    elif param.shape[1] == loaded_weight.shape[1]:  # down_proj
        target, weight = param.data, share(loaded_weight, 2)
    else:
        target, weight = param.data, torch.cat([share(half, 1) for half in loaded_weight.chunk(2, 1)], 1)
    assert target.shape == weight.shape, f"an expert's {tuple(weight.shape)} for {tuple(target.shape)}"
    target.copy_(weight)


def load_rows(param: Tensor, loaded_weight: Tensor) -> None:
    """Copies this rank's share of the output features."""
    param.data.copy_(share(loaded_weight, 0))


def load_inputs(param: Tensor, loaded_weight: Tensor) -> None:
    """Copies this rank's share of the input features."""
    param.data.copy_(share(loaded_weight, 1))


def check_shares(config: LightningConfig, ranks: int) -> None:
    """Raises UserError where the policy cannot be cut into `ranks` equal parts."""
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "shared_intermediate_size": config.shared_size or 0,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise UserError(f"tensor_parallel {ranks} does not divide the policy's {name} {size}")
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        raise UserError(
            f"tensor_parallel {ranks} and the policy's num_key_value_heads {config.num_kv_heads} do not fit"
        )
