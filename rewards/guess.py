"""A task of several turns for two cores: find a number of 0 to 31 in five guesses, with the thought in every reply.

    prompt "?"   policy "00-31:15"   environment ">"   policy "16-31:23"   environment "<"   policy "16-22:19"   ...

A reply is the interval that is left, which nothing but the policy's own earlier thoughts and guesses says, and a guess.
Five guesses by halves find 31 of 32 numbers.

    problems         {"prompt": "?", "answer": "17", ...}
    demonstrations   {"prompt": "?", "completion": [assistant "00-31:13", user ">", ..., assistant "14-21:17"]}

A number is no problem to hold out: the splits "train" and "test" share their 32 numbers and differ in their seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cispo.agents.contract import Reply, Step

_NUMBERS = 32
GUESSES = 5


class Guess:
    """The environment of one attempt."""

    def __init__(self, answer: str) -> None:
        self.answer = int(answer)
        self.guesses = 0

    def step(self, reply: Reply) -> Step | None:
        self.guesses += 1
        guess = reply.text.rpartition(":")[2]
        if not (len(guess) == 2 and guess.isdigit() and guess.isascii()):
            return Step(observation="!", done=True)
        if int(guess) == self.answer or self.guesses == GUESSES:
            return None
        return Step(observation="<" if self.answer < int(guess) else ">")


def parse(text: str) -> Reply:
    """The interval as the thought, for `env.tool_parser`: with `env.thinking: drop` the guesses alone stay."""
    thought, _, guess = text.rpartition(":")
    return Reply(text=text, content=guess, thought=thought)


def found(completion: str, answer: str, **_: object) -> float:
    """1.0 where the last guess is the number."""
    return float(completion.rpartition(":")[2] == answer)


def problems(size: int, seed: int, split: str = "train") -> Iterator[dict[str, str]]:
    """`size` numbers; the same seed and split give the same numbers."""
    rng = Random(f"{split} {seed}")
    for _ in range(size):
        yield {"prompt": "?", "answer": f"{rng.randrange(_NUMBERS):02d}"}


def demonstrations(size: int, seed: int, noise: float = 0.6) -> Iterator[dict[str, object]]:
    """Conversations of a teacher that keeps the interval right and guesses anywhere in it with a chance of `noise`."""
    rng = Random(f"teacher {seed}")
    for _ in range(size):
        secret, low, high = rng.randrange(_NUMBERS), 0, _NUMBERS - 1
        turns: list[dict[str, str]] = []
        for _ in range(GUESSES):
            guess = rng.randint(low, high) if rng.random() < noise else (low + high) // 2
            turns.append({"role": "assistant", "content": f"{low:02d}-{high:02d}:{guess:02d}"})
            if guess == secret:
                break
            turns.append({"role": "user", "content": "<" if secret < guess else ">"})
            low, high = (low, guess - 1) if secret < guess else (guess + 1, high)
        if turns[-1]["role"] == "user":
            turns.pop()
        yield {"prompt": "?", "completion": turns}
