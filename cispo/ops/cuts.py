"""Documents of which each rank of a group holds some pieces: where the tokens are, before, behind and elsewhere.

    document order   | document 0                    | document 1            |      what one rank would have
    pieces           | 0: a   | 1: b | 1: c | 0: d   | 0: e      | 1: f      |      owner: name, any cut
    rank 0           | a | d | e |                       rank 1    | b | c | f |

A piece is a range of a document's tokens; different pieces do not overlap. To the kernels that stay on one rank pieces
are documents; the rest of a document comes in by states, by rows before a piece, or by keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A piece in its place."""

    document: int
    start: int
    """In the document."""
    end: int
    owner: int
    """The rank that holds it."""
    row: int
    """Of its first token among its owner's."""

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Cut:
    """The pieces of all ranks from the view of one of them; indices are made on the device once, for all layers.

    Example: Cut([5], [[(0, 0, 2)], [(0, 2, 5)]], rank=1, device=torch.device("cpu")) holds tokens 2, 3 and 4
    """

    def __init__(
        self,
        lengths: Sequence[int],
        by_rank: Sequence[Sequence[tuple[int, int, int]]],
        rank: int,
        device: torch.device,
    ) -> None:
        """lengths [documents]; by_rank [ranks][pieces] of (document, start, end), each rank's in the order of its rows.

        No piece is empty; together they are the documents.
        """
        self.lengths, self.rank, self.size, self.device = tuple(lengths), rank, len(by_rank), device
        self.starts = (0, *accumulate(lengths))
        """Of each document in document order, then the number of all tokens."""
        self.by_rank = tuple(_spans(pieces, owner) for owner, pieces in enumerate(by_rank))
        self.pieces = tuple(sorted(span for of_rank in self.by_rank for span in of_rank))
        """Of all ranks, in document order."""
        ends = {(span.document, span.end) for span in self.pieces}
        covered = sum(span.tokens for span in self.pieces)
        assert covered == self.starts[-1], "the pieces do not cover the documents"
        assert all(not s.start or (s.document, s.start) in ends for s in self.pieces), "pieces overlap"

    @property
    def own(self) -> tuple[Span, ...]:
        return self.by_rank[self.rank]

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(span.tokens for span in of_rank) for of_rank in self.by_rank]

    @property
    def tokens(self) -> int:
        """Of this rank."""
        return self.counts[self.rank]

    @cached_property
    def most(self) -> int:
        """Tokens of the rank with the most."""
        return max(self.counts)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[pieces + 1] int32: this rank's pieces as documents."""
        return self.index([0, *accumulate(span.tokens for span in self.own)]).int()

    @cached_property
    def cu_documents(self) -> Tensor:
        """[documents + 1] int32."""
        return self.index(self.starts).int()

    def index(self, numbers: Sequence[int]) -> Tensor:
        """int64 on the device; a GPU is not waited for."""
        made = torch.tensor(numbers, dtype=torch.long)
        return made if self.device.type == "cpu" else made.pin_memory().to(self.device, non_blocking=True)

    def ranges(self, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """int64 on the device: all numbers of the ranges, one range after another."""
        return torch.cat([torch.arange(a, b, device=self.device) for a, b in bounds] or [self.index([])])

    @cached_property
    def places(self) -> Tensor:
        """[N]: for each token in document order its row where ranks' tokens, `most` of each, follow each other."""
        rows = ((s.owner * self.most + s.row, s.tokens) for s in self.pieces)
        return self.ranges([(first, first + tokens) for first, tokens in rows])

    @cached_property
    def packed_places(self) -> Tensor:
        """[N]: the same where each rank has as many rows as tokens."""
        before = [0, *accumulate(self.counts)]
        rows = ((before[s.owner] + s.row, s.tokens) for s in self.pieces)
        return self.ranges([(first, first + tokens) for first, tokens in rows])

    @cached_property
    def packed_order(self) -> Tensor:
        """[N]: the inverse of `packed_places`: for each rank's tokens in turn, their place in document order."""
        return self.ranges([self.place(span) for of_rank in self.by_rank for span in of_rank])

    @cached_property
    def own_order(self) -> Tensor:
        """[tokens]: this rank's tokens in document order."""
        return self.ranges([self.place(span) for span in self.own])

    def place(self, span: Span) -> tuple[int, int]:
        """First and last place of a piece in document order."""
        return self.starts[span.document] + span.start, self.starts[span.document] + span.end

    def ends_early(self, span: Span) -> bool:
        """Whether the document goes on behind the piece."""
        return span.end < self.lengths[span.document]

    def padded(self, x: Tensor) -> Tensor:
        """This rank's rows [tokens, ...] with zeros behind them, [most, ...]."""
        missing = self.most - self.tokens
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _spans(pieces: Sequence[tuple[int, int, int]], owner: int) -> tuple[Span, ...]:
    rows = accumulate((end - start for _, start, end in pieces), initial=0)
    return tuple(Span(*piece, owner, row) for piece, row in zip(pieces, rows, strict=False))
