"""Both engines behind one protocol: ends of completions, meaning of log-probabilities, seeds, bad input; and the file
that carries weights to them."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.engines.drafts import Draft, RunCounter
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.errors import Diverged, UserError
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.minimax.config import LightningConfig, dump_config
from cispo.policies.policy import Policy
from cispo.types import FinishReason, RepetitionStop, Sampling
from cispo.weights.publish import mapped_weights, publish_weights, weights_folder
from tests.patterns import repeats_pattern
from tests.served import sampled, update

VOCAB = 32
CONTEXT = 48
OFF = RepetitionStop(run_length=0)
PLAIN = Sampling(max_tokens=12, eos_ids=(), repetition=OFF)
PROMPTS = [[(3 * i + j) % VOCAB for j in range(1 + i % 7)] for i in range(24)]


def make_policy(folder: Path, certainty: float = 1.0, **changes: Any) -> Policy:
    """A random policy, saved; `certainty` scales its logits."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rotary_dim": 32,
        "lightning_layers": (True, False),
        "num_experts": 2,
        "initializer_range": 0.15,
    }
    policy = init_policy(dump_config(LightningConfig(**(shape | changes))), seed=0)
    with torch.no_grad():
        policy.lm_head_weight.mul_(certainty)
    save_policy(policy, folder)
    return policy


def make_engine(kind: str, folder: Path) -> ServedEngine:
    if kind == "torch":
        return ServedEngine(TorchEngine(str(folder), dtype="float32", max_context=CONTEXT, max_sequences=16))
    return ServedEngine(VLLMEngine(str(folder), dtype="float32", seed=0, max_context=CONTEXT, max_sequences=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    make_policy(path)
    return path


@pytest.fixture(scope="module")
def certain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that gives most of its tokens a probability above 0.99."""
    path = tmp_path_factory.mktemp("certain")
    make_policy(path, certainty=12.0)
    return path


@pytest.fixture(scope="module", params=["vllm", "torch"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[ServedEngine]:
    engine = make_engine(request.param, folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["vllm", "torch"])
def certain_engine(request: pytest.FixtureRequest, certain_folder: Path) -> Iterator[ServedEngine]:
    engine = make_engine(request.param, certain_folder)
    yield engine
    engine.close()


# ---- when a completion ends


def test_run_counter_counts_strictly_above_and_starts_again_below() -> None:
    sure, unsure, edge = math.log(0.995), math.log(0.5), math.log(0.99)
    rule = RepetitionStop(run_length=3, probability=0.99)

    def fired_at(logprobs: Sequence[float], rule: RepetitionStop = rule) -> int | None:
        counter = RunCounter(rule)
        return next((i for i, x in enumerate(logprobs) if counter.fires(x)), None)

    assert fired_at([sure] * 5) == 2
    assert fired_at([sure, sure, unsure, sure, sure, sure]) == 5
    assert fired_at([sure, sure]) is None
    assert fired_at([sure, edge, sure, sure]) is None, "exactly 0.99 is not above 0.99"
    assert fired_at([0.0, 0.0, 0.0]) == 2
    assert fired_at([unsure] * 3, replace(rule, run_length=0)) is None


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=24), size=st.integers(0, 6), count=st.integers(2, 4)
)  # few symbols, so that patterns do occur
def test_pattern_rule_is_vllms(tokens: list[int], size: int, count: int) -> None:
    from vllm.sampling_params import RepetitionDetectionParams
    from vllm.v1.core.sched.utils import check_sequence_repetition

    theirs = check_sequence_repetition(tokens, RepetitionDetectionParams(max_pattern_size=size, min_count=count))
    assert repeats_pattern(tokens, RepetitionStop(pattern_size=size, pattern_count=count)) == theirs


def test_a_draft_keeps_nothing_after_the_token_that_ended_it() -> None:
    rule = RepetitionStop(run_length=2, probability=0.9)
    asked: dict[str, Any] = {"prompt": [1], "sampling": PLAIN, "seed": 0, "limit": 9}
    draft = Draft(**asked, counter=RunCounter(rule))
    draft.extend([4, 5, 6, 7], [-2.0, -0.01, -0.01, -0.01], "length")
    assert (draft.tokens, draft.reason) == ([4, 5, 6], FinishReason.REPETITION)
    draft = Draft(**asked, counter=RunCounter(rule))
    draft.extend([4, 5], [-0.01, -0.01], "stop")
    assert (draft.tokens, draft.reason) == ([4, 5], FinishReason.STOP), "it had ended anyway"
    with pytest.raises(Diverged, match="not finite"):
        Draft(**asked, tokens=[4], logprobs=[math.nan], reason=FinishReason.LENGTH).completion()


def test_eos_and_length(engine: ServedEngine) -> None:
    eos = (1, 2, 3)
    completions = sampled(engine, PROMPTS, replace(PLAIN, eos_ids=eos), seed=3)
    reasons = [c.finish_reason for c in completions]
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        *before, last = completion.token_ids
        assert not set(before) & set(eos)
        assert (last in eos) == (completion.finish_reason is FinishReason.STOP)
        assert len(completion.logprobs) == len(completion.token_ids) <= PLAIN.max_tokens
        assert completion.finish_reason is FinishReason.STOP or len(completion.token_ids) == PLAIN.max_tokens
        assert completion.versions == (0,) * len(completion.token_ids)


def test_the_context_bounds_a_completion(engine: ServedEngine) -> None:
    prompts = [[5] * n for n in (CONTEXT - 1, CONTEXT - 7, 3)]
    completions = sampled(engine, prompts, replace(PLAIN, max_tokens=1000), seed=0)
    assert [len(c.token_ids) for c in completions] == [1, 7, CONTEXT - 3]
    assert {c.finish_reason for c in completions} == {FinishReason.LENGTH}


def test_a_limit_for_each_completion(engine: ServedEngine) -> None:
    prompts = [[5] * n for n in (CONTEXT - 7, 3, 3)]
    completions = sampled(engine, prompts, PLAIN, seed=0, limits=[9, 1, 30])
    assert [len(c.token_ids) for c in completions] == [7, 1, 30]


@pytest.mark.parametrize("run_length", [4, 30])
def test_run_of_near_certain_tokens_ends_a_completion(certain_engine: ServedEngine, run_length: int) -> None:
    rule = RepetitionStop(run_length=run_length, probability=0.99)
    completions = sampled(certain_engine, PROMPTS, replace(PLAIN, max_tokens=30, repetition=rule), seed=1)
    for completion in completions:
        run = [x > math.log(0.99) for x in completion.logprobs]
        firings = [i for i in range(run_length, len(run) + 1) if all(run[i - run_length : i])]
        ended_by_it = len(run) < 30
        # At its last place the limit comes first, whether the rule would fire there or not.
        assert firings == [len(run)] or (not ended_by_it and not firings)
        assert completion.finish_reason is (FinishReason.REPETITION if ended_by_it else FinishReason.LENGTH)
    assert any(len(c.token_ids) < 30 for c in completions) == (run_length == 4)


def test_a_repeated_pattern_ends_a_completion(certain_engine: ServedEngine) -> None:
    rule = RepetitionStop(run_length=0, pattern_size=4, pattern_count=3)
    completions = sampled(certain_engine, PROMPTS, replace(PLAIN, max_tokens=30, repetition=rule), seed=1)
    for completion in completions:
        tokens = completion.token_ids
        repeating = [n for n in range(1, len(tokens) + 1) if repeats_pattern(tokens[:n], rule)]
        stopped = completion.finish_reason is FinishReason.REPETITION
        assert repeating == ([len(tokens)] if stopped else [])
    assert {c.finish_reason for c in completions} == {FinishReason.REPETITION, FinishReason.LENGTH}


# ---- the distribution drawn from, and its log-probabilities


def reference_logprobs(policy: Policy, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling) -> Tensor:
    """Of each token in the distribution that `sampling` draws from, one row at a time, by the definitions."""
    sequence = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        bounds = torch.tensor([0, len(sequence)], dtype=torch.int32)
        hidden = policy(sequence, torch.arange(len(sequence)), bounds).hidden
        logits = (hidden @ policy.lm_head_weight.T)[len(prompt) - 1 : -1]
    results = []
    for row, token in zip(logits, tokens, strict=True):
        probabilities = (row / sampling.temperature).softmax(-1)
        kept = probabilities * (probabilities >= sampling.min_p * probabilities.max())
        kept = kept / kept.sum()
        if sampling.top_k:
            kept = kept * (kept >= kept.sort().values[-sampling.top_k])
            kept = kept / kept.sum()
        ordered = kept.sort(descending=True)
        # The smallest set with a probability of at least top_p.
        size = int((ordered.values.cumsum(0) < sampling.top_p).sum()) + 1
        chosen = ordered.indices[:size]
        results.append((kept[token] / kept[chosen].sum()).log() if token in chosen else torch.tensor(-math.inf))
    return torch.stack(results)


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_logprobs_are_those_of_the_distribution_drawn_from(
    engine: ServedEngine, folder: Path, changes: dict[str, float]
) -> None:
    sampling = replace(PLAIN, **changes)
    policy = load_policy(folder)
    for prompt, completion in zip(PROMPTS, sampled(engine, PROMPTS, sampling, seed=5), strict=True):
        expected = reference_logprobs(policy, prompt, completion.token_ids, sampling)
        assert expected.isfinite().all(), "a token outside the truncated distribution was drawn"
        assert (torch.tensor(completion.logprobs) - expected).abs().max() <= 1e-5


def test_greedy_engines_agree(folder: Path) -> None:
    sampling = replace(PLAIN, temperature=0)
    sides = []
    for kind in ("vllm", "torch"):
        engine = make_engine(kind, folder)
        sides.append(sampled(engine, PROMPTS, sampling, seed=0))
        engine.close()
    for ours, theirs in zip(*sides, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert np.abs(np.subtract(ours.logprobs, theirs.logprobs)).max() <= 1e-5
        assert max(ours.logprobs) < -1e-3, "the policy's own probabilities, not those of a certain choice"


def test_tokens_come_as_often_as_their_probabilities_say(engine: ServedEngine, folder: Path) -> None:
    draws = 3000
    completions = sampled(engine, [[7, 8]] * draws, replace(PLAIN, max_tokens=1), seed=11)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB)
    logprobs = [reference_logprobs(load_policy(folder), [7, 8], [t], PLAIN).item() for t in range(VOCAB)]
    expected = draws * torch.tensor(logprobs).exp()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    # Chi-square with 31 degrees of freedom exceeds 75 with probability 2e-5; the seed makes the test repeatable.
    assert statistic < 75


# ---- seeds


def sample(engine: ServedEngine, seed: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """With ends at different lengths, and more prompts than run at once."""
    completions = sampled(engine, PROMPTS * 2, replace(PLAIN, eos_ids=(1, 2)), seed)
    return [(c.token_ids, c.logprobs) for c in completions]


def test_the_seed_decides(engine: ServedEngine) -> None:
    first = sample(engine, 1)
    other = sample(engine, 2)
    assert sample(engine, 1) == first
    assert [tokens for tokens, _ in other] != [tokens for tokens, _ in first]
    copies = sampled(engine, [[9, 9]] * 8, PLAIN, seed=4)
    assert len({c.token_ids for c in copies}) == 8, "the attempts at one prompt are independent"


def test_another_process_samples_the_same(folder: Path) -> None:
    engine = make_engine("vllm", folder)
    expected = sample(engine, 1)
    engine.close()
    script = (
        "import json, sys; from pathlib import Path; import tests.test_engine as t;"
        "print(json.dumps(t.sample(t.make_engine('vllm', Path(sys.argv[1])), 1)))"
    )
    # Another order of every set of strings.
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": "."}
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    sampled = json.loads(result.stdout.splitlines()[-1])
    assert [(tuple(tokens), tuple(logprobs)) for tokens, logprobs in sampled] == expected


def test_engines_leave_the_process_its_random_streams(folder: Path) -> None:
    for stream in (torch.manual_seed, random.seed, np.random.seed):
        stream(0)
    untouched = torch.rand(3), random.random(), np.random.rand()
    for stream in (torch.manual_seed, random.seed, np.random.seed):
        stream(0)
    engine = make_engine("vllm", folder)
    sampled(engine, PROMPTS, PLAIN, seed=5)
    engine.close()
    after = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(untouched[0], after[0]) and untouched[1:] == after[1:]


# ---- bad input


def test_prompts_without_room_are_named(engine: ServedEngine) -> None:
    with pytest.raises(UserError, match=r"prompt 1 has 48 tokens.*max_context 48"):
        sampled(engine, [[1], [1] * CONTEXT], PLAIN, seed=0)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        sampled(engine, [[]], PLAIN, seed=0)
    assert sampled(engine, [], PLAIN, seed=0) == []
    assert len(sampled(engine, [[1]], PLAIN, seed=0)) == 1, "nothing of the refused calls is left behind"


def test_the_run_rule_needs_the_policys_own_probabilities(engine: ServedEngine) -> None:
    rule = RepetitionStop(run_length=12)
    for changes in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}):
        with pytest.raises(UserError, match=r"repetition\.run_length"):
            sampled(engine, [[1]], replace(PLAIN, repetition=rule, **changes), seed=0)
    out_of_reach = replace(PLAIN, repetition=RepetitionStop(run_length=13), temperature=0.7)
    assert len(sampled(engine, [[1]], out_of_reach, seed=0)) == 1


def test_models_and_arguments_vllm_cannot_run_are_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    def start(path: Path, max_context: int = CONTEXT, **arguments: Any) -> None:
        sizes = {"max_context": max_context, "max_sequences": 4}
        VLLMEngine(str(path), dtype="float32", seed=0, **sizes, **arguments).close()

    with pytest.raises(UserError, match=r"config\.json is missing"):
        start(tmp_path / "nowhere")
    with pytest.raises(UserError, match="max_context 5000 is above the 4096 positions"):
        start(folder, max_context=5000)
    with pytest.raises(UserError, match="no argument 'max_num_sequences'"):
        start(folder, engine_args={"max_num_sequences": 3})
    with pytest.raises(UserError, match=r"vLLM refuses .*block_size"):
        start(folder, engine_args={"block_size": "many"})
    make_policy(tmp_path, head_dim=16, rotary_dim=16)
    with pytest.raises(UserError, match="head_dim 16 cannot be sampled on a CPU"):
        start(tmp_path)


# ---- weights


@pytest.fixture
def weights() -> Iterator[Path]:
    with weights_folder("test") as folder:
        yield folder


def test_a_published_version_arrives_bit_for_bit_and_replaces_the_last(weights: Path) -> None:
    embedding = torch.randn(8, 4)
    state = {
        "a": torch.randn(3, 5).T,  # not contiguous
        "b": torch.randn(7).bfloat16(),
        "embedding": embedding,
        "head": embedding,  # tied
        "part": embedding[2:4],
    }
    first = publish_weights(state, weights, 1)
    held = dict(mapped_weights(first))
    second = publish_weights({name: tensor + 1 for name, tensor in state.items()}, weights, 2)
    assert [p.name for p in weights.iterdir()] == [second.name]
    assert held.keys() == state.keys() and all(torch.equal(held[n], state[n]) for n in state), "a mapped file stays"
    assert all(torch.equal(t, state[n] + 1) for n, t in mapped_weights(second))
    with pytest.raises(UserError, match="do not exist"):
        dict(mapped_weights(first))


def test_a_version_that_cannot_be_written_leaves_the_last_alone(weights: Path, tmp_path: Path) -> None:
    state = {"a": torch.zeros(2)}
    path = publish_weights(state, weights, 1)
    with pytest.raises(UserError, match="cannot write the weights"):
        publish_weights(state, tmp_path / "missing", 2)
    assert list(weights.iterdir()) == [path]


def test_the_learners_side_does_not_import_vllm() -> None:
    script = "import sys, cispo.weights.publish, cispo.engines.engine; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True, timeout=600)


def test_an_update_changes_what_is_sampled(folder: Path, certain_folder: Path, weights: Path) -> None:
    for kind in ("vllm", "torch"):
        engine, target = make_engine(kind, folder), make_engine(kind, certain_folder)
        path = publish_weights(load_policy(certain_folder).to_hf(), weights, 3)
        with pytest.raises(UserError, match="do not exist"):
            update(engine, str(weights / "weights-00000009.safetensors"), 9)
        assert engine.version == 0
        update(engine, str(path), 3)
        assert engine.version == 3
        updated, expected = sampled(engine, PROMPTS, PLAIN, seed=2), sampled(target, PROMPTS, PLAIN, seed=2)
        assert [c.logprobs for c in updated] == [c.logprobs for c in expected]
        assert {version for c in updated for version in c.versions} == {3}
        for each in (engine, target):
            each.close()
