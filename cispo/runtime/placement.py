"""Which GPUs learners and engines run on: of their own, or shared; and what that reserves of a cluster.

separate    learner 0 | learner 1 | engine 0 | engine 1          one or more GPUs each
split       learner 0 + engine 0  | learner 1 + engine 1         both keep their memory
sleep       the same, but engines give theirs back while the learners work

A bundle is what must be on one node: a learner rank with its critic's rank and the engines that share its GPU, or one
engine with all its GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from cispo.errors import UserError
from cispo.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the parts of a run live.

    Example: Placement(device="cuda", rank_bundles=({"GPU": 1, "CPU": 3},), rank_gpus=0.3333, engine_gpus=0.3333)
    """

    device: Literal["cpu", "cuda"] = "cpu"
    rank_bundles: tuple[Mapping[str, float], ...] = ()
    """One for each learner rank; empty in one process, or where there are engines alone."""
    engine_bundles: tuple[Mapping[str, float], ...] = ()
    """One for each engine; empty where engines sit in the ranks' bundles, or there are none."""
    rank_gpus: float = 0
    """GPUs of a learner's or a critic's rank."""
    engine_gpus: float = 0
    sleeps: bool = False
    """Engines give their memory back while learners work."""
    cache_share: float = 0.0
    """Of a GPU's memory, what one engine's cache may take."""

    @property
    def shares_gpus(self) -> bool:
        """Whether engines sit on the learners' GPUs."""
        return self.device == "cuda" and bool(self.rank_bundles) and not self.engine_bundles

    def bundle_of_rank(self, rank: int) -> int | None:
        """Of a learner's or a critic's rank, counted through ranks and engines."""
        return rank if self.rank_bundles else None

    def bundle_of_engine(self, number: int) -> int | None:
        """Engines without bundles of their own take the ranks' in turn."""
        if self.engine_bundles:
            return len(self.rank_bundles) + number
        return number % len(self.rank_bundles) if self.rank_bundles else None


def placement_of(
    recipe: Recipe, *, available: int, critic: bool = False, learners: bool = True, engines: bool = True
) -> Placement:
    """The recipe's placement where `available` GPUs are to be had; reserves for the parts that a command starts.

    Raises UserError where the parts cannot share, or there are too few GPUs.
    """
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    in_process, parts = recipe.runtime == "local", 1 + int(critic)
    if device_of(recipe, available) == "cpu":
        if in_process:
            return Placement()
        return Placement(
            rank_bundles=tuple({"CPU": parts} for _ in range(ranks if learners else 0)),
            engine_bundles=tuple({"CPU": 1} for _ in range(rollout.engines if engines else 0)),
        )
    if available == 0:
        raise UserError("device: cuda, but there is no GPU here")
    separate = _gpus(recipe, critic=critic, shared=False)
    placement = rollout.placement
    if placement == "auto":
        placement = "separate" if available >= separate else "split"
    if in_process:
        return Placement(device="cuda", rank_gpus=1, cache_share=rollout.gpu_memory, sleeps=placement == "sleep")
    if placement == "separate":
        if available < separate:
            raise UserError(
                f"rollout.placement separate needs {separate} GPUs and there are {available}: others share them"
            )
        engine = {"GPU": rollout.tensor_parallel, "CPU": 1}
        return Placement(
            device="cuda",
            rank_bundles=tuple({"GPU": parts, "CPU": parts} for _ in range(ranks if learners else 0)),
            engine_bundles=tuple(engine for _ in range(rollout.engines if engines else 0)),
            rank_gpus=1,
            engine_gpus=rollout.tensor_parallel,
            cache_share=rollout.gpu_memory,
        )
    return _shared(recipe, available, parts, sleeps=placement == "sleep")


def _shared(recipe: Recipe, available: int, parts: int, *, sleeps: bool) -> Placement:
    """Each learner rank (of `parts` processes) and its engines on one GPU."""
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    if rollout.tensor_parallel > 1:
        raise UserError(f"rollout.tensor_parallel {rollout.tensor_parallel} needs rollout.placement separate")
    if available < ranks:
        raise UserError(f"learner.ranks {ranks} is more than the {available} GPUs that there are")
    engines = math.ceil(rollout.engines / ranks)
    occupants = parts + engines
    share = math.floor(10_000 / occupants) / 10_000  # Ray counts in ten thousandths
    return Placement(
        device="cuda",
        rank_bundles=tuple({"GPU": 1, "CPU": occupants} for _ in range(ranks)),
        rank_gpus=share,
        engine_gpus=share,
        sleeps=sleeps,
        cache_share=rollout.gpu_memory / engines,
    )


def device_of(recipe: Recipe, available: int) -> Literal["cpu", "cuda"]:
    """Where policies run; a driver without a GPU of its own counts on those of the cluster."""
    if recipe.device == "auto" and available > 0 and torch.version.cuda is not None:
        return "cuda"
    return "cuda" if pick_device(recipe.device).type == "cuda" else "cpu"


def gpus_of(recipe: Recipe, *, critic: bool = False, shared: bool | None = None) -> int:
    """GPUs that a run takes, 0 on a CPU; `shared` decides where the recipe leaves it open."""
    if pick_device(recipe.device).type == "cpu":
        return 0
    if shared is None:
        shared = recipe.rollout.placement in ("split", "sleep")
    return _gpus(recipe, critic=critic, shared=shared)


def _gpus(recipe: Recipe, *, critic: bool, shared: bool) -> int:
    ranks, rollout = recipe.learner.ranks, recipe.rollout
    return ranks if shared else ranks * (1 + int(critic)) + rollout.engines * rollout.tensor_parallel


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a recipe's `device` key names; auto takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
