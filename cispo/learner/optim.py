"""AdamW on float32 master weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter


def learning_rate(
    step: float,
    *,
    steps: int,
    peak: float,
    warmup: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    final_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up to peak, then to final_ratio * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    fall = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1 - final_ratio) * fall)


class Optimizer:
    """AdamW with decay on matrices only, whose step is skipped where a gradient is not finite.

    Gradients are collected in float32 over micro-batches. Weights of a lower precision are copies of float32 masters:
    a learning rate of 1e-6 is far below the spacing of bfloat16 numbers and would change nothing.
    """

    def __init__(
        self, parameters: Sequence[Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() > 1]
        others = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps)

    def reload_masters(self) -> None:
        """Takes the weights that were put into the parameters from outside."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    master.copy_(parameter)

    def collect(self) -> None:
        """Adds the gradients of one backward pass to the masters'."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Every master's gradient, zeros where a parameter had no part in the loss."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters if m.grad is not None]

    def step(self, lr: float, *, max_grad_norm: float) -> tuple[float, bool]:
        """One update; returns the gradient norm before clipping and whether the step was taken."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        taken = math.isfinite(norm)
        if taken:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if parameter is not master:
                        parameter.copy_(master)
        self.adam.zero_grad(set_to_none=True)
        return norm, taken
