"""One process of data-parallel training, shared by learner and critic: model, gradients, optimizer, saved state.

    micro-batches --loss_of, backward--> gradients --sum over micro-batches and ranks--> AdamW --> weights

Each rank holds a whole copy of the model; only this file, `parallel` and the learner's exports of weights rely on it.
Sharding enters here: parameters of a rank (`trainable_policy`), collectives of a pass (`forward`, `backward`), gradient
norm (`step`), part of the state that a rank writes and reads (`start_save`, `restore`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from cispo.files import BackgroundSave, load_tensors, save_tensors
from cispo.learner.optim import Optimizer
from cispo.learner.parallel import Mesh, to_device
from cispo.policies.loading import load_policy
from cispo.policies.policy import Policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch

Report = TypeVar("Report")

# Prefix of the model's own tensors beside the optimizer's.
_MODEL = "model/"


def trainable_policy(folder: str, config: LearnerConfig, mesh: Mesh, dtype: Literal["float32", "bfloat16"]) -> Policy:
    """The policy of a folder on this rank's device, ready for training."""
    policy = load_policy(folder, dtype=getattr(torch, dtype)).to(mesh.device)
    policy.gradient_checkpointing = config.gradient_checkpointing
    policy.train()
    return policy


class Rank:
    """One rank's model with its optimizer, and the operations in which all ranks take part."""

    def __init__(
        self, model: nn.Module, config: LearnerConfig, mesh: Mesh, *, state_file: str, with_model: bool = False
    ) -> None:
        """`state_file` names the optimizer's file in a checkpoint; `with_model` writes the model into it too."""
        self.model, self.config, self.mesh = model, config, mesh
        self.state_file, self.with_model = state_file, with_model
        self._save: BackgroundSave | None = None
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Replaces the optimizer by one without moments, as between warm-up and reinforcement learning."""
        self.optimizer = Optimizer(
            self.model.named_parameters(),
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )

    def to_device(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches as `forward` and `backward` take them."""
        return [to_device(mb, self.mesh.device) for mb in micro_batches]

    @torch.no_grad()
    def forward(self, batches: Sequence[MicroBatch], values_of: Callable[[MicroBatch], Tensor]) -> list[Tensor]:
        """A pass without gradient: `values_of` each micro-batch on the device, [T], returned on the host."""
        return [values.cpu() for values in [values_of(mb) for mb in batches]]

    def backward(
        self, batches: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], tuple[Tensor, Report]]
    ) -> list[Report]:
        """Leaves the gradient of the whole batch, summed over micro-batches and ranks, in the optimizer.

        `loss_of` gives the loss of a micro-batch and a report, which is returned. Every rank must call it, also with no
        micro-batch. A GPU is never waited for: nothing is read from it here.
        """
        reports = [self._backward(mb, loss_of) for mb in batches]
        self.mesh.sum(self.optimizer.gradients())
        return reports

    def _backward(self, mb: MicroBatch, loss_of: Callable[[MicroBatch], tuple[Tensor, Report]]) -> Report:
        loss, report = loss_of(mb)
        loss.backward()
        self.optimizer.collect()
        return report

    def step(self, lr: float) -> tuple[float, bool]:
        """One optimizer step after `backward`: gradient norm over all ranks before clipping, whether it was taken."""
        return self.optimizer.step(lr, max_grad_norm=self.config.max_grad_norm)

    def start_save(self, folder: str, write_model: Callable[[], None] | None = None) -> None:
        """Copies the state to the host; a thread runs `write_model` and writes the state while training goes on.

        The ranks' states are equal: rank 0 alone is told to save.
        """
        state: dict[str, Tensor] = {}
        if self.with_model:
            state = {f"{_MODEL}{name}": p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        state |= self.optimizer.state()

        def write() -> None:
            if write_model is not None:
                write_model()
            save_tensors(state, self._path(folder))

        self._save = BackgroundSave(write)

    def saved(self, *, wait: bool) -> bool:
        """Whether the files of `start_save` are complete. Raises RunError where the disk refused them."""
        return self._save is None or self._save.done(wait=wait)

    @torch.no_grad()
    def restore(self, checkpoint: str) -> None:
        """Reads the optimizer's state, and the model where the file has it."""
        state = load_tensors(self._path(checkpoint))
        if self.with_model:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.pop(f"{_MODEL}{name}"))
            self.optimizer.reload_masters()
        self.optimizer.restore(state)

    def _path(self, folder: str) -> Path:
        return Path(folder) / "training" / self.state_file


def total(losses: Sequence[Tensor]) -> float:
    """The sum of scalars on a device, read from it at once; 0 without any."""
    return float(torch.stack(list(losses)).double().sum()) if losses else 0.0
