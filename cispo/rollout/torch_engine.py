"""The engine for tests: the learner's policy, recomputed from the first token at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cispo.policies.base import load_policy
from cispo.rollout.drafts import Draft, repeats_pattern
from cispo.rollout.engine import check_model
from cispo.types import FinishReason, Sampling
from cispo.weight_sync import FileMessage, WeightMessage, mapped_weights


class TorchEngine:
    """The learner's policy, recomputed from the first token at every step: small, slow, for tests.

    All drafts run at once. It keeps nothing from step to step, so an update that keeps is one that recomputes.
    """

    def __init__(self, model: str, *, dtype: str, max_context: int) -> None:
        check_model(model, max_context)
        self._policy = load_policy(model, dtype=getattr(torch, dtype)).eval()
        self.max_context = max_context
        self.sampled = 0
        self._drafts: list[Draft] = []

    def submit(self, drafts: Sequence[Draft]) -> None:
        self._drafts += drafts

    @torch.no_grad()
    def step(self) -> list[Draft]:
        logits = self._logits([[*draft.prompt, *draft.tokens] for draft in self._drafts])
        for sampling in dict.fromkeys(draft.sampling for draft in self._drafts):
            rows = [row for row, draft in enumerate(self._drafts) if draft.sampling == sampling]
            for row, token, logprob in zip(rows, *_sample(logits[rows], sampling), strict=True):
                draft = self._drafts[row]
                draft.extend([token], [logprob], _finish_reason([*draft.tokens, token], draft.limit, sampling))
        self.sampled += len(self._drafts)
        complete = [draft for draft in self._drafts if draft.reason is not None]
        self.drop(complete)
        return complete

    def settle(self) -> list[Draft]:
        return []

    def drop(self, drafts: Sequence[Draft]) -> None:
        dropped = set(drafts)
        self._drafts = [draft for draft in self._drafts if draft not in dropped]

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Of the token after each sequence, [S, V] float32."""
        lengths = torch.tensor([len(s) for s in sequences])
        ends = lengths.cumsum(0)
        tokens = torch.tensor([t for s in sequences for t in s])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        hidden = self._policy(tokens, positions, torch.cat([ends.new_zeros(1), ends]).int()).hidden
        return hidden[ends - 1].float() @ self._policy.lm_head_weight.float().T

    def receive_weights(self, message: WeightMessage) -> None:
        assert isinstance(message, FileMessage), "only vLLM's engine takes buckets"
        self._policy.load_hf(mapped_weights(message.path))

    def finish_update(self, *, recompute: bool) -> None:
        pass

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        raise AssertionError("only vLLM's engine takes buckets")

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        del self._policy


def _finish_reason(tokens: Sequence[int], limit: int, sampling: Sampling) -> FinishReason | None:
    """Why the last token ends the completion, in vLLM's order of precedence."""
    if tokens[-1] in sampling.eos_ids:
        return FinishReason.STOP
    if len(tokens) >= limit:
        return FinishReason.LENGTH
    if repeats_pattern(tokens, sampling.repetition):
        return FinishReason.REPETITION
    return None


def _sample(logits: Tensor, sampling: Sampling) -> tuple[list[int], list[float]]:
    """One token a row of logits [S, V] and its log-probability in the distribution it was drawn from (greedy: raw)."""
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1, keepdim=True)
    else:
        logprobs = _truncate(logits / sampling.temperature, sampling).log_softmax(-1)
        tokens = logprobs.exp().multinomial(1)
    return tokens.flatten().tolist(), logprobs.gather(-1, tokens).flatten().tolist()


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Masks what min_p, top_k and top_p leave out, in vLLM's order."""
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < smallest, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(-1)
        beyond = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, places, beyond), -math.inf)
    return logits
