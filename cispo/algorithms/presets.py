"""CISPO and GRPO as other frameworks ship them: their bounds, anchor, reduction, std and KL defaults.

A number copied from one framework to another changes the algorithm: "0.2" is a cap of 0.2 in TRL, a band of [0.8, 1.2]
in verl and slime, and a cap of 1.2 in verl's example. Use a preset to reproduce a result, and `cispo` to train.

Not reproduced: sequence-level importance weights that multiply the loss by default (TRL), and optimizer defaults.
"""

from __future__ import annotations

from dataclasses import replace

from cispo.algorithms import ALGORITHMS, Algorithm, Anchor, Reduction
from cispo.algorithms.advantages import Advantage, GroupMean, GroupNorm
from cispo.algorithms.corrections import Correction
from cispo.algorithms.losses import Cispo, ClippedSurrogate

# torch.std (n - 1) and the framework's epsilon beside it.
_VERL_NORM = GroupNorm(ddof=1, epsilon=1e-6)
_TRL_NORM = GroupNorm(ddof=1, epsilon=1e-4)


def _cispo(
    name: str,
    source: str,
    low: float,
    high: float,
    *,
    reduction: Reduction = "token",
    ratio_anchor: Anchor = "old",
    kl_coef: float = 0.0,
    advantage: Advantage = _VERL_NORM,
    correction: Correction | None = None,
) -> Algorithm:
    return replace(
        ALGORITHMS["cispo"],
        name=name,
        source=source,
        loss=Cispo(ratio_max=high, ratio_min=low),
        advantage=advantage,
        reduction=reduction,
        ratio_anchor=ratio_anchor,
        kl_coef=kl_coef,
        correction=correction,
        zero_variance="keep",
    )


def _grpo(
    name: str,
    source: str,
    *,
    reduction: Reduction = "token",
    kl_coef: float = 0.0,
    advantage: Advantage = _VERL_NORM,
    dual_clip: float | None = None,
) -> Algorithm:
    return replace(
        ALGORITHMS["grpo"],
        name=name,
        source=source,
        loss=ClippedSurrogate(clip_low=0.2, clip_high=0.2, dual_clip=dual_clip),
        advantage=advantage,
        reduction=reduction,
        kl_coef=kl_coef,
        zero_variance="keep",
    )


PRESETS: dict[str, Algorithm] = {
    preset.name: preset
    for preset in (
        _cispo("verl_cispo", "verl 0.9, loss_mode=cispo with clip_ratio_low and _high of 0.2 (offsets)", 0.8, 1.2),
        _cispo("verl_example_cispo", "verl 0.9, examples/cispo_trainer: low 10, high 0.2, KL", 0, 1.2, kl_coef=0.001),
        _cispo(
            "trl_cispo", "TRL, loss_type=cispo, epsilon_high unset: epsilon 0.2 is the cap", 0, 0.2, advantage=_TRL_NORM
        ),
        _cispo("trl_docs_cispo", "TRL's documentation: epsilon_high 5.0 (absolute)", 0, 5, advantage=_TRL_NORM),
        _cispo("ms_swift_cispo", "ms-swift, loss_type cispo, epsilon_high unset: cap 0.2", 0, 0.2, advantage=_TRL_NORM),
        _cispo("skyrl_cispo", "SkyRL 0.3, policy_loss_type=cispo: offsets 1 and 4, KL loss on", 0, 5, kl_coef=0.001),
        _cispo("slime_cispo", "slime 0.3, eps_clip 0.2 (offsets), mean of samples", 0.8, 1.2, reduction="sequence"),
        _cispo("nemo_rl_cispo", "NeMo-RL 0.7, CISPO recipe: offsets 1 and 5, KL 0.01 by default", 0, 6, kl_coef=0.01),
        _cispo("roll_cispo", "ROLL 0.3, cispo_epsilon 0.1 (offsets), mean of samples", 0.9, 1.1, reduction="sequence"),
        _cispo(
            "open_instruct_cispo",
            "open-instruct 0.3, clip_higher 0.272, KL 0.05 and truncated importance weights by default",
            0,
            1.272,
            kl_coef=0.05,
            correction=Correction(kind="tis", low=0.0, high=2.0),
        ),
        _cispo("trinity_cispo", "Trinity-RFT, clip_range 1.0 and 0.28 (offsets), token mask off", 0, 1.28),
        # A sum over all tokens: the sum of each completion over their number is that up to a factor, which Adam drops.
        _cispo(
            "tinker_cispo",
            "Tinker, loss_fn=cispo: absolute bounds 0 and 4 on sampler logprobs, summed",
            0,
            4,
            reduction="sequence_sum",
            ratio_anchor="rollout",
            advantage=GroupMean(),
        ),
        _grpo("verl_grpo", "verl 0.9, adv_estimator=grpo: token mean, dual clip 3, no KL loss", dual_clip=3.0),
        _grpo("trl_grpo", "TRL 1.x, GRPOTrainer: loss_type dapo (token mean), beta 0", advantage=_TRL_NORM),
        _grpo("slime_grpo", "slime 0.3, advantage_estimator=grpo: mean of samples, no KL loss", reduction="sequence"),
        _grpo("skyrl_grpo", "SkyRL 0.3, grpo with policy_loss_type regular: token mean, KL loss 0.001", kl_coef=0.001),
    )
}
