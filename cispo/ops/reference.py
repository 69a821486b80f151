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


def delta_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule one token at a time, in the dtype given; decay first, output after the update.

    S <- Diag(exp g) S ; u = beta (v - S^T k) ; S <- S + k u^T ; o = S^T q. q, k [T, G, K], head h of v [T, H, V] has
    the keys of head h // (H / G); g [T, H] or [T, H, K]; beta [T, H]; states [S, H, K, V], zero where `initial_state`
    is None. Returns the outputs [T, H, V] and the state after the last token of each document.
    Sources: arXiv 2412.06464 (gated DeltaNet), equation 10; arXiv 2510.26692 (Kimi Linear), equation 1.
    """
    _, heads, value = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    bounds = cu_seqlens.tolist()
    decay = torch.exp(g if g.ndim == 3 else g[..., None])[..., None]
    outputs, states = [], []
    for document, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = v.new_zeros(heads, k.shape[-1], value) if initial_state is None else initial_state[document].to(v.dtype)
        for t in range(start, end):
            state = decay[t] * state
            update = beta[t, :, None] * (v[t] - (k[t, :, :, None] * state).sum(1))
            state = state + k[t, :, :, None] * update[:, None, :]
            outputs.append((q[t, :, :, None] * state).sum(1))
        states.append(state)
    output = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return output, torch.stack(states) if states else v.new_zeros(0, heads, k.shape[-1], value)


def convolution_recurrence(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu of the causal convolution of each channel one token at a time, in the dtype given.

    x [T, C]; weight [C, W], the newest token's tap last; states [S, W - 1, C]: the inputs before the first token,
    oldest first. Returns the outputs [T, C] and the last W - 1 inputs of each document.
    """
    width, channels = weight.shape[1], x.shape[1]
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for document, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = x.new_zeros(width - 1, channels) if initial_state is None else initial_state[document].to(x.dtype)
        for t in range(start, end):
            window = torch.cat((state, x[t : t + 1]))
            total = (window * weight.t()).sum(0)
            outputs.append(total * torch.sigmoid(total))
            state = window[1:]
        states.append(state)
    output = torch.stack(outputs) if outputs else torch.zeros_like(x)
    return output, torch.stack(states) if states else x.new_zeros(0, width - 1, channels)
