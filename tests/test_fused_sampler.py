"""The sampler of two launches against vLLM's own: the same tokens and log-probabilities, bit for bit.

python -m pytest tests/test_fused_sampler.py       where there is a GPU; elsewhere only the choice between the two runs
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers  # noqa: E402
from vllm.v1.worker.gpu.sample.sampler import Sampler  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402

from cispo.engines.vllm_sample import FusedSampler  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SLOTS, LONGEST = 16, 64

PLAIN = {"temperature": 1.0}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "plain": [PLAIN],
    "seeds": [{"seed": 7}, {"seed": 8}],
    "temperature": [{"temperature": 0.7}, PLAIN, {"temperature": 1.3, "seed": 3}],
    "greedy": [{"temperature": 0.0}, PLAIN],
    "top_k": [{"top_k": 5}, PLAIN],
    "top_p": [{"top_p": 0.8, "temperature": 0.9}, PLAIN],
    "min_p": [{"min_p": 0.1}, PLAIN],
    "all": [{"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8, "seed": 1}, {"temperature": 0.0}, PLAIN],
    "bias": [{"logit_bias": {3: 5.0}}, PLAIN],
}


@pytest.fixture(autouse=True)
def no_pinned_memory_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)


def vllm_sampler(vocab_size: int, **options: Any) -> Sampler:
    states = RequestState(SLOTS, LONGEST, SLOTS * LONGEST, 0, vocab_size, DEVICE, use_dense_all_token_ids=True)
    config: Any = SimpleNamespace(reasoning_config=None)
    options = {"logprobs_mode": "processed_logprobs"} | options
    return Sampler(config, SLOTS, vocab_size, DEVICE, states, **options)


def opened(sampler: Sampler, settings: list[dict[str, Any]], *, rows: int, logprobs: int | None = 0) -> np.ndarray:
    """Requests with prompts of 9 tokens, settings in turn; their slots, in an order that is not theirs."""
    np.random.seed(0)  # vLLM draws the seeds that are not set
    slots = []
    for row in range(rows):
        name = f"r{row}"
        sampler.req_states.add_request(name, 9, list(range(1, 10)), 0, 20)
        slot = sampler.req_states.req_id_to_index[name]
        sampler.add_request(slot, SamplingParams(logprobs=logprobs, **settings[row % len(settings)]))
        slots.append(slot)
    if GPU:
        sampler.req_states.apply_staged_writes()
        sampler.apply_staged_writes()
    return np.array(slots[::-1])


def input_batch(slots: np.ndarray, *, tokens_each: int, last: int) -> InputBatch:
    """Every request reads `tokens_each` tokens, those of its sequence up to position `last` + its row."""
    rows = len(slots)
    dummy = InputBatch.make_dummy(rows, rows * tokens_each, InputBuffers(SLOTS, SLOTS * LONGEST, DEVICE))
    ends = last + torch.arange(rows, device=DEVICE)
    positions = (ends[:, None] - torch.arange(tokens_each - 1, -1, -1, device=DEVICE)).flatten()
    mapping = torch.from_numpy(slots).to(DEVICE, torch.int32)
    return replace(
        dummy,
        idx_mapping_np=slots,
        idx_mapping=mapping,
        expanded_idx_mapping=mapping,
        positions=positions,
        seq_lens=(ends + 1).to(torch.int32),
    )


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """A part of wider rows, as a padded head leaves it."""
    generator = torch.Generator(DEVICE).manual_seed(rows)
    wide = 4 * torch.randn(rows, vocab_size + 24, generator=generator, device=DEVICE)
    return wide.to(dtype)[:, :vocab_size]


@pytest.mark.skipif(not GPU, reason="the kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1000, 40_960, 151_673])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_is_vllms(name: str, vocab_size: int, dtype: torch.dtype) -> None:
    sampler = vllm_sampler(vocab_size)
    fused = FusedSampler(sampler)
    slots = opened(sampler, SETTINGS[name], rows=11)
    # Of prompts of 9 tokens the first rows have read less by position 4: they get no sample.
    for tokens_each, last in ((1, 20), (1, 4), (3, 4), (1, 21)):
        batch = input_batch(slots, tokens_each=tokens_each, last=last)
        logits = random_logits(len(slots), vocab_size, dtype)
        ours = fused(logits.clone(), batch)
        theirs = sampler(logits.clone(), batch)
        assert ours is not None and theirs.logprobs_tensors is not None
        assert torch.equal(ours.output.sampled_token_ids, theirs.sampled_token_ids)
        assert torch.equal(ours.logprobs, theirs.logprobs_tensors.logprobs[:, 0])
        assert torch.equal(ours.output.num_sampled, theirs.num_sampled)
        assert torch.equal(ours.output.num_rejected, theirs.num_rejected)
        assert torch.equal(ours.positions, batch.positions[batch.logits_indices] + 1)
        assert ours.output.sampled_token_ids.dtype == theirs.sampled_token_ids.dtype
        assert ours.output.num_sampled.dtype == theirs.num_sampled.dtype


@pytest.mark.parametrize("logprobs", [None, 2])
def test_other_log_probabilities_are_left_to_vllm(logprobs: int | None) -> None:
    sampler = vllm_sampler(100)
    slots = opened(sampler, [PLAIN], rows=3, logprobs=logprobs)
    assert FusedSampler(sampler)(torch.zeros(3, 100), input_batch(slots, tokens_each=1, last=20)) is None


def test_drafts_are_left_to_vllm() -> None:
    sampler = vllm_sampler(100)
    batch = input_batch(opened(sampler, [PLAIN], rows=3), tokens_each=2, last=20)
    fused = FusedSampler(sampler)
    assert fused(torch.zeros(6, 100), replace(batch, num_draft_tokens=3)) is None
    assert fused(torch.zeros(6, 100), batch) is None, "two rows of logits a request"


@pytest.mark.parametrize(
    "options", [{}, {"logprobs_mode": "raw_logprobs"}, {"use_fp64_gumbel": True}, {"return_sampling_mask": True}]
)
def test_options_of_the_engine_decide(options: dict[str, Any]) -> None:
    runner: Any = SimpleNamespace(sampler=vllm_sampler(100, **options), batch_sharder=None)
    assert (FusedSampler.of(runner) is None) == bool(options)
    runner.batch_sharder = object()
    assert FusedSampler.of(runner) is None


def test_a_sampler_that_is_not_vllms_is_left_alone() -> None:
    class Watermarking(Sampler):
        pass

    sampler = vllm_sampler(100)
    sampler.__class__ = Watermarking
    runner: Any = SimpleNamespace(sampler=sampler, batch_sharder=None)
    assert FusedSampler.of(runner) is None
