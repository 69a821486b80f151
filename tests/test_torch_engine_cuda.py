"""The torch engine on a GPU: its log-probabilities are the learner's, weights arrive, no step in bfloat16 waits for the
host.

    python -m pytest tests/test_torch_engine_cuda.py        where there is a GPU; skipped elsewhere

In float32 both sides differ by the order of sums. In bfloat16 activations are rounded at every layer in another order
on each side; a wrong position, state or mask would be off by whole nats in the mean.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.torch_sampler import Sampler
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.policy import Policy
from cispo.types import Completion, RepetitionStop, Sampling
from cispo.weights.buckets import WeightSender, tensor_checksum
from tests.tiny_policies import bounds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
HYBRID: dict[str, Any] = {
    **SHAPE,
    "model_type": "minimax",
    "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
CONFIGS = {"llama": {**SHAPE, "model_type": "llama"}, "hybrid": HYBRID}
SAMPLING = Sampling(max_tokens=150, eos_ids=(3,), repetition=RepetitionStop(run_length=0))
PROMPTS = [torch.randint(4, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 9, 40, 77)]
PROMPTS = [prompt for prompt in PROMPTS for _ in range(8)]

# (largest, mean) difference of a log-probability by dtype; in bfloat16 the largest is a token sent to another expert.
LIMITS = {"float32": (1e-4, 1e-5), "bfloat16": (10.0, 0.1)}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / str(request.param)
    save_policy(init_policy(CONFIGS[request.param], seed=0), folder)
    return folder


def engine_of(folder: Path, dtype: str, device: str = "cuda") -> ServedEngine:
    return ServedEngine(TorchEngine(str(folder), dtype=dtype, max_context=256, max_sequences=64, device=device))


def generate(engine: ServedEngine, sampling: Sampling = SAMPLING) -> list[Completion]:
    return asyncio.run(engine.generate(PROMPTS, sampling, 7))


@torch.no_grad()
def differences(policy: Policy, completions: list[Completion]) -> Tensor:
    """Between the engine's log-probabilities and those of one packed pass on the policy's device, [tokens]."""
    device = policy.lm_head_weight.device
    rows = [[*prompt, *done.token_ids] for prompt, done in zip(PROMPTS, completions, strict=True)]
    tokens = torch.tensor([token for row in rows for token in row], device=device)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).to(device)
    cu_seqlens = bounds([len(row) for row in rows]).to(device)
    hidden = policy(tokens, positions, cu_seqlens).hidden
    logprobs = (hidden.float() @ policy.lm_head_weight.float().T).log_softmax(-1).cpu()
    found = []
    for start, prompt, row, done in zip(cu_seqlens.tolist(), PROMPTS, rows, completions, strict=False):
        places = torch.arange(start + len(prompt) - 1, start + len(row) - 1)
        expected = logprobs[places, torch.tensor(done.token_ids)]
        found.append((expected - torch.tensor(done.logprobs)).abs())
    return torch.cat(found)


def check(policy: Policy, completions: list[Completion], dtype: str) -> None:
    found = differences(policy, completions)
    largest, mean = LIMITS[dtype]
    assert found.max().item() <= largest and found.mean().item() <= mean, (found.max(), found.mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_are_the_learners_before_and_after_an_update(folder: Path, dtype: str) -> None:
    engine = engine_of(folder, dtype)
    policy = load_policy(folder, dtype=getattr(torch, dtype)).cuda().eval()
    completions = generate(engine)
    check(policy, completions, dtype)
    lengths = {len(done.token_ids) for done in completions}
    assert len(lengths) > 3 and max(lengths) <= 150, "completions end at an end token or the limit, each for itself"
    assert all(3 not in done.token_ids[:-1] for done in completions)

    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cuda", dtype=torch.float32)
            parameter.add_((0.02 * noise).to(parameter.dtype))
    assert differences(policy, completions).mean().item() > LIMITS[dtype][1], "the new weights are others"
    sender = WeightSender(policy.to_hf(), bucket_bytes=1 << 18)
    assert len(sender.buckets) > 1
    asyncio.run(engine.begin_update("wait"))
    for number in range(len(sender.buckets)):
        engine.receive_weights(sender.stage(number, "direct"))
    engine.finish_update(1)
    assert engine.weight_checksums() == {name: tensor_checksum(weight) for name, weight in policy.to_hf().items()}
    after = generate(engine)
    check(policy, after, dtype)
    assert {version for done in after for version in done.versions} == {1}


def test_greedy_is_the_same_on_cpu_and_gpu(folder: Path) -> None:
    greedy = Sampling(max_tokens=40, eos_ids=(3,), repetition=RepetitionStop(run_length=0), temperature=0.0)
    here, there = (generate(engine_of(folder, "float32", device), greedy) for device in ("cpu", "cuda"))
    assert [done.token_ids for done in here] == [done.token_ids for done in there]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_gpu_between_two_looks(folder: Path, dtype: str) -> None:
    """But for experts in float32: torch's grouped product of that format reads its groups' sizes on the host."""
    if folder.name == "hybrid" and dtype == "float32":
        pytest.skip("torch's grouped product waits in float32")
    policy = load_policy(folder, dtype=getattr(torch, dtype)).cuda().eval()
    # The first sampler compiles kernels.
    for _ in range(2):
        sampler = Sampler(policy, SAMPLING)
        sampler.add(range(len(PROMPTS)), PROMPTS, [100] * len(PROMPTS))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(7):
                assert sampler.step() == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
    while len(sampler):
        sampler.step()
