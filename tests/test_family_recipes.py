"""Every family has a recipe at laptop size and one for its released checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest import approx

from cispo.engines.choice import settled
from cispo.policies.families import FAMILIES, family_of
from cispo.policies.loading import shape_of
from cispo.recipe.load import load_recipe
from cispo.rollout.renderer import renderer_of
from cispo.start import check_new_policy, new_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
# Released checkpoint -> its laptop size's family.
PAIRS = {
    "minimax_m2": "minimax_m2",
    "qwen3_next": "qwen3_next",
    "kimi_linear": "kimi_linear",
    "deepseek_v32": "deepseek",
    "ling": "ling",
    "qwen3_moe": "gqa_moe",
}


def test_no_family_lacks_recipes() -> None:
    """The quickstart is the first family's, qwen3_tiny the last one's."""
    assert set(PAIRS.values()) == FAMILIES.keys() - {"minimax", "dense"}


@pytest.mark.parametrize("name", PAIRS)
def test_the_laptop_size_is_a_policy_of_the_family(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}_tiny.yaml")
    renderer = renderer_of(recipe)
    config = new_config(recipe, renderer)
    check_new_policy(recipe, renderer)
    assert family_of(config) is FAMILIES[PAIRS[name]]
    policy = shape_of(config)
    assert sum(p.numel() for p in policy.parameters()) == approx(0.75e6, rel=0.2)
    assert policy.router_shape[0] >= 2
    # vLLM samples contexts up to index_topk alone.
    assert settled(recipe, "cuda").rollout.engine == ("torch" if name == "deepseek_v32" else "vllm")
    assert settled(recipe, "cpu").rollout.engine == "torch"
    assert (
        recipe.eval is not None
        and not isinstance(recipe.eval, list)
        and recipe.eval.source == "rewards.sorting:problems"
    )


@pytest.mark.parametrize("name", PAIRS)
def test_the_released_checkpoint_is_sharded_and_replayed(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert recipe.policy.model is not None and recipe.policy.model.count("/") == 1
    assert recipe.policy.router_replay == "rollout" and recipe.policy.lora is not None
    assert recipe.learner.shard is True and recipe.learner.ranks > 1 and recipe.learner.gradient_checkpointing
