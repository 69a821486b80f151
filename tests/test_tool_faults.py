"""Tools that are broken in every way of `scripts/tool_faults.py`, in one batch with sound ones."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from cispo.agents.contract import Reply, Status, Step, ToolCall
from cispo.agents.environment import Identity
from cispo.agents.session_pool import pool_of
from cispo.agents.session_process import SessionError
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, Prompt, Sampling, Trajectory

SCRIPTS = Path(__file__).parents[1] / "scripts"
SOUND = 3


@pytest.fixture(scope="module")
def trials() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module("inject_tool_faults")


def called(name: str, **arguments: object) -> Reply:
    return Reply(text="", calls=(ToolCall(id="call_0", name=name, arguments=arguments),))


class Policy:
    """Attempt k meets fault k at its second turn, those behind them none; each then goes on."""

    def __init__(self, trials: ModuleType, renderer: Renderer, kinds: list[str]) -> None:
        self.script = trials.Policy(renderer, "", 0, set(), tools=True)
        self.kinds, self.turn = kinds, 0

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        self.turn += 1
        return [self.script._completion(self.said(number)) for number in range(len(prompts))]

    def said(self, number: int) -> str:
        if self.turn == 2 and number < len(self.kinds):
            return f"[broken {self.kinds[number]}]"
        return f"[count {number}/{self.turn}]"


def played(trials: ModuleType, kinds: list[str], size: int) -> list[Trajectory]:
    renderer = Renderer(load_tokenizer(trials.CHARS))
    policy = Policy(trials, renderer, kinds)
    prompt = Prompt(id=0, messages=({"role": "user", "content": "go"},))
    with trials.floods_go_nowhere(), trials.playing(renderer, tools=True, timeout=2.0) as episodes:
        playing = episodes.play([prompt], policy.generate, group_size=size, sampling=trials.SAMPLING, seed=0)
        [group] = asyncio.run(asyncio.wait_for(playing, 120.0))
    return list(group.trajectories)


def test_a_request_that_a_stuck_process_does_not_read(trials: ModuleType):
    """It fills the socket while a loop in C holds the lock: the loop ends by its time, and another process answers."""

    async def ask() -> Sequence[object]:
        with contextlib.closing(
            pool_of(["tool_faults:count", "tool_faults:broken"], {}, "env.tools", timeout=1.0, workers=1)
        ) as pool:
            stuck, large = pool.open({}, Identity(0, 0)), pool.open({}, Identity(0, 1))
            await asyncio.gather(stuck.start(), large.start())
            looping = asyncio.create_task(stuck.step(called("broken", kind="loops-in-c")))
            await asyncio.sleep(0.4)
            return await asyncio.gather(
                looping, large.step(called("count", word="x" * 5_000_000)), return_exceptions=True
            )

    first, second = asyncio.run(asyncio.wait_for(ask(), 120.0))
    assert isinstance(first, SessionError) and first.timed_out
    assert isinstance(second, tuple) and isinstance(second[0], Step) and "1 xxx" in str(second[0].observation)[:80]


def test_each_fault_once(trials: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """No hang, no attempt without its end, no process left; the state of sound calls before and behind is whole."""
    kinds = list(trials.FAULTS)
    assert len(kinds) >= 12
    monkeypatch.setenv(trials.MARK, f"test {os.getpid()} {time.monotonic()}")
    attempts = played(trials, kinds, len(kinds) + SOUND)
    assert [t.index for t in attempts] == list(range(len(kinds) + SOUND))
    assert {t.status for t in attempts} == {str(Status.TURNS)}, "with on_error: tell an attempt goes on"
    told = {}
    for number, t in enumerate(attempts):
        answers = [str(m["content"]) for m in t.messages if m["role"] == "tool"]
        counts = [text for n, text in enumerate(answers) if n != 1 or number >= len(kinds)]
        turns = [1, 2, 3, 4] if number >= len(kinds) else [1, 3, 4]
        assert counts == [f"{n} {number}/{turn}" for n, turn in enumerate(turns, start=1)]
        told[number] = answers[1]
    errors = {kinds[number]: told[number] for number in range(len(kinds)) if told[number].startswith("error: ")}
    assert errors["sleeps-forever"] == errors["loops-in-c"] == "error: broken did not finish within 2 s"
    assert errors["crashes"] == "error: broken crashed its process (SIGSEGV)"
    assert "RecursionError" in errors["recurses"] and "ended its process" in errors["exits"]
    assert len(told[kinds.index("returns-megabytes")]) < 21_000
    assert not trials.marked(os.environ[trials.MARK])
