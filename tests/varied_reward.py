"""Rewards for policies that answer nothing right: one that differs from completion to completion, one that does not."""

from __future__ import annotations


def varied(completion: str, **_: object) -> float:
    return sum(map(ord, completion)) % 8 / 8


def always_right(completion: str, **_: object) -> float:
    return 1.0


def digits(completion: str, **_: object) -> float:
    return sum(map(str.isdigit, completion)) / 6
