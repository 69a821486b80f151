"""Weights that arrive while an engine samples: every token's log-probability is that of a fresh forward pass of the
learner's policy with the weights of its version, hybrid and dense, with prefix caching, preemption, and calls that come
and go."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cispo.engines.sampled_tokens import StepTokens
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.engines.vllm_logprobs import PendingLogprobs, Records
from cispo.policies.loading import init_policy, save_policy
from cispo.types import Completion, FinishReason, OnUpdate, RepetitionStop, Sampling
from cispo.weights.publish import publish_weights, weights_folder
from tests.served import sampled
from tests.test_vllm_parity import CROSSING, QWEN3, RAGGED, SHARED, learner_logprobs, lightning, scheduler

TOLERANCE = 1e-5
VERSIONS = 4
PLAIN = Sampling(max_tokens=60, eos_ids=(), repetition=RepetitionStop(run_length=0))


class Kind:
    """Versions of a policy: version 0 in a folder, each of them published."""

    def __init__(self, folder: Path, weights: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.policies = [init_policy(config, seed) for seed in range(VERSIONS)]
        save_policy(self.policies[0], folder)
        self.paths = []
        for version, policy in enumerate(self.policies):
            path = publish_weights(policy.to_hf(), weights, version)
            self.paths.append(str(path.rename(weights / f"{folder.name}-{version}")))

    def gaps(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
        """|engine - learner| of every token, the learner with the weights of the token's version."""
        by_version = torch.stack([learner_logprobs(p, prompts, completions) for p in self.policies])
        versions = torch.tensor([v for c in completions for v in c.versions])
        engine = torch.tensor([x for c in completions for x in c.logprobs])
        assert by_version.isfinite().all() and engine.isfinite().all() and len(engine) == len(versions)
        return (by_version[versions, torch.arange(len(versions))] - engine).abs()


@pytest.fixture(scope="module")
def weights() -> Iterator[Path]:
    with weights_folder("test") as folder:
        yield folder


@pytest.fixture(scope="module")
def kinds(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    configs = {"hybrid": lightning(), "dense": QWEN3}
    return {name: Kind(tmp_path_factory.mktemp(name), weights, config) for name, config in configs.items()}


EngineName = Literal["vllm", "torch"]
EITHER_ENGINE = pytest.mark.parametrize("name", ["vllm", "torch"])


@contextmanager
def running(kind: Kind, at_once: int = 12, *, name: EngineName = "vllm", **engine_args: Any) -> Iterator[ServedEngine]:
    """`engine_args` are vLLM's own."""
    sizes: dict[str, Any] = {"dtype": "float32", "max_context": 400, "max_sequences": at_once}
    if name == "torch":
        core = TorchEngine(str(kind.folder), **sizes)
    else:
        core = VLLMEngine(str(kind.folder), **sizes, seed=0, engine_args=engine_args)
    engine = ServedEngine(core)
    try:
        yield engine
    finally:
        engine.close()


def idle(engine: ServedEngine) -> bool:
    """Whether the engine holds nothing of any call."""
    core = engine.engine
    if isinstance(core, TorchEngine):
        return not (core._waiting or core._running or any(map(len, core._samplers.values())))
    return not scheduler(engine).requests


def preemptions(engine: ServedEngine) -> list[int]:
    """Counts those that come from a lack of blocks, not from an update."""
    count, original = [0], scheduler(engine)._preempt_request

    def preempt(request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        count[0] += not drop_stale_output
        original(request, timestamp, drop_stale_output)

    scheduler(engine)._preempt_request = preempt
    return count


async def update(engine: ServedEngine, kind: Kind, version: int, mode: OnUpdate) -> int:
    lost = await engine.begin_update(mode)
    engine.load_weights(kind.paths[version])
    engine.finish_update(version)
    return lost


async def sampled_with_updates(
    engine: ServedEngine, kind: Kind, prompts: Sequence[Sequence[int]], mode: OnUpdate, sampling: Sampling = PLAIN
) -> tuple[list[Completion], int]:
    """One call during which each further version arrives after a quarter more of the tokens; and the tokens lost."""
    before, lost = engine.progress(), 0
    call = asyncio.ensure_future(engine.generate(prompts, sampling, 3))
    for version in range(1, VERSIONS):
        while engine.progress() < before + lost + len(prompts) * sampling.max_tokens * version // VERSIONS:
            await asyncio.sleep(0)
        lost += await update(engine, kind, version, mode)
    return await call, lost


MODES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "chunked": ({"max_num_batched_tokens": 64}, RAGGED[:12]),
    "cached": ({"enable_prefix_caching": True}, SHARED[:6] + RAGGED[:6]),
    "cached, preempted": ({"enable_prefix_caching": True}, CROSSING[:12] + SHARED[:4]),
}
EXACT: list[OnUpdate] = ["recompute", "wait", "abort"]
"""All but keep: its tokens after an update are of no one version's weights."""
BLOCKS = {"hybrid": 16, "dense": 10}


@pytest.mark.parametrize("kind_name", ["hybrid", "dense"])
@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * (m == "chunked")) for m in MODES])
def test_recomputed(mode: str, kind_name: str, kinds: dict[str, Kind]) -> None:
    """Tokens before an update match the old weights, and tokens after it the new ones, through three updates."""
    kind = kinds[kind_name]
    engine_args, prompts = MODES[mode]
    if "preempted" in mode:
        engine_args: dict[str, Any] = engine_args | {"num_gpu_blocks_override": BLOCKS[kind_name]}
    with running(kind, **engine_args) as engine:
        preempted = preemptions(engine)
        completions, lost = asyncio.run(sampled_with_updates(engine, kind, prompts, "recompute"))
        assert kind.gaps(prompts, completions).max() <= TOLERANCE
        assert max(len(set(c.versions)) for c in completions) >= 3, "several updates fell into one completion"
        assert {v for c in completions for v in c.versions} == set(range(VERSIONS))
        assert lost == 0 and engine.progress() == len(prompts) * PLAIN.max_tokens
        assert (preempted[0] >= 4) == ("preempted" in mode)
        again = sampled(engine, prompts, PLAIN, 4)
        assert kind.gaps(prompts, again).max() <= TOLERANCE and set(again[0].versions) == {VERSIONS - 1}


@pytest.mark.parametrize("kind_name", ["hybrid", "dense"])
def test_recomputed_by_the_torch_engine(kind_name: str, kinds: dict[str, Kind]) -> None:
    """The same, with prompts that several share and sequences that wait for a place."""
    kind, prompts = kinds[kind_name], RAGGED[:8] + SHARED[:2] * 2
    with running(kind, at_once=8, name="torch") as engine:
        completions, lost = asyncio.run(sampled_with_updates(engine, kind, prompts, "recompute"))
        assert kind.gaps(prompts, completions).max() <= TOLERANCE
        assert max(len(set(c.versions)) for c in completions) >= 3, "several updates fell into one completion"
        assert {v for c in completions for v in c.versions} == set(range(VERSIONS))
        assert lost == 0 and engine.progress() == len(prompts) * PLAIN.max_tokens and idle(engine)


@EITHER_ENGINE
@pytest.mark.parametrize("kind_name", ["hybrid", "dense"])
def test_kept(kind_name: str, name: EngineName, kinds: dict[str, Kind]) -> None:
    """Tokens before the first update match; later ones follow keys and states of older weights. A call that comes
    after an update shares nothing with those that keep, though its prompts are theirs."""
    kind, prompts = kinds[kind_name], SHARED[:6]

    async def run() -> tuple[list[Completion], list[Completion], int]:
        first = asyncio.ensure_future(engine.generate(prompts, PLAIN, 3))
        while engine.progress() < 6 * 20:
            await asyncio.sleep(0)
        before = engine.progress()
        await update(engine, kind, 1, "keep")
        second = await engine.generate(prompts, replace(PLAIN, max_tokens=10), 4)
        assert not first.done()
        return await first, second, before

    with running(kind, name=name, enable_prefix_caching=True) as engine:
        first, second, before = asyncio.run(run())
    gaps, versions = kind.gaps(prompts, first), torch.tensor([v for c in first for v in c.versions])
    assert all(set(c.versions) == {0, 1} and list(c.versions) == sorted(c.versions) for c in first)
    assert (versions == 0).sum() == before
    assert gaps[versions == 0].max() <= TOLERANCE and gaps[versions == 1].median() > 1e-3
    assert kind.gaps(prompts, second).max() <= TOLERANCE and {v for c in second for v in c.versions} == {1}


@EITHER_ENGINE
@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_no_completion_mixes_versions(mode: OnUpdate, name: EngineName, kinds: dict[str, Kind]) -> None:
    kind, prompts = kinds["hybrid"], RAGGED[:12]
    with running(kind, at_once=4, name=name) as engine:
        completions, lost = asyncio.run(sampled_with_updates(engine, kind, prompts, mode))
        assert engine.progress() == 12 * PLAIN.max_tokens + lost
    assert kind.gaps(prompts, completions).max() <= TOLERANCE
    assert all(len(set(c.versions)) == 1 and len(c.token_ids) == PLAIN.max_tokens for c in completions)
    assert len({c.versions for c in completions}) > 1, "those that had no place yet began under newer weights"
    assert (lost > 0) == (mode == "abort")


@EITHER_ENGINE
def test_overlapping_calls_get_what_they_asked_for(name: EngineName, kinds: dict[str, Kind]) -> None:
    """Greedy calls sample as they do alone; limits, ends and temperatures are each call's own."""
    kind = kinds["hybrid"]
    greedy = replace(PLAIN, temperature=0, max_tokens=30)
    ending = replace(PLAIN, eos_ids=tuple(range(8)))
    with running(kind, name=name) as engine:
        alone = [sampled(engine, part, greedy, 0) for part in (RAGGED[:5], RAGGED[5:9])]

        async def run() -> list[list[Completion]]:
            calls = [engine.generate(RAGGED[:5], greedy, 0), engine.generate(RAGGED[5:9], greedy, 1)]
            calls += [engine.generate(RAGGED[:6], ending, 2), engine.generate([[5], [6]], PLAIN, 3, [1, 40])]
            return await asyncio.gather(*calls)

        *same, ended, limited = asyncio.run(run())
    for ours, expected in zip(same, alone, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in expected]
        assert np.abs(np.subtract([c.logprobs for c in ours], [c.logprobs for c in expected])).max() <= TOLERANCE
    assert [len(c.token_ids) for c in limited] == [1, 40]
    assert any(c.finish_reason is FinishReason.STOP for c in ended)
    assert all((c.token_ids[-1] < 8) == (c.finish_reason is FinishReason.STOP) for c in ended)
    assert kind.gaps(RAGGED[:6], ended).max() <= TOLERANCE


RULED = replace(PLAIN, repetition=RepetitionStop(run_length=3, probability=0.02))


def check_ends(completion: Completion, limit: int) -> None:
    """Three tokens in a row above `RULED`'s probability end a completion, through any updates in between."""
    sure = [x > math.log(RULED.repetition.probability) for x in completion.logprobs]
    fired = [end for end in range(3, len(sure) + 1) if all(sure[end - 3 : end])]
    by_rule = completion.finish_reason is FinishReason.REPETITION
    assert (fired == [len(sure)]) if by_rule else (len(sure) == limit and fired in ([], [limit]))


async def interleaved(
    engine: ServedEngine, kind: Kind, seed: int, modes: Sequence[OnUpdate], sampling: Sampling = PLAIN
) -> float:
    """Calls, cancellations and updates at random moments; the largest gap of the sampled tokens."""
    rng, calls, version = random.Random(seed), [], 0
    for _ in range(14):
        event = rng.random()
        if event < 0.55:
            prompts = rng.sample(RAGGED + SHARED, rng.randrange(1, 5))
            limits = [rng.randrange(1, 40) for _ in prompts]
            call = asyncio.ensure_future(engine.generate(prompts, sampling, rng.randrange(99), limits))
            calls.append((call, prompts, limits))
        elif event < 0.65 and calls:
            calls.pop(rng.randrange(len(calls)))[0].cancel()
        else:
            version = (version + 1) % VERSIONS
            await update(engine, kind, version, rng.choice(modes))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
    largest = 0.0
    for task, prompts, limits in calls:
        completions = await task
        largest = max(largest, kind.gaps(prompts, completions).max().item())
        for completion, limit in zip(completions, limits, strict=True):
            if sampling is RULED:
                check_ends(completion, limit)
            else:
                assert len(completion.token_ids) == limit
    assert calls and idle(engine)
    return largest


@EITHER_ENGINE
@pytest.mark.parametrize("kind_name", ["hybrid", "dense"])
def test_random_interleavings(kind_name: str, name: EngineName, kinds: dict[str, Kind]) -> None:
    kind = kinds[kind_name]
    arguments = {"enable_prefix_caching": True, "num_gpu_blocks_override": BLOCKS[kind_name]}
    with running(kind, name=name, **arguments) as engine:
        for seed, sampling in enumerate([PLAIN, PLAIN, RULED, RULED]):
            assert asyncio.run(asyncio.wait_for(interleaved(engine, kind, seed, EXACT, sampling), 60)) <= TOLERANCE
            sampled(engine, [[1]], PLAIN, 0)


def as_on_a_gpu(engine: VLLMEngine) -> None:
    """Outputs come back a step late and without log-probabilities, which are recorded, as with asynchronous
    scheduling and `RecordingSampler`; each request has its own seed."""
    core, positions = cast(Any, engine._core.engine_core), {}
    records: list[tuple[str, int, float]] = []
    sent: list[tuple[str, int, float]] = []
    queue: deque[Any] = deque(maxlen=2)

    def record(request: str, logprob: float) -> None:
        start = len(engine._requests[request].prompt)
        positions[request] = positions.get(request, start - 1) + 1
        records.append((request, positions[request], logprob))

    def step() -> tuple[Any, bool]:
        if core.scheduler.has_requests():
            outputs, executed = type(core).step(core)
            found = outputs[0].outputs if outputs else []
            if isinstance(found, StepTokens):
                assert found.logprobs is not None
                for request, logprob in zip(found.requests, found.logprobs, strict=True):
                    record(request, logprob)
                outputs[0].outputs = found._replace(logprobs=None)
            else:
                for output in found:
                    record(output.request_id, float(output.new_logprobs.logprobs[0, 0]))
                    output.new_logprobs = None
            queue.appendleft((outputs, executed))
            if len(queue) < 2 and core.scheduler.has_requests():
                return None, executed
        return queue.pop() if queue else (None, False)

    def send() -> None:
        sent[:], records[:] = records, []

    def take() -> list[Records]:
        ids, positions, logprobs = zip(*sent, strict=True) if sent else ((), (), ())
        sent.clear()
        ones = np.ones(len(ids), bool)
        return [Records(list(ids), np.array(positions, np.int64), np.array(logprobs, np.float32), ones)]

    core.batch_queue, core.step_fn = queue, step
    engine._pending = PendingLogprobs(send, take, engine.max_context)


def test_steps_in_flight_and_recorded_logprobs(kinds: dict[str, Kind]) -> None:
    """The way of a GPU, as far as it can be walked without one."""
    kind = kinds["hybrid"]
    sure = RepetitionStop(run_length=3, probability=0.02)
    with running(kind) as engine:
        core = engine.engine
        assert isinstance(core, VLLMEngine)
        as_on_a_gpu(core)
        completions, _ = asyncio.run(sampled_with_updates(engine, kind, RAGGED[:12], "recompute"))
        assert kind.gaps(RAGGED[:12], completions).max() <= TOLERANCE
        assert {v for c in completions for v in c.versions} == set(range(VERSIONS))
        for seed in range(4, 7):
            largest = asyncio.run(asyncio.wait_for(interleaved(engine, kind, seed, EXACT), 60))
            assert largest <= TOLERANCE
        # A seed of its own for each request: other calls change nothing but last bits.
        alone = sampled(engine, RAGGED[:3], PLAIN, 7)

        async def beside() -> list[Completion]:
            other = asyncio.ensure_future(engine.generate(RAGGED[4:9], PLAIN, 1))
            result = await engine.generate(RAGGED[:3], PLAIN, 7)
            return [*result, *(await other)][:3]

        assert [c.token_ids for c in asyncio.run(beside())] == [c.token_ids for c in alone]
        ruled = sampled(engine, RAGGED[:12], replace(PLAIN, max_tokens=200, repetition=sure), 5)
        assert any(c.finish_reason is FinishReason.REPETITION for c in ruled)
        assert kind.gaps(RAGGED[:12], ruled).max() <= TOLERANCE
        assert core._pending is not None and not core._pending._requests and not core._pending._table._rows
        assert not core._requests
