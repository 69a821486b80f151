"""Agents as functions: the ledger of their conversations, their rounds, ends and replays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cispo.agents.contract import Reply
from cispo.agents.episodes import episodes_of
from cispo.agents.ledger import Ledger, reply_message
from cispo.agents.parsing import compact
from cispo.batch.packing import pack
from cispo.batch.samples import to_samples
from cispo.commands.train import train
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.errors import UserError
from cispo.learner.learner import Learner
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, FinishReason, Message, Sample, Sampling, Trajectory, TrajectoryGroup, Turn
from tests.test_end_to_end import QUICKSTART, ROOT
from tests.test_episodes import CHARS, CHATML, SAMPLING, Scripted, playing, prompt
from tests.test_resume import FAULTS, KEYS, TURNS
from tests.tiny_policies import MINIMAX

Q: Message = {"role": "user", "content": "go"}


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def completion(renderer: Renderer, text: str, *, ends: bool = True) -> Completion:
    ids = renderer.encode_completion(text)
    ids = ids if ends else ids[:-1]
    return Completion(
        token_ids=tuple(ids),
        logprobs=(-0.5,) * len(ids),
        finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
        versions=(1,) * len(ids),
    )


def ask(ledger: Ledger, messages: list[Message], text: str, *, ends: bool = True) -> Reply:
    """The policy answers `text` to a request."""
    found = completion(ledger.renderer, text, ends=ends)
    reply = compact(ledger.renderer.decode(found.token_ids), [])
    ledger.record(ledger.place(messages), found, reply)
    return reply


def trained(turns: tuple[Turn, ...]) -> int:
    """Tokens that are trained on, after the split into samples."""
    t = Trajectory(group_id=0, index=0, turns=turns, text="", reward=0.0)
    return sum(s.num_loss_tokens for s in to_samples(TrajectoryGroup(prompt=prompt(), trajectories=(t,))))


def play(name: str, renderer: Renderer, say: Any = None, group_size: int = 1, env: Any = None, **columns: Any):
    say = say or (lambda number, turn: f"r{turn}{number}")
    with playing(renderer, use=f"tests.chat_agents:{name}", **{"max_turns": 12, **(env or {})}) as episodes:
        engine = Scripted(renderer, say)
        [group] = asyncio.run(
            episodes.play([prompt(**columns)], engine.generate, group_size=group_size, sampling=SAMPLING, seed=7)
        )
    return group, engine


@pytest.mark.parametrize("name", ["count", "plain"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_an_agent_that_appends_is_one_sequence(renderer: Renderer, name: str, template: str | None):
    """The k-th prompt begins with the one before and its reply, in rounds of all attempts."""
    renderer.tokenizer.chat_template = template
    group, engine = play(name, renderer, group_size=3, target=3)
    assert [len(asked) for asked in engine.asked] == [3, 3, 3] and len(set(engine.seeds)) == 3
    for n, t in enumerate(group.trajectories):
        asked = [ids[n] for ids in engine.asked]
        for before, after, turn in zip(asked, asked[1:], t.turns, strict=False):
            assert after[: len(before) + len(turn.completion.token_ids)] == [*before, *turn.completion.token_ids]
        assert (t.status, len(t.segments), t.text) == ("done", 1, f"r2{n}")
        assert dict(t.turns[-1].rewards) == ({"said": 3.0} if name == "count" else {"agent": 3.0})
        assert trained(t.turns) == t.length == sum(len(turn.completion.token_ids) for turn in t.turns)
    samples = to_samples(group)
    assert [s.token_ids.tolist()[: len(a)] for s, a in zip(samples, engine.asked[-1], strict=True)] == engine.asked[-1]


# The ledger

TOOLS: list[dict[str, object]] = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}},
    }
]
TEXT = "<think>so</think>hi [add 1, 2]"
CALL = {"name": "add", "arguments": '{"b": "2",  "a": "1"}'}
FORMS: dict[str, dict[str, object]] = {
    "as it is": {"content": TEXT},
    "without its thought": {"content": "hi [add 1, 2]"},
    "in parts": {"content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "[add 1, 2]\n"}]},
    "calls as JSON in another order": {"content": "hi", "tool_calls": [{"id": "x9", "function": CALL}]},
    "calls as objects": {
        "content": " hi ",
        "reasoning_content": "so",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": "2"}}}],
    },
    "another thought": {"content": "hi [add 1, 2]", "reasoning": "rewritten", "refusal": None, "audio": None},
}


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("form", FORMS)
def test_a_client_s_form_of_a_reply_continues_the_sampled_tokens(renderer: Renderer, form: str, template: str | None):
    renderer.tokenizer.chat_template = template
    ledger = Ledger(renderer)
    first = ledger.place([Q], TOOLS)
    said = completion(renderer, TEXT)
    reply = compact(renderer.decode(said.token_ids), TOOLS)
    ledger.record(first, said, reply)
    result = {"role": "tool", "tool_call_id": "x9", "content": "3"}
    second = ledger.place(
        [{**Q, "content": [{"type": "text", "text": "go"}]}, {"role": "assistant", **FORMS[form]}, result], TOOLS
    )
    assert (
        second.before is not None and second.ids[: len(first.ids) + len(said.token_ids)] == first.ids + said.token_ids
    )
    assert "3" in renderer.decode(second.context) and "hi" not in renderer.decode(second.context)
    ledger.record(second, completion(renderer, "3"), compact("3", TOOLS))
    assert [turn.continues for turn in ledger.turns()] == [False, True]


def test_other_beginnings_start_segments(renderer: Renderer):
    """Another system message, other tools, another reply, other arguments, and a reply without its end."""
    ledger = Ledger(renderer)
    said = completion(renderer, TEXT)
    ledger.record(ledger.place([Q], TOOLS), said, compact(renderer.decode(said.token_ids), TOOLS))
    answer: Message = {"role": "assistant", "content": TEXT}
    other = {"name": "add", "arguments": '{"a": "1", "b": "3"}'}
    for messages, tools in (
        ([{"role": "system", "content": "be"}, Q, answer, user("u")], TOOLS),
        ([Q, answer, user("u")], []),
        ([Q, {"role": "assistant", "content": "no [add 1, 2]"}, user("u")], TOOLS),
        ([Q, {"role": "assistant", "content": "hi", "tool_calls": [{"function": other}]}, user("u")], TOOLS),
    ):
        assert ledger.place(messages, tools).before is None
    assert ledger.place([Q, answer, user("u")], TOOLS).before is ledger.sampled[0]
    cut = Ledger(renderer)
    ask(cut, [Q], "abc", ends=False)
    again = cut.place([Q, {"role": "assistant", "content": "abc"}, user("u")])
    assert again.before is None and renderer.decode_reply(again.ids) == "goabc<eos>u"


def test_replies_that_look_alike_are_told_apart_by_their_thoughts(renderer: Renderer):
    """Votes with one visible answer: the thought decides, else the newest; a known continuation outweighs both."""
    ledger = Ledger(renderer)
    for thought in "ab":
        ask(ledger, [Q], f"<think>{thought}</think>7")
    for text, number in (("<think>a</think>7", 0), ("<think>b</think>7", 1), ("7", 1)):
        before = ledger.place([Q, {"role": "assistant", "content": text}, user("u")]).before
        assert before is ledger.sampled[number]
    ask(ledger, [Q, {"role": "assistant", "content": "<think>a</think>7"}, user("u")], "8")
    found = ledger.place(
        [Q, {"role": "assistant", "content": "7"}, user("u"), {"role": "assistant", "content": "8"}, user("v")]
    )
    assert found.before is ledger.sampled[2] and ledger.sampled[2].before is ledger.sampled[0]


def test_prompts_of_ids_and_of_text_continue_replies(renderer: Renderer):
    ledger = Ledger(renderer)
    said = completion(renderer, "abc")
    ids = tuple(renderer.encode_prompt("go "))
    first = ledger.place_text("go ")
    assert first.ids == ids
    ledger.record(first, said, compact("abc", []))
    for place in (
        ledger.place_text("go abc more"),
        ledger.place_ids([*ids, *said.token_ids, *renderer.encode_text(" more")]),
    ):
        assert place.before is ledger.sampled[0] and renderer.decode(place.context) == " more"
    assert ledger.place_ids([*ids, *said.token_ids[:-2], 9]).before is None
    assert ledger.place_text("go abX").before is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), template=st.sampled_from([None, CHATML]), thinking=st.sampled_from(["keep", "template", "drop"]))
def test_each_sampled_token_is_trained_once(
    renderer: Renderer, data: st.DataObject, template: str | None, thinking: Any
):
    """Over forks, new beginnings, sub-agents and slid windows; each turn's tokens are those that were sampled there."""
    renderer.tokenizer.chat_template = template
    ledger = Ledger(renderer, thinking)
    known: list[list[Message]] = [[Q]]
    prompts: list[tuple[int, ...]] = []
    for number in range(data.draw(st.integers(1, 8))):
        messages = list(data.draw(st.sampled_from(known)))
        if data.draw(st.booleans()):
            messages = messages[-1:] if messages[-1]["role"] == "user" else messages[-2:]
        thought = data.draw(st.sampled_from(["", "<think>t</think>"]))
        text = f"{thought}r{data.draw(st.integers(0, 1))}"
        prompts.append(ledger.place(messages).ids)
        reply = ask(ledger, messages, text)
        shown = data.draw(st.sampled_from([reply.text, reply.content]))
        known.append([*messages, {"role": "assistant", "content": shown}, user(f"u{number}")])
    turns, order = ledger.turns(), [one for segment in ledger.segments() for one in segment]
    assert sorted(one.number for one in order) == list(range(len(prompts))) and order[-1].number == len(prompts) - 1
    read: list[int] = []
    for turn, one in zip(turns, order, strict=True):
        read = [*read, *turn.context_ids] if turn.continues else list(turn.context_ids)
        assert tuple(read) == prompts[one.number] and turn.completion is one.completion
        read += turn.completion.token_ids
    assert trained(turns) == sum(len(one.completion.token_ids) for one in ledger.sampled)


# Thinking


@pytest.mark.parametrize(("thinking", "prompts"), [
    ("keep", ["go", "go<think>t0</think>r0<eos>u0", "go<think>t0</think>r0<eos>u0<think>t1</think>r1<eos>u1"]),
    ("template", ["go", "go<think>t0</think>r0<eos>u0", "go<think>t0</think>r0<eos>u0<think>t1</think>r1<eos>u1"]),
    ("drop", ["go", "gor0<eos>u0", "gor0<eos>u0r1<eos>u1"]),
])  # fmt: skip
def test_thoughts_without_a_template(renderer: Renderer, thinking: str, prompts: list[str]):
    """In the compact form of small policies; a client that sends no thought back changes nothing."""
    ledger = Ledger(renderer, thinking)  # type: ignore[arg-type]
    messages = [Q]
    for number in range(3):
        assert renderer.decode_reply(ledger.place(messages).ids) == prompts[number]
        reply = ask(ledger, messages, f"<think>t{number}</think>r{number}")
        messages = [*messages, {"role": "assistant", "content": reply.content}, user(f"u{number}")]
    assert len(ledger.segments()) == (3 if thinking == "drop" else 1)


# Keeps thoughts behind the last user message, as Qwen3 and MiniMax-M2 do.
THINKS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<bos>{{ m['role'] }}:"
    "{% if m.get('reasoning_content') and loop.index0 > ns.last %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}[{{ c['function']['name'] }} "
    "{{ c['function']['arguments'].values() | join(', ') }}]{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)


def test_the_template_s_rule_cuts_at_user_messages_alone(renderer: Renderer):
    """tool, tool, user, tool: one cut; the history behind it is the template's own rendering, token by token."""
    renderer.tokenizer.chat_template = THINKS
    roles = ["tool", "tool", "user", "tool"]
    for thinking, segments in (("keep", 1), ("template", 2), ("drop", 5)):
        ledger = Ledger(renderer, thinking)  # type: ignore[arg-type]
        shown, full = [Q], [Q]
        for number, role in enumerate([*roles, ""]):
            place = ledger.place(shown)
            if thinking == "template":
                assert place.ids == tuple(renderer.render(full)), number
            reply = ask(ledger, shown, f"<think>t{number}</think>r{number}")
            said: list[Message] = [{"role": role, "content": f"o{number}"}]
            shown = [*shown, {"role": "assistant", "content": reply.content}, *said]
            full = [*full, reply_message(renderer, reply), *said]
        assert len(ledger.segments()) == segments and trained(ledger.turns()) == sum(
            len(one.completion.token_ids) for one in ledger.sampled
        )


def parse_marked(text: str) -> Reply:
    """`thought:content`, as small policies write it."""
    thought, _, content = text.removesuffix("<eos>").rpartition(":")
    return Reply(text=text, content=content, thought=thought)


WHOLE = "go9:a0<eos>1 9:a09:a1<eos>2 9:a1"


@pytest.mark.parametrize(
    ("thinking", "segments", "last"),
    [("keep", 1, WHOLE), ("template", 1, WHOLE), ("drop", 3, "goa0<eos>1 9:a0a1<eos>2 9:a1")],
)
def test_environments_think_too(renderer: Renderer, thinking: str, segments: int, last: str):
    env: dict[str, Any] = {
        "use": "tests.agent_code:Counter",
        "thinking": thinking,
        "tool_parser": "tests.test_agents_chat:parse_marked",
    }
    with playing(renderer, **env) as episodes:
        engine = Scripted(renderer, lambda number, turn: f"9:a{turn}")
        [group] = asyncio.run(
            episodes.play([prompt(target=3)], engine.generate, group_size=2, sampling=SAMPLING, seed=7)
        )
    for n, t in enumerate(group.trajectories):
        assert renderer.decode_reply(engine.asked[-1][n]).replace("count to 3", "") == last
        assert len(t.segments) == segments and trained(t.turns) == t.length
        assert [sum(turn.rewards.values()) for turn in t.turns] == [0.25, 0.25, 3.25]
        assert sum(map(sum, (s.loss_mask.tolist() for s in to_samples(group)))) == 2 * t.length


# Agents in processes


def test_a_summary_starts_a_segment(renderer: Renderer):
    """Requests with a limit of their own have a call of their own."""
    group, engine = play("summarised", renderer, group_size=2, target=4)
    for t in group.trajectories:
        assert [len(s) for s in t.segments] == [3, 3] and trained(t.turns) == t.length
    assert len(engine.seeds) == len(set(engine.seeds)) == 6


def test_a_window_slides_where_the_context_is_full(renderer: Renderer):
    with playing(renderer, context=60, use="tests.chat_agents:sliding", max_turns=12) as episodes:
        engine = Scripted(renderer, lambda number, turn: f"answer {turn}")
        [group] = asyncio.run(
            episodes.play([prompt(target=6)], engine.generate, group_size=1, sampling=SAMPLING, seed=7)
        )
    [t] = group.trajectories
    assert t.status == "done" and len(t.turns) == 6 and len(t.segments) > 1 and trained(t.turns) == t.length
    assert all(len(ids) < 60 for asked in engine.asked for ids in asked)


def test_sub_agents_ask_side_by_side(renderer: Renderer):
    """Their requests are one round; the leader continues its own reply afterwards."""
    group, engine = play("team", renderer, group_size=2, target=3)
    assert [len(asked) for asked in engine.asked] == [2, 6, 6, 2]
    for t in group.trajectories:
        assert sorted(len(s) for s in t.segments) == [2, 2, 2, 2] and trained(t.turns) == t.length
        assert len(t.segments[-1]) == 2 and t.messages[0]["role"] == "assistant"


def test_the_same_question_is_sampled_again(renderer: Renderer):
    [t] = play("votes", renderer, target=3)[0].trajectories
    assert dict(t.turns[-1].rewards) == {"agent": 3.0} and [len(s) for s in t.segments] == [1, 1, 1]


def test_an_agent_is_replayed_after_a_death(renderer: Renderer, tmp_path: Path):
    """Its process dies before one of its turns: prompts, seeds and trajectories are those of an undisturbed run."""
    undisturbed, engine = play("dies", renderer, group_size=3, target=9, fatal="kill", crashed=str(tmp_path / "no"))
    for turn, fatal in ((0, "kill"), (2, "exit"), (3, "kill")):
        marker = tmp_path / str(turn)
        group, again = play("dies", renderer, group_size=3, target=turn, fatal=fatal, crashed=str(marker))
        assert marker.exists() and again.asked == engine.asked and again.seeds == engine.seeds
        assert group.trajectories == undisturbed.trajectories


BROKEN = {
    "raise": ("failed", 2),
    "hang": ("timeout", 2),
    "block": ("timeout", 2),
    "nan": ("failed", 2),
    "text": ("failed", 2),
    "refused": ("failed", 2),
    "exit": ("failed", 2),
    "endless": ("turns", 6),
    "stubborn": ("timeout", 6),
    "full": ("context", 2),
    "group": ("context", 2),
}


def test_broken_agents_end_their_own_attempt(renderer: Renderer):
    """All in one process; the second attempt of each group is undisturbed."""
    prompts = [prompt(how=how) for how in BROKEN]
    with playing(renderer, use="tests.chat_agents:broken", timeout=2.0, max_turns=6) as episodes:
        engine = Scripted(renderer, lambda number, turn: f"r{turn}")
        groups = asyncio.run(episodes.play(prompts, engine.generate, group_size=2, sampling=SAMPLING, seed=7))
    for (how, end), group in zip(BROKEN.items(), groups, strict=True):
        bad, good = group.trajectories
        assert (how, bad.status, len(bad.turns)) == (how, *end) and trained(bad.turns) == bad.length
        assert (good.status, len(good.turns), dict(good.turns[-1].rewards)) == ("done", 3, {"agent": 1.0})


def test_an_attempt_that_never_asks_is_left_out_and_errors_may_end_the_run(renderer: Renderer):
    assert play("silent", renderer)[0].trajectories == ()
    with pytest.raises(UserError, match="env: .*broken raised ValueError: by design .prompt 3, turn 2"):
        play("broken", renderer, env={"on_error": "raise"}, how="raise")
    with pytest.raises(UserError, match="env.use: the agent needs the column 'target', which row 3 of data has not"):
        with playing(renderer, [prompt()], use="tests.chat_agents:plain"):
            pass


def test_apart_no_attempt_waits_for_another(renderer: Renderer):
    """A call of the engines a request, with a seed from attempt and turn; the same trajectories as in rounds."""
    say = lambda number, turn: "same"  # noqa: E731
    with playing(renderer, use="tests.chat_agents:count", max_turns=12) as episodes:
        rounds, apart = Scripted(renderer, say), Scripted(renderer, say)
        groups = []
        for engine in (rounds, apart):
            episodes.apart = engine is apart
            ask = episodes.play([prompt(target=3)], engine.generate, group_size=4, sampling=SAMPLING, seed=7)
            groups.append(asyncio.run(ask))
    assert groups[0] == groups[1] and len(rounds.asked) == 3
    assert [len(asked) for asked in apart.asked] == [1] * 12 and len(set(apart.seeds)) == 12
    recipe = Recipe.model_validate({"env": {"use": "tests.chat_agents:count"}, "control": {"max_staleness": 2}})
    own = episodes_of(recipe, renderer, {})
    assert own is not None and own.apart
    own.close()


def test_a_failing_engine_ends_the_play(renderer: Renderer):
    async def fails(prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        raise RuntimeError("engine-0 died")

    with (
        playing(renderer, use="tests.chat_agents:count") as episodes,
        pytest.raises(RuntimeError, match="engine-0 died"),
    ):
        play = episodes.play([prompt(target=3)], fails, group_size=2, sampling=SAMPLING, seed=7)
        asyncio.run(asyncio.wait_for(play, 60))


def test_sampler_and_learner_agree_over_segments(renderer: Renderer, tmp_path: Path):
    """Summaries, sub-agents and continued replies: float32, each segment is read as one sequence by the learner."""
    save_policy(init_policy({**MINIMAX, "vocab_size": len(renderer.tokenizer)}, seed=3), tmp_path)
    engine = ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=120, max_sequences=8))
    sampling = Sampling(max_tokens=9, eos_ids=tuple(range(2, 60)))  # replies end soon
    samples: list[Sample] = []
    for name in ("summarised", "team"):
        with playing(renderer, context=120, use=f"tests.chat_agents:{name}", max_turns=12) as episodes:
            play = episodes.play([prompt(target=3)], engine.generate, group_size=3, sampling=sampling, seed=1)
            [group] = asyncio.run(play)
        assert all(t.status == "done" and len(t.segments) > 1 for t in group.trajectories)
        samples += to_samples(group)
    (batches,) = pack(samples, reduction="token", max_tokens=9, tokens_per_micro_batch=500)
    logprobs = Learner(str(tmp_path), LearnerConfig()).logprobs(batches)
    for mb, found in zip(batches, logprobs, strict=True):
        differences = (found - mb.rollout_logprobs)[mb.loss_mask]
        assert bool(torch.isfinite(differences).all()) and float(differences.abs().max()) <= 1e-5
    assert sum(int(mb.loss_mask.sum()) for mb in batches) > 60


def test_a_run_whose_agent_is_killed_is_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An agent's process dies in a turn, and the run is ended and resumed after: bit for bit as if nothing had been."""
    monkeypatch.chdir(ROOT)

    def run(folder: str, *all_steps: int) -> dict[str, Any]:
        agent = ["env.use=tests.chat_agents:chase", f"env.args={{crashed: '{tmp_path / folder}.crashed', turn: 2}}"]
        for steps in all_steps:
            keys = [*KEYS, *TURNS, *agent, f"output_dir={tmp_path / folder}", f"train.steps={steps}", "eval.limit=2"]
            train(QUICKSTART, keys, resume=steps != all_steps[0])
        return FAULTS.state_of(tmp_path / folder / "quickstart")

    (tmp_path / "whole.crashed").touch()
    one, other = run("whole", 3), run("parts", 2, 3)
    assert (tmp_path / "parts.crashed").exists() and FAULTS.difference(one, other) == ""
    assert [row["agent/turns_mean"] for row in one["metrics"][1:]] == [8.0] * 3 and len(one["tensors"]) > 30
