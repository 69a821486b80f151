"""The context of a torch.autograd.Function, with types: torch declares no attribute of it usably."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """`ctx` of `forward` and `backward`; a function that keeps more than tensors extends it by its attributes."""

    saved_tensors: tuple[Tensor, ...]
    """Those of `save_for_backward`, None where None was saved."""
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...
