"""Trajectories of several turns on the way to the learner: segments, weights, advantages, and the prefix tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cispo.algorithms import ALGORITHMS, Reduction
from cispo.algorithms.advantages import RewardToGo, TokenRewards, TurnToGo
from cispo.algorithms.choice import resolve
from cispo.batch.packing import pack, reduction_weights
from cispo.batch.samples import informative, to_samples, with_advantages
from cispo.learner.learner import Learner
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.rollout.rollout import Rollouts, rollouts_from_json, rollouts_to_json
from cispo.types import Completion, FinishReason, Prompt, Sample, Trajectory, TrajectoryGroup, Turn
from tests.tiny_policies import MINIMAX

CISPO = ALGORITHMS["cispo"].objective


def turn(context: list[int], sampled: list[int], *, continues: bool = False, **rewards: float) -> Turn:
    completion = Completion(
        token_ids=tuple(sampled),
        logprobs=tuple(-1.0 - 0.01 * t for t in sampled),
        finish_reason=FinishReason.STOP,
        versions=(3,) * len(sampled),
    )
    return Turn(context_ids=tuple(context), completion=completion, continues=continues, rewards=rewards)


def group_of(*attempts: tuple[float, list[Turn]], id: int = 0) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(group_id=id, index=index, turns=tuple(turns), text="", reward=reward)
        for index, (reward, turns) in enumerate(attempts)
    )
    return TrajectoryGroup(prompt=Prompt(id=id, messages=()), trajectories=trajectories)


def test_continued_turns_are_one_sample():
    """Observations are context: mask False, no log-probability, no version."""
    [sample] = to_samples(group_of((1.0, [turn([4, 5], [6, 2]), turn([7], [8], continues=True)])))
    assert sample.token_ids.tolist() == [4, 5, 6, 2, 7, 8]
    assert sample.loss_mask.tolist() == [False, False, True, True, False, True]
    assert sample.rollout_logprobs.tolist() == pytest.approx([0, 0, -1.06, -1.02, 0, -1.08])
    assert sample.versions.tolist() == [0, 0, 3, 3, 0, 3] and sample.segment == 0


def test_a_rewritten_history_starts_a_segment():
    """Each sampled token is trained once, where it was sampled; the rewritten history is context."""
    turns = [turn([4], [6, 2]), turn([7], [8], continues=True), turn([4, 6, 9], [3])]
    first, second = to_samples(group_of((1.0, turns)))
    assert first.token_ids.tolist() == [4, 6, 2, 7, 8] and second.token_ids.tolist() == [4, 6, 9, 3]
    assert second.loss_mask.tolist() == [False, False, False, True] and (first.segment, second.segment) == (0, 1)


def test_turns_survive_a_checkpoint():
    group = group_of((1.0, [turn([4], [6], tool=-0.5), turn([7], [8], continues=True)]))
    rollouts = Rollouts(groups=[group], dropped=0, tokens=2, seconds_scoring=0.0)
    stored = rollouts_to_json(rollouts)
    assert rollouts_from_json(stored, [group.prompt]).groups[0].trajectories == group.trajectories


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("reduction", ["token", "prompt", "sequence", "sequence_sum", "constant"])
def test_a_weight_does_not_depend_on_the_cut(reduction: Reduction, cuts: tuple[int, ...]):
    """Two attempts of 12 tokens, one of them in 6 turns: a token weighs the same however the turns are cut."""
    turns = [turn([9], [1, 2], continues=bool(n) and n not in cuts) for n in range(6)]
    group = group_of((1.0, turns), (0.0, [turn([9], list(range(12)))]))
    samples = to_samples(group)
    assert len(samples) == len(cuts) + 2
    weights = reduction_weights(samples, reduction, max_tokens=20)
    expected = {"token": 1 / 24, "prompt": 1 / 24, "sequence": 1 / 24, "sequence_sum": 1 / 2, "constant": 1 / 40}
    assert weights == pytest.approx([expected[reduction]] * len(samples))


def test_a_prompt_drawn_twice_has_attempts_of_its_own():
    one = group_of((1.0, [turn([1], [2, 3])]))
    weights = reduction_weights([*to_samples(one), *to_samples(one)], "sequence", max_tokens=8)
    assert weights == pytest.approx([1 / 4, 1 / 4])


def test_turn_rewards_make_a_group_informative():
    equal = [turn([1], [2]), turn([1], [2], continues=True)]
    earlier = [turn([1], [2], progress=0.5), turn([1], [2], continues=True, progress=-0.5)]
    assert not informative(group_of((1.0, equal), (1.0, equal)))
    assert informative(group_of((1.0, equal), (1.0, earlier))) and informative(group_of((1.0, equal), (0.0, equal)))
    assert informative(group_of((1.0, [turn([1], [2])]), (1.0, earlier)))


def attempt(*turns: tuple[int, float]) -> TokenRewards:
    """(sampled tokens, reward on the last of them) of each turn."""
    values = [0.0] * sum(n for n, _ in turns)
    place = -1
    for n, reward in turns:
        place += n
        values[place] = reward
    stream = torch.tensor(values, dtype=torch.float64)
    return TokenRewards(streams={"outcome": stream}, turns=tuple(n for n, _ in turns))


def test_turn_to_go_compares_equal_turns():
    """A first turn that pays all attempts 1 pushes no later token: reward_to_go gives the second turn -1.5 and -0.5."""
    group = [attempt((2, 1.0), (1, 0.0)), attempt((1, 1.0), (2, 1.0))]
    assert [a.tolist() for a in TurnToGo()([group])[0]] == [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
    assert [a.tolist() for a in RewardToGo()([group])[0]] == [[-0.5, -0.5, -1.5], [0.5, -0.5, -0.5]]
    scaled = TurnToGo(divide_by_std=True)([group])[0]
    assert [a.tolist() for a in scaled] == [[-1.0] * 3, [1.0] * 3]


def test_the_longest_attempt_is_not_compared_with_itself():
    """Turn 2 is had by two attempts, turn 3 by one: its baseline is that of turn 2."""
    group = [attempt((1, 0.0)), attempt((1, 0.0), (1, 1.0)), attempt((1, 0.0), (1, 0.0), (1, 3.0))]
    first, second, third = TurnToGo()([group])[0]
    assert first.tolist() == pytest.approx([-4 / 3])
    assert second.tolist() == pytest.approx([1 - 4 / 3, 1 - 2]) and third.tolist() == pytest.approx([5 / 3, 1, 1])


def conversations() -> list[TrajectoryGroup]:
    """Two groups of attempts that branch: continued turns, rewritten histories, and single turns."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 40, (count,), generator=generator).tolist()

    groups = []
    for id in range(2):
        prompt, attempts = tokens(9), []
        for number in range(3):
            first, said = turn(prompt, tokens(4)), tokens(3)
            second = turn(said, tokens(5), continues=True, step=0.1 * number)
            history = [*prompt, *first.completion.token_ids, *said[:1]]
            attempts.append((float(number == 1), [first, second, turn([*history, *tokens(2)], tokens(3))]))
        groups.append(group_of(*attempts, id=id))
    return groups


def one_a_turn(group: TrajectoryGroup, cut: Callable[[int], bool] = lambda number: True) -> TrajectoryGroup:
    """The same attempts with a segment a turn, each with its whole prompt; or cut before the turns that `cut` names."""
    attempts = []
    for t in group.trajectories:
        turns, read = [], list[int]()
        for number, own in enumerate(t.turns):
            read = [*read, *own.context_ids] if own.continues else list(own.context_ids)
            continues = own.continues and not cut(number)
            context = own.context_ids if continues else tuple(read)
            turns.append(Turn(context_ids=context, completion=own.completion, continues=continues, rewards=own.rewards))
            read += own.completion.token_ids
        attempts.append((t.reward, turns))
    return group_of(*attempts, id=group.prompt.id)


def gradient(
    folder: Path, groups: list[TrajectoryGroup], reduction: Reduction, share: bool
) -> tuple[torch.Tensor, int]:
    """Gradient of one CISPO batch, and the tokens that the policy reads."""
    algorithm = resolve(ALGORITHMS["cispo"], AlgorithmSection(advantage="turn_to_go"))
    samples: list[Sample] = [s for group in groups for s in to_samples(group)]
    samples = with_advantages(groups, samples, algorithm)
    (batches,) = pack(samples, reduction=reduction, max_tokens=16, tokens_per_micro_batch=200, share_prompts=share)
    learner = Learner(str(folder), LearnerConfig())
    learner.forward_backward(batches, CISPO)
    read = sum(len(mb.tokens) if mb.unique_index is None else len(mb.unique_index) for mb in batches)
    return torch.cat([g.flatten() for g in learner.rank.optimizer.gradients()]), read


@pytest.mark.parametrize("reduction", ["token", "sequence_sum", "constant"])
def test_the_gradient_does_not_depend_on_the_cuts(tmp_path: Path, reduction: Reduction):
    """Forked attempts, each split in its own way: the advantage is the attempt's, and so is the denominator."""
    save_policy(init_policy(MINIMAX, seed=1), tmp_path)
    groups = conversations()
    split = [one_a_turn(groups[0], lambda number: number == 1), groups[1]]
    assert sum(len(t.segments) for g in split for t in g.trajectories) > sum(
        len(t.segments) for g in groups for t in g.trajectories
    )
    one, most = gradient(tmp_path, groups, reduction, share=False)
    other, read = gradient(tmp_path, split, reduction, share=False)
    assert read > most and float(one.abs().max()) > 1e-3
    assert float((one - other).abs().max()) <= 1e-6 * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("reduction", ["prompt", "sequence"])
def test_merged_turns_and_the_prefix_tree_give_the_same_gradient(tmp_path: Path, reduction: Reduction):
    """Float32: sums in another order; a sample a turn is the reference."""
    save_policy(init_policy(MINIMAX, seed=1), tmp_path)
    groups = conversations()
    reference, most = gradient(tmp_path, [one_a_turn(group) for group in groups], reduction, share=False)
    merged, fewer = gradient(tmp_path, groups, reduction, share=False)
    tree, fewest = gradient(tmp_path, groups, reduction, share=True)
    assert fewest < fewer < most
    largest = float(reference.abs().max())
    assert largest > 1e-3
    assert float((merged - reference).abs().max()) <= 1e-6 * max(1.0, largest)
    assert float((tree - reference).abs().max()) <= 1e-6 * max(1.0, largest)
