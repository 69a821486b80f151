"""Children of a driver end with it, also where it is killed; processes of other drivers do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cispo.runtime.orphans import MARK

ROOT = Path(__file__).parents[1]

# A child in a session of its own, orphaned by its parent's end, as Ray's agents are.
DRIVER = """
import subprocess, sys, time
import cispo.runtime.orphans as orphans

orphans.watch_over()
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
print(int(child.stdout.readline()), flush=True)
sys.stdin.read()
"""


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def watchers(driver: int) -> list[psutil.Process]:
    lines = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [process for process, line in lines.items() if "cispo.runtime.orphans" in line and str(driver) in line]


def test_orphans_end_with_a_driver_that_is_killed() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    stranger = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: "of another driver"})
    try:
        assert driver.stdout is not None
        child = psutil.Process(int(driver.stdout.readline()))
        assert until(lambda: len(watchers(driver.pid)) == 1, 10) and child.is_running()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        # The watcher gives it 10 s to end by itself, and the machine may be busy.
        assert until(lambda: not child.is_running(), 60)
        assert until(lambda: not watchers(driver.pid), 30)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        driver.kill()
