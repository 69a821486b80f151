"""Log-probabilities of sampled tokens that stay on the GPU until they are asked for.

    sampler(logits) -> tokens to the scheduler, every step
                    -> log-probabilities into a list on the device; send --> host memory; take --> Records

vLLM's own way back makes objects for every token and step, which costs as much host time as all the rest of a step
(docs/performance.md). Here the sampler computes the same numbers and a wrapper keeps them. The worker runs
`RecorderExtension`; this module imports vLLM nowhere, so it can name it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Records(NamedTuple):
    """What was sampled between two calls of `send`, in order: row i says what one request sampled in one step."""

    requests: list[str]
    """Internal request ids, one a row."""
    positions: npt.NDArray[np.int64]
    """[rows] int64: the place in its sequence, prompt included, of the token that was sampled."""
    logprobs: npt.NDArray[np.float32]
    """[rows] float32."""
    sampled: npt.NDArray[np.bool_]
    """[rows] bool: False where the prompt went on and the sample was dropped."""


@dataclass(slots=True)
class _Step:
    requests: tuple[str, ...]
    positions: Tensor
    logprobs: Tensor
    sampled: Tensor


@dataclass(slots=True)
class _Sent:
    """Columns on their way to the host, or there."""

    requests: list[str]
    columns: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    def records(self) -> Records:
        if self.arrived is not None:
            self.arrived.synchronize()
        positions, logprobs, sampled = (column.numpy() for column in self.columns)
        return Records(self.requests, positions.astype(np.int64), logprobs, sampled > 0)


class RecordingSampler:
    """A sampler of vLLM's second model runner that keeps the log-probabilities it was asked for."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.steps: list[_Step] = []
        self._sent: _Sent | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        output = self.sampler(logits, batch)
        if output.logprobs_tensors is None:
            return output
        positions = batch.positions[batch.logits_indices] + 1
        step = _Step(tuple(batch.req_ids), positions, output.logprobs_tensors.logprobs[:, 0], output.num_sampled)
        self.steps.append(step)
        return replace(output, logprobs_tensors=None)

    def send(self) -> None:
        """Puts a copy of what was recorded behind the steps that are queued on the device, and waits for nothing."""
        assert self._sent is None, "what was sent is to be taken first"
        steps, self.steps = self.steps, []
        if not steps:
            return
        columns = ([s.positions for s in steps], [s.logprobs for s in steps], [s.sampled for s in steps])
        # Copies that do not block go to pinned memory.
        copies = tuple(torch.cat(column).to("cpu", non_blocking=True) for column in columns)
        arrived = None
        if steps[0].logprobs.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent = _Sent([request for step in steps for request in step.requests], copies, arrived)

    def take(self) -> Records:
        """What was sent; waits until it has arrived."""
        sent, self._sent = self._sent, None
        if sent is None:
            return Records([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))
        return sent.records()


class RecorderExtension:
    """Methods that vLLM adds to its worker."""

    model_runner: Any
    use_v2_model_runner: bool

    def record_logprobs(self) -> bool:
        """Starts to record; False where this worker's sampler reports in another way."""
        if not self.use_v2_model_runner:
            return False
        self.model_runner.sampler = RecordingSampler(self.model_runner.sampler)
        return True

    def send_logprobs(self) -> None:
        self.model_runner.sampler.send()

    def take_logprobs(self) -> Records:
        return self.model_runner.sampler.take()


class LogprobTable:
    """Where the records of requests come together, as long as these are open: a row of the table each."""

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
        """A token that was sampled twice, because its request was preempted meanwhile, counts as the second time."""
        if not self._rows:
            return
        rows = np.fromiter((self._rows.get(r, -1) for r in records.requests), np.int64, len(records.requests))
        places: npt.NDArray[np.int64] = records.positions - self._starts[rows]
        kept = records.sampled & (rows >= 0) & (places < self._limits[rows])
        self._values[rows[kept], places[kept]] = records.logprobs[kept]
        self._known[rows[kept], places[kept]] = True

    def get(self, request: str, start: int, stop: int) -> list[float]:
        """Of a request's tokens start to stop."""
        row = self._rows[request]
        assert self._known[row, start:stop].all(), "a sampled token has no log-probability"
        return self._values[row, start:stop].tolist()

    def _grow(self) -> None:
        """Twice as many rows; what is never written takes no memory."""
        rows = len(self._starts)
        more = max(rows, 16)
        self._free += range(rows + more - 1, rows - 1, -1)
        self._starts, self._limits = (np.pad(column, (0, more)) for column in (self._starts, self._limits))
        self._values, self._known = (_longer(table, more) for table in (self._values, self._known))


def _longer(table: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    result = np.zeros((len(table) + rows, table.shape[1]), table.dtype)
    result[: len(table)] = table
    return result
