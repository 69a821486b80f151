"""An engine that serves overlapping calls and takes weights in flight, in the event loop of its process.

    generate(...) --+                                         +--> completions, each call's when its own are done
    generate(...) --+--> queue --> drafts --> step, step ... --+
    generate(...) --+                 |                       +--> every token with the version that sampled it
                                      +-- begin_update, load_weights or receive_weights ..., finish_update

A task steps the engine while there is something to sample. A step blocks the event loop; between two steps everybody
else gets a turn, so that calls, updates and questions never meet a step half-way.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from cispo.engines.drafts import Draft, start_drafts
from cispo.engines.engine import Engine
from cispo.engines.random_stream import RandomStream
from cispo.types import Completion, OnUpdate, Sampling
from cispo.weights.publish import FileMessage, WeightMessage

# Drafts join those that run when all that wait find room, or when this share of the room is free. On a GPU a step that
# reads a prompt takes twice the time of one that only samples (it is no CUDA graph), for one prompt as for many.
_GULP = 0.25

# Between two steps the event loop turns until so many turns bring nothing new: a call from another process needs
# several from its arrival to its start. Threads that bring it need the interpreter, which a step hardly lets go of; in
# one process with everything else the loop runs in the main thread, and there are none.
_QUIET_TURNS = 4
_BREATH_SECONDS = 50e-6


@dataclass(slots=True, eq=False)
class _Call:
    """One call of `generate` that is waiting."""

    left: int
    """Drafts of it that are not complete."""
    done: asyncio.Future[None]


class ServedEngine:
    """Serves any number of calls at once from one continuous batch, and says which version sampled each token.

    Drafts are active, in the engine, or queue for room in it, or are held until an update is over. Where a step fails,
    all calls fail with that error, now and later; where an update fails, until a whole version has arrived.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._version = 0
        self._stream = RandomStream()
        self._active: dict[Draft, _Call] = {}
        self._queue: dict[Draft, _Call] = {}
        self._held: dict[Draft, _Call] = {}
        self._holding = False
        """Whether new drafts wait for an update."""
        self._updating = False
        """Whether weights may change: no step happens."""
        self._recompute = True
        self._broken: Exception | None = None
        """What a verb of the engine failed with."""
        self._torn: Exception | None = None
        """What an update failed with: the weights are of no one version."""
        self._stepping: asyncio.Task[None] | None = None
        self._arrivals = 0
        """Calls since the start."""

    @property
    def version(self) -> int:
        """Of the weights that the next token is sampled from; 0 is the model folder's."""
        return self._version

    def progress(self) -> int:
        """Tokens sampled since the start. Raises what a step failed with: nothing is sampled any more."""
        self._check_broken()
        return self.engine.sampled

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        """Samples one completion a prompt, in order; the same batch and seed give the same tokens, but for what other
        calls do to an engine on a CPU.

        `limits` is the most tokens of each completion, in place of the one number in `sampling`. A call that is
        cancelled takes its drafts back. Raises UserError on a prompt that leaves no room for a token, naming its index.
        """
        self._arrivals += 1
        self._check()
        drafts = start_drafts(prompts, sampling, seed, max_context=self.engine.max_context, limits=limits)
        if not drafts:
            return []
        if not self._active and not self._queue and not self._held:
            # On a CPU all drafts draw from one stream: vLLM's per-request seeds end it when a prompt is prefilled in
            # parts. With other calls under way the stream goes on from where it is.
            self._stream.seed(seed)
        call = _Call(len(drafts), asyncio.get_running_loop().create_future())
        try:
            self._add(dict.fromkeys(drafts, call))
            await call.done
        finally:
            self._drop([draft for draft in drafts if draft.reason is None])
        return [draft.completion() for draft in drafts]

    async def begin_update(self, on_update: OnUpdate) -> int:
        """Stops stepping, once nothing runs that must not see new weights; returns how many tokens were thrown away.

        What has sampled no token yet begins under the new weights; for the rest, wait: it is finished first. keep: it
        goes on after the update with its keys, values and states. recompute: it goes on, and all before its next token
        is computed again. abort: it begins again from its prompt.
        """
        self._arrivals += 1
        self._check_broken()
        if self._torn is not None or self._updating:  # another try, after this engine or another one failed
            return 0
        assert not self._holding, "an update is under way"
        self._holding = True
        try:
            self._run(self.engine.settle)
            again = [draft for draft in self._active if on_update == "abort" or not draft.tokens]
            self._held = {draft: self._active.pop(draft) for draft in again} | self._queue
            self._queue = {}
            self._run(self.engine.drop, again)
            lost = sum(draft.start_again() for draft in again)
            while on_update == "wait" and self._active:  # others step
                await asyncio.sleep(0)
            self._check_broken()
        except BaseException:
            self._resume()
            raise
        self._recompute = on_update != "keep" or not self._active
        self._updating = True
        return lost

    def load_weights(self, path: str) -> None:
        """Takes what `publish_weights` wrote. Raises UserError where the file is gone."""
        self.receive_weights(FileMessage(str(path)))

    def receive_weights(self, message: WeightMessage) -> None:
        """Takes a whole version or one of its buckets; `finish_update` follows the last."""
        with self._update():
            self.engine.receive_weights(message)

    def finish_update(self, version: int) -> None:
        """From here on tokens are sampled from the new weights. Raises AssertionError where a parameter is missing."""
        with self._update():
            self.engine.finish_update(recompute=self._recompute)
        self._version, self._torn = version, None
        for draft in self._active:
            draft.sampled_by(version)
        self._resume()
        self._check_broken()

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the group over which the learner sends weights; its workers take the ranks from the first."""
        self.engine.join_broadcast(address, first_rank, world)

    def sleep(self) -> None:
        """Gives the device's memory back until `wake`."""
        waiting = [*self._active, *self._queue, *self._held]
        assert not waiting, "an engine does not sleep while calls wait for it"
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        """Frees what the engine holds; nothing works afterwards."""
        self._drop([*self._active, *self._queue, *self._held])
        self.engine.close()

    async def _steps(self) -> None:
        await self._listen()
        while self._active and not self._updating:
            self._run(self.engine.step)
            self._admit()
            if not self._active:
                self._run(self.engine.settle)
            await self._listen()

    async def _listen(self) -> None:
        """Lets what has arrived meanwhile begin: calls that come together are sampled together."""
        known = None
        while known != self._arrivals:
            known = self._arrivals
            if threading.current_thread() is not threading.main_thread():
                time.sleep(_BREATH_SECONDS)
            for _ in range(_QUIET_TURNS):
                await asyncio.sleep(0)

    def _add(self, drafts: Mapping[Draft, _Call]) -> None:
        if self._holding:
            self._held |= drafts
            return
        self._queue |= drafts
        self._admit()
        # It has ended where nothing was left to do, or an update was under way.
        if self._active and (self._stepping is None or self._stepping.done()):
            self._stepping = asyncio.get_running_loop().create_task(self._steps())

    def _admit(self) -> None:
        """Moves drafts from the queue into the engine, in order, where there is room for all or for many."""
        room = self.engine.max_sequences - len(self._active)
        if not self._queue or room < min(len(self._queue), self.engine.max_sequences * _GULP):
            return
        drafts = dict(itertools.islice(self._queue.items(), room))
        for draft in drafts:
            del self._queue[draft]
            draft.sampled_by(self._version)
        self._active |= drafts
        for call in dict.fromkeys(drafts.values()):
            self._run(self.engine.submit, [draft for draft, own in drafts.items() if own is call])

    def _drop(self, drafts: Sequence[Draft]) -> None:
        running = [draft for draft in drafts if self._active.pop(draft, None)]
        for draft in drafts:
            self._queue.pop(draft, None)
            self._held.pop(draft, None)
        if running:
            self._run(self.engine.drop, running)
            self._admit()
        if running and not self._active:
            self._run(self.engine.settle)

    def _resume(self) -> None:
        """Ends the holding: drafts that waited join those that run."""
        self._holding = self._updating = False
        held, self._held = self._held, {}
        self._add(held)

    def _run(self, verb: Callable[..., list[Draft] | None], *args: Any) -> None:
        """A verb of the engine, and what becomes of the drafts that it completes; where that fails everybody is told,
        and nothing is run from then on."""
        if self._broken is not None:
            return
        try:
            with self._stream.current():
                complete = verb(*args)
            for draft in complete or []:
                call = self._active.pop(draft)
                call.left -= 1
                if not call.left and not call.done.done():
                    call.done.set_result(None)
        except Exception as error:  # of whatever kind: who waits must hear of it
            self._broken = error
            self._fail(error)

    @contextmanager
    def _update(self) -> Iterator[None]:
        """A part of an update; where it fails the weights may be of two versions, which nobody may sample from."""
        assert self._updating, "begin_update comes first"
        try:
            yield
        except Exception as error:
            self._torn = error
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        calls = {*self._active.values(), *self._queue.values(), *self._held.values()}
        running, self._active, self._queue, self._held = list(self._active), {}, {}, {}
        self._run(self.engine.drop, running)
        for call in calls:
            if not call.done.done():
                call.done.set_exception(error)

    def _check(self) -> None:
        self._check_broken()
        if self._torn is not None:
            raise self._torn

    def _check_broken(self) -> None:
        if self._broken is not None:
            raise self._broken


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
    engine_args: Mapping[str, Any],
) -> ServedEngine:
    """The engine that a recipe's rollout.engine names."""

    if kind == "torch":
        from cispo.engines.torch_engine import TorchEngine

        return ServedEngine(TorchEngine(model, dtype=dtype, max_context=max_context, max_sequences=max_sequences))
    from cispo.engines.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        model,
        dtype=dtype,
        max_context=max_context,
        max_sequences=max_sequences,
        tensor_parallel=tensor_parallel,
        seed=0,  # whoever serves it seeds every call
        memory=memory,
        sleeps=sleeps,
        engine_args=engine_args,
    )
    return ServedEngine(engine)
