"""Where the heavy classes live: in this process or in Ray actors, behind one handle.

    handle = await runtime.start(Learner, ..., name="learner-0")
    result = await handle.call("update", micro_batches, ...)

Both runtimes run the same classes. `local` is for tests and debuggers: calls run in this process. An object that is
started `concurrent` takes any number of calls at once, in its event loop; any other one call after another.
Which Ray cluster it is, and what of it is reserved: `cluster`. No other file imports Ray.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cispo.errors import ProcessDied, RunError, UserError
from cispo.runtime import cluster
from cispo.runtime.cluster import Bundle
from cispo.runtime.network import free_port, in_url, listen_on
from cispo.runtime.watchdog import Activity

# One thread each: on a shared machine more wait for each other (docs/design.md, Threads). The allocator keeps what it
# has, which spares an engine most of its page faults. The last hides torch's warning about NUMA.
_CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


# Calls of a concurrent object at a time; Ray lets later ones wait, a question about progress among them.
_MAX_CONCURRENT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What an object takes of a machine.

    Example: Seat(gpus=0.5, bundle=0)
    """

    gpus: float = 0
    """A part of one GPU, or whole ones."""
    bundle: int | None = None
    """Which of the reserved bundles it sits in."""


class Handle(Protocol):
    """Something that lives elsewhere and answers to method names."""

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the object; UserErrors and RunErrors come back as they were raised.

        Raises ProcessDied where its process is gone. Cancelling a call of a concurrent object cancels the method there.
        """
        ...

    async def ask(self, method: str) -> Any:
        """As `call`, but a watchdog does not count it as something that moves."""
        ...

    def kill(self) -> None:
        """Ends it without a word; nothing happens where it is gone already."""
        ...


_NO_GPU = Seat()


class Runtime(Protocol):
    """Starts objects and ends them."""

    def gpus(self) -> int:
        """How many there are."""
        ...

    async def reserve(self, groups: Sequence[Sequence[Bundle]]) -> None:
        """Reserves resources for the seats that name a bundle, counted through all groups.

        A bundle is on one machine, a group's bundles are near each other.
        """
        ...

    def is_home(self) -> bool:
        """Whether all that is reserved is on this machine."""
        ...

    async def check_paths(self, paths: Mapping[str, str]) -> None:
        """Raises UserError where a machine with a reserved bundle does not see one of the paths, given by key."""
        ...

    async def start(
        self,
        build: Callable[..., Any],
        *args: Any,
        name: str,
        seat: Seat = _NO_GPU,
        concurrent: bool = False,
        **kwargs: Any,
    ) -> Handle:
        """Builds one object; `concurrent` if its methods may be coroutines, several of which are under way at once."""
        ...

    async def start_ranks(
        self, build: Callable[..., Any], *args: Any, name: str, seats: Sequence[Seat], **kwargs: Any
    ) -> list[Handle]:
        """Builds one object a seat; each also gets rank=, world= and address= (where the ranks meet)."""
        ...

    def close(self) -> None: ...


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class _LocalHandle:
    def __init__(self, target: Any) -> None:
        self.target = target

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await _result(getattr(self.target, method)(*args, **kwargs))

    async def ask(self, method: str) -> Any:
        return await self.call(method)

    def kill(self) -> None:
        self.target.close()


class LocalRuntime:
    """Everything in this process."""

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

    async def start(
        self,
        build: Callable[..., Any],
        *args: Any,
        name: str,
        seat: Seat = _NO_GPU,
        concurrent: bool = False,
        **kwargs: Any,
    ) -> Handle:
        self._handles.append(_LocalHandle(build(*args, **kwargs)))
        return self._handles[-1]

    async def start_ranks(
        self, build: Callable[..., Any], *args: Any, name: str, seats: Sequence[Seat], **kwargs: Any
    ) -> list[Handle]:
        assert len(seats) == 1, "one process holds one rank"
        return [await self.start(build, *args, name=name, seat=seats[0], **kwargs)]

    def close(self) -> None:
        for handle in reversed(self._handles):
            handle.target.close()
        self._handles.clear()


class _Host:
    """The Ray actor: an empty process until it is told what to build, so that errors of a constructor arrive whole."""

    def __init__(self) -> None:
        import ray

        self._address: str = ray.util.get_node_ip_address()
        listen_on(self._address)
        self._target: Any = None

    def build(self, build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._target = build(*args, **kwargs)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self._target, method)(*args, **kwargs)

    def free_address(self) -> str:
        """tcp://host:port of this actor's machine, free at the moment."""
        return f"tcp://{in_url(self._address)}:{free_port(self._address)}"


class _ConcurrentHost(_Host):
    """The same with an event loop, in which Ray runs every call of an actor that has a coroutine among its methods."""

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await _result(super().call(method, args, kwargs))


class _RayHandle:
    def __init__(self, actor: Any, name: str, ray: Any, activity: Activity, *, concurrent: bool) -> None:
        """Calls that are under way in a `concurrent` actor can be cancelled; of others only a kill is an end."""
        self.actor, self.name, self._ray, self.activity = actor, name, ray, activity
        self._concurrent = concurrent

    async def build(self, build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.activity.doing(f"{self.name} to start"):
            await self.wait(self.actor.build.remote(build, args, kwargs))

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        reference = self.actor.call.remote(method, args, kwargs)
        try:
            with self.activity.doing(f"{self.name} to {method}"):
                return await self.wait(reference)
        except asyncio.CancelledError:
            if self._concurrent:
                self._ray.cancel(reference)
            raise

    async def ask(self, method: str) -> Any:
        return await self.wait(self.actor.call.remote(method, (), {}))

    def kill(self) -> None:
        self._ray.kill(self.actor)

    async def wait(self, reference: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise type(error.cause)(str(error.cause)) from None
            raise
        except RayActorError as error:
            detail = re.search(r"Worker exit detail: (.*?\.)(?:\s|$)", " ".join(str(error).split()))
            reason = f" ({detail[1]})" if detail else ""
            raise ProcessDied(f"the process of {self.name} ended unexpectedly{reason}") from None


class RayRuntime:
    """A Ray cluster: this process's, else the one that RAY_ADDRESS names, else one of this machine for its lifetime."""

    def __init__(self, *, processes: int, activity: Activity) -> None:
        """`processes` is how many actors will be started; a laptop's cluster is sized for them.

        A runtime inside another's lifetime shares its cluster, so that several runs can stand side by side.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DISABLE_MEMORY_MONITOR", "1")
        # Ray would hide the GPUs from actors that ask for none, in a way that it will itself abandon.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._actors: list[Any] = []
        self._room = cluster.Room()
        self._owner = cluster.connect(processes)
        import ray

        self._ray = ray
        self._activity = activity
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < processes:
            raise UserError(f"the Ray cluster has {cpus} CPUs, but the recipe starts {processes} learners and engines")

    def gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    async def reserve(self, groups: Sequence[Sequence[Bundle]]) -> None:
        self._room = await cluster.reserve(groups)

    def is_home(self) -> bool:
        return cluster.is_home(self._room)

    async def check_paths(self, paths: Mapping[str, str]) -> None:
        await cluster.check_paths(self._room, paths)

    async def start(
        self,
        build: Callable[..., Any],
        *args: Any,
        name: str,
        seat: Seat = _NO_GPU,
        concurrent: bool = False,
        **kwargs: Any,
    ) -> Handle:
        handle = self._actor(name, seat, concurrent)
        await handle.build(build, args, kwargs)
        return handle

    async def start_ranks(
        self, build: Callable[..., Any], *args: Any, name: str, seats: Sequence[Seat], **kwargs: Any
    ) -> list[Handle]:
        handles = [self._actor(f"{name}-{rank}", seat) for rank, seat in enumerate(seats)]
        address = await handles[0].wait(handles[0].actor.free_address.remote())
        places = [{"rank": rank, "world": len(seats), "address": address} for rank in range(len(seats))]
        await asyncio.gather(
            *(h.build(build, args, {**kwargs, **place}) for h, place in zip(handles, places, strict=True))
        )
        return list(handles)

    def _actor(self, name: str, seat: Seat, concurrent: bool = False) -> _RayHandle:
        environment = {"env_vars": {} if seat.gpus else _CPU_ENV}
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": seat.gpus, "runtime_env": environment}
        if seat.bundle is not None:
            options["scheduling_strategy"] = self._room.strategy(seat.bundle)
        if concurrent:
            options["max_concurrency"] = _MAX_CONCURRENT
        # A class of that name, so that `ps` and Ray's tools say which process is which.
        kind = type(name, (_ConcurrentHost if concurrent else _Host,), {})
        actor = self._ray.remote(kind).options(**options).remote()
        self._actors.append(actor)
        return _RayHandle(actor, name, self._ray, self._activity, concurrent=concurrent)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        cluster.release(self._room)
        self._room = cluster.Room()
        if self._owner:
            self._ray.shutdown()
