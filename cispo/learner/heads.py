"""The loss of a policy's heads of multi-token prediction, beside the policy's own loss and without effect on it.

    trunk's hidden [T, d], detached --head 0--> --head 1--> ...      loss = - sum_n sum_j w_j log p_n(t_j) / heads

Head n (from 0) predicts every trained token t_j from the position n + 2 tokens before it, which must be in t_j's
document; w_j is the token's weight in the policy's loss (`MicroBatch.loss_weights`). Embedding and LM head are detached
too, so heads alone get a gradient: equation 24 of arXiv 2412.19437, where the trunk is trained as well. The mean over
heads is its equation 25 without the factor.

Heads read all tokens of every document, those of shared prompts again: the last token of a prompt has another next
token in each. Logits go through the chunks of `ops.logprobs`; the best token takes one product more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cispo.learner.loss import WholeDocuments, attention_of
from cispo.ops.collectives import Group
from cispo.ops.logprobs import best_tokens, fused_token_loss
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.policy import Policy, heads_of
from cispo.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Sums over the predictions of all heads: (head, trained token) pairs."""

    count: float
    loss: float
    """Negative log-probabilities in nats, unweighted."""
    right: float
    """Predictions whose token of the highest probability is the trained one."""

    @classmethod
    def of(cls, sums: Sequence[Tensor | None]) -> Predictions:
        """From [3] tensors of micro-batches, on a device, which is read once."""
        known = [own for own in sums if own is not None]
        count, loss, right = torch.stack(known).double().sum(0).tolist() if known else (0.0, 0.0, 0.0)
        return cls(count=count, loss=loss, right=right)


def prediction_metrics(predictions: Iterable[Predictions | None]) -> dict[str, float]:
    """Mean negative log-probability in nats of the trained tokens by the heads of multi-token prediction, and the share
    that they give the highest probability, over all heads; empty where there is no prediction."""
    found = [own for own in predictions if own is not None]
    count = sum(own.count for own in found)
    if not count:
        return {}
    return {
        "mtp/loss": sum(own.loss for own in found) / count,
        "mtp/accuracy": sum(own.right for own in found) / count,
    }


class HeadsLoss(NamedTuple):
    """One micro-batch's loss of the heads."""

    loss: Tensor
    """[]: with a gradient for the heads alone; the shares of micro-batches and ranks add up."""
    sums: Tensor
    """[3]: the numbers of `Predictions`, without gradient."""


class _Labels(NamedTuple):
    """Tokens that a head predicts, [n] each."""

    rows: Tensor
    """int64: positions from which they are predicted."""
    tokens: Tensor
    weights: Tensor
    counted: Tensor
    """bool: False where the rows hold no prediction, and then the weight is 0."""


def heads_loss(
    policy: Policy, hidden: Tensor, mb: MicroBatch, *, temperature: float, group: Group | None = None
) -> HeadsLoss:
    """The loss of a policy's heads, of which there is one at least, on a micro-batch.

    hidden [T, d] are the trunk's states, which get no gradient. The ranks of `group` compute it together, and meet in
    collectives where documents are split.
    """
    assert isinstance(policy, HybridPolicy)
    attention = attention_of(mb, group, share_prompts=False)
    hidden, weight = hidden.detach(), policy.lm_head_weight.detach()
    losses, sums = [], []
    documents = None if mb.pieces is None else WholeDocuments(mb, _given(group))
    for number, head in enumerate(heads_of(policy)):
        hidden = policy.predict(number, _ahead(mb, mb.targets, number, documents), mb.positions, hidden, attention)
        labels = _labels(mb, number + 1, documents)
        states = head.norm(hidden.index_select(0, labels.rows))

        def part_loss(logprobs: Tensor, entropy: Tensor, part: slice, labels: _Labels = labels) -> Tensor:
            return -logprobs * labels.weights[part]

        loss, logprobs, _ = fused_token_loss(states, weight, labels.tokens, part_loss, temperature=temperature)
        right = (best_tokens(states.detach(), weight) == labels.tokens) & labels.counted
        losses.append(loss)
        nats = -torch.where(labels.counted, logprobs, 0.0).sum()
        sums.append(torch.stack([labels.counted.sum(), nats, right.sum()]))
    return HeadsLoss(torch.stack(losses).sum() / len(losses), torch.stack(sums).sum(0))


def copy_of_trunk(policy: Policy) -> Policy:
    """A copy without heads and without gradient."""
    # The copy of the list of heads is given: an empty one.
    known = {id(policy.predictors): nn.ModuleList()} if isinstance(policy, HybridPolicy) else {}
    return copy.deepcopy(policy, known).requires_grad_(False)


def _labels(mb: MicroBatch, distance: int, documents: WholeDocuments | None) -> _Labels:
    """Trained tokens that are `distance` places behind the target of the position which predicts them."""
    if documents is None:
        # As many rows as trained tokens: their number is known without asking the device.
        index = mb.loss_index
        inside = mb.positions.index_select(0, index) >= distance
        weights = torch.where(inside, mb.loss_weights.index_select(0, index), 0.0)
        return _Labels((index - distance).clamp(min=0), mb.targets.index_select(0, index), weights, inside)
    # The position of a token at the beginning of a piece is on another rank.
    trained = _ahead(mb, mb.loss_mask.long(), distance, documents, beyond=0)
    rows = trained.nonzero()[:, 0]
    tokens, weights = (_ahead(mb, x, distance, documents).index_select(0, rows) for x in (mb.targets, mb.loss_weights))
    return _Labels(rows, tokens, weights, torch.ones_like(rows, dtype=torch.bool))


def _ahead(
    mb: MicroBatch, values: Tensor, distance: int, documents: WholeDocuments | None, *, beyond: int | None = None
) -> Tensor:
    """[T]: `values` of the token `distance` places behind in the document; its own, or `beyond`, where there is none.

    Such a token is read by no position with a label: attention is causal.
    """
    if distance == 0:
        return values
    positions = mb.positions
    if documents is not None:
        values, positions = documents.join(values), documents.join(positions)
    index = torch.arange(len(values), device=values.device)
    moved = (index + distance).clamp(max=len(values) - 1)
    same = positions.index_select(0, moved) == positions + distance
    own = values if beyond is None else torch.full_like(values, beyond)
    result = torch.where(same, values.index_select(0, moved), own)
    return result if documents is None else documents.own(result)


def _given(group: Group | None) -> Group:
    assert group is not None, "a micro-batch with split documents is read by a group of ranks"
    return group
