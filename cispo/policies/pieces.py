"""The plan of a batch for context parallelism: which rank reads which tokens, a pure function of lengths.

    lengths --micro_batch_plan--> [shares][micro-batches] of documents --split_plan--> [ranks] of documents and pieces

A share of the batch is read by a group of ranks. Within it documents that are longer than a rank's part of the cost are
cut into 2 * ranks equal parts, of which rank r reads parts r and 2 * ranks - 1 - r: each gets the same tokens, and
about as many pairs of queries and keys. All others stay whole on one rank, which costs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cispo.types import Piece

# A rank's cost beyond the mean, above which the longest whole document is split too.
_UNEVEN = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work on a document: L + L^2 / `quadratic`, in units of a token's work outside softmax attention."""

    quadratic: float = math.inf
    """The length at which a document's softmax attention costs as much as all its other layers."""

    def __call__(self, tokens: int) -> float:
        return tokens + tokens * tokens / self.quadratic


class SplitPlan(NamedTuple):
    """One micro-batch on the ranks of a group; documents by their numbers in it."""

    whole: tuple[tuple[int, ...], ...]
    """[ranks]: the documents that each rank reads alone."""
    split: tuple[int, ...]
    """The documents that all of them read, longest first."""
    pieces: tuple[tuple[Piece, ...], ...]
    """[ranks]: their parts, `Piece.document` being the place in `split`."""


def split_plan(lengths: Sequence[int], ranks: int, cost: Cost) -> SplitPlan:
    """Splits the longest documents, and as few as leave no rank more than 5 % above the mean cost.

    A document shorter than 2 * ranks tokens stays whole. No rank costs more than the mean and the longest whole
    document.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    costs = [cost(length) for length in lengths]
    mean = sum(costs) / ranks
    long_enough = [number for number in order if lengths[number] >= 2 * ranks]
    above = sum(costs[number] > mean for number in long_enough)
    for count in range(above, len(long_enough) + 1):
        split, rest = long_enough[:count], [number for number in order if number not in long_enough[:count]]
        whole = _placed(rest, costs, ranks)
        most = max(sum(costs[number] for number in own) for own in whole)
        if most + sum(costs[number] for number in split) / ranks <= _UNEVEN * mean:
            break
    pieces = tuple(tuple(_zigzag([lengths[number] for number in split], rank, ranks)) for rank in range(ranks))
    return SplitPlan(tuple(map(tuple, whole)), tuple(split), pieces)


def _placed(order: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """[ranks]: the documents, each on the cheapest rank so far."""
    placed: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for number in order:
        rank = load.index(min(load))
        placed[rank].append(number)
        load[rank] += costs[number]
    return placed


def _zigzag(lengths: Sequence[int], rank: int, ranks: int) -> list[Piece]:
    """The two parts of each document that a rank reads; neighbours in one piece, which the last rank's are."""
    parts = 2 * ranks
    found = []
    for document, length in enumerate(lengths):
        bounds = [length * part // parts for part in range(parts + 1)]
        first, second = rank, parts - 1 - rank
        if first + 1 == second:
            found.append(Piece(document, bounds[first], bounds[second + 1]))
        else:
            found += [Piece(document, bounds[part], bounds[part + 1]) for part in (first, second)]
    return found


def micro_batch_plan(lengths: Sequence[int], shares: int, budget: int, cost: Cost) -> list[list[list[int]]]:
    """[shares][micro-batches][documents]: as many micro-batches in each share, each of at most `budget` tokens.

    Documents go to shares longest first onto the cheapest, and inside one into as few micro-batches as that order
    allows; one longer than the budget has a micro-batch of its own. Where a share has fewer, its most expensive ones
    are halved. Only micro-batches of a share with fewer documents than micro-batches are empty.
    """
    costs = [cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    plan = [_bins(own, lengths, budget) for own in _placed(order, costs, shares)]
    most = max(map(len, plan))
    for own in plan:
        while len(own) < most and any(len(documents) > 1 for documents in own):
            heaviest = max(
                (number for number, documents in enumerate(own) if len(documents) > 1),
                key=lambda number: sum(costs[document] for document in own[number]),
            )
            own[heaviest : heaviest + 1] = _placed(own[heaviest], costs, 2)
        own += [[] for _ in range(most - len(own))]
    return plan


def _bins(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    left = 0
    for number in order:
        if lengths[number] > left or not bins:
            bins.append([])
            left = budget
        bins[-1].append(number)
        left -= lengths[number]
    return bins
