"""Parts of a rank's memory that are in host memory while they are not used. Copies change no bit.

    masters       host --fetch--> device: a piece of the step of AdamW --stow--> host             `HostCopy`
    activations   inputs of recomputed layers --forward--> host --backward--> device              `HostActivations`
    reference     host --a pass without gradient--> device                                        `HostPolicy`

On a GPU host memory is pinned, which copies at full speed in the background; torch rounds each pinned tensor up to a
power of two bytes. On a CPU the same code copies inside host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cispo.learner.rows import is_split
from cispo.policies.policy import Policy


def host_like(tensor: Tensor) -> Tensor:
    """Undefined host memory in the form of a tensor, pinned where the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; of a tensor on a GPU it is complete once the current stream is."""
    return host_like(tensor).copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def finish_copies(device: torch.device) -> None:
    """Waits for the copies to the host that the current stream has queued."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class HostCopy:
    """A tensor on a device whose memory is freed while its values are on the host.

    The tensor stays the same object, of the same device, so that it can have a gradient meanwhile.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.values = on_host(tensor)
        """Valid while the tensor has no memory."""
        self._tensor, self._bytes = tensor, tensor.untyped_storage().nbytes()
        assert self._bytes == tensor.numel() * tensor.element_size(), "the tensor shares its memory"
        tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def fetch(self) -> None:
        self._tensor.untyped_storage().resize_(self._bytes)
        self._tensor.copy_(self.values, non_blocking=self._tensor.is_cuda)

    @torch.no_grad()
    def stow(self) -> None:
        self.values.copy_(self._tensor, non_blocking=self._tensor.is_cuda)
        self._tensor.untyped_storage().resize_(0)


class _Moved(NamedTuple):
    """A saved activation in host memory."""

    values: Tensor
    device: torch.device
    copied: torch.cuda.Event | None
    """The end of the copy, on a GPU."""


class HostActivations(saved_tensors_hooks):
    """A block in which autograd's saved activations [..., width] go to the host until the backward pass needs them.

    With gradient checkpointing these are the inputs of the layers. All else stays: tables of positions, indices. Copies
    to the host run beside the computation of the next layer, in a stream of their own.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._copying: tuple[Tensor, torch.cuda.Event] | None = None
        """The activation that is on its way, which keeps its memory until the copy is complete."""
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *error: object) -> None:
        self._let_go()
        super().__exit__(*error)

    def _let_go(self) -> None:
        if self._copying is not None:
            saved, copied = self._copying
            torch.cuda.current_stream(saved.device).wait_event(copied)
            self._copying = None

    def _pack(self, saved: Tensor) -> Tensor | _Moved:
        if not saved.is_floating_point() or saved.dim() < 2 or saved.shape[-1] != self.width:
            return saved
        if not saved.is_cuda:
            return _Moved(on_host(saved), saved.device, None)
        self._let_go()
        stream, copied = _copy_stream(saved.device), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(saved.device))
        with torch.cuda.stream(stream):
            values = on_host(saved)
        copied.record(stream)
        self._copying = saved, copied
        return _Moved(values, saved.device, copied)

    def _unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed.copied is None:
            return packed.values
        torch.cuda.current_stream(packed.device).wait_event(packed.copied)
        return packed.values.to(packed.device, non_blocking=True)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


class HostPolicy:
    """A policy without gradient whose weights are in host memory but for the time of a pass.

    Of a whole copy the host's weights stay where they are, and those on the device are dropped after a pass; the rows
    of a split policy move.
    """

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self._policy, self._device = policy, device
        self._split = any(map(is_split, policy.parameters()))
        parameters = [] if self._split else list(policy.parameters())
        self._whole = [(parameter, on_host(parameter)) for parameter in parameters]
        finish_copies(device)
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[Policy]:
        """The policy, ready for passes on the device."""
        if self._split:
            self._policy.to(self._device)
        for parameter, values in self._whole:
            parameter.data = values.to(self._device, non_blocking=True, copy=True)
        try:
            yield self._policy
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._split:
            self._policy.to("cpu")
        for parameter, values in self._whole:
            parameter.data = values
