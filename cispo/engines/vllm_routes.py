"""Experts of every token that vLLM reads, for router replay.

    worker   routers --RouteBuffer--> device memory --one copy a step--> host: RoutedStep
    engine   RouteTable: steps --> a row a request --> RoutedExperts of a complete draft

The worker runs `RouteExtension`, which vLLM imports by name: this module imports vLLM nowhere. A token that is read
again, its request preempted or recomputed, counts as the last time. Tokens that come out of the prefix cache are read
by no one here: their experts stay unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.policies.replay import RouteBuffer
from cispo.types import RoutedExperts


class RoutedStep(NamedTuple):
    """Tokens of one step of the engine, request after request."""

    requests: tuple[str, ...]
    """[requests] vLLM's internal ids."""
    starts: npt.NDArray[np.int64]
    """[requests]: position of each request's first token of the step in its sequence."""
    counts: npt.NDArray[np.int64]
    """[requests]: tokens of each in the step."""
    routes: Tensor
    """[tokens, layers, k], on the host."""
    arrived: torch.cuda.Event | None
    """Recorded behind the copy of `routes`; None where that has ended."""


class _Batch(Protocol):
    """Input batch of either of vLLM's model runners, as far as it is read here."""

    @property
    def req_ids(self) -> Sequence[str]: ...


class _FirstBatch(_Batch, Protocol):
    @property
    def num_computed_tokens_cpu(self) -> npt.NDArray[np.int32]: ...


class _SecondBatch(_Batch, Protocol):
    @property
    def num_computed_tokens_np(self) -> npt.NDArray[np.int32]: ...


class _SecondState(Protocol):
    @property
    def input_batch(self) -> _SecondBatch: ...


class _SchedulerOutput(Protocol):
    @property
    def num_scheduled_tokens(self) -> Mapping[str, int]: ...


class _ModelRunner(Protocol):
    execute_model: Callable[..., object]
    input_batch: _FirstBatch
    execute_model_state: _SecondState | None

    def get_model(self) -> torch.nn.Module: ...


class RouteExtension:
    """Methods that vLLM adds to its worker."""

    model_runner: _ModelRunner
    use_v2_model_runner: bool
    rank: int
    _routed_steps: list[RoutedStep]

    def record_routes(self) -> None:
        """Starts to record. All ranks of a model choose alike: the first one records."""
        self._routed_steps = []
        if self.rank:
            return
        runner, execute = self.model_runner, self.model_runner.execute_model
        buffer = getattr(runner.get_model(), "route_buffer", None)
        assert isinstance(buffer, RouteBuffer), "the model was not built to record its experts"

        def recorded(output: _SchedulerOutput, *args: object, **kwargs: object) -> object:
            result = execute(output, *args, **kwargs)
            if output.num_scheduled_tokens and not kwargs.get("dummy_run"):
                self._routed_steps.append(_step(self._sequences(), output.num_scheduled_tokens, buffer.routes))
            return result

        runner.execute_model = recorded

    def take_routes(self) -> list[RoutedStep]:
        """The steps since the last call, but for those that a device has not finished."""
        steps = self._routed_steps
        ready = next((i for i, s in enumerate(steps) if s.arrived is not None and not s.arrived.query()), len(steps))
        self._routed_steps = steps[ready:]
        return [step._replace(arrived=None) for step in steps[:ready]]

    def _sequences(self) -> tuple[Sequence[str], npt.NDArray[np.int32]]:
        """The requests of the step that was executed last, and how many tokens of each were known before it."""
        runner = self.model_runner
        if getattr(self, "use_v2_model_runner", False):
            assert runner.execute_model_state is not None
            batch = runner.execute_model_state.input_batch
            return batch.req_ids, batch.num_computed_tokens_np
        return runner.input_batch.req_ids, runner.input_batch.num_computed_tokens_cpu


def _step(
    sequences: tuple[Sequence[str], npt.NDArray[np.int32]], scheduled: Mapping[str, int], routes: Tensor
) -> RoutedStep:
    requests, computed = sequences
    counts = np.fromiter((scheduled[request] for request in requests), np.int64, len(requests))
    used, arrived = routes[: int(counts.sum())], None
    if used.is_cuda:
        copy = used.to("cpu", non_blocking=True)  # to pinned memory
        arrived = torch.cuda.Event()
        arrived.record()
    else:
        copy = used.clone()
    return RoutedStep(tuple(requests), computed[: len(requests)].astype(np.int64), counts, copy, arrived)


class RouteTable:
    """Experts of open requests by position: a row per request, reused once it is closed."""

    def __init__(self, take: Callable[[], Sequence[list[RoutedStep]]], *, rows: int, width: int) -> None:
        """`take` calls `RouteExtension.take_routes` on every worker, the first of which records.

        `rows` is the most requests that are open at a time, `width` the most tokens of one.
        """
        self._take, self._shape = take, (rows, width)
        self._rows: dict[str, int] = {}
        self._free = list(range(rows))
        self._first = np.zeros(rows, np.int64)
        self._values: npt.NDArray[np.uint8 | np.int16] | None = None
        """[rows, width, layers, k], from the first step on; a part that is never written takes no memory."""

    def open(self, request: str) -> None:
        row = self._rows[request] = self._free.pop()
        self._first[row] = self._shape[1]

    def close(self, request: str) -> None:
        self._free.append(self._rows.pop(request))

    def update(self) -> None:
        """Stores the steps that have arrived."""
        for step in self._take()[0]:
            self._add(step)

    def get(self, request: str, read: int) -> RoutedExperts:
        """Experts of the first `read` tokens of a request, from its first one that was not cached."""
        row = self._rows[request]
        first = int(self._first[row])
        assert self._values is not None and first < read, "a complete request has no recorded experts"
        values = self._values[row, first:read]
        return RoutedExperts(data=values.tobytes(), shape=(read - first, *values.shape[1:]), first=first)

    def _add(self, step: RoutedStep) -> None:
        routes = step.routes.numpy()
        if self._values is None:
            self._values = np.zeros((*self._shape, *routes.shape[1:]), routes.dtype)
        rows = np.fromiter((self._rows.get(r, -1) for r in step.requests), np.int64, len(step.requests))
        open_rows, starts = rows[rows >= 0], step.starts[rows >= 0]
        self._first[open_rows] = np.minimum(self._first[open_rows], starts)
        row_of_token = rows.repeat(step.counts)
        before = step.counts.cumsum() - step.counts
        places = np.arange(len(routes)) + (step.starts - before).repeat(step.counts)
        # A request that has ended may read its last token before the scheduler knows.
        kept = (row_of_token >= 0) & (places < self._shape[1])
        self._values[row_of_token[kept], places[kept]] = routes[kept]
