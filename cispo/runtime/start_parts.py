"""Seconds of a start by its parts, from the first instruction of the command to the first step.

time/start               all of it
time/start/import        the driver's imports
time/start/learner/...   parts inside the processes, of the slowest one; they overlap with the driver's
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAME = "time/start"


class Parts(dict[str, float]):
    """Seconds by part, of a start for one."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """A block that belongs to `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + time.perf_counter() - started

    def counted(self, part: str, call: Callable[_P, _R]) -> Callable[_P, _R]:
        """The function as a part."""

        def timed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with self.timed(part):
                return call(*args, **kwargs)

        return timed


class StartParts(Parts):
    """Parts of a run's start in its driver: one after another, so that with `other` they add up to the whole."""

    of_command: ClassVar[bool] = False
    """Whether this process is that of a command, whose start is the run's."""

    def __init__(self) -> None:
        """The start begins now; of a command with the process, of which all so far is `import`."""
        super().__init__()
        self.begun = _start_of_process() if self.of_command else time.time()
        if self.of_command:
            self["import"] = time.time() - self.begun

    def metrics(self, processes: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
        """All parts up to now; `processes` is kind -> the parts of each of its processes, of which the slowest counts.

        Example: {"time/start": 9.1, "time/start/inputs": 1.2, "time/start/engine/build": 2.2, ...}
        """
        whole = time.time() - self.begun
        found = {**self, "other": whole - sum(self.values())}
        for kind, each in processes.items():
            slowest = max(each, key=_seconds, default={})
            found |= {f"{kind}/{part}": seconds for part, seconds in slowest.items()}
        return {_NAME: whole} | {f"{_NAME}/{part}": seconds for part, seconds in found.items()}


def _start_of_process() -> float:
    import psutil

    return psutil.Process().create_time()


def _seconds(parts: Mapping[str, float]) -> float:
    """Of a process, whose other parts lie within its import and build."""
    return sum(parts.get(part, 0.0) for part in ("process", "import", "build"))
