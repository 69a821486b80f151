"""Tensor parallelism of the lightning policy in vLLM: what vLLM's own layers do not cut.

Those cut projections and the vocabulary. Here are the loaders of the rest, experts and the shared expert by their
width, and the sizes that can be cut; the norm of a lightning layer is `shares.SummedRMSNorm`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cispo.policies.minimax.config import LightningConfig
from cispo.policies.policy import Place
from cispo.policies.shares import Cut, Ranks


def loader(cut: Cut) -> Callable[..., None]:
    """Copies the rank's part of a whole weight, or of one expert's; vLLM finds it at a parameter as `weight_loader`."""

    # vLLM's reloading needs the first name to be `param`.
    def load(param: Tensor, loaded_weight: Tensor, place: Place | None = None) -> None:
        target = param.data if place is None else place.of(param.data)
        own = (cut if place is None else cut.at(place)).of(loaded_weight)
        assert target.shape == own.shape, f"a weight of {tuple(own.shape)} for {tuple(target.shape)}"
        target.copy_(own)

    return load


def check_shares(config: LightningConfig, ranks: Ranks) -> None:
    """Raises UserError where the policy cannot be cut into equal parts."""
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "shared_intermediate_size": config.shared_size or 0,
    }
    for name, size in sizes.items():
        ranks.part(size, name)
    ranks.key_heads(config.num_kv_heads)
