r"""Exact value of a number that is written out, as -3/4, 2 1/3, 1.2\times 10^{3}, 2^{100}-1, 20! or 0.\overline{3}.

text -> tokens -> sum of products of powers, in Fractions
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import factorial

# Numbers beyond so many bits are left to others: nothing that a person writes as an answer is that large.
_MAX_BITS = 20_000
_MAX_LENGTH = 1_000
_MAX_DEPTH = 20

_TOKEN = re.compile(
    r"""\s*(?:(?P<repeating>\d*\.\d*\\overline\s*\{\d+\})
        |(?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?|\.\d+)
        |(?P<frac>\\frac)|(?P<times>\\times|\\cdot|\*)|(?P<other>[-+/^!(){}]))""",
    re.VERBOSE | re.ASCII,
)


class _NotANumber(Exception):
    """The text is more than a rational number."""


def rational(text: str) -> Fraction | None:
    """The value; None where the text is more, or other, than a rational number."""
    if len(text) > _MAX_LENGTH:
        return None
    try:
        tokens = _tokens(text)
        reader = _Reader(tokens)
        value = reader.sum()
        return value if reader.place == len(tokens) else None
    except (_NotANumber, ZeroDivisionError, ValueError, OverflowError):
        return None


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place, text = [], 0, text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise _NotANumber
        found.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    if not found:
        raise _NotANumber
    return found


class _Reader:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self, text: str) -> bool:
        if self.peek()[1] == text:
            self.place += 1
            return True
        return False

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotANumber
        value = self.product()
        while self.peek()[1] in ("+", "-"):
            sign = 1 if self.tokens[self.place][1] == "+" else -1
            self.place += 1
            value += sign * self.product()
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        sign = 1
        while self.peek()[1] in ("+", "-"):
            sign *= -1 if self.tokens[self.place][1] == "-" else 1
            self.place += 1
        value = self.power()
        while True:
            kind, text = self.peek()
            if kind == "times":
                self.place += 1
                value *= self.signed_power()
            elif text == "/":
                self.place += 1
                value /= self.power()
            elif kind == "frac" or (kind == "number" and self.is_mixed()):
                # 2 \frac{1}{3} and 2 1/3 are mixed numbers.
                if value.denominator != 1:
                    raise _NotANumber
                part = self.power()
                if self.take("/"):
                    part /= self.power()
                if not 0 < part < 1:
                    raise _NotANumber
                return sign * (value + part)
            elif text == "(":
                value *= self.power()
            else:
                return sign * value

    def is_mixed(self) -> bool:
        return self.place + 1 < len(self.tokens) and self.tokens[self.place + 1][1] == "/"

    def signed_power(self) -> Fraction:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.take("!"):
            if base.denominator != 1 or not 0 <= base <= 1_000:
                raise _NotANumber
            base = Fraction(factorial(int(base)))
        if self.take("^"):
            exponent = self.group() if self.peek()[1] == "{" else self.signed_power()
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator != 1 or abs(exponent) * bits > _MAX_BITS:
                raise _NotANumber
            return base ** int(exponent)
        return base

    def group(self) -> Fraction:
        if not self.take("{"):
            raise _NotANumber
        value = self.sum()
        if not self.take("}"):
            raise _NotANumber
        return value

    def atom(self) -> Fraction:
        kind, text = self.peek()
        self.place += 1
        if kind == "number":
            return Fraction(text)
        if kind == "repeating":
            return _repeating(text)
        if kind == "frac":
            return self.argument() / self.argument()
        if text == "(":
            value = self.sum()
            if not self.take(")"):
                raise _NotANumber
            return value
        if text == "{":
            self.place -= 1
            return self.group()
        raise _NotANumber

    def argument(self) -> Fraction:
        r"""An argument of \frac: a group, or one digit (\frac12)."""
        kind, text = self.peek()
        if kind != "number":
            return self.group()
        if not text.isdigit():
            raise _NotANumber
        if len(text) > 1:
            self.tokens[self.place] = ("number", text[1:])
        else:
            self.place += 1
        return Fraction(text[0])


def _repeating(text: str) -> Fraction:
    whole, _, rest = text.partition(".")
    fixed, _, period = rest.partition("\\overline")
    digits = re.sub(r"\D", "", period)
    scale = 10 ** len(fixed)
    return Fraction(int((whole + fixed) or "0"), scale) + Fraction(int(digits), scale * (10 ** len(digits) - 1))
