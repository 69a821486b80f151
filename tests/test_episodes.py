"""Attempts of several turns: token chains, ends, rewards, and the learner's view of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.agents.episodes import Episodes, episodes_of
from cispo.batch.packing import pack
from cispo.batch.samples import to_samples
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.errors import UserError
from cispo.learner.learner import Learner
from cispo.metrics import agent_metrics
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rewards import RewardFunction, RewardRunner
from cispo.rollout.rollout import score
from cispo.types import Completion, FinishReason, Prompt, Sampling, TrajectoryGroup
from tests.tiny_policies import MINIMAX

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
SAMPLING = Sampling(max_tokens=12, eos_ids=(2,))
CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
# Drops an earlier reply once a user message follows it: no conversation is a prefix of its continuation.
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] != 'assistant' }}")


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


Say = Callable[[int, int], str]
"""(number among the attempts that go on, turn) -> the policy's reply."""


class Scripted:
    """An engine that answers by a script; `ends` False: a reply without its end token."""

    def __init__(self, renderer: Renderer, say: Say, *, ends: bool = True) -> None:
        self.renderer, self.say, self.ends = renderer, say, ends
        self.asked: list[list[list[int]]] = []
        self.seeds: list[int] = []

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        self.asked.append([list(ids) for ids in prompts])
        self.seeds.append(seed)
        return [self._completion(self.say(number, len(self.asked) - 1)) for number in range(len(prompts))]

    def _completion(self, text: str) -> Completion:
        ids = self.renderer.encode_completion(text)
        ids = ids if self.ends else ids[:-1]
        return Completion(
            token_ids=tuple(ids),
            logprobs=(-0.5,) * len(ids),
            finish_reason=FinishReason.STOP if self.ends else FinishReason.LENGTH,
            versions=(1,) * len(ids),
        )


@contextlib.contextmanager
def playing(renderer: Renderer, prompts: Sequence[Prompt] = (), context: int = 400, **env: Any) -> Iterator[Episodes]:
    recipe = Recipe.model_validate({"env": {"timeout": 5.0, "workers": 1, **env}, "rollout": {"max_context": context}})
    episodes = episodes_of(recipe, renderer, {"data": prompts})
    assert episodes is not None
    with contextlib.closing(episodes):
        yield episodes


def prompt(text: str = "go", **columns: object) -> Prompt:
    return Prompt(id=3, messages=({"role": "user", "content": text},), columns=columns)


def play(episodes: Episodes, engine: Scripted, *prompts: Prompt, group_size: int = 1) -> list[TrajectoryGroup]:
    return asyncio.run(episodes.play(prompts, engine.generate, group_size=group_size, sampling=SAMPLING, seed=7))


COUNTER: dict[str, Any] = {"use": "tests.agent_code:Counter"}


@pytest.mark.parametrize("template", [None, CHATML])
def test_nothing_is_tokenised_twice(renderer: Renderer, template: str | None):
    """Each turn's prompt begins with the one before and its reply, and ends as the template would have it."""
    renderer.tokenizer.chat_template = template
    with playing(renderer, **COUNTER) as episodes:
        engine = Scripted(renderer, lambda attempt, turn: f"n{turn}")
        [group] = play(episodes, engine, prompt(target=3))
    [t] = group.trajectories
    asked = [ids for [ids] in engine.asked]
    for before, after, turn in zip(asked, asked[1:], t.turns, strict=False):
        assert after[: len(before) + len(turn.completion.token_ids)] == [*before, *turn.completion.token_ids]
    conversation = [*prompt().messages, *t.messages[:-2]]
    if template is not None:
        assert asked[-1] == renderer.render(conversation)
    [sample] = to_samples(group)
    assert sample.token_ids.tolist() == [*asked[-1], *t.turns[-1].completion.token_ids]
    assert sample.num_loss_tokens == t.length and len(set(engine.seeds)) == 3


def test_a_template_that_rewrites_the_past_is_refused(renderer: Renderer):
    renderer.tokenizer.chat_template = FORGETFUL
    with pytest.raises(UserError, match="does not continue a conversation"), playing(renderer, **COUNTER):
        pass


def test_rewards_and_ends_of_an_environment(renderer: Renderer):
    """Steps pay .25 each on their turn's last token, the end pays `said`."""
    with playing(renderer, **COUNTER, max_turns=4) as episodes:
        engine = Scripted(renderer, lambda attempt, turn: "stop" if turn == 1 and attempt == 0 else f"{turn}")
        [group] = play(episodes, engine, prompt(target=9), group_size=2)
        first, second = group.trajectories
        assert (first.status, second.status) == ("answered", "turns")
        assert [dict(turn.rewards) for turn in first.turns] == [{"step": 0.25}, {"said": 2.0}]
        assert [turn.rewards.get("said") for turn in second.turns] == [None, None, None, 4.0]
        [done] = play(episodes, engine, prompt(target=1))[0].trajectories
        assert done.status == "done" and dict(done.turns[0].rewards) == {"step": 0.25, "said": 1.0}
    metrics = agent_metrics([first, second, done])
    assert metrics["agent/turns_mean"] == pytest.approx(7 / 3) and metrics["agent/turns_max"] == 4
    assert metrics["agent/status_answered"] == metrics["agent/status_turns"] == pytest.approx(1 / 3)


def test_a_reply_without_its_end_ends_the_attempt(renderer: Renderer):
    with playing(renderer, **COUNTER) as episodes:
        [t] = play(episodes, Scripted(renderer, lambda *_: "abc", ends=False), prompt(target=9))[0].trajectories
    assert t.status == "length" and len(t.turns) == 1 and t.text == "abc"


def test_an_attempt_without_room_ends(renderer: Renderer):
    """Opening and observations count for the context; no engine is asked for a reply that cannot begin."""
    with playing(renderer, **COUNTER, context=40) as episodes:
        engine = Scripted(renderer, lambda *_: "0123456789")
        [t] = play(episodes, engine, prompt(target=9))[0].trajectories
    assert t.status == "context" and all(len(ids) < 40 for asked in engine.asked for ids in asked)


@pytest.mark.parametrize(("text", "status"), [("raise", "failed"), ("hang", "timeout"), ("die", "failed")])
def test_broken_environments_end_their_own_attempt(renderer: Renderer, text: str, status: str):
    """The neighbour in the same process goes on, from its replies."""
    with playing(renderer, **COUNTER, timeout=1.0, max_turns=3) as episodes:
        engine = Scripted(renderer, lambda attempt, turn: text if (attempt, turn) == (0, 1) else f"{turn}")
        [group] = play(episodes, engine, prompt(target=9), group_size=2)
    bad, good = group.trajectories
    assert bad.status == status and len(bad.turns) == 2 and good.status == "turns"
    assert [m["content"] for m in good.messages if m["role"] == "user"][1:] == ["1 0", "2 1", "3 2"]


TOOLS = [f"tests.agent_code:{name}" for name in ("add", "raises", "hangs", "exits", "sleeps_at_random")]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[add 2, 3]", "5"),
        ("[add 2, x]", "error: add: argument 'b'"),
        ("[sub 1]", "error: there is no tool 'sub'"),
        ("[raises luck]", "error: RuntimeError: no luck"),
        ("[hangs x]", "error: hangs did not finish within 1 s"),
        ("[exits x]", "error: exits ended its process with exit code 3"),
        ("[add 1, 2, 3]", "error: add takes 2 arguments, not 3"),
    ],
)
def test_the_policy_reads_the_errors_of_its_calls(renderer: Renderer, said: str, told: str):
    with playing(renderer, tools=TOOLS, timeout=1.0) as episodes:
        engine = Scripted(renderer, lambda attempt, turn: said if turn == 0 else "7")
        [t] = play(episodes, engine, prompt())[0].trajectories
    assert t.status == "answered" and t.text == "7"
    assert str(t.messages[1]["content"]).startswith(told) and t.messages[1]["role"] == "tool"
    assert t.events["calls"] == int("1, 2, 3" not in said)
    assert t.events["failed"] == int(told.startswith("error") and "1, 2, 3" not in said)
    assert t.events["unreadable"] == int("1, 2, 3" in said)


def test_errors_may_end_the_attempt_or_the_run(renderer: Renderer):
    engine = Scripted(renderer, lambda attempt, turn: "[hangs x]")
    with playing(renderer, tools=TOOLS, timeout=0.5, on_error="fail") as episodes:
        assert play(episodes, engine, prompt())[0].trajectories[0].status == "timeout"
    with playing(renderer, tools=TOOLS, timeout=0.5, on_error="raise") as episodes:
        with pytest.raises(UserError, match="env: .*hangs.* did not finish within 0.5 s .prompt 3, turn 1"):
            play(episodes, engine, prompt())


def test_the_time_of_tools_changes_nothing(renderer: Renderer):
    """Two plays with tools that sleep at random: equal prompts in each round, and equal trajectories."""
    plays = []
    with playing(renderer, tools=TOOLS) as episodes:
        for _ in range(2):
            engine = Scripted(renderer, lambda attempt, turn: f"[sleeps_at_random {attempt}]" if turn < 2 else "done")
            plays.append((play(episodes, engine, prompt(), prompt(), group_size=3), engine.asked))
    assert plays[0] == plays[1]


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({}, "env: give either `tools` or `use`"),
        ({"tools": TOOLS, **COUNTER}, "env: give either `tools` or `use`"),
        (
            {"tools": ["tests.agent_code:lookup"]},
            "env.tools: a tool needs the column 'table', which row 3 of data has not",
        ),
        ({"tools": ["tests.agent_code:nothing"]}, "env.tools: 'tests.agent_code:nothing'"),
        ({"use": "tests.agent_code:KEY"}, "env.use: 'tests.agent_code:KEY'"),
    ],
)
def test_sections_without_a_meaning_are_refused(renderer: Renderer, env: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence), playing(renderer, [prompt()], **env):
        pass


def by_conversation(completion: str, conversation: list[dict[str, object]], status: str) -> float:
    assert [m["role"] for m in conversation[:2]] == ["user", "assistant"] and completion == conversation[-1]["content"]
    return float(len(conversation)) if status == "answered" else 0.0


def test_rewards_see_the_whole_attempt(renderer: Renderer):
    """Facts by name, of each attempt its own; a column of the dataset with such a name takes precedence."""
    names = ["by_conversation"]
    functions = [RewardFunction(fn=f"tests.test_episodes:{name}") for name in names]
    functions += [
        RewardFunction(fn=f"rewards.agent:{name}") for name in ("failed_calls", "unreadable", "turns", "calls")
    ]
    runner = RewardRunner(functions, timeout=20.0)
    # The first of those that are left answers.
    engine = Scripted(renderer, lambda number, turn: "[add x]" if number else "7")
    with playing(renderer, tools=TOOLS) as episodes, contextlib.closing(runner):
        runner.check_rows([prompt()], "data")
        groups = play(episodes, engine, prompt(), group_size=3) + play(
            episodes, Scripted(renderer, engine.say), prompt(calls=9)
        )
        [group, other] = asyncio.run(score(groups, runner))
    values = [[t.rewards[n] for n in runner.names] for t in group.trajectories]
    assert values == [[2.0, 0.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 2.0, 1.0], [6.0, 2.0, 0.0, 3.0, 2.0]]
    assert other.trajectories[0].rewards["calls"] == 9.0


def test_rewards_of_the_environment_alone_measure_an_attempt(renderer: Renderer):
    """With weight 0 they are counted once: beside the rewards of the turns, which are trained on."""
    runner = RewardRunner([RewardFunction(fn="rewards.agent:earned", weight=0.0)], timeout=20.0)
    with playing(renderer, **COUNTER) as episodes, contextlib.closing(runner):
        groups = play(episodes, Scripted(renderer, lambda number, turn: "1"), prompt(target=3))
        [group] = asyncio.run(score(groups, runner))
    [attempt] = group.trajectories
    assert attempt.rewards == {"earned": 3 * 0.25 + 3.0} and attempt.reward == 0.0


def test_sampler_and_learner_agree_over_turns(renderer: Renderer, tmp_path: Path):
    """Every sampled token of several turns: float32, the torch engine reads each turn's prompt anew."""
    config = {**MINIMAX, "vocab_size": len(renderer.tokenizer)}
    save_policy(init_policy(config, seed=3), tmp_path)
    engine = ServedEngine(TorchEngine(str(tmp_path), dtype="float32", max_context=120, max_sequences=8))

    sampling = Sampling(max_tokens=9, eos_ids=tuple(range(2, 40)))  # replies end soon
    with playing(renderer, **COUNTER, context=120, max_turns=6) as episodes:
        groups = asyncio.run(
            episodes.play(
                [prompt(target=9), prompt("x", target=9)], engine.generate, group_size=3, sampling=sampling, seed=1
            )
        )
    samples = [s for group in groups for s in to_samples(group)]
    assert max(len(t.turns) for group in groups for t in group.trajectories) >= 4
    (batches,) = pack(samples, reduction="token", max_tokens=9, tokens_per_micro_batch=500)
    logprobs = Learner(str(tmp_path), LearnerConfig()).logprobs(batches)
    for mb, found in zip(batches, logprobs, strict=True):
        assert int(mb.loss_mask.sum()) > 20
        differences = (found - mb.rollout_logprobs)[mb.loss_mask]
        assert bool(torch.isfinite(differences).all()) and float(differences.abs().max()) <= 1e-5


def test_a_reset_that_fails_says_its_reason(renderer: Renderer):
    """Attempts without a reply are gone, and the reason is kept for the run's warning."""
    engine = Scripted(renderer, lambda number, turn: "1")
    asked = [Prompt(id=3, messages=({"role": "user", "content": "x"},), columns={})]
    with playing(renderer, asked, use="tests.agent_code:NeverStarts") as episodes:
        [group] = asyncio.run(episodes.play(asked, engine.generate, group_size=2, sampling=SAMPLING, seed=1))
    assert group.trajectories == () and "NeverStarts" in group.problem
    # numpy's legacy seeds, which games take, have 32 bits.
    assert "seeded with 31 bits" in group.problem
