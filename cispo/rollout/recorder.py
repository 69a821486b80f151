"""Log-probabilities of sampled tokens that stay on the GPU until they are asked for.

    sampler(logits) -> tokens to the scheduler, every step
                    -> log-probabilities into a list on the device, fetched once

vLLM's own way back makes objects for every token and step, which costs as much host time as all the rest of a step
(docs/performance.md). Here the sampler computes the same numbers and a wrapper keeps them. The worker runs
`RecorderExtension`; this module imports vLLM nowhere, so it can name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Records(NamedTuple):
    """What was sampled since the last call, in order: row i says what one request sampled in one step."""

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


class RecordingSampler:
    """A sampler of vLLM's second model runner that keeps the log-probabilities it was asked for."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.steps: list[_Step] = []

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

    def take(self) -> Records:
        steps, self.steps = self.steps, []
        if not steps:
            return Records([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))
        requests = [request for step in steps for request in step.requests]
        positions = torch.cat([step.positions for step in steps]).cpu().numpy().astype(np.int64)
        logprobs = torch.cat([step.logprobs for step in steps]).cpu().numpy()
        sampled = torch.cat([step.sampled for step in steps]).cpu().numpy() > 0
        return Records(requests, positions, logprobs, sampled)


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

    def take_logprobs(self) -> Records:
        return self.model_runner.sampler.take()


class LogprobTable:
    """Where the records of one batch of requests come together."""

    def __init__(self, requests: Mapping[str, int], starts: Sequence[int], limits: Sequence[int]) -> None:
        """`requests` gives each internal id its row, `starts` the prompts' lengths, `limits` the most tokens."""
        self._rows = requests
        self._starts = np.array(starts, np.int64)
        self._ends: npt.NDArray[np.int64] = np.array(limits, np.int64).cumsum(dtype=np.int64)
        self._begins: npt.NDArray[np.int64] = self._ends - np.array(limits, np.int64)
        self._values = np.full(int(self._ends[-1]) if limits else 0, np.nan, np.float32)
        self._known = np.zeros(len(self._values), bool)

    def add(self, records: Records) -> None:
        """A token that was sampled twice, because its request was preempted meanwhile, counts as the second time."""
        rows = np.fromiter((self._rows.get(r, -1) for r in records.requests), np.int64, len(records.requests))
        places: npt.NDArray[np.int64] = self._begins[rows] + records.positions - self._starts[rows]
        kept = records.sampled & (rows >= 0) & (places < self._ends[rows])
        self._values[places[kept]] = records.logprobs[kept]
        self._known[places[kept]] = True

    def get(self, row: int, start: int, stop: int) -> list[float]:
        """Of a request's tokens start to stop."""
        part = slice(self._begins[row] + start, self._begins[row] + stop)
        assert self._known[part].all(), "a sampled token has no log-probability"
        return self._values[part].tolist()
