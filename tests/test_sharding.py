"""Ranks that each hold a share of the model: equal to one rank in every number, on gloo groups of 2 and 4 processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.presets import PRESETS
from cispo.batch.packing import pack
from cispo.errors import RunError, UserError
from cispo.files import save_tensors, write_json
from cispo.learner.learner import Learner
from cispo.learner.memory import layers_of, rank_memory, units_of
from cispo.learner.parallel import Mesh, shards
from cispo.learner.sharding import Rows, extent, row_range, rows_of
from cispo.learner.state import StoredState, state_path, write_state
from cispo.output.checkpoint import CheckpointFolder
from cispo.policies.loading import init_policy, load_policy, save_policy, shape_of, weight_files
from cispo.policies.policy import Place
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.weights.buckets import WeightSender
from tests import tiny_hybrids
from tests.shard_group import (
    BUCKET,
    CASES,
    F64,
    LR,
    TOKEN,
    Case,
    Group,
    batch,
    critic_batch,
    differ,
    gradients,
    joined,
    run_group,
)
from tests.test_learner import DENSE, TINY, samples

WORLDS = (2, 4)
CONFIGS = {
    "untied": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "deep": {
        **TINY,
        "num_hidden_layers": 9,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 3,
    },
    "uneven": {**TINY, "vocab_size": 41, "num_local_experts": 3},
    "dense": {"model_type": "qwen3", **DENSE},
    "dense tied": {"model_type": "qwen3", **DENSE, "tie_word_embeddings": True},
}


CONFIGS |= {name: tiny_hybrids.TINY[name].hf_config for name in ("minimax_m2", "qwen3_next", "deepseek_v3")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies, norm weights off neutral, a checkpoint written by one rank, and the results of both groups."""
    made = tmp_path_factory.mktemp("sharding")
    for name, config in CONFIGS.items():
        policy = init_policy(config, seed=0)
        with torch.no_grad():
            for parameter in policy.named_weights().values():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        save_policy(policy, made / name)
    save_policy(init_policy(TINY, seed=5), made / "untied other")
    for dtype in ("float32", "bfloat16"):
        learner = Learner(str(made / "untied"), LearnerConfig(), dtype=dtype)
        learner.update(batch(1)[0], TOKEN, lr=LR)
        saved(learner, made / f"from 1 {dtype}")
    for world in WORLDS:
        assert run_group(world, made) == [0] * world
    return made


def saved(learner: Learner, folder: Path) -> None:
    (folder / "training").mkdir(parents=True, exist_ok=True)
    learner.start_save(str(folder))
    assert learner.saved(wait=True)


def results(root: Path, world: int, name: str) -> list[Any]:
    """[ranks] results of a case."""
    return [torch.load(root / f"results.{world}.{own}", weights_only=False)[name] for own in range(world)]


def one_rank(root: Path) -> Group:
    return Group(0, 1, Mesh(), root)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    error = differ(ours, theirs)
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_one_rank(root: Path, case: Case):
    """float64: 1e-12; float32: 1e-6, since the order of sums over tokens and ranks differs.

    Gradients in float32 may be as far from one rank's as these are from float64 (latent attention: 1.8e-6).
    """
    tolerance = 1e-12 if case.dtype == F64 else 1e-6
    loss, aux, own = one_rank(root).gradient(case)
    whole, room = joined([own]), tolerance
    if case.dtype != F64:
        room = max(room, differ(whole, joined([one_rank(root).gradient(replace(case, dtype=F64))[2]])))
    for world in case.worlds:
        found = results(root, world, case.name)
        assert sum(r[0] for r in found) == pytest.approx(loss, rel=tolerance, abs=tolerance)
        assert sum(r[1] for r in found) == pytest.approx(aux, rel=tolerance, abs=tolerance)
        close(joined([r[2] for r in found]), whole, room)


def test_optimizer_steps_are_those_of_one_rank(root: Path):
    """AdamW divides by the root of tiny second moments: 1e-9 after ten steps in float64, 1e-5 after one in float32."""
    for name, dtype, count, tolerance in (("steps", F64, 10, 1e-9), ("step float32", "float32", 1, 1e-5)):
        norms, own = one_rank(root).steps(dtype, count)  # type: ignore[arg-type]
        assert max(norms) > 1, "nothing is clipped"
        for world in WORLDS:
            found = results(root, world, name)
            for ours, _ in found:
                assert ours == pytest.approx(norms, rel=1e-9 if dtype == F64 else 1e-6)
            close(joined([r[1] for r in found]), joined([own]), tolerance)


def test_a_critic_is_that_of_one_rank(root: Path):
    """float32, as its head is in any policy: 1e-6, and 1e-4 in the values after a step of AdamW."""
    before, loss, own, after = one_rank(root).values()
    expected = [sorted(torch.cat(values).tolist()) for values in (before, after)]
    for world in WORLDS:
        found = results(root, world, "critic")
        assert sum(r[1] for r in found) == pytest.approx(loss, rel=1e-6)
        close(joined([r[2] for r in found]), joined([own]), 1e-6)
        for index, values in zip((0, 3), expected, strict=True):
            ours = torch.cat([torch.cat(r[index]) for r in found])
            trained = torch.cat([mb.loss_mask for mbs in critic_batch(world) for mb in mbs])
            assert sorted(ours[trained].tolist()) == pytest.approx([v for v in values if v], abs=1e-4)


def test_passes_without_gradient_see_the_newest_weights(root: Path):
    policy = load_policy(root / "untied")
    other = load_policy(root / "untied other")
    learner = Learner(str(root / "untied"), LearnerConfig())
    for world in WORLDS:
        for own, (before, frozen, after, reference, again) in enumerate(results(root, world, "references")):
            mbs = batch(world)[own]
            with torch.no_grad():
                for mine, theirs in zip(learner.policy.parameters(), policy.parameters(), strict=True):
                    mine.copy_(theirs)
            expected = torch.cat(learner.logprobs(mbs))
            for values in (before, frozen):
                assert torch.allclose(torch.cat(values), expected, atol=1e-5)
            with torch.no_grad():
                for parameter in learner.policy.parameters():
                    parameter.mul_(1.25)
            moved = torch.cat(learner.logprobs(mbs))
            assert own > 0 or float((moved - expected).abs().max()) > 0.05
            for values in (after, again):
                assert torch.allclose(torch.cat(values), moved, atol=1e-4)
            with torch.no_grad():
                for mine, theirs in zip(learner.policy.parameters(), other.parameters(), strict=True):
                    mine.copy_(theirs)
            assert torch.allclose(torch.cat(reference), torch.cat(learner.logprobs(mbs)), atol=1e-5)


def test_bfloat16_passes_are_those_of_a_whole_copy_bit_for_bit(root: Path):
    """At far positions too: rotary tables stay float32."""
    learner = Learner(str(root / "untied"), LearnerConfig(), dtype="bfloat16")
    for world in WORLDS:
        for own, values in enumerate(results(root, world, "far")):
            mbs = [replace(mb, positions=mb.positions + 3000) for mb in batch(world)[own]]
            assert all(torch.equal(a, b) for a, b in zip(values, learner.logprobs(mbs), strict=True))
    near = learner.logprobs(batch(1)[0])
    assert not torch.equal(torch.cat(near), torch.cat(one_rank(root).far()))


@pytest.mark.parametrize(
    ("name", "folder", "dtype"),
    [
        ("transfer untied", "untied", "float32"),
        ("transfer uneven", "uneven", "float32"),
        ("transfer dense tied", "dense tied", "float32"),
        ("transfer bfloat16", "untied", "bfloat16"),
    ],
)
def test_engines_get_the_weights_of_one_rank(root: Path, name: str, folder: str, dtype: str):
    """By the checksum of every bucket on every rank; a stage allocates less than one more bucket."""
    state = load_policy(root / folder, dtype=getattr(torch, dtype)).to_hf()
    sender = WeightSender(state, bucket_bytes=BUCKET)
    # Twice, as the groups do: gaps between tensors keep the bytes of earlier buckets.
    _, expected = (
        [sender.stage(n, "direct", check=True).checksum for n in range(len(sender.buckets))] for _ in range(2)
    )
    assert len(expected) > 3 and len(set(expected)) == len(expected)
    for world in (2,) if "dense" in folder else WORLDS:
        for sums, allocated, _, count in results(root, world, name):
            assert sums == expected and count == len(expected)
            assert allocated < 1
        published = load_file(results(root, world, name)[0][2])
        if (folder, dtype) in (("dense tied", "float32"), ("untied", "bfloat16")):  # the last of their number format
            assert published.keys() == state.keys() and all(torch.equal(published[n], state[n]) for n in state)


def test_float32_parts_of_a_bfloat16_policy_stay_float32(root: Path):
    """Decays, which FSDP would cast: logprobs bit for bit, the step's norm to the rounding of gradients, 1e-2."""
    learner = Learner(str(root / "qwen3_next"), LearnerConfig(), dtype="bfloat16")
    assert any(p.dtype == torch.float32 for p in learner.policy.parameters())
    norm = learner.update(batch(1)[0], TOKEN, lr=LR).grad_norm
    whole = Learner(str(root / "qwen3_next"), LearnerConfig(), dtype="bfloat16")
    found = results(root, 2, "mixed")
    for own, (before, ours, sent, again) in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(before, whole.logprobs(batch(2)[own]), strict=True))
        assert ours == pytest.approx(norm, rel=1e-2) and ours == found[0][1]
        assert sent == again == found[0][2]
    saved_weights = load_policy(root / "mixed", dtype=torch.bfloat16).to_hf()
    exact = {name for name, tensor in saved_weights.items() if tensor.dtype == torch.float32}
    assert exact == {name for name, tensor in learner.policy.to_hf().items() if tensor.dtype == torch.float32} != set()
    for name in exact:
        assert torch.allclose(saved_weights[name], learner.policy.to_hf()[name], atol=2 * LR)
        assert not torch.equal(saved_weights[name], whole.policy.to_hf()[name])


def everything(folder: Path) -> dict[str, Tensor]:
    """All weights and all of the training state in a checkpoint."""
    found = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    stored = StoredState(folder, "learner")
    for key, shape in stored.shapes.items():
        assert tuple(stored.read(key, 0, shape[0] if shape else 1).shape) == shape
        found[f"state/{key}"] = stored.read(key, 0, shape[0] if shape else 1)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_go_from_any_number_of_ranks_to_any_other(root: Path, dtype: Any, tmp_path: Path):
    """Bit for bit: 1 to 2 and 4 and back, 4 to 1; a run resumed on the same ranks is the one that was not."""
    first = everything(root / f"from 1 {dtype}")
    assert any(key.startswith("state/") for key in first) and any("master" in key for key in first) == (
        dtype != "float32"
    )
    for world in WORLDS:
        for undisturbed, resumed in results(root, world, f"checkpoint {dtype}"):
            assert all(torch.equal(undisturbed[n][1], resumed[n][1]) for n in undisturbed)
        copy = everything(root / f"from 1 by {world} {dtype}")
        assert copy.keys() == first.keys() and all(torch.equal(copy[n], first[n]) for n in first)
        written = root / f"from {world} {dtype}"
        assert len(list((written / "training").glob(f"learner-*-of-0000{world}.safetensors"))) == world
        index = json.loads((written / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) == len(weight_files(written)) > world
        assert json.loads((written / "config.json").read_text())["dtype"] == dtype
        learner = Learner(str(written), LearnerConfig(), dtype=dtype)
        learner.restore(str(written))
        saved(learner, tmp_path / str(world))
        ours, theirs = everything(tmp_path / str(world)), everything(written)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_open_collective_is_named(root: Path):
    assert results(root, 2, "hang")[0].startswith("forward and backward of micro-batch 1 of")


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(root: Path, tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2)
    with folder.writing() as draft:
        learner = Learner(str(root / "untied"), LearnerConfig())
        learner.update(batch(1)[0], TOKEN, lr=LR)
        saved(learner, draft)
        write_json(draft / "training" / "driver.json", {"finished": 1})
    folder.finish(1, {})
    with folder.writing() as draft:
        (draft / "training").mkdir()
        codes = run_group(2, root, draft)
    assert codes[1] == -9
    assert folder.last() == folder.folder / "step_000001"
    with pytest.raises(UserError, match="1 of the parts of learner"):
        StoredState(draft, "learner")
    checkpoint = str(folder.resume_point(1, print))
    resumed = Learner(checkpoint, LearnerConfig())
    resumed.restore(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(resumed.policy.parameters(), learner.policy.parameters(), strict=True))
    assert gradients(resumed.rank).keys() == gradients(learner.rank).keys()


@pytest.mark.parametrize("algorithm", [*ALGORITHMS.values(), *PRESETS.values()], ids=lambda choice: choice.name)
def test_a_stand_in_adds_nothing(root: Path, algorithm: Algorithm):
    """No loss, exact zeros as gradient, no token, no choice of an expert, and the metrics of other batches by name."""
    learner = Learner(str(root / "untied"), LearnerConfig(router_aux_coef=0.5, router_aux_tokens="all"))
    given = [replace(s, old_logprobs=s.rollout_logprobs, ref_logprobs=s.rollout_logprobs) for s in samples(1)]
    (real,), (stand_in,) = pack(given, reduction="token", max_tokens=16, tokens_per_micro_batch=40, ranks=2)
    alone = learner.forward_backward([stand_in], algorithm.objective)
    assert alone.loss == alone.aux_loss == 0 and alone.tokens is not None and not len(alone.tokens.ratio)
    assert all(bool((g == 0).all()) for g in learner.rank.optimizer.gradients())
    learner.rank.optimizer.step(0.0, max_grad_norm=1.0)
    one = learner.forward_backward([real], algorithm.objective)
    learner.rank.optimizer.step(0.0, max_grad_norm=1.0)
    both = learner.forward_backward([real, stand_in], algorithm.objective)
    assert (both.loss, both.aux_loss) == (one.loss, one.aux_loss) and one.tokens and both.tokens
    assert torch.equal(one.tokens.logprobs, both.tokens.logprobs)
    assert one.tokens.extra.keys() == both.tokens.extra.keys() == alone.tokens.extra.keys()


def test_memory_of_a_rank_by_hand():
    """A copy in bfloat16: 14 bytes a number, 6 more in a pass. Shards: 12 / ranks, and gathered weights in a pass."""
    policy = shape_of({**TINY, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    count = sum(p.numel() for p in policy.parameters())
    block = sum(p.numel() for p in policy.get_submodule("layers.0").parameters())
    config = LearnerConfig(ranks=4, tokens_per_micro_batch=100)
    copy = rank_memory(policy, config, dtype="bfloat16", sharded=False)
    assert (copy.state, copy.during_pass) == (14 * count, 6 * count)
    assert rank_memory(policy, config, dtype="float32", sharded=False).state == 12 * count
    split = rank_memory(policy, config, dtype="bfloat16", sharded=True)
    assert split.state == -(-12 * count // 4)
    rest = count - 2 * block
    assert split.during_pass == -(-4 * count // 4) + 2 * (rest + 2 * block) + 6 * max(rest, block)
    adapted = rank_memory(policy, config, dtype="bfloat16", sharded=False, adapter=500)
    assert (adapted.state, adapted.during_pass) == (2 * count + 14 * 500, 6 * 500)
    # q, k, v and o of 2 heads of 16 and 1 of keys, the router of 4, both matrices of a token's 2 experts.
    kept = (32 + 32) + 2 * (16 + 32) + (32 + 32) + (4 + 32) + 2 * (48 + 32) + 2 * (32 + 24)
    assert copy.activations == 100 * 2 * 2 * kept
    less = config.model_copy(update={"gradient_checkpointing": True})
    assert rank_memory(policy, less, dtype="bfloat16", sharded=True).activations == 100 * 2 * (2 * 32 + kept)


def test_too_little_memory_names_the_keys_that_help(root: Path, monkeypatch: pytest.MonkeyPatch):
    learner = Learner(str(root / "untied"), LearnerConfig())

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(learner, "_loss", full)
    with pytest.raises(
        RunError, match="micro-batch 1 of 1: CUDA out of memory; less is used with learner.gradient_check"
    ) as raised:
        learner.update(pack(samples(1), reduction="token", max_tokens=16, tokens_per_micro_batch=40)[0], TOKEN, lr=LR)
    assert "learner.shard=true" in str(raised.value) and "policy.lora" in str(raised.value)


def test_units_of_layers_by_hand():
    """FSDP gathers at most a quarter of the layers at a time, and at most half a GiB in bfloat16."""
    deep = shape_of(CONFIGS["deep"])
    assert [len(unit) for unit in units_of(deep)] == [2, 2, 2, 2, 1]
    assert [layer for unit in units_of(deep) for layer in unit] == layers_of(deep)
    wide = {**CONFIGS["deep"], "hidden_size": 4096, "intermediate_size": 6144, "head_dim": 512}
    assert [len(unit) for unit in units_of(shape_of(wide))] == [1] * 9


def test_the_choice_of_shards():
    assert not shards("auto", ranks=2, device="cpu") and shards("auto", ranks=2, device="cuda")
    assert shards(True, ranks=2, device="cpu") and not shards(False, ranks=2, device="cuda")
    assert not shards(True, ranks=1, device="cuda")


def test_rows_by_hand():
    """41 rows over 4 ranks: 11, 11, 11, 8; 3 rows: the last rank has none."""
    assert [row_range(41, r, 4) for r in range(4)] == [(0, 11), (11, 22), (22, 33), (33, 41)]
    assert [row_range(3, r, 4) for r in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    rows = Rows((6, 4), 2, torch.zeros(2, 4))
    assert rows.overlap(0, 24) == (8, 16) and rows.overlap(10, 12) == (10, 12)
    assert rows.overlap(16, 24)[0] >= rows.overlap(16, 24)[1]
    assert extent(Place("w"), (3, 8, 5)) == (0, 120)
    assert extent(Place("w", expert=1), (3, 8, 5)) == (40, 80)
    assert extent(Place("w", expert=2, half="up"), (3, 8, 5)) == (100, 120)
    assert rows_of(torch.ones(3, 2), Mesh(rank=1, world=2)).first == 0


def test_parts_of_the_state_that_do_not_go_together_are_one_sentence(tmp_path: Path):
    whole = torch.arange(10.0).view(5, 2)
    for own, world in ((0, 2), (1, 2)):
        first, last = row_range(5, own, world)
        rows = {"w/m": Rows((5, 2), first, whole[first:last].clone())}
        write_state(
            rows | ({"w/step": Rows((), 0, torch.tensor(3.0))} if own == 0 else {}),
            state_path(tmp_path, "learner", own, world),
        )
    stored = StoredState(tmp_path, "learner")
    assert torch.equal(stored.read("w/m", 0, 5), whole) and torch.equal(stored.read("w/m", 2, 2), whole[2:4])
    assert stored.read("w/m", 5, 0).shape == (0, 2) and float(stored.read("w/step", 0, 1)) == 3
    last_part = state_path(tmp_path, "learner", 1, 2)
    save_tensors({"w/m": torch.zeros(1, 2)}, last_part, {"rows": json.dumps({"w/m": [[5, 2], 3]})})
    with pytest.raises(UserError, match="lack rows of w/m"):
        StoredState(tmp_path, "learner")
    last_part.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        StoredState(tmp_path, "learner")
    last_part.unlink()
    with pytest.raises(UserError, match="1 of the parts of learner"):
        StoredState(tmp_path, "learner")
