"""Overlapping calls and updates in flight, on an engine that samples the version of its weights: through all events
every token is its own version. `test_updates_in_flight.py` adds real policies."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import deque
from collections.abc import Sequence
from threading import Thread
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.engines import serving
from cispo.engines.drafts import Draft
from cispo.engines.handle import EngineHandle
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.errors import UserError
from cispo.types import Completion, OnUpdate, RepetitionStop, Sampling
from cispo.weights.publish import FileMessage, WeightMessage
from tests.served import sampled

PLAIN = Sampling(max_tokens=6, eos_ids=(), repetition=RepetitionStop(run_length=0))
NEVER = 10**9


class Versions:
    """Samples the version of its weights as a token. `at_once` drafts run at a time; `delay` steps are in flight."""

    max_context = 1000

    def __init__(self, at_once: int = NEVER, delay: int = 0, max_sequences: int = 1000) -> None:
        self.at_once, self.delay, self.max_sequences = at_once, delay, max_sequences
        self.submitted: list[int] = []
        self.sampled = self.steps = 0
        self.weights: int | None = 0
        """None while they are of two versions."""
        self.drafts: list[Draft] = []
        self.flight: deque[list[tuple[Draft, int]]] = deque()
        self.recomputed: list[bool] = []
        self.fails_at = NEVER
        self.closed = False

    def submit(self, drafts: Sequence[Draft]) -> None:
        assert not any(draft.tokens or draft in self.drafts for draft in drafts)
        self.drafts += drafts
        self.submitted.append(len(drafts))
        assert len(self.drafts) <= self.max_sequences

    def step(self) -> list[Draft]:
        assert self.drafts or self.flight, "a step with nothing to do"
        assert self.weights is not None, "a step between two versions"
        self.steps += 1
        if self.steps >= self.fails_at:
            raise RuntimeError("the device is gone")
        self.flight.append([(draft, self.weights) for draft in self.drafts[: self.at_once]])
        return self._land() if len(self.flight) > self.delay else []

    def settle(self) -> list[Draft]:
        return [draft for _ in range(len(self.flight)) for draft in self._land()]

    def _land(self) -> list[Draft]:
        complete = []
        for draft, version in self.flight.popleft():
            if draft in self.drafts:
                last = len(draft.tokens) + 1 == draft.limit
                draft.extend([version], [-1.0], "length" if last else None)
                self.sampled += 1
                if last:
                    self.drafts.remove(draft)
                    complete.append(draft)
        return complete

    def drop(self, drafts: Sequence[Draft]) -> None:
        self.drafts = [draft for draft in self.drafts if draft not in drafts]

    def receive_weights(self, message: WeightMessage) -> None:
        assert not self.flight, "weights change under a step"
        self.weights = None
        assert isinstance(message, FileMessage)
        if message.path == "missing":
            raise UserError("the published weights missing do not exist")
        self.arrived = int(message.path)

    def finish_update(self, *, recompute: bool) -> None:
        assert self.arrived >= 0, "the weights lack a parameter"
        self.weights = self.arrived
        self.recomputed.append(recompute)

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        raise AssertionError

    def sleep(self) -> None:
        assert not self.flight

    def wake(self) -> None:
        pass

    def close(self) -> None:
        assert not self.drafts
        self.closed = True


async def update(engine: ServedEngine, version: int, mode: OnUpdate) -> int:
    lost = await engine.begin_update(mode)
    engine.load_weights(str(version))
    await turns(version % 10)  # few, and so many that the task of the steps finds nothing to do
    engine.finish_update(version)
    return lost


def call(engine: ServedEngine, count: int, tokens: int) -> asyncio.Task[list[Completion]]:
    return asyncio.ensure_future(engine.generate([[1]] * count, PLAIN, 0, [tokens] * count))


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def steps(core: Versions, count: int) -> None:
    while core.steps < count:
        await asyncio.sleep(0)


def check(completions: Sequence[Completion], mode: OnUpdate | None = None) -> None:
    for completion in completions:
        assert completion.token_ids == completion.versions == tuple(sorted(completion.versions))
        assert len(completion.logprobs) == len(completion.token_ids)
        assert mode not in ("wait", "abort") or len(set(completion.versions)) == 1


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    at_once=st.sampled_from([1, 3, NEVER]),
    delay=st.integers(0, 2),
    max_sequences=st.sampled_from([1, 5, 1000]),
)
def test_random_interleavings(seed: int, at_once: int, delay: int, max_sequences: int) -> None:
    """Calls, cancellations and updates at random moments: no hang, every token is its version, nothing is left."""
    rng, core = random.Random(seed), Versions(at_once, delay, max_sequences)
    engine = ServedEngine(core)
    mode = rng.choice([None, *get_args(OnUpdate)])

    async def run() -> None:
        waiting: list[tuple[asyncio.Task[list[Completion]], list[int]]] = []
        version, lost, cancelled = 0, 0, False
        for _ in range(rng.randrange(1, 30)):
            event = rng.random()
            if event < 0.4:
                limits = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 5))]
                task = asyncio.ensure_future(engine.generate([[1]] * len(limits), PLAIN, 0, limits))
                waiting.append((task, limits))
            elif event < 0.5 and waiting:
                waiting.pop(rng.randrange(len(waiting)))[0].cancel()
                cancelled = True
            elif event < 0.75:
                version += 1
                lost += await update(engine, version, mode or rng.choice(get_args(OnUpdate)))
            await turns(rng.randrange(24))
        total = 0
        for task, limits in waiting:
            completions = await task
            assert [len(c.token_ids) for c in completions] == limits
            check(completions, mode)
            total += sum(limits)
        assert engine.progress() == total + lost or cancelled
        await turns(9)
        assert not core.drafts and not core.flight and engine.version == version
        engine.sleep()
        engine.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert core.closed


def test_calls_share_steps_and_return_when_their_own_are_done() -> None:
    core = Versions()
    engine = ServedEngine(core)

    async def run() -> None:
        long, short = call(engine, 2, 9), call(engine, 3, 2)
        check(await short)
        assert not long.done() and core.steps < 9
        check(await long)

    asyncio.run(run())
    assert core.steps == 9


def test_the_loop_sleeps_after_each_step_only_where_a_call_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the main thread, as in an actor, with steps of 4 ms and a host that sleeps for 2 ms at least."""
    core = Versions()
    engine, slept, turned = ServedEngine(core), [], []

    def now() -> float:
        return 0.004 * core.steps + 0.002 * len(slept)

    clock = SimpleNamespace(sleep=lambda seconds: slept.append(core.steps), perf_counter=now)
    monkeypatch.setattr(serving, "time", clock)

    async def ticks() -> None:
        while True:
            turned.append(core.steps)
            await asyncio.sleep(0)

    async def run() -> None:
        ticking = asyncio.ensure_future(ticks())
        first = call(engine, 3, 300)
        await steps(core, 100)
        second = call(engine, 1, 15)
        check([*await first, *await second])
        ticking.cancel()

    thread = Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join()
    assert core.submitted == [3, 1] and core.steps == 300
    assert set(slept) >= {*range(5), *range(100, 105)}, "others may follow the call that has come"
    quiet = [step for step in slept if 20 <= step < 100 or step >= 120]
    assert 4 <= len(quiet) <= 6, "a hundredth of the time"
    assert max(turned.count(step) for step in range(1, 300) if step != 100) <= 4


def test_drafts_that_wait_for_room_begin_in_order_and_several_at_a_time() -> None:
    """A quarter of 8 places, or as many as wait."""
    core = Versions(max_sequences=8)
    engine = ServedEngine(core)

    async def run() -> None:
        first = asyncio.ensure_future(engine.generate([[1]] * 8, PLAIN, 0, [3, 4, 5, 6, 20, 20, 20, 20]))
        second, third = call(engine, 5, 3), call(engine, 1, 1)
        await second
        assert core.submitted == [8, 2, 2, 1, 1] and not first.done()
        check(await first + await second + await third)

    asyncio.run(run())
    assert core.steps == 20


def test_a_cancelled_call_takes_its_drafts_back() -> None:
    core = Versions()
    engine = ServedEngine(core)

    async def run() -> None:
        first, second = call(engine, 2, 50), call(engine, 1, 5)
        await steps(core, 2)
        first.cancel()
        await turns(1)
        assert len(core.drafts) == 1
        check(await second)
        assert first.cancelled()

    asyncio.run(run())
    assert core.steps == 5


def test_no_step_happens_during_an_update() -> None:
    core = Versions(delay=1)
    engine = ServedEngine(core)

    async def run() -> None:
        first = call(engine, 2, 20)
        await steps(core, 3)
        await engine.begin_update("keep")
        second, before, sampled = call(engine, 1, 3), core.steps, engine.progress()
        await turns(20)
        engine.load_weights("7")
        await turns(20)
        assert core.steps == before and engine.progress() == sampled, "steps in flight had come back before"
        assert await engine.begin_update("keep") == 0, "another try of the same update changes nothing"
        engine.finish_update(7)
        check(await first + await second)
        assert set((await second)[0].versions) == {7} and set((await first)[0].versions) == {0, 7}

    asyncio.run(run())
    assert core.recomputed == [False]


@pytest.mark.parametrize("mode", get_args(OnUpdate))
def test_an_update_treats_begun_drafts_by_its_mode(mode: OnUpdate) -> None:
    """Two drafts have begun, two wait for a place, and two more come while the update is beginning."""
    core = Versions(at_once=2)
    engine = ServedEngine(core)

    async def run() -> tuple[list[list[int]], int]:
        first = call(engine, 4, 6)
        await steps(core, 2)
        updating = asyncio.ensure_future(update(engine, 1, mode))
        await turns(1)
        second = call(engine, 2, 6)
        lost = await updating
        completions = await first + await second
        check(completions, mode)
        return [sorted(set(c.versions)) for c in completions], lost

    versions, lost = asyncio.run(run())
    old = {"wait": [0], "keep": [0, 1], "recompute": [0, 1], "abort": [1]}[mode]
    assert versions == [old] * 2 + [[1]] * 4
    assert (lost > 0) == (mode == "abort") and core.sampled == 6 * 6 + lost
    assert core.recomputed == [mode != "keep"]


def test_an_update_of_an_idle_engine_drops_what_was_computed() -> None:
    core = Versions()
    assert asyncio.run(update(ServedEngine(core), 1, "keep")) == 0 and core.recomputed == [True]


def test_an_update_that_is_given_up_lets_everything_go_on() -> None:
    core = Versions(at_once=1)
    engine = ServedEngine(core)

    async def run() -> None:
        first = call(engine, 2, 30)
        await steps(core, 2)
        beginning = asyncio.ensure_future(engine.begin_update("wait"))
        await turns(4)
        second = call(engine, 1, 2)
        beginning.cancel()
        check(await first + await second)
        assert beginning.cancelled()
        await update(engine, 1, "wait")

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("delay", [0, 1])
def test_a_failing_step_reaches_every_caller(delay: int) -> None:
    core = Versions(delay=delay)
    core.fails_at = 4
    engine = ServedEngine(core)

    async def run() -> None:
        calls = [call(engine, 2, 9), call(engine, 1, 30)]
        await steps(core, 2)
        beginning = asyncio.ensure_future(engine.begin_update("wait"))
        for task in (*calls, beginning):
            with pytest.raises(RuntimeError, match="the device is gone"):
                await task
        for late in (call(engine, 1, 1), engine.begin_update("keep")):
            with pytest.raises(RuntimeError, match="the device is gone"):
                await late

    asyncio.run(asyncio.wait_for(run(), 30))
    assert core.steps == 4


def test_a_torn_engine_samples_nothing_until_a_whole_update() -> None:
    core = Versions()
    engine = ServedEngine(core)

    async def run() -> None:
        running = call(engine, 1, 30)
        await steps(core, 2)
        await engine.begin_update("recompute")
        held = call(engine, 1, 3)
        await turns(1)
        with pytest.raises(UserError, match="missing"):
            engine.load_weights("missing")
        for task in (running, held, call(engine, 1, 1)):
            with pytest.raises(UserError, match="missing"):
                await task
        assert not core.drafts and core.weights is None
        await engine.begin_update("recompute")
        engine.load_weights("-1")
        with pytest.raises(AssertionError, match="lack"):
            engine.finish_update(2)
        with pytest.raises(AssertionError, match="lack"):
            await call(engine, 1, 1)
        await update(engine, 2, "recompute")
        completions = await call(engine, 1, 4)
        check(completions)
        assert completions[0].versions == (2,) * 4

    asyncio.run(run())


def test_bad_input_fails_its_own_call_only() -> None:
    engine = ServedEngine(Versions())

    async def run() -> None:
        good = call(engine, 2, 5)
        with pytest.raises(UserError, match="prompt 1 is empty"):
            await engine.generate([[1], []], PLAIN, 0)
        check(await good)

    asyncio.run(run())


def test_the_handle_offers_methods_of_the_engine() -> None:
    """Same names, and parameters a prefix of the engine's; `kill` is the runtime's."""
    methods = [name for name in vars(EngineHandle) if not name.startswith("_") and name not in ("remote", "kill")]
    assert "generate" in methods
    for name in methods:
        ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (EngineHandle, ServedEngine))
        pairs = zip(ours.parameters.values(), theirs.parameters.values(), strict=False)
        assert all((a.name, a.annotation) == (b.name, b.annotation) for a, b in pairs)
        assert len(ours.parameters) <= len(theirs.parameters) and ours.return_annotation == theirs.return_annotation


def test_an_engine_outlives_the_event_loop_of_a_call() -> None:
    core = Versions()
    engine = ServedEngine(core)

    async def leave() -> None:
        call(engine, 1, 50)
        await steps(core, 2)

    asyncio.run(leave())  # which cancels the call
    check(sampled(engine, [[1]], PLAIN, 0))


def test_a_stream_for_each_engine(tmp_path) -> None:
    """Two engines with alternating steps draw as each does alone, and the process's stream is as it was."""
    from tests.test_engine import PROMPTS, make_policy

    make_policy(tmp_path)
    engines = [
        ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=48, max_sequences=16)) for _ in range(2)
    ]
    alone = [sampled(engine, PROMPTS[:6], PLAIN, seed) for seed, engine in enumerate(engines)]

    async def both() -> list[list[Completion]]:
        return await asyncio.gather(*(e.generate(PROMPTS[:6], PLAIN, seed) for seed, e in enumerate(engines)))

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert asyncio.run(both()) == alone and alone[0] != alone[1]
    assert torch.equal(torch.rand(3), expected)
