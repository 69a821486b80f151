"""Shipped rewards and teachers."""

from __future__ import annotations

import math
import pickle
import signal
import threading
import time
from functools import partial

import pytest

from cispo.errors import UserError
from cispo.rollout.rows import in_split, load_rows
from rewards import gym, sorting, steps
from rewards.exact import exact_match
from rewards.format import boxed, boxed_exact, extract_boxed, think_format
from rewards.math import math_equal
from rewards.numeric import last_number, numeric


def test_exact_match_ignores_only_white_space_around() -> None:
    assert exact_match(" 03,47\n", answer="03,47", other=1) == 1.0
    assert exact_match("03, 47", answer="03,47") == 0.0
    assert exact_match("", answer="03,47") == 0.0


@pytest.mark.parametrize(
    ("text", "inside", "well_formed"),
    [
        (r"so \boxed{42}.", "42", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", 1.0),
        (r"\boxed {x}", "x", 1.0),
        (r"\boxed{1} or \boxed{2}", "2", 0.0),
        (r"\boxed{1", None, 0.0),
        (r"\boxed{1} \boxed{2", "1", 0.0),
        (r"\boxed{}", "", 0.0),
        (r"boxed{1}", None, 0.0),
        ("", None, 0.0),
    ],
)
def test_boxed(text: str, inside: str | None, well_formed: float) -> None:
    assert extract_boxed(text) == inside
    assert boxed(text) == well_formed


def test_boxed_exact_needs_the_answer_in_the_only_box() -> None:
    assert boxed_exact(r"it is \boxed{ 42 }", answer="42") == 1.0
    assert boxed_exact(r"it is \boxed{41}", answer="42") == 0.0
    assert boxed_exact("it is 42", answer="42") == 0.0
    assert boxed_exact(r"\boxed{}", answer="") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>2 + 2</think>4", 1.0),
        ("\n<think>\na\n</think>\n\n4\n", 1.0),
        ("<think></think>4", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think><think>b</think>4", 0.0),
        ("4<think>a</think>4", 0.0),
        ("<think>a 4", 0.0),
        ("4", 0.0),
    ],
)
def test_think_format(text: str, value: float) -> None:
    assert think_format(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it costs $1,234.5 in all.", 1234.5),
        ("from 3 to -3", -3.0),
        ("5-3", 3.0),
        ("\u22127", -7.0),
        ("1e-4", 1e-4),
        ("-1.5E+3 km", -1500.0),
        ("3/4", 0.75),
        ("3/0", None),
        ("50%", 0.5),
        (r"12.5 \%", 0.125),
        ("the answer is 42.", 42.0),
        (".5", 0.5),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, value: float | None) -> None:
    assert last_number(text) == (None if value is None else pytest.approx(value, rel=1e-15))


def test_numeric_tolerance_is_relative_above_one_and_absolute_below() -> None:
    assert numeric("1000001", answer="1000000", tolerance=1e-5) == 1.0
    assert numeric("1000100", answer="1000000", tolerance=1e-5) == 0.0
    assert numeric("0.000001", answer=0, tolerance=1e-5) == 1.0
    assert numeric("0.01", answer=0, tolerance=1e-5) == 0.0
    assert numeric("1/3", answer="0.3333333") == 1.0
    assert numeric("no idea", answer="3") == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        numeric("3", answer="three")


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        ("the answer is 0.5", "1/2", 1.0),
        ("the answer is 0.51", "1/2", 0.0),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("1234", "1,234", 1.0),
        ("x = 3", "$3$", 1.0),
        ("no idea", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math_equal(completion: str, answer: str, value: float) -> None:
    assert math_equal(completion, answer) == value


# Text of a policy

HOSTILE = {
    "open boxes": r"\boxed{" * 140_000,
    "nested boxes": r"\boxed{" * 70_000 + "}" * 70_000,
    "braces in a box": r"\boxed{" + "{" * 500_000 + "}" * 500_000,
    "boxes without braces": r"\boxed " * 140_000,
    "a box far from its brace": r"\boxed" + " " * 10**6,
    "backslashes": "\\" * 10**6,
    "thousands": "1," + "111," * 250_000,
    "thousands and a half": "1" + ",111" * 250_000 + ",1",
    "digits": "9" * 10**6,
    "a long fraction": "9" * 500_000 + "/" + "9" * 500_000,
    "fractions": "1/" * 500_000,
    "exponents": "1e" * 500_000,
    "signs": "-" * 10**6,
    "points": "1.1." * 250_000,
    "thoughts": "<think>" * 140_000,
    "open thoughts": "<think>" + "</think" * 140_000,
    "spaces": " " * 10**6,
    "lone surrogates": "\ud800" * 10**6,
    "zero bytes": "\0" * 10**6,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_from_a_policy_is_judged_in_a_second(name: str) -> None:
    text = HOSTILE[name]
    for judge in (boxed, think_format, *(partial(f, answer="3") for f in (numeric, exact_match, boxed_exact))):
        started = time.process_time()
        assert judge(text) == 0.0
        assert time.process_time() - started < 1.0, judge
    started = time.process_time()
    extract_boxed(text)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it is 1,234, which", 1234.0),
        ("so 1,234,567.", 1234567.0),
        ("-1,234.5%", -12.345),
        ("12,345,67", 67.0),
        ("1234,567", 567.0),
        ("(1,234)", 1234.0),
        ("3, 1,234", 1234.0),
        ("1,234/2", 617.0),
    ],
)
def test_thousands(text: str, value: float) -> None:
    assert last_number(text) == pytest.approx(value, rel=1e-15)


def test_a_row_without_an_answer_is_not_the_word_none() -> None:
    row: dict = {"answer": None}
    for judge, text in ((exact_match, "None"), (boxed_exact, r"\boxed{None}"), (numeric, "0")):
        with pytest.raises(ValueError, match="answer"):
            judge(text, **row)


VERIFIED = ["countdown", "binary_matrix", "n_queens", "coin_flip", "boxnet", "rubiks_cube", "spell_backward"]


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[pytest.mark.slow] * (task in ("binary_matrix", "n_queens"))) for task in VERIFIED],
)
def test_a_verifier_of_reasoning_gym_is_total(task: str) -> None:
    """Some of them evaluate the answer: as an expression, or as Python that exits."""
    row = load_rows(f"reasoning_gym:{task}", "train", {"size": 1, "seed": 0}, None, "data")[0]
    texts = [
        "9**9**9**9",
        "__import__('sys').exit()",
        "1e999999999",
        "(" * 5000,
        "[" * 10**6,
        "9" * 10**6,
        "\0",
        "\ud800",
    ]
    texts += ["[0 for _ in iter(int, 1)]", "factorial(99999999)", "U R " * 250_000]
    for text in texts:
        started = time.process_time()
        for partial_credit in (False, True):
            assert 0.0 <= gym.score(text, **row, partial=partial_credit) < 0.5
        assert time.process_time() - started < 10 * gym.SECONDS, text[:40]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_math_equal_gives_up_on_a_tower_of_powers() -> None:
    started = time.perf_counter()
    assert math_equal("$9^{9^{9^9}}$", "3") == 0.0
    # With room for a busy machine; without a limit it would take for ever.
    assert time.perf_counter() - started < 12


def test_math_equal_outside_the_main_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(math_equal("0.5", "1/2")))
    thread.start()
    thread.join()
    assert found == [1.0]


# reasoning-gym


def test_countdown_floor_is_not_a_reward() -> None:
    row = load_rows("reasoning_gym:countdown", "train", {"size": 1, "seed": 0}, None, "data")[0]
    verifier = gym._verifier("countdown", "{}")
    raw = [verifier.score_answer(text, row["item"]) for text in ("", "so?", "7")]
    assert raw == pytest.approx([0.01, 0.01, 0.05]), "reasoning_gym no longer scores wrong answers above 0"
    assert [gym.score(text, **row) for text in ("", "so?", "7")] == [0.0, 0.0, 0.0]
    partial = [gym.score(text, **row, partial=True) for text in ("", "so?", "7")]
    assert partial == pytest.approx([0.0, 0.0, 0.04 / 0.99])
    assert gym.score(row["answer"], **row) == gym.score(row["answer"], **row, partial=True) == 1.0


def test_partial_credit_is_rescaled_to_start_at_zero() -> None:
    row = load_rows("reasoning_gym:spell_backward", "train", {"size": 1, "seed": 0}, None, "data")[0]
    nearly = row["answer"][:-1] + "?"
    assert gym.score(nearly, **row) == 0.0
    assert gym.score(nearly, **row, partial=True) == pytest.approx(1 - 1 / len(row["answer"]), abs=1e-9)
    assert gym.score("", **row, partial=True) == 0.0


def test_every_task_scores_its_own_answer_right_and_junk_wrong() -> None:
    from reasoning_gym.factory import DATASETS

    wrong: list[str] = []
    for task in sorted(set(DATASETS) - {"composite"}):
        row = load_rows(f"reasoning_gym:{task}", "train", {"size": 1, "seed": 0}, None, "data")[0]
        row = pickle.loads(pickle.dumps(row))  # as it reaches a worker
        if isinstance(row["answer"], str) and gym.score(row["answer"], **row) != 1.0:
            wrong.append(f"{task}: own answer")
        # Any text but "True" means False to game_of_life_halting.
        junk = [gym.score(text, **row, partial=p) for text in ("", "xyzzy") for p in (False, True)]
        if task != "game_of_life_halting" and any(value > 0.25 for value in junk):
            wrong.append(f"{task}: junk {junk}")
    assert not wrong


def test_gym_teacher_errs_as_often_as_it_is_told_to() -> None:
    rows = list(gym.demonstrations("spell_backward", size=2000, seed=1, noise=0.6, min_word_len=3, max_word_len=6))
    errs = [gym.score(row["completion"], row["task"], row["params"], row["item"]) == 0.0 for row in rows]
    # Four standard deviations of a share among 2,000.
    assert abs(sum(errs) / len(errs) - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 2000)
    changed = [sum(a != b for a, b in zip(r["completion"], r["answer"], strict=True)) for r in rows]
    assert changed == [int(err) for err in errs]
    with pytest.raises(UserError, match="rubiks_cube has no single right answer"):
        list(gym.demonstrations("rubiks_cube", size=1, seed=0))


def test_few_shot_solves_training_problems_before_the_question() -> None:
    sums = partial(gym.few_shot, "chain_sum", size=100, seed=1, question="{expression} = ?", max_terms=2)
    rows = list(sums(split="test", shots=2, answer="{expression} = {answer}"))
    train = {row["expression"] for row in sums(shots=0)}
    for row in rows:
        *solved, question = row["messages"]
        assert question == {"role": "user", "content": f"{row['expression']} = ?"} and row["expression"] not in train
        assert [message["role"] for message in solved] == ["user", "assistant"] * 2
        assert solved == rows[0]["messages"][:-1]
        for asked, answered in zip(solved[::2], solved[1::2], strict=True):
            left, right = answered["content"].split(" = ")
            assert asked["content"] == f"{left} = ?" and eval(left) == int(right)
            assert not in_split(f"State the final answer to the following arithmetic problem: {left} =", "test")


# The quickstart's task


def test_sorting_problems_are_sorted_seeded_and_disjoint() -> None:
    train = list(sorting.problems(size=2000, seed=1, count=1))
    test = list(sorting.problems(size=2000, seed=1, count=1, split="test"))
    # With one number there are 100 problems, so that chance alone could not keep the two apart.
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)
    rows = list(sorting.problems(size=50, seed=2))
    assert rows == list(sorting.problems(size=50, seed=2)) != list(sorting.problems(size=50, seed=3))
    for row in rows:
        assert row["answer"].split(",") == sorted(row["prompt"].removesuffix(">").split(","))


def test_sorting_teacher_errs_as_often_as_it_is_told_to() -> None:
    rows = list(sorting.demonstrations(size=5000, seed=1, noise=0.7))
    right = [row["answer"] for row in sorting.problems(size=5000, seed=1)]
    changed = [sum(a != b for a, b in zip(r["completion"], a, strict=True)) for r, a in zip(rows, right, strict=True)]
    assert set(changed) == {0, 1}
    # Four standard deviations of a share among 5,000.
    assert abs(sum(changed) / 5000 - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 5000)
    assert not any(sorting.demonstrations(size=0, seed=1))
    assert all(r["completion"] == a for r, a in zip(sorting.demonstrations(200, 1, noise=0.0), right, strict=False))


# Sums, worked out


chain_sums = partial(steps.problems, min_terms=4, max_terms=4, min_digits=1, max_digits=2)


def test_sums_are_worked_out_line_by_line() -> None:
    assert steps.worked("36 - 8 + 73") == "36-8=28\n28+73=101"
    assert steps.worked("1 - 9 - 2") == "1-9=-8\n-8-2=-10"
    rows = list(chain_sums(size=200, seed=2))
    assert rows == list(chain_sums(size=200, seed=2)) != list(chain_sums(size=200, seed=3))
    for row in rows:
        assert eval(row["prompt"].removesuffix("=")) == int(row["answer"])
        solution = steps.worked(row["expression"])
        assert all(eval(left) == int(right) for left, right in (line.split("=") for line in solution.split("\n")))
        assert len(solution.split("\n")) == 3 and numeric(solution, row["answer"]) == 1.0


def test_sums_to_practise_on_and_to_be_tested_on_are_disjoint() -> None:
    small = partial(steps.problems, size=80, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert {row["prompt"] for row in small()}.isdisjoint(row["prompt"] for row in small(split="test"))


def test_a_slip_is_one_wrong_digit_that_the_rest_follows() -> None:
    sums = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 2}
    rows = list(steps.demonstrations(3000, 1, 0.6, **sums))
    slips = [
        sum(eval(left) != int(right) for left, right in (line.split("=") for line in row["completion"].split("\n")))
        for row in rows
    ]
    assert set(slips) == {0, 1}
    # Four standard deviations of a share among 3,000.
    assert abs(sum(slips) / 3000 - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 3000)
    for row, slip in zip(rows, slips, strict=True):
        lines = row["completion"].split("\n")
        assert all(b.startswith(a.split("=")[1]) for a, b in zip(lines, lines[1:], strict=False))
        assert numeric(row["completion"], row["answer"]) == 1.0 - slip
