"""Requests that decode together, and the counters that stand for them while they do.

SteadyBatch.of(running requests) -> step, step ... -> SteadyBatch.part (some have ended)
                                    each an order to vLLM's workers, `SteadyOutput`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

Integers = npt.NDArray[np.int64]


@dataclass(slots=True)
class SteadyBatch:
    """The running requests of steady steps, rows in their order, and their counters before the next of these steps."""

    requests: list[Request]
    ids: list[str]
    computed: Integers
    """[rows] Tokens with keys and values, those of steps in flight included."""
    prompts: Integers
    """[rows] Tokens of the prompt."""
    limits: Integers
    """[rows] Tokens, prompt included, at which the request ends."""
    room: Integers
    """[rows] Tokens for which blocks are allocated."""
    stops: frozenset[int]
    """Tokens that end any of the requests."""
    watched: frozenset[int]
    """Rows that vLLM has to check at every token: a repeated pattern ends them."""
    first: int
    """Number of vLLM's last step when they came together."""
    step: int
    """Number of vLLM's last step."""
    last: int
    """Number of the last step before any request has all the tokens of its limit under way."""

    @classmethod
    def of(cls, requests: list[Request], room: Integers, *, longest: int, step: int) -> SteadyBatch:
        """Of requests that decode, `longest` tokens at most, after step number `step`."""
        computed = integers(request.num_computed_tokens for request in requests)
        prompts = integers(request.num_prompt_tokens for request in requests)
        limits = np.minimum(prompts + integers(request.max_tokens for request in requests), longest)
        rules = [request.sampling_params for request in requests]
        return cls(
            requests=requests,
            ids=[request.request_id for request in requests],
            computed=computed,
            prompts=prompts,
            limits=limits,
            room=room,
            stops=frozenset(chain.from_iterable({_stops(rule) for rule in rules})),
            watched=frozenset(row for row, rule in enumerate(rules) if rule and rule.repetition_detection),
            first=step,
            step=step,
            last=step + int((limits - 1 - computed).min()),
        )

    def part(self, rows: Sequence[int]) -> SteadyBatch:
        """Of these rows; tokens that end other requests stay, since vLLM has the last word on every end."""
        place = {row: index for index, row in enumerate(rows)}
        return replace(
            self,
            requests=[self.requests[row] for row in rows],
            ids=[self.ids[row] for row in rows],
            computed=self.computed[rows],
            prompts=self.prompts[rows],
            limits=self.limits[rows],
            room=self.room[rows],
            watched=frozenset(place[row] for row in self.watched if row in place),
            last=self.step + int((self.limits - 1 - self.computed)[rows].min()),
        )


@dataclass(slots=True)
class SteadyStep:
    """The part of a steady step that its update reads."""

    batch: SteadyBatch
    computed: Integers
    """[rows] Before the step: the token it samples is number `computed` + 2 of the sequence."""


@dataclass
class SteadyOutput(SchedulerOutput):
    """vLLM's order to its workers; `steady` stays in this process."""

    steady: SteadyStep | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "steady": None}


def _stops(rule: SamplingParams | None) -> tuple[int, ...]:
    """Tokens that end a request of these sampling parameters."""
    if rule is None:
        return ()
    eos = () if rule.eos_token_id is None else (rule.eos_token_id,)
    return (*eos, *(rule.stop_token_ids or ()))


def integers(values: Iterable[int]) -> Integers:
    return np.fromiter(values, np.int64)
