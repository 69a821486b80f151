"""The policy behind OpenAI's API, for agents that are written with any client of it: on the loopback, in the driver's
event loop.

    POST /v1/chat/completions, /v1/completions --key--> the attempt's Conversations --> rounds or apart, ledger
    GET  /v1/models

The key is the attempt. A request with a known body gets the answer that the first one got, as the retries of clients
need: a `seed` makes bodies differ. Parameters of sampling are the run's: those of a request are not read, but for
`max_tokens`, which can lower the run's limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from cispo.agents.chat import ChatEnded, ChatRefused, ContextFull
from cispo.agents.contract import Status
from cispo.agents.conversations import Conversations
from cispo.agents.ledger import Place, Sampled
from cispo.agents.openai_form import (
    LARGEST_BODY,
    MODEL,
    TRANSPORT,
    Json,
    Refused,
    calls_of,
    envelope_of,
    finish_of,
    ids_of,
    limit_of,
    messages_of,
    prompt_of,
    read_body,
    said_of,
    tools_of,
    usage_of,
)
from cispo.errors import UserError
from cispo.rollout.renderer import Renderer, Tools

_BACKLOG = 1024
_KEPT_KEYS = 100_000
"""Ended attempts whose late requests are told so."""


def _over() -> Refused:
    return Refused(410, "the attempt is over", code="attempt_over")


@dataclass(slots=True)
class Access:
    """The way of one attempt's requests to the policy."""

    conversations: Conversations
    waiting: Callable[[], AbstractContextManager[None]]
    """Entered while the policy is asked: that time is not the agent's."""
    failed: Callable[[Exception], None]
    """Receives an error that is none of the agent's: the run's."""
    refused: Status | None = None
    """The bound that a request has met: the status of an attempt that ends by it."""
    over: bool = False


_Answer = Callable[[web.Request, Access], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class _Serving:
    """An open port."""

    loop: asyncio.AbstractEventLoop
    listening: socket.socket
    server: asyncio.Server
    handler: web.Server


def _placed(place: Callable[[], Place]) -> Place:
    """Raises ChatRefused for messages that the ledger or the chat template cannot read: the client may send any."""
    try:
        return place()
    except Exception as error:
        reason = " ".join(str(error).split())
        text = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        raise ChatRefused(f"the messages cannot be read: {text:.300}") from None


class Endpoint:
    """One server for all attempts of a run."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._open: dict[str, Access] = {}
        self._over: dict[str, None] = {}
        self._serving: _Serving | None = None

    async def start(self) -> str:
        """Opens a port of the loopback, where none is open in this event loop. Returns the `base_url` of clients."""
        loop = asyncio.get_running_loop()
        if self._serving is not None and self._serving.loop is not loop:
            self.close()
        if self._serving is None:
            app = web.Application(client_max_size=LARGEST_BODY)
            app.router.add_post("/v1/chat/completions", self._guarded(self._chat))
            app.router.add_post("/v1/completions", self._guarded(self._complete))
            app.router.add_get("/v1/models", self._guarded(self._models))
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            listening = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
            assert runner.server is not None
            server = await loop.create_server(runner.server, sock=listening, backlog=_BACKLOG)
            self._serving = _Serving(loop, listening, server, runner.server)
        return f"http://127.0.0.1:{self._serving.listening.getsockname()[1]}/v1"

    def close(self) -> None:
        """Closes the port and all connections, inside of its event loop or after the loop's end."""
        serving, self._serving = self._serving, None
        if serving is None:
            return
        if serving.loop.is_closed():
            serving.listening.close()
            return
        serving.server.close()
        for connection in list(serving.handler.connections):
            connection.force_close()

    def new_key(self) -> str:
        """A key for one attempt."""
        return f"cispo-{secrets.token_hex(16)}"

    def open(
        self,
        key: str,
        conversations: Conversations,
        waiting: Callable[[], AbstractContextManager[None]],
        failed: Callable[[Exception], None],
    ) -> Access:
        """Requests with the key are answered from here on, until `end`; the arguments are those of `Access`."""
        self._open[key] = access = Access(conversations, waiting, failed)
        return access

    def end(self, key: str) -> None:
        """The attempt is over: further requests are answered with 410."""
        self._open.pop(key).over = True
        self._over[key] = None
        while len(self._over) > _KEPT_KEYS:
            del self._over[next(iter(self._over))]

    def _guarded(self, answer: _Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            access: Access | None = None
            try:
                access = self._access(request)
                return await answer(request, access)
            except Refused as refusal:
                return refusal.response()
            except ChatEnded as error:
                assert access is not None
                access.refused = error.status
                code = "context_length_exceeded" if isinstance(error, ContextFull) else "max_turns"
                # No status that clients retry.
                return Refused(400 if isinstance(error, ContextFull) else 403, str(error), code=code).response()
            except ChatRefused as error:
                return Refused(400, str(error)).response()

        return handle

    def _access(self, request: web.Request) -> Access:
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        key = key.strip() if kind.lower() == "bearer" else ""
        if key in self._over:
            raise _over()
        if key not in self._open:
            raise Refused(401, "the API key is of no attempt of this run", code="invalid_api_key")
        return self._open[key]

    async def _models(self, request: web.Request, access: Access) -> web.StreamResponse:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "cispo"}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request, access: Access) -> web.StreamResponse:
        body = await read_body(request)
        messages, tools = messages_of(body), tools_of(body)
        ledger = access.conversations.ledger
        access.conversations.check(tools)
        sampled = await self._sampled(access, body, lambda: ledger.place(messages, tools), tools)
        choice = {"index": 0, "finish_reason": finish_of(sampled.reply), "logprobs": self._logprobs(body, sampled)}
        said = said_of(sampled.reply)
        if not body.get("stream"):
            return self._whole(body, "chat.completion", sampled, {**choice, "message": said})
        calls = [{"index": n, **call} for n, call in enumerate(calls_of(sampled.reply))]
        delta = {**said, "tool_calls": calls} if calls else said
        return await self._streamed(request, body, "chat.completion.chunk", sampled, {**choice, "delta": delta})

    async def _complete(self, request: web.Request, access: Access) -> web.StreamResponse:
        body = await read_body(request)
        given = prompt_of(body, vocabulary=len(self._renderer.tokenizer))
        ledger = access.conversations.ledger

        def place() -> Place:
            return ledger.place_text(given) if isinstance(given, str) else ledger.place_ids(given)

        sampled = await self._sampled(access, body, place, ())
        text = self._renderer.decode_reply(sampled.completion.token_ids)
        reason = "stop" if sampled.ended else "length"
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if not body.get("stream"):
            return self._whole(body, "text_completion", sampled, choice)
        return await self._streamed(request, body, "text_completion", sampled, choice)

    async def _sampled(self, access: Access, body: Json, place: Callable[[], Place], tools: Tools) -> Sampled:
        """The answer to a body, sampled with the first request that has it."""
        identity = json.dumps({k: v for k, v in body.items() if k not in TRANSPORT}, sort_keys=True)
        limit = limit_of(body)
        try:
            with access.waiting():
                return await access.conversations.ask_at(
                    partial(_placed, place), identity, limit, tools=tools, once=True
                )
        except (ChatEnded, ChatRefused):
            raise
        except asyncio.CancelledError:
            if access.over:
                raise _over() from None
            raise
        except Exception as error:
            access.failed(error)
            raise Refused(500, "the run has failed") from None

    def _logprobs(self, body: Json, sampled: Sampled) -> Json | None:
        if not body.get("logprobs"):
            return None
        tokens = self._renderer.tokenizer.convert_ids_to_tokens(list(sampled.completion.token_ids))
        pairs = zip(tokens, sampled.completion.logprobs, strict=True)
        return {"content": [{"token": t, "logprob": x, "bytes": None, "top_logprobs": []} for t, x in pairs]}

    def _whole(self, body: Json, kind: str, sampled: Sampled, choice: Json) -> web.Response:
        return web.json_response(
            {
                **envelope_of(body, kind, sampled),
                "choices": [{**choice, **ids_of(body, sampled)}],
                "usage": usage_of(sampled),
            }
        )

    async def _streamed(
        self, request: web.Request, body: Json, kind: str, sampled: Sampled, choice: Json
    ) -> web.StreamResponse:
        """The whole answer as one event."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        envelope = envelope_of(body, kind, sampled)
        events: list[Json] = [{**envelope, "choices": [choice]}]
        options = body.get("stream_options")
        if isinstance(options, Mapping) and options.get("include_usage"):
            events.append({**envelope, "choices": [], "usage": usage_of(sampled)})
        # A client that is gone asks again, and is answered then.
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            for event in events:
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        return response
