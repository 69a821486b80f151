"""Algorithms in words: what `cispo show` prints, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping

from cispo.algorithms import Algorithm
from cispo.algorithms.losses import policy_gradient


def warnings(algorithm: Algorithm, *, updates_per_batch: int, max_staleness: int) -> list[str]:
    """What is legal and probably not meant, one sentence each. `updates_per_batch` counts all epochs."""
    found = []
    if max_staleness > 0 and algorithm.loss is not policy_gradient and algorithm.anchor == "old":
        if algorithm.correction is None:
            found.append(
                f"completions may be {max_staleness} versions old, but the ratio divides by the learner's own "
                "logprobs: nothing corrects for their age; use ratio_anchor: rollout, or a correction"
            )
    high, low = algorithm.settings.get("ratio_max"), algorithm.settings.get("ratio_min")
    if high is not None and high < 1:
        found.append(
            f"{algorithm.name} repeats a degenerate default ({algorithm.source}): a token with a ratio above {high} "
            f"gets the weight {high}, which divides the learning rate by {1 / high:g} and corrects nothing"
        )
    if high is not None and 1 <= high < 1.5:
        found.append(f"ratio_max {high} is a PPO-like band: CISPO's cap is usually 4 to 8 (ScaleRL)")
    if low is not None and low > 0:
        found.append(f"ratio_min {low} keeps pushing tokens that the policy has already left: the paper uses none")
    if algorithm.loss is policy_gradient:
        if updates_per_batch > 1:
            found.append(
                f"{algorithm.name} has no importance weight: after the first of {updates_per_batch} updates a batch, "
                "its gradient is that of a policy which is gone"
            )
    elif updates_per_batch == 1 and algorithm.anchor == "old":
        found.append("one update per batch anchored on the learner's own logprobs: every ratio is 1, the clip is inert")
    if algorithm.kl_coef > 0 and algorithm.kl_in == "loss" and algorithm.kl == "k1":
        found.append("kl k1 in the loss has a gradient of mean 0: it adds noise and no pull; use k3, or kl_in: reward")
    return found


def describe(algorithm: Algorithm) -> list[tuple[str, str]]:
    """(item, words) rows: the algorithm with its resolved bounds."""
    rows = [("name", algorithm.name)]
    if algorithm.source:
        rows.append(("convention of", algorithm.source))
    rows.append(("advantage", _first_line(algorithm.advantage) + _settings(algorithm.advantage_settings)))
    rows.append(("loss", _first_line(algorithm.loss)))
    rows += _bounds(algorithm)
    anchors = {"rollout": "the engine's logprobs at sampling time", "old": "the learner's logprobs before this batch"}
    if algorithm.loss is not policy_gradient:
        rows.append(("ratio divides by", anchors[algorithm.anchor]))
    reductions = {
        "token": "every token of the batch counts the same (1 / tokens)",
        "prompt": "every prompt counts the same, its tokens share it (the paper's eq. 4)",
        "sequence": "every completion counts the same, its tokens share it",
        "sequence_sum": "the sum over each completion's tokens, averaged over completions",
        "constant": "divided by completions * max_tokens (Dr. GRPO)",
    }
    rows.append(("reduction", f"{algorithm.reduction}: {reductions[algorithm.reduction]}"))
    if algorithm.kl_coef > 0:
        where = "added to the loss" if algorithm.kl_in == "loss" else "taken off each token's reward"
        rows.append(("KL to the start", f"{algorithm.kl_coef:g} * {algorithm.kl}, {where}"))
    if algorithm.correction:
        rows.append(("rollout correction", algorithm.correction.words()))
    if algorithm.critic:
        rows.append(("critic", "a value head on a copy of the policy, trained beside it"))
    rows.append(("groups of equal rewards", _constant_groups(algorithm)))
    return rows


def _first_line(function: object) -> str:
    return (function.__doc__ or getattr(function, "__name__", repr(function))).strip().splitlines()[0]


def _settings(settings: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{k} {v:g}' for k, v in settings.items())})" if settings else ""


def _bounds(algorithm: Algorithm) -> list[tuple[str, str]]:
    s, rows = algorithm.settings, []
    if s.get("ratio_max") is not None:
        band = f"[{s.get('ratio_min') or 0:g}, {s['ratio_max']:g}]"
        rows.append(("importance weight", f"clipped to {band} (absolute), stop-gradient"))
        low, high = s.get("mask_low"), s.get("mask_high")
        sides = [f"A > 0 and ratio > {high:g}"] if high is not None else []
        sides += [f"A < 0 and ratio < {low:g}"] if low is not None else []
        rows.append(("token mask", "drops " + " or ".join(sides) if sides else "off"))
    low, high, dual = s.get("clip_low"), s.get("clip_high"), s.get("dual_clip")
    if low is not None and high is not None:
        rows.append(("ratio", f"clipped to [{1 - low:g}, {1 + high:g}]: tokens beyond, on the side of A, are dropped"))
    if dual is not None:
        rows.append(("dual clip", f"tokens with A < 0 and a ratio above {dual:g} are dropped"))
    return rows


def _constant_groups(algorithm: Algorithm) -> str:
    if algorithm.dynamic_sampling:
        return f"replaced by other prompts, in at most {algorithm.dynamic_sampling} more rounds of sampling"
    return {"drop": "left out of the batch", "keep": "count in the reduction"}[algorithm.zero_variance]
