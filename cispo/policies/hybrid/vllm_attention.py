"""The attention of one step of vLLM's engine, as a policy's layers call it.

    softmax    -> vLLM's Attention over paged keys and values, heads padded with zeros to one size
    latents    -> `LatentAttention` over a row of latents a token; softmax where keys and values are no more than that
    recurrent  -> states in slots: decodes (one token each) first, then the prefills, each from the state it left

A step of decodes alone reads nothing back to the host and has shapes that depend on the batch size only, so a CUDA
graph can hold it. In vLLM's dummy runs there are no sequences and recurrences give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from cispo.ops.convolution import CONVOLUTION, convolve_decode, convolve_prefill
from cispo.ops.delta import DELTA, delta_decode, delta_prefill
from cispo.ops.expansion import Expansion
from cispo.ops.lightning import LIGHTNING, lightning_decode, lightning_prefill
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.slots import read_states, write_states
from cispo.ops.sparse_attention import Index
from cispo.policies.hybrid.vllm_latents import LatentAttention
from cispo.policies.hybrid.vllm_plan import Plan
from cispo.policies.hybrid.vllm_states import StateHolder
from cispo.policies.vllm_slots import Batch, batches_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotKernels:
    """Kernels for a GPU that read and write states in their slots."""

    decode: Callable[..., Tensor]
    """(*inputs, cache [N, ...], slots [S], fresh [S]) -> outputs; one launch that a CUDA graph can hold."""
    prefill: Callable[..., Tensor]
    """(*inputs, cu_seqlens [S + 1], cache, slots, fresh) -> outputs."""


SLOT_KERNELS: dict[RecurrentOp, SlotKernels] = {
    CONVOLUTION: SlotKernels(decode=convolve_decode, prefill=convolve_prefill),
    DELTA: SlotKernels(decode=delta_decode, prefill=delta_prefill),
    LIGHTNING: SlotKernels(decode=lightning_decode, prefill=lightning_prefill),
}


class PagedAttention:
    """`Attention` over vLLM's caches, for one forward pass."""

    def __init__(
        self, plan: Plan, layers: Sequence[Attention | LatentAttention], holders: Sequence[StateHolder]
    ) -> None:
        self.plan, self.layers, self.holders = plan, layers, holders
        self._batches = batches_of(holders)
        self._softmax = self._recurrent = 0

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        layer, call = self.layers[self._softmax], self.plan.softmax[self._softmax]
        self._softmax += 1
        padded = (F.pad(x, (0, call.head_size - x.shape[-1])).flatten(1) for x in (q, k, v))
        return layer(*padded).view(len(q), call.heads, call.head_size)[..., : call.value_dim]

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        # No context is longer than the keys that are selected (`check_context`): all of them are.
        return self.softmax(q, k, v, scale)

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        # With an index as in `sparse_softmax`. The layer has the scale from the plan.
        if not self.plan.keeps_latents:
            return self.softmax(q, *expand(*latents), scale)
        layer = self.layers[self._softmax]
        self._softmax += 1
        return layer(q, latents, expand)

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        call, place = self.plan.recurrent[self._recurrent], self.plan.places[self._recurrent]
        self._recurrent += 1
        rows, x = len(inputs[0]), inputs[0]
        if not self._batches:
            return torch.zeros(rows, *call.output, dtype=call.dtype, device=x.device)
        batch = self._batches[place.holder]
        cache = self.holders[place.holder].rows(place).view(-1, *place.shape)
        if batch.decodes == rows:
            return _decode(op, inputs, cache, batch)
        out = torch.zeros(rows, *call.output, dtype=call.dtype, device=x.device)
        if batch.decodes:
            out[: batch.decodes] = _decode(op, _rows(op, inputs, slice(batch.decodes)), cache, batch)
        if batch.prefills:
            tokens = slice(batch.decodes, batch.tokens)
            out[tokens] = _prefill(op, _rows(op, inputs, tokens), cache, batch)
        return out


def _rows(op: RecurrentOp, inputs: Sequence[Tensor], tokens: slice) -> list[Tensor]:
    return [x[tokens] if i < op.token_inputs else x for i, x in enumerate(inputs)]


def _decode(op: RecurrentOp, inputs: Sequence[Tensor], cache: Tensor, batch: Batch) -> Tensor:
    """One token of each of the batch's decodes; cache [N, ...] in place."""
    slots, fresh = batch.slots[: batch.decodes], batch.fresh[: batch.decodes]
    kernels = SLOT_KERNELS.get(op)
    if cache.is_cuda and kernels is not None:
        return kernels.decode(*inputs, cache, slots, fresh)
    # Padding may have a negative slot; vLLM's null block, number 0, is no sequence's.
    slots = slots.long().clamp(min=0)
    states = read_states(cache, slots, fresh)
    out = op.step(*inputs, states)
    write_states(cache, slots, states)
    return out


def _prefill(op: RecurrentOp, inputs: Sequence[Tensor], cache: Tensor, batch: Batch) -> Tensor:
    """The tokens of the batch's prefills; cache [N, ...] in place."""
    slots, fresh = batch.slots[batch.decodes :], batch.fresh[batch.decodes :]
    kernels = SLOT_KERNELS.get(op)
    if cache.is_cuda and kernels is not None:
        return kernels.prefill(*inputs, batch.bounds, cache, slots, fresh)
    slots = slots.long()
    states = read_states(cache, slots, fresh)
    out, states = op.packed(*inputs, batch.bounds, initial_state=states, output_final_state=True)
    assert states is not None
    write_states(cache, slots, states)
    return out
