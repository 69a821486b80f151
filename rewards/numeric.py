"""Numbers within a tolerance: the last number of the completion against the answer."""

from __future__ import annotations

import re
from collections import deque

_NUMBER = re.compile(
    r"""(?P<sign>(?<![\w.)])[-+\u2212])?                                # not the minus of 5-3
        # 1,234.5 or 1234.5 or .5. Groups begin at the start of a run of digits and commas alone: a run is read once.
        (?P<value>(?:(?<!\d)(?<!\d,)\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)
        (?P<exponent>[eE][-+]?\d+)?
        (?:\s?/\s?(?P<divisor>\d+(?:\.\d+)?))?                          # 3/4
        (?P<percent>\s?\\?%)?""",
    re.VERBOSE | re.ASCII,
)


def numeric(completion: str, answer: str | float, tolerance: float = 1e-6, **_) -> float:
    """1.0 when |number - answer| <= tolerance * max(1, |answer|): relative for large answers, absolute for small ones.

    Reads 1,234.5 and -3 and 1e-4 and 3/4 and 50%, which is 0.5. ValueError when the answer holds no number.
    """
    expected = last_number(str(answer))
    if expected is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    found = last_number(completion)
    return float(found is not None and abs(found - expected) <= tolerance * max(1.0, abs(expected)))


def last_number(text: str) -> float | None:
    """The last number that a text writes in digits; None if there is none, or if it divides by zero."""
    last = deque(_NUMBER.finditer(text), maxlen=1)
    if not last:
        return None
    match = last[0]
    number = float(match["value"].replace(",", "") + (match["exponent"] or ""))
    divisor = float(match["divisor"] or 1)
    if divisor == 0:
        return None
    return (-number if match["sign"] in ("-", "\u2212") else number) / divisor / (100 if match["percent"] else 1)
