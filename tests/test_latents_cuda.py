"""Latents in vLLM's cache on a GPU: the kernels against float64, in CUDA graphs too, and engines at the released sizes
of latents against the policy on the same GPU.

    python -m pytest -s tests/test_latents_cuda.py        where there is a GPU; skipped elsewhere; -s prints the figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.ops.paged_latents import paged_latent_attention, write_latents
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.policy import Policy
from cispo.weights.publish import publish_weights
from tests.served import update
from tests.test_hybrid_parity import CONFIGS as TINY
from tests.test_hybrid_parity import engine_model, poison
from tests.test_hybrids_cuda import check, started
from tests.test_vllm_parity import RAGGED, SHARED, counting, scheduler
from tests.tiny_hybrids import draw_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PAGE = 16
LONGEST = 4096
LIMIT = 1e-2
"""Of |kernel - float64| / |float64| over all outputs, bfloat16 inputs rounded before both."""

STEPS = {
    "decodes": ([1] * 7, [1, 5, 16, 17, 700, 3000, 33]),
    "many decodes": ([1] * 300, [1 + (37 * n) % 900 for n in range(300)]),
    "prompts in parts": ([1, 1, 40, 3, 200], [600, 16, 90, 3, 1500]),
}
"""(tokens of each sequence in the step, tokens of each with the past)."""

WIDTHS = [(512, 64), (32, 16), (112, 16)]


class Step:
    """A step over random latents; NaN in every other place, as a state may have left it."""

    def __init__(self, counts: list[int], lengths: list[int], widths: tuple[int, int], heads: int) -> None:
        from cispo.policies.hybrid.vllm_latents import LatentMetadata

        torch.manual_seed(0)
        blocks = LONGEST // PAGE
        used = [-(-length // PAGE) for length in lengths]
        self.pages = torch.full((sum(used) + 1, PAGE, sum(widths) + 32), torch.nan, dtype=torch.bfloat16)
        tables = torch.zeros(len(counts), blocks, dtype=torch.int32)
        free = (torch.randperm(sum(used)) + 1).int().tolist()
        for row, (count, length) in enumerate(zip(used, lengths, strict=True)):
            tables[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
            places = torch.arange(length)
            slots = tables[row, places // PAGE] * PAGE + places % PAGE
            write_latents(self.pages, slots, torch.randn(length, sum(widths)).bfloat16())
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        self.q = torch.randn(sum(counts), heads, sum(widths)).bfloat16()
        self.widths, self.scale = widths, sum(widths) ** -0.5
        decodes = sum(count == 1 for count in counts)
        self.metadata = LatentMetadata(
            decodes=decodes,
            tokens=sum(counts),
            decode_tokens=decodes,
            expands=False,
            starts=starts.cuda(),
            lengths=torch.tensor(lengths, dtype=torch.int32).cuda(),
            tables=tables.cuda(),
            slots=torch.zeros(sum(counts), dtype=torch.int64).cuda(),
            longest_query=max(counts),
            longest=max(lengths),
        )

    def exact(self) -> Tensor:
        step, widths = self.metadata, self.widths
        moved = (x.cpu() for x in (step.tables, step.lengths, step.starts))
        q, pages = self.q.double(), self.pages.double()
        return paged_latent_attention(q, pages, *moved, rank=widths[0], scale=self.scale)


def kernel_of(name: str, widths: tuple[int, int]) -> Any:
    from cispo.policies.hybrid import vllm_latents

    if name == "flash":
        if widths != (512, 64) or not vllm_latents._has_flash():
            pytest.skip("flash attention 3 takes 512 and 64, on Hopper")
        return vllm_latents.attend_by_flash
    return vllm_latents.attend_by_rows


def error(found: Tensor, exact: Tensor) -> float:
    assert found.isfinite().all()
    return ((found.cpu().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("heads", [2, 16, 128])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", ["flash", "rows"])
@pytest.mark.parametrize("name", STEPS)
def test_kernels_equal_float64(name: str, kernel: str, widths: tuple[int, int], heads: int) -> None:
    attend, step = kernel_of(kernel, widths), Step(*STEPS[name], widths, heads)
    found = attend(step.q.cuda(), step.pages.cuda(), step.metadata, widths, step.scale)
    assert found.shape == (len(step.q), heads, widths[0]) and found.dtype == torch.bfloat16
    worst = error(found, step.exact())
    print(f"{kernel} {widths} {heads} heads, {name}: {worst:.1e}", flush=True)
    assert worst <= LIMIT


@pytest.mark.parametrize("name", STEPS)
def test_float32_is_exact(name: str) -> None:
    from cispo.policies.hybrid.vllm_latents import attend_latents

    step = Step(*STEPS[name], (512, 64), 4)
    found = attend_latents(step.q.float().cuda(), step.pages.float().cuda(), step.metadata, step.widths, step.scale)
    assert error(found, step.exact()) <= 1e-5


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", ["flash", "rows"])
def test_a_graph_decodes_other_sequences(kernel: str, widths: tuple[int, int]) -> None:
    """Captured for the longest context with padding alone; replayed with sequences, the last rows still padding."""
    attend = kernel_of(kernel, widths)
    step = Step([1] * 12, [40 * n + 1 for n in range(12)], widths, 16)
    q, pages, metadata = step.q.cuda(), step.pages.cuda(), step.metadata
    lengths, tables = metadata.lengths.clone(), metadata.tables.clone()
    for tensor in (metadata.lengths, metadata.tables, q):
        tensor.zero_()
    captured = type(metadata)(**{**vars(metadata), "longest": LONGEST})
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(q, pages, captured, widths, step.scale)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, pages, captured, widths, step.scale)
    metadata.lengths[:9], metadata.tables[:9] = lengths[:9], tables[:9]
    q.copy_(step.q)
    graph.replay()
    torch.cuda.synchronize()
    metadata.lengths.copy_(lengths)
    metadata.tables.copy_(tables)
    assert error(out[:9], step.exact()[:9]) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_latents_are_stored_as_on_a_cpu(dtype: torch.dtype) -> None:
    """Of strided latents, into rows that are longer; padding has negative slots."""
    from cispo.policies.hybrid.vllm_latents import store_latents

    both, slots = torch.randn(40, 64 + 576, dtype=dtype), torch.randperm(96)[:40]
    slots[5] = -1
    first, second = both[:, :512], both[:, 512:576]
    expected = torch.zeros(6, PAGE, 608, dtype=dtype)
    write_latents(expected, slots, torch.cat([first, second], -1))
    moved = both.cuda()
    pages = torch.zeros(6, PAGE, 608, dtype=dtype, device="cuda")
    one = torch.ones((), device="cuda")
    store_latents(pages, slots.cuda(), moved[:, :512], moved[:, 512:576], one)
    assert torch.equal(pages[1:].cpu(), expected[1:])


LATENTS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
CONFIGS = {
    "deepseek_v3": {**TINY["deepseek_v3"], **LATENTS},
    # States so large that rows are longer than latents.
    "kimi_linear": {
        **TINY["kimi_linear"],
        **LATENTS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_head_dim": 128,
        "linear_num_heads": 16,
    },
}
NUMBERS = {"deepseek_v3": 576, "kimi_linear": 1648}
"""Of a row in the cache."""


def policy_of(family: str, seed: int) -> Policy:
    policy = init_policy(CONFIGS[family], seed)
    draw_weights(policy, seed)
    return policy


@pytest.mark.parametrize(
    ("dtype", "name", "engine_args"),
    [
        ("bfloat16", "graphs", {}),
        ("bfloat16", "chunked", {"max_num_batched_tokens": 128}),
        ("bfloat16", "prefix cache", {"enable_prefix_caching": True, "max_num_batched_tokens": 1024}),
        ("float32", "chunked", {"max_num_batched_tokens": 128}),
        ("float32", "prefix cache", {"enable_prefix_caching": True, "max_num_batched_tokens": 1024}),
    ],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_engine_equals_learner(family: str, dtype: str, name: str, engine_args: dict[str, Any], tmp_path: Path) -> None:
    """The released sizes of latents; after an update; NaN in every slot of a state at first."""
    folders = [tmp_path / str(version) for version in range(2)]
    for version, folder in enumerate(folders):
        save_policy(policy_of(family, version), folder)
    policies = [load_policy(folder, dtype=getattr(torch, dtype)).to("cuda").eval() for folder in folders]
    common = [token for prompt in RAGGED if len(prompt) > 60 for token in prompt][:400]
    prompts = [common + prompt[:30] for prompt in RAGGED] + SHARED
    engine = started(folders[0], dtype, routed=True, **engine_args)
    try:
        for layer in engine_model(engine).attention:
            assert layer.kv_cache.shape[1] == 1 and layer.kv_cache.shape[-1] == NUMBERS[family]
        hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        poison(engine)
        check(f"{family} {dtype} {name}", engine, policies[0], dtype, prompts, 0)
        update(engine, str(publish_weights(policies[1].to_hf(), tmp_path, 1)), 1)
        check(f"{family} {dtype} {name} after an update", engine, policies[1], dtype, prompts, 1)
        assert (hits[0] > 0) == ("prefix" in name and family == "deepseek_v3")
    finally:
        engine.close()
