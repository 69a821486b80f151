"""One process of data-parallel training, shared by learner and critic: model, gradients, optimizer, saved state.

    micro-batches --loss_of, backward--> gradients --sum over micro-batches and ranks--> AdamW --> weights

A rank holds a whole copy of the model, or its rows of each parameter (`sharding`). The difference is in the gradient's
sum, which FSDP has taken for rows, in the norm, and in the part of the state that a rank writes and reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from cispo.errors import RunError
from cispo.files import BackgroundSave
from cispo.learner.adapters import Adapters, base_folder, start_adapter
from cispo.learner.memory import saving
from cispo.learner.offload import HostActivations
from cispo.learner.optim import Optimizer
from cispo.learner.parallel import Mesh, to_device
from cispo.learner.rows import Rows, rows_of, state_rows
from cispo.learner.sharding import fill_from, reshard, sharded_policy
from cispo.learner.state import StoredState, state_path, write_state
from cispo.policies.loading import load_policy
from cispo.policies.lora import adapt
from cispo.policies.policy import HEADS, Policy, heads_of
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.types import MicroBatch

Report = TypeVar("Report")

# Prefix of the model's own tensors beside the optimizer's.
_MODEL = "model/"


def trainable_policy(
    folder: str,
    config: LearnerConfig,
    mesh: Mesh,
    dtype: Literal["float32", "bfloat16"],
    adapters: Adapters | None = None,
    *,
    heads: bool = False,
) -> Policy:
    """The policy of a folder on this rank's device, whole or this rank's rows of it, ready for training.

    With `adapters` the policy is frozen but for an adapter, that of the folder or a new one. With `heads` those of
    multi-token prediction are modules.
    """
    number = getattr(torch, dtype)
    base = folder if adapters is None else base_folder(folder)
    if mesh.shards is not None:
        policy = sharded_policy(base, mesh, number, lora=None if adapters is None else adapters.lora, heads=heads)
        fill_from(policy, base, mesh, number)
    else:
        policy = load_policy(base, dtype=number, heads=heads).to(mesh.device)
        policy = policy if adapters is None else adapt(policy, adapters.lora)
    if adapters is not None:
        start_adapter(policy, folder, adapters)
    policy.gradient_checkpointing = config.recomputes
    policy.train()
    return policy


class Rank:
    """One rank's model with its optimizer, and the operations in which all ranks take part."""

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        mesh: Mesh,
        *,
        state: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        with_model: bool = False,
    ) -> None:
        """`state` names the optimizer's files in a checkpoint; `with_model` writes the model into them too.

        `dtype` is the number format of the weights that engines and model folders get.
        """
        self.model, self.config, self.mesh = model, config, mesh
        self.state, self.with_model = state, with_model
        self.dtype: Literal["float32", "bfloat16"] = dtype
        self.has_reference = False
        """Whether a second policy is kept beside the model."""
        self._save: BackgroundSave | None = None
        # From before the first pass: FSDP shows gathered weights under the same names during and after one.
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._of_heads = {id(parameter) for head in heads_of(model) for parameter in head.parameters()}
        self.heads: Optimizer | None = None
        """Of heads of multi-token prediction: neither norm nor sums of the other gradients know theirs."""
        self.reset_optimizer()

    @property
    def sharded(self) -> bool:
        """Whether this rank holds rows of each parameter."""
        return self.mesh.shards is not None

    @property
    def number_format(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def writes(self) -> bool:
        """Whether this rank has a part of checkpoints to write."""
        return self.mesh.rank < self.parts

    @property
    def parts(self) -> int:
        """Ranks that write a part of the state: all with rows, or rank 0 for all that hold the same."""
        return self.mesh.world if self.sharded else 1

    def reset_optimizer(self) -> None:
        """Replaces the optimizer by one without moments, as between warm-up and reinforcement learning."""
        heads = [(name, parameter) for name, parameter in self._named if id(parameter) in self._of_heads]
        self.optimizer = self._new_optimizer([named for named in self._named if id(named[1]) not in self._of_heads])
        self.heads = self._new_optimizer(heads) if heads else None

    def _new_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        return Optimizer(
            named,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            over_ranks=self.mesh.sum if self.sharded else None,
            ranks=self.mesh.world,
            keep_masters=self.sharded and not self.with_model and self.dtype == "bfloat16",
            low_bit=self.config.optimizer == "adamw8bit",
            offload="optimizer" in self.config.offload,
        )

    @property
    def optimizers(self) -> list[Optimizer]:
        """That of the model, then that of heads."""
        return [self.optimizer] if self.heads is None else [self.optimizer, self.heads]

    @contextmanager
    def doing(self, step: str) -> Iterator[None]:
        """A step with collectives. Raises RunError, which names keys of the recipe, where GPU memory does not do."""
        try:
            with self.mesh.doing(step):
                yield
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            sizes = re.findall(r"(?:allocate|of which) ([\d.]+ \w+)", str(error))
            asked = f"; {' asked for, '.join(sizes)} {'free' if len(sizes) > 1 else 'asked for'}" if sizes else ""
            raise RunError(
                f"learner rank {self.mesh.rank}, {step}: {reason}; less is used with {self._ways_to_save()}{asked}"
            ) from None

    def _ways_to_save(self) -> str:
        """Keys of the recipe that save memory, with the number of GiB of this rank's plan."""
        sizes = [parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad]
        adapted = any(not parameter.requires_grad for parameter in self.model.parameters())
        return saving(
            self._policy,
            self.config.model_copy(update={"ranks": self.mesh.world}),
            dtype=self.dtype,
            sharded=self.sharded,
            adapter=sum(sizes) if adapted else 0,
            reference=self.has_reference,
        )

    def activations(self) -> AbstractContextManager[object]:
        """A block in which a pass keeps its activations where the recipe wants them."""
        kept = "activations" in self.config.offload
        return HostActivations(self._policy.lm_head_weight.shape[1]) if kept else nullcontext()

    @property
    def _policy(self) -> Policy:
        """The model, or a critic's backbone."""
        return next(module for module in self.model.modules() if isinstance(module, Policy))

    def to_device(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches as `forward` and `backward` take them."""
        return [to_device(mb, self.mesh.device) for mb in micro_batches]

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[MicroBatch],
        values_of: Callable[[MicroBatch], Tensor],
        *,
        model: nn.Module | None = None,
    ) -> list[Tensor]:
        """A pass without gradient: `values_of` each micro-batch on the device, [T], returned on the host.

        `model` is the one that `values_of` runs, if not the trained one.
        """
        with self.doing("a forward pass"):
            values = [values.cpu() for values in [values_of(mb) for mb in batches]]
        reshard(model or self.model)
        return values

    def backward(
        self, batches: Sequence[MicroBatch], loss_of: Callable[[MicroBatch], tuple[Tensor, Report]]
    ) -> list[Report]:
        """Leaves the gradient of the whole batch, summed over micro-batches and ranks, in the optimizer.

        `loss_of` gives the loss of a micro-batch and a report, which is returned. Every rank must call it, with as many
        micro-batches. A GPU is never waited for: nothing is read from it here.
        """
        reports = []
        for number, mb in enumerate(batches, 1):
            with self.doing(f"forward and backward of micro-batch {number} of {len(batches)}"):
                reports.append(self._backward(mb, loss_of))
        for optimizer in self.optimizers:
            optimizer.gradients()
            with self.doing("the sum of gradients"):
                # FSDP has summed those of split parameters.
                self.mesh.sum([m.grad for m in optimizer.whole if m.grad is not None])
        return reports

    def _backward(self, mb: MicroBatch, loss_of: Callable[[MicroBatch], tuple[Tensor, Report]]) -> Report:
        loss, report = loss_of(mb)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.collect()
        return report

    def step(self, lr: float) -> tuple[float, bool]:
        """One optimizer step after `backward`: gradient norm over all ranks before clipping, whether it was taken.

        Heads have a step of their own with the same bound, which neither number tells of.
        """
        with self.doing("the optimizer step"):
            result = self.optimizer.step(lr, max_grad_norm=self.config.max_grad_norm)
            if self.heads is not None:
                self.heads.step(lr, max_grad_norm=self.config.max_grad_norm)
            return result

    def start_save(self, folder: str, write_model: Callable[[], None] | None = None, *, full: bool = True) -> None:
        """Copies the state to the host; a thread runs `write_model` and writes the state while training goes on.

        Without `full` the optimizer is left out. A rank with the state of rank 0 writes nothing.
        """
        if not self.writes:
            return
        state = self._rows_of_state(full=full)
        file = state_path(folder, self.state, self.mesh.rank, self.parts)

        def write() -> None:
            if write_model is not None:
                write_model()
            if full or self.with_model:
                write_state(state, file)

        self._save = BackgroundSave(write)

    def _rows_of_state(self, *, full: bool) -> dict[str, Rows]:
        """Copies on the host of this rank's part: rows of the model, if the state has it, and of a `full` optimizer."""
        rows = {name: rows_of(parameter, self.mesh) for name, parameter in self._named}
        state: dict[str, Rows] = {}
        if self.with_model:
            state = {f"{_MODEL}{name}": r.on_host() for name, r in rows.items()}
        if full:
            for optimizer in self.optimizers:
                state |= state_rows(optimizer.state(), rows)
        # Step counts and the like are equal on all ranks.
        return {key: r for key, r in state.items() if r.split or self.mesh.rank == 0}

    def saved(self, *, wait: bool) -> bool:
        """Whether the files of `start_save` are complete. Raises RunError where the disk refused them."""
        return self._save is None or self._save.done(wait=wait)

    @torch.no_grad()
    def restore(self, checkpoint: str, *, full: bool = True) -> None:
        """Reads the optimizer's state, and the model where the files have it; any number of ranks may have saved it.

        A checkpoint that is not `full` has no optimizer, which then stays as it is.
        """
        if not full and not self.with_model:
            return
        stored = StoredState(checkpoint, self.state)
        state = {key: self._own_part(stored, key) for key in stored.shapes}
        if self.with_model:
            for name, parameter in self._named:
                rows_of(parameter, self.mesh).values.copy_(state.pop(f"{_MODEL}{name}"))
            self.optimizer.reload_masters()
        of_heads = {key for key in state if key.startswith(HEADS)}
        self.optimizer.restore({key: values for key, values in state.items() if key not in of_heads})
        # A run that no longer asks for heads leaves their moments.
        if self.heads is not None:
            self.heads.restore({key: state[key] for key in of_heads})

    def _own_part(self, stored: StoredState, key: str) -> Tensor:
        shape = stored.shapes[key]
        if not shape:
            return stored.read(key, 0, 1)
        name = key.removeprefix(_MODEL) if key.startswith(_MODEL) else key.rpartition("/")[0]
        parameter = dict(self._named).get(name)
        if parameter is None:
            return stored.read(key, 0, shape[0])
        rows = rows_of(parameter, self.mesh)
        values = stored.read(key, rows.first, len(rows.values))
        return values if rows.narrow is None else rows.narrow.of(values)


def total(losses: Sequence[Tensor]) -> float:
    """The sum of scalars on a device, read from it at once; 0 without any."""
    return float(torch.stack(list(losses)).double().sum()) if losses else 0.0
