"""Work on a token in softmax attention and outside it, from the shapes of a policy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.loading import config_of, shape_of
from cispo.policies.moe import Experts, Router, ScoreRouter
from cispo.policies.policy import HFConfig, Policy


class _Widths:
    """An `Attention` that computes nothing, and adds up the width of a query's products with a key."""

    def __init__(self) -> None:
        self.products = 0

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        self.products += q.shape[1] * (q.shape[2] + v.shape[2])
        return q.new_empty(*q.shape[:2], v.shape[2])

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        # The indexer scores every key; the attention behind it reads a fixed number of them.
        self.products += index.queries.shape[1] * index.queries.shape[2]
        return q.new_empty(*q.shape[:2], v.shape[2])

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        return torch.empty_like(inputs[min(2, op.token_inputs - 1)])


def quadratic_length(policy: Policy) -> float:
    """Tokens of a document on which softmax attention costs as much as all products with weights of the layers.

    On L tokens: L^2 * sum of H (D + E) against L * 2 * weights that a token meets (causal; arXiv 2501.08313). Infinite
    where no layer is quadratic. `policy` has shapes alone, and is not used afterwards.
    """
    token, widths = torch.zeros(1, dtype=torch.long, device="meta"), _Widths()
    with torch.no_grad(), _without_experts(policy):
        policy.attend(token, token, widths)
    weights = _met(_layers(policy))
    return 2 * weights / widths.products if widths.products else math.inf


def layer_parameters(policy: Policy) -> int:
    """Parameters of the layers: all but embedding, head and final norm."""
    return sum(p.numel() for p in _layers(policy).parameters())


def _layers(policy: Policy) -> nn.ModuleList:
    return next(m for m in policy.modules() if isinstance(m, nn.ModuleList))


class _Cached(_Widths):
    """An `Attention` that computes nothing, and adds up what a sampler keeps: keys and values of a token, states."""

    def __init__(self) -> None:
        super().__init__()
        self.token = self.state = 0

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        self.token += k.shape[1] * (k.shape[2] + v.shape[2])
        return super().softmax(q, k, v, scale)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        self.token += k.shape[1] * (k.shape[2] + v.shape[2])
        return super().sparse_softmax(q, k, v, index, scale)

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        if op.across != "window":
            self.state += inputs[1].shape[1] * inputs[1].shape[2] * inputs[2].shape[2]
        return super().recurrent(op, *inputs)


def cache_sizes(policy: Policy) -> tuple[int, int]:
    """About the numbers that an engine keeps of a token, and of a sequence of any length, its states.

    Latents count as the keys and values that they expand to, which is too much; a convolution's last inputs are left
    out. The head that drafts counts, where heads are modules. `policy` has shapes alone.
    """
    token, cached = torch.zeros(1, dtype=torch.long, device="meta"), _Cached()
    with torch.no_grad(), _without_experts(policy):
        hidden = policy.attend(token, token, cached).hidden
        if isinstance(policy, HybridPolicy) and policy.predictors:
            policy.predict(0, token, token, hidden, cached)
    return cached.token, cached.state


@contextmanager
def _without_experts(policy: Policy) -> Iterator[None]:
    """A block in which experts return their inputs."""
    experts = [module for module in policy.modules() if isinstance(module, Experts)]
    for module in experts:
        module.forward = _no_experts
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _no_experts(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return x


def _met(layers: nn.Module) -> float:
    """Weights in products with one token: of the experts' those that it chooses."""
    routers = [m for m in layers.modules() if isinstance(m, Router | ScoreRouter)]
    chosen = max((m.top_k if isinstance(m, Router) else m.routing.top_k for m in routers), default=1)
    return sum(p.numel() * (chosen / len(p) if p.dim() == 3 else 1) for p in layers.parameters() if p.dim() > 1)


def quadratic_length_of(model: str | None, config: HFConfig | None) -> float:
    """`quadratic_length` of a model folder's policy, or of a config.json's content."""
    return _of(model, json.dumps(config, sort_keys=True))


@cache
def _of(model: str | None, config: str) -> float:
    # Neither embedding nor head counts, so that any vocabulary does.
    content = {"vocab_size": 1, **json.loads(config)} if model is None else config_of(model)
    return quadratic_length(shape_of(content))
