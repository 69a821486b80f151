"""Routers of the hybrid families: hand-worked numbers, a token at a time in plain Python, and router replay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.policies.moe import MoE, Routed, Router, Routing, ScoreRouter, SharedMoE, replayed
from tests.tiny_policies import assert_close


def route(logits: list[float], routing: Routing, bias: list[float] | None = None) -> Routed:
    """Decisions on one token with these logits."""
    router = ScoreRouter(len(logits), routing)
    with torch.no_grad():
        router.weight.copy_(torch.eye(len(logits)))
        if bias is not None:
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.copy_(torch.tensor(bias))
        return router(torch.tensor([logits]))


def test_softmax_by_hand() -> None:
    """e^2 / (e^2 + e^1) = .731059; without normalisation the softmax over all four: .643914, .236883."""
    routed = route([2.0, 1.0, 0.0, -1.0], Routing(num_experts=4, top_k=2))
    assert routed.chosen.tolist() == [[0, 1]]
    assert_close(routed.weights, torch.tensor([[0.731059, 0.268941]]), 1e-6)
    plain = route([2.0, 1.0, 0.0, -1.0], Routing(num_experts=4, top_k=2, normalised=False))
    assert_close(plain.weights, torch.tensor([[0.643914, 0.236883]]), 1e-6)
    assert_close(plain.probs, routed.probs, 0)


def test_sigmoid_and_correction_by_hand() -> None:
    """The bias decides who is chosen, and is not in the weights: .8808 and .5 of experts 0 and 2."""
    rule = Routing(num_experts=4, top_k=2, scores="sigmoid", corrected=True, scale=2.5)
    routed = route([2.0, 1.0, 0.0, -1.0], rule, [0.0, 0.0, 0.3, 0.5])
    assert routed.chosen.tolist() == [[0, 2]]
    assert_close(routed.weights, torch.tensor([[1.594726, 0.905274]]), 1e-6)
    scores = torch.tensor([0.880797, 0.731059, 0.5, 0.268941])
    assert_close(routed.probs[0], scores / scores.sum(), 1e-6)
    unscaled = route([2.0, 1.0, 0.0, -1.0], Routing(num_experts=4, top_k=2, scores="sigmoid"))
    assert unscaled.chosen.tolist() == [[0, 1]]
    plain = route([2.0, 1.0, 0.0, -1.0], Routing(num_experts=4, top_k=2, scores="sigmoid", normalised=False))
    assert_close(plain.weights, torch.tensor([[0.880797, 0.731059]]), 1e-6)


def test_groups_by_hand() -> None:
    """2 of 4 groups, scored .9527, 1.4420, 1.3124, .2384: expert 0, the best of all, is out."""
    rule = Routing(num_experts=8, top_k=2, scores="sigmoid", groups=4, kept_groups=2)
    routed = route([3.0, -9.0, 1.0, 0.9, 0.8, 0.5, -2.0, -2.0], rule)
    assert routed.chosen.tolist() == [[2, 3]]
    assert_close(routed.weights, torch.tensor([[0.506973, 0.493027]]), 1e-6)


def by_hand(logits: list[float], bias: list[float], rule: Routing) -> dict[int, float]:
    """Weight of each chosen expert, one number at a time."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    ranked = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // rule.groups
    groups = [sum(sorted(ranked[g * size : (g + 1) * size])[-2:]) for g in range(rule.groups)]
    kept = sorted(range(rule.groups), key=lambda g: -groups[g])[: rule.kept_groups]
    among = [e for e in range(len(logits)) if e // size in kept]
    chosen = sorted(among, key=lambda e: -ranked[e])[: rule.top_k]
    total = sum(scores[e] for e in chosen)
    return {e: rule.scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (4, 1), (2, 2)])
def test_random_tokens_equal_plain_python(groups: int, kept: int) -> None:
    """Negative biases too: experts of groups that are out never come back, however low the others rank."""
    rule = Routing(
        num_experts=12, top_k=3, scores="sigmoid", corrected=True, scale=2.446, groups=groups, kept_groups=kept
    )
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(12, generator=generator) * 0.3 - 1.0
    for logits in torch.randn(40, 12, generator=generator) * 2:
        routed = route(logits.tolist(), rule, bias.tolist())
        expected = by_hand(logits.tolist(), bias.tolist(), rule)
        weights = dict(zip(routed.chosen[0].tolist(), routed.weights[0].tolist(), strict=True))
        assert weights.keys() == expected.keys()
        assert all(abs(weights[e] - expected[e]) < 1e-6 for e in expected)


def test_logits_are_float32_in_a_bfloat16_policy() -> None:
    """Two experts whose logits are equal in bfloat16 keep their order."""
    router = ScoreRouter(256, Routing(num_experts=2, top_k=1)).to(torch.bfloat16)
    x = torch.full((1, 256), 1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.fill_(1.0)
        router.weight[1, 0] = 1.0078125
    routed = router(x)
    assert routed.chosen.tolist() == [[1]]
    assert routed.weights.dtype == routed.probs.dtype == torch.float32


def test_underflowed_scores_are_finite() -> None:
    routed = route([-200.0] * 4, Routing(num_experts=4, top_k=2, scores="sigmoid"))
    assert torch.isfinite(routed.weights).all() and torch.isfinite(routed.probs).all()


def mixed(dtype: torch.dtype = torch.float64) -> SharedMoE:
    torch.manual_seed(0)
    rule = Routing(num_experts=6, top_k=2, scores="sigmoid", corrected=True, scale=1.7)
    moe = SharedMoE(8, 6, rule, shared_width=10, shared_gate=True).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert moe.gate.e_score_correction_bias is not None
    moe.gate.e_score_correction_bias.normal_(std=0.2)
    return moe


def test_shared_experts_see_every_token() -> None:
    """A token at a time, one expert after the other, and the gated shared one; with and without the gate."""
    moe = mixed()
    assert moe.shared_experts is not None and moe.shared_expert_gate is not None
    gate = moe.shared_expert_gate.weight
    x = torch.randn(9, 8, dtype=torch.float64)
    mixture, routed = moe(x)
    expected = []
    for t in range(9):
        out = torch.zeros(8, dtype=torch.float64)
        for e, w in zip(routed.chosen[t].tolist(), routed.weights[t], strict=True):
            half, up = (moe.experts.gate_up_proj[e] @ x[t]).chunk(2)
            out = out + w * (moe.experts.down_proj[e] @ (F.silu(half) * up))
        share = torch.sigmoid(gate[0] @ x[t])
        expected.append(out + share * moe.shared_experts(x[t]))
    assert_close(mixture, torch.stack(expected), 1e-12)
    moe.shared_expert_gate = None
    shares = torch.sigmoid(x @ gate.T)
    assert_close(moe(x)[0], torch.stack(expected) + (1 - shares) * moe.shared_experts(x), 1e-12)


def test_correction_bias_is_a_stored_buffer_without_gradient() -> None:
    moe = mixed()
    names = [name for name, _ in moe.named_parameters()]
    assert "gate.e_score_correction_bias" in dict(moe.named_buffers())
    assert "gate.e_score_correction_bias" not in names
    assert "gate.e_score_correction_bias" in moe.state_dict()


def test_replay_takes_rows_and_leaves_others() -> None:
    live = torch.tensor([[0, 1], [2, 3], [4, 5]])
    routes = torch.tensor([[5, 4], [-1, -1], [1, 0]], dtype=torch.int16)
    assert replayed(live, routes).tolist() == [[5, 4], [2, 3], [1, 0]]
    assert replayed(live, routes).dtype == torch.int64
    assert replayed(live, None) is live


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_replayed_weights_are_live_and_reach_the_router(kind: str) -> None:
    """The weights of replayed experts are this pass's scores; the router's gradient equals finite differences."""
    x = torch.randn(5, 8, dtype=torch.float64)
    routes = torch.tensor([[0, 5], [1, 2], [3, 0], [4, 1], [-1, -1]])
    if kind == "softmax":
        torch.manual_seed(1)
        moe: MoE | SharedMoE = MoE(8, 6, 6, 2).double()
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        probs, chosen = moe.gate(x, routes)
        weights = probs.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        moe = mixed()
        routed = moe.gate(x, routes)
        chosen, weights = routed.chosen, routed.weights
        scores = torch.sigmoid(x @ moe.gate.weight.T).gather(-1, chosen)
        assert_close(weights, 1.7 * scores / scores.sum(-1, keepdim=True), 1e-12)
    assert torch.equal(chosen[:4], routes[:4])
    assert isinstance(moe.gate, Router | ScoreRouter)
    target = torch.randn(5, 8, dtype=torch.float64)

    def loss() -> Tensor:
        return (moe(x, routes)[0] * target).sum()

    (gradient,) = torch.autograd.grad(loss(), [moe.gate.weight])
    assert gradient.abs().max() > 0
    with torch.no_grad():
        for place in [(0, 0), (3, 5), (5, 7)]:
            values = []
            for step in (1e-6, -2e-6):
                moe.gate.weight[place] += step
                values.append(float(loss()))
            moe.gate.weight[place] += 1e-6
            assert abs((values[0] - values[1]) / 2e-6 - float(gradient[place])) < 1e-6
