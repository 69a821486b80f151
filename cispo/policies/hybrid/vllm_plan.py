"""The cache that a policy needs inside vLLM, found by tracing one forward pass without memory.

    config.json -> Policy on the meta device --attend, predict(Recorder)--> Plan
    Plan        -> softmax layers of one head size; places of the recurrent states in the slots of a few holders

Layers of latent attention keep a row of latents a token, where that is less than the keys and values of all heads.

Nothing here imports vLLM.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from cispo.errors import UserError
from cispo.ops.expansion import Expansion
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index
from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.hybrid.shares import build_share
from cispo.policies.moe import Experts
from cispo.policies.policy import HFConfig, Policy
from cispo.policies.shares import Ranks

# Head sizes that vLLM's attention takes on a CPU; each of them suits its kernels for GPUs.
_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# Floats. The kernels read states in vectors of up to 128 bytes.
_ALIGNMENT = 32

# Tokens of keys and values, as float32, that are as large as a slot with states of several layers. vLLM gives both
# blocks of one size; larger blocks waste memory on short sequences, and a prefix cache finds whole ones alone.
_LONGEST_BLOCK = 512

# Floats. Rows of latents are read in vectors of 16 bytes; each is half a row of keys and half a row of values to vLLM.
_LATENT_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxCall:
    """Shapes of one layer's softmax attention."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    latents: tuple[int, int] | None = None
    """Widths of the two latents that keys and values are made of, if they are: of the part that both are linear in, and
    of the part that is behind every key."""

    @property
    def token_floats(self) -> int:
        """Keys and values of a token, with the padding of their heads where these are cached."""
        width = self.head_size if self.latents is None else max(self.key_dim, self.value_dim)
        return 2 * self.kv_heads * width

    @property
    def head_size(self) -> int:
        """Width of a head in vLLM's cache: keys and values are padded with zeros to the next size that it takes.

        Raises UserError where there is none.
        """
        width = max(self.key_dim, self.value_dim)
        size = next((size for size in _HEAD_SIZES if size >= width), None)
        if size is None:
            raise UserError(f"attention heads {width} wide cannot be sampled by vLLM: the widest are {_HEAD_SIZES[-1]}")
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentCall:
    """Shapes of one call of a recurrence."""

    op: RecurrentOp
    state: tuple[int, ...]
    """Of one sequence."""
    output: tuple[int, ...]
    """Of one token."""
    dtype: torch.dtype
    """Of the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlace:
    """Place of one recurrence's state in the slot that a sequence has in a holder."""

    holder: int
    offset: int
    """In floats."""
    shape: tuple[int, ...]

    @property
    def floats(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All attention of a forward pass, in the order of its calls."""

    vocab_size: int
    hidden_size: int
    softmax: tuple[SoftmaxCall, ...]
    recurrent: tuple[RecurrentCall, ...]
    selected: int | None
    """The fewest keys that a layer of sparse attention selects; None without such layers."""
    head: tuple[SoftmaxCall, ...] = ()
    """Of the first head of multi-token prediction, whose layers share the softmax layers' cache; empty without."""
    given_holders: int | None = None
    """`holders` of the whole policy, in the plan of a rank of tensor parallelism: vLLM's config has one number."""

    @property
    def of_head(self) -> Plan:
        """The plan of the head's own forward pass."""
        return replace(self, softmax=self.head, recurrent=(), head=())

    @cached_property
    def keeps_latents(self) -> bool:
        """Whether the cache has a row of latents a token and softmax layer; a rank has them all, and fewer heads."""
        call = self.softmax[0]
        return call.latents is not None and self._latent_row <= call.token_floats

    @cached_property
    def cached_heads(self) -> tuple[int, int]:
        """Key heads, and the size of each, of a rank's cache: twice as many numbers a token and softmax layer.

        Rows of latents are longer than the latents where a block would have too many tokens, though never longer than
        keys and values.
        """
        if not self.keeps_latents:
            return self.softmax[0].kv_heads, self.softmax[0].head_size
        padded = _aligned(math.ceil(self.slot_floats / _LONGEST_BLOCK), _LATENT_ALIGNMENT)
        expanded = self.softmax[0].token_floats // _LATENT_ALIGNMENT * _LATENT_ALIGNMENT
        return 1, max(self._latent_row, min(padded, expanded)) // 2

    @property
    def _latent_row(self) -> int:
        return _aligned(sum(self.softmax[0].latents or ()), _LATENT_ALIGNMENT)

    @cached_property
    def holders(self) -> int:
        """Layers of vLLM's cache that hold the states: as many as there are softmax layers, or more of smaller slots.

        vLLM sorts the layers of its cache into groups of one kind and size and does the host's work once a group.
        """
        if self.given_holders is not None:
            return self.given_holders
        most = max(self._kinds.values(), default=0)
        if not most:
            return 0
        states = sum(_aligned_floats(state) for _, state in self._kinds)
        fitting = _LONGEST_BLOCK * self.softmax[0].token_floats // states
        each = min(math.ceil(most / len(self.softmax)), max(fitting, 1))
        return math.ceil(most / each)

    @property
    def slot_floats(self) -> int:
        """Floats of a slot, alike in all holders."""
        return sum(size * each for size, each in self._shares.values())

    @cached_property
    def places(self) -> tuple[StatePlace, ...]:
        """One a recurrent call: calls of one kind fill a holder after the other."""
        first, offset = {}, 0
        for kind, (size, each) in self._shares.items():
            first[kind] = offset
            offset += size * each
        seen: Counter[tuple[RecurrentOp, tuple[int, ...]]] = Counter()
        places = []
        for call in self.recurrent:
            kind = call.op, call.state
            size, each = self._shares[kind]
            holder, row = divmod(seen[kind], each)
            places.append(StatePlace(holder=holder, offset=first[kind] + row * size, shape=call.state))
            seen[kind] += 1
        return tuple(places)

    @cached_property
    def _kinds(self) -> Counter[tuple[RecurrentOp, tuple[int, ...]]]:
        return Counter((call.op, call.state) for call in self.recurrent)

    @cached_property
    def _shares(self) -> dict[tuple[RecurrentOp, tuple[int, ...]], tuple[int, int]]:
        """(floats of a state, states in each holder) of every kind."""
        return {
            kind: (_aligned_floats(kind[1]), math.ceil(calls / self.holders)) for kind, calls in self._kinds.items()
        }


def _aligned_floats(state: tuple[int, ...]) -> int:
    return _aligned(math.prod(state), _ALIGNMENT)


def _aligned(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit


class Recorder:
    """An `Attention` that records the shapes of every call and computes nothing."""

    def __init__(self) -> None:
        self.softmax_calls: list[SoftmaxCall] = []
        self.recurrent_calls: list[RecurrentCall] = []
        self.selected: int | None = None

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        call = SoftmaxCall(
            heads=q.shape[1],
            kv_heads=k.shape[1],
            key_dim=q.shape[2],
            value_dim=v.shape[2],
            scale=q.shape[2] ** -0.5 if scale is None else scale,
        )
        self.softmax_calls.append(call)
        return q.new_empty(*q.shape[:2], v.shape[2])

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        with torch.device("cpu"):
            zeros = [torch.zeros(x.shape, dtype=x.dtype) for x in inputs]
            bounds = torch.tensor([0, len(zeros[0])], dtype=torch.int32)
            output, state = op.packed(*zeros, bounds, output_final_state=True)
        assert state is not None
        call = RecurrentCall(op=op, state=tuple(state.shape[1:]), output=tuple(output.shape[1:]), dtype=output.dtype)
        self.recurrent_calls.append(call)
        return output.to(inputs[0].device)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        self.selected = index.top_k if self.selected is None else min(self.selected, index.top_k)
        return self.softmax(q, k, v, scale)

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        k, v = expand(*latents)
        output = self.softmax(q, k, v, scale) if index is None else self.sparse_softmax(q, k, v, index, scale)
        first, second = (x.shape[-1] for x in latents)
        self.softmax_calls[-1] = replace(self.softmax_calls[-1], latents=(first, second))
        return output


def check_context(plan: Plan, max_context: int) -> None:
    """Raises UserError where sparse attention would select: vLLM then needs kernels of its own for it."""
    if plan.selected is not None and max_context > plan.selected:
        raise UserError(
            f"rollout.engine: the policy's sparse attention selects {plan.selected} keys; contexts longer than that "
            f"(up to {max_context} tokens here) are sampled by the torch engine: set it to torch"
        )


def plan_of(config: HFConfig, folder: Path, dtype: torch.dtype, ranks: int = 1, *, heads: bool = False) -> Plan:
    """The plan of the policy that a config.json's content describes, of each rank where `ranks` share it; `folder`
    holds its weights. With `heads` its heads of multi-token prediction are modules (`families.Build`).

    Raises UserError where vLLM cannot hold its attention, or the ranks do not divide the policy, or it has no heads.
    """
    content = json.dumps(config, sort_keys=True)
    whole = _plan(content, folder, dtype, 1, heads)
    return whole if ranks == 1 else replace(_plan(content, folder, dtype, ranks, heads), given_holders=whole.holders)


@cache
def _plan(config: str, folder: Path, dtype: torch.dtype, ranks: int, heads: bool) -> Plan:
    policy = _without_memory(json.loads(config), folder, dtype, ranks, heads)
    token, recorder, of_head = torch.zeros(1, dtype=torch.long, device="meta"), Recorder(), Recorder()
    with torch.no_grad():
        hidden = policy.attend(token, token, recorder).hidden
        if heads:
            assert isinstance(policy, HybridPolicy)
            policy.predict(0, token, token, hidden, of_head)
    vocab_size, hidden_size = policy.lm_head_weight.shape
    plan = Plan(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        softmax=tuple(recorder.softmax_calls),
        recurrent=tuple(recorder.recurrent_calls),
        selected=recorder.selected,
        head=tuple(of_head.softmax_calls),
    )
    sizes = {call.latents or (call.kv_heads, call.head_size) for call in plan.softmax + plan.head}
    if len(sizes) > 1:
        raise UserError(f"vLLM cannot hold softmax layers of different (key heads, head sizes): {sorted(sizes)}")
    if not sizes:
        raise UserError(
            "rollout.engine: a policy without softmax layers is sampled by the torch engine: set it to torch"
        )
    return plan


def _without_memory(config: HFConfig, folder: Path, dtype: torch.dtype, ranks: int, heads: bool) -> Policy:
    """The policy, or a rank's share."""
    with torch.device("meta"):
        policy = build_share(config, folder, dtype, Ranks.first(ranks), heads=heads).policy
    for module in policy.modules():
        if isinstance(module, Experts):
            module.forward = _no_experts
    return policy


def _no_experts(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In the place of `Experts.forward`: the sizes of its groups are values, which the meta device does not have."""
    return x
