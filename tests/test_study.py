"""The study of docs/cispo-vs-baselines.md: its task, the order and merging of its runs, its statistics and pages."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cispo.errors import UserError
from rewards.checking import MARK, demonstrations, problems, worked
from rewards.numeric import numeric

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from scripts.bench_study import run, train, warm_up  # noqa: E402
from scripts.study_plan import ARMS, GRIDS, POLICIES, Queue, Regime, Task, load, tasks_of, tasks_of_grids, warm_folder  # noqa: E402
from scripts.study_report import adjusted, chosen, drops, rows_of, study_of, write_report  # noqa: E402
from scripts.study_results import by_kind  # noqa: E402


def test_a_check_is_rare_and_pays():
    rows = list(demonstrations(20000, seed=1))
    own = [row for row in rows if MARK not in row["prompt"]]
    begun = [row for row in rows if MARK in row["prompt"]]
    assert len(begun) / len(rows) == pytest.approx(0.5, abs=0.02)
    checked = [row for row in own if MARK in row["completion"]]
    assert len(checked) / len(own) == pytest.approx(0.01, abs=0.003)

    def score(row: Mapping[str, str]) -> float:
        prompt, _, _ = row["prompt"].partition("=")
        return numeric(row["completion"], str(eval(prompt)))

    assert all(score(row) == 1 for row in checked + begun)
    glances = [score(row) for row in own if MARK not in row["completion"]]
    assert np.mean(glances) == pytest.approx(1 / 7, abs=0.02), "a glance is off by -3 to 3"


def test_a_check_is_the_sum_a_step_at_a_time():
    assert worked("3+9-5-7+2") == "3+9=12;12-5=7;7-7=0;0+2=2"
    assert numeric("4!3+9=12;12-5=7;7-7=0;0+2=2", "2") == 1 and numeric("4", "2") == 0
    assert numeric("2!3+9=12;12-5=7;7-7=0;0+2=-2", "2") == 0, "the number at the end alone decides"


def test_splits_are_disjoint_and_repeat():
    train, test = ({row["prompt"] for row in problems(2000, 0, terms=4, split=split)} for split in ("train", "test"))
    assert not train & test
    assert list(problems(50, 3)) == list(problems(50, 3))
    with pytest.raises(UserError, match="terms must be at least 2, not 1"):
        next(problems(1, 0, terms=1))


def test_runs_go_seed_after_seed():
    tasks = tasks_of(["small"], [Regime.of("16:0"), Regime.of("4:8")], ["cispo", "grpo"], [1e-4, 3e-4], [0, 1])
    assert len(tasks) == len(set(tasks)) == 16
    assert [task.seed for task in tasks] == [0] * 8 + [1] * 8
    # All arms at one rate come before the next rate, so that an early end leaves pairs.
    assert [task.name for task in tasks[:3]] == [
        "cispo-k16-s0-lr0.0001-seed0", "grpo-k16-s0-lr0.0001-seed0", "cispo-k16-s0-lr0.0003-seed0",
    ]  # fmt: skip


def test_what_ended_is_skipped_and_nothing_starts_too_late(tmp_path: Path):
    tasks = tasks_of(["small"], [Regime(4, 0)], ["cispo", "grpo"], [1e-4], [0, 1])
    done = tasks[0].file(tmp_path)
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    queue = Queue(tmp_path, tasks, starts=1, deadline=100.0, expect=30.0)
    assert [task.name for task in queue.waiting] == [task.name for task in tasks[1:]]
    # The warm-up goes first; meanwhile nothing else can.
    first = queue.next(0.0)
    assert not isinstance(first, str) and (first.policy, first.start, first.task) == ("small", 0, None)
    assert queue.next(0.0) == "wait"
    warm_folder(tmp_path, "small", 0).mkdir(parents=True)
    order = queue.next(10.0)
    assert not isinstance(order, str) and order.task == tasks[1] and order.start == 0
    # A run like it took 60 s: at 41 s none fits, at 40 s one does.
    queue.ended(order, 60.0)
    assert queue.next(41.0) == "end"
    later = queue.next(40.0)
    assert not isinstance(later, str) and later.task == tasks[2]


def test_a_broken_warm_up_takes_its_runs_along(tmp_path: Path):
    queue = Queue(
        tmp_path, tasks_of(["small"], [Regime(4, 0)], ["cispo"], [1e-4], [0, 1]), starts=0, deadline=9.0, expect=1.0
    )
    first, second = queue.next(0.0), queue.next(0.0)
    assert not isinstance(first, str) and not isinstance(second, str)
    queue.failed(first)
    warm_folder(tmp_path, "small", 1).mkdir(parents=True)
    order = queue.next(0.0)
    assert not isinstance(order, str) and order.task is not None and order.task.seed == 1
    assert queue.next(0.0) == "end"


def test_a_rate_is_chosen_by_the_other_seeds():
    # Seed 2 alone likes the second rate: it gets the first, by which it loses; the others get theirs as well.
    table = {1e-4: {0: 0.5, 1: 0.6, 2: 0.1}, 3e-4: {0: 0.4, 1: 0.4, 2: 0.9}}
    assert chosen(table) == {0: 3e-4, 1: 3e-4, 2: 1e-4}
    assert chosen({1e-4: {0: 0.5, 1: 0.3}, 3e-4: {0: 0.6}}) == {0: 3e-4}, "a seed needs every rate"
    assert chosen({}) == {}


def result(task: Task, final: float) -> dict[str, Any]:
    """A run of 4 steps whose accuracy rises in a line."""
    history = [
        {"step": s, "total/tokens": 100 * s, "total/completions": 32 * s, "total/seconds": s, "entropy": 0.5,
         "eval/accuracy": final * s / 4, "eval/accuracy_stderr": 0.01}
        for s in range(5)
    ]  # fmt: skip
    counts = {name: 10 for name in ("pos", "neg")}
    counts |= {f"{name}_{sign}": 2 for name in ("ppo_dropped", "dropped") for sign in ("pos", "neg")}
    kinds = {kind: {**counts, "ratio": [0.5, 0.9, 1.0, 1.1, 2.0]} for kind in ("mark", "other")}
    steps = [{"step": s, "marked": 0.2 * s, "kinds": kinds} for s in range(1, 5)]
    return {
        "task": asdict(task), "start": 0, "status": "done", "seconds": 1.0, "history": history, "steps": steps,
        "held_out": [],
    }  # fmt: skip


def test_a_difference_is_resolved_among_many_comparisons():
    """One arm is truly worse, the others differ by noise: many would be called different without an adjustment."""
    rng = random.Random(0)
    tasks = tasks_of(["small"], [Regime(k, s) for k in (1, 4, 16) for s in (0, 2, 8)], ARMS, [1e-4], range(5))
    found = []
    for task in tasks:
        worse = -0.3 if task.arm == "gspo" and task.regime == Regime(16, 0) else 0.0
        found.append((task, result(task, 0.6 + worse + rng.gauss(0, 0.02))))
    rows = [row for row in rows_of(study_of(found)) if row.measure == "final"]
    resolved = [(row.found.arm, row.regime, row.word) for row in rows if row.word != "not resolved"]
    assert resolved == [("gspo", Regime(16, 0), "worse")]
    naive = [row for row in rows if row.p is not None and row.p < 0.05]
    assert len(rows) == 45 and len(naive) > 1
    # Benjamini and Hochberg's adjustment of known values.
    some = rows[:4]
    again = adjusted(
        [type(r)(r.policy, r.regime, r.measure, r.found, p) for r, p in zip(some, (0.01, 0.04, 0.03, 0.5), strict=True)]
    )
    assert [row.q for row in again] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_results_of_several_machines_merge_into_one_page(tmp_path: Path):
    for task in tasks_of(["small"], [Regime(16, 0)], ARMS, [1e-4, 3e-4], range(3)):
        place = tmp_path / "results" / ("machine_a" if task.seed else "machine_b") / f"{task.name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result(task, 0.5 + 0.01 * task.seed + 1000 * task.lr)))
    write_report(tmp_path, list(load(tmp_path)))
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("36 runs; ")
    assert "| cispo | 0.810 n=3 " in text, "0.5 + 0.01 + 0.3, at the better rate"
    assert "| small | 16 updates, staleness 0 | A > 0 | 20.00% of 0" not in text
    assert "| small | 16 updates, staleness 0 | A > 0 | none | none |" in text, "marks are never rare"
    assert "| gspo | 0.0001: 0.610, 0.0003: 0.810 |" in text, "each rate's mean"
    for name in ("study_small", "study_tokens_small", "study_overview"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_dropped_tokens_are_counted_by_kind():
    ids = np.array([7, 7, 3, 3, 3, 7])
    ratio = np.array([1.5, 1.1, 1.3, 0.7, 0.9, 0.5])
    advantages = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    weight = np.array([0.0, 1.1, 1.3, 0.0, 0.9, 0.5])
    found = by_kind(ids, ratio, weight, advantages, mark=7)
    # A ratio below the band is dropped with a negative advantage alone, one above it with a positive one.
    expected = {"pos": 3, "ppo_dropped_pos": 1, "dropped_pos": 1, "neg": 0, "ppo_dropped_neg": 0, "dropped_neg": 0}
    assert {name: found["mark"][name] for name in expected} == expected
    assert (found["other"]["neg"], found["other"]["ppo_dropped_neg"], found["other"]["dropped_neg"]) == (2, 1, 1)
    assert found["mark"]["ratio"][2] == 1.1
    assert by_kind(ids[2:5], ratio[2:5], weight[2:5], advantages[2:5], mark=7)["mark"]["pos"] == 0


def test_dropped_tokens_are_those_of_rare_marks_in_whole_runs():
    """Of steps with 10, 20, 30 and 40 % marks the first has rare ones; a lost run does not count."""
    tasks = tasks_of(["small"], [Regime(16, 0)], ["cispo"], [1e-4], [0, 1])
    found = [(task, result(task, 0.6)) for task in tasks]
    for _, run_found in found:
        for step in run_found["steps"]:
            step["marked"] /= 2
    runs = study_of(found)["small", Regime(16, 0)]["cispo"]
    assert drops(runs, "mark", "pos", "ppo_dropped") == (4, 20), "one step of each of two runs"
    found[1][1]["status"] = "diverged"
    runs = study_of(found)["small", Regime(16, 0)]["cispo"]
    assert drops(runs, "mark", "pos", "ppo_dropped") == (2, 10)


SMALL = (
    "device=cpu", "runtime=local", "rollout.engine=torch", "train.steps=2", "train.eval_every=2",
    "rollout.prompts_per_step=2", "rollout.group_size=4", "sft.steps=2", "sft.batch_size=4", "eval.args.size=8",
    "data.args.size=64", "rollout.max_tokens=6", "sft.data.args.size=64",
)  # fmt: skip


def test_a_run_leaves_its_result_alone(tmp_path: Path):
    """A run of two steps through the workers: the result file, and nothing else once it ended."""
    tasks = tasks_of(["lightning_1m"], [Regime(2, 0)], ["cispo"], [1e-4], [0])
    queue = Queue(tmp_path, tasks, starts=0, deadline=time.monotonic() + 60, expect=1.0)
    run(queue, 1, SMALL, fresh=False)
    ((task, found),) = load(tmp_path)
    assert task == tasks[0] and found["status"] == "done"
    assert [row["step"] for row in found["history"]] == [0, 1, 2]
    assert [step["step"] for step in found["steps"]] == [1, 2] and [one["step"] for one in found["held_out"]] == [0, 2]
    assert [file.suffix for file in (tmp_path / "work").iterdir() if file.is_file()] == [".log"]
    assert not list((tmp_path / "work" / "lightning_1m").iterdir())


def test_a_run_served_later_is_the_run_served_first(tmp_path: Path):
    """Bit for bit, with a critic and old samples too: a worker's runs leave nothing behind for one another."""
    first, second = (Task("lightning_1m", arm, 2, staleness, 1e-4, 0) for arm, staleness in (("cispo", 0), ("ppo", 8)))
    warm_up(tmp_path / "a", "lightning_1m", 0, None, SMALL)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "warm").symlink_to(tmp_path / "a" / "warm")
    for place, task in (("a", first), ("a", second), ("b", second), ("b", first)):
        train(tmp_path / place, task, 0, SMALL)
    ours, theirs = (dict(load(tmp_path / place)) for place in "ab")
    assert ours.keys() == theirs.keys() == {first, second}
    for task in ours:
        assert [ours[task][key] for key in ("steps", "held_out")] == [
            theirs[task][key] for key in ("steps", "held_out")
        ]
        assert timeless(ours[task]) == timeless(theirs[task])


def timeless(found: Mapping[str, Any]) -> list[dict[str, float]]:
    clocks = ("total/seconds", "time/step")
    return [{name: value for name, value in row.items() if name not in clocks} for row in found["history"]]


def test_the_grids_name_known_policies_and_arms():
    for grids in GRIDS.values():
        tasks = tasks_of_grids(grids)
        assert len(tasks) == len(set(tasks)) >= 50
        assert {task.policy for task in tasks} <= set(POLICIES) and {task.arm for task in tasks} == set(ARMS)
    # The regimes of the claim come first, and seed after seed.
    first = tasks_of_grids(GRIDS["gpu"])[:24]
    assert {(task.policy, task.seed) for task in first} == {("lightning_35m", 0)}
    assert {task.regime for task in first} == {Regime(16, 0), Regime(4, 8)}
