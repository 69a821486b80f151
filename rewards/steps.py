r"""reasoning-gym's chain_sum, worked out one operation a line by a teacher who slips.

    problems         {"prompt": "36-8+73=", "answer": "101", ...}                   to practise on, and to be tested on
    demonstrations   {"prompt": "36-8+73=", "completion": "36-8=28\n28+73=101"}     for the warm-up

Both take chain_sum's parameters (min_terms, max_digits ...). Only the number at the end decides: score with
`rewards.numeric:numeric`, which reads the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cispo.rollout.rows import Row, load_rows

from .sorting import with_wrong_digit


def problems(size: int, seed: int, split: str = "train", **params: object) -> Iterator[Row]:
    """`size` items of a split; the prompt is the expression alone, without spaces, and "="."""
    for row in load_rows("reasoning_gym:chain_sum", split, {"size": size, "seed": seed, **params}, None, "chain_sum"):
        yield {**row, "prompt": row["expression"].replace(" ", "") + "="}


def demonstrations(size: int, seed: int, noise: float = 0.6, **params: object) -> Iterator[Row]:
    """Training problems with solutions; a share `noise` has one slip: a wrong digit in the result of one line.

    The lines after a slip go on from the wrong result, as a person would.
    """
    rng = Random(f"teacher {seed}")
    for row in problems(size, seed, "train", **params):
        slips = rng.random() < noise
        yield {**row, "completion": worked(row["expression"], rng if slips else None)}


def worked(expression: str, slips: Random | None = None) -> str:
    """ "36 - 8 + 73" line by line; with a random source, the result of one line has a wrong digit."""
    first, *rest = expression.split()
    operations = list(zip(rest[::2], rest[1::2], strict=True))
    slip_at = slips.randrange(len(operations)) if slips else None
    total, lines = int(first), list[str]()
    for number, (sign, term) in enumerate(operations):
        result = total + int(term) if sign == "+" else total - int(term)
        if slips and number == slip_at:
            result = int(with_wrong_digit(str(result), slips))
        lines.append(f"{total}{sign}{term}={result}")
        total = result
    return "\n".join(lines)
