"""From a recipe's algorithm section to the resolved record: a named algorithm, a preset or the user's, with changes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cispo.algorithms import ALGORITHMS, Algorithm, KlPlace, Reduction, ZeroVariance
from cispo.algorithms.advantages import ADVANTAGES, GROUP_RELATIVE, gae
from cispo.algorithms.corrections import DEFAULT_BOUNDS, Correction, CorrectionKind
from cispo.algorithms.losses import Kl
from cispo.algorithms.objective import Anchor
from cispo.algorithms.presets import PRESETS
from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.user_code import load_object


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm with its changes, checked against the group size."""
    keys = recipe.algorithm
    settings = {key: getattr(keys, key) for key in (*LOSS_KEYS, *ADVANTAGE_KEYS)}
    same = ("advantage", "reduction", "kl", "kl_coef", "kl_in", "correction", "correction_low", "correction_high")
    same += ("zero_variance", "dynamic_sampling")
    changes = {key: getattr(keys, key) for key in same}
    resolved = resolve(named_algorithm(keys.name), Changes(settings=settings, anchor=keys.ratio_anchor, **changes))
    if recipe.rollout.group_size == 1 and resolved.advantage in GROUP_RELATIVE:
        raise UserError(
            f"rollout.group_size 1 gives {resolved.advantage.__name__} nothing to compare: every advantage would be 0"
        )
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


LOSS_KEYS = ("ratio_max", "ratio_min", "mask_low", "mask_high", "clip_low", "clip_high", "dual_clip")


ADVANTAGE_KEYS = ("gamma", "lam")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a recipe changes of an algorithm; None leaves the algorithm's own value."""

    settings: Mapping[str, float | None] = field(default_factory=dict)
    """LOSS_KEYS and ADVANTAGE_KEYS."""
    advantage: str | None = None
    reduction: Reduction | None = None
    anchor: Anchor | None = None
    kl: Kl | None = None
    kl_coef: float | None = None
    kl_in: KlPlace | None = None
    correction: Literal["none"] | CorrectionKind | None = None
    correction_low: float | None = None
    correction_high: float | None = None
    zero_variance: ZeroVariance | None = None
    dynamic_sampling: int | None = None


def resolve(algorithm: Algorithm, changes: Changes) -> Algorithm:
    """The algorithm with a recipe's changes.

    Raises UserError for a setting that the algorithm does not have, an unknown advantage, or a meaningless bound.
    """
    given = _advantage(algorithm, changes.advantage) if changes.advantage is not None else {}
    plain = ("reduction", "anchor", "kl", "kl_coef", "kl_in", "zero_variance", "dynamic_sampling")
    given |= {k: getattr(changes, k) for k in plain if getattr(changes, k) is not None}
    resolved = replace(algorithm, **given)
    settings = {k: v for k, v in changes.settings.items() if v is not None}
    foreign = [k for k in settings if k not in resolved.settings and k not in resolved.advantage_settings]
    if foreign:
        has = ", ".join((*resolved.settings, *resolved.advantage_settings)) or "none"
        raise UserError(f"algorithm.{foreign[0]} means nothing to {algorithm.name}, whose settings are: {has}")
    resolved = replace(
        resolved,
        settings={k: settings.get(k, v) for k, v in resolved.settings.items()},
        advantage_settings={k: settings.get(k, v) for k, v in resolved.advantage_settings.items()},
        correction=_correction(algorithm.correction, changes),
    )
    # A preset may repeat its framework's default, however odd; a number that the user chose may not.
    _check_bounds(resolved.settings, preset=algorithm.source is not None and "ratio_max" not in settings)
    _check_parts(resolved)
    return resolved


def _advantage(algorithm: Algorithm, name: str) -> dict[str, Any]:
    if name not in ADVANTAGES:
        raise UserError(f"algorithm.advantage {name!r} is unknown; there are {', '.join(ADVANTAGES)}")
    chosen = ADVANTAGES[name]
    if chosen is algorithm.advantage:
        return {}
    # Groups of equal rewards say something to an advantage that looks beyond the group.
    keep = {} if chosen in GROUP_RELATIVE else {"zero_variance": "keep"}
    settings = {"gamma": 1.0, "lam": 1.0} if chosen is gae else {}
    return {"advantage": chosen, "advantage_settings": settings, "critic": chosen is gae, **keep}


def _correction(own: Correction | None, changes: Changes) -> Correction | None:
    kind = changes.correction or (own.kind if own else "none")
    if kind == "none":
        if changes.correction_low is not None or changes.correction_high is not None:
            raise UserError("algorithm.correction_low and correction_high need an algorithm.correction")
        return None
    low, high = (own.low, own.high) if own and own.kind == kind else DEFAULT_BOUNDS[kind]
    low = low if changes.correction_low is None else changes.correction_low
    high = high if changes.correction_high is None else changes.correction_high
    if not 0 <= low < high:
        raise UserError(f"algorithm.correction_low {low} must be from 0 to below correction_high {high}")
    return Correction(kind=kind, low=low, high=high)


def _check_bounds(settings: Mapping[str, float | None], *, preset: bool) -> None:
    high, low = settings.get("ratio_max"), settings.get("ratio_min")
    if high is not None and high < 1 and not preset:
        raise UserError(
            f"algorithm.ratio_max {high} is below 1: it is the absolute cap on the importance weight, "
            "so every token would be scaled down (a cap of 1 + eps is meant?)"
        )
    if low is not None and high is not None and not 0 <= low <= min(1.0, high):
        raise UserError(f"algorithm.ratio_min {low} must be from 0 (no floor) to 1")
    for key in ("clip_low", "clip_high"):
        value = settings.get(key)
        if value is not None and value < 0:
            raise UserError(f"algorithm.{key} {value} must not be negative")
    dual = settings.get("dual_clip")
    if dual is not None and dual <= 1 + (settings.get("clip_high") or 0):
        raise UserError(f"algorithm.dual_clip {dual} must be above the clip 1 + clip_high")


def _check_parts(algorithm: Algorithm) -> None:
    if algorithm.correction is not None and algorithm.anchor == "rollout":
        raise UserError(
            f"algorithm.correction {algorithm.correction.kind} with ratio_anchor rollout counts the mismatch twice: "
            "the ratio divides by the engine's logprobs already (use ratio_anchor: old, or no correction)"
        )
    if algorithm.dynamic_sampling > 0 and algorithm.zero_variance == "keep":
        raise UserError(
            "algorithm.dynamic_sampling replaces groups of equal rewards, which zero_variance: keep wants in the batch"
        )
    if algorithm.advantage is gae and not algorithm.critic:
        raise UserError(f"the advantage of {algorithm.name} is gae, which needs the record's critic=True")
