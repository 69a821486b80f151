"""AdamW on float32 master weights, and the learning-rate schedule."""

# pyright: reportPrivateImportUsage=false
# torch documents its operations on lists of tensors (_foreach_*) though their names begin with an underscore.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from cispo.errors import UserError
from cispo.learner.adamw import FusedAdamW, Group
from cispo.learner.offload import HostCopy, finish_copies
from cispo.learner.optimizer_moments import Moments, Resting
from cispo.learner.rows import is_split, local

# Bytes of masters that a step brings to the device at a time, where something rests elsewhere or in 8 bits.
PIECE = 1 << 28


def learning_rate(
    step: float,
    *,
    steps: int,
    peak: float,
    warmup: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    final_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up to peak, then decay to final_ratio * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1 - final_ratio) * remaining)


class Optimizer:
    """AdamW with weight decay on matrices only; a step with a gradient that is not finite is skipped.

    Gradients are summed in float32 over micro-batches. Weights of a lower precision are copies of float32 masters: a
    learning rate of 1e-6 is far below the spacing of bfloat16 numbers and would change nothing. Of a parameter that is
    split over the ranks the master is this rank's rows: FSDP keeps them in float32 and sums their gradients.

    Masters that are copies, and all moments, may rest in host memory, moments in 8 bits too. A step then goes through
    the parameters piece by piece; in float32 it is the same step, bit for bit.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        over_ranks: Callable[[Sequence[Tensor]], None] | None = None,
        ranks: int = 1,
        keep_masters: bool = False,
        low_bit: bool = False,
        offload: bool = False,
        piece: int = PIECE,
    ) -> None:
        """`parameters` are (name, parameter) pairs; the state is saved under the names.

        For split parameters `over_ranks` sums tensors over the `ranks` in place; `keep_masters` adds the masters to the
        state, where the weights in a model folder are rounded. `low_bit` keeps moments in 8 bits, `offload` what rests
        in host memory; `piece` is the number of bytes of masters that come to the device at a time.
        """
        named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        exact = (torch.float32, torch.float64)
        self.masters = [p if p.dtype in exact else Parameter(p.detach().float()) for p in map(_own, self.parameters)]
        pairs = list(zip(self.parameters, self.masters, strict=True))
        self.shards = [(p, m) for p, m in pairs if is_split(p)]
        """(split parameter, the rows of it that are its master)."""
        self.copies = [(p, m) for p, m in pairs if p is not m and not is_split(p)]
        """(weight of a lower precision, its master)."""
        self.whole = [m for p, m in pairs if not is_split(p)]
        """Masters that every rank has in full."""
        self.keep_masters, self.over_ranks, self.ranks = keep_masters, over_ranks, ranks
        # Of a parameter with fewer rows than ranks some ranks hold none.
        held = [m for m in self.masters if m.numel()]
        matrices = [m for m in held if m.dim() > 1]
        others = [m for m in held if m.dim() <= 1]
        self.adam = FusedAdamW([Group(matrices, weight_decay), Group(others, 0.0)], betas=betas, eps=eps)
        # Between two steps moments may rest in other forms, which AdamW does not meet.
        state = cast("MutableMapping[Tensor, MutableMapping[str, Resting]]", self.adam.state)
        self._moments = Moments(state, betas=betas, low_bit=low_bit, host=offload)
        self._pieces = _pieces(held, piece) if low_bit or offload else None
        self._on_host = {id(m): HostCopy(m) for _, m in self.copies if m.numel()} if offload else {}
        finish_copies(self.masters[0].device)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Copies the parameters into their masters, after new weights were loaded into the parameters."""
        if self.copies:
            torch._foreach_copy_([self._values(m) for _, m in self.copies], [p for p, _ in self.copies])

    def _values(self, master: Parameter) -> Tensor:
        """A master's values where they are between two steps."""
        copy = self._on_host.get(id(master))
        return master if copy is None else copy.values

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and float32 masters under "parameter/entry": copies on the CPU.

        A parameter without an update has no moments yet.
        """
        found: dict[str, Tensor] = {}
        copied = {id(m) for _, m in (self.shards if self.keep_masters else self.copies)}
        for name, master in zip(self.names, self.masters, strict=True):
            found |= {f"{name}/{entry}": value for entry, value in self._moments.stored(master).items()}
            if id(master) in copied:
                found[f"{name}/master"] = self._values(master)
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets moments, step counts and masters from a result of `state`. Raises UserError for other parameters'."""
        masters = dict(zip(self.names, self.masters, strict=True))
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        for name, own in entries.items():
            values = own.pop("master", None)
            master = masters.get(name)
            wrong = master is None or (values is not None and values.shape != master.shape)
            if wrong or master is None or not self._moments.restore(master, own):
                shapes = ", ".join(f"{entry} {list(value.shape)}" for entry, value in own.items())
                raise UserError(f"the checkpoint's optimizer has {name} with {shapes}, which this policy has not")
            if values is not None:
                self._values(master).copy_(values)
        finish_copies(self.masters[0].device)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of one backward pass to the masters'."""
        sums, addends = [], []
        for parameter, master in self.copies:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                sums.append(master.grad)
                addends.append(parameter.grad)
            parameter.grad = None
        if sums:
            torch._foreach_add_(sums, addends)

    def gradients(self) -> list[Tensor]:
        """Every master's gradient; zeros where the loss does not depend on the parameter."""
        for parameter, master in self.shards:
            if parameter.grad is not None:
                master.grad, parameter.grad = local(parameter.grad), None
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters if m.grad is not None]

    def step(self, lr: float, *, max_grad_norm: float) -> tuple[float, bool]:
        """One update; returns the gradient norm before clipping and whether the step was taken.

        Only the norm is read from the device.
        """
        norm = self._clip(max_grad_norm)
        taken = math.isfinite(norm)
        if taken:
            if self._pieces is None:
                self._step(lr, self.copies)
            else:
                self._step_in(lr, self._pieces)
        self.adam.zero_grad()
        return norm, taken

    def _step(self, lr: float, copies: Sequence[tuple[Parameter, Parameter]]) -> None:
        """AdamW on all masters with a gradient, and the weights that are `copies` of them."""
        self.adam.step(lr)
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in copies], [m for _, m in copies])

    def _step_in(self, lr: float, pieces: Sequence[Sequence[Parameter]]) -> None:
        """`_step` of one piece of the masters after the other: AdamW leaves those without a gradient alone."""
        gradients = {id(m): m.grad for piece in pieces for m in piece}
        weights = {id(m): p for p, m in self.copies}
        self.adam.zero_grad()
        for piece in pieces:
            homes = [self._on_host[id(m)] for m in piece if id(m) in self._on_host]
            for home in homes:
                home.fetch()
            with self._moments.in_use(piece):
                for m in piece:
                    m.grad = gradients.pop(id(m))
                self._step(lr, [(weights[id(m)], m) for m in piece if id(m) in weights])
            for home in homes:
                home.stow()
            for m in piece:
                m.grad = None
        # The host may read its part after the step.
        finish_copies(self.masters[0].device)

    def _clip(self, max_grad_norm: float) -> float:
        """Scales the gradients down to the norm over all parameters; returns the norm before."""
        if self.over_ranks is None:
            return float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        whole = {id(m) for m in self.whole}
        held = [m for m in self.masters if m.numel()]
        gradients = [m.grad for m in held if m.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        # Every element counts once: rows are on one rank, and of a whole one each rank adds its share.
        shares = [1 / self.ranks if id(m) in whole else 1.0 for m in held if m.grad is not None]
        square = squares.dot(torch.tensor(shares, dtype=squares.dtype, device=squares.device))
        self.over_ranks([square])
        norm = square.sqrt()
        scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        return float(norm)


def _pieces(masters: Sequence[Parameter], size: int) -> list[list[Parameter]]:
    """The masters in order, in pieces of at most `size` bytes or one master."""
    pieces: list[list[Parameter]] = []
    filled = size
    for master in masters:
        own = master.numel() * master.element_size()
        if filled + own > size:
            pieces.append([])
            filled = 0
        pieces[-1].append(master)
        filled += own
    return pieces


def _own(parameter: Parameter) -> Parameter:
    """The rows of a split parameter that this rank holds, in their own memory; any other parameter itself."""
    return Parameter(local(parameter)) if is_split(parameter) else parameter
