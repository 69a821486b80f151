"""Packing: the shift, the reductions, and that nothing depends on order, budget or ranks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.algorithms import Reduction
from cispo.batch.packing import pack, reduction_weights, unpack
from cispo.batch.samples import demonstration, to_samples
from cispo.types import Completion, FinishReason, Prompt, Sample, Trajectory, TrajectoryGroup, Turn


def version_of(token: int) -> int:
    return 1 + token % 100 // 3


def sample(group: int, index: int, prompt: int, completion: int, advantage: float = 1.0) -> Sample:
    """A sample with token ids that encode their origin."""
    base = 10_000 * group + 100 * index
    ids = tuple(range(base, base + prompt + completion))
    turn = Turn(
        context_ids=ids[:prompt],
        completion=Completion(
            token_ids=ids[prompt:],
            logprobs=tuple(-0.01 * (t % 100) for t in ids[prompt:]),
            finish_reason=FinishReason.STOP,
            versions=tuple(map(version_of, ids[prompt:])),
        ),
    )
    trajectory = Trajectory(group_id=group, index=index, turns=(turn,), text="", reward=0.0)
    prompt_object = Prompt(id=group, messages=())
    made = to_samples(TrajectoryGroup(prompt=prompt_object, trajectories=(trajectory,)))[0]
    return replace(made, advantages=made.loss_mask * advantage)


def test_the_shift():
    ((mb,),) = pack([sample(0, 0, 2, 2, 0.5)], reduction="token", max_tokens=8, tokens_per_micro_batch=64)
    assert mb.tokens.tolist() == [0, 1, 2] and mb.targets.tolist() == [1, 2, 3]
    assert mb.loss_mask.tolist() == [False, True, True]
    assert mb.rollout_logprobs.tolist() == pytest.approx([0, -0.02, -0.03])
    assert mb.versions.tolist() == [0, 1, 2]
    assert mb.advantages.tolist() == [0, 0.5, 0.5] and mb.loss_weights.tolist() == [0, 0.5, 0.5]
    assert mb.positions.tolist() == [0, 1, 2] and mb.cu_seqlens.tolist() == [0, 3]


def test_reductions_by_hand():
    """Prompt 0 has 10 tokens of loss 1, prompt 1 has 30 of loss 0: the token mean is .25, the prompt mean .5."""
    samples = [sample(0, 0, 1, 10), sample(1, 0, 1, 20), sample(1, 1, 1, 10)]
    losses = [1.0, 0.0, 0.0]

    def reduced(reduction: Reduction) -> float:
        weights = reduction_weights(samples, reduction, max_tokens=50)
        return sum(w * s.num_loss_tokens * loss for w, s, loss in zip(weights, samples, losses, strict=True))

    assert reduced("token") == pytest.approx(0.25)
    assert reduced("prompt") == pytest.approx(0.5)
    assert reduced("sequence") == pytest.approx(1 / 3)
    assert reduced("sequence_sum") == pytest.approx(10 / 3)
    assert reduced("constant") == pytest.approx(10 / 150)


REDUCTIONS: list[Reduction] = ["token", "prompt", "sequence", "sequence_sum", "constant"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=24),
    st.sampled_from(REDUCTIONS),
    st.integers(8, 64),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_every_token_keeps_its_weight(shapes: list, reduction: Reduction, budget: int, ranks: int, rng: random.Random):
    """For any order, budget and ranks: the same tokens with the same weights, within the budget."""
    samples = [sample(group, number, prompt, completion) for number, (group, prompt, completion) in enumerate(shapes)]

    def weight_by_token(given: list[Sample], budget: int, ranks: int) -> dict[int, float]:
        batches = pack(given, reduction=reduction, max_tokens=32, tokens_per_micro_batch=budget, ranks=ranks)
        assert len(batches) == ranks
        found: dict[int, float] = {}
        for mb in (mb for of_rank in batches for mb in of_rank):
            assert len(mb.tokens) <= budget or len(mb.cu_seqlens) == 2
            assert int(mb.cu_seqlens[-1]) == len(mb.tokens)
            kept = mb.loss_mask.nonzero()[:, 0].tolist()
            assert bool((mb.loss_weights[~mb.loss_mask] == 0).all())
            assert mb.versions[mb.loss_mask].tolist() == [version_of(int(mb.targets[t])) for t in kept]
            found |= {int(mb.targets[t]): float(mb.loss_weights[t]) for t in kept}
        return found

    whole = weight_by_token(samples, 10_000, 1)
    assert len(whole) == sum(completion for _, _, completion in shapes)
    shuffled = list(samples)
    rng.shuffle(shuffled)
    assert weight_by_token(shuffled, budget, ranks) == whole


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=12), st.integers(8, 64))
def test_unpack_undoes_pack(shapes: list, budget: int):
    """A value beside the token to predict comes back at that token, in the order of the samples."""
    samples = [sample(0, number, prompt, completion) for number, (prompt, completion) in enumerate(shapes)]
    batches = pack(samples, reduction="token", max_tokens=32, tokens_per_micro_batch=budget, ranks=2)
    values = [[mb.targets.float() * mb.loss_mask for mb in of_rank] for of_rank in batches]
    for s, row in zip(samples, unpack(batches, values, len(samples)), strict=True):
        assert torch.equal(row, s.token_ids.float() * s.loss_mask)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(8, 64),
)
def test_shared_prompts_are_read_once(shapes: list, budget: int):
    """The unique tokens give back all tokens and positions; the copies of prompts are left out."""
    samples = []
    for number, (group, prompt, completion) in enumerate(shapes):
        made = sample(group, number, prompt, completion)
        same = torch.arange(prompt) - 1000 * (group + 1)  # of one group and length: one prompt
        samples.append(replace(made, token_ids=torch.cat([same, made.token_ids[prompt:]])))
    options = {"reduction": "token", "max_tokens": 32, "tokens_per_micro_batch": budget, "ranks": 2}
    plain, shared = pack(samples, **options), pack(samples, **options, share_prompts=True)
    for before, mb in zip(sum(plain, []), sum(shared, []), strict=True):
        assert torch.equal(mb.tokens, before.tokens) and before.unique_index is None
        prompts = sorted(shapes[index][:2] for index in mb.sample_index)
        # The prompts of a group begin alike: the longest one holds the others.
        saved = sum(length for _, length in prompts) - sum(dict(prompts).values())
        assert (mb.unique_index is None) == (saved == 0)
        if mb.unique_index is not None and mb.inverse is not None:
            assert len(mb.unique_index) == len(mb.tokens) - saved
            for values in (mb.tokens, mb.positions):
                assert torch.equal(values[mb.unique_index][mb.inverse], values)


def test_ranks_are_balanced():
    rng = random.Random(0)
    samples = [sample(0, i, 4, rng.randint(1, 60)) for i in range(64)]
    batches = pack(samples, reduction="token", max_tokens=64, tokens_per_micro_batch=512, ranks=4)
    loads = [sum(len(mb.tokens) for mb in of_rank) for of_rank in batches]
    assert max(loads) - min(loads) <= 64


def test_a_rank_without_samples_has_a_stand_in():
    batches = pack([sample(0, 0, 2, 3)], reduction="token", max_tokens=8, tokens_per_micro_batch=64, ranks=2)
    assert [[(len(mb.tokens), mb.stand_in) for mb in of_rank] for of_rank in batches] == [[(4, False)], [(1, True)]]
    ((first,), (second,)) = batches
    assert not second.loss_mask.any() and not second.loss_weights.any() and second.sample_index == ()
    assert second.advantages.shape == (1,) and (second.old_logprobs is None) == (first.old_logprobs is None)
    assert pack([], reduction="token", max_tokens=8, tokens_per_micro_batch=64, ranks=2) == [[], []]


def test_demonstration():
    s = demonstration([5, 6], [7, 2], 3)
    assert s.token_ids.tolist() == [5, 6, 7, 2] and s.loss_mask.tolist() == [False, False, True, True]
