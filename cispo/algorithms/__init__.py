"""Algorithms: a record of pure functions each, in one dict literal; a user names their own as module:NAME.

    rewards --advantage--> advantages [L] --loss--> per-token loss --reduction (batch.packing)--> the gradient

The learner knows none of the names. Other frameworks' conventions are in `presets`, the texts of `cispo show` in
`describe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cispo.algorithms.advantages import (
    AdvantageFn,
    BatchBaseline,
    BatchWhiten,
    Gae,
    GroupMean,
    GroupNorm,
    LeaveOneOut,
    RewardToGo,
)
from cispo.algorithms.corrections import Correction
from cispo.algorithms.losses import Cispo, ClippedSurrogate, Gspo, Kl, LossFn, PolicyGradient
from cispo.algorithms.objective import Anchor, Objective

Reduction = Literal["token", "prompt", "sequence", "sequence_sum", "constant"]
KlPlace = Literal["loss", "reward"]
ZeroVariance = Literal["drop", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One algorithm; the defaults are its paper's. A field that a recipe may change has the name of the recipe's key.

    Example: Algorithm(name="cispo", loss=Cispo(ratio_max=5.0), reduction="prompt")
    """

    name: str
    loss: LossFn
    """(LossInputs) -> LossOutput; a recipe may change its dataclass fields."""
    advantage: AdvantageFn = GroupNorm()
    """(groups of TokenRewards) -> one tensor [L] a trajectory; a recipe may change its dataclass fields."""
    reduction: Reduction = "token"
    ratio_anchor: Anchor = "rollout"
    """The ratio's denominator: the engine's logprobs at sampling time, or the learner's before this batch."""
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
    """Of a preset: the framework that has this convention, and where it is written."""

    @property
    def objective(self) -> Objective:
        """The learner's part of the algorithm."""
        return Objective(
            loss=self.loss,
            ratio_anchor=self.ratio_anchor,
            kl=self.kl,
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
            correction=self.correction,
        )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0


# The cap is unpublished by MiniMax; ScaleRL (arXiv 2510.13786) found 4, 5 and 8 equivalent.
_CISPO = Cispo(ratio_max=5.0, ratio_min=0.0)
_PPO = ClippedSurrogate(clip_low=0.2, clip_high=0.2)

ALGORITHMS: dict[str, Algorithm] = {
    "cispo": Algorithm(name="cispo", loss=_CISPO),
    # Eq. 6-7 with DAPO's band in the mask; the weight stays capped.
    "cispo_masked": Algorithm(
        name="cispo_masked",
        loss=Cispo(ratio_max=5.0, ratio_min=0.0, mask_low=0.8, mask_high=1.28),
    ),
    # MiniMax's agents: per-turn rewards, reward-to-go, a group baseline and no division by the std.
    "cispo_agent": Algorithm(
        name="cispo_agent",
        loss=_CISPO,
        advantage=RewardToGo(),
        reduction="prompt",
        zero_variance="keep",
    ),
    "ppo": Algorithm(
        name="ppo",
        loss=_PPO,
        advantage=Gae(gamma=1.0, lam=1.0),
        ratio_anchor="old",
        critic=True,
        zero_variance="keep",
    ),
    "grpo": Algorithm(
        name="grpo",
        loss=_PPO,
        reduction="sequence",
        ratio_anchor="old",
        kl_coef=0.04,
    ),
    "dapo": Algorithm(
        name="dapo",
        loss=ClippedSurrogate(clip_low=0.2, clip_high=0.28),
        ratio_anchor="old",
        dynamic_sampling=10,
        overlong_share=0.2,
    ),
    "dr_grpo": Algorithm(
        name="dr_grpo",
        loss=_PPO,
        advantage=GroupMean(),
        reduction="constant",
        ratio_anchor="old",
        zero_variance="keep",
    ),
    "gspo": Algorithm(
        name="gspo",
        loss=Gspo(clip_low=3e-4, clip_high=4e-4),
        reduction="sequence",
        ratio_anchor="old",
    ),
    "rloo": Algorithm(
        name="rloo",
        loss=PolicyGradient(),
        advantage=LeaveOneOut(),
        reduction="sequence_sum",
        zero_variance="keep",
    ),
    "reinforce": Algorithm(
        name="reinforce",
        loss=PolicyGradient(),
        advantage=BatchBaseline(),
        zero_variance="keep",
    ),
    "reinforce_pp": Algorithm(
        name="reinforce_pp",
        loss=_PPO,
        advantage=BatchWhiten(),
        ratio_anchor="old",
        zero_variance="keep",
    ),
}
