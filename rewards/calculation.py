"""A task for a policy with a calculator: expressions of three numbers that it can hardly work out in its head.

    user "What is 47 * 86 - 13?"   policy "[calculator 47*86-13]"   tool "4029"   policy "4029"

    problems    {"messages": [a solved problem with its call, the question], "answer": "4029"}

The solved problem shows a weak model the form of a call. The splits "train" and "test" are disjoint by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cispo.rollout.rows import in_split
from cispo.types import Message

_EXAMPLE = ("58", "*", "21", "+", "34")
_TASK = "Use the calculator, then say the number alone. A call is written [calculator 1+2]."


def problems(size: int, seed: int, split: str = "train", shots: int = 1) -> Iterator[dict[str, object]]:
    """`size` problems of a product and a sum or difference; the same seed gives the same problems.

    With `shots` 0 no solved problem stands before the question.
    """
    rng = Random(seed)
    while size > 0:
        numbers = [str(rng.randrange(11, 100)) for _ in range(3)]
        first, second = rng.choice((("*", "+"), ("*", "-"), ("+", "*"), ("-", "*")))
        parts = (numbers[0], first, numbers[1], second, numbers[2])
        if "".join(parts) != "".join(_EXAMPLE) and in_split("".join(parts), split):
            shown = _solved(_EXAMPLE) if shots else []
            yield {"messages": [*shown, _asked(parts, first=not shown)], "answer": str(_value(parts))}
            size -= 1


def _solved(parts: tuple[str, ...]) -> list[Message]:
    value = str(_value(parts))
    return [
        _asked(parts, first=True),
        {"role": "assistant", "content": f"[calculator {''.join(parts)}]"},
        {"role": "tool", "content": value},
        {"role": "assistant", "content": value},
    ]


def _asked(parts: tuple[str, ...], *, first: bool) -> Message:
    question = f"What is {' '.join(parts)}?"
    return {"role": "user", "content": f"{_TASK}\n{question}" if first else question}


def _value(parts: tuple[str, ...]) -> int:
    a, first, b, second, c = parts
    x, y, z = int(a), int(b), int(c)
    if first == "*":
        return x * y + (z if second == "+" else -z)
    return x + (y * z if first == "+" else -y * z)
