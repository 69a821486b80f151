"""Reference implementations: the definitions that the fast operations are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_attention_recurrence(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lightning attention one token at a time, in the dtype given: S <- exp(-s) S + k^T v ; o = q S.

    q, k, v [T, H, D]; slopes [H]; cu_seqlens [S + 1]; states [S, H, D, D], zero where `initial_state` is None.
    Returns the outputs [T, H, D] and the state after the last token of each document.
    Source: arXiv 2501.08313 (MiniMax-01), section 2.2.1; no scale, no normaliser.
    """
    _, heads, dim = q.shape
    bounds = cu_seqlens.tolist()
    decay = torch.exp(-slopes.to(q.dtype))[:, None, None]
    outputs, states = [], []
    for document, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = q.new_zeros(heads, dim, dim) if initial_state is None else initial_state[document].to(q.dtype)
        for t in range(start, end):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append((q[t, :, None, :] @ state).squeeze(1))
        states.append(state)
    output = torch.stack(outputs) if outputs else torch.zeros_like(q)
    return output, torch.stack(states) if states else q.new_zeros(0, heads, dim, dim)
