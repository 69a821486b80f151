"""Which implementation of an operation runs: the one dispatch point, and the one that tests override."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]


def choose_backend(named: Backend | None, *tensors: Tensor) -> Backend:
    """`named` if there is one; else Triton where all tensors are bfloat16 or float32 on a GPU, and torch elsewhere.

    Triton is imported by whoever uses it, so that a machine without a GPU does without it.
    """
    if named is not None:
        return named
    suited = all(x.is_cuda and x.dtype in (torch.bfloat16, torch.float32) for x in tensors)
    return "triton" if suited else "torch"
