"""Which GPUs the parts of a run get, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.assemble import transport_of
from cispo.config import Recipe, load_recipe
from cispo.placement import Placement, gpus_of, placement_of
from cispo.types import UserError

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, ["device=cuda", "learner.ranks=1", *overrides])


def test_a_cpu_has_no_placement() -> None:
    on_cpu = load_recipe(QUICKSTART, ["device=cpu"])
    assert placement_of(on_cpu, available=0) == Placement() and gpus_of(on_cpu) == 0
    assert transport_of(on_cpu, Placement()) == "shared_memory"


@pytest.mark.parametrize(
    ("overrides", "available", "bundles", "each", "engine", "transport"),
    [
        (["rollout.engines=2"], 3, 0, 1, 1, "broadcast"),
        (["rollout.engines=2"], 2, 1, 0.3333, 0.3333, "cuda_ipc"),
        (["rollout.engines=2", "rollout.placement=separate", "rollout.tensor_parallel=2"], 5, 0, 1, 2, "broadcast"),
        (["rollout.engines=3", "rollout.placement=sleep", "learner.ranks=2"], 2, 2, 0.3333, 0.3333, "cuda_ipc"),
        (["runtime=local"], 1, 0, 1, 0, "direct"),
        (["rollout.placement=split", "rollout.weight_sync=shared_memory"], 1, 1, 0.5, 0.5, "shared_memory"),
    ],
)
def test_parts_get_gpus(
    overrides: Sequence[str], available: int, bundles: int, each: float, engine: float, transport: str
) -> None:
    wanted = recipe(*overrides)
    found = placement_of(wanted, available=available)
    assert (len(found.bundles), found.rank_gpus, found.engine_gpus) == (bundles, each, engine)
    assert found.sleeps == (wanted.rollout.placement == "sleep") and transport_of(wanted, found) == transport
    for bundle in found.bundles:
        parts = bundle["CPU"]
        assert parts * found.rank_gpus <= bundle["GPU"], "Ray must find room for all that share a GPU"
    if found.bundles:
        assert [found.bundle_of(n) for n in range(3)] == [n % bundles for n in range(3)]


@pytest.mark.parametrize(
    ("overrides", "available", "sentence"),
    [
        (["rollout.placement=separate"], 1, "needs 2 GPUs and there are 1"),
        (["rollout.placement=split", "rollout.tensor_parallel=2"], 2, "needs rollout.placement separate"),
        (["learner.ranks=3"], 2, "learner.ranks 3 is more than the 2 GPUs"),
        ([], 0, "there is no GPU here"),
    ],
)
def test_what_cannot_be_placed_is_refused(overrides: Sequence[str], available: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        placement_of(recipe(*overrides), available=available)


def test_transports_that_do_not_fit_are_refused() -> None:
    separate: dict[str, Any] = {"device": "cuda", "rank_gpus": 1, "engine_gpus": 1}
    with pytest.raises(UserError, match="share GPUs"):
        transport_of(recipe("rollout.weight_sync=cuda_ipc"), Placement(**separate))
    for overrides, sentence in (
        (["rollout.weight_sync=broadcast", "rollout.engine=torch"], "needs rollout.engine: vllm"),
        (["rollout.weight_sync=broadcast", "runtime=local"], "needs runtime: ray"),
        (["rollout.weight_sync=cuda_ipc", "device=cpu"], "needs GPUs"),
    ):
        with pytest.raises(UserError, match=sentence):
            recipe(*overrides)


def test_a_critic_takes_a_share() -> None:
    found = placement_of(recipe("algorithm.name=ppo", "algorithm.ratio_max=null"), available=1, critic=True)
    assert found.bundles == ({"GPU": 1, "CPU": 3},) and found.rank_gpus == 0.3333
    assert gpus_of(recipe(), critic=True) == 3 and gpus_of(recipe("rollout.placement=split"), critic=True) == 1
    assert not torch.cuda.is_available() or found.cache_share > 0
