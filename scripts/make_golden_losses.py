"""Golden vectors for policy-gradient losses: writes tests/golden/losses.json, which tests/golden/README.md explains.

    python scripts/make_golden_losses.py [--check]

Written from the papers with the standard library alone and sharing no code with the package, so that the two cannot
share a mistake. Before anything is written every gradient is compared with a central difference in which the
stop-gradient factors stay frozen, and every number worked out by hand (PRINTED) is compared with the computed one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from math import exp, fsum, log
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[1] / "tests" / "golden" / "losses.json"
STEP = 1e-6  # of the central differences
MARGIN = 2e-5  # of random ratios and values from every kink or jump; a central difference moves them by less

Case = dict[str, Any]  # JSON
Completion = dict[str, Any]  # one of the "sequences" of a case
Batch = list[Completion]
Algorithm = dict[str, Any]
Token = tuple[int, int]  # sequence, position
Tokens = dict[Token, float]  # unmasked tokens only
TokenLoss = Callable[[Token, float], tuple[float, float]]  # its loss and derivative at a live logprob or value

CONVENTIONS = {
    "sequences": "Each is one completion. Its arrays have one entry per listed token; logprobs are natural logarithms.",
    "mask": "1 is trained on, 0 is not (tool output, injected text). Masked tokens count nowhere, whatever they hold.",
    "total": "Sum over unmasked tokens of losses * loss_weights, to be minimised; gradients are d total / d logprobs.",
    "losses": "correction_weights * policy loss + kl_coef * KL (where kl_in is loss), per token, before loss_weights.",
    "stop_gradient": "sg(), anchors, advantages and corrections are constants in the gradient.",
    "ratio": "r = exp(logprobs - anchor logprobs); the anchor is rollout or old, or null where no ratio is used.",
    "null": "A setting that is null is switched off.",
    "policy_gradient": "-A lp",
    "clipped_surrogate": "-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with dual_clip c at most -c A if A < 0.",
    "gspo": "The clipped surrogate of sg(s) exp(lp - sg(lp)), s = exp(mean of log r over the sequence).",
    "cispo": "-sg(clip(r, ratio_min, ratio_max)) M A lp; M = 0 if A > 0, r > mask_high or A < 0, r < mask_low, else 1.",
    "sapo": "-(4 / tau) sigmoid(tau (r - 1)) A; tau is tau_positive if A > 0, else tau_negative.",
    "clamped_ratio": "-clip(r, 1 - clip_low, 1 + clip_high) A: not CISPO, though published as such; kept as contrast.",
    "kl": "With d = ref - lp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. kl_in loss: its plain derivative counts.",
    "kl_in_reward": "Every token's reward gets -kl_coef * k(anchor logprobs for lp, ref_logprobs), a constant.",
    "rewards": "Named streams of per-token rewards, added up. R is a completion's sum over tokens and streams.",
    "group_norm": "(R - mean) / (std + epsilon) in the group, std with n - ddof. All R equal: exact zeros.",
    "group_mean": "R - mean of the group.",
    "leave_one_out": "R - mean of the group's other completions.",
    "batch_baseline": "R - mean over the batch's completions.",
    "batch_norm": "(R - mean of the group) / population std of these differences over the batch's completions.",
    "reward_to_go": "Sum of token rewards from this token on, minus the group's mean R.",
    "batch_whiten": "Sum of token rewards from this token on, whitened.",
    "gae": "delta = r + gamma V_next - V, V_next of the next unmasked token, 0 after the last; returns = A + V; then "
    "A is whitened if whiten.",
    "whitened": "Minus mean, over population std, both over the batch's unmasked tokens.",
    "given": "The advantages are the case's own.",
    "reduction": "token: 1 / tokens of the batch. prompt: 1 / (groups * tokens of the group). sequence: 1 / (sequences "
    "* tokens of the sequence). sequence_sum: 1 / sequences. constant: 1 / (sequences * max_tokens).",
    "correction": "rho = exp(old - rollout). tis: min(rho, max). icepop: rho if min <= rho <= max, else 0. "
    "sequence_mask: 1 if min <= exp(mean log rho of the sequence) <= max, else 0. loss_weights stay as they are.",
    "value_losses": "0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) with V = new_values, V_old = values, "
    "G = returns, c = value_clip. value_total is the token mean; value_gradients = d value_total / d new_values.",
}


# -------------------------------------------------------------------------------------------------------- small helpers
def mean(numbers: list[float]) -> float:
    return fsum(numbers) / len(numbers)  # not sum(), which rounds differently from Python 3.12 on


def std(numbers: list[float], ddof: int = 0) -> float:
    centre = mean(numbers)
    return math.sqrt(fsum((x - centre) ** 2 for x in numbers) / (len(numbers) - ddof))


def clip(x: float, low: float | None, high: float | None) -> float:
    x = x if low is None else max(x, low)
    return x if high is None else min(x, high)


def tokens(batch: Batch, name: str) -> Tokens:
    masks = [sequence["mask"] for sequence in batch]
    return {(i, t): batch[i][name][t] for i, mask in enumerate(masks) for t, keep in enumerate(mask) if keep}


def rows(batch: Batch, values: Tokens) -> list[list[float]]:
    """One list per sequence, 0 at masked tokens; adding 0.0 turns -0.0 into 0.0."""
    return [[values.get((i, t), 0.0) + 0.0 for t in range(len(s["mask"]))] for i, s in enumerate(batch)]


def sequence_means(values: Tokens) -> Tokens:
    return {(i, t): mean([x for (j, _), x in values.items() if j == i]) for i, t in values}


def anchor_logprobs(batch: Batch, algorithm: Algorithm) -> Tokens:
    return tokens(batch, f"{algorithm['anchor']}_logprobs" if algorithm["anchor"] else "logprobs")


# -------------------------------------------------------------------------------------------------- rewards, advantages
def kl(kind: str, lp: float, ref: float) -> tuple[float, float]:
    """KL(policy, ref) and d / d lp; with d = ref - lp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d (GRPO 2402.03300)."""
    d = ref - lp
    return {"k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (exp(d) - 1 - d, 1 - exp(d))}[kind]


def token_rewards(batch: Batch, algorithm: Algorithm) -> Tokens:
    """Sum of the streams, and -kl_coef * KL(anchor, ref) where the KL is in the reward (REINFORCE++ 2501.03262)."""
    rewards = {(i, t): fsum(s[t] for s in batch[i]["rewards"].values()) for i, t in tokens(batch, "mask")}
    if algorithm["kl_in"] == "reward":
        anchor, ref = anchor_logprobs(batch, algorithm), tokens(batch, "ref_logprobs")
        return {k: r - algorithm["kl_coef"] * kl(algorithm["kl"], anchor[k], ref[k])[0] for k, r in rewards.items()}
    return rewards


def completion_advantage(kind: str, r: float, group: list[float], batch: list[float], settings: Algorithm) -> float:
    """One number per completion. GRPO 2402.03300: (R - mean) / std. Dr. GRPO 2503.20783: R - mean of the group.
    RLOO 2402.14740: R_i - mean_{j != i} R_j. REINFORCE with baseline: R - mean of the batch."""
    if kind == "group_norm":
        # Zeros by rule: in a group of equal rewards rounding must not decide the value of 0 / 0.
        equal = max(group) == min(group)
        return 0.0 if equal else (r - mean(group)) / (std(group, settings["ddof"]) + settings["epsilon"])
    if kind == "leave_one_out":
        return r - (fsum(group) - r) / (len(group) - 1)
    return r - mean(batch if kind == "batch_baseline" else group)


def gae(rewards: Tokens, values: Tokens, gamma: float, lam: float) -> Tokens:
    """A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next - V_t (1506.02438); masked tokens are skipped."""
    advantages: Tokens = {}
    following = (-1, 0.0, 0.0)  # sequence, value and advantage of the next unmasked token
    for i, t in reversed(list(values)):
        next_value, next_advantage = following[1:] if following[0] == i else (0.0, 0.0)
        advantages[i, t] = rewards[i, t] + gamma * next_value - values[i, t] + gamma * lam * next_advantage
        following = (i, values[i, t], advantages[i, t])
    return {key: advantages[key] for key in values}


def whiten(values: Tokens) -> Tokens:
    """(x - mean) / population std over the batch's tokens (REINFORCE++ 2501.03262)."""
    centre, scale = mean(list(values.values())), std(list(values.values()))
    return {key: (x - centre) / scale for key, x in values.items()}


def advantages_of(batch: Batch, algorithm: Algorithm, rewards: Tokens) -> Tokens:
    """Per-token advantages; reward_to_go with the group's mean as baseline is CISPO for agents (2605.26494)."""
    kind, settings = algorithm["advantage"], algorithm["advantage_settings"]
    if kind == "gae":
        return gae(rewards, tokens(batch, "values"), settings["gamma"], settings["lam"])
    totals = [fsum(r for (j, _), r in rewards.items() if j == i) for i in range(len(batch))]
    groups = [[r for r, other in zip(totals, batch, strict=True) if other["group"] == s["group"]] for s in batch]
    if kind in ("reward_to_go", "batch_whiten"):
        to_go = {(i, t): fsum(r for (j, p), r in rewards.items() if j == i and p >= t) for i, t in rewards}
        return whiten(to_go) if kind == "batch_whiten" else {(i, t): x - mean(groups[i]) for (i, t), x in to_go.items()}
    each = [completion_advantage(kind, r, group, totals, settings) for r, group in zip(totals, groups, strict=True)]
    if kind == "batch_norm":  # centred by group, scaled by batch: ScaleRL 2510.13786
        each = [advantage / std(each) for advantage in each]
    return {(i, t): each[i] for i, t in rewards}


def soft_overlong(length: int, max_length: int, cache_length: int) -> float:
    """0 up to max - cache tokens, then ((max - cache) - length) / cache, -1 beyond max (DAPO 2503.14476, Eq. 13)."""
    return -1.0 if length > max_length else min(0.0, (max_length - cache_length - length) / cache_length)


# --------------------------------------------------------------------------------------------------------------- losses
def surrogate(ratio: float, advantage: float, settings: Algorithm) -> tuple[float, float]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO 1707.06347), if A < 0 at most -c A (dual clip 1912.09729)."""
    free = ratio * advantage
    held = clip(ratio, 1 - settings["clip_low"], 1 + settings["clip_high"]) * advantage
    dual_clip = settings.get("dual_clip")
    if dual_clip is not None and advantage < 0 and min(free, held) < dual_clip * advantage:
        return -dual_clip * advantage, 0.0
    return -min(free, held), -free if free <= held else 0.0


def policy_loss(
    algorithm: Algorithm, lp: float, sg_lp: float, anchor: float, s: float, a: float
) -> tuple[float, float]:
    """Loss and d loss / d lp of one token; sg_lp is lp under a stop-gradient, s the ratio of the sequence, a = A."""
    kind, settings, ratio = algorithm["loss"], algorithm["settings"], exp(lp - anchor)
    if kind == "policy_gradient":  # -A lp: REINFORCE
        return -a * lp, -a
    if kind == "clipped_surrogate":
        return surrogate(ratio, a, settings)
    if kind == "gspo":  # GSPO-token (2507.18071): the value of s, with a gradient for one token
        return surrogate(s * exp(lp - sg_lp), a, settings)
    if kind == "cispo":  # -sg(clip(r)) M A lp (2506.13585, Eq. 4 to 7)
        r, high, low = exp(sg_lp - anchor), settings["mask_high"], settings["mask_low"]
        dropped = (a > 0 and high is not None and r > high) or (a < 0 and low is not None and r < low)
        weight = 0.0 if dropped else clip(r, settings["ratio_min"], settings["ratio_max"])
        return -weight * a * lp, -weight * a
    if kind == "sapo":  # -(4 / tau) sigmoid(tau (r - 1)) A (2511.20347)
        tau = settings["tau_positive"] if a > 0 else settings["tau_negative"]
        gate = 1 / (1 + exp(-tau * (ratio - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a
    assert kind == "clamped_ratio", kind
    clipped = clip(ratio, 1 - settings["clip_low"], 1 + settings["clip_high"])
    return -clipped * a, -ratio * a if clipped == ratio else 0.0


def loss_weights(batch: Batch, reduction: str, max_tokens: int) -> Tokens:
    """token DAPO 2503.14476; prompt CISPO 2506.13585 Eq. 4; sequence GRPO 2402.03300; constant Dr. GRPO 2503.20783."""
    keys = list(tokens(batch, "mask"))
    groups = [sequence["group"] for sequence in batch]
    denominators: dict[str, Callable[[int], int]] = {
        "token": lambda i: len(keys),
        "prompt": lambda i: len(set(groups)) * sum(groups[j] == groups[i] for j, _ in keys),
        "sequence": lambda i: len(batch) * sum(j == i for j, _ in keys),
        "sequence_sum": lambda i: len(batch),
        "constant": lambda i: len(batch) * max_tokens,
    }
    return {(i, t): 1 / denominators[reduction](i) for i, t in keys}


def correction_weights(batch: Batch, kind: str, low: float, high: float) -> Tokens:
    """rho = old / rollout; tis: min(rho, C); icepop: rho inside a band (2510.18855); sequence_mask: 1 where the
    sequence's geometric mean of rho is inside a band (2512.23075)."""
    old, rollout = tokens(batch, "old_logprobs"), tokens(batch, "rollout_logprobs")
    log_rho = {key: old[key] - rollout[key] for key in old}
    if kind == "tis":
        return {key: min(exp(x), high) for key, x in log_rho.items()}
    if kind == "icepop":
        return {key: exp(x) if low <= exp(x) <= high else 0.0 for key, x in log_rho.items()}
    return {key: float(low <= exp(x) <= high) for key, x in sequence_means(log_rho).items()}


def value_loss(value: float, old: float, target: float, bound: float) -> tuple[float, float]:
    """0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2): the clipped value loss of PPO's implementations."""
    free, held = (value - target) ** 2, (clip(value, old - bound, old + bound) - target) ** 2
    return 0.5 * max(free, held), value - target if free >= held else 0.0


# ----------------------------------------------------------------------------------------------------------- evaluation
def weighted(at: Tokens, weights: Tokens, loss: TokenLoss) -> tuple[float, Tokens, Tokens]:
    """Total, losses and gradients of a per-token loss at `at`, each gradient checked by a central difference."""

    def total(live: Tokens) -> float:
        return fsum(weights[key] * loss(key, x)[0] for key, x in live.items())

    losses = {key: loss(key, x)[0] for key, x in at.items()}
    gradients = {key: weights[key] * loss(key, x)[1] for key, x in at.items()}
    assert_gradients(total, at, gradients)
    return total(at), losses, gradients


def evaluate(case: Case, algorithm: Algorithm) -> Case:
    """The expected arrays of one algorithm on one case."""
    batch: Batch = case["sequences"]
    result: Case = {"algorithm": algorithm}
    if algorithm["advantage"] == "given":
        raw = advantages = {(i, t): case["advantages"][i][t] for i, t in tokens(batch, "mask")}
    else:
        rewards = token_rewards(batch, algorithm)
        raw = advantages = advantages_of(batch, algorithm, rewards)
        if algorithm["kl_in"] == "reward":
            result["token_rewards"] = rows(batch, rewards)
        if algorithm["advantage_settings"].get("whiten"):
            advantages = whiten(raw)
    result["advantages"] = rows(batch, advantages)
    if "logprobs" not in batch[0]:
        return result

    lp, anchor = tokens(batch, "logprobs"), anchor_logprobs(batch, algorithm)
    ratio = {key: exp(x) for key, x in sequence_means({key: lp[key] - anchor[key] for key in lp}).items()}
    correction, limits = dict.fromkeys(lp, 1.0), algorithm["correction_settings"]
    if algorithm["correction"]:
        correction = correction_weights(batch, algorithm["correction"], limits.get("min", 0.0), limits["max"])
        result["correction_weights"] = rows(batch, correction)

    def loss(key: Token, live: float) -> tuple[float, float]:
        value, slope = policy_loss(algorithm, live, lp[key], anchor[key], ratio[key], advantages[key])
        value, slope = correction[key] * value, correction[key] * slope
        if algorithm["kl_in"] == "loss":
            i, t = key
            penalty, penalty_slope = kl(algorithm["kl"], live, batch[i]["ref_logprobs"][t])
            value, slope = value + algorithm["kl_coef"] * penalty, slope + algorithm["kl_coef"] * penalty_slope
        return value, slope

    weights = loss_weights(batch, algorithm["reduction"], case["max_tokens"])
    total, losses, gradients = weighted(lp, weights, loss)
    if algorithm["loss"] == "gspo":
        assert_gradients(lambda live: gspo_total(algorithm, live, anchor, advantages, weights), lp, gradients)
    arrays = {"loss_weights": weights, "losses": losses, "gradients": gradients}
    result |= {name: rows(batch, array) for name, array in arrays.items()} | {"total": total + 0.0}

    if algorithm["advantage"] == "gae":
        new, old, bound = tokens(batch, "new_values"), tokens(batch, "values"), algorithm["value_clip"]
        returns = {key: raw[key] + old[key] for key in raw}
        for key, value in new.items():
            midpoint = (value + clip(value, old[key] - bound, old[key] + bound)) / 2
            assert abs(abs(value - old[key]) - bound) > MARGIN and abs(midpoint - returns[key]) > MARGIN
        weights = loss_weights(batch, "token", case["max_tokens"])
        total, losses, gradients = weighted(new, weights, lambda k, v: value_loss(v, old[k], returns[k], bound))
        arrays = {"returns": returns, "value_losses": losses, "value_gradients": gradients}
        result |= {name: rows(batch, array) for name, array in arrays.items()} | {"value_total": total}
    return result


# --------------------------------------------------------------------------------------------------------------- proofs
def assert_gradients(total: Callable[[Tokens], float], at: Tokens, gradients: Tokens) -> None:
    for key, gradient in gradients.items():
        up, down = total({**at, key: at[key] + STEP}), total({**at, key: at[key] - STEP})
        assert math.isclose((up - down) / (2 * STEP), gradient, rel_tol=1e-7, abs_tol=1e-8), (key, gradient)


def gspo_total(algorithm: Algorithm, live: Tokens, anchor: Tokens, advantages: Tokens, weights: Tokens) -> float:
    """GSPO proper, differentiated through the whole sequence's s: GSPO-token must have the same gradient."""
    s = sequence_means({key: live[key] - anchor[key] for key in live})
    return fsum(weights[key] * surrogate(exp(s[key]), advantages[key], algorithm["settings"])[0] for key in live)


def assert_printed(cases: dict[str, Case]) -> None:
    """Each number worked out by hand, to half a unit of its last digit."""
    for line in PRINTED.split("\n")[1:-1]:
        case, field, *entries = line.split()
        for name, numbers in (entry.split("=") for entry in entries):
            array = cases[case]["expected"][name][field.removesuffix("_sum")]
            computed = [array] if field == "total" else [x for row in array for x in row]
            computed = [fsum(computed)] if field.endswith("_sum") else computed
            for number, digits in zip(computed, numbers.split(","), strict=True):
                half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) if "." in digits else 0.0
                assert abs(number - float(digits)) <= half + 1e-12, (case, name, field, number, digits)


def assert_covered(cases: dict[str, Case]) -> None:
    """The random batches reach every branch, off the bounds, and the identities between the losses hold on them."""

    def flat(case: str, name: str, field: str) -> list[float]:
        pairs = zip(cases[case]["sequences"], cases[case]["expected"][name][field], strict=True)
        return [x for sequence, row in pairs for keep, x in zip(sequence["mask"], row, strict=True) if keep]

    def dropped(name: str, sign: int) -> list[bool]:
        pairs = zip(flat("ragged", name, "advantages"), flat("ragged", name, "gradients"), strict=True)
        return [gradient == 0 for advantage, gradient in pairs if advantage * sign > 1e-9]

    for case in ("ragged", "corrections"):
        lp, old, rollout = (tokens(cases[case]["sequences"], f"{name}logprobs") for name in ("", "old_", "rollout_"))
        for top, bottom in ((lp, old), (lp, rollout), (old, rollout)):
            logs = {key: top[key] - bottom[key] for key in top}
            bounds = [(exp(x), bound) for x in logs.values() for bound in (0.5, 0.8, 1.2, 1.28, 2, 3, 5)]
            bounds += [(exp(x), bound) for x in sequence_means(logs).values() for bound in (0.9, 0.9997, 1.0004, 1.1)]
            assert all(abs(ratio - bound) > MARGIN for ratio, bound in bounds)
            found = [exp(x) for x in logs.values()]
            if top is old:
                assert min(found) < 0.5 and max(found) > 5 and any(2 < rho < 5 for rho in found)
            elif case == "ragged":
                assert 0.05 <= min(found) < 0.06 and 18 < max(found) <= 20
    for name in ("ppo", "dapo", "gspo", "cispo_masked"):
        assert all(set(dropped(name, sign)) == {True, False} for sign in (1, -1)), name
    assert sum(dropped("dapo_dual_clip", -1)) > sum(dropped("dapo", -1))
    assert set(flat("corrections", "cispo_sequence_mask", "correction_weights")) == {0.0, 1.0}
    assert 0.0 in flat("ragged", "ppo", "value_gradients")
    # The mask of CISPO without its clip is DAPO's rule; on policy neither does anything.
    assert flat("ragged", "cispo_as_dapo", "gradients") == flat("ragged", "dapo", "gradients")
    on_policy = [flat("on_policy", name, "gradients") for name in ("cispo", "cispo_masked", "dapo")]
    assert on_policy[0] == on_policy[1] == on_policy[2]


# ----------------------------------------------------------------------------------------------------------- algorithms
LOSSES: dict[str, dict[str, float | None]] = {
    "policy_gradient": {},
    "clipped_surrogate": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"ratio_max": 5.0, "ratio_min": 0.0, "mask_low": None, "mask_high": None},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "clamped_ratio": {"clip_low": 0.2, "clip_high": 0.2},
}
ADVANTAGES: dict[str, dict[str, float]] = {
    "group_norm": {"ddof": 0, "epsilon": 0.0},
    "gae": {"gamma": 1.0, "lam": 1.0, "whiten": True},
}


def spec(
    loss: str, advantage: str, reduction: str = "token", anchor: str | None = None, **changes: object
) -> Algorithm:
    """An algorithm with every setting spelled out; a change replaces the setting of that name, wherever it is."""
    algorithm: Algorithm = {"loss": loss, "settings": dict(LOSSES[loss])}
    algorithm |= {"advantage": advantage, "advantage_settings": dict(ADVANTAGES.get(advantage, {}))}
    algorithm |= {"reduction": reduction, "anchor": anchor, "kl": None, "kl_in": None, "kl_coef": 0.0}
    algorithm |= {"correction": None, "correction_settings": {}, "value_clip": 0.2 if advantage == "gae" else None}
    for name, value in changes.items():
        tables = (algorithm, algorithm["settings"], algorithm["advantage_settings"])
        next(table for table in tables if name in table)[name] = value
    return algorithm


def cispo(
    advantage: str = "group_norm", reduction: str = "token", anchor: str = "rollout", **changes: object
) -> Algorithm:
    return spec("cispo", advantage, reduction, anchor, **changes)


def clipped(advantage: str, reduction: str = "token", **changes: object) -> Algorithm:
    return spec("clipped_surrogate", advantage, reduction, "old", **changes)


def in_loss(kind: str) -> Algorithm:
    return {"kl": kind, "kl_in": "loss", "kl_coef": 0.04}


def in_reward(kind: str) -> Algorithm:
    return {"kl": kind, "kl_in": "reward", "kl_coef": 0.05}


ALGORITHMS = {
    "reinforce": spec("policy_gradient", "batch_baseline"),
    "rloo": spec("policy_gradient", "leave_one_out", "sequence_sum"),
    "reinforce_pp": clipped("batch_whiten"),
    "ppo": clipped("gae"),
    "grpo": clipped("group_norm", "sequence", **in_loss("k3")),
    "dapo": clipped("group_norm", clip_high=0.28),
    "dr_grpo": clipped("group_mean", "constant"),
    "gspo": spec("gspo", "group_norm", "sequence", "old"),
    "cispo": cispo(),
    "cispo_masked": cispo(mask_low=0.8, mask_high=1.28),
    "cispo_agent": cispo("reward_to_go", "prompt"),
}
REDUCTIONS = ("token", "prompt", "sequence", "sequence_sum", "constant")
VARIANTS = {
    **{f"cispo_{reduction}": cispo("group_norm", reduction) for reduction in REDUCTIONS[1:]},
    **{f"cispo_{kind}": cispo(**in_loss(kind)) for kind in ("k1", "k2", "k3")},
    "cispo_old": cispo(anchor="old"),
    "cispo_as_dapo": cispo(anchor="old", ratio_max=None, mask_low=0.8, mask_high=1.28),
    "cispo_batch_norm": cispo("batch_norm"),
    "dapo_dual_clip": clipped("group_norm", clip_high=0.28, dual_clip=3.0),
    "grpo_verl": clipped("group_norm", "sequence", ddof=1, epsilon=1e-6),
    "grpo_trl": clipped("group_norm", "sequence", ddof=1, epsilon=1e-4),
    "ppo_gae": clipped("gae", gamma=0.99, lam=0.95, whiten=False),
    "reinforce_pp_reward_k1": clipped("batch_whiten", **in_reward("k1")),
    "cispo_agent_reward_k2": cispo("reward_to_go", "prompt", **in_reward("k2")),
    "ppo_reward_k3": clipped("gae", **in_reward("k3")),
}
CORRECTIONS = {"tis": {"max": 2.0}, "icepop": {"min": 0.5, "max": 5.0}, "sequence_mask": {"min": 0.9, "max": 1.1}}
CORRECTED = {
    f"{name}_{rule}": algorithm | {"correction": rule, "correction_settings": limits}
    for name, algorithm in {"cispo": cispo(anchor="old"), "grpo": ALGORITHMS["grpo"]}.items()
    for rule, limits in CORRECTIONS.items()
}
ONE_TOKEN = {
    **{f"cispo_{cap}": cispo("given", ratio_max=cap) for cap in (1.28, 4.0, 5.0, 6.0)},
    "cispo_unbounded": cispo("given", ratio_max=None),
    "cispo_masked": cispo("given", mask_low=0.8, mask_high=1.28),
    "ppo": clipped("given"),
    "ppo_dual_clip": clipped("given", dual_clip=3.0),
    "dapo": clipped("given", clip_high=0.28),
    "sapo": spec("sapo", "given", "token", "old"),
    "clamped_ratio": spec("clamped_ratio", "given", "token", "old"),
}
BOUNDS = {"0_5": (0.0, 5.0), "0_1.2": (0.0, 1.2), "0.8_1.2": (0.8, 1.2), "unbounded": (None, None)}
BOUNDED = {
    f"cispo_{name}_{reduction}": cispo("given", reduction, ratio_min=low, ratio_max=high)
    for name, (low, high) in BOUNDS.items()
    for reduction in ("token", "sequence")
}
SCORES = {
    **{kind: cispo(kind) for kind in ("group_norm", "group_mean", "leave_one_out", "batch_baseline", "batch_norm")},
    "group_norm_ddof_1": cispo(ddof=1),
    "group_norm_verl": cispo(ddof=1, epsilon=1e-6),
    "group_norm_trl": cispo(ddof=1, epsilon=1e-4),
}
MISMATCH = {
    "cispo_old": cispo("given", anchor="old"),
    "cispo_old_tis": cispo("given", anchor="old", correction="tis", correction_settings={"max": 2.0}),
    "cispo_rollout": cispo("given"),
    "cispo_rollout_unbounded": cispo("given", ratio_max=None),
}
TOTALS = {f"reduce_{reduction}": spec("policy_gradient", "given", reduction) for reduction in REDUCTIONS}

# Worked out by hand: case, field, algorithm=numbers ...
PRINTED = """
single_token gradients cispo_5.0=-5 cispo_1.28=-1.28 cispo_4.0=-4 cispo_6.0=-6 cispo_unbounded=-12 ppo=0 dapo=0
single_token gradients sapo=-0.000802 cispo_masked=0 clamped_ratio=0
single_token losses cispo_5.0=10.6013177 cispo_1.28=2.7139373 cispo_4.0=8.4810541 cispo_6.0=12.7215812
single_token losses cispo_unbounded=25.4431624 ppo=-1.2 dapo=-1.28 sapo=-3.999933 cispo_masked=0
single_token losses clamped_ratio=-1.2
single_token_negative gradients cispo_5.0=5 ppo=12 ppo_dual_clip=0
two_sequences losses_sum cispo_0_5_token=9.264508 cispo_0_1.2_token=1.207507
two_sequences losses_sum cispo_0.8_1.2_token=.100843 cispo_unbounded_token=24.106353
two_sequences total cispo_0_5_token=1.852902 cispo_0_1.2_token=.241501 cispo_0.8_1.2_token=.020169
two_sequences total cispo_0_5_sequence=2.478610 cispo_0_1.2_sequence=.464360
two_sequences total cispo_0.8_1.2_sequence=.279916 cispo_unbounded_sequence=6.189072 cispo_unbounded_token=4.821271
two_sequences gradients cispo_0_5_token=-1,-.24,.1,.1,.2 cispo_0_1.2_token=-.24,-.24,.1,.1,.2
two_sequences gradients cispo_0.8_1.2_token=-.24,-.24,.16,.16,.2 cispo_unbounded_token=-2.4,-.24,.1,.1,.2
two_sequences_ppo gradients ppo=0,-.238,0,0,.2
advantages advantages group_norm=1.732051,-.577350,-.577350,-.577350,1,1,-1,-1,0,0,0,0
advantages advantages group_norm_ddof_1=1.5,-.5,-.5,-.5,.866025,.866025,-.866025,-.866025,0,0,0,0
advantages advantages group_mean=.75,-.25,-.25,-.25,.5,.5,-.5,-.5,0,0,0,0
advantages advantages leave_one_out=1,-.3333333,-.3333333,-.3333333,.6666667,.6666667,-.6666667,-.6666667,0,0,0,0
advantages_batch advantages batch_norm=1.732051,-.577350,-.577350,-.577350,.577350,.577350,.577350,-1.732051
reductions total reduce_token=.25 reduce_prompt=.5 reduce_sequence=.5 reduce_sequence_sum=2.5 reduce_constant=.125
mismatch gradients cispo_old=-5 cispo_old_tis=-6.25 cispo_rollout=-5 cispo_rollout_unbounded=-15
"""


# ---------------------------------------------------------------------------------------------------------------- cases
def by_hand(group: int, **probabilities: list[float]) -> Completion:
    """A sequence without masked tokens from new, old and rollout (default: old) probabilities."""
    new, old = probabilities["new"], probabilities["old"]
    arrays = {"logprobs": new, "old_logprobs": old, "rollout_logprobs": probabilities.get("rollout", old)}
    return {"group": group, "mask": [1] * len(new)} | {name: [log(p) for p in array] for name, array in arrays.items()}


def scored(*groups: list[float]) -> Batch:
    """One-token completions that have a reward and nothing else."""
    pairs = [(group, float(reward)) for group, rewards in enumerate(groups) for reward in rewards]
    return [{"group": group, "mask": [1], "rewards": {"outcome": [reward]}} for group, reward in pairs]


def random_batch(seed: int, masks: list[str], constant_group: int | None) -> Batch:
    """Groups of ragged completions, one string of masks a group; equal rewards in the constant group. Masked tokens
    hold numbers that would show if they leaked. Every fifth completion hardly moved, as GSPO's narrow band needs."""
    rng = random.Random(seed)
    batch: Batch = []
    for group, mask in ((g, mask) for g, line in enumerate(masks) for mask in line.split()):
        names = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "new_values")
        sequence: Completion = {"group": group, "mask": [int(keep) for keep in mask]} | {name: [] for name in names}
        calm = len(batch) % 5 == 1
        for keep in sequence["mask"]:
            drawn = random_logprobs(rng, calm) if keep else (-0.5, -30.0, -40.0, -20.0)
            value = round(rng.uniform(-1, 1), 6)
            drawn += (value, round(value + rng.uniform(-0.4, 0.4), 6)) if keep else (7.0, -7.0)
            for name, number in zip(names, drawn, strict=True):
                sequence[name].append(number)
        # Sixteenths, so that sums of rewards are exact in any order.
        speed = [int(rng.uniform(-2, 5)) / 16 if keep and rng.random() < 0.4 else 0.0 for keep in sequence["mask"]]
        outcome = [0.0] * len(mask)
        outcome[mask.rindex("1")] = 0.75 - fsum(speed) if group == constant_group else int(rng.uniform(0, 5)) / 4
        batch.append(sequence | {"rewards": {"outcome": outcome, "speed": speed}})
    return batch


def random_logprobs(rng: random.Random, calm: bool) -> tuple[float, ...]:
    """New, old, rollout and reference logprob of a token, with ratios to old and to rollout from 0.05 to 20."""
    while True:
        new = rng.uniform(-6, 0)
        width = 6e-4 if calm else 3 if rng.random() < 0.4 else 0.4
        old = new - rng.uniform(-width, width)
        width = 2 if rng.random() < 0.2 else 0.1
        rollout = old - rng.uniform(-width, width)
        ref = new + rng.uniform(-1, 1)
        if max(new, old, rollout, ref) < -1e-3 and max(abs(new - old), abs(new - rollout)) < log(20):
            return tuple(round(x, 6) for x in (new, old, rollout, ref))


def make_cases() -> list[Case]:
    aha = [by_hand(0, new=[0.12], old=[0.01])]
    two = [by_hand(0, new=[0.12, 0.6], old=[0.01, 0.5]), by_hand(0, new=[0.1, 0.25, 0.9], old=[0.2, 0.5, 0.9])]
    inside = [by_hand(0, new=[0.12, 0.595], old=[0.01, 0.5]), two[1]]
    mismatch = [by_hand(0, new=[0.12], old=[0.01], rollout=[0.008])]
    lengths = ((0, 4), (0, 6), (1, 10), (1, 20))
    even = [by_hand(group, new=[exp(-1)] * n, old=[exp(-1)] * n) for group, n in lengths]
    signs = [[1.0, 1.0], [-1.0, -1.0, -1.0]]
    ragged = random_batch(1430, ["1 111001111 0110 110111", "101 1111111 11 10110", "01111111 1 110011 1110"], 1)
    copies = {"old_logprobs": "logprobs", "rollout_logprobs": "logprobs", "new_values": "values"}
    on_policy = [sequence | {name: sequence[source] for name, source in copies.items()} for sequence in ragged]
    small = random_batch(328, ["1111 110111 011", "11 11111 1011"], None)
    ones = [[1.0 - group] * n for group, n in lengths]

    def case(
        name: str, about: str, max_tokens: int, batch: Batch, algorithms: dict[str, Algorithm], **given: object
    ) -> Case:
        case = {"name": name, "about": about, "max_tokens": max_tokens, **given, "sequences": batch}
        return case | {"expected": {key: evaluate(case, algorithm) for key, algorithm in algorithms.items()}}

    limits = {"max_length": 20480, "cache_length": 4096}
    overlong = [1, 16384, 16385, 18432, 20480, 20481]
    penalties = [soft_overlong(length, **limits) for length in overlong]
    assert penalties == [0, 0, -1 / 4096, -0.5, -1, -1]
    return [
        case("single_token", "A rare token, p .01 -> .12, A = 1.", 1, aha, ONE_TOKEN, advantages=[[1.0]]),
        case("single_token_negative", "The same with A = -1.", 1, aha, ONE_TOKEN, advantages=[[-1.0]]),
        case("two_sequences", "Ratios 12, 1.2 and .5, .5, 1.", 3, two, BOUNDED, advantages=signs),
        case(
            "two_sequences_ppo", "1.19, as 1.2 is PPO's bound.", 3, inside, {"ppo": ONE_TOKEN["ppo"]}, advantages=signs
        ),
        case("advantages", "Rewards only.", 1, scored([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]), SCORES),
        case("advantages_batch", "Rewards only.", 1, scored([1, 0, 0, 0], [1, 1, 1, 0]), SCORES),
        case("reductions", "Losses 1 in one group, 0 in the other.", 20, even, TOTALS, advantages=ones),
        {"name": "overlong", "about": "DAPO's length penalty."} | limits | {"lengths": overlong, "rewards": penalties},
        case("mismatch", "Rollout .008, old .01, new .12.", 1, mismatch, MISMATCH, advantages=[[1.0]]),
        case("ragged", "Random; group 1 has equal R.", 10, ragged, ALGORITHMS | VARIANTS),
        case("on_policy", "ragged with every ratio 1.", 10, on_policy, ALGORITHMS),
        case("corrections", "Random.", 10, small, CORRECTED),
    ]


def dump(node: object, indent: str = "") -> str:
    """JSON with an array of numbers, and a small object without arrays, on one line."""
    line = json.dumps(node, allow_nan=False)
    inner = indent + " "
    if isinstance(node, dict) and ("[" in line or len(line) > 600):
        parts = [f"{inner}{json.dumps(key)}: {dump(value, inner)}" for key, value in node.items()]
    elif isinstance(node, list) and node and isinstance(node[0], list | dict):
        parts = [inner + dump(value, inner) for value in node]
    else:
        return line
    opening, closing = "{}" if isinstance(node, dict) else "[]"
    return opening + "\n" + ",\n".join(parts) + "\n" + indent + closing


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden vectors for policy-gradient losses.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the stored file differs")
    check = parser.parse_args().check
    cases = make_cases()
    assert_printed({case["name"]: case for case in cases})
    assert_covered({case["name"]: case for case in cases})
    text = dump({"format": 1, "conventions": CONVENTIONS, "cases": cases}) + "\n"
    if not check:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        PATH.write_text(text, encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != text:
        sys.exit(f"{PATH} differs from what this script generates")


if __name__ == "__main__":
    main()
