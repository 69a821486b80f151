"""Updates in flight on a GPU: a step on its way when weights arrive counts for the old ones, graphs and recorded
log-probabilities included.

    python -m pytest tests/test_serving_cuda.py        where there is a GPU; skipped elsewhere

float32 runs eagerly and must match the learner on the GPU as on a CPU. In bfloat16, with CUDA graphs, activations are
rounded at every layer in another order on each side; tokens counted to the wrong version would be off by whole nats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.types import Completion, OnUpdate, RepetitionStop, Sampling
from cispo.weights.buckets import WeightSender

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": {**SHAPE, "model_type": "llama"},
    "hybrid": {
        **SHAPE,
        "model_type": "minimax",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
VERSIONS = 4
SAMPLING = Sampling(max_tokens=200, eos_ids=(), repetition=RepetitionStop(run_length=0))
PROMPTS = [torch.randint(512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 193, 3)]

# (largest, mean) difference of a log-probability by dtype. In bfloat16 the largest is a token sent to another expert:
# up to 3.4 was seen on an H200, 0.06 in the mean, with updates and without. Other weights are nats off in the mean.
LIMITS = {"float32": (1e-4, 1e-5), "bfloat16": (10.0, 0.1)}


class Side:
    """An engine and the versions of its policy."""

    def __init__(self, folder: Path, kind: str, dtype: str) -> None:
        self.limits = LIMITS[dtype]
        self.policies = []
        for version in range(VERSIONS):
            save_policy(init_policy(CONFIGS[kind], version), folder / str(version))
            self.policies.append(load_policy(folder / str(version), dtype=getattr(torch, dtype)).to("cuda").eval())
        self.senders = [WeightSender(policy.to_hf(), bucket_bytes=1 << 20) for policy in self.policies]
        core = VLLMEngine(str(folder / "0"), dtype=dtype, max_context=512, max_sequences=48, seed=0, memory=0.2)
        assert core._pending is not None, "log-probabilities are recorded on a GPU"
        self.engine = ServedEngine(core)

    async def update(self, version: int, mode: OnUpdate) -> int:
        lost = await self.engine.begin_update(mode)
        sender = self.senders[version]
        for number in range(len(sender.buckets)):
            self.engine.receive_weights(sender.stage(number, "direct", check=True))
            await asyncio.sleep(0)
        self.engine.finish_update(version)
        return lost

    async def with_updates(self, mode: OnUpdate) -> tuple[list[Completion], int]:
        """Two overlapping calls during which each further version arrives."""
        half, lost, before = len(PROMPTS) // 2, 0, self.engine.progress()
        calls = [asyncio.ensure_future(self.engine.generate(p, SAMPLING, 3)) for p in (PROMPTS[:half], PROMPTS[half:])]
        for version in range(1, VERSIONS):
            share = len(PROMPTS) * SAMPLING.max_tokens * version // VERSIONS
            while self.engine.progress() < before + lost + share:
                await asyncio.sleep(0)
            lost += await self.update(version, mode)
        return [completion for call in calls for completion in await call], lost

    @torch.no_grad()
    def gaps(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
        """|engine - learner| of every token, the learner with the weights of the token's version."""
        parts = []
        for prompt, c in zip(prompts, completions, strict=True):
            tokens = torch.tensor([*prompt, *c.token_ids], device="cuda")
            bounds = torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda")
            positions = torch.arange(len(tokens), device="cuda")
            rows = []
            for policy in self.policies:
                hidden = policy(tokens, positions, bounds).hidden[len(prompt) - 1 : -1]
                logits = hidden.float() @ policy.lm_head_weight.float().T
                rows.append(logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0])
            places = torch.arange(len(c.token_ids), device="cuda")
            learner = torch.stack(rows)[torch.tensor(c.versions, device="cuda"), places]
            parts.append((learner - torch.tensor(c.logprobs, device="cuda")).abs())
        return torch.cat(parts)

    def assert_close(self, gaps: Tensor) -> None:
        largest, mean = self.limits
        assert gaps.isfinite().all() and gaps.max() <= largest and gaps.mean() <= mean, (gaps.max(), gaps.mean())


@pytest.fixture(params=[(kind, dtype) for kind in CONFIGS for dtype in LIMITS], ids="-".join)
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    kind, dtype = request.param
    side = Side(tmp_path, kind, dtype)
    yield side
    side.engine.close()


def test_updates_in_flight(side: Side) -> None:
    """recompute, wait and abort are exact; keep is until the first update; then each version alone, as a check."""
    for mode in ("recompute", "wait", "abort"):
        completions, lost = asyncio.run(side.with_updates(mode))
        side.assert_close(side.gaps(PROMPTS, completions))
        assert {len(c.token_ids) for c in completions} == {SAMPLING.max_tokens}
        mixed = max(len(set(c.versions)) for c in completions)
        assert mixed >= 3 if mode == "recompute" else mixed == 1
        assert (lost > 0) == (mode == "abort")
        asyncio.run(side.update(0, "wait"))
    completions, _ = asyncio.run(side.with_updates("keep"))
    gaps, versions = side.gaps(PROMPTS, completions), torch.tensor([v for c in completions for v in c.versions])
    side.assert_close(gaps[(versions == 0).cuda()])
    again = asyncio.run(side.engine.generate(PROMPTS, SAMPLING, 5))
    side.assert_close(side.gaps(PROMPTS, again))
    assert {v for c in again for v in c.versions} == {VERSIONS - 1}


def test_a_call_samples_the_same_beside_others(side: Side) -> None:
    """Every request has its own seed. In float32 the last bits of another batch hardly ever tip a choice."""

    async def beside() -> list[Completion]:
        other = asyncio.ensure_future(side.engine.generate(PROMPTS[20:40], SAMPLING, 1))
        result = await side.engine.generate(PROMPTS[:10], SAMPLING, 7)
        await other
        return result

    alone = asyncio.run(side.engine.generate(PROMPTS[:10], SAMPLING, 7))
    together = asyncio.run(beside())
    if side.limits == LIMITS["float32"]:
        assert sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=True)) >= 9
    side.assert_close(side.gaps(PROMPTS[:10], together))


def test_cancelled_calls_leave_nothing(side: Side) -> None:
    async def run() -> list[Completion]:
        calls = [asyncio.ensure_future(side.engine.generate(PROMPTS[i::8], SAMPLING, i)) for i in range(8)]
        while side.engine.progress() < 2000:
            await asyncio.sleep(0)
        for call in calls[1:]:
            call.cancel()
        return await calls[0]

    completions = asyncio.run(run())
    side.assert_close(side.gaps(PROMPTS[::8], completions))
    core = side.engine.engine
    assert isinstance(core, VLLMEngine) and core._pending is not None
    assert not core._requests and not core._pending._table._rows and not core._core.engine_core.batch_queue
