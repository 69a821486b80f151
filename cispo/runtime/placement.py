"""Placement of learners and engines on GPUs, their own or shared, and the bundles that it reserves of a cluster.

    separate    learner 0 | learner 1 | engine 0 | engine 1          one or more GPUs each
    split       learner 0 + engine 0  | learner 1 + engine 1         both keep their memory
    sleep       as split, but engines free their memory while the learners work

A bundle holds the processes that must be on one node: a learner rank with its critic's rank and the engines that share
its GPU, or one engine with all its GPUs.
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
    """Devices, GPU fractions and bundles of a run's processes.

    Example: Placement(device="cuda", rank_bundles=({"GPU": 1, "CPU": 3},), rank_gpus=0.3333, engine_gpus=0.3333)
    """

    device: Literal["cpu", "cuda"] = "cpu"
    rank_bundles: tuple[Mapping[str, float], ...] = ()
    """One for each learner rank; empty with runtime: local, and for a command with engines alone."""
    engine_bundles: tuple[Mapping[str, float], ...] = ()
    """One for each engine; empty where engines share the ranks' bundles, and for a command without engines."""
    rank_gpus: float = 0
    """GPUs of each rank of the learner, and of the critic."""
    engine_gpus: float = 0
    """GPUs of each engine."""
    sleeps: bool = False
    """Engines free their memory while learners work."""
    cache_share: float = 0.0
    """The largest fraction of a GPU's memory that one engine's cache may take."""

    @property
    def shares_gpus(self) -> bool:
        """Whether engines run on the learners' GPUs."""
        return self.device == "cuda" and bool(self.rank_bundles) and not self.engine_bundles

    def bundle_of_rank(self, rank: int) -> int | None:
        """Bundle of a learner rank and its critic's rank; ranks are counted first, then engines."""
        return rank if self.rank_bundles else None

    def bundle_of_engine(self, number: int) -> int | None:
        """Bundle of an engine. Engines without bundles of their own share the ranks' in turn."""
        if self.engine_bundles:
            return len(self.rank_bundles) + number
        return number % len(self.rank_bundles) if self.rank_bundles else None


def placement_of(
    recipe: Recipe,
    *,
    available: int,
    critic: bool = False,
    learners: bool = True,
    engines: bool = True,
    side_by_side: int = 1,
) -> Placement:
    """The recipe's placement on `available` GPUs; bundles are for the processes that a command starts.

    `side_by_side` runs divide the GPUs, and share each where they are more than these. Raises UserError where the
    processes cannot share GPUs, or there are too few.
    """
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    in_process, per_rank = recipe.runtime == "local", 1 + int(critic)
    if device_of(recipe, available) == "cpu":
        if in_process:
            return Placement()
        return Placement(
            rank_bundles=tuple({"CPU": per_rank} for _ in range(ranks if learners else 0)),
            engine_bundles=tuple({"CPU": 1} for _ in range(rollout.engines if engines else 0)),
        )
    if available == 0:
        raise UserError("device: cuda, but there is no GPU here")
    separate = _gpus(recipe, critic=critic, shared=False)
    placement = rollout.placement
    if placement == "auto":
        placement = "separate" if available // side_by_side >= separate else "split"
    runs_per_gpu = math.ceil(side_by_side / available)
    if in_process:
        share = rollout.gpu_memory / runs_per_gpu
        return Placement(device="cuda", rank_gpus=1, cache_share=share, sleeps=placement == "sleep")
    if runs_per_gpu > 1 and (placement == "separate" or ranks > 1):
        key = "rollout.placement separate" if placement == "separate" else f"learner.ranks {ranks}"
        raise UserError(f"--parallel {side_by_side} on {available} GPUs: with {key} runs cannot share a GPU")
    if placement == "separate":
        if available < separate:
            raise UserError(
                f"rollout.placement separate needs {separate} GPUs and there are {available}: use split or sleep"
            )
        engine = {"GPU": rollout.tensor_parallel, "CPU": 1}
        return Placement(
            device="cuda",
            rank_bundles=tuple({"GPU": per_rank, "CPU": per_rank} for _ in range(ranks if learners else 0)),
            engine_bundles=tuple(engine for _ in range(rollout.engines if engines else 0)),
            rank_gpus=1,
            engine_gpus=rollout.tensor_parallel,
            cache_share=rollout.gpu_memory,
        )
    return _shared(recipe, available, per_rank, runs_per_gpu, sleeps=placement == "sleep")


def _shared(recipe: Recipe, available: int, per_rank: int, runs_per_gpu: int, *, sleeps: bool) -> Placement:
    """Each learner rank, of `per_rank` processes, and its engines on one GPU, or on their part of it."""
    rollout, ranks = recipe.rollout, recipe.learner.ranks
    if rollout.tensor_parallel > 1:
        raise UserError(f"rollout.tensor_parallel {rollout.tensor_parallel} needs rollout.placement separate")
    if available < ranks:
        raise UserError(f"learner.ranks {ranks} is more than the {available} GPUs that there are")
    engines = math.ceil(rollout.engines / ranks)
    occupants = per_rank + engines
    part = 10_000 // runs_per_gpu  # Ray counts GPUs in ten-thousandths
    share = part // occupants / 10_000
    return Placement(
        device="cuda",
        rank_bundles=tuple({"GPU": part / 10_000, "CPU": occupants} for _ in range(ranks)),
        rank_gpus=share,
        engine_gpus=share,
        sleeps=sleeps,
        cache_share=rollout.gpu_memory / engines / runs_per_gpu,
    )


def device_of(recipe: Recipe, available: int) -> Literal["cpu", "cuda"]:
    """Device of the policies. `auto` on a driver without a GPU takes the cluster's, of which `available` are there."""
    if recipe.device == "auto" and available > 0 and torch.version.cuda is not None:
        return "cuda"
    return "cuda" if pick_device(recipe.device).type == "cuda" else "cpu"


def formatted(recipe: Recipe, device: Literal["cpu", "cuda"]) -> Recipe:
    """The recipe with the number format and the recomputation of its policy chosen for a device.

    A policy that is given and runs on a GPU is bfloat16 and recomputes its layers.
    """
    lean = device == "cuda" and recipe.policy.model is not None
    policy, learner = recipe.policy, recipe.learner
    if policy.dtype == "auto":
        policy = policy.model_copy(update={"dtype": "bfloat16" if lean else "float32"})
    if learner.gradient_checkpointing == "auto":
        learner = learner.model_copy(update={"gradient_checkpointing": lean or learner.recomputes})
    return recipe.model_copy(update={"policy": policy, "learner": learner})


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a recipe's `device` key; `auto` takes a GPU where this machine has one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def gpus_of(recipe: Recipe, *, critic: bool = False, shared: bool | None = None) -> int:
    """Number of GPUs of a run, 0 on a CPU. `shared` overrides whether the recipe's engines share the learners' GPUs."""
    if pick_device(recipe.device).type == "cpu":
        return 0
    if shared is None:
        shared = recipe.rollout.placement in ("split", "sleep")
    return _gpus(recipe, critic=critic, shared=shared)


def _gpus(recipe: Recipe, *, critic: bool, shared: bool) -> int:
    ranks, rollout = recipe.learner.ranks, recipe.rollout
    return ranks if shared else ranks * (1 + int(critic)) + rollout.engines * rollout.tensor_parallel
