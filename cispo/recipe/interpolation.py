r"""`${key}` and `${oc.env:NAME}` in the values of a recipe, by OmegaConf.

    layers --merge--> {"data": {"source": "${oc.env:ROOT}/a.jsonl"}} --resolve--> values in force, texts to store

A recipe that reads the environment is stored with all its interpolations as they are written: a secret stays out of
run folders. Apart from those, `${` in a stored text is the text itself, written as `\${`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cispo.errors import UserError

Place = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe to a value."""

_MISSING = "???"
_LONGEST = 10_000
# Each may stand for the values of several others: n of them can make a text 3^(n/3) times as long.
_CHAINED = 24
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_REFERENCE = re.compile(r"\$\{(?!\s*oc\.env\s*:)\s*([\w.\[\]-]*)")


def merge_and_resolve(layers: Sequence[Mapping[str, object]]) -> tuple[dict[str, object], dict[Place, str]]:
    """The values of the layers, a later one over an earlier one, and the interpolated texts that are to be stored.

    Mappings are merged, all other values are replaced. Raises UserError for an interpolation that cannot be resolved.
    """
    for low, high in combinations(layers, 2):
        _check_kinds(low, high, ())
    try:
        merged = OmegaConf.merge(*map(dict, layers))
        written = cast(dict[str, object], OmegaConf.to_container(merged))
        texts = {place: text for place, text in _texts(written, ()) if "${" in text}
        _check_length(texts)
        values = cast(dict[str, object], OmegaConf.to_container(merged, resolve=True)) if texts else written
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        problem = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).split("\n")[0])
        raise UserError(rf"{key}{problem:.200} (a text with ${{ in it is written \${{)") from None
    except RecursionError:
        raise UserError("an interpolation is nested too deeply") from None
    for part in (values, layers[-1]):
        for place, text in _texts(part, ()):
            if text == _MISSING:
                raise UserError(f"{'.'.join(map(str, place))} is ???, which stands for a value still to be given")
    return values, texts if any(_ENVIRONMENT.search(text) for text in texts.values()) else {}


def as_stored(value: object, kept: Mapping[Place, tuple[str, object]], place: Place = ()) -> object:
    r"""A value of a recipe as it is stored: escaped, or its kept (text, value)'s text while that value is in force."""
    text, before = kept.get(place, ("", None))
    if text and before == value:
        return text
    if isinstance(value, Mapping):
        return {key: as_stored(inner, kept, (*place, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_stored(inner, kept, (*place, index)) for index, inner in enumerate(value)]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def value_at(values: object, place: Place) -> object:
    for key in place:
        values = values[key]  # type: ignore[index]  # the place comes from a walk over such values
    return values


def _check_kinds(low: object, high: object, place: Place) -> None:
    """Raises UserError where a list and a mapping are to be merged."""
    if isinstance(low, Mapping) and isinstance(high, Mapping):
        for key in low.keys() & high.keys():
            _check_kinds(low[key], high[key], (*place, key))
    elif {type(low), type(high)} == {list, dict}:
        kinds = ("a list", "keys and values") if isinstance(low, list) else ("keys and values", "a list")
        raise UserError(f"{'.'.join(map(str, place))} holds {kinds[0]}, which {kinds[1]} cannot replace")


def _check_length(texts: Mapping[Place, str]) -> None:
    """Raises UserError where interpolations of interpolations could grow without bound."""
    names = {".".join(map(str, place)) for place in texts}
    references = 0
    for place, text in texts.items():
        if len(text) > _LONGEST:
            raise UserError(f"{'.'.join(map(str, place))} has more than {_LONGEST:,} characters and interpolations")
        for target in _REFERENCE.findall(text):
            plain = target.replace("[", ".").replace("]", "")
            near = (plain == name or plain.startswith(f"{name}.") or name.startswith(f"{plain}.") for name in names)
            references += plain == "" or plain.startswith(".") or any(near)
    if references > _CHAINED:
        raise UserError(f"more than {_CHAINED} interpolations stand for other interpolations")


def _texts(value: object, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*place, index))
