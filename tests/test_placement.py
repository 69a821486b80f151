"""GPUs and bundles of a run's processes, and placements that are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cispo.errors import UserError
from cispo.recipe.load import load_recipe
from cispo.recipe.schema import Recipe
from cispo.runtime.placement import Placement, gpus_of, placement_of
from cispo.start import transport_of

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, ["device=cuda", "learner.ranks=1", *overrides])


def test_a_cpu_has_no_placement() -> None:
    on_cpu = load_recipe(QUICKSTART, ["device=cpu"])
    found = placement_of(on_cpu, available=0, critic=True)
    assert found == Placement(rank_bundles=({"CPU": 2},) * 2, engine_bundles=({"CPU": 1},)) and gpus_of(on_cpu) == 0
    assert [found.bundle_of_rank(r) for r in range(2)] == [0, 1] and found.bundle_of_engine(0) == 2
    assert transport_of(on_cpu, found) == "shared_memory" and transport_of(on_cpu, found, home=False) == "broadcast"
    files = load_recipe(QUICKSTART, ["device=cpu", "rollout.engine=torch"])
    assert transport_of(files, found, home=False) == "shared_memory", "a torch engine takes files alone"
    in_process = load_recipe(QUICKSTART, ["device=cpu", "runtime=local", "learner.ranks=1"])
    assert placement_of(in_process, available=0) == Placement()


def test_only_the_parts_that_a_command_starts_are_reserved() -> None:
    on_cpu = load_recipe(QUICKSTART, ["device=cpu", "rollout.engines=3"])
    engines = placement_of(on_cpu, available=0, learners=False)
    assert (len(engines.rank_bundles), len(engines.engine_bundles)) == (0, 3)
    assert [engines.bundle_of_engine(n) for n in range(3)] == [0, 1, 2]
    learners = placement_of(on_cpu, available=0, engines=False)
    assert (len(learners.rank_bundles), len(learners.engine_bundles)) == (2, 0)
    shared = placement_of(recipe("rollout.placement=split"), available=1, learners=False)
    assert shared.rank_bundles and shared.bundle_of_engine(0) == 0


@pytest.mark.parametrize(
    ("overrides", "available", "shared", "each", "engine", "transport"),
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
    overrides: Sequence[str], available: int, shared: int, each: float, engine: float, transport: str
) -> None:
    wanted = recipe(*overrides)
    found = placement_of(wanted, available=available)
    assert (found.shares_gpus, found.rank_gpus, found.engine_gpus) == (bool(shared), each, engine)
    assert found.sleeps == (wanted.rollout.placement == "sleep") and transport_of(wanted, found) == transport
    if shared:
        assert len(found.rank_bundles) == shared and not found.engine_bundles
        for bundle in found.rank_bundles:
            assert bundle["CPU"] * found.rank_gpus <= bundle["GPU"], "Ray must find room for all that share a GPU"
        assert [found.bundle_of_engine(n) for n in range(3)] == [n % shared for n in range(3)]
    elif wanted.runtime == "ray":
        assert [bundle["GPU"] for bundle in found.rank_bundles] == [1]
        assert [bundle["GPU"] for bundle in found.engine_bundles] == [engine] * wanted.rollout.engines


@pytest.mark.parametrize(
    ("runs", "available", "bundle", "each", "cache"),
    [(3, 1, 0.3333, 0.1666, 0.1), (4, 2, 0.5, 0.25, 0.15), (3, 4, 1, 0.5, 0.3)],
)
def test_runs_side_by_side_divide_the_gpus(runs: int, available: int, bundle: float, each: float, cache: float) -> None:
    found = placement_of(recipe("rollout.gpu_memory=0.3"), available=available, side_by_side=runs)
    assert found.rank_bundles == ({"GPU": bundle, "CPU": 2},) and found.shares_gpus
    assert found.rank_gpus == found.engine_gpus == each and 2 * each <= bundle, "Ray must find room for both"
    assert found.cache_share == pytest.approx(cache), "every engine's cache leaves room for the other runs"
    assert math.floor(1 / bundle) * available >= runs, "Ray must find room for all runs"
    alone = placement_of(recipe(), available=4, side_by_side=2)
    assert not alone.shares_gpus and alone == placement_of(recipe(), available=4)


@pytest.mark.parametrize("key", ["rollout.placement=separate", "learner.ranks=2"])
def test_runs_that_take_whole_gpus_share_none(key: str) -> None:
    with pytest.raises(UserError, match=f"--parallel 4 on 2 GPUs: with {key.replace('=', ' ')} runs cannot share"):
        placement_of(recipe(key), available=2, side_by_side=4)


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
    with pytest.raises(UserError, match="share GPUs"):
        transport_of(recipe("rollout.weight_sync=cuda_ipc"), Placement(device="cuda", rank_gpus=1, engine_gpus=1))
    for overrides, sentence in (
        (["rollout.weight_sync=broadcast", "rollout.engine=torch"], "needs rollout.engine: vllm"),
        (["rollout.weight_sync=broadcast", "runtime=local"], "needs runtime: ray"),
        (["rollout.weight_sync=cuda_ipc", "device=cpu"], "needs GPUs"),
    ):
        with pytest.raises(UserError, match=sentence):
            recipe(*overrides)


def test_a_critic_takes_a_share() -> None:
    found = placement_of(recipe("algorithm.name=ppo", "algorithm.ratio_max=null"), available=1, critic=True)
    assert found.rank_bundles == ({"GPU": 1, "CPU": 3},) and found.rank_gpus == 0.3333
    assert gpus_of(recipe(), critic=True) == 3 and gpus_of(recipe("rollout.placement=split"), critic=True) == 1
    assert not torch.cuda.is_available() or found.cache_share > 0


def test_a_driver_without_a_gpu_counts_on_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a cluster often has none; a torch that was built for CPUs could not use one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = recipe("device=auto")
    for version, available, device in (("12.8", 2, "cuda"), ("12.8", 0, "cpu"), (None, 2, "cpu")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert placement_of(wanted, available=available).device == device
