"""Experts distributed over ranks: expert parallelism (ep) and expert tensor parallelism (etp).

    x [T, d] of every rank --to the ranks that hold its experts--> rows --two grouped products--> rows --back--> [T, d]

A set of experts is held by ep x etp ranks, of which each has E / ep experts and 1 / etp of their width I: gate and up
are cut apart, and the down projections' results are partial sums. The tokens of all of them meet the same experts, so
the backward pass brings each expert the gradient of the whole set's tokens; sets (edp) are summed by FSDP.

Tokens travel in one of two forms (P = ep, G = ep x etp, n tokens a rank, k chosen):

    gather      every rank gets all tokens, parts of the mixture are summed at home     2 n d (G - 1)       where P <= k
    exchange    a row goes to the holders of its expert, results come back              2 n k d (G - 1) / P   else

Rows of an expert come in the order of ranks and tokens, so the products are those of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.learner.parallel import Mesh
from cispo.learner.rows import WidthShare, set_share
from cispo.ops.ragged import exchange_rows, gather_counts, gather_rows, sum_rows
from cispo.policies.moe import Experts, grouped_linear


class SplitExperts(Experts):
    """One rank's share of a layer's experts: gate_up_proj [E / ep, 2I / etp, d] and down_proj [E / ep, d, I / etp].

    All ranks of a set call it together, each with its own tokens, also none.
    """

    def __init__(self, whole: Experts, mesh: Mesh) -> None:
        """Takes shapes, number format and device from `whole`, no values."""
        nn.Module.__init__(self)
        assert mesh.experts is not None, "the mesh has no axes for experts"
        self.group = mesh.experts
        self.ep, self.etp = mesh.ep, mesh.etp
        self.num_experts, double, hidden = whole.gate_up_proj.shape
        self.per_rank = self.num_experts // mesh.ep
        self.first = mesh.ep_rank * self.per_rank
        self.shares = {
            "gate_up_proj": WidthShare(axis=1, part=mesh.etp_rank, parts=mesh.etp, blocks=2),
            "down_proj": WidthShare(axis=2, part=mesh.etp_rank, parts=mesh.etp),
        }
        trained = whole.gate_up_proj.requires_grad
        up = whole.gate_up_proj.new_empty(self.per_rank, double // mesh.etp, hidden)
        down = whole.down_proj.new_empty(self.per_rank, hidden, double // 2 // mesh.etp)
        self.gate_up_proj, self.down_proj = nn.Parameter(up, trained), nn.Parameter(down, trained)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over k of weights[t, k] * expert[chosen[t, k]](x[t]): x [T, d], chosen and weights [T, k], to [T, d]."""
        choices = chosen.new_zeros(self.num_experts)
        choices.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        counts = gather_counts(choices, self.group)
        form = self._by_gather if self.ep <= chosen.shape[1] else self._by_exchange
        return form(x, chosen, weights, counts, counts.tolist())

    def _by_gather(
        self, x: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor, on_host: Sequence[Sequence[int]]
    ) -> Tensor:
        k = chosen.shape[1]
        sizes = [sum(by_expert) // k for by_expert in on_host]
        tokens, shares = gather_rows(x, sizes, self.group), gather_rows(weights, sizes, self.group)
        local = gather_rows(chosen, sizes, self.group).flatten() - self.first
        rows = sum(sum(by_expert[self.first : self.first + self.per_rank]) for by_expert in on_host)
        own = (local >= 0) & (local < self.per_rank)
        # Choices of other ranks' experts are sorted to the end and cut off.
        order = torch.where(own, local, self.per_rank).sort(stable=True).indices[:rows]
        token = order // k
        results = self._products(tokens.index_select(0, token), self._ends(counts))
        results = results * shares.flatten().index_select(0, order)[:, None]
        mixture = results.new_zeros(len(tokens), x.shape[1]).index_add(0, token, results)
        return sum_rows(mixture.to(x.dtype), sizes, self.group)

    def _by_exchange(
        self, x: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor, on_host: Sequence[Sequence[int]]
    ) -> Tensor:
        tokens, k = chosen.shape
        order = chosen.flatten().sort(stable=True).indices
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        own = on_host[self.group.rank]
        blocks = [sum(own[first : first + self.per_rank]) for first in range(0, self.num_experts, self.per_rank)]
        sent = [block for block in blocks for _ in range(self.etp)]
        received = [sum(by_expert[self.first : self.first + self.per_rank]) for by_expert in on_host]
        rows = x.index_select(0, order // k)
        if self.etp > 1:  # each of an expert's holders needs its rows
            rows = torch.cat([block for block in rows.split(blocks) for _ in range(self.etp)])
        rows = exchange_rows(rows, sent, received, self.group)
        # From (source, expert) to (expert, source), and back.
        experts = torch.arange(self.per_rank, device=x.device).repeat(len(on_host))
        held = counts[:, self.first : self.first + self.per_rank].flatten()
        by_expert = experts.repeat_interleave(held, output_size=sum(received)).sort(stable=True).indices
        back = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(by_expert), device=x.device))
        results = self._products(rows.index_select(0, by_expert), self._ends(counts)).index_select(0, back)
        results = exchange_rows(results, received, sent, self.group)
        if self.etp > 1:
            results = torch.cat([_sum_of(part, self.etp) for part in results.split([n * self.etp for n in blocks])])
        return (results.index_select(0, place).view(tokens, k, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)

    def _ends(self, counts: Tensor) -> Tensor:
        """[E / ep] int32: where the rows of each of this rank's experts end; counts [ranks, E]."""
        return counts[:, self.first : self.first + self.per_rank].sum(0).cumsum(0).int()

    def _products(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Rows [R, d] in the order of their experts to the experts' results, with etp this rank's share of them."""
        count = len(rows)
        if count == 0:  # a kernel need not take a product without rows; the gradients are zeros
            rows, ends = F.pad(rows, (0, 0, 0, 1)), torch.ones_like(ends)
        gate, up = grouped_linear(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends)[:count]


def _sum_of(x: Tensor, parts: int) -> Tensor:
    """[parts * n, d] to the sum [n, d] of the parts, added in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.view(parts, -1, x.shape[1]).sum(0, dtype=wide).to(x.dtype)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(name, experts) of every MoE layer, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


def check_expert_axes(model: nn.Module, ep: int, etp: int) -> None:
    """Raises UserError where ep ranks cannot share the model's experts evenly, or etp ranks their width."""
    if ep * etp == 1:
        return
    found = list(experts_of(model))
    if not found:
        key = f"expert_parallel {ep}" if ep > 1 else f"expert_tensor_parallel {etp}"
        raise UserError(f"learner.{key}: the policy has no experts to distribute")
    for _, experts in found:
        count, width = len(experts.gate_up_proj), experts.down_proj.shape[-1]
        if count % ep:
            raise UserError(f"learner.expert_parallel {ep} does not divide the {count} experts of a layer")
        if width % etp:
            raise UserError(f"learner.expert_tensor_parallel {etp} does not divide the experts' width {width}")


def split_experts(model: nn.Module, mesh: Mesh) -> list[SplitExperts]:
    """Replaces the experts of every MoE layer of a model on the meta device by this rank's share of them."""
    if mesh.expert_ranks == 1:
        return []
    check_expert_axes(model, mesh.ep, mesh.etp)
    replaced = {name: SplitExperts(experts, mesh) for name, experts in list(experts_of(model))}
    for name, experts in replaced.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).register_module(own, experts)
    return list(replaced.values())


def mark_shares(experts: Sequence[SplitExperts]) -> None:
    """Notes on every parameter the part of the width that it has, once its memory is given."""
    for module in experts:
        for name, share in module.shares.items():
            set_share(module.get_parameter(name), share)
