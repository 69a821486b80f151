"""The tasks of several turns that ship: their teachers, their environments, and their recipes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cispo.agents.contract import Reply, Step, ToolCall
from cispo.agents.episodes import episodes_of
from cispo.recipe.load import load_recipe
from cispo.recipe.schema import Recipe
from cispo.rollout.prompts import build_prompts
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, FinishReason, Sampling, Trajectory
from cispo.warmup import demonstrations_of
from rewards import calculation, errand, guess
from rewards.numeric import numeric

ROOT = Path(__file__).parents[1]
TOKENIZERS = ROOT / "recipes" / "tokenizers"
RECIPES = ["chase", "guess", "interleaved_thinking", "thinking_template", "thinking_drop", "smollm2_tools"]


@pytest.mark.parametrize("name", RECIPES)
def test_agent_recipes_are_short(name: str):
    assert len((ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()) < 60
    recipe = load_recipe(name)
    assert recipe.env is not None and recipe.name == name and recipe.eval is not None


def test_the_arms_of_the_comparison_differ_in_one_key():
    arms = [load_recipe(name).model_dump() for name in ("interleaved_thinking", "thinking_template", "thinking_drop")]
    assert [arm["env"].pop("thinking") for arm in arms] == ["keep", "template", "drop"]
    assert all({**arm, "name": ""} == {**arms[0], "name": ""} for arm in arms)


def played(name: str, tokenizer: str, row: Mapping[str, object], say: Callable[[str], str]) -> tuple[Trajectory, str]:
    """One attempt by a policy that replies to the text of its prompt; and its last prompt."""
    renderer, asked = Renderer(load_tokenizer(TOKENIZERS / tokenizer)), [""]

    async def generate(prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        [asked[0]] = map(renderer.decode_reply, prompts)
        ids = tuple(renderer.encode_completion(say(asked[0])))
        stop = FinishReason.STOP
        return [Completion(token_ids=ids, logprobs=(-0.5,) * len(ids), finish_reason=stop, versions=(1,) * len(ids))]

    env = load_recipe(name).env
    assert env is not None
    recipe = Recipe.model_validate({"env": {**env.model_dump(), "workers": 1}, "rollout": {"max_context": 900}})
    episodes = episodes_of(recipe, renderer, {})
    assert episodes is not None
    with contextlib.closing(episodes):
        playing = episodes.play(
            build_prompts([dict(row)], None, "data"),
            generate,
            group_size=1,
            sampling=Sampling(max_tokens=60, eos_ids=renderer.eos_ids),
            seed=0,
        )
        [group] = asyncio.run(playing)
    return group.trajectories[0], asked[0]


# Guess


def by_halves(secret: int) -> Iterator[str]:
    low, high = 0, 31
    while True:
        middle = (low + high) // 2
        yield f"{low:02d}-{high:02d}:{middle:02d}"
        low, high = (low, middle - 1) if secret < middle else (middle + 1, high)


def test_five_guesses_by_halves_find_all_numbers_but_one():
    found = []
    for secret in range(32):
        env, right = guess.Guess(answer=f"{secret:02d}"), 0.0
        for text in by_halves(secret):
            step = env.step(Reply(text=text))
            right = guess.found(text, f"{secret:02d}")
            if step is None:
                break
            assert step.observation == ("<" if secret < int(text[-2:]) else ">") and not step.done
        found.append(right)
    assert sum(found) == 31


def test_a_reply_without_a_guess_ends_the_game():
    for text in ("", "00-31", "00-31:5", "00-31:½½", "00-31:x1"):
        assert guess.Guess(answer="07").step(Reply(text=text)) == Step(observation="!", done=True)
    assert guess.found("00-31:07", "07") == 1.0 and guess.found("07-31:17", "07") == 0.0


def test_the_teacher_s_interval_holds_the_number():
    for row in itertools.islice(guess.demonstrations(200, seed=1), 200):
        turns = row["completion"]
        assert isinstance(turns, list) and turns[-1]["role"] == "assistant" and len(turns) <= 9
        for said, told in zip(turns[::2], turns[1::2], strict=False):
            low, high, number = int(said["content"][:2]), int(said["content"][3:5]), int(said["content"][6:])
            assert low <= number <= high and told["content"] in "<>"


# Errand


def walker(prompt: str) -> str:
    """The right reply: from the tools' answers alone, as thoughts may be missing."""
    hops, start = re.findall(r"user\n(\d)(\w)\?", prompt)[0]
    found = re.findall(r"<response>(\w)(\d)</response>", prompt)
    asked = "+1 sum?" in prompt
    left, total = int(hops) + asked - len(found), sum(int(digit) for _, digit in found) % 3
    key = found[-1][0] if found else start
    return f"{left}{total}</think>" + (errand._CALL.format(key=key) if left else str(total) if asked else key)


@pytest.mark.parametrize(
    ("name", "thoughts"), [("interleaved_thinking", 5), ("thinking_template", 1), ("thinking_drop", 0)]
)
def test_an_errand_is_run(name: str, thoughts: int):
    """Three calls, the key, one more call, and the sum; M2's format as vLLM reads it; past thoughts in the last prompt
    as the arm has them."""
    row = next(row for row in errand.problems(50, seed=4) if row["prompt"][0] == "3")
    t, last = played(name, "m2_chars", row, walker)
    assert t.status == "answered" and len(t.turns) == 6 and t.events["calls"] == 4 and t.events["failed"] == 0
    assert errand.solved(t.text, **row) == 1.0
    assert last.count("</think>") == thoughts and last.endswith("</response>[e~[\n]~b]ai\n<think>")
    assert [turn.continues for turn in t.turns] == {
        "interleaved_thinking": [False, True, True, True, True, True],
        "thinking_template": [False, True, True, True, False, True],
        "thinking_drop": [False] * 6,
    }[name]


def test_an_errand_needs_its_calls():
    row = next(errand.problems(1, seed=4))
    t, _ = played("interleaved_thinking", "m2_chars", row, lambda prompt: "00</think>a")
    assert t.status == "answered" and errand.solved(t.text, **row) == 0.0
    env = errand.Errand("b" * 26, "3" * 26, "b")
    calls = tuple(ToolCall(id="", name="get", arguments=arguments) for arguments in ({"key": "a"}, {"key": "é"}, {}))
    step = env.step(Reply(text="", calls=calls))
    assert step is not None and [m["content"] for m in step.observation if isinstance(m, dict)] == ["b3", "!", "!"]


def test_the_teacher_speaks_the_policy_s_formats():
    """A right teacher's replies are the walker's; a prompt without thoughts is rendered as `drop` renders it."""
    recipe = load_recipe("interleaved_thinking", ["sft.data.args={size: 40, seed: 1, noise: 0.0}"])
    assert recipe.sft is not None
    renderer = Renderer(load_tokenizer(TOKENIZERS / "m2_chars"))
    samples = demonstrations_of(recipe.sft.data, renderer, recipe)
    whole = 0
    for sample in samples:
        ids, mask = sample.token_ids.tolist(), sample.loss_mask.tolist()
        starts = [n for n in range(1, len(ids)) if mask[n] and not mask[n - 1]]
        ends = [n for n in range(1, len(ids) + 1) if mask[n - 1] and (n == len(ids) or not mask[n])]
        for start, end in zip(starts, ends, strict=True):
            assert renderer.decode_reply(ids[start:end]) == walker(renderer.decode_reply(ids[:start]))
        whole += len(starts) > 1
    assert 20 < whole < 30, "conversations with their thoughts, beside their ends without and single replies"


# Calculation


def test_a_calculation_with_the_shipped_tool():
    row = next(calculation.problems(1, seed=3))

    def say(prompt: str) -> str:
        question = prompt.rpartition("What is ")[2]
        expression, _, said = question.partition("?")
        return said.rpartition("<eos>")[2] or f"[calculator {expression}]"

    t, _ = played("smollm2_tools", "chars", row, say)
    assert t.status == "answered" and len(t.turns) == 2 and t.events == {"calls": 1, "failed": 0, "unreadable": 0}
    assert numeric(t.turns and str(t.messages[1]["content"]), str(row["answer"])) == 1.0


def test_splits_are_disjoint():
    for module in (errand, calculation):
        train, test = (
            {str(row.get("messages", "")) + str(row.get("table", "")) for row in module.problems(300, 1, split=split)}
            for split in ("train", "test")
        )
        assert len(train) > 250 and not train & test
