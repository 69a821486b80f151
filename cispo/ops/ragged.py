"""Rows between the ranks of a group that have any numbers of them, with gradients.

    gather_rows     own rows -> those of all ranks              gradient: sum_rows
    sum_rows        a part for every rank -> own rows, summed   gradient: gather_rows
    exchange_rows   rows by destination -> rows by source       gradient: the way back

All numbers of rows are known on the host before. Every rank of the group calls them in one order, forward and backward,
ranks without rows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.ops.autograd import Context
from cispo.ops.collectives import ALL_GATHER, Counts, Group, exchange


class _RowsContext(Context, Protocol):
    sizes: Sequence[int]
    group: Group


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RowsContext, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gathered(x, sizes, group)

    @staticmethod
    def backward(ctx: _RowsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grads[0], ctx.sizes, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RowsContext, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _summed(x, sizes, group)

    @staticmethod
    def backward(ctx: _RowsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(grads[0], ctx.sizes, ctx.group), None, None


def gather_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """x [sizes[rank], ...] to the rows of all ranks, [sum(sizes), ...], in the order of the ranks."""
    return cast(Tensor, _Gather.apply(x, tuple(sizes), group))


def sum_rows(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """x [sum(sizes), ...] of every rank to the sum of the ranks' own parts, [sizes[rank], ...].

    The bytes of a reduce-scatter, but added here, in float32 and in the order of the ranks: parts in bfloat16 are
    rounded once, and the result does not depend on the order in which they arrive.
    """
    return cast(Tensor, _Sum.apply(x, tuple(sizes), group))


def exchange_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """x [sum(sent), d] in blocks by destination to [sum(received), d] in blocks by source, one block a rank."""
    width = x.shape[1]
    counts = Counts([width * n for n in sent], [width * n for n in received])
    return exchange([x.flatten()], [counts], group)[0].view(-1, width)


def gather_counts(counts: Tensor, group: Group) -> Tensor:
    """counts [n] of every rank to [size, n], without gradient."""
    whole = counts.new_empty(group.size * len(counts))
    ALL_GATHER(whole, counts, group=group.processes)
    return whole.view(group.size, -1)


def _gathered(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    most = max(*sizes, 1)
    if min(sizes) == most:
        whole = x.new_empty(sum(sizes), *x.shape[1:])
        ALL_GATHER(whole, x.contiguous(), group=group.processes)
        return whole
    # gloo takes no uneven parts: shorter ones are padded.
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    whole = x.new_empty(len(sizes) * most, *x.shape[1:])
    ALL_GATHER(whole, padded, group=group.processes)
    return torch.cat([part[:size] for part, size in zip(whole.split(most), sizes, strict=True)])


def _summed(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    own = sizes[group.rank]
    parts = x.new_empty(group.size * own, *x.shape[1:])
    dist.all_to_all_single(parts, x.contiguous(), [own] * group.size, list(sizes), group=group.processes)
    parts = parts.view(group.size, own, *x.shape[1:])
    return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
