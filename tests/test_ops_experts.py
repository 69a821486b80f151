"""Experts of few tokens: the plain form against the learner's experts, the kernels against float64.

    TRITON_INTERPRET=1 python -m pytest tests/test_ops_experts.py

In bfloat16, on a GPU, the kernels and the learner's own products differ in the order of their sums.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from cispo.ops.experts import expert_rows, weigh_rows
from cispo.ops.norms import residual_norm
from cispo.policies.expert_tiles import ExpertShape, ExpertTiles, expert_tiles
from cispo.policies.moe import Experts

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_kernels = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels need a GPU, or TRITON_INTERPRET=1"
)


def case(
    tokens: int, hidden: int, width: int, experts: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Experts, Tensor, Tensor]:
    """x, experts, and choices and weights of each token; the last expert is nobody's where there are enough others."""
    generator = torch.Generator().manual_seed(tokens)
    module = Experts(hidden, width, experts).requires_grad_(False)
    module.gate_up_proj.copy_(torch.randn(module.gate_up_proj.shape, generator=generator) * hidden**-0.5)
    module.down_proj.copy_(torch.randn(module.down_proj.shape, generator=generator) * width**-0.5)
    scores = torch.rand(tokens, experts, generator=generator)
    if experts > k:
        scores[:, -1] = 0
    weights, chosen = scores.topk(k, dim=-1)
    x = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    return x, module.to(DEVICE, dtype), chosen.to(DEVICE), (weights / weights.sum(-1, keepdim=True)).to(DEVICE)


CASES = [
    (1, 32, 16, 4, 2),
    (5, 48, 40, 8, 2),
    (23, 64, 24, 3, 1),
    (40, 16, 72, 2, 2),
    (7, 72, 8, 5, 3),
    (0, 16, 16, 4, 2),
]
"""Tokens, sizes of the model and of an expert, experts, and how many a token has: one, several and no block of rows."""


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_weighted_rows_are_the_learners_experts(shape: tuple[int, int, int, int, int]) -> None:
    x, experts, chosen, weights = case(*shape)
    rows = expert_rows(x, experts.gate_up_proj, experts.down_proj, chosen, backend="torch")
    mixture = weigh_rows(rows, weights, backend="torch")
    torch.testing.assert_close(mixture, experts(x, chosen, weights), rtol=1e-5, atol=1e-5)
    # As a layer adds them to its residual.
    residual, norm = torch.ones_like(x), torch.ones_like(x[0] if len(x) else x.new_empty(x.shape[1]))
    total, _ = residual_norm(residual, rows, norm, 1e-6, alpha=2.0, beta=0.5, shares=weights, backend="torch")
    torch.testing.assert_close(total, 2 + 0.5 * mixture, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_kernels_equal_the_definition(shape: tuple[int, int, int, int, int]) -> None:
    x, experts, chosen, weights = case(*shape)
    exact = expert_rows(x.double(), experts.gate_up_proj.double(), experts.down_proj.double(), chosen)
    for choices in (chosen, chosen.int()):
        rows = expert_rows(x, experts.gate_up_proj, experts.down_proj, choices, backend="triton")
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-5)
    mixture = weigh_rows(rows, weights, backend="triton")
    torch.testing.assert_close(mixture.double(), weigh_rows(exact, weights.double()), rtol=1e-5, atol=1e-5)
    norm = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = residual_norm(x, rows, norm, 1e-5, alpha=2.0, beta=0.5, shares=weights, backend="triton")
    wanted = residual_norm(x.double(), exact, norm.double(), 1e-5, alpha=2.0, beta=0.5, shares=weights.double())
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_an_expert_of_all_tokens_takes_them_in_blocks() -> None:
    """Tiles are sized for an even load; the last of the three blocks is not full."""
    x, experts, chosen, _ = case(41, 32, 24, 8, 1)
    for favourite in (0, 7):
        chosen[:] = favourite
        exact = expert_rows(x.double(), experts.gate_up_proj.double(), experts.down_proj.double(), chosen)
        rows = expert_rows(x, experts.gate_up_proj, experts.down_proj, chosen, backend="triton")
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_kernels_read_only_the_rows_of_their_expert() -> None:
    """NaN in a token, and in an expert that no other token has, stays there."""
    x, experts, chosen, _ = case(9, 32, 24, 6, 2)
    x[4] = torch.nan
    experts.gate_up_proj[-1] = torch.nan
    experts.down_proj[-1] = torch.nan
    rows = expert_rows(x, experts.gate_up_proj, experts.down_proj, chosen, backend="triton")
    assert rows[4].isnan().all() and rows[:4].isfinite().all() and rows[5:].isfinite().all()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
@pytest.mark.parametrize(
    ("hidden", "width", "experts", "k"), [(2048, 1408, 8, 2), (512, 256, 8, 2), (1024, 512, 64, 8)]
)
def test_bfloat16_rows_are_the_learners(hidden: int, width: int, experts: int, k: int, tokens: int) -> None:
    x, module, chosen, weights = case(tokens, hidden, width, experts, k, torch.bfloat16)
    rows = expert_rows(x, module.gate_up_proj, module.down_proj, chosen)
    residual, norm = torch.zeros_like(x), torch.ones_like(x[0])
    total, _ = residual_norm(residual, rows, norm, 1e-6, shares=weights)
    mixture = weigh_rows(rows, weights)
    learner = module(x, chosen, weights)
    exact = Experts(hidden, width, experts).to(DEVICE).double()
    exact.gate_up_proj, exact.down_proj = (torch.nn.Parameter(w.double()) for w in module.parameters())
    with torch.no_grad():
        wanted = exact(x.double(), chosen, weights.double())
    errors = [float((found.double() - wanted).norm() / wanted.norm()) for found in (total, mixture, learner)]
    # Four roundings to bfloat16 on either side.
    assert max(errors[:2]) <= 1.1 * errors[2] <= 1e-2, errors


@pytest.mark.parametrize(
    ("card", "tokens", "tiles"),
    [
        ("NVIDIA H200", 512, ExpertTiles(128, 128, 64, 8, 3)),
        ("NVIDIA H200", 257, ExpertTiles(128, 128, 64, 8, 3)),
        ("NVIDIA H200", 256, None),
        ("NVIDIA H200", 513, None),
        ("another card", 512, None),
    ],
)
def test_tiles_are_those_found_near_a_number_of_tokens(card: str, tokens: int, tiles: ExpertTiles | None) -> None:
    """At 128 tokens of this shape vLLM's own choice was as good as any."""
    assert expert_tiles(card, ExpertShape(8, 2048, 1408, 2), tokens) == tiles
    assert expert_tiles(card, ExpertShape(16, 2048, 1408, 2), tokens) is None
