"""The gated delta rule by the kernels of flash-linear-attention: bfloat16 on a GPU, forward and backward."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

# Triton versions that compile fla's gated backward kernel to wrong gradients on Hopper: fla 0.6 refuses to run there.
_WRONG_ON_HOPPER = (3, 4, 0), (3, 7, 1)


@cache
def has_backward(device: torch.device) -> bool:
    """Whether the gradient of a decay a head can be had here."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return True
    first, fixed = _WRONG_ON_HOPPER
    return not first <= tuple(int(part) for part in version("triton").split("+")[0].split(".")[:3]) < fixed


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`delta.delta_rule`: q and k in v's dtype, decays, beta and states in float32; at least one token."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
    from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]

    run = chunk_kda if g.ndim == 3 else chunk_gated_delta_rule
    with torch.autocast(v.device.type, enabled=False):
        output, final = run(
            q[None].to(v.dtype),
            k[None].to(v.dtype),
            v[None],
            g[None].float(),
            beta[None].float(),
            scale=1.0,
            initial_state=None if initial_state is None else initial_state.float(),
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    return output[0], final
