"""Learners, critics and engines in Ray actors or in this process, behind one handle.

    handle = await runtime.start(Learner, ..., name="learner-0")
    result = await handle.call("update", micro_batches, ...)

`RayRuntime` and `LocalRuntime` run the same classes; the local one is for tests and debuggers. An object started as
`concurrent` takes any number of calls at once, in the event loop of its process; any other takes one after another.
`cluster` joins or starts (`local_cluster`) the Ray cluster and reserves its bundles, `host` is the inside of a process.
Only these files import Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from cispo.errors import ProcessDied, RunError, UserError
from cispo.runtime import cluster
from cispo.runtime.cluster import Bundle
from cispo.runtime.fork_server import Imports
from cispo.runtime.host import ConcurrentHost, Host, named_parts, result_of
from cispo.runtime.watchdog import Activity

# Ray's name for the calls of `look`.
_LOOKS = "looks"

# Simultaneous calls of a concurrent object. Ray queues any further call, `ask("progress")` included.
_MAX_CONCURRENT = 100_000


RayActor: TypeAlias = Any
"""Ray's ActorHandle, or Ray Client's. Any, because Ray declares the methods of its handles as Never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Resources of one process on its machine.

    Example: Resources(gpus=0.5, bundle=0)
    """

    gpus: float = 0
    """A fraction of one GPU, or a whole number of GPUs."""
    bundle: int | None = None
    """Index of the reserved bundle that holds the process; None outside of any reservation."""


_NO_GPU = Resources()


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A process that `Runtime.prepare` starts before its object can be built.

    Example: Planned(name="engine-0", concurrent=True, imports="cispo.engines.serving:prepare", args=("vllm",))
    """

    name: str
    """As later given to `start`; of a rank with its number."""
    resources: Resources = _NO_GPU
    concurrent: bool = False
    """Whether it is for `start` with `concurrent`; otherwise for `start_ranks`."""
    imports: str = ""
    """"module:function" that the process calls with `args`: its imports are the point of it."""
    args: tuple[object, ...] = ()


class Handle(Protocol):
    """An object in this or another process, called by method name."""

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds of the object's start: process, import and build, and parts of these that the object names itself."""
        ...

    async def call(self, method: str, *args: object, **kwargs: object) -> Any:
        """Runs a method of the object; UserError and RunError are raised here as they were raised there.

        Raises RunError for an OSError of another process, which is its machine's, and ProcessDied where its process is
        gone. Cancelling a call of a concurrent object cancels the method.
        """
        ...

    async def ask(self, method: str) -> object:
        """As `call`, but the watchdog does not count it as progress of the run."""
        ...

    async def look(self, method: str) -> object:
        """As `ask`, of an object of `start_ranks`: answered at once, also while another call of it runs."""
        ...

    def kill(self) -> None:
        """Ends the object's process at once; does nothing where it has ended already."""
        ...


class Closable(Protocol):
    """Any class with a `close`, which frees its memory and ends its threads and processes."""

    def close(self) -> None: ...


class Runtime(Protocol):
    """Starts objects and ends them."""

    def gpus(self) -> int:
        """Number of GPUs of the machine or cluster."""
        ...

    async def reserve(self, groups: Sequence[Sequence[Bundle]]) -> None:
        """Reserves bundles; `Resources.bundle` counts them through all groups.

        A bundle is on one machine. A group's bundles are on as few machines as possible.
        """
        ...

    def is_home(self) -> bool:
        """Whether all reserved bundles are on this machine."""
        ...

    async def check_paths(self, paths: Mapping[str, str]) -> None:
        """`paths` is key -> path. Raises UserError where a machine with a reserved bundle does not see a path."""
        ...

    def prepare(self, planned: Iterable[Planned]) -> None:
        """Starts processes ahead of their objects, without waiting; `start` and `start_ranks` then take them."""
        ...

    async def start(
        self,
        build: Callable[..., Closable],
        *args: object,
        name: str,
        resources: Resources = _NO_GPU,
        concurrent: bool = False,
        **kwargs: object,
    ) -> Handle:
        """Builds one object. The methods of a `concurrent` one may be coroutines, which then overlap."""
        ...

    async def start_ranks(
        self, build: Callable[..., Closable], *args: object, name: str, resources: Sequence[Resources], **kwargs: object
    ) -> list[Handle]:
        """Builds one object for each of `resources`; each is also given rank=, world= and address= (rank 0's)."""
        ...

    def close(self) -> None:
        """Ends every object and gives back the reservation."""
        ...


class _LocalHandle:
    def __init__(self, target: Closable, seconds: float) -> None:
        self.target = target
        self.parts = {"build": seconds, **named_parts(target)}

    async def call(self, method: str, *args: object, **kwargs: object) -> object:
        return await result_of(getattr(self.target, method)(*args, **kwargs))

    async def ask(self, method: str) -> object:
        return await self.call(method)

    async def look(self, method: str) -> object:
        return await self.call(method)

    def kill(self) -> None:
        self.target.close()


class LocalRuntime:
    """All objects in this process."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._handles: list[_LocalHandle] = []

    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    async def reserve(self, groups: Sequence[Sequence[Bundle]]) -> None:
        pass

    def is_home(self) -> bool:
        return True

    async def check_paths(self, paths: Mapping[str, str]) -> None:
        pass

    def prepare(self, planned: Iterable[Planned]) -> None:
        pass

    async def start(
        self,
        build: Callable[..., Closable],
        *args: object,
        name: str,
        resources: Resources = _NO_GPU,
        concurrent: bool = False,
        **kwargs: object,
    ) -> Handle:
        return self._hold(build, *args, **kwargs)

    async def start_ranks(
        self, build: Callable[..., Closable], *args: object, name: str, resources: Sequence[Resources], **kwargs: object
    ) -> list[Handle]:
        assert len(resources) == 1, "one process holds one rank"
        return [self._hold(build, *args, **kwargs)]

    def _hold(self, build: Callable[..., Closable], *args: object, **kwargs: object) -> Handle:
        started = time.perf_counter()
        target = build(*args, **kwargs)
        self._handles.append(_LocalHandle(target, time.perf_counter() - started))
        return self._handles[-1]

    def close(self) -> None:
        for handle in reversed(self._handles):
            handle.target.close()
        self._handles.clear()


class _RayHandle:
    def __init__(self, actor: RayActor, name: str, activity: Activity, *, concurrent: bool) -> None:
        """Ray can cancel a call that a `concurrent` actor has begun; in any other actor only a kill ends it."""
        self.actor, self.name, self.activity = actor, name, activity
        self._concurrent = concurrent
        self.parts: Mapping[str, float] = {}

    async def build(self, build: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        with self.activity.doing(f"{self.name} to start"):
            parts = await self.wait(self.actor.build.remote(build, args, kwargs))
        assert isinstance(parts, dict)
        self.parts = parts

    async def call(self, method: str, *args: object, **kwargs: object) -> object:
        import ray

        reference = self.actor.call.remote(method, args, kwargs)
        try:
            with self.activity.doing(f"{self.name} to {method}"):
                return await self.wait(reference)
        except asyncio.CancelledError:
            if self._concurrent:
                ray.cancel(reference)
            raise

    async def ask(self, method: str) -> object:
        return await self.wait(self.actor.call.remote(method, (), {}))

    async def look(self, method: str) -> object:
        return await self.wait(self.actor.call.options(concurrency_group=_LOOKS).remote(method, (), {}))

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)

    async def wait(self, reference: Awaitable[object]) -> object:
        """The result of a call; raises the errors that `Handle.call` names."""
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise type(error.cause)(str(error.cause)) from None
            if isinstance(error.cause, OSError):
                reason = " ".join(str(error.cause).split()) or type(error.cause).__name__
                raise RunError(f"{self.name}: {reason}") from None
            raise
        except RayActorError as error:
            detail = re.search(r"Worker exit detail: (.*?\.)(?:\s|$)", " ".join(str(error).split()))
            reason = f" ({detail[1]})" if detail else ""
            raise ProcessDied(f"the process of {self.name} ended unexpectedly{reason}") from None
        except OutOfMemoryError:
            # Not an error of actors to Ray, and its text is a page that lists the machine's processes.
            reason = "Ray ended it because the machine has no memory left"
            raise ProcessDied(f"the process of {self.name} ended unexpectedly ({reason})") from None


class RayRuntime:
    """A Ray cluster: the one this process is in, else the one RAY_ADDRESS names, else a new one on this machine."""

    def __init__(self, *, processes: int, activity: Activity, imports: Imports | None = None) -> None:
        """`processes` is the number of actors to be started, for which a cluster on this machine is sized; those
        of a new one share `imports`, if it is given any.

        A runtime built while another one is open shares its cluster, so that several runs can be side by side.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DISABLE_MEMORY_MONITOR", "1")
        # By default Ray hides the GPUs from actors that ask for none, in a way that it announces to abandon.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._actors: list[RayActor] = []
        self._prepared: dict[str, _RayHandle] = {}
        self._reservation = cluster.Reservation()
        self._leave = cluster.connect(processes, imports)
        self._activity = activity
        activity.checks.append(cluster.check)
        cluster.check()
        cpus = cluster.total("CPU")
        if cpus < processes:
            raise UserError(f"the Ray cluster has {cpus} CPUs, but the recipe starts {processes} learners and engines")

    def gpus(self) -> int:
        return cluster.total("GPU")

    async def reserve(self, groups: Sequence[Sequence[Bundle]]) -> None:
        self._reservation = await cluster.reserve(groups)

    def is_home(self) -> bool:
        return cluster.is_home(self._reservation)

    async def check_paths(self, paths: Mapping[str, str]) -> None:
        await cluster.check_paths(self._reservation, paths)

    def prepare(self, planned: Iterable[Planned]) -> None:
        for one in planned:
            handle = self._actor(one.name, one.resources, one.concurrent, looks=not one.concurrent)
            handle.actor.prepare.remote(bool(one.resources.gpus), one.imports, one.args)
            self._prepared[one.name] = handle

    async def start(
        self,
        build: Callable[..., object],
        *args: object,
        name: str,
        resources: Resources = _NO_GPU,
        concurrent: bool = False,
        **kwargs: object,
    ) -> Handle:
        handle = self._process(name, resources, concurrent)
        await handle.build(build, args, kwargs)
        return handle

    async def start_ranks(
        self, build: Callable[..., object], *args: object, name: str, resources: Sequence[Resources], **kwargs: object
    ) -> list[Handle]:
        handles = [self._process(f"{name}-{rank}", own, looks=True) for rank, own in enumerate(resources)]
        address = await handles[0].wait(handles[0].actor.free_address.remote())
        await asyncio.gather(
            *(
                handle.build(build, args, {**kwargs, "rank": rank, "world": len(handles), "address": address})
                for rank, handle in enumerate(handles)
            )
        )
        return list(handles)

    def _process(self, name: str, resources: Resources, concurrent: bool = False, *, looks: bool = False) -> _RayHandle:
        """The prepared process of that name, or a new one; a restarted object gets a new one."""
        handle = self._prepared.pop(name, None)
        if handle is None:
            handle = self._actor(name, resources, concurrent, looks=looks)
            handle.actor.prepare.remote(bool(resources.gpus), "", ())
        return handle

    def _actor(self, name: str, resources: Resources, concurrent: bool = False, *, looks: bool = False) -> _RayHandle:
        import ray

        # Without a runtime environment of its own an actor takes a process that Ray has started with the cluster.
        options: dict[str, object] = {"num_cpus": 1, "num_gpus": resources.gpus}
        if resources.bundle is not None:
            options["scheduling_strategy"] = self._reservation.strategy(resources.bundle)
        if concurrent:
            options["max_concurrency"] = _MAX_CONCURRENT
        # `ps` and Ray's tools show the name of an actor's class.
        kind = type(name, (ConcurrentHost if concurrent else Host,), {})
        # Calls of a group run in a thread of its own; all others stay one after another.
        groups: Any = {"concurrency_groups": {_LOOKS: 1}}
        remote = ray.remote(**groups)(kind) if looks else ray.remote(kind)
        actor = remote.options(**options).remote()
        self._actors.append(actor)
        return _RayHandle(actor, name, self._activity, concurrent=concurrent)

    def close(self) -> None:
        import ray
        from ray.exceptions import RayError

        if cluster.check in self._activity.checks:
            self._activity.checks.remove(cluster.check)
        if cluster.is_alive():
            with contextlib.suppress(RayError):
                for actor in self._actors:
                    ray.kill(actor)
                cluster.release(self._reservation)
        self._actors.clear()
        self._prepared.clear()
        self._reservation = cluster.Reservation()
        if self._leave is not None:
            self._leave()
            self._leave = None
