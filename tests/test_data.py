"""Rows that stay in files' own form, long rows, system messages, several sources, and what they are judged by."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cispo.errors import UserError
from cispo.evaluate import held_out_sets
from cispo.metrics import source_metrics
from cispo.output.checkpoint import CheckpointFolder
from cispo.recipe.held_out import best_metric, held_out_metrics
from cispo.recipe.load import load_recipe, parse_recipe
from cispo.recipe.resume import difference
from cispo.recipe.schema import Recipe
from cispo.rollout import prompts as prompts_module
from cispo.rollout.prompt_source import PromptSource, prompt_source_of
from cispo.rollout.prompts import Prompts, build_prompts, distinct, prompts_of
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rewards import Attempts, RewardFunction, RewardRunner
from cispo.rollout.rows import load_rows
from cispo.rollout.tables import ArrowRows, JsonRows, Table
from cispo.types import Completion, FinishReason, Prompt, Sampling, Trajectory, TrajectoryGroup, Turn

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
BASE = {"policy": {"tokenizer": str(CHARS), "config": {"model_type": "minimax"}}}


@pytest.fixture(scope="module")
def chars() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def table(tmp_path: Path, rows: Sequence[dict[str, object]], suffix: str) -> Path:
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(file: Path, split: str = "train", limit: int | None = None) -> Sequence[dict[str, object]]:
    return load_rows(str(file), split, {}, limit, "data")


# Rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_made_when_they_are_used(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": f"{n}?", "a": None if n == 5 else str(n), "n": n} for n in range(9)]
    found = load(table(tmp_path, rows, suffix))
    assert isinstance(found, Table) and found == rows and list(found) == rows
    assert found[-1] == rows[-1] and found[2:6:2] == rows[2:6:2] and len(found) == 9
    with pytest.raises(IndexError):
        found[9]
    assert found.kinds() == [0, 5], "the first row, and the first with a null"
    assert load(table(tmp_path, rows, suffix), "train[3:7]", 3) == rows[3:6]
    part = load(table(tmp_path, rows, suffix), "train[4:]")
    assert isinstance(part, Table) and part.kinds() == [0, 1] and part[part.kinds()[1]]["a"] is None
    assert type(found) is (JsonRows if suffix == ".jsonl" else ArrowRows)


def test_kinds_of_lines_show_every_set_of_columns(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}, {"a": 3, "b": 1}, {"b": None, "a": 1}, {"a": 1}]
    found = load(table(tmp_path, rows, ".jsonl"))
    assert isinstance(found, JsonRows) and found.kinds() == [0, 2, 3]


def test_lines_end_in_any_way_and_blank_ones_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r{"a": "\xe2\x80\xa8"}\n \n{"a": 4}')
    assert load(file) == [{"a": 1}, {"a": 2}, {"a": "\u2028"}, {"a": 4}]
    file.write_bytes(b'{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"line 2 is not JSON"):
        load(file)
    assert load(file, limit=1) == [{"a": 1}], "lines behind the limit are not read"


def test_a_file_that_changes_later_changes_no_row(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".parquet"):
        found = load(table(tmp_path, [dict[str, object](a="x")] * 3, suffix))
        table(tmp_path, [{"a": "yy"}], suffix)
        assert found == [{"a": "x"}] * 3


def test_configurations_of_a_folder(tmp_path: Path) -> None:
    hub = str(Path(__file__).parent / "data" / "hub" / "openai" / "gsm8k")
    assert len(load_rows(hub, "train", {}, None, "data", config="main")) == 12
    assert load_rows(hub, "train", {}, None, "data", config="socratic")[0]["question"] == "Another configuration."
    with pytest.raises(UserError, match=r"data: cannot read .*gsm8k', split 'train'.*[Mm]ain"):
        load_rows(hub, "train", {}, None, "data", config="Mian")
    with pytest.raises(UserError, match=r"data.config is 'main' and data.args.name 'socratic': leave one"):
        load_rows(hub, "train", {"name": "socratic"}, None, "data", config="main")


# Long rows


def words(sizes: Sequence[int]) -> list[dict[str, object]]:
    return [{"prompt": "1" * size + ">", "answer": str(n)} for n, size in enumerate(sizes)]


SIZES = [3, 50, 4, 5, 60, 6, 7, 2, 70, 1, 8, 9]
FIT = [n for n, size in enumerate(SIZES) if size < 31]


def recipe_of(data: object, **sections: object) -> Recipe:
    rollout = {"max_context": 32, "max_tokens": 4, "prompts_per_step": 4, **sections.pop("rollout", {})}  # type: ignore[dict-item]
    return parse_recipe({**BASE, "data": data, "rollout": rollout, **sections})


def source_of(recipe: Recipe, renderer: Renderer, say: list[str] | None = None) -> PromptSource:
    assert recipe.data is not None
    said = [] if say is None else say
    return prompt_source_of(recipe, prompts_of(recipe.data, "data", renderer, recipe, said.append))


def ids(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.id for prompt in prompts]


def test_long_rows_are_left_out_and_counted_once(tmp_path: Path, chars: Renderer) -> None:
    file = str(table(tmp_path, words(SIZES), ".jsonl"))
    with pytest.raises(UserError, match=r"data: 3 of 12 rows are too long.*row 8 has 71 tokens \(too long: 1, 4, 8\)"):
        source_of(recipe_of({"source": file}), chars)
    said: list[str] = []
    source = source_of(recipe_of({"source": file, "overlong": "drop"}), chars, said)
    assert said == ["data: 3 of 12 rows leave no room in rollout.max_context 32 and are left out (overlong: drop)"]
    taken = ids(source.take(18))
    assert sorted(taken[:9]) == sorted(taken[9:]) == FIT, "each once an epoch"
    assert source.metrics() == {"data/overlong": 3}
    # The order is that of all rows: with more room, the same prompts come in the same order between others.
    roomy = recipe_of({"source": file}, rollout={"max_context": 128})
    assert [i for i in ids(source_of(roomy, chars).take(24)) if i in FIT] == taken


@pytest.mark.parametrize("weighting", ["uniform", "difficulty"])
def test_a_large_set_finds_its_long_rows_when_they_are_used(
    tmp_path: Path, chars: Renderer, monkeypatch: pytest.MonkeyPatch, weighting: str
) -> None:
    file = str(table(tmp_path, words(SIZES), ".jsonl"))
    recipe = recipe_of(
        {"source": file, "overlong": "drop"}, curriculum={"weighting": weighting}, rollout={"group_size": 2}
    )
    whole = source_of(recipe, chars)
    monkeypatch.setattr(prompts_module, "_CHECKED", 4)  # rows 0, 3, 6 and 9, none of them long
    said: list[str] = []
    source = source_of(recipe, chars, said)
    assert "0 of 4 rows, evenly spread over 12," in said[0] and source.metrics()["data/overlong"] == 0
    if weighting == "uniform":
        assert ids(source.take(18)) == ids(whole.take(18)) and source.metrics()["data/overlong"] == 3
        source = source_of(recipe, chars)

    def step(source: PromptSource) -> list[int]:
        taken = ids(source.take(4))
        for index in taken:
            source.observe(index, right=index % 3 % 2, attempts=2)
        return taken

    first = [step(source) for _ in range(3)]
    state = json.loads(json.dumps(source.state_dict()))
    rest = [step(source) for _ in range(6)]
    resumed = source_of(recipe, chars)
    resumed.load_state_dict(state)
    assert [step(resumed) for _ in range(6)] == rest and resumed.state_dict() == source.state_dict()
    assert {index for taken in (*first, *rest) for index in taken} <= set(FIT)
    with pytest.raises(UserError, match=r"data: 1 of 1 rows are too long.* row \d has"):
        source_of(recipe_of({"source": file}), chars).take(12)


def test_a_large_set_is_used_row_by_row(tmp_path: Path, chars: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the start nor a step reads rows that it does not need."""
    file = table(tmp_path, words([5] * 500), ".jsonl")
    read: list[int] = []
    row = JsonRows.row
    monkeypatch.setattr(JsonRows, "row", lambda self, index: read.append(index) or row(self, index))
    monkeypatch.setattr(prompts_module, "_CHECKED", 10)
    source = source_of(recipe_of({"source": str(file)}), chars)
    assert sorted(set(read)) == list(range(0, 500, 50))
    read.clear()
    source.take(4)
    assert len(read) == 4
    assert [prompt.id for prompt in distinct(source.prompts)] == [0]


# Messages


def test_system_messages_and_further_columns(chars: Renderer) -> None:
    rows = [{"prompt": "1>"}, {"messages": [{"role": "user", "content": "2>"}]},
            {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "3>"}]}]  # fmt: skip
    found = build_prompts(rows, None, "data", system="be brief")
    assert [[m["content"] for m in p.messages] for p in found] == [
        ["be brief", "1>"],
        ["be brief", "2>"],
        ["own", "3>"],
    ]
    recipe = recipe_of(
        {"source": "x", "system": "s"}, eval={"source": "y"}, sft={"data": {"source": "z", "system": ""}}
    )
    assert recipe.data is not None and recipe.sft is not None and not isinstance(recipe.eval, list) and recipe.eval
    assert prompts_module.system_of(recipe.eval, recipe.eval, recipe) == "s"
    assert prompts_module.system_of(recipe.sft.data, recipe.sft.data, recipe) is None, "empty is none"
    columns = prompts_module.with_columns({"a": [1, 2], "b": "x"}, {"c": "{a}", "d": "{b}{a[1]}"}, "data: row 0")
    assert columns == {"a": [1, 2], "b": "x", "c": [1, 2], "d": "x2"}


# Several sources


def mixture(tmp_path: Path, **keys: object) -> Recipe:
    rows = {"big": [{"prompt": f"{n}b>", "answer": "1"} for n in range(30)],
            "small": [{"prompt": f"{n}s>", "right": "2"} for n in range(7)]}  # fmt: skip
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    sources = [{"name": name, "source": str(tmp_path / f"{name}.jsonl")} for name in rows]
    return recipe_of({"sources": [{**sources[0], "weight": 1.0}, {**sources[1], "weight": 3.0}], **keys})


def test_sources_are_drawn_by_weight_each_in_an_order_of_its_own(tmp_path: Path, chars: Renderer) -> None:
    recipe = mixture(tmp_path)
    source = source_of(recipe, chars)
    assert [p.source for p in source.prompts] == ["big"] * 30 + ["small"] * 7
    taken = source.take(4000)
    share = Counter(prompt.source for prompt in taken)["small"] / 4000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    for name, size in (("big", 30), ("small", 7)):
        own = [prompt.id for prompt in taken if prompt.source == name]
        assert sorted(own[:size]) == sorted(own[size : 2 * size]) and len(set(own[:size])) == size, "an epoch"
    # Another weight takes the same prompts of a source, in the same order.
    assert recipe.data is not None
    other = [one.model_copy(update={"weight": 1.0}) for one in recipe.data.sources]
    again = source_of(recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": other})}), chars)
    orders = [[p.id for p in some if p.source == "big"][:300] for some in (taken, again.take(1000))]
    assert orders[0] == orders[1]


def test_a_mixture_resumes_and_goes_on_without_a_dropped_source(tmp_path: Path, chars: Renderer) -> None:
    recipe = mixture(tmp_path).model_copy(
        update={"curriculum": recipe_of(None, curriculum={"drop_above": 0.9}, rollout={"group_size": 4}).curriculum}
    )
    source = source_of(recipe, chars)

    def step(source: PromptSource) -> list[int]:
        taken = ids(source.take(5))
        for index in taken:
            source.observe(index, right=4 if index >= 30 else 1, attempts=4)
        return taken

    for _ in range(2):
        step(source)
    state = json.loads(json.dumps(source.state_dict()))
    rest = [step(source) for _ in range(12)]
    resumed = source_of(recipe, chars)
    resumed.load_state_dict(state)
    assert [step(resumed) for _ in range(12)] == rest
    assert all(index < 30 for index in rest[-1]), "every small one is dropped"
    assert resumed.state_dict() == source.state_dict()


def test_one_source_is_the_stream_without_names(tmp_path: Path, chars: Renderer) -> None:
    """The single form draws as `random` shuffles: recipes with one source are what they were."""
    file = str(table(tmp_path, words([3] * 9), ".jsonl"))
    source = source_of(recipe_of({"source": file}), chars)
    order = list(range(9))
    random.Random(f"{source.seed}/0").shuffle(order)
    assert ids(source.take(9)) == order and [p.source for p in source.prompts] == [""] * 9


def test_rewards_and_metrics_by_source(tmp_path: Path, chars: Renderer) -> None:
    recipe = mixture(tmp_path)
    assert recipe.data is not None
    prompts = prompts_of(recipe.data, "data", chars, recipe)
    here = "tests.source_rewards"
    functions = [
        RewardFunction(fn=f"{here}:one_right", sources=("big",)),
        RewardFunction(fn=f"{here}:two_right", sources=("small",), weight=2.0),
        RewardFunction(fn="rewards.format:boxed", weight=0.5),
    ]
    runner = RewardRunner(functions)
    try:
        runner.check_rows(prompts, "data")
        assert runner.judge_of("big") == "one_right" and runner.judge_of("small") == "two_right"
        assert runner.judge_of("") == "boxed"
        attempts = [Attempts(prompt=prompts[i], completions=["1", "2"]) for i in (0, 30)]
        big, small = asyncio.run(runner.score(attempts))
        assert big is not None and small is not None
        assert [(s.total, dict(s.values)) for s in big] == [
            (1.0, {"one_right": 1.0, "boxed": 0.0}), (0.0, {"one_right": 0.0, "boxed": 0.0})
        ]  # fmt: skip
        assert [(s.total, dict(s.values)) for s in small] == [
            (0.0, {"two_right": 0.0, "boxed": 0.0}), (2.0, {"two_right": 1.0, "boxed": 0.0})
        ]  # fmt: skip
        groups = [group_of(prompts[i], scores) for i, scores in ((0, big), (1, big), (30, small))]
        metrics = source_metrics(groups, runner)
        assert metrics["source/big/prompts"] == 2 and metrics["source/small/prompts"] == 1
        assert metrics["source/big/right_frac"] == 0.5 and metrics["source/small/reward"] == 1.0
        assert source_metrics([replace(g, prompt=replace(g.prompt, source="")) for g in groups], runner) == {}
        runner.functions = tuple(replace(function, sources=()) for function in functions)
        with pytest.raises(UserError, match=r"two_right needs a column 'right', but row 0 of data has prompt, answer"):
            runner.check_rows(prompts, "data")
    finally:
        runner.close()


def group_of(prompt: Prompt, scores: Sequence[object]) -> TrajectoryGroup:
    completion = Completion(token_ids=(5, 2), logprobs=(0.0, 0.0), finish_reason=FinishReason.STOP, versions=(1, 1))
    turn = Turn(context_ids=(4,), completion=completion)
    return TrajectoryGroup(
        prompt=prompt,
        trajectories=tuple(
            Trajectory(group_id=prompt.id, index=i, turns=(turn,), text="", reward=s.total, rewards=s.values)  # type: ignore[attr-defined]
            for i, s in enumerate(scores)
        ),
    )


# Evaluation


def test_sets_have_sampling_and_names_of_their_own(tmp_path: Path, chars: Renderer) -> None:
    file = str(table(tmp_path, words(SIZES), ".jsonl"))
    sets = [
        {"name": "a", "source": file, "overlong": "drop", "samples": 4, "temperature": 0.6, "top_p": 0.9},
        {"name": "b", "source": file, "limit": 1, "max_tokens": 9, "answer": "rewards.math:last_answer"},
    ]
    recipe = recipe_of(None, eval=sets, train={"eval_samples": 3, "best": "eval/b/maj@3"})
    first, second = held_out_sets(recipe, chars, lambda _: None)
    assert ids(first.prompts) == FIT and [p.source for p in second.prompts] == ["b"]
    training = Sampling(max_tokens=4, eos_ids=(2,))
    own = first.sampling(training)
    assert (own.temperature, own.top_p, own.max_tokens, own.repetition.run_length) == (0.6, 0.9, 4, 0)
    assert second.sampling(training) == replace(training, max_tokens=9)
    assert (first.samples, second.samples) == (4, 3) and first.seed(recipe) != second.seed(recipe)
    assert second.read is not None and second.read("so \\boxed{4}") == "4"
    assert best_metric(recipe) == "eval/b/maj@3"
    assert held_out_metrics(recipe)[:2] == ["eval/a/avg@4", "eval/b/avg@3"] and "eval/a/pass@2" in held_out_metrics(
        recipe
    )
    single = load_recipe("quickstart")
    assert best_metric(single) == "eval/accuracy"


def test_the_best_checkpoint_goes_by_the_named_metric(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 1, "eval/a/pass@4")
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4)):
        with folder.writing() as draft:
            (draft / "x").write_text("x")
        folder.finish(step, {}, score=score)
    assert [f.name for f in folder.steps()] == ["step_000002", "step_000003"] and folder.best_score() == 0.9
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 2, "eval/a/pass@4": 0.9}
    assert CheckpointFolder(tmp_path, 1).best() is None, "of another metric"


def test_a_run_resumes_with_other_paths_of_its_sources(tmp_path: Path) -> None:
    before = mixture(tmp_path)
    (tmp_path / "moved").mkdir()
    now = mixture(tmp_path / "moved")
    assert difference(before, now) is None, "other paths, the same content"
    (tmp_path / "moved" / "small.jsonl").write_text('{"prompt": "x"}\n')
    assert (difference(before, now) or ("",))[0] == "data.sources.1.source"
    assert now.data is not None
    heavier = [now.data.sources[0], now.data.sources[1].model_copy(update={"weight": 4.0})]
    data = now.data.model_copy(update={"sources": heavier})
    assert (difference(before, before.model_copy(update={"data": data})) or ("",))[0] in (
        "data.sources.1.source", "data.sources.1.weight"
    )  # fmt: skip


def test_prompts_are_a_sequence(tmp_path: Path, chars: Renderer) -> None:
    recipe = mixture(tmp_path)
    assert recipe.data is not None
    prompts = prompts_of(recipe.data, "data", chars, recipe)
    assert isinstance(prompts, Prompts) and len(prompts) == 37
    assert list(prompts) == [prompts[i] for i in range(37)] == prompts[:] and prompts[-1].id == 36
    assert [p.id for p in distinct(prompts)] == [0, 30]
    with pytest.raises(IndexError):
        prompts[37]


def test_the_examples_of_the_docs_are_recipes() -> None:
    docs = Path(__file__).parents[1] / "docs"
    snippets = [
        s
        for page in ("data.md", "evaluation.md")
        for s in re.findall(r"```yaml\n(.*?)```", (docs / page).read_text(), re.DOTALL)
    ]
    parsed = [parse_recipe({**BASE, "rollout": {"max_context": 4096}, **yaml.safe_load(text)}) for text in snippets]
    assert len(parsed) == 3 and parsed[0].data and parsed[1].data
    assert parsed[0].data.columns == {"answer": "{solution}"} and len(parsed[1].data.sources) == 2
    assert best_metric(parsed[2]) == "eval/math500/avg@4"
