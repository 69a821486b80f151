"""Tools and environments that are broken, one for each way, for `inject_tool_faults`.

FAULTS[name]() breaks; `broken` is a tool, and `Broken` an environment, that does so where it is told to
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from cispo.agents.contract import Reply, Step


def raises() -> object:
    raise random.choice([RuntimeError("by design"), MemoryError(), KeyboardInterrupt(), SystemExit(3), StopIteration()])


def wrong_type() -> object:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    values: list[object] = [object(), 7j, b"bytes", nested, lambda: None, threading.Lock(), (1, 2), Step(reward="much")]  # type: ignore[arg-type]
    return random.choice(
        [*values, Step(observation=[{"role": "user", "content": object()}]), Step(reward=float("nan"))]
    )  # type: ignore[arg-type]


def sleeps_forever() -> object:
    while True:
        time.sleep(3600)


def loops_in_c() -> object:
    """A regular expression that backtracks for ever, and holds Python's lock meanwhile."""
    return re.match(r"(a|a)+$", "a" * 60 + "b")


def exits() -> object:
    os._exit(random.choice([0, 3]))


def kills_itself() -> object:
    os.kill(os.getpid(), random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))
    return "alive"


def crashes() -> object:
    """An invalid address, as a broken extension module reads it."""
    return ctypes.string_at(8)


def allocates() -> object:
    """256 MB a second, so that a machine survives until the time limit."""
    held: list[bytes] = []
    while True:
        held.append(os.urandom(1 << 10) * (8 << 10))
        time.sleep(0.03)


def floods_stdout() -> object:
    for _ in range(160):
        sys.stdout.write("x" * (64 << 10))
    sys.stdout.flush()
    return "flooded"


def returns_megabytes() -> object:
    return "0123456789" * 1_000_000


def bad_text() -> object:
    """No UTF-8 holds a lone surrogate; a NUL ends a text in C."""
    return random.choice(["\ud800 lone", "a\0b", "\x1b[2J", "\u202e", b"\xff\xfe".decode("latin1"), ""])


def closes_descriptors() -> object:
    os.closerange(0, 1024)
    return "closed"


def leaves_processes() -> object:
    """One in the group of its parent, and one in a session of its own, as a daemon is."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(3600)"]
    subprocess.Popen(sleeper)
    subprocess.Popen(sleeper, start_new_session=True)
    return "left"


def leaves_threads() -> object:
    def spin() -> None:
        while True:
            pass

    threading.Thread(target=spin, daemon=random.random() < 0.5).start()
    return "left"


def recurses() -> object:
    return recurses()


def changes_its_world() -> object:
    """All that the calls of one process share."""
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    sys.setrecursionlimit(60)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    random.seed(0)
    return "changed"


FAULTS: dict[str, Callable[[], object]] = {
    "raises": raises,
    "wrong-type": wrong_type,
    "sleeps-forever": sleeps_forever,
    "loops-in-c": loops_in_c,
    "exits": exits,
    "kills-itself": kills_itself,
    "crashes": crashes,
    "allocates": allocates,
    "floods-stdout": floods_stdout,
    "returns-megabytes": returns_megabytes,
    "bad-text": bad_text,
    "closes-descriptors": closes_descriptors,
    "leaves-processes": leaves_processes,
    "leaves-threads": leaves_threads,
    "recurses": recurses,
    "changes-its-world": changes_its_world,
}


def broken(kind: str) -> object:
    """A tool that breaks."""
    return FAULTS[kind]()


def count(word: str, *, session: dict[str, object]) -> str:
    """A tool with a state: a call that is lost or repeated shows in its answers."""
    said = session.setdefault("said", [])
    assert isinstance(said, list)
    said.append(word)
    time.sleep(random.random() * 0.02)
    return f"{len(said)} {word}"


class Broken:
    """Answers as `count`, and breaks at the reply "break". Attempt `victim` breaks in the method `where` as well."""

    def __init__(self, kind: str, where: str, victim: int, attempt: int) -> None:
        self.kind, self.where, self.attempt = kind, where if attempt == victim else "", attempt
        self.said: list[str] = []
        if self.where == "__init__":
            FAULTS[kind]()

    def start(self) -> object:
        return FAULTS[self.kind]() if self.where == "start" else f"n{self.attempt}"

    def step(self, reply: Reply) -> object:
        if reply.text == "break":
            return FAULTS[self.kind]()
        self.said.append(reply.text)
        time.sleep(random.random() * 0.02)
        return f"{len(self.said)} {reply.text}"

    def reward(self) -> object:
        return FAULTS[self.kind]() if self.where == "reward" else {"said": float(len(self.said))}

    def close(self) -> None:
        if self.where == "close":
            FAULTS[self.kind]()
