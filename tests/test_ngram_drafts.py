"""Drafts of n-grams: an engine with them samples the policy's distribution, and reports the policy's log-probabilities.

python -m pytest tests/test_ngram_drafts.py       where there is a GPU also the second model runner, end to end
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.sampler import Sampler as FirstSampler  # noqa: E402
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata  # noqa: E402

from cispo.engines import vllm_drafts  # noqa: E402
from cispo.engines.serving import ServedEngine  # noqa: E402
from cispo.engines.vllm_drafts import FirstRejectionSampler, Runs, SecondRejectionSampler  # noqa: E402
from cispo.engines.vllm_engine import VLLMEngine  # noqa: E402
from cispo.engines.vllm_logprobs import RecordingSampler  # noqa: E402
from cispo.errors import UserError  # noqa: E402
from cispo.policies.loading import init_policy, save_policy  # noqa: E402
from cispo.policies.policy import Policy  # noqa: E402
from cispo.types import Completion, FinishReason, RepetitionStop, Sampling  # noqa: E402
from cispo.weights.publish import publish_weights, weights_folder  # noqa: E402
from tests.served import sampled, update  # noqa: E402
from tests.test_fused_sampler import input_batch, opened, vllm_sampler  # noqa: E402
from tests.test_updates_in_flight import BLOCKS, EXACT, PLAIN, RULED, Kind, interleaved  # noqa: E402
from tests.test_updates_in_flight import running as running_kind  # noqa: E402
from tests.test_vllm_parity import QWEN3, counting, lightning, random_prompts, scheduler  # noqa: E402
from tests.tiny_hybrids import TINY, draw_weights  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

TOLERANCE = 4e-5
"""Largest difference of two float32 log-probabilities: with these sharp weights engine and learner are up to 1.9e-5 and
1.2e-5 from the learner's float64."""

K = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

# Such weights repeat themselves: a tenth of the drafts is right.
ECHOING = QWEN3 | {"initializer_range": 0.5, "tie_word_embeddings": True}

# Some prompts have an n-gram to look up from the first step on, others none.
PROMPTS = [3 * prompt[:5] + prompt for prompt in random_prompts([8, 16, 5, 20, 40, 70], seed=4)] + [
    [n] for n in range(6)
]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**({"max_tokens": 60, "eos_ids": (), "repetition": RepetitionStop(run_length=0)} | changes))


@contextmanager
def running(
    folder: Path, drafts: dict[str, Any] | None = NGRAM, *, ranks: int = 1, **engine_args: Any
) -> Iterator[ServedEngine]:
    arguments = engine_args | ({} if drafts is None else {"speculative_config": drafts})
    sizes: dict[str, Any] = {"max_context": 256, "max_sequences": 12, "seed": 0, "tensor_parallel": ranks}
    engine = ServedEngine(VLLMEngine(str(folder), dtype="float32", engine_args=arguments, **sizes))
    try:
        yield engine
    finally:
        engine.close()


def counts(engine: ServedEngine) -> tuple[int, int]:
    """Drafts proposed and accepted since the start."""
    assert isinstance(engine.engine, VLLMEngine)
    return engine.engine._engine.collective_rpc("draft_counts")[0]


def policy_logprobs(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], rule: Sampling
) -> Tensor:
    """Of every sampled token, under the distribution that `rule` makes of the policy's logits."""
    sequences = [[*p, *c.token_ids] for p, c in zip(prompts, completions, strict=True)]
    starts = list(accumulate((len(s) for s in sequences), initial=0))
    tokens = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    rows = [n for start, p, s in zip(starts, prompts, sequences, strict=False) for n in _rows(start, len(p), len(s))]
    with torch.no_grad():
        hidden = policy(tokens, positions, torch.tensor(starts, dtype=torch.int32)).hidden[rows]
    logits = hidden @ policy.lm_head_weight.T / (rule.temperature or 1)
    if rule.top_p < 1:
        ordered, index = logits.sort(-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - rule.top_p
        logits = logits.scatter(-1, index, ordered.masked_fill(dropped, -torch.inf))
    return logits.log_softmax(-1).gather(1, tokens[1:][rows, None])[:, 0]


def _rows(start: int, prompt: int, end: int) -> range:
    return range(start + prompt - 1, start + end - 1)


def difference(engine: ServedEngine, policy: Policy, rule: Sampling, seed: int = 0) -> float:
    """The largest of the log-probabilities that the engine reports for what it samples now."""
    completions = sampled(engine, PROMPTS, rule, seed)
    assert [len(c.token_ids) for c in completions] == [rule.max_tokens] * len(PROMPTS)
    reported = torch.tensor([x for c in completions for x in c.logprobs])
    expected = policy_logprobs(policy, PROMPTS, completions, rule)
    assert reported.isfinite().all() and expected.isfinite().all()
    return (reported - expected).abs().max().item()


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Policy]]:
    """A folder with the first of two versions of a policy, and the two."""
    folder = tmp_path_factory.mktemp("echoing")
    policies = [init_policy(ECHOING, seed) for seed in range(2)]
    save_policy(policies[0], folder)
    return folder, policies


def first_metadata(rows: int, **changes: Any) -> SamplingMetadata:
    """A step of vLLM's first model runner in which every request has the same settings."""
    settings: dict[str, Any] = {"temperature": torch.ones(rows), "all_greedy": False, "all_random": True}
    settings |= {"top_p": None, "top_k": None, "generators": {}, "max_num_logprobs": 0, "no_penalties": True}
    settings |= {"prompt_token_ids": None, "output_token_ids": [[] for _ in range(rows)], "bad_words_token_ids": {}}
    settings |= dict.fromkeys(("frequency_penalties", "presence_penalties", "repetition_penalties"), torch.zeros(rows))
    return SamplingMetadata(**settings, allowed_token_ids_mask=None, logitsprocs=LogitsProcessors(), **changes)


def test_tokens_have_the_policys_distribution_at_every_place() -> None:
    """8,000 sequences of one text: frequencies of each place, given that the run has reached it, by a chi-square."""
    torch.manual_seed(0)
    number, vocab, drafts = 8_000, 6, [2, 4]
    logits = torch.randn(len(drafts) + 1, vocab)
    probs, logprobs = logits.softmax(-1), logits.log_softmax(-1)
    metadata = SpecDecodeMetadata.make_dummy([drafts] * number, torch.device("cpu"))
    sampler = FirstRejectionSampler(FirstSampler("processed_logprobs"))
    output = sampler(metadata, None, logits.repeat(number, 1), first_metadata(number))
    tokens, reported = output.sampled_token_ids.long(), output.logprobs_tensors
    assert reported is not None
    for place in range(len(drafts) + 1):
        reached = tokens[:, place] >= 0
        assert torch.equal(reached, (tokens[:, :place] == torch.tensor(drafts[:place])).all(1))
        seen, expected = tokens[reached, place].bincount(minlength=vocab), probs[place] * reached.sum()
        statistic = ((seen - expected) ** 2 / expected).sum()
        assert statistic < 22, "5 degrees of freedom: above 22 once in 2,000 times"
        known = reported.logprobs.view(number, -1)[reached, place]
        torch.testing.assert_close(known, logprobs[place][tokens[reached, place]])
    accepted = (tokens[:, 1:] >= 0).sum().item()
    assert sampler.counts() == (2 * number, accepted) and accepted > 0


def as_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of vLLM's kernels, which need a GPU."""

    def gather(
        ids: Tensor, positions: Tensor, indices: Tensor, mapping: Tensor, places: Tensor, prefill: Tensor
    ) -> Any:
        ids, positions = ids[indices], positions[indices]
        return torch.where((places > 0) & (positions - places < prefill[mapping]), -1, ids), positions

    def runs(tokens: Tensor, drafts: Tensor, batch: Any, prefill: Tensor, width: int, accepted: Tensor) -> Runs:
        lengths, bounds = torch.ones(len(batch.req_ids), dtype=torch.int32), batch.cu_num_logits.tolist()
        by_sequence = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, (start, end) in enumerate(pairwise(bounds)):
            by_sequence[row, : end - start] = tokens[start:end]
            while lengths[row] < end - start and drafts[start + lengths[row]] == tokens[start + lengths[row] - 1]:
                lengths[row] += 1
        lengths[batch.seq_lens < prefill[batch.idx_mapping]] = 0
        accepted += (lengths - 1).clamp(min=0).sum()
        rows = batch.cu_num_logits.diff()
        counted = [
            place < length for length, n in zip(lengths.tolist(), rows.tolist(), strict=True) for place in range(n)
        ]
        return Runs(by_sequence, lengths, (rows - lengths) * (lengths > 0), torch.tensor(counted).to(torch.int32))

    monkeypatch.setattr(vllm_drafts, "gather_draft_sampled", gather)
    monkeypatch.setattr(vllm_drafts, "find_runs", runs)
    monkeypatch.setattr(vllm_drafts, "compute_token_logprobs", lambda x, ids: x.log_softmax(-1).gather(1, ids))


class KeyedSampler:
    """Draws by (slot of the request, position), as vLLM's second sampler does; `req_states` has prompts' lengths."""

    def __init__(self, prompts: Tensor) -> None:
        self.req_states = SimpleNamespace(prefill_len=SimpleNamespace(gpu=prompts), device=prompts.device)

    def sample(self, logits: Tensor, slots: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions = args[2]
        noise = [
            torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(1000 * slot + place))
            for slot, place in zip(slots.tolist(), positions.tolist(), strict=True)
        ]
        return (logits - (-torch.stack(noise).log()).log()).argmax(-1), logits


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_second_runner_samples_the_tokens_of_an_engine_without_drafts(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_drafts, "get_max_chunk_logits", lambda vocab: chunk)
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: GPU)
    vocab, rows = 100, torch.tensor([4, 1, 4, 3, 2])
    bounds, total = torch.tensor([0, *accumulate(rows.tolist())]), int(rows.sum())
    starts = torch.tensor([20, 25, 8, 30, 21])
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts.tolist(), rows.tolist(), strict=True)])
    places = torch.cat([torch.arange(n) for n in rows.tolist()]).to(torch.int32)
    logits = 3 * torch.randn(total, vocab, generator=torch.Generator().manual_seed(seed))

    slots = np.array([3, 0, 4, 1, 2])
    sampler: Any = vllm_sampler(vocab)
    if GPU:
        slots = opened(sampler, [{"seed": 7}, {"seed": 8, "temperature": 0.7, "top_p": 0.9}], rows=5)
    else:
        as_plain_torch(monkeypatch)
        sampler = KeyedSampler(torch.full((16,), 9))
    plain = input_batch(slots, tokens_each=1, last=20)
    mapping = plain.idx_mapping.repeat_interleave(rows.to(DEVICE))
    on_device = {"positions": positions, "expanded_local_pos": places, "logits_indices": torch.arange(total)}
    on_device |= {"cu_num_logits": bounds.to(torch.int32), "seq_lens": (starts + rows).to(torch.int32)}
    host = {"seq_lens_cpu_upper_bound": (starts + rows).to(torch.int32), "cu_num_logits_np": bounds.numpy()}
    moved = {name: value.to(DEVICE) for name, value in on_device.items()}
    batch = replace(
        plain, expanded_idx_mapping=mapping, num_draft_tokens=total - 5, req_ids=list("abcde"), **moved, **host
    )

    # Every row by itself: what an engine without drafts would sample there.
    arguments = (
        batch.idx_mapping,
        slots,
        batch.positions,
        mapping,
        batch.expanded_local_pos,
        host["seq_lens_cpu_upper_bound"].numpy(),
    )
    tokens, processed = sampler.sample(logits.to(DEVICE), mapping, *arguments, return_logprobs=True)
    drafts = tokens.roll(1).to(torch.int32)
    drafts[int(bounds[4]) + 1] += 1  # wrong
    recorder = RecordingSampler(sampler)
    second = SecondRejectionSampler(sampler, K, recorder.record)
    output = second(logits.to(DEVICE), replace(batch, input_ids=drafts), None, None)

    # The third sequence began to read its drafts within its prompt: none of them counts.
    lengths = [4, 1, 1, 3, 1]
    assert output.num_sampled.tolist() == lengths and output.num_rejected.tolist() == [0, 0, 3, 0, 1]
    for row, (start, length) in enumerate(zip(bounds.tolist(), lengths, strict=False)):
        assert torch.equal(output.sampled_token_ids[row, :length], tokens[start : start + length])
    assert second.counts() == (total - 5, 5)
    recorder.send()
    records = recorder.take()
    kept = (places < torch.tensor(lengths).repeat_interleave(rows)).numpy()
    assert records.requests == [name for name, count in zip("abcde", rows.tolist(), strict=True) for _ in range(count)]
    assert (records.positions == positions.numpy() + 1).all() and (records.sampled == kept).all()
    expected = processed.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
    torch.testing.assert_close(torch.from_numpy(records.logprobs), expected)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 0.7, "top_p": 0.9}, id="truncated", marks=pytest.mark.slow),
    ],
)
def test_engine_equals_learner_before_and_after_an_update(
    rule: dict[str, Any], echoing: tuple[Path, list[Policy]]
) -> None:
    folder, policies = echoing
    with weights_folder("test") as weights, running(folder) as engine:
        assert difference(engine, policies[0], sampling(**rule)) <= TOLERANCE
        drafted, accepted = counts(engine)
        assert drafted > accepted > 50
        update(engine, str(publish_weights(policies[1].to_hf(), weights, 1)), 1)
        assert difference(engine, policies[1], sampling(**rule), seed=1) <= TOLERANCE


MODES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 20},
    "prefix_cache_preempted": {"enable_prefix_caching": True, "num_gpu_blocks_override": 8, "block_size": 128},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_scheduling_samples_the_policys_greedy_tokens(
    mode: str, echoing: tuple[Path, list[Policy]]
) -> None:
    folder, policies = echoing
    greedy = sampling(temperature=0)
    with running(folder, None) as engine:
        expected = sampled(engine, PROMPTS, greedy, 0)
    with running(folder, **MODES[mode]) as engine:
        preemptions = counting(scheduler(engine), "_preempt_request", lambda _: 1)
        assert difference(engine, policies[0], greedy) <= TOLERANCE
        assert [c.token_ids for c in sampled(engine, PROMPTS, greedy, 0)] == [c.token_ids for c in expected]
        assert counts(engine)[1] > 100
    assert (preemptions[0] > 0) == ("preempted" in mode)


def test_ends_inside_of_a_run_of_drafts(echoing: tuple[Path, list[Policy]]) -> None:
    """An end-of-sequence token, or the limit of a completion's tokens, with accepted drafts behind it."""
    folder, _ = echoing
    limits = [17 + n for n in range(len(PROMPTS))]
    greedy = sampling(temperature=0)
    with running(folder, None) as engine:
        whole = sampled(engine, PROMPTS, greedy, 0)
        # A token that comes late in some completions, among repeated ones, and never in others.
        last = max(whole[0].token_ids, key=whole[0].token_ids[20:].count)
        ending = sampling(temperature=0, eos_ids=(last,))
        expected = [sampled(engine, PROMPTS, rule, 0, limits) for rule in (greedy, ending)]
    with running(folder) as engine:
        assert isinstance(engine.engine, VLLMEngine)
        runs = counting(engine.engine._core, "get_output", lambda output: len(output.outputs))
        found = [sampled(engine, PROMPTS, rule, 0, limits) for rule in (greedy, ending)]
        emitted = sum(len(c.token_ids) for completions in found for c in completions)
        assert engine.engine.sampled == emitted, "tokens behind an end are not counted"
        assert runs[0] + counts(engine)[1] > emitted, "accepted drafts behind an end"
    assert [[c.token_ids for c in cs] for cs in found] == [[c.token_ids for c in cs] for cs in expected]
    assert [[c.finish_reason for c in cs] for cs in found] == [[c.finish_reason for c in cs] for cs in expected]
    assert {c.finish_reason for c in found[1]} == {FinishReason.STOP, FinishReason.LENGTH}
    assert [len(c.token_ids) for c in found[0]] == limits


@pytest.mark.slow
def test_updates_cancelled_calls_and_rules_between_drafts(tmp_path: Path) -> None:
    arguments = {"enable_prefix_caching": True, "num_gpu_blocks_override": BLOCKS["dense"], "block_size": 128}
    with weights_folder("test") as weights:
        kind = Kind(tmp_path, weights, ECHOING)
        with running_kind(kind, speculative_config=NGRAM, **arguments) as engine:
            for seed, rule in enumerate([PLAIN, RULED]):
                largest = asyncio.run(asyncio.wait_for(interleaved(engine, kind, seed, EXACT, rule), 60))
                assert largest <= TOLERANCE
            assert counts(engine)[1] > 0


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("minimax_m2", marks=pytest.mark.slow)])
def test_policies_of_softmax_and_latent_attention(family: str, tmp_path: Path) -> None:
    policy = init_policy(TINY[family].hf_config, 0)
    draw_weights(policy, 0)
    save_policy(policy, tmp_path)
    with running(tmp_path) as engine:
        assert difference(engine, policy, sampling(temperature=0.25)) <= 4 * TOLERANCE
        assert counts(engine)[1] > 20


@pytest.mark.parametrize("family", ["lightning", "qwen3_next", "kimi_linear"])
def test_policies_with_recurrent_states_are_refused(family: str, tmp_path: Path) -> None:
    save_policy(init_policy(lightning() if family == "lightning" else TINY[family].hf_config, 0), tmp_path)
    with pytest.raises(
        UserError, match=r"engine_args.speculative_config must stay unset for this policy: its recurrent"
    ):
        VLLMEngine(
            str(tmp_path),
            dtype="float32",
            max_context=256,
            max_sequences=4,
            seed=0,
            engine_args={"speculative_config": NGRAM},
        )
