"""The mesh of a run in a few lines, and the bytes that a rank sends in a layer: arithmetic on shapes, for `cispo show`.

n tokens a rank, d hidden, k experts a token of E with width I, P = ep, G = ep x etp, C = cp, w bytes a number

    FSDP            w numbers (W - 1) / W a gather, over the W ranks that share a weight
    experts         2 n d w (G - 1) where P <= k, else 2 n k d w (G - 1) / P           dispatch and combine
    softmax         (C - 1) n (numbers of a token's keys and values, or latents) w     of documents that are split
    lightning       (C - 1) 2 H D^2 4      delta rule    n (inputs and output of all heads) w (C - 1) / C

A backward pass sends the same once more, its gradients of weights in float32; layers that are recomputed repeat the
forward pass. Bytes received are as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cispo.learner.memory import layers_of
from cispo.learner.parallel import Mesh
from cispo.ops.expansion import Expansion
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index
from cispo.policies.moe import Experts
from cispo.policies.policy import Policy
from cispo.policies.replay import choices_of, routers_of

_DRAWN = 16
"""Ranks of which each is drawn; larger meshes have the first and the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraffic:
    """Bytes that one rank sends in a layer's forward pass, the most of all layers."""

    weights: int
    """Gathered by FSDP."""
    experts: int
    """Tokens and results of distributed experts."""
    context: int
    """States, keys and values of split documents."""


def draw(mesh: Mesh) -> Iterator[tuple[str, str]]:
    """(name, text) of both views: ranks in [] share a micro-batch, or one set of experts."""
    yield "batch", f"dp {mesh.dp} x cp {mesh.cp}: {_groups(mesh.world, mesh.cp)}"
    if mesh.expert_ranks > 1:
        axes = f"edp {mesh.edp} x ep {mesh.ep} x etp {mesh.etp}"
        yield "experts", f"{axes}: {_groups(mesh.world, mesh.expert_ranks, mesh.etp)}"


def _groups(world: int, size: int, inner: int = 1) -> str:
    """Ranks in groups of neighbours, those of an inner group joined by +.

    Example: _groups(4, 4, 2) is "[0+1 2+3]"
    """
    groups = []
    for first in range(0, world, size):
        names = ["+".join(map(str, range(i, i + inner))) for i in range(first, first + size, inner)]
        groups.append(f"[{' '.join(names)}]")
    shown = groups if world <= _DRAWN else [groups[0], "...", groups[-1]]
    return " ".join(dict.fromkeys(shown))


def traffic(policy: Policy, mesh: Mesh, *, tokens: int, width: int, sharded: bool) -> LayerTraffic:
    """Of one rank of the mesh, which needs no groups.

    policy: shapes alone, not used afterwards. tokens: of a rank's micro-batch. width: bytes of a number of the policy.
    """
    hidden = policy.lm_head_weight.shape[1]
    weights = experts = 0
    for layer in layers_of(policy):
        chosen = max(map(choices_of, routers_of(layer)), default=1)
        found = [module for module in layer.modules() if isinstance(module, Experts)]
        numbers = sum(p.numel() for module in found for p in module.parameters())
        dense = sum(p.numel() for p in layer.parameters()) - numbers
        if sharded:
            own = _gathered(numbers // mesh.expert_ranks, mesh.edp)
            weights = max(weights, width * (_gathered(dense, mesh.world) + own))
        if found and mesh.expert_ranks > 1:
            times = 1.0 if mesh.ep <= chosen else chosen / mesh.ep
            experts = max(experts, int(2 * tokens * hidden * width * (mesh.expert_ranks - 1) * times))
    context = 0 if mesh.cp == 1 else _context(policy, mesh.cp, tokens, width)
    return LayerTraffic(weights=weights, experts=experts, context=context)


def _gathered(numbers: int, ranks: int) -> int:
    """Numbers of its share that a rank sends to the others in a gather of `numbers`."""
    return numbers * (ranks - 1) // ranks


class _Widths:
    """An `Attention` that computes nothing, and notes what a rank sends for split documents in each layer."""

    def __init__(self, cp: int, tokens: int, width: int) -> None:
        self.cp, self.tokens, self.width = cp, tokens, width
        self.sent: list[int] = []

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        self._rows(k, v)
        return q.new_empty(*q.shape[:2], v.shape[2])

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        self._rows(k, v, index.keys)
        return q.new_empty(*q.shape[:2], v.shape[2])

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        self._rows(*latents, *(() if index is None else (index.keys,)))
        return q.new_empty(*q.shape[:2], expand.shapes(*latents)[1].shape[2])

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        output = torch.empty_like(inputs[min(2, op.token_inputs - 1)])
        if op.across == "decay":
            heads, size = inputs[1].shape[1:]
            self.sent.append((self.cp - 1) * 2 * heads * size * inputs[2].shape[2] * 4)
        elif op.across == "heads":
            numbers = sum(x[0].numel() for x in (*inputs[: op.token_inputs], output))
            self.sent.append(self.tokens * numbers * self.width * (self.cp - 1) // self.cp)
        return output

    def _rows(self, *tensors: Tensor) -> None:
        self.sent.append((self.cp - 1) * self.tokens * sum(x[0].numel() for x in tensors) * self.width)


def _context(policy: Policy, cp: int, tokens: int, width: int) -> int:
    for module in policy.modules():
        if isinstance(module, Experts):
            module.forward = _no_experts
    token, widths = torch.zeros(1, dtype=torch.long, device="meta"), _Widths(cp, tokens, width)
    with torch.no_grad():
        policy.attend(token, token, widths)
    return max(widths.sent, default=0)


def _no_experts(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return x
