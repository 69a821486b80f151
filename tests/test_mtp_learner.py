"""Training of heads of multi-token prediction beside the policy: the policy is the one without heads, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cispo.learner.adapters import Adapters
from cispo.learner.heads import Predictions, prediction_metrics
from cispo.learner.learner import Learner, UpdateResult
from cispo.learner.memory import rank_memory, units_of
from cispo.policies.costs import cache_sizes
from cispo.policies.loading import load_policy, save_policy, shape_of
from cispo.policies.moe import correction_biases
from cispo.policies.policy import heads_of
from cispo.policies.replay import routers_of
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from tests.shard_group import prompts_shared
from tests.test_learner import CISPO, samples
from tests.test_mtp import HEADS, config_of, drawn, packed


@pytest.fixture(scope="module", params=["deepseek_v3", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    save_policy(drawn(config_of(request.param)), made)
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases balanced, prompts shared": {"router_bias_rate": 0.01, "share_prompts": True},
    "8 bits, on the host, recomputed": {
        "optimizer": "adamw8bit",
        "offload": ["optimizer", "activations"],
        "gradient_checkpointing": True,
    },
}


def updates(
    folder: Path, options: dict[str, Any], *, heads: bool, dtype: Any = "float32", count: int = 3
) -> tuple[Learner, list[UpdateResult]]:
    learner = Learner(str(folder), LearnerConfig(**options), heads=heads, dtype=dtype, temperature=1.3)
    mbs = packed(prompts_shared(samples()), shared=bool(options.get("share_prompts")))
    assert len(mbs) > 1
    return learner, [learner.update(mbs, CISPO, lr=1e-2) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, "float32") for options in OPTIONS.values()), (OPTIONS["8 bits, on the host, recomputed"], "bfloat16")],
    ids=[*OPTIONS, "masters on the host"],
)
def test_the_policy_is_the_one_without_heads_to_the_bit(folder: Path, options: dict[str, Any], dtype: str) -> None:
    """Three updates: weights, moments, biases, losses, norms, log-probabilities. The heads learn meanwhile."""
    alone, expected = updates(folder, options, heads=False, dtype=dtype)
    learner, results = updates(folder, options, heads=True, dtype=dtype)
    assert [(r.batch.loss, r.grad_norm, r.taken) for r in results] == [
        (r.batch.loss, r.grad_norm, r.taken) for r in expected
    ]
    assert min(r.grad_norm for r in results) > 1, "nothing is clipped"
    for one, other in zip(results, expected, strict=True):
        assert one.batch.tokens is not None and other.batch.tokens is not None
        assert torch.equal(one.batch.tokens.logprobs, other.batch.tokens.logprobs)
    weights = learner.policy.named_weights()
    assert all(torch.equal(w, weights[name]) for name, w in alone.policy.named_weights().items())
    state, whole = alone.rank.optimizer.state(), learner.rank.optimizer.state()
    assert state.keys() == whole.keys() and all(torch.equal(value, whole[key]) for key, value in state.items())
    # What a reference and routers' biases are made of is the trunk's.
    learner.freeze_reference()
    assert learner.reference is not None and not heads_of(learner.reference)
    assert len(correction_biases(learner.policy)) == len(routers_of(learner.policy)) == 3
    losses = [found.loss / found.count for r in results if (found := r.batch.predictions)]
    assert losses[2] < losses[1] < losses[0] < 6 and expected[0].batch.predictions is None


def test_heads_have_a_norm_and_a_clip_of_their_own(folder: Path) -> None:
    """With a bound far below their gradient's norm their first moments are those of a gradient of that norm: 1e-6, the
    rounding of a float32 sum."""
    learner, _ = updates(folder, {"max_grad_norm": 1e-3}, heads=True, count=1)
    assert learner.rank.heads is not None
    for optimizer in learner.rank.optimizers:
        moments = [v for key, v in optimizer.state().items() if key.endswith("/exp_avg")]
        norm = torch.stack([m.double().square().sum() for m in moments]).sum().sqrt()
        assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-5)


def test_a_resumed_run_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    """To the bit; and a checkpoint with heads goes on without them, and the reverse."""
    learner, _ = updates(folder, {}, heads=True, count=2)
    (tmp_path / "training").mkdir()
    learner.start_save(str(tmp_path))
    assert learner.saved(wait=True)
    mbs = packed(prompts_shared(samples()))
    expected = learner.update(mbs, CISPO, lr=1e-2)
    resumed = Learner(str(tmp_path), LearnerConfig(), heads=True, temperature=1.3)
    resumed.restore(str(tmp_path))
    found = resumed.update(mbs, CISPO, lr=1e-2)
    assert (found.batch.predictions, found.grad_norm) == (expected.batch.predictions, expected.grad_norm)
    weights = learner.policy.named_weights()
    assert all(torch.equal(w, weights[name]) for name, w in resumed.policy.named_weights().items())
    without = Learner(str(tmp_path), LearnerConfig(), temperature=1.3)
    without.restore(str(tmp_path))
    assert without.update(mbs, CISPO, lr=1e-2).grad_norm == expected.grad_norm and without.policy.kept
    (tmp_path / "without" / "training").mkdir(parents=True)
    without.start_save(str(tmp_path / "without"))
    assert without.saved(wait=True)
    again = Learner(str(tmp_path / "without"), LearnerConfig(), heads=True, temperature=1.3)
    again.restore(str(tmp_path / "without"))
    assert again.update(mbs, CISPO, lr=1e-2).taken


def test_engines_and_folders_get_the_heads_weights(folder: Path, tmp_path: Path) -> None:
    learner, _ = updates(folder, {}, heads=True, count=1)
    names = {name for name, _ in learner.policy.disk_places()}
    assert any(name.startswith("model.layers.5.") for name in names)
    assert {slot.name for bucket in learner.sender.buckets for slot in bucket.slots} == names
    sent = load_file(learner.publish(str(tmp_path), 1))
    learner.save(str(tmp_path / "saved"))
    written = load_file(tmp_path / "saved" / "model.safetensors")
    second = {f"model.layers.{n}.{name}.weight" for n in (4, 5) for name in ("embed_tokens", "shared_head.head")}
    assert sent.keys() == names and written.keys() == names | second
    assert all(torch.equal(sent[name], written[name]) for name in names)
    assert torch.equal(written["model.layers.5.embed_tokens.weight"], sent["model.embed_tokens.weight"])
    assert torch.equal(written["model.layers.4.shared_head.head.weight"], sent["lm_head.weight"])


def test_beside_an_adapter_heads_stay_as_they_came(folder: Path) -> None:
    adapters = Adapters(lora=Lora(rank=2, alpha=4.0), seed=3)
    before = load_policy(folder, heads=True).named_weights()
    learner = Learner(str(folder), LearnerConfig(), adapters=adapters, heads=True)
    alone = Learner(str(folder), LearnerConfig(), adapters=adapters)
    results = [one.update(packed(samples()), CISPO, lr=1e-2) for one in (learner, alone)]
    assert results[0].grad_norm == results[1].grad_norm > 0 and results[0].batch.predictions is None
    weights = learner.policy.named_weights()
    heads = [name for name in weights if name.startswith("predictors.")]
    assert heads and all(torch.equal(weights[name], before[name]) for name in heads)
    assert not any(".lora_" in name for name in heads)
    sent = learner.policy.to_hf()
    assert torch.equal(sent["model.layers.4.eh_proj.weight"], before["predictors.0.eh_proj.weight"])
    one, other = (made.policy for made in (learner, alone))
    assert one.adapter_config.to_dict() == other.adapter_config.to_dict()  # type: ignore[attr-defined]


def test_the_metrics_are_means_over_predictions() -> None:
    ranks = [Predictions(count=3, loss=6.0, right=1), None, Predictions(count=1, loss=1.0, right=1)]
    assert prediction_metrics(ranks) == {"mtp/loss": 1.75, "mtp/accuracy": 0.5}
    assert prediction_metrics([None]) == prediction_metrics([Predictions(count=0, loss=0.0, right=0)]) == {}


def test_the_memory_plan_counts_heads_but_not_in_a_reference() -> None:
    plain, policy = (shape_of(config_of("deepseek_v3"), heads=heads) for heads in (False, True))
    more = sum(p.numel() for head in heads_of(policy) for p in head.parameters())
    options: dict[str, Any] = {"dtype": "float32", "sharded": False, "reference": True}
    with_heads, without = (rank_memory(one, LearnerConfig(), **options) for one in (policy, plain))
    assert with_heads.weights - without.weights == 4 * more and with_heads.reference == without.reference
    assert with_heads.moments - without.moments == 8 * more
    # A head is one layer more in an engine's cache, of four.
    assert cache_sizes(policy)[0] * 4 == cache_sizes(plain)[0] * 5, "four layers and the head that drafts"
    trunk = [len(unit) for unit in units_of(plain)]
    assert [len(unit) for unit in units_of(policy)] == trunk + [1] * 2 * HEADS
