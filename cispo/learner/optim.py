"""AdamW on float32 master weights, and the learning-rate schedule."""

# pyright: reportPrivateImportUsage=false
# torch documents its operations on lists of tensors (_foreach_*) though their names begin with an underscore.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from cispo.errors import UserError


def learning_rate(
    step: float,
    *,
    steps: int,
    peak: float,
    warmup: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    final_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up to peak, then decay to final_ratio * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1 - final_ratio) * remaining)


class Optimizer:
    """AdamW with weight decay on matrices only; a step with a gradient that is not finite is skipped.

    Gradients are summed in float32 over micro-batches. Weights of a lower precision are copies of float32 masters: a
    learning rate of 1e-6 is far below the spacing of bfloat16 numbers and would change nothing.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """`parameters` are (name, parameter) pairs; the state is saved under the names."""
        named = list(parameters)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        exact = (torch.float32, torch.float64)
        self.masters = [p if p.dtype in exact else Parameter(p.detach().float()) for p in self.parameters]
        self.copies = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        """(weight of a lower precision, its master)."""
        matrices = [m for m in self.masters if m.dim() > 1]
        others = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Fused is one kernel for all tensors on a GPU, and on a CPU one pass over each instead of a dozen.
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Copies the parameters into their masters, after new weights were loaded into the parameters."""
        if self.copies:
            torch._foreach_copy_([m for _, m in self.copies], [p for p, _ in self.copies])

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and float32 masters under "parameter/entry": copies on the CPU.

        A parameter without an update has no moments yet.
        """
        found: dict[str, Tensor] = {}
        copied = {id(m) for _, m in self.copies}
        for name, master in zip(self.names, self.masters, strict=True):
            found |= {f"{name}/{entry}": value for entry, value in self.adam.state[master].items()}
            if id(master) in copied:
                found[f"{name}/master"] = master
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets moments, step counts and masters from a result of `state`. Raises UserError for other parameters'."""
        masters = dict(zip(self.names, self.masters, strict=True))
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name not in masters or (entry != "step" and value.shape != masters[name].shape):
                raise UserError(f"the checkpoint's optimizer has {key} {list(value.shape)}, which this policy has not")
            master = masters[name]
            if entry == "master":
                master.copy_(value)
            else:
                self.adam.state[master][entry] = value.to(master.device, copy=True)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of one backward pass to the masters'."""
        sums, addends = [], []
        for parameter, master in self.copies:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                sums.append(master.grad)
                addends.append(parameter.grad)
            parameter.grad = None
        if sums:
            torch._foreach_add_(sums, addends)

    def gradients(self) -> list[Tensor]:
        """Every master's gradient; zeros where the loss does not depend on the parameter."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters if m.grad is not None]

    def step(self, lr: float, *, max_grad_norm: float) -> tuple[float, bool]:
        """One update; returns the gradient norm before clipping and whether the step was taken.

        Only the norm is read from the device.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        taken = math.isfinite(norm)
        if taken:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            if self.copies:
                with torch.no_grad():
                    torch._foreach_copy_([p for p, _ in self.copies], [m for _, m in self.copies])
        self.adam.zero_grad(set_to_none=True)
        return norm, taken
