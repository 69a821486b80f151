"""Tokens that a step of vLLM has sampled, by request and of the whole step.

StepTokens -> split -> SampledTokens -> Draft.extend
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple


class SampledTokens(NamedTuple):
    """The next tokens of a request."""

    request: str
    tokens: list[int]
    logprobs: list[float]
    reason: str | None
    """Why vLLM ended the request with the last of them; None while more are to come."""


class StepTokens(NamedTuple):
    """The next token of each of many requests, which one step has sampled."""

    requests: list[str]
    tokens: list[int]
    """[requests]"""
    logprobs: list[float] | None
    """[requests]; None where they stay on the device."""
    reasons: Mapping[int, str]
    """{index of a request: why vLLM ended it with this token}"""

    def only(self, requests: Container[str]) -> StepTokens:
        """The part of the given requests."""
        if all(map(requests.__contains__, self.requests)):
            return self
        kept = [index for index, request in enumerate(self.requests) if request in requests]
        return StepTokens(
            [self.requests[index] for index in kept],
            [self.tokens[index] for index in kept],
            None if self.logprobs is None else [self.logprobs[index] for index in kept],
            {place: self.reasons[index] for place, index in enumerate(kept) if index in self.reasons},
        )

    def split(self) -> Iterator[SampledTokens]:
        """By request, of a step that has its log-probabilities."""
        assert self.logprobs is not None
        for index, (request, token, logprob) in enumerate(zip(self.requests, self.tokens, self.logprobs, strict=True)):
            yield SampledTokens(request, [token], [logprob], self.reasons.get(index))
