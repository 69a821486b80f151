"""pass@k, maj@k and intervals against enumeration of every set of k samples, and scipy."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations

import pytest
from scipy.stats import binomtest, ttest_1samp

from cispo.metrics import pass_at_k
from cispo.output.estimates import maj_at_k, share_of
from cispo.recipe.held_out import passes, votes


def maj_by_enumeration(answers: list[str | None], right: list[bool], k: int) -> float:
    """Every set of k samples, every winner of a tie with the same chance."""
    share = {
        answer: sum(r for a, r in zip(answers, right, strict=True) if a == answer) / answers.count(answer)
        for answer in answers
        if answer is not None
    }
    total = 0.0
    for chosen in combinations(answers, k):
        votes = Counter(answer for answer in chosen if answer is not None)
        if votes:
            most = max(votes.values())
            winners = [answer for answer, count in votes.items() if count == most]
            total += sum(share[answer] for answer in winners) / len(winners)
    return total / math.comb(len(answers), k)


@pytest.mark.parametrize("seed", range(12))
def test_votes_are_those_of_every_set_of_k(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.randint(1, 9)
    answers = [draw.choice(["a", "b", "c", "d", None]) for _ in range(size)]
    right = [answer == "a" or (answer == "b" and draw.random() < 0.5) for answer in answers]
    for k in range(1, size + 1):
        assert maj_at_k(answers, right, k) == pytest.approx(maj_by_enumeration(answers, right, k), abs=1e-12)


def test_one_vote_is_the_average_and_all_of_them_are_the_mode() -> None:
    answers, right = ["a", "a", "b", "c", None], [True, True, False, False, False]
    assert maj_at_k(answers, right, 1) == pytest.approx(2 / 5) and maj_at_k(answers, right, 5) == 1
    assert maj_at_k(["a", "b"], [True, False], 2) == 0.5 and maj_at_k([None, None], [False, False], 2) == 0
    big = ["a"] * 33 + ["b"] * 31
    assert maj_at_k(big, [a == "a" for a in big], 64) == 1 and 0.5 < maj_at_k(big, [a == "a" for a in big], 8) < 0.7


def test_a_right_one_among_k_is_that_of_every_set_of_k() -> None:
    for size, right in ((4, 1), (7, 3), (5, 0), (6, 6)):
        outcomes = [True] * right + [False] * (size - right)
        for k in range(1, size + 1):
            every = [any(chosen) for chosen in combinations(outcomes, k)]
            assert pass_at_k(right, size, k) == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_intervals_are_scipys() -> None:
    values = [0.25, 0.5, 1.0, 0.0, 0.75, 0.5]
    expected = ttest_1samp(values, 0).confidence_interval()
    assert share_of(values) == pytest.approx((0.5, expected.low, expected.high))
    assert share_of([0.0, 0.0, 0.9]).low == 0 and share_of([1.0, 1.0, 0.1]).high == 1
    for value in (0.0, 1.0):
        wilson = binomtest(int(value) * 7, 7).proportion_ci(method="wilson")
        assert share_of([value] * 7) == pytest.approx((value, wilson.low, wilson.high))
    assert share_of([0.5])[0] == 0.5 and math.isnan(share_of([0.5]).low)


def test_the_k_of_several_samples() -> None:
    assert [passes(n) for n in (1, 2, 3, 4, 6, 16)] == [[], [2], [2, 3], [2, 4], [2, 4, 6], [2, 4, 8, 16]]
    assert [votes(n) for n in (1, 2, 3, 8)] == [[], [], [3], [4, 8]]
