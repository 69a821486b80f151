"""Algorithms: a record of pure functions each, in one dict literal; a user names their own as module:NAME.

An algorithm is an advantage (rewards of a batch -> one number a trajectory), a per-token loss with its settings, and a
reduction (how packing fills `loss_weights`). The learner knows none of the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cispo.algorithms.advantages import ADVANTAGES, AdvantageFn
from cispo.algorithms.losses import LossFn, cispo, clipped_surrogate
from cispo.types import UserError

Anchor = Literal["rollout", "old"]
Reduction = Literal["token", "prompt", "sequence", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One algorithm; the defaults are its paper's.

    Example: Algorithm(name="cispo", loss=cispo, settings={"ratio_max": 5.0, "ratio_min": 0.0})
    """

    name: str
    loss: LossFn
    """(LossInputs, **settings) -> LossOutput."""
    settings: Mapping[str, float | None] = field(default_factory=dict)
    """Keyword arguments of the loss; a recipe may change these and no others."""
    advantage: AdvantageFn = ADVANTAGES["group_norm"]
    reduction: Reduction = "token"
    anchor: Anchor = "rollout"
    """What the ratio divides by."""


ALGORITHMS: dict[str, Algorithm] = {
    # The cap is unpublished by MiniMax; ScaleRL (arXiv 2510.13786) found 4, 5 and 8 equivalent.
    "cispo": Algorithm(
        name="cispo",
        loss=cispo,
        settings={"ratio_max": 5.0, "ratio_min": 0.0, "mask_low": None, "mask_high": None},
    ),
    "grpo": Algorithm(
        name="grpo",
        loss=clipped_surrogate,
        settings={"clip_low": 0.2, "clip_high": 0.2},
        reduction="sequence",
        anchor="old",
    ),
}

LOSS_KEYS = ("ratio_max", "ratio_min", "mask_low", "mask_high", "clip_low", "clip_high")


def resolve(
    algorithm: Algorithm,
    *,
    settings: Mapping[str, float | None],
    advantage: str | None = None,
    reduction: Reduction | None = None,
    anchor: Anchor | None = None,
) -> Algorithm:
    """The algorithm with a recipe's changes; None leaves the algorithm's own value.

    Raises UserError for a setting that the algorithm does not have, an unknown advantage, or a meaningless bound.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    foreign = [k for k in given if k not in algorithm.settings]
    if foreign:
        has = ", ".join(algorithm.settings) or "none"
        raise UserError(f"algorithm.{foreign[0]} means nothing to {algorithm.name}, whose settings are: {has}")
    if advantage is not None and advantage not in ADVANTAGES:
        raise UserError(f"algorithm.advantage {advantage!r} is unknown; there are {', '.join(ADVANTAGES)}")
    changes: dict[str, Any] = {"settings": {**algorithm.settings, **given}}
    if advantage is not None:
        changes["advantage"] = ADVANTAGES[advantage]
    if reduction is not None:
        changes["reduction"] = reduction
    if anchor is not None:
        changes["anchor"] = anchor
    resolved = replace(algorithm, **changes)
    _check_bounds(resolved.settings)
    return resolved


def _check_bounds(settings: Mapping[str, float | None]) -> None:
    high, low = settings.get("ratio_max"), settings.get("ratio_min")
    if high is not None and high < 1:
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


def warnings(algorithm: Algorithm, *, updates_per_batch: int) -> list[str]:
    """What is legal and probably not meant, one sentence each."""
    found = []
    high, low = algorithm.settings.get("ratio_max"), algorithm.settings.get("ratio_min")
    if high is not None and 1 <= high < 1.5:
        found.append(f"ratio_max {high} is a PPO-like band: CISPO's cap is usually 4 to 8 (ScaleRL)")
    if low is not None and low > 0:
        found.append(f"ratio_min {low} keeps pushing tokens that the policy has already left: the paper uses none")
    if updates_per_batch == 1 and algorithm.anchor == "old":
        found.append("one update per batch anchored on the learner's own logprobs: every ratio is 1, the clip is inert")
    return found


def describe(algorithm: Algorithm) -> list[tuple[str, str]]:
    """(item, words) rows: the algorithm with its resolved bounds."""
    s = algorithm.settings
    rows = [("name", algorithm.name), ("advantage", algorithm.advantage.__doc__ or algorithm.advantage.__name__)]
    rows.append(("loss", (algorithm.loss.__doc__ or algorithm.loss.__name__).splitlines()[0]))
    if "ratio_max" in s:
        rows.append(
            ("importance weight", f"clipped to [{s['ratio_min']:g}, {s['ratio_max']:g}] (absolute), stop-gradient")
        )
        low, high = s.get("mask_low"), s.get("mask_high")
        sides = [f"A > 0 and ratio > {high:g}"] if high is not None else []
        sides += [f"A < 0 and ratio < {low:g}"] if low is not None else []
        rows.append(("token mask", "drops " + " or ".join(sides) if sides else "off"))
    if s.get("clip_low") is not None and s.get("clip_high") is not None:
        rows.append(("ratio", f"clipped to [{1 - (s['clip_low'] or 0):g}, {1 + (s['clip_high'] or 0):g}]"))
    anchors = {"rollout": "the engine's logprobs at sampling time", "old": "the learner's logprobs before this batch"}
    rows.append(("ratio divides by", anchors[algorithm.anchor]))
    reductions = {
        "token": "every token of the batch counts the same (1 / tokens)",
        "prompt": "every prompt counts the same, its tokens share it (the paper's eq. 4)",
        "sequence": "every completion counts the same, its tokens share it",
        "constant": "divided by completions * max_tokens (Dr. GRPO)",
    }
    rows.append(("reduction", f"{algorithm.reduction}: {reductions[algorithm.reduction]}"))
    return rows
