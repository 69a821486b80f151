"""Causal attention to latents in pages: keys and values of one head for all (arXiv 2405.04434, section 2.1.2).

    sequence -> table of pages -> rows [m, C] of its m tokens: keys; their first R numbers: values
    the last tokens of a sequence -> queries [n, H, C] -> outputs [n, H, R]

Plain products in float32 at least, on any device, one sequence after another: padding all to one length takes a CPU up
to ten times as long.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores that are held at a time: 64 MiB of float32.
_SCORES = 1 << 24


def write_latents(pages: Tensor, slots: Tensor, latents: Tensor) -> None:
    """Puts latents [T, C] in place into pages [N, size, at least C], at slots [T]: page * size + offset.

    Rows with a negative slot are padding; page 0 is no sequence's.
    """
    slots = slots.long().clamp(min=0)
    size = pages.shape[1]
    pages[:, :, : latents.shape[-1]][slots // size, slots % size] = latents


def paged_latent_attention(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor, *, rank: int, scale: float
) -> Tensor:
    """[T, H, rank]: q [T, H, C] are the last tokens of S sequences, one sequence after another.

    pages [N, size, at least C]; tables [S, pages of a sequence]; lengths [S] with the queries; starts [S + 1] of q.
    Results are of q's dtype. Lengths are read on the host.
    """
    pages, bounds, sizes = pages[:, :, : q.shape[-1]], starts.tolist(), lengths.tolist()
    counts = [math.ceil(length / pages.shape[1]) for length in sizes]
    numbers = tables[:, : max(counts, default=0)].tolist()
    outputs = []
    for row, length in enumerate(sizes):
        read = [pages[number] for number in numbers[row][: counts[row]]]
        # Rows behind a sequence's end may hold anything.
        keys = (read[0] if len(read) == 1 else torch.cat(read))[:length]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        queries = q[bounds[row] : bounds[row + 1]].to(keys.dtype) * scale
        outputs += [_last(queries[0], keys, rank)[None]] if len(queries) == 1 else _suffix(queries, keys, rank)
    return torch.cat(outputs).to(q.dtype) if outputs else q.new_empty(0, q.shape[1], rank)


def _last(q: Tensor, keys: Tensor, rank: int) -> Tensor:
    """[H, rank]: a query [H, C] that sees all keys [m, C]."""
    return (q @ keys.mT).softmax(-1) @ keys[:, :rank]


def _suffix(q: Tensor, keys: Tensor, rank: int) -> list[Tensor]:
    """[n, H, rank] in parts: the last queries of one sequence [n, H, C] over its keys [m, C]."""
    behind, places = len(keys) - len(q), torch.arange(len(keys), device=q.device)
    step = max(_SCORES // (len(keys) * q.shape[1]), 1)
    parts = []
    for first in range(0, len(q), step):
        own = q[first : first + step]
        seen = behind + first + len(own)
        scores = (own.flatten(0, 1) @ keys[:seen].mT).unflatten(0, own.shape[:2])
        hidden = places[:seen] > places[behind + first : seen, None]
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        parts.append((weights.flatten(0, 1) @ keys[:seen, :rank]).unflatten(0, own.shape[:2]))
    return parts
