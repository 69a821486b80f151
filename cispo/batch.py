"""From scored groups to the minibatches of a step: advantages per token, and how a batch is cut up.

groups, samples (with what passes of learner, reference and critic attached) -> samples with advantages -> minibatches
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cispo.algorithms import Algorithm
from cispo.algorithms.advantages import TokenRewards, generalised_advantages, is_constant
from cispo.algorithms.losses import kl_estimate
from cispo.types import Sample, Trajectory, TrajectoryGroup


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
