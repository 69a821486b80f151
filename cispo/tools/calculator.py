"""A tool that ships: exact arithmetic of the four operations, powers and remainders.

    "(47*86 - 1/3) ** 2" --ast--> Fraction --> "147032/9 (about 16336.88889)", "4042", "0.125"

Nothing is evaluated as Python: the expression's syntax tree is walked, and every number is a fraction of bounded size.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from cispo.agents.tools import ToolError

_MAX_LENGTH = 500
_MAX_BITS = 4096
"""Size of a numerator or a denominator: 1,233 digits."""

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_FLOAT = re.compile(r"(\d*\.?\d*)(?:e([+-]?\d{1,3}))?", re.IGNORECASE)


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression exactly. Knows + - * / // % ** and parentheses.

    Args:
        expression: such as 47*86
    """
    text = expression.strip().translate(_SIGNS).replace("^", "**")
    if not text or len(text) > _MAX_LENGTH:
        raise ToolError(f"the expression must have 1 to {_MAX_LENGTH} characters")
    try:
        tree = ast.parse(text, mode="eval").body
        return _written(_value(tree, text))
    except ZeroDivisionError:
        raise ToolError(f"{text:.80} divides by zero") from None
    # ast.parse raises the latter three for nested brackets, a NUL and numbers of thousands of digits.
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ToolError(f"{text:.80} is not an arithmetic expression") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return _number(node, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _power(_value(left, text), _value(right, text))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATIONS:
            return _bounded(Fraction(_OPERATIONS[type(op)](_value(left, text), _value(right, text))))
    raise ToolError(f"{ast.unparse(node):.80} is not arithmetic: numbers, + - * / // % ** and parentheses are")


def _number(node: ast.Constant, text: str) -> Fraction:
    """The written number: 0.1 is 1/10, not the nearest float."""
    if type(node.value) is int:
        return _bounded(Fraction(node.value))
    written = (ast.get_source_segment(text, node) or "").replace("_", "")
    if type(node.value) is not float or not _FLOAT.fullmatch(written):
        raise ToolError(f"{written:.80} is no number that this calculator knows")
    return _bounded(Fraction(written))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError(f"a power with the exponent {exponent} is not exact: exponents are whole numbers")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MAX_BITS and abs(base) != 1:
        raise ToolError("the result is too large")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ToolError("the result is too large")
    return value


def _written(value: Fraction) -> str:
    """A whole number or a finite decimal as such; another fraction with its value to 10 digits."""
    rest, places = value.denominator, [0, 0]
    for place, prime in enumerate((2, 5)):
        while rest % prime == 0:
            rest //= prime
            places[place] += 1
    digits = max(places)
    if rest != 1 or digits > 20:
        return f"{value} (about {_about(value)})"
    if digits == 0:
        return str(value.numerator)
    whole, part = divmod(abs(value.numerator) * 10**digits // value.denominator, 10**digits)
    return f"{'-' * (value < 0)}{whole}.{part:0{digits}d}"


def _about(value: Fraction) -> str:
    try:
        return f"{float(value):.10g}"
    except OverflowError:
        return f"{'-' * (value < 0)}1e{len(str(abs(value.numerator // value.denominator))) - 1}"
