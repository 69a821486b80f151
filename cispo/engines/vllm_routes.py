"""Experts of every token that vLLM reads, for router replay.

    worker   routers --RouteBuffer--> device memory --one copy a step--> host: RoutedStep
    engine   RouteTable: steps --> a row a request --> RoutedExperts of a complete draft

The worker runs `RouteExtension`, which vLLM imports by name: this module imports vLLM nowhere. A token that is read
again, its request preempted or recomputed, counts as the last time. A token out of the prefix cache has the experts of
the request that read it.
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

_Routes = npt.NDArray[np.uint8 | np.int16]
"""[..., layers, k]: numbers of experts."""


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


class PrefixRoutes:
    """Experts of the tokens that vLLM's prefix cache may hold, by the beginning of a sequence that ends with them.

    A tree of pieces of equally many tokens. vLLM's blocks are multiples of a piece.
    """

    _PIECE = 16

    def __init__(self) -> None:
        self._pieces: dict[int, dict[tuple[int, tuple[int, ...]], tuple[int, _Routes]]] = {}
        """Salt -> {(number of the piece before, -1 at the start; tokens): (its number, its rows)}."""

    def add(self, salt: int, tokens: Sequence[int], rows: _Routes) -> None:
        """`rows` [n, layers, k] are those of the first n tokens. Salts before the last but one are forgotten."""
        if salt not in self._pieces:
            self._pieces = {old: pieces for old, pieces in self._pieces.items() if old >= salt - 1}
        pieces, before = self._pieces.setdefault(salt, {}), -1
        for start in range(0, len(rows) - self._PIECE + 1, self._PIECE):
            part = slice(start, start + self._PIECE)
            new = len(pieces), rows[part]
            found = pieces.get(key := (before, tuple(tokens[part])))
            if found is None:
                found = pieces[key] = new[0], new[1].copy()
            before = found[0]

    def find(self, salt: int, tokens: Sequence[int], count: int) -> _Routes | None:
        """[count, layers, k] of the first tokens; None where one of them is unknown."""
        pieces, before, rows = self._pieces.get(salt, {}), -1, list[_Routes]()
        for start in range(0, count, self._PIECE):
            found = pieces.get((before, tuple(tokens[start : start + self._PIECE])))
            if found is None:
                return None
            before = found[0]
            rows.append(found[1])
        return np.concatenate(rows)[:count]


class RouteTable:
    """Experts of open requests by position: a row per request, reused once it is closed."""

    def __init__(self, take: Callable[[], Sequence[list[RoutedStep]]], *, rows: int, width: int, caches: bool) -> None:
        """`take` calls `RouteExtension.take_routes` on every worker, the first of which records.

        `rows` is the most requests that are open at a time, `width` the most tokens of one; `caches` says whether vLLM
        has a prefix cache.
        """
        self._take, self._shape = take, (rows, width)
        self._rows: dict[str, int] = {}
        self._free = list(range(rows))
        self._first = np.zeros(rows, np.int64)
        """Position from which on a row is known; `width` before its first step."""
        self._values: _Routes | None = None
        """[rows, width, layers, k], from the first step on; a part that is never written takes no memory."""
        self._prefixes = PrefixRoutes() if caches else None
        self._prompts: dict[str, tuple[int, Sequence[int]]] = {}
        """Request -> its salt in the prefix cache and its prompt."""

    def open(self, request: str, prompt: Sequence[int], salt: int) -> None:
        row = self._rows[request] = self._free.pop()
        self._first[row] = self._shape[1]
        self._prompts[request] = salt, prompt

    def close(self, request: str) -> None:
        self._free.append(self._rows.pop(request))
        del self._prompts[request]

    def update(self) -> None:
        """Stores the steps that have arrived."""
        for step in self._take()[0]:
            self._add(step)

    def get(self, request: str, sampled: Sequence[int]) -> RoutedExperts:
        """Experts of a complete request but for its last token, given the tokens that it sampled."""
        row, (salt, prompt) = self._rows[request], self._prompts[request]
        first, read = int(self._first[row]), len(prompt) + len(sampled) - 1
        assert self._values is not None and first < read, "a complete request has no recorded experts"
        values = self._values[row, first:read]
        if self._prefixes is not None and first == 0:
            self._prefixes.add(salt, [*prompt, *sampled], values)
        return RoutedExperts(data=values.tobytes(), shape=(read - first, *values.shape[1:]), first=first)

    def _add(self, step: RoutedStep) -> None:
        routes: _Routes = step.routes.numpy()
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
        if self._prefixes is not None:
            self._share(self._prefixes, dict(zip(step.requests, (step.starts + step.counts).tolist(), strict=True)))

    def _share(self, prefixes: PrefixRoutes, ends: Mapping[str, int]) -> None:
        """Completes rows that begin behind cached tokens, given the position at which each request's step ends."""
        assert self._values is not None
        reads_prompt = (r for r in ends if r in self._rows and ends[r] <= len(self._prompts[r][1]))
        waiting = {request: ends[request] for request in reads_prompt}
        # A prompt may find what another one reads in the same step.
        while waiting:
            known = [request for request in waiting if self._begins_at_start(prefixes, request)]
            for request in known:
                (salt, prompt), row = self._prompts[request], self._rows[request]
                prefixes.add(salt, prompt, self._values[row, : waiting.pop(request)])
            if not known:
                return

    def _begins_at_start(self, prefixes: PrefixRoutes, request: str) -> bool:
        """Whether a request's row is known from its first token on, after a look among the prefixes."""
        row, (salt, prompt) = self._rows[request], self._prompts[request]
        first = int(self._first[row])
        assert self._values is not None
        if first and (found := prefixes.find(salt, prompt, first)) is not None:
            self._values[row, :first] = found
            self._first[row] = 0
        return self._first[row] == 0
