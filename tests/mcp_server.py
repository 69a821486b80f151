"""A real MCP server of the tests, with a state and with tools that break: python -m tests.mcp_server [PREFIX]."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests", log_level="ERROR")
remembered: list[str] = []


def multiply(a: int, b: int = 2) -> str:
    """Multiplies two numbers."""
    return str(a * b)


def remember(text: str) -> str:
    """Remembers a text; all of them so far."""
    remembered.append(text)
    return " ".join(remembered)


def refuse(text: str) -> str:
    """Raises."""
    raise ValueError(f"no {text}")


def leave(text: str) -> str:
    """Ends the server, once for each file name."""
    if os.path.exists(text):
        return "stayed"
    open(text, "w").close()
    os._exit(5)


def die(text: str) -> str:
    """Ends the server."""
    os._exit(5)


def hang(text: str) -> str:
    """Never answers."""
    time.sleep(1000)
    return text


if __name__ == "__main__":
    prefix = "".join(sys.argv[1:])
    for tool in (multiply, remember, refuse, leave, die, hang):
        server.add_tool(tool, name=prefix + tool.__name__)
    server.run("stdio")
