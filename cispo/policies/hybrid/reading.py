"""Reading a config.json for a hybrid family: every value checked, every error a sentence that names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cispo.errors import UserError
from cispo.policies.hybrid.config import Rotary, Yarn
from cispo.policies.moe import Routing
from cispo.policies.policy import HFConfig


class Reader:
    """A config.json's content, read by key; a key that is null counts as missing.

    Example: Reader(config, "MiniMax-M2").size("hidden_size")
    """

    def __init__(self, config: HFConfig, family: str) -> None:
        self.config, self.family = config, family

    def get(self, key: str, default: object = None) -> object:
        value = self.config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`. Raises UserError without one and without a default."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"the policy's config lacks {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key} {value!r:.80} must be a whole number of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"the policy's config lacks {key!r}")
        return _positive(key, value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{key} {value!r:.80} must be true or false")
        return value

    def only(self, key: str, *allowed: object) -> None:
        """Raises UserError where the key is given with another value than those that the family has."""
        value = self.config.get(key)
        if value is not None and value not in allowed:
            names = " or ".join(repr(one) for one in allowed) or "null"
            raise UserError(f"{key} {value!r:.80} is not supported by {self.family} policies, only {names}")

    def kinds(self, key: str, allowed: Sequence[str], layers: int) -> tuple[str, ...] | None:
        """A list with one of `allowed` for each layer; None where the key is missing."""
        kinds = self.get(key)
        if kinds is None:
            return None
        if not isinstance(kinds, list | tuple):
            raise UserError(f"{key} {kinds!r:.80} must be a list with an entry for each layer")
        if len(kinds) != layers:
            raise UserError(f"{key} has {len(kinds)} entries for num_hidden_layers {layers}")
        unknown = [kind for kind in kinds if kind not in allowed]
        if unknown:
            raise UserError(f"{key} holds {unknown[0]!r}; it takes {' and '.join(repr(kind) for kind in allowed)}")
        return tuple(kinds)

    def sparse_layers(self, layers: int) -> tuple[bool, ...]:
        """Which layers have experts, by Qwen's keys: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
        dense, step = self.get("mlp_only_layers", []), self.size("decoder_sparse_step", 1)
        if not isinstance(dense, list | tuple):
            raise UserError(f"mlp_only_layers {dense!r:.80} must be a list of layers")
        return tuple(number not in dense and (number + 1) % step == 0 for number in range(layers))

    def heads(self, key: str, groups_key: str, default: int | None = None) -> tuple[int, int]:
        """Heads and key heads: (value of `key`, value of `groups_key`), the second a divisor of the first."""
        heads, groups = self.size(key), self.size(groups_key, default)
        if heads % groups:
            raise UserError(f"{key} {heads} is not a multiple of {groups_key} {groups}")
        return heads, groups

    def rope(self) -> Mapping[str, object]:
        """rope_parameters, or rope_scaling and the keys beside it as older config.json's have them."""
        given = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise UserError(f"rope_parameters {given!r:.80} must be a mapping")
        beside = {key: self.config[key] for key in ("rope_theta", "partial_rotary_factor") if key in self.config}
        return {**{key: value for key, value in beside.items() if value is not None}, **given}

    def rotary(self, head_dim: int, *, theta: float = 10000.0, factor: float = 1.0) -> Rotary:
        """Rotary positions of `head_dim` * partial_rotary_factor dims; `theta` and `factor` where no key says them."""
        rope = self.rope()
        share = _positive("partial_rotary_factor", rope.get("partial_rotary_factor", factor))
        dim = int(head_dim * share)
        if dim % 2 or not 0 < dim <= head_dim:
            raise UserError(
                f"partial_rotary_factor {share} turns {dim} dims: it must be an even number up to {head_dim}"
            )
        theta = _positive("rope_theta", rope.get("rope_theta", theta))
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return Rotary(dim=dim, theta=theta)
        if kind != "yarn":
            raise UserError(
                f"rope_type {kind!r:.80} is not supported by {self.family} policies, only 'default' or 'yarn'"
            )
        return Rotary(dim=dim, theta=theta, yarn=self._yarn(rope))

    def _yarn(self, rope: Mapping[str, object]) -> Yarn:
        original = rope.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise UserError(f"original_max_position_embeddings {original!r:.80} must be a whole number above 0")
        factor = rope.get("factor")
        factor = self.size("max_position_embeddings") / original if factor is None else _positive("factor", factor)
        mscale, everywhere = rope.get("mscale"), rope.get("mscale_all_dim")
        if rope.get("attention_factor") is not None:
            attention = _positive("attention_factor", rope["attention_factor"])
        elif mscale and everywhere:
            attention = yarn_scale(factor, _positive("mscale", mscale)) / yarn_scale(
                factor, _positive("mscale_all_dim", everywhere)
            )
        else:
            attention = yarn_scale(factor)
        return Yarn(
            factor=factor,
            original_positions=original,
            beta_fast=_positive("beta_fast", rope.get("beta_fast") or 32),
            beta_slow=_positive("beta_slow", rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=attention,
        )

    def check_routing(self, routing: Routing, experts_key: str) -> Routing:
        """The routing itself. Raises UserError where its numbers do not go together."""
        experts, groups, kept = routing.num_experts, routing.groups, routing.kept_groups
        if experts % groups:
            raise UserError(f"{experts_key} {experts} is not a multiple of n_group {groups}")
        if kept > groups:
            raise UserError(f"topk_group {kept} is more than n_group {groups}")
        among = experts // groups * kept
        if routing.top_k > among:
            raise UserError(
                f"num_experts_per_tok {routing.top_k} must be from 1 to {among}, the experts to choose from"
            )
        return routing


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """The growth of attention's logits with a context that is `factor` times as long (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _positive(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{key} {value!r:.80} must be a number above 0")
    return float(value)
