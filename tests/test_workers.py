"""Engines that fail in any call are restarted with the current weights, at most max_restarts times."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cispo.engines.handle import EngineHandle
from cispo.errors import Diverged, ProcessDied, RunError, UserError
from cispo.learner.handle import LearnerHandle
from cispo.types import Home, Sampling
from cispo.workers import Workers

SAMPLING = Sampling(max_tokens=4, eos_ids=(1,))


class Engine:
    """Answers with its own name. Fails in the methods of `fails`, and in every call after that."""

    def __init__(self, name: str, fails: dict[str, Exception]) -> None:
        self.name, self.fails = name, fails
        self.failed: Exception | None = None
        self.killed = False
        self.version = 0
        self.calls: list[str] = []
        self.parts: dict[str, float] = {}

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(method)
        await asyncio.sleep(0)
        self.failed = self.failed or self.fails.get(method)
        if self.failed is not None:
            raise self.failed
        if method == "generate":
            return [f"{self.name} under {self.version}"] * len(args[0])
        if method == "finish_update":
            self.version = args[0]
        return 0

    async def ask(self, method: str) -> Any:
        if self.failed is not None:
            raise self.failed
        return 0

    async def look(self, method: str) -> Any:
        return await self.ask(method)

    def kill(self) -> None:
        self.killed = True


class Learner:
    """Publishes, and broadcasts one bucket."""

    def __init__(self) -> None:
        self.worlds: list[int] = []
        self.parts: dict[str, float] = {}

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        if method == "open_weight_group":
            self.worlds.append(args[0])
        return {"num_buckets": 1, "publish": "weights", "stage_bucket": Bucket()}.get(method)

    async def ask(self, method: str) -> Any:
        raise AssertionError("a learner is not asked")

    async def look(self, method: str) -> Any:
        raise AssertionError("nothing hangs here")

    def kill(self) -> None:
        raise AssertionError("a learner is not killed")


class Bucket:
    handles = None


def workers(fails: list[list[dict[str, Exception]]], **keys: Any) -> tuple[Workers, list[list[Engine]]]:
    """`fails[n][k]`: failing methods of the k-th engine that is started as number n; later engines do not fail."""
    made: list[list[Engine]] = [[] for _ in fails]

    async def start(number: int) -> EngineHandle:
        place = made[number]
        plan = fails[number][len(place)] if len(place) < len(fails[number]) else {}
        place.append(Engine(f"{number}.{len(place)}", plan))
        if "start" in plan:
            raise plan["start"]
        return EngineHandle(place[-1])

    return (
        Workers(
            learners=[LearnerHandle(Learner())],
            critics=[],
            engines=[],
            start_engine=start,
            weights_folder="",
            group_size=2,
            say=lambda _: None,
            **{"max_restarts": 5, **keys},
        ),
        made,
    )


async def started(group: Workers, version: int = 1) -> None:
    await group.start_engines(2)
    await group.sync_weights(version)


DIED = ProcessDied("the process of engine ended unexpectedly")


@pytest.mark.parametrize("error", [DIED, RuntimeError("CUDA error")], ids=["died", "error"])
@pytest.mark.parametrize("verb", ["start", "begin_update", "load_weights", "finish_update", "generate"])
def test_an_engine_that_fails_is_replaced_and_has_the_weights(verb: str, error: Exception) -> None:
    async def run() -> None:
        group, made = workers([[{verb: error}], []])
        await started(group, version=3)
        answers: Any = await group.generate([[5]] * 4, SAMPLING, 0)
        assert answers == ["0.1 under 3"] * 2 + ["1.0 under 3"] * 2
        assert group.restarts == 1 and len(made[0]) == 2 and len(made[1]) == 1
        assert verb == "start" or made[0][0].killed

    asyncio.run(run())


def test_of_several_calls_that_lose_an_engine_one_starts_it_again() -> None:
    async def run() -> None:
        group, made = workers([[{"generate": DIED}]])
        await group.start_engines(1)
        await group.sync_weights(1)
        answers: Any = await asyncio.gather(*(group.generate([[5]] * 2, SAMPLING, i) for i in range(6)))
        assert answers == [["0.1 under 1"] * 2] * 6 and group.restarts == 1 and len(made[0]) == 2

    asyncio.run(run())


@pytest.mark.parametrize("verb", ["join_broadcast", "receive_weights"])
def test_a_broadcast_that_loses_both_engines_meets_anew(verb: str) -> None:
    """Each is restarted once, though the broadcast finds both dead."""

    async def run() -> None:
        group, made = workers([[{verb: DIED}], [{verb: DIED}]], transport="broadcast")
        await started(group, version=2)
        assert group.restarts == 2 and [len(place) for place in made] == [2, 2]
        assert [place[1].version for place in made] == [2, 2]
        assert cast(Learner, group.learners[0].remote).worlds[-1] == 3 and group.joined

    asyncio.run(run())


def test_while_the_learner_changes_its_weights_nobody_is_given_them() -> None:
    async def run() -> None:
        group, made = workers([[{"generate": DIED}]])
        await group.start_engines(1)
        await group.sync_weights(1)
        async with group.learning():
            waiting: Any = asyncio.ensure_future(group.generate([[5]], SAMPLING, 0))
            await asyncio.sleep(0.01)
            assert len(made[0]) == 1 and not waiting.done()
            await group.sync_weights(2)  # finds it dead, and replaces it itself
        assert await waiting == ["0.1 under 2"] and group.restarts == 1

    asyncio.run(run())


def test_what_would_be_the_same_in_a_new_engine_ends_the_run() -> None:
    for error in (UserError("prompt 0 is empty"), Diverged("not finite")):
        group, _ = workers([[{"generate": error}]])
        asyncio.run(group.start_engines(1))
        with pytest.raises(type(error), match=str(error)):
            asyncio.run(group.generate([[5]], SAMPLING, 0))
        assert group.restarts == 0


def test_bad_input_found_by_one_engine_ends_the_start_of_the_others() -> None:
    """Their processes are killed next, which is no reason to start them again."""

    async def run() -> None:
        group, _ = workers([[], []])
        ended = asyncio.Event()

        async def start(number: int) -> EngineHandle:
            if number == 0:
                raise UserError("head_dim 16 cannot be sampled")
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            raise AssertionError("the start goes on")

        group.start_engine = start
        with pytest.raises(UserError, match="head_dim 16"):
            await group.start_engines(2)
        assert ended.is_set() and group.restarts == 0

    asyncio.run(run())


def test_restarts_are_bounded() -> None:
    async def run(error: Exception) -> None:
        group, _ = workers([[{"generate": error}] * 4], max_restarts=2)
        await group.start_engines(1)
        await group.generate([[5]], SAMPLING, 0)

    with pytest.raises(RunError, match="control.max_restarts 2 allows no further"):
        asyncio.run(run(DIED))
    with pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(run(RuntimeError("CUDA error")))


def test_the_turns_of_a_home_stay_at_its_engine() -> None:
    """New homes are dealt out like groups; later calls, of any attempts in any order, follow them. A single new home
    goes to the least loaded engine."""

    async def run() -> None:
        group, made = workers([[], []])
        await started(group)
        homes = [Home(cache="a") for _ in range(3)]
        of = [homes[0], homes[0], homes[1], homes[1], homes[2], homes[2]]
        plain: Any = await group.generate([[n] for n in range(6)], SAMPLING, 0)
        first: Any = await group.generate_at([[n] for n in range(6)], SAMPLING, 0, of)
        assert first == plain and [home.engine for home in homes] == [0, 0, 1]
        later: Any = await group.generate_at([[5], [0], [3]], SAMPLING, 1, [homes[2], homes[0], homes[1]])
        assert [answer[0] for answer in later] == ["1", "0", "0"]
        busy = asyncio.ensure_future(group.generate_at([[1]], SAMPLING, 2, [homes[0]]))
        await asyncio.sleep(0)
        single = Home()
        await group.generate_at([[1]], SAMPLING, 3, [single])
        await busy
        assert single.engine == 1 and made[0][0].calls.count("generate") == 4

    asyncio.run(run())
