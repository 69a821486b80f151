"""The learner: one data-parallel rank that turns packed micro-batches into an optimizer step.

    micro-batches -> policy -> logprobs -> loss * loss_weights -> backward ... -> sum over ranks -> AdamW

It knows no algorithm: the objective is a function it is given, the reduction is in the micro-batches.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cispo.algorithms.objective import Objective
from cispo.errors import UserError
from cispo.files import disk_errors
from cispo.learner.adapters import Adapters, freeze_adapter
from cispo.learner.export import Export
from cispo.learner.heads import Predictions, copy_of_trunk, heads_loss
from cispo.learner.loss import micro_batch_loss, read, read_for_loss, spread, trained_logprobs
from cispo.learner.offload import HostPolicy
from cispo.learner.parallel import join, shards
from cispo.learner.rank import Rank, total, trainable_policy
from cispo.learner.sharding import copy_rows, fill_from, sharded_policy
from cispo.policies.loading import config_of, load_policy, save_policy, shape_of
from cispo.policies.lora import AdaptedPolicy
from cispo.policies.moe import balance_biases, correction_biases, expert_counts, router_aux_loss
from cispo.policies.policy import HFConfig, Policy, RouterOutput
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch, TokenStats
from cispo.weights.buckets import BucketMessage, Transport, WeightSender


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLoss:
    """One rank's share of a batch's loss (the ranks' shares add up), with the tokens it is made of."""

    loss: float
    aux_loss: float
    """The router's balancing loss, before its coefficient."""
    tokens: TokenStats | None
    """This rank's trained tokens; None where it had no micro-batch."""
    predictions: Predictions | None = None
    """Of heads of multi-token prediction; None where none is trained. Their loss is not part of `loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """One rank's report of an optimizer step."""

    batch: BatchLoss
    grad_norm: float
    """Over all ranks, before clipping."""
    taken: bool
    """False where the step was skipped because a gradient was not finite."""


class ExpertLoad(NamedTuple):
    """Choices of each expert over the whole batch."""

    counts: Tensor
    """[layers, E]: (token, slot) pairs."""
    tokens: float
    """Tokens that were counted."""


class MicroBatchLoss(NamedTuple):
    """One micro-batch's losses and trained tokens, on the device and without gradient."""

    loss: Tensor
    aux_loss: Tensor | None
    tokens: TokenStats
    counts: Tensor | None = None
    """[layers, E]: (token, slot) pairs of each expert, where correction biases are balanced."""
    predictions: Tensor | None = None
    """[3]: sums of `Predictions`, where heads are trained."""


def prepare(gpu: bool, folder: str | None, config: HFConfig | None) -> None:
    """The imports of a rank, those of the family of the policy in `folder` or of `config` included."""
    if gpu:
        torch.zeros(1, device="cuda")  # makes the context
        importlib.import_module("torch._dynamo")  # recomputed layers import it in their first pass
    if folder is not None:
        config = config_of(folder)
    if config is not None:
        shape_of({"vocab_size": 1, **config})


class Learner:
    """One rank: the policy or its rows of it, its optimizer, and the verbs of the training loop."""

    def __init__(
        self,
        folder: str,
        config: LearnerConfig,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        temperature: float = 1.0,
        adapters: Adapters | None = None,
        heads: bool = False,
        rank: int = 0,
        world: int = 1,
        address: str = "",
    ) -> None:
        """With `heads` the policy's heads of multi-token prediction are trained too, but for `adapters`, which leave
        them as they are."""
        self.config, self.temperature = config, temperature
        shard = shards(config.shard, ranks=world, device=device, expert_ranks=config.expert_ranks)
        axes = {"cp": config.context_parallel, "ep": config.expert_parallel, "etp": config.expert_tensor_parallel}
        mesh = join(rank=rank, world=world, device=torch.device(device), address=address, shard=shard, **axes)
        self.policy = trainable_policy(folder, config, mesh, dtype, adapters, heads=heads)
        self.reference: Policy | None = None
        self._reference_home: HostPolicy | None = None
        self.export = Export(self.policy, mesh, dtype, folder)
        self._folder = folder
        if config.router_aux_coef > 0 and self.policy.router_shape == (0, 0):
            raise UserError(f"learner.router_aux_coef {config.router_aux_coef}: the policy has no experts to balance")
        self._biases = correction_biases(self.policy) if config.router_bias_rate > 0 else []
        if config.router_bias_rate > 0 and not self._biases:
            raise UserError(f"learner.router_bias_rate {config.router_bias_rate}: no router of the policy has a bias")
        self.rank = Rank(self.policy, config, mesh, state="learner", dtype=dtype)

    # Training

    def update(self, micro_batches: Sequence[MicroBatch], objective: Objective, *, lr: float) -> UpdateResult:
        """One optimizer step on this rank's micro-batches; every rank must call it, with as many."""
        batch, counts = self._forward_backward(micro_batches, objective)
        norm, taken = self.rank.step(lr)
        if taken and counts is not None:
            balance_biases(self._biases, counts, self.config.router_bias_rate)
        return UpdateResult(batch=batch, grad_norm=norm, taken=taken)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> BatchLoss:
        """Leaves the gradient of the whole batch, summed over micro-batches and ranks, in the optimizer.

        Nothing is read from the device before the last micro-batch is queued: a GPU never waits for this loop.
        """
        return self._forward_backward(micro_batches, objective)[0]

    def _forward_backward(
        self, micro_batches: Sequence[MicroBatch], objective: Objective
    ) -> tuple[BatchLoss, Tensor | None]:
        """The share of the loss, and the choices of each expert over the whole batch where biases are balanced."""
        batches = self.rank.to_device(micro_batches)
        load = self._expert_load(batches) if self.config.router_aux_coef > 0 else None
        results = self.rank.backward(batches, lambda mb: self._loss(mb, objective, load))
        batch = BatchLoss(
            loss=total([result.loss for result in results]),
            aux_loss=total([result.aux_loss for result in results if result.aux_loss is not None]),
            tokens=TokenStats.concat([result.tokens for result in results]) if results else None,
            predictions=Predictions.of([result.predictions for result in results]) if self.rank.heads else None,
        )
        if not self._biases:
            return batch, None
        counts = torch.zeros(*self.policy.router_shape, device=self.rank.mesh.device)
        for result in results:
            assert result.counts is not None
            counts += result.counts
        self.rank.mesh.sum([counts])
        return batch, counts

    def _loss(self, mb: MicroBatch, objective: Objective, load: ExpertLoad | None) -> tuple[Tensor, MicroBatchLoss]:
        """One micro-batch's loss, those of balance and heads included, and its parts."""
        with self.rank.activations():
            output, extra = read_for_loss(self.policy, mb, self.rank.mesh.context)
            options = {"temperature": self.temperature, "group": self.rank.mesh.context}
            heads = heads_loss(self.policy, output.hidden, mb, **options) if self.rank.heads else None
        head = self.policy.lm_head_weight
        loss, tokens = micro_batch_loss(output.hidden, head, mb, objective, **options)
        tokens = replace(tokens, extra={**tokens.extra, **extra})
        counts = self._counts(output.router, mb) if self._biases else None
        result = MicroBatchLoss(loss.detach(), None, tokens, counts)
        if load is not None:
            aux = router_aux_loss([r.probs for r in output.router], self._balanced(mb), load.counts, load.tokens)
            loss, result = loss + self.config.router_aux_coef * aux, result._replace(aux_loss=aux.detach())
        if heads is None:
            return loss, result
        # They have no parameter in common, so that a sum leaves each its gradient.
        return loss + heads.loss, result._replace(predictions=heads.sums)

    def _counts(self, router: Sequence[RouterOutput], mb: MicroBatch) -> Tensor:
        """[layers, E]: choices of each expert by the tokens that are balanced."""
        mask, experts = self._balanced(mb), self.policy.router_shape[1]
        return torch.stack([expert_counts(r.chosen, mask, experts) for r in router])

    @torch.no_grad()
    def _expert_load(self, batches: Sequence[MicroBatch]) -> ExpertLoad:
        """The load of the whole batch, over all ranks.

        The balancing loss needs it before the first backward pass, hence a forward pass of its own.
        """
        layers, experts = self.policy.router_shape
        counts = torch.zeros(layers, experts + 1, device=self.rank.mesh.device)
        for mb in batches:
            counts[:, :-1] += self._counts(read(self.policy, mb, self.rank.mesh.context).router, mb)
            counts[:, -1] += self._balanced(mb).sum()
        self.rank.mesh.sum([counts])
        return ExpertLoad(counts[:, :-1], max(float(counts[0, -1]), 1.0))

    def _balanced(self, mb: MicroBatch) -> Tensor:
        """[T] bool: the tokens that the balancing loss counts."""
        every = self.config.router_aux_tokens == "all" and not mb.stand_in
        return torch.ones_like(mb.loss_mask) if every else mb.loss_mask

    def reset_optimizer(self) -> None:
        """Drops the optimizer's moments, as between supervised warm-up and reinforcement learning."""
        self.rank.reset_optimizer()

    # Log-probabilities

    def logprobs(self, micro_batches: Sequence[MicroBatch], *, reference: bool = False) -> list[Tensor]:
        """Log-probability of every trained token by policy or reference, [T] a micro-batch, 0 where masked.

        The reference's routers choose for themselves: the engine's experts are the policy's.
        """
        if reference and isinstance(self.policy, AdaptedPolicy):
            with self.policy.as_frozen():
                return self.logprobs([replace(mb, routes=None) for mb in micro_batches])
        policy = self.reference if reference else self.policy
        assert policy is not None, "freeze_reference comes first"
        if reference:
            micro_batches = [replace(mb, routes=None) for mb in micro_batches]
        batches = self.rank.to_device(micro_batches)
        home = self._reference_home if reference else None
        with nullcontext() if home is None else home.on_device():
            return self.rank.forward(batches, lambda mb: self._logprobs(policy, mb), model=policy)

    def _logprobs(self, policy: Policy, mb: MicroBatch) -> Tensor:
        """[T]: 0 where masked."""
        hidden = read(policy, mb, self.rank.mesh.context).hidden
        return spread(trained_logprobs(hidden, policy.lm_head_weight, mb, temperature=self.temperature)[0], mb)

    def freeze_reference(self) -> None:
        """Copies the current policy as the reference of a KL penalty; of one with an adapter, the adapter."""
        if isinstance(self.policy, AdaptedPolicy):
            return freeze_adapter(self.policy)
        if self.rank.sharded:
            reference = self._empty_reference()
            copy_rows(self.policy, reference, self.rank.mesh)
        else:
            reference = copy_of_trunk(self.policy)
        self._keep_reference(reference)

    def load_reference(self, folder: str) -> None:
        """Reads the reference policy from a folder that `save` wrote."""
        if isinstance(self.policy, AdaptedPolicy):
            return freeze_adapter(self.policy, folder)
        if self.rank.sharded:
            reference = self._empty_reference()
            fill_from(reference, folder, self.rank.mesh, self.rank.number_format)
        else:
            reference = copy_of_trunk(self.policy)
            reference.load_hf(load_policy(folder, dtype=next(self.policy.parameters()).dtype).to_hf().items())
        self._keep_reference(reference)

    def _keep_reference(self, reference: Policy) -> None:
        self.reference, self.rank.has_reference = reference, True
        offloaded = "reference" in self.config.offload
        self._reference_home = HostPolicy(reference, self.rank.mesh.device) if offloaded else None

    def _empty_reference(self) -> Policy:
        """A split policy without gradient, with undefined weights: FSDP's modules cannot be copied."""
        return sharded_policy(self._folder, self.rank.mesh, self.rank.number_format, trained=False).train()

    # Weights to the engines; of a sharded policy every rank calls `publish` and `stage_bucket`

    def publish(self, folder: str, version: int) -> str:
        """Writes the weights to a file that engines read; returns its path."""
        return self.export.publish(folder, version)

    @property
    def sender(self) -> WeightSender:
        """The current weights in buckets, staged in one buffer of a bucket's size."""
        return self.export.sender

    def num_buckets(self) -> int:
        return len(self.sender.buckets)

    def stage_bucket(self, number: int, transport: Transport, *, check: bool) -> BucketMessage:
        with self.rank.mesh.doing(f"the gather of bucket {number + 1} of {self.num_buckets()}"):
            return self.sender.stage(number, transport, check=check)

    def open_weight_group(self, world: int) -> str:
        """Opens the process group of learner and engines for weights; returns its address."""
        return self.sender.open_group(self.rank.mesh.host, world)

    def join_weight_group(self) -> None:
        self.sender.join_group()

    def broadcast_bucket(self, number: int) -> None:
        self.sender.broadcast(number)

    # Checkpoints, and the end

    def save(self, folder: str) -> None:
        """Writes the policy in Hugging Face form. Raises RunError where the disk refuses."""
        if self.rank.sharded or isinstance(self.policy, AdaptedPolicy):
            self.export.copy()(Path(folder))
            return
        with disk_errors(Path(folder)):
            save_policy(self.policy, folder)

    def start_save(self, folder: str, *, full: bool = True) -> None:
        """Copies policy (in Hugging Face form) and, of a `full` checkpoint, optimizer; a thread writes them meanwhile.

        A rank that holds the same as rank 0 writes nothing.
        """
        if self.rank.writes:
            self.rank.start_save(folder, partial(self.export.copy(), Path(folder)), full=full)

    def saved(self, *, wait: bool) -> bool:
        """Whether the files of `start_save` are complete. Raises RunError where the disk refused them."""
        return self.rank.saved(wait=wait)

    def restore(self, checkpoint: str, *, full: bool = True) -> None:
        """Reads the optimizer from a `full` checkpoint; its policy is loaded by the constructor."""
        self.rank.restore(checkpoint, full=full)

    def waiting_in(self) -> str:
        """The step with collectives that is open, with its age; may be called while another call runs."""
        return self.rank.mesh.waiting_in()

    def release_memory(self) -> None:
        """Returns cached memory to the device, for engines that wake up."""
        self.rank.mesh.release_memory()

    def close(self) -> None:
        self.rank.mesh.leave()
