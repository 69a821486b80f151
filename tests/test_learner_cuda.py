"""The learner on a GPU against the same learner on a CPU in float32: losses, gradients, tokens, steps; no waits.

In float32 a GPU sums in another order (1e-4 of a gradient's norm). In bfloat16 activations are rounded to 8 bits at
every layer: the bounds are twice the error of the same policies in bfloat16 on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.algorithms.losses import Cispo, ClippedSurrogate, Gspo, LossOutput
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack
from cispo.learner.learner import BatchLoss, Learner
from cispo.learner.loss import micro_batch_loss
from cispo.learner.optim import Optimizer
from cispo.learner.optimizer_moments import decoded, encoded
from cispo.learner.parallel import to_device
from cispo.policies.attention import Documents, causal_attention
from cispo.policies.layers import RMSNorm
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.moe import MoE
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import LossInputs, MicroBatch, Sample
from tests.test_learner_loss import by_name
from tests.tiny_policies import bounds

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Dtype = Literal["float32", "bfloat16"]

SHAPE: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
}
HYBRID = {
    **SHAPE,
    "model_type": "minimax",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "hybrid": HYBRID,
    "qwen3": {**SHAPE, "model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {**SHAPE, "model_type": "llama", "tie_word_embeddings": False},
}


def whole(x: LossInputs) -> LossOutput:
    """CISPO that does not say that it is per token."""
    return Cispo(ratio_max=1.5)(x)


OBJECTIVES = {
    "fused": Objective(loss=Cispo(ratio_max=1.5)),
    "whole": Objective(loss=whole),
    "fused, kl": Objective(loss=ClippedSurrogate(clip_low=0.2, clip_high=0.2), ratio_anchor="old", kl_coef=0.1),
}

GSPO = Objective(loss=Gspo(clip_low=3e-4, clip_high=4e-4), ratio_anchor="old")


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that bfloat16 holds exactly, so that only activations are rounded."""
    made = tmp_path_factory.mktemp("policy")
    save_policy(init_policy(CONFIGS[request.param], seed=0, dtype=torch.bfloat16), made)
    return made


def samples(longest: int = 150, count: int = 12) -> list[Sample]:
    """Ragged samples, two of them with a single token to train and one with none."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        length = int(torch.randint(4, longest, (), generator=generator)) if number > 1 else 2
        mask = torch.arange(length) >= max(1, length // 3)
        near = torch.where(mask, -5.8 + 0.5 * torch.randn(3, length, generator=generator), torch.nan)
        made.append(
            Sample(
                token_ids=torch.randint(320, (length,), generator=generator),
                loss_mask=mask if number != 5 else torch.zeros_like(mask),
                rollout_logprobs=near[0],
                versions=mask.int() * (1 + number % 3),
                old_logprobs=near[1],
                ref_logprobs=near[2],
                advantages=mask * float(torch.randn((), generator=generator)),
                group_id=number // 4,
                index=number % 4,
            )
        )
    return made


def micro_batches(budget: int = 300) -> list[MicroBatch]:
    """Several packs; the last has nothing to train on."""
    given = samples()
    (mbs,) = pack(given, reduction="prompt", max_tokens=150, tokens_per_micro_batch=budget)
    (empty,) = pack([given[5]], reduction="prompt", max_tokens=150, tokens_per_micro_batch=budget)
    assert len(mbs) > 2 and not len(empty[0].loss_index)
    return [*mbs, *empty]


def trained(
    folder: Path, objective: Objective, dtype: Dtype, device: str, config: LearnerConfig
) -> tuple[BatchLoss, dict[str, Tensor]]:
    learner = Learner(str(folder), config, dtype=dtype, device=device)
    batch = learner.forward_backward(micro_batches(), objective)
    optimizer = learner.rank.optimizer
    optimizer.gradients()
    grads = {
        name: m.grad.cpu()
        for (name, _), m in zip(learner.policy.named_parameters(), optimizer.masters, strict=True)
        if m.grad is not None
    }
    return batch, grads


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    assert actual.shape == expected.shape and bool(actual.isfinite().all())
    return float(((actual - expected).norm() / expected.norm().clamp(min=1e-12)).detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_learns_what_a_cpu_does(folder: Path, dtype: Dtype, objective: str):
    checked_against_cpu(folder, dtype, objective, LearnerConfig())


@pytest.mark.parametrize(
    "config", [LearnerConfig(gradient_checkpointing=True), LearnerConfig(router_aux_coef=0.1)], ids=["again", "aux"]
)
def test_a_gpu_learns_what_a_cpu_does_with(folder: Path, config: LearnerConfig):
    if config.router_aux_coef > 0 and '"minimax"' not in (folder / "config.json").read_text():
        pytest.skip("a dense policy has no experts to balance")
    checked_against_cpu(folder, "float32", "fused", config)


def checked_against_cpu(folder: Path, dtype: Dtype, objective: str, config: LearnerConfig) -> None:
    expected, grads = trained(folder, OBJECTIVES[objective], "float32", "cpu", config)
    batch, actual = trained(folder, OBJECTIVES[objective], dtype, GPU, config)
    exact = dtype == "float32"
    assert batch.loss == pytest.approx(expected.loss, rel=1e-4 if exact else 0.02, abs=1e-5 if exact else 5e-3)
    assert batch.aux_loss == pytest.approx(expected.aux_loss, rel=1e-4)
    assert batch.tokens is not None and expected.tokens is not None
    tokens, wanted = by_name(batch.tokens), by_name(expected.tokens)
    assert tokens.keys() == wanted.keys()
    assert all(values.device.type == "cpu" for values in tokens.values())
    for name in ("targets", "rollout_logprobs", "versions", "advantages", "old_logprobs"):
        assert torch.equal(tokens[name], wanted[name]), name
    for name in ("logprobs", "entropy"):
        difference = (tokens[name] - wanted[name]).abs()
        assert float(difference.max()) <= (1e-4 if exact else 0.12), name
        assert float(difference.mean()) <= (1e-5 if exact else 0.01), name
    if exact:
        # A token at the edge of a clip may fall on either side.
        for name in tokens.keys() - {"weight"}:
            assert error(tokens[name].float(), wanted[name].float()) <= 1e-4, name
    together = error(*(torch.cat([g[name].flatten() for name in grads]) for g in (actual, grads)))
    assert together <= (1e-4 if exact else 0.04), together
    for name, gradient in grads.items():
        # A router's gradient is that of the few tokens near a tie, some of which bfloat16 sends to other experts.
        rounded = 0.25 if name.endswith("gate.weight") else 0.1 if ".experts." in name else 0.05
        assert error(actual[name], gradient) <= (1e-3 if exact else rounded), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_move_weights_and_masters_alike(folder: Path, dtype: Dtype):
    learner = Learner(str(folder), LearnerConfig(), dtype=dtype, device=GPU)
    before = [p.detach().clone() for p in learner.policy.parameters()]
    results = [learner.update(micro_batches(), OBJECTIVES["fused"], lr=1e-2) for _ in range(2)]
    assert all(result.taken and result.grad_norm > 0 for result in results)
    optimizer = learner.rank.optimizer
    for parameter, master, old in zip(optimizer.parameters, optimizer.masters, before, strict=True):
        assert master.dtype == torch.float32 and torch.equal(parameter, master.to(parameter.dtype))
        assert not torch.equal(parameter, old)


def test_the_optimizer_is_that_of_a_cpu():
    """Gradients from 1e-18, far below bfloat16's eps of 1e-15 beside them, to 1: the same masters within 1e-6."""
    torch.manual_seed(0)
    shapes = [(64, 48), (48,), (7,), (130, 3)]
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    steps = [[torch.randn(shape) * 10.0 ** -(6 * n) for n, shape in enumerate(shapes)] for _ in range(4)]
    masters = []
    for device in ("cpu", GPU):
        parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
        named = [(str(i), p) for i, p in enumerate(parameters)]
        optimizer = Optimizer(named, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1)
        for gradients in steps:
            for _ in range(2):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.to(device, torch.bfloat16)
                optimizer.collect()
            norm, taken = optimizer.step(1e-3, max_grad_norm=1.0)
            assert taken and norm > 1
        masters.append([m.detach().cpu() for m in optimizer.masters])
    for ours, plain in zip(*reversed(masters), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 130, 64, 0, 17], [1, 0, 1, 1], [300]])
@pytest.mark.parametrize("dim", [64, 32])
def test_flash_attention_on_documents(lengths: list[int], dim: int):
    """Grouped heads, empty documents, documents of one token: output and gradients of the padded form in float32."""
    torch.manual_seed(0)
    total = sum(lengths)
    leaves = [torch.randn(total, heads, dim).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    weight = torch.randn(total, 6, dim)
    results = []
    for device, dtype, form in (("cpu", torch.float32, "padded"), (GPU, torch.bfloat16, "varlen")):
        q, k, v = (leaf.to(device, dtype) for leaf in leaves)
        documents = Documents(bounds(lengths).to(device), total, max(lengths))
        output = causal_attention(q, k, v, documents, form=form)  # type: ignore[arg-type]
        loss = (output.float() * weight.to(device)).sum()
        results.append([x.float().cpu() for x in (output, *torch.autograd.grad(loss, leaves))])
    for expected, actual in zip(*results, strict=True):
        # Of a single key, the gradients of queries and keys are zero.
        assert float((actual - expected).norm()) <= 0.02 * max(float(expected.norm()), 1.0)


def test_padded_attention_in_float32():
    torch.manual_seed(0)
    lengths = [5, 0, 1, 130, 64]
    leaves = [torch.randn(200, heads, 64, requires_grad=True) for heads in (6, 2, 2)]
    results = []
    for device in ("cpu", GPU):
        documents = Documents(bounds(lengths).to(device), 200)
        output = causal_attention(*(leaf.to(device) for leaf in leaves), documents)  # type: ignore[arg-type]
        results.append([output.cpu(), *torch.autograd.grad(output.square().sum(), leaves)])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-5


def test_norm_rounds_once():
    """bfloat16 in and out, float32 between: the rounded result of the same norm in float32."""
    torch.manual_seed(0)
    norm = RMSNorm(576, 1e-5)
    torch.nn.init.normal_(norm.weight)
    norm = norm.bfloat16()
    x = torch.randn(300, 576).bfloat16()
    expected = F.rms_norm(x.float(), (576,), norm.weight.float(), 1e-5).bfloat16()
    actual = norm.to(GPU)(x.to(GPU)).cpu()
    assert float((actual == expected).float().mean()) > 0.99, "only values halfway between two numbers may differ"
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)


def test_experts_fit_into_a_graph():
    """No shape, launch or wait depends on the chosen experts: a captured forward pass is right for other tokens."""
    torch.manual_seed(0)
    moe = MoE(128, 96, 8, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe = moe.to(GPU, torch.bfloat16).requires_grad_(False)
    tokens = torch.randn(3, 96, 128, device=GPU, dtype=torch.bfloat16)
    tokens[2] = tokens[2, 0]  # all of them to the same two experts
    expected = [moe(x) for x in tokens]
    place = tokens[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        moe(place)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = moe(place)
    for x, outputs in zip(tokens, expected, strict=True):
        place.copy_(x)
        graph.replay()
        for actual, output in zip(results, outputs, strict=True):
            assert torch.equal(actual, output)


def test_experts_equal_those_of_a_cpu():
    """bfloat16 against float32 on a CPU with the same choices, gradients included; two experts are idle."""
    torch.manual_seed(0)
    moe = MoE(128, 96, 6, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe = moe.bfloat16()
    x = torch.randn(77, 128).bfloat16()
    chosen = torch.randint(4, (77, 2))
    weights = torch.rand(77, 2)
    results = []
    for device, dtype in (("cpu", torch.float32), (GPU, torch.bfloat16)):
        moe.zero_grad()
        copy = MoE(128, 96, 6, 2)
        copy.load_state_dict(moe.state_dict())
        copy = copy.to(device, dtype)
        output = copy.experts(x.to(device, dtype), chosen.to(device), weights.to(device))
        output.float().square().sum().backward()
        grads = [p.grad for p in copy.experts.parameters() if p.grad is not None]
        results.append([y.detach().float().cpu() for y in (output, *grads)])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) <= 0.02
    assert not any(bool(gradient[4:].any()) for gradient in results[1][1:])


@contextmanager
def no_waiting() -> Iterator[None]:
    """A read from the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), GSPO], ids=[*OBJECTIVES, "gspo"])
def test_a_micro_batch_is_queued_without_waiting(folder: Path, objective: Objective):
    """Forward, loss, backward and collection of a pack above 4,096 tokens, in bfloat16."""
    learner = Learner(str(folder), LearnerConfig(), dtype="bfloat16", device=GPU)
    (mbs,) = pack(samples(500, 40), reduction="token", max_tokens=500, tokens_per_micro_batch=16384)
    assert len(mbs[0].tokens) > 4096
    for attempt in range(2):
        # The first one compiles kernels and moves the decay slopes.
        torch.cuda.synchronize()
        with no_waiting() if attempt else nullcontext():
            mb = to_device(mbs[0], learner.rank.mesh.device)
            output = learner.policy(mb.tokens, mb.positions, mb.cu_seqlens, mb.max_seqlen)
            loss, tokens = micro_batch_loss(
                output.hidden, learner.policy.lm_head_weight, mb, objective, temperature=1.0
            )
            loss.backward()
            learner.rank.optimizer.collect()
    assert all(bool(values.isfinite().all()) for values in by_name(tokens).values())


def test_logprobs_of_a_gpu(folder: Path):
    cpu, gpu = (Learner(str(folder), LearnerConfig(), device=device) for device in ("cpu", GPU))
    for expected, actual in zip(cpu.logprobs(micro_batches()), gpu.logprobs(micro_batches()), strict=True):
        assert actual.device.type == "cpu" and actual.shape == expected.shape
        assert float((actual - expected).abs().max()) <= 1e-4


# Host memory

OFFLOADED = LearnerConfig(offload=["optimizer", "activations", "reference"], gradient_checkpointing=True)
ON_DEVICE = LearnerConfig(gradient_checkpointing=True)


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_from_host_memory_is_the_same_step(dtype: Dtype):
    """Weights, masters and moments bit for bit, in pieces of one parameter and of all; the host's are pinned."""
    number = torch.float32 if dtype == "float32" else torch.bfloat16
    states = []
    for keys in ({}, {"offload": True, "piece": 1}, {"offload": True}):
        generator = torch.Generator().manual_seed(0)
        shapes = [(256, 512), (512,), (70, 64), (3, 4, 128)]
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(GPU, number)) for s in shapes]
        named = [(str(n), p) for n, p in enumerate(parameters)]
        optimizer = Optimizer(named, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1, **keys)  # type: ignore[arg-type]
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = (0.01 * torch.randn(parameter.shape, generator=generator)).to(GPU, number)
            optimizer.collect()
            optimizer.gradients()
            assert optimizer.step(1e-3, max_grad_norm=1.0)[1]
        resting = [v for own in optimizer.adam.state.values() for name, v in own.items() if name != "step"]
        assert all(v.is_pinned() == bool(keys) for v in resting)
        states.append(optimizer.state() | {f"{n}/weight": p.detach().cpu() for n, p in named})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_moments_in_8_bits_are_those_of_a_cpu():
    """The same codes but for ties: a GPU divides and takes roots to the last bit or two."""
    values = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) ** 3
    for signed in (True, False):
        given = values if signed else values.abs()
        cpu, gpu = encoded(given, signed=signed), encoded(given.to(GPU), signed=signed)
        assert torch.equal(cpu.scale, gpu.scale.cpu())
        different = (cpu.codes.int() - gpu.codes.cpu().int()).abs()
        assert int(different.max()) <= 1 and float((different > 0).float().mean()) < 1e-4
        error = (decoded(gpu, signed=signed).cpu() - given).view(-1, 64).abs()
        assert bool((error <= 0.0072 * given.view(-1, 64).abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloads_change_no_bit_of_a_gpu(folder: Path, dtype: Dtype):
    """Two updates and the reference's log-probabilities; kernels whose sums have no fixed order are left out of it."""
    results = []
    for config in (ON_DEVICE, ON_DEVICE, OFFLOADED):
        learner = Learner(str(folder), config, dtype=dtype, device=GPU)
        learner.freeze_reference()
        updates = [learner.update(micro_batches(), OBJECTIVES["fused"], lr=1e-2) for _ in range(2)]
        reference, policy = (torch.cat(learner.logprobs(micro_batches(), reference=r)) for r in (True, False))
        state = learner.rank.optimizer.state()
        results.append([torch.tensor([u.batch.loss for u in updates]), reference, policy, *state.values()])
    plain, again, offloaded = results
    assert torch.equal(offloaded[1], plain[1]), "the reference is the same"
    if all(map(torch.equal, again, plain)):
        assert all(map(torch.equal, offloaded, plain))
    else:
        # Two equal runs differ by the order of sums: offloads by no more than ten times that.
        for a, b, c in zip(plain, again, offloaded, strict=True):
            spread = float((a.double() - b.double()).norm())
            assert float((a.double() - c.double()).norm()) <= 10 * spread + 1e-6 * float(a.double().norm())


def test_offloads_free_the_gpu(tmp_path: Path):
    """A policy of 28 M numbers in bfloat16: at rest 2 bytes each of 16; saved inputs of layers leave the device."""
    shape = {**SHAPE, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 320}
    save_policy(init_policy({**shape, "model_type": "qwen3", "tie_word_embeddings": True}, seed=0), tmp_path)
    resting, peaks = [], []
    # Enough tokens that inputs of layers outweigh gradients, which grow while inputs are freed.
    (mbs,) = pack(samples(400, 400), reduction="token", max_tokens=400, tokens_per_micro_batch=1 << 18)
    for config in (ON_DEVICE, OFFLOADED):
        gc.collect()
        before = allocated()
        learner = Learner(str(tmp_path), config, dtype="bfloat16", device=GPU)
        learner.freeze_reference()
        learner.update(mbs, OBJECTIVES["fused"], lr=1e-4)
        resting.append(allocated() - before)
        count = sum(p.numel() for p in learner.policy.parameters())
        torch.cuda.reset_peak_memory_stats()
        learner.forward_backward(mbs, OBJECTIVES["fused"])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del learner
    assert resting[0] >= 16 * count and resting[1] <= 2.2 * count
    inputs = 4 * len(mbs[0].tokens) * 512 * 2
    assert peaks[0] - peaks[1] >= 13.5 * count + inputs, "half of the eight inputs"


def test_activations_go_to_the_host_without_waiting(folder: Path):
    learner = Learner(str(folder), OFFLOADED, dtype="bfloat16", device=GPU)
    (mbs,) = pack(samples(500, 40), reduction="token", max_tokens=500, tokens_per_micro_batch=16384)
    batches = learner.rank.to_device(mbs)
    for attempt in range(2):
        torch.cuda.synchronize()
        with no_waiting() if attempt else nullcontext():
            learner.rank.backward(batches, lambda mb: learner._loss(mb, OBJECTIVES["fused"], None))


def test_a_gpu_goes_on_from_moments_in_8_bits(folder: Path, tmp_path: Path):
    """A checkpoint of a learner with all on the device, read by one with its moments on the host."""
    first = Learner(str(folder), LearnerConfig(optimizer="adamw8bit"), dtype="bfloat16", device=GPU)
    first.update(micro_batches(), OBJECTIVES["fused"], lr=1e-3)
    first.start_save(str(tmp_path))
    assert first.saved(wait=True)
    config = LearnerConfig(optimizer="adamw8bit", offload=["optimizer"])
    second = Learner(str(tmp_path), config, dtype="bfloat16", device=GPU)
    second.restore(str(tmp_path))
    saved, restored = first.rank.optimizer.state(), second.rank.optimizer.state()
    assert saved.keys() == restored.keys() and all(torch.equal(saved[k], restored[k]) for k in saved)
    assert any(name.endswith("exp_avg_codes") for name in saved)
    for learner in (first, second):
        assert learner.update(micro_batches(), OBJECTIVES["fused"], lr=1e-3).taken
    one, other = first.rank.optimizer.state(), second.rank.optimizer.state()
    assert error(*(torch.cat([s[k].float().flatten() for k in s if k.endswith("master")]) for s in (other, one))) < 1e-5
