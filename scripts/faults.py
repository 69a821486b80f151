"""The faults of `inject_faults`, and a run to inject them into."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
MARK = "CISPO_FAULT_TRIAL"
SMALL = [
    "sft.data.limit=500",
    "data.limit=500",
    "sft.steps=5",
    "sft.batch_size=32",
    "train.steps=8",
    "train.save_every=4",
    "train.eval_every=4",
    "eval.limit=8",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "learner.ranks=1",
    "learner.lr=1e-3",
    "reward={functions: [{fn: 'tests.varied_reward:varied'}]}",
]
"""A run this short answers nothing right. Varied rewards make it learn all the same."""


@dataclass
class Trial:
    """One run with a folder and processes of its own."""

    folder: Path
    overrides: Sequence[str]
    limit: float
    compares: bool = False
    """Whether it is a comparison of two algorithms, which the same command resumes, instead of one run."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    mounted: list[Path] = field(default_factory=list)
    """Folders of it with a disk that a fault has mounted."""
    process: subprocess.Popen[str] | None = None

    def runs(self) -> list[Path]:
        """Its run folders."""
        return sorted(f.parent for f in self.folder.glob("**/recipe.yaml") if f.parent.parent.name != "warm")

    def command(self) -> list[str]:
        """Starts the run, or resumes it where there is one."""
        command = [sys.executable, "-m", "cispo.cli", "compare" if self.compares else "train"]
        command += [str(ROOT / "recipes" / "quickstart.yaml"), f"output_dir={self.folder}", *SMALL, *self.overrides]
        if self.compares:
            command += ["algorithm.ratio_max=null", "--algorithms", "cispo,grpo", "--seeds", "1"]
        elif self.runs():
            command.append("--resume")
        return command

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command(),
            cwd=ROOT,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A process group of its own, to be signalled.
            start_new_session=True,
            # As from a shell, also where this script runs in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def end(self) -> tuple[int | None, str]:
        """(exit code, output) at its end; code None is a hang, which is then killed."""
        assert self.process is not None
        try:
            output, _ = self.process.communicate(timeout=self.limit)
            return self.process.returncode, output
        except subprocess.TimeoutExpired:
            for process in self.processes():
                process.kill()
            return None, self.process.communicate()[0]

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Every living process of the trial, with any parent, that has `title` in its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
                if mine and title in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_for(self, title: str) -> psutil.Process | None:
        """A process with the title, once there is one; None where the run ended before."""
        assert self.process is not None
        while self.process.poll() is None:
            found = self.processes(title)
            if found:
                return random.choice(found)
            time.sleep(0.1)
        return None

    def orphans(self) -> list[str]:
        """Command lines of the processes that are alive 60 s after its end; kills them."""
        deadline = time.monotonic() + 60
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        names = [" ".join(p.cmdline())[:60] for p in alive]
        for process in alive:
            process.kill()
        return names

    def checkpoints(self) -> set[str]:
        """Paths of the checkpoints of all its runs."""
        return {str(f.parent) for run in self.runs() for f in run.glob("checkpoints/step_*/cispo.json")}

    def unsaved(self) -> str:
        """The run with a step in its metrics that is later than its last checkpoint, "" where there is none."""
        for run in self.runs():
            rows = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
            if rows and not (run / "checkpoints" / f"step_{rows - 1:06d}" / "cispo.json").exists():
                return f"{run.name} ended after step {rows - 1}"
        return ""


Act = Callable[[Trial], bool]
"""Injects a fault into a trial; False where the run was over. Raises WrongResponse."""


class WrongResponse(Exception):
    """Another command, which is the fault, got a wrong response."""


def strike(title: str, do: Callable[[psutil.Process], None]) -> Act:
    """A fault that does something to a process with the title, once there is one."""

    def act(trial: Trial) -> bool:
        process = trial.wait_for(title)
        try:
            if process is not None:
                do(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False
        return process is not None

    return act


def kill(title: str, number: int = signal.SIGKILL) -> Act:
    return strike(title, lambda process: process.send_signal(number))


def starve(process: psutil.Process) -> None:
    """Limits the address space of the process to its present size and 1 KiB."""
    limit = process.memory_info().vms + 1024
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))


def send(*numbers: signal.Signals, to: str = "driver") -> Act:
    """Signals to the driver, its process group, or all processes of the run; a second one comes a second later."""

    def act(trial: Trial) -> bool:
        process = trial.process
        assert process is not None
        for position, number in enumerate(numbers):
            time.sleep(1.0 if position else 0.0)
            try:
                if to == "group":
                    os.killpg(process.pid, number)
                for each in trial.processes() if to == "all" else []:
                    each.send_signal(number)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
            if to == "driver":
                process.send_signal(number)
        return True

    return act


def resume_too(trial: Trial) -> bool:
    """The same command once more, to resume the run that is going on: it must be refused."""
    while trial.process is not None and trial.process.poll() is None:
        if trial.runs():
            environment = {**os.environ, MARK: trial.mark}
            other = subprocess.run(
                trial.command(), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            if trial.process.poll() is not None:
                return False
            if other.returncode != 2 or "is in use" not in other.stderr or "Traceback" in other.stderr:
                raise WrongResponse(f"the second command ended with {other.returncode}: {other.stderr[-600:]}")
            return True
        time.sleep(0.1)
    return False


def delete_folder(trial: Trial) -> bool:
    """Removes the run's folder, once there is one."""
    while trial.process is not None and trial.process.poll() is None:
        for run in trial.runs():
            while run.exists():
                shutil.rmtree(run, ignore_errors=True)
            return True
        time.sleep(0.1)
    return False


def kill_after_checkpoint(trial: Trial) -> bool:
    """Kills the driver once it has two checkpoints."""
    assert trial.process is not None
    while trial.process.poll() is None:
        if len(trial.checkpoints()) >= 2:
            trial.process.kill()
            return True
        time.sleep(0.05)
    return False


def flip_bit(trial: Trial) -> None:
    """Flips one bit in a file of the newest checkpoint."""
    newest = Path(max(trial.checkpoints()))
    files = [file for file in newest.rglob("*") if file.is_file() and file.name != "cispo.json"]
    file = random.choice(files)
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def fill_disk(trial: Trial) -> bool:
    try:
        with (trial.folder / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
    except OSError:
        return True


def free_disk(trial: Trial) -> None:
    (trial.folder / "ballast").unlink(missing_ok=True)


def fill(find: Callable[[Trial], Path | None]) -> Act:
    """Mounts a full disk over a folder of the run, once there is one."""

    def act(trial: Trial) -> bool:
        while trial.process is not None and trial.process.poll() is None:
            folder = find(trial)
            if folder is not None and folder.is_dir():
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=True)
                (folder / "ballast").write_bytes(b"\0" * 4096)
                trial.mounted.append(folder)
                return True
            time.sleep(0.02)
        return False

    return act


def samples(trial: Trial) -> Path:
    return trial.folder / "quickstart" / "samples"


def checkpoints(trial: Trial) -> Path | None:
    """The folder of the checkpoints, once a first one is in it: then no process reads from it any more."""
    folder = trial.folder / "quickstart" / "checkpoints"
    return folder if list(folder.glob("step_*")) else None


def weights(trial: Trial) -> Path | None:
    """The folder through which the engines get their weights: the driver holds its lock."""
    assert trial.process is not None
    try:
        files = [os.readlink(file) for file in Path(f"/proc/{trial.process.pid}/fd").iterdir()]
    except OSError:
        return None
    return next((Path(file) for file in files if "/cispo-weights-" in file), None)


def unmount(trial: Trial) -> None:
    for folder in trial.mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
    trial.mounted.clear()


def forbid_growth(process: psutil.Process) -> None:
    """No file that the process writes may be larger than nothing."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


def forbid_writing(trial: Trial) -> bool:
    """Remounts the checkpoint folder read-only, as soon as no file there is open for writing."""
    assert trial.process is not None
    folder = str(trial.folder / "quickstart" / "checkpoints")
    while trial.process.poll() is None and not Path(folder).exists():
        time.sleep(0.05)
    subprocess.run(["mount", "--bind", folder, folder], check=False, capture_output=True)
    command = ["mount", "-o", "remount,bind,ro", folder]
    while trial.process.poll() is None and subprocess.run(command, check=False, capture_output=True).returncode:
        time.sleep(0.05)
    return trial.process.poll() is None


def allow_writing(trial: Trial) -> None:
    folder = trial.folder / "quickstart" / "checkpoints"
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def nothing(trial: Trial) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    act: Act
    ends_with: tuple[int, ...]
    """Correct exit codes. 0 is always correct; where it is not among these, it means that the fault came too late."""
    undo: Callable[[Trial], None] = nothing
    """Before the run is resumed."""
    overrides: tuple[str, ...] = ()
    says: str = ""
    """Pattern in the output of a run that noticed the fault; without a match the fault came too late."""
    resumed_says: str = ""
    """Pattern that must be in the output of the resumed run."""
    own_disk: bool = False
    mounts: bool = False
    removes: bool = False
    """Whether the fault itself removes checkpoints."""
    quiet: bool = True
    """No traceback may be printed. Ray prints one for a worker without memory."""


# Minus the number of a signal: the interpreter itself, before or after the run.
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
REFUSED = "cannot write|can be written"

FAULTS: Mapping[str, Fault] = {
    "kill-driver": Fault(kill("cispo.cli"), (-signal.SIGKILL,)),
    "kill-learner": Fault(kill("ray::learner-0"), (1,)),
    "kill-engine": Fault(kill("ray::engine-0"), (0,), says="starting it again"),
    # A process without memory may die, or stand still where it cannot even start a thread.
    "engine-without-memory": Fault(
        strike("ray::engine-0", starve),
        (0, 1),
        overrides=("control.watchdog=15",),
        says="starting it again|nothing has moved",
        quiet=False,
    ),
    "hang-engine": Fault(kill("ray::engine-0", signal.SIGSTOP), (1,), overrides=("control.watchdog=15",)),
    "kill-reward": Fault(kill("reward_worker"), (0,)),
    "hang-reward": Fault(kill("reward_worker", signal.SIGSTOP), (0,), overrides=("reward.timeout=2",)),
    "raylet": Fault(kill("core/src/ray/raylet/raylet"), (1,)),
    "gcs": Fault(kill("core/src/ray/gcs/gcs_server"), (1,)),
    "ctrl-c": Fault(send(signal.SIGINT), STOPPED),
    "ctrl-c-twice": Fault(send(signal.SIGINT, signal.SIGINT), STOPPED),
    "term": Fault(send(signal.SIGTERM), STOPPED),
    "term-group": Fault(send(signal.SIGTERM, to="group"), STOPPED),
    "term-all": Fault(send(signal.SIGTERM, to="all"), STOPPED),
    "hup": Fault(send(signal.SIGHUP, to="group"), STOPPED),
    "usr1-all": Fault(send(signal.SIGUSR1, to="all"), (0, -signal.SIGUSR1), says="SIGUSR1: saving"),
    "second-resume": Fault(resume_too, (0,)),
    "deleted-folder": Fault(delete_folder, (1, 2), removes=True),
    "flipped-bit": Fault(kill_after_checkpoint, (-signal.SIGKILL,), undo=flip_bit, resumed_says="is damaged"),
    "full-disk": Fault(fill_disk, (1, 2), undo=free_disk, own_disk=True),
    "full-disk-samples": Fault(fill(samples), (1,), undo=unmount, mounts=True, says=REFUSED),
    "full-disk-checkpoints": Fault(fill(checkpoints), (1,), undo=unmount, mounts=True, says=REFUSED),
    "full-disk-weights": Fault(fill(weights), (1, 2), undo=unmount, mounts=True, says=REFUSED),
    # Early, the driver finds no temporary folder, or Ray no folder for its logs.
    "full-disk-driver": Fault(
        strike("cispo.cli", forbid_growth), (1, 2), says=f"{REFUSED}|temporary directory|Ray did not start"
    ),
    # In a call: Python itself needs a temporary file to start.
    "full-disk-learner": Fault(strike("ray::learner-0.call", forbid_growth), (1, 2), says=REFUSED),
    "read-only": Fault(forbid_writing, (1, 2), undo=allow_writing, own_disk=True),
}
