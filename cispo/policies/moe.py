"""Mixture of experts: routers, grouped experts, and the balance loss over a global batch.

    x [T, d] --router--> chosen [T, k], weights [T, k] --experts--> mixture [T, d]  (+ shared experts)

Router replay: `routes` [T, k] are the choices of another forward pass, an engine's; rows of -1 leave the choice to the
router. Weights come from this pass's scores, so the gradient reaches the router all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.ops.autograd import Context
from cispo.policies.layers import SwiGLU
from cispo.policies.policy import trunk_modules

# Keeps the sum of sigmoid scores above zero where all of them underflow.
_TINY = 1e-20

# On a CPU, all of few experts on so few tokens (a decode step) are faster than sorting the tokens by expert.
FEW_TOKENS = 64


class Router(nn.Module):
    """Chooses k experts for each token; `weight` is [E, d]."""

    def __init__(self, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.top_k = top_k

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, d] to probs [T, E], at least float32, and chosen [T, k] int64, most probable first."""
        probs = _logits(x, self.weight).softmax(-1)
        return probs, replayed(probs.topk(self.top_k, dim=-1).indices, routes)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    # The product is float32 too: logits rounded to bfloat16 make ties, and ties are chosen either way.
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


def replayed(chosen: Tensor, routes: Tensor | None) -> Tensor:
    """The rows of `routes` [T, k], of any signed integer dtype, and those of `chosen` [T, k] where a row is -1."""
    return chosen if routes is None else torch.where(routes[:, :1] >= 0, routes.to(chosen.dtype), chosen)


def routing_weights(probs: Tensor, chosen: Tensor) -> Tensor:
    """Weights [T, k] of the chosen experts: their probabilities, renormalised to sum to 1.

    `chosen` may come from another forward pass (router replay): the gradient reaches the router all the same.
    """
    weights = probs.gather(-1, chosen)
    return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a router scores, chooses and weighs experts.

    Example (DeepSeek-V3): Routing(num_experts=256, top_k=8, scores="sigmoid", corrected=True, scale=2.5, groups=8,
    kept_groups=4)
    """

    num_experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    """A bias an expert is added to its score for the choice alone: balance without a loss (arXiv 2408.15664)."""
    normalised: bool = True
    """The weights of a token's chosen experts are divided by their sum, and multiplied by `scale` then."""
    scale: float = 1.0
    groups: int = 1
    """Equal groups of neighbouring experts; a token's experts come from its `kept_groups` best, each scored by the sum
    of its two best experts (arXiv 2412.19437, section 2.1.2)."""
    kept_groups: int = 1


class Routed(NamedTuple):
    """Decisions of a `ScoreRouter`."""

    probs: Tensor
    """[T, E], at least float32: scores divided by their sum over all experts; softmax scores sum to 1 already."""
    chosen: Tensor
    """[T, k] int64."""
    weights: Tensor
    """[T, k] of the chosen experts' outputs, at least float32."""


class ScoreRouter(nn.Module):
    """A router by the rule of `Routing`; `weight` is [E, d].

    `e_score_correction_bias` [E] float32 is a buffer: stored, sent to engines, without gradient.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, hidden: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.num_experts, hidden))
        bias = torch.zeros(routing.num_experts, dtype=torch.float32) if routing.corrected else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor, routes: Tensor | None = None) -> Routed:
        """x [T, d]; routes [T, k] or None."""
        rule, logits = self.routing, _logits(x, self.weight)
        if rule.scores == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / (scores.sum(-1, keepdim=True) + _TINY)
        chosen = replayed(self._ranked(scores.detach()).topk(rule.top_k, dim=-1).indices, routes)
        if rule.normalised and rule.scores == "softmax":
            weights = routing_weights(scores, chosen)
        else:
            weights = scores.gather(-1, chosen)
            if rule.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return Routed(probs, chosen, weights if rule.scale == 1 else weights * rule.scale)

    def _ranked(self, scores: Tensor) -> Tensor:
        """Scores [T, E] by which experts are chosen: -inf for those of groups that are out."""
        rule, bias = self.routing, self.e_score_correction_bias
        ranked = scores if bias is None else scores + bias
        if rule.kept_groups == rule.groups:
            return ranked
        groups = ranked.unflatten(-1, (rule.groups, -1))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(rule.kept_groups, dim=-1).indices
        kept = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=ranked.device).scatter_(-1, best, True)
        return groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def correction_biases(policy: nn.Module) -> list[Tensor]:
    """[E] float32 of each MoE layer of the trunk whose router has one, in order."""
    routers = [module for module in trunk_modules(policy) if isinstance(module, ScoreRouter)]
    return [router.e_score_correction_bias for router in routers if router.e_score_correction_bias is not None]


@torch.no_grad()
def balance_biases(biases: Sequence[Tensor], counts: Sequence[Tensor] | Tensor, rate: float) -> None:
    """Moves each bias [E] by `rate`: up where an expert was chosen less often than the mean, down where more often.

    counts [layers, E] are those of the whole batch. It balances without a loss, which would bend the gradient
    (arXiv 2408.15664, algorithm 1).
    """
    for bias, chosen in zip(biases, counts, strict=True):
        bias.add_((chosen.mean() - chosen).sign(), alpha=rate)


class Experts(nn.Module):
    """E SwiGLU experts in two fused weights: gate_up_proj [E, 2I, d], gate first, and down_proj [E, d, I].

    On a GPU in bfloat16 no shape and no launch depends on the choices, so that a CUDA graph can hold it.
    """

    def __init__(self, hidden: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert[chosen[t, k]](x[t]): x [T, d], chosen and weights [T, k], to [T, d]."""
        if not x.is_cuda and len(x) <= FEW_TOKENS and len(self.gate_up_proj) <= 2 * chosen.shape[1]:
            return self._every_expert(x, chosen, weights)
        tokens, k = chosen.shape
        expert_of_row, order = chosen.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        experts = torch.arange(len(self.gate_up_proj), device=x.device)
        ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
        gate, up = grouped_linear(_spread(x, order, place, k), self.gate_up_proj, ends).chunk(2, dim=-1)
        rows = grouped_linear(F.silu(gate) * up, self.down_proj, ends)
        return (_spread(rows, place, order, 1).view(tokens, k, x.shape[-1]) * weights[..., None]).sum(1).to(x.dtype)

    def _every_expert(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same from two products with all experts, where those not chosen have the weight 0."""
        tokens, experts = len(x), len(self.gate_up_proj)
        shares = weights.new_zeros(tokens, experts).scatter_add(1, chosen, weights)
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(1, (experts, -1)).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * shares[..., None]).flatten(1).to(x.dtype)
        return F.linear(inner, self.down_proj.transpose(0, 1).flatten(1))


class _SpreadContext(Context, Protocol):
    k: int


class _Spread(torch.autograd.Function):
    """`_spread` whose gradient reads rows too: adding them up by index is slower on a GPU, and its order is chance."""

    @staticmethod
    def forward(ctx: _SpreadContext, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx: _SpreadContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = grads[0].index_select(0, ctx.saved_tensors[0])
        return (rows if ctx.k == 1 else rows.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


def _spread(x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
    """Row order[r] // k of x [T, d] for every r, [T k, d]; `place` is the inverse of the permutation `order`."""
    if x.is_cuda:
        return cast(Tensor, _Spread.apply(x, order, place, k))
    return x.index_select(0, order // k if k > 1 else order)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x [R, d] times their experts' weights [E, n, d], to [R, n]; ends [E] int32: where each one's rows end."""
    # grouped_mm has no double and wants rows, of the output's gradient too, that are a multiple of 16 bytes.
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned:
        groups = x.tensor_split(ends[:-1].long().cpu())
        return torch.cat([F.linear(rows, w) for rows, w in zip(groups, weight.unbind(), strict=True)])
    return F.grouped_mm(x, weight.to(x.dtype).transpose(-1, -2), offs=ends)


class MoE(nn.Module):
    """A router and its experts."""

    def __init__(self, hidden: int, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = Router(hidden, num_experts, top_k)
        self.experts = Experts(hidden, width, num_experts)

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d] to the mixture [T, d], and the router's probs [T, E] and chosen [T, k]."""
        probs, chosen = self.gate(x, routes)
        return self.experts(x, chosen, routing_weights(probs, chosen)), probs, chosen


class SharedMoE(nn.Module):
    """Experts behind a `ScoreRouter`, and a shared expert that sees every token, gated by a sigmoid or not."""

    def __init__(
        self, hidden: int, width: int, routing: Routing, *, shared_width: int = 0, shared_gate: bool = False
    ) -> None:
        """`shared_width` is that of all shared experts together, 0 for none."""
        super().__init__()
        self.gate = ScoreRouter(hidden, routing)
        self.experts = Experts(hidden, width, routing.num_experts)
        self.shared_experts = SwiGLU(hidden, shared_width) if shared_width else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if shared_width and shared_gate else None

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Routed]:
        """x [T, d], routes [T, k] or None, to the mixture [T, d] and the router's decisions."""
        routed = self.gate(x, routes)
        mixture = self.experts(x, routed.chosen, routed.weights)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
            mixture = mixture + shared
        return mixture, routed


def expert_counts(chosen: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """(token, slot) pairs that went to each expert, [E] float32, over the tokens where `mask` [T] is True.

    Counts add up over micro-batches and ranks.
    """
    experts = torch.arange(num_experts, device=chosen.device)
    return ((chosen[..., None] == experts) & mask[:, None, None]).sum((0, 1)).float()


def aux_loss(probs: Tensor, mask: Tensor, counts: Tensor, num_tokens: float) -> Tensor:
    """This micro-batch's share of one layer's balance loss E * sum_e f_e P_e (arXiv 2101.03961, eq. 4-6).

    f_e is the share of the N counted tokens that chose e, summed over the k slots, P_e the mean probability of e: k
    where the load is even. probs [T, E] and mask [T] are local; counts [E] and num_tokens N those of the global
    batch, so the shares of all micro-batches and ranks add up to the loss of the batch, and their gradients too.
    Values where the mask is False do not matter.
    """
    local = torch.where(mask[:, None], probs, 0.0).sum(0)
    return len(counts) * (counts / num_tokens * (local / num_tokens)).sum()


def router_aux_loss(
    probs: Sequence[Tensor], mask: Tensor, counts: Sequence[Tensor] | Tensor, num_tokens: float
) -> Tensor:
    """The mean of `aux_loss` over layers: probs and counts have one entry a layer."""
    losses = [aux_loss(p, mask, c, num_tokens) for p, c in zip(probs, counts, strict=True)]
    return torch.stack(losses).mean()
