"""The learner: one data-parallel rank that turns packed micro-batches into an optimizer step.

    micro-batches -> policy -> logprobs -> loss * loss_weights -> backward ... -> sum over ranks -> AdamW

It knows no algorithm: the objective is a function it is given, the reduction is in the micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cispo.algorithms.objective import Objective
from cispo.errors import UserError
from cispo.files import BackgroundSave, disk_errors, load_tensors, save_tensors
from cispo.learner.loss import Columns, micro_batch_loss, read, spread, trained_logprobs
from cispo.learner.optim import Optimizer
from cispo.learner.parallel import Ranks, join, leave, release_memory, to_device
from cispo.policies.loading import load_policy, save_policy, write_policy
from cispo.policies.moe import expert_counts, router_aux_loss
from cispo.policies.policy import Policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch
from cispo.weights.buckets import BucketMessage, Transport, WeightSender
from cispo.weights.publish import publish_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLoss:
    """This rank's share of a batch's loss (the ranks' shares add up), and what the metrics are made of."""

    loss: float
    aux_loss: float
    """The router's balancing loss, before its coefficient."""
    tokens: Mapping[str, Tensor]
    """[N] over this rank's trained tokens: targets, logprobs, rollout_logprobs, versions, advantages, ratio, weight,
    entropy, old_logprobs where they are attached, and what else the objective reports."""


class ExpertLoad(NamedTuple):
    """How often each expert is chosen over the whole batch."""

    counts: Tensor
    """[layers, E]."""
    tokens: float
    """The tokens that were counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did."""

    batch: BatchLoss
    grad_norm: float
    """Over all ranks, before clipping."""
    taken: bool
    """False where the step was skipped because a gradient was not finite."""


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
        self.reference: Policy | None = None
        self._sender: WeightSender | None = None
        self._save: BackgroundSave | None = None
        if config.router_aux_coef > 0 and self.policy.router_shape == (0, 0):
            raise UserError(f"learner.router_aux_coef {config.router_aux_coef}: the policy has no experts to balance")
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forgets the optimizer's moments, as between supervised warm-up and reinforcement learning."""
        self.optimizer = Optimizer(
            self.policy.named_parameters(),
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )

    def freeze_reference(self) -> None:
        """Keeps a copy of the policy as it is now: the reference of a KL penalty."""
        reference = copy.deepcopy(self.policy)
        for parameter in reference.parameters():
            parameter.requires_grad_(False)
        self.reference = reference

    def update(self, micro_batches: Sequence[MicroBatch], objective: Objective, *, lr: float) -> UpdateResult:
        """One optimizer step on this rank's micro-batches; every rank must call it, also with none."""
        batch = self.forward_backward(micro_batches, objective)
        norm, taken = self.optimizer.step(lr, max_grad_norm=self.config.max_grad_norm)
        return UpdateResult(batch=batch, grad_norm=norm, taken=taken)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> BatchLoss:
        """Leaves the gradient of the whole batch, summed over micro-batches and ranks, in the optimizer.

        Nothing is read from the device before the last micro-batch is queued: a GPU never waits for this loop.
        """
        batches = [to_device(mb, self.ranks.device) for mb in micro_batches]
        load = self._expert_load(batches) if self.config.router_aux_coef > 0 else None
        results = [self._backward(mb, objective, load) for mb in batches]
        self.ranks.sum(self.optimizer.gradients())
        columns = [columns for _, _, columns in results]
        merged = {name: torch.cat([c[name] for c in columns]).cpu() for name in columns[0]} if columns else {}
        return BatchLoss(
            loss=_total([loss for loss, _, _ in results]),
            aux_loss=_total([aux for _, aux, _ in results if aux is not None]),
            tokens={**_given(micro_batches), **merged},
        )

    def _backward(
        self, mb: MicroBatch, objective: Objective, load: ExpertLoad | None
    ) -> tuple[Tensor, Tensor | None, Columns]:
        """One micro-batch's gradients into the optimizer; (loss, balancing loss, columns) on the device."""
        output = read(self.policy, mb)
        loss, columns = micro_batch_loss(
            output.hidden, self.policy.lm_head_weight, mb, objective, temperature=self.temperature
        )
        total, aux = loss, None
        if load is not None:
            aux = router_aux_loss([r.probs for r in output.router], self._balanced(mb), load.counts, load.tokens)
            total = loss + self.config.router_aux_coef * aux
        total.backward()
        self.optimizer.collect()
        return loss.detach(), None if aux is None else aux.detach(), columns

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch], *, reference: bool = False) -> list[Tensor]:
        """Log-probability of every trained token by policy or reference, [T] a micro-batch, 0 where masked."""
        policy = self.reference if reference else self.policy
        assert policy is not None, "freeze_reference comes first"
        batches = [to_device(mb, self.ranks.device) for mb in micro_batches]
        return [column.cpu() for column in [self._logprobs(policy, mb) for mb in batches]]

    def publish(self, folder: str, version: int) -> str | None:
        """Writes the weights where the engines read them; rank 0 returns the path, the others None."""
        if self.ranks.rank > 0:
            return None
        return str(publish_weights(self.policy.to_hf(), folder, version))

    @property
    def sender(self) -> WeightSender:
        """Buckets of the weights as they are; its buffer is as large as a bucket."""
        if self._sender is None:
            self._sender = WeightSender(self.policy.to_hf())
        return self._sender

    def num_buckets(self) -> int:
        return len(self.sender.buckets)

    def stage_bucket(self, number: int, transport: Transport, *, check: bool) -> BucketMessage:
        return self.sender.stage(number, transport, check=check)

    def open_weight_group(self, world: int) -> str:
        """Opens the group over which the weights go to the engines; returns its address."""
        return self.sender.open_group(self.ranks.host, world)

    def join_weight_group(self) -> None:
        self.sender.join_group()

    def broadcast_bucket(self, number: int) -> None:
        self.sender.broadcast(number)

    def release_memory(self) -> None:
        """Gives what the allocator keeps back to the device, for engines that wake up."""
        release_memory(self.ranks.device)

    def save(self, folder: str) -> None:
        """Writes the policy in Hugging Face form."""
        save_policy(self.policy, folder)

    def start_save(self, folder: str) -> None:
        """Copies policy and optimizer as they are now; a thread writes them while training goes on.

        The ranks hold the same, so one of them saves.
        """
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.policy.to_hf().items()}
        config, state = self.policy.hf_config(), self.optimizer.state()

        def write() -> None:
            with disk_errors(Path(folder)):
                write_policy(weights, config, folder)
            save_tensors(state, Path(folder) / "training" / "learner.safetensors")

        self._save = BackgroundSave(write)

    def saved(self, *, wait: bool) -> bool:
        """Whether what `start_save` began is written. Raises RunError where the disk refused."""
        return self._save is None or self._save.done(wait=wait)

    def restore(self, checkpoint: str) -> None:
        """Takes the optimizer from a checkpoint, whose policy is loaded already."""
        self.optimizer.restore(load_tensors(Path(checkpoint) / "training" / "learner.safetensors"))

    def load_reference(self, folder: str) -> None:
        """Takes the reference policy from where `save` wrote it."""
        self.freeze_reference()
        assert self.reference is not None
        self.reference.load_hf(load_policy(folder, dtype=next(self.policy.parameters()).dtype).to_hf().items())

    def close(self) -> None:
        leave(self.ranks)

    def _logprobs(self, policy: Policy, mb: MicroBatch) -> Tensor:
        """[T]: 0 where masked."""
        hidden = read(policy, mb).hidden
        return spread(trained_logprobs(hidden, policy.lm_head_weight, mb, temperature=self.temperature)[0], mb)

    def _balanced(self, mb: MicroBatch) -> Tensor:
        """[T] bool: the tokens that the balancing loss counts."""
        return mb.loss_mask if self.config.router_aux_tokens == "completion" else torch.ones_like(mb.loss_mask)

    @torch.no_grad()
    def _expert_load(self, batches: Sequence[MicroBatch]) -> ExpertLoad:
        """The load of the whole batch, over all ranks.

        The balancing loss needs it before the first backward pass, hence a forward pass of its own.
        """
        layers, experts = self.policy.router_shape
        counts = torch.zeros(layers, experts + 1, device=self.ranks.device)
        for mb in batches:
            mask = self._balanced(mb)
            router = read(self.policy, mb).router
            counts[:, :-1] += torch.stack([expert_counts(r.chosen, mask, experts) for r in router])
            counts[:, -1] += mask.sum()
        self.ranks.sum([counts])
        return ExpertLoad(counts[:, :-1], max(float(counts[0, -1]), 1.0))


def _given(micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """[N] each: what came with the trained tokens, from where it still lies."""
    names = ["targets", "rollout_logprobs", "versions", "advantages"]
    if any(mb.old_logprobs is not None for mb in micro_batches):
        names.append("old_logprobs")
    if not micro_batches:
        return {}
    return {
        name: torch.cat([getattr(mb, name).index_select(0, mb.loss_index) for mb in micro_batches]) for name in names
    }


def _total(losses: Sequence[Tensor]) -> float:
    """The sum of scalars, read from the device at once."""
    return float(torch.stack(list(losses)).double().sum()) if losses else 0.0
