"""The learner: one data-parallel rank that turns packed micro-batches into an optimizer step.

    micro-batches -> policy -> logprobs -> loss * loss_weights -> backward ... -> sum over ranks -> AdamW

It knows no algorithm: the loss is a function it is given, the reduction is in the micro-batches. A critic would be a
second group of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cispo.algorithms.losses import LossFn
from cispo.config import Learner as LearnerConfig
from cispo.learner.optim import Optimizer
from cispo.learner.parallel import Ranks, join, leave
from cispo.ops.logprobs import token_logprobs
from cispo.policies.base import PolicyOutput, RouterOutput, load_policy, save_policy
from cispo.policies.moe import aux_loss, expert_counts
from cispo.types import LossInputs, MicroBatch
from cispo.weight_sync import publish_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update did: scalars of the step, and per-token values of this rank's trained tokens for the metrics."""

    grad_norm: float
    taken: bool
    """False where the step was skipped because a gradient was not finite."""
    loss: float
    """This rank's share of the loss (the ranks' shares add up)."""
    aux_loss: float
    """This rank's share of the router's balancing loss, before its coefficient."""
    tokens: Mapping[str, Tensor]
    """[N] each: logprobs, old_logprobs, rollout_logprobs, advantages, ratio, weight, entropy."""


class Learner:
    """One rank: a whole copy of the policy, its optimizer, and the verbs of the training loop."""

    def __init__(
        self,
        folder: str,
        config: LearnerConfig,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        temperature: float = 1.0,
        rank: int = 0,
        world: int = 1,
        address: str = "",
    ) -> None:
        self.config = config
        self.temperature = temperature
        self.ranks: Ranks = join(rank=rank, world=world, device=torch.device(device), address=address)
        self.policy = load_policy(folder, dtype=getattr(torch, dtype)).to(self.ranks.device)
        self.policy.gradient_checkpointing = config.gradient_checkpointing
        self.policy.train()
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forgets the optimizer's moments, as between supervised warm-up and reinforcement learning."""
        self.optimizer = Optimizer(
            list(self.policy.parameters()),
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFn,
        settings: Mapping[str, float | None],
        *,
        lr: float,
        anchor: Literal["rollout", "old"] = "rollout",
    ) -> UpdateResult:
        """One optimizer step on this rank's micro-batches; every rank must call it, also with none.

        The ratio divides by the micro-batches' old_logprobs or rollout_logprobs, as `anchor` says.
        """
        batches = [self._here(mb) for mb in micro_batches]
        counts = self._global_expert_counts(batches) if self.config.router_aux_coef > 0 else None
        total, total_aux, tokens = 0.0, 0.0, []
        for mb in batches:
            output, logprobs, entropy = self._forward(mb)
            old = mb.rollout_logprobs if anchor == "rollout" else mb.old_logprobs
            assert old is not None, "old_logprobs are not attached"
            result = loss(_loss_inputs(mb, logprobs, old), **settings)
            value = (result.loss * mb.loss_weights).sum()
            if counts is not None:
                aux = self._aux_loss(output.router, mb, counts)
                total_aux += float(aux.detach())
                value = value + self.config.router_aux_coef * aux
            value.backward()
            self.optimizer.collect()
            total += float(value.detach())
            columns = {
                "logprobs": logprobs.detach(),
                "old_logprobs": old,
                "rollout_logprobs": mb.rollout_logprobs,
                "advantages": mb.advantages,
                "ratio": result.ratio,
                "weight": result.weight,
                "entropy": entropy,
            }
            tokens.append({name: column[mb.loss_mask].cpu() for name, column in columns.items()})
        self.ranks.sum(self.optimizer.gradients())
        norm, taken = self.optimizer.step(lr, max_grad_norm=self.config.max_grad_norm)
        merged = {name: torch.cat([t[name] for t in tokens]) for name in tokens[0]} if tokens else {}
        return UpdateResult(grad_norm=norm, taken=taken, loss=total, aux_loss=total_aux, tokens=merged)

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The policy's log-probability of every trained token, [T] a micro-batch, 0 where masked."""
        return [self._forward(self._here(mb))[1].cpu() for mb in micro_batches]

    def publish(self, folder: str, version: int) -> str | None:
        """Writes the weights where the engines read them; rank 0 returns the path, the others None."""
        if self.ranks.rank > 0:
            return None
        return str(publish_weights(self.policy.to_hf(), folder, version))

    def save(self, folder: str) -> None:
        """Writes the policy in Hugging Face form (rank 0)."""
        if self.ranks.rank == 0:
            save_policy(self.policy, Path(folder))

    def close(self) -> None:
        leave(self.ranks)

    def _forward(self, mb: MicroBatch) -> tuple[PolicyOutput, Tensor, Tensor]:
        """(policy output, logprobs [T], entropy [T]); the LM head runs for trained tokens only."""
        output = self.policy(mb.tokens, mb.positions, mb.cu_seqlens)
        picked, entropies = token_logprobs(
            output.hidden[mb.loss_mask],
            self.policy.lm_head_weight,
            mb.targets[mb.loss_mask],
            temperature=self.temperature,
        )
        zeros = picked.new_zeros(mb.tokens.shape[0])
        return output, zeros.masked_scatter(mb.loss_mask, picked), zeros.masked_scatter(mb.loss_mask, entropies)

    def _here(self, mb: MicroBatch) -> MicroBatch:
        if self.ranks.device.type == "cpu":
            return mb
        moved = {name: getattr(mb, name) for name in mb.__slots__}
        return MicroBatch(**{k: v if v is None else v.to(self.ranks.device) for k, v in moved.items()})

    def _balanced(self, mb: MicroBatch) -> Tensor:
        """[T] bool: the tokens that the balancing loss counts."""
        return mb.loss_mask if self.config.router_aux_tokens == "completion" else torch.ones_like(mb.loss_mask)

    @torch.no_grad()
    def _global_expert_counts(self, batches: Sequence[MicroBatch]) -> Tensor:
        """How often each expert is chosen over the whole batch, [layers, E + 1]; the last column is the tokens counted.

        The balancing loss needs the global counts before the first backward pass, hence a forward pass of its own.
        """
        layers = [
            [
                torch.cat([expert_counts(r.chosen, self._balanced(mb), r.probs.shape[1]), self._balanced(mb).sum()[None]])
                for r in self.policy(mb.tokens, mb.positions, mb.cu_seqlens).router
            ]
            for mb in batches
        ]
        counts = torch.zeros(self.policy.num_router_layers, self.policy.num_experts + 1, device=self.ranks.device)
        for layer in layers:
            counts += torch.stack(layer)
        self.ranks.sum([counts])
        return counts

    def _aux_loss(self, router: Sequence[RouterOutput], mb: MicroBatch, counts: Tensor) -> Tensor:
        """This micro-batch's share of the balancing loss, averaged over the layers."""
        mask = self._balanced(mb)
        shares = [
            aux_loss(r.probs, mask, count[:-1], float(count[-1].clamp(min=1)))
            for r, count in zip(router, counts, strict=True)
        ]
        return torch.stack(shares).mean()


def _loss_inputs(mb: MicroBatch, logprobs: Tensor, old: Tensor) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=mb.rollout_logprobs,
        advantages=mb.advantages,
        mask=mb.loss_mask,
        cu_seqlens=mb.cu_seqlens,
        ref_logprobs=mb.ref_logprobs,
    )
