"""The buffer between sampling and learning: the bound on staleness, the order, and its state in a checkpoint.

Time is simulated: the ends of sampling are moments on a clock, without waiting, so that thousands of schedules run.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.rollout.buffer import Buffer
from cispo.rollout.rollout import Rollouts
from cispo.types import Completion, FinishReason, Prompt, Trajectory, TrajectoryGroup, Turn

PROMPTS = [Prompt(id=i, messages=({"role": "user", "content": str(i)},)) for i in range(2000)]


def rollouts(prompts: Sequence[Prompt], version: int) -> Rollouts:
    """One attempt a prompt, sampled by `version`."""
    completion = Completion(
        token_ids=(5, 9), logprobs=(-0.1, -0.7), finish_reason=FinishReason.STOP, versions=(version, version)
    )
    groups = [
        TrajectoryGroup(
            prompt=p,
            trajectories=(
                Trajectory(
                    group_id=p.id,
                    index=0,
                    turns=(Turn(context_ids=(4,), completion=completion, rewards={"time": -0.1}),),
                    text="x",
                    reward=1 / 3,
                    rewards={"exact": 1 / 3},
                    extra={"note": "why"},
                ),
            ),
        )
        for p in prompts
    ]
    return Rollouts(groups=groups, dropped=0, tokens=2, seconds_scoring=0.1)


@dataclass
class Simulation:
    """Engines that take random times, and a learner in between that takes random times too."""

    buffer: Buffer = field(init=False)
    durations: random.Random
    batch: int
    max_staleness: int
    window: int
    version: int = 1
    clock: float = 0.0
    taken: list[tuple[int, int, int]] = field(default_factory=list)
    """(prompt, version that sampled, version that trained)."""
    sleeping: list[tuple[float, asyncio.Event]] = field(default_factory=list)
    cursor: int = 0

    def __post_init__(self) -> None:
        self.buffer = Buffer(
            produce=self.produce,
            next_prompts=self.next_prompts,
            batch=self.batch,
            max_staleness=self.max_staleness,
            window=self.window,
        )

    def next_prompts(self, count: int) -> list[Prompt]:
        self.cursor += count
        return PROMPTS[self.cursor - count : self.cursor]

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self.sleeping.append((self.clock + seconds, event))
        await event.wait()

    async def produce(self, prompts: Sequence[Prompt], ticket: int) -> Rollouts:
        version = self.version
        # Some completions are far longer than most.
        await self.sleep(self.durations.choice([0.1, 1.0, 1.0, 1.0, 30.0]) * self.durations.random())
        return rollouts(prompts, version)

    async def drive(self, until: asyncio.Future | None, at: float | None = None) -> None:
        """Moves the clock until a future is done, or to a moment."""
        while True:
            for _ in range(6):  # yields to all tasks that are ready
                await asyncio.sleep(0)
            if until is not None and until.done():
                return
            due = min((moment for moment, _ in self.sleeping), default=None)
            if at is not None and (due is None or due > at):
                self.clock = at
                return
            assert due is not None, "nothing runs and nothing is done: a deadlock"
            self.clock = max(self.clock, due)
            for entry in [e for e in self.sleeping if e[0] <= self.clock]:
                self.sleeping.remove(entry)
                entry[1].set()

    async def step(self, left: int) -> list[int]:
        taking = asyncio.ensure_future(self.buffer.take(self.batch, version=self.version, left=left))
        await self.drive(taking)
        groups = taking.result().groups
        for group in groups:
            self.taken.append((group.prompt.id, group.trajectories[0].turns[0].completion.versions[0], self.version))
        await self.drive(None, self.clock + self.durations.random() * 3)  # the learner works
        self.version += 1
        return [group.prompt.id for group in groups]


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    max_staleness=st.integers(0, 4),
    share=st.floats(0, 1),
    steps=st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_staleness_never_exceeds_the_bound(seed: int, batch: int, max_staleness: int, share: float, steps: int):
    window = int(share * max_staleness * batch)

    async def run() -> Simulation:
        simulation = Simulation(random.Random(seed), batch, max_staleness, window)
        for step in range(steps):
            assert len(await simulation.step(left=(steps - step) * batch)) == batch
        await simulation.buffer.close()
        return simulation

    simulation = asyncio.run(run())
    lags = [trained - sampled for _, sampled, trained in simulation.taken]
    assert min(lags) >= 0 and max(lags) <= max_staleness
    prompts = [prompt for prompt, _, _ in simulation.taken]
    assert sorted(prompts) == list(range(steps * batch)), "every prompt once, none beyond the last step"
    for place, prompt in enumerate(prompts):
        overtaken = [other for other in prompts[place + 1 :] if other < prompt - window - batch]
        assert not overtaken, "it was taken long before prompts that were submitted earlier"
    if max_staleness == 0:
        assert prompts == sorted(prompts) and set(lags) == {0}


def test_sampling_does_run_ahead_and_short_ones_do_overtake():
    """The freedom within the bound is used: lags above 0, and with a window another order than without."""

    async def order(window: int) -> tuple[list[int], float, float]:
        simulation = Simulation(random.Random(3), 4, 2, window)
        for step in range(20):
            await simulation.step(left=(20 - step) * 4)
        await simulation.buffer.close()
        lags = [trained - sampled for _, sampled, trained in simulation.taken]
        return [p for p, _, _ in simulation.taken], sum(lags) / len(lags), simulation.clock

    strict, lag, seconds = asyncio.run(order(0))
    free, _, sooner = asyncio.run(order(4))
    assert strict == sorted(strict) and lag > 0.5
    assert free != sorted(free) and sooner < seconds


def test_a_checkpoint_keeps_what_is_finished_and_samples_the_rest_again():
    async def run() -> None:
        first = Simulation(random.Random(2), 4, 2, 0)
        await first.step(left=40)
        state = json.loads(json.dumps(first.buffer.state()))
        finished = [t for t in first.buffer.tickets if t.result.done()]
        assert 0 < len(finished) < len(first.buffer.tickets), "some of each"
        second = Simulation(random.Random(2), 4, 2, 0, version=first.version, cursor=first.cursor)
        second.buffer.restore(state, prompts=PROMPTS, version=second.version)
        for before, after in zip(finished, second.buffer.tickets, strict=False):
            assert after.result.result() == before.result.result(), "every number and text as it was"
        assert {p.id for t in second.buffer.tickets for p in t.prompts} == {
            p.id for t in first.buffer.tickets for p in t.prompts
        }
        for step in range(9):
            await second.step(left=(9 - step) * 4)
        assert sorted(p for p, _, _ in first.taken + second.taken) == list(range(40))
        assert max(trained - sampled for _, sampled, trained in second.taken) <= 2
        await first.buffer.close()
        await second.buffer.close()

    asyncio.run(run())


def test_an_error_ends_the_wait_at_once():
    """Also the error of a ticket that is not due, while the one due never ends."""

    async def produce(prompts: Sequence[Prompt], ticket: int) -> Rollouts:
        if ticket == 3:
            raise RuntimeError("the reward broke")
        await asyncio.sleep(3600)
        return rollouts(prompts, 1)

    async def run() -> None:
        buffer = Buffer(produce=produce, next_prompts=lambda n: PROMPTS[:n], batch=2, max_staleness=1)
        with pytest.raises(RuntimeError, match="the reward broke"):
            await asyncio.wait_for(buffer.take(2, version=1, left=100), 10)
        await buffer.close()

    asyncio.run(run())
