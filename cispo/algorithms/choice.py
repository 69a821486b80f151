"""From a recipe's algorithm section to the resolved record: a named algorithm, a preset or the user's, with changes.

algorithm.name --named_algorithm--> Algorithm --resolve(the section's other keys)--> Algorithm, checked
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

from cispo.algorithms import ALGORITHMS, Algorithm
from cispo.algorithms.advantages import ADVANTAGES, Advantage, Gae
from cispo.algorithms.corrections import DEFAULT_BOUNDS, Correction
from cispo.algorithms.losses import Cispo, Loss, LossFn
from cispo.algorithms.presets import PRESETS
from cispo.errors import UserError
from cispo.recipe.schema import Algorithm as AlgorithmSection
from cispo.recipe.schema import Recipe
from cispo.recipe.user_code import load_object

Part = TypeVar("Part")

# Keys of the section that a run reads for itself, and those that name or make an object of the record.
_RUN_KEYS = {"name", "overlong_buffer", "overlong_penalty", "updates_per_batch", "epochs"}
_OBJECT_KEYS = {"advantage", "correction", "correction_low", "correction_high"}
# The record takes these as they are; any other key is a setting of the loss or of the advantage.
_PLAIN_KEYS = AlgorithmSection.model_fields.keys() & {field.name for field in fields(Algorithm)} - _OBJECT_KEYS


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm with its changes, checked against the group size."""
    resolved = resolve(named_algorithm(recipe.algorithm.name), recipe.algorithm)
    advantage = resolved.advantage
    if recipe.rollout.group_size == 1 and isinstance(advantage, Advantage) and advantage.group_relative:
        raise UserError(f"rollout.group_size 1 gives {advantage.name} nothing to compare: every advantage would be 0")
    return resolved


def named_algorithm(name: str) -> Algorithm:
    """The record of a name, a preset or module:NAME. Raises UserError where there is none."""
    if ":" in name:
        algorithm = load_object(name, "algorithm.name")
        if not isinstance(algorithm, Algorithm):
            raise UserError(f"algorithm.name: {name} is not an Algorithm record but a {type(algorithm).__name__}")
        return algorithm
    known = ALGORITHMS | PRESETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, or module:NAME"
        raise UserError(f"algorithm.name {name!r} is unknown ({hint})")
    return known[name]


def overlong_buffer_of(recipe: Recipe, algorithm: Algorithm, max_tokens: int) -> int:
    """Tokens before max_tokens over which the length penalty rises: the recipe's, else the algorithm's share."""
    given = recipe.algorithm.overlong_buffer
    return round(algorithm.overlong_share * max_tokens) if given is None else given


def resolve(algorithm: Algorithm, section: AlgorithmSection) -> Algorithm:
    """The algorithm with the changes of a recipe's section, in which None leaves the algorithm's own value.

    Raises UserError for a setting that the algorithm does not have, an unknown advantage, or a meaningless bound.
    """
    given = section.model_dump(exclude_none=True, exclude=_RUN_KEYS | _OBJECT_KEYS)
    plain = {key: given.pop(key) for key in _PLAIN_KEYS & given.keys()}
    resolved = replace(_with_advantage(algorithm, section.advantage), **plain)
    known = _settings(resolved.loss) + _settings(resolved.advantage)
    foreign = [key for key in given if key not in known]
    if foreign:
        has = ", ".join(key for key in known if key in AlgorithmSection.model_fields) or "none"
        raise UserError(f"algorithm.{foreign[0]} means nothing to {algorithm.name}, whose settings are: {has}")
    resolved = replace(
        resolved,
        loss=_changed(resolved.loss, given),
        advantage=_changed(resolved.advantage, given),
        correction=_correction(algorithm.correction, section),
    )
    # A preset may repeat its framework's default, however odd; a number that the user chose may not.
    if algorithm.source is None or "ratio_max" in given:
        _check_cap(resolved.loss)
    if isinstance(resolved.loss, Loss):
        resolved.loss.check()
    _check_parts(resolved)
    return resolved


def _with_advantage(algorithm: Algorithm, name: str | None) -> Algorithm:
    if name is None:
        return algorithm
    if name not in ADVANTAGES:
        raise UserError(f"algorithm.advantage {name!r} is unknown; there are {', '.join(ADVANTAGES)}")
    chosen = ADVANTAGES[name]
    if type(chosen) is type(algorithm.advantage):
        return algorithm
    # Groups of equal rewards say something to an advantage that looks beyond the group.
    zero_variance = algorithm.zero_variance if chosen.group_relative else "keep"
    return replace(algorithm, advantage=chosen, critic=isinstance(chosen, Gae), zero_variance=zero_variance)


def _settings(part: object) -> list[str]:
    """Names of the settings of a loss or an advantage: its dataclass fields."""
    return [field.name for field in fields(part)] if is_dataclass(part) else []


def _changed(part: Part, settings: Mapping[str, object]) -> Part:
    """The loss or advantage with those of the settings that are its own."""
    own = {name: settings[name] for name in _settings(part) if name in settings}
    return replace(part, **own) if own else part  # type: ignore[type-var]  # only a dataclass has settings


def _correction(own: Correction | None, section: AlgorithmSection) -> Correction | None:
    kind = section.correction or (own.kind if own else "none")
    if kind == "none":
        if section.correction_low is not None or section.correction_high is not None:
            raise UserError("algorithm.correction_low and correction_high need an algorithm.correction")
        return None
    low, high = (own.low, own.high) if own and own.kind == kind else DEFAULT_BOUNDS[kind]
    low = low if section.correction_low is None else section.correction_low
    high = high if section.correction_high is None else section.correction_high
    correction = Correction(kind=kind, low=low, high=high)
    correction.check()
    return correction


def _check_cap(loss: LossFn) -> None:
    if isinstance(loss, Cispo) and loss.ratio_max < 1:
        raise UserError(
            f"algorithm.ratio_max {loss.ratio_max} is below 1: it is the absolute cap on the importance weight, "
            "so every token would be scaled down (a cap of 1 + eps is meant?)"
        )


def _check_parts(algorithm: Algorithm) -> None:
    if algorithm.correction is not None and algorithm.ratio_anchor == "rollout":
        raise UserError(
            f"algorithm.correction {algorithm.correction.kind} with ratio_anchor rollout counts the mismatch twice: "
            "the ratio divides by the engine's logprobs already (use ratio_anchor: old, or no correction)"
        )
    if algorithm.dynamic_sampling > 0 and algorithm.zero_variance == "keep":
        raise UserError(
            "algorithm.dynamic_sampling replaces groups of equal rewards, which zero_variance: keep wants in the batch"
        )
    if isinstance(algorithm.advantage, Gae) and not algorithm.critic:
        raise UserError(f"the advantage of {algorithm.name} is gae, which needs the record's critic=True")
