"""Agents behind OpenAI's API: the same tokens as without it, refusals, limits and ends. Real clients, a real policy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cispo.agents.episodes import Episodes
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.policies.loading import init_policy, save_policy
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Prompt, Sampling, Trajectory
from tests.test_episodes import CHARS, CHATML, playing
from tests.tiny_policies import MINIMAX

# Many ends: replies of a few tokens.
SAMPLING = Sampling(max_tokens=40, eos_ids=tuple(range(2, 40)))
ENV: dict[str, Any] = {"tool_parser": "tests.endpoint_agents:parse", "max_turns": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with random weights."""
    place = tmp_path_factory.mktemp("policy")
    config = {**MINIMAX, "vocab_size": len(load_tokenizer(CHARS))}
    save_policy(init_policy(config, seed=3), place)
    return place


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    renderer = Renderer(load_tokenizer(CHARS))
    renderer.tokenizer.chat_template = CHATML
    return renderer


@pytest.fixture(scope="module")
def episodes(renderer: Renderer) -> Iterator[Episodes]:
    with playing(renderer, use="tests.endpoint_agents:solve", **{**ENV, "timeout": 120.0}) as episodes:
        yield episodes


def prompts(**columns: object) -> list[Prompt]:
    return [Prompt(id=n, messages=({"role": "user", "content": f"{n}>"},), columns=columns) for n in range(2)]


def play(episodes: Episodes, folder: Path, asked: list[Prompt], group_size: int = 2) -> list[Trajectory]:
    """All attempts, by an engine of their own."""
    engine = ServedEngine(TorchEngine(str(folder), dtype="float32", max_context=400, max_sequences=32))
    groups = asyncio.run(
        episodes.play(asked, engine.generate, group_size=group_size, sampling=SAMPLING, seed=5)  # type: ignore[arg-type]
    )
    return [t for group in groups for t in group.trajectories]


def chains(trajectories: list[Trajectory]) -> list[list[tuple[tuple[int, ...], tuple[int, ...], bool]]]:
    return [[(t.context_ids, t.completion.token_ids, t.continues) for t in one.turns] for one in trajectories]


@pytest.fixture(scope="module")
def expected(episodes: Episodes, folder: Path) -> list[Any]:
    """The run without HTTP."""
    found = chains(play(episodes, folder, prompts(client="white_box")))
    assert [len(one) for one in found] == [4] * 4 and len({str(one) for one in found}) == 4
    assert [[continues for _, _, continues in one] for one in found] == [[False, True, True, True]] * 4
    return found


@pytest.mark.parametrize("client", ["sdk", "forgetful", "reordering"])
def test_clients_give_the_tokens_of_the_white_box(episodes: Episodes, folder: Path, expected: list[Any], client: str):
    """One keeps every field, one drops thoughts and streams, one writes the JSON of arguments anew."""
    attempts = play(episodes, folder, prompts(client=client))
    assert chains(attempts) == expected
    assert [(t.status, dict(t.turns[-1].rewards)) for t in attempts] == [("done", {"agent": 9.0})] * 4


def test_requests_that_are_no_plain_question(episodes: Episodes, folder: Path, tmp_path: Path):
    [attempt] = play(episodes, folder, prompts(client="odd", folder=str(tmp_path))[:1], group_size=1)
    facts = json.loads((tmp_path / "facts.json").read_text())

    async def late() -> httpx.Response:
        assert episodes.endpoint is not None
        base_url = await episodes.endpoint.start()
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {facts['api_key']}"}) as client:
            return await client.get(f"{base_url}/models")

    answer = asyncio.run(late())
    assert (answer.status_code, answer.json()["error"]["message"]) == (410, "the attempt is over")
    assert attempt.status == "done" and dict(attempt.turns[-1].rewards) == {"asked": 1.0}
    assert facts["base_url"].startswith("http://127.0.0.1:") and facts["models"] == ["policy"]
    assert facts["n"] == [400, None, "n must be 1: every reply of an attempt is trained on"]
    assert facts["logit_bias"][2].startswith("logit_bias is not supported")
    assert facts["messages"][2] == "messages must be a list of at least one message"
    assert facts["role"][2] == "messages[0] is no message with a role"
    assert facts["max_tokens"][2] == "max_tokens must be a number of at least 1"
    assert facts["tools"][2] == "tools[0] is no function with a name"
    assert facts["schema"][2] == "tools[0] has parameters that are no JSON schema"
    assert facts["content"][0] == 400 and facts["content"][2].startswith("the messages cannot be read: ")
    assert facts["vocabulary"][2].startswith("prompt has token ids outside of 0 to ")
    assert facts["prompt"][2] == "prompt must be one text or one list of token ids"
    assert facts["json"] == [400, "the request is no JSON"]
    assert facts["key"][:2] == [401, "invalid_api_key"]
    assert facts["long"][:2] == [400, "context_length_exceeded"]
    assert facts["turns"] == [403, "max_turns", "the attempt has used its 7 turns (env.max_turns)"]
    # An equal body was sampled once, another seed again; the limit of a request lowers the run's.
    assert all(same == facts["same"][0] for same in facts["same"]) and facts["same"][0]["id"] == "chatcmpl-0"
    assert facts["seed"] == "chatcmpl-1"
    [choice] = facts["short"]["choices"]
    assert len(choice["token_ids"]) == 1 == facts["short"]["usage"]["completion_tokens"]
    assert choice["logprobs"]["content"][0]["logprob"] == pytest.approx(attempt.turns[2].completion.logprobs[0])
    # Text that continues a completion continues its tokens.
    assert facts["by_ids"] == 3
    lengths = [len(turn.completion.token_ids) for turn in attempt.turns]
    assert attempt.length == sum(lengths) and len(attempt.turns) == 7


def test_every_attempt_has_a_status(renderer: Renderer, folder: Path):
    """Side by side: one asks beyond its turns, one raises, one returns no number, one hangs and is ended."""
    hows = ["asks", "raises", "returns", "hangs"]
    asked = [replace(prompts()[0], id=n, columns={"how": how}) for n, how in enumerate(hows)]
    env = {**ENV, "max_turns": 3, "timeout": 8.0}
    with playing(renderer, use="tests.endpoint_agents:ends", **env) as episodes:
        attempts = play(episodes, folder, asked, group_size=1)
    assert [t.status for t in attempts] == ["turns", "failed", "failed", "timeout"]
    assert [len(t.turns) for t in attempts] == [3, 1, 1, 1]


def test_an_agent_whose_process_dies_goes_on(episodes: Episodes, folder: Path, expected: list[Any], tmp_path: Path):
    """Its replayed requests are answered with the replies that they got: the tokens of an undisturbed run."""
    attempts = play(episodes, folder, prompts(client="dies_once", folder=str(tmp_path)))
    assert (tmp_path / "died").exists() and chains(attempts) == expected


@pytest.mark.slow
def test_two_hundred_attempts_at_once(renderer: Renderer, folder: Path, capsys: pytest.CaptureFixture[str]):
    """All of them ask side by side, through clients of their own."""
    env = {**ENV, "timeout": 120.0, "workers": 2, "args": {"client": "sdk", "turns": 3}}
    with playing(renderer, use="tests.endpoint_agents:solve", **env) as episodes:
        started, most = time.perf_counter(), 0

        async def watch() -> None:
            nonlocal most
            while True:
                children = psutil.Process().children(recursive=True)
                most = max(most, sum(child.memory_info().rss for child in children))
                await asyncio.sleep(0.5)

        async def run() -> list[Trajectory]:
            engine = ServedEngine(TorchEngine(str(folder), dtype="float32", max_context=400, max_sequences=256))
            watching = asyncio.create_task(watch())
            try:
                groups = await episodes.play(prompts(), engine.generate, group_size=100, sampling=SAMPLING, seed=5)
            finally:
                watching.cancel()
            return [t for group in groups for t in group.trajectories]

        attempts = asyncio.run(run())
        seconds = time.perf_counter() - started
    assert len(attempts) == 200 and {t.status for t in attempts} == {"done"}
    with capsys.disabled():
        print(f"\n200 attempts of 3 requests: {seconds:.1f} s, {most / 2**20:.0f} MiB in the session processes")
