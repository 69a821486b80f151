"""YAML of recipes, in a file, in a key=value override and in a run folder, read and written in one way.

    text --nodes--> bounded, no key twice --plain values--> {"learner": {"lr": 1e-06}}

Numbers are those of YAML 1.2, with `1_000` as well: 1e-6 is a number, 2024_11, 12:30 and 2024-01-01 are text. A key
that holds text in the schema takes a plain value as it is written. Keys of mappings are text, as in JSON.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.constructor import ConstructorError

from cispo.errors import UserError
from cispo.recipe.schema import known_keys

Values = dict[str, object]
"""The plain values of a recipe: nested sections, keys of any version."""

MAX_BYTES = 1 << 18
"""Largest recipe."""
_MAX_VALUES = 20_000
"""Most values of a recipe, those behind its aliases included."""
_MAX_DEPTH = 50
_MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"(?:\d+|\d{1,3}(?:_\d{3})+)"
_INT = re.compile(rf"[-+]?(?:{_NUMBER}|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)")
_FLOAT = re.compile(rf"[-+]?(?:(?:{_NUMBER}\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)")


_QUOTED_OR_NULL = re.compile(r"""\s*(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|~|null|Null|NULL|)\s*""", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Plain values alone: no dates, no sets, no objects."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}bool", f"{_TAG}null", f"{_TAG}merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (*(f"{_TAG}{kind}" for kind in ("null", "str", "seq", "map")), None)
    }


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or a reader of YAML 1.1 would take for something else."""

    yaml_implicit_resolvers = {first: [*pairs] for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}


def _number(loader: _Loader, node: ScalarNode) -> int | float:
    """The number of a node that is tagged as one, by its form or by hand."""
    text = loader.construct_scalar(node)
    digits = text.replace("_", "").lower()
    if len(digits) > _MAX_DIGITS:
        raise ConstructorError(None, None, f"a number has {len(digits):,} digits", node.start_mark)
    prefixed = re.fullmatch(r"([-+]?)0([obx])(.+)", digits)
    if _INT.fullmatch(text) and node.tag == f"{_TAG}int":
        return int(prefixed[1] + prefixed[3], {"o": 8, "b": 2, "x": 16}[prefixed[2]]) if prefixed else int(digits)
    if prefixed or not _FLOAT.fullmatch(text):
        raise ConstructorError(None, None, f"{text!r} is no number", node.start_mark)
    value = float(re.sub(r"\.(inf|nan)", r"\1", digits))
    if math.isinf(value) and "inf" not in digits:
        raise ConstructorError(None, None, f"{text} is beyond the largest number", node.start_mark)
    return value


def _boolean(loader: _Loader, node: ScalarNode) -> bool:
    text = loader.construct_scalar(node)
    if text.lower() not in loader.bool_values:
        raise ConstructorError(None, None, f"{text!r} is neither true nor false", node.start_mark)
    return loader.bool_values[text.lower()]


for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"(?:{_pattern.pattern})$"), list("-+.0123456789"))
    _Loader.add_constructor(f"{_TAG}{_kind}", _number)
_Loader.add_constructor(f"{_TAG}bool", _boolean)
# Apart from its place before a mapping, `<<` is text.
_Loader.add_constructor(f"{_TAG}merge", _Loader.construct_yaml_str)


def read_file(file: Path) -> Values:
    """The values of a recipe's file. Raises UserError naming the file, and the line where there is one."""
    # The shell's <(...) is a pipe that has a writer; another pipe may have none.
    if os.path.exists(file) and not os.path.isfile(file) and not str(file).startswith(("/dev/fd/", "/dev/stdin")):
        raise UserError(f"recipe {file} cannot be read: it is no file")
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"recipe {file} does not exist") from None
    except OSError as error:
        raise UserError(f"recipe {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"recipe {str(file)!r} cannot be read: {error}") from None
    return read_text(text, str(file))


def read_text(text: str | bytes, where: str) -> Values:
    """The values of a recipe's text; `where` names it in errors."""
    if len(text) > MAX_BYTES:
        raise UserError(f"recipe {where} is larger than {MAX_BYTES >> 10} KiB, which no recipe is")
    values = _construct(text, f"recipe {where}", ())
    if not isinstance(values, dict):
        raise UserError(f"recipe {where} does not hold keys and values")
    return values


def read_value(text: str, key: str, where: str) -> object:
    """The value that `key`=`text` gives: the text itself for a key that holds text, else the YAML in it.

    Quotes around the whole text and `null` are YAML for a key that holds text as well, and so is a list of texts.
    """
    if key in _text_keys() - _list_keys() and not _QUOTED_OR_NULL.fullmatch(text):
        return text
    try:
        return _construct(text, where, tuple(key.split(".")))
    except UserError as error:
        raise UserError(f"{error} (a text that looks like YAML goes in quotes)") from None


def write_text(values: Mapping[str, object]) -> str:
    """YAML that `read_text` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def _construct(text: str | bytes, where: str, place: tuple[str, ...]) -> object:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, {}, 0)
            return loader.construct_document(_expanded(node, place))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem, error.note)))
        raise UserError(f"{where} is not valid YAML: {line}{_one_line(problem)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where} is nested more than {_MAX_DEPTH} levels deep") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_size(node: Node, sizes: dict[int, int], depth: int) -> int:
    """The number of values below a node, every alias counted as the values that it stands for.

    Raises UserError where it is too large, or without end: a few hundred bytes of aliases can stand for 10^9 values.
    """
    if depth > _MAX_DEPTH:
        raise UserError(f"line {_line(node)} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(node, ScalarNode):
        return 1
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError(f"line {_line(node)} holds an alias of itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    inner = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
    size = 1 + sum(_check_size(part, sizes, depth + 1) for part in inner)
    if size > _MAX_VALUES:
        raise UserError(f"line {_line(node)} stands for more than {_MAX_VALUES:,} values")
    sizes[id(node)] = size
    return size


def _expanded(node: Node, place: tuple[str, ...]) -> Node:
    """A copy of the tree without aliases, in which keys, and plain values of keys that hold text, are text.

    Raises UserError where a mapping has a key twice.
    """
    if isinstance(node, SequenceNode):
        return SequenceNode(node.tag, [_expanded(part, place) for part in node.value], node.start_mark, node.end_mark)
    if isinstance(node, ScalarNode):
        as_text = node.style is None and node.tag != f"{_TAG}null" and ".".join(place) in _text_keys()
        tag = f"{_TAG}str" if as_text else node.tag
        return ScalarNode(tag, node.value, node.start_mark, node.end_mark, node.style)
    pairs: list[tuple[Node, Node]] = []
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise UserError(f"line {_line(key)}: a key must be text")
        if key.tag == f"{_TAG}merge":
            pairs.append((key, _expanded(value, place)))
            continue
        name = str(key.value)
        full = (*place, name)
        if name in lines:
            raise UserError(f"line {_line(key)}: the key {'.'.join(full)} stands in line {lines[name]} already")
        lines[name] = _line(key)
        pairs.append((ScalarNode(f"{_TAG}str", name, key.start_mark, key.end_mark), _expanded(value, full)))
    return MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


@functools.cache
def _text_keys() -> frozenset[str]:
    """Dotted keys of the schema that hold text."""
    return frozenset(key for key, info in known_keys() if _holds_text(info.annotation))


@functools.cache
def _list_keys() -> frozenset[str]:
    """Dotted keys of the schema that hold a list, or nothing."""
    return frozenset(key for key, info in known_keys() if _holds_list(info.annotation))


def _holds_list(annotation: object) -> bool:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(_holds_list(part) for part in get_args(annotation))
    return get_origin(annotation) is list


def _holds_text(annotation: object) -> bool:
    if get_origin(annotation) in (dict, Literal):
        return get_origin(annotation) is Literal
    return annotation is str or any(_holds_text(part) for part in get_args(annotation))


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
