"""Tools of MCP servers: commands that speak the Model Context Protocol over stdin and stdout.

    "mcp: python -m my_server" --start--> McpServer.tools --McpTool.call--> the server's text, or a ToolError

A server serves the attempts of one session process. One named with "mcp per attempt:" keeps state between calls: it is
started for each attempt, and where it ends, the next one repeats the attempt's calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cispo.agents.tools import ToolError
from cispo.errors import UserError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

_NAMED = re.compile(r"mcp( per attempt)?:(.*)", re.DOTALL)

_START_SECONDS = 60.0
"""Limit of a server's start, the import of its modules included."""

# The client gives a server a session of its own, which the death of this process does not end. The kernel ends it.
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class _ServerEnded(Exception):
    """The server's process ended during a call."""


@dataclass(frozen=True, slots=True)
class McpTool:
    """One tool of a server, as `tools.Tool` is one of a function."""

    name: str
    description: str
    schema: Mapping[str, object]
    """Of its arguments, as the server gives it."""
    server: McpServer
    required_columns: frozenset[str] = frozenset()
    """None: a server sees the arguments of a call alone."""

    @property
    def definition(self) -> dict[str, object]:
        """The tool as chat templates and OpenAI's API take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.schema)}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, object], columns: Mapping[str, object]) -> object:
        """The text of the result. Raises ToolError with the server's own sentence."""
        return await self.server.call(self.name, _typed(arguments, self.schema))


class McpServer:
    """One entry of `env.tools`; its process runs between `start` and `close`."""

    def __init__(self, entry: str, key: str) -> None:
        """`key` is the recipe key that holds `entry`. Raises UserError where it names no command."""
        match = _NAMED.fullmatch(entry.strip())
        assert match is not None
        self.entry, self.key, self.per_attempt = entry, key, match[1] is not None
        try:
            self._argv = shlex.split(match[2])
        except ValueError as error:
            raise UserError(f"{key}: '{entry}' is no command line: {error}") from None
        if not self._argv:
            raise UserError(f"{key}: '{entry}' names no command")
        self.tools: list[McpTool] = []
        self._past: list[tuple[str, Mapping[str, object]]] = []
        """Calls that made the state of an attempt's server."""
        self._client: Client | None = None
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> McpServer:
        """Starts the process and reads its list of tools. Raises UserError with the reason where that fails."""
        client = await self._connected()
        listed, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            listed += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        self.tools = [McpTool(tool.name, tool.description or "", _untitled(tool.input_schema), self) for tool in listed]
        if not self.tools:
            raise UserError(f"{self.key}: the server of '{self.entry}' has no tools")
        return self

    async def for_attempt(self) -> McpServer:
        """The server of one attempt: this one, or one of its own."""
        return await McpServer(self.entry, self.key).start() if self.per_attempt else self

    async def call(self, name: str, arguments: Mapping[str, object]) -> str:
        """The text of a call's result. Raises ToolError for an error of the server, or for its end."""
        try:
            try:
                text = await self._call(name, arguments)
            except _ServerEnded:
                # A server of many attempts may have ended by the call of another.
                text = await self._call(name, arguments)
        except _ServerEnded:
            raise ToolError(f"{name} ended its server") from None
        except UserError as error:
            raise ToolError(f"{name}: the server is gone, and {error}") from None
        if self.per_attempt:
            self._past.append((name, arguments))
        return text

    async def close(self) -> None:
        """Ends the process."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait({self._task})
        self._client, self._task = None, None

    async def _call(self, name: str, arguments: Mapping[str, object]) -> str:
        from mcp import MCPError

        client = await self._connected()
        try:
            result = await client.call_tool(name, dict(arguments))
        except MCPError as error:
            if client is self._client and not self._is_closed(error.code):
                raise ToolError(f"{name}: {error.error.message}") from None
            await self._forget(client)
            raise _ServerEnded from None
        text = _text(result)
        if result.is_error:
            raise ToolError(text.strip() or f"{name} failed")
        return text

    @staticmethod
    def _is_closed(code: int) -> bool:
        from mcp.types import CONNECTION_CLOSED

        return code == CONNECTION_CLOSED

    async def _forget(self, client: Client) -> None:
        async with self._starting:
            if self._client is client:
                await self.close()

    async def _connected(self) -> Client:
        """The client of a running server, which has repeated the attempt's calls."""
        async with self._starting:
            if self._client is None:
                self._closing = asyncio.Event()
                connected: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
                said = _LastWords()
                self._task = asyncio.create_task(self._run(connected, said))
                try:
                    client = await asyncio.wait_for(connected, _START_SECONDS)
                # The client raises the errors of process, pipes and protocol.
                except Exception as error:
                    await self.close()
                    raise UserError(f"{self.key}: '{self.entry}' {_reason(error, said.text())}") from None
                await self._repeat_past(client)
                self._client = client
        return self._client

    async def _repeat_past(self, client: Client) -> None:
        from mcp import MCPError

        try:
            for name, arguments in self._past:
                await client.call_tool(name, dict(arguments))
        except MCPError:
            await self.close()
            raise _ServerEnded from None

    async def _run(self, connected: asyncio.Future[Client], said: _LastWords) -> None:
        """The client's life in one task, as its library demands."""
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client

        # `python` is the one that runs this process.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        try:
            if shutil.which(self._argv[0], path=path) is None:
                raise FileNotFoundError(f"there is no command '{self._argv[0]}'")
            parameters = StdioServerParameters(
                command=sys.executable,
                args=["-I", "-S", "-c", _LAUNCHER, *self._argv],
                env={**os.environ, "PATH": path},
            )
            with said.open() as errors:
                transport = stdio_client(parameters, errlog=errors)
                async with Client(transport) as client:
                    connected.set_result(client)
                    await self._closing.wait()
        except Exception as error:
            if not connected.done():
                connected.set_exception(error)


class _LastWords:
    """The end of the text that a process writes to its standard error, for the sentence on its failure."""

    def __init__(self) -> None:
        self._bytes = b""

    @contextmanager
    def open(self) -> Iterator[TextIO]:
        """The pipe's end for the process; it is read while the block lasts."""
        loop = asyncio.get_running_loop()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        loop.add_reader(reading, self._read, reading)
        try:
            with open(writing, "w") as file:
                yield file
            self._read(reading)
        finally:
            loop.remove_reader(reading)
            os.close(reading)

    def _read(self, pipe: int) -> None:
        with suppress(BlockingIOError):
            self._bytes = (self._bytes + os.read(pipe, 65536))[-4096:]

    def text(self) -> str:
        return self._bytes.decode(errors="replace")


def is_mcp(entry: str) -> bool:
    """Whether an entry of `env.tools` names a server's command, and no function."""
    return _NAMED.match(entry.strip()) is not None


def _text(result: CallToolResult) -> str:
    """The text of a result; parts without text are named."""
    parts = [getattr(part, "text", None) or f"[{part.type} left out]" for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _untitled(schema: Mapping[str, object]) -> dict[str, object]:
    """A schema without the titles that Python servers add, which repeat the names."""
    kept = {name: value for name, value in schema.items() if name != "title"}
    properties = kept.get("properties")
    if isinstance(properties, Mapping):
        kept["properties"] = {n: _untitled(p) if isinstance(p, Mapping) else p for n, p in properties.items()}
    return kept


def _typed(arguments: Mapping[str, object], schema: Mapping[str, object]) -> dict[str, object]:
    """Arguments that a parser could only read as text, as the JSON values that the schema asks for."""
    properties = schema.get("properties")
    types = {
        name: described.get("type")
        for name, described in (properties.items() if isinstance(properties, Mapping) else ())
        if isinstance(described, Mapping)
    }
    return {name: _value(value, types.get(name)) for name, value in arguments.items()}


def _value(value: object, kind: object) -> object:
    if not isinstance(value, str) or kind not in ("integer", "number", "boolean", "array", "object"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _reason(error: BaseException, said: str) -> str:
    """The predicate of a sentence on a server that did not start and wrote `said` to its standard error."""
    if isinstance(error, TimeoutError):
        return f"does not answer within {_START_SECONDS:g} s"
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = lines[-1] if lines else " ".join(str(error).split())
    return f"does not start as an MCP server: {text:.300}"
