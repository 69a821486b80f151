"""Datasets from every kind of source, and prompts from rows."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from cispo.errors import UserError
from cispo.rollout.prompts import build_prompts, load_rows
from cispo.user_code import is_hub_id, load_object

USER_CODE = """
def rows(size, split="train"):
    for i in range(size):
        yield {"question": f"{split} {i}", "answer": i}
def endless():
    i = 0
    while True:
        yield {"prompt": str(i)}
        i += 1
def raises():
    yield {"prompt": "a"}
    raise OSError("the disk is on fire")
def numbers(): return [1, 2]
def nothing(): return []
value = 3
class Task:
    @staticmethod
    def rows(): return [{"prompt": "a"}]
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_tasks.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_tasks"


def load(source: object, args: Mapping[str, object] | None = None, *, split: str = "train", limit: int | None = None):
    return load_rows(str(source), split, args or {}, limit, "data")


def refusal(source: object, args: Mapping[str, object] | None = None, *, split: str = "train") -> str:
    """The sentence of the UserError that loading a source gives."""
    with pytest.raises(UserError) as raised:
        load(source, args, split=split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Files


def test_jsonl_rows_are_what_the_file_says(tmp_path: Path) -> None:
    rows = [
        {"question": "when?", "answer": "2024-01-01"},
        {"question": "line\u2028separator", "answer": 3, "tags": ["a"], "more": {"x": None}},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    assert load(file) == rows
    assert load(file, limit=1) == rows[:1]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert load(tmp_path / "train.json") == rows


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"a": 1}\n{"a": }\n', "line 2 is not JSON: Expecting value (column 7)"),
        ('{"a": 1}\n\n{"a": 1} x\n', "line 3 is not JSON: Extra data (column 10)"),
        ('{"a": 1}\n[1, 2]\n', "line 2 is not an object with columns but a list"),
        ("", "has no rows"),
        ("\n\n", "has no rows"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    assert refusal(file).startswith(f"data: '{file}'") and refusal(file).endswith(sentence)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"a": 1}')
    assert refusal(tmp_path / "one.json").endswith("must hold a list of rows, not one dict")
    (tmp_path / "cut.json").write_text('[{"a": 1},\n {"a"')
    assert "cut.json' line 2 is not JSON" in refusal(tmp_path / "cut.json")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    assert "cannot read" in refusal(tmp_path / "latin.jsonl")
    (tmp_path / "not.parquet").write_text("hello")
    assert "cannot read" in refusal(tmp_path / "not.parquet")
    for name in ("missing.jsonl", "missing.parquet", "missing"):
        assert "does not exist" in refusal(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert "cannot read" in refusal(tmp_path / "empty")


def test_parquet_is_never_stale_and_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for rows in ([{"question": "a", "answer": 1}] * 3, [{"question": "b", "answer": 2}] * 2):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
        assert load(tmp_path / "train.parquet") == rows
        assert not list(scratch.iterdir())


def test_a_folder_holds_splits(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "b"}\n')
    assert load(folder) == [{"prompt": "a"}]
    assert load(folder, split="test") == [{"prompt": "b"}]
    assert "split 'dev'" in refusal(folder, split="dev")


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("openai/gsm8k")
    assert not any(map(is_hub_id, ["data/trian", "/data/x", "./data", "gsm8k", "a/b/c", "a b/c"]))
    assert "'data/trian' does not exist, and is neither" in refusal("data/trian")


# Functions


def test_a_function_gets_args_and_split(user_code: str) -> None:
    assert load(f"{user_code}:rows", {"size": 2}, split="test") == [
        {"question": "test 0", "answer": 0},
        {"question": "test 1", "answer": 1},
    ]
    assert load(f"{user_code}:rows", {"size": 1, "split": "mine"})[0]["question"] == "mine 0"
    assert load(f"{user_code}:endless", limit=3) == [{"prompt": "0"}, {"prompt": "1"}, {"prompt": "2"}]
    assert load(f"{user_code}:Task.rows") == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("rows", {"sise": 2}, "data: user_tasks:rows takes size, split: missing a required argument: 'size'"),
        ("raises", {}, "data: user_tasks:raises raised OSError: the disk is on fire"),
        ("numbers", {}, "data: row 0 of user_tasks:numbers is not an object with columns but a int"),
        ("nothing", {}, "data: 'user_tasks:nothing' has no rows"),
        ("value", {}, "data: 'user_tasks:value' is not a function: 3 is not a callable object"),
    ],
)
def test_a_function_that_gives_no_rows(user_code: str, name: str, args: dict, sentence: str) -> None:
    assert refusal(f"{user_code}:{name}", args) == sentence


def test_load_object_says_why_not(user_code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import no_such_package")
    (tmp_path / "leaving.py").write_text("raise SystemExit(1)")
    (tmp_path / "unfinished.py").write_text("def f(:")
    for path, sentence in {
        "needy:f": "cannot import 'needy:f': it needs the module 'no_such_package', which is not installed",
        "leaving:f": "algorithm.name: cannot import 'leaving:f': SystemExit: 1",
        "unfinished:f": "algorithm.name: cannot import 'unfinished:f': SyntaxError: invalid syntax",
        "nowhere.at.all:f": "there is no module 'nowhere' on the Python path or in the current directory",
        "user_tasks:row": "has no 'row', did you mean rows?",
        "user_tasks:Task.row": "'Task' has no 'row', did you mean rows?",
        "math:squirt": "module 'math'",
        "user_tasks": "'user_tasks' is not of the form module:name",
        ":f": "':f' is not of the form module:name",
    }.items():
        with pytest.raises(UserError) as raised:
            load_object(path, "algorithm.name")
        assert sentence in str(raised.value) and str(raised.value).startswith("algorithm.name: ")


def test_load_object_finds_modules_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    (tmp_path / "beside_me.py").write_text("value = 4")
    monkeypatch.chdir(tmp_path)
    assert load_object("beside_me:value", "k") == 4
    assert sys.path.count(str(tmp_path)) == 1 and sys.path[0] != str(tmp_path), "appended once, never put first"


# reasoning-gym


def test_reasoning_gym_rows_have_columns_for_templates_and_scoring() -> None:
    args = {"size": 20, "seed": 5, "min_word_len": 3, "max_word_len": 4}
    rows = load("reasoning_gym:spell_backward", args)
    assert rows == load("reasoning_gym:spell_backward", args)
    assert len(rows) == 20
    for row in rows:
        assert row["word"] in row["question"] and row["answer"] == row["word"][::-1] and 3 <= row["word_len"] <= 4
        assert row["task"] == "spell_backward" and row["params"] == {"min_word_len": 3, "max_word_len": 4}
    prompts = build_prompts(rows, "{word}>", "data")
    assert prompts[0].messages == ({"role": "user", "content": rows[0]["word"] + ">"},)


def test_reasoning_gym_splits_and_seeds_are_disjoint() -> None:
    def questions(split: str, seed: int, **params: int) -> set[str]:
        rows = load("reasoning_gym:chain_sum", {"size": 300, "seed": seed, **params}, split=split)
        return {row["question"] for row in rows}

    # Few problems (a digit plus or minus a digit), so that chance alone could not keep the splits apart.
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert questions("train", 0, **small).isdisjoint(questions("test", 0, **small))
    # reasoning_gym's own seeds 0 and 1 share all but one item; among so many problems, ours share next to none.
    assert len(questions("train", 0) & questions("train", 1)) < 5


@pytest.mark.parametrize(
    ("task", "args", "sentence"),
    [
        ("spell_backwards", {}, "data: reasoning_gym has no task 'spell_backwards', did you mean spell_backward"),
        ("zzz", {}, "data: reasoning_gym has no task 'zzz'; there are 106, such as chain_sum"),
        ("chain_sum", {"terms": 2}, "data: reasoning_gym:chain_sum has no parameter 'terms'; it takes min_terms, max"),
        ("spell_backward", {"min_word_len": 0}, "refuses its parameters: min_word_len must be positive"),
        ("spell_backward", {"min_word_len": "a"}, "refuses its parameters: "),
        ("chain_sum", {"size": 0}, "data: reasoning_gym:chain_sum needs a size of 1 to 200000 and a seed of 0 or more"),
        ("count_bits", {"size": 9, "min_n": 1, "max_n": 1}, "has only 0 problems in split 'train' among 136 items"),
    ],
)
def test_reasoning_gym_refuses(task: str, args: dict, sentence: str) -> None:
    assert sentence in refusal(f"reasoning_gym:{task}", args)


# Prompts


def test_messages_then_template_then_prompt() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        {"messages": messages, "question": "q", "prompt": "p"},
        {"question": "q", "prompt": "p", "n": 3},
    ]
    with_template = build_prompts(rows, "{question}?", "data")
    assert [p.messages for p in with_template] == [tuple(messages), ({"role": "user", "content": "q?"},)]
    assert [p.id for p in with_template] == [0, 1]
    assert with_template[1].columns == rows[1]
    assert build_prompts(rows[1:], None, "data")[0].messages == ({"role": "user", "content": "p"},)
    assert build_prompts([{"prompt": messages}], None, "data")[0].messages == tuple(messages)
    assert build_prompts([{"a": [3, 4], "b": 0.5}], "{a[1]} {b:.2f} {{", "d")[0].messages[0]["content"] == "4 0.50 {"


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        (
            {"q": 1, "a": 2},
            "{question}",
            "data: row 0 has no column 'question', which the template needs; its columns are q, a",
        ),
        (
            {"q": 1},
            None,
            "data: row 0 has no column 'messages' or 'prompt', and there is no template; its columns are q",
        ),
        ({"q": 1}, "{q", "data: row 0 does not fit the template '{q': expected '}' before end of string"),
        ({"q": 1}, "{}", "data: row 0 does not fit the template '{}': "),
        ({"q": "a"}, "{q:d}", "data: row 0 does not fit the template '{q:d}': "),
        (
            {"messages": "hi"},
            None,
            "data: row 0: column 'messages' must be a list of messages with role and content, not 'hi'",
        ),
        ({"messages": []}, None, "data: row 0: column 'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}]}, None, "data: row 0: column 'messages' must be a list of messages"),
        ({"prompt": 3}, None, "data: row 0: column 'prompt' must be a list of messages"),
    ],
)
def test_a_row_that_makes_no_prompt(row: dict, template: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        build_prompts([row], template, "data")
