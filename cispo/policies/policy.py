"""A policy: a language model on packed tokens, its outputs, and the names of its weights on disk.

tokens, positions [T], cu_seqlens [S + 1] --forward--> Documents --attend--> PolicyOutput
checkpoint names  --place_of--> Place --load_hf--> parameters --to_hf--> checkpoint names
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from cispo.errors import UserError
from cispo.policies.attention import Attention, Documents

HFConfig: TypeAlias = Mapping[str, Any]
"""The content of a config.json: names and types are those of the model's own code."""


P = TypeVar("P", bound="Policy")


class RouterOutput(NamedTuple):
    """Decisions of one MoE layer's router."""

    probs: Tensor
    """[T, E], at least float32, rows sum to 1: softmax over all experts, or sigmoid scores divided by their sum."""
    chosen: Tensor
    """[T, k] int64: replayed choices where routes are given."""


class PolicyOutput(NamedTuple):
    """One forward pass over packed tokens."""

    hidden: Tensor
    """[T, d] after the final norm; the logits are hidden @ lm_head_weight.T."""
    router: tuple[RouterOutput, ...] = ()
    """One entry per MoE layer; empty for a dense policy."""


class Place(NamedTuple):
    """Destination of a checkpoint's tensor: a parameter, or one expert's part of a fused one."""

    parameter: str
    expert: int | None = None
    half: Literal["gate", "up"] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that the tensor fills."""
        view = parameter if self.expert is None else parameter[self.expert]
        if self.half is None:
            return view
        gate, up = view.chunk(2)
        return gate if self.half == "gate" else up


class Head(nn.Module):
    """A head of multi-token prediction: drafts for an engine. It is no part of the trunk (`trunk_modules`)."""

    norm: nn.Module
    """Before the LM head's product."""


def trunk_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model`, itself first, without heads and their parts; in the order of `Module.modules`."""
    if not isinstance(model, Head):
        yield model
        for child in model.children():
            yield from trunk_modules(child)


def heads_of(model: nn.Module) -> list[Head]:
    """The heads of multi-token prediction."""
    return [module for module in model.modules() if isinstance(module, Head)]


HEADS = "predictors."
"""Beginning of the names of heads' parameters."""


def no_heads(reason: str) -> UserError:
    """The refusal of a policy whose heads are asked for."""
    return UserError(
        f"rollout.engine_args.speculative_config.method mtp needs heads of multi-token prediction: {reason}"
    )


class Policy(nn.Module, ABC):
    """A language model on packed tokens, without cache, padding or dropout.

    A family implements `attend`, the shapes, and the two directions of its naming: `place_of` and `disk_places`.
    """

    __call__: Callable[..., PolicyOutput]
    _gradient_checkpointing = False
    read_as_matrices: tuple[str, ...] = ()
    """Names of linear layers that `attend` does not call: it reads their weights, so adapters would have no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        """A checkpoint's tensors that the policy does not run but writes back, by their names on disk: heads of
        multi-token prediction that were not asked for. On the CPU, in the dtype of the file."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass instead of keeping its activations."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._gradient_checkpointing = enabled

    @property
    @abstractmethod
    def lm_head_weight(self) -> Tensor:
        """[V, d]; the embedding where they are tied."""

    @property
    def vocab_size(self) -> int:
        return self.lm_head_weight.shape[0]

    @property
    def router_shape(self) -> tuple[int, int]:
        """(MoE layers, experts of each); (0, 0) for a dense policy."""
        return 0, 0

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        routes: Tensor | None = None,
    ) -> PolicyOutput:
        """tokens and positions [T] int64; cu_seqlens [S + 1] int32: the start of each document, then T.

        `max_seqlen` is the length of the longest document; without it, it is read from the device. `routes` as in
        `attend`.
        """
        return self.attend(tokens, positions, Documents(cu_seqlens, len(tokens), max_seqlen), routes)

    @abstractmethod
    def attend(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routes: Tensor | None = None
    ) -> PolicyOutput:
        """`forward` with any form of attention: packed documents, shared prompts, a sampler's cache.

        `routes` [T, MoE layers, k], of a signed integer dtype, are experts to take instead of the routers' choices
        (router replay); a row of -1 leaves the choice to the router. Weights are those of this pass.
        """

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The config.json that goes with `to_hf`."""

    @abstractmethod
    def place_of(self, name: str) -> Place | None:
        """Destination of the checkpoint's tensor `name`, in any naming of the family; need not exist in this policy.

        None for tensors that are not copied: buffers that are recomputed, the second name of a tied head.
        """

    @abstractmethod
    def disk_places(self) -> Iterator[tuple[str, Place]]:
        """The names that `to_hf` writes, in order, each with the part of a parameter that it holds."""

    def keeps(self, name: str) -> bool:
        """Whether the checkpoint's tensor `name` goes to `kept`."""
        return False

    def initial_weight(self, name: str, shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
        """Value of the parameter or stored buffer `name` in a new policy, float32 on the generator's device.

        Matrices are normal with standard deviation `std`, biases zero, other vectors one.
        """
        if len(shape) > 1:
            return torch.randn(shape, generator=generator, device=generator.device) * std
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=generator.device)

    def named_weights(self) -> dict[str, Tensor]:
        """The parameters, then the buffers that a checkpoint holds: stored and sent to engines, but not trained."""
        stored = {place.parameter for _, place in self.disk_places()}
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in stored}
        return {**dict(self.named_parameters()), **buffers}

    def to_hf(self) -> Mapping[str, Tensor]:
        """The weights under the names that checkpoints use: views, detached, a tied lm_head left out."""
        weights = self.named_weights()
        return {name: place.of(weights[place.parameter].detach()) for name, place in self.disk_places()}

    def second_names(self) -> Mapping[str, Sequence[str]]:
        """Names of `to_hf` -> further names under which a folder, but no engine, gets the same weight."""
        return {}

    def checkpoint(self) -> dict[str, Tensor]:
        """`to_hf`, second names and the tensors that are only kept: everything that a folder of the policy holds."""
        weights = self.to_hf()
        copies = {name: weights[first].clone() for first, names in self.second_names().items() for name in names}
        return {**weights, **copies, **self.kept}

    @torch.no_grad()
    def load_hf(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies a whole checkpoint in. Raises UserError for a missing, unexpected or misshapen weight."""
        parameters = self.named_weights()
        missing: dict[str, dict[Place, str]] = {}
        for name, place in self.disk_places():
            missing.setdefault(place.parameter, {})[place] = name
        for name, tensor in weights:
            if self.keeps(name):
                self.kept[name] = tensor.detach().to("cpu", copy=True) if tensor.device.type != "meta" else tensor
                continue
            place = self.place_of(name)
            if place is None:
                continue
            parameter = parameters.get(place.parameter)
            if parameter is None or (place.expert is not None and place.expert >= len(parameter)):
                raise UserError(f"weight {name!r} has no place in this policy: is it a checkpoint of another model?")
            target = place.of(parameter)
            if target.shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, this policy needs {list(target.shape)}"
                raise UserError(f"weight {name!r} has shape {shapes}: is it a checkpoint of another model?")
            target.copy_(tensor)
            if place.expert is None:
                missing[place.parameter].clear()
            else:
                missing[place.parameter].pop(place, None)
        lacking = [name for names in missing.values() for name in names.values()]
        if lacking and all(parameter.startswith(HEADS) for parameter, names in missing.items() if names):
            raise no_heads(f"{len(lacking)} weights of this policy's heads are missing, the first is {lacking[0]!r}")
        if lacking:
            raise UserError(f"{len(lacking)} weights are missing, the first is {lacking[0]!r}")


def with_memory(policy: P, device: torch.device) -> P:
    """A policy on the meta device, moved to another with undefined weights.

    As `Module.to_empty`, of which torch's kernels for the meta device import sympy: half a second in a new process.
    """
    if device.type == "meta":
        return policy
    return policy._apply(lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device))
