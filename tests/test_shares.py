"""Tensor parallelism of the hybrid families: the ranks' shares together are the policy, weights and function.

The ranks are threads of this process, and their sum a barrier; `test_hybrid_parity.py` runs them in vLLM's workers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.hybrid.shares import Share, share_of
from cispo.policies.loading import init_policy
from cispo.policies.policy import Place
from cispo.policies.shares import Cut, Ranks
from tests.tiny_hybrids import TINY, VARIANTS, VOCAB, draw_weights

CASES = {
    **{(name, 2): tiny.hf_config for name, tiny in (TINY | VARIANTS).items() if "one key head" not in name},
    # Two key heads, and two groups of an output norm, on four ranks.
    **{(name, 4): TINY[name].hf_config for name in ("minimax_m2", "kimi_linear", "deepseek_v3", "ling")},
    ("olmoe", 4): VARIANTS["olmoe"].hf_config,
}


def whole_policy(config: dict[str, Any]) -> HybridPolicy:
    policy = init_policy(config, 0)
    draw_weights(policy, 0)
    assert isinstance(policy, HybridPolicy)
    return policy


def shares(policy: HybridPolicy, count: int) -> list[Share]:
    """Of ranks that are threads: `sum` waits for all of them and adds up in the order of ranks."""
    barrier, given = Barrier(count), list[Any]([None] * count)

    def summed(rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(x: Tensor) -> Tensor:
            given[rank] = x
            barrier.wait(timeout=60)
            total = torch.stack(given).sum(0)
            barrier.wait(timeout=60)
            return total

        return add_up

    ranks = [Ranks(number=rank, count=count, sum=summed(rank)) for rank in range(count)]
    return [share_of(policy.config, torch.float32, rank) for rank in ranks]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_shares_compute_the_policy(name: str, count: int) -> None:
    policy = whole_policy(CASES[name, count])
    parts = shares(policy, count)
    held = [sum(p.numel() for p in part.policy.parameters()) for part in parts]
    assert len(set(held)) == 1 and held[0] < 0.8 * sum(p.numel() for p in policy.parameters())
    lengths = torch.tensor([0, 70, 71, 140], dtype=torch.int32)
    tokens = torch.randint(VOCAB, (140,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths.diff().tolist()])

    def run(share: Share) -> Tensor:
        assert share.load(policy.to_hf().items()) == set(share.policy.named_weights())
        with torch.no_grad():  # of each thread
            output = share.policy(tokens, positions, lengths)
            return (output.hidden @ share.policy.lm_head_weight.T).log_softmax(-1)

    with torch.no_grad():
        expected = (policy(tokens, positions, lengths).hidden @ policy.lm_head_weight.T).log_softmax(-1)
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, parts))
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-5)
    # The sum is needed: a rank alone computes another function.
    alone = share_of(policy.config, torch.float32, Ranks.first(count))
    assert (run(alone) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("name", "count"), CASES)
def test_shares_together_hold_every_element_as_often(name: str, count: int) -> None:
    policy = whole_policy(CASES[name, count])
    parts = shares(policy, count)
    for parameter, weight in policy.named_weights().items():
        elements = torch.arange(weight.numel()).view(weight.shape)
        cuts = [part.cuts.get(parameter) for part in parts]
        kept = [elements if cut is None else cut.of(elements) for cut in cuts]
        assert [part.shape for part in kept] == [part.policy.named_weights()[parameter].shape for part in parts]
        times = torch.bincount(torch.cat([part.flatten() for part in kept]), minlength=weight.numel())
        assert times[0] > 0 and (times == times[0]).all(), parameter
        assert all((cut is None) == (part.shape == weight.shape) for cut, part in zip(cuts, kept, strict=True))


def test_blocks_of_an_axis_are_cut_each_by_itself() -> None:
    cut = Cut(axis=0, part=1, parts=2, blocks=(1, 1, 2))
    assert cut.of(torch.arange(8)).tolist() == [1, 3, 6, 7]
    fused = torch.arange(24).view(2, 4, 3)  # two experts, gate and up of two rows each
    half = Cut(axis=1, part=1, parts=2, blocks=(1, 1))
    assert half.of(fused)[1].tolist() == [[15, 16, 17], [21, 22, 23]]
    place = Place("gate_up_proj", 1, "up")
    assert half.at(place).of(place.of(fused)).tolist() == [[21, 22, 23]]
    assert half.at(Place("gate_up_proj")) == half


@pytest.mark.parametrize("name", ["minimax_m2", "qwen3_next"])
def test_experts_in_one_tensor_load_as_one_by_one(name: str) -> None:
    """transformers' own state dict has gate and up of all experts in one tensor."""
    policy = whole_policy(TINY[name].hf_config)
    for separate, fused in zip(shares(policy, 2), shares(policy, 2), strict=True):
        separate.load(policy.to_hf().items())
        fused.load((f"model.{key}", weight) for key, weight in policy.named_parameters() if "lm_head" not in key)
        held, expected = fused.policy.named_weights(), separate.policy.named_weights()
        experts = [key for key in held if ".experts." in key]
        assert len(experts) == 8 and all(torch.equal(held[key], expected[key]) for key in experts)


REFUSED = {
    "attention heads: 4": ("minimax_m2", 3, {}),
    "width of an expert: 33": ("minimax_m2", 2, {"intermediate_size": 33}),
    "width of shared experts: 47": ("qwen3_next", 2, {"shared_expert_intermediate_size": 47}),
    "width of an MLP: 95": ("deepseek_v3", 2, {"intermediate_size": 95}),
    "key heads of DeltaNet: 2": ("qwen3_next", 4, {}),
    "3 key heads do not fit": ("minimax_m2", 2, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "heads of KDA: 5": ("kimi_linear", 2, {"linear_num_heads": 5}),
    "group_norm_size 3 do not fit": ("ling", 2, {"num_attention_heads": 6, "group_norm_size": 3}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_ranks_that_do_not_divide_the_policy_are_refused(reason: str) -> None:
    name, count, changes = REFUSED[reason]
    policy = init_policy(TINY[name].hf_config | changes, 0)
    assert isinstance(policy, HybridPolicy)
    with pytest.raises(UserError, match=f"^rollout.tensor_parallel {count} .*{reason}$"):
        share_of(policy.config, torch.float32, Ranks.first(count))
