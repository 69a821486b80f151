"""The LM head in chunks against the plain formula on the whole [N, V], values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cispo.ops.logprobs import fused_token_loss, token_logprobs


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 24, generator=generator, dtype=torch.float64) * 0.3
    targets = torch.randint(50, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, grad


@pytest.mark.parametrize("rows", [0, 1, 7, 33])
@pytest.mark.parametrize("chunk_rows", [1, 8, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
# float64: summation order only. float32: the same at 2^-24 with sums of 50 terms.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_plain_formula(
    rows: int, chunk_rows: int | None, temperature: float, dtype: torch.dtype, tolerance: float
):
    hidden, weight, targets, grad = case(rows, dtype)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_rows=chunk_rows)
    got = torch.autograd.grad((logprobs * grad.to(dtype)).sum(), (hidden, weight))
    exact_hidden, exact_weight, *_ = case(rows, torch.float64)
    exact, exact_entropy = plain(exact_hidden, exact_weight, targets, temperature)
    expected = torch.autograd.grad((exact * grad).sum(), (exact_hidden, exact_weight))
    assert logprobs.dtype == dtype and not entropy.requires_grad
    for ours, reference in zip((logprobs, entropy, *got), (exact, exact_entropy, *expected), strict=True):
        assert bool(ours.isfinite().all())
        assert torch.allclose(ours.double(), reference, rtol=tolerance, atol=tolerance * 10)


def test_bfloat16_policy_has_a_float32_head():
    """Logits of bfloat16 states and weights are computed in float32, not rounded to bfloat16 and upcast."""
    hidden, weight, targets, _ = case(33, torch.float32)
    hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    logprobs, _ = token_logprobs(hidden, weight, targets)
    exact, _ = plain(hidden.double(), weight.double(), targets, 1.0)
    assert logprobs.dtype == torch.float32
    # 1e-5 is far below the 1e-2 that a bfloat16 matmul would give.
    assert float((logprobs.double() - exact).detach().abs().max()) < 1e-5
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_tied_head_gradient_adds_to_the_embedding():
    """One matrix as embedding and head gets the sum of both gradients."""
    table = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens, targets = torch.tensor([3, 4, 5]), torch.tensor([4, 5, 6])
    logprobs, _ = token_logprobs(table[tokens].tanh(), table, targets)
    (got,) = torch.autograd.grad(logprobs.sum(), table)
    exact, _ = plain(table[tokens].tanh(), table, targets, 1.0)
    (expected,) = torch.autograd.grad(exact.sum(), table)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """PPO's loss: what a token gets depends on its own log-probability, as in every token-level algorithm."""
    ratio = torch.exp(logprobs - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


@pytest.mark.parametrize("rows", [0, 1, 7, 33])
@pytest.mark.parametrize("chunk_rows", [1, 8, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_loss_equals_the_loss_of_token_logprobs(
    rows: int, chunk_rows: int | None, dtype: torch.dtype, tolerance: float
):
    hidden, weight, targets, advantages = case(rows, dtype)
    advantages = advantages.to(dtype)
    expected_logprobs, expected_entropy = token_logprobs(hidden, weight, targets, temperature=0.7)
    old = expected_logprobs.detach() + 0.3 * torch.sin(torch.arange(rows))
    expected_loss = clipped(expected_logprobs, old, advantages).sum()
    expected = torch.autograd.grad(3 * expected_loss, (hidden, weight))
    seen = []

    def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        seen.append(range(rows)[part])
        assert logprobs.shape == entropy.shape == advantages[part].shape and not entropy.requires_grad
        return clipped(logprobs, old[part], advantages[part])

    total, logprobs, entropy = fused_token_loss(hidden, weight, targets, loss, temperature=0.7, chunk_rows=chunk_rows)
    got = torch.autograd.grad(3 * total, (hidden, weight))
    assert [i for part in seen for i in part] == list(range(rows))
    assert not logprobs.requires_grad and not entropy.requires_grad
    pairs = [(total, expected_loss), (logprobs, expected_logprobs), (entropy, expected_entropy)]
    for ours, theirs in [*pairs, *zip(got, expected, strict=True)]:
        assert bool(ours.isfinite().all())
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * 10)


def test_fused_loss_without_gradients_and_with_one_of_them():
    """Evaluation asks for none, a frozen head for the hidden states' only."""
    hidden, weight, targets, _ = case(20, torch.float64)
    with torch.no_grad():
        loss, logprobs, _ = fused_token_loss(hidden, weight, targets, lambda x, *_: -x)
    assert not loss.requires_grad and torch.equal(loss, -logprobs.sum())
    loss, *_ = fused_token_loss(hidden, weight, targets, lambda x, *_: -x)
    both = torch.autograd.grad(loss, (hidden, weight))
    for hidden_needed in (True, False):
        leaves = hidden.detach().requires_grad_(hidden_needed), weight.detach().requires_grad_(not hidden_needed)
        loss, *_ = fused_token_loss(*leaves, targets, lambda x, *_: -x)
        (grad,) = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
        assert torch.equal(grad, both[0 if hidden_needed else 1])
