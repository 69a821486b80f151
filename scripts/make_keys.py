"""Writes docs/keys.md: the keys that most recipes set, with their defaults and sentences from the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cispo.recipe.schema import known_keys

FILE = Path(__file__).parents[1] / "docs" / "keys.md"

MOST_USED = {
    "The run": ("base", "name", "seed", "device", "logging"),
    "The policy": ("policy.model", "policy.dtype", "policy.lora"),
    "Prompts": ("data.source", "data.prompt", "data.system", "data.overlong", "eval.source", "eval.limit"),
    "Rewards": ("reward.functions", "reward.timeout"),
    "Sampling": (
        "rollout.prompts_per_step",
        "rollout.group_size",
        "rollout.max_tokens",
        "rollout.max_context",
        "rollout.temperature",
        "rollout.gpu_memory",
    ),
    "The loss": ("algorithm.name", "algorithm.ratio_max", "algorithm.updates_per_batch"),
    "The update": ("learner.lr", "learner.ranks"),
    "Length": ("train.steps", "train.eval_every", "train.save_every"),
}

_HEAD = """# The 30 most used keys

Written by `scripts/make_keys.py` from the schema. `recipes/schema.json` has every key, and editors complete from it;
`cispo show RECIPE` prints all values of a recipe; `key=value` on the command line changes one. A mapping is merged with
that of the recipe or its base; `{}` replaces it.
"""


def page() -> str:
    """The text of docs/keys.md."""
    fields = dict(known_keys())
    parts = [_HEAD]
    for heading, keys in MOST_USED.items():
        rows = [f"| `{key}` | {_default(fields[key])} | {_meaning(fields[key])} |" for key in keys]
        parts.append("\n".join([f"## {heading}\n", "| key | default | meaning |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value in (None, "") or isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _meaning(field: FieldInfo) -> str:
    sentence = " ".join((field.description or "").split())
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return sentence + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")


if __name__ == "__main__":
    FILE.write_text(page())
