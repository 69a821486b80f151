"""Changes that a resumed run may have: those of where and how long it runs, none that makes it another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cispo.errors import UserError
from cispo.recipe.load import read_stored
from cispo.recipe.schema import Recipe

# Sections and keys that change nothing of the computation, or only of the steps to come.
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
    """Raises UserError where a run folder's recipe differs from `recipe` in a key that makes another run of it.

    A key that is newer than the run has its default in the run.
    """
    before, now = _leaves(read_stored(folder / "recipe.yaml")), _leaves(recipe)
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"--resume: the run in {folder} has {key} {before.get(key)!r}, not {now.get(key)!r}: that would be "
                "another run (start it without --resume)"
            )


def _leaves(recipe: Recipe) -> dict[str, object]:
    """Dotted key -> value; an empty section is a value."""
    return dict(_walk(recipe.model_dump(mode="json", exclude={"base"}), ""))


def _walk(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
