"""From the hidden states of one micro-batch to its loss, inside the LM head's own pass where the loss allows it.

    hidden [T, d] --trained rows--> [N, d] --LM head--> logprobs --objective, loss_weights--> loss, TokenStats [N]

Two forms with equal numbers. The fused one takes a loss that is declared `per_token` in chunks of rows, while their
logits are alive: three products with the head. Any other loss gets all tokens of all sequences at the price of a
fourth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cispo.algorithms.losses import LossOutput
from cispo.algorithms.objective import Objective
from cispo.ops.collectives import Group, gather_sliced
from cispo.ops.cuts import Cut
from cispo.ops.logprobs import fused_token_loss, token_logprobs
from cispo.policies.attention import Attention, Documents, SharedPrompts
from cispo.policies.policy import Policy, PolicyOutput, RouterOutput
from cispo.policies.replay import differing, live_choices
from cispo.policies.split_documents import SplitDocuments
from cispo.types import LossInputs, MicroBatch, TokenStats


def read(policy: Policy, mb: MicroBatch, group: Group | None = None) -> PolicyOutput:
    """The policy's pass over a micro-batch: hidden [T, d], and router outputs over all T tokens.

    The ranks of `group` read it together, and meet in collectives where it has split documents.
    """
    # Always by `attend`: a split policy gathers its weights around that method alone.
    attention = attention_of(mb, group)
    if mb.unique_index is None or mb.inverse is None:
        return policy.attend(mb.tokens, mb.positions, attention, mb.routes)
    tokens, positions = mb.tokens.index_select(0, mb.unique_index), mb.positions.index_select(0, mb.unique_index)
    routes = None if mb.routes is None else mb.routes.index_select(0, mb.unique_index)
    output = policy.attend(tokens, positions, attention, routes)
    router = tuple(RouterOutput(*(x.index_select(0, mb.inverse) for x in layer)) for layer in output.router)
    return PolicyOutput(output.hidden.index_select(0, mb.inverse), router)


def attention_of(mb: MicroBatch, group: Group | None = None, *, share_prompts: bool = True) -> Attention:
    """The attention of a pass over a micro-batch: over its distinct tokens where prompts are shared, else over all."""
    cut = None
    whole, rows = len(mb.cu_seqlens) - 1, len(mb.tokens)
    if mb.pieces is not None:
        assert group is not None, "a micro-batch with split documents is read by a group of ranks"
        cut = Cut(mb.pieces.lengths, mb.pieces.by_rank, group.rank, mb.tokens.device)
        whole, rows = whole - len(cut.own), rows - cut.tokens
    attention: Attention = Documents(mb.cu_seqlens[: whole + 1], rows, mb.max_seqlen)
    if share_prompts and mb.unique_index is not None and mb.inverse is not None:
        distinct = len(mb.unique_index) - (len(mb.tokens) - rows)
        attention = SharedPrompts(attention, mb.unique_index[:distinct], mb.inverse[:rows])
        rows = distinct
    if cut is None or group is None:
        return attention
    return SplitDocuments(attention, rows, cut, group)


def read_for_loss(policy: Policy, mb: MicroBatch, group: Group | None = None) -> tuple[PolicyOutput, dict[str, Tensor]]:
    """`read`, with values [N] of the trained tokens by metric name: under router replay, 1 for those with replayed
    experts that are not the routers' own choice in some layer.
    """
    if mb.routes is None:
        return read(policy, mb, group), {}
    with live_choices(policy) as live:
        output = read(policy, mb, group)
    own = live if mb.inverse is None else [chosen.index_select(0, mb.inverse) for chosen in live]
    differs = differing(own, [layer.chosen for layer in output.router]).index_select(0, mb.loss_index)
    return output, {"router/replayed_differ": differs.float()}


def micro_batch_loss(
    hidden: Tensor,
    head: Tensor,
    mb: MicroBatch,
    objective: Objective,
    *,
    temperature: float,
    group: Group | None = None,
) -> tuple[Tensor, TokenStats]:
    """This micro-batch's share of the loss, and its trained tokens.

    hidden [T, d] and head [V, d] get the loss's gradient. The loss of whole sequences is the same on all ranks of
    `group` for a document that they split: this rank's tokens count in its value, and get its gradient.
    """
    # Without trained tokens the fused form never calls the objective, which alone knows the names of its `extra`.
    if objective.per_token and len(mb.loss_index):
        return _fused(hidden, head, mb, objective, temperature)
    if objective.per_token or mb.pieces is None:
        return _whole(hidden, head, mb, objective, temperature)
    assert group is not None, "a micro-batch with split documents is read by a group of ranks"
    return _joined(hidden, head, mb, objective, temperature, group)


def trained_logprobs(hidden: Tensor, head: Tensor, mb: MicroBatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the trained tokens, [N] each; the head runs on these rows only."""
    rows, targets = hidden.index_select(0, mb.loss_index), mb.targets.index_select(0, mb.loss_index)
    return token_logprobs(rows, head, targets, temperature=temperature)


def spread(values: Tensor, mb: MicroBatch) -> Tensor:
    """[N] over trained tokens to [T], 0 elsewhere."""
    return values.new_zeros(len(mb.tokens)).index_copy(0, mb.loss_index, values)


def _whole(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, temperature: float
) -> tuple[Tensor, TokenStats]:
    logprobs, entropy = trained_logprobs(hidden, head, mb, temperature=temperature)
    result = objective(_loss_inputs(mb, spread(logprobs, mb), objective, lambda values: values, mb.cu_seqlens))
    loss = (result.loss * mb.loss_weights).sum()
    trained = _each(result, lambda values: values.detach().index_select(0, mb.loss_index))
    return loss, _stats(mb, logprobs.detach(), entropy, [trained])


def _joined(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, temperature: float, group: Group
) -> tuple[Tensor, TokenStats]:
    """`_whole` where documents are split: every rank of the group computes their loss, from all their tokens."""
    documents = WholeDocuments(mb, group)
    join, own = documents.join, documents.own
    logprobs, entropy = trained_logprobs(hidden, head, mb, temperature=temperature)
    result = objective(_loss_inputs(mb, join(spread(logprobs, mb)), objective, join, documents.cu_seqlens))
    every = (result.loss * join(mb.loss_weights)).sum()
    share = (own(result.loss.detach()) * mb.loss_weights).sum()
    trained = _each(result, lambda values: own(values.detach()).index_select(0, mb.loss_index))
    return share + (every - every.detach()), _stats(mb, logprobs.detach(), entropy, [trained])


class WholeDocuments:
    """All tokens of the documents of which a rank's micro-batch has pieces, behind those of its whole documents."""

    def __init__(self, mb: MicroBatch, group: Group) -> None:
        assert mb.pieces is not None
        self._group = group
        self._cut = Cut(mb.pieces.lengths, mb.pieces.by_rank, group.rank, mb.tokens.device)
        self._rows = len(mb.tokens) - self._cut.tokens
        whole = len(mb.cu_seqlens) - 1 - len(self._cut.own)
        self.cu_seqlens = torch.cat([mb.cu_seqlens[:whole], self._cut.cu_documents + self._rows])
        """[documents + 1] int32, of the joined tokens."""

    def join(self, values: Tensor) -> Tensor:
        """[T] of this rank to the joined tokens; a collective of the group."""
        pieces = gather_sliced(self._cut.padded(values[self._rows :]), self._group)
        return torch.cat([values[: self._rows], pieces.index_select(0, self._cut.places)])

    def own(self, values: Tensor) -> Tensor:
        """The joined tokens to [T] of this rank."""
        return torch.cat([values[: self._rows], values[self._rows :].index_select(0, self._cut.own_order)])


def _fused(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, temperature: float
) -> tuple[Tensor, TokenStats]:
    parts: list[LossOutput] = []

    def part_loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        index = mb.loss_index[part]
        # Empty, so that a loss which reads sequences though it is declared per_token fails instead of being wrong.
        no_sequences = mb.cu_seqlens[:0]
        inputs = _loss_inputs(mb, logprobs, objective, lambda values: values.index_select(0, index), no_sequences)
        result = objective(inputs)
        parts.append(_each(result, Tensor.detach))
        return result.loss * mb.loss_weights.index_select(0, index)

    rows, targets = hidden.index_select(0, mb.loss_index), mb.targets.index_select(0, mb.loss_index)
    loss, logprobs, entropy = fused_token_loss(rows, head, targets, part_loss, temperature=temperature)
    return loss, _stats(mb, logprobs, entropy, parts)


def _loss_inputs(
    mb: MicroBatch, logprobs: Tensor, objective: Objective, pick: Callable[[Tensor], Tensor], cu_seqlens: Tensor
) -> LossInputs:
    """Arguments of the objective for `logprobs` [n]; `pick` maps a tensor [T] to the same n tokens."""
    anchor = mb.rollout_logprobs if objective.ratio_anchor == "rollout" else mb.old_logprobs
    assert anchor is not None, "old_logprobs are not attached"
    return LossInputs(
        logprobs=logprobs,
        anchor_logprobs=pick(anchor),
        rollout_logprobs=pick(mb.rollout_logprobs),
        advantages=pick(mb.advantages),
        mask=pick(mb.loss_mask),
        cu_seqlens=cu_seqlens,
        old_logprobs=None if mb.old_logprobs is None else pick(mb.old_logprobs),
        ref_logprobs=None if mb.ref_logprobs is None else pick(mb.ref_logprobs),
    )


def _each(result: LossOutput, function: Callable[[Tensor], Tensor]) -> LossOutput:
    """The function applied to every tensor."""
    extra = {name: function(values) for name, values in result.extra.items()}
    return LossOutput(function(result.loss), function(result.ratio), function(result.weight), extra)


def _stats(mb: MicroBatch, logprobs: Tensor, entropy: Tensor, results: Sequence[LossOutput]) -> TokenStats:
    """The micro-batch's trained tokens; `results` are the objective's, one or several that follow each other."""

    def trained(values: Tensor) -> Tensor:
        return values.index_select(0, mb.loss_index)

    return TokenStats(
        targets=trained(mb.targets),
        logprobs=logprobs,
        rollout_logprobs=trained(mb.rollout_logprobs),
        versions=trained(mb.versions),
        advantages=trained(mb.advantages),
        ratio=torch.cat([result.ratio for result in results]),
        weight=torch.cat([result.weight for result in results]),
        entropy=entropy,
        old_logprobs=None if mb.old_logprobs is None else trained(mb.old_logprobs),
        extra={name: torch.cat([result.extra[name] for result in results]) for name in results[0].extra},
    )
