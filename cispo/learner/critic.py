"""The critic: the learner's twin for PPO's value function, one data-parallel rank of it.

micro-batches -> backbone and value head -> clipped value loss -> sum over ranks -> AdamW
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cispo.algorithms.losses import value_loss
from cispo.files import BackgroundSave, load_tensors, save_tensors
from cispo.learner.optim import Optimizer
from cispo.learner.parallel import join, leave, release_memory, to_device
from cispo.policies.loading import load_policy
from cispo.policies.value import ValueModel
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch
from cispo.weights.publish import mapped_weights

# Before the names of the value model's own tensors in a checkpoint.
_MODEL = "model/"


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticResult:
    """What one optimizer step of the critic did."""

    loss: float
    """This rank's share; the ranks' shares add up."""
    grad_norm: float
    taken: bool


class Critic:
    """One rank: a value model on a backbone of its own, and its optimizer."""

    def __init__(
        self,
        folder: str,
        config: CriticConfig,
        learner: LearnerConfig,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        rank: int = 0,
        world: int = 1,
        address: str = "",
    ) -> None:
        self.config = config
        self.max_grad_norm = learner.max_grad_norm
        self._save: BackgroundSave | None = None
        self.ranks = join(rank=rank, world=world, device=torch.device(device), address=address)
        backbone = load_policy(folder, dtype=getattr(torch, dtype)).to(self.ranks.device)
        backbone.gradient_checkpointing = learner.gradient_checkpointing
        self.model = ValueModel(backbone).to(self.ranks.device).train()
        self.optimizer = Optimizer(
            self.model.named_parameters(),
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
        )

    def load_backbone(self, path: str) -> None:
        """Takes the policy's published weights as the backbone: a critic starts from the policy after its warm-up."""
        self.model.backbone.load_hf(mapped_weights(path))
        self.optimizer.reload_masters()

    @torch.no_grad()
    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """V of the state in which each trained token was sampled, [T] a micro-batch, 0 where masked."""
        batches = [to_device(mb, self.ranks.device) for mb in micro_batches]
        values = [torch.where(mb.loss_mask, self._forward(mb), 0.0) for mb in batches]
        return [column.cpu() for column in values]

    def update(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> CriticResult:
        """One optimizer step on this rank's micro-batches; every rank must call it, also with none."""
        shares = []
        for mb in (to_device(mb, self.ranks.device) for mb in micro_batches):
            assert mb.values is not None and mb.returns is not None, "values and returns are not attached"
            losses = value_loss(self._forward(mb), mb.values, mb.returns, mb.loss_mask, clip=self.config.value_clip)
            loss = (losses * mb.loss_weights).sum()
            loss.backward()
            self.optimizer.collect()
            shares.append(loss.detach())
        self.ranks.sum(self.optimizer.gradients())
        norm, taken = self.optimizer.step(lr, max_grad_norm=self.max_grad_norm)
        total = float(torch.stack(shares).double().sum()) if shares else 0.0
        return CriticResult(loss=total, grad_norm=norm, taken=taken)

    def start_save(self, folder: str) -> None:
        """As the learner's: copies value model and optimizer, and writes them in the background."""
        state = {f"{_MODEL}{name}": p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        state |= self.optimizer.state()
        self._save = BackgroundSave(partial(save_tensors, state, Path(folder) / "training" / "critic.safetensors"))

    def saved(self, *, wait: bool) -> bool:
        return self._save is None or self._save.done(wait=wait)

    @torch.no_grad()
    def restore(self, checkpoint: str) -> None:
        """Takes value model and optimizer from a checkpoint."""
        state = load_tensors(Path(checkpoint) / "training" / "critic.safetensors")
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state.pop(f"{_MODEL}{name}"))
        self.optimizer.reload_masters()
        self.optimizer.restore(state)

    def release_memory(self) -> None:
        release_memory(self.ranks.device)

    def close(self) -> None:
        leave(self.ranks)

    def _forward(self, mb: MicroBatch) -> Tensor:
        return self.model(mb.tokens, mb.positions, mb.cu_seqlens, mb.max_seqlen)
