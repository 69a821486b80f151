"""Log-probabilities that were recorded on a device, sorted into the requests they belong to.

Records, a row a sample of a step -> LogprobTable: a row a request, a column a token
"""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt


class Records(NamedTuple):
    """Samples recorded between two calls of `send`, in order: a row is one request in one step."""

    requests: list[str]
    """[rows] vLLM's internal request ids."""
    positions: npt.NDArray[np.int64]
    """[rows] int64: position of the sampled token in its sequence, prompt included."""
    logprobs: npt.NDArray[np.float32]
    """[rows] float32."""
    sampled: npt.NDArray[np.bool_]
    """[rows] bool: False where the prompt went on and the sample was dropped."""


class LogprobTable:
    """Log-probabilities of open requests by token: a row per request, reused once it is closed."""

    def __init__(self, width: int) -> None:
        """`width` is the most tokens that a request may sample."""
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._starts = np.zeros(0, np.int64)
        self._limits = np.zeros(0, np.int64)
        self._values = np.zeros((0, width), np.float32)
        self._known = np.zeros((0, width), bool)

    def open(self, request: str, *, start: int, limit: int) -> None:
        """`start` is the prompt's length, `limit` the most tokens; later ones are dropped."""
        if not self._free:
            self._grow()
        row = self._rows[request] = self._free.pop()
        self._starts[row], self._limits[row] = start, limit
        self._known[row, :limit] = False

    def close(self, request: str) -> None:
        self._free.append(self._rows.pop(request))

    def add(self, records: Records) -> None:
        """Stores records. A token sampled twice, its request preempted meanwhile, keeps the later log-probability."""
        if not self._rows:
            return
        # A loop inside of the interpreter: there is a record for every token of a batch.
        rows = np.fromiter(map(self._rows.get, records.requests, repeat(-1)), np.int64, len(records.requests))
        tokens: npt.NDArray[np.int64] = records.positions - self._starts[rows]
        kept = np.flatnonzero(records.sampled & (rows >= 0) & (tokens < self._limits[rows]))
        cells = rows[kept] * self._values.shape[1] + tokens[kept]
        self._values.reshape(-1)[cells] = records.logprobs[kept]
        self._known.reshape(-1)[cells] = True

    def get(self, request: str, start: int, stop: int) -> list[float]:
        """Log-probabilities of a request's sampled tokens `start` to `stop`."""
        row = self._rows[request]
        assert self._known[row, start:stop].all(), "a sampled token has no log-probability"
        return self._values[row, start:stop].tolist()

    def _grow(self) -> None:
        """Doubles the rows; a row that is never written takes no memory."""
        rows = len(self._starts)
        more = max(rows, 16)
        self._free += range(rows + more - 1, rows - 1, -1)
        self._starts, self._limits = (np.pad(values, (0, more)) for values in (self._starts, self._limits))
        self._values, self._known = _extended(self._values, more), _extended(self._known, more)


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _extended(table: npt.NDArray[_Scalar], rows: int) -> npt.NDArray[_Scalar]:
    result = np.zeros((len(table) + rows, table.shape[1]), table.dtype)
    result[: len(table)] = table
    return result
