"""Which GPUs learners and engines run on: of their own, or shared.

separate    learner 0 | learner 1 | engine 0 | engine 1          one or more GPUs each
split       learner 0 + engine 0  | learner 1 + engine 1         both keep their memory
sleep       the same, but engines give theirs back while the learners work
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cispo.config import Recipe
from cispo.learner.parallel import pick_device
from cispo.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the parts of a run live.

    Example: Placement(device="cuda", bundles=[{"GPU": 1, "CPU": 3}], rank_gpus=0.3333, engine_gpus=0.3333)
    """

    device: Literal["cpu", "cuda"] = "cpu"
    bundles: tuple[dict[str, float], ...] = ()
    """What is reserved of each GPU that learners and engines share; empty where they share none."""
    rank_gpus: float = 0
    """GPUs of a learner's or a critic's rank."""
    engine_gpus: float = 0
    sleeps: bool = False
    """Engines give their memory back while learners work."""
    cache_share: float = 0.0
    """Of a GPU's memory, what one engine's cache may take."""

    def bundle_of(self, number: int) -> int | None:
        """Of a rank or an engine: they take the shared GPUs in turn."""
        return number % len(self.bundles) if self.bundles else None


def placement_of(recipe: Recipe, *, available: int, critic: bool = False) -> Placement:
    """The recipe's placement where `available` GPUs are to be had.

    Raises UserError where its parts cannot share, or there are too few.
    """
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    if pick_device(recipe.device).type == "cpu":
        return Placement()
    if available == 0:
        raise UserError("device: cuda, but there is no GPU here")
    separate = gpus_of(recipe, critic=critic, shared=False)
    placement = rollout.placement
    if placement == "auto":
        placement = "separate" if available >= separate else "split"
    if recipe.runtime == "local":
        return Placement(device="cuda", rank_gpus=1, cache_share=rollout.gpu_memory, sleeps=placement == "sleep")
    if placement == "separate":
        if available < separate:
            raise UserError(
                f"rollout.placement separate needs {separate} GPUs and there are {available}: others share them"
            )
        return Placement(
            device="cuda", rank_gpus=1, engine_gpus=rollout.tensor_parallel, cache_share=rollout.gpu_memory
        )
    if rollout.tensor_parallel > 1:
        raise UserError(f"rollout.tensor_parallel {rollout.tensor_parallel} needs rollout.placement separate")
    if available < ranks:
        raise UserError(f"learner.ranks {ranks} is more than the {available} GPUs that there are")
    engines = math.ceil(rollout.engines / ranks)
    occupants = 1 + int(critic) + engines
    share = math.floor(10_000 / occupants) / 10_000  # Ray counts in ten thousandths
    return Placement(
        device="cuda",
        bundles=tuple({"GPU": 1, "CPU": occupants} for _ in range(ranks)),
        rank_gpus=share,
        engine_gpus=share,
        sleeps=placement == "sleep",
        cache_share=rollout.gpu_memory / engines,
    )


def gpus_of(recipe: Recipe, *, critic: bool = False, shared: bool | None = None) -> int:
    """GPUs that a run takes, 0 on a CPU; `shared` decides where the recipe leaves it open."""
    if pick_device(recipe.device).type == "cpu":
        return 0
    ranks, rollout = recipe.learner.ranks, recipe.rollout
    if shared is None:
        shared = rollout.placement in ("split", "sleep")
    return ranks if shared else ranks * (1 + int(critic)) + rollout.engines * rollout.tensor_parallel
