"""Router replay on a GPU: vLLM's workers record experts inside CUDA graphs, and a learner that takes them is closer.

    python -m pytest -s tests/test_router_replay_cuda.py        where there is a GPU; skipped elsewhere

float32 runs eagerly, and its experts are the learner's but where a router's candidates are equal to rounding. In
bfloat16, with decode steps as CUDA graphs, the two sides round in another order: a few tokens in a hundred go to other
experts, and those make the largest errors of a log-probability.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.policy import Policy
from cispo.policies.replay import routers_of, routes_of, routes_of_turns
from cispo.types import Completion, RepetitionStop, Sampling, Turn
from cispo.weights.buckets import WeightSender
from tests.served import sampled
from tests.test_serving_cuda import CONFIGS, PROMPTS
from tests.tiny_hybrids import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Head sizes that vLLM's attention on a GPU takes, 512 words, and enough experts that a choice is close now and then.
FAMILIES: dict[str, dict[str, Any]] = {
    "minimax": {**CONFIGS["hybrid"], "num_local_experts": 16},
    "minimax_m2": {
        **TINY["minimax_m2"].hf_config,
        "vocab_size": 512,
        "hidden_size": 256,
        "head_dim": 64,
        "rotary_dim": 32,
        "num_local_experts": 16,
    },
}
SAMPLING = Sampling(max_tokens=120, eos_ids=(), repetition=RepetitionStop(run_length=0))


class Comparison(NamedTuple):
    """Engine and learner on the same tokens."""

    differ: float
    """Share of the tokens that were read with another set of experts in some layer."""
    alone: Tensor
    """[sampled tokens]: |difference of log-probabilities|, the learner's routers choosing."""
    replayed: Tensor
    """The same with the engine's experts."""


class Side:
    def __init__(self, folder: Path, config: dict[str, Any], dtype: str, **engine_args: object) -> None:
        self.folder, self.dtype = folder, dtype
        for version in range(2):
            policy = init_policy(config, version)
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for router in routers_of(policy):
                    router.weight.copy_(0.3 * torch.randn(router.weight.shape, generator=generator))
            save_policy(policy, folder / str(version))
        core = VLLMEngine(
            str(folder / "0"),
            dtype=dtype,
            max_context=512,
            max_sequences=48,
            seed=0,
            memory=0.2,
            engine_args=engine_args,
            record_routes=True,
        )
        self.engine = ServedEngine(core)
        self.policy = self.learner(0)

    def learner(self, version: int) -> Policy:
        return load_policy(self.folder / str(version), dtype=getattr(torch, self.dtype)).to("cuda").eval()

    @torch.no_grad()
    def compare(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Comparison:
        differ, gaps = [], {False: [], True: []}
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([*prompt, *completion.token_ids], device="cuda")
            reported = routes_of_turns([Turn(context_ids=tuple(prompt), completion=completion)])
            assert reported is not None and len(reported) == len(ids) - 1 and (reported >= 0).all()
            routes = reported.cuda()
            bounds = torch.tensor([0, len(ids) - 1], dtype=torch.int32, device="cuda")
            for replays in (False, True):
                output = self.policy(
                    ids[:-1],
                    torch.arange(len(ids) - 1, device="cuda"),
                    bounds,
                    routes=routes if replays else None,
                )
                if not replays:
                    own = routes_of(output.router).to(torch.int16)
                    differ.append((own.sort(-1).values != routes.sort(-1).values).any(-1).any(-1))
                hidden = output.hidden[len(prompt) - 1 :].float()
                logprobs = (hidden @ self.policy.lm_head_weight.float().T).log_softmax(-1)
                taken = logprobs.gather(1, ids[len(prompt) :, None])[:, 0]
                gaps[replays].append((taken - torch.tensor(completion.logprobs, device="cuda")).abs())
        share = float(torch.cat(differ).double().mean())
        return Comparison(share, torch.cat(gaps[False]), torch.cat(gaps[True]))


def check(name: str, dtype: str, found: Comparison) -> None:
    figures = [f"{float(x):.2e}" for gaps in found[1:] for x in (gaps.mean(), gaps.max())]
    print(f"{name} {dtype}: {found.differ:.4f} differ; mean, max {figures[:2]}; replayed {figures[2:]}")
    assert found.alone.isfinite().all() and found.replayed.isfinite().all()
    if dtype == "float32":
        # A flip in float32 has been seen once in 1,440 tokens. States add up rounding: lightning layers came to 1.0e-4.
        assert found.differ <= 0.002 and found.replayed.max() <= 2e-4
    else:
        # Random experts are orders of magnitude above: 16 choose 2 agree once in 120. The largest of thousands of
        # tokens is one whose probability is small: 1.1 was seen with lightning layers, .04 without.
        assert 0 < found.differ <= 0.4
        assert found.replayed.max() <= 2.0 and found.replayed.mean() <= found.alone.mean()


@pytest.fixture(params=[(name, dtype) for name in FAMILIES for dtype in ("float32", "bfloat16")], ids="-".join)
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Side, str, str]]:
    name, dtype = request.param
    # Chunked prompts: rows arrive in parts.
    side = Side(tmp_path, FAMILIES[name], dtype, max_num_batched_tokens=128)
    yield side, name, dtype
    side.engine.close()


def test_reported_experts_are_those_of_the_pass(side: tuple[Side, str, str]) -> None:
    own, name, dtype = side
    completions = sampled(own.engine, PROMPTS, SAMPLING, 3)
    check(name, dtype, own.compare(PROMPTS, completions))

    async def update_meanwhile() -> list[Completion]:
        call = asyncio.ensure_future(own.engine.generate(PROMPTS, SAMPLING, 4))
        before = own.engine.progress()
        while own.engine.progress() < before + 2000:
            await asyncio.sleep(0)
        await own.engine.begin_update("recompute")
        sender = WeightSender(own.learner(1).to_hf(), bucket_bytes=1 << 22)
        for number in range(len(sender.buckets)):
            own.engine.receive_weights(sender.stage(number, "direct", check=True))
        own.engine.finish_update(1)
        return await call

    completions = asyncio.run(update_meanwhile())
    assert any(len(set(c.versions)) == 2 for c in completions)
    # Recomputed, every row is of the new weights; log-probabilities of the tokens before are not.
    own.policy = own.learner(1)
    whole = [c for c in completions if set(c.versions) == {1}]
    prompts = [p for p, c in zip(PROMPTS, completions, strict=True) if set(c.versions) == {1}]
    if whole:
        check(name, dtype, own.compare(prompts, whole))
    mixed = own.compare(PROMPTS, completions)
    assert mixed.differ <= (0.002 if dtype == "float32" else 0.4)


def test_recording_costs_little(tmp_path: Path) -> None:
    """Tokens a second with and without, printed; both engines one after the other, second calls."""
    rates = {}
    for recorded in (False, True):
        save_policy(init_policy(FAMILIES["minimax"], 0), tmp_path)
        core = VLLMEngine(
            str(tmp_path),
            dtype="bfloat16",
            max_context=512,
            max_sequences=48,
            seed=0,
            memory=0.2,
            record_routes=recorded,
        )
        engine = ServedEngine(core)
        for seed in range(2):
            started = time.perf_counter()
            completions = sampled(engine, PROMPTS[:48], SAMPLING, seed)
            rates[recorded] = sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started)
        assert all((c.routed_experts is not None) == recorded for c in completions)
        engine.close()
    print(f"tokens/s: {rates[False]:.0f} without, {rates[True]:.0f} with experts recorded")
    assert rates[True] > 0.6 * rates[False]
