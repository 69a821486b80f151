"""Rows of files and hub datasets, kept as text or in Arrow: a Python dict is made when a row is used.

    line of a .jsonl --JsonRows--> row        record of a parquet file, folder or hub dataset --ArrowRows--> row

A million rows of 300 bytes take 0.3 GB in either form, as dicts several times that.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from cispo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
"""Column -> value. Any: the values are the user's own."""


_BATCH = 1000


class Table(Sequence[Row]):
    """Rows that are made when they are used; equal to any sequence of equal rows."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """The row at an index from 0 on."""

    @abstractmethod
    def kinds(self) -> list[int]:
        """Positions of rows that show, between them, every set of columns, and null in every column that has it."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Table:
        """The rows of a range."""

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as that of a list


class JsonRows(Table):
    """Lines of JSON objects in one buffer, each known to hold one."""

    def __init__(self, text: bytearray, ends: array[int], kinds: Sequence[int], start: int = 0) -> None:
        """`ends[i]` is the end of row i in `text`; `kinds` are positions in `ends`. The rows begin at `start`."""
        self._text, self._ends, self._kinds, self._start = text, ends, kinds, start
        self._stop = len(ends)

    def __len__(self) -> int:
        return self._stop - self._start

    def row(self, index: int) -> Row:
        at = self._start + index
        line = self._text[self._ends[at - 1] if at else 0 : self._ends[at]]
        return json.loads(line.decode())

    def kinds(self) -> list[int]:
        if (self._start, self._stop) == (0, len(self._ends)):
            return list(self._kinds)
        return kinds_of(self)

    def part(self, start: int, stop: int) -> JsonRows:
        part = JsonRows(self._text, self._ends, self._kinds, self._start + start)
        part._stop = self._start + stop
        return part


class ArrowRows(Table):
    """A dataset of `datasets`, read from memory-mapped files."""

    def __init__(self, dataset: Dataset, where: str) -> None:
        """`where` names the dataset in errors."""
        self._dataset, self._where = dataset, where

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Row]:
        try:
            # By batches: a row alone takes datasets 20 microseconds.
            for batch in self._dataset.iter(_BATCH):
                assert isinstance(batch, dict)
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))
        # The decoding of a column is its type's code.
        except Exception as error:
            raise self._unreadable(error) from error

    def row(self, index: int) -> Row:
        try:
            return dict(self._dataset[index])
        except Exception as error:
            raise self._unreadable(error) from error

    def kinds(self) -> list[int]:
        import pyarrow.compute as pc

        if len(self) == 0:
            return []
        # A selection that is no range has an index of its own beside the table.
        if self._dataset._indices is not None:
            return kinds_of(self)
        columns = self._dataset.data.table.columns
        nulls = [int(pc.index(column.is_null(), True).as_py()) for column in columns if column.null_count]
        return sorted({0, *nulls})

    def part(self, start: int, stop: int) -> ArrowRows:
        return ArrowRows(self._dataset.select(range(start, stop)), self._where)

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._where}: cannot read a row: {' '.join(str(error.__cause__ or error).split())}")


def kind_of(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of a row, and those that are null."""
    return tuple(row), tuple(name for name, value in row.items() if value is None)


def kinds_of(rows: Sequence[Row]) -> list[int]:
    """`Table.kinds` of any rows, in one pass over them."""
    if isinstance(rows, Table) and type(rows).kinds is Table.kinds:
        return rows.kinds()
    first: dict[object, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(kind_of(row), index)
    return list(first.values())
