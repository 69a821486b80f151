"""Router, grouped experts and the balance loss, against loops and definitions written here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.policies.moe import (
    Experts,
    MoE,
    Router,
    _Spread,
    aux_loss,
    expert_counts,
    grouped_linear,
    router_aux_loss,
    routing_weights,
)


def experts_by_loop(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one expert at a time."""
    outputs = []
    for t in range(len(x)):
        output = torch.zeros_like(x[t])
        for slot in range(chosen.shape[1]):
            gate_and_up = gate_up[chosen[t, slot]]
            gate, up = gate_and_up[: len(gate_and_up) // 2] @ x[t], gate_and_up[len(gate_and_up) // 2 :] @ x[t]
            output = output + weights[t, slot] * (down[chosen[t, slot]] @ (F.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs) if outputs else torch.zeros_like(x)


def random_experts(dtype: torch.dtype, width: int = 12, count: int = 5) -> Experts:
    torch.manual_seed(0)
    experts = Experts(8, width, count)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


@pytest.mark.parametrize("count", [5, 9])  # of so few, few tokens go through all; of 9 they are sorted by expert
@pytest.mark.parametrize("width", [12, 6, 5])  # grouped_mm takes only the first
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "chosen",
    [
        torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [3, 1], [0, 1], [1, 0]]),  # experts 2 and 4 get nothing
        torch.tensor([[4, 2]]),
        torch.tensor([[2]] * 9),  # one expert gets everything
        torch.randint(0, 5, (33, 3), generator=torch.Generator().manual_seed(0)),  # an expert chosen twice by a token
        torch.zeros(0, 2, dtype=torch.long),
    ],
    ids=["idle experts", "one token", "one expert", "ragged", "no token"],
)
def test_grouped_experts_equal_the_loop(chosen: Tensor, dtype: torch.dtype, width: int, count: int) -> None:
    """Outputs and all gradients; 1e-12 / 1e-5 because only the order of a few sums differs."""
    experts = random_experts(dtype, width, count)
    x = torch.randn(len(chosen), 8, dtype=dtype, requires_grad=True)
    weights = torch.rand(chosen.shape, dtype=dtype, requires_grad=True)
    leaves = [x, weights, experts.gate_up_proj, experts.down_proj]
    target = torch.randn(len(chosen), 8, dtype=dtype)
    results = []
    for output in (
        experts(x, chosen, weights),
        experts_by_loop(x, chosen, weights, experts.gate_up_proj, experts.down_proj),
    ):
        assert output.shape == x.shape
        loss = (output * target).sum() + 0 * x.sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([output, *(torch.zeros(()) if g is None else g for g in gradients)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for grouped, looped in zip(*results, strict=True):
        assert torch.isfinite(grouped).all()
        torch.testing.assert_close(grouped, looped.to(dtype).expand_as(grouped), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [[1, 0, 7, 3], [0, 0, 0, 5], [13, 17, 1, 2]])
def test_grouped_linear_in_bfloat16_and_float32(counts: list[int]) -> None:
    """Group sizes that are no multiple of anything: no row is padded, dropped or given another expert's weight."""
    torch.manual_seed(0)
    x, weight = torch.randn(sum(counts), 24), torch.randn(4, 40, 24)
    expected = torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)])
    ends = torch.tensor(counts).cumsum(0).int()
    actual = grouped_linear(x, weight, ends)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    coarse = grouped_linear(x.bfloat16(), weight.bfloat16(), ends)
    assert coarse.dtype == torch.bfloat16
    # Three roundings to 8 bits of values near 5.
    torch.testing.assert_close(coarse.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("k", [1, 3])
def test_rows_of_experts_have_the_gradient_of_index_select(k: int) -> None:
    """The form for GPUs, in float64: `_Spread` against torch's own operation, exactly equal but for sums of k rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(17, 5, dtype=torch.float64, generator=generator).requires_grad_()
    order = torch.randperm(17 * k, generator=generator)
    weights = torch.randn(17 * k, 5, dtype=torch.float64, generator=generator)
    expected = x.index_select(0, order // k)
    found = _Spread.apply(x, order, order.argsort(), k)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (exact,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, exact, rtol=1e-15, atol=1e-15)


def test_a_plain_sum_of_the_output_has_a_gradient() -> None:
    """The gradient of .sum() has stride 0, which grouped_mm refuses if it reaches it."""
    experts = random_experts(torch.float32)
    x = torch.randn(7, 8, requires_grad=True)
    experts(x, torch.tensor([[0, 1]] * 7), torch.full((7, 2), 0.5)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_router_chooses_the_most_probable_and_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    router = Router(8, 6, 3)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, 8)
    probs, chosen = router(x)
    expected = torch.softmax(x @ router.weight.T, -1)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(chosen, expected.argsort(-1, descending=True)[:, :3])
    weights = routing_weights(probs, chosen)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    kept = probs.gather(1, chosen)
    torch.testing.assert_close(weights[:, 0] / weights[:, 1], kept[:, 0] / kept[:, 1])
    half = router.bfloat16()(x.bfloat16())[0]
    assert half.dtype == torch.float32, "the softmax over experts is float32 whatever the activations"


def test_replayed_routes_reach_the_router() -> None:
    """Experts that another forward pass chose: the router learns from them, the unchosen ones included."""
    torch.manual_seed(0)
    moe = MoE(8, 6, 5, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(10, 8)
    probs, chosen = moe.gate(x)
    other = (chosen + 1) % 5
    output = moe.experts(x, other, routing_weights(probs, other))
    output.pow(2).sum().backward()
    assert moe.gate.weight.grad is not None and moe.gate.weight.grad.abs().min() > 0


def switch_loss(probs: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """E * sum_e f_e P_e by counting, from the definition."""
    kept = [t for t in range(len(mask)) if mask[t]]
    experts = probs.shape[1]
    total = probs.new_zeros(())
    for e in range(experts):
        share = sum(int((chosen[t] == e).sum()) for t in kept) / len(kept)
        total = total + share * torch.stack([probs[t, e] for t in kept]).mean()
    return experts * total


def routed(tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs = logits.softmax(-1)
    return probs, probs.topk(top_k).indices


def test_aux_loss_is_the_definition_and_top_k_when_balanced() -> None:
    probs, chosen = routed(40, 6, 3, 0)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.7
    ours = aux_loss(probs, mask, expert_counts(chosen, mask, 6), float(mask.sum()))
    torch.testing.assert_close(ours, switch_loss(probs, chosen, mask), rtol=1e-6, atol=0)

    even = torch.full((8, 4), 0.25)
    turns = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1)
    everything = torch.ones(8, dtype=torch.bool)
    balanced = aux_loss(even, everything, expert_counts(turns, everything, 4), 8.0)
    assert balanced.item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("parts", [[40], [10, 30], [1, 38, 1], [20, 0, 20]])
def test_shares_of_micro_batches_add_up(parts: list[int]) -> None:
    """Value and gradient of the whole batch, for any split of it; a share with no counted token is zero."""
    layers = [routed(40, 6, 2, seed) for seed in range(3)]
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0] = False
    total = float(mask.sum())

    def run(sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
        leaves = [probs.clone().requires_grad_() for probs, _ in layers]
        masks = mask.split(sizes)
        counts = [
            torch.stack([expert_counts(c, m, 6) for c, m in zip(chosen.split(sizes), masks, strict=True)]).sum(0)
            for _, chosen in layers
        ]
        shares = [
            router_aux_loss([leaf.split(sizes)[i] for leaf in leaves], part, counts, total)
            for i, part in enumerate(masks)
        ]
        loss = torch.stack(shares).sum()
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    (loss, gradients), (split_loss, split_gradients) = run([40]), run(parts)
    expected = torch.stack([switch_loss(probs, chosen, mask) for probs, chosen in layers]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=0)
    assert len(gradients) == len(split_gradients) == 3
    for whole, split in zip(gradients, split_gradients, strict=True):
        assert torch.isfinite(whole).all() and whole.abs().max() > 0
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=0)


def test_masked_positions_do_not_matter() -> None:
    probs, chosen = routed(20, 4, 2, 0)
    mask = torch.arange(20) >= 5
    counts = expert_counts(chosen, mask, 4)
    clean = aux_loss(probs, mask, counts, 15.0)
    spoilt = probs.clone()
    spoilt[:5] = float("nan")
    spoilt.requires_grad_()
    elsewhere = chosen.clone()
    elsewhere[:5] = 3
    assert torch.equal(expert_counts(elsewhere, mask, 4), counts)
    loss = aux_loss(spoilt, mask, counts, 15.0)
    assert torch.equal(loss, clean)
    loss.backward()
    assert spoilt.grad is not None
    assert torch.equal(spoilt.grad[:5], torch.zeros(5, 4, dtype=torch.float64))
    assert torch.isfinite(spoilt.grad).all()
