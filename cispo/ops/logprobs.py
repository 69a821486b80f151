"""LM head, log-probability and entropy in one differentiable op that never holds [T, V].

    token_logprobs     logprobs, entropy  -> any loss -> backward computes each chunk's logits again   4 products
    fused_token_loss   logprobs, entropy, loss and both gradients while a chunk's logits are alive     3 products

Rows are handled in chunks. The head runs in float32 for every dtype of the policy (float64 for float64 inputs): a
bfloat16 head kept MiniMax-M1's reward from growing (arXiv 2506.13585, section 3.2), and upcasting bfloat16 logits is
not the same. It works from the weight matrix, so tied and untied heads take the same path.

On a GPU the products read bfloat16 operands where hidden and weight both are; logits, sums and softmax stay float32,
and float32 operands are multiplied in float32, never in TF32. Everywhere else the operands are converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cispo.ops.autograd import Context
from cispo.ops.backend import Backend, choose_backend

if TYPE_CHECKING:
    from cispo.ops.logprobs_triton import TritonHead

_CHUNK_ELEMENTS = 1 << 23

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(logprobs [n], entropy [n] without gradient, slice of these rows) -> the loss of each row, [n], or its sum."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and entropy of softmax(hidden @ weight.T / temperature).

    hidden [N, d] and weight [V, d] of any float dtype, targets [N] int64. Returns logprobs [N], differentiable with
    respect to hidden and weight, and entropy [N] in nats, without gradient; both float32 (float64 for float64 inputs).
    """
    head = _head_type(hidden, weight, backend)
    rows = chunk_rows or head.chunk_rows(len(hidden), weight)
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, rows, head)  # type: ignore[return-value]


def fused_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a per-token loss of `token_logprobs`' log-probabilities, in a single pass.

    `loss` is called once a chunk, in order, and its gradient with respect to the log-probabilities is taken at once. It
    must depend on the rows it gets alone, so a loss of whole sequences (GSPO's ratio) needs `token_logprobs`. Returns
    the loss, differentiable with respect to hidden and weight, once; logprobs [N] and entropy [N], without gradient.
    """
    head = _head_type(hidden, weight, backend)
    rows = chunk_rows or head.chunk_rows(len(hidden), weight)
    return _FusedLoss.apply(hidden, weight, targets, loss, temperature, rows, head)  # type: ignore[return-value]


@torch.no_grad()
def best_tokens(hidden: Tensor, weight: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """[N] int64: the token of the highest logit of each row, of equal ones the first; arguments as `token_logprobs`."""
    half = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    wide = weight if half else weight.to(exact)
    best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    for part in _parts(hidden, chunk_rows or TorchHead.chunk_rows(len(hidden), weight)):
        rows = hidden[part]
        # Sums of products of bfloat16 are float32, as in the head itself.
        logits = torch.mm(rows, wide.T, out_dtype=exact) if half else rows.to(exact) @ wide.T
        best[part] = logits.argmax(-1)
    return best


def _head_type(hidden: Tensor, weight: Tensor, backend: Backend | None) -> type[TorchHead] | type[TritonHead]:
    if choose_backend(backend, hidden, weight) == "torch":
        return TorchHead
    from cispo.ops.logprobs_triton import TritonHead

    return TritonHead


class TorchHead:
    """The head on chunks of rows, in float32 or float64: `forward`, then `gradients` of the same rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.weight = weight.to(self.dtype)
        self.grad_weight: Tensor | None = None
        self.probs = hidden.new_empty(0)

    @staticmethod
    def chunk_rows(rows: int, weight: Tensor) -> int:
        return max(1, _CHUNK_ELEMENTS // weight.shape[0])

    def forward(self, part: slice, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and log-sum-exp of the rows; with `keep` the probabilities stay for `gradients`."""
        logits = (self.hidden[part].to(self.dtype) @ self.weight.T) / self.temperature
        normaliser = torch.logsumexp(logits, -1)
        logprobs = logits.gather(1, self.targets[part, None])[:, 0] - normaliser
        probs = torch.exp(logits - normaliser[:, None])
        entropy = normaliser - (probs * logits).sum(-1)
        if keep:
            self.probs = probs
        return logprobs, entropy, normaliser

    def recall(self, part: slice, normaliser: Tensor) -> None:
        """Prepares `gradients` of the rows from their log-sum-exp."""
        logits = (self.hidden[part].to(self.dtype) @ self.weight.T) / self.temperature
        self.probs = torch.exp(logits - normaliser[:, None])

    def gradients(self, part: slice, grad: Tensor, hidden: bool, weight: bool) -> Tensor | None:
        """d hidden of the rows, given d logprobs, if `hidden`; adds to `grad_weight` if `weight`."""
        grad_logits = self.probs.neg_()
        grad_logits.scatter_add_(1, self.targets[part, None], torch.ones_like(grad_logits[:, :1]))
        grad_logits *= (grad / self.temperature)[:, None]
        if weight:
            if self.grad_weight is None:
                self.grad_weight = torch.zeros_like(self.weight)
            self.grad_weight.addmm_(grad_logits.T, self.hidden[part].to(self.dtype))
        return (grad_logits @ self.weight).to(self.hidden.dtype) if hidden else None

    @staticmethod
    def scale_(gradient: Tensor, factor: Tensor) -> None:
        gradient.mul_(factor)


class _LogprobsContext(Context, Protocol):
    temperature: float
    rows: int
    head_type: type[TorchHead]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LogprobsContext,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        rows: int,
        head_type: type[TorchHead],
    ) -> tuple[Tensor, Tensor]:
        head = head_type(hidden, weight, targets, temperature)
        logprobs, entropy, normaliser = _results(hidden)
        for part in _parts(hidden, rows):
            logprobs[part], entropy[part], normaliser[part] = head.forward(part)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature, ctx.rows, ctx.head_type = temperature, rows, head_type
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: _LogprobsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        head = ctx.head_type(hidden, weight, targets, ctx.temperature)
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        for part in _parts(hidden, ctx.rows):
            head.recall(part, normaliser[part])
            rows = head.gradients(part, grads[0][part], *needed)
            if grad_hidden is not None and rows is not None:
                grad_hidden[part] = rows
        return grad_hidden, _weight_gradient(head, weight) if needed[1] else None, None, None, None, None


class _LossContext(Context, Protocol):
    head_type: type[TorchHead]
    gradients: tuple[Tensor | None, Tensor | None] | None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LossContext,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: TokenLoss,
        temperature: float,
        rows: int,
        head_type: type[TorchHead],
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head = head_type(hidden, weight, targets, temperature)
        logprobs, entropy, _ = _results(hidden)
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        total = logprobs.new_zeros(())
        for part in _parts(hidden, rows):
            logprobs[part], entropy[part], _ = head.forward(part, keep=any(needed))
            with torch.enable_grad():
                leaf = logprobs[part].clone().requires_grad_(any(needed))
                value = loss(leaf, entropy[part], part).sum()
            total += value.detach()
            if any(needed):
                (grad,) = torch.autograd.grad(value, leaf)
                new = head.gradients(part, grad, *needed)
                if grad_hidden is not None and new is not None:
                    grad_hidden[part] = new
        ctx.head_type = head_type
        ctx.gradients = grad_hidden, _weight_gradient(head, weight) if needed[1] else None
        ctx.mark_non_differentiable(logprobs, entropy)
        return total, logprobs, entropy

    @staticmethod
    def backward(ctx: _LossContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of a fused loss can be taken once"
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                # In place: the weight's is too large to hold twice.
                ctx.head_type.scale_(gradient, grads[0])
        return *gradients, None, None, None, None, None


def _results(hidden: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised log-probability, entropy and log-sum-exp of every row."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty(3, len(hidden), dtype=exact, device=hidden.device).unbind()


def _parts(hidden: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))


def _weight_gradient(head: TorchHead, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if head.grad_weight is None else head.grad_weight.to(weight.dtype)
