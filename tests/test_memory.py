"""Less memory: offloads change no bit, moments in 8 bits stay within their bounds, `show` knows the card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.losses import NegativeLogLikelihood
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack
from cispo.commands import show as show_command
from cispo.commands.card import CARDS, GIB, Card, Planner
from cispo.commands.train import train
from cispo.engines.choice import settled
from cispo.errors import RunError, UserError
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.learner.memory import rank_memory
from cispo.learner.offload import HostActivations
from cispo.learner.optim import Optimizer
from cispo.learner.optimizer_moments import BLOCK, decoded, encoded, largest_square, moment_bytes
from cispo.policies.costs import cache_sizes
from cispo.policies.loading import init_policy, save_policy, shape_of
from cispo.policies.lora import adapter_size
from cispo.recipe.load import dump_yaml, load_recipe, parse_recipe, read_stored
from cispo.recipe.resume import check_same_run
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora, Recipe
from tests.lora_ranks import with_values
from tests.memory_ranks import ADAPTERS, CISPO, LR, SETTINGS, run_rank
from tests.rank_group import free_address
from tests.test_end_to_end import QUICKSTART, ROOT
from tests.test_learner import samples
from tests.test_resume import FAULTS, KEYS
from tests.tiny_policies import MINIMAX, QWEN3

HYBRID = {**MINIMAX, "hidden_size": 64, "intermediate_size": 64}
DENSE = {**QWEN3, "hidden_size": 64, "intermediate_size": 128}
CONFIGS: dict[str, dict[str, Any]] = {"hybrid": HYBRID, "dense": DENSE}
BETAS = (0.9, 0.95)
OFFLOADS: list[list[Literal["optimizer", "activations", "reference"]]] = [
    [],
    ["optimizer", "activations"],
    ["optimizer", "activations", "reference"],
]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    save_policy(init_policy(CONFIGS[request.param], seed=0), made)
    return made


def packed(ranks: int = 1) -> list[Any]:
    return pack(samples(), reduction="token", max_tokens=40, tokens_per_micro_batch=60, ranks=ranks)


def stepped(dtype: torch.dtype, steps: int = 5, **keys: Any) -> tuple[Optimizer, list[float]]:
    """An optimizer after steps on made-up gradients; one of its parameters has no gradient in the first step."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 128), (128,), (70, 64), (5,), (3, 4, 128), (6, 10)]
    parameters = [Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]
    named = [(f"p{number}", parameter) for number, parameter in enumerate(parameters)]
    optimizer = Optimizer(named, betas=BETAS, eps=1e-15, weight_decay=0.1, **keys)
    return optimizer, [go(optimizer, generator, first=step == 0) for step in range(steps)]


def go(optimizer: Optimizer, generator: torch.Generator, *, first: bool = False) -> float:
    for parameter in optimizer.parameters[int(first) :]:
        parameter.grad = (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    optimizer.collect()
    optimizer.gradients()
    return optimizer.step(1e-3, max_grad_norm=0.5)[0]


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


# The step of AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"low_bit": True}], ids=["float32 moments", "8-bit moments"])
@pytest.mark.parametrize("piece", [1, 20_000, 1 << 28])
def test_a_step_in_pieces_from_the_host_is_the_same_step(dtype: torch.dtype, kind: dict[str, bool], piece: int):
    """Weights, masters, moments and norms, bit for bit; between steps masters that are copies have no memory."""
    plain, norms = stepped(dtype, **kind)
    offloaded, others = stepped(dtype, offload=True, piece=piece, **kind)
    assert norms == others and norms[1] > 0.5
    assert_equal(offloaded.state(), plain.state())
    assert all(torch.equal(a, b) for a, b in zip(offloaded.parameters, plain.parameters, strict=True))
    assert len(offloaded.copies) == (6 if dtype == torch.bfloat16 else 0)
    assert all(master.untyped_storage().nbytes() == 0 for _, master in offloaded.copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_from_its_state_in_any_place(dtype: torch.dtype):
    """From device to host and back, in float32 and in 8 bits: the undisturbed steps, bit for bit."""
    for kind in ({}, {"low_bit": True}):
        straight, _ = stepped(dtype, **kind)
        saved, weights = straight.state(), [p.detach().clone() for p in straight.parameters]
        norm = go(straight, torch.Generator().manual_seed(7))
        for offload in (True, False):
            other, _ = stepped(dtype, steps=1, offload=offload, **kind)
            with torch.no_grad():
                for parameter, values in zip(other.parameters, weights, strict=True):
                    parameter.copy_(values)
            other.reload_masters()
            other.restore(saved)
            assert go(other, torch.Generator().manual_seed(7)) == norm
            assert_equal(other.state(), straight.state())


def test_a_state_of_another_policy_is_one_sentence():
    saved = stepped(torch.float32, low_bit=True)[0].state()
    other = Optimizer([("p0", Parameter(torch.zeros(3, 64)))], betas=BETAS, eps=1e-15, weight_decay=0.0, low_bit=True)
    with pytest.raises(UserError, match=r"the checkpoint's optimizer has p0 with .*exp_avg_codes \[96, 128\]"):
        other.restore({key: value for key, value in saved.items() if key.startswith("p0/")})
    with pytest.raises(UserError, match="the checkpoint's optimizer has p5 with"):
        other.restore({key: value for key, value in saved.items() if key.startswith("p5/")})


# Moments in 8 bits


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.0071), (False, 0.0036)])
def test_rounding_to_8_bits(signed: bool, bound: float):
    """At most `bound` of the block's largest value, over fourteen orders of magnitude; zeros stay zero."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 1024, generator=generator) * torch.logspace(-20, -6, 64)[:, None]
    values *= torch.rand(64, 1024, generator=generator) ** 8
    values[3] = 0
    values = values if signed else values.abs()
    low = encoded(values, signed=signed)
    assert low.codes.shape == (64, 1024) and low.scale.shape == (64, 1024 // BLOCK)
    back = decoded(low, signed=signed)
    largest = values.view(-1, BLOCK).abs().amax(1, keepdim=True)
    error = (back - values).view(-1, BLOCK).abs() / largest.clamp(min=1e-38)
    assert bound / 2 < float(error.max()) <= bound
    assert not back[3].any() and torch.equal(encoded(values, signed=signed).codes, low.codes)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed: bool):
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    values = values if signed else values.abs()
    expected = torchao.OptimState8bit.zeros(values.shape, signed=signed, block_size=BLOCK)
    expected.copy_(values)
    assert torch.equal(encoded(values, signed=signed).codes, expected.codes)


def test_no_step_is_long_where_a_second_moment_was_rounded_away():
    """Beside one large gradient all others are below the smallest level; later they get none, and eps is 1e-15."""
    assert largest_square((0.9, 0.95)) == pytest.approx(1.3571, abs=1e-4)
    weight = Parameter(torch.zeros(1, BLOCK))
    optimizer = Optimizer([("w", weight)], betas=BETAS, eps=1e-15, weight_decay=0.0, low_bit=True)
    gradient = torch.full((1, BLOCK), 1e-9)
    gradient[0, 0], gradient[0, 1:30] = 1.0, 3e-6
    for step in range(12):
        before = weight.detach().clone()
        weight.grad = gradient.clone() if step < 2 else torch.zeros(1, BLOCK)
        optimizer.step(1.0, max_grad_norm=1e9)
        longest = largest_square(BETAS) ** 0.5 * (1 - 0.95 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        assert float((weight.detach() - before).abs().max()) <= longest * 1.001


def test_moments_in_8_bits_learn(folder: Path):
    """Twenty steps of supervised learning: each loss within 2 % of float32's; most moments have about a byte."""
    losses = {}
    for optimizer in ("adamw", "adamw8bit"):
        learner = Learner(str(folder), LearnerConfig(optimizer=optimizer))
        (mbs,) = packed()
        objective = Objective(loss=NegativeLogLikelihood())
        losses[optimizer] = [learner.update(mbs, objective, lr=3e-3).batch.loss for _ in range(20)]
        state = learner.rank.optimizer.state()
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)
    assert losses["adamw8bit"] != losses["adamw"]
    size = sum(value.nbytes for key, value in state.items() if "exp_avg" in key)
    assert size == sum(moment_bytes(p.shape, low=True) for p in learner.policy.parameters())
    assert size < 0.5 * sum(moment_bytes(p.shape, low=False) for p in learner.policy.parameters())


# Learner and critic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloads_change_no_bit(folder: Path, dtype: Any):
    """Weights, log-probabilities and moments with everything on the host; one input of each layer goes there."""
    kept: list[Tensor] = []
    results = []
    for offload in OFFLOADS[0], OFFLOADS[2]:
        learner = Learner(str(folder), LearnerConfig(offload=offload, gradient_checkpointing=True), dtype=dtype)
        learner.freeze_reference()
        (mbs,) = packed()
        with pytest.MonkeyPatch.context() as patch:
            pack_it = HostActivations._pack

            def count(self: HostActivations, saved: Tensor, pack_it: Any = pack_it) -> Any:
                moved = pack_it(self, saved)
                kept.extend([saved] if moved is not saved else [])
                return moved

            patch.setattr(HostActivations, "_pack", count)
            updates = [learner.update(mbs, CISPO, lr=LR) for _ in range(3)]
        passes = [torch.cat(learner.logprobs(mbs, reference=r)) for r in (True, False, True)]
        assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])
        learner.load_reference(str(folder))
        passes.append(torch.cat(learner.logprobs(mbs, reference=True)))
        results.append(([(u.batch.loss, u.grad_norm) for u in updates], passes, learner.rank.optimizer.state()))
    (losses, passes, state), (others, again, offloaded) = results
    assert losses == others and all(map(torch.equal, passes, again))
    assert_equal(offloaded, state)
    layers = 4 if "hybrid" in folder.name else 2
    assert len(kept) >= 3 * len(mbs) * layers and all(saved.shape[-1] == 64 for saved in kept)


def test_offloads_change_no_bit_of_an_adapter_or_a_critic(folder: Path):
    states = []
    for offload in OFFLOADS[0], OFFLOADS[1]:
        config = LearnerConfig(offload=offload, gradient_checkpointing=True)
        learner = Learner(str(folder), config, dtype="bfloat16", adapters=ADAPTERS)
        critic = Critic(str(folder), CriticConfig(), config, dtype="bfloat16")
        (mbs,) = packed()
        for _ in range(2):
            assert learner.update(mbs, CISPO, lr=LR).taken
            assert critic.update(with_values(mbs, critic.values(mbs)), lr=LR).taken
        states.append((learner.rank.optimizer.state(), critic.rank.optimizer.state()))
    for plain, offloaded in zip(*states, strict=True):
        assert_equal(offloaded, plain)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_learner_resumes_bit_for_bit(folder: Path, tmp_path: Path, optimizer: Any):
    """A checkpoint with the moments on the device is read by a learner with them on the host."""
    (mbs,) = packed()
    first = Learner(str(folder), LearnerConfig(optimizer=optimizer), dtype="bfloat16")
    for _ in range(2):
        first.update(mbs, CISPO, lr=LR)
    first.start_save(str(tmp_path))
    assert first.saved(wait=True)
    second = Learner(str(tmp_path), LearnerConfig(optimizer=optimizer, offload=["optimizer"]), dtype="bfloat16")
    second.restore(str(tmp_path))
    for learner in (first, second):
        learner.update(mbs, CISPO, lr=LR)
    assert_equal(second.rank.optimizer.state(), first.rank.optimizer.state())


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["hybrid"], indirect=True)
def test_sharded_ranks_offload_and_round_alike(folder: Path, tmp_path: Path):
    """Two ranks with halves of every parameter: offloads change no bit, adapters included; moments in 8 bits are
    resumed bit for bit, and read whole by one rank, which saves the same.
    """
    arguments = (str(folder), packed(ranks=2), free_address(), str(tmp_path))
    mp.spawn(run_rank, args=arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}")
        assert results.keys() == {*SETTINGS, "low", "low, resumed"}
        for name in ("", "adapter "):
            (plain, passes), (offloaded, others) = results[name.strip() or "plain"], results[f"{name}offloaded"]
            assert_equal(offloaded, plain)
            assert all(map(torch.equal, others, passes)) and not torch.equal(passes[0], passes[1])
        assert_equal(results["low, resumed"], results["low"])
        assert any(not torch.equal(results["low"][key], results["plain"][0][key]) for key in results["low"])
    parts = [load_file(file) for file in sorted((tmp_path / "training").glob("learner-*.safetensors"))]
    one = Learner(str(tmp_path), LearnerConfig(optimizer="adamw8bit"), dtype="bfloat16")
    one.restore(str(tmp_path))
    state = one.rank.optimizer.state()
    name = next(key for key in state if key.endswith("exp_avg_sq_scale"))
    for key in (name, name.replace("_scale", "_codes")):
        assert torch.equal(torch.cat([part[key] for part in parts]), state[key])
    assert one.update(packed()[0], CISPO, lr=LR).taken


# Choices of a recipe


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"offload": ["activations"], "gradient_checkpointing": False},
            "learner.offload: activations moves the inputs of recomputed layers: set learner.gradient_checkpointing",
        ),
        (
            {"optimizer": "adamw8bit", "betas": (0.95, 0.9)},
            r"adamw8bit needs betas\[0\]\^2 below betas\[1\], which bounds a rounded step: 0.95\^2 is not below 0.9",
        ),
    ],
)
def test_what_cannot_be_combined_is_one_sentence(keys: dict[str, object], sentence: str):
    overrides = [f"learner.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in keys.items()]
    with pytest.raises(UserError, match=sentence):
        load_recipe(QUICKSTART, [item.replace("'", "") for item in overrides])


def test_a_reference_without_adapter_is_not_moved():
    with pytest.raises(UserError, match="learner.offload: reference moves nothing with policy.lora"):
        load_recipe(QUICKSTART, ["learner.offload=[reference]", "policy.lora={}"])


def test_automatic_choices():
    """bfloat16 and recomputed layers where a model is given and the device is a GPU; what is set stays."""
    given = parse_recipe({"policy": {"model": "a/b"}})
    shape = parse_recipe({"policy": {"config": {}, "tokenizer": "t"}})

    def chosen(recipe: Recipe, device: Any) -> tuple[str, object]:
        found = settled(recipe, device)
        assert found.policy.number_format == found.policy.dtype
        return found.policy.dtype, found.learner.gradient_checkpointing

    assert chosen(given, "cuda") == ("bfloat16", True)
    assert chosen(given, "cpu") == chosen(shape, "cuda") == chosen(shape, "cpu") == ("float32", False)
    fixed = parse_recipe({"policy": {"model": "a/b", "dtype": "float32"}, "learner": {"gradient_checkpointing": False}})
    assert chosen(fixed, "cuda") == ("float32", False)
    kept = parse_recipe({"policy": {"model": "a/b"}, "learner": {"offload": ["activations"]}})
    assert chosen(kept, "cpu") == ("float32", True) and kept.learner.recomputes
    assert (given.policy.number_format, given.learner.recomputes) == ("float32", False)


def test_a_run_keeps_the_number_format_that_it_began_with(tmp_path: Path):
    """A resumed recipe without policy.dtype is the run's, whatever the default is on that device."""
    recipe = load_recipe(QUICKSTART, [])
    assert recipe.policy.dtype == "auto"
    for stored in ("float32", "bfloat16"):
        keys = [f"policy.dtype={stored}", "learner.gradient_checkpointing=false"]
        (tmp_path / "recipe.yaml").write_text(dump_yaml(load_recipe(QUICKSTART, keys)))
        assert check_same_run(recipe, tmp_path).policy.dtype == stored
    with pytest.raises(UserError, match="policy.dtype 'bfloat16', not 'float32'"):
        check_same_run(load_recipe(QUICKSTART, ["policy.dtype=float32"]), tmp_path)
    with pytest.raises(UserError, match="learner.optimizer 'adamw', not 'adamw8bit'"):
        check_same_run(load_recipe(QUICKSTART, ["learner.optimizer=adamw8bit"]), tmp_path)
    assert check_same_run(load_recipe(QUICKSTART, ["learner.offload=[optimizer]"]), tmp_path).learner.offload


# Checkpoints


def test_a_run_with_little_memory_is_the_same_run_when_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything on the host, moments in 8 bits, a critic and a reference; without the offloads before."""
    monkeypatch.chdir(ROOT)
    less = "learner.offload=[optimizer,activations,reference]"
    ppo = "algorithm={name: ppo, ratio_max: null, kl_coef: 0.01, kl_in: reward, kl: k1}"
    keys = [*KEYS, ppo, "learner.optimizer=adamw8bit", "sft.steps=1", "train.save_every=1"]
    train(QUICKSTART, [f"output_dir={tmp_path / 'whole'}", *keys, "train.steps=3"], resume=False)
    for steps, more in ((2, []), (3, [less])):
        overrides = [f"output_dir={tmp_path / 'parts'}", *keys, *more, f"train.steps={steps}"]
        train(QUICKSTART, overrides, resume=steps > 2)
    one, other = (FAULTS.state_of(tmp_path / part / "quickstart") for part in ("whole", "parts"))
    assert FAULTS.difference(one, other) == ""
    assert any(key.endswith("exp_avg_codes") for key in map(str, one["tensors"]))


def test_a_checkpoint_of_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Policy and critic without optimizers: smaller; a resumed run says that moments start again, and goes on."""
    monkeypatch.chdir(ROOT)
    ppo = "algorithm={name: ppo, ratio_max: null}"
    keys = [*KEYS, ppo, "train.eval_every=0", "train.checkpoint=weights", f"output_dir={tmp_path}"]
    train(QUICKSTART, [*keys, "train.steps=2"], resume=False)
    folder = tmp_path / "quickstart" / "checkpoints" / "step_000002"
    names = {file.name for file in (folder / "training").iterdir()}
    assert names == {"driver.json", "driver.safetensors", "critic.safetensors"}
    critic = load_file(folder / "training" / "critic.safetensors")
    assert critic and all(key.startswith("model/") for key in critic)
    capfd.readouterr()
    train(QUICKSTART, [*keys, "train.steps=4", "train.checkpoint=full"], resume=True)
    said = " ".join(capfd.readouterr().out.split())
    assert "step_000002 holds weights alone (train.checkpoint: weights): AdamW's moments start again from zero" in said
    whole = folder.with_name("step_000004")
    steps = [v for k, v in load_file(whole / "training" / "learner.safetensors").items() if k.endswith("/step")]
    assert steps and all(float(step) == 2 for step in steps), "steps since the resume"
    sizes = [sum(f.stat().st_size for f in part.rglob("*.safetensors")) for part in (folder, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    assert read_stored(tmp_path / "quickstart" / "recipe.yaml").train.checkpoint == "full"


# Plans


def test_memory_of_a_rank_with_less_by_hand():
    """Copies in bfloat16: of 20 bytes a number in a step, 8 stay; 8-bit moments are 2 + 8 / 64 bytes."""
    policy = shape_of(DENSE)
    count = sum(p.numel() for p in policy.parameters())
    vectors = sum(p.numel() for p in policy.parameters() if p.dim() == 1)
    narrow = sum(p.numel() for p in policy.parameters() if p.dim() == 2 and p.shape[-1] % BLOCK)
    config = LearnerConfig(tokens_per_micro_batch=100, gradient_checkpointing=True)

    def plan(**keys: Any) -> Any:
        sharded = keys.pop("sharded", False)
        changed = config.model_copy(update=keys)
        return rank_memory(policy, changed, dtype="bfloat16", sharded=sharded, reference=True)

    plain, low = plan(), plan(optimizer="adamw8bit")
    assert (plain.weights, plain.masters, plain.moments) == (2 * count, 4 * count, 8 * count)
    assert (plain.gradients, plain.rounded, plain.during_pass) == (4 * count, 2 * count, 6 * count)
    assert plain.reference == 2 * count and plain.resting == 16 * count and plain.host == plain.staging == 0
    exact = vectors + narrow
    assert low.moments == 8 * exact + 2 * (count - exact) + 8 * (count - exact) // BLOCK
    assert low.state == 6 * count + low.moments
    moved = plan(offload=["optimizer", "reference"])
    assert (moved.state, moved.reference, moved.host) == (2 * count, 0, 14 * count)
    # Nothing is larger than a piece: masters and both moments of all parameters come to the device in a step.
    assert moved.staging == 12 * count
    assert moved.peak == 2 * count + max(6 * count + moved.activations, 4 * count + 12 * count)
    layers = plan(offload=["activations"])
    assert plain.activations == layers.activations  # the inputs of two layers stay
    deep = shape_of({**DENSE, "num_hidden_layers": 5})
    sizes = [
        rank_memory(deep, config.model_copy(update={"offload": o}), dtype="bfloat16", sharded=False)
        for o in ([], ["activations"])
    ]
    assert sizes[0].activations - sizes[1].activations == 3 * 100 * 64 * 2 == sizes[1].host
    shards = plan(ranks=2, sharded=True, offload=["optimizer"])
    assert (shards.weights, shards.masters, shards.moments, shards.host) == (2 * count, 0, 0, 4 * count)


def test_the_table_of_the_docs():
    """Two of its rows, as `rank_memory` has them."""
    text = (ROOT / "docs" / "memory.md").read_text()
    large = {**QWEN3_06B, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    large |= {"num_attention_heads": 32, "tie_word_embeddings": False}
    for name, config in {"Qwen3-0.6B": QWEN3_06B, "Qwen3-8B": large}.items():
        policy, recomputed = shape_of(config), LearnerConfig(gradient_checkpointing=True)

        def peak(policy: Any = policy, config: LearnerConfig = recomputed, adapter: int = 0, **keys: Any) -> float:
            changed = config.model_copy(update=keys)
            sharded = changed.ranks > 1
            return rank_memory(policy, changed, dtype="bfloat16", sharded=sharded, adapter=adapter).peak / GIB

        columns = [{}, {"optimizer": "adamw8bit"}, {"offload": OFFLOADS[2][:1]}, {"offload": OFFLOADS[1]}]
        columns += [{"ranks": 2}, {"ranks": 8}, {"ranks": 8, "offload": OFFLOADS[2][:1]}]
        columns += [{"adapter": adapter_size(policy, Lora(rank=16))}]
        assert f"| {name} | " + " | ".join(f"{peak(**keys):.1f}" for keys in columns) + " |" in text


def test_cache_of_an_engine_by_hand():
    """Keys and values of two heads of 16 in two layers; a hybrid's states of 6 heads of 16 x 16 in three."""
    assert cache_sizes(shape_of(DENSE)) == (2 * 2 * (16 + 16), 0)
    assert cache_sizes(shape_of(HYBRID)) == (2 * (16 + 16), 3 * 6 * 16 * 16)


QWEN3_06B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128},
    **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
}
LARGE = ["learner.ranks=1", "rollout.max_context=2048", "rollout.max_tokens=1024", "policy.dtype=bfloat16"]


def planner(*overrides: str) -> tuple[Planner, Recipe]:
    recipe = load_recipe(QUICKSTART, [*LARGE, *overrides])
    return Planner(shape_of(QWEN3_06B), algorithm_of(recipe)), recipe


def test_a_run_against_a_card():
    """20 bytes of each of 596 M numbers in a step, 2 of an engine's, its cache, contexts: and what makes that less."""
    own, recipe = planner("learner.gradient_checkpointing=true")
    need = own.need(recipe, CARDS[0])
    assert need.learner is not None
    assert need.learner.state + need.learner.during_pass == 20 * 596_049_920
    assert need.cache == int(0.4 * CARDS[0].bytes) and need.engine_weights == 2 * 596_049_920
    assert need.total == sum(size for _, size in need.parts())
    assert own.verdict(recipe, CARDS[1]).startswith("a 48 GB card (L40S) is enough: about ")
    said = own.verdict(recipe, CARDS[0])
    start = "a 24 GB card (RTX 4090) is too small, about 24.39 GiB for 23.50 GiB: rollout.placement=sleep makes"
    assert said.startswith(start)
    # What the sentence names does fit.
    _, slept = planner("learner.gradient_checkpointing=true", "rollout.placement=sleep")
    assert f"makes that {own.need(slept, CARDS[0]).total / GIB:.2f} GiB" in said


@pytest.mark.parametrize("size", [19, 15, 12, 10])
def test_keys_of_a_sentence_fit_together(size: int):
    """The command with the named keys is planned below the card, or the sentence says that they are not enough."""
    card = Card("it", size * GIB)
    own, recipe = planner("control.max_staleness=1")
    said = own.verdict(recipe, card)
    keys = [word for word in said.split() if "=" in word]
    assert keys and len({key.partition("=")[0] for key in keys}) == len(keys)
    _, changed = planner("control.max_staleness=1", *keys)
    total = own.need(changed, card).total
    assert f"make that {total / GIB:.2f} GiB" in said.replace("makes", "make")
    assert (total <= card.bytes) == (", so it takes more learner.ranks or policy.lora" not in said)


def test_show_says_which_card_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], **QWEN3_06B}))
    keys = [*LARGE, "learner.gradient_checkpointing=true", f"policy.model={tmp_path}", "policy.config=null"]
    show_command.show(Path(QUICKSTART), keys)
    said = " ".join(capsys.readouterr().out.split())
    assert "memory of a GPU a 48 GB card (L40S) is enough" in said
    assert "a 24 GB card (RTX 4090) is too small" in said and "masters 2.22 GiB, moments 4.44 GiB" in said
    assert "checkpoints about 7.77 GiB each (all state)" in said
    show_command.show(Path(QUICKSTART), [*keys, "device=cpu", "train.checkpoint=weights"])
    said = " ".join(capsys.readouterr().out.split())
    assert "memory of a GPU" not in said and "about 1.11 GiB each (weights alone, no optimizer)" in said


def test_too_little_memory_names_the_new_keys_with_their_gib(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Keys in use are not named; bytes asked for and free come from torch's message."""
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in total of which 1.50 GiB is free."

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(f"{text} Including non-PyTorch memory ...")

    def sentence(**keys: Any) -> str:
        learner = Learner(str(folder), LearnerConfig(gradient_checkpointing=True, **keys), dtype="bfloat16")
        learner.freeze_reference()
        monkeypatch.setattr(learner, "_loss", full)
        with pytest.raises(RunError) as raised:
            learner.update(packed()[0], CISPO, lr=LR)
        return str(raised.value)

    said = sentence()
    assert "less is used with learner.tokens_per_micro_batch=4096 (" in said
    for keys in ("learner.offload=[reference] (", "learner.ranks=2 with learner.shard=true (", "policy.lora"):
        assert keys in said
    # Of two layers both inputs stay.
    assert ("learner.offload=[activations] (" in said) == ("hybrid" in folder.name)
    assert said.endswith("; 2.00 GiB asked for, 1.50 GiB free")
    assert "gradient_checkpointing" not in said
    assert "learner.offload=[reference] (" not in sentence(offload=["reference", "activations"])
