"""The mesh of learner ranks by hand: coordinates, refusals, and what `cispo show` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.commands.show import show
from cispo.errors import UserError
from cispo.learner.experts import check_expert_axes
from cispo.learner.memory import rank_memory
from cispo.learner.parallel import Mesh, shards
from cispo.learner.rows import Rows, WidthShare, expert_range, rows_of, set_share
from cispo.learner.traffic import draw, traffic
from cispo.policies.loading import shape_of
from cispo.recipe.load import load_recipe
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.start import check_experts
from tests.test_learner import DENSE, TINY

TEXT_01: dict[str, Any] = {
    **TINY,
    "vocab_size": 128,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 32,
}
GIB, MIB = 2**30, 2**20


def test_coordinates_of_four_ranks():
    """dp_shard 2, cp 2; ep 2, etp 2: both views have their last axis fastest."""
    meshes = [Mesh(rank=r, world=4, cp=2, ep=2, etp=2) for r in range(4)]
    assert [(m.dp_rank, m.cp_rank) for m in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(m.edp_rank, m.ep_rank, m.etp_rank) for m in meshes] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert (meshes[0].dp, meshes[0].edp, meshes[0].expert_ranks) == (2, 1, 4)
    twice = [Mesh(rank=r, world=4, ep=2) for r in range(4)]
    assert [(m.edp_rank, m.ep_rank) for m in twice] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert twice[0].of_rank(3).ep_rank == 1 and twice[0].experts is None and twice[0].context is None
    # 6 experts, ep 2, edp 2: three each, cut as torch.chunk cuts them.
    assert [expert_range(6, twice[0], r) for r in range(4)] == [(0, 2), (3, 5), (2, 3), (5, 6)]


def test_shares_of_the_width_by_hand():
    """gate and up [4, 2 I = 8, d]: part 1 of 2 is rows 2, 3 of gate and of up; down [4, d, 4]: its columns 2, 3."""
    fused, down = torch.arange(4 * 8 * 3.0).view(4, 8, 3), torch.arange(4 * 3 * 4.0).view(4, 3, 4)
    halves = WidthShare(axis=1, part=1, parts=2, blocks=2)
    assert torch.equal(halves.of(fused), fused[:, [2, 3, 6, 7]])
    columns = WidthShare(axis=2, part=1, parts=2)
    assert torch.equal(columns.of(down), down[:, :, 2:])
    for share, whole in ((halves, fused), (columns, down)):
        again = torch.full_like(whole, torch.nan)
        for part in range(2):
            own = WidthShare(axis=share.axis, part=part, parts=2, blocks=share.blocks)
            own.put(own.of(whole), again)
        assert torch.equal(again, whole)
    assert halves.of_expert((4, 3)) == (slice(2, 4),) and columns.of_expert((3, 4), 0) == (slice(None), slice(0, 2))
    parameter = torch.nn.Parameter(halves.of(fused)[:2])
    set_share(parameter, halves)
    rows = rows_of(parameter, Mesh(rank=3, world=4, ep=2, etp=2))
    assert (rows.shape, rows.first, rows.split, rows.narrow) == ((4, 8, 3), 2, True, halves)
    assert Rows((4, 8, 3), 2, fused[2:]).overlap(0, 96) == (48, 96)


def test_bytes_that_a_rank_sends():
    """Text-01's widths on 8 ranks with 131,072 tokens each, in bfloat16."""
    options: dict[str, Any] = {"tokens": 131072, "width": 2, "sharded": True}
    eight = traffic(shape_of(TEXT_01), Mesh(world=8, ep=8), **options)
    assert eight.experts == 5.25 * GIB  # 2 n k d 2 bytes * 7 / 8
    cut = traffic(shape_of(TEXT_01), Mesh(world=16, ep=8, etp=2), **options)
    assert cut.experts == 11.25 * GIB  # and 2 n k d 2 bytes more for the second half of the width
    two = traffic(shape_of(TEXT_01), Mesh(world=2, ep=2), **options)
    assert two.experts == 3 * GIB  # gathered tokens: 2 n d 2 bytes
    split = traffic(shape_of(TEXT_01), Mesh(world=8, cp=8), **options)
    assert (split.context, split.experts) == (3.5 * GIB, 0)  # keys and values; the states' 56 MiB are less
    states = traffic(shape_of({**TEXT_01, "layer_types": ["linear_attention"] * 2}), Mesh(world=8, cp=8), **options)
    assert states.context == 56 * MIB
    dense = eight.weights
    assert split.weights == pytest.approx(dense + 3 * 32 * 6144 * 9216 * 2 * 7 / 8)
    assert traffic(shape_of(TEXT_01), Mesh(world=8), tokens=8, width=2, sharded=False).weights == 0


def test_the_mesh_is_drawn():
    assert dict(draw(Mesh(world=4, cp=2, ep=2, etp=2))) == {
        "batch": "dp 2 x cp 2: [0 1] [2 3]",
        "experts": "edp 1 x ep 2 x etp 2: [0+1 2+3]",
    }
    large = dict(draw(Mesh(world=32, ep=2)))["experts"]
    assert large == "edp 16 x ep 2 x etp 1: [0 1] ... [30 31]"


def test_memory_of_distributed_experts():
    """State as with shards alone; fewer weights in a pass, and room for tokens on their way."""
    policy = shape_of(TINY)
    plain = LearnerConfig(ranks=4, tokens_per_micro_batch=100)
    own = plain.model_copy(update={"expert_parallel": 4})
    alone, spread = (rank_memory(policy, c, dtype="bfloat16", sharded=True) for c in (plain, own))
    assert alone.state == spread.state
    # Three quarters of 4 experts of 3 x 24 x 32 numbers: two layers in bfloat16, one more and in float32.
    assert alone.during_pass - spread.during_pass == 3 * 3 * 24 * 32 * (2 * 2 + 2 + 4)
    # In each of 3 layers: sent and received rows of 32, 2 of them a token, in 2 bytes.
    assert spread.activations - alone.activations == 100 * 3 * 2 * 32 * 2 * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["learner.context_parallel=3"], "learner.context_parallel 3 does not divide learner.ranks 4"),
        (
            ["learner.expert_parallel=2", "learner.expert_tensor_parallel=4"],
            "learner.expert_parallel 2 x learner.expert_tensor_parallel 4 does not divide learner.ranks 4",
        ),
        (
            ["learner.expert_parallel=2", "learner.shard=false"],
            "learner.expert_parallel 2 gives ranks different weights, which learner.shard: false excludes",
        ),
    ],
)
def test_recipes_with_an_impossible_mesh_are_one_sentence(keys: list[str], message: str):
    with pytest.raises(UserError, match=f": {message}$"):
        load_recipe(Path("recipes/quickstart.yaml"), ["learner.ranks=4", *keys])


def test_policies_that_do_not_fit_the_mesh_are_one_sentence():
    dense = shape_of({"model_type": "qwen3", **DENSE})
    with pytest.raises(UserError, match="^learner.expert_parallel 2: the policy has no experts to distribute$"):
        check_expert_axes(dense, 2, 1)
    with pytest.raises(UserError, match="^learner.expert_tensor_parallel 2: the policy has no experts"):
        check_expert_axes(dense, 1, 2)
    policy = shape_of({**TINY, "num_local_experts": 6})
    with pytest.raises(UserError, match="^learner.expert_parallel 4 does not divide the 6 experts of a layer$"):
        check_expert_axes(policy, 4, 1)
    with pytest.raises(UserError, match="^learner.expert_tensor_parallel 16 does not divide the experts' width 24$"):
        check_expert_axes(policy, 1, 16)
    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["learner.ranks=2", "learner.expert_parallel=2"])
    with pytest.raises(UserError, match="the policy has no experts to distribute"):
        check_experts(recipe, dense)
    check_experts(recipe, policy)


def test_distributed_experts_are_shards_on_any_device():
    assert shards("auto", ranks=2, device="cpu", expert_ranks=2)
    assert not shards("auto", ranks=2, device="cpu") and not shards("auto", ranks=1, device="cuda", expert_ranks=1)


def test_show_has_mesh_and_bytes(capsys: pytest.CaptureFixture[str]):
    keys = ["learner.ranks=8", "learner.context_parallel=2", "learner.expert_parallel=2", "runtime=ray"]
    show(Path("recipes/quickstart.yaml"), keys)
    text = " ".join(capsys.readouterr().out.split())
    assert "batch dp 4 x cp 2: [0 1] [2 3] [4 5] [6 7]" in text
    assert "experts edp 4 x ep 2 x etp 1: [0 1] [2 3] [4 5] [6 7]" in text
    assert "of experts' tokens" in text and "of split documents" in text
    with pytest.raises(UserError, match="does not divide the 4 experts"):
        show(Path("recipes/quickstart.yaml"), ["learner.ranks=8", "learner.expert_parallel=8"])
