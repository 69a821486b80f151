"""Packed documents cut into chunks: the layout in which a chunked recurrence computes.

    tokens      | document 0        | document 1 | doc 2 |
    chunks      | C     | C     |pad| C      |pad| C |pad|         chunks start where documents start

The scan over chunks is a loop as long as the longest document has chunks; each step serves every document that still
has one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The positions of tokens in documents cut into chunks.

    The N chunks are ordered by their place in the document, then by document, longest first: the chunks that one
    step of the scan reads are contiguous, and belong to the first documents of the order.
    """

    chunk: int
    rows: Tensor
    """[T] int64: the row of each token among the N * chunk padded rows."""
    sources: Tensor
    """[N * chunk] int64: the token of each row, T where it has none."""
    lengths: Tensor
    """[N] int64: tokens in each chunk."""
    widths: list[int]
    """Documents that have a first chunk, a second, ..."""
    order: Tensor
    """[S] int64: documents by number of chunks, most first."""
    rank: Tensor
    """[S] int64: the inverse of `order`."""


def lay_out(cu_seqlens: Tensor, tokens: int, chunk: int) -> Layout:
    """cu_seqlens [S + 1] int32, documents may be empty; `chunk` tokens each."""
    lengths = cu_seqlens.diff().long()
    chunks = (lengths + chunk - 1) // chunk
    order = torch.argsort(chunks, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    # Documents with more than t chunks, for t = 0, 1, ...: all of them, less those that have ended.
    widths = len(chunks) - torch.bincount(chunks, minlength=1).cumsum(0)[:-1]
    offsets = widths.cumsum(0) - widths
    document = torch.repeat_interleave(lengths, output_size=tokens)
    within = torch.arange(tokens, device=lengths.device) - cu_seqlens[:-1].long()[document]
    index = offsets[within // chunk] + rank[document]
    filled = torch.bincount(index, minlength=int(chunks.sum()))
    rows = index * chunk + within % chunk
    sources = torch.full((len(filled) * chunk,), tokens, device=rows.device)
    sources[rows] = torch.arange(tokens, device=rows.device)
    return Layout(chunk, rows, sources, filled, widths.tolist(), order, rank)


def choose_chunk(cu_seqlens: Tensor, dim: int, chunk_size: int, power_of_two: bool = False) -> int:
    """The cheapest chunk, at most `chunk_size`: long chunks pad short documents, short ones carry more states.

    A padded row costs its chunk (scores), about 64 (copies) and, where documents span chunks, 2 * dim (matmuls with
    states [dim, dim]) and dim^2 / chunk (moving them): this ranks chunks as a CPU does, on equal, ragged and mixed
    lengths. With `power_of_two`, `chunk_size` is one, and so is the result.
    """
    lengths = cu_seqlens.diff().long()
    longest = int(lengths.max()) if len(lengths) else 0
    limit = 1 << max(longest - 1, 0).bit_length() if power_of_two else longest
    costs: dict[int, float] = {}
    for size in (chunk_size, chunk_size // 2, chunk_size // 4):
        chunk = max(1, min(limit, size))
        rows = int(((lengths + chunk - 1) // chunk).sum()) * chunk
        states = 2 * dim + dim * dim / chunk if longest > chunk else 0
        costs[chunk] = rows * (chunk + 64 + states)
    return min(costs, key=lambda chunk: costs[chunk])


def pad_chunks(x: Tensor, layout: Layout) -> Tensor:
    """[T, ...] to [N, C, ...], zero where a chunk has no token."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, layout.sources)
    return padded.view(-1, layout.chunk, *x.shape[1:])
