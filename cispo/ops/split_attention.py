"""Causal softmax attention of documents that ranks hold in pieces: queries stay, keys and values come.

    over_keys   keys and values of all documents are here, by an all-gather: one block a piece
    ring        those of one rank at a time, the next one's under way meanwhile, W - 1 hops; backward their gradients
                travel with them and one hop further, home

The ring keeps 2 / W of the keys that the all-gather keeps. Instead of keys and values latents may travel: each rank
expands those of one rank at a time, in the backward pass again, and has no more of them expanded. The gradient of the
expansion's weights is that of this rank's queries, as with an all-gather: ranks sum it with all others. Partial results
are merged in float32, where bfloat16 would add an error of its own. Different pieces of a document do not overlap: one
is before the other, or they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from cispo.ops.attention_blocks import Partial, attend_block, block_gradients, merge
from cispo.ops.autograd import Context
from cispo.ops.collectives import Group, Hop
from cispo.ops.cuts import Cut, Span
from cispo.ops.expansion import Expansion, Recomputed


class _KeysContext(Context, Protocol):
    cut: Cut
    scale: float
    flash: bool


class _OverKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _KeysContext, q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float, flash: bool) -> Tensor:
        ctx.cut, ctx.scale, ctx.flash = cut, scale, flash
        parts = [
            attend_block(q[_rows(s)], k[_seen(cut, s)], v[_seen(cut, s)], scale, causal=True, flash=flash)
            for s in cut.own
        ]
        output = _joined(parts, q, v.shape[-1])
        ctx.save_for_backward(q, k, v, output, *(part.lse for part in parts))
        return output

    @staticmethod
    def backward(ctx: _KeysContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *sums = ctx.saved_tensors
        dtype = _wide(q)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
        for span, lse in zip(ctx.cut.own, sums, strict=True):
            rows, seen = _rows(span), _seen(ctx.cut, span)
            own = block_gradients(
                grads[0][rows].contiguous(), q[rows], k[seen], v[seen], Partial(output[rows], lse), ctx.scale,
                causal=True, flash=ctx.flash,
            )  # fmt: skip
            grad_q[rows] = own.q.to(q.dtype)
            grad_k[seen] += own.k
            grad_v[seen] += own.v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def over_keys(q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float, *, flash: bool) -> Tensor:
    """[T, H, E]: q [T, H, D] of this rank's pieces over k [N, K, D], v [N, K, E] of all documents in their order."""
    return cast(Tensor, _OverKeys.apply(q, k, v, cut, scale, flash))


def _joined(parts: list[Partial], q: Tensor, width: int) -> Tensor:
    """[T, H, width] in q's dtype."""
    return torch.cat([part.output.to(q.dtype) for part in parts] or [q.new_empty(0, q.shape[1], width)])


def _rows(span: Span) -> slice:
    return slice(span.row, span.row + span.tokens)


def _seen(cut: Cut, span: Span) -> slice:
    """Rows in document order that the piece's queries see: its document up to its end."""
    return slice(cut.starts[span.document], cut.place(span)[1])


@dataclass(frozen=True, slots=True)
class _Hops:
    """All that a ring's hops have in common."""

    cut: Cut
    group: Group
    scale: float
    flash: bool
    width: int
    """E of the values."""
    expand: Expansion | None

    def blocks(self, hop: int) -> list[tuple[int, Span, Span]]:
        """(number of an own piece, the piece, one whose keys its queries see) of the rank whose rows are here."""
        owner = (self.group.rank - hop) % self.group.size
        own, there = self.cut.own, self.cut.by_rank[owner]
        return [(number, span, other) for number, span in enumerate(own) for other in there if _sees(span, other)]


class _RingContext(Context, Protocol):
    hops: _Hops


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RingContext, q: Tensor, first: Tensor, second: Tensor, hops: _Hops, *weights: Tensor) -> Tensor:
        ctx.hops, cut, group = hops, hops.cut, hops.group
        found: list[Partial | None] = [None] * len(cut.own)
        held = cut.padded(first), cut.padded(second)
        for hop in range(group.size):
            coming = Hop(held, group) if hop + 1 < group.size else None
            _attend(hops, hop, q, held, found)
            if coming is not None:
                held = coming.wait()
        parts = [part for part in found if part is not None]
        output = _joined(parts, q, hops.width)
        ctx.save_for_backward(q, first, second, output, *(part.lse for part in parts))
        return output

    @staticmethod
    def backward(ctx: _RingContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, first, second, output, *sums = ctx.saved_tensors
        hops, cut, group = ctx.hops, ctx.hops.cut, ctx.hops.group
        weights = () if hops.expand is None else hops.expand.trained
        of_q, *of_weights = (x.new_zeros(x.shape, dtype=_wide(x)) for x in (q, *weights))
        own = _Own(grads[0], q, output, sums, of_q, of_weights)
        held, home = (cut.padded(first), cut.padded(second)), None
        for hop in range(group.size):
            coming = Hop(held, group) if hop + 1 < group.size else None
            of_first, of_second = _gradients(hops, hop, own, held)
            if home is not None:
                before_first, before_second = home.wait()
                of_first, of_second = of_first + before_first, of_second + before_second
            # Gradients go on with their rows, and after the last hop to the rows' owner.
            home = Hop((of_first, of_second), group)
            if coming is not None:
                held = coming.wait()
        assert home is not None
        of_first, of_second = (x[: cut.tokens] for x in home.wait())
        summed = (total.to(weight.dtype) for total, weight in zip(of_weights, weights, strict=True))
        return of_q.to(q.dtype), of_first.to(first.dtype), of_second.to(second.dtype), None, *summed


def _attend(hops: _Hops, hop: int, q: Tensor, held: tuple[Tensor, Tensor], found: list[Partial | None]) -> None:
    """Merges attention over the rows that are here into `found`, an entry an own piece."""
    blocks = hops.blocks(hop)
    if not blocks:
        return
    k, v = held if hops.expand is None else hops.expand(*held)
    for number, span, other in blocks:
        keys = _rows(other)
        part = attend_block(q[_rows(span)], k[keys], v[keys], hops.scale, causal=span == other, flash=hops.flash)
        found[number] = merge(found[number], part)


class _Own(NamedTuple):
    """This rank's part of a backward pass."""

    grad: Tensor
    """[T, H, E] of the output."""
    q: Tensor
    output: Tensor
    sums: Sequence[Tensor]
    """The lse of each piece."""
    of_q: Tensor
    """Gradient, to which hops add; at least float32."""
    of_weights: Sequence[Tensor]
    """The same of the expansion's trained weights."""


def _gradients(hops: _Hops, hop: int, own: _Own, held: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Those of the rows that are here from this rank's queries, at least float32; adds to those in `own`."""
    blocks = hops.blocks(hop)
    if not blocks:
        first, second = held
        return first.new_zeros(first.shape, dtype=_wide(first)), second.new_zeros(second.shape, dtype=_wide(second))
    expanded = None if hops.expand is None else Recomputed(hops.expand, *held)
    k, v = held if expanded is None else (expanded.keys, expanded.values)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=_wide(own.q)) for x in (k, v))
    for number, span, other in blocks:
        rows, keys = _rows(span), _rows(other)
        block = block_gradients(
            own.grad[rows].contiguous(), own.q[rows], k[keys], v[keys], Partial(own.output[rows], own.sums[number]),
            hops.scale, causal=span == other, flash=hops.flash,
        )  # fmt: skip
        own.of_q[rows] += block.q
        grad_k[keys] += block.k
        grad_v[keys] += block.v
    if expanded is None:
        return grad_k, grad_v
    (first, second), of_weights = expanded.gradients(grad_k, grad_v)
    for total, part in zip(own.of_weights, of_weights, strict=True):
        total += part
    return first.to(_wide(first)), second.to(_wide(second))


def ring(
    q: Tensor,
    rows: tuple[Tensor, Tensor],
    cut: Cut,
    group: Group,
    scale: float,
    *,
    flash: bool,
    expand: Expansion | None = None,
) -> Tensor:
    """[T, H, E]: q [T, H, D] of this rank's pieces, whose rows travel; every rank calls it.

    rows: k [T, K, D] and v [T, K, E]; with `expand` two latents [T, ...], of which it makes them.
    """
    values = rows[1] if expand is None else expand.shapes(*rows)[1]
    hops = _Hops(cut, group, scale, flash, values.shape[-1], expand)
    return cast(Tensor, _Ring.apply(q, *rows, hops, *(() if expand is None else expand.trained)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sees(span: Span, other: Span) -> bool:
    """Whether queries of a piece see keys of another, or of itself."""
    return span.document == other.document and other.start <= span.start
