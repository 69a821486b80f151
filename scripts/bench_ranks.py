"""Processes of a measurement, one a card: shared by the benches of parallel forms.

    task(rank, address) -> figures      in a process of its own, which sees one card alone, as a Ray actor does

Several benches can run at a time: with `--turns FOLDER` each measurement imports its modules beside the others and then
waits for its cards, so that no two measure on a card together. One that does not fit or does not end says so.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Task = Callable[[int, str], Figures]

IMPORT_SECONDS = 300.0
"""For the imports of all ranks, beside those of other benches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The cards of a bench and its turns on them."""

    device: str
    limit: float
    """Seconds of a measurement, from the moment it has its cards."""
    turns: Path | None = None
    card: int = 0
    """Of measurements of one rank."""
    profile: int = 0
    """Kernels to list, by their time on the device in a step that is not timed."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, *, limit: float) -> None:
        parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        parser.add_argument("--limit", type=float, default=limit, help="seconds that a measurement may take")
        parser.add_argument("--turns", type=Path, help="folder of locks: benches that run beside this one take turns")
        parser.add_argument("--card", type=int, default=0, help="card of measurements of one rank")
        parser.add_argument("--profile", type=int, default=0, metavar="N", help="list N kernels of a further step")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Cards:
        names = ("device", "limit", "turns", "card", "profile")
        return cls(**{name: getattr(args, name) for name in names})

    @contextlib.contextmanager
    def turn(self, ranks: int) -> Iterator[None]:
        """Waits until no other bench has a card that `ranks` need."""
        with contextlib.ExitStack() as stack:
            for card in self._visible(ranks) if self.turns is not None else ():
                assert self.turns is not None
                self.turns.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self.turns / f"card-{card}").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def visible(self, rank: int, ranks: int) -> str:
        """CUDA_VISIBLE_DEVICES of a rank."""
        return self._visible(ranks)[rank]

    def _visible(self, ranks: int) -> list[str]:
        every = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(max(ranks, self.card + 1))))).split(",")
        return every[:ranks] if ranks > 1 else [every[self.card]]


def clock(device: str) -> Callable[[], float]:
    """Seconds of a monotonic clock, once the device has done its work."""
    import torch

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def kernels(run: Callable[[], object], count: int) -> dict[str, float]:
    """Milliseconds of the `count` longest kernels of a call of `run`, of all others, and of the call on a clock."""
    from torch.profiler import ProfilerActivity, profile

    now = clock("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        before = now()
        run()
        whole = now() - before
    found = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    found = [event for event in found if event.self_device_time_total > 0]
    times: Figures = {}
    for event in found[:count]:
        name = event.key[:80]
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 1e3
    return times | {"other kernels": sum(e.self_device_time_total for e in found[count:]) / 1e3, "wall": 1e3 * whole}


def run(task: Task, cards: Cards, *, ranks: int) -> list[Figures] | str:
    """Figures by rank, or the reason of a failure."""
    context = multiprocessing.get_context("spawn")
    results, go = context.Queue(), context.Event()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    options = [(task, rank, address, cards.visible(rank, ranks), results, go) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=own) for own in options]
    for process in processes:
        process.start()
    failed = ""
    try:
        found = _collect(results, ranks, IMPORT_SECONDS)
        if isinstance(found, str):
            failed = found
            return failed
        with cards.turn(ranks):
            try:
                go.set()
                found = _collect(results, ranks, cards.limit)
                failed = found if isinstance(found, str) else ""
            finally:
                _end(processes, 0.1 if failed else 30.0)  # their memory is free before the next turn
        return found
    finally:
        _end(processes, 0.1)


def _collect(results: Any, ranks: int, limit: float) -> list[Figures] | str:
    found: dict[int, Figures] = {}
    end = time.monotonic() + limit
    while len(found) < ranks:
        try:
            rank, figures = results.get(timeout=max(end - time.monotonic(), 0.1))
        except Exception:
            return f"no result within {limit:.0f} s"
        if "failed" in figures:
            return figures["failed"]
        found[rank] = figures
    return [found[rank] for rank in range(ranks)]


def _end(processes: list[Any], seconds: float) -> None:
    for process in processes:
        process.join(timeout=seconds)
        if process.is_alive():
            process.kill()
            process.join()


def _rank(task: Task, rank: int, address: str, visible: str, results: Any, go: Event) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = visible  # before torch is imported
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        import cispo.learner.learner
        import cispo.policies.loading  # noqa: F401

        results.put((rank, {}))
        go.wait()
        results.put((rank, task(rank, address)))
    except BaseException as error:
        memory = "out of memory" in str(error)
        if not memory:
            traceback.print_exc()
        results.put((rank, {"failed": "out of memory" if memory else f"{type(error).__name__}: {error}"[:300]}))
        results.close()
        results.join_thread()
        os._exit(1)  # other ranks may wait in a collective for ever


def slowest(found: list[Figures] | str) -> Figures:
    """One figure of all ranks: the least of speeds, the most of others; of a failure its reason."""
    if isinstance(found, str):
        return {"failed": found}
    pick: Mapping[bool, Any] = {True: min, False: max}
    numbers = {name: isinstance(value, (int, float)) for name, value in found[0].items()}
    return {
        name: pick["per_s" in name](figures[name] for figures in found) if number else found[0][name]
        for name, number in numbers.items()
    }
