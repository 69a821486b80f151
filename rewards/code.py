"""Rewards for programs: the completion's code runs in a sandbox (`cispo.sandbox`) against the tests of its dataset row.

    passes_io        column tests       each test is an input and the output that a program prints for it
    passes_asserts   column test_code   assert statements, or test functions, that call the code's definitions

A program's output, and the result in `assert f(1, 2) == [3]`, is compared outside of the sandbox: the expected answer
never enters it. Other tests share a process with the code that they test: docs/rewards.md has the consequences.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cispo.sandbox.run import SandboxResult, run_python

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_HARNESS = Path(__file__).with_name("code_harness.py")

Outcome = tuple[float, dict[str, object]]
"""The reward of a completion and its extra values tests_passed, tests and problem."""


def passes_io(
    completion: str,
    tests: object,
    partial: bool = False,
    timeout: float = 2.0,
    total: float = 8.0,
    memory_mb: int = 512,
    **_,
) -> Outcome:
    """1.0 when the program prints the right output for every input; with `partial` the share of tests that it passes.

    `tests` is a list of {"input", "output"}, or {"inputs": [...], "outputs": [...]}, either as such or as JSON. White
    space at the ends of lines, and empty lines at the end, do not count. A test may take `timeout` seconds and all of
    them `total`, which has to stay below the recipe's `reward.timeout`. Without `partial`, no test runs after the first
    failure. Raises ValueError when there are no such tests.
    """
    cases = read_cases(tests)
    code = extract_code(completion)
    if not code.strip():
        return _outcome(0, len(cases), partial, "no code")
    passed, problem = 0, ""
    deadline = time.monotonic() + total
    for given, expected in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            problem = problem or "time"
            break
        result = run_python(code, stdin=given, timeout=min(timeout, left), memory_mb=memory_mb)
        if result.ok and _lines(result.stdout) == _lines(expected):
            passed += 1
            continue
        problem = problem or _problem(result) or "wrong output"
        if not partial:
            break
    return _outcome(passed, len(cases), partial, problem)


def passes_asserts(
    completion: str,
    test_code: str | Sequence[str],
    partial: bool = False,
    timeout: float = 5.0,
    memory_mb: int = 512,
    **_,
) -> Outcome:
    """1.0 when the code passes every test; with `partial` the share of tests that it passes.

    `test_code` is Python, or a list of pieces of it. A test is an assert or a call at its top level, or a function
    without arguments that is called test...; everything else in it is executed in its place. `timeout` is in seconds,
    for all tests together. Raises ValueError when it tests nothing or does not parse.
    """
    steps, expected = read_steps(test_code if isinstance(test_code, str) else "\n".join(test_code))
    tests = sum(kind != "do" for kind, _ in steps)
    code = extract_code(completion)
    if not code.strip():
        return _outcome(0, tests, partial, "no code")
    secret = secrets.token_hex(16)
    program = f"{_HARNESS.read_text()}\nmain({code!r})\n"
    result = run_python(program, stdin=repr((secret, steps)), timeout=timeout, memory_mb=memory_mb)
    passed = _verdicts(result.stdout, secret, steps, expected)
    return _outcome(len(passed), tests, partial, "" if len(passed) == tests else _problem(result) or "wrong result")


def extract_code(completion: str) -> str:
    """The last ```python block of a text; else its last block without a language; else, if it has no block, all of it.

    A block that is never closed goes on to the end.
    """
    blocks = [(match[1].lower(), match[2]) for match in _FENCE.finditer(completion)]
    for languages in (("python", "py", "python3"), ("",)):
        found = [code for language, code in blocks if language in languages]
        if found:
            return found[-1]
    return "" if blocks else completion


def read_cases(tests: object) -> list[tuple[str, str]]:
    """The (input, output) pairs of a column `tests`. Raises ValueError when it holds none, or anything else."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise ValueError(f"tests is no JSON: {error}") from error
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= set(tests):
        if len(tests["inputs"]) != len(tests["outputs"]):
            raise ValueError(f"tests has {len(tests['inputs'])} inputs and {len(tests['outputs'])} outputs")
        tests = [{"input": given, "output": out} for given, out in zip(tests["inputs"], tests["outputs"], strict=True)]
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError("tests must be a list of {input, output} with at least one test")
    cases = []
    for number, test in enumerate(tests):
        if not isinstance(test, Mapping) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
            raise ValueError(f"test {number} of tests must have an input and an output, both text")
        cases.append((test["input"], test["output"]))
    return cases


def read_steps(test_code: str) -> tuple[list[tuple[str, str]], dict[int, tuple[object, bool]]]:
    """The harness's steps (kind, source), and (value, by identity) that each step of kind "value" must give.

    Raises ValueError when the code does not parse or tests nothing.
    """
    try:
        tree = ast.parse(test_code)
    except SyntaxError as error:
        raise ValueError(f"test_code does not parse: {error}") from error
    steps: list[tuple[str, str]] = []
    expected: dict[int, tuple[object, bool]] = {}
    for statement in tree.body:
        comparison = _with_literal(statement)
        if comparison is not None:
            source, value, identity = comparison
            expected[len(steps)] = (value, identity)
            steps.append(("value", source))
            continue
        counts = isinstance(statement, ast.Assert) or isinstance(statement, ast.Expr) and _calls(statement.value)
        steps.append(("check" if counts else "do", ast.unparse(statement)))
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test") and not _parameters(statement):
            steps.append(("check", f"{statement.name}()"))
    if all(kind == "do" for kind, _ in steps):
        raise ValueError("test_code tests nothing: it has no assert, no call and no test function")
    return steps, expected


def _with_literal(statement: ast.stmt) -> tuple[str, object, bool] | None:
    """(expression, value, by identity) of an assert that compares with a literal; None for another statement."""
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        return None
    test = statement.test
    if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq | ast.Is):
        return None
    for literal, other in ((test.comparators[0], test.left), (test.left, test.comparators[0])):
        try:
            value = ast.literal_eval(literal)
        except (ValueError, TypeError):
            continue
        if isinstance(test.ops[0], ast.Eq) or value is None or isinstance(value, bool):
            return ast.unparse(other), value, isinstance(test.ops[0], ast.Is)
    return None


def _calls(expression: ast.expr) -> bool:
    return any(isinstance(node, ast.Call) for node in ast.walk(expression))


def _parameters(function: ast.FunctionDef) -> bool:
    a = function.args
    return bool(a.posonlyargs or a.args or a.kwonlyargs or a.vararg or a.kwarg)


def _verdicts(
    stdout: str, secret: str, steps: Sequence[tuple[str, str]], expected: Mapping[int, tuple[object, bool]]
) -> set[int]:
    """The steps that passed. Only the harness knows the secret: lines without it are the solution's own output."""
    passed: set[int] = set()
    for number, outcome in re.findall(rf"^{secret} (\d+) (.*)$", stdout, re.MULTILINE):
        step = int(number)
        if step not in range(len(steps)) or steps[step][0] == "do":
            continue
        if steps[step][0] == "check" and outcome == "passed":
            passed.add(step)
        elif steps[step][0] == "value" and _is_equal(outcome.removeprefix("value "), *expected[step]):
            passed.add(step)
    return passed


def _is_equal(text: str, value: object, identity: bool) -> bool:
    try:
        found = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return found is value if identity else found == value


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().split("\n")


def _problem(result: SandboxResult) -> str:
    """The reason of a program's failure in a few words; "" when it ended well."""
    if result.stopped:
        return result.stopped
    last = result.stderr.strip().rpartition("\n")[2][:200]
    return last or (f"exit code {result.exit_code}" if result.exit_code else "")


def _outcome(passed: int, tests: int, partial: bool, problem: str) -> Outcome:
    value = passed / tests if partial else float(passed == tests)
    return value, {"tests_passed": passed, "tests": tests, "problem": problem}
