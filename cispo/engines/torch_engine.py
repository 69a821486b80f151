"""The learner's policy as an engine, for small policies: `torch_sampler` behind the engines' protocol.

    submit -> waiting      step -> waiting drafts start running -> one token of every running draft

Tokens stay in the samplers' tensors until a draft is complete or `settle` asks for them. Weights come in files, or in
buckets on the GPU of a learner in the same process (transport `direct`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from cispo.engines.drafts import Draft
from cispo.engines.engine import check_model
from cispo.engines.torch_sampler import Sampled, Sampler
from cispo.policies.loading import load_policy
from cispo.types import RoutedExperts, Sampling
from cispo.weights.buckets import WeightReceiver, tensor_checksum
from cispo.weights.publish import FileMessage, WeightMessage, mapped_weights


class TorchEngine:
    """The policy that trains, with a cache.

    `model` is a folder in checkpoint format. `max_context` bounds prompt and completion together, `max_sequences` the
    sequences at a time. Tokens are drawn from torch's random stream of the host. With `record_routes` completions carry
    the experts of their tokens.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_context: int,
        max_sequences: int,
        record_routes: bool = False,
        device: str = "cpu",
    ) -> None:
        check_model(model, max_context)
        self._policy = load_policy(model, dtype=getattr(torch, dtype)).to(device).eval()
        assert not record_routes or self._policy.router_shape[0], "the policy has no experts to record"
        self._record_routes = record_routes
        self.max_context, self.max_sequences = max_context, max_sequences
        self.sampled = 0
        """On a GPU with the tokens of ended rows that are not yet seen to have ended."""
        self._receiver = WeightReceiver(torch.device(device))
        self._arrived: set[str] | None = None
        """Weights that came in buckets of the update under way; None where none has."""
        self._numbers = itertools.count()
        self._waiting: list[Draft] = []
        """Drafts that start in the next step."""
        self._running: dict[int, Draft] = {}
        self._samplers: dict[Sampling, Sampler] = {}
        """Samplers with running drafts, in the order in which they draw; if there are none, the last that had some."""

    def submit(self, drafts: Sequence[Draft]) -> None:
        self._waiting.extend(drafts)

    def step(self) -> list[Draft]:
        self._admit()
        complete = []
        for sampler in self._samplers.values():
            self.sampled += len(sampler)
            complete += self._completed(sampler.step())
        self._forget_idle()
        return complete

    def settle(self) -> list[Draft]:
        complete = []
        for sampler in self._samplers.values():
            complete += self._completed(sampler.collect())
            for sampled in sampler.unfinished():
                _extend(self._running[sampled.request], sampled)
        self._forget_idle()
        return complete

    def drop(self, drafts: Sequence[Draft]) -> None:
        dropped = set(drafts)
        self._waiting = [draft for draft in self._waiting if draft not in dropped]
        numbers = [number for number, draft in self._running.items() if draft in dropped]
        for sampler in self._samplers.values():
            sampler.abort(numbers)
        for number in numbers:
            del self._running[number]
        self._forget_idle()

    def receive_weights(self, message: WeightMessage) -> None:
        if isinstance(message, FileMessage):
            return self._policy.load_hf(mapped_weights(message.path))
        assert message.buffer is not None, "only vLLM's engine takes buckets of another process"
        own = self._policy.to_hf()
        self._arrived = self._arrived or set()
        with torch.no_grad():
            for name, weight in self._receiver.receive(message):
                own[name].copy_(weight)
                self._arrived.add(name)

    def finish_update(self, *, recompute: bool) -> None:
        arrived, self._arrived = self._arrived, None
        missing = set() if arrived is None else self._policy.to_hf().keys() - arrived
        assert not missing, f"the weights lack {min(missing)} and {len(missing) - 1} more parameters"
        if recompute:
            prompts = {number: draft.prompt for number, draft in self._running.items()}
            for sampler in self._samplers.values():
                sampler.recompute(prompts)

    def weight_checksums(self) -> dict[str, int]:
        """Checksum of each weight, under its name in checkpoints."""
        return {name: tensor_checksum(weight) for name, weight in self._policy.to_hf().items()}

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        raise AssertionError("only vLLM's engine takes buckets of another process")

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._samplers.clear()
        del self._policy

    def _completed(self, ended: Iterable[Sampled]) -> list[Draft]:
        complete = []
        for sampled in ended:
            draft = self._running.pop(sampled.request)
            _extend(draft, sampled)
            complete.append(draft)
        return complete

    def _admit(self) -> None:
        admitted = {next(self._numbers): draft for draft in self._waiting}
        self._waiting = []
        self._running |= admitted
        for sampling in dict.fromkeys(draft.sampling for draft in admitted.values()):
            drafts = {number: draft for number, draft in admitted.items() if draft.sampling == sampling}
            sampler = self._samplers.get(sampling)
            if sampler is None:
                sampler = Sampler(self._policy, sampling, record_routes=self._record_routes)
            if not len(sampler):  # it draws after the busy ones
                self._samplers.pop(sampling, None)
                self._samplers[sampling] = sampler
            sampler.add(list(drafts), [d.prompt for d in drafts.values()], [d.limit for d in drafts.values()])

    def _forget_idle(self) -> None:
        busy = {sampling: sampler for sampling, sampler in self._samplers.items() if len(sampler)}
        self._samplers = busy or dict(itertools.islice(self._samplers.items(), 1))


def _extend(draft: Draft, sampled: Sampled) -> None:
    """Adds the tokens that the draft does not have yet."""
    known = len(draft.tokens)
    draft.extend(sampled.tokens[known:], sampled.logprobs[known:], sampled.reason)
    if sampled.routes is not None:
        tokens, layers, k = sampled.routes.shape
        draft.routed_experts = RoutedExperts(data=sampled.routes.cpu().numpy().tobytes(), shape=(tokens, layers, k))
