"""Any policy as a model of vLLM: the learner's own forward pass, with attention over vLLM's caches.

    PolicyForCausalLM -> Policy.attend(tokens, positions, PagedAttention) -> hidden -> logits in float32

Weights have the policy's own names and are copied in place. In bfloat16 on a GPU, vLLM's fused kernel multiplies with
the experts' own two weights. With tensor parallelism each worker has a share of the policy (`shares`). Where drafts of
its heads are asked for, the policy has these too, and `vllm_heads` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from cispo.policies.hybrid.shares import build_share
from cispo.policies.hybrid.vllm_attention import PagedAttention
from cispo.policies.hybrid.vllm_config import PolicyConfig
from cispo.policies.hybrid.vllm_latents import LatentAttention
from cispo.policies.hybrid.vllm_plan import Plan, SoftmaxCall, plan_of
from cispo.policies.hybrid.vllm_states import StateHolder
from cispo.policies.moe import Experts
from cispo.policies.policy import HFConfig, Policy
from cispo.policies.replay import route_buffer
from cispo.policies.vllm_experts import run_experts
from cispo.policies.vllm_plugin import drafts_by_heads
from cispo.policies.vllm_ranks import vllm_ranks

TARGET = "policy"
"""Name of the model in vLLM's table of its layers, from which a model of drafts takes it."""


class FusedExperts(Experts):
    """Experts of a policy, with the same two parameters, by vLLM's kernel where it suits."""

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if not x.is_cuda or x.dtype != torch.bfloat16:
            return super().forward(x, chosen, weights)
        return run_experts(x, self.gate_up_proj, self.down_proj, weights.float(), chosen.to(torch.int32))


class PolicyForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The model that vLLM loads for every family without a model of its own in vLLM."""

    # Read by vLLM's loader, first match wins: a folder may hold other safetensors beside the model's.
    allow_patterns_overrides = ["model*.safetensors", "*.safetensors", "*.bin"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model, ranks = vllm_config.model_config, vllm_ranks()
        heads = drafts_by_heads(vllm_config)
        self.plan = _plan(model, ranks.count, heads=heads)
        self.share = build_share(*_source(model), model.dtype, ranks, heads=heads)
        self.policy = self.share.policy
        self.policy.requires_grad_(False)
        _fuse_experts(self.policy)
        self.route_buffer = route_buffer(self.policy, vllm_config)
        # vLLM reads a layer's number from its name.
        names = [f"model.layers.{i}" for i in range(len(self.plan.softmax) + self.plan.holders)]
        self.attention = nn.ModuleList(
            softmax_layer(self.plan, call, vllm_config, f"{name}.attention")
            for call, name in zip(self.plan.softmax, names, strict=False)
        )
        self.holders = nn.ModuleList(
            StateHolder(self.plan, vllm_config, f"{name}.states") for name in names[len(self.plan.softmax) :]
        )
        if heads:
            vllm_config.compilation_config.static_forward_context[TARGET] = self

    @property
    def model(self) -> nn.Module:
        """Where vLLM looks for the embedding that a model of drafts shares."""
        return self.policy

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T, d]; `forward` takes tokens and embeds them itself."""
        return self.policy.get_submodule("embed_tokens")(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, d] after the final norm."""
        assert input_ids is not None
        layers = cast(Sequence[Attention | LatentAttention], self.attention)
        holders = cast(Sequence[StateHolder], self.holders)
        attention = PagedAttention(self.plan, layers, holders)
        return self.policy.attend(input_ids, positions, attention).hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[n, V] float32, as the learner computes them: products of bfloat16 operands are summed in float32."""
        weight = self.policy.lm_head_weight
        if hidden_states.is_cuda and hidden_states.dtype == weight.dtype == torch.bfloat16:
            return torch.mm(hidden_states, weight.t(), out_dtype=torch.float32)
        return F.linear(hidden_states.float(), weight.float())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies weights in place and returns the names of the tensors that it filled, as this module names them.

        Raises UserError on a name that the policy does not have.
        """
        return {f"policy.{name}" for name in self.share.load(weights)}

    @classmethod
    def count_cached_states(cls, model: ModelConfig) -> int:
        """State layers as vLLM's cache counts them, with any number of ranks."""
        return _plan(model, 1).holders

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...]]:
        return ((_plan(vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size).slot_floats,),)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable, ...]:
        """One state a slot, copied whole."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()


def _source(model: ModelConfig) -> tuple[HFConfig, Path]:
    """The policy's config.json and its folder."""
    config = model.hf_config
    assert isinstance(config, PolicyConfig)
    return config.content, Path(model.model)


def _plan(model: ModelConfig, ranks: int, *, heads: bool = False) -> Plan:
    return plan_of(*_source(model), model.dtype, ranks, heads=heads)


def softmax_layer(plan: Plan, call: SoftmaxCall, config: VllmConfig, prefix: str) -> Attention | LatentAttention:
    """The layer of one softmax call. vLLM reads its number from `prefix`, model.layers.<number>.attention."""
    heads, size = plan.cached_heads
    assert size == config.model_config.get_head_size(), "the config is that of other ranks (`cached_heads`)"
    if plan.keeps_latents:
        return LatentAttention(call, size, config, prefix)
    cache = config.cache_config
    return Attention(call.heads, size, call.scale, num_kv_heads=heads, cache_config=cache, prefix=prefix)


def _fuse_experts(policy: Policy) -> None:
    """Replaces all experts; parameters and their names stay."""
    for parent in list(policy.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Experts:
                setattr(parent, name, FusedExperts(child))
