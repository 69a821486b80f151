"""The inside of a process of the run: settings, imports, and the object that it holds.

prepare    environment and allocator of a CPU process, imports of the libraries
build      the object, and the seconds of its start by parts
call       its methods by name
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping
from pkgutil import resolve_name

from cispo.runtime import fork_server
from cispo.runtime.garbage import no_collections
from cispo.runtime.network import free_port, in_url, listen_on

# One thread a process: an engine and a learner of two threads each on two cores wait at one another's barriers, and one
# thread each was 10 times faster on a busy machine. The last entry hides torch's warning about NUMA.
CPU_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

# Parameters of glibc's mallopt (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) that keep freed memory in the process, which spares
# an engine most of its page faults.
_CPU_MALLOC = {-1: 1_000_000_000, -3: 1 << 25}


async def result_of(value: object) -> object:
    return await value if inspect.isawaitable(value) else value


def named_parts(target: object) -> Mapping[str, float]:
    """Parts of its start that an object names itself."""
    return getattr(target, "start_parts", {})


class Host:
    """The Ray actor. It builds its object in a call, so that an error of the constructor arrives whole."""

    def __init__(self) -> None:
        import psutil
        import ray

        self._address: str = ray.util.get_node_ip_address()
        listen_on(self._address)
        self._target: object = None
        began = fork_server.asked or psutil.Process().create_time()
        self._parts = {"process": time.time() - began, "import": 0.0}

    def prepare(self, gpu: bool, imports: str, args: tuple[object, ...]) -> None:
        """Settings that libraries read when they are imported, and the imports. A failure is left to `build`."""
        if not gpu:
            os.environ.update(CPU_ENV)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)  # as the variables, which it has read
            _keep_freed_memory()
        started = time.perf_counter()
        if imports:
            with contextlib.suppress(Exception), no_collections():
                resolve_name(imports)(*args)
        self._parts["import"] = time.perf_counter() - started

    def build(
        self, build: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Mapping[str, float]:
        """Returns the seconds of the start by its parts."""
        started = time.perf_counter()
        self._target = build(*args, **kwargs)
        # Of the libraries' half a million objects none ends before the process does: without them a full collection,
        # in the middle of some step, takes no time instead of 0.2 s and more.
        gc.collect()
        gc.freeze()
        self._parts["build"] = time.perf_counter() - started
        named = named_parts(self._target)
        return {part: self._parts.get(part, 0.0) + named.get(part, 0.0) for part in (*self._parts, *named)}

    def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return getattr(self._target, method)(*args, **kwargs)

    def free_address(self) -> str:
        """tcp://host:port of this actor's machine; the port is free at the moment."""
        return f"tcp://{in_url(self._address)}:{free_port(self._address)}"


class ConcurrentHost(Host):
    """A host with an event loop: Ray runs all calls of an actor in one as soon as one of its methods is a coroutine."""

    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return await result_of(super().call(method, args, kwargs))


def _keep_freed_memory() -> None:
    """Applies `_CPU_MALLOC`; another C library has no such call."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _CPU_MALLOC.items():
            mallopt(parameter, value)
