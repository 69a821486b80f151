"""AdamW (arXiv 1711.05101) by torch's function, without its optimizer class: that imports the compiler, a processor's
second and more in each rank, before its first step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw


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
            parameters = [parameter for parameter in group.parameters if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            first, second = self._betas
            adamw(
                list[Tensor](parameters),
                [parameter.grad for parameter in parameters if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                lr=lr,
                beta1=first,
                beta2=second,
                weight_decay=group.weight_decay,
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
