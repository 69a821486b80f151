"""The critic: values beside the tokens they precede, one gradient for any micro-batches, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cispo.batch.packing import pack, unpack
from cispo.learner.critic import Critic
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import Sample
from cispo.weights.publish import publish_weights
from tests.test_learner import DENSE, TINY, samples


@pytest.fixture(scope="module", params=[TINY, {"model_type": "qwen3", **DENSE}], ids=["lightning", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("critic")
    save_policy(init_policy(request.param, seed=0), made)
    return str(made)


def critic_of(folder: str, value_clip: float = 10.0) -> Critic:
    critic = Critic(folder, CriticConfig(value_clip=value_clip), LearnerConfig())
    with torch.no_grad():  # a new head gives 0 everywhere
        critic.model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return critic


def with_targets(critic: Critic, given: list[Sample]) -> list[Sample]:
    """Samples with the critic's values and learnable returns: the share of the completion still to come."""
    batches = pack(given, reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    rows = unpack(batches, [critic.values(mbs) for mbs in batches], len(given))
    targets = [s.loss_mask.flip(0).cumsum(0).flip(0) / s.loss_mask.sum() * s.loss_mask for s in given]
    return [replace(s, values=v, returns=g) for s, v, g in zip(given, rows, targets, strict=True)]


def test_a_value_is_of_the_state_before_its_token(folder: str):
    """The value at a token must not change with that token or any after it, and must with the one before."""
    critic = critic_of(folder)
    (first, *_) = samples(1)
    position = int(first.loss_mask.nonzero()[0])

    def value(tokens: torch.Tensor) -> float:
        batches = pack([replace(first, token_ids=tokens)], reduction="token", max_tokens=16, tokens_per_micro_batch=60)
        return float(unpack(batches, [critic.values(mbs) for mbs in batches], 1)[0][position])

    same, other = first.token_ids.clone(), first.token_ids.clone()
    same[position:] = (same[position:] + 1) % 40
    other[position - 1] = (other[position - 1] + 1) % 40
    assert value(same) == value(first.token_ids) != value(other)


def test_a_new_critic_predicts_zero(folder: str):
    critic = Critic(folder, CriticConfig(), LearnerConfig())
    (mbs,) = pack(samples(), reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    assert all(bool((v == 0).all()) for v in critic.values(mbs))


def test_one_gradient_for_any_micro_batches(folder: str):
    grads = []
    for budget in (10_000, 40):
        critic = critic_of(folder)
        (mbs,) = pack(with_targets(critic, samples()), reduction="token", max_tokens=16, tokens_per_micro_batch=budget)
        parameters = [p.detach().clone() for p in critic.model.parameters()]
        result = critic.update(mbs, lr=1e-2)
        assert result.taken and result.grad_norm > 0
        grads.append((result.loss, result.grad_norm))
        assert any(not torch.equal(a, b) for a, b in zip(parameters, critic.model.parameters(), strict=True))
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


def test_the_critic_learns(folder: str):
    """Returns that depend on the position: most of their variance is explained after a few dozen steps."""
    critic = Critic(folder, CriticConfig(value_clip=100.0), LearnerConfig())
    (mbs,) = pack(with_targets(critic, samples()), reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    losses = [critic.update(mbs, lr=1e-2).loss for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]


def test_values_beyond_the_clip_stop(folder: str):
    """With a tiny clip the values may not run from the batch's old ones: the loss stops falling."""
    critic = critic_of(folder, value_clip=1e-4)
    (mbs,) = pack(with_targets(critic, samples()), reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    losses = [critic.update(mbs, lr=1e-3).loss for _ in range(10)]
    assert losses[-1] > 0.9 * losses[0]


def test_the_backbone_starts_from_published_weights(folder: str, tmp_path: Path):
    critic = critic_of(folder)
    policy = load_policy(folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    critic.load_backbone(str(publish_weights(policy.to_hf(), tmp_path, 1)))
    ours, theirs = critic.model.backbone.to_hf(), policy.to_hf()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
