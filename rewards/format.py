r"""Rewards for the form of a completion: \boxed{answer}, and <think>reasoning</think> before the answer."""

from __future__ import annotations

import re

_THINK = re.compile(r"\s*<think>(?P<reasoning>.*)</think>(?P<answer>.*)", re.DOTALL)


def boxed(completion: str, **_) -> float:
    r"""1.0 when the completion has exactly one \boxed{...}, with balanced braces and something inside."""
    return float(bool(_single_box(completion)))


def boxed_exact(completion: str, answer: str, **_) -> float:
    r"""1.0 when the completion has exactly one \boxed{...} and it holds the answer."""
    inside = _single_box(completion)
    return float(bool(inside) and inside == str(answer).strip())


def think_format(completion: str, **_) -> float:
    """1.0 for one <think>...</think> block at the start, with reasoning inside and an answer after it."""
    match = _THINK.fullmatch(completion)
    if match is None or completion.count("<think>") != 1 or completion.count("</think>") != 1:
        return 0.0
    return float(bool(match["reasoning"].strip()) and bool(match["answer"].strip()))


def extract_boxed(text: str) -> str | None:
    r"""The content of the last well-formed \boxed{...} of a text; braces may nest. None when there is none."""
    boxes = [inside for inside in _boxes(text) if inside is not None]
    return boxes[-1].strip() if boxes else None


def _single_box(text: str) -> str | None:
    boxes = _boxes(text)
    return boxes[0].strip() if len(boxes) == 1 and boxes[0] is not None else None


def _boxes(text: str) -> list[str | None]:
    r"""The content of each \boxed{, None where its brace is never closed. \{ and \} are characters, not braces."""
    found: list[str | None] = []
    for start in (match.end() for match in re.finditer(r"\\boxed\s*\{", text)):
        depth = 1
        for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                found.append(text[start : start + match.start()])
                break
        else:
            found.append(None)
    return found
