"""Algorithms: a record of pure functions each, in one dict literal; a user names their own as module:NAME.

    rewards --advantage--> advantages [L] --loss--> per-token loss --reduction (packing)--> the gradient

The learner knows none of the names. Other frameworks' conventions are in `presets`, words about algorithms in `words`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cispo.algorithms.advantages import ADVANTAGES, AdvantageFn, gae
from cispo.algorithms.corrections import Correction
from cispo.algorithms.losses import Kl, LossFn, cispo, clipped_surrogate, gspo, policy_gradient
from cispo.algorithms.objective import Anchor, Objective

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
