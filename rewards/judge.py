"""An LLM as the judge, behind any server with OpenAI's chat completions (vLLM's own, a provider, a gateway).

    template filled with {prompt}, {completion} and columns --> cache --> rate limit --> request, retried --> a number

An answer without a number, and a request that fails after its retries, give no reward (None): the sample says so in
`judge_problem`, and `reward/judge_count` is the number of completions that were judged. A refused key or an unknown
model is an error of the call.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import string
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiolimiter import AsyncLimiter
from openai import AsyncOpenAI

from cispo.rollout.reward_clock import waiting

PROMPT = """Question:
{prompt}

Answer to judge:
{completion}

Is the answer correct? Reply with one number from 0 (wrong) to 10 (right) and nothing else."""

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_KEPT = 100_000
"""Most verdicts that a process remembers."""

Verdict = tuple[float | None, dict[str, object]]


@dataclass(slots=True)
class _Server:
    """One server and its limits, shared by all calls of the process."""

    client: AsyncOpenAI
    limiter: AsyncLimiter | None
    verdicts: OrderedDict[str, asyncio.Future[str]] = field(default_factory=OrderedDict)
    store: sqlite3.Connection | None = None


_SERVERS: dict[tuple[object, ...], _Server] = {}


async def judge(
    completion: str,
    prompt: str,
    *,
    model: str,
    base_url: str | None = None,
    template: str = PROMPT,
    system: str | None = None,
    scale: float = 10.0,
    pattern: str | None = None,
    max_tokens: int = 16,
    temperature: float = 0.0,
    per_minute: float | None = None,
    retries: int = 3,
    request_timeout: float = 60.0,
    cache: str | None = None,
    extra: Mapping[str, object] | None = None,
    **columns: object,
) -> Verdict:
    """The judge's number divided by `scale`, held within [0, 1].

    `base_url` is the server's, as "http://host:8000/v1"; left out, and for the key, OPENAI_BASE_URL and OPENAI_API_KEY
    of the environment hold. `template` may name columns of the row. The number is the last one of the reply, or the
    first group of `pattern`. At most `per_minute` requests begin in a minute; that wait is no part of `reward.timeout`.
    Requests that fail with a connection error, a time-out, or the codes 408, 409, 429 and 5xx are repeated up to
    `retries` times with growing pauses, which do count. Equal requests are asked once: of this process, or with
    `cache`, a file, of all runs that name it. `extra` goes into the request's body (`{"chat_template_kwargs": ...}`).
    """
    text = _Filled(columns | {"prompt": prompt, "completion": completion}).format(template)
    said = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    request = {"model": model, "messages": said, "max_tokens": max_tokens, "temperature": temperature}
    server = _server(base_url, per_minute, retries, request_timeout, cache)
    try:
        reply = await _asked_once(server, request, dict(extra or {}))
    # Of the openai client, whose errors share no other class with the standard library's.
    except Exception as error:
        # A wrong key, address or model fails every call: that is for `reward.on_error`.
        if getattr(error, "status_code", None) in (401, 403, 404):
            raise
        return None, {"judge_problem": f"{type(error).__name__}: {' '.join(str(error).split()):.200}"}
    found = re.findall(pattern, reply) if pattern else _NUMBER.findall(reply)
    try:
        number = float(found[0] if pattern else found[-1])
    except (IndexError, ValueError):
        return None, {"judge_problem": "no number", "judge_reply": reply[:200]}
    return min(max(number / scale, 0.0), 1.0), {}


class _Filled(string.Formatter):
    """Fills {name} fields; braces in the values stay as they are."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def get_value(self, key: int | str, args: object, kwargs: object) -> object:
        if key not in self._values:
            raise ValueError(f"the template names {{{key}}}, and the row has no such column")
        return self._values[str(key)]


def _server(
    base_url: str | None, per_minute: float | None, retries: int, request_timeout: float, cache: str | None
) -> _Server:
    # An event loop's clients do not work on another one.
    key = (id(asyncio.get_running_loop()), base_url, per_minute, retries, request_timeout, cache)
    if key not in _SERVERS:
        key_of_server = "none" if base_url is not None and not _has_key() else None
        client = AsyncOpenAI(api_key=key_of_server, base_url=base_url, max_retries=retries, timeout=request_timeout)
        # Bursts of a second's worth: more at once would be refused by a provider that counts seconds.
        limiter = None if per_minute is None else AsyncLimiter(max(per_minute / 60, 1.0), max(60 / per_minute, 1.0))
        store = None
        if cache is not None:
            store = sqlite3.connect(cache, timeout=30.0, isolation_level=None)
            store.execute("create table if not exists verdicts (request text primary key, reply text)")
        _SERVERS[key] = _Server(client, limiter, store=store)
    return _SERVERS[key]


def _has_key() -> bool:
    return bool(os.environ.get("OPENAI_API_KEY"))


async def _asked_once(server: _Server, request: dict[str, object], extra: dict[str, object]) -> str:
    """The reply to a request; an equal one that is under way or answered is not sent again. Failures are forgotten."""
    identity = json.dumps([str(server.client.base_url), request, extra], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    if server.store is not None:
        row = server.store.execute("select reply from verdicts where request = ?", [key]).fetchone()
        if row is not None:
            return row[0]
    if key in server.verdicts:
        # It runs in another call, whose limit holds for it.
        with waiting():
            return await asyncio.shield(server.verdicts[key])
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server.verdicts[key] = answer
    try:
        reply = await _ask(server, request, extra)
    except BaseException as error:
        del server.verdicts[key]
        answer.set_exception(
            error if isinstance(error, Exception) else TimeoutError("the judge did not answer in time")
        )
        # Without another call that waits for it, the loop would report an exception that was never read.
        answer.exception()
        raise
    answer.set_result(reply)
    while len(server.verdicts) > _KEPT:
        server.verdicts.popitem(last=False)
    if server.store is not None:
        server.store.execute("insert or replace into verdicts values (?, ?)", [key, reply])
    return reply


async def _ask(server: _Server, request: dict[str, object], extra: dict[str, object]) -> str:
    if server.limiter is not None:
        with waiting():
            await server.limiter.acquire()
    done = await server.client.chat.completions.create(**request, extra_body=extra or None)  # type: ignore[call-overload]
    return done.choices[0].message.content or ""
