r"""Rewards for the form of a completion: \boxed{answer}, and <think>reasoning</think> before the answer."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed(completion: str, **_) -> float:
    r"""1.0 when the completion has exactly one \boxed{...}, with balanced braces and something inside."""
    return float(bool(_single_box(completion)))


def boxed_exact(completion: str, answer: str, **_) -> float:
    r"""1.0 when the completion has exactly one \boxed{...} and it holds the answer.

    ValueError for an answer of None.
    """
    if answer is None:
        raise ValueError("the row has no answer")
    inside = _single_box(completion)
    return float(bool(inside) and inside == str(answer).strip())


def think_format(completion: str, **_) -> float:
    """1.0 for one <think>...</think> block at the start, with reasoning inside and an answer after it."""
    if completion.count("<think>") != 1 or completion.count("</think>") != 1:
        return 0.0
    before, _, rest = completion.partition("<think>")
    reasoning, end, answer = rest.partition("</think>")
    return float(not before.strip() and bool(end) and bool(reasoning.strip()) and bool(answer.strip()))


def extract_boxed(text: str) -> str | None:
    r"""The content of the last well-formed \boxed{...} of a text; braces may nest. None when there is none."""
    spans = [span for span in _boxes(text) if span is not None]
    return text[slice(*spans[-1])].strip() if spans else None


def _single_box(text: str) -> str | None:
    spans = _boxes(text)
    return text[slice(*spans[0])].strip() if len(spans) == 1 and spans[0] is not None else None


def _boxes(text: str) -> list[tuple[int, int] | None]:
    r"""(start, end) of the content of each \boxed{, None where its brace is never closed. \{ and \} are no braces.

    One pass over the text: boxes may nest as deeply as a policy writes them.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text, starts[0] - 1 if starts else len(text)):
        if match[0] == "{":
            opened.append(match.end())
        elif match[0] == "}" and opened:
            ends[opened.pop()] = match.start()
    return [(start, ends[start]) if start in ends else None for start in starts]
