"""The engine that `rollout.engine: auto` stands for: by device, keys and size, once, and as it was in a resumed run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cispo.engines.choice import SMALL, engine_of, settled
from cispo.errors import UserError
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.load import dump_yaml, load_recipe, parse_recipe
from cispo.recipe.resume import check_same_run
from tests.test_vllm_parity import lightning

RECIPES = Path(__file__).parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"


@pytest.mark.parametrize(
    ("changes", "device", "name", "reason"),
    [
        ([], "cpu", "torch", f"904,576 parameters in layers, at most {SMALL:,}, on a CPU"),
        ([], "cuda", "vllm", "the policy runs on a GPU"),
        (["rollout.engine=vllm"], "cpu", "vllm", "the recipe names it"),
        (["rollout.engine=torch"], "cuda", "torch", "the recipe names it"),
        (["rollout.engine_args={enable_prefix_caching: true}"], "cpu", "vllm", "rollout.engine_args is vLLM's"),
        (["rollout.weight_sync=broadcast"], "cpu", "vllm", "rollout.weight_sync broadcast is vLLM's"),
        (["rollout.weight_sync=shared_memory"], "cpu", "torch", "904,576 parameters"),
        (["rollout.tensor_parallel=2"], "cpu", "vllm", "rollout.tensor_parallel is vLLM's"),
        (["policy.dtype=bfloat16"], "cpu", "vllm", "policy.dtype is bfloat16"),
        (["policy.config.intermediate_size=8192"], "cpu", "vllm", f"more than {SMALL:,}, on a CPU"),
        # The vocabulary does not count: its product is the same work in both.
        (["policy.config.vocab_size=150000"], "cpu", "torch", "904,576 parameters"),
        (["policy={config: null, model: some/policy}"], "cpu", "vllm", "not known before it is loaded"),
        (["policy.config.layer_types=[]"], "cpu", "vllm", "not known before it is loaded"),
    ],
)
def test_the_engine_and_its_reason(changes: Sequence[str], device: str, name: str, reason: str) -> None:
    recipe = load_recipe(QUICKSTART, changes)
    found = engine_of(recipe, "cuda" if device == "cuda" else "cpu")
    assert found.name == name and reason in found.reason
    assert settled(recipe, "cuda" if device == "cuda" else "cpu").rollout.engine == name


def test_a_folder_counts_by_its_config(tmp_path: Path) -> None:
    save_policy(init_policy(lightning(), seed=0), tmp_path)
    given = [f"policy={{config: null, model: {tmp_path}}}"]
    assert engine_of(load_recipe(QUICKSTART, given), "cpu").name == "torch"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 1 << 20}))
    assert engine_of(load_recipe(QUICKSTART, given), "cpu").name == "vllm"


def test_a_named_cluster_may_have_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for changes, name in (([], "vllm"), (["device=cpu"], "torch"), (["runtime=local", "learner.ranks=1"], "torch")):
        assert engine_of(load_recipe(QUICKSTART, changes)).name == name
    monkeypatch.delenv("RAY_ADDRESS")
    assert engine_of(load_recipe(QUICKSTART)).name == "torch"


@pytest.mark.parametrize("name", [file.stem for file in sorted(RECIPES.glob("*.yaml"))])
def test_the_shipped_recipes(name: str) -> None:
    """Those for a laptop sample by the torch engine there; on GPUs vLLM samples, where the recipe does not say."""
    recipe = load_recipe(name)
    if recipe.rollout.engine == "auto":
        assert settled(recipe, "cuda").rollout.engine == "vllm"
    if name in ("quickstart", "compare_quick", "guess", "chase") or name.endswith("_tiny"):
        assert settled(recipe, "cpu").rollout.engine == "torch"


def test_a_resumed_run_keeps_its_engine(tmp_path: Path) -> None:
    """One that was stored when vllm was the default too; another engine would be another run."""
    recipe = load_recipe(QUICKSTART, ["device=cpu"])
    for engine in ("vllm", "torch"):
        stored = dump_yaml(settled(load_recipe(QUICKSTART, ["device=cpu", f"rollout.engine={engine}"]), "cpu"))
        (tmp_path / "recipe.yaml").write_text(stored)
        assert settled(check_same_run(recipe, tmp_path), "cpu").rollout.engine == engine
        other = load_recipe(QUICKSTART, ["device=cpu", f"rollout.engine={'torch' if engine == 'vllm' else 'vllm'}"])
        with pytest.raises(UserError, match=f"has rollout.engine '{engine}', not"):
            check_same_run(other, tmp_path)


def test_a_config_that_is_no_policys_is_left_to_its_own_check() -> None:
    recipe = parse_recipe({"policy": {"config": {}, "tokenizer": "t"}})
    assert engine_of(recipe, "cpu").name == "vllm"
