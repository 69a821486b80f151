"""From YAML files and key=value overrides to a `Recipe`, and back to YAML.

    defaults  <-  base: other.yaml  <-  recipe.yaml  <-  key=value ...

OmegaConf merges, pydantic validates; unknown keys and wrong types raise UserError naming the key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cispo.errors import UserError
from cispo.recipe.checks import check_recipe
from cispo.recipe.migrate import REMOVED, migrate
from cispo.recipe.schema import Data, Recipe, Section

Values = dict[str, object]
"""The plain values of a recipe: nested sections, keys of any version."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, its base and the overrides (`key=value`).

    `path` is a file, or the bare name of a shipped recipe. Raises UserError for a missing or malformed file, an unknown
    key, a wrong type, or keys that contradict each other.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _locate(path)
    layers, folders = [_read_yaml(file)], [file.parent]
    base = layers[0].get("base")
    if base is not None:
        base_file = _locate(str(base), file.parent)
        folders.append(base_file.parent)
        base_layer = _read_yaml(base_file)
        if "base" in base_layer:
            raise UserError(f"{base_file}: a base recipe cannot have a base of its own")
        layers.insert(0, base_layer)
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UserError(f"override {item!r} is not of the form key=value")
    try:
        layers.append(_plain(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))))
        merged = OmegaConf.merge(*(migrate(layer, str(file)) for layer in layers))
        values = _plain(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {_one_line(error)}") from None
    return _with_paths(parse_recipe(values, where=str(file)), folders)


def parse_recipe(values: Mapping[str, object], *, where: str = "recipe") -> Recipe:
    """Validates plain values; `where` names the file in errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    check_recipe(recipe, where)
    return recipe


def read_stored(file: Path) -> Recipe:
    """The recipe.yaml of a run folder: see `stored_recipe`."""
    return parse_recipe(migrate(_read_yaml(file), str(file)), where=str(file))


def stored_recipe(text: str, *, where: str) -> Recipe:
    """The recipe in a text that `dump_yaml` wrote, in this version or an earlier one.

    Keys that are newer than the text take their defaults. Raises UserError naming `where` and the key that cannot be
    read.
    """
    return parse_recipe(migrate(_parse_yaml(text, where), where), where=where)


def _locate(name: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe, `beside` being the folder that its path starts from."""
    file, given = beside / name, Path(name)
    if file.is_file() or given.suffix or len(given.parts) != 1:
        return file
    shipped = {Path(str(f)).stem: Path(str(f)) for f in files("cispo.recipes").iterdir() if f.name.endswith(".yaml")}
    if given.name not in shipped:
        raise UserError(f"recipe {name} does not exist; the shipped recipes are {', '.join(sorted(shipped))}")
    return shipped[given.name]


def _read_yaml(file: Path) -> Values:
    try:
        return _parse_yaml(file.read_text(), str(file))
    except FileNotFoundError:
        raise UserError(f"recipe {file} does not exist") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} cannot be read: {_one_line(error)}") from None


def _parse_yaml(text: str, where: str) -> Values:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {where} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {where} does not hold keys and values")
    return _plain(values)


def _plain(values: object) -> Values:
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key of the schema, nested sections included."""
    for name, info in section.model_fields.items():
        yield prefix + name, info
        for inner in _sections(info.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def _sections(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for part in getattr(annotation, "__args__", ()) for s in _sections(part)]


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence that names the key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        if plain in REMOVED:
            return f"unknown key {key}: {REMOVED[plain].reason}"
        keys = [k for k, _ in known_keys()]
        near = difflib.get_close_matches(plain, keys, n=1, cutoff=0.6)
        leaf = plain.rsplit(".", 1)[-1]
        near = near or [k for k in keys if k.rsplit(".", 1)[-1] == leaf][:1]
        return f"unknown key {key}" + (f" (did you mean {near[0]}?)" if near else "")
    if first["type"] == "missing":
        return f"key {key} is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key} = {first['input']!r}: {message}"


def _with_paths(recipe: Recipe, folders: Sequence[Path]) -> Recipe:
    """Paths that exist beside the recipe or its base but not in the current directory are taken from there."""

    def found(value: str | None) -> str | None:
        if value is None or Path(value).exists():
            return value
        return next((str(folder / value) for folder in folders if (folder / value).exists()), value)

    def data(value: Data | None) -> Data | None:
        return value and value.model_copy(update={"source": found(value.source)})

    policy = recipe.policy.model_copy(
        update={"model": found(recipe.policy.model), "tokenizer": found(recipe.policy.tokenizer)}
    )
    sft = recipe.sft and recipe.sft.model_copy(update={"data": data(recipe.sft.data)})
    return recipe.model_copy(
        update={"policy": policy, "data": data(recipe.data), "eval": data(recipe.eval), "sft": sft, "base": None}
    )


def need(recipe: Recipe, *sections: str) -> None:
    """Raises UserError where a command needs a section that the recipe leaves out."""
    for section in sections:
        if getattr(recipe, section) is None:
            raise UserError(f"the recipe has no {section}: section, which this command needs")


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key with the value in force."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"base"}), sort_keys=False, width=120)


def json_schema() -> str:
    """The schema that editors complete recipes with."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"
