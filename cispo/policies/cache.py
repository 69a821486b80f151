"""A sampler's cache of the tokens that a policy has read: keys and values, and recurrent states, a row a sequence.

    prompts --read--> new rows, hidden [rows, d]     a prompt that several rows share is computed once
    tokens  --step--> hidden [n, d]                  one token of every row
    rows    --drop--                                 the last rows move into the places of those that go

The learner's policy runs as it is; the cache implements its attention (`attention.Attention`). Rows are dense, [0, n):
every operation takes all sequences at once, and none that has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index, index_scores, select
from cispo.policies.attention import Documents
from cispo.policies.policy import Policy, RouterOutput
from cispo.policies.short_step import ShortStep

# Tokens that a row has room for at first; the room doubles when a sequence outgrows it.
_FIRST_ROOM = 64

# Memory that an idle cache keeps at most: new memory has to be cleared, in every step of a small policy.
_IDLE_BYTES = 64 << 20


class Cache:
    """Keys, values and states of n sequences, which grow by a token in every step, on the policy's device.

    A step reads nothing back from a GPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is the policy's, a CPU where None."""
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        """[n] int64: tokens of each row's sequence that have been read."""
        self.longest = 0
        """The largest of `lengths`, known to the host."""
        self.stores: list[list[Tensor]] = []
        """Keys [rows, K, room, D] and values [rows, K, room, E] of each softmax layer, and index keys [rows, 1, room,
        Di] of a sparse one; finite everywhere, rows and room as reserved."""
        self.states: list[Tensor] = []
        """[rows, ...] for each recurrent call of a step, at least float32."""
        self.router: tuple[RouterOutput, ...] = ()
        """Router outputs of the last pass: over the tokens of its distinct prompts, or over its rows."""
        self.rows, self.room = 0, _FIRST_ROOM

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, policy: Policy, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Adds len(copies) rows; row i of them starts with prompts[copies[i]]. No prompt is empty.

        Returns the hidden state after each new row's last token, [len(copies), d].
        """
        device = self.lengths.device
        lengths, chosen = torch.tensor([len(p) for p in prompts]), torch.tensor(copies)
        self._reserve(len(self) + len(copies), int(lengths.max()))
        bounds = torch.tensor(list(accumulate(lengths.tolist(), initial=0)))
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
        tokens = torch.tensor([token for prompt in prompts for token in prompt]).to(device)
        hidden, self.router = policy.attend(tokens, positions, _Reading(self, bounds, chosen))
        self.lengths = torch.cat([self.lengths, lengths[chosen].to(device)])
        self.longest = max(self.longest, int(lengths[chosen].max()))
        return hidden[(bounds[1:] - 1)[chosen].to(device)]

    def step(self, policy: Policy, tokens: Tensor, short: ShortStep | None = None) -> Tensor:
        """Reads one token of every row, [n] int64; returns the hidden state after it, [n, d].

        `short` is the policy's step in fewer operations, where it has one (`families.short_step`).
        """
        self._reserve(len(self), self.longest + 1)
        stepping = _Stepping(self)
        hidden, self.router = (short or policy.attend)(tokens, self.lengths, stepping)
        self.lengths = self.lengths + 1
        self.longest += 1
        return hidden

    def drop(self, gone: Tensor) -> Tensor:
        """Takes out the rows where `gone` [n] is True; returns the old row in each place, [rows that stay]."""
        left = len(gone) - int(gone.sum())
        holes = gone[:left].nonzero()[:, 0]
        movers = left + (~gone[left:]).nonzero()[:, 0]
        order = torch.arange(left, device=gone.device).index_copy(0, holes, movers)
        if len(holes):
            longest = int(self.lengths[movers].max())
            for store in chain.from_iterable(self.stores):
                store[holes, :, :longest] = store[movers, :, :longest]
            for layer in self.states:
                layer[holes] = layer[movers]
        self.lengths = self.lengths[order]
        self.longest = int(self.lengths.max()) if left else 0
        if not left and sum(x.nbytes for x in chain(self.states, *self.stores)) > _IDLE_BYTES:
            self.stores, self.states, self.rows, self.room = [], [], 0, _FIRST_ROOM
        return order

    def _reserve(self, rows: int, tokens: int) -> None:
        """Makes room for so many rows of so many tokens."""
        if rows > self.rows:
            self.rows = max(rows, 2 * self.rows)
            self.states = [_enlarged(layer, 0, self.rows) for layer in self.states]
            self.stores = [[_enlarged(store, 0, self.rows) for store in layer] for layer in self.stores]
        if tokens > self.room:
            while self.room < tokens:
                self.room *= 2
            self.stores = [[_enlarged(store, 2, self.room) for store in layer] for layer in self.stores]


def _vectors(rows: Tensor, places: Tensor, heads: int, room: int) -> Tensor:
    """[n * heads]: the indices, among a layer's vectors [rows * heads * room, D], of place places[i] of rows[i]."""
    return ((rows[:, None] * heads + torch.arange(heads, device=rows.device)) * room + places[:, None]).flatten()


def _write(store: Tensor, vectors: Tensor, new: Tensor) -> None:
    """Copies `new` [n, K, D] to the indices `vectors`; store is [rows, K, room, D]."""
    # As whole vectors: an index of two axes with one between them is copied number by number.
    store.view(-1, store.shape[-1]).index_copy_(0, vectors, new.reshape(-1, store.shape[-1]))


def _enlarged(x: Tensor, axis: int, size: int) -> Tensor:
    larger = x.new_zeros(*x.shape[:axis], size, *x.shape[axis + 1 :])
    larger.narrow(axis, 0, x.shape[axis]).copy_(x)
    return larger


class _Reading:
    """The pass over new prompts: attention inside packed documents; the cache keeps their keys, values and states."""

    def __init__(self, cache: Cache, bounds: Tensor, copies: Tensor) -> None:
        """bounds [P + 1] int64: where each prompt starts; copies [R] int64: the prompt of each new row; on the host."""
        device = cache.lengths.device
        self.cache, self.copies = cache, copies.to(device)
        self.documents = Documents(bounds.int().to(device), int(bounds[-1]), int(bounds.diff().max()))
        self.new = slice(len(cache), len(cache) + len(copies))
        lengths = bounds.diff()[copies]
        # Each token of a new row: its row, its place there, and its place in the packed prompts.
        rows = torch.arange(self.new.start, self.new.stop).repeat_interleave(lengths)
        places = torch.cat([torch.arange(n) for n in lengths.tolist()])
        sources = bounds[:-1][copies].repeat_interleave(lengths) + places
        self.rows, self.places, self.sources = rows.to(device), places.to(device), sources.to(device)
        self.softmax_calls = self.recurrent_calls = 0
        self._of_heads: dict[int, Tensor] = {}

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        self._keep(k, v)
        return self.documents.softmax(q, k, v, scale)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        self._keep(k, v, index.keys[:, None])
        return self.documents.sparse_softmax(q, k, v, index, scale)

    def _keep(self, *tensors: Tensor) -> None:
        """Copies those of the prompts, [tokens, heads, width], into the stores of this layer's new rows."""
        layers, number = self.cache.stores, self.softmax_calls
        if number == len(layers):
            layers.append([x.new_zeros(self.cache.rows, x.shape[1], self.cache.room, x.shape[2]) for x in tensors])
        for store, x in zip(layers[number], tensors, strict=True):
            heads = x.shape[1]
            if heads not in self._of_heads:
                self._of_heads[heads] = _vectors(self.rows, self.places, heads, self.cache.room)
            _write(store, self._of_heads[heads], x.index_select(0, self.sources))
        self.softmax_calls += 1

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        output, states = op.packed(*inputs, self.documents.cu_seqlens, output_final_state=True)
        assert states is not None
        layers, number = self.cache.states, self.recurrent_calls
        if number == len(layers):
            layers.append(states.new_zeros(self.cache.rows, *states.shape[1:]))
        layers[number][self.new] = states[self.copies]
        self.recurrent_calls += 1
        return output


class _Stepping:
    """The pass over one token of every row."""

    def __init__(self, cache: Cache) -> None:
        self.stores, self.states = iter(cache.stores), iter(cache.states)
        device = cache.lengths.device
        self.lengths, self.rows, self.room = cache.lengths, torch.arange(len(cache), device=device), cache.room
        self.longest = cache.longest + 1
        outside = torch.arange(self.longest, device=device) > cache.lengths[:, None]
        self.mask = torch.zeros(outside.shape, device=device).masked_fill_(outside, -torch.inf)
        """[n, longest]: 0 where a row has a token, this one included."""
        self._of_heads: dict[int, tuple[Tensor, Tensor]] = {}

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        keys, values = self._append(k, v)
        return self._attend(q, keys, values, scale)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        keys, values, offered = self._append(k, v, index.keys[:, None])
        hidden = None
        if self.longest > index.top_k:
            scores = index_scores(index.queries[:, None], offered[:, 0], index.weights[:, None])[:, 0]
            hidden = ~select(scores, self.mask == 0, index.top_k)
        return self._attend(q, keys, values, scale, hidden)

    def _append(self, *tensors: Tensor) -> list[Tensor]:
        """Writes those of the new tokens, [n, heads, width]; returns the stores' parts in use, [n, heads, longest,
        width]."""
        stores = next(self.stores)
        for store, x in zip(stores, tensors, strict=True):
            _write(store, self._once(x.shape[1])[0], x)
        return [store[: len(self.rows), :, : self.longest] for store in stores]

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None, hidden: Tensor | None = None
    ) -> Tensor:
        """[n, H, E] of q [n, H, D], without the keys where `hidden` [n, longest] is True."""
        n, heads, _, dim = keys.shape
        grouped = q.reshape(n, heads, -1, dim)
        if q.dtype != torch.float32 and not q.is_cuda:
            mask = self.mask if hidden is None else self.mask.masked_fill(hidden, -torch.inf)
            shown = mask[:, None, None].to(q.dtype)
            return F.scaled_dot_product_attention(grouped, keys, values, shown, scale=scale).flatten(1, 2)
        mask = self._once(heads)[1]
        if hidden is not None:
            mask = mask.masked_fill(hidden.repeat_interleave(heads, 0)[:, None], -torch.inf)
        # The same as two products, which take a fifth to a third less time for one query a row. On a GPU some of
        # SDPA's kernels are planned anew for each length, which is another one in every step.
        factor = dim**-0.5 if scale is None else scale
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (x.flatten(0, 1).to(wide) for x in (grouped, keys, values))
        scores = torch.baddbmm(mask.to(wide), queries, keys.transpose(1, 2), alpha=factor)
        return torch.bmm(scores.softmax(-1), values).view(n, q.shape[1], -1).to(q.dtype)

    def _once(self, heads: int) -> tuple[Tensor, Tensor]:
        """For all layers of so many heads: the indices of their new vectors, and the mask [n * heads, 1, longest]."""
        if heads not in self._of_heads:
            mask = self.mask[:, None].expand(-1, heads, -1).reshape(len(self.rows) * heads, 1, -1)
            self._of_heads[heads] = _vectors(self.rows, self.lengths, heads, self.room), mask
        return self._of_heads[heads]

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        return op.step(*inputs, next(self.states)[: len(self.rows)])
