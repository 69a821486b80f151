"""The sandboxed program: loads a solution, takes the steps of its tests one by one and reports the outcome of each.

The last line, `main(solution, secret)`, is added by `rewards.code`. A step is a line on stdin, the repr of
(secret, kind, source), and is answered by the line "secret outcome", as the end of loading is. The kinds: "do" is
executed, "check" is executed and counts, "call" is a check that gets plain results of the solution's functions, and
"value" is evaluated and its value sent out to be compared there.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Callable, Iterator


def main(solution: str, secret: str) -> None:
    names, pristine = builtins.__dict__, dict(builtins.__dict__)
    write, leave, read, evaluate, compiled = os.write, os._exit, os.read, eval, compile
    module = types.ModuleType("solution")
    space = module.__dict__

    # A solution may patch or shadow builtins, before the tests or while they call it.
    def restore() -> None:
        names.update(pristine)
        space["__builtins__"] = builtins

    def run(source: str, kind: str, local: dict[str, object] | None = None) -> object:
        result = evaluate(compiled(source, "solution.py", kind, dont_inherit=True), space, local)
        restore()
        return result

    def plainly(value: object) -> object:
        return plain_function(value, restore) if callable(value) else value

    def report(outcome: str) -> None:
        line = f"\n{secret} {outcome}\n".encode()
        while line:
            line = line[write(verdicts, line) :]

    steps, verdicts = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.unlink("main.py")
    sys.modules["solution"] = sys.modules["__main__"] = module
    run(solution, "exec")
    report("loaded")
    text = b""
    while chunk := read(steps, 1 << 16):
        text += chunk
        if not text.endswith(b"\n"):
            continue
        secret, kind, source = evaluate(text)
        text = b""
        try:
            if kind == "value":
                outcome = "value " + repr(plain(run(source, "eval")))
            elif kind == "call":
                run(source, "eval", {"plainly": plainly})
                outcome = "passed"
            else:
                run(source, "exec")
                outcome = "passed"
        # SystemExit and KeyboardInterrupt as well: a solution that leaves has not passed.
        except BaseException as error:
            restore()
            outcome = "failed"
            write(2, f"{type(error).__name__}: {error}\n"[:300].encode(errors="replace"))
        report(outcome)
    # No exit handlers of the solution, and no waiting for its threads.
    leave(0)


def plain(value: object) -> object:
    """The value in built-in types: its repr is a literal, and no method of the solution takes part in comparing.

    By its true type: `isinstance` believes an object that calls itself an int.
    """
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if issubclass(kind, int):
        return int.__int__(value)  # type: ignore[arg-type]
    if issubclass(kind, float):
        return float.__float__(value)  # type: ignore[arg-type]
    if issubclass(kind, complex):
        return complex.__complex__(value)  # type: ignore[arg-type]
    if issubclass(kind, str):
        return str.__str__(value)  # type: ignore[arg-type]
    if issubclass(kind, bytes):
        return bytes(memoryview(value))  # type: ignore[arg-type]
    if issubclass(kind, dict):
        return {plain(key): plain(inner) for key, inner in dict.items(value)}  # type: ignore[arg-type]
    for container in (list, tuple, set, frozenset):
        if issubclass(kind, container):
            return container(plain(inner) for inner in container.__iter__(value))  # type: ignore[arg-type]
    raise TypeError(f"a result of type {kind.__name__} cannot be compared")


def plain_function(function: Callable[..., object], restore: Callable[[], None]) -> Callable[..., object]:
    """The function with its results, and the contents of containers that it changes in place, in built-in types.

    An object that equals everything passes no test of it.
    """
    iterators = (types.GeneratorType, map, filter, zip, enumerate, reversed)

    def call(*args: object, **kwargs: object) -> object:
        given = [value for value in (*args, *kwargs.values()) if type(value) in (list, dict, set) and is_plain(value)]
        result = function(*args, **kwargs)
        restore()
        for value in given:
            contents = plain(value)
            if isinstance(value, list) and isinstance(contents, list):
                value[:] = contents
            elif isinstance(value, dict) and isinstance(contents, dict):
                value.clear()
                value.update(contents)
            elif isinstance(value, set) and isinstance(contents, set):
                value.clear()
                value.update(contents)
        if type(result) in iterators and isinstance(result, Iterator):
            return map(plain, result)
        return result if type(result) is range else plain(result)

    return call


def is_plain(value: object) -> bool:
    try:
        plain(value)
    except (TypeError, RecursionError):
        return False
    return True
