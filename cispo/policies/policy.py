"""A policy: a language model on packed tokens, and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cispo.policies.attention import Attention


class RouterOutput(NamedTuple):
    """What the router of one MoE layer decided."""

    probs: Tensor
    """[T, E]: softmax over all experts, at least float32."""
    chosen: Tensor
    """[T, k] int64."""


class PolicyOutput(NamedTuple):
    """One forward pass over packed tokens."""

    hidden: Tensor
    """[T, d] after the final norm; the logits are hidden @ lm_head_weight.T."""
    router: tuple[RouterOutput, ...] = ()
    """One entry per MoE layer; empty for a dense policy."""


class Policy(Protocol):
    """A language model on packed tokens. Implementations are nn.Modules; these are the parts the project relies on."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer is recomputed in the backward pass instead of keeping its activations."""
        ...

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None: ...

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, d]; the embedding where they are tied."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Longest sequence the policy is made for."""
        ...

    @property
    def router_shape(self) -> tuple[int, int]:
        """(MoE layers, experts of each); (0, 0) for a dense policy."""
        ...

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> PolicyOutput:
        """tokens and positions [T] int64; cu_seqlens [S + 1] int32: where each document starts, then T.

        `max_seqlen` is the length of the longest document; without it, it is read from the device.
        """
        ...

    def attend(self, tokens: Tensor, positions: Tensor, attention: Attention) -> PolicyOutput:
        """`forward`, where `attention` says how tokens see one another: a sampler's cache takes this way."""
        ...

    def to_hf(self) -> dict[str, Tensor]:
        """The weights under the names that checkpoints use: views, detached, a tied lm_head left out."""
        ...

    def load_hf(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies a whole checkpoint in. Raises UserError for a missing, unexpected or misshapen weight."""
        ...

    def hf_config(self) -> dict[str, Any]:
        """The config.json that goes with `to_hf`."""
        ...

    def __call__(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> PolicyOutput: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, target: Any, /) -> Any: ...


ShortStep = Callable[[Tensor, Tensor, Attention], Tensor]
"""(tokens [n] int64, positions [n] int64, attention) to the hidden states after the final norm, [n, d]."""
