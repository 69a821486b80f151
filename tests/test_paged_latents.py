"""Latents in vLLM's cache: absorbed attention against expanded keys and values, the plan, and what each step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cispo.engines.vllm_engine import VLLMEngine
from cispo.errors import UserError
from cispo.ops import paged_latents
from cispo.ops.convolution import CONVOLUTION
from cispo.ops.delta import DELTA
from cispo.ops.expansion import Expansion
from cispo.ops.lightning import LIGHTNING
from cispo.ops.paged_latents import paged_latent_attention, write_latents
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index
from cispo.policies.attention import Documents
from cispo.policies.hybrid.config import MLAConfig
from cispo.policies.hybrid.mla import MultiHeadLatentAttention, RotaryTable
from cispo.policies.hybrid.vllm_plan import Plan, RecurrentCall, SoftmaxCall
from cispo.policies.loading import save_policy
from tests.test_hybrid_parity import tiny_policy

CONFIG = MLAConfig(
    num_heads=3,
    q_lora_rank=None,
    kv_lora_rank=8,
    nope_dim=6,
    rope_dim=4,
    value_dim=5,
    rotary="pairs",
    scale=0.4,
    latent_norm_eps=1e-6,
    bias=False,
    indexer=None,
)
HIDDEN, PAGE = 16, 4
LENGTHS = [9, 1, 23, 4, 13]


class Pages:
    """An `Attention` of steps over pages, with tokens of the past in them and NaN in all other places."""

    def __init__(self) -> None:
        longest = -(-max(LENGTHS) // PAGE)
        self.tables = torch.randperm(len(LENGTHS) * longest).view(-1, longest).int() + 1
        self.pages = torch.full((len(LENGTHS) * longest + 1, PAGE, 15), torch.nan, dtype=torch.float64)
        self.read = [0] * len(LENGTHS)
        self.counts: Sequence[int] = ()

    def begin(self, counts: Sequence[int]) -> None:
        """The tokens that each sequence reads in the next step; sequences that read one come first."""
        self.counts = counts

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        active = sorted((n for n, count in enumerate(self.counts) if count), key=lambda n: self.counts[n] > 1)
        rows = [(n, range(self.read[n], self.read[n] + self.counts[n])) for n in active]
        slots = [int(self.tables[n, p // PAGE]) * PAGE + p % PAGE for n, places in rows for p in places]
        write_latents(self.pages, torch.tensor(slots), torch.cat([x.flatten(1) for x in latents], -1))
        for n in active:
            self.read[n] += self.counts[n]
        assert expand.absorbed is not None and scale is not None
        summed = paged_latent_attention(
            expand.absorbed.queries(q),
            self.pages,
            self.tables[active],
            torch.tensor([self.read[n] for n in active], dtype=torch.int32),
            torch.tensor([0] + [self.counts[n] for n in active]).cumsum(0),
            rank=latents[0].shape[-1],
            scale=scale,
        )
        return expand.absorbed.values(summed)

    def order(self) -> list[int]:
        return sorted((n for n, count in enumerate(self.counts) if count), key=lambda n: self.counts[n] > 1)


def rotary_of(positions: Tensor) -> RotaryTable:
    angles = positions[:, None, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("scores", [1 << 24, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@torch.no_grad()
def test_absorbed_attention_in_steps_equals_expanded(chunk: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged sequences that read up to `chunk` tokens a step, the last ones beside others' decodes; float64."""
    monkeypatch.setattr(paged_latents, "_SCORES", scores)
    torch.manual_seed(0)
    mixer = MultiHeadLatentAttention(HIDDEN, CONFIG).double()
    xs = [torch.randn(length, HIDDEN, dtype=torch.float64) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    documents = Documents(starts.int(), sum(LENGTHS))
    expected = mixer(torch.cat(xs), documents, rotary_of(positions)).split(LENGTHS)
    pages, found = Pages(), [[] for _ in LENGTHS]
    while any(pages.read[n] < length for n, length in enumerate(LENGTHS)):
        before = list(pages.read)
        pages.begin([min(chunk, length - read) for length, read in zip(LENGTHS, before, strict=True)])
        order, parts = pages.order(), {n: slice(before[n], before[n] + pages.counts[n]) for n in pages.order()}
        places = torch.cat([torch.arange(parts[n].start, parts[n].stop) for n in order])
        outputs = mixer(torch.cat([xs[n][parts[n]] for n in order]), pages, rotary_of(places))
        for n, part in zip(order, outputs.split([pages.counts[n] for n in order]), strict=True):
            found[n].append(part)
    for parts, whole in zip(found, expected, strict=True):
        assert (torch.cat(parts) - whole).abs().max() <= 1e-12


def test_padding_writes_page_0_alone() -> None:
    pages = torch.zeros(3, 2, 5)
    write_latents(pages, torch.tensor([-1, 5, 2]), torch.ones(3, 4))
    assert pages[1:, :, 4].eq(0).all() and pages[2, 1, :4].eq(1).all() and pages[1, 0, :4].eq(1).all()
    assert pages[1:].sum() == 8


def released(heads: int, latent_layers: int, *states: tuple[RecurrentOp, tuple[int, ...], int]) -> Plan:
    """Latent attention at the released head sizes, beside recurrences (operation, state, layers)."""
    call = SoftmaxCall(heads=heads, kv_heads=heads, key_dim=192, value_dim=128, scale=1.0, latents=(512, 64))
    recurrent = [
        RecurrentCall(op=op, state=state, output=(1,), dtype=torch.float32) for op, state, n in states for _ in range(n)
    ]
    sizes = {"vocab_size": 8, "hidden_size": 8, "selected": None}
    return Plan(softmax=(call,) * latent_layers, recurrent=tuple(recurrent), **sizes)


RELEASED = {
    "DeepSeek-V3": released(128, 61),
    "Kimi-Linear": released(32, 7, (DELTA, (32, 128, 128), 20), (CONVOLUTION, (3, 4096), 60)),
    "Ling 2.5": released(64, 10, (LIGHTNING, (64, 128, 128), 70)),
}


def context_bytes(plan: Plan, tokens: int) -> int:
    """Memory of one context in bfloat16 with vLLM's rule: blocks of multiples of 16 tokens, as large as a slot."""
    heads, size = plan.cached_heads
    token = 2 * heads * size * 2
    block = 16 * max(-(-plan.slot_floats * 4 // (16 * token)), 1)
    return (len(plan.softmax) * -(-tokens // block) + plan.holders) * block * token


def of_rank(name: str, ranks: int) -> Plan:
    """With its part of the heads, channels and states."""
    whole = RELEASED[name]
    calls = [replace(call, heads=call.heads // ranks, kv_heads=call.kv_heads // ranks) for call in whole.softmax]
    axis = {CONVOLUTION: 1}
    states = [
        replace(call, state=tuple(n // ranks if i == axis.get(call.op, 0) else n for i, n in enumerate(call.state)))
        for call in whole.recurrent
    ]
    return replace(whole, softmax=tuple(calls), recurrent=tuple(states), given_holders=whole.holders)


@pytest.mark.parametrize("ranks", [1, 4, 16])
@pytest.mark.parametrize("name", RELEASED)
def test_a_context_takes_no_more_memory_than_keys_and_values(name: str, ranks: int) -> None:
    plan = of_rank(name, ranks)
    expanded = replace(plan, softmax=tuple(replace(call, latents=None) for call in plan.softmax))
    assert plan.keeps_latents and not expanded.keeps_latents
    assert plan.holders == expanded.holders and plan.slot_floats == expanded.slot_floats
    for tokens in (1, 16, 100, 1000, 4096, 40_000):
        # A slot is padded to whole tokens, of which those of latents are the smaller.
        assert context_bytes(plan, tokens) <= context_bytes(expanded, tokens)
    ratio = context_bytes(expanded, 40_000) / context_bytes(plan, 40_000)
    assert ratio >= {"DeepSeek-V3": 85 / ranks, "Kimi-Linear": 3.5 if ranks == 1 else 1.3, "Ling 2.5": 1.6}[name]


def test_rows_of_latents_keep_blocks_short() -> None:
    """A slot of 20 KDA states has 512 tokens of the rows, which are 576 numbers where there are no states."""
    assert RELEASED["DeepSeek-V3"].cached_heads == (1, 288)
    heads, size = RELEASED["Kimi-Linear"].cached_heads
    assert heads == 1 and 2 * size > 576 and 480 < RELEASED["Kimi-Linear"].slot_floats / (2 * size) <= 512


def test_latents_that_are_more_than_keys_and_values_are_expanded() -> None:
    call = SoftmaxCall(heads=2, kv_heads=2, key_dim=48, value_dim=32, scale=1.0, latents=(512, 16))
    plan = Plan(vocab_size=8, hidden_size=8, softmax=(call,), recurrent=(), selected=None)
    assert not plan.keeps_latents and plan.cached_heads == (2, 64)


def test_a_step_expands_prompts_that_are_read_at_once() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from cispo.policies.hybrid.vllm_latents import LatentMetadata, LatentMetadataBuilder

    def built(counts: list[int], lengths: list[int]) -> LatentMetadata:
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(counts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=torch.arange(len(counts) * 4, dtype=torch.int32).view(-1, 4),
            slot_mapping=torch.arange(sum(counts)),
        )
        builder = object.__new__(LatentMetadataBuilder)
        return builder.build(0, common)

    step = built([1, 1, 3, 2], [7, 1, 3, 2])
    assert step.expands and step.decodes == 2 and step.tokens == 7
    assert step.prompts.cu_seqlens.tolist() == [0, 3, 5] and step.prompts.tokens == 5
    assert step.decoding.lengths.tolist() == [7, 1] and step.decoding.longest_query == 1
    step = built([1, 3, 2], [7, 5, 2])
    assert not step.expands
    tables, seen = step.rows
    assert seen.tolist() == [7, 3, 4, 5, 1, 2] and tables[:, 0].tolist() == [0, 4, 4, 4, 8, 8]
    step = built([1, 1], [7, 1])
    assert not step.expands and step.decodes == 2


def test_latents_have_the_policys_dtype(tmp_path: Path) -> None:
    save_policy(tiny_policy("deepseek_v3", 0), tmp_path)
    with pytest.raises(UserError, match=r"^rollout.engine_args: kv_cache_dtype 'bfloat16'"):
        VLLMEngine(
            str(tmp_path),
            dtype="float32",
            max_context=64,
            max_sequences=2,
            seed=0,
            engine_args={"kv_cache_dtype": "bfloat16"},
        )
