"""The simplest reward: the completion is the answer, character for character."""

from __future__ import annotations


def exact_match(completion: str, answer: str, **_) -> float:
    """1.0 when completion and answer are equal, but for white space around them. ValueError for an answer of None."""
    if answer is None:
        raise ValueError("the row has no answer")
    return float(completion.strip() == str(answer).strip())
