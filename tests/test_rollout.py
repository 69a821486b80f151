"""The three stages of a rollout, alone and together; and rollouts as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cispo.evaluate import evaluate, gaps
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rewards import RewardFunction, RewardRunner
from cispo.rollout.rollout import (
    RolloutSetup,
    overlong_penalty,
    roll_out,
    rollouts_from_json,
    rollouts_to_json,
    sample,
    score,
    shape,
)
from cispo.types import Completion, FinishReason, Prompt, Sampling

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
PROMPTS = [
    Prompt(id=i, messages=({"role": "user", "content": f"{i}>"},), columns={"answer": str(i)} if i != 5 else {})
    for i in (3, 5, 4)
]
SAMPLING = Sampling(max_tokens=4, eos_ids=(2,))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


@pytest.fixture
def rewards() -> Iterator[RewardRunner]:
    """1 for the answer; prompt 5 has none, and its group is dropped."""
    runner = RewardRunner([RewardFunction(fn="tests.test_rollout:reward_of")], on_error="drop_group")
    yield runner
    runner.close()


def reward_of(completion: str, **columns: str) -> tuple[float, dict[str, str]]:
    return float(completion == columns["answer"]), {"said": completion}


def reward_if_known(completion: str, answer: str | None = None, **_: object) -> float | None:
    """None without an answer, and for completions of two characters."""
    return None if answer is None or len(completion) == 2 else float(completion == answer)


def nearly_right(completion: str, **_: object) -> float:
    return sum([0.1] * 10)


def longer_is_better(completion: str, **_: object) -> float:
    return float(len(completion))


class Engine:
    """Attempt g at the prompt "N>" is N, N+1, ... with g further digits."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.calls: list[tuple[list[list[int]], Sampling, int]] = []

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        self.calls.append((prompts, sampling, seed))
        return [self._answer(prompts, i) for i in range(len(prompts))]

    def _answer(self, prompts: list[list[int]], i: int) -> Completion:
        attempt = prompts[:i].count(prompts[i])
        number = int(self.renderer.decode(prompts[i]).rstrip(">"))
        text = "".join(str(number + k) for k in range(attempt + 1))
        ids = (*self.renderer.render([{"role": "user", "content": text}]), 2)
        return Completion(
            token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=FinishReason.STOP, versions=(1,) * len(ids)
        )


def test_samples_are_unscored_groups_in_order_from_one_call(renderer: Renderer):
    engine = Engine(renderer)
    groups = asyncio.run(sample(PROMPTS, engine.generate, renderer, group_size=2, sampling=SAMPLING, seed=7))
    ids = [renderer.render(prompt.messages) for prompt in PROMPTS]
    assert engine.calls == [([ids[0], ids[0], ids[1], ids[1], ids[2], ids[2]], SAMPLING, 7)]
    assert [group.prompt for group in groups] == PROMPTS
    assert [[t.text for t in group.trajectories] for group in groups] == [["3", "34"], ["5", "56"], ["4", "45"]]
    for prompt_ids, group in zip(ids, groups, strict=True):
        assert [(t.group_id, t.index) for t in group.trajectories] == [(group.prompt.id, 0), (group.prompt.id, 1)]
        assert [t.length for t in group.trajectories] == [2, 3]
        for t in group.trajectories:
            assert [turn.context_ids for turn in t.turns] == [tuple(prompt_ids)]
            assert (t.reward, t.rewards, t.extra) == (0.0, {}, {})


def test_scores_and_penalties_add_up(renderer: Renderer, rewards: RewardRunner):
    async def run():
        sampled = await sample(PROMPTS, Engine(renderer).generate, renderer, group_size=2, sampling=SAMPLING, seed=7)
        return sampled, await score(sampled, rewards)

    sampled, scored = asyncio.run(run())
    assert [group.prompt.id for group in scored] == [3, 4], "prompt 5 is dropped"
    for before, after in zip((sampled[0], sampled[2]), scored, strict=True):
        assert [t.turns for t in before.trajectories] == [t.turns for t in after.trajectories]
        assert [t.reward for t in after.trajectories] == [1.0, 0.0]
        assert [t.rewards for t in after.trajectories] == [{"reward_of": 1.0}, {"reward_of": 0.0}]
        assert [t.extra for t in after.trajectories] == [{"said": t.text} for t in before.trajectories]
    shaped = shape(scored, max_tokens=4, buffer=2, penalty=0.5)
    assert [t.reward for group in shaped for t in group.trajectories] == [1.0, -0.25] * 2
    assert [t.rewards for t in shaped[0].trajectories] == [t.rewards for t in scored[0].trajectories]
    assert shape(scored, max_tokens=4, buffer=0, penalty=0.5) == scored


def test_roll_out_is_the_three_in_a_row(renderer: Renderer, rewards: RewardRunner):
    setup = RolloutSetup(generate=Engine(renderer).generate, renderer=renderer, rewards=rewards)
    rollouts = asyncio.run(
        roll_out(PROMPTS, setup, group_size=3, sampling=SAMPLING, seed=7, overlong_buffer=2, overlong_factor=0.5)
    )
    assert (rollouts.dropped, rollouts.rounds, rollouts.tokens) == (1, 1, 3 * (2 + 3 + 4)), "dropped ones included"
    expected = [1.0, *(overlong_penalty(n, max_tokens=4, buffer=2, penalty=0.5) for n in (3, 4))]
    assert [[t.reward for t in group.trajectories] for group in rollouts.groups] == [expected] * 2
    assert rollouts.seconds_scoring > 0


def test_a_completion_that_no_function_applies_to_has_no_reward(renderer: Renderer):
    """Attempts are "3", "34", "345": the second has no reward, and prompt 5 has none at all."""
    rewards = RewardRunner([RewardFunction(fn="tests.test_rollout:reward_if_known")])
    setup = RolloutSetup(generate=Engine(renderer).generate, renderer=renderer, rewards=rewards)
    try:
        rollouts = asyncio.run(roll_out(PROMPTS, setup, group_size=3, sampling=SAMPLING, seed=7))
    finally:
        rewards.close()
    assert [(t.group_id, t.index, t.reward) for g in rollouts.groups for t in g.trajectories] == [
        (3, 0, 1.0), (3, 2, 0.0), (4, 0, 1.0), (4, 2, 0.0)
    ]  # fmt: skip
    assert (rollouts.dropped, rollouts.unscored) == (0, 5)
    again = rollouts_from_json(json.loads(json.dumps(rollouts_to_json(rollouts))), [*PROMPTS, *PROMPTS])
    assert again.unscored == 5 and (rollouts + rollouts).unscored == 10


def held_out(renderer: Renderer, *functions: str, samples: int) -> tuple[dict[str, float], str]:
    rewards = RewardRunner([RewardFunction(fn=f"tests.test_rollout:{f}") for f in functions], on_error="drop_group")
    setup = RolloutSetup(generate=Engine(renderer).generate, renderer=renderer, rewards=rewards)
    try:
        metrics, _ = asyncio.run(evaluate(PROMPTS, setup, samples=samples, sampling=SAMPLING, seed=7))
        return metrics, gaps(metrics, rewards)
    finally:
        rewards.close()


def test_held_out_accuracy_says_how_many_prompts_are_in_it(renderer: Renderer):
    metrics, sentence = held_out(renderer, "reward_of", samples=2)
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/pass@2"] == 1.0
    assert (metrics["eval/prompts"], metrics["eval/dropped"], metrics["eval/unjudged"]) == (2, 1, 0)
    assert "over 2 prompts and leaves out 1 held-out prompts: a reward failed" in sentence and "KeyError" in sentence


def test_a_judge_that_gives_none_is_not_a_wrong_answer(renderer: Renderer):
    metrics, sentence = held_out(renderer, "reward_if_known", "longer_is_better", samples=3)
    assert metrics["eval/accuracy"] == 0.5, "the first of two judged completions is right"
    assert (metrics["eval/prompts"], metrics["eval/dropped"], metrics["eval/unjudged"]) == (2, 1, 2)
    assert "eval/pass@3" not in metrics and "1 held-out prompts and 2 completions of others" in sentence
    metrics, sentence = held_out(renderer, "reward_if_known", samples=1)
    assert (metrics["eval/prompts"], metrics["eval/dropped"]) == (2, 1) and metrics["eval/accuracy"] == 1.0


def test_a_judge_is_satisfied_by_1_but_for_rounding(renderer: Renderer):
    metrics, sentence = held_out(renderer, "nearly_right", samples=1)
    assert sum([0.1] * 10) < 1 and metrics["eval/accuracy"] == 1.0 and sentence == ""


def test_without_rewards_every_reward_is_zero(renderer: Renderer):
    setup = RolloutSetup(generate=Engine(renderer).generate, renderer=renderer, rewards=None)
    rollouts = asyncio.run(roll_out(PROMPTS, setup, group_size=2, sampling=SAMPLING, seed=7))
    assert rollouts.dropped == 0 and len(rollouts.groups) == 3
    assert all(t.reward == 0 and not t.rewards for group in rollouts.groups for t in group.trajectories)


def test_json_and_back(renderer: Renderer, rewards: RewardRunner):
    """Every number and text, also from a file with fields that the types do not have."""
    setup = RolloutSetup(generate=Engine(renderer).generate, renderer=renderer, rewards=rewards)
    rollouts = asyncio.run(roll_out(PROMPTS, setup, group_size=2, sampling=SAMPLING, seed=7, overlong_buffer=3))
    dataset = [Prompt(id=i, messages=()) for i in range(3)] + [PROMPTS[0], PROMPTS[2]]
    stored: dict[str, Any] = json.loads(json.dumps(rollouts_to_json(rollouts)))
    assert rollouts_from_json(stored, dataset) == rollouts
    stored["unknown"] = 1
    for group in stored["groups"]:
        group["unknown"] = 1
        for trajectory in group["trajectories"]:
            trajectory["unknown"] = [1]
            for turn in trajectory["turns"]:
                turn["observation"], turn["completion"]["routed_experts"] = [], None
    restored = rollouts_from_json(stored, dataset)
    assert restored == rollouts and isinstance(restored.groups, list)
