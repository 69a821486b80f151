"""Attention by products against a plain softmax in float64, outputs and gradients: ragged, grouped, shared, blocked."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from cispo.ops.product_attention import product_attention
from cispo.policies import attention
from cispo.policies.attention import Documents, SharedPrompts, causal_attention
from cispo.policies.layers import RMSNorm

# Products of up to 130 keys in float32: a few roundings of 6e-8 each.
FLOAT32 = 2e-6

RAGGED = [5, 0, 1, 130, 64, 65, 0, 17]


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """[T, H, D] by the definition, a document and a head at a time."""
    groups = q.shape[1] // k.shape[1]
    output = q.new_zeros(*q.shape[:2], v.shape[-1])
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[start:end, head // groups].T
            scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            output[start:end, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[start:end, head // groups]
    return output


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def leaves(tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(tokens, count, dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def relative(actual: Tensor, expected: Tensor) -> float:
    assert bool(actual.isfinite().all())
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [RAGGED, [1, 1], [64], [200], [45] * 6])
def test_outputs_and_gradients(lengths: list[int], heads: tuple[int, int]):
    inputs = leaves(sum(lengths), heads, 16, torch.float32)
    weight = torch.randn_like(inputs[0])
    output = causal_attention(inputs[0], inputs[1], inputs[2], Documents(bounds(lengths), sum(lengths)))
    actual = [output, *torch.autograd.grad((output * weight).sum(), inputs)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = plain(exact[0], exact[1], exact[2], lengths)
    expected = [reference, *torch.autograd.grad((reference * weight.double()).sum(), exact)]
    # Of a single key, the gradients of queries and keys are zero.
    compared = 4 if max(lengths) > 1 else 1
    assert max(map(relative, actual[:compared], expected[:compared])) <= FLOAT32


def test_it_is_what_short_documents_get(monkeypatch: pytest.MonkeyPatch):
    """And torch's kernel is what they get where the probabilities would be many; both are the same."""
    inputs = leaves(sum(RAGGED), (6, 2), 16, torch.float64)
    calls = []
    own = attention.product_attention
    monkeypatch.setattr(attention, "product_attention", lambda *args: calls.append(1) or own(*args))
    documents = Documents(bounds(RAGGED), sum(RAGGED))
    results = []
    for room in (attention._KEPT_PROBABILITIES, 0):
        monkeypatch.setattr(attention, "_KEPT_PROBABILITIES", room)
        output = causal_attention(inputs[0], inputs[1], inputs[2], documents, scale=0.3)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert len(calls) == 1
    assert max(map(relative, *results)) <= 1e-13  # float64


def test_gradients_are_those_of_differences():
    lengths = [3, 70, 0, 2]
    inputs = leaves(sum(lengths), (4, 2), 3, torch.float64)
    inputs[2] = torch.randn(75, 2, 5, dtype=torch.float64, requires_grad=True)  # values may be of another size
    padding = Documents(bounds(lengths), sum(lengths)).padding
    attend = functools.partial(product_attention, padding=padding)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("room", [attention._KEPT_PROBABILITIES, 0])
def test_a_prompt_that_is_read_once(room: int, monkeypatch: pytest.MonkeyPatch):
    """Two prompts of 7 and 70 tokens, read by three and two documents: what documents of their own would get."""
    monkeypatch.setattr(attention, "_KEPT_PROBABILITIES", room)
    prompts, readers, own = [7, 70], [0, 1, 0, 0, 1], [5, 3, 0, 80, 9]
    lengths = [prompts[p] + n for p, n in zip(readers, own, strict=True)]
    distinct, reading, first, start, count = [], [], {}, 0, 0
    for prompt, new in zip(readers, own, strict=True):
        if prompt not in first:
            first[prompt] = count
            distinct += range(start, start + prompts[prompt])
            count += prompts[prompt]
        reading += range(first[prompt], first[prompt] + prompts[prompt])
        distinct += range(start + prompts[prompt], start + prompts[prompt] + new)
        reading += range(count, count + new)
        start, count = start + prompts[prompt] + new, count + new
    documents = Documents(bounds(lengths), start)
    shared = SharedPrompts(documents, torch.tensor(distinct), torch.tensor(reading))
    inputs = leaves(count, (4, 2), 8, torch.float64)
    weight = torch.randn_like(inputs[0])
    output = shared.softmax(inputs[0], inputs[1], inputs[2])
    q, k, v = (x[torch.tensor(reading)] for x in inputs)
    expected = plain(q, k, v, lengths)[torch.tensor(distinct)]
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (output, expected)]
    assert relative(output, expected) <= 1e-13
    assert max(map(relative, *gradients)) <= 1e-13


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 8), (1, 1)])
def test_norm(shape: tuple[int, ...]):
    """Ours on a CPU is F.rms_norm, with its gradients, in float32 and float64."""
    torch.manual_seed(0)
    for dtype, bound in ((torch.float32, FLOAT32), (torch.float64, 1e-14)):
        norm = RMSNorm(shape[-1], 1e-5).to(dtype)
        norm.weight.data.normal_()
        x, weight = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=torch.float64)
        exact = [x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()]
        reference = torch.nn.functional.rms_norm(exact[0], exact[1].shape, exact[1], 1e-5)
        output = norm(x)
        actual = [output, *torch.autograd.grad((output * weight).sum(), [x, norm.weight])]
        expected = [reference, *torch.autograd.grad((reference * weight).sum(), exact)]
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative(ours, theirs) <= bound or float((ours - theirs).abs().max()) <= bound
    assert norm(x[:0]).shape == x[:0].shape


def test_norm_of_zeros_has_a_finite_gradient():
    norm = RMSNorm(4, 1e-6)
    x = torch.zeros(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full((2, 4), 1e3))  # 1 / sqrt(eps)
