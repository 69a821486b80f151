"""Causal softmax attention of short documents on a CPU: plain products, and probabilities kept for the gradient.

    q, k, v [C, heads, D] --gather--> [B * K, G, W, D] --64 queries at a time--> scores, softmax, products --> [C, H, D]

torch's kernel for a CPU computes the scores a second time on its way back, and its small tiles cost more than they
save while the probabilities are few. Queries that share a key's head (arXiv 2305.13245) are rows of the same product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Queries of one product: less is computed in vain behind the diagonal, and more products are started.
_QUERIES = 64


class Padding(NamedTuple):
    """Documents as padded batches of rows."""

    batches: list[Tensor]
    """[documents, width] int64 each: the row that each place reads; behind a document's end its last row again."""
    places: Tensor
    """[C] int64: where the output of each row is among the places of all batches."""
    shared: bool
    """Whether rows are read in several documents."""

    def probabilities(self, heads: int) -> int:
        """How many there are."""
        return sum(heads * len(b) * sum((e - s) * e for s, e in _blocks(b.shape[1])) for b in self.batches)


def product_attention(q: Tensor, k: Tensor, v: Tensor, padding: Padding, scale: float | None = None) -> Tensor:
    """Each document's causal softmax attention, [C, H, E]: q [C, H, D], k [C, K, D], v [C, K, E], H a multiple of K.

    scale is 1 / sqrt(D) where None. Differentiable in q, k and v; holds `padding.probabilities(H)` numbers for it.
    """
    return _ProductAttention.apply(q, k, v, padding, q.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[return-value]


def _blocks(width: int) -> Iterator[tuple[int, int]]:
    """First and last query of each product, the last one, which sees all keys, first."""
    return ((start, min(start + _QUERIES, width)) for start in range((width - 1) // _QUERIES * _QUERIES, -1, -_QUERIES))


class _ProductAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, padding: Padding, scale: float) -> Tensor:
        ctx.padding, ctx.scale = padding, scale
        outputs, saved = [], []
        for rows in padding.batches:
            keys, values = _heads(k, rows), _heads(v, rows)
            queries = _heads(q, rows).unflatten(0, (len(keys), -1))
            output, probs = queries.new_empty(*queries.shape[:3], v.shape[-1]), []
            for start, end in _blocks(rows.shape[1]):
                block = queries[:, :, start:end]
                mask = _mask(q, start, end, block.shape[1])
                scores = torch.baddbmm(mask, block.flatten(1, 2), keys[:, :end].mT, alpha=scale)
                probs.append(scores.softmax(-1))
                output[:, :, start:end] = torch.bmm(probs[-1], values[:, :end]).unflatten(1, block.shape[1:3])
            outputs.append(_rows(output, rows))
            if any(ctx.needs_input_grad):
                saved += [queries, keys, values, output, *probs]
        ctx.save_for_backward(*saved)
        return torch.cat(outputs).index_select(0, padding.places).unflatten(1, (-1, v.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padding, (grad,), saved = ctx.padding, grads, list(ctx.saved_tensors)
        sizes = [rows.numel() for rows in padding.batches]
        spread = grad.new_zeros(sum(sizes), *grad.shape[1:]).index_copy_(0, padding.places, grad).split(sizes)
        parts, dims = [], []
        for rows, own in zip(padding.batches, spread, strict=True):
            above = own.view(*rows.shape, *grad.shape[1:]).transpose(1, 2)
            batch = [saved.pop(0) for _ in range(4 + len(list(_blocks(rows.shape[1]))))]
            gradients = _gradients(above, *batch, scale=ctx.scale)
            dims = [gradient.shape[-1] for gradient in gradients]
            parts.append([_rows(gradient, rows) for gradient in gradients])
        columns = [torch.cat(part) for part in zip(*parts, strict=True)]
        merged = [_collect(x, padding, len(grad)).unflatten(1, (-1, d)) for x, d in zip(columns, dims, strict=True)]
        return *merged, None, None


def _gradients(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, *probs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one batch's queries [B * K, G, W, D], keys and values [B * K, W, D], given the output's [B, H, W, D]."""
    grad = grad.reshape(output.shape)
    dots = (grad * output).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    width = keys.shape[1]
    for (start, end), p in zip(_blocks(width), probs, strict=True):
        block, above = (x[:, :, start:end].flatten(1, 2) for x in (queries, grad))
        scores = torch.bmm(above, values[:, :end].mT)
        scores.sub_(dots[:, :, start:end].flatten(1, 2)).mul_(p).mul_(scale)
        grad_q[:, :, start:end] = torch.bmm(scores, keys[:, :end]).view_as(grad_q[:, :, start:end])
        if end == width:
            torch.bmm(scores.mT, block, out=grad_k)
            torch.bmm(p.mT, above, out=grad_v)
        else:
            grad_k[:, :end].baddbmm_(scores.mT, block)
            grad_v[:, :end].baddbmm_(p.mT, above)
    return grad_q, grad_k, grad_v


def _heads(x: Tensor, rows: Tensor) -> Tensor:
    """[C, heads, D] to [B * heads, W, D]."""
    padded = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
    return padded.transpose(1, 2).reshape(-1, rows.shape[1], x.shape[-1])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B * heads, ..., W, D] to [B * W, heads * ... * D]."""
    return x.view(len(rows), -1, rows.shape[1], x.shape[-1]).transpose(1, 2).reshape(rows.numel(), -1)


def _mask(like: Tensor, start: int, end: int, groups: int) -> Tensor:
    """[groups * (end - start), end]: 0 for the keys that each query sees, minus infinity behind it."""
    return like.new_full((end - start, end), -torch.inf).triu_(start + 1).repeat(groups, 1)


def _collect(x: Tensor, padding: Padding, rows: int) -> Tensor:
    """The gradient of `rows` rows from that of all places; what is behind a document's end is zero."""
    if not padding.shared:
        return x.index_select(0, padding.places)
    readers = torch.cat([batch.flatten() for batch in padding.batches])
    return x.new_zeros(rows, x.shape[1]).scatter_add_(0, readers[:, None].expand_as(x), x)
