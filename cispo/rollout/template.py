"""A chat template is a stranger's program: its first renderings happen in a process that can be ended.

conversations --fork--> batches of texts over a pipe, their number in shared memory --> texts, or a sentence that names
                                                                                    the conversation
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import struct
import sys
import time
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

# A message a text would take more than twice the time of the texts. A batch holds one text of any length at least.
_BATCH_SECONDS = 0.1
_BATCH_CHARACTERS = 1 << 20
_COUNT = struct.Struct("q")


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

    def refused(position: int, reason: str) -> UserError:
        return UserError(f"{where} {numbers[position]}: the chat template of '{name}' {reason}")

    def at_work() -> int:
        # All may be finished, and their last batch not be sent.
        return min(_COUNT.unpack_from(done)[0], len(conversations) - 1)

    done = mmap.mmap(-1, _COUNT.size)
    receiving, sending = multiprocessing.Pipe(duplex=False)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _run_child(parent, render, conversations, longest, sending, done)
    sending.close()
    texts: list[str | None] = []
    try:
        while len(texts) < len(conversations):
            # The conversation at work began within a batch's time of the last message.
            if not receiving.poll(_SECONDS + _BATCH_SECONDS):
                raise refused(at_work(), f"does not finish within {_SECONDS:g} s")
            try:
                batch, reason = receiving.recv()
            except EOFError:
                raise refused(at_work(), "crashes its process") from None
            texts += batch
            if reason:
                raise refused(len(texts), reason)
    finally:
        # The program around may ignore its children's ends, and the system forgets them then.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        receiving.close()
        done.close()
    return texts


def _run_child(
    parent: int,
    render: Render,
    conversations: Sequence[Sequence[Message]],
    longest: int,
    sending: Connection,
    done: mmap.mmap,
) -> NoReturn:
    """`_render_all`, then the end of the process, without the exit handlers of the program that was forked."""
    try:
        if sys.platform == "linux":
            call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == parent:  # it may have ended before
            _render_all(render, conversations, longest, sending, done)
    finally:
        os._exit(0)


def _render_all(
    render: Render, conversations: Sequence[Sequence[Message]], longest: int, sending: Connection, done: mmap.mmap
) -> None:
    """Sends (texts, reason) for one batch after another; a reason ends them, and is that of the text behind the last.

    `done` counts the texts that are finished, sent or not.
    """
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    texts: list[str | None] = []
    characters, sent = 0, time.monotonic()
    for number, messages in enumerate(conversations, start=1):
        try:
            text = render(messages)
        # A template may raise anything.
        except Exception as error:
            return sending.send((texts, reason_of(error)))
        texts.append(text if len(text) <= longest else None)
        _COUNT.pack_into(done, 0, number)
        characters += 0 if texts[-1] is None else len(text)
        if characters > _BATCH_CHARACTERS or time.monotonic() - sent > _BATCH_SECONDS:
            sending.send((texts, ""))
            texts, characters, sent = [], 0, time.monotonic()
    sending.send((texts, ""))


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
