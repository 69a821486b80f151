"""Algorithms in words: the rows and the warnings of `cispo show`."""

from __future__ import annotations

from collections.abc import Iterator

from cispo.algorithms import Algorithm
from cispo.algorithms.advantages import Advantage
from cispo.algorithms.losses import Cispo, Loss, PolicyGradient

_ANCHORS = {"rollout": "the engine's logprobs at sampling time", "old": "the learner's logprobs before this batch"}
_REDUCTIONS = {
    "token": "every token of the batch counts the same (1 / tokens)",
    "prompt": "every prompt counts the same, its tokens share it (the paper's eq. 4)",
    "sequence": "every completion counts the same, its tokens share it",
    "sequence_sum": "the sum over each completion's tokens, averaged over completions",
    "constant": "divided by completions * max_tokens (Dr. GRPO)",
}


def warnings(algorithm: Algorithm, *, updates_per_batch: int, max_staleness: int) -> list[str]:
    """Settings that are legal and probably not meant, one sentence each. `updates_per_batch` counts all epochs."""
    return [
        *_stale(algorithm, max_staleness),
        *(_cap(algorithm, algorithm.loss) if isinstance(algorithm.loss, Cispo) else ()),
        *_updates(algorithm, updates_per_batch),
        *_kl(algorithm),
    ]


def _stale(algorithm: Algorithm, max_staleness: int) -> Iterator[str]:
    weighted = not isinstance(algorithm.loss, PolicyGradient)
    if max_staleness > 0 and weighted and algorithm.ratio_anchor == "old" and algorithm.correction is None:
        yield (
            f"completions may be {max_staleness} versions old, but the ratio divides by the learner's own "
            "logprobs: nothing corrects for their age; use ratio_anchor: rollout, or a correction"
        )


def _cap(algorithm: Algorithm, loss: Cispo) -> Iterator[str]:
    high, low = loss.ratio_max, loss.ratio_min
    if high < 1:
        yield (
            f"{algorithm.name} repeats a degenerate default ({algorithm.source}): a token with a ratio above {high} "
            f"gets the weight {high}, which divides the learning rate by {1 / high:g} and corrects nothing"
        )
    if 1 <= high < 1.5:
        yield f"ratio_max {high} is a PPO-like band: CISPO's cap is usually 4 to 8 (ScaleRL)"
    if low > 0:
        yield f"ratio_min {low} keeps pushing tokens that the policy has already left: the paper uses none"


def _updates(algorithm: Algorithm, updates_per_batch: int) -> Iterator[str]:
    if isinstance(algorithm.loss, PolicyGradient):
        if updates_per_batch > 1:
            yield (
                f"{algorithm.name} has no importance weight: after the first of {updates_per_batch} updates a batch, "
                "its gradient is that of a policy which is gone"
            )
    elif updates_per_batch == 1 and algorithm.ratio_anchor == "old":
        yield "one update per batch anchored on the learner's own logprobs: every ratio is 1, the clip is inert"


def _kl(algorithm: Algorithm) -> Iterator[str]:
    if algorithm.kl_coef > 0 and algorithm.kl_in == "loss" and algorithm.kl == "k1":
        yield "kl k1 in the loss has a gradient of mean 0: it adds noise and no pull; use k3, or kl_in: reward"


def describe(algorithm: Algorithm) -> list[tuple[str, str]]:
    """(item, words) rows: the algorithm with its resolved bounds."""
    rows = [("name", algorithm.name)]
    if algorithm.source:
        rows.append(("convention of", algorithm.source))
    settings = algorithm.advantage.describe() if isinstance(algorithm.advantage, Advantage) else ""
    rows.append(("advantage", _first_line(algorithm.advantage) + (f" ({settings})" if settings else "")))
    rows.append(("loss", _first_line(algorithm.loss)))
    if isinstance(algorithm.loss, Loss):
        rows += algorithm.loss.describe()
    if not isinstance(algorithm.loss, PolicyGradient):
        rows.append(("ratio divides by", _ANCHORS[algorithm.ratio_anchor]))
    rows.append(("reduction", f"{algorithm.reduction}: {_REDUCTIONS[algorithm.reduction]}"))
    if algorithm.kl_coef > 0:
        where = "added to the loss" if algorithm.kl_in == "loss" else "taken off each token's reward"
        rows.append(("KL to the start", f"{algorithm.kl_coef:g} * {algorithm.kl}, {where}"))
    if algorithm.correction:
        rows.append(("rollout correction", algorithm.correction.describe()))
    if algorithm.critic:
        rows.append(("critic", "a value head on a copy of the policy, trained beside it"))
    rows.append(("groups of equal rewards", _constant_groups(algorithm)))
    return rows


def _first_line(part: object) -> str:
    return (part.__doc__ or getattr(part, "__name__", repr(part))).strip().splitlines()[0]


def _constant_groups(algorithm: Algorithm) -> str:
    if algorithm.dynamic_sampling:
        return f"replaced by other prompts, in at most {algorithm.dynamic_sampling} more rounds of sampling"
    return {"drop": "left out of the batch", "keep": "count in the reduction"}[algorithm.zero_variance]
