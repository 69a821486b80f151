"""The process that feeds a run's trackers, through `accelerate.tracking`; its driver is `cispo.output.trackers`.

    stdin: Setup, then a JSON line a step --> a thread a tracker --> wandb, mlflow, trackio ...
    reports (a pipe): the problems of a tracker, one JSON line each

A process of its own: most trackers keep one current run a process, while `compare` has several; and neither a library
that hangs nor one that crashes holds up a training.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.files import write_json
from cispo.recipe.user_code import load_object

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

STATE = "trackers.json"
"""File of the run folder: tracker -> the id of its run, with which a resumed run goes on."""

Cell = str | float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first line of stdin."""

    names: Sequence[str]
    """Trackers as `logging` names them."""
    folder: str
    """The run folder."""
    project: str
    name: str
    """Of the run."""
    group: str
    """Of the runs of one comparison; "" for a run by itself."""
    config: Mapping[str, Cell]
    """The resolved recipe, flat."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of stdin: the metrics of a step, or its samples as a table."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


Make = Callable[[Setup, str, bool], "GeneralTracker"]
"""(setup, id, whether the tracker has a run of that id) -> a tracker that has not started."""


def _wandb(setup: Setup, run: str, _: bool) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", setup.project)
    place = {"dir": setup.folder, "id": run, "resume": "allow"}
    return WandBTracker(project, name=setup.name, group=setup.group or None, **place)


def _swanlab(setup: Setup, run: str, _: bool) -> GeneralTracker:
    from accelerate.tracking import SwanLabTracker

    project = os.environ.get("SWANLAB_PROJ_NAME", setup.project)
    return SwanLabTracker(project, name=setup.name, group=setup.group or None, id=run, resume="allow")


def _mlflow(setup: Setup, run: str, known: bool) -> GeneralTracker:
    from accelerate.tracking import MLflowTracker

    tags = {"group": setup.group} if setup.group else None
    return MLflowTracker(setup.project, run_id=run if known else None, run_name=setup.name, tags=tags)


def _trackio(setup: Setup, run: str, known: bool) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    # Its runs are told apart by their names.
    name = run if known else f"{setup.name}-{run[:4]}"
    project = os.environ.get("TRACKIO_PROJECT", setup.project)
    return TrackioTracker(project, name=name, group=setup.group or None, resume="allow", embed=False)


def _comet(setup: Setup, run: str, _: bool) -> GeneralTracker:
    from accelerate.tracking import CometMLTracker

    return CometMLTracker(setup.project, experiment_key=run)


def _aim(setup: Setup, run: str, known: bool) -> GeneralTracker:
    from accelerate.tracking import AimTracker

    return AimTracker(
        setup.name,
        os.path.dirname(setup.folder),
        experiment=setup.group or setup.project,
        **({"run_hash": run} if known else {}),
    )


def _clearml(setup: Setup, run: str, known: bool) -> GeneralTracker:
    from accelerate.tracking import ClearMLTracker

    tags = [setup.group] if setup.group else []
    return ClearMLTracker(
        setup.project, task_name=setup.name, tags=tags, **({"continue_last_task": run} if known else {})
    )


def _dvclive(setup: Setup, _: str, known: bool) -> GeneralTracker:
    from accelerate.tracking import DVCLiveTracker

    return DVCLiveTracker(dir=str(Path(setup.folder) / "dvclive"), resume=known)


MAKERS: Mapping[str, Make] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "swanlab": _swanlab,
    "comet_ml": _comet,
    "aim": _aim,
    "clearml": _clearml,
    "dvclive": _dvclive,
}


def _own(path: str, setup: Setup, run: str, known: bool) -> GeneralTracker:
    """A tracker class of the user, "module:Class", called as accelerate calls a registered one."""
    made = load_object(path, "logging")
    place = [setup.folder] if made.requires_logging_directory else []
    tracker = made(setup.name, *place)
    # Accelerate has no name for it: a class that can go on with a run says so by this attribute.
    if known and hasattr(tracker, "run_id"):
        tracker.run_id = run
    return tracker


def _id_of(name: str, tracker: GeneralTracker, run: str) -> str:
    """The id with which the same run can be opened again."""
    # Any: the run of the tracker's own library.
    inner: Any = getattr(tracker, "tracker", None)
    if name == "mlflow":
        return inner.info.run_id
    if name == "trackio":
        return inner.name
    if name == "aim":
        return inner.hash
    if name == "clearml":
        return inner.id
    return str(getattr(tracker, "run_id", run)) if ":" in name else run


def _log_table(name: str, tracker: GeneralTracker, step: Step) -> None:
    """The samples of a step, for a tracker that has tables."""
    columns, rows = list(step.columns), [list(row) for row in step.rows]
    own = getattr(tracker, "log_table", None)
    if own is not None:
        own("samples", columns=columns, data=rows, step=step.step)
    elif name == "trackio":
        import trackio  # pyright: ignore[reportMissingImports]

        tracker.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step.step)
    elif name == "mlflow":
        import mlflow  # pyright: ignore[reportMissingImports]

        mlflow.log_table(
            {c: [row[i] for row in rows] for i, c in enumerate(columns)}, f"samples/step_{step.step:06d}.json"
        )
    elif name == "swanlab":
        import swanlab  # pyright: ignore[reportMissingImports]

        table = swanlab.echarts.Table()
        table.add(columns, rows)
        tracker.log({"samples": table}, step=step.step)


class _Feeder(threading.Thread):
    """One tracker and its queue, in a thread: some libraries keep their current run by thread."""

    def __init__(self, name: str, setup: Setup, ids: _Ids, report: Callable[[str, str], None]) -> None:
        super().__init__(daemon=True)
        self.steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._tracker, self._setup, self._ids = name, setup, ids
        self._report = report

    def run(self) -> None:
        name, run = self._tracker, self._ids.known.get(self._tracker)
        try:
            tracker = self._open(name, run)
        # A tracker may raise anything, SystemExit for want of a login included.
        except (Exception, SystemExit) as error:
            self._report(name, f"could not start ({_text(error)}), and this run goes on without it")
            return
        while (step := self.steps.get()) is not None:
            try:
                if step.values:
                    tracker.log(dict(step.values), step=step.step)
                if step.rows:
                    _log_table(name, tracker, step)
            except (Exception, SystemExit) as error:
                self._report(name, f"did not take step {step.step} ({_text(error)}); later steps are still sent")
        try:
            tracker.finish()
        except (Exception, SystemExit) as error:
            self._report(name, f"did not end in order ({_text(error)})")

    def _open(self, name: str, run: str | None) -> GeneralTracker:
        fresh = run or os.urandom(16).hex()
        known = run is not None
        if name in MAKERS:
            tracker = MAKERS[name](self._setup, fresh, known)
        else:
            tracker = _own(name, self._setup, fresh, known)
        tracker.start()
        self._ids.keep(name, _id_of(name, tracker, fresh))
        if not known:
            tracker.store_init_configuration(dict(self._setup.config))
        return tracker


class _Ids:
    """STATE of the run folder."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / STATE, threading.Lock()
        try:
            self.known: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def keep(self, name: str, run: str) -> None:
        with self._lock:
            self.known[name] = run
            write_json(self._file, self.known)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def main(reports: int) -> None:
    """Reads lines until stdin ends, then closes every tracker."""
    lines = iter(sys.stdin.buffer)
    setup = Setup(**json.loads(next(lines)))
    lock = threading.Lock()

    def report(name: str, problem: str) -> None:
        with lock:
            os.write(reports, json.dumps([name, problem]).encode() + b"\n")

    # Of a launcher: accelerate would look for further processes.
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(variable, None)
    from accelerate import PartialState

    PartialState(cpu=True)
    ids = _Ids(Path(setup.folder))
    feeders = [_Feeder(name, setup, ids, report) for name in setup.names]
    for feeder in feeders:
        feeder.start()
    for line in lines:
        step = Step(**json.loads(line))
        for feeder in feeders:
            feeder.steps.put(step)
    for feeder in feeders:
        feeder.steps.put(None)
    for feeder in feeders:
        feeder.join()
