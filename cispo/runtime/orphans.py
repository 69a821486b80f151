"""Orphans of a killed driver: a watcher process waits for its end, ends the processes it started, removes their folder.

    driver, marked --> Ray's processes, actors, reward workers: all inherit the mark in their environment
           ^
        watcher, in a session of its own, so that a signal to the driver's process group does not end it

Ray's processes nearly always end by themselves when their driver dies. An exception was seen: two of Ray's agents that
are just starting can each hold open the pipe that would tell the other of the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

MARK = "CISPO_DRIVER"

_LOOK_SECONDS = 1.0
# For processes that end by themselves, or are still writing.
_GRACE_SECONDS = 10.0


def watch_over(folder: Path | None = None) -> None:
    """Starts a watcher for this process; later children of this process end with it, at most some 10 s later.

    `folder` is theirs: the watcher then removes it, where the driver has not.
    """
    mark = f"{os.getpid()}-{uuid.uuid4().hex}"
    subprocess.Popen(
        [sys.executable, "-m", "cispo.runtime.orphans", str(os.getpid()), mark, *([str(folder)] if folder else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != MARK}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    os.environ[MARK] = mark


def end_orphans(driver: int, mark: str, *folders: str) -> None:
    """Waits for the end of the driver, then of the processes with its mark; kills them after a grace period.

    Then removes the folders.
    """
    try:
        process = psutil.Process(driver)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_SECONDS)
    except psutil.NoSuchProcess:
        pass
    deadline = time.monotonic() + _GRACE_SECONDS
    while orphans := [process for process in psutil.process_iter() if _is_marked(process, mark)]:
        if time.monotonic() > deadline:
            for process in orphans:
                try:
                    process.kill()
                except psutil.Error:
                    pass
        time.sleep(_LOOK_SECONDS)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def kill_marked(variable: str, mark: str) -> None:
    """Kills every process that has inherited the environment variable with this value, in any process group."""
    for process in psutil.process_iter():
        if _is_marked(process, mark, variable):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _is_marked(process: psutil.Process, mark: str, variable: str = MARK) -> bool:
    try:
        return process.environ().get(variable) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    end_orphans(int(sys.argv[1]), *sys.argv[2:])
