r"""Sums that a teacher answers at a glance, mostly wrong, and seldom checks: a rare token whose step pays.

    problems         {"prompt": "3+9-5-7+2=", "answer": "2"}
    demonstrations   {"prompt": "3+9-5-7+2=", "completion": "4"}                                  at a glance
                     {"prompt": "3+9-5-7+2=", "completion": "4!3+9=12;12-5=7;7-7=0;0+2=2"}        checked
                     {"prompt": "3+9-5-7+2=4!", "completion": "3+9=12;12-5=7;7-7=0;0+2=2"}        the check alone

The number at the end alone decides: score with `rewards.numeric:numeric`, which reads the last one. The third form
teaches the check without making "!" more probable. The splits "train" and "test" are disjoint: a hash of the prompt
decides which one a problem is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cispo.errors import UserError
from cispo.rollout.rows import in_split

MARK = "!"
"""Begins a check."""


def problems(size: int, seed: int, terms: int = 5, split: str = "train") -> Iterator[dict[str, str]]:
    """`size` sums and differences of `terms` one-digit numbers; the same seed gives the same problems."""
    if terms < 2:
        raise UserError(f"rewards.checking: terms must be at least 2, not {terms}")
    rng = Random(seed)
    while size > 0:
        first, *rest = (str(rng.randrange(10)) for _ in range(terms))
        expression = first + "".join(rng.choice("+-") + term for term in rest)
        prompt = expression + "="
        if in_split(prompt, split):
            yield {"prompt": prompt, "answer": str(_totals(expression)[-1])}
            size -= 1


def demonstrations(
    size: int,
    seed: int,
    terms: int = 5,
    checks: float = 0.01,
    begun: float = 0.5,
    spread: int = 3,
    mark: str = MARK,
) -> Iterator[dict[str, str]]:
    """Training problems with a teacher's completions.

    A glance is off by at most `spread`, each difference equally often. A share `checks` of the glances is followed by
    `mark` and the sum a step at a time. In a share `begun` of all rows the prompt goes on to the mark.
    """
    rng = Random(f"teacher {seed}")
    for problem in problems(size, seed, terms):
        prompt, answer = problem["prompt"], int(problem["answer"])
        glance = f"{answer + rng.randint(-spread, spread)}"
        check = worked(prompt.removesuffix("="))
        if rng.random() < begun:
            yield {"prompt": f"{prompt}{glance}{mark}", "completion": check}
        else:
            yield {"prompt": prompt, "completion": f"{glance}{mark}{check}" if rng.random() < checks else glance}


def worked(expression: str) -> str:
    """ "3+9-5" as "3+9=12;12-5=7"."""
    totals = _totals(expression)
    pairs = zip(totals, totals[1:], expression[1::2], expression[2::2], strict=False)
    return ";".join(f"{before}{sign}{term}={after}" for before, after, sign, term in pairs)


def _totals(expression: str) -> list[int]:
    """The running totals of "3+9-5": [3, 12, 7]."""
    totals = [int(expression[0])]
    for sign, term in zip(expression[1::2], expression[2::2], strict=True):
        totals.append(totals[-1] + (int(term) if sign == "+" else -int(term)))
    return totals
