"""Lightning attention in vLLM's model of the family: states in slots of its cache.

A step of decodes alone is four launches, norms, gate and SiLU included: a product, the attention, a norm, a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from cispo.ops.lightning import lightning_attention, lightning_decode, lightning_prefill
from cispo.ops.norms import gated_norm
from cispo.policies.minimax.config import LIGHTNING_NORM_EPS, LightningConfig
from cispo.policies.minimax.shares import loader
from cispo.policies.minimax.vllm_states import LightningStates, states_per_holder
from cispo.policies.shares import SummedRMSNorm
from cispo.policies.vllm_ranks import vllm_ranks
from cispo.policies.vllm_slots import Batch


class Step(NamedTuple):
    """Of one step of the engine, the same for all layers."""

    positions: Tensor
    """[T]."""
    batches: list[Batch]
    """The sequences, one entry a holder of states; empty in vLLM's dummy runs."""


class LightningAttention(nn.Module):
    """Lightning attention with its output norm and gate; the state of each sequence lives in vLLM's cache, fp32."""

    def __init__(self, config: LightningConfig, layer: int, states: Sequence[LightningStates], prefix: str) -> None:
        super().__init__()
        self.number, self.place = divmod(sum(config.lightning_layers[:layer]), states_per_holder(config)[1])
        # In a tuple: the holder is the model's, not a part of this layer.
        self.holder = (states[self.number],)
        ranks = vllm_ranks()
        self.heads, self.head_dim = config.num_heads // ranks.count, config.head_dim
        inner = config.num_heads * config.head_dim
        self.sizes = [3 * inner // ranks.count, inner // ranks.count]
        # One product: q, k and v of all heads, then the gate.
        self.qkv_gate_proj = MergedColumnParallelLinear(
            config.hidden_size, [3 * inner, inner], bias=False, prefix=f"{prefix}.qkv_gate_proj"
        )
        self.out_proj = RowParallelLinear(inner, config.hidden_size, bias=False, prefix=f"{prefix}.out_proj")
        if ranks.count == 1:
            self.norm = RMSNorm(inner, eps=LIGHTNING_NORM_EPS)
        else:
            weight = nn.Parameter(torch.ones(inner // ranks.count))
            set_weight_attrs(weight, {"weight_loader": loader(ranks.cut(0))})
            self.norm = SummedRMSNorm(weight, LIGHTNING_NORM_EPS, ranks)
        # Not a buffer: a buffer would be rounded to the model's dtype.
        self.slopes = config.slopes(layer).chunk(ranks.count)[ranks.number].to(self.norm.weight.device)
        self.decay = torch.exp(-self.slopes)[:, None, None]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, d] -> [T, d]; rows beyond the scheduled tokens are padding and come out arbitrary."""
        qkv, gate = self.qkv_gate_proj(x)[0].split(self.sizes, dim=-1)
        qkv = qkv.unflatten(-1, (self.heads, 3 * self.head_dim))
        if step.batches:
            (holder,) = self.holder
            attend = self._attend_by_slot if x.is_cuda else self._attend
            out = attend(qkv, step.batches[self.number], holder.of(self.place))
        else:  # vLLM's dummy runs have no sequences
            out = qkv.new_zeros(len(x), self.heads, self.head_dim)
        out = out.flatten(1).to(x.dtype)
        if x.is_cuda and isinstance(self.norm, RMSNorm):
            return self.out_proj(gated_norm(out, gate, self.norm.weight, LIGHTNING_NORM_EPS))[0]
        return self.out_proj(torch.sigmoid(gate) * self.norm(out))[0]

    def _attend_by_slot(self, qkv: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        """By kernels: one launch for all decodes, one or two for all prefills, states read and written in place.

        qkv [T, H, 3D] before its SiLU, which a step of decodes takes within its launch. A fresh sequence's slot holds
        the state of its last owner: it counts as zero. That includes the padding of a CUDA graph, which has vLLM's
        null block.
        """
        decodes, slots, fresh = batch.decodes, batch.slots, batch.fresh
        if decodes == len(qkv):
            q, k, v = qkv.split(self.head_dim, dim=-1)
            return lightning_decode(q, k, v, self.slopes, cache, slots, fresh, silu=True)
        q, k, v = F.silu(qkv).split(self.head_dim, dim=-1)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            part = slice(decodes)
            out[part] = lightning_decode(q[part], k[part], v[part], self.slopes, cache, slots[part], fresh[part])
        if batch.prefills:
            part, rest = slice(decodes, batch.tokens), slice(decodes, None)
            out[part] = lightning_prefill(
                q[part], k[part], v[part], self.slopes, batch.bounds, cache, slots[rest], fresh[rest]
            )
        return out

    def _attend(self, qkv: Tensor, batch: Batch, states: Tensor) -> Tensor:
        """Attends over every sequence of the step and leaves the new states in the cache."""
        q, k, v = F.silu(qkv).float().split(self.head_dim, dim=-1)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        # One row a state: torch copies rows several times faster than [H, D, D] blocks.
        cache = states.view(len(states), -1)
        decodes, slots = batch.decodes, batch.slots.long()
        # A fresh sequence's slot holds the state of its last owner.
        cache.index_fill_(0, slots[batch.fresh], 0)
        if decodes:
            state = cache.index_select(0, slots[:decodes]).float().view(-1, *states.shape[1:])
            out[:decodes] = _decode(q[:decodes], k[:decodes], v[:decodes], self.decay, state)
            cache.index_copy_(0, slots[:decodes], state.to(cache.dtype).flatten(1))
        if batch.prefills:
            tokens = slice(decodes, batch.tokens)
            state = cache.index_select(0, slots[decodes:]).float().view(-1, *states.shape[1:])
            out[tokens], state = lightning_attention(
                q[tokens], k[tokens], v[tokens], self.slopes, batch.bounds, initial_state=state, output_final_state=True
            )
            assert state is not None
            cache.index_copy_(0, slots[decodes:], state.to(cache.dtype).flatten(1))
        return out


def _decode(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """One token of each sequence: S = decay * S + k^T v in place, o = q S; q, k, v [S, H, D], state [S, H, D, D]."""
    state.mul_(decay).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    return torch.bmm(q.flatten(0, 1).unsqueeze(1), state.flatten(0, 1)).view(q.shape)
