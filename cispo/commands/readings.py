"""Readings of fixed tokens by fixed weights, each with one thing changed, for `cispo doctor`.

    folder with the learner's weights --load_policy--> policy --read_alone, read_stepwise--> log-probabilities [N]

The plain reading is one sequence at a time, in float64: nothing that batches, packs or rounds. Sequences with recorded
experts are read with those, so that a small difference turns no router's choice over. N are the sampled tokens of all
sequences, in order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.batch.packing import pack, unpack
from cispo.files import read_json
from cispo.learner.loss import read
from cispo.policies.attention import Attention
from cispo.policies.cache import Cache
from cispo.policies.policy import Policy, PolicyOutput
from cispo.types import MicroBatch, RankBatches, Sample

_WEIGHTS = "model.safetensors"


def by_sample(batches: RankBatches, values: Sequence[Sequence[Tensor]], samples: Sequence[Sample]) -> Tensor:
    """[N] of values [T] of micro-batches, in the order of the samples and not of the micro-batches."""
    rows = unpack(batches, values, len(samples))
    rows = [row[1:][sample.loss_mask[1:]] for row, sample in zip(rows, samples, strict=True)]
    return torch.cat(rows).double()


def alone(samples: Sequence[Sample]) -> list[MicroBatch]:
    """A micro-batch for each sequence."""
    return pack(samples, reduction="token", max_tokens=1, tokens_per_micro_batch=1)[0]


@torch.no_grad()
def read_alone(
    policy: Policy, samples: Sequence[Sample], *, temperature: float, head: torch.dtype | None = None
) -> Tensor:
    """[N]: each sequence by itself, in chunks; `head` is a lower dtype of the product with the head."""
    batches = alone(samples)
    values = []
    for mb in batches:
        logits = _logits(read(policy, mb).hidden, policy, head) / temperature
        values.append(logits.log_softmax(-1).gather(-1, mb.targets[:, None])[:, 0])
    return by_sample([batches], [values], samples)


@torch.no_grad()
def read_stepwise(
    policy: Policy, samples: Sequence[Sample], *, temperature: float, state: torch.dtype | None = None
) -> Tensor:
    """[N]: prompts in chunks, then token by token by the recurrence, with a cache and all sequences in one batch.

    With `state`, recurrent states are rounded to that dtype after the prompt and after each token.
    """
    cache, replaying = Cache(), Replaying(policy)
    prompts = [sample.token_ids[: int(sample.loss_mask.int().argmax())].tolist() for sample in samples]
    replaying.routes = _rows_of(samples, [range(len(prompt)) for prompt in prompts])
    hidden = cache.read(replaying, prompts, range(len(prompts)))  # type: ignore[arg-type]
    found: list[list[Tensor]] = [[] for _ in samples]
    places = torch.tensor([len(prompt) for prompt in prompts])
    last = max(len(sample.token_ids) for sample in samples)
    padded = torch.stack([F.pad(sample.token_ids, (0, last - len(sample.token_ids))) for sample in samples])
    masks = torch.stack([F.pad(sample.loss_mask, (0, last - len(sample.token_ids))) for sample in samples])
    while True:
        _round_states(cache, state)
        live = (places < last).nonzero()[:, 0]
        if not len(live):
            return torch.cat([torch.stack(own) for own in found]).double()
        targets = padded[torch.arange(len(samples)), places.clamp(max=last - 1)]
        logprobs = (_logits(hidden, policy, None) / temperature).log_softmax(-1)
        taken = logprobs.gather(-1, targets[:, None])[:, 0]
        for row in live.tolist():
            if masks[row, places[row]]:
                found[row].append(taken[row])
        replaying.routes = _rows_of(samples, [[place] for place in places.tolist()])
        places = places + 1
        if int(places.min()) < last:
            hidden = cache.step(policy, targets, replaying.attend)


class Replaying:
    """A policy for a cache, which takes the experts of `routes` [T, layers, k] in its next pass; None: its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.routes: Tensor | None = None

    def attend(self, tokens: Tensor, positions: Tensor, attention: Attention) -> PolicyOutput:
        return self.policy.attend(tokens, positions, attention, self.routes)


def _rows_of(samples: Sequence[Sample], places: Sequence[Sequence[int]]) -> Tensor | None:
    """The recorded experts of some places of each sample, -1 beyond those that were read; None where none are."""
    if any(sample.routes is None for sample in samples):
        return None
    rows = []
    for sample, own in zip(samples, places, strict=True):
        assert sample.routes is not None
        unknown = torch.full_like(sample.routes[0], -1)
        rows += [sample.routes[place] if place < len(sample.routes) else unknown for place in own]
    return torch.stack(rows)


def _round_states(cache: Cache, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for layer in cache.states:
            layer.copy_(layer.to(dtype))


def _logits(hidden: Tensor, policy: Policy, dtype: torch.dtype | None) -> Tensor:
    """At least float32; the product is in `dtype` where one is given."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    number = wide if dtype is None else dtype
    return (hidden.to(number) @ policy.lm_head_weight.to(number).T).to(wide)


@contextmanager
def policy_copy(weights: Path, model: Path, changes: Mapping[str, object] | None = None) -> Iterator[Path]:
    """A temporary model folder of published weights and the config.json of `model`, with `changes` made in it.

    A changed key is set wherever the config has it, in sections too.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = changed_config(read_json(model / "config.json"), changes or {})
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        os.symlink(weights.absolute(), folder / _WEIGHTS)
        yield folder


def changed_config(config: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """The config with `changes` in place of the values of the same keys, at any depth."""
    return {
        key: changed_config(value, changes) if isinstance(value, Mapping) else changes.get(key, value)
        for key, value in config.items()
    }


def rope_theta(config: Mapping[str, object]) -> float | None:
    """The base of the rotary positions in a config.json; None where it names none."""
    for key, value in config.items():
        if key == "rope_theta" and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Mapping) and (found := rope_theta(value)) is not None:
            return found
    return None


def golden_section(
    function: Callable[[float], float], low: float, high: float, start: tuple[float, float], rounds: int = 12
) -> tuple[float, float]:
    """(x, value) of the least value that a search by golden sections in [low, high] meets; `start` is one known."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [function(x) for x in inner]
    met = [start, *zip(inner, values, strict=True)]
    for _ in range(rounds):
        if values[0] < values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            new, inner[0] = 0, high - ratio * (high - low)
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            new, inner[1] = 1, low + ratio * (high - low)
        values[new] = function(inner[new])
        met.append((inner[new], values[new]))
    return min(met, key=lambda pair: pair[1])
