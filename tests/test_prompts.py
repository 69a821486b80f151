"""Datasets from every kind of source, and prompts from rows."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from cispo.errors import UserError
from cispo.recipe.schema import Data, Recipe, Rollout
from cispo.recipe.user_code import is_hub_id, load_object
from cispo.rollout.prompts import build_prompts, prompt_ids
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rows import load_rows
from cispo.warmup import demonstrations_of

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"

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
def anything(**args): return [args]
def takes_away(names):
    while names: yield {"name": names.pop()}
def numbered(): return [{1: 2}]
def leaves(): raise SystemExit(3)
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


@pytest.fixture(scope="module")
def chars() -> Renderer:
    return Renderer(load_tokenizer(CHARS))


def recipe_of(max_context: int) -> Recipe:
    return Recipe(rollout=Rollout(max_context=max_context, max_tokens=4))


class Unsayable:
    def __repr__(self) -> str:
        raise ValueError

    def __format__(self, spec: str) -> str:
        raise SystemExit(3)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


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
    assert refusal(" ") == "data.source is empty"
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


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_split_of_a_file_is_used_or_refused(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, file = [{"n": n} for n in range(7)], tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    first, second = load(file, split="train[:50%]"), load(file, split="train[50%:]")
    assert [*first, *second] == rows == load(file) and len(first) == 4
    assert load(file, split="train[:2]+train[-1:]") == [rows[0], rows[1], rows[6]]
    for split in ("test", "train[", "train[:x]", ""):
        assert f"split '{split}'" in refusal(file, split=split)
    assert "has no rows in split 'train[5:5]'" in refusal(file, split="train[5:5]") or suffix == "parquet"


def test_arguments_beside_a_file_are_used_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    sentence = refusal(tmp_path / "rows.jsonl", {"columns": ["a"]})
    assert sentence.startswith("data.args: ") and "takes no arguments, not columns" in sentence
    pq.write_table(pa.Table.from_pylist([{"a": 1, "b": 2}]), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet", {"columns": ["b"]}) == [{"b": 2}]
    for args in ({"colums": ["b"]}, {"split": "test"}, {"data_files": "x"}):
        assert "cannot read" in refusal(tmp_path / "rows.parquet", args)


def test_files_that_never_end_or_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "train.jsonl")
    for name in ("pipe.jsonl", "pipe.parquet", "folder"):
        assert "is neither a regular file nor a folder" in refusal(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "is neither a regular file nor a folder" in refusal(tmp_path / "zero.jsonl")
    for name in ("rows.csv", "rows.txt", "rows", "rows.jsonl.gz"):
        (tmp_path / name).write_text("a,b\n1,2\n")
        assert "is no file that can be read: .jsonl, .json and .parquet are" in refusal(tmp_path / name)
    assert "cannot read" in refusal("x" * 5000)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[" * 100_000 + "]" * 100_000, "line 1 cannot be read: it is nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "line 1 cannot be read: it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "line 1 cannot be read: Exceeds the limit"),
    ],
    ids=["list", "object", "digits"],
)
def test_json_that_python_does_not_read(tmp_path: Path, line: str, sentence: str) -> None:
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text(line)
        assert sentence in refusal(tmp_path / name)


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
        ("numbered", {}, "data: row 0 of user_tasks:numbered has a column 1, whose name is no text"),
        ("leaves", {}, "data: user_tasks:leaves raised SystemExit: 3"),
        ("value", {}, "data: 'user_tasks:value' is not a function: 3 is not a callable object"),
    ],
)
def test_a_function_that_gives_no_rows(user_code: str, name: str, args: dict, sentence: str) -> None:
    assert refusal(f"{user_code}:{name}", args) == sentence


def test_a_function_uses_the_split_or_it_is_refused(user_code: str) -> None:
    assert refusal(f"{user_code}:Task.rows", split="test") == (
        "data.split is 'test', but user_tasks:Task.rows has no parameter 'split'"
    )
    sentence = refusal(f"{user_code}:rows", {"size": 1, "split": "mine"}, split="test")
    assert sentence == "data.split is 'test' and data.args.split 'mine': leave one of them out"
    assert load(f"{user_code}:anything", {"a": 1}) == [{"a": 1}]
    assert load(f"{user_code}:anything", {"a": 1}, split="test") == [{"a": 1, "split": "test"}]


def test_a_function_cannot_change_the_recipe(user_code: str) -> None:
    args = {"names": ["a", "b"]}
    assert load(f"{user_code}:takes_away", args) == [{"name": "b"}, {"name": "a"}]
    assert args == {"names": ["a", "b"]}


def test_the_line_of_an_import_error_is_named(user_code: str, tmp_path: Path) -> None:
    (tmp_path / "unlucky_import.py").write_text("import json\n\njson.loads('{')\n")
    assert refusal("unlucky_import:f").endswith("(char 1) (unlucky_import.py, line 3)")


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
        ("chain_sum", {"size": "many"}, "data: reasoning_gym:chain_sum needs a size of 1 to 200000"),
        ("chain_sum", {"size": 2.5}, "data: reasoning_gym:chain_sum needs a size of 1 to 200000"),
        ("count_bits", {"size": 9, "min_n": 1, "max_n": 1}, "has only 0 problems in split 'train' among 136 items"),
    ],
)
def test_reasoning_gym_refuses(task: str, args: dict, sentence: str) -> None:
    assert sentence in refusal(f"reasoning_gym:{task}", args)


@pytest.mark.parametrize("split", ["train[:50%]", "train+test", "Train", "training", "trian", ""])
def test_a_split_of_procedural_problems_is_a_name_that_cannot_be_mistaken(split: str) -> None:
    """Every name but train is the held-out half: a slice of train, or a misspelt train, would be in it."""
    for source in ("reasoning_gym:chain_sum", "rewards.sorting:problems"):
        assert f"split '{split}'" in refusal(source, {"size": 2, "seed": 0}, split=split)
    assert len(load("reasoning_gym:chain_sum", {"size": 2.0, "seed": 0}, split="validation")) == 2


# Prompts


def test_template_then_messages_then_prompt() -> None:
    """A template that the recipe gives is used, also where the dataset has messages."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        {"messages": messages, "question": "q", "prompt": "p"},
        {"question": "q", "prompt": "p", "n": 3},
    ]
    with_template = build_prompts(rows, "{question}?", "data")
    assert [p.messages for p in with_template] == [({"role": "user", "content": "q?"},)] * 2
    assert build_prompts(rows[:1], None, "data")[0].messages == tuple(messages)
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
        (
            {"prompt": Unsayable()},
            None,
            "data: row 0: column 'prompt' must be a list of messages with role and content, ",
        ),
        ({"q": Unsayable()}, "{q}", "data: row 0 does not fit the template '{q}': 3"),
        (
            {"q": 1},
            "{q:9999999}",
            "data: row 0 does not fit the template '{q:9999999}': the width 9999999 is too large",
        ),
        ({"q": None}, "{q}", "data: row 0 does not fit the template '{q}': column 'q' is null"),
        ({"q": {"a": None}}, "{q[a]!r}", "data: row 0 does not fit the template '{q[a]!r}': column 'q[a]' is null"),
        ({"prompt": [user("a"), user(None)]}, None, "data: row 0: column 'prompt': message 1 has the content None"),
        ({"prompt": [user(3)]}, None, "data: row 0: column 'prompt': message 0 has the content 3, which is no text"),
        ({"prompt": [{"role": None, "content": "a"}]}, None, "data: row 0: column 'prompt': message 0 has the role N"),
        ({"prompt": "a\ud800"}, None, "data: row 0 holds '\\ud800', half of a character"),
        ({"q": "\udfff"}, "{q}", "data: row 0 holds '\\udfff', half of a character"),
        ({"messages": [user("\ud800")]}, None, "data: row 0: column 'messages': message 0 holds '\\ud800'"),
        (
            {"messages": [user([{"type": "text", "text": "\ud800"}])]},
            None,
            "data: row 0: column 'messages': message 0 holds '\\ud800'",
        ),
    ],
)
def test_a_row_that_makes_no_prompt(row: dict, template: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        build_prompts([row], template, "data")


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt"])
def test_messages_that_end_with_an_answer_are_refused(role: str) -> None:
    """Chat rows as they lie on the hub end with the answer, which the policy would read in its prompt."""
    messages = [user("2 + 2?"), {"role": role, "content": "4"}]
    for column in ("messages", "prompt"):
        with pytest.raises(UserError, match=f"data: row 0: column '{column}' ends with the role '{role}', an answer"):
            build_prompts([{column: messages}], None, "data")
    for last in ({"role": "tool", "content": "4"}, user("and 3 + 3?"), {"role": "system", "content": "be short"}):
        assert build_prompts([{"messages": [*messages, last]}], None, "data")[0].messages[-1] == last
    assert build_prompts([{"messages": messages}], "{messages[0][content]}", "data")[0].messages == (user("2 + 2?"),)
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert build_prompts([{"messages": [called, user("well?")]}], None, "data")


def test_rows_that_are_too_long_are_counted_and_named(chars: Renderer) -> None:
    texts = ["a" * n for n in (3, 40, 31, 32, 50)]
    prompts = build_prompts([{"prompt": text} for text in texts], None, "data")
    with pytest.raises(UserError) as raised:
        prompt_ids(prompts, "data", chars, recipe_of(32), print)
    assert str(raised.value) == (
        "data: 3 of 5 rows are too long: rollout.max_context 32 leaves room for 31 tokens, row 4 has 50 tokens "
        "(too long: 1, 3, 4)"
    )
    assert [len(ids) for ids in prompt_ids(prompts, "data", chars, recipe_of(51), print)] == [3, 40, 31, 32, 50]
    huge = build_prompts([{"prompt": "a"}, {"prompt": "a" * 200_000_000}], None, "data")
    with pytest.raises(UserError, match="1 of 2 rows are too long: .* row 1 has over 51,000 characters"):
        prompt_ids(huge, "data", chars, recipe_of(51), print)
    with pytest.raises(UserError, match="data: row 1 makes an empty prompt"):
        prompt_ids(build_prompts([{"prompt": "a"}, {"prompt": ""}], None, "data"), "data", chars, recipe_of(9), print)


def test_characters_that_the_tokenizer_lacks_are_said_and_counted(chars: Renderer, tmp_path: Path) -> None:
    said: list[str] = []
    rows = [{"prompt": text, "completion": "b"} for text in ("a", "\u00e9\u00fc", "b\u00e9")]
    prompt_ids(build_prompts(rows, None, "data"), "data", chars, recipe_of(9), said.append)
    assert said == [
        "data: 2 of 3 prompts hold characters that the tokenizer lacks ('\u00e9', '\u00fc'): all of them become <unk>"
    ]
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "completion": c}) + "\n" for c in ("b", "\u00e9")))
    said.clear()
    assert len(demonstrations_of(Data(source=str(file)), chars, recipe_of(9), said.append)) == 2
    assert said[0].startswith("sft.data: 1 of 2 completions hold characters")
