"""Memory plan of a learner rank, from shapes alone, and the keys of a recipe that make it smaller.

    state       frozen weights | weights, masters and moments of the trained ones    stays; 1 / ranks of it with shards
    pass        gradients; with shards the gathered layers and head                  during a step
    activations inputs of layers, one layer's inside | everything that layers keep   during a micro-batch, about

The state is exact. Activations are counted from the widths of matrices: each keeps its input and its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cispo.policies.moe import Experts
from cispo.policies.policy import Policy
from cispo.policies.replay import choices_of, routers_of
from cispo.recipe.schema import Learner as LearnerConfig

_EXACT = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    state: int
    during_pass: int
    activations: int

    @property
    def peak(self) -> int:
        return self.state + self.during_pass + self.activations


def rank_memory(
    policy: Policy,
    config: LearnerConfig,
    *,
    dtype: Literal["float32", "bfloat16"],
    sharded: bool,
    adapter: int = 0,
) -> RankMemory:
    """The plan of one of `config.ranks` ranks; `policy` has shapes alone. Above 0 only `adapter` numbers are trained.

    A whole copy in bfloat16 has weights and gradients of its own beside the float32 ones; shards are float32 alone.
    """
    width = getattr(torch, dtype).itemsize
    every = sum(p.numel() for p in policy.parameters())
    trained, frozen = (adapter, every) if adapter else (every, 0)
    lower = width if width < _EXACT else 0
    if not sharded:
        return RankMemory(
            state=frozen * width + trained * (3 * _EXACT + lower),
            during_pass=trained * (_EXACT + lower),
            activations=_activations(policy, config, width),
        )
    # Of distributed experts a rank sees its own alone.
    own = {id(p) for m in policy.modules() if isinstance(m, Experts) for p in m.parameters()}
    blocks = [
        sum(-(-p.numel() // config.expert_ranks) if id(p) in own else p.numel() for p in block.parameters())
        for block in layers_of(policy)
    ]
    rest = every - sum(p.numel() for block in layers_of(policy) for p in block.parameters())
    # The root stays gathered, and FSDP gathers the next layer while one is computed. Gradients of the trained ones
    # are whole in the compute dtype, and once more in float32 while they are summed.
    whole = rest + 2 * max(blocks, default=0)
    unsummed = 0 if adapter else max(rest, max(blocks, default=0)) * (width + _EXACT)
    return RankMemory(
        state=-(-(frozen * width + trained * 3 * _EXACT) // config.ranks),
        during_pass=-(-trained * _EXACT // config.ranks) + whole * width + unsummed,
        activations=_activations(policy, config, width),
    )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The entries of the outermost lists of modules: the layers of a policy."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = [name for name, _ in lists]
    outermost = [ls for name, ls in lists if not any(name.startswith(f"{other}.") for other in names)]
    return [block for blocks in outermost for block in blocks if any(True for _ in block.parameters())]


def _activations(policy: Policy, config: LearnerConfig, width: int) -> int:
    """Of a micro-batch: with checkpointing each layer's input and the inside of one layer, else the inside of all."""
    tokens, hidden = config.tokens_per_micro_batch, policy.lm_head_weight.shape[1]
    inside = [_kept(layer, config) for layer in layers_of(policy)]
    numbers = hidden * len(inside) + max(inside, default=0) if config.gradient_checkpointing else sum(inside)
    return tokens * numbers * width


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


def relief(config: LearnerConfig, *, sharded: bool, lora: bool) -> str:
    """Keys of a recipe that save memory and are not used yet, as a clause."""
    ways = [f"a learner.tokens_per_micro_batch below {config.tokens_per_micro_batch}"]
    if not config.gradient_checkpointing:
        ways.insert(0, "learner.gradient_checkpointing=true")
    if not sharded:
        ways.append("learner.ranks=2 or more with learner.shard=true")
    else:
        ways.append(f"learner.ranks above {config.ranks}")
    if not lora:
        ways.append("policy.lora")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"
