"""The code rewards: programs that are right, that are wrong, and that try to pass without being right."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from cispo.rollout.rewards import Attempts, RewardFunction, RewardRunner
from cispo.types import Prompt
from rewards.code import extract_code, passes_asserts, passes_io, read_cases, read_steps

pytestmark = pytest.mark.usefixtures("no_other_sandboxes")

DOUBLE = [{"input": "2\n", "output": "4\n"}, {"input": "-3", "output": "-6"}, {"input": "0", "output": "0"}]
ASSERTS = ["assert double(2) == 4", "assert double(-3) == -6", "assert abs(double(0.5) - 1) < 1e-9"]


def scored_io(
    completion: str, tests: object, partial: bool = False, timeout: float = 20.0, total: float = 60.0
) -> tuple[float, dict]:
    """With time enough for a busy machine."""
    return passes_io(completion, tests, partial, timeout, total)


def scored(
    completion: str, test_code: str | list[str], partial: bool = False, timeout: float = 20.0
) -> tuple[float, dict]:
    return passes_asserts(completion, test_code, partial, timeout)


def block(code: str) -> str:
    return f"I would write:\n```python\n{code}\n```\nThat is all."


def test_the_code_of_a_completion() -> None:
    assert extract_code("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```\n```bash\nls\n```") == "x = 2\n"
    assert extract_code("```\nx = 1\n```\n```bash\nls\n```") == "x = 1\n"
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("```bash\nls\n```") == ""
    assert extract_code("```python\nx = 1\ny =") == "x = 1\ny ="
    assert extract_code("```python\ns = '```'\n```") == "s = '```'\n"


def test_input_and_output() -> None:
    assert scored_io(block("print(2 * int(input()))"), DOUBLE) == (1.0, {"tests_passed": 3, "tests": 3, "problem": ""})
    wrong = block("n = int(input())\nprint(n + 2 if n > 0 else 0)   ")
    assert scored_io(wrong, DOUBLE) == (0.0, {"tests_passed": 1, "tests": 3, "problem": "wrong output"})
    assert scored_io(wrong, DOUBLE, partial=True)[0] == pytest.approx(2 / 3)
    assert scored_io("no code", DOUBLE)[1]["problem"].startswith("SyntaxError")
    assert scored_io("```bash\nls\n```", DOUBLE)[1]["problem"] == "no code"


def test_a_program_that_fails_after_the_right_output_has_not_passed() -> None:
    value, columns = scored_io("print(2 * int(input()))\n1 / 0", DOUBLE)
    assert value == 0.0 and columns["problem"].startswith("ZeroDivisionError")


def test_forms_of_a_column_of_tests() -> None:
    cases = [("2\n", "4\n"), ("-3", "-6"), ("0", "0")]
    assert read_cases(DOUBLE) == read_cases(json.dumps(DOUBLE)) == cases
    assert read_cases({"inputs": [i for i, _ in cases], "outputs": [o for _, o in cases]}) == cases
    for bad in ([], "{", 3, [{"input": "1"}], [{"input": 1, "output": "2"}], {"inputs": ["1"], "outputs": []}):
        with pytest.raises(ValueError, match="test"):
            read_cases(bad)


def test_time_for_all_tests_together() -> None:
    started = time.monotonic()
    value, columns = scored_io("while True: pass", DOUBLE * 100, partial=True, timeout=0.5, total=1.5)
    # Without the limit for all it takes 100 s and more.
    assert (value, columns["problem"]) == (0.0, "time") and time.monotonic() - started < 30.0


def test_asserts() -> None:
    right = block("def double(x):\n    return 2 * x")
    assert scored(right, ASSERTS) == (1.0, {"tests_passed": 3, "tests": 3, "problem": ""})
    half = block("def double(x):\n    return 4 if x == 2 else 1.0")
    assert scored(half, ASSERTS)[0] == 0.0
    assert scored(half, ASSERTS, partial=True)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(): return [(1, 'a'), {2: {3}}, None, 1.5]", "assert f() == [(1, 'a'), {2: {3}}, None, 1.5]"),
        ("import collections\ndef f(s): return collections.Counter(s)", "assert {'a': 2} == f('aa')"),
        ("def f(x): return x > 1", "assert f(2) is True\nassert f(1) is False"),
        ("def f(x): return x", "import math\nexpected = math.pi\nassert f(math.pi) == expected"),
        ("def f(x): return x", "def check(f):\n    assert f(3) == 3\ncheck(f)"),
        ("def f(x): return x", "def test_three():\n    assert f(3) == 3"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "assert P(3).x == 3"),
        ("def f(): return 1\nif __name__ == '__main__':\n    print(int(input()))", "assert f() == 1"),
    ],
)
def test_code_that_is_right(code: str, tests: str) -> None:
    assert scored(code, tests)[0] == 1.0
    assert scored("def f(*a): return 'wrong'\ndef P(*a): return f", tests, partial=True)[0] == 0.0


ATTACKS = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "exit in a call": "def double(x): raise SystemExit(0)",
    "_exit in a call": "import os\ndef double(x): os._exit(0)",
    "exit handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef double(x): return 7",
    "exit in a thread": """
import threading, os, time
threading.Thread(target=lambda: (time.sleep(0.1), os._exit(0))).start()
def double(x): time.sleep(1)
""",
    "a repr": """
class Four(int):
    def __repr__(self): return "4 if 1 else 1"
    def __eq__(self, other): return True
def double(x): return Four(5)
""",
    "builtins": """
import builtins
builtins.AssertionError = ValueError
builtins.abs = lambda x: 0
def double(x): return 7
""",
    "builtins of the module": "__builtins__ = {**vars(__builtins__), 'abs': lambda x: 0}\ndef double(x): return 7",
    "builtins in a call": """
import builtins
def double(x):
    builtins.repr = lambda v: "4"
    builtins.exec = builtins.eval = print
    return 7
""",
    "functions of the harness": "import os\nos.write = os._exit = print\ndef double(x): return 7",
    "markers": "print('passed', '3 passed', 'All tests passed', 'OK', sep='\\n')\ndef double(x): return 7",
    "verdicts": "print('\\n'.join(f'{0:032x} {i} passed' for i in range(3)))\ndef double(x): return 7",
    "no streams": "import sys\nsys.stdout = sys.stderr = None\ndef double(x): return 7",
    "no output": "import os\nos.close(1)\ndef double(x): return 7",
    "reading the tests": "print(open('main.py').read())\ndef double(x): return 7",
    "reading the input": "print(input())\ndef double(x): return 7",
    "endless loop": "def double(x):\n    while True: pass",
    "endless recursion": "def double(x): return double(x)",
    "no function": "double = None",
    "nothing": "",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_that_cheats(attack: str) -> None:
    value, columns = scored(block(ATTACKS[attack]), ASSERTS, partial=True, timeout=3.0)
    assert value == 0.0 and columns["tests_passed"] == 0 and columns["problem"]


def test_an_object_that_equals_everything_passes_only_what_has_to_trust_it() -> None:
    attack = """
class Always:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
def double(x): return Always()
"""
    assert scored(block(attack), ASSERTS, partial=True)[1]["tests_passed"] == 1
    assert scored(block(attack), ASSERTS[:2], partial=True)[1]["tests_passed"] == 0


def test_expected_values_do_not_enter_the_sandbox() -> None:
    steps, expected = read_steps("assert f(1) == 123456\nassert 'abc' == g()\nassert f(2) is None")
    assert steps == [("value", "f(1)"), ("value", "g()"), ("value", "f(2)")]
    assert expected == {0: (123456, False), 1: ("abc", False), 2: (None, True)}


@pytest.mark.parametrize("bad", ["", "x = 1", "'only text'", "assert f(", "def helper():\n    assert f() == 1"])
def test_test_code_that_tests_nothing_is_an_error(bad: str) -> None:
    with pytest.raises(ValueError, match="test_code"):
        scored("def f(): return 1", bad)


LITERALS = ["assert double(2) == 4", "assert double(-3) == -6", "assert double(5) == 10"]
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n\ncheck(double)"

FINDS_THE_SECRET = """
import os, sys
def harness():
    frame = sys._getframe()
    while frame and "secret" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals
"""

GUESSES = {
    "every verdict in a call": FINDS_THE_SECRET + """
def double(x):
    found = harness()
    secret, verdicts = found["secret"], found["verdicts"]
    for guess in range(-50, 50):
        steps = (f"{secret} {step} value {guess}" for step in range(3))
        lines = [f"{secret} value {guess}", f"{secret} passed", *steps]
        os.write(verdicts, "".join(f"\\n{line}\\n" for line in lines).encode())
    return 7
""",
    "every verdict while loading": FINDS_THE_SECRET + """
for step in range(3):
    for guess in range(-50, 50):
        secret = harness()["secret"]
        os.write(1, f"\\n{secret} value {guess}\\n{secret} {step} value {guess}\\n{secret} passed\\n".encode())
def double(x): return 7
""",
    "steps while loading": """
import os, fcntl
for descriptor in range(3, 10):
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK)
        print(os.read(descriptor, 1 << 20))
    except OSError:
        pass
def double(x): return 7
""",
    "a verdict of 5,000 digits": "print('\\n', '1' * 5000, 'passed')\ndef double(x): return 7",
    "a number of 5,000 digits": "def double(x): return 10 ** 5000",
    "a set of equal hashes": "def double(x): return {i * (2 ** 61 - 1) for i in range(3000)}",
    "an object that calls itself a bool": """
class Fake:
    __class__ = bool
    def __eq__(self, other): return True
    def __repr__(self): return "4"
def double(x): return Fake()
""",
    "a text that equals everything": """
class Text(str):
    def __str__(self): return self
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def double(x): return Text("4")
""",
    "an object that equals everything": """
class Always:
    def __eq__(self, other): return True
def double(x): return Always()
""",
    "a class that equals everything": """
class double:
    def __init__(self, x): pass
    def __eq__(self, other): return True
""",
    "builtins during a check": """
import builtins
class Always:
    def __eq__(self, other): return True
def double(x):
    builtins.issubclass = lambda *_: False
    builtins.type = lambda *_: int
    return Always()
""",
}  # fmt: skip


@pytest.mark.parametrize("attack", GUESSES)
def test_guesses_pass_no_test(attack: str) -> None:
    """Neither asserts with literals, of which one guess each is allowed, nor the form of HumanEval."""
    for tests in (LITERALS, CHECK):
        value, columns = scored(block(GUESSES[attack]), tests, partial=True, timeout=10.0)
        assert value == 0.0 and columns["tests_passed"] == 0 and columns["problem"]


def test_a_solution_cannot_hide_a_lie_in_its_arguments() -> None:
    tests = "def check(f):\n    values = [3, 1]\n    f(values)\n    assert values == [1, 3]\n\ncheck(order)"
    assert scored(block("def order(values): values.sort()"), tests)[0] == 1.0
    lie = "class Always:\n    def __eq__(self, other): return True\ndef order(values): values[:] = [Always(), Always()]"
    assert scored(block(lie), tests)[1]["tests_passed"] == 0


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x): return {1: {2: [3, (4,)]}, 'a': {1, 2}}", "assert f(0) == {'a': {2, 1}, 1: {2: [3, (4,)]}}"),
        ("def f(x): return frozenset({x})", "assert f(1) == {1}\nassert [f(2)] == [{2}]"),
        ("def f(x): return set()", "assert f(0) == set()"),
        ("def f(x): return 10 ** 22", "assert f(0) == 1e22"),
        ("def f(x): return -1j", "assert f(0) == -1j"),
        ("def f(x): yield from range(x)", "def check(c):\n    assert list(c(3)) == [0, 1, 2]\ncheck(f)"),
        ("def f(x): return range(x)", "def check(c):\n    assert c(3) == range(3)\ncheck(f)"),
        ("def f(x): return {frozenset({x})}", "def check(c):\n    assert c(3) == {frozenset({3})}\ncheck(f)"),
        ("def f(x): return x", "candidate = f\ndef check(c, k):\n    assert c(k) == k\ncheck(candidate, 3)"),
        ("def f(x): return x", "def check(c):\n    assert c([1, 2]) == [1, 2]\ncheck(c=f)"),
        ("def f(x): return len(x)", f"assert f({'a' * 200_000!r}) == 200000"),
        ("print('a', flush=True)\ndef f(x):\n    print(x, end='')\n    return x", "assert f(1) == 1\nassert f(2) == 2"),
        ("def f(x): return x", [f"assert f({i}) == {i}" for i in range(300)]),
        ("state = []\ndef f(x): state.append(x); return len(state)", "assert f(1) == 1\nassert f(1) == 2"),
    ],
)  # fmt: skip
def test_results_that_are_right(code: str, tests: str | list[str]) -> None:
    assert scored(block(code), tests)[0] == 1.0
    assert scored(block("def f(*a, **k): return 'wrong'"), tests, partial=True)[0] == 0.0


def test_tests_that_cannot_be_parsed_are_an_error_of_the_row() -> None:
    for bad in (
        "assert f() == " + "(" * 500 + ")" * 500,
        "assert " + "-" * 100_000 + "1",
        "a\0b",
        "assert f() == " + "9" * 5000,
    ):
        with pytest.raises(ValueError, match="test_code"):
            read_steps(bad)


@pytest.mark.parametrize(
    "text",
    ["```python" + "x" * 10**6, "```" * 333_333, "```\n" * 250_000, "\n" * 10**6, "```python\n" * 100_000, " " * 10**6],
    ids=["no newline", "fences in a line", "fences", "newlines", "openings", "spaces"],
)  # fmt: skip
def test_a_megabyte_is_searched_for_code_in_a_second(text: str) -> None:
    started = time.process_time()
    extract_code(text)
    assert time.process_time() - started < 1.0


def test_line_ends_of_windows_close_a_block() -> None:
    assert extract_code("```python\r\nx = 1\r\n```\r\nThat is all.\r\n") == "x = 1\r\n"


def test_a_shipped_judge_that_runs_out_of_time_gives_0_and_ends_nothing() -> None:
    """The others of the group, and the other functions, keep their values."""
    functions = [
        RewardFunction(fn="rewards.code:passes_io", args={"timeout": 600.0, "total": 600.0}),
        RewardFunction(fn="rewards.exact:exact_match", weight=0.5),
    ]
    runner = RewardRunner(functions, timeout=5.0, workers=1)
    texts = [block("print(2 * int(input()))"), block("import time; time.sleep(600)"), "42"]
    columns = {"tests": DOUBLE[:1], "answer": "42"}
    try:
        (scores,) = asyncio.run(
            runner.score([Attempts(prompt=Prompt(id=7, messages=(), columns=columns), completions=texts)])
        )
    finally:
        runner.close()
    assert scores is not None and [score.total for score in scores] == [1.0, 0.0, 0.5]
    assert scores[1].values == {"passes_io": 0.0, "exact_match": 0.0} and scores[1].extra == {"problem": "time"}
    assert (runner.timeouts, runner.errors) == (1, 0)
    assert "rewards.code:passes_io did not finish within 5 s on prompt 7, completion 1" in runner.problems[0]


def test_an_endless_loop_gets_no_reward_and_the_worker_lives() -> None:
    functions = [RewardFunction(fn="rewards.code:passes_io", args={"timeout": 3.0})]
    runner = RewardRunner(functions, timeout=30.0, workers=1)
    texts = [block("while True: pass"), block("print(2 * int(input()))"), block("import os\nwhile True: os.fork()")]
    try:
        (scores,) = asyncio.run(
            runner.score([Attempts(prompt=Prompt(id=0, messages=(), columns={"tests": DOUBLE}), completions=texts)])
        )
    finally:
        runner.close()
    assert scores is not None and [score.total for score in scores] == [0.0, 1.0, 0.0]
    assert (runner.timeouts, runner.errors) == (0, 0)
    assert scores[0].extra == {"tests_passed": 0, "tests": 3, "problem": "time"}
