"""Shaping and filtering of rewards before the advantages."""

from __future__ import annotations


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, eq. 13), at most 0.

    Nothing up to max_tokens - buffer tokens, then linear, -penalty from max_tokens on. A buffer of 0 is off.
    """
    if buffer == 0:
        return 0.0
    over = length - (max_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)
