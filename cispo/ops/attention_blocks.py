"""Blocks of causal softmax attention: some queries of a document over some of its keys, merged into the whole.

    partial (o_b, lse_b) per block of keys --merge in float32--> o = sum_b o_b e^{lse_b - lse}, lse = ln sum_b e^{lse_b}
    backward, block by block, with the final o and lse: p = e^{s - lse}, ds = p (do v^T - sum(do o)) scale

A block is `causal`, its last query at its last key, or all of its keys are before all of its queries. Two forms:

    flash      torch's flash attention, bfloat16 and float16 on a GPU
    products   plain products, some queries at a time: every other device and dtype
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores of one product that are alive at a time: 64 MiB of float32.
_SCORES = 1 << 24


class Partial(NamedTuple):
    """Attention over some keys."""

    output: Tensor
    """[n, H, E]; of queries without keys 0."""
    lse: Tensor
    """[H, n] at least float32: the logarithm of the sum of e^score; of queries without keys -inf."""


def merge(first: Partial | None, second: Partial) -> Partial:
    """Attention over the keys of both, at least in float32."""
    if first is None:
        return second
    lse = torch.logaddexp(first.lse, second.lse)
    parts = (p.output.to(lse.dtype) * (p.lse - lse).exp().T[..., None] for p in (first, second))
    return Partial(sum(parts, start=lse.new_zeros(())), lse)


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, flash: bool) -> Partial:
    """q [n, H, D] over k [m, K, D] and v [m, K, E]; n, m > 0, and n <= m where it is `causal`.

    `flash` wants E to be D.
    """
    if flash:
        bounds = _bounds(q), _bounds(k)
        sizes = max(len(q), 2), max(len(k), 2)  # kernels swap heads and queries where there is one
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *bounds, *sizes, 0.0, causal, False, scale=scale
        )
        return Partial(output, lse.reshape(q.shape[1], -1)[:, : len(q)])
    dtype = torch.promote_types(q.dtype, torch.float32)
    outputs, sums = [], []
    for rows, seen in _parts(q, k, causal):
        scores = _scores(q[rows], k[:seen], scale, causal)
        lse = scores.logsumexp(-1)
        probs = (scores - lse[..., None]).exp().flatten(1, 2)
        values = v[:seen].to(dtype).transpose(0, 1)
        outputs.append((probs @ values).unflatten(1, scores.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2))
        sums.append(lse.flatten(0, 1))
    return Partial(torch.cat(outputs), torch.cat(sums, 1))


class Gradients(NamedTuple):
    """Of one block's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor


def block_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Partial, scale: float, *, causal: bool, flash: bool
) -> Gradients:
    """`grad` [n, H, E] is that of the output over all keys, `whole`; of which these are one block."""
    if flash:
        bounds, sizes = (_bounds(q), _bounds(k)), (max(len(q), 2), max(len(k), 2))
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # a random state, of dropout
        return Gradients(
            *torch.ops.aten._flash_attention_backward(
                grad, q, k, v, whole.output, whole.lse.contiguous(), *bounds, *sizes, 0.0, causal, unused, unused,
                scale=scale,
            )
        )  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[1]
    dots = (grad.to(dtype) * whole.output.to(dtype)).sum(-1)
    grad_q = q.new_empty(q.shape, dtype=dtype)
    grad_k, grad_v = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    for rows, seen in _parts(q, k, causal):
        lse = whole.lse[:, rows].unflatten(0, (groups, -1))
        probs = (_scores(q[rows], k[:seen], scale, causal) - lse[..., None]).exp().flatten(1, 2)
        above, asked = _grouped(grad[rows], groups, dtype), _grouped(q[rows], groups, dtype)
        keys, values = (x[:seen].to(dtype).transpose(0, 1) for x in (k, v))
        slopes = above.flatten(1, 2) @ values.mT - _grouped(dots[rows, :, None], groups, dtype).flatten(1, 2)
        slopes = slopes * probs * scale
        grad_q[rows] = (slopes @ keys).unflatten(1, asked.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
        grad_k[:seen] += (slopes.mT @ asked.flatten(1, 2)).transpose(0, 1)
        grad_v[:seen] += (probs.mT @ above.flatten(1, 2)).transpose(0, 1)
    return Gradients(grad_q, grad_k, grad_v)


def _parts(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, int]]:
    """Queries of one product, and the number of keys that the last of them sees."""
    step = max(1, _SCORES // (q.shape[1] * len(k)))
    behind = len(k) - len(q)
    bounds = [(start, min(start + step, len(q))) for start in range(0, len(q), step)]
    return [(slice(start, end), end + behind if causal else len(k)) for start, end in bounds]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """[K, G, n, m]: -inf for keys behind a query, the last query being at the last key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = _grouped(q, k.shape[1], dtype)
    scores = (rows.flatten(1, 2) @ k.to(dtype).permute(1, 2, 0)).unflatten(1, rows.shape[1:3]) * scale
    if causal:
        behind = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu_(len(k) - len(q) + 1)
        scores = scores.masked_fill(behind, -torch.inf)
    return scores


def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[n, H, D] to [K, G, n, D]."""
    return x.to(dtype).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _bounds(x: Tensor) -> Tensor:
    return torch.arange(2, device=x.device, dtype=torch.int32) * len(x)
