"""The learner's policy as an engine, for small policies on a CPU: `torch_sampler` behind the engines' protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from cispo.policies.base import load_policy
from cispo.rollout.drafts import start_drafts
from cispo.rollout.engine import check_context
from cispo.rollout.torch_sampler import Sampler
from cispo.types import Completion, Sampling
from cispo.weight_sync import mapped_weights


class TorchEngine:
    """The policy that trains, with a cache. At most `max_sequences` are sampled at once; the others wait."""

    def __init__(self, model: str, *, dtype: str, max_context: int, max_sequences: int) -> None:
        check_context(model, max_context)
        self._policy = load_policy(model, dtype=getattr(torch, dtype)).eval()
        self._max_context, self._max_sequences = max_context, max_sequences
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        drafts = start_drafts(prompts, sampling, self._max_context, limits)
        sampler = Sampler(self._policy, sampling, seed)
        waiting = deque(range(len(prompts)))
        while waiting or len(sampler):
            admitted = [waiting.popleft() for _ in range(min(len(waiting), self._max_sequences - len(sampler)))]
            sampler.add(admitted, [prompts[i] for i in admitted], [drafts[i].limit for i in admitted])
            for done in sampler.step():
                draft = drafts[done.request]
                draft.tokens, draft.logprobs, draft.reason = done.tokens, done.logprobs, done.reason
        return [draft.completion(self._version) for draft in drafts]

    def update_weights(self, path: str, version: int) -> None:
        self._policy.load_hf(mapped_weights(path))
        self._version = version

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        del self._policy
