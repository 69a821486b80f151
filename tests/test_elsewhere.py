"""Runs and comparisons that are started in one directory and continued from another.

A project's recipe names the tokenizer beside it and rows in the directory of the start, for real runs a variable of the
environment too. Commands run in this process with the small torch engine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from cispo import cli
from cispo.errors import UserError
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.recipe.resume import check_same_run, output_dirs
from cispo.recipe.schema import Recipe
from tests.bad_inputs import CHARS, values

ROOT = Path(__file__).parents[1]
SECRET = "s3cr3t-of-the-environment"
ROWS = """
def rows(token, file="rows.txt", size=4):
    assert token == "s3cr3t-of-the-environment"
    for number in range(size):
        yield {"prompt": f"{number}>", "answer": str(number)}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("CISPO_TOKEN", SECRET)
    home = tmp_path / "home"
    (home / "conf").mkdir(parents=True)
    (home / "conf" / "tok").symlink_to(CHARS)
    (home / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}>", "answer": str(n)}) + "\n" for n in range(4))
    )
    (home / "secret_rows.py").write_text(ROWS)
    data = {"source": "secret_rows:rows", "args": {"token": "${oc.env:CISPO_TOKEN}"}}
    recipe = {**values(), "name": "r", "data": {"source": "rows.jsonl"}, "eval": data}
    recipe["policy"] = {**yaml.safe_load(yaml.safe_dump(values()["policy"])), "tokenizer": "tok"}
    recipe["train"] = {"steps": 1, "eval_every": 1, "save_every": 1}
    (home / "conf" / "r.yaml").write_text(yaml.safe_dump(recipe))
    sys.path.append(str(home))
    monkeypatch.chdir(home)
    return home


def cispo(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cispo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def holds_the_secret(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_a_run_goes_on_from_other_directories(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = project / "runs" / "r"
    cispo(monkeypatch, "train", "conf/r.yaml")
    assert steps(run) == [0, 1]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["output_dir"] == str(project / "runs")
    monkeypatch.chdir(tmp_path)
    cispo(monkeypatch, "train", "home/conf/r.yaml", "--resume", f"output_dir={project / 'runs'}", "train.steps=2")
    cispo(monkeypatch, "train", run / "recipe.yaml", "--resume", "train.steps=3")
    monkeypatch.chdir(project / "conf")
    cispo(monkeypatch, "train", "r.yaml", "--resume", "output_dir=../runs", "train.steps=4")
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    cispo(monkeypatch, "train", "moved/runs/r/recipe.yaml", "--resume", "train.steps=5")
    assert steps(tmp_path / "moved" / "runs" / "r") == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "runs").exists() and not holds_the_secret(tmp_path / "moved" / "runs")


def test_a_comparison_goes_on_from_another_directory(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cispo(monkeypatch, "compare", "conf/r.yaml", "--seeds", "1")
    outcome = project / "runs" / "r-compare" / "arms" / "cispo" / "seed_0" / "outcome.json"
    before = outcome.read_bytes()
    assert b"${oc.env:CISPO_TOKEN}" in before
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").symlink_to(project / "rows.jsonl")
    cispo(monkeypatch, "compare", "home/conf/r.yaml", f"output_dir={project / 'runs'}", "--seeds", "1")
    assert outcome.read_bytes() == before and not holds_the_secret(project / "runs")


# The check of a resume alone


@pytest.fixture
def sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its tokenizer beside it, and rows where the run was started; and the run's folder."""
    home = tmp_path / "home"
    (home / "conf" / "tok").mkdir(parents=True)
    (home / "conf" / "tok" / "tokenizer.json").write_text("{}")
    (home / "rows.jsonl").write_text("{}")
    text = "name: r\npolicy: {config: {}, tokenizer: tok}\ndata: {source: rows.jsonl}\n"
    (home / "conf" / "r.yaml").write_text(text)
    (home / "runs" / "r").mkdir(parents=True)
    monkeypatch.chdir(home)
    return home


def store(folder: Path, recipe: Recipe) -> Path:
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    return folder


def test_a_run_goes_on_from_another_directory(sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = store(sketch / "runs" / "r", load_recipe("conf/r.yaml"))
    for place in (sketch, sketch / "conf", tmp_path):
        monkeypatch.chdir(place)
        for path in (sketch / "conf" / "r.yaml", os.path.relpath(sketch / "conf" / "r.yaml")):
            recipe = check_same_run(load_recipe(path), run)
            assert recipe.data is not None and Path(recipe.data.source) == sketch / "rows.jsonl"
            assert Path(recipe.policy.tokenizer or "") == sketch / "conf" / "tok"
    (tmp_path / "rows.jsonl").write_text("other rows")
    with pytest.raises(UserError, match="has data.source '.*home/rows.jsonl', not '.*rows.jsonl'"):
        check_same_run(load_recipe(sketch / "conf" / "r.yaml"), run)


def test_a_run_of_an_earlier_version_goes_on_from_another_directory(
    sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It has stored paths as they were typed, or as they were found beside the recipe."""
    run = sketch / "runs" / "r"
    recipe = load_recipe("conf/r.yaml")
    typed = recipe.model_copy(
        update={
            "policy": recipe.policy.model_copy(update={"tokenizer": "conf/tok"}),
            "data": recipe.data and recipe.data.model_copy(update={"source": "rows.jsonl"}),
        }
    )
    store(run, typed)
    monkeypatch.chdir(tmp_path)
    found = check_same_run(load_recipe(sketch / "conf" / "r.yaml"), run)
    assert found.data is not None and Path(found.data.source) == sketch / "rows.jsonl"


def test_a_moved_or_copied_project_goes_on(sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store(sketch / "runs" / "r", load_recipe("conf/r.yaml"))
    shutil.copytree(sketch, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert check_same_run(load_recipe("conf/r.yaml"), tmp_path / "copy" / "runs" / "r")
    shutil.move(sketch, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert check_same_run(load_recipe("conf/r.yaml"), tmp_path / "moved" / "runs" / "r")
    (tmp_path / "copy" / "conf" / "tok" / "tokenizer.json").write_text("{ }")
    run = store(tmp_path / "moved" / "runs" / "r", load_recipe("conf/r.yaml"))
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(UserError, match="has policy.tokenizer"):
        check_same_run(load_recipe("conf/r.yaml"), run)


def test_a_run_of_a_recipes_file_goes_on_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the installed recipe lies elsewhere than the file, with the same content."""
    monkeypatch.chdir(ROOT)
    assert check_same_run(load_recipe("quickstart"), store(tmp_path, load_recipe("recipes/quickstart.yaml")))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    assert check_same_run(load_recipe("quickstart"), store(tmp_path, load_recipe("recipes/quickstart.yaml")))


def test_runs_are_found_beside_the_recipe_and_around_it(sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe("conf/r.yaml")
    assert output_dirs(recipe, "conf/r.yaml", []) == ["runs", "conf/runs"]
    assert output_dirs(recipe, "conf/r.yaml", ["output_dir=runs"]) == ["runs"]
    store(sketch / "runs" / "r", recipe)
    monkeypatch.chdir(tmp_path)
    places = output_dirs(recipe, "home/runs/r/recipe.yaml", ["seed=1"])
    assert places == ["runs", "home/runs/r/runs", str(sketch / "runs")]
