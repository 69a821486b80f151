r"""Mathematical equality: 0.5, 1/2 and \boxed{\frac{2}{4}} are the same answer.

    completion -> the last answer (a box, else a formula or number at the end) -> text without markup
        -> exact: rational numbers, choice letters, words, times, numbers with a base
        -> math-verify: algebra, sets, intervals, matrices; not for a formula that takes it seconds (`parse_cost`)

Every step is linear in the completion's length, and none raises on a row of data: an unreadable answer scores 0.
"""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

from .parse_cost import is_cheap
from .rational import rational
from .time_limit import TimeIsUp, limited

SECONDS = 2.0
"""Limit of math-verify for a pair, as in `time_limit`; past it they differ."""

# It warns that its own limit, on the clock, is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# A longer answer is no answer; the end of a completion without a box holds it in so many characters.
_MAX_ANSWER = 1_000
_MAX_END = 2_000

_SPACE = re.compile(r"(?<!\\)\\[,;:! ]|\\quad|\\qquad|~|\u00a0|\u2009|\u202f")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|textrm|mbox)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?![\d])")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?\.?")
_FINAL = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)+\s*:?\s*", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\$(?!\d[\d,.]*(?:\s|[.,;:!?)]|$))([^$\n]+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"""(?<![\w.^\\)])[-+\u2212]?(?:\\?\$\s?)?                       # not the minus of 5-3; $18
        (?:\d*\s?\\[dt]?frac\s?(?:\{-?\d+\}\s?\{\d+\}|\d\d)           # 2\frac{1}{3}
          |\d+\s+\d+\s?/\s?\d+                                        # 2 1/3
          |(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)        # 1,234.5 or 1234.5 or .5
        (?:[eE][-+]?\d+|\s?(?:\\times|\\cdot|\u00d7|\*)\s?10\s?\^\s?\{?-?\d+\}?)?
        (?:\s?/\s?\d+(?:\.\d+)?)?""",
    re.VERBOSE | re.ASCII,
)
_BOUNDED = re.compile(r"(?P<low>[^<>,]+)(?P<first><=?)[a-zA-Z](?P<second><=?)(?P<high>[^<>,]+)")
_ONE_SIDED = re.compile(r"[a-zA-Z](?P<sign><=?|>=?)(?P<end>[^<>,]+)")


def math_equal(completion: str, answer: str | float, **_) -> float:
    r"""1.0 when the last answer of the completion, its last box or the formula or number at its end, equals the answer.

    The answer is a formula with or without dollar signs: `\frac{1}{2}`, `$x^2$`, `0.5`, `[1, 2)`, `B`. Numbers are
    compared exactly; a unit, a currency or a percent sign beside one does not count. 0.0 for an empty or unterminated
    last box, and for an answer or a completion that cannot be read.
    """
    gold = _plain(_unboxed(str(answer)))
    if answer is None or not gold:
        return 0.0
    if _is_words(gold) and "\\boxed" not in completion:
        return float(_last_words(completion).endswith(gold.casefold()))
    found = last_answer(completion, choice=_CHOICE.fullmatch(gold) is not None)
    return float(found is not None and _equal(gold, _plain(found)))


def last_answer(completion: str, *, choice: bool = False) -> str | None:
    r"""The text of the answer that a completion ends with; None where there is none.

    A \boxed decides, the last one, also where it is empty or unterminated (None). Else the part behind the last `####`
    or "answer is", the last formula between dollar signs, or the last number; with `choice` a letter.
    """
    start = completion.rfind("\\boxed")
    if start >= 0:
        return _box(completion, start)
    end = completion[-_MAX_END:]
    mark = end.rfind("####")
    if mark >= 0:
        return end[mark + 4 :].strip().split("\n")[0] or None
    phrases = list(_FINAL.finditer(end))
    tail = end[phrases[-1].end() :] if phrases else end
    if choice:
        if phrases and (letter := re.match(r"\W*([A-Za-z])(?![A-Za-z'])", tail)):
            return letter[1]
        letters = re.findall(r"(?<![A-Za-z\\])\(?([A-Z])\)?(?![A-Za-z'])", tail)
        return letters[-1] if letters else None
    formulas = list(_MATH.finditer(tail))
    numbers = list(_NUMBER.finditer(tail))
    if phrases and formulas and formulas[0].start() == 0:
        return next(group for group in formulas[0].groups() if group is not None)
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return next(group for group in formulas[-1].groups() if group is not None)
    if not numbers:
        return None
    # "the final answer is 30 (see step 2)": behind the phrase the first number counts, elsewhere the last.
    return (numbers[0] if phrases and not formulas else numbers[-1])[0]


def _box(text: str, start: int) -> str | None:
    r"""The content of the \boxed at `start`, None where it is empty, too long or not closed."""
    opening = re.compile(r"\\f?boxed\s*\{").match(text, start)
    if opening is None:
        bare = re.compile(r"\\boxed\s+(\S+)").match(text, start)  # TeX takes the next token
        return bare[1].rstrip(".$") if bare else None
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end(), opening.end() + _MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[opening.end() : match.start()].strip() or None
    return None


def _unboxed(text: str) -> str:
    start = text.rfind("\\boxed")
    return (_box(text, start) or "") if start >= 0 else text[:_MAX_ANSWER]


def _plain(text: str) -> str:
    """The answer without markup, units, currency and percent signs: comparable as text or as a formula."""
    text = text.strip().strip("*").strip()
    text = re.sub(r"^(\$\$|\$|\\\(|\\\[)(.*?)(\$\$|\$|\\\)|\\\])\.?$", r"\2", text, flags=re.DOTALL).strip()
    text = text.replace("\u2212", "-").replace("\u00d7", r"\times").replace("\\$", "").replace("$", "")
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\cfrac", r"\frac")
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle", "", text)
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\mathbb{R}", r"(-\infty,\infty)")
    if not re.search(r"\\(sin|cos|tan|cot|sec|csc)", text):  # a degree is a unit, but for a function of an angle
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree", "", text)
    text = re.sub(r"(?<=[\d}\s])\s*\\?%", "", text)
    text = _THOUSANDS.sub(lambda m: re.sub(r"[^\d]", "", m[0]), _SPACE.sub(" ", text))
    text = _without_words(text)
    # Forms that math-verify reads: one kind of matrix, e as the constant, arguments in braces.
    text = re.sub(r"\\(begin|end)\{[bBvV]?matrix\}", r"\\\1{pmatrix}", text)
    text = re.sub(r"(?<![A-Za-z\\])e\s*\^\s*\{([^{}]*)\}", r"\\exp(\1)", text)
    text = re.sub(r"\\log_\s*\{?(\w)\}?\s*\{?(\d+)\}?", r"\\log_{\1}(\2)", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<=[^.])\.$", "", text)
    while text.startswith("{") and text.endswith("}") and "\\" not in text and text.count("{") == 1:
        text = text[1:-1].strip()
    return text


def _without_words(text: str) -> str:
    r"""`5\text{ cm}` to `5`, `\text{(B)}` to `(B)`, `1 \text{ or } 2` to `1, 2`: words beside a number are a unit."""
    text = _WORDS.sub(lambda m: ", " if m[1].strip() in ("and", "or") else f"\u27e8{m[1].strip()}\u27e9", text)
    around = re.sub(r"\u27e8[^\u27e9]*\u27e9", "", text)
    if re.search(r"\d", around):
        # A unit may carry an exponent: \text{m}^2.
        return re.sub(r"\u27e8[^\u27e9]*\u27e9(\s*\^\s*\{?\d\}?)?", " ", text)
    return re.sub(r"[\u27e8\u27e9]", "", text)


def _equal(gold: str, found: str) -> bool:
    if not found:
        return False
    if gold == found:
        return True
    if match := _CHOICE.fullmatch(gold):
        other = _CHOICE.fullmatch(found) or re.match(r"\(([A-Za-z])\)\s", found)
        if other is not None and (match[1].isupper() or gold != match[1]):
            return match[1].upper() == other[1].upper()
    if _is_words(gold):
        return gold.casefold() == found.casefold()
    if re.search(r"(?<!\\log)_\s*\{?\d", gold + found):
        return _based(gold) is not None and _based(gold) == _based(found)
    if re.fullmatch(r"\d+(\s*:\s*\d+)+", gold) or re.fullmatch(r"\d+(\s*:\s*\d+)+", found):
        return gold.replace(" ", "") == found.replace(" ", "")
    numbers = rational(_right_side(gold)), rational(_right_side(found))
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    gold, found = _interval(gold), _interval(found)
    if gold.replace(" ", "") == found.replace(" ", ""):
        return True
    if _is_interval(gold) != _is_interval(found) and (_is_interval(gold) or _is_interval(found)):
        return False
    return _verify(gold, found)


def _right_side(text: str) -> str:
    """`x = 5` to `5`: the name of an unknown does not count beside a number."""
    return re.sub(r"^[A-Za-z]\s*=\s*", "", text)


def _based(text: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"([0-9A-Za-z]+)\s*_\s*\{?(\d+)\}?", text)
    return (match[1].upper().lstrip("0"), int(match[2])) if match else None


def _interval(text: str) -> str:
    r"""Inequalities of one unknown and `x \in [1,2]` in the form of intervals; other text unchanged."""
    text = re.sub(r"^[a-zA-Z]\s*\\in\s*", "", text).replace(r"+\infty", r"\infty")
    plain = re.sub(r"\\(?:leq?|leqslant)(?![a-z])|\u2264", "<=", text)
    plain = re.sub(r"\\(?:geq?|geqslant)(?![a-z])|\u2265", ">=", plain)
    plain = plain.replace(r"\lt", "<").replace(r"\gt", ">").replace(" ", "")
    parts = [_interval_of(part) for part in plain.split(",")]
    return r"\cup".join(part for part in parts if part) if all(parts) else text


def _interval_of(inequality: str) -> str | None:
    if inequality.count(">") == 2:
        high, low = re.split(">=?", inequality)[0], re.split(">=?", inequality)[-1]
        signs = [sign.replace(">", "<") for sign in re.findall(">=?", inequality)]
        inequality = f"{low}{signs[1]}{inequality[len(high) :].lstrip('>=')[:1]}{signs[0]}{high}"
    if match := _BOUNDED.fullmatch(inequality):
        opening, closing = "[" if "=" in match["first"] else "(", "]" if "=" in match["second"] else ")"
        return f"{opening}{match['low']},{match['high']}{closing}"
    if match := _ONE_SIDED.fullmatch(inequality):
        closed = "=" in match["sign"]
        if match["sign"].startswith(">"):
            return f"{'[' if closed else '('}{match['end']},\\infty)"
        return f"(-\\infty,{match['end']}{']' if closed else ')'}"
    return None


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z][A-Za-z]+( [A-Za-z]+)*", text) is not None


def _last_words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text[-_MAX_END:]).strip().casefold()


def _is_interval(text: str) -> bool:
    """With a square bracket or an infinite end; (1, 2) may be a point."""
    return re.search(r"[\[(][^,]*,[^,]*[\])]", text) is not None and ("[" in text or "]" in text or r"\infty" in text)


def _verify(gold: str, found: str) -> bool:
    if not (is_cheap(gold) and is_cheap(found)):
        return False

    def same() -> bool:
        pair = [parse(f"${text}$", parsing_timeout=None) for text in (gold, found)]  # pyright: ignore[reportArgumentType]
        return all(pair) and bool(verify(pair[0], pair[1], float_rounding=12, timeout_seconds=None))

    try:
        return limited(SECONDS, same)
    # sympy and the parser raise many kinds of errors on the text of a policy.
    except (Exception, TimeIsUp):
        return False
