"""Memory of a run's fullest GPU against the card that is there, and the keys that make it fit.

    recipe --placement--> processes of its fullest GPU: learner rank, critic rank, engines --> Need, in bytes
    Need, card --keys in the order of their price--> one sentence

A learner rank is planned from shapes (`learner.memory`), an engine from its weights and the cache of its sequences; the
share of CUDA, NCCL and vLLM themselves is assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from cispo.algorithms import Algorithm
from cispo.engines.choice import settled
from cispo.learner.memory import RankMemory, gib, rank_memory, reliefs
from cispo.learner.parallel import shards
from cispo.policies.costs import cache_sizes
from cispo.policies.hybrid.shares import parameters_of_rank
from cispo.policies.lora import adapter_size
from cispo.policies.policy import Policy
from cispo.recipe.schema import Recipe
from cispo.runtime.placement import gpus_of
from cispo.start import sequences_of

GIB = 2**30

CONTEXT = GIB // 2
"""Assumed bytes of a process's CUDA context and libraries."""

ENGINE = 3 * GIB // 2
"""Assumed bytes of an engine beside weights and cache: context, CUDA graphs, activations of vLLM."""


class Card(NamedTuple):
    name: str
    bytes: int
    """What a process can use of it."""


CARDS = (
    Card("a 24 GB card (RTX 4090)", int(23.5 * GIB)),
    Card("a 48 GB card (L40S)", int(44.4 * GIB)),
    Card("an 80 GB card (H100)", int(79.1 * GIB)),
    Card("a 141 GB card (H200)", int(139.8 * GIB)),
)
"""Cards to plan for where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of the fullest GPU of a run."""

    learner: RankMemory | None
    """Of the learner's rank there, if there is one."""
    critic: RankMemory | None
    engine_weights: int
    """Of all engines there."""
    cache: int
    rest: int
    """Contexts and the like."""
    sleeps: bool = False

    @property
    def total(self) -> int:
        ranks = [rank for rank in (self.learner, self.critic) if rank is not None]
        resting = sum(rank.resting for rank in ranks)
        # Learner and critic work one after the other.
        working = max((rank.peak - rank.resting for rank in ranks), default=0)
        engines = self.engine_weights + self.cache
        # Engines that sleep give their memory back while the others work.
        return resting + self.rest + (max(working, engines) if self.sleeps else working + engines)

    def parts(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each part."""
        for prefix, rank in {"": self.learner, "critic's ": self.critic}.items():
            if rank is not None:
                yield f"{prefix}weights", rank.weights
                yield f"{prefix}masters", rank.masters
                yield f"{prefix}moments", rank.moments
                yield f"{prefix}gradients", rank.gradients + rank.rounded
                yield f"{prefix}gathered weights", rank.gathered
                yield f"{prefix}activations", rank.activations
                yield "reference", rank.reference
        yield "engine weights", self.engine_weights
        yield "cache", self.cache
        yield "CUDA and vLLM", self.rest


def card_here() -> Card | None:
    """The first GPU of this machine."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Card(f"the {found.name} here", found.total_memory)


@dataclass(frozen=True)
class Planner:
    """Plans of a recipe and of its variants on GPUs."""

    policy: Policy
    """Shapes alone."""
    algorithm: Algorithm
    gpus: int = 0
    """GPUs that there are; where there is none, an automatic placement is taken to share."""

    @cached_property
    def _cached(self) -> tuple[int, int]:
        return cache_sizes(self.policy)

    def need(self, recipe: Recipe, card: Card) -> Need:
        """The plan of a recipe on GPUs like `card`."""
        recipe = settled(recipe, "cuda")
        learner, rollout, lora = recipe.learner, recipe.rollout, recipe.policy.lora
        dtype = recipe.policy.number_format
        width = getattr(torch, dtype).itemsize
        options = {
            "dtype": dtype,
            "sharded": shards(learner.shard, ranks=learner.ranks, device="cuda", expert_ranks=learner.expert_ranks),
            "adapter": 0 if lora is None else adapter_size(self.policy, lora),
        }
        own = rank_memory(self.policy, learner, reference=self.reference(recipe), **options)
        critic = rank_memory(self.policy, learner, **options) if self.algorithm.critic else None
        shared = self.shares(recipe)
        engines = -(-rollout.engines // learner.ranks) if shared else 1
        weights = engines * parameters_of_rank(self.policy, rollout.tensor_parallel) * width
        token, state = self._cached
        sequence = rollout.max_context * token * width + 4 * state
        wanted = engines * (sequences_of(recipe) + 1) * sequence // rollout.tensor_parallel
        cache = min(wanted, int(card.bytes * rollout.gpu_memory))
        if shared:
            rest = CONTEXT * (1 if critic is None else 2) + ENGINE * engines
            sleeps = rollout.placement == "sleep"
            return Need(learner=own, critic=critic, engine_weights=weights, cache=cache, rest=rest, sleeps=sleeps)
        alone = (
            Need(learner=own, critic=None, engine_weights=0, cache=0, rest=CONTEXT),
            Need(learner=None, critic=critic, engine_weights=0, cache=0, rest=CONTEXT),
            Need(learner=None, critic=None, engine_weights=weights, cache=cache, rest=ENGINE),
        )
        return max(alone, key=lambda need: need.total)

    def reference(self, recipe: Recipe) -> bool:
        """Whether a learner keeps a second policy: an adapter's reference is its policy."""
        return self.algorithm.needs_reference and recipe.policy.lora is None

    def shares(self, recipe: Recipe) -> bool:
        """Whether learners and engines share GPUs."""
        if recipe.rollout.placement != "auto":
            return recipe.rollout.placement != "separate"
        on_gpus = recipe.model_copy(update={"device": "cuda"})
        return self.gpus < gpus_of(on_gpus, critic=self.algorithm.critic, shared=False)

    def verdict(self, recipe: Recipe, card: Card) -> str:
        """One sentence: that the run fits a card, or the keys that make it fit."""
        total = self.need(recipe, card).total
        if total <= card.bytes:
            return f"{card.name} is enough: about {gib(total)} of {gib(card.bytes)}"
        start = f"{card.name} is too small, about {gib(total)} for {gib(card.bytes)}: "
        for _, keys, changed in self._ways(recipe):
            less = self.need(changed, card).total
            if less <= card.bytes:
                return f"{start}{keys} makes that {gib(less)}"
        used, left = self._together(recipe, card, frozenset())
        if left > card.bytes:
            ways = "more learner.ranks" if recipe.policy.lora else "more learner.ranks or policy.lora"
            return f"{start}{' '.join(used.values())} make that {gib(left)}, so it takes {ways} or a larger card too"
        without: frozenset[str] = frozenset()
        for name in list(used):
            fewer, still = self._together(recipe, card, without | {name})
            if still <= card.bytes:
                used, left, without = fewer, still, without | {name}
        return f"{start}{' '.join(used.values())} make that {gib(left)}"

    def smallest(self, recipe: Recipe) -> str:
        """The sentence for a machine without a GPU: the smallest of `CARDS` that is enough, and the next smaller."""
        enough = [card for card in CARDS if self.need(recipe, card).total <= card.bytes]
        if not enough:
            return self.verdict(recipe, CARDS[-1])
        smaller = CARDS[: CARDS.index(enough[0])]
        return "; ".join(self.verdict(recipe, card) for card in (enough[0], *smaller[-1:]))

    def _together(self, recipe: Recipe, card: Card, without: Set[str]) -> tuple[dict[str, str], int]:
        """Changes by their names, one after the other until the run fits or there are no more; the bytes then."""
        used: dict[str, str] = {}
        now = self.need(recipe, card).total
        while now > card.bytes:
            better = (
                (name, keys, changed, less)
                for name, keys, changed in self._ways(recipe)
                if name not in without and (less := self.need(changed, card).total) < now
            )
            step = next(better, None)
            if step is None:
                break
            name, keys, recipe, now = step
            used.pop(name, None)
            used[name] = keys
        return used, now

    def _ways(self, recipe: Recipe) -> Iterator[_Way]:
        """Changes that save memory and are not made yet, in the order of their price."""
        recipe = settled(recipe, "cuda")
        rollout = recipe.rollout
        if recipe.policy.number_format == "float32":
            yield _Way("dtype", "policy.dtype=bfloat16", _changed(recipe, "policy", dtype="bfloat16"))
        options = {"reference": self.reference(recipe), "trains_all": recipe.policy.lora is None}
        learners = [
            _Way(keys.partition("=")[0], keys, recipe.model_copy(update={"learner": learner}))
            for keys, learner in reliefs(recipe.learner, **options)
        ]
        slower = ("learner.offload", "learner.optimizer")
        yield from (way for way in learners if way.name not in slower)
        if self.shares(recipe) and rollout.placement != "sleep" and recipe.control.max_staleness == 0:
            yield _Way("sleep", "rollout.placement=sleep", _changed(recipe, "rollout", placement="sleep"))
        if rollout.gpu_memory > _SMALL_CACHE:
            keys = f"rollout.gpu_memory={_SMALL_CACHE}"
            yield _Way("cache", keys, _changed(recipe, "rollout", gpu_memory=_SMALL_CACHE))
        yield from (way for way in learners if way.name in slower)


_SMALL_CACHE = 0.2
"""Share of a GPU's memory below which engines wait for room in their cache."""


class _Way(NamedTuple):
    name: str
    keys: str
    recipe: Recipe


def _changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
