"""A group of ranks in processes of their own, from a server that has imported once."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path


def free_address() -> str:
    """An address of this machine with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def run_ranks(
    entry: Callable[..., None],
    world: int,
    root: Path,
    *options: object,
    preload: Sequence[str] = (),
    timeout: float = 400,
) -> list[int | None]:
    """Runs `entry(rank, world, root, address, *options)` in `world` processes; the exit code of each.

    The server imports the module of `entry`, and those of `preload`.
    A process that hangs is killed after `timeout` seconds, which is a failure and no process for ever.
    """
    address = free_address()
    context = get_context("forkserver")
    context.set_forkserver_preload([entry.__module__, *preload])
    ranks = [context.Process(target=entry, args=(own, world, root, address, *options)) for own in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(timeout=max(deadline - time.monotonic(), 0.1))
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]
