"""Agents of the endpoint's tests: one loop, written for the policy itself and with clients of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any

import httpx
from openai import APIStatusError, AsyncOpenAI, OpenAI

from cispo.agents.chat import Chat
from cispo.agents.contract import Reply, ToolCall

LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}, "depth": {"type": "integer"}}},
    },
}


def parse(text: str) -> Reply:
    """Any text of an untrained policy as a thought, a call with two arguments, and the rest."""
    call = ToolCall(id="call_0", name="look", arguments={"key": text[1:3], "depth": len(text)})
    return Reply(text=text, thought=text[:1], content=text[3:], calls=(call,))


def looked(arguments: Mapping[str, Any]) -> str:
    return f"{arguments['key']}{arguments['depth']}"


async def solve(
    chat: Chat, base_url: str, api_key: str, messages: list[Any], client: str, turns: int = 4, folder: str = ""
) -> object:
    """The agent that the row names: one process serves all tests."""
    match client:
        case "white_box":
            return await white_box(chat, messages, turns)
        case "forgetful":
            return await asyncio.to_thread(forgetful, base_url, api_key, messages, turns)
        case "reordering":
            return await reordering(base_url, api_key, messages, turns)
        case "odd":
            return await odd(base_url, api_key, messages, folder)
        case "dies_once":
            return await dies_once(base_url, api_key, messages, folder)
    return await sdk(base_url, api_key, messages, turns)


async def white_box(chat: Chat, messages: list[Any], turns: int) -> float:
    """The loop, without HTTP."""
    for _ in range(turns):
        reply = await chat(messages, tools=[LOOK])
        messages = [*messages, reply.message]
        messages += [{"role": "tool", "tool_call_id": c.id, "content": looked(c.arguments)} for c in reply.calls]
    return float(len(messages))


async def sdk(base_url: str, api_key: str, messages: list[Any], turns: int) -> float:
    """The client's own objects go back, with every field."""
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(turns):
            answer = await client.chat.completions.create(
                model="any", messages=messages, tools=[LOOK], temperature=0.1, top_p=0.5, seed=3, stop=["x"]
            )
            said = answer.choices[0].message
            messages = [*messages, said.model_dump(exclude_none=True)]
            for call in said.tool_calls or []:
                assert call.type == "function"
                content = looked(json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return float(len(messages))


def forgetful(base_url: str, api_key: str, messages: list[Any], turns: int) -> float:
    """A blocking, streaming client that knows no field for thoughts, and gives back the content as parts."""
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(turns):
            content, calls = "", []
            with client.chat.completions.create(model="any", messages=messages, tools=[LOOK], stream=True) as stream:
                for chunk in stream:
                    content += chunk.choices[0].delta.content or ""
                    calls += chunk.choices[0].delta.tool_calls or []
            said = [{"id": c.id, "type": "function", "function": c.function.model_dump()} for c in calls]
            parts = [{"type": "text", "text": content}]
            messages = [*messages, {"role": "assistant", "content": parts, "tool_calls": said}]
            for call in calls:
                told = looked(json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": told})
    return float(len(messages))


async def reordering(base_url: str, api_key: str, messages: list[Any], turns: int) -> float:
    """Plain HTTP: arguments are written anew in another order, with blanks; ids of its own; the content gets blanks."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"}, timeout=60) as client:
        for turn in range(turns):
            body = {"model": "m", "messages": messages, "tools": [LOOK], "max_tokens": 1000}
            answer = (await client.post(f"{base_url}/chat/completions", json=body)).raise_for_status().json()
            said = answer["choices"][0]["message"]
            [call] = said["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            mixed = json.dumps(dict(reversed(arguments.items())), indent=3)
            own = {"id": f"mine-{turn}", "type": "function", "function": {"name": "look", "arguments": mixed}}
            content = f" {said['content'] or ''}\n"
            messages = [*messages, {"role": "assistant", "content": content, "tool_calls": [own], "extra": 1}]
            messages.append({"role": "tool", "tool_call_id": own["id"], "content": looked(arguments)})
    return float(len(messages))


async def odd(base_url: str, api_key: str, messages: list[Any], folder: str) -> Mapping[str, float]:
    """Requests that are no plain question. The facts that the test checks go into a file."""
    facts: dict[str, Any] = {}
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        facts["models"] = [model.id for model in (await client.models.list()).data]
        create, complete = client.chat.completions.create, client.completions.create
        asked: dict[str, Any] = {"model": "m", "messages": messages}
        for name, extra in {
            "n": {"n": 2},
            "logit_bias": {"logit_bias": {"5": 1}},
            "messages": {"messages": []},
            "role": {"messages": [{"content": "x"}]},
            "max_tokens": {"max_tokens": 0},
            "tools": {"tools": [{"type": "function"}]},
            "schema": {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"properties": 1}}}]},
            "content": {"messages": [{"role": "user", "content": {"a": 1}}]},
        }.items():
            facts[name] = await refusal(create(**{**asked, **extra}))
        answers = await asyncio.gather(*(create(**asked) for _ in range(3)))
        facts["same"] = [answer.model_dump(exclude={"created"}) for answer in [*answers, await create(**asked)]]
        facts["seed"] = (await create(**asked, seed=1)).id
        short = await create(**asked, max_tokens=1, logprobs=True, extra_body={"return_token_ids": True})
        facts["short"] = short.model_dump()
        text = await complete(model="m", prompt="1,2", max_tokens=3)
        facts["text"] = text.choices[0].text
        more = await complete(
            model="m", prompt="1,2" + text.choices[0].text + "4", extra_body={"return_token_ids": True}
        )
        facts["more"] = more.model_dump()
        facts["by_ids"] = (await complete(model="m", prompt=[5, 6, 7])).usage.prompt_tokens  # type: ignore[union-attr]
        facts["prompt"] = await refusal(complete(model="m", prompt=["a", "b"]))
        facts["vocabulary"] = await refusal(complete(model="m", prompt=[5, 10**6]))
        facts["long"] = await refusal(create(model="m", messages=[{"role": "user", "content": "1" * 500}]))
        for number in range(4):
            facts["turns"] = await refusal(create(**asked, seed=10 + number))
    async with AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
        facts["key"] = await refusal(client.models.list())
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"}) as client:
        body = await client.post(f"{base_url}/chat/completions", content=b"{")
        facts["json"] = [body.status_code, body.json()["error"]["message"]]
    with open(os.path.join(folder, "facts.json"), "w") as file:
        json.dump({**facts, "base_url": base_url, "api_key": api_key}, file)
    return {"asked": 1.0}


async def refusal(request: Any) -> list[object]:
    """Status, code and sentence of a request that is refused."""
    try:
        await request
    except APIStatusError as error:
        body: Any = error.body
        return [error.status_code, body["code"], body["message"]]
    return [200, None, ""]


async def dies_once(base_url: str, api_key: str, messages: list[Any], folder: str) -> float:
    """Ends its process after two replies, once; asked again, the requests have the answers that they got."""
    await sdk(base_url, api_key, messages, 2)
    marker = os.path.join(folder, "died")
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(7)
    return await sdk(base_url, api_key, messages, 4)


async def ends(base_url: str, api_key: str, messages: list[Any], how: str) -> object:
    """An agent that asks without an end, or is wrong itself."""
    await sdk(base_url, api_key, messages, 1000 if how == "asks" else 1)
    if how == "raises":
        raise ValueError("by design")
    while how == "hangs":
        pass
    return "no number"
