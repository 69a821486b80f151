"""Experiment trackers of a run (`logging: [tensorboard, wandb, mlflow ...]`): W&B, MLflow, trackio, SwanLab and others.

    metrics and samples of a step --> a queue --> a thread --> the tracker process (`cispo.output.tracker_process`)

Nothing here waits for a tracker, but for its last steps at the end. A tracker that fails is a warning. TensorBoard is
not among them: its event files are the run folder's own (`cispo.output.board`).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from cispo.errors import UserError
from cispo.output.tracker_process import MAKERS, STATE, Cell, Setup, Step
from cispo.recipe.user_code import load_object
from cispo.types import TrajectoryGroup

__all__ = ["STATE", "TENSORBOARD", "Trackers", "check_trackers", "flat"]

TENSORBOARD = "tensorboard"
SAMPLES = 16
"""Rows of a step's table."""

_PROJECT = "cispo"
_END_SECONDS = 60.0
"""For the last steps of a run to reach its trackers."""
_WAITING = 10_000
"""Most lines that wait for a tracker; later ones are lost."""
_COLUMNS = ("step", "prompt", "completion", "reward", "finish_reason", "length")
_PACKAGES = {"comet_ml": "comet-ml"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for an unknown tracker, or one that is not installed."""
    for name in names:
        if ":" in name:
            made = load_object(name, "logging")
            if not hasattr(made, "requires_logging_directory"):
                raise UserError(f"logging: '{name}' is no tracker of accelerate (a subclass of GeneralTracker)")
        elif name != TENSORBOARD and name not in MAKERS:
            known = [TENSORBOARD, *MAKERS]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"logging: '{name}' is no tracker{hint} ({', '.join(known)}, or module:Class)")
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"logging: {name} is not installed (pip install {_PACKAGES.get(name, name)})")


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, Cell]:
    """Dotted key -> value; lists and the user's own mappings as JSON text."""
    result: dict[str, Cell] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and key not in ("args", "config", "engine_args"):
            result |= flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | bool | int | float):
            result[prefix + key] = value
        else:
            result[prefix + key] = json.dumps(value)
    return result


class Trackers:
    """The trackers of one run. Every method returns at once; `close` waits for the steps on their way."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        name: str,
        group: str,
        config: Mapping[str, Cell],
        say: Callable[[str], None],
    ) -> None:
        """`config` is the resolved recipe; `say` shows the one warning of a tracker that fails."""
        self._say = say
        self._warned: set[str] = set()
        self._names, self._rest = tuple(names), b""
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        setup = Setup(
            names=self._names, folder=str(folder.absolute()), project=_PROJECT, name=name, group=group, config=config
        )
        self._reports, theirs = os.pipe()
        os.set_blocking(self._reports, False)
        code = f"import sys; sys.path[:] = {sys.path!r}; from cispo.output.tracker_process import main; main({theirs})"
        with (folder / "trackers.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the driver alone: the last steps are still sent.
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        os.close(theirs)
        self._put(asdict(setup))
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step."""
        self._put(asdict(Step(step, values=dict(values))))
        self._listen()

    def table(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """SAMPLES completions of a step, spread evenly over its groups."""
        pairs = [(group, t) for group in groups for t in group.trajectories]
        count = min(SAMPLES, len(pairs))
        picked = [pairs[i * len(pairs) // count] for i in range(count)]
        rows = [
            (
                step,
                "\n".join(str(m["content"]) for m in g.prompt.messages),
                t.text,
                t.reward,
                t.finish_reason.value,
                t.length,
            )
            for g, t in picked
        ]
        self._put(asdict(Step(step, columns=_COLUMNS, rows=rows)))

    def _put(self, line: Mapping[str, object]) -> None:
        try:
            self._lines.put_nowait(json.dumps(line).encode() + b"\n")
        except queue.Full:
            self._warn("all", f"do not keep up: {_WAITING:,} steps wait, and later ones are not sent")

    def _write(self) -> None:
        assert self._process.stdin is not None
        while (line := self._lines.get()) is not None:
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except OSError:
                # The process is gone, as `_listen` reports; the queue is emptied without it.
                continue
        try:
            self._process.stdin.close()
        except OSError:
            pass

    def _listen(self) -> None:
        """Shows new problems."""
        while True:
            try:
                part = os.read(self._reports, 65536)
            except BlockingIOError:
                break
            self._rest += part
            if not part:
                break
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._warn(*json.loads(line))
        if self._process.poll() not in (None, 0):
            self._warn("all", f"process ended with code {self._process.returncode}; the run goes on without it")

    def _warn(self, name: str, problem: str) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        subject = f"the tracker {name}" if name != "all" else f"the trackers ({', '.join(self._names)})"
        self._say(f"logging: {subject} {problem}")

    def close(self) -> None:
        """Sends the last steps and ends the process; waits a minute at most."""
        try:
            self._lines.put(None, timeout=1.0)
            self._process.wait(_END_SECONDS)
        except (queue.Full, subprocess.TimeoutExpired):
            self._warn("all", f"did not end within {_END_SECONDS:g} s, and their last steps may be lost")
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            self._process.wait()
            self._listen()
            os.close(self._reports)
