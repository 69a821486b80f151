"""Tools of a real MCP server, in a real session process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cispo.agents.contract import Reply, Step, ToolCall
from cispo.agents.environment import Identity
from cispo.agents.mcp_servers import McpServer
from cispo.agents.session_pool import RemoteSession, SessionPool, pool_of
from cispo.errors import UserError

ROOT = Path(__file__).parents[1]
COMMAND = f"env PYTHONPATH={ROOT} python -m tests.mcp_server"


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    """Both kinds of server, and a function beside them."""
    entries = [f"mcp: {COMMAND} shared_", f"mcp per attempt: {COMMAND}", "tests.agent_code:add"]
    pool = pool_of(entries, {}, "env.tools", timeout=30.0, workers=1)
    yield pool
    pool.close()


async def said(env: RemoteSession, *calls: tuple[str, dict[str, object]]) -> list[str]:
    """The answers to one reply with these calls after another."""
    texts = []
    for name, arguments in calls:
        call = ToolCall(id="call_0", name=name, arguments=arguments)
        step, failed = await env.step(Reply(text="", calls=(call,)))
        assert isinstance(step, Step) and not isinstance(step.observation, str)
        texts.append(str(step.observation[0]["content"]))
        assert bool(failed) == texts[-1].startswith("error:")
    return texts


def test_its_tools_join_the_schema(pool: SessionPool):
    tools = {str(tool["function"]["name"]): tool for tool in pool.check().tools}  # type: ignore[index]
    names = ["multiply", "remember", "refuse", "leave", "die", "hang"]
    assert list(tools) == [f"shared_{name}" for name in names] + names + ["add"]
    assert tools["multiply"] == {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiplies two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
                "required": ["a"],
            },
        },
    }


def test_calls_errors_and_ends(pool: SessionPool, tmp_path: Path):
    """Attempts share the one server and not the other; a server that ends is started again, its attempt's calls are
    repeated, and only a call that ends it twice is an error."""

    async def play() -> tuple[list[str], list[str]]:
        first, second = (pool.open({}, Identity(0, number)) for number in range(2))
        try:
            return (
                await said(
                    first,
                    ("multiply", {"a": "3", "b": 4}),
                    ("multiply", {"a": "x"}),
                    ("refuse", {"text": "luck"}),
                    ("remember", {"text": "a"}),
                    ("remember", {"text": "b"}),
                    ("leave", {"text": str(tmp_path / "left")}),
                    ("remember", {"text": "c"}),
                    ("die", {"text": ""}),
                    ("remember", {"text": "d"}),
                    ("shared_remember", {"text": "one"}),
                ),
                await said(
                    second, ("remember", {"text": "z"}), ("shared_remember", {"text": "two"}), ("add", {"a": 1})
                ),
            )
        finally:
            await first.close()
            await second.close()

    first, second = asyncio.run(play())
    assert first[0] == "12" and first[1].startswith("error: Error executing tool multiply") and "integer" in first[1]
    assert first[2].startswith("error: Error executing tool refuse")
    assert first[3:] == ["a", "a b", "stayed", "a b c", "error: die ended its server", "a b c d", "one"]
    assert second == ["z", "one two", "2"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("mcp:", "'mcp:' names no command"),
        ("mcp: 'half", "is no command line"),
        ("mcp: no-such-command", "does not start as an MCP server: there is no command 'no-such-command'"),
        ("mcp: python -m no_such_module", "does not start as an MCP server: .*No module named no_such_module"),
        ("mcp: true", "does not start as an MCP server: Connection closed"),
    ],
)
def test_servers_that_do_not_start_are_refused(entry: str, sentence: str):
    async def start() -> None:
        await McpServer(entry, "env.tools").start()

    with pytest.raises(UserError, match=f"env.tools: .*{sentence}"):
        asyncio.run(start())


def test_a_name_is_given_once():
    with pytest.raises(UserError, match="env.tools: two tools are named 'add'"):
        pool_of(["tests.agent_code:add", "tests.agent_code:add"], {}, "env.tools", timeout=5.0, workers=1)
