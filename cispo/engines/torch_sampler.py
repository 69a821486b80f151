"""Sampling with the learner's policy: a batch of sequences that grow by a token a step and leave as they end.

    add(prompts)  -> rows with the hidden state after their prompt          `policies.cache` reads a shared prompt once
    step          -> read each row's last token, draw the next, end rows -> [Sampled] of those seen to have ended
    abort         -> rows leave without a result
    recompute     -> prompts and tokens are read again, under the present weights

A step is a fixed number of operations on all rows; only ended sequences are visited one by one. On a GPU the host looks
for them every `_LOOKS["cuda"]` steps and reads nothing back in between: until then ended rows are computed in vain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cispo.policies.cache import Cache
from cispo.policies.families import short_step
from cispo.policies.policy import Policy
from cispo.policies.replay import routes_of
from cispo.types import FinishReason, RepetitionStop, Sampling

# Maximum number of tokens of different prompts in one forward pass; it bounds the memory of activations.
_TOKENS_PER_READ = 8192
_FIRST_ROOM = 64

# Steps between two looks at the rows that have ended. Each look waits for a GPU.
_LOOKS = {"cpu": 1, "cuda": 8}

_REASONS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)
"""In order of precedence."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens sampled for a request."""

    request: int
    tokens: list[int]
    logprobs: list[float]
    reason: FinishReason | None
    """None while it goes on."""
    routes: Tensor | None = None
    """[tokens read, layers, k]: experts of prompt and tokens once it has ended; None where they are not recorded."""


@dataclass(slots=True)
class _Rows:
    """State of the n sequences being sampled, a row each."""

    request: Tensor
    """[n] int64: the caller's number."""
    limit: Tensor
    """[n] int64: maximum number of tokens."""
    count: Tensor
    """[n] int64: tokens sampled so far."""
    ended: Tensor
    """[n] int64: 0 while the sequence goes on, else 1 + the index of its reason in `_REASONS`."""
    run: Tensor
    """[n] int64: length of the run of near-certain tokens that ends with the last token."""
    repeats: Tensor
    """[n, pattern_size] int64: length of the run, up to the last token, of tokens equal to the one 1, 2, ... before."""
    tokens: Tensor
    """[n, room] int64."""
    logprobs: Tensor
    """[n, room] float32."""
    hidden: Tensor
    """[n, d]: hidden state after the last token read."""
    routes: Tensor
    """[n, room, layers, k]: experts of the sampled tokens that were read; no layers where they are not recorded."""

    def __len__(self) -> int:
        return len(self.request)

    def take(self, order: Tensor) -> _Rows:
        return _Rows(*(getattr(self, name)[order] for name in self.__slots__))

    def join(self, new: _Rows) -> _Rows:
        pairs = ((getattr(self, name), getattr(new, name)) for name in self.__slots__)
        return _Rows(*(torch.cat([old, more]) for old, more in pairs))

    def make_room(self, most: int) -> None:
        """Doubles the room where a row of `most` tokens may have filled it."""
        if most == self.tokens.shape[1]:
            self.tokens = torch.cat([self.tokens, torch.zeros_like(self.tokens)], 1)
            self.logprobs = torch.cat([self.logprobs, torch.zeros_like(self.logprobs)], 1)
            self.routes = torch.cat([self.routes, torch.zeros_like(self.routes)], 1)


class _Read(NamedTuple):
    """The passes over new sequences."""

    hidden: Tensor
    """[sequences, d]: after the last token."""
    routes: list[Tensor]
    """[tokens, layers, k] a sequence; none where experts are not recorded."""


class Sampler:
    """One batch, drawn from torch's random stream.

    The policy's weights may change between steps; the cache keeps keys, values and states until `recompute`.
    """

    def __init__(self, policy: Policy, sampling: Sampling, *, record_routes: bool = False) -> None:
        """`record_routes` keeps the experts of every token; the policy has MoE layers then."""
        self._policy, self._sampling, self._short = policy, sampling, short_step(policy)
        self._record_routes = record_routes
        self._device = policy.lm_head_weight.device
        self._looks = _LOOKS[self._device.type]
        self._steps = 0
        self._prompts: dict[int, tuple[int, Tensor]] = {}
        """Request -> tokens of its prompt, and the experts of those read before the rows' own: of the prompt, and after
        `recompute` of sampled tokens too. Empty where experts are not recorded."""
        self._cache = Cache(self._device)
        self._rows: _Rows | None = None
        self._most = 0
        """The largest of the rows' counts, or a bound on it."""
        self._behind = False
        """Whether the tokens of the last step are unread; the next step reads them, under its own weights."""

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @torch.inference_mode()
    def add(self, requests: Sequence[int], prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        """Starts a sequence for each request, of at least one and at most `limits[i]` tokens; no prompt is empty."""
        if self._rows is not None:
            self._catch_up(self._rows)
        read = self._read(prompts)
        for request, prompt, routes in zip(requests, prompts, read.routes, strict=False):
            self._prompts[request] = len(prompt), routes
        new = self._fresh(requests, limits, read.hidden)
        self._rows = new if self._rows is None else self._rows.join(new)

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """Samples a token for every sequence; removes and returns those that are seen to have ended."""
        rows = self._rows
        if rows is None:
            return []
        self._catch_up(rows)
        head = self._policy.lm_head_weight
        tokens, logprobs = draw(rows.hidden.float() @ head.float().T, self._sampling)
        rows.make_room(self._most)
        index = self._index(rows), rows.count
        rows.tokens[index] = tokens
        rows.logprobs[index] = logprobs
        going = rows.ended == 0
        rows.count = rows.count + going
        self._most += 1
        self._behind = True
        rows.ended = torch.where(going, self._ends(rows, tokens, logprobs), rows.ended)
        self._steps += 1
        return [] if self._steps % self._looks else self.collect()

    @torch.inference_mode()
    def collect(self) -> list[Sampled]:
        """Removes and returns the sequences that have ended."""
        rows = self._rows
        if rows is None:
            return []
        gone = rows.ended > 0
        which = gone.nonzero()[:, 0]
        if not len(which):
            return []
        ended = [self._with_routes(rows, *pair) for pair in zip(which.tolist(), _sampled(rows, which), strict=True)]
        self._drop(gone)
        return ended

    @torch.inference_mode()
    def abort(self, requests: Sequence[int]) -> None:
        """Removes the sequences of these requests without a result; unknown ones are ignored."""
        if self._rows is not None:
            named = torch.tensor(requests, dtype=torch.long, device=self._device)
            self._drop(torch.isin(self._rows.request, named))
        for request in requests:
            self._prompts.pop(request, None)

    def unfinished(self) -> list[Sampled]:
        """Tokens so far of every sequence that `collect` has left."""
        return [] if self._rows is None else _sampled(self._rows, self._index(self._rows))

    @torch.inference_mode()
    def recompute(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Reads all sequences again, given the prompt of each request, so that only the present weights remain."""
        if self._rows is None:
            return
        running = self.unfinished()
        self._cache = Cache(self._device)
        read = self._read([[*prompts[sampled.request], *sampled.tokens] for sampled in running])
        self._rows.hidden = read.hidden
        for sampled, routes in zip(running, read.routes, strict=False):
            self._prompts[sampled.request] = len(prompts[sampled.request]), routes
        self._behind = False

    def _read(self, prompts: Sequence[Sequence[int]]) -> _Read:
        """A new row of the cache for each prompt."""
        hidden, routes = [], []
        for part in _parts(prompts):
            unique = list(dict.fromkeys(map(tuple, prompts[part])))
            index = {prompt: number for number, prompt in enumerate(unique)}
            inverse = [index[tuple(prompt)] for prompt in prompts[part]]
            hidden.append(self._cache.read(self._policy, unique, inverse))
            if self._record_routes:
                by_prompt = routes_of(self._cache.router).split([len(prompt) for prompt in unique])
                routes += [by_prompt[number] for number in inverse]
        return _Read(torch.cat(hidden), routes)

    def _catch_up(self, rows: _Rows) -> None:
        if self._behind:
            index = self._index(rows), rows.count - 1
            rows.hidden = self._cache.step(self._policy, rows.tokens[index], self._short)
            if self._record_routes:
                rows.routes[index] = routes_of(self._cache.router)
            self._behind = False

    def _index(self, rows: _Rows) -> Tensor:
        return torch.arange(len(rows), device=self._device)

    def _with_routes(self, rows: _Rows, row: int, sampled: Sampled) -> Sampled:
        """The ended sequence of a row, with its experts where they are recorded."""
        if not self._record_routes:
            return sampled
        prompt, earlier = self._prompts.pop(sampled.request)
        # The last token is not read.
        later = rows.routes[row, len(earlier) - prompt : len(sampled.tokens) - 1]
        return replace(sampled, routes=torch.cat([earlier, later]))

    def _fresh(self, requests: Sequence[int], limits: Sequence[int], hidden: Tensor) -> _Rows:
        n = len(requests)
        room = _FIRST_ROOM if self._rows is None else self._rows.tokens.shape[1]
        one = routes_of(self._cache.router)[0] if self._record_routes else torch.zeros(0, 0, dtype=torch.uint8)
        with self._device:
            return _Rows(
                request=torch.tensor(requests),
                limit=torch.tensor(limits),
                count=torch.zeros(n, dtype=torch.long),
                ended=torch.zeros(n, dtype=torch.long),
                run=torch.zeros(n, dtype=torch.long),
                repeats=torch.zeros(n, self._sampling.repetition.pattern_size, dtype=torch.long),
                tokens=torch.zeros(n, room, dtype=torch.long),
                logprobs=torch.zeros(n, room),
                hidden=hidden,
                routes=torch.zeros(n, room, *one.shape, dtype=one.dtype),
            )

    def _drop(self, gone: Tensor) -> None:
        """Removes the rows where `gone` [n] is True."""
        assert self._rows is not None
        order = self._cache.drop(gone)
        self._rows = self._rows.take(order) if len(order) else None
        self._most = int(self._rows.count.max()) if self._rows is not None else 0
        self._behind = self._behind and self._rows is not None

    def _ends(self, rows: _Rows, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """[n] int64: the rows ended by the tokens [n] just sampled, as in `_Rows.ended`."""
        rule = self._sampling.repetition
        ends = {FinishReason.STOP: torch.zeros_like(tokens, dtype=torch.bool)}
        for token in self._sampling.eos_ids:
            ends[FinishReason.STOP] |= tokens == token
        ends[FinishReason.LENGTH] = rows.count >= rows.limit
        if rule.pattern_size:
            ends[FinishReason.REPETITION] = _count_repeats(rows, tokens, rule)
        if rule.run_length:
            rows.run = (rows.run + 1).masked_fill_(logprobs.double() <= math.log(rule.probability), 0)
            ran = rows.run >= rule.run_length
            ends[FinishReason.REPETITION] = ends.get(FinishReason.REPETITION, ran) | ran
        ended = torch.zeros_like(tokens)
        for reason, where in reversed(ends.items()):  # so that an earlier one prevails
            ended.masked_fill_(where, 1 + _REASONS.index(reason))
        return ended


def _count_repeats(rows: _Rows, tokens: Tensor, rule: RepetitionStop) -> Tensor:
    """[n] bool: whether a row ends in `pattern_count` copies of a pattern of at most `pattern_size` tokens."""
    sizes = torch.arange(1, rule.pattern_size + 1, device=tokens.device)
    before = rows.count[:, None] - 1 - sizes
    same = (rows.tokens.gather(1, before.clamp(min=0)) == tokens[:, None]) & (before >= 0)
    rows.repeats = torch.where(same, rows.repeats + 1, 0)
    return (rows.repeats >= sizes * (rule.pattern_count - 1)).any(1)


def _sampled(rows: _Rows, which: Tensor) -> list[Sampled]:
    """The sequences of the rows `which` [m] int64."""
    # A single read for all of them: each one waits for a GPU.
    numbers = torch.stack([rows.request, rows.count, rows.ended], 1)[which].tolist()
    longest = max((count for _, count, _ in numbers), default=0)
    tokens, logprobs = (values[which, :longest].tolist() for values in (rows.tokens, rows.logprobs))
    return [
        Sampled(request, tokens[row][:count], logprobs[row][:count], _REASONS[ended - 1] if ended else None)
        for row, (request, count, ended) in enumerate(numbers)
    ]


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Slices of neighbouring prompts; the unique ones of a slice fit into one pass. A longer prompt has its own."""
    start, read, known = 0, 0, set[tuple[int, ...]]()
    for number, prompt in enumerate(map(tuple, prompts)):
        if prompt in known:
            continue
        if read and read + len(prompt) > _TOKENS_PER_READ:
            yield slice(start, number)
            start, read, known = number, 0, set()
        known.add(prompt)
        read += len(prompt)
    if start < len(prompts):
        yield slice(start, len(prompts))


def draw(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws one token for each row of logits [n, V] float32: tokens [n] int64, their log-probabilities [n] float32.

    Random numbers come from torch's stream. A log-probability is that of the distribution the token was drawn from; at
    temperature 0, the policy's.
    """
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1, keepdim=True)
    else:
        logprobs = _truncate(logits / sampling.temperature, sampling).log_softmax(-1)
        # By the inverse of the distribution function: one random number a row, where torch.multinomial takes V.
        ends = logprobs.exp().cumsum(-1, dtype=torch.float64)
        below_one = 1 - 2.0**-50  # so that the product stays below the total, and no token without probability is hit
        # From the host's stream for a GPU too, by way of pinned memory: neither waits for the other.
        points = torch.rand(len(logits), 1, dtype=torch.float64, pin_memory=logits.is_cuda)
        points = points.to(logits.device, non_blocking=True) * below_one * ends[:, -1:]
        # Rows of NaN get some token; its log-probability, NaN too, reveals that the policy has diverged.
        tokens = torch.searchsorted(ends, points, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Masks the tokens that min_p, top_k and top_p leave out, in vLLM's order."""
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < smallest, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(-1)
        beyond = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -math.inf)
    return logits
