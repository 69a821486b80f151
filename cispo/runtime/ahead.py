"""The processes of a run on this machine, started in a thread while the driver still imports and reads its inputs.

    recipe --Ahead--> cluster, bundles, processes that import their libraries   (thread)
           ---------> tokenizer, data, rewards, first policy                    (driver)   --> take: objects are built

A start is mostly imports: three seconds in a learner, ten and more in an engine of vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from cispo.recipe.schema import Recipe
from cispo.runtime.actors import Planned, RayRuntime, Resources
from cispo.runtime.fork_server import Import, Imports
from cispo.runtime.host import CPU_ENV
from cispo.runtime.interrupts import EXIT_CODE
from cispo.runtime.ray_address import cluster_is_named
from cispo.runtime.start_parts import StartParts
from cispo.runtime.watchdog import Activity

if TYPE_CHECKING:
    from cispo.runtime.placement import Placement

# Functions that import the libraries of a rank and of an engine.
_OF_RANKS = "cispo.learner.learner:prepare"
_OF_ENGINES = "cispo.engines.serving:prepare"
# The same of an engine that is yet to be chosen.
_OF_SETTLED = "cispo.engines.choice:prepare"


Settle = Callable[[Recipe, Literal["cpu", "cuda"]], Recipe]
"""`choice.settled`, which imports torch and policies."""


class Started(NamedTuple):
    """A cluster with the bundles of a run, whose processes are under way."""

    runtime: RayRuntime
    placement: Placement


class Ahead:
    """The processes of a run from before its inputs are read; a context that ends those that no run has taken."""

    def __init__(
        self,
        recipe: Recipe,
        activity: Activity,
        *,
        critic: Callable[[], bool],
        settle: Settle,
        engines: bool = True,
    ) -> None:
        """`critic` says whether the algorithm has one; it and `settle` are called in the thread: they import torch."""
        self.activity = activity
        self._recipe, self._critic, self._settle, self._engines = recipe, critic, settle, engines
        self._started: Future[Started] = Future()
        self._taken = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if can_start(recipe):
            self._thread = threading.Thread(target=self._run, name="start of processes", daemon=True)
            self._thread.start()

    async def take(self) -> Started | None:
        """The processes, which end with their runtime from here on; None where none were started ahead.

        Raises the error of the start.
        """
        if self._thread is None or self._taken:
            return None
        # A cancelled wait leaves them to the end of this context.
        started = await asyncio.shield(asyncio.wrap_future(self._started))
        self._taken = True
        return started

    def _run(self) -> None:
        try:
            self._started.set_result(self._start())
        # `take` raises it where the run begins, as if the processes were started there.
        except BaseException as error:
            self._started.set_exception(error)
        # Ray's servers are told of the end of the thread that started them, and end with it.
        self._end.wait()

    def _start(self) -> Started:
        recipe, engines = self._recipe, self._engines
        if ":" in recipe.algorithm.name:
            self._critic()  # the user's module first: the processes get the search path of this one
        count = 2 * recipe.learner.ranks + (recipe.rollout.engines if engines else 0)
        runtime = RayRuntime(processes=count, activity=self.activity, imports=shared_imports(recipe, engines=engines))
        try:
            # Imports torch, while Ray's servers begin to run.
            from cispo.runtime.placement import placement_of

            critic = self._critic()
            placement = placement_of(recipe, available=runtime.gpus(), critic=critic, engines=engines)
            asyncio.run(runtime.reserve([placement.rank_bundles, placement.engine_bundles]))
            runtime.prepare(planned(recipe, placement, critic=critic, settle=self._settle, engines=engines))
        except BaseException:
            runtime.close()
            raise
        return Started(runtime, placement)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if (
            kind is KeyboardInterrupt
            and StartParts.of_command
            and self._thread is not None
            and not self._started.done()
        ):
            # Neither thread nor imports can be broken off. Ray's servers end with this process, the rest soon after it.
            print("cispo: interrupted", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)
        try:
            if self._thread is not None and not self._taken:
                with contextlib.suppress(Exception):
                    self._started.result().runtime.close()
        finally:
            self._end.set()


def can_start(recipe: Recipe) -> bool:
    """Whether a run has a cluster of this machine to itself. Code for another one is shipped once it is loaded."""
    running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return recipe.runtime == "ray" and not cluster_is_named() and not running


def engines_wait(recipe: Recipe, processes: int) -> bool:
    """Whether engines start once the learners are there: a warm-up needs none of them, and has no processor to spare
    on a machine with fewer than there are `processes` and the driver."""
    return recipe.sft is not None and (os.cpu_count() or 1) <= processes


def _model_folder(recipe: Recipe) -> str | None:
    """The folder of the recipe's model; None where it has none, or one of a hub."""
    model = recipe.policy.model
    return str(Path(model).absolute()) if model is not None and (Path(model) / "config.json").is_file() else None


def _engine_folder(recipe: Recipe) -> str | None:
    """The same for an engine of one process; the class of a model in other ones is theirs to import."""
    return _model_folder(recipe) if recipe.rollout.tensor_parallel == 1 else None


def shared_imports(recipe: Recipe, *, engines: bool) -> Imports | None:
    """The imports that the processes of a run share by forks; None where it may have a GPU.

    vLLM asks NVML for GPUs when it is imported, which leaves a thread and an open device behind.
    """
    if recipe.device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    of_ranks = Import(_OF_RANKS, (False, _model_folder(recipe), recipe.policy.config))
    of_engines = Import(_OF_SETTLED, (recipe.model_dump(mode="json"), _engine_folder(recipe)))
    later = not engines or engines_wait(recipe, recipe.learner.ranks + recipe.rollout.engines)
    return Imports((of_ranks,), () if later else (of_engines,), env=CPU_ENV)


def planned(recipe: Recipe, placement: Placement, *, critic: bool, settle: Settle, engines: bool) -> Iterator[Planned]:
    """The processes of a run that start at once; those before the engines need no settled recipe."""
    ranks, gpu, rollout = range(recipe.learner.ranks), placement.device == "cuda", recipe.rollout
    folder = _model_folder(recipe)
    kinds = ("learner", *(("critic",) if critic else ()))
    for name in kinds:
        for rank in ranks:
            own = Resources(gpus=placement.rank_gpus, bundle=placement.bundle_of_rank(rank))
            arguments = (gpu, folder, recipe.policy.config)
            yield Planned(name=f"{name}-{rank}", resources=own, imports=_OF_RANKS, args=arguments)
    if not engines or engines_wait(recipe, len(kinds) * len(ranks) + rollout.engines):
        return
    recipe = settle(recipe, placement.device)
    arguments = (recipe.rollout.kind, recipe.policy.number_format, _engine_folder(recipe))
    for number in range(rollout.engines):
        own = Resources(gpus=placement.engine_gpus, bundle=placement.bundle_of_engine(number))
        yield Planned(name=f"engine-{number}", resources=own, concurrent=True, imports=_OF_ENGINES, args=arguments)
