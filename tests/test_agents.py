"""Tools, environments and their processes: contracts, errors for the policy, and user code that breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cispo.agents.contract import Reply, Step, ToolCall
from cispo.agents.environment import BadStep, Identity, Session, open_session, rewards_of, used_tools
from cispo.agents.parsing import compact, parser_of
from cispo.agents.session_pool import RemoteSession, SessionPool, pool_of
from cispo.agents.session_process import SessionError
from cispo.agents.tools import tool_of
from cispo.errors import UserError
from tests import agent_code

KEY = "env.tools"


def reply(text: str = "", *calls: ToolCall) -> Reply:
    return Reply(text=text, content=text, calls=calls)


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(id=f"call_{name}", name=name, arguments=arguments)


def session(*used: object, seed: int = 0, **columns: object) -> Session:
    return asyncio.run(open_session(used, columns, Identity(seed, 0), KEY))


def contents(step: Step | None) -> list[str]:
    assert step is not None and not isinstance(step.observation, str)
    return [str(message["content"]) for message in step.observation]


def test_hints_and_docstring_make_the_schema():
    definition = tool_of(agent_code.add, KEY).definition
    assert definition == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "a": {"type": "integer", "description": "the first"},
                    "b": {"type": "integer", "description": "the second", "default": 1},
                },
                "required": ["a"],
            },
        },
    }


def test_columns_are_hidden_from_the_policy():
    tool = tool_of(agent_code.lookup, KEY)
    assert "table" not in str(tool.definition) and tool.required_columns == {"table"}
    step, failed = asyncio.run(session(agent_code.lookup, table={"a": "b"}).step(reply("", call("lookup", key="a"))))
    assert contents(step) == ["b"] and failed == 0


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda text: text, "parameter 'text' of tool '<lambda>' has no type hint"),
        (lambda *args: "", r"takes \*args: a call fills in named parameters only"),
        (Path, "an environment class is named alone|has neither|signature"),
        (7, "names a int, where a function or a class is expected"),
    ],
)
def test_objects_that_are_no_tools_are_refused(function: object, sentence: str):
    with pytest.raises(UserError, match=sentence):
        used_tools([function, agent_code.add], KEY)


def test_errors_that_the_policy_can_mend_are_told():
    """In order: an unknown name, an argument of a wrong type, a missing one, a foreign one, and an exception."""
    calls = [
        call("ad", a=1),
        call("add", a="x"),
        call("add"),
        call("add", a=1, c=2),
        call("raises", text="luck"),
        call("gives_object", text=""),
    ]
    tools = (agent_code.add, agent_code.raises, agent_code.gives_object)
    step, failed = asyncio.run(session(*tools).step(reply("", *calls)))
    assert failed == 6
    told = contents(step)
    assert told[0] == "error: there is no tool 'ad', only add, raises, gives_object; did you mean 'add'?"
    assert "argument 'a'" in told[1] and "argument 'a'" in told[2] and "argument 'c'" in told[3]
    assert told[4] == "error: RuntimeError: no luck" and told[5] == "error: the tool returned object, which is not text"


def test_calls_of_one_reply_are_answered_in_order():
    step, failed = asyncio.run(
        session(agent_code.later, agent_code.add).step(
            reply("", call("later", text="a"), call("add", a=2, b="3"), call("later", text="b"))
        )
    )
    assert contents(step) == ["A", "5", "B"] and failed == 0


def test_a_reply_without_a_call_is_the_answer_and_a_tool_may_end_the_episode():
    tools = session(agent_code.finish)
    assert asyncio.run(tools.step(reply("7"))) == (None, 0)
    step, _ = asyncio.run(tools.step(reply("", call("finish", answer="7"))))
    assert step is not None and step.done and rewards_of(step) == {"tool": 2.0}


def test_the_output_of_a_tool_is_cut():
    step, _ = asyncio.run(session(agent_code.floods).step(reply("", call("floods", text=""))))
    [text] = contents(step)
    assert len(text) < 20_100 and text.endswith("[9980000 more characters were cut]")


def test_gymnasium_s_contract():
    env = session(agent_code.Gym, seed=5)

    async def play() -> list[object]:
        return [await env.start(), *[await env.step(reply(str(n))) for n in range(100)]]

    opening, *steps = asyncio.run(play())
    assert opening == "guess"
    right = [s for s, _ in steps if s.done]  # type: ignore[misc]
    assert len(right) == 1 and rewards_of(right[0]) == {"step": 1.0}


def test_trl_s_contract():
    env = session(agent_code.Trl, start=4, other="ignored")
    assert [tool.name for tool in env.tools] == ["add"]

    async def play() -> tuple[object, Step | None, object]:
        opening = await env.start()
        step, _ = await env.step(reply("", call("add", amount=3)))
        return opening, step, await env.reward()

    opening, step, reward = asyncio.run(play())
    assert opening == "you have 4" and contents(step) == ["7"] and reward == {"env": 7.0}


def test_values_without_a_meaning_are_named():
    with pytest.raises(BadStep, match="said int where text or messages are expected"):
        asyncio.run(session(agent_code.Counter, target=2).step(reply("bad")))
    with pytest.raises(BadStep, match="reward nan"):
        rewards_of(Step(reward=float("nan")))


def test_compact_calls():
    tools = [tool_of(f, KEY).definition for f in (agent_code.add, agent_code.later)]
    found = compact("<think>so [add 9]</think>now [add 1, 2] and [later a, b]", tools)
    assert found.thought == "so [add 9]" and found.content == "now  and"
    assert [(c.name, c.arguments) for c in found.calls] == [("add", {"a": "1", "b": "2"}), ("later", {"text": "a, b"})]
    assert compact("[add 1, 2, 3]", tools).problem == "add takes 2 arguments, not 3"
    assert compact("plain [1]", tools).calls == () and [c.name for c in compact("[other x]", tools).calls] == ["other"]


def test_an_unknown_parser_is_refused():
    with pytest.raises(UserError, match="env.tool_parser"):
        parser_of("tests.agent_code:nothing", [], None, "env.tool_parser")  # type: ignore[arg-type]


# Processes


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SessionPool]:
    """Two processes; user code writes into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    pool = pool_of(["tests.agent_code:Counter"], {}, KEY, timeout=2.0, workers=2)
    yield pool
    pool.close()


async def said(env: RemoteSession, *texts: str) -> list[object]:
    results: list[object] = []
    for text in texts:
        try:
            step, _ = await env.step(reply(text))
            results.append(None if step is None else step.observation)
        except SessionError as error:
            results.append(str(error))
    return results


def test_a_process_that_dies_is_replaced_and_its_sessions_go_on(counters: SessionPool):
    """One session crashes its process once: it and its neighbour of the same process are replayed, nothing is lost.
    One that crashes each time, hangs, or raises fails alone."""

    async def play() -> list[list[object]]:
        sessions = [counters.open({"target": 9}, Identity(seed, 0)) for seed in range(6)]
        await asyncio.gather(*(s.start() for s in sessions))
        texts = [
            ("a", "crash", "b"),
            ("a", "b", "c"),
            ("a", "b", "c"),
            ("a", "die", "b"),
            ("a", "hang"),
            ("raise", "a"),
        ]
        results = await asyncio.gather(*(said(s, *t) for s, t in zip(sessions, texts, strict=True)))
        rewards: list[object] = [await sessions[number].reward() for number in (0, 1, 2)]
        await asyncio.gather(*(s.close() for s in sessions))
        return [*results, rewards]

    results = asyncio.run(play())
    assert results[0] == ["1 a", "2 crash", "3 b"]
    assert results[1] == results[2] == ["1 a", "2 b", "3 c"]
    assert results[3] == ["1 a", "ended its process with exit code 1", "2 b"]
    assert results[4] == ["1 a", "did not finish within 2 s"]
    assert results[5] == ["raised ValueError: by design", "1 a"]
    assert results[6] == [{"said": 3.0}] * 3


def test_objects_that_cannot_be_imported_are_named():
    with pytest.raises(UserError, match="env.use: 'tests.agent_code:Nothing'.*has no 'Nothing'"):
        pool_of(["tests.agent_code:Nothing"], {}, "env.use", timeout=1.0, workers=1)
