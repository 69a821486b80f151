"""A task of several turns for two cores: follow a hidden table for h hops, one lookup a turn.

    prompt "2d?"   policy "2:d"   environment ">r"   policy "1:r"   environment ">p"   policy "=p"

A reply `hops left:key` looks a key up, a reply `=key` is the answer. The table is the environment's: an answer without
its lookups is a guess among 26 letters.

    problems         {"prompt": "2d?", "answer": "=p", "table": "...", ...}
    demonstrations   {"prompt": "2d?", "completion": [assistant "2:d", user ">r", ..., assistant "=p"]}

The splits "train" and "test" are disjoint by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase

from cispo.agents.contract import Reply, Step
from cispo.rollout.rows import in_split

_HOPS = 5


class Chase:
    """The environment of one attempt."""

    def __init__(self, table: str) -> None:
        """`table` has the successor of each letter, in order."""
        self.table = dict(zip(ascii_lowercase, table, strict=True))

    def step(self, reply: Reply) -> Step | None:
        if reply.text.startswith("="):
            return None
        left, _, key = reply.text.partition(":")
        found = self.table.get(key, "!") if len(left) == 1 and left.isdigit() else "!"
        return Step(observation=f">{found}")


def problems(size: int, seed: int, split: str = "train") -> Iterator[dict[str, str]]:
    """`size` problems of 1 to 5 hops; the same seed gives the same problems."""
    rng = Random(seed)
    while size > 0:
        table = "".join(rng.choices(ascii_lowercase, k=26))
        hops, key = rng.randint(1, _HOPS), rng.choice(ascii_lowercase)
        if in_split(f"{hops}{key}{table}", split):
            yield {"prompt": f"{hops}{key}?", "answer": "=" + _walk(table, key, hops)[-1], "table": table}
            size -= 1


def demonstrations(size: int, seed: int, noise: float = 0.7) -> Iterator[dict[str, object]]:
    """Training problems with a teacher's conversations, of which a share `noise` stops after a random hop."""
    rng = Random(f"teacher {seed}")
    for problem in problems(size, seed):
        hops, key = int(problem["prompt"][0]), problem["prompt"][1]
        stop = rng.randint(0, hops + 1) if rng.random() < noise else hops
        path = _walk(problem["table"], key, stop)
        turns: list[dict[str, str]] = []
        for number, (asked, found) in enumerate(zip(path, path[1:], strict=False)):
            turns.append({"role": "assistant", "content": f"{max(hops - number, 0)}:{asked}"})
            turns.append({"role": "user", "content": f">{found}"})
        yield {"prompt": problem["prompt"], "completion": [*turns, {"role": "assistant", "content": f"={path[-1]}"}]}


def _walk(table: str, key: str, hops: int) -> str:
    """The keys from `key` on, hops + 1 of them."""
    path = key
    for _ in range(hops):
        path += table[ascii_lowercase.index(path[-1])]
    return path
