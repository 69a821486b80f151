"""Causal softmax attention of documents that ranks hold in pieces: queries stay, keys and values come.

    over_keys   keys and values of all documents are here, by an all-gather: one block a piece
    ring        those of one rank at a time, the next one's under way meanwhile, W - 1 hops; backward their gradients
                travel with them and one hop further, home

The ring keeps 2 / W of the keys that the all-gather keeps. Partial results are merged in float32, where bfloat16 would
add an error of its own. Different pieces of a document do not overlap: one is before the other, or they are the same.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from cispo.ops.attention_blocks import Partial, attend_block, block_gradients, merge
from cispo.ops.autograd import Context
from cispo.ops.collectives import Group, Hop
from cispo.ops.cuts import Cut, Span


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
        output = _joined(parts, q, v)
        ctx.save_for_backward(q, k, v, output, *(part.lse for part in parts))
        return output

    @staticmethod
    def backward(ctx: _KeysContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *sums = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
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


def _joined(parts: list[Partial], q: Tensor, v: Tensor) -> Tensor:
    """[T, H, E] in q's dtype."""
    return torch.cat([part.output.to(q.dtype) for part in parts] or [q.new_empty(0, q.shape[1], v.shape[-1])])


def _rows(span: Span) -> slice:
    return slice(span.row, span.row + span.tokens)


def _seen(cut: Cut, span: Span) -> slice:
    """Rows in document order that the piece's queries see: its document up to its end."""
    return slice(cut.starts[span.document], cut.place(span)[1])


class _RingContext(Context, Protocol):
    cut: Cut
    group: Group
    scale: float
    flash: bool


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RingContext, q: Tensor, k: Tensor, v: Tensor, cut: Cut, group: Group, scale: float, flash: bool
    ) -> Tensor:
        ctx.cut, ctx.group, ctx.scale, ctx.flash = cut, group, scale, flash
        found: list[Partial | None] = [None] * len(cut.own)
        held = cut.padded(k), cut.padded(v)
        for hop in range(group.size):
            coming = Hop(held, group) if hop + 1 < group.size else None
            owner = (group.rank - hop) % group.size
            for number, span in enumerate(cut.own):
                for other in cut.by_rank[owner]:
                    if _sees(span, other):
                        keys, values = (x[_rows(other)] for x in held)
                        part = attend_block(q[_rows(span)], keys, values, scale, causal=span == other, flash=flash)
                        found[number] = merge(found[number], part)
            if coming is not None:
                held = coming.wait()
        parts = [part for part in found if part is not None]
        output = _joined(parts, q, v)
        ctx.save_for_backward(q, k, v, output, *(part.lse for part in parts))
        return output

    @staticmethod
    def backward(ctx: _RingContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *sums = ctx.saved_tensors
        cut, group = ctx.cut, ctx.group
        dtype = torch.promote_types(q.dtype, torch.float32)
        grad_q = q.new_zeros(q.shape, dtype=dtype)
        held, home = (cut.padded(k), cut.padded(v)), None
        for hop in range(group.size):
            coming = Hop(held, group) if hop + 1 < group.size else None
            owner = (group.rank - hop) % group.size
            grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in held)
            for span, lse in zip(cut.own, sums, strict=True):
                for other in cut.by_rank[owner]:
                    if _sees(span, other):
                        rows, keys = _rows(span), _rows(other)
                        own = block_gradients(
                            grads[0][rows].contiguous(), q[rows], held[0][keys], held[1][keys],
                            Partial(output[rows], lse), ctx.scale, causal=span == other, flash=ctx.flash,
                        )  # fmt: skip
                        grad_q[rows] += own.q
                        grad_k[keys] += own.k
                        grad_v[keys] += own.v
            if home is not None:
                before_k, before_v = home.wait()
                grad_k, grad_v = grad_k + before_k, grad_v + before_v
            # Gradients go on with their keys, and after the last hop to the keys' owner.
            home = Hop((grad_k, grad_v), group)
            if coming is not None:
                held = coming.wait()
        assert home is not None
        grad_k, grad_v = (x[: cut.tokens] for x in home.wait())
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def ring(q: Tensor, k: Tensor, v: Tensor, cut: Cut, group: Group, scale: float, *, flash: bool) -> Tensor:
    """[T, H, E]: q [T, H, D], k [T, K, D], v [T, K, E] of this rank's pieces; every rank calls it."""
    return cast(Tensor, _Ring.apply(q, k, v, cut, group, scale, flash))


def _sees(span: Span, other: Span) -> bool:
    """Whether queries of a piece see keys of another, or of itself."""
    return span.document == other.document and other.start <= span.start
