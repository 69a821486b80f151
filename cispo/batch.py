"""From scored groups to the minibatches of a step: advantages per token, and how a batch is cut up.

groups, samples (with what passes of learner, reference and critic attached) -> samples with advantages -> minibatches
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cispo.algorithms import Algorithm, Reduction
from cispo.algorithms.advantages import TokenRewards, generalised_advantages, is_constant
from cispo.algorithms.losses import kl_estimate
from cispo.recipe.schema import Recipe
from cispo.types import MicroBatch, Sample, Trajectory, TrajectoryGroup, Turn


def informative(group: TrajectoryGroup) -> bool:
    """Whether the attempts of a group differ in their reward."""
    return not is_constant([t.reward for t in group.trajectories])


def with_advantages(groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], algorithm: Algorithm) -> list[Sample]:
    """The samples of the groups (in order, as `to_samples` gives them) with advantages, and returns for a critic."""
    remaining = iter(samples)
    turns = [[[next(remaining) for _ in t.turns] for t in group.trajectories] for group in groups]
    rewards = [
        [token_rewards(t, own, algorithm) for t, own in zip(group.trajectories, of_group, strict=True)]
        for group, of_group in zip(groups, turns, strict=True)
    ]
    advantages = algorithm.advantage(rewards, **algorithm.advantage_settings)
    tokens = [advantage for of_group in advantages for advantage in of_group]
    assert not tokens or bool(torch.cat(tokens).isfinite().all()), "an advantage is not finite"
    done = []
    for of_group, group_rewards, group_advantages in zip(turns, rewards, advantages, strict=True):
        for own, reward, advantage in zip(of_group, group_rewards, group_advantages, strict=True):
            columns = {"advantages": advantage}
            if algorithm.critic:
                columns["returns"] = _value_targets(reward, algorithm)
            done += _split(own, columns)
    return done


def token_rewards(trajectory: Trajectory, turns: Sequence[Sample], algorithm: Algorithm) -> TokenRewards:
    """A trajectory's reward streams over its sampled tokens: the outcome, each turn's own, and KL as a reward."""
    lengths = [sample.num_loss_tokens for sample in turns]
    streams = {"outcome": torch.zeros(sum(lengths), dtype=torch.float64)}
    streams["outcome"][-1] = trajectory.reward
    for turn, end in zip(trajectory.turns, accumulate(lengths), strict=True):
        for name, value in turn.rewards.items():
            streams.setdefault(name, torch.zeros_like(streams["outcome"]))[end - 1] += value
    if algorithm.needs_reference and algorithm.kl_in == "reward":
        # Of the policy that sampled: what the ratio divides by.
        policy, reference = _sampled(turns, f"{algorithm.anchor}_logprobs"), _sampled(turns, "ref_logprobs")
        kl = kl_estimate(policy, reference, torch.ones_like(policy, dtype=torch.bool), algorithm.kl)
        streams["kl"] = -algorithm.kl_coef * kl
    return TokenRewards(streams=streams, values=_sampled(turns, "values") if algorithm.critic else None)


def _sampled(turns: Sequence[Sample], name: str) -> Tensor:
    """[L] float64: one column over the sampled tokens of all turns."""
    return torch.cat([getattr(sample, name)[sample.loss_mask] for sample in turns]).double()


def _value_targets(rewards: TokenRewards, algorithm: Algorithm) -> Tensor:
    """[L]: G_t = A_t + V_t with the unwhitened advantages of the same gamma and lambda."""
    settings = algorithm.advantage_settings
    assert rewards.values is not None
    gamma, lam = settings.get("gamma", 1.0), settings.get("lam", 1.0)
    return generalised_advantages(rewards, gamma=gamma, lam=lam) + rewards.values


def _split(turns: Sequence[Sample], columns: dict[str, Tensor]) -> Iterator[Sample]:
    """Hands columns [L] over a trajectory's sampled tokens out to its turns."""
    tokens = len(next(iter(columns.values())))
    lengths = [sample.num_loss_tokens for sample in turns] if len(turns) > 1 else [tokens]
    parts = {name: values.float().split(lengths) for name, values in columns.items()}
    for number, sample in enumerate(turns):
        empty = torch.zeros(len(sample.token_ids))
        yield replace(sample, **{n: empty.masked_scatter(sample.loss_mask, part[number]) for n, part in parts.items()})


def minibatches(samples: Sequence[Sample], count: int, *, seed: int) -> list[list[Sample]]:
    """`count` nearly equal shares of the batch, in an order that only the seed decides; none of them empty.

    A trajectory's turns stay together, and so do the attempts at a prompt, but for those at the seams.
    """
    groups: dict[int, dict[int, list[Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, {}).setdefault(sample.index, []).append(sample)
    order = list(groups.values())
    if count > 1:
        random.Random(seed).shuffle(order)
    trajectories = [turns for group in order for turns in group.values()]
    bounds = [round(i * len(trajectories) / count) for i in range(count + 1)]
    shares = [trajectories[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [[sample for turns in share for sample in turns] for share in shares if share]


def pack_for(recipe: Recipe, samples: Sequence[Sample], reduction: Reduction) -> list[list[MicroBatch]]:
    """Packs a batch for the recipe's learner ranks: [ranks][micro-batches].

    The constant reduction divides by rollout.max_tokens in every length stage: a token weighs the same in all of them.
    """
    return pack(
        samples,
        reduction=reduction,
        max_tokens=recipe.rollout.max_tokens,
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        ranks=recipe.learner.ranks,
        share_prompts=recipe.learner.share_prompts,
    )


_OPTIONAL = ("old_logprobs", "ref_logprobs", "values", "returns")


def to_samples(group: TrajectoryGroup) -> list[Sample]:
    """One sample a turn, in order: the rendered prompt is context, the completion is trained on."""
    return [_turn_sample(trajectory, turn) for trajectory in group.trajectories for turn in trajectory.turns]


def _turn_sample(trajectory: Trajectory, turn: Turn) -> Sample:
    completion = turn.completion
    prompt = len(turn.prompt_ids)
    mask = torch.zeros(prompt + len(completion.token_ids), dtype=torch.bool)
    mask[prompt:] = True
    return Sample(
        token_ids=torch.tensor((*turn.prompt_ids, *completion.token_ids)),
        loss_mask=mask,
        rollout_logprobs=torch.tensor((*(0.0,) * prompt, *completion.logprobs)),
        versions=torch.tensor((*(0,) * prompt, *completion.versions), dtype=torch.int32),
        group_id=trajectory.group_id,
        index=trajectory.index,
    )


def demonstration(prompt_ids: Sequence[int], completion_ids: Sequence[int], index: int) -> Sample:
    """A sample for supervised fine-tuning: no rollout, advantage 1."""
    mask = torch.zeros(len(prompt_ids) + len(completion_ids), dtype=torch.bool)
    mask[len(prompt_ids) :] = True
    return Sample(
        token_ids=torch.tensor((*prompt_ids, *completion_ids)),
        loss_mask=mask,
        rollout_logprobs=torch.zeros(len(mask)),
        versions=torch.zeros(len(mask), dtype=torch.int32),
        group_id=index,
        index=0,
        advantages=mask.float(),
    )


def reduction_weights(samples: Sequence[Sample], reduction: Reduction, *, max_tokens: int) -> list[float]:
    """The weight of each sample's tokens, so that the weighted sum over the batch is the named reduction.

    token: 1 / tokens. prompt: 1 / (prompts * tokens of the prompt), the form of CISPO's eq. 4. sequence:
    1 / (sequences * tokens of the sequence). sequence_sum: 1 / sequences. constant: 1 / (sequences * max_tokens), Dr.
    GRPO.
    """
    lengths = [sample.num_loss_tokens for sample in samples]
    if reduction == "token":
        return [1 / max(sum(lengths), 1)] * len(samples)
    if reduction == "prompt":
        by_prompt: Counter[int] = Counter()
        for sample, length in zip(samples, lengths, strict=True):
            by_prompt[sample.group_id] += length
        return [1 / (len(by_prompt) * max(by_prompt[sample.group_id], 1)) for sample in samples]
    if reduction == "sequence":
        return [1 / (len(samples) * max(length, 1)) for length in lengths]
    return [1 / (len(samples) * (1 if reduction == "sequence_sum" else max_tokens))] * len(samples)


def pack(
    samples: Sequence[Sample],
    *,
    reduction: Reduction,
    max_tokens: int,
    tokens_per_micro_batch: int,
    ranks: int = 1,
    share_prompts: bool = False,
) -> list[list[MicroBatch]]:
    """Packs a batch for the learner: [ranks][micro-batches], each at most `tokens_per_micro_batch` tokens.

    Samples go to ranks longest first onto the least loaded, and inside a rank into as few micro-batches as their
    order by length allows. A sample longer than the budget has a micro-batch of its own. A rank may get none. With
    `share_prompts` equal prompts of a micro-batch are marked to be read once; they count in full for the budget.
    """
    weights = reduction_weights(samples, reduction, max_tokens=max_tokens)
    order = sorted(
        range(len(samples)), key=lambda i: (-len(samples[i].token_ids), samples[i].group_id, samples[i].index)
    )
    columns: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in order:
        rank = load.index(min(load))
        columns[rank].append(i)
        load[rank] += len(samples[i].token_ids) - 1
    return [
        [
            _flatten([samples[i] for i in bin], [weights[i] for i in bin], bin, share_prompts)
            for bin in _bins(column, samples, tokens_per_micro_batch)
        ]
        for column in columns
    ]


def _bins(column: Sequence[int], samples: Sequence[Sample], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room = 0
    for i in column:
        need = len(samples[i].token_ids) - 1
        if need > room or not bins:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= need
    return bins


def _flatten(
    samples: Sequence[Sample], weights: Sequence[float], sample_index: Sequence[int], share_prompts: bool
) -> MicroBatch:
    """Shifts once: position t holds the input token and everything about the token it predicts."""
    lengths = torch.tensor([len(s.token_ids) - 1 for s in samples])
    mask = torch.cat([s.loss_mask[1:] for s in samples])
    per_sample = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)

    def column(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if any(v is None for v in values) else torch.cat([v[1:] for v in values])

    advantages = column("advantages")
    unique_index, inverse = _distinct_tokens(samples) if share_prompts else (None, None)
    return MicroBatch(
        tokens=torch.cat([s.token_ids[:-1] for s in samples]),
        targets=torch.cat([s.token_ids[1:] for s in samples]),
        positions=torch.cat([torch.arange(int(n)) for n in lengths]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        max_seqlen=int(lengths.max()),
        loss_mask=mask,
        loss_index=mask.nonzero()[:, 0],
        rollout_logprobs=torch.cat([s.rollout_logprobs[1:] for s in samples]),
        versions=torch.cat([s.versions[1:] for s in samples]),
        # Passes that only read logprobs or values come before there are advantages.
        advantages=torch.zeros(len(mask)) if advantages is None else advantages,
        loss_weights=torch.where(mask, per_sample, 0.0).float(),
        sample_index=tuple(sample_index),
        unique_index=unique_index,
        inverse=inverse,
        **{name: column(name) for name in _OPTIONAL},
    )


def _distinct_tokens(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`unique_index` and `inverse` of a micro-batch; None where no two prompts are equal.

    What stands before the first token to predict is read alike wherever the same tokens do: attention is causal.
    """
    unique_index, inverse, known = [], [], dict[tuple[int, ...], Tensor]()
    start = count = 0
    for sample in samples:
        length = len(sample.token_ids) - 1
        # The last token of a prompt predicts the first of each completion: its hidden state is one all the same.
        prompt = tuple(sample.token_ids[:length][: _context(sample)].tolist())
        new = 0 if prompt not in known else len(prompt)
        unique_index.append(torch.arange(start + new, start + length))
        rows = torch.arange(count, count + length - new)
        inverse.append(torch.cat([known[prompt], rows]) if new else rows)
        known.setdefault(prompt, rows[: len(prompt)])
        start, count = start + length, count + length - new
    return (torch.cat(unique_index), torch.cat(inverse)) if count < start else (None, None)


def _context(sample: Sample) -> int:
    """Tokens before the first that is trained on."""
    first = int(sample.loss_mask.int().argmax())
    return first if sample.loss_mask[first] else len(sample.loss_mask)


def unpack(columns: Sequence[Sequence[MicroBatch]], values: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Per-token values [T] of packed micro-batches as one tensor [L] a sample, in the order that was packed.

    Undoes the shift: what stood beside the token to predict stands at that token; position 0 is 0.
    """
    rows: list[Tensor] = [torch.empty(0)] * count
    for column, results in zip(columns, values, strict=True):
        for mb, result in zip(column, results, strict=True):
            parts = result.split(mb.cu_seqlens.diff().tolist())
            for index, part in zip(mb.sample_index, parts, strict=True):
                rows[index] = torch.cat([part.new_zeros(1), part])
    return rows
