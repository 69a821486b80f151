"""Tensor parallelism of a policy: the parts of its weights that a rank holds, and the layers that sum over all ranks.

    whole weight --Cut--> a rank's part --product--> a part of the sum --Ranks.sum--> the whole result, on every rank

Nothing here imports vLLM: its sum comes in through `Ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.policies.moe import Routed, SharedMoE
from cispo.policies.policy import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks that hold a policy together, and this one's number among them."""

    number: int
    count: int
    sum: Callable[[Tensor], Tensor]
    """Adds up a tensor over the ranks: all of them call it alike and get the same result."""

    @classmethod
    def first(cls, count: int) -> Ranks:
        """The first of ranks that never compute: the shapes of all are the same."""
        return cls(number=0, count=count, sum=lambda x: x)

    def part(self, size: int, name: str) -> int:
        """Size of a rank's part. Raises UserError where the ranks do not divide it."""
        if size % self.count:
            raise UserError(f"rollout.tensor_parallel {self.count} does not divide the policy's {name}: {size}")
        return size // self.count

    def key_heads(self, heads: int) -> Cut:
        """The cut of rows of key heads: query heads are cut evenly, and each rank has the key heads that its own share.

        Several ranks have the same one where there are fewer of them. Raises UserError where neither divides the other.
        """
        if heads % self.count and self.count % heads:
            raise UserError(f"rollout.tensor_parallel {self.count} and the policy's {heads} key heads do not fit")
        parts = min(heads, self.count)
        return Cut(axis=0, part=self.number * parts // self.count, parts=parts)

    def cut(self, axis: int, *, blocks: tuple[int, ...] = (1,)) -> Cut:
        """The cut of an axis into as many parts as there are ranks."""
        return Cut(axis=axis, part=self.number, parts=self.count, blocks=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Part number `part` of `parts` equal ones, of every block of one axis of a weight.

    Example: Cut(axis=0, part=1, parts=2, blocks=(1, 1, 2)) of [8, d] has the rows 1, 3, 6 and 7
    """

    axis: int
    part: int
    parts: int
    blocks: tuple[int, ...] = (1,)
    """Relative sizes of the blocks of the axis."""

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole weight: a view with one block, else a copy."""
        if self.parts == 1:
            return whole
        unit = whole.shape[self.axis] // sum(self.blocks)
        blocks = whole.split([unit * size for size in self.blocks], self.axis)
        parts = [block.chunk(self.parts, self.axis)[self.part] for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def at(self, place: Place) -> Cut:
        """The same cut of the tensor that fills `place`: one expert's has an axis less, its gate or up a single block.

        The cut is that of the fused parameter, of all experts.
        """
        if place.expert is None:
            return self
        return replace(self, axis=self.axis - 1, blocks=self.blocks if place.half is None else (1,))


class SummedLinear(nn.Linear):
    """A linear layer of which each rank has a part of the inputs; every rank has the whole bias."""

    def __init__(self, part: nn.Linear, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = part.in_features, part.out_features
        self.weight, self.bias, self.ranks = part.weight, part.bias, ranks

    def forward(self, input: Tensor) -> Tensor:
        summed = self.ranks.sum(F.linear(input, self.weight))
        return summed if self.bias is None else summed + self.bias


class SummedMoE(SharedMoE):
    """A mixture of which each rank has a part of every expert's width; every rank has the whole router."""

    def __init__(self, part: SharedMoE, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts, self.ranks = part.gate, part.experts, ranks
        self.shared_experts, self.shared_expert_gate = part.shared_experts, part.shared_expert_gate

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routed]:
        mixture, routed = super().forward(x, routes)
        return self.ranks.sum(mixture), routed


class SummedRMSNorm(nn.Module):
    """RMSNorm over a vector of which each rank has an equal part, or over `groups` equal parts of it, each by itself.

    Ranks may hold the same part, all of them equally often: the mean stays the same.
    """

    def __init__(self, weight: nn.Parameter, eps: float, ranks: Ranks, groups: int = 1) -> None:
        """`weight` is that of the rank's part, which belongs to one group."""
        super().__init__()
        self.weight, self.eps, self.ranks, self.groups = weight, eps, ranks, groups
        each = ranks.count // groups
        self.group, self.width = ranks.number // each, len(weight) * each

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().sum(-1, keepdim=True)
        if self.groups > 1:
            square = F.pad(square, (self.group, self.groups - 1 - self.group))
        square = self.ranks.sum(square)[..., self.group, None]
        return (wide * torch.rsqrt(square / self.width + self.eps) * self.weight.to(wide.dtype)).to(x.dtype)
