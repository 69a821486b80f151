"""Tools and environments of the agents' tests: good ones, and one for each way of being broken."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from cispo.agents.contract import Reply, Step
from cispo.types import Message
from rewards.chase import Chase


def add(a: int, b: int = 1) -> str:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return str(a + b)


def lookup(key: str, *, table: dict) -> str:
    """Looks a key up."""
    return table[key]


async def later(text: str) -> str:
    await asyncio.sleep(0.01)
    return text.upper()


def finish(answer: str) -> Step:
    return Step(observation="over", reward={"tool": 2.0}, done=True)


def raises(text: str) -> str:
    raise RuntimeError(f"no {text}")


def hangs(text: str) -> str:
    while True:
        time.sleep(0.01)


def exits(text: str) -> str:
    os._exit(3)


def floods(text: str) -> str:
    return "x" * 10_000_000


def gives_object(text: str) -> object:
    return object()


def sleeps_at_random(text: str) -> str:
    time.sleep(random.random() * 0.05)
    return text


class Counter:
    """Counts the replies; its state makes a lost or doubled replay visible."""

    def __init__(self, target: int, seed: int) -> None:
        self.target, self.seed, self.said = target, seed, list[str]()

    def start(self) -> Sequence[Message]:
        return [{"role": "user", "content": f"count to {self.target}"}]

    def step(self, reply: Reply) -> Step | str | None:
        if reply.text == "crash" and not os.path.exists(f"{self.seed}.crashed"):
            open(f"{self.seed}.crashed", "w").close()
            os._exit(1)
        if reply.text == "die":
            os._exit(1)
        if reply.text == "hang":
            time.sleep(3600)
        if reply.text == "raise":
            raise ValueError("by design")
        if reply.text == "bad":
            return 7  # type: ignore[return-value]
        self.said.append(reply.text)
        if reply.text == "stop":
            return None
        return Step(observation=f"{len(self.said)} {self.said[-1]}", reward=0.25, done=len(self.said) == self.target)

    def reward(self) -> dict[str, float]:
        return {"said": float(len(self.said))}


class Gym:
    """gymnasium's contract, on Python's own random numbers."""

    def reset(self, seed: int) -> tuple[str, dict]:
        random.seed(seed)
        self.secret = random.randrange(100)
        return "guess", {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        right = text == str(self.secret)
        return "right" if right else "wrong", float(right), right, False, {}


class Trl:
    """TRL's contract: public methods are tools."""

    def __init__(self) -> None:
        self.total = 0

    def reset(self, start: int, **_: object) -> str:
        self.total = start
        return f"you have {start}"

    def add(self, amount: int) -> str:
        """Adds to the total.

        Args:
            amount: what to add
        """
        self.total += amount
        return str(self.total)

    def get_reward(self) -> float:
        return float(self.total)


class SleepyChase(Chase):
    """The shipped environment, with a tool that takes its time."""

    def step(self, reply: Reply) -> Step | None:
        time.sleep(random.random() * 0.03)
        return super().step(reply)


class ChaseThatKills(Chase):
    """Kills the driver once: at its attempt's reply whose number stands in the file `mark`."""

    def __init__(self, table: str, mark: str) -> None:
        super().__init__(table)
        self.mark, self.said = Path(mark), 0

    def step(self, reply: Reply) -> Step | None:
        self.said += 1
        if self.mark.exists() and self.mark.read_text() == str(self.said):
            self.mark.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
        return super().step(reply)


class NeverStarts:
    """A game that cannot be reset."""

    def reset(self, seed: int) -> tuple[str, dict[str, object]]:
        raise ValueError(f"seeded with {31 if 0 <= seed < 2**31 else 'more'} bits")

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, object]]:
        return "", 0.0, True, False, {}
