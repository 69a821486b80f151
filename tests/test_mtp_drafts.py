"""Drafts of heads of multi-token prediction: the policy's distribution, and drafts that are the head's own.

Every draft that vLLM proposes is compared with the head's prediction over the whole text, recomputed without a cache:
rows that an update, a rejected draft, a preemption or a shared prompt has left in its cache would show.

python -m pytest tests/test_mtp_drafts.py           the first model runner; test_mtp_drafts_cuda.py has the second
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from itertools import accumulate, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from cispo.engines.serving import ServedEngine  # noqa: E402
from cispo.engines.vllm_engine import VLLMEngine  # noqa: E402
from cispo.errors import UserError  # noqa: E402
from cispo.policies.attention import Documents  # noqa: E402
from cispo.policies.hybrid.model import HybridPolicy  # noqa: E402
from cispo.policies.loading import init_policy, save_policy  # noqa: E402
from cispo.types import FinishReason  # noqa: E402
from cispo.weights.publish import publish_weights, weights_folder  # noqa: E402
from tests.served import sampled, update  # noqa: E402
from tests.test_ngram_drafts import TOLERANCE, counts, policy_logprobs, running, sampling  # noqa: E402
from tests.test_updates_in_flight import BLOCKS, EXACT, PLAIN, RULED, VERSIONS, Kind, interleaved  # noqa: E402
from tests.test_updates_in_flight import running as running_kind  # noqa: E402
from tests.test_vllm_parity import QWEN3, counting, lightning, random_prompts, scheduler, vllm  # noqa: E402
from tests.tiny_hybrids import TINY, VARIANTS, draw_weights  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has vLLM's second model runner")

K = 3
MTP = {"method": "mtp", "num_speculative_tokens": K}
CONFIGS = {
    family: {**TINY, **VARIANTS}[family].hf_config | {"num_nextn_predict_layers": 1}
    for family in ("glm4_moe", "deepseek_v3")
}
DEFAULT = [("deepseek_v3", "prefix_cache")]
"""The way of scheduling that is not among the repetitions."""

PROMPTS = random_prompts([8, 16, 5, 20, 40, 70], seed=4) + [[n] for n in range(6)]


# Weight of a head's attention, with which most drafts change where it sees one row of the cache alone.
OWN = {"glm4_moe": 8.0, "deepseek_v3": 20.0}


def following(family: str, seed: int, *, context: float = 1.0) -> HybridPolicy:
    """A policy that mostly follows each token by one other, as its head does; `context` weighs its layers.

    Drafts are then right and wrong in the same run.
    """
    policy = init_policy(CONFIGS[family], seed, heads=True)
    assert isinstance(policy, HybridPolicy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        draw_weights(policy, seed)
        for name, weight in policy.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight *= context
        vocab, hidden = policy.lm_head_weight.shape
        rows = torch.nn.functional.normalize(torch.randn(vocab, hidden, generator=generator), dim=1)
        policy.embed_tokens.weight.copy_(rows * hidden**0.5)
        policy.lm_head_weight[torch.randperm(vocab, generator=generator)] = rows * 8 / hidden**0.5
        first, second = policy.get_parameter("predictors.0.eh_proj.weight").chunk(2, 1)
        first += torch.eye(hidden)
        second *= context
        policy.get_parameter("predictors.0.layer.self_attn.o_proj.weight").mul_(OWN[family])
    return policy


class Proposal(NamedTuple):
    """The drafts of a sequence in a step."""

    text: list[int]
    """All tokens so far."""
    drafts: list[int]
    logits: Tensor | None
    """[drafts, V], of the head; None where a CUDA graph has them."""
    version: int = 0
    """Of the weights."""


def proposals(engine: ServedEngine) -> list[Proposal]:
    """A list to which every step adds the drafts that its sequences get; those whose prompt goes on get none."""
    found: list[Proposal] = []

    def watch(worker: Any) -> None:
        runner = worker.model_runner
        propose, compute = runner.drafter.propose, runner.drafter.model.compute_logits
        computed: list[Tensor] = []

        def watched(**given: Any) -> Tensor:
            computed.clear()
            drafts = propose(**given)
            logits = torch.stack(computed, 1)
            for row, name in enumerate(runner.input_batch.req_ids):
                request = runner.requests[name]
                if not runner.discard_request_mask.np[row]:
                    text = [*request.prompt_token_ids, *request.output_token_ids]
                    found.append(Proposal(text, drafts[row].tolist(), logits[row], engine.version))
            return drafts

        def kept(hidden: Tensor) -> Tensor:
            computed.append(compute(hidden))
            return computed[-1]

        runner.drafter.propose, runner.drafter.model.compute_logits = watched, kept

    vllm(engine).collective_rpc(watch)
    return found


@torch.no_grad()
def predicted(policy: HybridPolicy, found: Sequence[Proposal]) -> Tensor:
    """[proposals, drafts, V]: the head's logits over the whole text, recomputed for every draft behind those before."""
    parts = []
    for start in range(0, len(found), 32):
        part, places = found[start : start + 32], list[Tensor]()
        tokens, positions, documents = packed([proposal.text[:-1] for proposal in part], policy)
        hidden = policy.attend(tokens, positions, documents).hidden
        states = list(hidden.split([len(proposal.text) - 1 for proposal in part]))
        for place in range(len(part[0].drafts)):
            behind = [proposal.text[1:] + proposal.drafts[:place] for proposal in part]
            tokens, positions, documents = packed(behind, policy)
            last = policy.predict(0, tokens, positions, torch.cat(states), documents)
            last = last[documents.cu_seqlens[1:].long() - 1]
            states = [torch.cat([own, new[None]]) for own, new in zip(states, last, strict=True)]
            normed = policy.get_submodule("predictors.0.norm")(last)
            places.append((normed.float() @ policy.lm_head_weight.float().T).cpu())
        parts.append(torch.stack(places, 1))
    return torch.cat(parts)


def packed(texts: Sequence[Sequence[int]], policy: HybridPolicy) -> tuple[Tensor, Tensor, Documents]:
    """Tokens, positions and documents, on the policy's device."""
    device = policy.lm_head_weight.device
    tokens = torch.tensor([token for text in texts for token in text], device=device)
    positions = torch.cat([torch.arange(len(text), device=device) for text in texts])
    starts = torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32, device=device)
    return tokens, positions, Documents(starts, len(tokens), max(map(len, texts)))


def check(engine: ServedEngine, policy: HybridPolicy, seed: int, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    """Tokens and log-probabilities of a call are the policy's, every draft is the head's, and many are right."""
    found, before, rule = proposals(engine), counts(engine), sampling(max_tokens=40)
    completions = sampled(engine, prompts, rule, seed)
    reported = torch.tensor([x for c in completions for x in c.logprobs])
    assert (reported - policy_logprobs(policy, prompts, completions, rule)).abs().max() <= TOLERANCE
    drafted, accepted = (now - then for now, then in zip(counts(engine), before, strict=True))
    assert 0.2 * drafted < accepted < 0.9 * drafted and len(found) > 100
    check_drafts(policy, found)


def check_drafts(policy: HybridPolicy, found: Sequence[Proposal]) -> None:
    logits = torch.stack([proposal.logits for proposal in found if proposal.logits is not None])
    assert len(logits) == len(found) and (predicted(policy, found) - logits).abs().max() <= 10 * TOLERANCE
    assert [proposal.drafts for proposal in found] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_tokens_are_the_policys_and_drafts_the_heads_before_and_after_an_update(family: str, tmp_path: Path) -> None:
    first, second = (following(family, seed) for seed in range(2))
    save_policy(first, tmp_path)
    with weights_folder("test") as weights, running(tmp_path, MTP) as engine:
        check(engine, first, 0)
        update(engine, str(publish_weights(second.to_hf(), weights, 1)), 1)
        check(engine, second, 1)


MODES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 20},
    "preempted": {"num_gpu_blocks_override": 16, "block_size": 32},
    "prefix_cache": {"enable_prefix_caching": True, "block_size": 32},
}


def sharing(number: int) -> list[list[int]]:
    """Prompts that share whole blocks, though the head's last row of them belongs to the token behind."""
    (shared,) = random_prompts([96], seed=6)
    return [shared + own for own in random_prompts([3 + n for n in range(number)], seed=7)]


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(family, mode, marks=[pytest.mark.slow] * ((family, mode) not in DEFAULT))
        for family in CONFIGS
        for mode in MODES
    ],
)
def test_every_way_of_scheduling(family: str, mode: str, tmp_path: Path) -> None:
    """A prompt in parts, whose last draft reads the next token of the prompt; rows recomputed; rows of other calls."""
    policy = following(family, 0)
    save_policy(policy, tmp_path)
    prompts = sharing(12) if mode == "prefix_cache" else PROMPTS
    with running(tmp_path, MTP, **MODES[mode]) as engine:
        preemptions = counting(scheduler(engine), "_preempt_request", lambda _: 1)
        hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        for seed in range(2 if mode == "prefix_cache" else 1):
            check(engine, policy, seed, prompts)
    assert (preemptions[0] > 0) == (mode == "preempted")
    assert (hits[0] > 0) == (mode == "prefix_cache")


class HeadKind(Kind):
    """Versions of a policy whose head is published too."""

    def __init__(self, folder: Path, weights: Path, family: str) -> None:
        self.folder = folder
        self.policies = [following(family, seed) for seed in range(VERSIONS)]
        save_policy(self.policies[0], folder)
        self.paths = [
            str(publish_weights(policy.to_hf(), weights, number).rename(weights / f"{folder.name}-{number}"))
            for number, policy in enumerate(self.policies)
        ]


@pytest.mark.parametrize("family", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_updates_cancelled_calls_and_rules_between_drafts(family: str, tmp_path: Path) -> None:
    """Every draft behind an update is one of the new head over rows of the new weights."""
    arguments = {"enable_prefix_caching": True, "num_gpu_blocks_override": BLOCKS["dense"], "block_size": 128}
    with weights_folder("test") as weights:
        kind = HeadKind(tmp_path, weights, family)
        with running_kind(kind, speculative_config=MTP, **arguments) as engine:
            found = proposals(engine)
            for seed, rule in enumerate([PLAIN, RULED]):
                assert asyncio.run(asyncio.wait_for(interleaved(engine, kind, seed, EXACT, rule), 60)) <= TOLERANCE
    for version, policy in enumerate(kind.policies):
        of_version = [proposal for proposal in found if proposal.version == version]
        assert isinstance(policy, HybridPolicy) and of_version
        check_drafts(policy, of_version)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_ranks_share_the_head(family: str, tmp_path: Path) -> None:
    """Two workers, each with its heads' part of the head's attention: as many drafts are right, after an update too."""
    first, second = (following(family, seed) for seed in range(2))
    save_policy(first, tmp_path)
    greedy, accepted = sampling(temperature=0), []
    for ranks in (1, 2):
        with weights_folder("test") as weights, running(tmp_path, MTP, ranks=ranks) as engine:
            for version, policy in enumerate((first, second)):
                if version:
                    update(engine, str(publish_weights(policy.to_hf(), weights, 1)), 1)
                before = counts(engine)[1]
                completions = sampled(engine, PROMPTS, greedy, 0)
                reported = torch.tensor([x for c in completions for x in c.logprobs])
                expected = policy_logprobs(policy, PROMPTS, completions, greedy)
                assert (reported - expected).abs().max() <= 2 * TOLERANCE
                accepted.append(counts(engine)[1] - before)
    assert min(accepted) > 100
    assert all(abs(one - two) <= 5 for one, two in zip(accepted[:2], accepted[2:], strict=True)), accepted


def test_a_right_head_ends_a_run_where_the_completion_ends(tmp_path: Path) -> None:
    """Without layers the policy's most likely token follows from the last one alone, and the head knows it: k + 1
    tokens a step, up to an end-of-sequence token, the limit of a completion or that of a context."""
    policy = following("glm4_moe", 0, context=0.0)
    save_policy(policy, tmp_path)
    next_of = (policy.embed_tokens.weight @ policy.lm_head_weight.T).argmax(1).tolist()

    def chain(token: int, length: int) -> tuple[int, ...]:
        return tuple(islice(accumulate(repeat(token), lambda last, _: next_of[last]), 1, length + 1))

    limits = [17 + n for n in range(len(PROMPTS))]
    greedy, ending = sampling(temperature=0), sampling(temperature=0, eos_ids=tuple(range(0, 64, 9)))
    with running(tmp_path, MTP | {"num_speculative_tokens": 4}) as engine:
        assert isinstance(engine.engine, VLLMEngine)
        steps = counting(engine.engine._core, "get_output", lambda _: 1)
        found = sampled(engine, PROMPTS, greedy, 0, limits)
        drafted, accepted = counts(engine)
        assert steps[0] <= 2 + max(limits) / 5 and accepted == drafted > 0
        ended = sampled(engine, PROMPTS, ending, 0, limits)
        assert engine.engine.sampled == sum(len(c.token_ids) for c in found + ended)
        whole = sampled(engine, PROMPTS, sampling(temperature=0, max_tokens=256), 0, [256 - len(p) for p in PROMPTS])
    for prompt, limit, limited, short, full in zip(PROMPTS, limits, found, ended, whole, strict=True):
        expected = chain(prompt[-1], limit)
        assert limited.token_ids == expected
        # One token of the prompt's step, then five a step.
        assert limited.accepted == limit - 1 - math.ceil((limit - 1) / 5)
        until = next((n for n, token in enumerate(expected, 1) if token in ending.eos_ids), limit)
        assert short.token_ids == expected[:until]
        assert full.token_ids == chain(prompt[-1], 256 - len(prompt))
    assert {c.finish_reason for c in ended} == {FinishReason.STOP, FinishReason.LENGTH}


REFUSED = {
    "qwen3, of another family": (QWEN3, "policies of model_type 'qwen3' have none"),
    "lightning": (lightning(), "policies of model_type"),
    "qwen3_next": (TINY["qwen3_next"].hf_config, "recurrent layers"),
    "glm4_moe, none in its config": (
        VARIANTS["glm4_moe"].hf_config | {"num_nextn_predict_layers": 0},
        "num_nextn_predict_layers is 0 or missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_policies_without_a_head_that_can_run_are_refused(case: str, tmp_path: Path) -> None:
    config, reason = REFUSED[case]
    save_policy(init_policy(config, 0), tmp_path)
    sizes: dict[str, Any] = {"max_context": 256, "max_sequences": 4, "seed": 0}
    with pytest.raises(UserError, match=rf"speculative_config.method mtp needs heads of multi-token .*{reason}"):
        VLLMEngine(str(tmp_path), dtype="float32", engine_args={"speculative_config": MTP}, **sizes)


def test_a_folder_without_the_weights_of_its_head_is_refused(tmp_path: Path) -> None:
    save_policy(init_policy(CONFIGS["glm4_moe"], 0), tmp_path)
    sizes: dict[str, Any] = {"max_context": 256, "max_sequences": 4, "seed": 0}
    with pytest.raises(UserError, match=r"method mtp needs heads .* 44 weights of this policy's heads are missing"):
        VLLMEngine(str(tmp_path), dtype="float32", engine_args={"speculative_config": MTP}, **sizes)


def test_a_folder_that_vllm_takes_for_other_drafts_is_refused(tmp_path: Path) -> None:
    save_policy(init_policy(CONFIGS["glm4_moe"], 0, heads=True), tmp_path / "bald-eagle-1")
    sizes: dict[str, Any] = {"max_context": 256, "max_sequences": 4, "seed": 0}
    with pytest.raises(UserError, match=r"vLLM takes .*bald-eagle-1 for drafts of 'eagle-': name it otherwise"):
        VLLMEngine(str(tmp_path / "bald-eagle-1"), dtype="float32", engine_args={"speculative_config": MTP}, **sizes)
