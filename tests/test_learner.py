"""The learner: one gradient for any micro-batches, ranks and order; skipped steps; the balancing loss; sft."""

from __future__ import annotations

import inspect
import math
import socket
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from cispo.algorithms import Reduction
from cispo.algorithms.losses import Cispo, ClippedSurrogate, NegativeLogLikelihood
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack, unpack
from cispo.batch.samples import demonstration
from cispo.errors import UserError
from cispo.learner.critic import Critic
from cispo.learner.handle import CriticHandle, LearnerHandle, RankHandle
from cispo.learner.learner import BatchLoss, Learner
from cispo.learner.loss import read
from cispo.learner.optim import Optimizer, learning_rate
from cispo.policies.loading import init_policy, load_policy, save_policy
from cispo.policies.moe import correction_biases
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch, Sample, TokenStats
from cispo.warmup import demonstration_batches
from tests import tiny_hybrids
from tests.tiny_policies import QWEN3

TINY = {
    "model_type": "minimax",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}
DENSE = {k: v for k, v in TINY.items() if k not in ("model_type", "layer_types") and "experts" not in k}
AUX = LearnerConfig(router_aux_coef=0.5)
CISPO = Objective(loss=Cispo(ratio_max=5.0))


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(init_policy(TINY, seed=0), folder)
    return folder


def samples(count: int = 13) -> list[Sample]:
    """Ragged samples with made-up rollouts that are off-policy enough for both sides of a clip."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        prompt, completion = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
        length = prompt + completion
        mask = torch.arange(length) >= prompt
        made.append(
            Sample(
                token_ids=torch.randint(40, (length,), generator=generator),
                loss_mask=mask,
                rollout_logprobs=torch.where(mask, -4.5 + torch.randn(length, generator=generator), 0.0),
                versions=mask.int() * (1 + number % 3),
                advantages=mask * float(torch.randn((), generator=generator)),
                group_id=number // 4,
                index=number % 4,
            )
        )
    return made


def packed(given: list[Sample], *, reduction: Reduction = "token", budget: int = 60) -> list[MicroBatch]:
    """The micro-batches of a single rank."""
    (mbs,) = pack(given, reduction=reduction, max_tokens=16, tokens_per_micro_batch=budget)
    return mbs


def tokens_of(batch: BatchLoss) -> TokenStats:
    assert batch.tokens is not None
    return batch.tokens


def gradient_of(
    learner: Learner,
    given: list[Sample],
    *,
    budget: int,
    rank: int = 0,
    world: int = 1,
    reduction: Reduction = "prompt",
) -> tuple[Tensor, BatchLoss]:
    batches = pack(given, reduction=reduction, max_tokens=16, tokens_per_micro_batch=budget, ranks=world)
    result = learner.forward_backward(batches[rank], Objective(loss=Cispo(ratio_max=1.5)))
    flat = torch.cat([g.flatten() for g in learner.rank.optimizer.gradients()])
    assert bool(flat.isfinite().all()) and float(flat.abs().max()) > 1e-4
    return flat, result


def _rank(rank: int, folder: str, address: str, queue: Queue) -> None:
    torch.set_num_threads(1)
    learner = Learner(folder, AUX, rank=rank, world=2, address=address)
    flat, result = gradient_of(learner, samples(), budget=40, rank=rank, world=2)
    queue.put((rank, flat.numpy(), result.loss, result.aux_loss))
    learner.close()


def test_one_gradient_for_any_micro_batches_ranks_and_order(policy_folder: Path):
    """1e-6 relative to the largest entry: only the order of float32 sums differs. The balancing loss is part of it."""
    whole, result = gradient_of(Learner(str(policy_folder), AUX), samples(), budget=10_000)
    scale = float(whole.abs().max())

    def close(other: Tensor, loss: float, aux: float) -> None:
        assert float((other - whole).abs().max()) <= 1e-6 * max(scale, 1.0)
        assert loss == pytest.approx(result.loss, abs=1e-6) and aux == pytest.approx(result.aux_loss, abs=1e-6)

    assert len(packed(samples(), reduction="prompt", budget=40)) >= 4
    split, split_result = gradient_of(Learner(str(policy_folder), AUX), samples(), budget=40)
    close(split, split_result.loss, split_result.aux_loss)
    backwards, backwards_result = gradient_of(Learner(str(policy_folder), AUX), samples()[::-1], budget=40)
    close(backwards, backwards_result.loss, backwards_result.aux_loss)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, str(policy_folder), address, queue)) for r in range(2)]
    for process in processes:
        process.start()
    ranks = sorted((queue.get(timeout=600) for _ in processes), key=lambda r: r[0])
    for process in processes:
        process.join(timeout=60)
    for _, flat, _, _ in ranks:
        close(torch.from_numpy(flat), sum(r[2] for r in ranks), sum(r[3] for r in ranks))


@pytest.mark.parametrize("config", [TINY, {"model_type": "qwen3", **DENSE}], ids=["lightning", "dense"])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_a_prompt_read_once_gives_the_same_gradient(tmp_path: Path, config: dict[str, object], budget: int):
    """Loss, gradient, log-probabilities and the balancing loss over all tokens, copies of a prompt included."""
    save_policy(init_policy(config, seed=0), tmp_path)
    coefficient = 0.5 if config is TINY else 0.0
    settings = LearnerConfig(router_aux_coef=coefficient, router_aux_tokens="all")
    prompts = {s.group_id: s.token_ids[: int((~s.loss_mask).sum())] for s in reversed(samples())}
    given = []
    for s in samples():
        prompt, answer = prompts[s.group_id], s.token_ids[s.loss_mask]

        def moved(values: Tensor, prompt: Tensor = prompt, mask: Tensor = s.loss_mask) -> Tensor:
            return torch.cat([torch.zeros(len(prompt), dtype=values.dtype), values[mask]])

        names = ("loss_mask", "rollout_logprobs", "advantages", "versions")
        values = {name: moved(getattr(s, name)) for name in names}
        given.append(replace(s, token_ids=torch.cat([prompt, answer]), **values))
    results = []
    for shared in (False, True):
        learner = Learner(str(tmp_path), settings)
        (mbs,) = pack(given, reduction="prompt", max_tokens=16, tokens_per_micro_batch=budget, share_prompts=shared)
        assert any(mb.unique_index is not None for mb in mbs) == shared
        logprobs = torch.cat(learner.logprobs(mbs))
        batch = learner.forward_backward(mbs, CISPO)
        results.append((torch.cat([g.flatten() for g in learner.rank.optimizer.gradients()]), logprobs, batch))
    (gradient, logprobs, batch), (shared_gradient, shared_logprobs, shared_batch) = results
    assert float(gradient.abs().max()) > 1e-3
    assert float((gradient - shared_gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max()))
    assert float((logprobs - shared_logprobs).abs().max()) <= 1e-5
    assert shared_batch.loss == pytest.approx(batch.loss, abs=1e-6)
    assert shared_batch.aux_loss == pytest.approx(batch.aux_loss, abs=1e-6)


def test_gradient_is_that_of_the_formula(policy_folder: Path):
    """The whole path against autograd on one sequence at a time with the plain softmax, token reduction."""
    given = samples(5)
    got, _ = gradient_of(Learner(str(policy_folder), LearnerConfig()), given, budget=30, reduction="token")
    policy = load_policy(str(policy_folder))
    total = sum(s.num_loss_tokens for s in given)
    loss = torch.zeros(())
    for s in given:
        tokens = s.token_ids[:-1]
        output = policy(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
        logprobs = torch.log_softmax(output.hidden @ policy.lm_head_weight.T, -1).gather(1, s.token_ids[1:, None])[:, 0]
        mask = s.loss_mask[1:]
        assert s.advantages is not None
        weight = (logprobs - s.rollout_logprobs[1:]).exp().clamp(max=1.5).detach()
        loss = loss - (weight * s.advantages[1:] * logprobs)[mask].sum() / total
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    flat = torch.cat([g.flatten() for g in expected])
    assert float((got - flat).abs().max()) <= 1e-6 * max(float(flat.abs().max()), 1.0)


def with_logprobs(learner: Learner, given: list[Sample], name: str, **which: bool) -> list[Sample]:
    batches = pack(given, reduction="token", max_tokens=16, tokens_per_micro_batch=60)
    rows = unpack(batches, [learner.logprobs(mbs, **which) for mbs in batches], len(given))
    return [replace(sample, **{name: row}) for sample, row in zip(given, rows, strict=True)]


def test_old_anchor_starts_at_ratio_one(policy_folder: Path):
    learner = Learner(str(policy_folder), LearnerConfig())
    given = with_logprobs(learner, samples(), "old_logprobs")
    mbs = packed(given)
    objective = Objective(loss=ClippedSurrogate(clip_low=0.2, clip_high=0.2), ratio_anchor="old")
    first = tokens_of(learner.update(mbs, objective, lr=1e-2).batch)
    assert torch.equal(first.ratio, torch.ones_like(first.ratio))
    versions = first.versions
    assert torch.equal(versions, torch.cat([mb.versions[mb.loss_mask] for mb in mbs]))
    assert set(versions.tolist()) == {1, 2, 3}
    again = tokens_of(learner.update(mbs, objective, lr=1e-2).batch)
    assert float((again.ratio - 1).abs().max()) > 1e-3


def test_the_reference_stays_where_the_policy_was(policy_folder: Path):
    """KL to the reference is 0 before the first update, and pulls back after: its gradient alone lowers it."""
    learner = Learner(str(policy_folder), LearnerConfig())
    learner.freeze_reference()
    given = with_logprobs(learner, samples(), "ref_logprobs", reference=True)
    mbs = packed(given)
    objective = Objective(loss=Cispo(ratio_max=5.0), kl_coef=0.5)
    first = tokens_of(learner.update(mbs, objective, lr=1e-2).batch).extra["kl/reference"]
    assert float(first.abs().max()) <= 1e-6
    away = tokens_of(learner.update(mbs, objective, lr=1e-2).batch).extra["kl/reference"]
    assert float(away.mean()) > 1e-3
    again = with_logprobs(learner, samples(), "ref_logprobs", reference=True)
    assert all(torch.equal(a.ref_logprobs, b.ref_logprobs) for a, b in zip(given, again, strict=True))  # type: ignore
    only_kl = Objective(loss=Cispo(ratio_max=0.0), kl_coef=0.5)
    batches = [learner.update(mbs, only_kl, lr=3e-3).batch for _ in range(8)]
    kls = [float(tokens_of(batch).extra["kl/reference"].mean()) for batch in batches]
    assert kls[-1] < 0.5 * kls[0]


def test_non_finite_gradients_skip_the_step(policy_folder: Path):
    learner = Learner(str(policy_folder), LearnerConfig())
    before = {n: p.detach().clone() for n, p in learner.policy.named_parameters()}
    mbs = packed(samples())
    mbs[0].advantages[mbs[0].loss_mask.nonzero()[0]] = math.inf
    result = learner.update(mbs, CISPO, lr=1e-2)
    assert not result.taken and not math.isfinite(result.grad_norm)
    assert all(torch.equal(before[n], p) for n, p in learner.policy.named_parameters())
    good = packed(samples())
    assert learner.update(good, CISPO, lr=1e-2).taken
    assert any(not torch.equal(before[n], p) for n, p in learner.policy.named_parameters())


def test_nothing_to_train_on_changes_nothing(policy_folder: Path):
    learner = Learner(str(policy_folder), LearnerConfig())
    before = [p.detach().clone() for p in learner.policy.parameters()]
    assert learner.update([], CISPO, lr=1e-2).grad_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


@pytest.mark.parametrize("tokens", ["completion", "all"])
def test_balancing_loss_is_its_definition(policy_folder: Path, tokens: Literal["completion", "all"]):
    config = LearnerConfig(router_aux_coef=1.0, router_aux_tokens=tokens)
    _, result = gradient_of(Learner(str(policy_folder), config), samples(), budget=30)
    policy = load_policy(str(policy_folder))
    (mb,) = packed(samples(), reduction="prompt", budget=10_000)
    mask = mb.loss_mask if tokens == "completion" else torch.ones_like(mb.loss_mask)
    layers = []
    for router in policy(mb.tokens, mb.positions, mb.cu_seqlens).router:
        chosen = torch.nn.functional.one_hot(router.chosen[mask], 4).sum(1).float()
        layers.append(4 * (chosen.mean(0) * router.probs[mask].mean(0)).sum())
    assert result.aux_loss == pytest.approx(float(torch.stack(layers).mean().detach()), rel=1e-6)


def test_balancing_a_dense_policy_is_refused(tmp_path: Path):
    save_policy(init_policy({"model_type": "qwen3", **DENSE}, seed=0), tmp_path)
    with pytest.raises(UserError, match="no experts"):
        Learner(str(tmp_path), AUX)


def test_sft_learns_a_constant_answer(policy_folder: Path):
    learner = Learner(str(policy_folder), LearnerConfig())
    batches = demonstration_batches([demonstration([n, 5], [7, 8, 2], n) for n in range(9, 30)], batch_size=8, seed=0)
    losses = []
    for _ in range(30):
        (mbs,) = pack(next(batches), reduction="token", max_tokens=8, tokens_per_micro_batch=512)
        losses.append(learner.update(mbs, Objective(loss=NegativeLogLikelihood()), lr=1e-2).batch.loss)
    assert losses[-1] < 0.05 < 2 < losses[0]


def test_demonstration_batches_cover_an_epoch_and_repeat_by_seed():
    given = [demonstration([1], [2], n) for n in range(10)]
    first, again = (demonstration_batches(given, batch_size=4, seed=3) for _ in range(2))
    ids = [[s.group_id for s in next(first)] for _ in range(5)]
    assert ids == [[s.group_id for s in next(again)] for _ in range(5)]
    assert sorted(i for batch in ids for i in batch) == sorted([*range(10), *range(10)])


def test_masters_keep_what_bfloat16_would_round_away():
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer([("weight", weight)], betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    for _ in range(8):
        weight.sum().backward()
        optimizer.collect()
        optimizer.step(1e-3, max_grad_norm=1.0)
    # A step of 1e-3 is below bfloat16's spacing at 1; eight of them are not.
    assert float(weight.detach()[0, 0]) == pytest.approx(1 - 8e-3, abs=4e-3) and float(weight.detach()[0, 0]) < 1


def test_learning_rate():
    linear = [learning_rate(s, steps=11, peak=1.0, warmup=0, schedule="linear", final_ratio=0.1) for s in range(11)]
    assert linear[0] == 1 and linear[-1] == pytest.approx(0.1) and linear[5] == pytest.approx(0.55)
    warm = [learning_rate(s, steps=10, peak=2.0, warmup=4) for s in range(6)]
    assert warm == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(9, steps=10, peak=1.0, schedule="cosine") == pytest.approx(0, abs=1e-12)


def test_tied_and_untied_policies_round_trip_through_a_step(tmp_path: Path):
    """One head gradient however the head is stored: a step of a tied policy moves the embedding and is saved."""
    save_policy(init_policy({**TINY, "tie_word_embeddings": True}, seed=0), tmp_path)
    learner = Learner(str(tmp_path), LearnerConfig())
    mbs = packed(samples())
    learner.update(mbs, CISPO, lr=1e-2)
    learner.save(str(tmp_path / "after"))
    saved = load_policy(tmp_path / "after")
    assert torch.equal(saved.lm_head_weight, learner.policy.lm_head_weight)
    assert not torch.equal(saved.lm_head_weight, load_policy(tmp_path).lm_head_weight)


@pytest.mark.parametrize(("handle", "rank"), [(LearnerHandle, Learner), (CriticHandle, Critic)])
def test_a_handle_has_the_signatures_of_its_rank(handle: type[RankHandle], rank: type):
    methods = [name for name, _ in inspect.getmembers(handle, inspect.isfunction) if not name.startswith("_")]
    assert {"update", "start_save", "saved", "restore", "release_memory"} <= set(methods)
    for name in methods:
        assert inspect.signature(getattr(handle, name)) == inspect.signature(getattr(rank, name)), name


def test_balancing_by_bias(tmp_path: Path):
    """After an update each bias has moved by the rate against its expert's load, counted over all micro-batches."""
    tiny_hybrids.save("minimax_m2", tmp_path)
    learner = Learner(str(tmp_path), LearnerConfig(router_bias_rate=0.01))
    given = samples(6)
    (mbs,) = pack(given, reduction="token", max_tokens=16, tokens_per_micro_batch=40)
    assert len(mbs) > 1
    policy = load_policy(str(tmp_path))
    layers, experts = policy.router_shape
    counts = torch.zeros(layers, experts)
    for mb in mbs:
        for layer, router in enumerate(read(policy, mb).router):
            counts[layer] += torch.bincount(router.chosen[mb.loss_mask].flatten(), minlength=experts)
    before = torch.stack(correction_biases(policy))
    learner.update(mbs, CISPO, lr=1e-3)
    expected = before + 0.01 * (counts.mean(-1, keepdim=True) - counts).sign()
    moved = torch.stack(correction_biases(learner.policy))
    assert torch.equal(moved, expected) and bool((moved != before).any())
    exported = [tensor for name, tensor in learner.policy.to_hf().items() if name.endswith("e_score_correction_bias")]
    assert torch.equal(torch.stack(exported), expected), "engines and checkpoints get the moved biases"
    save_policy(init_policy(QWEN3, seed=0), tmp_path / "dense")
    with pytest.raises(UserError, match="learner.router_bias_rate 0.01: no router of the policy has a bias"):
        Learner(str(tmp_path / "dense"), LearnerConfig(router_bias_rate=0.01))
