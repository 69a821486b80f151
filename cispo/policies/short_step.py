"""A decode step in few operations: its type, and the norm that the families' steps share.

A policy of a million parameters waits for Python and for torch's overhead per operation. A short step is the arithmetic
of the policy's modules in float32, and on a GPU with their roundings in any dtype; it works on their own parameters, so
that an update in place is seen at once; each row is a sequence of its own. `tests/test_torch_sampler.py` holds each
against its modules. A policy without one steps through `Policy.attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.policies.attention import Attention
from cispo.policies.layers import RMSNorm
from cispo.policies.policy import PolicyOutput

ShortStep = Callable[[Tensor, Tensor, Attention], PolicyOutput]
"""(tokens [n] int64, positions [n] int64, attention) to the outputs of `Policy.attend`."""


class Norm(NamedTuple):
    """Weight and eps of an RMSNorm."""

    weight: Tensor
    eps: Tensor
    """A scalar on the host, so that it is added in the operation that squares and divides."""


def norm_of(module: nn.Module) -> Norm:
    assert isinstance(module, RMSNorm)
    return Norm(module.weight, torch.tensor(module.eps, device="cpu"))


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """`layers.RMSNorm` for a few rows: on a CPU F.rms_norm is a dozen operations.

    The weight may have a row for each of the vectors of x, [n, heads, d].
    """
    if x.is_cuda and norm.weight.ndim == 1:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps.item())
    if x.is_cuda:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), x.shape[-1:], None, norm.eps.item()) * norm.weight.to(wide)).to(x.dtype)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(norm.eps, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(norm.weight)
