"""A draft grows into a completion; the limits and stopping rules that all engines share.

    prompts --start_drafts--> Draft --extend, token by token--> reason set --completion()--> Completion

A completion ends at the first of: an end-of-sequence token, the length limit, a repeated pattern, a run of near-certain
tokens. Where two fall on one token the earlier of this list is the reason; that token is always the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, repeat

from cispo.errors import Diverged, UserError
from cispo.types import Completion, FinishReason, RepetitionStop, RoutedExperts, Sampling


@dataclass(slots=True)
class RunCounter:
    """MiniMax-M1's repetition stop (arXiv 2506.13585, section 5): a run of tokens that were all near certain."""

    rule: RepetitionStop
    run: int = 0

    def fires(self, logprob: float) -> bool:
        """Takes the next log-probability; True from the `run_length`-th in a row strictly above `probability`."""
        self.run = self.run + 1 if logprob > math.log(self.rule.probability) else 0
        return 0 < self.rule.run_length <= self.run


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A completion in the making: the request, and the tokens sampled for it. Two drafts are never equal."""

    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    """Seed of its own, for an engine with a random stream per request."""
    limit: int
    """Maximum number of tokens."""
    cache: str = ""
    """Drafts of another name share no block of a prefix cache."""
    cached: int = 0
    """Tokens of the prompt that were found in it."""
    accepted: int = 0
    """Tokens that were drafts of speculative decoding, also of those that `extend` drops behind a rule's end."""
    counter: RunCounter | None = None
    """None where the limit rules out a run of the rule's length."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    """{index of a token: version that samples it and those after it}, in order."""
    reason: FinishReason | None = None
    routed_experts: RoutedExperts | None = None
    """Set when the draft is complete, by an engine that records them."""

    def sampled_by(self, version: int) -> None:
        """Records the version of the policy that samples the next token and those after it."""
        self.starts[len(self.tokens)] = version

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float], reason: str | None) -> None:
        """Adds sampled tokens; `reason` says why the last one ended the completion, None while it goes on."""
        assert len(tokens) == len(logprobs), f"{len(logprobs)} logprobs for {len(tokens)} tokens"
        kept = len(tokens)
        if self.counter is not None:
            kept = next((i for i, x in enumerate(logprobs, 1) if self.counter.fires(x)), kept + 1)
            if kept < len(tokens) or (kept == len(tokens) and reason is None):
                reason = FinishReason.REPETITION
        self.tokens.extend(tokens[:kept])
        self.logprobs.extend(logprobs[:kept])
        self.reason = None if reason is None else FinishReason(reason)

    def start_again(self) -> int:
        """Forgets all tokens; returns their number."""
        lost = len(self.tokens)
        self.tokens, self.logprobs, self.starts, self.accepted = [], [], {}, 0
        if self.counter is not None:
            self.counter.run = 0
        return lost

    def completion(self) -> Completion:
        """The finished completion. Raises Diverged where a log-probability is not finite."""
        assert self.reason is not None, "the engine stopped before this completion did"
        if not math.isfinite(sum(self.logprobs)):  # of float32 values: a sum of finite ones is finite
            raise Diverged("a sampled token has a log-probability that is not finite: the policy has diverged")
        spans = zip(pairwise([*self.starts, len(self.tokens)]), self.starts.values(), strict=True)
        versions = chain.from_iterable(repeat(version, end - start) for (start, end), version in spans)
        return Completion(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.reason,
            versions=tuple(versions),
            cached=self.cached,
            accepted=self.accepted,
            routed_experts=self._routed_experts(),
        )

    def _routed_experts(self) -> RoutedExperts | None:
        if self.routed_experts is None:
            return None
        # A rule may have ended the completion before the last token that the engine read.
        read = len(self.prompt) + len(self.tokens) - 1
        routed = self.routed_experts.until(read)
        assert routed.first + routed.shape[0] == read, "a token that was read has no experts"
        return routed


def start_drafts(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    *,
    max_context: int,
    limits: Sequence[int] | None = None,
    cache: str = "",
) -> list[Draft]:
    """An empty draft per prompt. Raises UserError on a prompt that leaves no room, or a rule that cannot be applied."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty")
        if len(prompt) >= max_context:
            raise UserError(f"prompt {index} has {len(prompt)} tokens: no room to answer in max_context {max_context}")
    asked = limits or [sampling.max_tokens] * len(prompts)
    limits = [min(most, max_context - len(prompt)) for most, prompt in zip(asked, prompts, strict=True)]
    rule = sampling.repetition
    if 0 < rule.run_length <= max(limits, default=0) and not _draws_from_the_policy(sampling):
        raise UserError(
            "repetition.run_length counts the policy's own probabilities, which sampling with a temperature other than "
            "1, top_p, top_k or min_p does not give: set repetition.run_length to 0 or sample at temperature 1"
        )
    return [
        Draft(
            prompt=prompt,
            sampling=sampling,
            seed=(seed + index * 0x9E3779B97F4A7C15) % 2**63,
            limit=limit,
            cache=cache,
            counter=RunCounter(rule) if 0 < rule.run_length <= limit else None,
        )
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def _draws_from_the_policy(sampling: Sampling) -> bool:
    """Whether the reported log-probabilities are the policy's own: plain sampling, or greedy."""
    plain = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
    return plain or sampling.temperature == 0
