"""From the hidden states of one micro-batch to its loss: in the LM head's own pass where no token looks at another.

    hidden [T, d] --trained rows--> [N, d] --LM head--> logprobs --objective, loss_weights--> loss, columns [N]

Both ways give the same numbers. The fused one takes a loss that is declared `per_token`, some rows at a time, while
their logits are alive: three products with the head. Any other loss gets all tokens of all sequences, for a fourth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cispo.algorithms.losses import LossOutput
from cispo.algorithms.objective import Objective
from cispo.ops.logprobs import fused_token_loss, token_logprobs
from cispo.policies.attention import Documents, SharedPrompts
from cispo.policies.policy import Policy, PolicyOutput, RouterOutput
from cispo.types import LossInputs, MicroBatch

Columns = Mapping[str, Tensor]
"""Name -> [N] over the trained tokens of a micro-batch, without gradient."""


def read(policy: Policy, mb: MicroBatch) -> PolicyOutput:
    """The policy's pass over a micro-batch: hidden [T, d], and router outputs over all T tokens."""
    if mb.unique_index is None or mb.inverse is None:
        return policy(mb.tokens, mb.positions, mb.cu_seqlens, mb.max_seqlen)
    documents = Documents(mb.cu_seqlens, len(mb.tokens), mb.max_seqlen)
    tokens, positions = mb.tokens.index_select(0, mb.unique_index), mb.positions.index_select(0, mb.unique_index)
    output = policy.attend(tokens, positions, SharedPrompts(documents, mb.unique_index, mb.inverse))
    router = tuple(RouterOutput(*(x.index_select(0, mb.inverse) for x in layer)) for layer in output.router)
    return PolicyOutput(output.hidden.index_select(0, mb.inverse), router)


def micro_batch_loss(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, *, temperature: float
) -> tuple[Tensor, Columns]:
    """This micro-batch's share of the loss, and what it reports: logprobs, entropy, ratio, weight and extras.

    hidden [T, d] and head [V, d], which get the loss's gradient.
    """
    # With nothing to train on, only the whole form tells which columns the objective has.
    take = _fused if objective.per_token and len(mb.loss_index) else _whole
    return take(hidden, head, mb, objective, temperature)


def trained_logprobs(hidden: Tensor, head: Tensor, mb: MicroBatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the trained tokens, [N] each; the head runs for no other."""
    rows, targets = hidden.index_select(0, mb.loss_index), mb.targets.index_select(0, mb.loss_index)
    return token_logprobs(rows, head, targets, temperature=temperature)


def spread(values: Tensor, mb: MicroBatch) -> Tensor:
    """[N] over trained tokens to [T], 0 elsewhere."""
    return values.new_zeros(len(mb.tokens)).index_copy(0, mb.loss_index, values)


def _whole(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, temperature: float
) -> tuple[Tensor, Columns]:
    logprobs, entropy = trained_logprobs(hidden, head, mb, temperature=temperature)
    result = objective(_loss_inputs(mb, spread(logprobs, mb), objective, lambda column: column, mb.cu_seqlens))
    reported = {name: column.index_select(0, mb.loss_index) for name, column in _reported(result).items()}
    loss = (result.loss * mb.loss_weights).sum()
    return loss, {"logprobs": logprobs.detach(), "entropy": entropy, **reported}


def _fused(
    hidden: Tensor, head: Tensor, mb: MicroBatch, objective: Objective, temperature: float
) -> tuple[Tensor, Columns]:
    parts: list[Columns] = []

    def part_loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        index = mb.loss_index[part]
        # Without sequences: a loss that looks for them though it is declared per_token fails, and is not wrong.
        none = mb.cu_seqlens[:0]
        result = objective(_loss_inputs(mb, logprobs, objective, lambda column: column.index_select(0, index), none))
        parts.append(_reported(result))
        return result.loss * mb.loss_weights.index_select(0, index)

    rows, targets = hidden.index_select(0, mb.loss_index), mb.targets.index_select(0, mb.loss_index)
    loss, logprobs, entropy = fused_token_loss(rows, head, targets, part_loss, temperature=temperature)
    reported = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return loss, {"logprobs": logprobs, "entropy": entropy, **reported}


def _reported(result: LossOutput) -> Columns:
    columns = {"ratio": result.ratio, "weight": result.weight, **result.extra}
    return {name: column.detach() for name, column in columns.items()}


def _loss_inputs(
    mb: MicroBatch, logprobs: Tensor, objective: Objective, pick: Callable[[Tensor], Tensor], cu_seqlens: Tensor
) -> LossInputs:
    """The objective's view of the tokens that `pick` takes of each column, [T] to as many as `logprobs` has."""
    anchor = mb.rollout_logprobs if objective.anchor == "rollout" else mb.old_logprobs
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
