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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cispo.sandbox.run import SandboxResult, run_python

_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+.-]*)")
_HARNESS = Path(__file__).with_name("code_harness.py")

Step = tuple[str, str]
"""Kind and source of a step of `code_harness`."""
Expected = Mapping[int, tuple[object, bool]]
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
    questions = _Questions(steps, expected)
    program = f"{_HARNESS.read_text()}\nmain({code!r}, {questions.secret!r})\n"
    result = run_python(program, stdin=questions, timeout=timeout, memory_mb=memory_mb)
    passed = questions.passed
    return _outcome(passed, tests, partial, "" if passed == tests else _problem(result) or "wrong result")


def extract_code(completion: str) -> str:
    """The last ```python block of a text; else its last block without a language; else, if it has no block, all of it.

    A block that is never closed goes on to the end.
    """
    blocks = _blocks(completion)
    for languages in (("python", "py", "python3"), ("",)):
        found = [code for language, code in blocks if language in languages]
        if found:
            return found[-1]
    return "" if blocks else completion


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every block between fences, in one pass over the lines."""
    blocks: list[tuple[str, str]] = []
    language, code = None, list[str]()
    *lines, last = text.split("\n")
    for line in lines:
        fence = _FENCE.match(line)
        if language is None:
            # A fence that ends the text has nothing behind it.
            language = fence[1].lower() if fence else None
        elif fence and line.strip(" \t\r") == "```":
            blocks.append((language, "".join(code)))
            language, code = None, []
        else:
            code.append(line + "\n")
    if language is not None:
        blocks.append((language, "".join(code) + ("" if last.strip(" \t\r") == "```" else last)))
    return blocks


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


def read_steps(test_code: str) -> tuple[list[Step], dict[int, tuple[object, bool]]]:
    """The harness's steps (kind, source), and (value, by identity) that each step of kind "value" must give.

    Raises ValueError when the code does not parse or tests nothing.
    """
    try:
        return _steps(ast.parse(test_code))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"test_code does not parse: {error or type(error).__name__}") from error


def _steps(tree: ast.Module) -> tuple[list[Step], dict[int, tuple[object, bool]]]:
    steps: list[Step] = []
    expected: dict[int, tuple[object, bool]] = {}
    own = {s.name for s in tree.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for statement in tree.body:
        comparison = _with_literal(statement)
        if comparison is not None:
            source, value, identity = comparison
            expected[len(steps)] = (value, identity)
            steps.append(("value", source))
            continue
        if isinstance(statement, ast.Expr) and (call := _of_candidates(statement.value, own)) is not None:
            steps.append(("call", call))
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
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(test.ops[0], ast.Eq) or value is None or isinstance(value, bool):
            return ast.unparse(other), value, isinstance(test.ops[0], ast.Is)
    return None


def _of_candidates(expression: ast.expr, own: Collection[str]) -> str | None:
    """`check(f)`, where the test defines check, as "check(plainly(f))"; None for another expression."""
    if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name):
        return None
    if expression.func.id not in own:
        return None

    def wrapped(argument: ast.expr) -> ast.expr:
        if isinstance(argument, ast.Starred) or isinstance(argument, ast.Name) and argument.id in own:
            return argument
        return ast.Call(ast.Name("plainly", ast.Load()), [argument], [])

    keywords = [ast.keyword(k.arg, wrapped(k.value) if k.arg else k.value) for k in expression.keywords]
    return ast.unparse(ast.Call(expression.func, [wrapped(a) for a in expression.args], keywords))


def _calls(expression: ast.expr) -> bool:
    return any(isinstance(node, ast.Call) for node in ast.walk(expression))


def _parameters(function: ast.FunctionDef) -> bool:
    a = function.args
    return bool(a.posonlyargs or a.args or a.kwonlyargs or a.vararg or a.kwarg)


class _Questions:
    """The steps of a test, put to the program one by one: it learns of a step once the one before has its verdict.

    The first verdict on a step decides, as a line that begins with the secret of that step. Other lines are the
    solution's own output.
    """

    def __init__(self, steps: Sequence[Step], expected: Expected) -> None:
        self.passed = 0
        self.secret = secrets.token_hex(16)
        self._steps, self._expected = steps, expected
        self._asked = -1
        """The step that was put last; -1 while the solution is loaded."""
        self._line = bytearray()

    def __call__(self, output: bytes) -> bytes | None:
        """The next step, b"" without a verdict in the program's new output, None after the last step."""
        first, *others = output.split(b"\n")
        self._line += first
        for part in others:
            line, self._line = bytes(self._line), bytearray(part)
            if line.startswith(b"%s " % self.secret.encode()):
                return self._next(line[len(self.secret) + 1 :].decode(errors="replace"))
        return b""

    def _next(self, outcome: str) -> bytes | None:
        if self._asked >= 0:
            kind, _ = self._steps[self._asked]
            if kind == "value":
                right = _is_equal(outcome.removeprefix("value "), *self._expected[self._asked])
            else:
                right = outcome == "passed"
            self.passed += right and kind != "do"
            if kind == "do" and not right:
                return None
        self._asked += 1
        if self._asked == len(self._steps):
            return None
        self.secret = secrets.token_hex(16)
        return f"{(self.secret, *self._steps[self._asked])!r}\n".encode()


def _is_equal(text: str, value: object, identity: bool) -> bool:
    """Whether a text from the program is a literal of the value.

    It may be written to harm its reader, so containers of another size than the value's are not even built: a set of
    numbers with equal hashes takes minutes.
    """
    if identity:
        return text == repr(value)
    try:
        if len(text) > 64 * len(repr(value)) + 4096:
            return False
        return _matches(ast.parse(text, mode="eval").body, value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


def _matches(node: ast.expr, value: object) -> bool:
    if isinstance(value, list | tuple):
        same_kind = isinstance(node, ast.List if isinstance(value, list) else ast.Tuple)
        return same_kind and len(node.elts) == len(value) and all(map(_matches, node.elts, value))
    if isinstance(value, dict):
        if not isinstance(node, ast.Dict) or len(node.keys) != len(value):
            return False
        found = {_literal(key): inner for key, inner in zip(node.keys, node.values, strict=True)}
        return found.keys() == value.keys() and all(_matches(found[key], inner) for key, inner in value.items())
    if isinstance(value, set):
        elements = _elements(node)
        return elements is not None and len(elements) == len(value) and set(map(_literal, elements)) == value
    return isinstance(node, ast.Constant | ast.UnaryOp | ast.BinOp) and ast.literal_eval(node) == value


def _elements(node: ast.expr) -> list[ast.expr] | None:
    """The elements of {1}, frozenset({1}) or set(); None of another expression."""
    if isinstance(node, ast.Set):
        return node.elts
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset"):
        return _elements(node.args[0]) if node.args else []
    return None


def _literal(node: ast.expr | None) -> object:
    if node is None:
        raise ValueError("a literal unpacks nothing")
    return ast.literal_eval(node)


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
