"""Latent attention over vLLM's cache: a row of latents a token, which all heads read.

    decodes, and prompts read in parts      latents in the cache are keys and values of one head (`expansion.Absorbed`)
    prompts read at once                    keys and values are expanded, as in the learner, and not kept

Products with cached latents are 3.4 times those with expanded keys and values at DeepSeek's sizes: they pay where a
query reads many rows that it would else have to expand. vLLM has such a layer too, but its backend for a CPU takes one
size and no parts of prompts, and on a GPU it keeps copies of the up-projection that a weight update does not reach.

    half precision on Hopper, released sizes     flash attention 3, with the latents' first part as values
    half precision on other GPUs, other sizes    vLLM's decode kernel in Triton, a row a token
    float32, CPU                                 plain products (`ops.paged_latents`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from cispo.errors import UserError
from cispo.ops.expansion import Expansion
from cispo.ops.paged_latents import paged_latent_attention, write_latents
from cispo.policies.attention import Documents
from cispo.policies.hybrid.vllm_plan import SoftmaxCall

_FLASH_WIDTHS = 512, 64
"""Widths of the latents for which flash attention 3 is built: those of all released models."""

# Keys of a part of a sequence that one program of the Triton kernel reads, while there are programs for all.
_SPLIT = 512

# Heads of a program of the Triton kernel.
_HEADS = 16

# Numbers of the parts' results, float32, that are held at a time.
_PARTIAL = 1 << 26


@dataclass(frozen=True, kw_only=True)
class LatentMetadata(AttentionMetadata):
    """The sequences of a step: those that read one token first, `decodes`."""

    decodes: int
    tokens: int
    """Of all sequences, without padding."""
    decode_tokens: int
    expands: bool
    """Whether all the others read their first tokens, so that expanded keys and values of this step are enough."""
    starts: Tensor
    """[S + 1] int32, of the sequences' tokens in this step."""
    lengths: Tensor
    """[S] int32, of the sequences up to this step."""
    tables: Tensor
    """[S, blocks of the longest] int32."""
    slots: Tensor
    """[T], of this step's tokens in the cache; negative for padding."""
    longest_query: int
    longest: int
    """A bound on the lengths."""

    @cached_property
    def prompts(self) -> Documents:
        """Of the sequences behind the decodes."""
        starts = self.starts[self.decodes :] - self.starts[self.decodes]
        return Documents(starts, self.tokens - self.decode_tokens, self.longest_query)

    @cached_property
    def decoding(self) -> LatentMetadata:
        """The decodes alone, as views."""
        return replace(
            self,
            tokens=self.decode_tokens,
            expands=False,
            starts=self.starts[: self.decodes + 1],
            lengths=self.lengths[: self.decodes],
            tables=self.tables[: self.decodes],
            longest_query=1,
        )

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Each token's (table [T, blocks], number of the keys that it sees [T] int32)."""
        queries = self.starts.diff()
        first = (self.lengths - queries - self.starts[:-1]).repeat_interleave(queries, output_size=self.tokens)
        seen = first + torch.arange(1, self.tokens + 1, dtype=torch.int32, device=first.device)
        return self.tables.repeat_interleave(queries, 0, output_size=self.tokens), seen


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """In a step of decodes alone nothing is computed: a CUDA graph reads vLLM's own buffers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        common, sequences = common_attn_metadata, common_attn_metadata.num_reqs
        decodes, prompts, decode_tokens, prompt_tokens = split_decodes_and_prefills(common, decode_threshold=1)
        lengths, first = common.seq_lens_cpu_upper_bound, False
        if prompts and lengths is not None:
            queries = common.query_start_loc_cpu[decodes : sequences + 1].diff()
            first = bool((lengths[decodes:sequences] <= queries).all())
        return LatentMetadata(
            decodes=decodes,
            tokens=decode_tokens + prompt_tokens,
            decode_tokens=decode_tokens,
            expands=first,
            starts=common.query_start_loc[: sequences + 1],
            lengths=common.seq_lens[:sequences],
            tables=common.block_table_tensor[:sequences],
            slots=common.slot_mapping,
            longest_query=common.max_query_len,
            longest=common.max_seq_len,
        )


class LatentBackend(AttentionBackend):
    """The cache of one group of layers."""

    @staticmethod
    def get_name() -> str:
        return "CISPO_LATENTS"

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]


class LatentAttention(nn.Module, AttentionLayerBase):
    """To vLLM one layer of softmax attention with one head, half of each row its key and half its value."""

    supports_dcp = False

    def __init__(self, call: SoftmaxCall, head_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        """Raises UserError where the cache is to have another dtype than the policy."""
        super().__init__()
        assert call.latents is not None
        cache_dtype = vllm_config.cache_config.cache_dtype
        self.dtype = vllm_config.model_config.dtype
        if kv_cache_dtype_str_to_dtype(cache_dtype, vllm_config.model_config) != self.dtype:
            raise UserError(
                f"rollout.engine_args: kv_cache_dtype {cache_dtype!r}: latents are cached in the policy's dtype alone"
            )
        self.widths, self.scale, self.num_heads, self.head_size = call.latents, call.scale, call.heads, head_size
        self.prefix, self.kv_cache = prefix, torch.tensor([])
        self.register_buffer("one", torch.ones((), dtype=torch.float32), persistent=False)
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, f"two layers named {prefix}"
        layers[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        block_size = vllm_config.cache_config.block_size
        return FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=self.head_size, dtype=self.dtype)

    def forward(self, q: Tensor, latents: Sequence[Tensor], expand: Expansion) -> Tensor:
        """[T, H, E]: q [T, H, D], latents [T, R] and [T, 1, S]; zeros in vLLM's dummy runs, which have no sequences."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return torch.zeros_like(expand(*latents)[1])
        step = metadata[self.prefix]
        assert isinstance(step, LatentMetadata) and expand.absorbed is not None
        first, second = (x[: step.tokens].flatten(1) for x in latents)
        store_latents(self._pages, step.slots[: step.tokens], first, second, cast(Tensor, self.one))
        absorbed = step.decode_tokens if step.expands else step.tokens
        outputs = []
        if absorbed:
            queries, part = expand.absorbed.queries(q[:absorbed]), step.decoding if step.expands else step
            summed = attend_latents(queries, self._pages, part, self.widths, self.scale)
            outputs.append(expand.absorbed.values(summed))
        if step.expands:
            k, v = expand(*(x[absorbed : step.tokens] for x in latents))
            outputs.append(step.prompts.softmax(q[absorbed : step.tokens], k, v, self.scale))
        if step.tokens < len(q):
            outputs.append(outputs[0].new_zeros(len(q) - step.tokens, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @property
    def _pages(self) -> Tensor:
        """[blocks, tokens of a block, numbers of a row]."""
        return self.kv_cache[:, 0]


def store_latents(pages: Tensor, slots: Tensor, first: Tensor, second: Tensor, one: Tensor) -> None:
    """Puts latents [T, R] and [T, S] into pages [blocks, tokens, numbers] at slots [T]; negative slots are padding.

    `one` is a scalar on the device, the scale of the cache.
    """
    if not first.is_cuda:
        return write_latents(pages, slots, torch.cat([first, second], -1))
    from vllm import _custom_ops as ops

    rows = pages[..., : first.shape[-1] + second.shape[-1]]
    ops.concat_and_cache_mla(first, second, rows, slots, "auto", one)


def attend_latents(q: Tensor, pages: Tensor, step: LatentMetadata, widths: tuple[int, int], scale: float) -> Tensor:
    """[T, H, R]: q [T, H, R + S] of the step's tokens, whose latents are in the pages [blocks, tokens, numbers]."""
    if not q.is_cuda or q.dtype == torch.float32:
        return paged_latent_attention(q, pages, step.tables, step.lengths, step.starts, rank=widths[0], scale=scale)
    if widths == _FLASH_WIDTHS and _has_flash():
        return attend_by_flash(q, pages, step, widths, scale)
    return attend_by_rows(q, pages, step, widths, scale)


def attend_by_flash(q: Tensor, pages: Tensor, step: LatentMetadata, widths: tuple[int, int], scale: float) -> Tensor:
    """`attend_latents` by flash attention 3: products of the second parts are those of queries and keys to it."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    values, keys = pages[..., : sum(widths)].unsqueeze(2).split(widths, -1)
    of_values, of_keys = q.split(widths, -1)
    out = flash_attn_varlen_func(
        q=of_keys,
        q_v=of_values,
        k=keys,
        v=values,
        max_seqlen_q=step.longest_query,
        cu_seqlens_q=step.starts,
        max_seqlen_k=step.longest,
        seqused_k=step.lengths,
        block_table=step.tables,
        softmax_scale=scale,
        causal=True,
        fa_version=3,
    )
    assert isinstance(out, Tensor)
    return out


def attend_by_rows(q: Tensor, pages: Tensor, step: LatentMetadata, widths: tuple[int, int], scale: float) -> Tensor:
    """`attend_latents` by vLLM's decode kernel: every token reads its keys by itself."""
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    keys, rank = pages[..., : sum(widths)].unsqueeze(2), widths[0]
    tables, seen = (step.tables, step.lengths) if len(q) == step.decode_tokens else step.rows
    # Padding of a CUDA graph sees no key, and would be 0 / 0.
    seen, one = seen.clamp(min=1), torch.ones((), dtype=torch.float32, device=q.device)
    splits = _splits(len(q) * math.ceil(q.shape[1] / _HEADS), step.longest, q.device)
    out, norms = q.new_empty(*q.shape[:2], rank), q.new_empty(q.shape[:2])
    at_once = max(_PARTIAL // (q.shape[1] * splits * (rank + 1)), 1)
    partial = q.new_empty(min(len(q), at_once), q.shape[1], splits, rank + 1, dtype=torch.float32)
    for start in range(0, len(q), at_once):
        rows = slice(start, start + at_once)
        decode_attention_fwd(
            q[rows],
            keys,
            keys[..., :rank],
            out[rows],
            norms[rows],
            tables[rows],
            seen[rows],
            partial,
            splits,
            scale,
            keys.shape[1],
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )
    return out


@cache
def _has_flash() -> bool:
    from vllm.v1.attention.backends.fa_utils import flash_attn_supports_mla

    return bool(flash_attn_supports_mla())


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """Parts of each sequence, a power of 2: few keys for each program, and no more programs than run at a time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(math.ceil(longest / _SPLIT), max(2 * processors // programs, 1))
    return 1 << (most.bit_length() - 1)
