"""Heads of multi-token prediction over ranks: shards, split documents and distributed experts give one rank's heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cispo.policies.loading import load_policy, save_policy
from tests.expert_group import joined
from tests.mtp_group import ALONE, CASES, Result, result_of, run_group
from tests.shard_group import differ
from tests.test_mtp import config_of, drawn

GROUPS = [(2, False), *(pytest.param((world, True), marks=pytest.mark.slow) for world in (2, 4))]
"""(ranks, whether every case runs)."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("heads")
    for name in ("deepseek_v3", "deepseek_v32", "glm4_moe"):
        save_policy(drawn(config_of(name)), made / name)
    save_policy(drawn({**config_of("glm4_moe"), "tie_word_embeddings": True}), made / "tied")
    return made


@pytest.fixture(scope="module", params=GROUPS, ids=str)
def ranks(request: pytest.FixtureRequest, root: Path) -> tuple[int, list[dict[str, Result]]]:
    """A group's size, and the results of each of its ranks."""
    world, thorough = request.param
    assert run_group(world, root, thorough=thorough) == [0] * world
    found = [torch.load(root / f"results.{world}.{own}", weights_only=False) for own in range(world)]
    return world, found


def test_heads_of_several_ranks_are_those_of_one(root: Path, ranks: tuple[int, list[dict[str, Result]]]) -> None:
    """float64: 1e-11 of the largest gradient, for the order of sums over tokens and ranks; 1e-6 of weights after two
    steps of AdamW, which divides by the root of tiny second moments. The policy is as without heads, to the bit."""
    world, found = ranks
    for name in dict.fromkeys(key.partition(" Axes")[0] for key in found[0]):
        alone = result_of(root, name, ALONE)
        assert alone.trunk, name
        for axes in (axes for axes in CASES[name].meshes if f"{name} {axes}" in found[0]):
            results = [own[f"{name} {axes}"] for own in found]
            assert all(r.trunk for r in results), name
            for part in ("count", "loss", "right"):
                total = sum(getattr(r.predictions, part) for r in results)
                assert total == pytest.approx(getattr(alone.predictions, part), rel=1e-11), name
            assert differ(joined([r.gradients for r in results]), joined([alone.gradients])) <= 1e-11, name
            assert differ(joined([r.weights for r in results]), joined([alone.weights])) <= 1e-6, name
            assert all(r.sums == results[0].sums for r in results), name
            written = load_policy(root / f"{name} {axes}", torch.float64)
            second = {key.removeprefix("model.layers.5."): value for key, value in written.kept.items()}
            assert torch.equal(second["embed_tokens.weight"], written.get_parameter("embed_tokens.weight"))
            assert torch.equal(second["shared_head.head.weight"], written.lm_head_weight)
