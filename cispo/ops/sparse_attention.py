"""Softmax attention over the keys that an indexer selects (DeepSeek Sparse Attention, arXiv 2512.02556, section 2.1).

    I(t, s) = sum_h w_t,h relu(q_t,h . k_s)      float32 at least, s <= t
    S(t)    = the top_k largest I(t, .); equal scores: the lowest position first
    o_t     = softmax attention of t over S(t)

The tie rule makes the selection a function. Scores of exactly 0 are common, since ReLU cuts every head off, and
`torch.topk` picks any of them: a decoded token then reads other keys than the same token in a full pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.product_attention import QUERIES, Batch, Padding


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """One layer's indexer on the tokens of a pass. The selection has no gradient."""

    queries: Tensor
    """[T, Hi, Di]."""
    keys: Tensor
    """[T, Di], one head for all queries."""
    weights: Tensor
    """[T, Hi], every scale included."""
    top_k: int


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """I [..., T, S], float32 at least: queries [..., T, Hi, Di], keys [..., S, Di], weights [..., T, Hi]."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    dots = torch.einsum("...thd,...sd->...ths", queries.to(wide), keys.to(wide)).relu_()
    # A negative weight times 0 is -0: adding 0 makes all zeros one number for every sorting algorithm.
    return (dots * weights.to(wide)[..., None]).sum(-2) + 0.0


def select(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """True at the top_k largest visible scores of each row, all where fewer are visible: [..., S] bool.

    Equal scores: the lowest position first. `visible` [..., S] bool broadcasts against the scores.
    """
    scores = scores.masked_fill(~visible, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & visible


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Index, padding: Padding, scale: float | None = None
) -> Tensor:
    """Each document's causal attention over its selected keys, [C, H, E]: q [C, H, D], k [C, K, D], v [C, K, E].

    scale is 1 / sqrt(D) where None. Differentiable in q, k and v.
    """
    outputs = [_attend(q, k, v, index, batch, scale) for batch in padding.batches]
    return torch.cat(outputs).index_select(0, padding.places)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Index, batch: Batch, scale: float | None) -> Tensor:
    """One batch's outputs, [B * (W - skip), H, E]."""
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = _padded(q, batch.queries), _padded(k, batch.rows), _padded(v, batch.rows)
    keys, values = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (keys, values))
    with torch.no_grad():
        asked, weights = _padded(index.queries, batch.queries), _padded(index.weights, batch.queries)
        offered = _padded(index.keys, batch.rows)
    places = torch.arange(batch.rows.shape[1], device=q.device)
    blocks = []
    for start, end in reversed(list(batch.blocks())):
        own = slice(start - batch.skip, end - batch.skip)
        with torch.no_grad():
            scores = index_scores(asked[:, own], offered[:, :end], weights[:, own])
            chosen = select(scores, places[:end] <= places[start:end, None], index.top_k)
        heads = (x.transpose(1, 2) for x in (queries[:, own], keys[:, :end], values[:, :end]))
        blocks.append(F.scaled_dot_product_attention(*heads, attn_mask=chosen[:, None], scale=scale).transpose(1, 2))
    return torch.cat(blocks, 1).flatten(0, 1)


def sparse_suffix(q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float) -> Tensor:
    """The last n queries of one document over its selected keys, [n, H, E]: q [n, H, D], k [m, K, D], v [m, K, E].

    `index` has n queries and weights, and m keys. Differentiable in q, k and v.
    """
    groups, behind = q.shape[1] // k.shape[1], len(k) - len(q)
    keys, values = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    places = torch.arange(len(k), device=q.device)
    blocks = []
    for start in range(0, len(q), QUERIES):
        own = slice(start, start + QUERIES)
        seen = min(start + QUERIES, len(q)) + behind
        with torch.no_grad():
            scores = index_scores(index.queries[own], index.keys[:seen], index.weights[own])
            visible = places[:seen] <= places[behind:][own, None]
            chosen = select(scores, visible, index.top_k)
        heads = (x.transpose(0, 1) for x in (q[own], keys[:seen], values[:seen]))
        blocks.append(F.scaled_dot_product_attention(*heads, attn_mask=chosen, scale=scale).transpose(0, 1))
    return torch.cat(blocks)


def _padded(x: Tensor, rows: Tensor) -> Tensor:
    """[C, ...] to [B, places, ...]."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
