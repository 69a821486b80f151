"""Router replay: experts that an engine's routers chose, recorded token by token and taken again by the learner.

    engine   RouterOutputs of a pass, or a `RouteBuffer` that routers fill --> [tokens, layers, k]
    learner  Policy.attend(..., routes=) --> the same experts, live weights;  live_choices: the routers' own choices

The expert of a token is chosen by a comparison: where two scores are close, rounding flips the choice and another
function is computed (arXiv 2510.11370). Replayed, learner and engine differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.policies.moe import Router, ScoreRouter
from cispo.policies.policy import Policy, RouterOutput, trunk_modules
from cispo.types import RoutedExperts, Sample, Turn


def routers_of(model: nn.Module) -> list[Router | ScoreRouter]:
    """The routers of a model's MoE layers, in order, without those of heads."""
    return [module for module in trunk_modules(model) if isinstance(module, Router | ScoreRouter)]


def choices_of(router: Router | ScoreRouter) -> int:
    """k: experts of a token."""
    return router.top_k if isinstance(router, Router) else router.routing.top_k


def route_dtype(experts: int) -> torch.dtype:
    """The dtype of recorded experts: uint8 for up to 256 of them, else int16, which holds as many as uint16 in use."""
    return torch.uint8 if experts <= 256 else torch.int16


def bytes_per_token(policy: Policy) -> int:
    """Size of a token's recorded experts, 0 for a policy without any."""
    return sum(map(choices_of, routers_of(policy))) * route_dtype(policy.router_shape[1]).itemsize


def routes_of(router: Sequence[RouterOutput]) -> Tensor:
    """[T, layers, k]: the experts of a pass with at least one MoE layer."""
    return torch.stack([layer.chosen for layer in router], 1).to(route_dtype(router[0].probs.shape[1]))


ROUTES_KEY = "record_routes"
"""Key in vLLM's `additional_config` that tells our models to build a `RouteBuffer`."""


class RouteBuffer:
    """The last pass's experts of a model that returns hidden states alone, in memory of a fixed address.

    Routers leave their choices in it through a forward hook, which works inside a captured CUDA graph too.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        """`tokens` is the most of one pass. `model` has MoE layers; the buffer lies on its device."""
        routers = routers_of(model)
        weight = routers[0].weight
        shape = tokens, len(routers), choices_of(routers[0])
        self.routes = torch.zeros(shape, dtype=route_dtype(len(weight)), device=weight.device)
        """[tokens, layers, k]."""
        self._numbers = {id(router): number for number, router in enumerate(routers)}
        for router in routers:
            router.register_forward_hook(self._record)

    def leave(self, router: Router | ScoreRouter, chosen: Tensor) -> None:
        """Records `chosen` [T, k], where another kernel does the router's work."""
        self.routes[: len(chosen), self._numbers[id(router)]].copy_(chosen)

    def _record(self, router: nn.Module, inputs: object, output: Sequence[Tensor]) -> None:
        assert isinstance(router, Router | ScoreRouter)
        self.leave(router, output[1])


def routes_of_turns(turns: Sequence[Turn]) -> Tensor | None:
    """[L - 1, layers, k] int16 of a sequence of turns that continue each other; None where one has no experts.

    A token has the experts of the request that sampled it; those between two completions, of the later one. Rows that
    the engine did not report are -1.
    """
    rows: list[Tensor] = []
    read = 0
    for turn in turns:
        routed = turn.completion.routed_experts
        if routed is None:
            return None
        whole = _routes_from_start(routed)
        rows.append(whole[read:])
        read = len(whole)
    return torch.cat(rows)


def _routes_from_start(routed: RoutedExperts) -> Tensor:
    tokens, layers, k = routed.shape
    wide = len(routed.data) > tokens * layers * k
    known = torch.frombuffer(bytearray(routed.data), dtype=torch.int16 if wide else torch.uint8)
    return F.pad(known.to(torch.int16).view(routed.shape), (0, 0, 0, 0, routed.first, 0), value=-1)


def packed_routes(samples: Sequence[Sample]) -> Tensor | None:
    """[T, layers, k] of samples one after another: -1 for those without routes; None where none has any."""
    known = next((sample.routes for sample in samples if sample.routes is not None), None)
    if known is None:
        return None
    blank = known.new_full((1, *known.shape[1:]), -1)
    rows = (blank.expand(len(s.token_ids) - 1, -1, -1) if s.routes is None else s.routes for s in samples)
    return torch.cat(list(rows))


class _Scheduler(Protocol):
    max_num_batched_tokens: int


class _EngineConfig(Protocol):
    """vLLM's configuration, as far as it is read here."""

    @property
    def additional_config(self) -> object: ...

    @property
    def scheduler_config(self) -> _Scheduler: ...


def route_buffer(model: nn.Module, config: _EngineConfig) -> RouteBuffer | None:
    """For a model inside vLLM: where its routers leave their choices; None where the engine does not record them."""
    asked = config.additional_config
    if not isinstance(asked, Mapping) or not asked.get(ROUTES_KEY):
        return None
    return RouteBuffer(model, config.scheduler_config.max_num_batched_tokens)


@contextmanager
def live_choices(policy: nn.Module) -> Iterator[list[Tensor]]:
    """Collects, during a pass with `routes`, the experts [T, k] that each router would have chosen itself, in order.

    The price is a second product of each router. A layer recomputed for its gradient later adds nothing.
    """
    found: list[Tensor] = []
    handles = [router.register_forward_hook(partial(_choose_again, found)) for router in routers_of(policy)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _choose_again(found: list[Tensor], router: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
    assert isinstance(router, Router | ScoreRouter)
    found.append(router.forward(inputs[0])[1])


def differing(chosen: Sequence[Tensor], replayed: Sequence[Tensor]) -> Tensor:
    """[T] bool: tokens with another set of experts in some layer; one [T, k] a layer each."""
    return torch.stack(
        [(a.sort(-1).values != b.sort(-1).values).any(-1) for a, b in zip(chosen, replayed, strict=True)]
    ).any(0)
