"""The vLLM model of the MiniMax-01 family: lightning and softmax attention layers with a mixture of experts.

    LightningForCausalLM -> LightningLayer x L -> LightningAttention | SoftmaxAttention, MoE

Both conventions come from `LightningConfig`, as in the learner's policy. vLLM sees a hybrid model: a softmax layer owns
paged keys and values, a lightning layer one [H, D, D] state a sequence. A step of the engine is a flat [T] batch with
the decodes (one token each) first and the prefills after them. A step of decodes alone reads nothing back to the host
and has shapes that depend on the batch size only, so a CUDA graph can hold it.

Router and experts are the learner's own `MoE`; in bfloat16 on a GPU, kernels multiply with the same two weights, ours
for few tokens and vLLM's fused one for more. vLLM's own layer would pack them when they are loaded, and an update would
silently read as garbage.

Tensor parallel: each rank has its share of the heads, of every expert's width and of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.utils import set_weight_attrs

from cispo.errors import UserError
from cispo.ops.experts import FEW_TOKENS, expert_rows
from cispo.ops.norms import residual_norm
from cispo.policies.layers import SwiGLU
from cispo.policies.minimax.config import LightningConfig, parse_config, shared_size_of_weights
from cispo.policies.minimax.names import place_of, vllm_target
from cispo.policies.minimax.shares import check_shares, loader
from cispo.policies.minimax.vllm_lightning import LightningAttention, Step
from cispo.policies.minimax.vllm_states import LightningStates, state_dtype, state_shape, states_per_holder
from cispo.policies.moe import MoE
from cispo.policies.replay import RouteBuffer, route_buffer
from cispo.policies.vllm_experts import run_experts
from cispo.policies.vllm_ranks import vllm_ranks
from cispo.policies.vllm_slots import batches_of


def resolve_config(model: ModelConfig) -> LightningConfig:
    """The policy's shape and conventions; a local folder's weights give the shared expert's width."""
    return parse_config(model.hf_config.to_dict(), shared_size=shared_size_of_weights(Path(model.model)))


class SoftmaxAttention(nn.Module):
    """Grouped-query attention over vLLM's paged cache; rotary embedding on the first `rotary_dim` of each head."""

    def __init__(self, config: LightningConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads = heads // ranks, max(kv_heads // ranks, 1)
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        # The table covers the engine's context, not M1's ten million positions.
        self.rotary_emb = get_rope(
            head_dim,
            max_position=vllm_config.model_config.max_model_len,
            rope_parameters={"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_dim / head_dim},
        )
        self.attn = Attention(
            heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [T, d] -> [T, d]."""
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, dim=-1)
        q, k = self.rotary_emb(step.positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class LightningLayer(nn.Module):
    """Attention and experts with scaled residuals; the residual branches off after the norm (postnorm) or before it."""

    def __init__(
        self,
        config: LightningConfig,
        vllm_config: VllmConfig,
        layer: int,
        states: Sequence[LightningStates],
        prefix: str,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        if config.lightning_layers[layer]:
            self.self_attn = LightningAttention(config, layer, states, f"{prefix}.self_attn")
        else:
            self.self_attn = SoftmaxAttention(config, vllm_config, f"{prefix}.self_attn")
        self.ranks = vllm_ranks()
        width = config.intermediate_size // self.ranks.count
        self.mlp = MoE(hidden, width, config.num_experts, config.experts_per_token)
        experts, halves, inputs = self.mlp.experts, self.ranks.cut(1, blocks=(1, 1)), self.ranks.cut(2)
        set_weight_attrs(experts.gate_up_proj, {"weight_loader": loader(halves)})
        set_weight_attrs(experts.down_proj, {"weight_loader": loader(inputs)})
        self.shared_mlp = self.coefficient = None
        if config.shared_size:
            self.shared_mlp = SwiGLU(hidden, config.shared_size // self.ranks.count)
            for name, parameter in self.shared_mlp.named_parameters():
                axis = 1 if name.startswith("down") else 0
                set_weight_attrs(parameter, {"weight_loader": loader(self.ranks.cut(axis))})
            self.coefficient = nn.Linear(hidden, 1, bias=False)
        self.input_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.postnorm = config.postnorm
        self.attention_factors = config.attention_factors(layer)
        self.mlp_factors = config.mlp_alpha, config.mlp_beta
        self.route_buffer: RouteBuffer | None = None

    def forward(self, x: Tensor, normed: Tensor, step: Step, following: RMSNorm) -> tuple[Tensor, Tensor]:
        """x and `input_layernorm` of it, [T, d], to the layer's output and the `following` norm of that."""
        branch = self.self_attn(normed, step)
        x, normed = self._residual(x, normed, branch, self.attention_factors, self.post_attention_layernorm)
        branch, shares = self._experts(normed)
        return self._residual(x, normed, branch, self.mlp_factors, following, shares)

    def _residual(
        self,
        x: Tensor,
        normed: Tensor,
        branch: Tensor,
        factors: tuple[float, float],
        norm: RMSNorm,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        (alpha, beta), residual = factors, normed if self.postnorm else x
        if x.is_cuda:
            return residual_norm(
                residual, branch, norm.weight, norm.variance_epsilon, alpha=alpha, beta=beta, shares=shares
            )
        # On a CPU vLLM's norm is one operation, the plain form of `residual_norm` five.
        total = torch.add(branch if beta == 1 else beta * branch, residual, alpha=alpha)
        return total, norm(total)

    def _experts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mixture [T, d] and None, or rows [T, k, d] and their shares [T, k]."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            # The learner's arithmetic, which takes it eight launches: logits are float32 sums of bfloat16 products.
            logits = torch.mm(x, self.mlp.gate.weight.t(), out_dtype=torch.float32)
            weights, chosen, _ = fused_topk(x, logits, self.mlp.gate.top_k, renormalize=True)
            if self.route_buffer is not None:
                self.route_buffer.leave(self.mlp.gate, chosen)
            if len(x) <= FEW_TOKENS and self.ranks.count == 1 and self.shared_mlp is None:
                return expert_rows(x, self.mlp.experts.gate_up_proj, self.mlp.experts.down_proj, chosen), weights
            out = run_experts(x, self.mlp.experts.gate_up_proj, self.mlp.experts.down_proj, weights, chosen)
        else:
            out, _, _ = self.mlp(x)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = torch.sigmoid(F.linear(x.float(), self.coefficient.weight.float())).to(x.dtype)
            out = out * (1 - share) + self.shared_mlp(x) * share
        return out if self.ranks.count == 1 else self.ranks.sum(out), None


class LightningModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LightningConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        holders, each = states_per_holder(config)
        lightning = [layer for layer, kind in enumerate(config.lightning_layers) if kind]
        # Named by the first of its layers: vLLM reads a layer's number from its name.
        names = [f"{prefix}.layers.{lightning[holder * each]}.states" for holder in range(holders)]
        self.states = nn.ModuleList(LightningStates(config, vllm_config, name) for name in names)
        states = cast(Sequence[LightningStates], self.states)
        self.layers = nn.ModuleList(
            LightningLayer(config, vllm_config, i, states, f"{prefix}.layers.{i}") for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        layers, states = cast(Sequence[LightningLayer], self.layers), cast(Sequence[LightningStates], self.states)
        step = Step(positions, batches_of(states))
        normed = layers[0].input_layernorm(x)
        # Each layer ends with the norm behind it: a sum and its norm are one kernel.
        for layer, norm in zip(layers, [*(layer.input_layernorm for layer in layers[1:]), self.norm], strict=True):
            x, normed = layer(x, normed, step, norm)
        return normed


class LightningForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The model that vLLM loads for the architectures of the family (`families.FAMILIES`)."""

    # Read by vLLM's loader, first match wins: a folder may hold other safetensors beside the model's.
    allow_patterns_overrides = ["model*.safetensors", "*.safetensors", "*.bin"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = resolve_config(vllm_config.model_config)
        check_shares(config, vllm_ranks())
        self.model = LightningModel(config, vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.requires_grad_(False)
        self.route_buffer = route_buffer(self, vllm_config)
        for layer in cast(Sequence[LightningLayer], self.model.layers):
            layer.route_buffer = self.route_buffer

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, d] after the final norm."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies weights of either dialect in place and returns the names of the parameters that it filled.

        Raises UserError on a name that this policy does not have.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, weight in weights:
            place = place_of(name)
            if place is None:
                continue
            target, part = vllm_target(place)
            if target == "lm_head.weight" and target not in parameters:
                continue  # a tied head arrives with the embedding
            if target not in parameters:
                raise UserError(f"the weights hold {name!r}, which the lightning policy of this config does not have")
            load: Callable[..., None] = getattr(parameters[target], "weight_loader", default_weight_loader)
            load(parameters[target], weight, *part)
            loaded.add(target)
        return loaded

    @classmethod
    def count_cached_states(cls, model: ModelConfig) -> int:
        """State layers as vLLM's cache counts them: one a `LightningStates`."""
        return states_per_holder(resolve_config(model))[0]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtype(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...]]:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_shape(resolve_config(vllm_config.model_config), ranks)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable, ...]:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()
