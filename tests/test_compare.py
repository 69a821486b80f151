"""`cispo compare`: which arms a command line spans, that nothing ended runs again, and that an arm equals itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cispo.compare.plan import Plan, make_plan
from cispo.errors import UserError
from tests.test_end_to_end import QUICKSTART, ROOT, SMALL, VARIED

ARMS = ["train.steps=2", "train.eval_every=1", "sft.steps=3", "algorithm.ratio_max=null"]
ARMS += [VARIED]


def plan(*items: str, algorithms: str | None = None, updates: str | None = None, **keys: Any) -> Plan:
    given = {"seeds": 2, "metric": "eval/accuracy", "name": None, **keys}
    return make_plan(items or (str(QUICKSTART),), algorithms=algorithms, updates=updates, **given)


def test_arms_are_recipes_times_algorithms_times_updates(tmp_path: Path):
    other = tmp_path / "wide.yaml"
    other.write_text(f"base: {QUICKSTART}\nname: wide\nalgorithm: {{ratio_max: 8.0}}\n")
    found = plan(str(QUICKSTART), str(other), algorithms="cispo, grpo(kl_coef=0)", updates="1,4").arms
    assert [(arm.setting, arm.name) for arm in found] == [
        (f"{recipe} k={k}", name)
        for recipe in ("quickstart", "wide")
        for k in (1, 4)
        for name in ("cispo", "grpo(kl_coef=0)")
    ]
    assert len({arm.folder_name for arm in found}) == len(found)
    # A recipe's settings are its own algorithm's; the others have their defaults.
    assert [arm.recipe.algorithm.ratio_max for arm in found] == [5.0, None, 5.0, None, 8.0, None, 8.0, None]
    assert [arm.recipe.algorithm.kl_coef for arm in found][:2] == [None, 0]
    assert [arm.recipe.algorithm.updates_per_batch for arm in found][:4] == [1, 1, 4, 4]
    assert {arm.recipe.train.max_prompts for arm in found} == {150 * 16}


def test_recipes_alone_are_arms_of_one_setting(tmp_path: Path):
    other = tmp_path / "wide.yaml"
    other.write_text(f"base: {QUICKSTART}\nalgorithm: {{ratio_max: 8.0}}\n")
    found = plan(str(QUICKSTART), str(other)).arms
    assert [(arm.name, arm.setting) for arm in found] == [("quickstart", ""), ("wide", "")]


def test_changes_on_the_command_line_hold_for_every_arm():
    found = plan(str(QUICKSTART), "algorithm.kl_coef=0", "algorithm.epochs=2", algorithms="cispo,grpo,ppo").arms
    assert {(arm.recipe.algorithm.kl_coef, arm.recipe.algorithm.epochs) for arm in found} == {(0, 2)}


def test_an_arm_named_twice_is_two_arms():
    assert [arm.name for arm in plan(algorithms="cispo,cispo").arms] == ["cispo", "cispo #2"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"algorithms": "cispo,grop"}, "arm grop: algorithm.name 'grop' is unknown .did you mean grpo"),
        ({"algorithms": "cispo,,ppo"}, "a name is empty"),
        ({"algorithms": "grpo(kl)"}, "'kl' in 'grpo.kl.' is not of the form key=value"),
        ({"algorithms": "grpo(ratio_max=3)"}, "arm grpo.*ratio_max means nothing to grpo"),
        ({"algorithms": "grpo(colour=red)"}, "unknown key algorithm.colour"),
        ({"algorithms": "grpo)("}, "not of the form name"),
        ({"updates": "4,none"}, "'none' is not a positive number"),
        ({"updates": "4,0"}, "'0' is not a positive number"),
        ({"updates": "5000"}, "more than the 256 completions"),
    ],
)
def test_refused_plans(keys: dict, message: str):
    with pytest.raises(UserError, match=message):
        plan(**keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reward: {functions: [{fn: 'rewards.numeric:numeric'}]}", "different tasks: their reward: sections differ"),
        ("eval: {args: {size: 100}}", "different tasks: their eval: sections"),
        ("policy: {config: {hidden_size: 64}}", "different tasks: their policy: sections"),
        ("train: {steps: 10}", "different budgets"),
        ("rollout: {group_size: 4}", "different budgets"),
    ],
)
def test_recipes_of_different_tasks_are_refused(tmp_path: Path, change: str, message: str):
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {QUICKSTART}\n{change}\n")
    with pytest.raises(UserError, match=message):
        plan(str(QUICKSTART), str(other))


def command(folder: Path, *arguments: str) -> list[str]:
    recipe = [str(QUICKSTART), f"output_dir={folder}", *SMALL, *ARMS]
    return [sys.executable, "-m", "cispo.cli", "compare", *recipe, *arguments]


def compare(folder: Path, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout + done.stderr).split())


BROKEN = """
from dataclasses import replace
from cispo.algorithms import ALGORITHMS
from cispo.algorithms.losses import Cispo

class Backwards(Cispo):
    def __call__(self, x):
        result = super().__call__(x)
        return result._replace(loss=-result.loss, weight=-result.weight)

def infinite(x):
    result = ALGORITHMS["cispo"].loss(x)
    return result._replace(loss=result.loss * float("inf"))

BACKWARDS = replace(ALGORITHMS["cispo"], name="backwards", loss=Backwards(ratio_max=5.0))
INFINITE = replace(ALGORITHMS["cispo"], name="infinite", loss=infinite, zero_variance="keep")
"""


def test_compare_resume_and_report(tmp_path: Path):
    """Three arms run and are reported; run again, nothing that ended runs anew; stored results are held against."""
    # Entropy, since such short runs answer nothing right: an accuracy of 0 would be equal in any case.
    arms = ("--algorithms", "cispo,cispo,ppo", "--seeds", "2", "--metric", "entropy")
    out = compare(tmp_path, *arms)
    folder = tmp_path / "quickstart-compare"
    assert "0 of 6 runs ended" in out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == ["cispo", "cispo #2", "ppo"]
    # The same algorithm with the same seeds is the same run: the differences are zeros, not small numbers.
    same = [d for d in results["differences"] if d["arm"] == "cispo #2"]
    assert same and all(value == 0 for d in same for value in d["values"])
    assert "cispo #2 - cispo = 0 in final entropy: exactly equal" in out
    other = [d for d in results["differences"] if d["arm"] == "ppo" and d["measure"] == "final"]
    assert all(value != 0 for d in other for value in d["values"])
    page = (folder / "report.html").read_text()
    assert "ppo" in page and "data:image/png" in page and 'src="http' not in page
    history = [json.loads(line) for line in (folder / "arms/ppo/seed_1/metrics.jsonl").read_text().splitlines()]
    assert history[-1]["total/prompts"] == 4 and "critic/explained_variance" in history[-1]

    # An outcome of an earlier version: with a key that is removed, and without one that is newer.
    first = folder / "arms" / "ppo" / "seed_0" / "outcome.json"
    outcome = json.loads(first.read_text())
    identity = outcome["identity"].replace("  value_clip: 0.2\n", "")
    identity = identity.replace("  repetition:\n", "  top_p: 1.0\n  repetition:\n")
    assert identity != outcome["identity"]
    first.write_text(json.dumps(outcome | {"identity": identity}))
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("outcome.json")}
    assert len(before) == 6
    assert "6 of 6 runs ended" in compare(tmp_path, *arms, "--assert-equal", str(folder / "results.json"))
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("outcome.json")} == before

    stored = tmp_path / "stored.json"
    results["arms"]["ppo"]["seeds"]["0"]["final"] = 0.77
    stored.write_text(json.dumps(results))
    assert "1 differences, the first: ppo, seed 0: final is" in compare(
        tmp_path, *arms, "--plot-only", "--assert-equal", str(stored), code=1
    )
    refused = compare(tmp_path, *arms, "learner.lr=1", code=2)
    assert "holds a run of another recipe" in refused
    assert "did you mean 'eval/accuracy'" in compare(tmp_path, *arms, "--plot-only", "--metric", "eval/acuracy", code=2)
    one = compare(tmp_path, "--algorithms", "cispo,ppo", "--seeds", "1", "--metric", "entropy", "--plot-only", "--fit")
    assert "with 1 seed: there is no interval" in one


def test_a_killed_comparison_loses_nothing_that_ended(tmp_path: Path):
    arms = ("--algorithms", "cispo,grpo,rloo", "--seeds", "2")
    folder = tmp_path / "quickstart-compare"
    process = subprocess.Popen(command(tmp_path, *arms), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("outcome.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the comparison ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {f: f.stat().st_mtime_ns for f in folder.rglob("outcome.json")}
    assert 2 <= len(kept) < 6
    assert f"{len(kept)} of 6 runs ended" in compare(tmp_path, *arms)
    after = {f: f.stat().st_mtime_ns for f in folder.rglob("outcome.json")}
    assert len(after) == 6 and kept.items() <= after.items()
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    compare(undisturbed, *arms, "--assert-equal", str(folder / "results.json"))


def test_an_arm_that_breaks_does_not_end_the_others(tmp_path: Path):
    (tmp_path / "own.py").write_text(BROKEN)
    updates = "algorithm.updates_per_batch=6"
    out = compare(tmp_path, updates, "--algorithms", "cispo,own:INFINITE,own:BACKWARDS", "--seeds", "1")
    folder = tmp_path / "quickstart-compare" / "arms"
    outcome = json.loads((folder / "own_INFINITE" / "seed_0" / "outcome.json").read_text())
    assert outcome["status"] == "diverged" and "not finite" in outcome["sentence"]
    assert json.loads((folder / "own_BACKWARDS" / "seed_0" / "outcome.json").read_text())["status"] == "done"
    assert "own:INFINITE" in out and "not finite" in out
    # It would end the same way again, so it is not run again.
    again = compare(tmp_path, updates, "--algorithms", "cispo,own:INFINITE,own:BACKWARDS", "--seeds", "1")
    assert "3 of 3 runs ended" in again


def test_nothing_to_report_yet(tmp_path: Path):
    assert "there is no comparison in" in compare(tmp_path, "--algorithms", "cispo,grpo", "--plot-only", code=2)
    assert "is not the results.json" in compare(tmp_path, "--assert-equal", str(ROOT / "recipes/schema.json"), code=2)


@pytest.mark.slow
def test_an_arm_against_itself_and_against_a_broken_one(tmp_path: Path):
    """Three seeds of the quick recipe through Ray and vLLM, 10 to 20 minutes: the same seeds differ by exactly 0,
    other seeds by an interval that contains 0, and a loss with the wrong sign is flagged as worse."""
    (tmp_path / "own.py").write_text(BROKEN)
    quick = ROOT / "recipes" / "compare_quick.yaml"
    text = quick.read_text().replace("base: quickstart.yaml", f"base: {QUICKSTART}")
    for name, change in (("same", ""), ("other", "seed: 100\n"), ("broken", "")):
        own = text.replace("name: cispo", "name: own:BACKWARDS") if name == "broken" else text
        (tmp_path / f"{name}.yaml").write_text(own + change)
    recipes = [str(quick), *(str(tmp_path / f"{name}.yaml") for name in ("same", "other", "broken"))]
    done = subprocess.run(
        [sys.executable, "-m", "cispo.cli", "compare", *recipes, "--seeds", "3", "rollout.engine=vllm"]
        + [f"output_dir={tmp_path}"],
        capture_output=True, text=True, check=False, timeout=3000, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    results = json.loads((tmp_path / "compare_quick-compare" / "results.json").read_text())
    final = {d["arm"]: d for d in results["differences"] if d["measure"] == "final"}
    assert final["same"]["values"] == [0, 0, 0]
    low, high = final["other"]["student"]
    assert low <= 0 <= high and final["other"]["verdict"] == "not resolved"
    assert final["broken"]["verdict"] == "worse" and final["broken"]["student"][1] < -0.1
