"""The rule of repeated patterns by its definition, which engines are held against."""

from __future__ import annotations

from collections.abc import Sequence

from cispo.types import RepetitionStop


def repeats_pattern(tokens: Sequence[int], rule: RepetitionStop) -> bool:
    """Whether `tokens` end in `pattern_count` copies of a pattern of at most `pattern_size` tokens."""
    for size in range(1, rule.pattern_size + 1):
        span = size * rule.pattern_count
        if span > len(tokens):
            return False
        tail = tokens[-span:]
        if tail[size:] == tail[:-size]:
            return True
    return False
