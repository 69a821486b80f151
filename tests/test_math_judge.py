r"""The math judge against a person's verdicts on 244 pairs, and on hostile text.

`data/math_pairs.jsonl`: kind, completion, answer, and whether a person who reads both says that the completion's last
answer is right.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from rewards.math import last_answer, math_equal
from rewards.rational import rational

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "math_pairs.jsonl").read_text().splitlines()]


def test_the_judge_agrees_with_a_person() -> None:
    """At least 98 %, where a wrong answer that scores counts double."""
    wrong = [p for p in PAIRS if math_equal(p["completion"], p["answer"]) != p["right"]]
    cost = sum(1 if pair["right"] else 2 for pair in wrong)
    assert len(PAIRS) >= 200 and len(Counter(p["kind"] for p in PAIRS)) >= 15
    assert cost <= 0.02 * len(PAIRS), wrong


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\frac{1}{3}", Fraction(7, 3)),
        ("2 1/3", Fraction(7, 3)),
        (r"-1\frac12", Fraction(-3, 2)),
        (r"\frac{1}{2^{98}}", Fraction(1, 2**98)),
        (r"1.2\times 10^{3}", Fraction(1200)),
        ("1e-4", Fraction(1, 10_000)),
        ("20!", Fraction(2432902008176640000)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("-2^2", Fraction(-4)),
        ("2(3+4)", Fraction(14)),
        ("1/0", None),
        ("9^{9^{9}}", None),
        ("1000000!", None),
        ("x", None),
        ("", None),
        ("(" * 500, None),
        (r"2\frac{7}{3}", None),
    ],
)
def test_rational_numbers_are_read_exactly(text: str, value: Fraction | None) -> None:
    assert rational(text) == value


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"first \boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{5} and so \boxed{}", None),
        (r"\boxed{4} then \boxed{5", None),
        (r"\boxed 7 and", "7"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("The final answer is 30 (see step 2).", "30"),
        ("We add $40$ and $2$ to get $42$.", "42"),
        ("She pays $18 on 3 days, $54", "$54"),
        ("nothing", None),
    ],
)
def test_the_last_answer_counts(completion: str, answer: str | None) -> None:
    assert last_answer(completion) == answer


MEGABYTE = 1_000_000
HOSTILE = {
    "boxes": "\\boxed{" * (MEGABYTE // 7),
    "one box": "\\boxed{" + "{" * MEGABYTE,
    "parentheses": "\\boxed{" + "(" * 900 + "}",
    "groups of digits": "1," + "111," * (MEGABYTE // 4),
    "digits": "1" * MEGABYTE,
    "dollars": "$" * MEGABYTE,
    "formulas": "$x$ " * (MEGABYTE // 4),
    "spaces": " " * MEGABYTE,
    "mixed numbers": "1 2/3 " * (MEGABYTE // 6),
    "phrases": "answer is " * (MEGABYTE // 10),
    "factorials": "\\boxed{999!!!!}",
    "inequalities": "\\boxed{" + "<" * 900 + "}",
    "roots": "\\boxed{" + "\\sqrt{" * 150 + "2" + "}" * 150 + "}",
    "surrogates": "\\boxed{5\ud800}",
    "null bytes": "\0" * 1000 + "5",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_scores_nothing_soon(name: str) -> None:
    """A megabyte in under a second of this process's time, and no exception."""
    started = time.process_time()
    assert math_equal(HOSTILE[name], "4") == 0.0
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("answer", ["", "null", None, r"\$", "x" * 3000, r"\frac{", "$", "{}", r"\boxed{", "[1,2"])
def test_no_answer_of_a_dataset_raises(answer: str) -> None:
    assert math_equal(r"\boxed{4}", answer) == 0.0
