"""The vLLM model of the MiniMax-01 family: lightning and softmax attention layers with a mixture of experts.

    LightningForCausalLM -> LightningLayer x L -> LightningAttention | SoftmaxAttention, MoE

Both conventions come from `LightningConfig`, as in the learner's policy. vLLM sees a hybrid model: a softmax layer owns
paged keys and values, a lightning layer one [H, D, D] state a sequence. A step of the engine is a flat [T] batch with
the decodes (one token each) first and the prefills after them. A step of decodes alone reads nothing back to the host
and has shapes that depend on the batch size only, so a CUDA graph can hold it.

Router and experts are the learner's own `MoE`; in bfloat16 on a GPU, vLLM's fused kernel multiplies with the same two
weights. vLLM's own layer would pack them when they are loaded, and an update would silently read as garbage.

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
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata

from cispo.errors import UserError
from cispo.ops.lightning import lightning_attention, lightning_decode, lightning_prefill
from cispo.policies.layers import SwiGLU
from cispo.policies.minimax.config import LIGHTNING_NORM_EPS, LightningConfig, parse_config, shared_size_of_weights
from cispo.policies.minimax.names import place_of, vllm_target
from cispo.policies.minimax.shares import check_shares, loader
from cispo.policies.minimax.vllm_states import LightningStates, state_dtype, state_shape, states_per_holder
from cispo.policies.moe import MoE
from cispo.policies.replay import RouteBuffer, route_buffer
from cispo.policies.shares import SummedRMSNorm
from cispo.policies.vllm_ranks import vllm_ranks


def resolve_config(model: ModelConfig) -> LightningConfig:
    """The policy's shape and conventions; a local folder's weights give the shared expert's width."""
    return parse_config(model.hf_config.to_dict(), shared_size=shared_size_of_weights(Path(model.model)))


class LightningAttention(nn.Module):
    """Lightning attention with its output norm and gate; the state of each sequence lives in vLLM's cache, fp32."""

    def __init__(self, config: LightningConfig, layer: int, states: Sequence[LightningStates], prefix: str) -> None:
        super().__init__()
        holder, self.place = divmod(sum(config.lightning_layers[:layer]), states_per_holder(config)[1])
        # In a tuple: the holder is the model's, not a part of this layer.
        self.holder = (states[holder],)
        ranks = vllm_ranks()
        self.heads, self.head_dim = config.num_heads // ranks.count, config.head_dim
        inner = config.num_heads * config.head_dim
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, 3 * inner, bias=False, prefix=f"{prefix}.qkv_proj")
        self.output_gate = ColumnParallelLinear(config.hidden_size, inner, bias=False, prefix=f"{prefix}.output_gate")
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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, d] -> [T, d]; rows beyond the scheduled tokens are padding and come out arbitrary."""
        qkv = F.silu(self.qkv_proj(x)[0]).view(-1, self.heads, 3 * self.head_dim)
        if not x.is_cuda:
            qkv = qkv.float()
        q, k, v = qkv.split(self.head_dim, dim=-1)
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            (holder,) = self.holder
            batch = metadata[holder.prefix]
            assert isinstance(batch, LinearAttentionMetadata)
            assert batch.num_decode_tokens == batch.num_decodes, "speculative decoding is not supported"
            attend = self._attend_by_slot if x.is_cuda else self._attend
            out = attend(q, k, v, batch, holder.of(self.place))
        else:  # vLLM's dummy runs have no sequences
            out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        out = self.norm(out.view(len(x), -1).to(x.dtype))
        return self.out_proj(torch.sigmoid(self.output_gate(x)[0]) * out)[0]

    def _attend_by_slot(self, q: Tensor, k: Tensor, v: Tensor, batch: LinearAttentionMetadata, cache: Tensor) -> Tensor:
        """By kernels: one launch for all decodes, one or two for all prefills, states read and written in place.

        A fresh sequence's slot holds the state of its last owner: it counts as zero. That includes a prompt of one
        token, which vLLM counts among the decodes, and the padding of a CUDA graph, which has vLLM's null block.
        """
        decodes, sequences = batch.num_decodes, batch.num_decodes + batch.num_prefills
        slots, lengths = batch.state_indices_tensor[:sequences].contiguous(), batch.seq_lens[:sequences]
        if decodes == len(q):
            return lightning_decode(q, k, v, self.slopes, cache, slots, lengths <= 1)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            part = slice(decodes)
            fresh = lengths[part] <= 1
            out[part] = lightning_decode(q[part], k[part], v[part], self.slopes, cache, slots[part], fresh)
        if batch.num_prefills:
            part = slice(decodes, decodes + batch.num_prefill_tokens)
            starts = batch.query_start_loc[decodes : sequences + 1]
            fresh, bounds = lengths[decodes:] <= starts.diff(), starts - starts[0]
            out[part] = lightning_prefill(q[part], k[part], v[part], self.slopes, bounds, cache, slots[decodes:], fresh)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: LinearAttentionMetadata, states: Tensor) -> Tensor:
        """Attends over every sequence of the step and leaves the new states in the cache."""
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        # One row a state: torch copies rows several times faster than [H, D, D] blocks.
        cache = states.view(len(states), -1)
        decodes, sequences = batch.num_decodes, batch.num_decodes + batch.num_prefills
        starts, slots = batch.query_start_loc[: sequences + 1], batch.state_indices_tensor[:sequences].long()
        # A fresh sequence's slot holds the state of its last owner. That includes a prompt of one token, which vLLM
        # counts among the decodes.
        fresh = batch.seq_lens[:sequences] <= starts.diff()
        cache.index_fill_(0, slots[fresh], 0)
        if decodes:
            state = cache.index_select(0, slots[:decodes]).float().view(-1, *states.shape[1:])
            out[:decodes] = _decode(q[:decodes], k[:decodes], v[:decodes], self.decay, state)
            cache.index_copy_(0, slots[:decodes], state.to(cache.dtype).flatten(1))
        if batch.num_prefills:
            tokens = slice(decodes, decodes + batch.num_prefill_tokens)
            state = cache.index_select(0, slots[decodes:]).float().view(-1, *states.shape[1:])
            bounds = starts[decodes:] - starts[decodes]
            out[tokens], state = lightning_attention(
                q[tokens], k[tokens], v[tokens], self.slopes, bounds, initial_state=state, output_final_state=True
            )
            assert state is not None
            cache.index_copy_(0, slots[decodes:], state.to(cache.dtype).flatten(1))
        return out


def _decode(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """One token of each sequence: S = decay * S + k^T v in place, o = q S; q, k, v [S, H, D], state [S, H, D, D]."""
    state.mul_(decay).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    return torch.bmm(q.flatten(0, 1).unsqueeze(1), state.flatten(0, 1)).view(q.shape)


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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, d], positions [T] -> [T, d]."""
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, d], positions [T] -> [T, d]."""
        normed = self.input_layernorm(x)
        x = self._residual(x, normed, self.self_attn(normed, positions), self.attention_factors)
        normed = self.post_attention_layernorm(x)
        return self._residual(x, normed, self._experts(normed), self.mlp_factors)

    def _residual(self, x: Tensor, normed: Tensor, branch: Tensor, factors: tuple[float, float]) -> Tensor:
        alpha, beta = factors
        return torch.add(branch if beta == 1 else beta * branch, normed if self.postnorm else x, alpha=alpha)

    def _experts(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == torch.bfloat16:
            # The learner's arithmetic, which takes it eight launches: logits are float32 sums of bfloat16 products.
            logits = torch.mm(x, self.mlp.gate.weight.t(), out_dtype=torch.float32)
            weights, chosen, _ = fused_topk(x, logits, self.mlp.gate.top_k, renormalize=True)
            if self.route_buffer is not None:
                self.route_buffer.leave(self.mlp.gate, chosen)
            out = fused_experts(x, self.mlp.experts.gate_up_proj, self.mlp.experts.down_proj, weights, chosen)
        else:
            out, _, _ = self.mlp(x)
        if self.shared_mlp is not None and self.coefficient is not None:
            share = torch.sigmoid(F.linear(x.float(), self.coefficient.weight.float())).to(x.dtype)
            out = out * (1 - share) + self.shared_mlp(x) * share
        return out if self.ranks.count == 1 else self.ranks.sum(out)


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
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)


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
