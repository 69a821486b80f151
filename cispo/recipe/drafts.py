"""Drafts by the policy's own heads of multi-token prediction, as a recipe asks for them."""

from __future__ import annotations

from collections.abc import Mapping


def asks_heads(engine_args: Mapping[str, object]) -> bool:
    """Whether `rollout.engine_args` ask for heads: `speculative_config: {method: mtp, ...}`.

    The policy then has them as modules, in learners and engines, and the learner trains them.
    """
    given = engine_args.get("speculative_config")
    return isinstance(given, Mapping) and given.get("method") == "mtp"
