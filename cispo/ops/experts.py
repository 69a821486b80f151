"""SwiGLU experts of few tokens, without gradient: two or three launches for an engine's decode step.

    x [T, d] --gate, up--> silu(gate) * up [T, k, I] --down--> rows [T, k, d] --weights [T, k]--> mixture [T, d]

`norms.residual_norm` takes rows, and weighs them as it adds them to the residual. Every result that the learner's
experts (`policies.moe.Experts`) round to their dtype is rounded here too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.backend import Backend, choose_backend

FEW_TOKENS = 64
"""As many as the kernels are for."""


def expert_rows(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, chosen: Tensor, backend: Backend | None = None
) -> Tensor:
    """expert[chosen[t, j]](x[t]) for every t and j: [T, k, d].

    x [T, d]; gate_up_proj [E, 2I, d], gate first, and down_proj [E, d, I], of one dtype; chosen [T, k] of any integer
    dtype, distinct in a row. The kernels find an expert's tokens by reading all of `chosen`.
    """
    if choose_backend(backend, x, gate_up_proj, down_proj) == "triton":
        from cispo.ops import experts_triton

        return experts_triton.expert_rows(x, gate_up_proj, down_proj, chosen)
    tokens, k = chosen.shape
    rows, owners = x.repeat_interleave(k, 0), chosen.flatten()
    out = torch.zeros_like(rows)
    for expert in range(len(down_proj)):
        own = owners == expert
        gate, up = F.linear(rows[own], gate_up_proj[expert]).chunk(2, -1)
        out[own] = F.linear(F.silu(gate) * up, down_proj[expert])
    return out.view(tokens, k, x.shape[1])


def weigh_rows(rows: Tensor, weights: Tensor, backend: Backend | None = None) -> Tensor:
    """The mixture [T, d]: the sum of rows [T, k, d] by their weights [T, k], in float32 at least."""
    if choose_backend(backend, rows) == "triton":
        from cispo.ops import experts_triton

        return experts_triton.weigh_rows(rows, weights)
    return (rows * weights[..., None]).sum(1).to(rows.dtype)
