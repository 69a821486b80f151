"""LM head, log-probability and entropy in one differentiable op that never holds [T, V].

Rows are handled in chunks: a chunk's logits live only while its log-sum-exp is taken, and are computed again in the
backward pass. The head runs in float32 whatever the policy's dtype (float64 for float64 inputs): a bfloat16 head is
what kept MiniMax-M1's reward from growing (arXiv 2506.13585, section 3.2), and upcasting bfloat16 logits is not the
same thing. It works from the weight matrix, so tied and untied heads take the same path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and entropy of its distribution, softmax(hidden @ weight.T / temperature).

    hidden [N, d] and weight [V, d] of any float dtype, targets [N] int64. Returns logprobs [N], differentiable with
    respect to hidden and weight, and entropy [N] in nats, without gradient; both float32 (float64 for float64 inputs).
    """
    rows = chunk_rows or max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, rows)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        exact = _head_dtype(hidden)
        head = weight.to(exact)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=exact)
        entropy, normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden[part].to(exact) @ head.T) / temperature
            normaliser[part] = torch.logsumexp(logits, -1)
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - normaliser[part]
            probs = torch.exp(logits - normaliser[part, None])
            entropy[part] = normaliser[part] - (probs * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad = grads[0]
        exact = _head_dtype(hidden)
        head = weight.to(exact)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            rows = hidden[part].to(exact)
            grad_logits = -torch.exp((rows @ head.T) / ctx.temperature - normaliser[part, None])
            grad_logits.scatter_add_(1, targets[part, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits *= (grad[part] / ctx.temperature)[:, None]
            grad_hidden[part] = (grad_logits @ head).to(hidden.dtype)
            grad_head.addmm_(grad_logits.T, rows)
        return grad_hidden, grad_head.to(weight.dtype), None, None, None


def _head_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
