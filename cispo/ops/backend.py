"""The choice between implementations of an operation: the one dispatch point, and the one that tests override."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]


def choose_backend(named: Backend | None, *tensors: Tensor) -> Backend:
    """`named` if there is one; else Triton where all tensors are bfloat16 or float32 on a GPU, and torch elsewhere.

    Callers import Triton themselves, where it is chosen: a machine without a GPU may lack it.
    """
    if named is not None:
        return named
    suited = all(x.is_cuda and x.dtype in (torch.bfloat16, torch.float32) for x in tensors)
    return "triton" if suited else "torch"
