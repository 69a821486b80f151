"""The hybrid families inside vLLM: its log-probabilities against the policy's on the same tokens, under every kind of
scheduling, before and after weight updates.

Routers choose by comparison. Where the last expert chosen and the first one left out are closer than float32 resolves,
engine and learner may take different ones and then compute different functions, so the learner replays the engine's
choices here, all of them; any that is not its own must be such a tie.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.errors import UserError
from cispo.ops.convolution import CONVOLUTION
from cispo.ops.delta import DELTA
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.hybrid.shares import share_of
from cispo.policies.hybrid.vllm_plan import Plan, RecurrentCall, SoftmaxCall, plan_of
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.moe import ScoreRouter
from cispo.policies.policy import Policy
from cispo.policies.replay import routers_of
from cispo.policies.shares import Ranks
from cispo.types import Completion, RepetitionStop, Sampling
from cispo.weights.buckets import WeightSender, tensor_checksum
from cispo.weights.publish import publish_weights, weights_folder
from tests.served import sampled, update
from tests.test_vllm_parity import CROSSING, RAGGED, SHARED, counting, scheduler, vllm
from tests.tiny_hybrids import TINY, VARIANTS, VOCAB, draw_weights

TOLERANCES = {name: tiny.tolerance for name, tiny in TINY.items()}
"""Largest difference of two float32 log-probabilities: 1e-5, and 3e-5 with gated DeltaNet, where over 2,040 tokens the
engine was up to 1.7e-5 from float64 and the learner 1.2e-5, on both sides of it."""

DELTANET, LONG_TOLERANCE = ("qwen3_next", "qwen3_5", "qwen3_5_moe"), 5e-5
"""The same for gated DeltaNet in contexts of 100 tokens, preempted: over 2,040 tokens the learner is up to 3.2e-5 from
float64 and the engine 2.5e-5."""
SHORT_TOLERANCE = 5e-5
"""The same behind prompts of one token: over 4,080 tokens of ling the learner is up to 2.3e-5 from float64 on some
processors and the engine 1.2e-5, on both sides of it."""
RANKS_TOLERANCE = 5e-5
"""The same where two ranks add up parts of the learner's sums: after one-token prompts 2.9e-5 was seen, with learner
and engine up to 3e-5 each from float64 on the same tokens."""

TIE = 1e-6
"""Scores of experts that are closer are ordered by rounding."""

DEFAULT = "qwen3_next"
"""The family of the default run, of recurrences and softmax. For latents: `test_ngram_drafts` and `test_mtp_drafts`."""

CONFIGS = {name: tiny.hf_config for name, tiny in TINY.items()}
# Sparse attention runs in vLLM while it selects every key: in contexts of at most this length.
CONFIGS["deepseek_v32"] |= {"index_topk": 640}
# A block is as large as a slot: with one state a latent layer it has 128 tokens, with three it would have 384.
CONFIGS["kimi_linear"] |= {"layer_types": ["linear_attention", "full_attention"] * 2}
CONFIGS["ling"] |= {"layer_group_size": 2}
WITH_RANKS_ONLY = {"qwen3_moe": VARIANTS["qwen3_moe"].hf_config}
"""Families that are run with tensor parallelism alone: their blocks are those of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """Engine arguments, and the prompts that provoke the scheduling they stand for."""

    prompts: list[list[int]]
    args: dict[str, Any] = field(default_factory=dict)
    tokens: int = 85
    preemptions: int = 0
    """That happen at least."""
    hits: int = 0
    """Tokens found in the prefix cache at least."""


# Blocks of 128 tokens: SHARED have two in common.
FULL = {
    "one_shot": Mode(prompts=RAGGED, args={"enable_chunked_prefill": False}),
    "chunked": Mode(prompts=RAGGED, args={"max_num_batched_tokens": 64}),
    "prefix_cache": Mode(
        prompts=SHARED + RAGGED[:12],
        args={"enable_prefix_caching": True, "max_num_batched_tokens": 160},
        hits=2000,
    ),
    "preempted": Mode(prompts=CROSSING + RAGGED[:8], args={"num_gpu_blocks_override": 12}, preemptions=20),
}
SHORT = Mode(
    prompts=CROSSING[:8] + SHARED[:4] + RAGGED[:6],
    args={"enable_prefix_caching": True, "max_num_batched_tokens": 160, "num_gpu_blocks_override": 16},
    tokens=30,
    preemptions=2,
    hits=500,
)


def tiny_policy(family: str, seed: int) -> Policy:
    """With weights that make mistakes show."""
    policy = init_policy((CONFIGS | WITH_RANKS_ONLY)[family], seed)
    draw_weights(policy, seed)
    return policy


@contextmanager
def running(folder: Path, mode: Mode, *, routed: bool, ranks: int = 1) -> Iterator[ServedEngine]:
    sizes: dict[str, Any] = {"max_context": 640, "max_sequences": 12, "seed": 0, "record_routes": routed}
    core = VLLMEngine(str(folder), dtype="float32", engine_args=mode.args, tensor_parallel=ranks, **sizes)
    engine = ServedEngine(core)
    try:
        yield engine
    finally:
        engine.close()


def engine_model(engine: ServedEngine) -> Any:
    (model,) = vllm(engine).apply_model(lambda model: model)
    return model


def check_dummy_run(engine: ServedEngine) -> None:
    """A pass without sequences, by which vLLM measures memory: it runs, and its output has no meaning."""
    from vllm.forward_context import set_forward_context

    model, tokens = engine_model(engine), torch.arange(5)
    with torch.inference_mode(), set_forward_context(None, vllm(engine).vllm_config):
        hidden = model(tokens, tokens)
        assert hidden.shape == (5, model.plan.hidden_size)
        assert model.compute_logits(hidden).shape == (5, VOCAB)


def poison(engine: ServedEngine) -> None:
    """Leaves NaN in every slot of a state, as the last owner of each may have."""
    vllm(engine).collective_rpc(_poison)


def _poison(worker: Any) -> None:
    for holder in worker.get_model().holders:
        for states in holder.kv_cache:
            states.fill_(torch.nan)


def engine_routes(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor | None:
    """[T, layers, k] of the sequences one after another; -1 where the engine has read no token.

    None where it records no experts.
    """
    parts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        routed = completion.routed_experts
        if routed is None:
            return None
        tokens, layers, k = routed.shape
        assert routed.first + tokens == len(prompt) + len(completion.token_ids) - 1
        part = torch.full((len(prompt) + len(completion.token_ids), layers, k), -1)
        data = torch.frombuffer(bytearray(routed.data), dtype=torch.uint8)
        part[routed.first : routed.first + tokens] = data.view(routed.shape).long()
        parts.append(part)
    return torch.cat(parts)


@contextmanager
def margins(policy: Policy, routes: Tensor) -> Iterator[list[Tensor]]:
    """Collects, router by router, how far each token's replayed experts are from the router's own choice [T]: the
    highest score left out less the lowest one taken. Negative where both are the same."""
    found: list[Tensor] = []

    def measure(router: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        assert isinstance(router, ScoreRouter)
        logits = inputs[0] @ router.weight.T
        scores = logits.softmax(-1) if router.routing.scores == "softmax" else logits.sigmoid()
        ranked, taken = router._ranked(scores), routes[:, len(found)]
        known = taken[:, 0] >= 0
        lowest = ranked.gather(-1, taken.clamp(min=0)).amin(-1)
        others = ranked.scatter(-1, taken.clamp(min=0), -torch.inf).amax(-1)
        found.append(torch.where(known, others - lowest, -torch.inf))

    handles = [router.register_forward_hook(measure) for router in routers_of(policy)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def learner_logprobs(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
    """Of every sampled token, from one packed forward pass with the engine's experts."""
    sequences = [[*p, *c.token_ids] for p, c in zip(prompts, completions, strict=True)]
    tokens = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    starts = list(accumulate((len(s) for s in sequences), initial=0))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    routes = engine_routes(prompts, completions)
    if routes is None:
        hidden = policy(tokens, positions, cu_seqlens).hidden
    else:
        assert routes.shape[1] == policy.router_shape[0]
        with margins(policy, routes) as found:
            hidden = policy(tokens, positions, cu_seqlens, None, routes).hidden
        assert max(margin.max() for margin in found) <= TIE, "an expert that is no tie differs"
    logprobs = (hidden @ policy.lm_head_weight.T).log_softmax(-1)
    sampled_rows = [torch.arange(len(p) - 1, len(s) - 1) for p, s in zip(prompts, sequences, strict=True)]
    rows = torch.cat([start + part for start, part in zip(starts, sampled_rows, strict=False)])
    return logprobs[rows].gather(1, tokens[rows + 1, None]).squeeze(1)


def difference(engine: ServedEngine, policy: Policy, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> float:
    """The largest difference over what the engine samples now; 0 tokens and NaN are failures."""
    sampling = Sampling(max_tokens=tokens, eos_ids=(), repetition=RepetitionStop(run_length=0))
    completions = sampled(engine, prompts, sampling, seed)
    engine_side = torch.tensor([x for c in completions for x in c.logprobs])
    learner_side = learner_logprobs(policy, prompts, completions)
    assert len(engine_side) == len(learner_side) == len(prompts) * tokens
    assert engine_side.isfinite().all() and learner_side.isfinite().all()
    return (engine_side - learner_side).abs().max().item()


@pytest.fixture(scope="module")
def weights() -> Iterator[Path]:
    with weights_folder("test") as folder:
        yield folder


def check(family: str, mode: Mode, folder: Path, weights: Path) -> None:
    policies, tolerance = [tiny_policy(family, seed) for seed in range(3)], TOLERANCES[family]
    if family in DELTANET and mode.preemptions:
        tolerance = LONG_TOLERANCE
    save_policy(policies[0], folder)
    with running(folder, mode, routed=policies[0].router_shape[0] > 0) as engine:
        preemptions = counting(scheduler(engine), "_preempt_request", lambda _: 1)
        hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        check_dummy_run(engine)
        poison(engine)
        assert difference(engine, policies[0], mode.prompts, mode.tokens, seed=0) <= tolerance
        for version in (1, 2):
            update(engine, str(publish_weights(policies[version].to_hf(), weights, version)), version)
        held, sent = engine_model(engine).policy.named_weights(), policies[2].named_weights()
        assert held.keys() == sent.keys() and all(torch.equal(held[name], sent[name]) for name in sent)
        assert difference(engine, policies[2], mode.prompts, mode.tokens, seed=1) <= tolerance
        # Prompts of one token alone, in slots that longer sequences have left.
        assert difference(engine, policies[2], [[n] for n in range(8)], mode.tokens, seed=2) <= SHORT_TOLERANCE
    assert preemptions[0] >= mode.preemptions and hits[0] >= mode.hits, (preemptions, hits)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (family != DEFAULT)) for family in CONFIGS]
)
def test_engine_equals_learner(family: str, weights: Path, tmp_path: Path) -> None:
    """Ragged prompts, chunked prefill, prefix cache and preemption at once."""
    check(family, SHORT, tmp_path, weights)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mode", FULL)
def test_engine_equals_learner_in_every_mode(family: str, mode: str, weights: Path, tmp_path: Path) -> None:
    assert len(FULL[mode].prompts) * FULL[mode].tokens >= 2000
    check(family, FULL[mode], tmp_path, weights)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CONFIGS, *WITH_RANKS_ONLY])
def test_tensor_parallel_equals_learner(family: str, weights: Path, tmp_path: Path) -> None:
    """Two ranks, each with its share of the weights after two updates, by file and by broadcast, under every kind of
    scheduling at once."""
    policies, mode = [tiny_policy(family, seed) for seed in range(3)], SHORT
    save_policy(policies[0], tmp_path)
    with running(tmp_path, mode, routed=policies[0].router_shape[0] > 0, ranks=2) as engine:
        preemptions = counting(scheduler(engine), "_preempt_request", lambda _: 1)
        hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        poison(engine)
        found = [difference(engine, policies[0], mode.prompts, mode.tokens, seed=0)]
        update(engine, str(publish_weights(policies[1].to_hf(), weights, 1)), 1)
        broadcast(engine, policies[2], 2)
        assert isinstance(engine.engine, VLLMEngine)
        assert engine.engine.weight_checksums() == expected_checksums(policies[2], ranks=2)
        found.append(difference(engine, policies[2], mode.prompts, mode.tokens, seed=1))
        found.append(difference(engine, policies[2], [[n] for n in range(8)], mode.tokens, seed=2))
    print(f"{family}: largest differences {', '.join(f'{one:.1e}' for one in found)}", flush=True)
    assert max(found) <= RANKS_TOLERANCE
    assert preemptions[0] >= mode.preemptions and hits[0] >= mode.hits, (preemptions, hits)


def broadcast(engine: ServedEngine, policy: Policy, version: int) -> None:
    """Updates an idle engine of two ranks by buckets of 64 KiB, which both of them receive whole."""
    sender = WeightSender(policy.to_hf(), bucket_bytes=1 << 16)
    address = sender.open_group("127.0.0.1", 3)
    asyncio.run(engine.begin_update("wait"))
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(engine.join_broadcast, address, 1, 3)
        sender.join_group()
        joined.result()
        assert len(sender.buckets) > 2
        for number in range(len(sender.buckets)):
            received = thread.submit(engine.receive_weights, sender.stage(number, "broadcast", check=True))
            sender.broadcast(number)
            received.result()
    engine.finish_update(version)


def expected_checksums(policy: Policy, ranks: int) -> dict[str, int]:
    """Of every rank's share of the parameters."""
    assert isinstance(policy, HybridPolicy)
    sums = {}
    for number in range(ranks):
        share = share_of(policy.config, torch.float32, Ranks(number=number, count=ranks, sum=lambda x: x))
        share.load(policy.to_hf().items())
        own = share.policy.named_parameters()
        sums |= {f"policy.{name}/{number}": tensor_checksum(weight) for name, weight in own}
    return sums


def plan(*, states: int, softmax: int, floats: tuple[int, int]) -> Plan:
    """Of `states` convolutions, each with a recurrence behind it, and `softmax` other layers."""
    window, state = floats
    kinds = (CONVOLUTION, (window,)), (DELTA, (state,))
    recurrent = [RecurrentCall(op=op, state=shape, output=(1,), dtype=torch.float32) for op, shape in kinds] * states
    call = SoftmaxCall(heads=4, kv_heads=2, key_dim=24, value_dim=16, scale=1.0)
    calls = (call,) * softmax
    return Plan(vocab_size=8, hidden_size=8, softmax=calls, recurrent=tuple(recurrent), selected=None)


@pytest.mark.parametrize(
    ("states", "softmax", "floats", "holders"),
    [
        (6, 2, (40, 1000), 2),
        (7, 2, (40, 1000), 2),
        (3, 5, (40, 1000), 3),
        # One state alone is larger than 512 tokens of 128 keys and values.
        (6, 2, (40, 100_000), 6),
        # Two fit where three would be shared.
        (6, 2, (40, 30_000), 3),
    ],
)
def test_states_have_places_of_their_own(states: int, softmax: int, floats: tuple[int, int], holders: int) -> None:
    made = plan(states=states, softmax=softmax, floats=floats)
    assert made.holders == holders and {place.holder for place in made.places} == set(range(holders))
    taken = [torch.zeros(made.slot_floats, dtype=torch.int) for _ in range(holders)]
    for place, call in zip(made.places, made.recurrent, strict=True):
        assert place.shape == call.state and place.offset % 32 == 0
        assert place.offset + place.floats <= made.slot_floats
        taken[place.holder][place.offset : place.offset + place.floats] += 1
    assert max(int(slot.max()) for slot in taken) == 1
    assert sum(int(slot.sum()) for slot in taken) == states * sum(floats)


def test_heads_are_padded_to_a_size_of_vllm() -> None:
    """Keys of 192 and values of 128 dims, as DeepSeek has them, and sizes in between."""
    call = SoftmaxCall(heads=1, kv_heads=1, key_dim=192, value_dim=128, scale=1.0)
    assert [replace(call, key_dim=dim).head_size for dim in (24, 130, 48, 192, 500)] == [128, 160, 128, 192, 512]
    with pytest.raises(UserError, match="attention heads 600 wide"):
        _ = replace(call, key_dim=600).head_size


def test_vllm_refuses_sparse_attention_that_selects(tmp_path: Path) -> None:
    save_policy(tiny_policy("deepseek_v32", 0), tmp_path)
    with pytest.raises(UserError, match=r"^rollout.engine: .* selects 640 keys; .*up to 641 tokens.* set it to torch$"):
        VLLMEngine(str(tmp_path), dtype="float32", max_context=641, max_sequences=2, seed=0)


def test_vllm_refuses_ranks_that_do_not_divide_the_policy(tmp_path: Path) -> None:
    save_policy(tiny_policy("minimax_m2", 0), tmp_path)
    with pytest.raises(UserError, match="^rollout.tensor_parallel 3 does not divide .* attention heads: 4$"):
        VLLMEngine(str(tmp_path), dtype="float32", max_context=64, max_sequences=2, tensor_parallel=3, seed=0)


@pytest.mark.parametrize(("family", "ranks"), [("qwen3_next", 2), ("minimax_m2", 4), ("kimi_linear", 4), ("ling", 2)])
def test_a_ranks_plan_has_its_heads_and_as_many_holders(family: str, ranks: int, tmp_path: Path) -> None:
    """Key heads are never fewer than one."""
    whole, own = (plan_of(CONFIGS[family], tmp_path, torch.float32, count) for count in (1, ranks))
    assert own.holders == whole.holders and len(own.places) == len(whole.places)
    for one, all_ in zip(own.softmax, whole.softmax, strict=True):
        kv_heads = max(all_.kv_heads // ranks, 1)
        assert one == replace(all_, heads=all_.heads // ranks, kv_heads=kv_heads)
    for one, all_ in zip(own.recurrent, whole.recurrent, strict=True):
        assert math.prod(one.state) * ranks == math.prod(all_.state)
