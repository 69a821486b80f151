"""Agents and environments of other libraries, unmodified: openai-agents, verifiers in a virtual environment of its own
(its Python is named by VERIFIERS_PYTHON), and GEM. Skipped where the library is missing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cispo.agents.episodes import Episodes
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, FinishReason, Prompt, Sampling, Trajectory
from rewards import chase
from tests.test_end_to_end import cispo, metrics
from tests.test_episodes import CHARS, playing

SDK = {"use": "tests.sdk_agents:walk", "tool_parser": "tests.sdk_agents:parse"}
VERIFIERS = {"use": "tests.verifiers_agent:solve", "args": {"taskset": "verifiers-chase"}}
BOUNDS: dict[str, Any] = {"max_turns": 8, "timeout": 60.0}


def needs_verifiers() -> None:
    if not os.environ.get("VERIFIERS_PYTHON"):
        pytest.skip("VERIFIERS_PYTHON names no Python of a virtual environment with verifiers")


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def walker(text: str) -> str:
    """The right reply to a conversation of `chase`."""
    hops, start = re.findall(r"^(\d)(\w)\?", text)[0]
    found = re.findall(r">(\w)", text)
    left = int(hops) - len(found)
    key = found[-1] if found else start
    return f"{left}:{key}" if left else f"={key}"


def play(episodes: Episodes, renderer: Renderer, asked: list[Prompt], say: Callable[[str], str]) -> list[Trajectory]:
    """Two attempts a prompt by a policy that answers the text of its prompts."""

    async def generate(prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        replies = [tuple(renderer.encode_completion(say(renderer.decode_reply(ids)))) for ids in prompts]
        stop = FinishReason.STOP
        return [
            Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=stop, versions=(1,) * len(ids))
            for ids in replies
        ]

    sampling = Sampling(max_tokens=30, eos_ids=renderer.eos_ids)
    groups = asyncio.run(episodes.play(asked, generate, group_size=2, sampling=sampling, seed=5))
    return [t for group in groups for t in group.trajectories]


def walks(renderer: Renderer, **env: Any) -> list[Trajectory]:
    rows = list(chase.problems(6, seed=4))
    prompts = [
        Prompt(id=n, messages=({"role": "user", "content": row["prompt"]},), columns=row) for n, row in enumerate(rows)
    ]
    with playing(renderer, **{**BOUNDS, **env}) as episodes:
        return play(episodes, renderer, prompts, walker)


@pytest.mark.parametrize("library", ["openai-agents", "verifiers"])
def test_loops_of_others_give_the_tokens_of_our_environment(library: str, renderer: Renderer):
    """Calls of an SDK's tool, and turns of a foreign environment: one sequence an attempt, and the same one."""
    if library == "verifiers":
        needs_verifiers()
    else:
        pytest.importorskip("agents")
    ours = walks(renderer, use="rewards.chase:Chase")
    theirs = walks(renderer, **(VERIFIERS if library == "verifiers" else SDK))
    assert [(t.status, dict(t.turns[-1].rewards)) for t in theirs] == [("done", {"agent": 1.0})] * 12
    chains = [
        [[(turn.context_ids, turn.completion.token_ids, turn.continues) for turn in t.turns] for t in attempts]
        for attempts in (ours, theirs)
    ]
    assert chains[0] == chains[1] and max(len(t.turns) for t in ours) > 3


def test_a_game_of_gem_is_played(renderer: Renderer):
    """Guesses within the hints, in the middle; the group's seed gives both attempts one number."""
    pytest.importorskip("gem")

    def halves(text: str) -> str:
        low, high = 1, 10
        for hint, number in re.findall(r"number is (higher|lower) than (\d+)", text):
            low, high = (int(number) + 1, high) if hint == "higher" else (low, int(number) - 1)
        return f"\\boxed{{{(low + high) // 2}}}"

    prompts = [Prompt(id=n, messages=({"role": "user", "content": ">"},), columns={}) for n in range(4)]
    with playing(renderer, context=900, **{**BOUNDS, "use": "tests.gem_game:Game", "max_turns": 5}) as episodes:
        attempts = play(episodes, renderer, prompts, halves)
    assert {t.status for t in attempts} == {"done"}
    assert all(sum(turn.rewards.get("step", 0.0) for turn in t.turns) == 1.0 for t in attempts)
    numbers = [t.text for t in attempts]
    assert numbers[::2] == numbers[1::2] and len(set(numbers)) > 1


def rises(folder: Path, *keys: str, steps: int) -> Iterator[float]:
    """Mean reward of the first and of the last three steps of a run on the torch engine."""
    own = ["runtime=local", "rollout.engine=torch", "learner.ranks=1", "eval=null", f"train.steps={steps}"]
    cispo("train", "chase", f"output_dir={folder}", *own, *keys, timeout=900)
    rewards = [row["reward/turns"] for row in metrics(folder / "chase") if "reward/turns" in row]
    return map(statistics.mean, (rewards[:3], rewards[-3:]))


def keys(env: dict[str, Any]) -> str:
    """An env section as a change of the command line."""
    return json.dumps({**env, **BOUNDS})[1:-1]


FEWER = ["sft.steps=80", "rollout.prompts_per_step=8", "rollout.group_size=8"]


@pytest.mark.slow
def test_an_agent_of_the_openai_agents_sdk_trains(tmp_path: Path):
    pytest.importorskip("agents")
    first, last = rises(tmp_path, *FEWER, f"env={{{keys(SDK)}}}", steps=24)
    assert last > first + 0.15


@pytest.mark.slow
def test_an_environment_of_verifiers_trains(tmp_path: Path):
    needs_verifiers()
    first, last = rises(tmp_path, *FEWER, f"env={{{keys(VERIFIERS)}}}", steps=24)
    assert last > first + 0.15


@pytest.mark.slow
def test_a_game_of_gem_trains(tmp_path: Path):
    """Its rewards of turns are learned from, with tokens on which engine and learner agree."""
    pytest.importorskip("gem")
    rises(
        tmp_path,
        "sft.data={source: 'tests.gem_game:demonstrations', args: {size: 600, seed: 1}}",
        "sft.steps=40",
        "sft.batch_size=16",
        "data={source: 'tests.gem_game:problems', args: {size: 2000}}",
        "env={use: 'tests.gem_game:Game', max_turns: 5}",
        "rollout.max_context=900",
        "policy.config.max_position_embeddings=1024",
        "rollout.max_tokens=14",
        "reward.functions=[{fn: 'rewards.agent:earned', weight: 0.0}]",
        "rollout.prompts_per_step=4",
        "rollout.group_size=8",
        steps=4,
    )
    for row in metrics(tmp_path / "chase")[1:]:
        assert row["agent/status_done"] > 0.7 and row["agent/turns_mean"] > 2 and row["reward/turns"] > 0.3
        assert row["learner/updates"] == 1 and row["grad_norm"] > 0 and row["mismatch/logprob_max"] < 1e-4
