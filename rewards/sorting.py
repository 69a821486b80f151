"""The quickstart's task: sort two-digit numbers. Its prompts end with ">", and a few characters answer them.

    problems         {"prompt": "47,03,88,12>", "answer": "03,12,47,88"}            to practise on, and to be tested on
    demonstrations   {"prompt": "47,03,88,12>", "completion": "03,12,47,38"}        an imperfect teacher for the warm-up

The splits "train" and "test" are disjoint by construction: a hash of the problem's text decides which one it is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cispo.errors import UserError
from cispo.rollout.rows import in_split


def problems(size: int, seed: int, count: int = 4, split: str = "train") -> Iterator[dict[str, str]]:
    """`size` problems of `count` numbers each; the same seed gives the same problems."""
    if count < 1:
        raise UserError(f"rewards.sorting: count must be at least 1, not {count}")
    rng = Random(seed)
    while size > 0:
        numbers = [f"{rng.randrange(100):02d}" for _ in range(count)]
        prompt = ",".join(numbers) + ">"
        if in_split(prompt, split):
            yield {"prompt": prompt, "answer": ",".join(sorted(numbers))}
            size -= 1


def demonstrations(size: int, seed: int, noise: float = 0.7, count: int = 4) -> Iterator[dict[str, str]]:
    """Training problems with a teacher's completions, of which a share `noise` has one wrong digit."""
    rng = Random(f"teacher {seed}")
    for problem in problems(size, seed, count):
        wrong = rng.random() < noise
        completion = with_wrong_digit(problem["answer"], rng) if wrong else problem["answer"]
        yield {"prompt": problem["prompt"], "completion": completion}


def with_wrong_digit(text: str, rng: Random) -> str:
    """The text with one of its digits replaced by a different one."""
    place = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    digit = rng.choice([d for d in "0123456789" if d != text[place]])
    return text[:place] + digit + text[place + 1 :]
