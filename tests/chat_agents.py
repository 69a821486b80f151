"""Agents of the chat tests: functions that own their loop, and one for each way of being broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

from cispo.agents.chat import Chat, ChatEnded, ContextFull, PlainChat
from cispo.types import Message
from rewards.chase import Chase


def user(text: str) -> Message:
    return {"role": "user", "content": text}


async def count(chat: Chat, messages: list[Message], target: int, **_: object) -> Mapping[str, float]:
    """Counts replies; says back the last one. Its answers make a lost or doubled reply visible."""
    said = list[str]()
    while len(said) < target:
        reply = await chat(messages)
        said.append(reply.text)
        messages = [*messages, reply.message, user(f"{len(said)} {reply.text}")]
        await asyncio.sleep(random.random() * 0.02)
    return {"said": float(len(said))}


def plain(chat: PlainChat, messages: list[Message], target: int) -> float:
    """The same as a plain function."""
    for number in range(target):
        reply = chat(messages)
        messages = [*messages, reply.message, user(f"{number + 1} {reply.text}")]
        time.sleep(random.random() * 0.02)
    return float(target)


async def summarised(chat: Chat, messages: list[Message], target: int) -> float:
    """Replaces the history by the policy's own summary of it, every second reply."""
    start = messages
    for number in range(target):
        reply = await chat(messages)
        messages = [*messages, reply.message, user(f"n{number}")]
        if number % 2:
            summary = await chat([*messages, user("sum up")], max_tokens=8)
            messages = [*start, user(summary.content)]
    return 1.0


async def sliding(chat: Chat, messages: list[Message], target: int) -> float:
    """Keeps the prompt and the newest messages that have room."""
    start, rest = messages, list[Message]()
    for number in range(target):
        while True:
            try:
                reply = await chat([*start, *rest])
                break
            except ContextFull:
                rest = rest[2:]
        rest += [reply.message, user(f"and then {number}?")]
    return float(len(rest))


async def team(chat: Chat, messages: list[Message], target: int) -> float:
    """Sub-agents side by side, of several turns each; then an answer of the one that leads them."""

    async def member(name: str) -> str:
        own: list[Message] = [user(name)]
        for _ in range(2):
            reply = await chat(own)
            own += [reply.message, user("more")]
        return str(own[1]["content"])

    first = await chat(messages)
    found = await asyncio.gather(*(member(name) for name in "abc"[:target]))
    await chat([*messages, first.message, user(" ".join(found))])
    return 1.0


async def votes(chat: Chat, messages: list[Message], target: int) -> float:
    """The same question several times."""
    replies = [await chat(messages) for _ in range(target)]
    return float(len({reply.text for reply in replies}))


async def dies(chat: Chat, messages: list[Message], target: int, fatal: str, attempt: int, crashed: str) -> float:
    """Ends its process once, before turn `target` of attempt 0, with the signal or by hanging."""
    for number in range(4):
        mark = Path(crashed)
        if number == target and attempt == 0 and not mark.exists():
            mark.touch()
            if fatal == "kill":
                os.kill(os.getpid(), 9)
            os._exit(3)
        reply = await chat(messages)
        messages = [*messages, reply.message, user(f"{number} {reply.text}")]
    return 1.0


async def broken(chat: Chat, messages: list[Message], attempt: int, how: str) -> object:
    """Attempt 0 breaks; the others count to three."""
    for number in range(3):
        reply = await chat(messages)
        messages = [*messages, reply.message, user(f"{number}")]
        if attempt or number < 1:
            continue
        match how:
            case "raise":
                raise ValueError("by design")
            case "hang":
                time.sleep(3600)
            case "block":
                await asyncio.sleep(3600)
            case "nan":
                return float("nan")
            case "text":
                return "good"
            case "refused":
                await chat("no messages")  # type: ignore[arg-type]
            case "exit":
                raise SystemExit(3)
            case "endless":
                while True:
                    await chat(messages)
            case "stubborn":
                while True:
                    with contextlib.suppress(ChatEnded):
                        await chat(messages)
            case "full":
                await chat([*messages, user("x" * 500)])
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(chat([*messages, user("x" * 500)]))  # type: ignore[arg-type]
    return 1.0


async def silent(chat: Chat) -> float:
    """Never asks."""
    return 1.0


async def chase(chat: Chat, messages: list[Message], table: str, attempt: int, crashed: str, turn: int) -> None:
    """`rewards.chase:Chase` as an agent that goes on behind a reply without its end; its process is killed once, before
    turn `turn` of attempt 1."""
    env = Chase(table)
    for number in range(8):
        if number == turn and attempt == 1 and not Path(crashed).exists():
            Path(crashed).touch()
            os.kill(os.getpid(), 9)
        reply = await chat(messages)
        step = env.step(reply)
        if step is None:
            return
        messages = [*messages, reply.message, user(str(step.observation))]
