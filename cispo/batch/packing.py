"""From samples to the micro-batches of each rank, and from their values back to the samples.

    samples --pack--> [ranks][micro-batches] --learner, critic--> values [T] of each --unpack--> values of each sample

All of it is a pure function of its arguments.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cispo.algorithms import Reduction
from cispo.policies.costs import quadratic_length_of
from cispo.policies.pieces import Cost, micro_batch_plan, split_plan
from cispo.policies.replay import packed_routes
from cispo.recipe.schema import Recipe
from cispo.types import MicroBatch, Piece, Pieces, RankBatches, Sample

# Tensors of a sample that are there for some algorithms only.
_VALUES = ("advantages", "old_logprobs", "ref_logprobs", "values", "returns")
_PER_TOKEN = ("token_ids", "loss_mask", "rollout_logprobs", "versions")


def pack_for(recipe: Recipe, samples: Sequence[Sample], reduction: Reduction) -> list[list[MicroBatch]]:
    """Packs a batch for the recipe's learner ranks: [ranks][micro-batches].

    The constant reduction divides by rollout.max_tokens in every length stage: a token weighs the same in all of them.
    """
    cost = Cost()
    if recipe.learner.context_parallel > 1:
        cost = Cost(quadratic=quadratic_length_of(recipe.policy.model, recipe.policy.config))
    return pack(
        samples,
        reduction=reduction,
        max_tokens=recipe.rollout.max_tokens,
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        ranks=recipe.learner.data_parallel,
        context=recipe.learner.context_parallel,
        cost=cost,
        share_prompts=recipe.learner.share_prompts,
    )


def pack(
    samples: Sequence[Sample],
    *,
    reduction: Reduction,
    max_tokens: int,
    tokens_per_micro_batch: int,
    ranks: int = 1,
    context: int = 1,
    cost: Cost | None = None,
    share_prompts: bool = False,
) -> list[list[MicroBatch]]:
    """Packs a batch for the learner: [ranks][micro-batches], each at most `tokens_per_micro_batch` tokens.

    Samples go to ranks longest first onto the least loaded, and inside a rank into as few micro-batches as their
    order by length allows. A sample longer than the budget has a micro-batch of its own. All ranks get the same number
    of micro-batches: the collectives of a sharded model are as many on each. A rank with fewer has `stand_in`s. With
    `share_prompts` equal prompts of a micro-batch are marked to be read once; they count in full for the budget.

    With `context` above 1 each of `ranks` is a group of that many, neighbours in the result: a micro-batch of theirs
    has `context` times the tokens, each of them has its share, and long samples are split by `cost`
    (`pieces.split_plan`). The prompt of a split sample is not shared.
    """
    weights = reduction_weights(samples, reduction, max_tokens=max_tokens)
    if context > 1:
        lengths = [len(sample.token_ids) - 1 for sample in samples]
        cost = cost or Cost()
        plan = micro_batch_plan(lengths, ranks, tokens_per_micro_batch * context, cost)
        shares = [[_divided(samples, weights, index, context, cost, share_prompts) for index in own] for own in plan]
        return [[parts[rank] for parts in own] for own in shares for rank in range(context)]
    batches = [
        [
            _flatten([samples[i] for i in bin], [weights[i] for i in bin], bin, share_prompts)
            for bin in _bins(index, samples, tokens_per_micro_batch)
        ]
        for index in _by_rank(samples, ranks)
    ]
    most = max(map(len, batches))
    return [own + [stand_in(samples[0]) for _ in range(most - len(own))] for own in batches]


def _divided(
    samples: Sequence[Sample],
    weights: Sequence[float],
    index: Sequence[int],
    context: int,
    cost: Cost,
    share_prompts: bool,
) -> list[MicroBatch]:
    """[ranks of a group]: the parts of one micro-batch, of the samples in `index`."""
    plan = split_plan([len(samples[i].token_ids) - 1 for i in index], context, cost)
    lengths = tuple(len(samples[index[number]].token_ids) - 1 for number in plan.split)
    parts = []
    for rank in range(context):
        pieces = Pieces(lengths, plan.pieces, rank) if lengths else None
        whole = [index[number] for number in plan.whole[rank]]
        cut = [index[plan.split[piece.document]] for piece in plan.pieces[rank]]
        if not whole and not cut:
            parts.append(replace(stand_in(samples[0]), pieces=pieces))
            continue
        own = [*(samples[i] for i in whole), *map(_part, (samples[i] for i in cut), plan.pieces[rank])]
        numbers = *whole, *cut
        parts.append(_flatten(own, [weights[i] for i in numbers], numbers, share_prompts, pieces))
    return parts


def _part(sample: Sample, piece: Piece) -> Sample:
    """The piece's tokens as a sample, which has one token more: a micro-batch has input tokens and their targets."""
    rows = slice(piece.start, piece.end + 1)
    values = {name: None if (x := getattr(sample, name)) is None else x[rows] for name in (*_PER_TOKEN, *_VALUES)}
    routes = None if sample.routes is None else sample.routes[piece.start : piece.end]
    return replace(sample, routes=routes, **values)


def stand_in(like: Sample) -> MicroBatch:
    """A micro-batch of one token that is not trained on, with the values that `like` has; it stands for no sample."""
    blank = {name: torch.zeros(2) for name in _VALUES if getattr(like, name) is not None}
    sample = replace(
        like,
        token_ids=like.token_ids[:1].repeat(2),
        loss_mask=torch.zeros(2, dtype=torch.bool),
        rollout_logprobs=torch.zeros(2),
        versions=torch.zeros(2, dtype=like.versions.dtype),
        routes=None if like.routes is None else like.routes.new_full((1, *like.routes.shape[1:]), -1),
        **blank,
    )
    return replace(_flatten([sample], [0.0], (), False), stand_in=True)


def reduction_weights(samples: Sequence[Sample], reduction: Reduction, *, max_tokens: int) -> list[float]:
    """The weight of each sample's tokens, so that the weighted sum over the batch is the named reduction.

    token: 1 / tokens. prompt: 1 / (prompts * tokens of the prompt), the form of CISPO's eq. 4. sequence:
    1 / (sequences * tokens of the sequence). sequence_sum: 1 / sequences. constant: 1 / (sequences * max_tokens), Dr.
    GRPO. A sequence is a whole attempt, whatever its turns and segments.
    """
    lengths = [sample.num_loss_tokens for sample in samples]
    if reduction == "token":
        return [1 / max(sum(lengths), 1)] * len(samples)
    if reduction == "prompt":
        by_prompt: Counter[int] = Counter()
        for sample, length in zip(samples, lengths, strict=True):
            by_prompt[sample.group_id] += length
        return [1 / (len(by_prompt) * max(by_prompt[sample.group_id], 1)) for sample in samples]
    # The segments of an attempt stand side by side, and a prompt that was drawn twice has two attempts of one index.
    attempts = list(accumulate(int(sample.segment == 0) for sample in samples))
    count = attempts[-1] if attempts else 1
    if reduction == "sequence":
        by_attempt: Counter[int] = Counter()
        for attempt, length in zip(attempts, lengths, strict=True):
            by_attempt[attempt] += length
        return [1 / (count * max(by_attempt[attempt], 1)) for attempt in attempts]
    return [1 / (count * (1 if reduction == "sequence_sum" else max_tokens))] * len(samples)


def _by_rank(samples: Sequence[Sample], ranks: int) -> list[list[int]]:
    """Indices of each rank's samples, longest first."""
    order = sorted(
        range(len(samples)), key=lambda i: (-len(samples[i].token_ids), samples[i].group_id, samples[i].index)
    )
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in order:
        rank = load.index(min(load))
        by_rank[rank].append(i)
        load[rank] += len(samples[i].token_ids) - 1
    return by_rank


def _bins(index: Sequence[int], samples: Sequence[Sample], budget: int) -> list[list[int]]:
    """Cuts indices of samples into runs of at most `budget` tokens, or of a single sample."""
    bins: list[list[int]] = []
    left = 0
    for i in index:
        need = len(samples[i].token_ids) - 1
        if need > left or not bins:
            bins.append([])
            left = budget
        bins[-1].append(i)
        left -= need
    return bins


def _flatten(
    samples: Sequence[Sample],
    weights: Sequence[float],
    sample_index: Sequence[int],
    share_prompts: bool,
    pieces: Pieces | None = None,
) -> MicroBatch:
    """Shifts once: position t holds the input token, and all other values of the token it predicts.

    The last samples are this rank's `pieces`, if there are any.
    """
    lengths = torch.tensor([len(s.token_ids) - 1 for s in samples])
    cut = () if pieces is None else pieces.own
    firsts = [*(0,) * (len(samples) - len(cut)), *(piece.start for piece in cut)]
    mask = torch.cat([s.loss_mask[1:] for s in samples])
    per_sample = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)
    advantages = _shifted([s.advantages for s in samples])
    unique_index, inverse = _unique_tokens(samples, len(cut)) if share_prompts else (None, None)
    return MicroBatch(
        tokens=torch.cat([s.token_ids[:-1] for s in samples]),
        targets=torch.cat([s.token_ids[1:] for s in samples]),
        positions=torch.cat([torch.arange(int(n)) + first for n, first in zip(lengths, firsts, strict=True)]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        max_seqlen=int(lengths.max()),
        loss_mask=mask,
        loss_index=mask.nonzero()[:, 0],
        rollout_logprobs=torch.cat([s.rollout_logprobs[1:] for s in samples]),
        versions=torch.cat([s.versions[1:] for s in samples]),
        # Passes for logprobs and values come before advantages are estimated.
        advantages=torch.zeros(len(mask)) if advantages is None else advantages,
        loss_weights=torch.where(mask, per_sample, 0.0).float(),
        sample_index=tuple(sample_index),
        unique_index=unique_index,
        inverse=inverse,
        old_logprobs=_shifted([s.old_logprobs for s in samples]),
        ref_logprobs=_shifted([s.ref_logprobs for s in samples]),
        values=_shifted([s.values for s in samples]),
        returns=_shifted([s.returns for s in samples]),
        routes=packed_routes(samples),
        pieces=pieces,
    )


def _shifted(values: Sequence[Tensor | None]) -> Tensor | None:
    """[T]: one tensor [L] a sample, flat and without the first entries; None where a sample has none."""
    present = [v[1:] for v in values if v is not None]
    return torch.cat(present) if len(present) == len(values) else None


def _unique_tokens(samples: Sequence[Sample], pieces: int = 0) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`unique_index` and `inverse` of a micro-batch; None where nothing is read twice.

    The last `pieces` are parts of samples, which share nothing.

    Equal prefixes have equal hidden states, because attention is causal. Shared are equal prompts, and inside a group
    the longest beginning in common, so that a history which forks is read once up to the fork: a prefix tree.
    """
    unique_index, inverse = list[Tensor](), list[Tensor]()
    known = dict[tuple[int, ...], Tensor]()
    groups: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    start = count = 0
    for number, sample in enumerate(samples):
        tokens = sample.token_ids[:-1]
        length = len(tokens)
        if number >= len(samples) - pieces:
            unique_index.append(torch.arange(start, start + length))
            inverse.append(torch.arange(count, count + length))
            start, count = start + length, count + length
            continue
        # The prompt's last token is shared too: it predicts the first token of each completion from one hidden state.
        prompt = tokens[: _context(sample)]
        shared = known.get(tuple(prompt.tolist()))
        if shared is None:
            shared = _longest_prefix(prompt, groups[sample.group_id])
        unique_index.append(torch.arange(start + len(shared), start + length))
        rows = torch.cat([shared, torch.arange(count, count + length - len(shared))])
        inverse.append(rows)
        known.setdefault(tuple(prompt.tolist()), rows[: len(prompt)])
        groups[sample.group_id].append((tokens, rows))
        start, count = start + length, count + length - len(shared)
    return (torch.cat(unique_index), torch.cat(inverse)) if count < start else (None, None)


def _longest_prefix(prompt: Tensor, read: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The rows of the longest beginning of `prompt` among sequences that were read, (tokens, rows) each."""
    longest = torch.arange(0)
    for tokens, rows in read:
        size = min(len(prompt), len(tokens))
        equal = int((prompt[:size] == tokens[:size]).int().cumprod(0).sum())
        if equal > len(longest):
            longest = rows[:equal]
    return longest


def _context(sample: Sample) -> int:
    """Tokens before the first that is trained on."""
    first = int(sample.loss_mask.int().argmax())
    return first if sample.loss_mask[first] else len(sample.loss_mask)


def unpack(batches: RankBatches, values: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Values [T] of the `batches` of `count` samples as one tensor [L] a sample, in the order that was packed.

    Undoes the shift: the value beside the token to predict moves to that token; position 0 is 0. Puts the pieces of a
    sample together.
    """
    rows: list[Tensor] = [torch.empty(0)] * count
    for of_rank, values_of_rank in zip(batches, values, strict=True):
        for mb, result in zip(of_rank, values_of_rank, strict=True):
            if mb.stand_in:
                continue
            parts = result.split(mb.cu_seqlens.diff().tolist())
            cut = () if mb.pieces is None else mb.pieces.own
            for index, part in zip(mb.sample_index[: len(parts) - len(cut)], parts, strict=False):
                rows[index] = torch.cat([part.new_zeros(1), part])
            for index, part, piece in zip(reversed(mb.sample_index), reversed(parts), reversed(cut), strict=False):
                assert mb.pieces is not None
                if not len(rows[index]):
                    rows[index] = part.new_zeros(1 + mb.pieces.lengths[piece.document])
                rows[index][1 + piece.start : 1 + piece.end] = part
    return rows
