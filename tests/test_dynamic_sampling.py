"""Dynamic sampling: groups of equal rewards are replaced by further prompts, within bounds. The engine is scripted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.choice import resolve
from cispo.batch.samples import informative
from cispo.controller import Controller
from cispo.output.checkpoint import CheckpointFolder, CheckpointWriter
from cispo.output.folder import RunLog
from cispo.output.screen import Screen
from cispo.recipe.load import parse_recipe
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.recipe.schema import Recipe
from cispo.rollout.prompt_source import PromptSource
from cispo.rollout.prompts import build_prompts
from cispo.rollout.renderer import Renderer, renderer_of
from cispo.rollout.rewards import RewardFunction, RewardRunner
from cispo.rollout.rollout import Rollouts, sampling_of
from cispo.runtime.interrupts import Interrupts
from cispo.types import Completion, FinishReason, Sampling
from cispo.workers import Workers

ROOT = Path(__file__).parents[1]
GROUP = 4


class ScriptedWorkers:
    """Answers a prompt N> right in every attempt where `mixed(N)` is False, else in every other attempt."""

    def __init__(self, renderer: Renderer, mixed: Callable[[int], bool]) -> None:
        self.renderer, self.mixed = renderer, mixed
        self.version = 1
        self.calls: list[int] = []
        self.seeds: list[int] = []

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        self.calls.append(len(prompts) // GROUP)
        self.seeds.append(seed)
        return [self._answer(ids, index % GROUP) for index, ids in enumerate(prompts)]

    def _answer(self, ids: list[int], index: int) -> Completion:
        number = int(self.renderer.decode(ids).rstrip(">"))
        text = "1" if index % 2 or not self.mixed(number) else "0"
        tokens = tuple(self.renderer.tokenizer.encode(text, add_special_tokens=False)) + self.renderer.eos_ids[:1]
        return Completion(
            token_ids=tokens,
            logprobs=(-1.0,) * len(tokens),
            finish_reason=FinishReason.STOP,
            versions=(1,) * len(tokens),
        )


def recipe(**train: int) -> Recipe:
    return parse_recipe(
        {
            "policy": {"config": {}, "tokenizer": str(ROOT / "recipes" / "tokenizers" / "chars")},
            "rollout": {"prompts_per_step": 6, "group_size": GROUP, "max_context": 16, "max_tokens": 4},
            "algorithm": {"overlong_buffer": 0},
            "train": train,
        }
    )


def sampled(
    tmp_path: Path, mixed: Callable[[int], bool], *, rounds: int, **train: int
) -> tuple[Rollouts, list, Controller, list[int]]:
    """One step's rollouts, the groups that are kept, the controller and the prompts of each round."""
    keys = recipe(**train)
    renderer = renderer_of(keys)
    workers = ScriptedWorkers(renderer, mixed)
    rows = [{"prompt": f"{n}>", "answer": "1"} for n in range(60)]
    rewards = RewardRunner([RewardFunction(fn="rewards.exact:exact_match")])
    with contextlib.closing(rewards), contextlib.closing(RunLog(tmp_path)) as log:
        controller = Controller(
            recipe=keys,
            algorithm=resolve(ALGORITHMS["dapo"], AlgorithmSection(dynamic_sampling=rounds)),
            workers=cast(Workers, workers),
            renderer=renderer,
            sampling=sampling_of(keys, renderer),
            rewards=rewards,
            train_prompts=PromptSource(build_prompts(rows, None, "data"), seed=0, shuffle=False),
            held_out=[],
            log=log,
            screen=Screen(Console(quiet=True)),
            checkpoints=CheckpointWriter(
                folder=CheckpointFolder(tmp_path, keep=1),
                workers=cast(Workers, workers),
                save_tokenizer=renderer.tokenizer.save_pretrained,
            ),
            interrupts=Interrupts(print),
        )
        rollouts = asyncio.run(controller.sample())
    return rollouts, controller.kept(rollouts), controller, workers.calls


def test_the_batch_is_full(tmp_path: Path):
    """One in three groups is informative: further rounds ask for as many prompts as that share needs, at most P."""
    rollouts, kept, controller, calls = sampled(tmp_path, lambda n: n % 3 == 0, rounds=10)
    assert len(kept) == 6 and all(map(informative, kept))
    assert [g.prompt.id for g in kept] == [0, 3, 6, 9, 12, 15], "in the order of the data, none skipped"
    assert calls[0] == 6 and all(n <= 6 for n in calls) and rollouts.rounds == len(calls) > 1
    assert controller.totals.prompts == sum(calls) == len(rollouts.groups)
    assert controller.totals.completions == GROUP * sum(calls)


def test_the_bound_holds(tmp_path: Path):
    rollouts, kept, _, calls = sampled(tmp_path, lambda n: n == 4, rounds=3)
    assert calls == [6, 6, 6, 6] and rollouts.rounds == 4 and [g.prompt.id for g in kept] == [4]


def test_a_batch_that_is_full_at_once_is_left_alone(tmp_path: Path):
    _, kept, _, calls = sampled(tmp_path, lambda n: True, rounds=3)
    assert calls == [6] and len(kept) == 6


@pytest.mark.parametrize(("budget", "expected"), [(9, [6, 3]), (6, [6]), (4, [4])])
def test_no_more_prompts_than_the_budget(tmp_path: Path, budget: int, expected: list[int]):
    _, _, controller, calls = sampled(tmp_path, lambda n: n > 50, rounds=10, max_prompts=budget)
    assert calls == expected and controller.totals.prompts == budget


def test_different_rounds_sample_differently(tmp_path: Path):
    """Each round has a seed of its own; the first round's is that of a run without dynamic sampling."""
    (_, _, several, _), (_, _, one, _) = (
        sampled(tmp_path, lambda n: n == 4, rounds=2),
        sampled(tmp_path, lambda n: True, rounds=0),
    )
    seeds, alone = (cast(ScriptedWorkers, c.workers).seeds for c in (several, one))
    assert len(set(seeds)) == 3 and alone == seeds[:1]
