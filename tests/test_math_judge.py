r"""The math judge against a person's verdicts on 244 pairs, and on hostile text.

`data/math_pairs.jsonl`: kind, completion, answer, and whether a person who reads both says that the completion's last
answer is right.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from math_verify import parse

from rewards.math import SECONDS, last_answer, math_equal
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
    "parentheses in pairs": "\\boxed{" + "(" * 450 + "x" + ")" * 450 + "}",
    "brackets": "\\boxed{" + "[" * 40 + "x" + "]" * 40 + "}",
    "braces": "\\boxed{" + "{" * 40 + "x" + "}" * 40 + "}",
    "sets": "\\boxed{" + "\\{" * 20 + "x" + "\\}" * 20 + "}",
    "left and right": "\\boxed{" + "\\left(" * 30 + "x" + "\\right)" * 30 + "}",
    "bars": "\\boxed{" + "|x+" * 20 + "x" + "|" * 20 + "}",
    "fractions": "\\boxed{" + "\\frac{1}{" * 50 + "2" + "}" * 50 + "}",
    "exponents": "\\boxed{" + "x^{" * 40 + "x" + "}" * 40 + "}",
    "exponents without braces": "\\boxed{" + "x^" * 100 + "x}",
    "indices": "\\boxed{" + "x_{" * 40 + "x" + "}" * 40 + "}",
    "binomials": "\\boxed{" + "\\binom{" * 20 + "x" + "}{2}" * 20 + "}",
    "functions": "\\boxed{" + "\\sin(" * 40 + "x" + ")" * 40 + "}",
    "functions without parentheses": "\\boxed{" + "\\log " * 30 + "x}",
    "integrals": "\\boxed{" + "\\int " * 10 + "x dx}",
    "sums": "\\boxed{" + "\\sum_{i=1}^{9} " * 40 + "x}",
    "unions": "\\boxed{" + "(1,x)\\cup" * 60 + "(1,2)}",
    "additions": "\\boxed{" + "x+" * 450 + "x}",
    "signs": "\\boxed{" + "-" * 900 + "x}",
    "equations": "\\boxed{" + "x=" * 450 + "x}",
    "points": "\\boxed{" + "(1,x)," * 150 + "(1,2)}",
    "sums multiplied out": "\\boxed{(x+1)^{9999}}",
    "towers of powers": "\\boxed{x+2^{3^{40}}}",
    "powers without end": "\\boxed{x+9^{9^{9^{9}}}}",
    "products": "\\boxed{\\prod_{i=1}^{9999999} i}",
    "factorials": "\\boxed{999!!!!}",
    "a large factorial": "\\boxed{x+999999!}",
    "inequalities": "\\boxed{" + "<" * 900 + "}",
    "roots": "\\boxed{" + "\\sqrt{" * 120 + "2" + "}" * 120 + "}",
    "surrogates": "\\boxed{5\ud800}",
    "null bytes": "\0" * 1000 + "5",
}


@pytest.fixture(scope="module")
def loaded() -> None:
    """math-verify imports its parser at the first formula."""
    assert math_equal(r"\boxed{1+x}", "x+1") == 1.0


@pytest.mark.parametrize("answer", ["4", "y+1"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_scores_nothing_soon(name: str, answer: str, loaded: None) -> None:
    """A megabyte in under a second of this process's time, without the limit of math-verify, and no exception."""
    started = time.process_time()
    assert math_equal(HOSTILE[name], answer) == 0.0
    assert time.process_time() - started < 1.0 < SECONDS


def test_a_busy_machine_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts the time of this process."""
    monkeypatch.setattr("rewards.math.SECONDS", 0.5)
    monkeypatch.setattr("rewards.math.parse", lambda *args, **kwargs: time.sleep(0.4) or parse(*args, **kwargs))
    assert math_equal(r"\boxed{x+1}", "1+x") == 1.0


def test_a_comparison_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    monkeypatch.setattr("rewards.math.SECONDS", 0.2)
    monkeypatch.setattr("rewards.math.verify", hang)
    handlers = [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGALRM)]
    started = time.process_time()
    assert math_equal(r"\boxed{x+1}", "1+x") == 0.0
    assert 0.15 < time.process_time() - started < 2.0
    monkeypatch.setattr("rewards.math.SECONDS", 0.02)
    monkeypatch.setattr("rewards.math.verify", lambda *args, **kwargs: time.sleep(600))
    assert math_equal(r"\boxed{x+1}", "1+x") == 0.0
    assert [signal.getitimer(timer) for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL)] == [(0.0, 0.0)] * 2
    assert [signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGALRM)] == handlers


@pytest.mark.parametrize(
    ("formula", "same"),
    [
        (r"\frac{\sqrt{2+\sqrt{3}}}{2}", r"\frac{1}{2}\sqrt{\sqrt{3}+2}"),
        (r"\frac{1}{\sqrt{1+\left(\frac{a}{b}\right)^{2}}}", r"\frac{1}{\sqrt{\left(\frac{a}{b}\right)^{2}+1}}"),
        (r"\sqrt{1+\sqrt{1+\sqrt{1+\sqrt{1+x}}}}", r"\sqrt{\sqrt{\sqrt{\sqrt{x+1}+1}+1}+1}"),
        (r"x^{2^{3}}+1", r"1+x^{8}"),
        (r"(x+1)^{12}", r"(1+x)^{12}"),
        (r"x^{2024}+10!", r"10!+x^{2024}"),
        ("+".join(f"{n}x^{{{n}}}" for n in range(1, 13)), "+".join(f"{n}x^{{{n}}}" for n in range(12, 0, -1))),
        (r"(-\infty,-2)\cup(-2,0)\cup(0,2)\cup(2,\infty)", r"(-\infty,-2)\cup(-2,0)\cup(0,2)\cup(2, \infty)"),
    ],
)
def test_formulas_of_answers_are_not_too_large(formula: str, same: str) -> None:
    assert math_equal(rf"\boxed{{{formula}}}", same) == 1.0


def test_an_alarm_of_the_caller_is_kept(loaded: None) -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000.0)
    try:
        assert math_equal(r"\boxed{x+1}", "1+x") == 1.0
        assert 900.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.parametrize("answer", ["", "null", None, r"\$", "x" * 3000, r"\frac{", "$", "{}", r"\boxed{", "[1,2"])
def test_no_answer_of_a_dataset_raises(answer: str) -> None:
    assert math_equal(r"\boxed{4}", answer) == 0.0
