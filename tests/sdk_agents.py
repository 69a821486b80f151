"""The task of `chase` by an agent of the openai-agents SDK, which knows nothing of CISPO: a base URL and a key."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from cispo.agents.contract import Reply, ToolCall


async def walk(base_url: str, api_key: str, messages: list[dict[str, Any]], answer: str, table: str) -> float:
    """1.0 where the SDK's loop over model and tool ends with the right answer."""
    from agents import (  # type: ignore[import-not-found]
        Agent,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    @function_tool
    def look(key: str) -> str:
        """Looks a key up."""
        return f">{table[ascii_lowercase.index(key)]}" if key and key in ascii_lowercase else ">!"

    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        model = OpenAIChatCompletionsModel("policy", client)
        walker = Agent("walker", tools=[look], model=model)
        result = await Runner.run(walker, messages[0]["content"], max_turns=8)
    return float(result.final_output == answer)


def parse(text: str) -> Reply:
    """A reply `2:d` of the warm-up is the thought 2 and a call with the key d; another one is an answer."""
    left, colon, key = text.partition(":")
    if not colon:
        return Reply(text=text, content=text)
    return Reply(text=text, thought=left, calls=(ToolCall(id="call_0", name="look", arguments={"key": key}),))
