r"""Bound on the time that math-verify takes for a formula.

Its grammar is ambiguous: a parenthesis may be a factor, an argument or an interval, so the parser tries again at each
one. Sympy computes the factorials and powers that it meets. Either takes minutes on short texts, but no person gives
such a text as an answer.
"""

from __future__ import annotations

import re

_MAX_LENGTH = 500
_MAX_DEPTH = 5
# Sum of the depths of all opening brackets.
_MAX_NESTING = 40
_BRACKET = re.compile(r"\\begin|\\end|\\[lr](?:floor|ceil|angle)|\\[A-Za-z]+|\\.|[({\[\]})]", re.DOTALL)
_OPENING = frozenset(("(", "[", "{", r"\{", r"\(", r"\[", r"\begin", r"\lfloor", r"\lceil", r"\langle"))
_CLOSING = frozenset((")", "]", "}", r"\}", r"\)", r"\]", r"\end", r"\rfloor", r"\rceil", r"\rangle"))

# Without brackets: \sin\log\ln x, x^x^x, x!!!.
_CHAIN = re.compile(
    r"(?:\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?\s*|\\(?:log|ln|lg|exp)(?![a-z])\s*){4}"
    r"|(?:[\^_]\s*[-+]*\s*\\?\w+\s*){4}"
    r"|!\s*!\s*!"
)
_MAX_COUNTS = {"=": 12, "|": 6, "!": 6, "^": 24, r"\cup": 6, r"\cap": 6, r"\sin": 10, r"\cos": 10, r"\log": 10}
_MAX_COUNTS |= {"+": 60, "-": 60, "*": 60, "/": 40, ".": 60, ",": 100, r"\int": 3, r"\sum": 3, r"\prod": 3, r"\lim": 3}

_POWER = re.compile(r"\^\s*\{?\s*[-+]?\s*(\d+)(?=\s*\^\s*\{?\s*(\d*))?")
# Sympy multiplies (x+1)^{50} out.
_POWER_OF_SUM = re.compile(r"[)\]}]\s*\^\s*\{?\s*\+?\s*(\d+)")
_MAX_POWER_OF_SUM = 40
_COUNTS_UP = re.compile(r"!|binom|\\sum|\\prod|\\int")
_MAX_NUMBER = 9_999


def is_cheap(formula: str) -> bool:
    """Whether math-verify reads the formula, and compares it, in a fraction of a second."""
    return (
        len(formula) <= _MAX_LENGTH
        and _is_shallow(formula)
        and _CHAIN.search(formula) is None
        and all(formula.count(word) <= most for word, most in _MAX_COUNTS.items())
        and _has_small_powers(formula)
        and (_COUNTS_UP.search(formula) is None or re.search(rf"\d{{{len(str(_MAX_NUMBER)) + 1}}}", formula) is None)
    )


def _is_shallow(formula: str) -> bool:
    depth = nesting = 0
    for match in _BRACKET.finditer(formula):
        if match[0] in _OPENING:
            depth += 1
            nesting += depth
            if depth > _MAX_DEPTH or nesting > _MAX_NESTING:
                return False
        elif match[0] in _CLOSING:
            depth = max(depth - 1, 0)
    return True


def _has_small_powers(formula: str) -> bool:
    """No exponent is a number beyond `_MAX_NUMBER`, as in 2^{3^{40}}, or beyond `_MAX_POWER_OF_SUM` after brackets."""
    if any(int(match[1][:20]) > _MAX_POWER_OF_SUM for match in _POWER_OF_SUM.finditer(formula)):
        return False
    for match in _POWER.finditer(formula):
        number, exponent = int(match[1][:20]), int((match[2] or "1")[:20])
        if (
            number > _MAX_NUMBER
            or (number > 1 and exponent > _MAX_NUMBER.bit_length())
            or number**exponent > _MAX_NUMBER
        ):
            return False
    return True
