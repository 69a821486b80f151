"""The sandboxed program: loads a solution, takes the steps of its tests and reports the outcome of each.

The last line, `main(solution)`, is added by `rewards.code`. Steps come on stdin, as the repr of
(secret, [(kind, source)]): kind "do" is executed, "check" is executed and counts, "value" is evaluated and its value
sent out to be compared there.
"""

from __future__ import annotations

import builtins
import os
import sys
import types


def main(solution: str) -> None:
    names, pristine = builtins.__dict__, dict(builtins.__dict__)
    write, leave, read, evaluate, compiled = os.write, os._exit, os.read, eval, compile
    module = types.ModuleType("solution")
    space = module.__dict__

    # A solution may patch or shadow builtins, before the tests or while they call it.
    def restore() -> None:
        names.update(pristine)
        space["__builtins__"] = builtins

    def run(source: str, kind: str) -> object:
        result = evaluate(compiled(source, "solution.py", kind, dont_inherit=True), space)
        restore()
        return result

    steps_from, verdicts = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.unlink("main.py")
    sys.modules["solution"] = module
    run(solution, "exec")
    text = b""
    while chunk := read(steps_from, 1 << 20):
        text += chunk
    secret, steps = evaluate(text)
    for number, (kind, source) in enumerate(steps):
        try:
            if kind == "value":
                outcome = "value " + repr(plain(run(source, "eval")))
            else:
                run(source, "exec")
                outcome = "passed"
        # SystemExit and KeyboardInterrupt as well: a solution that leaves has not passed.
        except BaseException as error:
            restore()
            write(2, f"{type(error).__name__}: {error}\n"[:300].encode(errors="replace"))
            if kind == "do":
                break
            continue
        line = f"\n{secret} {number} {outcome}\n".encode()
        while line:
            line = line[write(verdicts, line) :]
    # No exit handlers of the solution, and no waiting for its threads.
    leave(0)


def plain(value: object) -> object:
    """The value in built-in types: its repr is a literal, and no method of the solution takes part in comparing."""
    if value is None or isinstance(value, bool):
        return value
    kind: type
    for kind in (int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    for container in (list, tuple, set):
        if isinstance(value, container):
            return container(plain(inner) for inner in value)
    if isinstance(value, frozenset):
        return {plain(inner) for inner in value}
    raise TypeError(f"a result of type {type(value).__name__} cannot be compared")
