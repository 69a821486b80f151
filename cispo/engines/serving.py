"""An engine that serves overlapping calls and takes weights in flight, in the event loop of its process.

    generate(...) --+                                            +--> completions, a call's when all of its own are done
    generate(...) --+--> waiting --> active --> step, step ... --+
                                     |                           +--> each token with the version that sampled it
                                     +-- begin_update, load_weights or receive_weights ..., finish_update

A task steps the engine while drafts are active. A step blocks the event loop; calls, updates and questions run between
two steps and never meet one half-way.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, ParamSpec

from cispo.engines.drafts import Draft, start_drafts
from cispo.engines.engine import Checked, Engine
from cispo.engines.random_stream import RandomStream
from cispo.types import Completion, OnUpdate, Sampling
from cispo.weights.publish import FileMessage, WeightMessage

_P = ParamSpec("_P")

# Queued drafts are admitted when all of them fit, or when this share of the engine's capacity is free. On a GPU a step
# that reads prompts takes twice the time of one that only samples (it is no CUDA graph), for one prompt as for many.
_ADMIT_SHARE = 0.25

# Turns of the event loop between two steps: a call from another process needs several from its arrival to its start.
_QUIET_TURNS = 4

# Once a call has come, the loop turns until `_QUIET_TURNS` bring no other: calls sent together are batched together.
# The threads that bring them need the interpreter lock, which steps hardly release; where the loop runs in the main
# thread there are none. So it sleeps: after every step for a moment from a call on, since others may follow it, and for
# a share of the time afterwards, because some hosts sleep a millisecond and more where they are asked for less.
_LOCK_RELEASE_SECONDS = 50e-6
_LOCK_RELEASE_SHARE = 0.01
_OTHERS_FOLLOW_SECONDS = 0.05


class State(StrEnum):
    """Phase of a served engine: which events it takes, and the state each leads to.

        event                     SERVING       HOLDING       UPDATING       TORN           BROKEN
        -----------------------   -----------   -----------   ------------   ------------   ------------
        step                      samples       samples       -              -              -
        generate                  is queued     is held       is held        raises         raises
        begin_update is called    -> HOLDING    asserts       returns 0      returns 0      raises
          its wait is over                      -> UPDATING
          it is cancelled                       -> SERVING
        receive_weights           asserts       asserts       loads          loads          loads
        finish_update             asserts       asserts       -> SERVING     -> SERVING     raises
        receive or finish fails                               -> TORN        -> TORN        raises
        another verb fails        -> BROKEN     -> BROKEN     -> BROKEN      -> BROKEN

    "raises": the error that led to the state. Entering TORN or BROKEN fails every call under way with that error;
    leaving HOLDING, UPDATING or TORN for SERVING queues the held drafts. A broken engine still loads weights, because a
    broadcast ends only when every engine has taken part. `begin_update` returns 0 where an update is begun again after
    this engine or another one failed.
    """

    SERVING = "serving"
    """Drafts are admitted and sampled."""
    HOLDING = "holding"
    """An update has begun: active drafts go on, new ones are held."""
    UPDATING = "updating"
    """Weights may change at any moment."""
    TORN = "torn"
    """An update failed half-way: the weights are of two versions until a whole version has arrived."""
    BROKEN = "broken"
    """A verb of the engine failed. Final."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call of `generate` under way."""

    left: int
    """Its drafts that are not complete."""
    done: asyncio.Future[None]


class ServedEngine:
    """Serves any number of calls at once from one continuous batch; each token carries the version that sampled it.

    A draft is active (in the engine) or waiting: queued for capacity while SERVING, held in every other state.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = State.SERVING
        self._error: Exception | None = None
        """The failure that led to TORN or BROKEN."""
        self._version = 0
        self._stream = RandomStream()
        self._active: dict[Draft, _Call] = {}
        self._waiting: dict[Draft, _Call] = {}
        """In the order of admission."""
        self._recompute = True
        """Whether the update under way drops keys, values and states computed before it."""
        self._stepping: asyncio.Task[None] | None = None
        self._arrivals = 0
        """Calls since the start."""
        self._last_arrival = self._next_sleep = 0.0
        """Moments for `_release_lock`: the last time that calls arrived, and the time of its next sleep without one."""

    @property
    def start_parts(self) -> Mapping[str, float]:
        """Seconds of the engine's start by its parts, where it counts them."""
        return getattr(self.engine, "start_parts", {})

    @property
    def version(self) -> int:
        """Version of the weights that sample the next token; 0 is the model folder's."""
        return self._version

    def progress(self) -> int:
        """Tokens sampled since the start. Raises the error of a BROKEN engine, which samples no more."""
        self._check(State.BROKEN)
        return self.engine.sampled

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        limits: Sequence[int] | None = None,
        cache: str = "",
    ) -> list[Completion]:
        """Samples one completion per prompt, in order.

        The same prompts and seed give the same tokens; on a CPU only while no other call is under way. `limits` is the
        maximum number of tokens per completion, in place of the one number in `sampling`. Calls of another `cache`
        share no block of the prefix cache with this one. A cancelled call takes its drafts back. Raises UserError on a
        prompt that leaves no room for a token, naming its index.
        """
        self._arrivals += 1
        self._check(State.TORN, State.BROKEN)
        drafts = start_drafts(prompts, sampling, seed, max_context=self.engine.max_context, limits=limits, cache=cache)
        if not drafts:
            return []
        if not self._active and not self._waiting:
            # On a CPU all drafts draw from one stream: vLLM's per-request seeds end it when a prompt is prefilled in
            # parts. With other calls under way the stream goes on from where it is.
            self._stream.seed(seed)
        call = _Call(len(drafts), asyncio.get_running_loop().create_future())
        try:
            self._waiting |= dict.fromkeys(drafts, call)
            self._start()
            await call.done
        finally:
            self._drop([draft for draft in drafts if draft.reason is None])
        return [draft.completion() for draft in drafts]

    async def begin_update(self, on_update: OnUpdate) -> int:
        """Stops stepping once no active draft has to finish under the old weights; returns the tokens discarded.

        Drafts without a token yet begin under the new weights. The others, by `on_update`:

            wait        finish first
            keep        go on after the update with their keys, values and states
            recompute   go on after the update; everything before their next token is computed again
            abort       begin again from their prompts
        """
        self._arrivals += 1
        self._check(State.BROKEN)
        if self.state in (State.UPDATING, State.TORN):
            return 0
        assert self.state is State.SERVING, "an update is under way"
        self.state = State.HOLDING
        try:
            self._run(self.engine.settle)
            again = [draft for draft in self._active if on_update == "abort" or not draft.tokens]
            self._waiting = {draft: self._active.pop(draft) for draft in again} | self._waiting
            self._run(self.engine.drop, again)
            lost = sum(draft.start_again() for draft in again)
            while on_update == "wait" and self._active:  # the stepping task finishes them
                await asyncio.sleep(0)
            self._check(State.BROKEN)
        except BaseException:
            self._resume()
            raise
        self._recompute = on_update != "keep" or not self._active
        self.state = State.UPDATING
        return lost

    def load_weights(self, path: str) -> None:
        """Loads a file of `publish_weights`. Raises UserError where the file is gone."""
        self.receive_weights(FileMessage(str(path)))

    def receive_weights(self, message: WeightMessage) -> None:
        """Loads a whole version or one of its buckets; `finish_update` follows the last."""
        with self._update():
            self.engine.receive_weights(message)

    def finish_update(self, version: int) -> None:
        """Ends an update: later tokens are sampled from the new weights.

        Raises AssertionError where a parameter is missing.
        """
        with self._update():
            self.engine.finish_update(recompute=self._recompute)
        self._version = version
        for draft in self._active:
            draft.sampled_by(version)
        self._resume()
        self._check(State.BROKEN)

    def weight_checksums(self) -> dict[str, int]:
        """Checksum of each parameter as it is now, for the doctor; {} of an engine without them."""
        return self.engine.weight_checksums() if isinstance(self.engine, Checked) else {}

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the group over which the learner sends weights; the engine's workers take the ranks from the first."""
        self.engine.join_broadcast(address, first_rank, world)

    def sleep(self) -> None:
        """Gives the device's memory back until `wake`."""
        assert not self._active and not self._waiting, "an engine does not sleep while calls wait for it"
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        """Frees the engine's memory and processes; no other method works afterwards."""
        self._drop([*self._active, *self._waiting])
        self.engine.close()

    async def _step(self) -> None:
        """Steps the engine until no draft is active or an update may change the weights."""
        await self._listen(arriving=True)
        while self._active and self.state in (State.SERVING, State.HOLDING):
            self._run(self.engine.step)
            self._admit()
            if not self._active:
                self._run(self.engine.settle)
            await self._listen(arriving=False)

    async def _listen(self, *, arriving: bool) -> None:
        """Yields to the event loop; from the first call that comes, or at once where one has, until no other does."""
        while True:
            known = self._arrivals
            if threading.current_thread() is not threading.main_thread():
                self._release_lock(arriving=arriving)
            for _ in range(_QUIET_TURNS):
                await asyncio.sleep(0)
            if known == self._arrivals:
                return
            arriving = True

    def _release_lock(self, *, arriving: bool) -> None:
        """Lets other threads of the process run for a moment, if it is time to."""
        begun = time.perf_counter()
        if arriving:
            self._last_arrival = begun
        if begun >= self._next_sleep or begun < self._last_arrival + _OTHERS_FOLLOW_SECONDS:
            time.sleep(_LOCK_RELEASE_SECONDS)
            ended = time.perf_counter()
            self._next_sleep = ended + (ended - begun) / _LOCK_RELEASE_SHARE

    def _start(self) -> None:
        """Admits waiting drafts, and creates a stepping task where drafts are active and none runs."""
        self._admit()
        running = self._stepping is not None and not self._stepping.done()
        if self.state is State.SERVING and self._active and not running:
            self._stepping = asyncio.get_running_loop().create_task(self._step())

    def _admit(self) -> None:
        """Moves queued drafts into the engine, in order, where capacity is free for all or for many."""
        free = self.engine.max_sequences - len(self._active)
        enough = min(len(self._waiting), self.engine.max_sequences * _ADMIT_SHARE)
        if self.state is not State.SERVING or not self._waiting or free < enough:
            return
        drafts = dict(itertools.islice(self._waiting.items(), free))
        for draft in drafts:
            del self._waiting[draft]
            draft.sampled_by(self._version)
        self._active |= drafts
        for call in dict.fromkeys(drafts.values()):
            self._run(self.engine.submit, [draft for draft, own in drafts.items() if own is call])

    def _drop(self, drafts: Sequence[Draft]) -> None:
        active = [draft for draft in drafts if self._active.pop(draft, None)]
        for draft in drafts:
            self._waiting.pop(draft, None)
        if active:
            self._run(self.engine.drop, active)
            self._admit()
        if active and not self._active:
            self._run(self.engine.settle)

    def _resume(self) -> None:
        """Ends an update: back to SERVING, unless the engine is BROKEN."""
        if self.state is not State.BROKEN:
            self.state, self._error = State.SERVING, None
        self._start()

    def _run(self, verb: Callable[_P, list[Draft] | None], *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Runs a verb of the engine and ends the calls it completes; any failure breaks the engine for good."""
        if self.state is State.BROKEN:
            return
        try:
            with self._stream.current():
                complete = verb(*args, **kwargs)
            for draft in complete or []:
                call = self._active.pop(draft)
                call.left -= 1
                if not call.left and not call.done.done():
                    call.done.set_result(None)
        except Exception as error:  # of any type: it is raised to the callers instead
            self._fail(State.BROKEN, error)

    @contextmanager
    def _update(self) -> Iterator[None]:
        """A part of an update; a failure tears the weights."""
        assert self.state not in (State.SERVING, State.HOLDING), "begin_update comes first"
        try:
            yield
        except Exception as error:
            if self.state is not State.BROKEN:
                self._fail(State.TORN, error)
            raise

    def _fail(self, state: Literal[State.TORN, State.BROKEN], error: Exception) -> None:
        """Enters a failed state: drops all drafts and raises the error in every call under way."""
        self.state, self._error = state, error
        calls = {*self._active.values(), *self._waiting.values()}
        active, self._active, self._waiting = list(self._active), {}, {}
        self._run(self.engine.drop, active)
        for call in calls:
            if not call.done.done():
                call.done.set_exception(error)

    def _check(self, *states: State) -> None:
        """Raises the failure that led to the present state, where that is one of `states`."""
        if self.state in states and self._error is not None:
            raise self._error


def prepare(kind: Literal["vllm", "torch"], dtype: str, model: str | None) -> None:
    """The imports of an engine's process, before there is a policy to load; `model` is its folder, if it is known."""
    if kind == "torch":
        importlib.import_module("cispo.engines.torch_engine")
        return
    from cispo.engines.vllm_start import import_vllm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM's, while it scans torch
        importlib.import_module("cispo.engines.vllm_engine")
        import_vllm(exact=dtype == "float32", folder=None if model is None else Path(model))


def make_engine(
    kind: Literal["vllm", "torch"],
    model: str,
    *,
    dtype: str,
    max_context: int,
    max_sequences: int,
    tensor_parallel: int,
    memory: float,
    sleeps: bool,
    engine_args: Mapping[str, object],
    record_routes: bool = False,
    read_weights: bool = True,
    device: str = "cpu",
) -> ServedEngine:
    """The engine named by a recipe's rollout.engine. Without `read_weights` those of vLLM's are undefined at first.

    `device` is torch's; vLLM finds its own.
    """
    if kind == "torch":
        from cispo.engines.torch_engine import TorchEngine

        sizes = {"max_context": max_context, "max_sequences": max_sequences}
        return ServedEngine(TorchEngine(model, dtype=dtype, **sizes, record_routes=record_routes, device=device))
    from cispo.engines.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        model,
        dtype=dtype,
        max_context=max_context,
        max_sequences=max_sequences,
        tensor_parallel=tensor_parallel,
        seed=0,  # for vLLM's start alone: every call of `generate` brings its own
        memory=memory,
        sleeps=sleeps,
        engine_args=engine_args,
        record_routes=record_routes,
        read_weights=read_weights,
    )
    return ServedEngine(engine)
