"""The short way of our scheduler against vLLM's own: after every step the same orders to the workers, the same outputs
and the same books of requests, queues, blocks and hashes, in steps one after the other and in steps under way."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.engines.sampled_tokens import StepTokens
from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.engines.vllm_start import choose_scheduler, import_vllm
from cispo.policies.loading import init_policy, save_policy
from cispo.types import Completion
from cispo.weights.publish import weights_folder
from tests.test_updates_in_flight import BLOCKS, PLAIN, Kind, running, sampled_with_updates, update
from tests.test_vllm_parity import CROSSING, QWEN3, RAGGED, SHARED, lightning
from tests.test_vllm_parity import scheduler as scheduler_of

SLOTS, BLOCK, LONGEST, VOCABULARY = 12, 8, 96, 50
STOPS = (7, 11)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of a dense policy."""
    import_vllm(exact=True)
    from vllm import EngineArgs

    folder = tmp_path_factory.mktemp("dense")
    save_policy(init_policy(QWEN3, 0), folder)
    sizes: dict[str, Any] = {"max_model_len": LONGEST, "max_num_seqs": SLOTS, "max_num_batched_tokens": 48}
    return EngineArgs(
        model=str(folder), dtype="float32", skip_tokenizer_init=True, block_size=BLOCK, enforce_eager=True, **sizes
    ).create_engine_config()


@dataclass(frozen=True)
class Setting:
    blocks: int = 400
    caching: bool = False
    states: bool = False
    """Whether the policy has layers with a state a sequence; a prefix cache keeps copies of it."""
    second_runner: bool = True


SETTINGS = {
    "dense": Setting(),
    "first model runner": Setting(second_runner=False),
    "few blocks": Setting(blocks=42),
    "cached": Setting(caching=True),
    "cached, few blocks": Setting(caching=True, blocks=42),
    "hybrid, cached": Setting(states=True, caching=True),
    "hybrid, cached, few blocks": Setting(states=True, caching=True, blocks=62),
    "hybrid": Setting(states=True),
    "hybrid, few blocks": Setting(states=True, blocks=54, second_runner=False),
}


def groups(setting: Setting) -> list[Any]:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from cispo.policies.vllm_slots import StateManager, StateSpec

    paged = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    found = [KVCacheGroupSpec(["attention"], paged)]
    if setting.states and setting.caching:
        state = MambaSpec(block_size=BLOCK, shapes=((8,),), dtypes=(torch.float32,), mamba_cache_mode="align")
        found.append(KVCacheGroupSpec(["state"], state))
    elif setting.states:
        KVCacheSpecRegistry.get_manager_class(paged)
        KVCacheSpecRegistry.register(StateSpec, StateManager, uniform_type_base_spec=MambaSpec)
        state = StateSpec(block_size=LONGEST, shapes=((8,),), dtypes=(torch.float32,))
        found.append(KVCacheGroupSpec(["state"], state))
    return found


def build(config: Any, setting: Setting, kind: type) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy.deepcopy(config)
    config.cache_config.enable_prefix_caching = setting.caching
    config.cache_config.num_gpu_blocks = setting.blocks
    config.cache_config.mamba_cache_mode = "align" if setting.caching else "none"
    caches = KVCacheConfig(
        num_blocks=setting.blocks,
        kv_cache_tensors=[],
        kv_cache_groups=groups(setting),
        prefix_cache_retention_interval=0 if setting.states else None,
    )
    size = LONGEST if setting.states and not setting.caching else BLOCK
    scheduler = kind(
        vllm_config=config,
        kv_cache_config=caches,
        structured_output_manager=StructuredOutputManager(config),
        block_size=size,
        hash_block_size=size,
    )
    scheduler.use_v2_model_runner = setting.second_runner
    return scheduler


def token(request: str, position: int) -> int:
    """Of a model that depends on nothing else; every fourth request repeats itself."""
    period = 3 if int(request) % 4 == 0 else 10**6
    return random.Random(f"{request} {position % period}").randrange(VOCABULARY)


class Side:
    """A scheduler with workers that sample `token`; `depth` steps may be under way, as in vLLM's core."""

    def __init__(self, scheduler: Any, depth: int, caching: bool) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        self.scheduler, self.depth = scheduler, depth
        self.under_way: deque[tuple[Any, Any]] = deque()
        self.taken = False
        """Whether the last step's tokens came back as `StepTokens`."""
        self.hasher = None
        if caching:
            function = get_hash_fn_by_name("sha256")
            init_none_hash(function)
            self.hasher = get_request_block_hasher(scheduler.hash_block_size, function)

    def add(self, name: str, prompt: list[int], params: Any) -> None:
        from vllm.v1.request import Request

        self.scheduler.add_request(
            Request(name, list(prompt), copy.copy(params), None, arrival_time=0.0, block_hasher=self.hasher)
        )

    def sample(self, order: Any) -> Any:
        """What the workers answer to an order, from the books right after it was given."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(order.num_scheduled_tokens)
        if not self.scheduler.use_v2_model_runner:
            names = sorted(names, key=lambda name: name[::-1])
        requests = [self.scheduler.requests[name] for name in names]
        tokens = [[] if r.is_prefill_chunk else [token(r.request_id, r.num_computed_tokens)] for r in requests]
        return ModelRunnerOutput(names, {name: place for place, name in enumerate(names)}, tokens)

    def step(self) -> tuple[Any, list[Any]]:
        """The order given, None where there was nothing to do; the outputs of a step, one a token."""
        order = None
        if self.scheduler.has_requests():
            order = self.scheduler.schedule()
            self.under_way.appendleft((order, self.sample(order)))
            if len(self.under_way) < self.depth and (order.num_scheduled_tokens or self.scheduler.has_requests()):
                return order, []
        if not self.under_way:
            return order, []
        outputs = self.scheduler.update_from_output(*self.under_way.pop())
        self.taken = any(isinstance(client.outputs, StepTokens) for client in outputs.values())
        return order, [one for client in outputs.values() for one in split(client.outputs)]


def split(outputs: Any) -> Iterator[tuple[str, list[int], str | None]]:
    if isinstance(outputs, StepTokens):
        for index, (name, sampled) in enumerate(zip(outputs.requests, outputs.tokens, strict=True)):
            yield name, [sampled], outputs.reasons.get(index)
        return
    for output in outputs:
        reason = None if output.finish_reason is None else str(output.finish_reason)
        yield output.request_id, output.new_token_ids, reason


def order_of(order: Any) -> Any:
    """vLLM's part of an order to the workers."""
    from vllm.v1.core.sched.output import SchedulerOutput

    return order and {field.name: getattr(order, field.name) for field in fields(SchedulerOutput)}


STATE_BOOKS = ("last_state_block_idx", "_num_retired_blocks", "_allocated_block_reqs", "_checkpoints")
STATE_BOOKS += ("_producer_partial_tail_reqs", "_partial_hit_reqs", "cached_blocks_this_step")


def books(scheduler: Any) -> dict[str, Any]:
    """All that a later step may read."""
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    requests = {}
    for name, request in scheduler.requests.items():
        kept = {key: value for key, value in vars(request).items() if "block_hasher" not in key}
        for key in ("output_token_ids", "all_token_ids"):
            kept[key] = list(kept[key])
        kept["sampling_params"] = repr(kept["sampling_params"])
        requests[name] = kept
    queues, sets = ("waiting", "kv_holding_waiting", "running"), ("deferred_waiting", "_inflight_prefills")
    plain = (
        "current_step",
        "finished_req_ids",
        "reset_preempted_req_ids",
        "prev_step_scheduled_req_ids",
        "prefill_capacity_bound",
        "num_waiting_for_streaming_input",
        "sched_step_seq",
        "processed_step_seq",
    )
    managers = [
        {
            "blocks": {name: [block.block_id for block in own] for name, own in one.req_to_blocks.items() if own},
            "cached": dict(one.num_cached_block),
            "new": list(one.new_block_ids),
            **{name: copy.copy(getattr(one, name, None)) for name in STATE_BOOKS},
        }
        for one in manager.coordinator.single_type_managers
    ]
    return {
        "requests": requests,
        "queues": {queue: [request.request_id for request in getattr(scheduler, queue)] for queue in queues},
        "sets": {name: {request.request_id for request in getattr(scheduler, name)} for name in sets},
        "plain": {name: copy.copy(getattr(scheduler, name)) for name in plain},
        "managers": managers,
        "blocks": [(block.ref_cnt, block.block_hash, block.block_hash_num_tokens) for block in pool.blocks],
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
    }


def params(generator: random.Random) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

    pattern = RepetitionDetectionParams(max_pattern_size=4, min_count=3) if generator.random() < 0.4 else None
    limit = generator.choice((1, 2, 9, 30, 30, 60, 200))
    return SamplingParams(
        max_tokens=min(limit, LONGEST - 40),
        stop_token_ids=list(STOPS) if generator.random() < 0.4 else [],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        repetition_detection=pattern,
    )


Event = Callable[[Side], None]


def event(generator: random.Random, names: Iterator[int], room: int) -> Event | None:
    """Something that may happen between two steps, the same on both sides; `room` requests are welcome."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    kind = generator.random()
    if kind < 0.08 * (room > 0) or room == SLOTS:
        shared = [random.Random("shared").randrange(VOCABULARY) for _ in range(20)] if generator.random() < 0.5 else []
        prompts = [
            (str(next(names)), shared + generator.choices(range(VOCABULARY), k=generator.randint(1, 20)))
            for _ in range(generator.randint(1, max(room, 1)))
        ]
        drawn = [params(generator) for _ in prompts]

        def add(side: Side) -> None:
            for (name, prompt), own in zip(prompts, drawn, strict=True):
                side.add(name, prompt, own)

        return add
    share = generator.random()
    if kind < 0.095:

        def abort(side: Side) -> None:
            own = list(side.scheduler.requests)
            side.scheduler.finish_requests(own[int(share * len(own)) :][:2], RequestStatus.FINISHED_ABORTED)

        return abort
    if kind < 0.1:
        return lambda side: side.scheduler.reset_prefix_cache(reset_running_requests=True) and None
    if kind < 0.105:

        def settle(side: Side) -> None:
            side.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            while side.under_way:
                side.step()
            side.scheduler.set_pause_state(PauseState.UNPAUSED)

        return settle
    return None


@pytest.mark.parametrize("swapped", [False, True], ids=["", "taking turns"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["one after the other", "under way"])
@pytest.mark.parametrize("name", SETTINGS)
def test_books_are_vllms_after_every_step(name: str, asynchronous: bool, swapped: bool, config: Any) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from cispo.engines.vllm_scheduler import SteadyAsyncScheduler, SteadyScheduler

    setting, depth = SETTINGS[name], 2 if asynchronous else 1
    generator = random.Random(f"{name} {asynchronous} {swapped}")
    vllms, own = (AsyncScheduler, SteadyAsyncScheduler) if asynchronous else (Scheduler, SteadyScheduler)
    sides = [Side(build(config, setting, kind), depth, setting.caching) for kind in (vllms, own)]
    steps, reasons, names = Counter[str](), Counter[str | None](), itertools.count()
    for number in range(700):
        room = SLOTS - len(sides[0].scheduler.requests)
        happens = event(generator, names, room) if number else None
        for side in sides:
            if number == 0:
                for n in range(SLOTS + 4):
                    side.add(f"{10**6 + n}", [n % 7] * (1 + 2 * n), params(random.Random(n)))
            if happens:
                happens(side)
        if swapped:
            sides[1].scheduler.__class__ = generator.choice((vllms, own))
        (theirs, expected), (ours, found) = (side.step() for side in sides)
        assert order_of(ours) == order_of(theirs), f"step {number}"
        assert found == expected, f"step {number}"
        assert books(sides[1].scheduler) == books(sides[0].scheduler), f"step {number}"
        steps[type(ours).__name__] += 1
        steps["StepTokens"] += sides[1].taken
        reasons.update(reason for _, _, reason in found)
        if "few" in name and ours is not None and ours.preempted_req_ids:
            steps["preempted"] += 1
    assert min(steps["SteadyOutput"], steps["StepTokens"]) > (40 if swapped else 250), steps
    assert reasons["stop"] and reasons["length"] and reasons["repetition"], reasons
    assert "few" not in name or steps["preempted"], steps


SLOW = [("hybrid", False), ("dense", True)]


async def workload(engine: ServedEngine, kind: Kind) -> list[Completion]:
    """Calls, one of them taken back, with stops and limits of their own, and updates in between."""
    short = replace(PLAIN, max_tokens=16)
    cancelled = asyncio.ensure_future(engine.generate(RAGGED[:4], PLAIN, 1))
    for _ in range(60):
        await asyncio.sleep(0)
    ending, limits = replace(PLAIN, eos_ids=(3, 9)), [3 * n + 1 for n in range(14)]
    first = asyncio.ensure_future(engine.generate(SHARED[:3] + RAGGED[5:16], ending, 2, limits))
    for _ in range(20):
        await asyncio.sleep(0)
    cancelled.cancel()
    found = await first
    for mode in ("recompute", "keep"):
        found += (await sampled_with_updates(engine, kind, CROSSING[:5], mode, short))[0]
    return found


@pytest.mark.parametrize(
    ("name", "caching"),
    [("hybrid", True), ("dense", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_an_engine_samples_the_same(name: str, caching: bool, tmp_path: Path) -> None:
    """Tokens, log-probabilities to the bit, reasons and versions, with vLLM's scheduler and with both taking turns."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from cispo.engines.vllm_scheduler import SteadyScheduler

    with weights_folder("test") as weights:
        kind = Kind(tmp_path, weights, lightning() if name == "hybrid" else QWEN3)
        arguments: dict[str, Any] = {"enable_prefix_caching": caching, "num_gpu_blocks_override": BLOCKS[name]}
        with running(kind, **arguments) as engine:
            assert isinstance(engine.engine, VLLMEngine)
            scheduler: Any = scheduler_of(engine)
            steps, drawn = Counter[str](), random.Random(0)
            assert scheduler.__class__ is SteadyScheduler
            turns: list[list[type]] = [[Scheduler], [Scheduler, *[SteadyScheduler] * 7]]
            found = []
            for kinds in turns:
                scheduler.schedule = lambda *args, kinds=kinds: scheduled(scheduler, drawn.choice(kinds), steps, *args)
                asyncio.run(update(engine, kind, 0, "wait"))
                found.append(asyncio.run(workload(engine, kind)))
    assert found[0] == found[1] and {str(c.finish_reason) for c in found[0]} == {"stop", "length"}
    assert steps["SteadyOutput"] > 30, steps


def scheduled(scheduler: Any, kind: type, steps: Counter[str], *args: Any) -> Any:
    scheduler.__class__ = kind
    order: Any = kind.schedule(scheduler, *args)  # pyright: ignore[reportAttributeAccessIssue]
    steps[type(order).__name__] += 1
    return order


@pytest.mark.parametrize("asynchronous", [False, True])
def test_engine_arguments_win_over_our_scheduler(asynchronous: bool, config: Any) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    ours, theirs = (copy.deepcopy(config.scheduler_config) for _ in range(2))
    ours.async_scheduling, theirs.scheduler_cls = asynchronous, "vllm.v1.core.sched.scheduler.Scheduler"
    choose_scheduler(ours)
    choose_scheduler(theirs)
    assert ours.get_scheduler_cls().__name__ == ("SteadyAsyncScheduler" if asynchronous else "SteadyScheduler")
    assert theirs.get_scheduler_cls() is Scheduler


def test_the_workers_are_sent_vllms_part_of_an_order() -> None:
    """With several workers an order is pickled; its counters stay here."""
    from vllm.v1.core.sched.output import SchedulerOutput

    from cispo.engines.vllm_steady import SteadyOutput

    empty = SchedulerOutput.make_empty()
    order = SteadyOutput(**vars(empty), steady=object())  # pyright: ignore[reportArgumentType]
    assert vars(pickle.loads(pickle.dumps(order))) == {**vars(empty), "steady": None}
    assert order.steady is not None
