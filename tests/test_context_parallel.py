"""Ranks that read parts of one document: equal to one rank in every number, on gloo groups of 2 and 4 processes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from cispo.batch.packing import pack_for, unpack
from cispo.commands.readings import by_sample
from cispo.ops.collectives import Group
from cispo.ops.cuts import Cut
from cispo.ops.expansion import Expansion
from cispo.ops.sparse_attention import Index
from cispo.policies import split_documents
from cispo.policies.attention import Documents
from cispo.policies.costs import quadratic_length
from cispo.policies.loading import init_policy, save_policy, shape_of
from cispo.policies.pieces import Cost, micro_batch_plan, split_plan
from cispo.recipe.load import load_recipe
from cispo.types import Piece, RankBatches, Sample
from tests import tiny_hybrids
from tests.context_group import (
    ATTENDED,
    CASES,
    LENGTHS,
    MESHES,
    ContextCase,
    batch,
    critic_batch,
    critic_result,
    learner_result,
    meshes_of,
    new_learner,
    packed,
    run_group,
)
from tests.shard_group import F64, joined, new_critic, prompts_shared
from tests.test_learner import DENSE, TINY, samples
from tests.test_sharding import close

RECIPES = Path(__file__).parents[1] / "recipes"

# The plan


def drawn(seed: int) -> list[int]:
    """Lengths of many short and a few long documents."""
    generator = random.Random(seed)
    count = generator.randint(1, 30)
    return [int(generator.paretovariate(0.8) * generator.randint(1, 20)) for _ in range(count)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_plan_reads_each_token_once_and_loads_ranks_evenly(ranks: int):
    for seed in range(150):
        lengths, cost = drawn(seed), Cost(quadratic=(30.0, 3000.0, math.inf)[seed % 3])
        plan = split_plan(lengths, ranks, cost)
        places = [(n, place) for own in plan.whole for n in own for place in range(lengths[n])]
        for own in plan.pieces:
            places += [(plan.split[p.document], place) for p in own for place in range(p.start, p.end)]
        assert sorted(places) == [(n, place) for n, length in enumerate(lengths) for place in range(length)]
        assert all(piece.start < piece.end for own in plan.pieces for piece in own)
        # Equal in tokens up to one a part; in pairs of query and key, as those of documents that parts divide.
        for document, number in enumerate(plan.split):
            tokens = [sum(p.end - p.start for p in own if p.document == document) for own in plan.pieces]
            assert max(tokens) - min(tokens) <= 2 and lengths[number] >= 2 * ranks
        loads = [
            sum(cost(lengths[n]) for n in own) + sum(cost(lengths[n]) for n in plan.split) / ranks for own in plan.whole
        ]
        mean = sum(cost(length) for length in lengths) / ranks
        unsplit = [cost(lengths[n]) for own in plan.whole for n in own]
        too_short = max((cost(length) for length in lengths if length < 2 * ranks), default=0)
        assert max(loads) <= max(1.05 * mean, mean + too_short) + 1e-9
        assert max(loads) <= mean + max(unsplit, default=0) + 1e-9
        assert sum(loads) == pytest.approx(ranks * mean)


def test_short_documents_are_not_split():
    plan = split_plan([10] * 64, 4, Cost())
    assert not plan.split and [len(own) for own in plan.whole] == [16] * 4
    assert split_plan([100, 10, 10], 2, Cost()).split == (0,)
    assert split_plan([3], 2, Cost()) == (((0,), ()), (), ((), ()))
    # Three of one length on two ranks: two whole, one split.
    assert len(split_plan([40, 40, 40], 2, Cost()).split) == 1


def test_parts_of_a_document_go_back_and_forth():
    plan = split_plan([16], 2, Cost())
    assert plan.pieces == ((Piece(0, 0, 4), Piece(0, 12, 16)), (Piece(0, 4, 12),))
    pairs = [sum(place + 1 for p in own for place in range(p.start, p.end)) for own in plan.pieces]
    assert pairs[0] == pytest.approx(pairs[1], rel=0.02)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_shares_have_equal_numbers_of_micro_batches(shares: int):
    for seed in range(100):
        lengths = drawn(seed)
        plan = micro_batch_plan(lengths, shares, 64, Cost(quadratic=200.0))
        assert len(plan) == shares and len({len(own) for own in plan}) == 1
        assert sorted(n for own in plan for documents in own for n in documents) == list(range(len(lengths)))
        for own in plan:
            assert all(len(d) <= 1 or sum(lengths[n] for n in d) <= 64 for d in own)
            if not all(own):  # stand-ins only where documents are too few
                assert all(len(documents) <= 1 for documents in own)


@pytest.mark.parametrize(("shares", "context"), [(1, 2), (2, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("count", [1, 3, 13])
def test_packing_and_unpacking_keep_values_in_order(shares: int, context: int, count: int):
    given = [
        replace(s, rollout_logprobs=torch.arange(len(s.token_ids)) + 100.0 * n, routes=routes_like(s))
        for n, s in enumerate(prompts_shared(samples(count)))
    ]
    batches = packed(given, shares, context, share_prompts=True)
    one = packed(given, 1, 1)[0]
    assert len(batches) == shares * context and len({len(own) for own in batches}) == 1
    rows = unpack(batches, [[mb.rollout_logprobs for mb in own] for own in batches], count)
    for sample, row in zip(given, rows, strict=True):
        assert torch.equal(row[1:], sample.rollout_logprobs[1:])
    every = [mb for own in batches for mb in own if not mb.stand_in]
    for name in ("tokens", "targets", "positions", "loss_mask", "versions", "advantages", "loss_weights"):
        ours, theirs = (torch.cat([getattr(mb, name) for mb in mbs]).double() for mbs in (every, one))
        order, expected = (torch.cat([mb.rollout_logprobs for mb in mbs]).argsort() for mbs in (every, one))
        assert torch.equal(ours[order], theirs[expected]), name
    for mb in every:
        assert mb.routes is not None and len(mb.routes) == len(mb.tokens) == int(mb.cu_seqlens[-1])
        assert torch.equal(mb.routes[:, 0, 0].long(), mb.tokens)
        if mb.unique_index is not None and mb.inverse is not None:
            assert torch.equal(mb.tokens[mb.unique_index][mb.inverse], mb.tokens)
            assert torch.equal(mb.positions[mb.unique_index][mb.inverse], mb.positions)


def routes_like(sample: Sample) -> Tensor:
    """Routes by which a token is known: its own id."""
    return sample.token_ids[:-1, None, None].to(torch.int16)


def test_a_recipe_is_packed_for_its_groups():
    keys = ["learner.ranks=4", "learner.context_parallel=2", "learner.tokens_per_micro_batch=20", "runtime=ray"]
    recipe = load_recipe(RECIPES / "quickstart.yaml", keys)
    given = samples(13)
    batches = pack_for(recipe, given, "prompt")
    assert len(batches) == 4 and len({len(own) for own in batches}) == 1
    assert any(mb.pieces is not None and mb.pieces.rank == rank % 2 for rank in (0, 1) for mb in batches[rank])
    values = [[mb.rollout_logprobs for mb in own] for own in batches]
    trained = torch.cat([s.rollout_logprobs[1:][s.loss_mask[1:]] for s in given])
    assert torch.equal(by_sample(batches, values, given), trained.double())


# Costs


def test_the_quadratic_length_is_that_worked_by_hand():
    """d 2048, 16 heads of 128, 4 of keys, 8 experts of 1408, 2 a token: weights that a token meets, pairs' widths."""
    shape = {"hidden_size": 2048, "intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 4}
    kinds = ["linear_attention", "full_attention"]
    config = {**TINY, **shape, "head_dim": 128, "num_local_experts": 8, "num_hidden_layers": 2, "layer_types": kinds}
    lightning, softmax = 5 * 2048 * 2048, 2 * 2048 * 2048 + 2 * 2048 * 512
    met = lightning + softmax + 2 * (2 * 3 * 2048 * 1408 + 8 * 2048)
    assert quadratic_length(shape_of(config)) == pytest.approx(2 * met / (16 * 256))
    assert quadratic_length(shape_of({**config, "layer_types": kinds[:1] * 2})) == math.inf
    # The indexer's 4 heads of 16 a layer are quadratic, the keys that it selects are not.
    dense, sparse = (quadratic_length(shape_of(CONFIGS[name])) for name in ("deepseek_v3", "deepseek_v32"))
    assert dense < sparse < math.inf


# Against one rank

WORLDS = (2, 4)
CONFIGS = {
    "untied": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "dense": {"model_type": "qwen3", **DENSE},
}
CONFIGS |= {
    name: tiny_hybrids.TINY[name].hf_config for name in ("qwen3_next", "kimi_linear", "deepseek_v3", "deepseek_v32")
}


def run_groups(folder: Path, every: bool = False) -> None:
    """Writes policies, norm weights off neutral, and the results of both groups."""
    for name, config in CONFIGS.items():
        policy = init_policy(config, seed=0)
        with torch.no_grad():
            for parameter in policy.named_weights().values():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        save_policy(policy, folder / name)
    for world in WORLDS:
        assert run_group(world, folder, every) == [0] * world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("context")
    run_groups(made)
    return made


def results(root: Path, world: int, name: str) -> list[Any]:
    """[ranks] results of a case."""
    return [torch.load(root / f"results.{world}.{own}", weights_only=False)[name] for own in range(world)]


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Relative to the largest entry of a tensor: rounding of sums, of bfloat16 outputs."""


@pytest.mark.parametrize("name", ATTENDED)
def test_attention_over_any_cut_is_that_of_one_rank(root: Path, name: str):
    attended = ATTENDED[name]
    rows = len(attended.inputs(1)[0])
    for kind, layout in attended.cuts:
        lengths = LENGTHS[kind]
        whole = attended.whole(lengths)
        for world in WORLDS:
            found = results(root, world, f"{name}, {kind}, {layout}")
            order = torch.cat([places for places, _ in found])
            assert sorted(order.tolist()) == list(range(sum(lengths)))
            for number, expected in enumerate(whole):
                if number < rows:
                    ours = torch.cat([values[number] for _, values in found])[order.argsort()]
                else:  # a weight of the layer
                    ours = torch.stack([values[number] for _, values in found]).sum(0)
                assert ours.isfinite().all()
                error = float((ours - expected).abs().max()) / max(float(expected.abs().max()), 1e-3)
                assert error <= TOLERANCES[attended.dtype], f"{kind}, {layout}, {number}: {error:.1e}"


@pytest.mark.parametrize("world", WORLDS)
def test_a_ring_of_latents_has_keys_of_one_rank_in_memory(root: Path, world: int):
    """An equal share of the tokens, rounded up to whole parts; a gather has the keys of all."""
    for most, tokens in results(root, world, "rows expanded, ring"):
        assert tokens // world <= most <= tokens // world + 2
    for most, tokens in results(root, world, "rows expanded, gather"):
        assert most == tokens


class Taken(Exception):
    """The form that attention of split documents takes."""


@pytest.mark.parametrize("bound, form", [(1440, "gather"), (1439, "ring")])
def test_the_bound_counts_latents_as_the_keys_and_values_that_they_become(
    bound: int, form: str, monkeypatch: pytest.MonkeyPatch
):
    """9 tokens of 2 heads with keys of 12 and values of 8 numbers, 4 bytes each; the latents are 9 x 7 numbers."""
    cut = Cut([9], [[(0, 0, 5)], [(0, 5, 9)]], 0, torch.device("cpu"))
    nothing, group = Documents(torch.zeros(1, dtype=torch.int32), 0, 1), Group(None, 0, 2)  # type: ignore[arg-type]
    for name, taken in (("Gather", "gather"), ("ring", "ring")):
        monkeypatch.setattr(split_documents, name, mock.Mock(side_effect=Taken(taken)))
    monkeypatch.setattr(split_documents, "_GATHERED", bound)
    attention = split_documents.SplitDocuments(nothing, 0, cut, group)
    expand = Expansion(lambda x, y: (x.new_empty(len(x), 2, 12), y.new_empty(len(y), 2, 8)), ())
    q, latents = torch.empty(5, 2, 12), [torch.empty(5, 4), torch.empty(5, 1, 3)]
    with pytest.raises(Taken, match=form):
        attention.latent_softmax(q, latents, expand)
    index = Index(queries=torch.empty(5, 1, 4), keys=torch.empty(5, 4), weights=torch.empty(5, 1), top_k=3)
    with pytest.raises(Taken, match="gather"):
        attention.latent_softmax(q, latents, expand, index=index)


def in_order(batches: RankBatches, values: list[list[Tensor]], count: int) -> Tensor:
    return torch.cat(unpack(batches, values, count))


class Errors(NamedTuple):
    """Of a mesh beside one rank."""

    loss: float
    """Relative to it or to 1, the larger, as that of the balancing loss."""
    aux: float
    gradient: float
    """Of any parameter, relative to the largest entry of all."""
    norm: float
    logprobs: float
    sums: float
    """Of entropies and ratios."""


def compared(root: Path, case: ContextCase, every: bool = False) -> dict[str, Errors]:
    """By mesh."""
    options = {"count": case.count, "share_prompts": case.share_prompts}
    learner = new_learner(root, case)
    one = batch(1, 1, **options)
    expected = learner_result(learner, case, one[0])
    logprobs, whole = in_order(one, [expected["logprobs"]], case.count), joined([expected["gradients"]])
    scale = max(float(g.abs().max()) for g in whole.values())
    assert expected["norm"] > 1e-3 and scale > 1e-4
    found = {}
    for world in WORLDS:
        for shares, context in meshes_of(case, world, every):
            ranks = results(root, world, f"{case.name}, {shares} x {context}")
            batches = batch(shares, context, **options)
            assert case.count == 1 or any(mb.pieces is not None for own in batches for mb in own)
            # A rank with whole copies has all rows.
            copies = all(r["gradients"][n][1].shape == g.shape for r in ranks for n, g in whole.items())
            gradients = joined([r["gradients"] for r in (ranks[:1] if copies else ranks)])
            assert gradients.keys() == whole.keys()
            ours = in_order(batches, [r["logprobs"] for r in ranks], case.count)
            sums = {name: sum(r[name] for r in ranks) - expected[name] for name in ("loss", "aux", "entropy", "ratio")}
            found[f"{shares} x {context}"] = Errors(
                loss=abs(sums["loss"]) / max(abs(expected["loss"]), 1.0),
                aux=abs(sums["aux"]) / max(expected["aux"], 1.0),
                gradient=max(float((gradients[n] - g).abs().max()) for n, g in whole.items()) / scale,
                norm=max(abs(r["norm"] / expected["norm"] - 1) for r in ranks),
                logprobs=float((ours - logprobs).abs().max()),
                sums=max(abs(sums[name]) / abs(expected[name]) for name in ("entropy", "ratio")),
            )
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_one_rank(root: Path, case: ContextCase):
    """float64: 1e-12; float32: the case's bound, since the order of sums over tokens and ranks differs, 1e-5 in
    log-probabilities.

    Log-probabilities of float64 policies have 1e-12 too.
    """
    tolerance, found = 1e-12 if case.dtype == F64 else case.bound, compared(root, case)
    assert found
    for mesh, errors in found.items():
        for name, error in errors._asdict().items():
            bound = 1e-5 if name == "logprobs" and case.dtype != F64 else tolerance
            assert error <= bound, f"{mesh}: {name} {error:.1e}"


def rounding(root: Path, case: ContextCase) -> float:
    """Error of one rank's gradient in float32 beside its float64, of any parameter, over the largest entry of all."""
    results = [
        learner_result(new_learner(root, replace(case, dtype=d)), case, batch(1, 1)[0]) for d in ("float32", F64)
    ]
    rounded, exact = (joined([result["gradients"]]) for result in results)
    scale = max(float(g.abs().max()) for g in exact.values())
    return max(float((rounded[n] - g).abs().max()) for n, g in exact.items()) / scale


def error_table(folder: Path) -> Iterator[str]:
    """Markdown: a row a case and mesh, run in `folder`."""
    run_groups(folder, every=True)
    yield "| policy, objective | number format | shares x context | loss | gradient | norm | log-probabilities |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        number = "float64" if case.dtype == F64 else case.dtype
        for mesh, errors in compared(folder, case, every=True).items():
            cells = (f"{e:.0e}" for e in (errors.loss, errors.gradient, errors.norm, errors.logprobs))
            yield f"| {case.name} | {number} | {mesh} | {' | '.join(cells)} |"
        if case.dtype != F64 and case.bound > 1e-6:
            error = rounding(folder, case)
            yield f"| {case.name}, one rank beside its float64 | {number} | 1 x 1 | | {error:.0e} | | |"


def test_a_critic_is_that_of_one_rank(root: Path):
    """float32, as its head is in any policy: 1e-6."""
    one = critic_batch(1, 1)
    expected = critic_result(new_critic(root / "untied", "float32"), one[0])
    values = in_order(one, [expected["values"]], 13)
    for world in WORLDS:
        for shares, context in MESHES[world]:
            found = results(root, world, f"critic, {shares} x {context}")
            assert sum(r["loss"] for r in found) == pytest.approx(expected["loss"], rel=1e-6)
            close(joined([r["gradients"] for r in found]), joined([expected["gradients"]]), 1e-6)
            ours = in_order(critic_batch(shares, context), [r["values"] for r in found], 13)
            assert torch.allclose(ours, values, rtol=0, atol=1e-5)
