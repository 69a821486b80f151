"""Router replay: experts reported by the engines are those of the learner's pass, and replayed they are taken again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.algorithms.losses import Cispo
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack
from cispo.batch.samples import to_samples
from cispo.engines.drafts import start_drafts
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.engines.torch_sampler import Sampler
from cispo.engines.vllm_routes import RoutedStep, RouteTable
from cispo.errors import UserError
from cispo.learner.learner import Learner
from cispo.learner.loss import read
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.moe import MoE, Routing, SharedMoE
from cispo.policies.policy import Policy
from cispo.policies.replay import RouteBuffer, bytes_per_token, differing, live_choices, routers_of, routes_of
from cispo.recipe.load import load_recipe
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.rollout.rollout import Rollouts, rollouts_from_json, rollouts_to_json
from cispo.start import check_experts
from cispo.types import (
    Completion,
    FinishReason,
    MicroBatch,
    Prompt,
    RepetitionStop,
    RoutedExperts,
    Sample,
    Sampling,
    Trajectory,
    TrajectoryGroup,
    Turn,
)
from tests.served import sampled
from tests.tiny_hybrids import TINY
from tests.tiny_policies import MINIMAX, QWEN3, bounds, tokens_of

CISPO = Objective(loss=Cispo(ratio_max=5.0))
SAMPLING = Sampling(max_tokens=30, eos_ids=(), repetition=RepetitionStop(run_length=0))
LENGTHS = (9, 1, 30, 17)
TOKENS = tokens_of(sum(LENGTHS))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
# A softmax router over 5 experts, and a sigmoid router with a correction bias behind a dense first layer.
CONFIGS: dict[str, dict[str, Any]] = {
    "softmax": MINIMAX,
    "sigmoid": {**TINY["deepseek_v3"].hf_config, "vocab_size": 40, "num_hidden_layers": 3},
}
EVERY_ROUTER = pytest.mark.parametrize("kind", CONFIGS)


def make(kind: str, *, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy with biases that change the choice of experts."""
    policy = init_policy(CONFIGS[kind], seed=0, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in policy.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return policy


@torch.no_grad()
def disturb_routers(policy: Policy, scale: float = 0.03) -> None:
    generator = torch.Generator().manual_seed(2)
    for router in routers_of(policy):
        noise = torch.randn(router.weight.shape, generator=generator)
        router.weight.add_((scale * noise).to(router.weight.dtype))


def run(policy: Policy, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states of the packed documents, and the experts taken."""
    output = policy(TOKENS, POSITIONS, bounds(LENGTHS), routes=routes)
    return output.hidden, routes_of(output.router)


def gradients(policy: Policy, routes: Tensor | None = None) -> dict[str, Tensor]:
    policy.zero_grad()
    hidden, _ = run(policy, routes)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@EVERY_ROUTER
def test_own_routes_give_the_same_pass_bit_for_bit(kind: str) -> None:
    policy = make(kind)
    hidden, routes = run(policy)
    again, chosen = run(policy, routes.to(torch.int16))
    assert torch.equal(hidden, again) and torch.equal(routes, chosen)
    first, second = gradients(policy), gradients(policy, routes.to(torch.int16))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@EVERY_ROUTER
def test_other_weights_take_the_same_experts_and_unknown_rows_choose_anew(kind: str) -> None:
    policy = make(kind)
    hidden, routes = run(policy)
    disturb_routers(policy)
    live = run(policy)[1]
    moved = (live.sort(-1).values != routes.sort(-1).values).any(-1).any(-1)
    assert 0.1 < moved.double().mean() < 1, "the disturbance changes the choice of some tokens"
    with live_choices(policy) as own:
        replayed, chosen = run(policy, routes.to(torch.int16))
    assert torch.equal(chosen, routes)
    assert not torch.equal(replayed, hidden), "weights of the experts are those of the present router"
    # Behind equal experts in the layers before, the first layer's own choice is that of a pass without replay.
    assert torch.equal(own[0].to(routes.dtype), live[:, 0])
    assert differing(own, chosen.unbind(1)).any()
    unknown = torch.full_like(routes, -1, dtype=torch.int16)
    assert torch.equal(run(policy, unknown)[1], live)
    mixed = torch.where(torch.arange(len(TOKENS))[:, None, None] < LENGTHS[0], unknown, routes.to(torch.int16))
    chosen = run(policy, mixed)[1]
    assert torch.equal(chosen[: LENGTHS[0]], live[: LENGTHS[0]])
    assert torch.equal(chosen[LENGTHS[0] :], routes[LENGTHS[0] :])


@EVERY_ROUTER
def test_the_gradient_of_a_replaying_router(kind: str) -> None:
    """By hand, in float64: weights of the chosen experts are differentiated, the choice is not.

    1e-12 since only the order of sums differs.
    """
    torch.manual_seed(0)
    tokens, hidden, experts, k, scale = 11, 8, 5, 2, 2.5
    if kind == "softmax":
        module: MoE | SharedMoE = MoE(hidden, 6, experts, k)
    else:
        routing = Routing(num_experts=experts, top_k=k, scores="sigmoid", corrected=True, scale=scale)
        module = SharedMoE(hidden, 6, routing)
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, target = torch.randn(tokens, hidden, dtype=torch.float64), torch.randn(tokens, hidden, dtype=torch.float64)
    routes = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    output = module(x, routes)[0]
    (output * target).sum().backward()

    expected = torch.zeros_like(module.gate.weight)
    logits = x @ module.gate.weight.detach().T
    for t, chosen in enumerate(routes.tolist()):
        one = torch.ones(1, 1, dtype=torch.float64)
        values = [module.experts(x[t : t + 1], torch.tensor([[e]]), one)[0].detach() @ target[t] for e in chosen]
        gains = torch.stack(values)
        if kind == "softmax":
            weights = logits[t, chosen].softmax(-1)
            slopes = weights * (gains - weights @ gains)
        else:
            scores = logits[t, chosen].sigmoid()
            weights = scores / scores.sum()
            slopes = scale * (gains - weights @ gains) / scores.sum() * scores * (1 - scores)
        for expert, slope in zip(chosen, slopes, strict=True):
            expected[expert] += slope * x[t]
    assert expected.abs().max() > 0.1
    assert module.gate.weight.grad is not None
    assert (module.gate.weight.grad - expected).abs().max() <= 1e-12


@EVERY_ROUTER
def test_checkpointing_recomputes_with_the_same_routes(kind: str) -> None:
    policy = make(kind)
    routes = run(policy)[1].to(torch.int16)
    disturb_routers(policy)
    plain, live = gradients(policy, routes), gradients(policy)
    policy.gradient_checkpointing = True
    recomputed = gradients(policy, routes)
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any(not torch.equal(plain[name], live[name]) for name in plain)


# Samples


def routed(policy: Policy, ids: Sequence[int], first: int = 0) -> RoutedExperts:
    """Experts of one sequence by the policy's own pass, as an engine reports them."""
    tokens = torch.tensor(ids[:-1])
    output = policy(tokens, torch.arange(len(tokens)), bounds([len(tokens)]))
    routes = routes_of(output.router)[first:]
    rows, layers, k = routes.shape
    return RoutedExperts(data=routes.numpy().tobytes(), shape=(rows, layers, k), first=first)


def group(policy: Policy, *, first: int = 0) -> TrajectoryGroup:
    """Ragged attempts at one prompt with their experts; the last of them has none."""
    prompt = tokens_of(12, seed=3).tolist()
    attempts = []
    for index, length in enumerate((4, 1, 9)):
        answer = tokens_of(length, seed=10 + index).tolist()
        completion = Completion(
            token_ids=tuple(answer),
            logprobs=tuple(-3.0 - 0.1 * i for i in range(length)),
            finish_reason=FinishReason.STOP,
            versions=(1,) * length,
            routed_experts=None if index == 2 else routed(policy, [*prompt, *answer], first),
        )
        turn = Turn(context_ids=tuple(prompt), completion=completion)
        attempts.append(Trajectory(group_id=5, index=index, turns=(turn,), text="", reward=float(index)))
    return TrajectoryGroup(prompt=Prompt(id=5, messages=()), trajectories=tuple(attempts))


def samples_of(policy: Policy, **kwargs: int) -> list[Sample]:
    return [replace(s, advantages=s.loss_mask * (1.0 + s.index)) for s in to_samples(group(policy, **kwargs))]


@EVERY_ROUTER
@pytest.mark.parametrize("share_prompts", [False, True], ids=["separate", "shared"])
def test_packing_keeps_every_row_beside_its_token(kind: str, share_prompts: bool) -> None:
    """Rows of the longest sample, which has none, are unknown; so are the first 3 of the others."""
    policy = make(kind)
    samples = samples_of(policy, first=3)
    packing = {"reduction": "token", "max_tokens": 16, "tokens_per_micro_batch": 60, "share_prompts": share_prompts}
    ((mb,),) = pack(samples, **packing)
    assert mb.routes is not None and mb.sample_index == (2, 0, 1)
    parts = mb.routes.split(mb.cu_seqlens.diff().tolist())
    assert (parts[0] == -1).all()
    for part, index in zip(parts[1:], mb.sample_index[1:], strict=True):
        own = routed(policy, samples[index].token_ids.tolist())
        expected = torch.frombuffer(bytearray(own.data), dtype=torch.uint8).view(own.shape)
        assert (part[:3] == -1).all() and torch.equal(part[3:], expected[3:].to(torch.int16))
    disturb_routers(policy)
    ((bare,),) = pack([replace(s, routes=None) for s in samples], **packing)
    assert bare.routes is None
    separate = read(policy, replace(mb, unique_index=None, inverse=None))
    taken, live = read(policy, mb), read(policy, bare)
    assert (mb.unique_index is not None) == share_prompts
    chosen = routes_of(taken.router)
    assert not torch.equal(chosen, routes_of(live.router))
    # A prompt that is read once has the experts of the first sample, the longest, for which they are unknown.
    rows = torch.cat([torch.arange(int(a) + (12 if share_prompts else 3), int(b)) for a, b in _spans(mb.cu_seqlens)])
    assert torch.equal(chosen[rows].to(torch.int16), mb.routes[rows])
    if not share_prompts:
        assert torch.equal(separate.hidden, taken.hidden)


def _spans(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(start, end) of the packed documents but the first."""
    return list(zip(cu_seqlens[1:-1], cu_seqlens[2:], strict=True))


def test_a_conversation_has_the_experts_of_the_request_that_sampled_each_token() -> None:
    def turn(context: int, tokens: int, expert: int, read: int, continues: bool = False) -> Turn:
        completion = Completion(
            token_ids=(1,) * tokens,
            logprobs=(0.0,) * tokens,
            finish_reason=FinishReason.STOP,
            versions=(1,) * tokens,
            routed_experts=RoutedExperts(data=bytes([expert] * read), shape=(read, 1, 1)),
        )
        return Turn(context_ids=(2,) * context, completion=completion, continues=continues)

    turns = (turn(3, 2, 7, read=4), turn(2, 3, 8, read=9, continues=True))
    attempt = Trajectory(group_id=0, index=0, turns=turns, text="", reward=0.0)
    (sample,) = to_samples(TrajectoryGroup(prompt=Prompt(id=0, messages=()), trajectories=(attempt,)))
    assert sample.routes is not None and len(sample.routes) == len(sample.token_ids) - 1
    assert sample.routes.flatten().tolist() == [7] * 4 + [8] * 5


def test_rollouts_keep_experts_in_a_checkpoint() -> None:
    """Through JSON, which also has no key for them where they are not recorded."""
    found = group(make("softmax"))
    wide = RoutedExperts(
        data=torch.tensor([[[300, 2]]], dtype=torch.int16).numpy().tobytes(), shape=(1, 1, 2), first=11
    )
    last = found.trajectories[1]
    turn = replace(last.turns[0], completion=replace(last.turns[0].completion, routed_experts=wide))
    found = replace(
        found, trajectories=(*found.trajectories[:1], replace(last, turns=(turn,)), *found.trajectories[2:])
    )
    rollouts = Rollouts(groups=[found], dropped=0, tokens=14, seconds_scoring=0.0)
    text = json.dumps(rollouts_to_json(rollouts))
    again = rollouts_from_json(json.loads(text), {5: found.prompt})  # type: ignore[arg-type]
    assert again == rollouts
    samples = to_samples(again.groups[0])
    assert samples[1].routes is not None and samples[1].routes[11].tolist() == [[300, 2]]
    assert text.count("routed_experts") == 2


# The learner


def metrics_of(learner: Learner, batches: Sequence[MicroBatch]) -> Mapping[str, Tensor]:
    tokens = learner.forward_backward(batches, CISPO).tokens
    assert tokens is not None
    return tokens.extra


@EVERY_ROUTER
@pytest.mark.parametrize("share_prompts", [False, True], ids=["separate", "shared"])
def test_learner_replays_balances_and_reports(kind: str, share_prompts: bool, tmp_path: Path) -> None:
    policy = make(kind)
    samples = samples_of(policy)[:2]
    save_policy(policy, tmp_path)
    config = LearnerConfig(router_aux_coef=0.1, router_aux_tokens="all", gradient_checkpointing=True)
    learner = Learner(str(tmp_path), config)
    packing = {"reduction": "token", "max_tokens": 16, "tokens_per_micro_batch": 60, "share_prompts": share_prompts}
    (batches,) = pack(samples, **packing)
    before = metrics_of(learner, batches)
    assert before["router/replayed_differ"].tolist() == [0.0] * 5
    (bare,) = pack([replace(s, routes=None) for s in samples], **packing)
    assert not metrics_of(learner, bare)
    disturb_routers(learner.policy)
    differs = metrics_of(learner, batches)["router/replayed_differ"]
    assert len(differs) == 5 and 0 < differs.mean() <= 1 and set(differs.tolist()) <= {0.0, 1.0}
    # Balance counts what is computed: the replayed choices.
    load, replayed = learner._expert_load(batches), batches[0].routes
    assert replayed is not None
    experts = learner.policy.router_shape[1]
    counts = torch.stack([torch.bincount(layer.flatten().long(), minlength=experts) for layer in replayed.unbind(1)])
    assert torch.equal(load.counts, counts.float())
    assert not torch.equal(learner._expert_load(bare).counts, counts.float())
    # Passes before the update replay too; the reference is a policy of its own.
    (old,), (plain,) = learner.logprobs(batches), learner.logprobs(bare)
    assert not torch.equal(old, plain)
    learner.freeze_reference()
    assert torch.equal(learner.logprobs(batches, reference=True)[0], plain)


# Engines


def assert_learners_choice(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> int:
    """Every row is the learner's; the number of rows."""
    rows = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*prompt, *completion.token_ids]
        reported = completion.routed_experts
        assert reported is not None
        assert reported == routed(policy, ids), "an expert is not the learner's"
        rows += reported.shape[0]
    return rows


PROMPTS = [tokens_of(n, seed=n).tolist() for n in (7, 7, 7, 1, 31, 31, 12, 1, 40, 3)]


@EVERY_ROUTER
def test_torch_engine_reports_the_learners_choice(kind: str, tmp_path: Path) -> None:
    """Shared prompts, ragged ends, through the short step and the modules."""
    policy = make(kind)
    save_policy(policy, tmp_path)
    engine = ServedEngine(
        TorchEngine(str(tmp_path), dtype="float32", max_context=80, max_sequences=4, record_routes=True)
    )
    limits = [5, 30, 1, 30, 2, 30, 12, 17, 30, 30]
    completions = sampled(engine, PROMPTS, SAMPLING, seed=0, limits=limits)
    assert assert_learners_choice(policy, PROMPTS, completions) == sum(map(len, PROMPTS)) + sum(limits) - len(PROMPTS)
    engine.close()
    plain = ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=80, max_sequences=4))
    again = sampled(plain, PROMPTS, SAMPLING, seed=0, limits=limits)
    assert [replace(c, routed_experts=None) for c in completions] == again, "recording changes nothing"


def test_a_recomputed_token_counts_as_the_last_time(tmp_path: Path) -> None:
    """An update in the middle: with `recompute` all rows are the new router's, with `keep` the earlier ones stay."""
    first = make("softmax")
    second = make("softmax")
    disturb_routers(second)
    save_policy(first, tmp_path)
    for on_update in ("recompute", "keep"):
        sampler_policy = load_policy(tmp_path).eval()
        sampler = Sampler(sampler_policy, SAMPLING, record_routes=True)
        sampler.add([0, 1], [PROMPTS[0], PROMPTS[4]], [12, 20])
        done = [s for _ in range(6) for s in sampler.step()]
        sampler_policy.load_hf(second.to_hf().items())
        if on_update == "recompute":
            sampler.recompute({0: PROMPTS[0], 1: PROMPTS[4]})
        done += [s for _ in range(14) for s in sampler.step()]
        assert [s.request for s in done] == [0, 1] and not sampler._prompts
        for found, prompt in zip(done, (PROMPTS[0], PROMPTS[4]), strict=True):
            assert found.routes is not None
            ids = [*prompt, *found.tokens]
            assert len(found.routes) == len(ids) - 1
            new, old = (_table(routed(policy, ids)) for policy in (second, first))
            if on_update == "recompute":
                assert torch.equal(found.routes, new)
            else:
                # The sixth sampled token is read after the update.
                assert torch.equal(found.routes[: len(prompt) + 5], old[: len(prompt) + 5])
                assert not torch.equal(found.routes, old)


def _table(reported: RoutedExperts) -> Tensor:
    return torch.frombuffer(bytearray(reported.data), dtype=torch.uint8).view(reported.shape)


def test_dropped_drafts_leave_nothing_behind(tmp_path: Path) -> None:
    save_policy(make("softmax"), tmp_path)
    engine = TorchEngine(str(tmp_path), dtype="float32", max_context=80, max_sequences=4, record_routes=True)
    drafts = start_drafts(PROMPTS[:4], SAMPLING, 0, max_context=80)
    engine.submit(drafts)
    engine.step()
    engine.drop(drafts[:3])
    (sampler,) = engine._samplers.values()
    assert len(sampler._prompts) == 1
    while not (done := engine.step()):
        pass
    assert done == drafts[3:] and not sampler._prompts
    completion = drafts[3].completion()
    assert completion.routed_experts is not None and completion.routed_experts.shape[0] == 1 + 30 - 1


def test_a_rule_that_ends_a_completion_cuts_its_experts() -> None:
    (draft,) = start_drafts([[1, 2, 3]], replace(SAMPLING, repetition=RepetitionStop(run_length=2)), 0, max_context=80)
    draft.sampled_by(0)
    draft.extend([4, 5, 6], [-1.0, -1e-6, -1e-6], None)
    draft.routed_experts = RoutedExperts(data=bytes(range(14)), shape=(7, 1, 2))
    routed_experts = draft.completion().routed_experts
    assert routed_experts == RoutedExperts(data=bytes(range(10)), shape=(5, 1, 2))
    draft.routed_experts = RoutedExperts(data=bytes(range(8)), shape=(4, 1, 2))
    with pytest.raises(AssertionError, match="has no experts"):
        draft.completion()


def route_table(*, width: int, caches: bool) -> tuple[RouteTable, Callable[..., None]]:
    """A table of three rows, and a step of it: (request, position of its first token, an expert a token) each."""
    steps: list[RoutedStep] = []
    table = RouteTable(lambda: [steps], rows=3, width=width, caches=caches)

    def step(*parts: tuple[str, int, list[int]]) -> None:
        values = torch.tensor([v for _, _, own in parts for v in own], dtype=torch.uint8)
        starts, counts = (torch.tensor(x).numpy() for x in ([s for _, s, _ in parts], [len(o) for _, _, o in parts]))
        steps[:] = [RoutedStep(tuple(r for r, _, _ in parts), starts, counts, values[:, None, None], None)]
        table.update()

    return table, step


def rows_of(table: RouteTable, request: str, sampled: list[int]) -> tuple[int, list[int]]:
    """Position of the first known row, and the experts from there on."""
    reported = table.get(request, sampled)
    return reported.first, list(reported.data)


def test_route_table_keeps_the_last_of_each_position() -> None:
    """Chunked prompts, requests read again, an unknown beginning, rows used again, steps of closed requests."""
    table, step = route_table(width=6, caches=False)
    table.open("a", [1, 1], 0)
    table.open("b", [2, 2, 2], 0)
    step(("a", 0, [1, 2, 3]), ("b", 2, [4]))
    step(("b", 3, [5, 6]), ("a", 3, [7]))
    assert rows_of(table, "a", [0] * 3) == (0, [1, 2, 3, 7]) and rows_of(table, "b", [0] * 3) == (2, [4, 5, 6])
    step(("a", 1, [8, 9, 10, 11, 12, 13]), ("gone", 0, [1]))  # its last token lies beyond the context
    assert rows_of(table, "a", [0] * 4) == (0, [1, 8, 9, 10, 11])
    table.close("a")
    table.open("c", [3], 0)
    step(("c", 4, [14]), ("a", 5, [15]))
    assert rows_of(table, "c", [0] * 5) == (4, [14]) and rows_of(table, "b", [0] * 3) == (2, [4, 5, 6])
    table.close("c")
    table.open("d", [4], 0)
    with pytest.raises(AssertionError, match="no recorded experts"):
        table.get("d", [0, 0, 0])


def test_cached_tokens_have_the_experts_of_the_request_that_read_them() -> None:
    """Prompts of 40 tokens in common: read before, in the same step, as an earlier answer, and under other weights."""
    table, step = route_table(width=80, caches=True)
    prompt, values = list(range(40)), list(range(100, 140))
    table.open("first", prompt, 0)
    table.open("beside", [*prompt, 7], 0)
    # The second finds two blocks of the first in the step that reads them; its part comes first.
    step(("beside", 32, [1] * 9), ("first", 0, values))
    assert rows_of(table, "first", [5]) == (0, values)
    assert rows_of(table, "beside", [5]) == (0, [*values[:32], *[1] * 9])
    step(("first", 40, [2]))
    step(("first", 41, [2]))
    for position in range(42, 48):
        step(("first", position, [3]))
    answer = [9] * 9
    assert rows_of(table, "first", answer) == (0, [*values, 2, 2, *[3] * 6])
    table.close("first")
    table.close("beside")
    # A conversation goes on behind the answer.
    table.open("next", [*prompt, *answer, 8], 0)
    step(("next", 48, [4, 4]))
    assert rows_of(table, "next", [5]) == (0, [*values, 2, 2, *[3] * 6, 4, 4])
    table.open("other", [*prompt[:31], 99, *prompt[32:]], 0)
    step(("other", 32, [6] * 8))
    assert rows_of(table, "other", [5]) == (32, [6] * 8)
    table.close("other")
    table.open("updated", prompt, 1)
    step(("updated", 32, [6] * 8))
    assert rows_of(table, "updated", [5]) == (32, [6] * 8)


def test_a_buffer_takes_the_choices_of_each_pass() -> None:
    policy = make("sigmoid")
    hidden, routes = run(policy)
    buffer = RouteBuffer(policy, len(TOKENS) + 3)
    address = buffer.routes.data_ptr()
    assert torch.equal(run(policy)[0], hidden)
    assert torch.equal(buffer.routes[: len(TOKENS)], routes) and not buffer.routes[len(TOKENS) :].any()
    buffer.leave(routers_of(policy)[1], torch.full((2, 2), 6))
    assert buffer.routes[:2, 1].tolist() == [[6, 6], [6, 6]] and buffer.routes.data_ptr() == address
    assert bytes_per_token(policy) == 2 * 2 and bytes_per_token(init_policy(QWEN3, 0)) == 0


def test_replay_takes_the_flips_out_of_a_bfloat16_engine(tmp_path: Path) -> None:
    """A float32 learner against a bfloat16 engine: the largest error is a flip's, and goes with it."""
    policy = make("sigmoid")
    disturb_routers(policy, 0.3)
    save_policy(policy, tmp_path)
    engine = ServedEngine(
        TorchEngine(str(tmp_path), dtype="bfloat16", max_context=80, max_sequences=16, record_routes=True)
    )
    prompts = [tokens_of(n, seed=50 + n).tolist() for n in range(20, 36)]
    completions = sampled(engine, prompts, SAMPLING, seed=1)
    rounded = load_policy(tmp_path, dtype=torch.bfloat16).float()  # the engine's weights, in float32
    largest, flipped = {}, []
    for replays in (False, True):
        errors = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([*prompt, *completion.token_ids])
            reported = completion.routed_experts
            assert reported is not None
            routes = _table(reported).to(torch.int16)
            with torch.no_grad(), live_choices(rounded) as live:
                given = routes if replays else None
                output = rounded(ids[:-1], torch.arange(len(ids) - 1), bounds([len(ids) - 1]), routes=given)
            if replays:
                flipped.append(differing(live, routes.long().unbind(1)))
            logprobs = (output.hidden @ rounded.lm_head_weight.detach().T).log_softmax(-1)[len(prompt) - 1 :]
            own = logprobs.gather(-1, ids[len(prompt) :, None])[:, 0]
            errors.append((own - torch.tensor(completion.logprobs)).abs())
        largest[replays] = float(torch.cat(errors).max())
    share = float(torch.cat(flipped).double().mean())
    assert 0.001 < share < 0.3
    assert largest[True] < 0.5 * largest[False], largest


# Recipes


def test_a_policy_without_experts_is_refused() -> None:
    recipe = load_recipe(Path("recipes/qwen3_tiny.yaml"), ["policy.router_replay=rollout"])
    with pytest.raises(UserError, match="policy.router_replay rollout: the policy has no experts to replay"):
        check_experts(recipe, init_policy(QWEN3, 0))
    check_experts(recipe, make("softmax"))
