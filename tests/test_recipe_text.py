"""The text of recipes and overrides: numbers, quotes, keys that stand twice, interpolations, hostile YAML."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cispo.errors import UserError
from cispo.recipe.load import changed, dump_yaml, load_recipe, stored_recipe
from cispo.recipe.resume import difference
from cispo.recipe.text import MAX_BYTES, read_text, read_value, write_text

MINIMAL = "policy: {config: {model_type: minimax}, tokenizer: t}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1e-6", 1e-6),
        ("-1.5E+3", -1500.0),
        ("1.e5", 100000.0),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("1_000", 1000),
        ("12_345_678", 12345678),
        ("1_000.5", 1000.5),
        ("2024_11", "2024_11"),
        ("1_0", "1_0"),
        ("010", 10),
        ("08", 8),
        ("0o14", 12),
        ("0x1F", 31),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("v1", "v1"),
        (".", "."),
        ("=", "="),
        ("<<", "<<"),
        ("yes", True),
        ("~", None),
        ("'1e-2'", "1e-2"),
    ],
)
def test_numbers_are_read_as_a_person_reads_them(tmp_path: Path, text: str, value: object):
    file = write(tmp_path, MINIMAL.replace("t}", f"t}}\ndata: {{source: s, args: {{x: {text}}}}}"))
    for recipe in (load_recipe(file), load_recipe(write(tmp_path, MINIMAL), ["data.source=s", f"data.args.x={text}"])):
        assert recipe.data is not None and repr(recipe.data.args) == repr({"x": value})
        stored = stored_recipe(dump_yaml(recipe), where="w")
        assert stored.data is not None and repr(stored.data.args) == repr({"x": value})
    config = load_recipe(write(tmp_path, f"policy: {{config: {{x: {text}}}, tokenizer: t}}")).policy.config
    assert repr(config) == repr({"x": value})


def test_a_key_that_holds_text_takes_it_as_it_is_written(tmp_path: Path):
    file = write(
        tmp_path, MINIMAL.replace("tokenizer: t", "tokenizer: 007") + "name: 2024_11\noutput_dir: 2024-01-01\n"
    )
    recipe = load_recipe(file)
    assert (recipe.policy.tokenizer, recipe.name, recipe.output_dir) == ("007", "2024_11", "2024-01-01")
    for text in ("2024_11", "007", "1e3", "no", "null_"):
        assert load_recipe(file, [f"name={text}"]).name == text
    shared = "name: &n 2024_11\ndata: {source: *n, args: {x: *n, y: &m 7}, split: *m}\n"
    data = load_recipe(write(tmp_path, MINIMAL + shared)).data
    assert data is not None and (data.source, data.split, data.args) == ("2024_11", "7", {"x": "2024_11", "y": 7})


@pytest.mark.parametrize(
    "text",
    ["{prompt}=", "{a: [b}", "[", "a: b", "{x}: {y}, {z}", "a # b", " = ", "&a *b", "!!int x", "%", "@x", "'a' or 'b'",
     '"', "- a", "|", "1e-2", "true", "{prompt}\n"],
)  # fmt: skip
def test_override_text_of_a_key_that_holds_text_is_literal(tmp_path: Path, text: str):
    data = load_recipe(write(tmp_path, MINIMAL), ["data.source=s", f"data.prompt={text}"]).data
    assert data is not None and data.prompt == text
    stored = stored_recipe(
        dump_yaml(load_recipe(tmp_path / "r.yaml", ["data.source=s", f"data.prompt={text}"])), where=""
    )
    assert stored.data == data


def test_quotes_null_and_escapes_in_overrides(tmp_path: Path):
    file = write(tmp_path, MINIMAL)
    for text, value in (
        ("'{x}'", "{x}"),
        ('"a\\nb"', "a\nb"),
        ("null", None),
        ("", None),
        (r"\${x}", "${x}"),
        ("$x ${name}", "$x run"),
    ):
        data = load_recipe(file, ["name=run", "data.source=s", f"data.prompt={text}"]).data
        assert data is not None and data.prompt == value, text
    for item, message in (
        ("data.prompt=${", r"data.prompt: .*is written \\\$\{"),
        ("data.args.x={y}=", "override 'data.args.x={y}=' is not valid YAML.*goes in quotes"),
        ("train.steps=[", "override 'train.steps=\\[' is not valid YAML"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(file, ["data.source=s", item])
        assert "\n" not in str(caught.value)
    assert read_value("{lr: 1e-2}", "learner", "w") == {"lr": 0.01}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {lr: 1}\nlearner: {eps: 1}\n", "line 3: the key learner stands in line 2 already"),
        ("learner:\n  lr: 1\n  eps: 1\n  lr: 2\n", "line 5: the key learner.lr stands in line 3 already"),
        ("data: {source: s, args: {a: [{b: 1, c: 2, b: 3}]}}\n", "the key data.args.a.b stands in line 2 already"),
        (
            "reward:\n  functions:\n    - {fn: a}\n    - {fn: b, fn: c}\n",
            "the key reward.functions.fn stands in line 5",
        ),
        ("data: {source: s, args: {1: a, '1': b}}\n", "the key data.args.1 stands in line 2 already"),
        ("eval: &e {source: s, source: t}\n", "the key eval.source stands"),
    ],
)
def test_a_key_twice_is_refused_at_any_level(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, MINIMAL + text))
    write(tmp_path, MINIMAL + text, "base.yaml")
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, "base: base.yaml\n"))
    with pytest.raises(UserError, match=message):
        stored_recipe(MINIMAL + text, where="w")


def test_merged_keys_are_not_twice(tmp_path: Path):
    text = "data: {source: s, args: &a {x: 1, y: 2}}\neval: {source: s, args: {<<: *a, x: 3}}\n"
    held_out = load_recipe(write(tmp_path, MINIMAL + text)).eval
    assert held_out is not None and not isinstance(held_out, list) and held_out.args == {"x": 3, "y": 2}


def test_keys_of_args_are_text_in_every_command(tmp_path: Path):
    config = "policy: {config: {id2label: {0: a, 1: b}, flags: {yes: 1, no: 0}}, tokenizer: t}\n"
    recipe = load_recipe(write(tmp_path, config))
    assert recipe.policy.config == {"id2label": {"0": "a", "1": "b"}, "flags": {"yes": 1, "no": 0}}
    assert stored_recipe(dump_yaml(recipe), where="w") == recipe


def test_what_is_written_is_read_back():
    values = {
        "a": ["1e-2", "2024_11", "12:30", "010", "0o14", "1_000", "yes", "null", "", "<<", "=", "~", "x: y", "\u2028"],
        "1": {"yes": 1e-6, "null": float("inf"), "-": [None, True, 10**18, {}]},
    }
    assert repr(read_text(write_text(values), "w")) == repr(values)


def test_hostile_yaml_ends_in_a_second(tmp_path: Path):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    echoes = "".join(f"    a{i}: '{f'${{policy.config.a{i - 1}}}' * 9}'\n" for i in range(1, 12))
    for text in (
        bomb,
        bomb.replace(": &", ": &").replace("[*", "[*"),
        "policy:\n  tokenizer: t\n  config:\n    a0: lol\n" + echoes,
        "a: " + "[" * (MAX_BYTES - 10),
        "a: " + "{" * 1000 + "}" * 1000,
        "x" * (MAX_BYTES + 1),
    ):
        started = time.process_time()
        with pytest.raises(UserError):
            load_recipe(write(tmp_path, text))
        assert time.process_time() - started < 5.0


def test_secrets_of_the_environment_stay_out_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CISPO_SECRET", "hush")
    text = "data: {source: s, args: {token: '${oc.env:CISPO_SECRET}', twice: '${data.args.token}!', lit: '\\${x}'}}\n"
    recipe = load_recipe(write(tmp_path, MINIMAL + text), ["critic.lr=0.5", "learner.lr=${critic.lr}"])
    assert recipe.data is not None and recipe.data.args == {"token": "hush", "twice": "hush!", "lit": "${x}"}
    assert recipe.learner.lr == 0.5
    written = dump_yaml(recipe)
    assert "hush" not in written and "${oc.env:CISPO_SECRET}" in written
    again = stored_recipe(written, where="w")
    assert again == recipe and dump_yaml(again) == written
    arm = changed(recipe, {"algorithm": {"name": "grpo"}}, where="arm")
    assert arm.data == recipe.data and "hush" not in dump_yaml(arm.model_copy(update={"name": "x"}))
    monkeypatch.setenv("CISPO_SECRET", "another")
    assert difference(stored_recipe(written, where="w"), recipe) is None
    monkeypatch.delenv("CISPO_SECRET")
    with pytest.raises(UserError, match="data.args.token: .*CISPO_SECRET"):
        stored_recipe(written, where="w")


def test_interpolations_without_the_environment_are_stored_resolved(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "seed: 3\neval: {source: s, args: {seed: '${seed}'}}\n"))
    assert "seed: 3" in dump_yaml(recipe).split("eval:")[1] and "${" not in dump_yaml(recipe)


@pytest.mark.parametrize("name", [".", "..", "-rf", ".hidden", "--", "a/b", "", "a" * 101])
def test_names_that_are_no_folder_of_a_run(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="name = "):
        load_recipe(write(tmp_path, MINIMAL + f"name: '{name}'\n"))


def test_true_is_no_number_and_no_number_is_nan(tmp_path: Path):
    for key in ("train.steps", "learner.lr", "algorithm.kl_coef", "rollout.group_size", "reward.timeout", "seed"):
        with pytest.raises(UserError, match="reward|= True: input should be a number"):
            load_recipe(write(tmp_path, MINIMAL), [f"{key}=true"])
    for key in ("learner.lr", "algorithm.ratio_max", "algorithm.clip_low", "algorithm.gamma", "control.window"):
        with pytest.raises(UserError, match=f"{key} = nan"):
            load_recipe(write(tmp_path, MINIMAL), [f"{key}=.nan"])
    assert load_recipe(write(tmp_path, MINIMAL), ["learner.share_prompts=yes"]).learner.share_prompts
