"""A tool that ships: Python cells of an attempt, each run in the sandbox (`cispo.sandbox`).

    cell 3 --> program: cells 1 and 2 in silence, then cell 3 with its output --> text

A call's process ends with the call, so names are kept by running the earlier cells again, with the same random numbers.
A cell that did not come to its end (a limit, a crash) leaves no name behind.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from cispo.sandbox.run import SandboxResult, run_python

_CELLS = Path(__file__).with_name("python_cells.py")
_END = "\0end of the cell\n"
"""Last output of a program: its cell came to its end."""


@dataclass(slots=True)
class _Cells:
    """The cells of one attempt that came to their ends."""

    done: list[str] = field(default_factory=list)
    order: asyncio.Lock = field(default_factory=asyncio.Lock)


async def run(
    code: str, *, session: dict[str, object], timeout: float = 5.0, memory_mb: int = 512, max_characters: int = 4000
) -> str:
    """Runs Python code and returns its output and the value of its last expression. Names are kept between calls.

    Args:
        code: a cell of Python
    """
    cells = session.setdefault(__name__, _Cells())
    assert isinstance(cells, _Cells)
    # Calls of one reply run side by side; cells run in their order, and the lock is first come, first served.
    async with cells.order:
        result = await asyncio.to_thread(_run, [*cells.done, code], timeout, memory_mb)
        output, ended, _ = result.stdout.partition(_END)
        if ended:
            cells.done.append(code)
            return cut(output.rstrip(), max_characters) or "(no output)"
    output = cut(output + result.stderr, max_characters)
    return "\n".join(filter(None, [output.rstrip(), f"[{_reason(result, timeout, memory_mb)}: the cell is undone]"]))


# The name that the policy calls.
run.__name__ = "python"


def _run(cells: list[str], timeout: float, memory_mb: int) -> SandboxResult:
    program = f"{_CELLS.read_text()}\nmain({cells!r}, {_END!r})\n"
    return run_python(program, timeout=timeout, memory_mb=memory_mb)


def _reason(result: SandboxResult, timeout: float, memory_mb: int) -> str:
    match result.stopped:
        case "time":
            return f"stopped after {timeout:g} s, earlier cells included"
        case "memory":
            return f"out of memory, {memory_mb} MB"
        case "output":
            return "too much output"
        case None:
            return f"ended its process with exit code {result.exit_code}"
        case other:
            return f"stopped at its limit of {other}"


def cut(text: str, most: int) -> str:
    """The text without its middle where it has over `most` characters: errors stand at the end."""
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]}\n[{len(text) - most} characters were cut]\n{text[len(text) - most + head :]}"
