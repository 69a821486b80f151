"""Rows of .jsonl and .json files.

    line --json: it holds an object--> text in one buffer --when it is used--> row

Read by `json`: `datasets` would turn the answer "2024-01-01" into a datetime, and its errors name no line.
"""

from __future__ import annotations

import codecs
import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from cispo.errors import UserError
from cispo.rollout.tables import JsonRows, Row, kind_of


def jsonl_rows(path: Path, limit: int | None, key: str) -> JsonRows:
    """The rows of a .jsonl file, each line read once now and again when it is used. UserError names a bad line."""
    text, ends = bytearray(), array("q")
    kinds: dict[object, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                decoded = line.decode()
                if not decoded.strip():
                    continue
                if len(ends) == limit:
                    break
                where = f"{key}: '{path}' line {number}"
                row = as_row(_parse(decoded, lambda _, where=where: where, column=True), where)
                kinds.setdefault(kind_of(row), len(ends))
                text += line
                ends.append(len(text))
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{key}: cannot read '{path}': {error or 'it does not fit into memory'}") from error
    return JsonRows(text, ends, list(kinds.values()))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that end at \\n, \\r\\n or \\r alone: JSON strings may hold U+2028 and its like unescaped."""
    for number, line in enumerate(file):
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if b"\r" not in line:
            yield line
        else:
            yield from line.replace(b"\r\n", b"\n").replace(b"\r", b"\n").splitlines(keepends=True)


def json_rows(path: Path, limit: int | None, key: str) -> list[Row]:
    """The rows of a .json file, one list of objects."""
    try:
        values = _parse(path.read_text(encoding="utf-8-sig"), lambda error: f"{key}: '{path}' line {error.lineno}")
    except (OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{key}: cannot read '{path}': {error or 'it does not fit into memory'}") from error
    if not isinstance(values, list):
        raise UserError(f"{key}: '{path}' must hold a list of rows, not one {type(values).__name__}")
    return [
        as_row(value, f"{key}: row {number} of '{path}'")
        for number, value in enumerate(itertools.islice(values, limit), start=1)
    ]


def _parse(text: str, where: Callable[[json.JSONDecodeError], str], *, column: bool = False) -> object:
    """The JSON value of a text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" (column {error.colno})" if column else ""
        raise UserError(f"{where(error)} is not JSON: {error.msg}{place}") from error
    # A number of more digits than Python reads, or too many brackets.
    except (ValueError, RecursionError) as error:
        start = json.JSONDecodeError("", text, 0)
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where(start)} cannot be read: {reason}") from None


def as_row(value: object, where: str) -> Row:
    """The value as a row. UserError where it has no columns, or a column without a text as its name."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is not an object with columns but a {type(value).__name__}")
    row = dict(value)
    other = next((name for name in row if not isinstance(name, str)), None)
    if other is not None:
        raise UserError(f"{where} has a column {other!r:.80}, whose name is no text")
    return row
