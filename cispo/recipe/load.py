"""From YAML files and key=value overrides to a `Recipe`, and back to YAML.

    defaults  <-  base: other.yaml  <-  recipe.yaml  <-  key=value ...

`text` reads YAML, `interpolation` merges, pydantic validates. A UserError names the key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from cispo.errors import UserError
from cispo.recipe import text
from cispo.recipe.checks import check_recipe
from cispo.recipe.interpolation import Place, as_stored, merge_and_resolve, value_at
from cispo.recipe.migrate import REMOVED, migrate
from cispo.recipe.schema import Data, Recipe, TrainData, known_keys
from cispo.recipe.text import Values

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, its base and the overrides (`key=value`).

    `path` is a file, or the bare name of a shipped recipe. Raises UserError for a missing or malformed file, an unknown
    key, a wrong type, or keys that contradict each other.
    """
    file = locate(path)
    layers, folders = [text.read_file(file)], [file.parent]
    base = layers[0].get("base")
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{file}: base = {_short(base)}: it must be the path or the name of a recipe")
        base_file = locate(base, file.parent)
        folders.append(base_file.parent)
        base_layer = text.read_file(base_file)
        if "base" in base_layer:
            raise UserError(f"{base_file}: a base recipe cannot have a base of its own")
        layers.insert(0, base_layer)
    layers += _overridden(overrides)
    recipe, kept = _parsed([migrate(layer, str(file)) for layer in layers], str(file))
    return _keeping(_with_paths(recipe, file, folders), kept)


def parse_recipe(values: Mapping[str, object], *, where: str = "recipe") -> Recipe:
    """Validates plain values; `where` names the file in errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    check_recipe(recipe, where)
    return recipe


def changed(recipe: Recipe, sections: Mapping[str, object], *, where: str) -> Recipe:
    """The recipe with other values of some top keys, validated; its interpolations are stored as before."""
    again = parse_recipe({**recipe.model_dump(mode="json"), **sections}, where=where)
    again.set_kept(recipe.kept)
    return again


def read_stored(file: Path) -> Recipe:
    """The recipe.yaml of a run folder: see `stored_recipe`."""
    return _stored(text.read_file(file), str(file))


def stored_recipe(written: str, *, where: str) -> Recipe:
    """The recipe in a text that `dump_yaml` wrote, in this version or an earlier one.

    Keys that are newer than the text take their defaults. Raises UserError naming `where` and the key that cannot be
    read.
    """
    return _stored(text.read_text(written, where), where)


def _stored(values: Values, where: str) -> Recipe:
    recipe, kept = _parsed([migrate(values, where)], where)
    return _keeping(recipe, kept)


def _parsed(layers: Sequence[Values], where: str) -> tuple[Recipe, Mapping[Place, str]]:
    """The recipe of the merged layers, and its interpolations as they are to be stored."""
    try:
        values, kept = merge_and_resolve(_without_replaced(layers))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return parse_recipe(values, where=where), kept


def _without_replaced(layers: Sequence[Values]) -> list[Values]:
    """The layers without the single dataset where a later one lists several, in data.sources or eval.

    Where a later one names another file, folder or hub's dataset, without the arguments of the earlier source either.
    Where a later one has {}, without the mapping that stood there.
    """
    result: list[Values] = []
    for layer in layers:
        result = [_less_emptied(low, layer) for low in result]
        for place in (("data",), ("eval",), ("sft", "data")):
            source = _section(layer, place).get("source")
            if isinstance(source, str) and ":" not in source:
                others = [_section(low, place).get("source", source) != source for low in result]
                result = [_less(low, place, ("args", "config")) if any(others) else low for low in result]
        if _section(layer, ("data",)).get("sources"):
            result = [_less(low, ("data",), ("source", "split", "args", "limit", "config")) for low in result]
        if isinstance(layer.get("eval"), list):
            result = [{key: value for key, value in low.items() if key != "eval"} for low in result]
        result.append(layer)
    return result


def _section(layer: Values, place: Sequence[str]) -> Values:
    """The values of a section; empty where it has none."""
    values: object = layer
    for key in place:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _less(layer: Values, place: Sequence[str], keys: Sequence[str]) -> Values:
    """The layer without some keys of a section."""
    first, *rest = place
    values = layer.get(first)
    if not isinstance(values, dict):
        return layer
    if rest:
        return {**layer, first: _less(values, rest, keys)}
    return {**layer, first: {key: value for key, value in values.items() if key not in keys}}


def _less_emptied(low: Values, high: Values) -> Values:
    """`low` without the mappings that `high` gives as {}."""
    result: Values = {}
    for key, value in low.items():
        above = high.get(key)
        if isinstance(value, dict) and isinstance(above, dict):
            if above:
                result[key] = _less_emptied(value, above)
        elif above != {}:
            result[key] = value
    return result


def _keeping(recipe: Recipe, kept: Mapping[Place, str]) -> Recipe:
    values = recipe.model_dump(mode="json")
    recipe.set_kept({place: (raw, value_at(values, place)) for place, raw in kept.items()})
    return recipe


def _overridden(overrides: Sequence[str]) -> list[Values]:
    """The nested values of key=value items, of two for one key the later; before them the mappings that one empties."""
    emptied: Values = {}
    layer: Values = {}
    for item in overrides:
        key, equals, given = item.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise UserError(f"override {_short(item)} is not of the form key=value")
        if _NO_TEXT.search(item):
            raise UserError(f"override {_short(item)} holds a character that is no text")
        if key == "base":
            raise UserError(f"override {_short(item)}: base stands in a recipe's file alone")
        value = text.read_value(given, key, f"override {_short(item)}")
        empties = value == {}
        for name in reversed(names[1:]):
            value = {name: value}
        layer[names[0]] = _over(layer.get(names[0]), value)
        if empties:
            emptied[names[0]] = _over(emptied.get(names[0]), value)
    return [emptied, layer]


def _over(low: object, high: object) -> object:
    """`high`, with the keys of `low` that it lacks where both are mappings and `high` is not the empty one."""
    if not isinstance(low, dict) or not isinstance(high, dict) or not high:
        return high
    return {**low, **{key: _over(low.get(key), value) for key, value in high.items()}}


def locate(name: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe, `beside` being the folder that its path starts from."""
    file, given = beside / name, Path(name)
    if os.path.isfile(file) or given.suffix or len(given.parts) != 1:
        return file
    shipped = {Path(str(f)).stem: Path(str(f)) for f in files("cispo.recipes").iterdir() if f.name.endswith(".yaml")}
    if given.name not in shipped:
        raise UserError(f"recipe {name} does not exist; the shipped recipes are {', '.join(sorted(shipped))}")
    return shipped[given.name]


def _short(value: object) -> str:
    """The value in at most 80 characters."""
    shown = " ".join(_SHOWN.repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence that names the key."""
    first = error.errors()[0]
    # Of a value with several types, pydantic adds the type that it tried first.
    # A part in braces is the form of a key with several, not a key.
    loc = tuple(part for part in first["loc"] if not str(part).startswith("{")) or first["loc"]
    place = loc[:-1] if loc[-1] in ("bool", "int", "float", "str") else loc
    key = _short(".".join(str(part) for part in place))[1:-1]
    if first["type"] == "extra_forbidden":
        plain = ".".join(str(part) for part in loc if not isinstance(part, int))
        if plain in REMOVED:
            return f"unknown key {key}: {REMOVED[plain].reason}"
        keys = [k for k, _ in known_keys()]
        near = difflib.get_close_matches(plain, keys, n=1, cutoff=0.6)
        leaf = plain.rsplit(".", 1)[-1]
        near = near or [k for k in keys if k.rsplit(".", 1)[-1] == leaf][:3]
        if plain in keys:
            return f"unknown key {key} (its parts are nested: {plain.replace('.', ': {', 1)}: ...}})"
        return f"unknown key {key}" + (f" (did you mean {' or '.join(near)}?)" if near else "")
    if first["type"] == "missing":
        return f"key {key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {_short(first['input'])}: {message[0].lower()}{message[1:]}"


def _with_paths(recipe: Recipe, file: Path, folders: Sequence[Path]) -> Recipe:
    """The recipe with absolute paths, from the current directory or else from beside the recipe or its base.

    The recipe of a run folder that was moved with its project finds files of the project at their new place.
    """

    def found(value: str) -> str:
        places = [folder / value for folder in (Path(), *folders)]
        if file.name == "recipe.yaml" and os.path.isabs(value) and os.path.isabs(recipe.output_dir):
            places.append(file.absolute().parents[1] / os.path.relpath(value, recipe.output_dir))
        return next((str(place.absolute()) for place in places if os.path.exists(place)), value)

    return with_paths(recipe, found).model_copy(update={"base": None})


def with_paths(recipe: Recipe, found: Callable[[str], str]) -> Recipe:
    """The recipe with `found` of every key that can name a file or folder to read."""

    def data(section: Data | None) -> Data | None:
        if section is None:
            return None
        several = {"sources": [data(s) for s in section.sources]} if isinstance(section, TrainData) else {}
        return section.model_copy(update={"source": section.source and found(section.source), **several})

    policy = recipe.policy.model_copy(
        update={
            "model": recipe.policy.model and found(recipe.policy.model),
            "tokenizer": recipe.policy.tokenizer and found(recipe.policy.tokenizer),
        }
    )
    sft = recipe.sft and recipe.sft.model_copy(update={"data": data(recipe.sft.data)})
    sets = [data(one) for one in recipe.eval] if isinstance(recipe.eval, list) else data(recipe.eval)
    return recipe.model_copy(update={"policy": policy, "data": data(recipe.data), "eval": sets, "sft": sft})


def need(recipe: Recipe, *sections: str) -> None:
    """Raises UserError where a command needs a section that the recipe leaves out."""
    for section in sections:
        if getattr(recipe, section) is None:
            raise UserError(f"the recipe has no {section}: section, which this command needs")


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key with the value in force, or as written where it reads the environment."""
    return text.write_text(stored_values(recipe))


def stored_values(recipe: Recipe) -> Values:
    """The values that `dump_yaml` writes."""
    values = as_stored(recipe.model_dump(mode="json", exclude={"base"}), recipe.kept)
    assert isinstance(values, dict)
    return values


def json_schema() -> str:
    """The schema that editors complete recipes with."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"
