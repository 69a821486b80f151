"""AdamW (arXiv 1711.05101) by torch's fused kernel, without torch's optimizer class: that imports the compiler, a
processor's second and more in each rank, before its first step."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Group(NamedTuple):
    """Parameters with one decay."""

    parameters: Sequence[Parameter]
    weight_decay: float


class FusedAdamW:
    """The numbers of torch.optim.AdamW(fused=True), bit for bit.

    The kernel is one for all tensors on a GPU, and on a CPU one pass over each instead of a dozen.
    """

    def __init__(self, groups: Sequence[Group], *, betas: tuple[float, float], eps: float) -> None:
        self._groups, self._betas, self._eps = groups, betas, eps
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        """Parameter -> step, exp_avg, exp_avg_sq, from its first update on."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of the parameters with a gradient."""
        for group in self._groups:
            kinds: defaultdict[tuple[torch.device, torch.dtype], list[Parameter]] = defaultdict(list)
            for parameter in group.parameters:
                if parameter.grad is not None:
                    kinds[parameter.device, parameter.dtype].append(parameter)
            for parameters in kinds.values():
                self._update(parameters, lr, group.weight_decay)

    def _update(self, parameters: Sequence[Parameter], lr: float, weight_decay: float) -> None:
        """`parameters` are of one device and number format."""
        states = [self._state_of(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        first, second = self._betas
        torch._fused_adamw_(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=lr,
            beta1=first,
            beta2=second,
            weight_decay=weight_decay,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None
