"""Algorithms: a record of pure functions each, in one dict literal; a user names their own as module:NAME.

    rewards --advantage--> advantages [L] --loss--> per-token loss --reduction (packing)--> the gradient

The learner knows none of the names. Other frameworks' conventions are in `presets`, words about algorithms in `words`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cispo.algorithms.advantages import ADVANTAGES, GROUP_RELATIVE, AdvantageFn, gae
from cispo.algorithms.corrections import DEFAULT_BOUNDS, Correction, CorrectionKind
from cispo.algorithms.losses import Kl, LossFn, cispo, clipped_surrogate, gspo, policy_gradient
from cispo.algorithms.objective import Anchor, Objective
from cispo.errors import UserError

Reduction = Literal["token", "prompt", "sequence", "sequence_sum", "constant"]
KlPlace = Literal["loss", "reward"]
ZeroVariance = Literal["drop", "keep"]


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
    """(groups of TokenRewards, **advantage_settings) -> one tensor [L] a trajectory."""
    advantage_settings: Mapping[str, float] = field(default_factory=dict)
    reduction: Reduction = "token"
    anchor: Anchor = "rollout"
    """What the ratio divides by."""
    kl: Kl = "k3"
    kl_coef: float = 0.0
    """Factor of KL(policy || the policy at the start); 0 is none, and then no reference policy is kept."""
    kl_in: KlPlace = "loss"
    correction: Correction | None = None
    critic: bool = False
    """Whether a value function is learned beside the policy; its values reach the advantage."""
    zero_variance: ZeroVariance = "drop"
    """Whether groups of equal rewards, which have no group-relative advantage, count in the reduction."""
    dynamic_sampling: int = 0
    """Most further rounds of sampling that replace groups of equal rewards."""
    overlong_share: float = 0.0
    """Last share of max_tokens over which DAPO's soft length penalty rises."""
    source: str | None = None
    """Of a preset: whose convention it is, and where that is written."""

    @property
    def objective(self) -> Objective:
        """What the learner needs of it."""
        return Objective(
            loss=self.loss,
            settings=dict(self.settings),
            anchor=self.anchor,
            kl=self.kl,
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
            correction=self.correction,
        )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0


# The cap is unpublished by MiniMax; ScaleRL (arXiv 2510.13786) found 4, 5 and 8 equivalent.
_CISPO_WEIGHT = {"ratio_max": 5.0, "ratio_min": 0.0, "mask_low": None, "mask_high": None}
_PPO_BAND = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}

ALGORITHMS: dict[str, Algorithm] = {
    "cispo": Algorithm(name="cispo", loss=cispo, settings=_CISPO_WEIGHT),
    # Eq. 6-7 with DAPO's band in the mask; the weight stays capped.
    "cispo_masked": Algorithm(
        name="cispo_masked",
        loss=cispo,
        settings={**_CISPO_WEIGHT, "mask_low": 0.8, "mask_high": 1.28},
    ),
    # MiniMax's agents: per-turn rewards, reward-to-go, a group baseline and no division by the std.
    "cispo_agent": Algorithm(
        name="cispo_agent",
        loss=cispo,
        settings=_CISPO_WEIGHT,
        advantage=ADVANTAGES["reward_to_go"],
        reduction="prompt",
        zero_variance="keep",
    ),
    "ppo": Algorithm(
        name="ppo",
        loss=clipped_surrogate,
        settings=_PPO_BAND,
        advantage=gae,
        advantage_settings={"gamma": 1.0, "lam": 1.0},
        anchor="old",
        critic=True,
        zero_variance="keep",
    ),
    "grpo": Algorithm(
        name="grpo",
        loss=clipped_surrogate,
        settings=_PPO_BAND,
        reduction="sequence",
        anchor="old",
        kl_coef=0.04,
    ),
    "dapo": Algorithm(
        name="dapo",
        loss=clipped_surrogate,
        settings={**_PPO_BAND, "clip_high": 0.28},
        anchor="old",
        dynamic_sampling=10,
        overlong_share=0.2,
    ),
    "dr_grpo": Algorithm(
        name="dr_grpo",
        loss=clipped_surrogate,
        settings=_PPO_BAND,
        advantage=ADVANTAGES["group_mean"],
        reduction="constant",
        anchor="old",
        zero_variance="keep",
    ),
    "gspo": Algorithm(
        name="gspo",
        loss=gspo,
        settings={"clip_low": 3e-4, "clip_high": 4e-4},
        reduction="sequence",
        anchor="old",
    ),
    "rloo": Algorithm(
        name="rloo",
        loss=policy_gradient,
        advantage=ADVANTAGES["leave_one_out"],
        reduction="sequence_sum",
        zero_variance="keep",
    ),
    "reinforce": Algorithm(
        name="reinforce",
        loss=policy_gradient,
        advantage=ADVANTAGES["batch_baseline"],
        zero_variance="keep",
    ),
    "reinforce_pp": Algorithm(
        name="reinforce_pp",
        loss=clipped_surrogate,
        settings=_PPO_BAND,
        advantage=ADVANTAGES["batch_whiten"],
        anchor="old",
        zero_variance="keep",
    ),
}

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
