"""Attention of a micro-batch of which a group of ranks hold parts: whole documents, and pieces of split ones.

    this rank's tokens   | whole documents, prompts shared or not | pieces of split documents |
                           Documents, SharedPrompts                 with the other ranks' pieces of the same documents

    lightning        states by one all-gather (`ops.lasp`)
    convolution      the few inputs before each piece by one all-gather
    delta rule       heads by all-to-all: each rank runs the kernel on all tokens of some heads
    softmax          keys and values by one all-gather, or in a ring (`ops.split_attention`)
    latents          the same by latents instead, which each rank expands, in a ring those of one rank at a time
    sparse softmax   by all-gathered keys, values and index keys; the selection is that of one rank

The delta rule's states could travel too, with the products of all transitions of a piece. They would be exact only in
float32, where the kernels' products are bfloat16: a training run by such states showed 220 times the KL divergence
between engine and learner. By heads the kernel sees the numbers that it would see on one rank.

The collective of a layer is under way while its whole documents are computed. Every rank takes part in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from cispo.ops.collectives import Counts, Gather, Group, empty_of, exchange, tie
from cispo.ops.cuts import Cut
from cispo.ops.expansion import Expansion
from cispo.ops.lasp import Lasp
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index, sparse_suffix
from cispo.ops.split_attention import over_keys, ring
from cispo.policies.attention import Attention, choose_form, widened

# Bytes of all keys and values of one layer on each rank, those of latents expanded.
_GATHERED = 4 << 30

SoftmaxForm = Literal["gather", "ring"]


class SplitDocuments:
    """`Attention` of one rank; made once a pass, for all layers."""

    def __init__(
        self, whole: Attention, whole_rows: int, cut: Cut, group: Group, *, form: SoftmaxForm | None = None
    ) -> None:
        """`whole` answers for the first `whole_rows` of this rank's rows, which may be 0; the others are its pieces.

        `form` of softmax attention: without one, the ring where gathered keys and values are more than 4 GiB.
        """
        self.whole, self.cut, self.group, self.form = whole, cut, group, form
        self._sizes = [whole_rows, cut.tokens]
        self._longest = max(cut.lengths)

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        (q, own_q), (k, own_k), (v, own_v) = (x.split(self._sizes) for x in (q, k, v))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        flash = choose_form(own_q, own_v) == "varlen"
        if (self.form or self._choose(k, v)) == "ring":
            wide = widened(own_v, own_q) if flash else own_v
            whole = self._of_whole(lambda: self.whole.softmax(q, k, v, scale), q, v)
            own = ring(own_q, (own_k, wide), self.cut, self.group, factor, flash=flash)[..., : v.shape[-1]]
            return torch.cat([whole, own])
        coming = self._gather(own_k, own_v)
        whole = self._of_whole(lambda: self.whole.softmax(q, k, v, scale), q, v)
        keys, values = self._rows(coming, own_k, own_v)
        own = self._over_keys(own_q, keys, values, factor, flash=flash)
        return torch.cat([whole, own, empty_of(keys, whole)])

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        """`softmax`, or `sparse_softmax` with an index, over the keys and values that `expand` makes of two latents.

        Sparse attention has no ring: a query selects among all keys at once.
        """
        (q, own_q), parts = q.split(self._sizes), [x.split(self._sizes) for x in latents]
        if index is None and (self.form or self._choose(*expand.shapes(*latents))) == "ring":
            return self._latent_ring(q, own_q, parts, expand, scale)
        coming = self._gather(*(own for _, own in parts))
        indices, keys_coming = self._indices(index)

        def of_whole() -> Tensor:
            keys = expand(*(whole for whole, _ in parts))
            if indices is None:
                return self.whole.softmax(q, *keys, scale)
            return self.whole.sparse_softmax(q, *keys, indices[0], scale)

        gathered = self._rows(coming, *(own for _, own in parts))
        keys, values = expand(*gathered)
        whole = self._of_whole(of_whole, q, values)
        own = self._select(own_q, keys, values, scale, indices, keys_coming)
        return torch.cat([whole, own, *(empty_of(x, whole) for x in gathered)])

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        (q, own_q), (k, own_k), (v, own_v) = (x.split(self._sizes) for x in (q, k, v))
        coming = self._gather(own_k, own_v)
        indices, keys_coming = self._indices(index)
        assert indices is not None
        whole = self._of_whole(lambda: self.whole.sparse_softmax(q, k, v, indices[0], scale), q, v)
        keys, values = self._rows(coming, own_k, own_v)
        own = self._select(own_q, keys, values, scale, indices, keys_coming)
        return torch.cat([whole, own, empty_of(keys, whole)])

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        tokens = [x.split(self._sizes) for x in inputs[: op.token_inputs]]
        of_layer = inputs[op.token_inputs :]
        whole, own = [x for x, _ in tokens], [x for _, x in tokens]
        if op.across == "decay":
            under_way = Lasp(*own, *of_layer, cut=self.cut, group=self.group)
            finish = under_way.result
        elif op.across == "window":
            under_way = _Window(op, own[0], *of_layer, cut=self.cut, group=self.group)
            finish = under_way.result
        else:
            assert not of_layer, "inputs of a layer are not cut by heads"
            finish = lambda: [by_heads(op, own, self.cut, self.group)]  # noqa: E731
        done = [self.whole.recurrent(op, *whole, *of_layer)] if self._sizes[0] else []
        return torch.cat([*done, *finish()])

    def _latent_ring(
        self,
        q: Tensor,
        own_q: Tensor,
        latents: Sequence[tuple[Tensor, ...]],
        expand: Expansion,
        scale: float | None,
    ) -> Tensor:
        """Of whole documents and pieces; latents: (of the former, of the latter) of each kind."""
        (first, own_first), (second, own_second) = latents
        _, v = expand.shapes(first, second)
        whole = self._of_whole(lambda: self.whole.softmax(q, *expand(first, second), scale), q, v)
        flash, factor = choose_form(own_q, v) == "varlen", q.shape[-1] ** -0.5 if scale is None else scale
        wide = replace(expand, function=partial(_widened, expand)) if flash else expand
        own = ring(own_q, (own_first, own_second), self.cut, self.group, factor, flash=flash, expand=wide)
        return torch.cat([whole, own[..., : v.shape[-1]]])

    def _choose(self, k: Tensor, v: Tensor) -> SoftmaxForm:
        width = k.shape[1:].numel() * k.itemsize + v.shape[1:].numel() * v.itemsize
        return "ring" if self.cut.starts[-1] * width > _GATHERED else "gather"

    def _of_whole(self, compute: Callable[[], Tensor], q: Tensor, v: Tensor) -> Tensor:
        return compute() if len(q) else q.new_empty(0, q.shape[1], v.shape[-1])

    def _gather(self, *tensors: Tensor) -> Gather:
        """The tensors [T, ...] of this rank's pieces on their way to all ranks, in one collective."""
        return Gather(self.cut.padded(torch.cat([x.flatten(1) for x in tensors], -1)), self.group)

    def _rows(self, coming: Gather, *like: Tensor) -> list[Tensor]:
        """The tensors of all ranks, [N, ...] in document order."""
        rows = coming.result().index_select(0, self.cut.places)
        parts = rows.split([x.shape[1:].numel() for x in like], -1)
        return [part.unflatten(-1, x.shape[1:]) for part, x in zip(parts, like, strict=True)]

    def _over_keys(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, flash: bool) -> Tensor:
        wide = widened(v, k) if flash else v
        return over_keys(q, k, wide, self.cut, scale, flash=flash)[..., : v.shape[-1]]

    def _indices(self, index: Index | None) -> tuple[tuple[Index, Index] | None, Gather | None]:
        """The index of whole documents and of pieces, with the keys of the latter under way where some are selected."""
        if index is None:
            return None, None
        parts = [x.split(self._sizes) for x in (index.queries, index.keys, index.weights)]
        whole, own = (
            replace(index, queries=queries, keys=keys, weights=weights)
            for queries, keys, weights in zip(*parts, strict=True)
        )
        return (whole, own), self._gather(own.keys) if self._longest > index.top_k else None

    def _select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        indices: tuple[Index, Index] | None,
        coming: Gather | None,
    ) -> Tensor:
        """[T, H, E] of this rank's pieces over k, v of all documents."""
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        if indices is None or coming is None:
            return self._over_keys(q, k, v, factor, flash=choose_form(q, v) == "varlen")
        _, index = indices
        (keys,) = self._rows(coming, index.keys)
        outputs = []
        for span in self.cut.own:
            own = slice(span.row, span.row + span.tokens)
            seen = slice(self.cut.starts[span.document], self.cut.place(span)[1])
            part = replace(index, queries=index.queries[own], keys=keys[seen], weights=index.weights[own])
            outputs.append(sparse_suffix(q[own], k[seen], v[seen], part, factor))
        return torch.cat(outputs) if outputs else q.new_empty(0, q.shape[1], v.shape[-1])


def _widened(expand: Expansion, *latents: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, and values as wide as they are."""
    k, v = expand(*latents)
    return k, widened(v, k)


class _Window:
    """A convolution of this rank's pieces, with the inputs before each one under way."""

    def __init__(self, op: RecurrentOp, x: Tensor, weight: Tensor, cut: Cut, group: Group) -> None:
        """x [T, C], weight [C, W]."""
        self._op, self._x, self._weight, self._cut = op, x, weight, cut
        reach = weight.shape[1] - 1
        # The last inputs of each piece, of which short ones have fewer.
        tails = [[(max(s.end - reach, s.start), s) for s in of_rank if cut.ends_early(s)] for of_rank in cut.by_rank]
        self._most = max(sum(s.end - first for first, s in of_rank) for of_rank in tails)
        rows = [(s.row + first - s.start, s.row + s.tokens) for first, s in tails[cut.rank]]
        sent = x.index_select(0, cut.ranges(rows))
        missing = self._most - len(sent)
        self._gather = Gather(torch.cat([sent, sent.new_zeros(missing, *x.shape[1:])]), group)
        self._source: dict[tuple[int, int], int] = {}
        for owner, of_rank in enumerate(tails):
            starts = accumulate((s.end - first for first, s in of_rank), initial=owner * self._most)
            for (first, s), row in zip(of_rank, starts, strict=False):
                self._source |= {(s.document, place): row + place - first for place in range(first, s.end)}
        self._reach = reach

    def result(self) -> list[Tensor]:
        """[T, C] in parts to be joined."""
        rows, cut = self._gather.result(), self._cut
        if not cut.own:
            return [self._x, empty_of(rows, self._x)]
        # Behind the gathered rows, one of zeros for the places before a document.
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        before = [
            self._source.get((s.document, s.start - back), len(rows) - 1)
            for s in cut.own
            for back in range(self._reach, 0, -1)
        ]
        states = rows.index_select(0, cut.index(before)).unflatten(0, (len(cut.own), self._reach))
        wide = torch.promote_types(states.dtype, torch.float32)
        return [self._op.packed(self._x, self._weight, cut.cu_seqlens, initial_state=states.to(wide))[0]]


def by_heads(op: RecurrentOp, inputs: Sequence[Tensor], cut: Cut, group: Group) -> Tensor:
    """`op` of this rank's pieces: all-to-all to all tokens of some heads, the op, and back; shaped as the third input.

    inputs [T, heads, ...]; where one has a multiple of another's heads, they go together. No number of heads need
    divide: ranks get one more or less, or none.
    """
    units = min(x.shape[1] for x in inputs)
    bounds = [units * rank // group.size for rank in range(group.size + 1)]
    shares = [last - first for first, last in pairwise(bounds)]
    dtypes = dict.fromkeys(x.dtype for x in inputs)
    rows = {d: torch.cat([_units(x, units) for x in inputs if x.dtype == d], -1) for d in dtypes}
    counts = [
        Counts(
            [cut.tokens * n * x.shape[-1] for n in shares], [t * shares[group.rank] * x.shape[-1] for t in cut.counts]
        )
        for x in rows.values()
    ]
    flat = [torch.cat([x[:, first:last].flatten() for first, last in pairwise(bounds)]) for x in rows.values()]
    received = dict(zip(dtypes, exchange(flat, counts, group), strict=True))
    documents = dict[torch.dtype, Iterator[Tensor]]()
    for dtype, x in rows.items():
        whole = received[dtype].view(cut.starts[-1], shares[group.rank], x.shape[-1]).index_select(0, cut.packed_places)
        documents[dtype] = iter(whole.split([_units(y, units).shape[-1] for y in inputs if y.dtype == dtype], -1))
    heads = [next(documents[x.dtype]).unflatten(-1, (x.shape[1] // units, *x.shape[2:])).flatten(1, 2) for x in inputs]
    output = op.packed(*heads, cut.cu_documents)[0] if shares[group.rank] else tie(heads[2], *heads)
    back = _units(output.index_select(0, cut.packed_order), shares[group.rank])
    width = _units(inputs[2], units).shape[-1]
    home = Counts([t * shares[group.rank] * width for t in cut.counts], [cut.tokens * n * width for n in shares])
    (flat_output,) = exchange([back.flatten()], [home], group)
    parts = flat_output.split(home.received)
    joined = torch.cat([x.view(cut.tokens, n, width) for x, n in zip(parts, shares, strict=True)], 1)
    return joined.reshape(inputs[2].shape)


def _units(x: Tensor, units: int) -> Tensor:
    """[T, heads, ...] to [T, units, width]."""
    return x.reshape(len(x), units, x.shape[1:].numel() // units if units else 0)
