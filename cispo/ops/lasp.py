"""LASP+: lightning attention over documents that ranks hold in pieces, by one all-gather of states (arXiv 2501.08313).

    local pass      every piece as a document: outputs, and M_u, the state at its end, started from zero
    all-gather      M_u of the pieces that their document goes on behind, in float32
    S_u = sum over earlier pieces j of the document of e^{-s (start_u - end_j)} M_j          the state before piece u
    output i of u  += e^{-s i} q_i S_u, i = 1.. in the piece                                 the correction

Every exponent is an integer times -s. The local pass waits for nothing, and operations between `Lasp` and `result` run
beside the all-gather. Backward: G_u = sum_i e^{-s i} q_i^T do_i, which autograd gives, is all-gathered, and dM_u is the
same sum over the pieces behind. Each rank sums in document order, so that a result does not depend on who is late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from cispo.ops.autograd import Context
from cispo.ops.collectives import Group, Pending, empty_of
from cispo.ops.cuts import Cut, Span
from cispo.ops.lightning import lightning_attention


class Lasp:
    """`lightning_attention` of this rank's pieces, with the end states under way."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cut: Cut, group: Group) -> None:
        """q, k, v [T, H, D] of this rank's pieces, slopes [H]."""
        self._q, self._slopes, self._cut = q, slopes, cut
        if cut.own:
            self._output, ends = lightning_attention(q, k, v, slopes, cut.cu_seqlens, None, True)
            assert ends is not None
        else:
            # Nothing, with a gradient.
            dtype = torch.promote_types(q.dtype, torch.float32)
            self._output, ends = q + v, (k[..., None] * v[..., None, :]).to(dtype)
        self._pending = _States(cut, group, slopes.to(ends.dtype))
        sent = [number for number, span in enumerate(cut.own) if cut.ends_early(span)]
        self._sent = cast(Tensor, _Send.apply(ends.index_select(0, cut.index(sent)), self._pending))

    def result(self) -> list[Tensor]:
        """[T, H, D] in parts to be joined, one of them empty: it keeps the collective in the graph (`tie`)."""
        states = cast(Tensor, _Receive.apply(self._sent, self._pending))
        outputs, received = [], iter(states)
        for span in self._cut.own:
            rows = slice(span.row, span.row + span.tokens)
            output = self._output[rows]
            if span.start:
                output = cast(Tensor, _Continue.apply(output, self._q[rows], next(received), self._slopes))
            outputs.append(output)
        return [*(outputs or [self._output]), empty_of(states, self._output)]


class _Continue(torch.autograd.Function):
    """output_i + e^{-s i} q_i S, i = 1..: outputs and q [n, H, D], S [H, D, D]; products at least in float32.

    S is rounded to q's dtype as the kernels do. Mixed dtypes are cast inside an operation, without copies on a GPU.
    """

    @staticmethod
    def forward(ctx: Context, output: Tensor, q: Tensor, state: Tensor, slopes: Tensor) -> Tensor:
        rounded = state.to(q.dtype)
        ctx.save_for_backward(q, rounded, slopes)
        read = _product(q.transpose(0, 1), rounded).transpose(0, 1)
        return torch.addcmul(output, read, _decay(q, slopes), out=torch.empty_like(output))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, rounded, slopes = ctx.saved_tensors
        above = torch.mul(grads[0], _decay(q, slopes), out=torch.empty_like(q)).transpose(0, 1)
        grad_q = (above @ rounded.mT).transpose(0, 1)
        return grads[0], grad_q, _product(q.permute(1, 2, 0), above), None


def _decay(q: Tensor, slopes: Tensor) -> Tensor:
    """e^{-s i}, i = 1.., [n, H, 1]."""
    steps = torch.arange(1, len(q) + 1, device=q.device)
    return torch.exp(-slopes.to(torch.promote_types(q.dtype, torch.float32)) * steps[:, None])[..., None]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [H, n, m] @ y [H, m, k], summed and kept at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and x.dtype != wide:
        return torch.bmm(x, y, out_dtype=wide)
    return x.to(wide) @ y.to(wide)


class _States:
    """The exchange of one layer's states, forward and backward."""

    def __init__(self, cut: Cut, group: Group, slopes: Tensor) -> None:
        self.cut, self.group, self.slopes, self.pending = cut, group, slopes, Pending()
        self.senders = [[s for s in of_rank if cut.ends_early(s)] for of_rank in cut.by_rank]
        self.receivers = [[s for s in of_rank if s.start] for of_rank in cut.by_rank]
        self.most = max(map(len, (*self.senders, *self.receivers)))
        """States of each rank in a collective: those missing are zeros."""

    def gather(self, states: Tensor) -> Tensor:
        missing = self.most - len(states)
        padded = torch.cat([states, states.new_zeros(missing, *states.shape[1:])]) if missing else states
        return self.pending.gather(padded, self.group)

    def row(self, of_ranks: Sequence[Sequence[Span]], span: Span) -> int:
        """Of a piece's state in the gathered ones."""
        return span.owner * self.most + of_ranks[span.owner].index(span)

    def decay(self, tokens: int) -> Tensor:
        return torch.exp(-self.slopes * tokens)[:, None, None]

    def before(self, states: Tensor) -> Tensor:
        """The state before each piece that this rank continues, [receivers, H, D, D], of all ranks' end states."""
        found = dict[Span, Tensor]()
        state, last = states.new_zeros(states.shape[1:]), -1
        for span in self.cut.pieces:
            if span.document != last:
                state, last = torch.zeros_like(state), span.document
            if span.start:
                found[span] = state
            if self.cut.ends_early(span):
                state = self.decay(span.tokens) * state + states[self.row(self.senders, span)]
        return _stacked([found[span] for span in self.receivers[self.group.rank]], states)

    def behind(self, states: Tensor) -> Tensor:
        """Gradient of this rank's end states, [senders, H, D, D], given that of the states before all pieces."""
        found = dict[Span, Tensor]()
        state, last = states.new_zeros(states.shape[1:]), -1
        for span in reversed(self.cut.pieces):
            if span.document != last:
                state, last = torch.zeros_like(state), span.document
            if self.cut.ends_early(span):
                found[span] = state
            if span.start:
                state = self.decay(span.tokens) * state + states[self.row(self.receivers, span)]
        return _stacked([found[span] for span in self.senders[self.group.rank]], states)


def _stacked(states: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(states)) if states else like.new_zeros(0, *like.shape[1:])


class _StatesContext(Context, Protocol):
    states: _States
    shape: torch.Size


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _StatesContext, ends: Tensor, states: _States) -> Tensor:
        ctx.states = states
        return states.gather(ends)

    @staticmethod
    def backward(ctx: _StatesContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.states.behind(ctx.states.pending.wait()), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _StatesContext, gathered: Tensor, states: _States) -> Tensor:
        ctx.states, ctx.shape = states, gathered.shape
        return states.before(states.pending.wait())

    @staticmethod
    def backward(ctx: _StatesContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.states.gather(grads[0])
        # The gradient itself is under way, and `_Send` waits for it.
        return grads[0].new_zeros(()).expand(ctx.shape), None
