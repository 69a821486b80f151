"""Collectives with gradients between the ranks of a group; a pass goes on while one is under way.

    gather     [n, ...] --start--> [size * n, ...] under way --finish--> there      gradient: summed to the owner
    exchange   elements of each rank for each other one, of any number              gradient: the way back
    Hop        tensors to the next rank, without gradient

Every rank of the group calls them in one order, forward and backward, ranks without rows too. A rank on which
a result is in no product would not join in the backward pass, so results are `tie`d to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cispo.ops.autograd import Context

# The names from torch 2.13 on, else those before.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Group(NamedTuple):
    """Ranks that read one micro-batch together, from the view of one of them."""

    processes: ProcessGroup
    rank: int
    size: int


class Pending:
    """A collective under way, and the tensors that it reads and writes."""

    def __init__(self) -> None:
        self._work: dist.Work | None = None
        self._given: Tensor | None = None
        self._result: Tensor | None = None

    def gather(self, x: Tensor, group: Group) -> Tensor:
        """Starts to fill the returned [size * n, ...] with x [n, ...] of each rank, in order."""
        self._given, self._result = x.contiguous(), x.new_empty(group.size * len(x), *x.shape[1:])
        self._work = ALL_GATHER(self._result, self._given, group=group.processes, async_op=True)
        return self._result

    def reduce(self, x: Tensor, group: Group) -> None:
        """Starts to sum x [size * n, ...] over the ranks, of which each gets its n rows; at least in float32."""
        self._given = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        self._result = self._given.new_empty(len(x) // group.size, *x.shape[1:])
        self._work = _REDUCE(self._result, self._given, group=group.processes, async_op=True)

    def wait(self) -> Tensor:
        """The result of the collective."""
        assert self._work is not None and self._result is not None, "no collective is under way"
        self._work.wait()
        result, self._work, self._given, self._result = self._result, None, None, None
        return result


class _GatherContext(Context, Protocol):
    group: Group
    pending: Pending
    dtype: torch.dtype


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, x: Tensor, group: Group, pending: Pending) -> Tensor:
        ctx.pending, ctx.dtype = pending, x.dtype
        return pending.gather(x, group)

    @staticmethod
    def backward(ctx: _GatherContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pending.wait().to(ctx.dtype), None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, whole: Tensor, group: Group, pending: Pending) -> Tensor:
        ctx.group, ctx.pending = group, pending
        return pending.wait().view_as(whole)

    @staticmethod
    def backward(ctx: _GatherContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.pending.reduce(grads[0], ctx.group)
        return grads[0], None, None


class Gather:
    """An all-gather of equal numbers of rows, which is waited for when its result is asked for.

    Operations between making it and `result` run beside it, and their gradients beside that of the gather.
    """

    def __init__(self, x: Tensor, group: Group) -> None:
        """x [n, ...], n the same on all ranks."""
        self._group, self._pending = group, Pending()
        self._whole = cast(Tensor, _Start.apply(x, group, self._pending))

    def result(self) -> Tensor:
        """[size * n, ...], asked for once."""
        return cast(Tensor, _Finish.apply(self._whole, self._group, self._pending))


class _ExchangeContext(Context, Protocol):
    group: Group
    counts: Sequence[Counts]


class Counts(NamedTuple):
    """Elements of a tensor in an exchange."""

    sent: Sequence[int]
    """For each rank."""
    received: Sequence[int]
    """From each rank."""

    def back(self) -> Counts:
        return Counts(self.received, self.sent)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ExchangeContext, group: Group, counts: Sequence[Counts], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.counts = group, counts
        return tuple(_exchanged(x, group, own) for x, own in zip(tensors, counts, strict=True))

    @staticmethod
    def backward(ctx: _ExchangeContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = (_exchanged(x, ctx.group, own.back()) for x, own in zip(grads, ctx.counts, strict=True))
        return None, None, *back


def _exchanged(x: Tensor, group: Group, counts: Counts) -> Tensor:
    result = x.new_empty(sum(counts.received))
    dist.all_to_all_single(result, x.contiguous(), list(counts.received), list(counts.sent), group=group.processes)
    return result


def exchange(tensors: Sequence[Tensor], counts: Sequence[Counts], group: Group) -> tuple[Tensor, ...]:
    """For each flat tensor, elements for all ranks in turn, the flat tensor of the elements that ranks have for this
    one, in their order.

    One operation, so that several tensors go in one order on all ranks, forward and backward.
    """
    return cast("tuple[Tensor, ...]", _Exchange.apply(group, counts, *tensors))


class _SliceContext(Context, Protocol):
    start: int
    rows: int


class _GatherSliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _SliceContext, x: Tensor, group: Group) -> Tensor:
        ctx.start, ctx.rows = group.rank * len(x), len(x)
        pending = Pending()
        pending.gather(x, group)
        return pending.wait()

    @staticmethod
    def backward(ctx: _SliceContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.start : ctx.start + ctx.rows], None


def gather_sliced(x: Tensor, group: Group) -> Tensor:
    """[size * n, ...] of x [n, ...]; the gradient is this rank's part of its own result's.

    For results from which every rank computes the same: summed over the ranks the gradient would be `size` times too
    large.
    """
    return cast(Tensor, _GatherSliced.apply(x, group))


class Hop:
    """Two tensors on their way to the next rank of a ring, and two of the rank before to this one.

    Shapes are the same on all ranks.
    """

    def __init__(self, tensors: tuple[Tensor, Tensor], group: Group) -> None:
        after, before = (dist.get_global_rank(group.processes, (group.rank + step) % group.size) for step in (1, -1))
        self._sent = tuple(x.contiguous() for x in tensors)
        self._received = tuple(torch.empty_like(x) for x in self._sent)
        moves = [dist.P2POp(dist.isend, x, after, group.processes) for x in self._sent]
        moves += [dist.P2POp(dist.irecv, x, before, group.processes) for x in self._received]
        self._work = dist.batch_isend_irecv(moves)

    def wait(self) -> tuple[Tensor, Tensor]:
        for work in self._work:
            work.wait()
        first, second = self._received
        return first, second


def empty_of(x: Tensor, like: Tensor) -> Tensor:
    """No rows, of the shape of `like`'s, made of `x`: joined to an output they bring x's collectives along."""
    return x.flatten()[:0].to(like.dtype).reshape(0, *like.shape[1:])


def tie(output: Tensor, *others: Tensor) -> Tensor:
    """`output` [T, ...] with `others` in its graph: their collectives run backward on this rank too."""
    return torch.cat([output, *(empty_of(x, output) for x in others)])
