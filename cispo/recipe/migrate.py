"""Recipes written for earlier versions, in a run folder or by hand, with the keys of this one.

    {rollout: {top_p: 1.0, group_size: 4}}  ->  {rollout: {group_size: 4}}

A renamed key is read under its old name with a warning. A removed key may stay with the only value that it had. A key
that is newer than the recipe takes its default, so the default of a new key must be the behaviour without it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cispo.errors import UserError

RENAMED: dict[str, str] = {}
"""Old name -> new name of keys and sections, dotted: {"learner.rate": "learner.lr"}."""


@dataclass(frozen=True, slots=True)
class Removed:
    """A key that is not in the schema any more."""

    value: object
    """Its only value, which a recipe may still give."""
    reason: str
    """Why there is no other, as the end of the unknown-key error."""


_TRUNCATION = "truncated sampling makes the importance ratio wrong, so it must stay {}"

REMOVED = {
    "rollout.top_p": Removed(1, _TRUNCATION.format(1)),
    "rollout.top_k": Removed(0, _TRUNCATION.format(0)),
    "rollout.min_p": Removed(0, _TRUNCATION.format(0)),
}

_ABSENT = object()


def migrate(values: Mapping[str, object], where: str) -> dict[str, object]:
    """A copy of a recipe's values with today's keys.

    Raises UserError where a key stands under both its names; `where` names the file in it.
    """
    moved = copy.deepcopy(dict(values))
    for key, removed in REMOVED.items():
        value = _pop(moved, key.split("."))
        if value not in (_ABSENT, removed.value):
            _put(moved, key.split("."), value)
    for old, new in RENAMED.items():
        value = _pop(moved, old.split("."))
        if value is _ABSENT:
            continue
        if _pop(moved, new.split(".")) is not _ABSENT:
            raise UserError(f"{where}: {old} is the old name of {new}, and the recipe has both")
        _put(moved, new.split("."), value)
        _warn(old, new)
    return moved


@functools.cache
def _warn(old: str, new: str) -> None:
    print(f"cispo: warning: the recipe key {old} is read as {new}, its new name", file=sys.stderr)


def _pop(section: dict[str, object], key: Sequence[str]) -> object:
    """Takes a key out, with the sections that it leaves empty; _ABSENT where it is not there."""
    first, *rest = key
    if not rest:
        return section.pop(first, _ABSENT)
    inner = section.get(first)
    if not isinstance(inner, dict):
        return _ABSENT
    value = _pop(inner, rest)
    if value is not _ABSENT and not inner:
        del section[first]
    return value


def _put(section: dict[str, object], key: Sequence[str], value: object) -> None:
    first, *rest = key
    if not rest:
        section[first] = value
        return
    inner = section.setdefault(first, {})
    # Validation refuses a section that is no mapping.
    if isinstance(inner, dict):
        _put(inner, rest, value)
