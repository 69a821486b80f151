"""A reward that differs from completion to completion, also where an untrained policy answers nothing right."""

from __future__ import annotations


def varied(completion: str, **_: object) -> float:
    return sum(map(ord, completion)) % 8 / 8
