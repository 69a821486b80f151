"""Sampling with a cache is the policy itself: hidden states, log-probabilities, ends, rows that come and go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.engines import torch_sampler
from cispo.engines.drafts import start_drafts
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.torch_sampler import Sampled, Sampler, draw
from cispo.errors import Diverged
from cispo.policies import cache as cache_module
from cispo.policies.cache import Cache
from cispo.policies.families import short_step
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.policy import Policy
from cispo.types import FinishReason, RepetitionStop, Sampling
from cispo.weights.buckets import WeightSender
from tests import served
from tests.patterns import repeats_pattern
from tests.tiny_hybrids import TINY
from tests.tiny_policies import DENSE, LLAMA, MINIMAX, ORIGINAL, QWEN3, bounds, logprobs, tokens_of

TOLERANCE = 1e-5
PLAIN = Sampling(max_tokens=90, eos_ids=(), repetition=RepetitionStop(run_length=0))
KINDS: dict[str, dict[str, Any]] = {
    "minimax": MINIMAX,
    "minimax, all experts at once": {**MINIMAX, "num_local_experts": 4, "tie_word_embeddings": True},
    "original, shared expert": {
        **ORIGINAL,
        "initializer_range": 0.08,
        "shared_intermediate_size": 12,
        "postnorm": False,
    },
    "qwen3": QWEN3,
    "llama": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, scaled rotary": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **DENSE},
    "mistral": {"model_type": "mistral", "sliding_window": None, **DENSE},
    "olmo2, the modules alone": {"model_type": "olmo2", **DENSE},
}
EVERY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def make(config: dict[str, Any]) -> Policy:
    """A random policy whose biases and norms are not those of a fresh one."""
    policy = init_policy(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def sampled(policy: Policy, prompts: Sequence[Sequence[int]], limits: Sequence[int], **changes: Any) -> list[Sampled]:
    """One for each prompt, in order."""
    torch.manual_seed(3)
    sampler = Sampler(policy, Sampling(**{"max_tokens": 90, "eos_ids": (), **changes}))
    sampler.add(range(len(prompts)), prompts, limits)
    done: list[Sampled] = []
    while len(sampler):
        done += sampler.step()
    assert sampler.unfinished() == []
    assert sorted(s.request for s in done) == list(range(len(prompts)))
    return sorted(done, key=lambda s: s.request)


def differences(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]) -> list[Tensor]:
    """Between the sampler's log-probabilities and the policy's of the whole sequences, [tokens] for each completion."""
    rows = []
    for prompt, done in zip(prompts, completions, strict=True):
        sequence = torch.tensor([*prompt, *done.tokens])
        with torch.no_grad():
            expected = logprobs(policy, sequence)[len(prompt) - 1 : -1].float()
        rows.append((torch.tensor(done.logprobs) - expected.gather(1, sequence[len(prompt) :, None])[:, 0]).abs())
    return rows


def largest_difference(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]) -> float:
    return torch.cat(differences(policy, prompts, completions)).max().item()


# Groups of one prompt, prompts of their own, and single tokens; ends at different steps, in another order than rows.
PROMPTS = [tokens_of(n, seed=n).tolist() for n in (7, 7, 7, 1, 31, 31, 12, 1, 70, 3)]
LIMITS = (5, 90, 1, 40, 2, 80, 33, 17, 64, 64)


@EVERY_KIND
def test_logprobs_are_the_policys(config: dict[str, Any]) -> None:
    policy = make(config)
    completions = sampled(policy, PROMPTS, LIMITS)
    assert [len(c.tokens) for c in completions] == list(LIMITS)
    assert {c.reason for c in completions} == {FinishReason.LENGTH}
    assert largest_difference(policy, PROMPTS, completions) <= TOLERANCE


@pytest.mark.parametrize("looks", [1, 4, 1000])
def test_ended_rows_that_the_host_has_not_seen(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change nothing: on a GPU the host looks every few steps."""
    policy = make(KINDS["minimax"])
    expected = sampled(policy, PROMPTS, LIMITS, temperature=0.0)
    monkeypatch.setattr(torch_sampler, "_LOOKS", {"cpu": looks})
    sampler = Sampler(policy, Sampling(max_tokens=90, eos_ids=(), temperature=0.0))
    sampler.add(range(len(PROMPTS)), PROMPTS, LIMITS)
    done, steps = list[Sampled](), 0
    while len(sampler):
        done += sampler.step()
        steps += 1
        if steps == max(LIMITS):
            done += sampler.collect()
    assert steps == max(LIMITS)
    done.sort(key=lambda one: one.request)
    assert [(d.tokens, d.reason) for d in done] == [(e.tokens, e.reason) for e in expected]
    assert largest_difference(policy, PROMPTS, done) <= TOLERANCE


def test_settling_completes_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sampler, "_LOOKS", {"cpu": 1000})
    save_policy(make(KINDS["minimax"]), tmp_path)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_context=100, max_sequences=8)
    drafts = start_drafts([[3, 4, 5]] * 3, PLAIN, 0, max_context=100, limits=[2, 9, 4])
    engine.submit(drafts)
    assert [engine.step() for _ in range(6)] == [[]] * 6
    assert set(engine.settle()) == {drafts[0], drafts[2]}
    assert [len(draft.tokens) for draft in drafts] == [2, 6, 4]
    engine.drop([drafts[1]])
    assert engine.step() == []


HYBRIDS = {name: tiny.hf_config for name, tiny in TINY.items()}


@pytest.mark.parametrize("kind", ["minimax", "llama", "qwen3", *HYBRIDS])
def test_a_step_reads_nothing_back_and_stays_on_its_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no value can be read, and no tensor meets one of another device: as a GPU wants it."""
    # A width of 16 bytes: products of experts with any other one are cut on the host.
    config = {**KINDS, **HYBRIDS, "minimax": {**MINIMAX, "intermediate_size": 48}}[kind]
    monkeypatch.setattr(torch_sampler, "_LOOKS", {"cpu": 8})
    policy = init_policy({"vocab_size": 40, **config}, seed=0).bfloat16().eval()
    sampler = Sampler(policy, PLAIN)
    sampler.add(range(3), [[4, 5, 6], [4, 5, 6], [7, 8]], [9, 9, 9])
    assert sampler.step() == []
    meta = torch.device("meta")
    policy.to(meta)
    for module in policy.modules():
        if isinstance(slopes := getattr(module, "slopes", None), Tensor):
            module.slopes = slopes.to(meta)
    rows, cache = sampler._rows, sampler._cache
    assert rows is not None
    for name in rows.__slots__:
        setattr(rows, name, getattr(rows, name).to(meta))
    cache.lengths, cache.states = cache.lengths.to(meta), [state.to(meta) for state in cache.states]
    cache.stores = [[store.to(meta) for store in layer] for layer in cache.stores]
    sampler._device = meta
    assert [sampler.step() for _ in range(6)] == [[]] * 6
    assert rows.tokens.device == rows.hidden.device == rows.count.device == meta


@pytest.mark.parametrize("kind", ["minimax", "qwen3"])
def test_buckets_of_a_learner_in_the_same_process_arrive(kind: str, tmp_path: Path) -> None:
    policy = make(KINDS[kind])
    save_policy(policy, tmp_path)
    engine = ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=100, max_sequences=8))
    served.sampled(engine, [[3, 4, 5]], PLAIN, seed=0)  # copies of merged weights exist
    policy.load_hf((name, 1.2 * weight) for name, weight in policy.to_hf().items())
    sender = WeightSender(policy.to_hf(), bucket_bytes=1 << 14)
    assert len(sender.buckets) > 2
    asyncio.run(engine.begin_update("wait"))
    for number in range(len(sender.buckets)):
        engine.receive_weights(sender.stage(number, "direct"))
    engine.finish_update(1)
    (done,) = served.sampled(engine, [[3, 4, 5]], PLAIN, seed=0)
    assert set(done.versions) == {1}
    as_sampled = Sampled(0, list(done.token_ids), list(done.logprobs), done.finish_reason)
    assert largest_difference(policy, [[3, 4, 5]], [as_sampled]) <= TOLERANCE
    # A version with a part missing is refused.
    asyncio.run(engine.begin_update("wait"))
    engine.receive_weights(sender.stage(0, "direct"))
    with pytest.raises(AssertionError, match="the weights lack"):
        engine.finish_update(2)


@EVERY_KIND
def test_a_step_sees_weights_that_changed_in_place(config: dict[str, Any]) -> None:
    """Also those of which it keeps a copy."""
    policy = make(config)
    step, tokens = short_step(policy), torch.tensor([3])
    results = []
    for _ in range(2):
        pair = []
        for short in (step, None):
            cache = Cache()
            with torch.inference_mode():
                cache.read(policy, PROMPTS[:1], [0])
                pair.append(cache.step(policy, tokens, short))
        assert (pair[0] - pair[1]).abs().max() <= 2 * TOLERANCE
        results.append(pair[0])
        policy.load_hf((name, 1.5 * weight) for name, weight in policy.to_hf().items())
    assert (results[0] - results[1]).abs().max() > 0.01


@EVERY_KIND
def test_a_cache_that_has_been_used(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds on to changes nothing; above a bound it holds nothing."""
    policy = make(config)
    first = sampled(policy, PROMPTS, LIMITS)
    torch.manual_seed(5)
    sampler = Sampler(policy, Sampling(max_tokens=90, eos_ids=()))
    for bound in (cache_module._IDLE_BYTES, 0):
        monkeypatch.setattr(cache_module, "_IDLE_BYTES", bound)
        for seed in (4, 3):
            torch.manual_seed(seed)
            sampler.add(range(len(PROMPTS)), PROMPTS, LIMITS)
            done = [s for _ in range(max(LIMITS)) for s in sampler.step()]
            assert not len(sampler) and (sampler._cache.rows > 0) == (bound > 0)
        assert sorted(done, key=lambda s: s.request) == first


@EVERY_KIND
@pytest.mark.parametrize("short", [True, False], ids=["short", "modules"])
def test_steps_continue_a_forward_pass(config: dict[str, Any], short: bool) -> None:
    policy = make(config)
    step = short_step(policy)
    assert (step is None) == (config.get("model_type") == "olmo2")
    continued = torch.stack([tokens_of(70, seed=100 + row) for row in range(len(PROMPTS))])
    cache = Cache()
    with torch.inference_mode():
        distinct = [PROMPTS[0], *PROMPTS[3:]]
        hidden = [cache.read(policy, distinct, [0, 0, 0, *range(1, len(distinct))])]
        hidden += [cache.step(policy, tokens, step if short else None) for tokens in continued.unbind(1)]
        for row, prompt in enumerate(PROMPTS):
            whole = torch.cat([torch.tensor(prompt), continued[row]])
            expected = policy(whole, torch.arange(len(whole)), bounds([len(whole)])).hidden[len(prompt) - 1 :]
            # Hidden states of size 3 through float32 norms: either form is up to 1.2e-5 from float64.
            assert (torch.stack([h[row] for h in hidden]) - expected).abs().max() <= 2 * TOLERANCE


@EVERY_KIND
def test_bfloat16_stays_as_close_as_its_rounding(config: dict[str, Any]) -> None:
    policy = init_policy(config, seed=0, dtype=torch.bfloat16).eval()
    assert short_step(policy) is None
    completions = sampled(policy, PROMPTS, LIMITS)
    assert largest_difference(policy, PROMPTS, completions) <= 0.1


def test_rows_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that start, end and are aborted while others go on, read in several passes."""
    monkeypatch.setattr(torch_sampler, "_TOKENS_PER_READ", 40)
    policy = make(MINIMAX)
    sampler = Sampler(policy, PLAIN)
    done: dict[int, Sampled] = {}
    sampler.add([0, 1, 2, 3, 4], PROMPTS[:5], LIMITS[:5])
    for number in range(100):
        if number == 3:
            sampler.abort([3, 77])
        if number == 20:
            sampler.add([5, 6, 7, 8, 9], PROMPTS[5:], LIMITS[5:])
        if number == 30:
            sampler.abort([5])
        done |= {s.request: s for s in sampler.step()}
        if number == 95:
            assert len(sampler) == 0
            sampler.add([10], PROMPTS[:1], [4])
    left = [0, 1, 2, 4, 6, 7, 8, 9]
    assert sorted(done) == [*left, 10] and len(done[10].tokens) == 4
    assert largest_difference(policy, [PROMPTS[i] for i in left], [done[i] for i in left]) <= TOLERANCE


@pytest.mark.parametrize("recompute", [True, False])
def test_weights_that_change_between_steps(recompute: bool) -> None:
    """Tokens sampled before an update match the old weights; those after it the new ones where all is read again, and
    else neither: keys and values of the old weights are still what is attended to."""
    policy = make(QWEN3)
    sampler = Sampler(policy, PLAIN)
    sampler.add(range(3), PROMPTS[2:5], [6] * 3)
    for _ in range(3):
        sampler.step()
    with torch.no_grad():
        policy.lm_head_weight.mul_(-1)  # tied: the embedding too
    if recompute:
        sampler.recompute(dict(enumerate(PROMPTS[2:5])))
    ended = sorted((s for _ in range(3) for s in sampler.step()), key=lambda s: s.request)
    new = torch.stack(differences(policy, PROMPTS[2:5], ended))
    with torch.no_grad():
        policy.lm_head_weight.mul_(-1)
    old = torch.stack(differences(policy, PROMPTS[2:5], ended))
    assert old[:, :3].max() <= TOLERANCE and old[:, 3:].amin(0).max() > 1e-3
    assert new[:, 3:].max() <= TOLERANCE if recompute else new[:, 3:].median() > 1e-3


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 5), count=st.integers(2, 4), eos=st.booleans())
def test_ends_are_those_of_the_rules(data: st.DataObject, size: int, count: int, eos: bool) -> None:
    """Rows of given tokens: each ends where `repeats_pattern`, the limit and the end token say, for their reason; that
    all is computed again in between changes nothing."""
    rule = RepetitionStop(run_length=0, pattern_size=size, pattern_count=count)
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=4))
    limits = data.draw(st.lists(st.integers(1, 12), min_size=len(rows), max_size=len(rows)))
    given_tokens, again = torch.tensor(rows), data.draw(st.integers(0, 12))

    def scripted(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        assert sampler._rows is not None
        at = sampler._rows
        return given_tokens[at.request, at.count], torch.zeros(len(logits))

    sampler = Sampler(_POLICY, Sampling(max_tokens=12, eos_ids=(2,) if eos else (), repetition=rule))
    sampler.add(range(len(rows)), [[1]] * len(rows), limits)
    ended: dict[int, Sampled] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sampler, "draw", scripted)
        for number in itertools.count():
            assert all(s.tokens == rows[s.request][:number] for s in sampler.unfinished())
            if number == again:
                sampler.recompute(dict.fromkeys(range(len(rows)), [1]))
            if not len(sampler):
                break
            ended |= {s.request: s for s in sampler.step()}
    for row, (tokens, limit) in enumerate(zip(rows, limits, strict=True)):
        for end in range(1, 13):
            stops, repeats = eos and tokens[end - 1] == 2, repeats_pattern(tokens[:end], rule)
            if stops or end >= limit or repeats:
                reason = FinishReason.STOP if stops else FinishReason.LENGTH if end >= limit else None
                assert ended[row].tokens == tokens[:end]
                assert ended[row].reason is (reason or FinishReason.REPETITION)
                break


_POLICY = make({**QWEN3, "num_hidden_layers": 1})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=12))
def test_parts_cover_the_prompts_and_bound_what_is_read(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sampler, "_TOKENS_PER_READ", 10)
        parts = list(torch_sampler._parts(prompts))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(prompts)))
    assert all(a.stop == b.start for a, b in pairwise(parts))
    for part in parts:
        assert sum(map(len, {tuple(p) for p in prompts[part]})) <= 10


def test_draws_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([0.0, -1e9, 2.0, -torch.inf, 1.0, -8.0])
    count = 200_000
    torch.manual_seed(0)
    tokens, _ = draw(logits.expand(count, -1), PLAIN)
    seen, expected = torch.bincount(tokens, minlength=6), count * logits.softmax(-1)
    assert seen[1] == seen[3] == 0
    possible = expected > 0
    # Chi-square with 3 degrees of freedom exceeds 25 with probability 2e-5; the seed makes the test repeatable.
    assert ((seen - expected)[possible] ** 2 / expected[possible]).sum() < 25


def test_a_diverged_policy_is_told(tmp_path: Path) -> None:
    policy = make(MINIMAX)
    with torch.no_grad():
        policy.lm_head_weight[3] = torch.nan
    save_policy(policy, tmp_path)
    engine = ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=64, max_sequences=4))
    with pytest.raises(Diverged, match="not finite"):
        served.sampled(engine, PROMPTS[:3], Sampling(max_tokens=3, eos_ids=()), seed=0)
