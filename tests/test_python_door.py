"""The commands as Python functions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cispo
from cispo.api import _as_command, _run
from cispo.errors import UserError
from cispo.recipe.load import load_recipe
from cispo.recipe.resume import _FREE, difference
from cispo.recipe.user_code import give, given, load_object
from cispo.rollout.reward_function import load_function
from tests.varied_reward import varied

ROOT = Path(__file__).parents[1]


def test_import_is_light_and_modules_do_not_hide_the_verbs():
    code = (
        "import sys, cispo; heavy = {'torch', 'ray', 'pydantic', 'typer', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; import cispo.evaluate, cispo.compare.plan; "
        "assert callable(cispo.evaluate) and callable(cispo.compare) and 'train' in dir(cispo); "
        "from cispo.evaluate import evaluate_set; assert cispo.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_shell_completes_commands():
    asked = {**os.environ, "_CISPO_COMPLETE": "complete_bash", "COMP_WORDS": "cispo ev", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "cispo.cli"], env=asked, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["evaluate"]


def test_a_resumed_run_may_have_other_limits_of_a_reward():
    keys = ["reward.functions=[{fn: 'tests.varied_reward:varied', timeout: 5}]", "logging=[tensorboard]"]
    before = load_recipe("quickstart", keys)
    for change, found in (
        ("[{fn: 'tests.varied_reward:varied', timeout: 50, concurrency: 3}]", None),
        ("[{fn: 'tests.varied_reward:varied', weight: 2}]", ("reward.functions.0.weight", 1.0, 2.0)),
    ):
        now = load_recipe("quickstart", [f"reward.functions={change}", "logging=[]", "reward.workers=9"])
        assert difference(before, now, free=_FREE) == found


def test_functions_are_named_by_import_or_sent_by_value():
    bonus = 2.0

    def local(completion, **_):
        return bonus * len(completion)

    assert give(varied, "rewards") == "tests.varied_reward:varied" and given(["tests.varied_reward:varied"]) == ()
    assert give(local, "rewards") == "__main__:local"
    ((path, pickled),) = given(["__main__:local"])
    # A process that has nothing but the message.
    code = (
        "import sys, pickle; from cispo.recipe.user_code import take_given; "
        "from cispo.rollout.reward_function import *; "
        "take_given((('__main__:local', sys.stdin.buffer.read()),)); "
        "f = load_function('__main__:local', {}, 'key'); print(f.invoke({'completion': 'abc'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True, cwd=ROOT)
    assert path == "__main__:local" and float(done.stdout) == 6.0
    assert load_function("__main__:local", {}, "key").signature.required == frozenset()
    with pytest.raises(UserError, match="'__main__:other' is defined in a script or notebook: start or resume"):
        load_object("__main__:other", "reward.functions.0.fn")
    lock = __import__("threading").Lock()
    with pytest.raises(UserError, match="rewards: __main__:holds cannot be sent to a process: TypeError"):

        def holds(completion):
            return lock

        give(holds, "rewards")


def test_a_reward_of_a_notebooks_cell():
    """Its code names a file that a process of its own does not find."""
    names = {"__name__": __name__}
    exec(compile("def cell(completion, **_):\n    return 0.5\n", "/tmp/ipykernel_1/2.py", "exec"), names)
    assert load_function(give(names["cell"], "rewards"), {}, "key").invoke({"completion": "a"}) == 0.5


def test_changes_and_rewards_become_a_recipe(tmp_path: Path):
    def mine(completion, **_):
        return 0.0

    changes = {"learner": {"lr": 3e-7, "betas": [0.5, 0.75]}, "output_dir": "a b: {c}", "train": {"steps": 7}}
    with _as_command("quickstart", [varied, (mine, 0.5)], changes) as (path, items):
        recipe = load_recipe(path, items)
    assert recipe.learner.lr == 3e-7 and recipe.learner.betas == (0.5, 0.75) and recipe.learner.ranks == 2
    assert recipe.output_dir == "a b: {c}" and recipe.train.steps == 7 and recipe.train.eval_every == 25
    assert recipe.reward is not None
    assert [(t.fn, t.weight) for t in recipe.reward.functions] == [
        ("tests.varied_reward:varied", 1.0),
        ("__main__:mine", 0.5),
    ]
    # As a mapping, and as a recipe that was loaded before.
    for form in ({"base": "quickstart", "seed": 5}, recipe.model_copy(update={"seed": 5})):
        with _as_command(form, (), {}) as (path, items):
            assert load_recipe(path, items).seed == 5
    with pytest.raises(UserError, match="two functions are called mine"), _as_command(recipe, [mine, mine], {}):
        pass
    with pytest.raises(UserError, match="rewards must be a list of functions"), _as_command(recipe, mine, {}):  # type: ignore[arg-type]
        pass
    with pytest.raises(UserError, match="Object of type set is not JSON"), _as_command(recipe, (), {"train": {1}}):
        pass


def test_a_command_runs_beside_a_running_loop():
    """As in a notebook: in a thread, with the command's own loop, and its errors."""

    async def answer() -> int:
        return 42

    def refuse() -> int:
        raise UserError("no")

    async def cell() -> None:
        assert _run(lambda: asyncio.run(answer())) == 42
        with pytest.raises(UserError, match="no"):
            _run(refuse)

    asyncio.run(cell())
    assert callable(cispo.train)


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("QUICKSTART_STEPS", "3")
    monkeypatch.setenv("QUICKSTART_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert "notebook" in str(outputs[2]) and "image/png" in str(outputs[3]) and "text/plain" in str(outputs[5])
    assert (tmp_path / "runs" / "notebook" / "metrics.jsonl").exists()
