"""Memory plan of a learner rank, from shapes alone, and the keys of a recipe that make it smaller.

    weights       in policy.dtype; float32 rows with shards        stay
    masters       float32, of weights of a lower precision         stay, or are on the host
    moments       AdamW's, float32 or in 8 bits                    stay, or are on the host
    reference     a KL penalty's policy                            stays, or is on the host
    gradients     float32 sums                                     during a step
    rounded       those of one micro-batch, in policy.dtype        during a micro-batch
    gathered      with shards the gathered layers and head         during a micro-batch
    activations   inputs of layers, one layer's inside | all       during a micro-batch, about
    staging       what a step of AdamW brings to the device        at the end of a step

State, gradients and weights are exact. Activations are counted from the widths of matrices: each keeps its input and
its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from cispo.learner.optim import PIECE
from cispo.learner.optimizer_moments import ROUNDING_BYTES, moment_bytes
from cispo.policies.moe import Experts
from cispo.policies.policy import Policy, heads_of
from cispo.policies.replay import choices_of, routers_of
from cispo.recipe.schema import Learner as LearnerConfig

_EXACT = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank on its device."""

    weights: int
    masters: int
    moments: int
    gradients: int
    """Sums over micro-batches."""
    rounded: int
    """Gradients of one micro-batch, of weights of a lower precision."""
    gathered: int
    activations: int
    staging: int = 0
    reference: int = 0
    host: int = 0
    """Bytes in host memory instead."""

    @property
    def state(self) -> int:
        """Weights with all that AdamW keeps of them between steps."""
        return self.weights + self.masters + self.moments

    @property
    def during_pass(self) -> int:
        return self.gradients + self.rounded + self.gathered

    @property
    def resting(self) -> int:
        """Bytes while nothing is computed."""
        return self.state + self.reference

    @property
    def peak(self) -> int:
        return self.resting + max(self.during_pass + self.activations, self.gradients + self.staging)


def rank_memory(
    policy: Policy,
    config: LearnerConfig,
    *,
    dtype: Literal["float32", "bfloat16"],
    sharded: bool,
    adapter: int = 0,
    reference: bool = False,
) -> RankMemory:
    """The plan of one of `config.ranks` ranks; `policy` has shapes alone. Above 0 only `adapter` numbers are trained.

    A whole copy in bfloat16 has weights and gradients of its own beside the float32 ones; shards are float32 alone.
    With a `reference` there is a second policy without gradient.
    """
    width = getattr(torch, dtype).itemsize
    every = sum(p.numel() for p in policy.parameters())
    # Heads of multi-token prediction are no part of a reference.
    trunk = every - sum(p.numel() for head in heads_of(policy) for p in head.parameters())
    trained, frozen = (adapter, every) if adapter else (every, 0)
    ranks = config.ranks if sharded else 1
    lower = width if width < _EXACT and not sharded else 0
    moments = _moments(policy, config, adapter)
    masters = trained * _EXACT if lower else 0
    weights = frozen * width + trained * (lower or _EXACT)
    whole, unsummed = _gathered(policy, config, trained_layers=not adapter) if sharded else (0, 0)
    inputs, inside = _activations(policy, config, width)
    sizes = {
        "weights": _share(weights, ranks),
        "masters": masters,
        "moments": _share(moments, ranks),
        "gradients": _share(trained * _EXACT, ranks),
        "rounded": trained * lower,
        "gathered": whole * width + unsummed * (width + _EXACT),
        "activations": inputs + inside,
        "reference": _share(trunk * width, ranks) if reference else 0,
    }
    host = 0
    for part, names in {"optimizer": ("masters", "moments"), "reference": ("reference",)}.items():
        if part in config.offload:
            host += sum(sizes[name] for name in names)
            sizes |= dict.fromkeys(names, 0)
    if "activations" in config.offload:
        layers = len(layers_of(policy))
        # The input of a layer is copied while the next one is computed.
        kept = min(layers, 2) * (inputs // max(layers, 1))
        host += inputs - kept
        sizes["activations"] = kept + inside
    return RankMemory(**sizes, staging=_staging(policy, config, ranks, adapter, copies=bool(lower)), host=host)


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _moments(policy: Policy, config: LearnerConfig, adapter: int) -> int:
    """Bytes of both moments of all trained numbers. Of an adapter the half with rows of its rank stays in float32."""
    low = config.optimizer == "adamw8bit"
    if adapter:
        return adapter * 2 * _EXACT if not low else adapter * _EXACT + int(moment_bytes((adapter // 128, 64), low=True))
    return sum(moment_bytes(p.shape, low=low) for p in policy.parameters())


def _staging(policy: Policy, config: LearnerConfig, ranks: int, adapter: int, *, copies: bool) -> int:
    """Bytes that a step brings to the device: a piece of moments and masters in float32."""
    low, offload = config.optimizer == "adamw8bit", "optimizer" in config.offload
    if not low and not offload:
        return 0
    sizes = [adapter] if adapter else [p.numel() for p in policy.parameters()]
    every, largest = (_share(numbers * _EXACT, ranks) for numbers in (sum(sizes), 0 if adapter else max(sizes)))
    parts = 2 + int(offload and copies)
    return parts * max(min(PIECE, every), largest) + low * ROUNDING_BYTES


def _gathered(policy: Policy, config: LearnerConfig, *, trained_layers: bool) -> tuple[int, int]:
    """Numbers that a rank with shards sees whole: gathered weights, and gradients that are not summed yet."""
    # Of distributed experts a rank sees its own alone.
    own = {id(p) for m in policy.modules() if isinstance(m, Experts) for p in m.parameters()}
    units = [
        sum(
            -(-p.numel() // config.expert_ranks) if id(p) in own else p.numel()
            for layer in unit
            for p in layer.parameters()
        )
        for unit in units_of(policy)
    ]
    every = sum(p.numel() for p in policy.parameters())
    rest = every - sum(p.numel() for block in layers_of(policy) for p in block.parameters())
    # The root stays gathered, and FSDP gathers the next layers while some are computed. Gradients of the trained ones
    # are whole in the compute dtype, and once more in float32 while they are summed.
    return rest + 2 * max(units, default=0), max(rest, max(units, default=0)) if trained_layers else 0


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The entries of the outermost lists of modules: the layers of a policy, then its heads."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, _ in lists]
    outermost = [ls for name, ls in lists if not any(name.startswith(f"{other}.") for other in names)]
    return [block for blocks in outermost for block in blocks if any(True for _ in block.parameters())]


# Bytes in bfloat16 that are gathered together: fewer collectives, which the host has to start.
_UNIT = 512 << 20


def units_of(model: nn.Module) -> list[list[nn.Module]]:
    """Consecutive layers whose parameters FSDP gathers together, of at most half a GiB and a quarter of all layers.

    Heads follow by themselves: a pass may leave them out. Their norms are called behind the heads' own pass.
    """
    heads = heads_of(model)
    layers = [layer for layer in layers_of(model) if layer not in heads]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    most = min(_UNIT // 2, sum(sizes) // 4)
    units, room = list[list[nn.Module]](), 0
    for layer, size in zip(layers, sizes, strict=True):
        if not units or size > room:
            units.append([])
            room = most
        units[-1].append(layer)
        room -= size
    return units + [[module] for head in heads for module in (head.norm, head)]


def _activations(policy: Policy, config: LearnerConfig, width: int) -> tuple[int, int]:
    """Bytes of a micro-batch: with checkpointing the layers' inputs and the inside of one, else the inside of all."""
    tokens, hidden = config.tokens_per_micro_batch, policy.lm_head_weight.shape[1]
    inside = [_kept(layer, config) for layer in layers_of(policy)]
    if not config.recomputes:
        return 0, tokens * sum(inside) * width
    return tokens * hidden * len(inside) * width, tokens * max(inside, default=0) * width


def _kept(layer: nn.Module, config: LearnerConfig) -> int:
    """Numbers that a layer keeps for each token.

    Experts that are stacked in one tensor see a token k times. Where their width is cut, etp ranks see each other's
    rows; and where they are distributed, tokens and results are kept on their way (`learner.experts`), with an even
    load.
    """
    numbers = sum(p.shape[-1] + p.shape[-2] for p in layer.parameters() if p.dim() == 2)
    ep, etp = config.expert_parallel, config.expert_tensor_parallel
    chosen = max(map(choices_of, routers_of(layer)), default=1)
    for module in layer.modules():
        if isinstance(module, Experts):
            hidden, width = module.down_proj.shape[1:]
            numbers += chosen * (3 * width + 2 * etp * hidden)
            if ep * etp > 1:
                numbers += 2 * hidden * (ep if ep <= chosen else chosen) * etp
    return numbers


class Relief(NamedTuple):
    """A change of the learner's keys that saves memory, in the order of their price."""

    keys: str
    config: LearnerConfig
    """The learner with them."""


# Fewer tokens at a time leave a GPU idle.
_FEWEST_TOKENS = 2048


def reliefs(config: LearnerConfig, *, reference: bool, trains_all: bool) -> Iterator[Relief]:
    """Keys that are not used yet: first those that change no number and cost little, then slower ones, then rounding.

    `reference` where a second policy is kept, `trains_all` where there is no adapter.
    """
    if not config.recomputes:
        yield _with(config, "learner.gradient_checkpointing=true", gradient_checkpointing=True)
    if config.tokens_per_micro_batch > _FEWEST_TOKENS:
        tokens = max(config.tokens_per_micro_batch // 2, _FEWEST_TOKENS)
        yield _with(config, f"learner.tokens_per_micro_batch={tokens}", tokens_per_micro_batch=tokens)
    parts: Sequence[Literal["reference", "optimizer", "activations"]] = ("reference", "optimizer", "activations")
    for part in parts:
        if part in config.offload or (part == "reference" and not (reference and trains_all)):
            continue
        offload = [*config.offload, part]
        more = {"gradient_checkpointing": True} if part == "activations" else {}
        yield _with(config, f"learner.offload=[{','.join(offload)}]", offload=offload, **more)
    if config.optimizer == "adamw":
        yield _with(config, "learner.optimizer=adamw8bit", optimizer="adamw8bit")


def _with(config: LearnerConfig, keys: str, **values: object) -> Relief:
    return Relief(keys, config.model_copy(update=values))


def saving(
    policy: Policy,
    config: LearnerConfig,
    *,
    dtype: Literal["float32", "bfloat16"],
    sharded: bool,
    adapter: int,
    reference: bool,
) -> str:
    """The keys that save memory and are not used yet, with the bytes that each saves of a rank's peak, as a clause."""
    options = {"dtype": dtype, "adapter": adapter, "reference": reference}

    def peak(changed: LearnerConfig, *, split: bool = sharded) -> int:
        return rank_memory(policy, changed, sharded=split, **options).peak

    before, ways = peak(config), []
    for keys, changed in reliefs(config, reference=reference, trains_all=not adapter):
        saved = before - peak(changed)
        if saved > 0:
            ways.append(f"{keys} ({gib(saved)} less)")
    more = config.model_copy(update={"ranks": 2 * config.ranks})
    shard = "" if sharded else " with learner.shard=true"
    ways.append(f"learner.ranks={more.ranks}{shard} ({gib(max(before - peak(more, split=True), 0))} less a rank)")
    if not adapter:
        ways.append("policy.lora")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"
