"""Log-probabilities of sampled tokens that stay on the GPU until they are fetched.

    worker   RecordingSampler: tokens -> scheduler, log-probabilities -> list on the device, every step
             send: list -> host memory, behind the queued steps      take: -> Records
    engine   PendingLogprobs:  tokens of a step -> pending -> fetched -> SampledTokens, with their log-probabilities

vLLM returns log-probabilities as objects, one per token and step, which costs as much host time as all the rest of a
step (docs/performance.md). Here the sampler computes the same numbers and a wrapper keeps them. The worker runs
`RecorderExtension`, which vLLM imports by name: this module imports vLLM only there (`vllm_sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from itertools import chain, groupby
from operator import attrgetter
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from cispo.engines.drafts import Draft
from cispo.engines.logprob_table import LogprobTable, Records
from cispo.engines.sampled_tokens import SampledTokens, StepTokens
from cispo.engines.vllm_routes import RouteExtension

# Steps between fetches of running requests where a rule may end one because of its log-probabilities.
_STEPS_BETWEEN_RULE_CHECKS = 64


class _Logprobs(Protocol):
    @property
    def logprobs(self) -> Tensor: ...


class _SamplerOutput(Protocol):
    """vLLM's dataclass, as far as it is read here."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def logprobs_tensors(self) -> _Logprobs | None: ...

    @property
    def num_sampled(self) -> Tensor: ...


class _InputBatch(Protocol):
    """vLLM's input batch of a step, as far as it is read here."""

    @property
    def req_ids(self) -> Sequence[str]: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def logits_indices(self) -> Tensor: ...


class _Sampler(Protocol):
    def __call__(self, logits: Tensor, batch: _InputBatch, /) -> _SamplerOutput: ...


# `vllm_sample.FusedSampler`: a step's output, positions of the samples and log-probabilities, None for other steps.
_FusedSampler = Callable[[Tensor, _InputBatch], tuple[_SamplerOutput, Tensor, Tensor] | None]


class _DraftSampler(Protocol):
    def counts(self) -> tuple[int, int]: ...


class _ModelRunner(Protocol):
    sampler: _Sampler
    rejection_sampler: object
    drafter: object
    """Of the first runner."""
    num_speculative_steps: int
    """Of the second runner."""


@dataclass(slots=True)
class _Step:
    requests: tuple[str, ...]
    positions: Tensor
    logprobs: Tensor
    sampled: Tensor


@dataclass(slots=True)
class _Sent:
    """Records on their way to the host, or there."""

    requests: list[str]
    tensors: tuple[Tensor, ...]
    """Positions, log-probabilities, sampled."""
    arrived: torch.cuda.Event | None

    def records(self) -> Records:
        if self.arrived is not None:
            self.arrived.synchronize()
        positions, logprobs, sampled = (tensor.numpy() for tensor in self.tensors)
        return Records(self.requests, positions.astype(np.int64, copy=False), logprobs, sampled > 0)


class RecordingSampler:
    """A sampler of vLLM's second model runner that keeps the log-probabilities it computes on the device."""

    def __init__(self, sampler: _Sampler, fused: _FusedSampler | None = None) -> None:
        """`fused` samples the steps that it knows, with the same numbers as `sampler`."""
        self.sampler, self._fused = sampler, fused
        self.steps: list[_Step] = []
        self._sent: _Sent | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.sampler, name)

    def __call__(self, logits: Tensor, batch: _InputBatch, /) -> _SamplerOutput:
        fused = None if self._fused is None else self._fused(logits, batch)
        if fused is not None:
            output, positions, logprobs = fused
        else:
            output = self.sampler(logits, batch)
            if output.logprobs_tensors is None:
                return output
            positions, logprobs = batch.positions[batch.logits_indices] + 1, output.logprobs_tensors.logprobs[:, 0]
            output = replace(output, logprobs_tensors=None)
        self.record(batch.req_ids, positions, logprobs, output.num_sampled)
        return output

    def record(self, requests: Sequence[str], positions: Tensor, logprobs: Tensor, sampled: Tensor) -> None:
        """Keeps a step's samples, each argument [rows]; `sampled` is 0 where a sample is dropped."""
        self.steps.append(_Step(tuple(requests), positions, logprobs, sampled))

    def send(self) -> None:
        """Queues a copy of the recorded steps to the host behind the steps on the device; does not wait for it."""
        assert self._sent is None, "records that were sent are taken before the next are sent"
        steps, self.steps = self.steps, []
        if not steps:
            return
        parts = ([s.positions for s in steps], [s.logprobs for s in steps], [s.sampled for s in steps])
        # Copies that do not block go to pinned memory.
        copies = tuple(torch.cat(part).to("cpu", non_blocking=True) for part in parts)
        arrived = None
        if steps[0].logprobs.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent = _Sent(list(chain.from_iterable(step.requests for step in steps)), copies, arrived)

    def take(self) -> Records:
        """The records of the last `send`; waits until they have arrived."""
        sent, self._sent = self._sent, None
        if sent is None:
            return Records([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))
        return sent.records()


class RecorderExtension(RouteExtension):
    """Methods that vLLM adds to its worker, those of `RouteExtension` too: vLLM takes one class."""

    model_runner: _ModelRunner
    _recorder: RecordingSampler
    _drafts: _DraftSampler

    def record_logprobs(self) -> bool:
        """Starts to record; False where this worker's sampler returns log-probabilities with the tokens."""
        if not self.use_v2_model_runner:
            return False
        from cispo.engines.vllm_sample import FusedSampler

        runner = self.model_runner
        fused = FusedSampler.of(runner)  # type: ignore[arg-type]
        self._recorder = RecordingSampler(runner.sampler, fused)  # type: ignore[arg-type]
        self.model_runner.sampler = self._recorder
        return True

    def sample_drafts(self) -> None:
        """Steps with drafts are sampled by `vllm_drafts`; call it after `record_logprobs`."""
        from cispo.engines.vllm_drafts import FirstRejectionSampler, SecondRejectionSampler, keep_lengths_apart

        runner = self.model_runner
        if not self.use_v2_model_runner:
            self._drafts = FirstRejectionSampler(runner.sampler)  # type: ignore[arg-type]
            keep_lengths_apart(runner.drafter)  # type: ignore[arg-type]
        else:
            sampler, record = self._recorder.sampler, self._recorder.record
            self._drafts = SecondRejectionSampler(sampler, runner.num_speculative_steps, record)  # type: ignore[arg-type]
        runner.rejection_sampler = self._drafts

    def draft_counts(self) -> tuple[int, int]:
        """Drafts proposed and accepted since the start."""
        return self._drafts.counts()

    def send_logprobs(self) -> None:
        self._recorder.send()

    def take_logprobs(self) -> Records:
        return self._recorder.take()


@dataclass(slots=True)
class _Submission:
    """Requests submitted together: their caller waits until all have ended."""

    running: int


@dataclass(slots=True)
class _Request:
    submission: _Submission
    has_rule: bool
    """Whether its log-probabilities may end it."""
    pending: list[int] = field(default_factory=list)
    """Sampled tokens that wait for their log-probabilities."""
    complete: int = 0
    """Tokens that have them."""
    reason: str | None = None
    """Why vLLM ended it; None while it runs."""


class PendingLogprobs:
    """Sampled tokens that wait for their log-probabilities, and the fetches that bring these.

        open -> add (tokens of a step) ... -> fetch_due (once a step) -> arrived (a step later) -> close

    A fetch is due when all requests of a submission have ended, since no caller waits for fewer; and from time to time
    for running requests that a rule may end. One fetch is under way at a time.
    """

    def __init__(self, send: Callable[[], object], take: Callable[[], Sequence[Records]], max_tokens: int) -> None:
        """`send` and `take` call the methods of `RecorderExtension` on every worker, all of which record the same.

        `max_tokens` is the most that a request may sample.
        """
        self._send, self._take = send, take
        self._requests: dict[str, _Request] = {}
        self._table = LogprobTable(max_tokens)
        self._fetching: dict[str, int] | None = None
        """Request -> number of its tokens in the fetch under way."""
        self._whole: list[StepTokens] = []
        """The last steps, not yet in `pending` of their requests."""
        self._due = False
        self._steps = 0
        """Since the last fetch of running requests."""
        self._ruled = 0
        """Requests that a rule may end."""

    def open(self, drafts: Mapping[str, Draft]) -> None:
        """Registers the requests of a submission by id."""
        submission = _Submission(len(drafts))
        for request, draft in drafts.items():
            self._requests[request] = _Request(submission, has_rule=draft.counter is not None)
            self._ruled += draft.counter is not None
            self._table.open(request, start=len(draft.prompt), limit=draft.limit)

    def add(self, request: str, tokens: Sequence[int], reason: str | None) -> None:
        """Adds tokens sampled in a step; `reason` says why vLLM ended the request with them, None while it runs."""
        self._split()
        entry = self._requests[request]
        entry.pending += tokens
        entry.reason = reason
        if reason is not None:
            self._end(entry)

    def add_step(self, step: StepTokens) -> None:
        """Adds the tokens of a step of many requests."""
        self._whole.append(step)
        for index, reason in step.reasons.items():
            self.add(step.requests[index], (), reason)

    def _split(self) -> None:
        """Gives each request its tokens of the last steps: of all steps of the same requests at once, not in each."""
        whole, self._whole = self._whole, []
        for requests, steps in groupby(whole, key=attrgetter("requests")):
            for request, tokens in zip(requests, zip(*(step.tokens for step in steps), strict=True), strict=True):
                self._requests[request].pending += tokens

    def fetch_due(self) -> bool:
        """Starts a fetch where one is due, once a step; True where every request has ended and no step will follow."""
        self._steps += 1
        check_rules = self._steps >= _STEPS_BETWEEN_RULE_CHECKS and self._ruled > 0
        if not self._due and not check_rules:
            return False
        self.fetch(running=check_rules)
        return all(request.reason is not None for request in self._requests.values())

    def fetch(self, *, running: bool) -> None:
        """Starts to copy the log-probabilities of ended requests to the host, with `running` those of all requests."""
        self._send()
        self._split()
        asked = {name: r for name, r in self._requests.items() if r.pending and (running or r.reason is not None)}
        self._fetching = {name: len(request.pending) for name, request in asked.items()}
        self._due = False
        if running:
            self._steps = 0

    def arrived(self) -> list[SampledTokens]:
        """The tokens of the fetch under way, requests closed meanwhile left out; waits until it has arrived."""
        if self._fetching is None:
            return []
        self._table.add(self._take()[0])
        fetched, self._fetching = self._fetching, None
        return [self._completed(request, count) for request, count in fetched.items() if request in self._requests]

    def close(self, requests: Sequence[str]) -> None:
        """Forgets requests that are complete or dropped."""
        self._split()
        for name in requests:
            request = self._requests.pop(name)
            self._ruled -= request.has_rule
            if request.reason is None:
                self._end(request)
            self._table.close(name)

    def _completed(self, name: str, count: int) -> SampledTokens:
        request = self._requests[name]
        tokens, request.pending = request.pending[:count], request.pending[count:]
        start, request.complete = request.complete, request.complete + count
        reason = None if request.pending else request.reason  # it comes with the last token
        return SampledTokens(name, tokens, self._table.get(name, start, request.complete), reason)

    def _end(self, request: _Request) -> None:
        request.submission.running -= 1
        self._due |= request.submission.running == 0
