"""A rank's share of a hybrid policy: the same policy with fewer heads and narrower MLPs, and the cut of each weight.

    HybridConfig --share_of--> Share(policy of the rank's shapes, cuts: parameter -> Cut)

    softmax attention        heads of queries; key heads too, or one that several ranks hold where there are fewer
    latent attention         heads; latents, their norms and the indexer are whole on every rank
    gated DeltaNet           key heads, with their value heads and channels of the convolution
    KDA, lightning           heads, with their channels, decays and slopes
    experts, MLPs            the width, of every expert
    embedding, head, norms of blocks, routers       whole on every rank

A mixer's output projection and an MLP sum over the ranks, and so do norms over all heads. States and keys in an
engine's cache are those of the rank's heads; latents in it are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.policies.families import family_of
from cispo.policies.hybrid.config import (
    DenseMLPConfig,
    GDNConfig,
    GQAConfig,
    HybridConfig,
    KDAConfig,
    LightningMixerConfig,
    MixerConfig,
    MLAConfig,
    MoEConfig,
)
from cispo.policies.hybrid.lightning import GroupedRMSNorm
from cispo.policies.hybrid.model import HybridLayer, HybridPolicy
from cispo.policies.hybrid.model import build as build_hybrid
from cispo.policies.layers import RMSNorm
from cispo.policies.moe import SharedMoE
from cispo.policies.policy import HFConfig, Policy
from cispo.policies.shares import Cut, Ranks, SummedLinear, SummedMoE, SummedRMSNorm


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a policy, or all of it."""

    policy: Policy
    """With undefined weights until `load`."""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """By parameter; those without one are whole."""

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies the rank's parts of whole weights, in a checkpoint's naming; returns the tensors that it filled.

        Raises UserError on a name that the policy does not have.
        """
        tensors = self.policy.named_weights()
        loaded = set()
        for name, weight in weights:
            place = None if self.policy.keeps(name) else self.policy.place_of(name)
            if place is None:
                continue
            if place.parameter not in tensors:
                raise UserError(f"the weights hold {name!r}, which the policy of this config does not have")
            target, cut = place.of(tensors[place.parameter]), self.cuts.get(place.parameter)
            own = weight if cut is None else cut.at(place).of(weight)
            assert target.shape == own.shape, f"{name}: {tuple(own.shape)} for {tuple(target.shape)}"
            target.copy_(own)
            loaded.add(place.parameter)
        return loaded


class _Part(NamedTuple):
    """A mixer's or an MLP's share."""

    config: MixerConfig | DenseMLPConfig | MoEConfig
    """With the rank's sizes."""
    cuts: Mapping[str, Cut]
    """By the name of a parameter inside the module; it may lack some of them."""
    output: str | None
    """The linear layer whose results are parts of a sum; None where those of the whole module are."""
    norms: Mapping[str, int] = {}
    """Norms over all heads, and the groups of each."""


def build_share(
    config: HFConfig, folder: Path | None, dtype: torch.dtype, ranks: Ranks, *, heads: bool = False
) -> Share:
    """`share_of` a config.json's content; the whole policy where there is one rank; `heads` as `Build` has it."""
    build = family_of(config).build
    if ranks.count == 1:
        return Share(build(config, folder, dtype, heads=heads))
    with torch.device("meta"):
        whole = build(config, folder, dtype, heads=heads)
    assert isinstance(whole, HybridPolicy)
    return share_of(whole.config, dtype, ranks)


def share_of(whole: HybridConfig, dtype: torch.dtype, ranks: Ranks) -> Share:
    """The rank's share on torch's default device. Raises UserError where the ranks do not divide the policy."""
    parts, count = _parts(whole, ranks), len(whole.layers)
    blocks = tuple(
        replace(one, mixer=a.config, mlp=b.config)
        for one, (a, b) in zip(whole.layers + whole.predictors, parts, strict=True)
    )
    policy = build_hybrid(replace(whole, layers=blocks[:count], heads=blocks[count:]), dtype)
    cuts: dict[str, Cut] = {}
    prefixes = [f"layers.{number}" for number in range(count)]
    prefixes += [f"predictors.{number}.layer" for number in range(len(blocks) - count)]
    for prefix, both in zip(prefixes, parts, strict=True):
        layer = policy.get_submodule(prefix)
        assert isinstance(layer, HybridLayer)
        for name, part in zip((layer.config.mixer.name, "mlp"), both, strict=True):
            _sum_over(layer, name, part, ranks)
            cuts |= {f"{prefix}.{name}.{leaf}": cut for leaf, cut in part.cuts.items()}
    named = dict(policy.named_parameters())
    return Share(policy, {name: cut for name, cut in cuts.items() if name in named})


def check_ranks(policy: Policy, ranks: int) -> None:
    """Raises UserError where so many ranks do not divide a hybrid policy; vLLM checks its own models itself."""
    if ranks > 1 and isinstance(policy, HybridPolicy):
        _parts(policy.config, Ranks.first(ranks))


def parameters_of_rank(policy: Policy, ranks: int) -> int:
    """Parameters that each of `ranks` holds; vLLM's own models are cut evenly, their vocabulary too.

    Raises UserError as `share_of`.
    """
    if ranks > 1 and isinstance(policy, HybridPolicy):
        with torch.device("meta"):
            policy = share_of(policy.config, torch.float32, Ranks.first(ranks)).policy
        ranks = 1
    return sum(weight.numel() for weight in policy.parameters()) // ranks


def _parts(whole: HybridConfig, ranks: Ranks) -> list[tuple[_Part, _Part]]:
    """The shares of the mixer and the MLP of every layer, then of every head's."""
    blocks = whole.layers + whole.predictors
    return [(_PARTS[type(one.mixer)](one.mixer, ranks), _PARTS[type(one.mlp)](one.mlp, ranks)) for one in blocks]


def _sum_over(layer: nn.Module, name: str, part: _Part, ranks: Ranks) -> None:
    """Replaces what has parts of sums for results, in the module `name` of a layer; names of parameters stay."""
    module = layer.get_submodule(name)
    for leaf, groups in part.norms.items():
        norm = module.get_submodule(leaf)
        assert isinstance(norm, RMSNorm | GroupedRMSNorm), "no family has centred norms over all heads"
        module.add_module(leaf, SummedRMSNorm(norm.weight, norm.eps, ranks, groups))
    if part.output is None:
        assert isinstance(module, SharedMoE)
        layer.add_module(name, SummedMoE(module, ranks))
    else:
        output = module.get_submodule(part.output)
        assert isinstance(output, nn.Linear)
        module.add_module(part.output, SummedLinear(output, ranks))


def _gqa(config: GQAConfig, ranks: Ranks) -> _Part:
    heads, queries = ranks.part(config.num_heads, "attention heads"), ranks.cut(0)
    kept = ranks.key_heads(config.num_kv_heads)
    cuts = {"q_proj": queries, "k_proj": kept, "v_proj": kept}
    cuts = {f"{name}.{leaf}": cut for name, cut in cuts.items() for leaf in ("weight", "bias")}
    joint = config.qk_norm == "joint"
    if joint:
        cuts |= {"q_norm.weight": queries, "k_norm.weight": kept}
    return _Part(
        replace(config, num_heads=heads, num_kv_heads=config.num_kv_heads // kept.parts),
        {**cuts, "o_proj.weight": ranks.cut(1)},
        output="o_proj",
        norms={"q_norm": 1, "k_norm": 1} if joint else {},
    )


def _mla(config: MLAConfig, ranks: Ranks) -> _Part:
    rows = ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")
    return _Part(
        replace(config, num_heads=ranks.part(config.num_heads, "attention heads")),
        {**dict.fromkeys(rows, ranks.cut(0)), "o_proj.weight": ranks.cut(1)},
        output="o_proj",
    )


def _gdn(config: GDNConfig, ranks: Ranks) -> _Part:
    keys = ranks.part(config.num_key_heads, "key heads of DeltaNet")
    rows = ("in_proj_qkvz.weight", "in_proj_ba.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight")
    sizes = config.num_key_heads * config.key_dim, config.num_value_heads * config.value_dim
    channels = ranks.cut(0, blocks=(sizes[0], *sizes))
    return _Part(
        replace(config, num_key_heads=keys, num_value_heads=config.num_value_heads // ranks.count),
        {
            **dict.fromkeys((*rows, "A_log", "dt_bias"), ranks.cut(0)),
            **dict.fromkeys(("in_proj_qkv.weight", "conv1d.weight"), channels),
            "out_proj.weight": ranks.cut(1),
        },
        output="out_proj",
    )


def _kda(config: KDAConfig, ranks: Ranks) -> _Part:
    rows = [f"{name}_{kind}.weight" for name in "qkv" for kind in ("proj", "conv1d")]
    rows += ["f_b_proj.weight", "g_b_proj.weight", "b_proj.weight", "dt_bias"]
    return _Part(
        replace(config, num_heads=ranks.part(config.num_heads, "heads of KDA")),
        {**dict.fromkeys(rows, ranks.cut(0)), "A_log": ranks.cut(2), "o_proj.weight": ranks.cut(1)},
        output="o_proj",
    )


def _lightning(config: LightningMixerConfig, ranks: Ranks) -> _Part:
    heads, groups = ranks.part(config.num_heads, "heads of lightning attention"), config.norm_groups
    if groups % ranks.count and ranks.count % groups:
        raise UserError(f"rollout.tensor_parallel {ranks.count} and the policy's group_norm_size {groups} do not fit")
    return _Part(
        replace(
            config,
            num_heads=heads,
            slopes=config.slopes[ranks.number * heads : (ranks.number + 1) * heads],
            norm_groups=max(groups // ranks.count, 1),
        ),
        {
            "query_key_value.weight": ranks.cut(0, blocks=(1, 1, 1)),
            **dict.fromkeys(("g_proj.weight", "g_norm.weight"), ranks.cut(0)),
            "o_proj.weight": ranks.cut(1),
        },
        output="o_proj",
        norms={"g_norm": groups} if groups < ranks.count else {},
    )


def _swiglu(ranks: Ranks, prefix: str = "") -> dict[str, Cut]:
    rows = dict.fromkeys((f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"), ranks.cut(0))
    return {**rows, f"{prefix}down_proj.weight": ranks.cut(1)}


def _dense(config: DenseMLPConfig, ranks: Ranks) -> _Part:
    return _Part(replace(config, width=ranks.part(config.width, "width of an MLP")), _swiglu(ranks), output="down_proj")


def _moe(config: MoEConfig, ranks: Ranks) -> _Part:
    shared = ranks.part(config.shared_width, "width of shared experts")
    return _Part(
        replace(config, width=ranks.part(config.width, "width of an expert"), shared_width=shared),
        {
            "experts.gate_up_proj": ranks.cut(1, blocks=(1, 1)),
            "experts.down_proj": ranks.cut(2),
            **_swiglu(ranks, "shared_experts."),
        },
        output=None,
    )


_PARTS: Mapping[type, Callable[..., _Part]] = {
    GQAConfig: _gqa,
    MLAConfig: _mla,
    GDNConfig: _gdn,
    KDAConfig: _kda,
    LightningMixerConfig: _lightning,
    DenseMLPConfig: _dense,
    MoEConfig: _moe,
}
