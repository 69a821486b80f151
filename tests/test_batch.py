"""From scored groups to minibatches: reward streams, turns, KL as a reward, and how a batch is cut up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.choice import resolve
from cispo.batch.samples import informative, minibatches, to_samples, token_rewards, with_advantages
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.types import Completion, FinishReason, Prompt, Sample, Trajectory, TrajectoryGroup, Turn


def turn(length: int, **rewards: float) -> Turn:
    completion = Completion(
        token_ids=(5,) * length, logprobs=(-1.0,) * length, finish_reason=FinishReason.STOP, versions=(0,) * length
    )
    return Turn(context_ids=(1, 2), completion=completion, rewards=rewards)


def group(id: int, *trajectories: tuple[float, list[Turn]]) -> TrajectoryGroup:
    made = [
        Trajectory(group_id=id, index=i, turns=tuple(turns), text="", reward=reward)
        for i, (reward, turns) in enumerate(trajectories)
    ]
    return TrajectoryGroup(prompt=Prompt(id=id, messages=()), trajectories=tuple(made))


def advantages(samples: list[Sample]) -> list[list[float]]:
    """Advantages of the sampled tokens of each sample; masked ones must have none."""
    for s in samples:
        assert s.advantages is not None and bool((s.advantages[~s.loss_mask] == 0).all())
    return [s.advantages[s.loss_mask].tolist() for s in samples if s.advantages is not None]


def test_turns_have_rewards_of_their_own():
    """Two turns of 2 and 1 tokens: the first turn's tool error counts for its tokens, the outcome for all."""
    agent = group(0, (1.0, [turn(2, tool_error=-0.5), turn(1)]), (0.0, [turn(3)]))
    samples = with_advantages([agent], to_samples(agent), resolve(ALGORITHMS["cispo_agent"], AlgorithmSection()))
    # Totals .5 and 0, baseline .25; reward-to-go of the first: .5 .5 | 1, of the second 0.
    assert advantages(samples) == [[0.25, 0.25], [0.75], [-0.25] * 3]
    streams = token_rewards(agent.trajectories[0], to_samples(agent)[:2], ALGORITHMS["cispo"]).streams
    assert streams["outcome"].tolist() == [0, 0, 1] and streams["tool_error"].tolist() == [0, -0.5, 0]


def test_kl_as_a_reward_is_a_stream_of_every_token():
    algorithm = resolve(ALGORITHMS["reinforce_pp"], AlgorithmSection(kl_coef=0.1, kl_in="reward", kl="k1"))
    one = group(0, (1.0, [turn(2)]), (0.0, [turn(2)]))
    samples = [
        replace(s, old_logprobs=torch.tensor([0.0, 0, -1, -2]), ref_logprobs=torch.tensor([0.0, 0, -2, -2]))
        for s in to_samples(one)
    ]
    streams = token_rewards(one.trajectories[0], samples[:1], algorithm).streams
    assert streams["kl"].tolist() == pytest.approx([-0.1, 0]) and algorithm.objective.kl_coef == 0
    # Reward-to-go .9 1 | -.1 0, whitened over the four tokens.
    to_go = torch.tensor([0.9, 1.0, -0.1, 0.0], dtype=torch.float64)
    expected = ((to_go - to_go.mean()) / to_go.std(correction=0)).tolist()
    got = [a for row in advantages(with_advantages([one], samples, algorithm)) for a in row]
    assert got == pytest.approx(expected, abs=1e-6)


def test_a_critic_gets_its_returns():
    one = group(0, (1.0, [turn(2)]), (0.0, [turn(1)]))
    samples = [replace(s, values=torch.full((len(s.token_ids),), 0.25) * s.loss_mask) for s in to_samples(one)]
    done = with_advantages([one], samples, ALGORITHMS["ppo"])
    # gamma = lam = 1: the return is the final reward.
    assert [s.returns.tolist() for s in done] == [[0, 0, 1, 1], [0, 0, 0]]  # type: ignore[union-attr]
    flat = torch.tensor([a for row in advantages(done) for a in row])
    assert float(flat.mean()) == pytest.approx(0, abs=1e-6) and float(flat.std(correction=0)) == pytest.approx(1)


def test_informative():
    assert not informative(group(0, (0.3, [turn(1)]), (0.1 + 0.2, [turn(2)])))
    assert not informative(group(0, (0.1, [turn(1)]), (torch.tensor(0.1).item(), [turn(2)])))
    assert not informative(group(0, (0.1, [turn(1)]), (0.1, [turn(2)])))
    assert informative(group(0, (0.1, [turn(1)]), (0.2, [turn(2)])))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
def test_minibatches_share_a_batch(count: int):
    """Every sample once, sizes that differ by one at most, the turns of a trajectory together, the same for a seed."""
    groups = [group(i, (1.0, [turn(2), turn(1)]), (0.0, [turn(3)]), (0.5, [turn(1)])) for i in range(6)]
    samples = [s for g in groups for s in to_samples(g)]
    shares = minibatches(groups, samples, count, seed=3)
    assert len(shares) == count
    assert sorted(id(s) for share in shares for s in share) == sorted(map(id, samples))
    trajectories = [{(s.group_id, s.index) for s in share} for share in shares]
    assert max(map(len, trajectories)) - min(map(len, trajectories)) <= 1
    assert sum(map(len, trajectories)) == 18, "a trajectory's turns are in one minibatch"
    again = minibatches(groups, samples, count, seed=3)
    assert [[id(s) for s in share] for share in again] == [[id(s) for s in share] for share in shares]
    if count > 1:
        assert [{s.group_id for s in share} for share in minibatches(groups, samples, count, seed=4)] != [
            {s.group_id for s in share} for share in shares
        ]


def test_fewer_trajectories_than_minibatches():
    one = group(0, (1.0, [turn(2)]), (0.0, [turn(3)]))
    assert [len(share) for share in minibatches([one], to_samples(one), 16, seed=0)] == [1, 1]
    assert minibatches([], [], 4, seed=0) == []


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_prompt_that_repeats_in_a_batch_takes_no_step_away(group_size: int):
    """Four groups of one prompt, as of a small dataset: as many steps as of four prompts."""
    groups = [group(7, *[(1.0, [turn(2), turn(1)])] * group_size) for _ in range(4)]
    samples = [s for g in groups for s in to_samples(g)]
    shares = minibatches(groups, samples, 4, seed=3)
    assert [len(share) for share in shares] == [2 * group_size] * 4
    assert sorted(id(s) for share in shares for s in share) == sorted(map(id, samples))
