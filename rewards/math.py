r"""Mathematical equality through math-verify: 0.5, 1/2 and \boxed{\frac{2}{4}} are the same answer.

math-verify limits its own time with SIGALRM, which works in a main thread only. A reward worker calls rewards in its
main thread; called in any other thread, `math_equal` has no limit of its own.
"""

from __future__ import annotations

import threading

from math_verify import parse, verify

SECONDS = 2
"""Limit of each of the three steps: reading the answer, reading the completion, comparing them. Past it they differ."""


def math_equal(completion: str, answer: str, **_) -> float:
    r"""1.0 when the formula or number that the completion ends with, or boxes, equals the answer.

    The answer is a formula with or without dollar signs: `\frac{1}{2}`, `$x^2$`, `0.5`; for words take `exact_match`.
    ValueError when it cannot be read.
    """
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    text = str(answer)
    gold = _read(text if "$" in text or r"\boxed" in text else f"${text}$", limit)
    if not gold:
        raise ValueError(f"the answer {answer!r} is not a formula")
    return float(verify(gold, _read(completion, limit), timeout_seconds=limit))


def _read(text: str, limit: int | None) -> list:
    # math-verify means None by "no limit", but declares an int.
    return parse(text, parsing_timeout=limit)  # pyright: ignore[reportArgumentType]
