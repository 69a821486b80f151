"""Causal softmax attention of short documents on a CPU: plain products, and probabilities kept for the gradient.

    q, k, v [C, heads, D] --gather--> [B * K, G, W, D] --64 queries at a time--> scores, softmax, products --> [C, H, D]

torch's kernel for a CPU computes the scores a second time on its way back, and its small tiles cost more than they
save while the probabilities are few. Queries that share a key's head (arXiv 2305.13245) are rows of the same product.
A prompt that several documents share is among the keys of all of them, and among the queries of the first alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cispo.ops.autograd import Context

# Queries of one product: fewer waste less work behind the diagonal, and start more products.
QUERIES = 64


class Batch(NamedTuple):
    """Documents of similar length, padded on the right."""

    rows: Tensor
    """[B, W] int64: the row that each place reads; behind a document's end, its last row again."""
    skip: int = 0
    """Places at the start that are keys alone, without queries."""

    @property
    def queries(self) -> Tensor:
        """[B, W - skip]."""
        return self.rows[:, self.skip :]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last place of the queries of each product; the last, which see all keys, come first."""
        width = self.rows.shape[1]
        for end in range(width, self.skip, -QUERIES):
            yield max(end - QUERIES, self.skip), end


class Padding:
    """Documents as padded batches of C rows."""

    def __init__(self, batches: list[Batch], places: Tensor, *, shared: bool = False) -> None:
        """places [C] int64: the index of each row's query among the queries of all batches; `shared`: several documents
        may read one row."""
        self.batches, self.places, self.shared = batches, places, shared

    @cached_property
    def probabilities(self) -> int:
        """Their number for each head."""
        return sum(len(b.rows) * sum((end - start) * end for start, end in b.blocks()) for b in self.batches)

    @cached_property
    def readers(self) -> Tensor:
        """[places]: the row that each place of all batches reads."""
        return torch.cat([batch.rows.flatten() for batch in self.batches])


def product_attention(q: Tensor, k: Tensor, v: Tensor, padding: Padding, scale: float | None = None) -> Tensor:
    """Each document's causal softmax attention, [C, H, E]: q [C, H, D], k [C, K, D], v [C, K, E], H a multiple of K.

    scale is 1 / sqrt(D) where None. Differentiable in q, k and v; keeps H * `padding.probabilities` numbers for it.
    """
    return _ProductAttention.apply(q, k, v, padding, q.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[return-value]


class _Context(Context, Protocol):
    padding: Padding
    scale: float


class _ProductAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, q: Tensor, k: Tensor, v: Tensor, padding: Padding, scale: float) -> Tensor:
        ctx.padding, ctx.scale = padding, scale
        outputs, saved = [], []
        for batch in padding.batches:
            keys, values = _heads(k, batch.rows), _heads(v, batch.rows)
            queries = _heads(q, batch.queries).unflatten(0, (len(keys), -1))
            output, probs = queries.new_empty(*queries.shape[:3], v.shape[-1]), []
            for start, end in batch.blocks():
                block = queries[:, :, start - batch.skip : end - batch.skip]
                mask = _mask(q, start, end, block.shape[1])
                scores = torch.baddbmm(mask, block.flatten(1, 2), keys[:, :end].mT, alpha=scale)
                probs.append(scores.softmax(-1))
                attended = torch.bmm(probs[-1], values[:, :end])
                output[:, :, start - batch.skip : end - batch.skip] = attended.unflatten(1, block.shape[1:3])
            outputs.append(_rows(output, len(batch.rows)))
            if any(ctx.needs_input_grad):
                saved += [queries, keys, values, output, *probs]
        ctx.save_for_backward(*saved)
        return torch.cat(outputs).index_select(0, padding.places).unflatten(1, (-1, v.shape[-1]))

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padding, (grad,), saved = ctx.padding, grads, list(ctx.saved_tensors)
        sizes = [batch.queries.numel() for batch in padding.batches]
        spread = grad.new_zeros(sum(sizes), *grad.shape[1:]).index_copy_(0, padding.places, grad).split(sizes)
        parts, dims = [], []
        for batch, own in zip(padding.batches, spread, strict=True):
            above = own.view(*batch.queries.shape, *grad.shape[1:]).transpose(1, 2)
            kept = [saved.pop(0) for _ in range(4 + len(list(batch.blocks())))]
            gradients = _gradients(above, batch, *kept, scale=ctx.scale)
            dims = [gradient.shape[-1] for gradient in gradients]
            parts.append([_rows(gradient, len(batch.rows)) for gradient in gradients])
        grad_q, grad_k, grad_v = (torch.cat(part) for part in zip(*parts, strict=True))
        grad_q = grad_q.index_select(0, padding.places)
        grad_k, grad_v = (_collect(x, padding, len(grad)) for x in (grad_k, grad_v))
        merged = [x.unflatten(1, (-1, dim)) for x, dim in zip((grad_q, grad_k, grad_v), dims, strict=True)]
        return *merged, None, None


def _gradients(
    grad: Tensor,
    batch: Batch,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    *probs: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one batch's queries [B * K, G, W - skip, D], keys and values [B * K, W, D], given the output's [B, H,
    W - skip, D]."""
    grad = grad.reshape(output.shape)
    dots = (grad * output).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for (start, end), p in zip(batch.blocks(), probs, strict=True):
        places = slice(start - batch.skip, end - batch.skip)
        block, above = (x[:, :, places].flatten(1, 2) for x in (queries, grad))
        scores = torch.bmm(above, values[:, :end].mT)
        scores.sub_(dots[:, :, places].flatten(1, 2)).mul_(p).mul_(scale)
        grad_q[:, :, places] = torch.bmm(scores, keys[:, :end]).view_as(grad_q[:, :, places])
        if end == keys.shape[1]:
            torch.bmm(scores.mT, block, out=grad_k)
            torch.bmm(p.mT, above, out=grad_v)
        else:
            grad_k[:, :end].baddbmm_(scores.mT, block)
            grad_v[:, :end].baddbmm_(p.mT, above)
    return grad_q, grad_k, grad_v


def _heads(x: Tensor, rows: Tensor) -> Tensor:
    """[C, heads, D] to [B * heads, places, D]."""
    padded = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
    return padded.transpose(1, 2).reshape(-1, rows.shape[1], x.shape[-1])


def _rows(x: Tensor, documents: int) -> Tensor:
    """[B * heads, ..., places, D] to [B * places, heads * ... * D]."""
    places, dim = x.shape[-2:]
    return x.view(documents, -1, places, dim).transpose(1, 2).reshape(documents * places, -1)


def _mask(like: Tensor, start: int, end: int, groups: int) -> Tensor:
    """[groups * (end - start), end]: 0 for the keys that each query sees, minus infinity behind it."""
    return like.new_full((end - start, end), -torch.inf).triu_(start + 1).repeat(groups, 1)


def _collect(x: Tensor, padding: Padding, rows: int) -> Tensor:
    """The gradient of `rows` rows from that of all places, which is zero behind a document's end."""
    if not padding.shared:
        return x.index_select(0, padding.places)
    readers = padding.readers
    return x.new_zeros(rows, x.shape[1]).scatter_add_(0, readers[:, None].expand_as(x), x)
