"""Program of the tool `python`, inside the sandbox: earlier cells in silence, then the last one with its output.

It runs on the sandbox's bare interpreter and imports nothing of CISPO.
"""

from __future__ import annotations

import ast
import io
import linecache
import os
import random
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType


def main(cells: Sequence[str], end: str) -> None:
    """Runs the cells in one namespace, writes `end` behind the output of the last one, and ends the process."""
    random.seed(0)
    module = ModuleType("__main__")
    # The program's own module stays alive by its name: its functions are running.
    sys.modules["cells"], sys.modules["__main__"] = sys.modules["__main__"], module
    # A program that is stopped has shown its lines.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    output = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number, cell in enumerate(cells, start=1):
        last = number == len(cells)
        # Also for code that writes to the descriptors themselves; both in one stream, in their order.
        for descriptor in (1, 2):
            os.dup2(output if last else nowhere, descriptor)
        _run(cell, f"<cell {number}>", module)
        _flush()
    os.write(output, end.encode())
    # Threads that a cell left behind end here.
    os._exit(0)


def _run(cell: str, name: str, module: ModuleType) -> None:
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    try:
        body = ast.parse(cell, name).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), module.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass
    # A cell may raise anything; its names up to there are kept.
    except BaseException as error:
        places = error.__traceback__
        while places is not None and not places.tb_frame.f_code.co_filename.startswith("<cell"):
            places = places.tb_next
        traceback.print_exception(type(error), error, places, file=sys.__stdout__)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass
