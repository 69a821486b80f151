"""A chat template is a stranger's program: its first renderings happen in a process that can be ended.

conversations --fork--> one text after another over a pipe --> texts, or a sentence that names the conversation
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

from cispo.errors import UserError
from cispo.sandbox.kernel import PR_SET_PDEATHSIG, call
from cispo.types import Message

Render = Callable[[Sequence[Message]], str]

_SECONDS = 10.0
"""Limit of one conversation."""
_MEMORY = 2 << 30
"""Bytes that the process may take beside those of its parent."""


def render_bounded(
    render: Render,
    conversations: Sequence[Sequence[Message]],
    *,
    longest: int,
    name: str,
    where: str,
    numbers: Sequence[int],
) -> list[str | None]:
    """`render` of each conversation, in a process of limited time and memory; None for over `longest` characters.

    The process is forked: it starts in milliseconds and runs nothing but the template. It ends with its parent, which
    may be a daemonic process of `multiprocessing`: such a one is not allowed to start a `Process`, for fear of orphans.
    Raises UserError for the first conversation that it fails on, as `where` ("data: row") and its entry of `numbers`,
    with the template's `name`.
    """

    def refused(reason: str) -> UserError:
        return UserError(f"{where} {numbers[len(texts)]}: the chat template of '{name}' {reason}")

    receiving, sending = multiprocessing.Pipe(duplex=False)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _run_child(parent, render, conversations, longest, sending)
    sending.close()
    texts: list[str | None] = []
    try:
        while len(texts) < len(conversations):
            if not receiving.poll(_SECONDS):
                raise refused(f"does not finish within {_SECONDS:g} s")
            try:
                text, reason = receiving.recv()
            except EOFError:
                raise refused("crashes its process") from None
            if reason:
                raise refused(reason)
            texts.append(text)
    finally:
        # The program around may ignore its children's ends, and the system forgets them then.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        receiving.close()
    return texts


def _run_child(
    parent: int, render: Render, conversations: Sequence[Sequence[Message]], longest: int, sending: Connection
) -> NoReturn:
    """`_render_all`, then the end of the process, without the exit handlers of the program that was forked."""
    try:
        if sys.platform == "linux":
            call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == parent:  # it may have ended before
            _render_all(render, conversations, longest, sending)
    finally:
        os._exit(0)


def _render_all(render: Render, conversations: Sequence[Sequence[Message]], longest: int, sending: Connection) -> None:
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    for messages in conversations:
        try:
            text = render(messages)
        # A template may raise anything.
        except Exception as error:
            return sending.send(("", reason_of(error)))
        sending.send((text if len(text) <= longest else None, ""))


def reason_of(error: Exception) -> str:
    """A template's error as the predicate of a sentence."""
    from jinja2 import TemplateError

    if isinstance(error, MemoryError):
        return "takes more than 2 GiB of memory"
    text = " ".join(str(error).split())
    return (
        f"refuses a prompt: {text:.300}"
        if isinstance(error, TemplateError)
        else (f"fails on a prompt: {type(error).__name__}: {text:.300}")
    )


def _limit_memory() -> None:
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + _MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
