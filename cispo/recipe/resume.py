"""Which changes a resumed run may have: of where and how long it runs, none that makes it another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cispo.errors import UserError
from cispo.recipe.schema import Recipe

# Sections and keys that do not change what is computed, or only from now on.
_FREE = (
    "output_dir",
    "device",
    "runtime",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.placement",
    "rollout.gpu_memory",
    "rollout.weight_sync",
    "rollout.verify_weights",
    "rollout.engine_args",
    "reward.timeout",
    "learner.ranks",
    "learner.tokens_per_micro_batch",
    "learner.gradient_checkpointing",
    "train",
    "control",
)


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Raises UserError where a run folder's recipe differs from `recipe` in a key that makes another run of it."""
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())
    before, now = dict(_leaves(stored)), dict(_leaves(recipe.model_dump(mode="json", exclude={"base"})))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"--resume: the run in {folder} has {key} {before.get(key)!r}, not {now.get(key)!r}: that would be "
                "another run (start it without --resume)"
            )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
