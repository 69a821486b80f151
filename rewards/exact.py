"""The simplest reward: the completion is the answer, character for character."""

from __future__ import annotations


def exact_match(completion: str, answer: str, **_) -> float:
    """1.0 when completion and answer are equal, but for white space around them."""
    return float(completion.strip() == str(answer).strip())
