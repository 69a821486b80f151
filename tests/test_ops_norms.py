"""RMSNorm joined with its neighbours: the plain form against the learner's layers, the kernels against float64.

    TRITON_INTERPRET=1 python -m pytest tests/test_ops_norms.py

In bfloat16, on a GPU, the kernels and the learner's own operations differ in the last bit of few elements.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from cispo.ops.norms import gated_norm, residual_norm
from cispo.policies.layers import RMSNorm

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = GPU or os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5
FACTORS = [(1.0, 1.0), (3.5565588200778455, 1.0), (0.7, 1.3)]
SHAPES = [(5, 64), (3, 100), (1, 1), (0, 48), (2, 1000)]
"""Rows and sizes; powers of two and others."""

needs_kernels = pytest.mark.skipif(not KERNELS, reason="the kernels need a GPU, or TRITON_INTERPRET=1")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def learners(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS).to(weight)
    norm.weight.data.copy_(weight)
    return norm


@torch.no_grad()
def learners_residual_norm(x: Tensor, y: Tensor, weight: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """As `minimax.model.Layer` computes it."""
    total = torch.add(beta * y, x, alpha=alpha)
    return total, learners(weight)(total)


@torch.no_grad()
def learners_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """As `minimax.model.LightningAttention` computes it."""
    return torch.sigmoid(gate) * learners(weight)(x)


def assert_last_bit(ours: Tensor, learner: Tensor) -> None:
    """Equal but for few elements, which are one rounding of bfloat16 off: two of a product's factors, at most."""
    assert ours.dtype == learner.dtype == torch.bfloat16 and ours.shape == learner.shape
    torch.testing.assert_close(ours, learner, rtol=2**-6, atol=1e-30)
    assert (ours != learner).float().mean() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_the_plain_form_is_the_learners(factors: tuple[float, float], dtype: torch.dtype) -> None:
    x, y, weight = (random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(7, 96), (7, 96), (96,)]))
    alpha, beta = factors
    ours = residual_norm(x, y, weight, EPS, alpha=alpha, beta=beta, backend="torch")
    relative, absolute = (2**-7, 0.0) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for mine, learner in zip(ours, learners_residual_norm(x, y, weight, alpha, beta), strict=True):
        torch.testing.assert_close(mine, learner, rtol=relative, atol=absolute)
    mine = gated_norm(x, y, weight, EPS, backend="torch")
    torch.testing.assert_close(mine, learners_gated_norm(x, y, weight), rtol=relative, atol=absolute)


@needs_kernels
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_kernels_equal_the_definition(rows: int, size: int, factors: tuple[float, float]) -> None:
    alpha, beta = factors
    x, y, weight = random(rows, size), random(rows, size, seed=1) * 4, random(size, seed=2)
    exact = x.double(), y.double(), weight.double()
    ours = residual_norm(x, y, weight, EPS, alpha=alpha, beta=beta, backend="triton")
    for mine, wanted in zip(ours, residual_norm(*exact, EPS, alpha=alpha, beta=beta), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gated_norm(x, y, weight, EPS, backend="triton").double(), gated_norm(*exact, EPS), rtol=2e-6, atol=2e-6
    )


@needs_kernels
def test_kernels_read_parts_of_a_joint_projection() -> None:
    """Rows between NaN: neither the neighbours in memory nor another row's NaN reaches a result."""
    joint, weight = random(6, 200), random(48, seed=2)
    joint[:, :20], joint[:, 68:100], joint[:, 148:], joint[3] = (torch.nan,) * 4
    x, gate = joint[:, 20:68], joint[:, 100:148]
    rows = [0, 1, 2, 4, 5]
    wanted = gated_norm(x[rows].contiguous(), gate[rows].contiguous(), weight, EPS, backend="torch")
    torch.testing.assert_close(gated_norm(x, gate, weight, EPS, backend="triton")[rows], wanted)
    ours = residual_norm(x, gate, weight, EPS, alpha=0.5, backend="triton")
    for mine, theirs in zip(ours, residual_norm(x, gate, weight, EPS, alpha=0.5, backend="torch"), strict=True):
        torch.testing.assert_close(mine[rows], theirs[rows])
        assert mine.is_contiguous() and mine[3].isnan().all()


@needs_kernels
def test_rows_of_any_size_stay_finite() -> None:
    """A row of zeros, gates that saturate, squares that end in float32's last digits."""
    x, weight = torch.zeros(3, 40, device=DEVICE), torch.ones(40, device=DEVICE)
    x[1], x[2] = 1e15, 1e-15
    gate = torch.tensor([100.0, -100.0], device=DEVICE).repeat(3, 20)
    out = gated_norm(x, gate, weight, EPS, backend="triton")
    torch.testing.assert_close(out, gated_norm(x, gate, weight, EPS, backend="torch"))
    assert out.isfinite().all() and not out[0].any() and not out[:, 1].any()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("size", [512, 2048, 6144])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_bfloat16_is_rounded_where_the_learner_rounds(factors: tuple[float, float], size: int) -> None:
    alpha, beta = factors
    x, y, weight = (random(*s, dtype=torch.bfloat16, seed=n) for n, s in enumerate([(33, size), (33, size), (size,)]))
    ours = residual_norm(x, y, weight, EPS, alpha=alpha, beta=beta)
    for mine, learner in zip(ours, learners_residual_norm(x, y, weight, alpha, beta), strict=True):
        assert_last_bit(mine, learner)
    assert_last_bit(gated_norm(x, y, weight, EPS), learners_gated_norm(x, y, weight))
