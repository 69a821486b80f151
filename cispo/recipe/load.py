"""From YAML files and key=value overrides to a `Recipe`, and back to YAML.

    defaults  <-  base: other.yaml  <-  recipe.yaml  <-  key=value ...

OmegaConf merges, pydantic validates; unknown keys and wrong types raise UserError naming the key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cispo.errors import UserError
from cispo.recipe.checks import check_recipe
from cispo.recipe.schema import Data, Recipe, Section


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, its base and the overrides (`key=value`).

    Raises UserError for a missing or malformed file, an unknown key, a wrong type, or keys that contradict each other.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    layers, folders = [_read_yaml(path)], [path.parent]
    base = layers[0].get("base")
    if base is not None:
        folders.append((path.parent / str(base)).parent)
        base_layer = _read_yaml(path.parent / str(base))
        if "base" in base_layer:
            raise UserError(f"{path.parent / str(base)}: a base recipe cannot have a base of its own")
        layers.insert(0, base_layer)
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UserError(f"override {item!r} is not of the form key=value")
    try:
        merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    assert isinstance(values, dict)
    recipe = parse_recipe({str(k): v for k, v in values.items()}, where=str(path))
    return _with_paths(recipe, folders)


def parse_recipe(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validates plain values; `where` names the file in errors."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    check_recipe(recipe, where)
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} does not hold keys and values")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, field) of every key of the schema, nested sections included."""
    for name, info in section.model_fields.items():
        yield prefix + name, info
        for inner in _sections(info.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for part in getattr(annotation, "__args__", ()) for s in _sections(part)]


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence that names the key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
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
