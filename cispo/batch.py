"""From scored groups to micro-batches: everything about a batch between sampling and the learner.

    groups --to_samples--> samples --with_advantages--> samples --minibatches--> shares --pack--> [ranks][micro-batches]

Passes of learner, reference and critic over the samples come before `with_advantages`: they too are packed, and
`unpack` gives their values [T] back to the samples. All of it is a pure function of its arguments.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cispo.algorithms import Algorithm, Reduction
from cispo.algorithms.advantages import Gae, TokenRewards, generalised_advantages, is_constant
from cispo.algorithms.losses import kl_estimate
from cispo.recipe.schema import Recipe
from cispo.types import MicroBatch, RankBatches, Sample, Trajectory, TrajectoryGroup, Turn


def informative(group: TrajectoryGroup) -> bool:
    """Whether the attempts of a group differ in their reward."""
    return not is_constant([t.reward for t in group.trajectories])


# Samples


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


def _by_trajectory(groups: Sequence[TrajectoryGroup], samples: Sequence[Sample]) -> list[list[list[Sample]]]:
    """The samples of the groups, as `to_samples` gives them one group after another: [groups][trajectories][turns]."""
    remaining = iter(samples)
    return [[[next(remaining) for _ in t.turns] for t in group.trajectories] for group in groups]


# Advantages


def with_advantages(groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], algorithm: Algorithm) -> list[Sample]:
    """The samples of the groups (in order, as `to_samples` gives them) with advantages, and returns for a critic."""
    turns = _by_trajectory(groups, samples)
    rewards = [
        [token_rewards(t, own, algorithm) for t, own in zip(group.trajectories, of_group, strict=True)]
        for group, of_group in zip(groups, turns, strict=True)
    ]
    advantages = algorithm.advantage(rewards)
    tokens = [advantage for of_group in advantages for advantage in of_group]
    assert not tokens or bool(torch.cat(tokens).isfinite().all()), "an advantage is not finite"
    done = []
    for of_group, group_rewards, group_advantages in zip(turns, rewards, advantages, strict=True):
        for own, reward, advantage in zip(of_group, group_rewards, group_advantages, strict=True):
            values = {"advantages": advantage}
            if algorithm.critic:
                values["returns"] = _returns(reward, algorithm)
            done += _attach(own, values)
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
        # The KL of the sampling policy, which is the ratio's denominator.
        policy, reference = _sampled(turns, f"{algorithm.ratio_anchor}_logprobs"), _sampled(turns, "ref_logprobs")
        kl = kl_estimate(policy, reference, torch.ones_like(policy, dtype=torch.bool), algorithm.kl)
        streams["kl"] = -algorithm.kl_coef * kl
    return TokenRewards(streams=streams, values=_sampled(turns, "values") if algorithm.critic else None)


def _sampled(turns: Sequence[Sample], name: str) -> Tensor:
    """[L] float64: a field of `Sample` over the sampled tokens of all turns."""
    return torch.cat([getattr(sample, name)[sample.loss_mask] for sample in turns]).double()


def _returns(rewards: TokenRewards, algorithm: Algorithm) -> Tensor:
    """[L]: G_t = A_t + V_t with the unwhitened advantages of the same gamma and lambda."""
    gae = algorithm.advantage if isinstance(algorithm.advantage, Gae) else Gae()
    assert rewards.values is not None
    return generalised_advantages(rewards, gamma=gae.gamma, lam=gae.lam) + rewards.values


def _attach(turns: Sequence[Sample], values: Mapping[str, Tensor]) -> Iterator[Sample]:
    """The turns of a trajectory with `values`, [L] over its sampled tokens, under their names in `Sample`."""
    tokens = len(next(iter(values.values())))
    lengths = [sample.num_loss_tokens for sample in turns] if len(turns) > 1 else [tokens]
    parts = {name: tensor.float().split(lengths) for name, tensor in values.items()}
    for number, sample in enumerate(turns):
        empty = torch.zeros(len(sample.token_ids))
        yield replace(sample, **{n: empty.masked_scatter(sample.loss_mask, part[number]) for n, part in parts.items()})


# Minibatches


def minibatches(
    groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], count: int, *, seed: int
) -> list[list[Sample]]:
    """`count` nearly equal shares of the groups' samples (in order) in an order given by the seed; none of them empty.

    The turns of a trajectory stay together, and the attempts of a group too, except where a share ends among them. A
    prompt that was drawn twice has two groups.
    """
    order = _by_trajectory(groups, samples)
    if count > 1:
        random.Random(seed).shuffle(order)
    trajectories = [turns for group in order for turns in group]
    bounds = [round(i * len(trajectories) / count) for i in range(count + 1)]
    shares = [trajectories[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [[sample for turns in share for sample in turns] for share in shares if share]


# Micro-batches


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
    return [
        [
            _flatten([samples[i] for i in bin], [weights[i] for i in bin], bin, share_prompts)
            for bin in _bins(index, samples, tokens_per_micro_batch)
        ]
        for index in _by_rank(samples, ranks)
    ]


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
    samples: Sequence[Sample], weights: Sequence[float], sample_index: Sequence[int], share_prompts: bool
) -> MicroBatch:
    """Shifts once: position t holds the input token, and all other values of the token it predicts."""
    lengths = torch.tensor([len(s.token_ids) - 1 for s in samples])
    mask = torch.cat([s.loss_mask[1:] for s in samples])
    per_sample = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)
    advantages = _shifted([s.advantages for s in samples])
    unique_index, inverse = _unique_tokens(samples) if share_prompts else (None, None)
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
    )


def _shifted(values: Sequence[Tensor | None]) -> Tensor | None:
    """[T]: one tensor [L] a sample, flat and without the first entries; None where a sample has none."""
    present = [v[1:] for v in values if v is not None]
    return torch.cat(present) if len(present) == len(values) else None


def _unique_tokens(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`unique_index` and `inverse` of a micro-batch; None where no two prompts are equal.

    Equal prompts have equal hidden states, because attention is causal.
    """
    unique_index, inverse, known = [], [], dict[tuple[int, ...], Tensor]()
    start = count = 0
    for sample in samples:
        length = len(sample.token_ids) - 1
        # The prompt's last token is shared too: it predicts the first token of each completion from one hidden state.
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


def unpack(batches: RankBatches, values: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Values [T] of the `batches` of `count` samples as one tensor [L] a sample, in the order that was packed.

    Undoes the shift: the value beside the token to predict moves to that token; position 0 is 0.
    """
    rows: list[Tensor] = [torch.empty(0)] * count
    for of_rank, values_of_rank in zip(batches, values, strict=True):
        for mb, result in zip(of_rank, values_of_rank, strict=True):
            parts = result.split(mb.cu_seqlens.diff().tolist())
            for index, part in zip(mb.sample_index, parts, strict=True):
                rows[index] = torch.cat([part.new_zeros(1), part])
    return rows
