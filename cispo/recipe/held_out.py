"""The held-out sets of a recipe and the names of their metrics.

eval: {...}                 one set        eval/accuracy, eval/pass@4 ...
eval: [{name: math, ...}]   several sets   eval/math/avg@4, eval/math/pass@4 ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cispo.recipe.schema import Eval, Recipe


def held_out_of(recipe: Recipe) -> list[Eval]:
    """The held-out sets, one in the single form."""
    if recipe.eval is None:
        return []
    return recipe.eval if isinstance(recipe.eval, list) else [recipe.eval]


def samples_of(recipe: Recipe, one: Eval) -> int:
    """Completions of each prompt of a set."""
    return one.samples or recipe.train.eval_samples


def prefix_of(recipe: Recipe, one: Eval) -> str:
    """First part of the names of a set's metrics."""
    return f"eval/{one.name}/" if isinstance(recipe.eval, list) else "eval/"


def passes(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to the number of samples, and that number."""
    return sorted({k for k in (2**power for power in range(1, samples.bit_length())) if k < samples} | {samples} - {1})


def votes(samples: int) -> list[int]:
    """The k of maj@k: as `passes`, from 3 on, since two votes decide nothing."""
    return [k for k in passes(samples) if k > 2]


def share_of_right(recipe: Recipe, one: Eval) -> str:
    """Name of a set's share of right completions."""
    prefix = prefix_of(recipe, one)
    return f"{prefix}avg@{samples_of(recipe, one)}" if isinstance(recipe.eval, list) else f"{prefix}accuracy"


def held_out_metrics(recipe: Recipe) -> list[str]:
    """Metrics of the evaluations in which a higher value is better, the shares of right completions first."""
    names = [share_of_right(recipe, one) for one in held_out_of(recipe)]
    for one in held_out_of(recipe):
        prefix, samples = prefix_of(recipe, one), samples_of(recipe, one)
        names += [f"{prefix}pass@{k}" for k in passes(samples)]
        names += [f"{prefix}maj@{k}" for k in votes(samples)] if one.answer is not None else []
        names.append(f"{prefix}reward")
    return names


def best_metric(recipe: Recipe) -> str:
    """Metric by which a checkpoint is the best."""
    sets = held_out_of(recipe)
    return recipe.train.best or (share_of_right(recipe, sets[0]) if sets else "eval/accuracy")
