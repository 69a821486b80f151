"""A chat template is a stranger's program: its first renderings happen in a process that can be ended.

conversations --fork--> one text after another over a pipe --> texts, or a sentence that names the conversation
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from cispo.errors import UserError
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

    The process is forked: it starts in milliseconds and runs nothing but the template. Raises UserError for the first
    conversation that it fails on, as `where` ("data: row") and its entry of `numbers`, with the template's `name`.
    """

    def refused(reason: str) -> UserError:
        return UserError(f"{where} {numbers[len(texts)]}: the chat template of '{name}' {reason}")

    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_render_all, args=(render, conversations, longest, sending), daemon=True)
    process.start()
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
        process.kill()
        process.join()
        receiving.close()
    return texts


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
