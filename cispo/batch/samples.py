"""From scored groups to samples with advantages, and to their minibatches.

    groups --to_samples--> samples --with_advantages--> samples --minibatches--> shares --packing.pack--> micro-batches

Passes of learner, reference and critic over the samples come before `with_advantages`. All of it is a pure function of
its arguments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from cispo.algorithms import Algorithm
from cispo.algorithms.advantages import Gae, TokenRewards, generalised_advantages, is_constant
from cispo.algorithms.losses import kl_estimate
from cispo.policies.replay import routes_of_turns
from cispo.types import Sample, Trajectory, TrajectoryGroup, Turn


def informative(group: TrajectoryGroup) -> bool:
    """Whether the attempts of a group differ in their reward: in all, or in that of some turn."""
    if not is_constant([t.reward for t in group.trajectories]):
        return True
    turns = zip_longest(*([sum(turn.rewards.values()) for turn in t.turns] for t in group.trajectories), fillvalue=0.0)
    return not all(map(is_constant, turns))


# Samples


def to_samples(group: TrajectoryGroup) -> list[Sample]:
    """One sample a segment, in order: what the policy read is context, its completions are trained on."""
    return [
        _segment_sample(trajectory, turns, number)
        for trajectory in group.trajectories
        for number, turns in enumerate(trajectory.segments)
    ]


def _segment_sample(trajectory: Trajectory, turns: Sequence[Turn], number: int) -> Sample:
    tokens, mask, logprobs, versions = list[int](), list[bool](), list[float](), list[int]()
    for turn in turns:
        context, completion = len(turn.context_ids), turn.completion
        tokens += (*turn.context_ids, *completion.token_ids)
        mask += (*(False,) * context, *(True,) * len(completion.token_ids))
        logprobs += (*(0.0,) * context, *completion.logprobs)
        versions += (*(0,) * context, *completion.versions)
    return Sample(
        token_ids=torch.tensor(tokens),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        rollout_logprobs=torch.tensor(logprobs),
        versions=torch.tensor(versions, dtype=torch.int32),
        group_id=trajectory.group_id,
        index=trajectory.index,
        segment=number,
        routes=routes_of_turns(turns),
    )


def demonstration(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], index: int, taught: Sequence[bool] | None = None
) -> Sample:
    """A sample for supervised fine-tuning: no rollout, advantage 1.

    `taught` says of each token of the completion whether it is trained on; without it, all are.
    """
    mask = torch.zeros(len(prompt_ids) + len(completion_ids), dtype=torch.bool)
    mask[len(prompt_ids) :] = True if taught is None else torch.tensor(taught, dtype=torch.bool)
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
    """The samples of `to_samples`, one group after another, as [groups][trajectories][segments]."""
    remaining = iter(samples)
    return [[[next(remaining) for _ in t.segments] for t in group.trajectories] for group in groups]


# Advantages


def with_advantages(groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], algorithm: Algorithm) -> list[Sample]:
    """The samples of the groups (in order, as `to_samples` gives them) with advantages, and returns for a critic."""
    segments = _by_trajectory(groups, samples)
    rewards = [
        [token_rewards(t, own, algorithm) for t, own in zip(group.trajectories, of_group, strict=True)]
        for group, of_group in zip(groups, segments, strict=True)
    ]
    advantages = algorithm.advantage(rewards)
    tokens = [advantage for of_group in advantages for advantage in of_group]
    assert not tokens or bool(torch.cat(tokens).isfinite().all()), "an advantage is not finite"
    done = []
    for of_group, group_rewards, group_advantages in zip(segments, rewards, advantages, strict=True):
        for own, reward, advantage in zip(of_group, group_rewards, group_advantages, strict=True):
            values = {"advantages": advantage}
            if algorithm.critic:
                values["returns"] = _returns(reward, algorithm)
            done += _attach(own, values)
    return done


def token_rewards(trajectory: Trajectory, segments: Sequence[Sample], algorithm: Algorithm) -> TokenRewards:
    """A trajectory's reward streams over its sampled tokens: the outcome, each turn's own, and KL as a reward."""
    lengths = [len(turn.completion.token_ids) for turn in trajectory.turns]
    streams = {"outcome": torch.zeros(sum(lengths), dtype=torch.float64)}
    streams["outcome"][-1] = trajectory.reward
    for turn, end in zip(trajectory.turns, accumulate(lengths), strict=True):
        for name, value in turn.rewards.items():
            streams.setdefault(name, torch.zeros_like(streams["outcome"]))[end - 1] += value
    if algorithm.needs_reference and algorithm.kl_in == "reward":
        # The KL of the sampling policy, which is the ratio's denominator.
        policy = _sampled(segments, f"{algorithm.ratio_anchor}_logprobs")
        reference = _sampled(segments, "ref_logprobs")
        kl = kl_estimate(policy, reference, torch.ones_like(policy, dtype=torch.bool), algorithm.kl)
        streams["kl"] = -algorithm.kl_coef * kl
    values = _sampled(segments, "values") if algorithm.critic else None
    return TokenRewards(streams=streams, values=values, turns=tuple(lengths))


def _sampled(segments: Sequence[Sample], name: str) -> Tensor:
    """[L] float64: a field of `Sample` over the sampled tokens of all segments."""
    return torch.cat([getattr(sample, name)[sample.loss_mask] for sample in segments]).double()


def _returns(rewards: TokenRewards, algorithm: Algorithm) -> Tensor:
    """[L]: G_t = A_t + V_t with the unwhitened advantages of the same gamma and lambda."""
    gae = algorithm.advantage if isinstance(algorithm.advantage, Gae) else Gae()
    assert rewards.values is not None
    return generalised_advantages(rewards, gamma=gae.gamma, lam=gae.lam) + rewards.values


def _attach(segments: Sequence[Sample], values: Mapping[str, Tensor]) -> Iterator[Sample]:
    """The segments of a trajectory with `values`, [L] over its sampled tokens, under their names in `Sample`."""
    tokens = len(next(iter(values.values())))
    lengths = [sample.num_loss_tokens for sample in segments] if len(segments) > 1 else [tokens]
    parts = {name: tensor.float().split(lengths) for name, tensor in values.items()}
    for number, sample in enumerate(segments):
        empty = torch.zeros(len(sample.token_ids))
        yield replace(sample, **{n: empty.masked_scatter(sample.loss_mask, part[number]) for n, part in parts.items()})


# Minibatches


def minibatches(
    groups: Sequence[TrajectoryGroup], samples: Sequence[Sample], count: int, *, seed: int
) -> list[list[Sample]]:
    """`count` nearly equal shares of the groups' samples (in order) in an order given by the seed; none of them empty.

    The segments of a trajectory stay together, and the attempts of a group too, except where a share ends among them. A
    prompt that was drawn twice has two groups.
    """
    order = _by_trajectory(groups, samples)
    if count > 1:
        random.Random(seed).shuffle(order)
    trajectories = [segments for group in order for segments in group]
    bounds = [round(i * len(trajectories) / count) for i in range(count + 1)]
    shares = [trajectories[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [[sample for segments in share for sample in segments] for share in shares if share]
