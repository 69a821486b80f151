"""The critic: one data-parallel rank of PPO's value function.

micro-batches -> backbone and value head -> clipped value loss -> sum over ranks -> AdamW
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cispo.algorithms.losses import value_loss
from cispo.learner.adapters import Adapters, base_folder, load_published, start_adapter
from cispo.learner.loss import attention_of
from cispo.learner.parallel import join, shards
from cispo.learner.rank import Rank, total, trainable_policy
from cispo.learner.sharding import fill, sharded_value_model
from cispo.policies.lora import AdaptedPolicy
from cispo.policies.value import ValueModel
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch
from cispo.weights.publish import mapped_slices, mapped_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticResult:
    """One rank's report of an optimizer step."""

    loss: float
    """This rank's share; the ranks' shares add up."""
    grad_norm: float
    taken: bool
    """False where the step was skipped because a gradient was not finite."""


class Critic:
    """One rank: a value model on a backbone of its own."""

    def __init__(
        self,
        folder: str,
        config: CriticConfig,
        learner: LearnerConfig,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        adapters: Adapters | None = None,
        rank: int = 0,
        world: int = 1,
        address: str = "",
    ) -> None:
        self.value_clip = config.value_clip
        shard = shards(learner.shard, ranks=world, device=device, expert_ranks=learner.expert_ranks)
        axes = {"cp": learner.context_parallel, "ep": learner.expert_parallel, "etp": learner.expert_tensor_parallel}
        mesh = join(rank=rank, world=world, device=torch.device(device), address=address, shard=shard, **axes)
        if shard:
            base, lora = (folder, None) if adapters is None else (base_folder(folder), adapters.lora)
            self.model = sharded_value_model(base, mesh, getattr(torch, dtype), lora)
            if adapters is not None:
                start_adapter(self.model.backbone, folder, adapters)
            self.model.backbone.gradient_checkpointing = learner.recomputes
        else:
            self.model = ValueModel(trainable_policy(folder, learner, mesh, dtype, adapters)).to(mesh.device)
        self.model.train()
        self.rank = Rank(self.model, learner, mesh, state="critic", dtype=dtype, with_model=True)

    def load_backbone(self, path: str) -> None:
        """Takes the policy's published weights as the backbone: a critic starts from the policy after its warm-up."""
        if isinstance(self.model.backbone, AdaptedPolicy):
            load_published(self.model.backbone, path)
        elif self.rank.sharded:
            fill(self.model.backbone, mapped_slices(path), self.rank.mesh, self.rank.number_format)
        else:
            self.model.backbone.load_hf(mapped_weights(path))
        self.rank.optimizer.reload_masters()

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """V of the state in which each trained token was sampled, [T] a micro-batch, 0 where masked."""
        batches = self.rank.to_device(micro_batches)
        return self.rank.forward(batches, lambda mb: torch.where(mb.loss_mask, self._values(mb), 0.0))

    def update(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> CriticResult:
        """One optimizer step on this rank's micro-batches; every rank must call it, with as many."""
        losses = self.rank.backward(self.rank.to_device(micro_batches), self._loss)
        norm, taken = self.rank.step(lr)
        return CriticResult(loss=total(losses), grad_norm=norm, taken=taken)

    def start_save(self, folder: str, *, full: bool = True) -> None:
        """Copies value model and, of a `full` checkpoint, optimizer; a thread writes them."""
        self.rank.start_save(folder, full=full)

    def saved(self, *, wait: bool) -> bool:
        return self.rank.saved(wait=wait)

    def restore(self, checkpoint: str, *, full: bool = True) -> None:
        """Reads value model and, of a `full` checkpoint, optimizer."""
        self.rank.restore(checkpoint, full=full)

    def waiting_in(self) -> str:
        """The step with collectives that is open, with its age; may be called while another call runs."""
        return self.rank.mesh.waiting_in()

    def release_memory(self) -> None:
        self.rank.mesh.release_memory()

    def close(self) -> None:
        self.rank.mesh.leave()

    def _loss(self, mb: MicroBatch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, with and without gradient."""
        assert mb.values is not None and mb.returns is not None, "values and returns are not attached"
        with self.rank.activations():
            values = self._values(mb)
        losses = value_loss(values, mb.values, mb.returns, mb.loss_mask, clip=self.value_clip)
        loss = (losses * mb.loss_weights).sum()
        return loss, loss.detach()

    def _values(self, mb: MicroBatch) -> Tensor:
        attention = attention_of(mb, self.rank.mesh.context, share_prompts=False)
        return self.model(mb.tokens, mb.positions, mb.cu_seqlens, mb.max_seqlen, attention)
