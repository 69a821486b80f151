"""A game of GEM as it is, and a teacher who passes over its hints in a share `noise` of the games."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import gem  # type: ignore[import-not-found]

GAME = "game:GuessTheNumber-v0-easy"
"""A number of 1 to 10 in four guesses."""


class Game:
    def __init__(self, game: str = GAME) -> None:
        self.env = gem.make(game)

    def reset(self, seed: int) -> Any:
        return self.env.reset(seed)

    def step(self, text: str) -> Any:
        return self.env.step(text)


def problems(size: int, **others: object) -> Iterator[dict[str, str]]:
    """The game's own text follows the prompt, and its number is that of the group's seed; `others` are not read."""
    for _ in range(size):
        yield {"prompt": ">"}


def demonstrations(size: int, seed: int, noise: float = 0.5) -> Iterator[dict[str, object]]:
    rng = Random(seed)
    for number in range(size):
        env, low, high, attends = gem.make(GAME), 1, 10, rng.random() >= noise
        said, _ = env.reset(seed=10_000 + number)
        opening = [{"role": "user", "content": text} for text in (">", said)]
        turns, over = list[dict[str, str]](), False
        while not over:
            guess = rng.randint(low, high) if attends else rng.randint(1, 10)
            turns.append({"role": "assistant", "content": f"\\boxed{{{guess}}}"})
            said, _, ended, cut, _ = env.step(turns[-1]["content"])
            over = ended or cut
            turns.append({"role": "user", "content": said})
            low, high = (guess + 1, high) if "higher" in said else (low, guess - 1) if "lower" in said else (low, high)
        yield {"prompt": opening, "completion": turns[:-1]}
