"""Fault injection: real runs are killed, hung or starved at random moments, resumed, and compared with a clean run.

    scripts/inject_faults.py --times 10                              every fault, a table at the end
    scripts/inject_faults.py kill-driver kill-engine --times 3 rollout.engine=torch

Each trial runs a small recipe on Ray, injects the fault, resumes the run where it ended, and compares it with an
undisturbed run: metrics (but times), sampled tokens, weights and optimizer must be equal bit for bit. A trial counts as
a hang where it does not end within --limit seconds, as orphans where a process of it is alive 60 s after its end, and
as lost where a whole checkpoint from before the fault is gone. Where the run was over before the fault had an effect,
the trial is repeated at another moment, and counts only if it found a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
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
    process: subprocess.Popen[str] | None = None

    def runs(self) -> list[Path]:
        """Its run folders."""
        return sorted(f.parent for f in self.folder.glob("**/recipe.yaml") if f.parent.parent.name != "warm")

    def start(self) -> None:
        """Starts the run, or resumes it."""
        command = [sys.executable, "-m", "cispo.cli", "compare" if self.compares else "train"]
        command += [str(ROOT / "recipes" / "quickstart.yaml"), f"output_dir={self.folder}", *SMALL, *self.overrides]
        if self.compares:
            command += ["algorithm.ratio_max=null", "--algorithms", "cispo,grpo", "--seeds", "1"]
        elif self.runs():
            command.append("--resume")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
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

    def state(self) -> dict[str, object]:
        return {f"{run.relative_to(self.folder)}/{k}": v for run in self.runs() for k, v in state_of(run).items()}


Act = Callable[[Trial], bool]
"""Injects a fault into a trial; False where the run was over."""


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


def interrupt(times: int) -> Act:
    def act(trial: Trial) -> bool:
        assert trial.process is not None
        for _ in range(times):
            trial.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        return True

    return act


def fill_disk(trial: Trial) -> bool:
    try:
        with (trial.folder / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
    except OSError:
        return True


def free_disk(trial: Trial) -> None:
    (trial.folder / "ballast").unlink(missing_ok=True)


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
    overrides: tuple[str, ...] = ()
    says: str = ""
    """Pattern in the output of a run that noticed the fault; without a match the fault came too late."""
    own_disk: bool = False
    quiet: bool = True
    """No traceback may be printed. TensorBoard's thread prints one on a full disk, Ray for a worker without memory."""


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
    # -2: the interpreter itself was interrupted, when the run was over.
    "ctrl-c": Fault(interrupt(1), (130, -signal.SIGINT)),
    "ctrl-c-twice": Fault(interrupt(2), (130, -signal.SIGINT)),
    "full-disk": Fault(fill_disk, (1, 2), undo=free_disk, own_disk=True, quiet=False),
    "read-only": Fault(forbid_writing, (1, 2), undo=allow_writing, own_disk=True),
}


def state_of(run: Path) -> dict[str, object]:
    """The metrics, samples and tensors in which a disturbed run must equal the undisturbed one."""
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "rollout/tokens_per_s", "total/seconds")
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    tensors = {f"{f.name}/{k}": v for f in sorted(last.rglob("*.safetensors")) for k, v in load_file(f).items()}
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows],
        "samples": {f.name: pq.read_table(f).to_pylist() for f in sorted((run / "samples").glob("*.parquet"))},
        "tensors": {name: v.reshape(-1).view(torch.uint8).numpy().tobytes() for name, v in tensors.items()},
    }


def difference(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The first key with different values, "" where there is none."""
    return next((key for key, value in one.items() if value != other.get(key)), "")


@dataclass
class Result:
    fault: str
    moment: float
    code: int | None
    problems: list[str]
    seconds: float
    struck: bool
    """Whether the run noticed the fault."""


def try_once(name: str, folder: Path, reference: Reference, moment: float, args: argparse.Namespace) -> Result | None:
    """One trial: run, fault, resume, compare; None where the run was over before the moment."""
    fault, started = FAULTS[name], time.monotonic()
    folder.mkdir(parents=True)
    if fault.own_disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], check=True)
    trial = Trial(folder, [*args.overrides, *fault.overrides], args.limit, args.compare)
    problems = []
    trial.start()
    time.sleep(moment * reference.seconds)
    before = trial.checkpoints()
    if trial.process is None or trial.process.poll() is not None:
        return None
    acted = fault.act(trial)
    code, output = trial.end()
    if code not in (0, *fault.ends_with):
        problems.append(f"{'hang' if code is None else f'exit code {code}'}: {output[-600:]}")
    if "Traceback" in output and fault.quiet:
        problems.append(f"traceback: {output[-1500:]}")
    problems += [f"orphans: {names}" for names in [trial.orphans()] if names]
    # A run removes older checkpoints in favour of newer ones, so only the newest must have a successor.
    for run in {str(Path(c).parent) for c in before}:
        newest = max(c for c in before if c.startswith(run))
        if max((c for c in trial.checkpoints() if c.startswith(run)), default="") < newest:
            problems.append(f"lost: {newest}")
    fault.undo(trial)
    # A comparison goes on with its other runs after a failure, and may end with exit code 0.
    struck = acted and (code in fault.ends_with or args.compare) and re.search(fault.says, output) is not None
    if (code != 0 and code is not None) or args.compare:
        trial.start()
        again, output = trial.end()
        if again != 0:
            problems.append(f"the resumed run ended with {again}: {output[-600:]}")
        problems += [f"orphans after the resumed run: {names}" for names in [trial.orphans()] if names]
    if not problems and (key := difference(reference.state, trial.state())):
        problems.append(f"not the same run: {key}")
    if fault.own_disk:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    if not problems and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(name, moment, code, problems, time.monotonic() - started, struck)


@dataclass
class Reference:
    """The undisturbed run."""

    state: Mapping[str, object]
    seconds: float


def undisturbed(folder: Path, args: argparse.Namespace) -> Reference:
    trial, started = Trial(folder, args.overrides, args.limit, args.compare), time.monotonic()
    trial.start()
    code, output = trial.end()
    if code != 0:
        raise SystemExit(f"the undisturbed run failed: {output[-2000:]}")
    return Reference(trial.state(), time.monotonic() - started)


def table(results: Sequence[Result]) -> str:
    lines = ["| fault | trials | ended by | hangs | lost checkpoints | orphans | not the same run | other |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r.fault for r in results):
        own = [r for r in results if r.fault == name]
        codes = [str(r.code) for r in own]
        ended = ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes)))
        kinds = ("hang", "lost", "orphans", "not the same")
        counts = [sum(any(p.startswith(kind) for p in r.problems) for r in own) for kind in kinds]
        other = sum(any(not p.startswith(kinds) for p in r.problems) for r in own)
        lines.append(f"| {name} | {len(own)} | {ended} | " + " | ".join(map(str, [*counts, other])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="FAULT|KEY=VALUE", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=10, help="trials of each fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a run is a hang")
    parser.add_argument("--compare", action="store_true", help="disturb a comparison of two algorithms")
    parser.add_argument("--keep", action="store_true", help="keep the folders of trials that went well")
    args = parser.parse_intermixed_args()
    args.overrides = [item for item in args.items if "=" in item]
    names = [item for item in args.items if "=" not in item] or list(FAULTS)
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no fault: there are {', '.join(FAULTS)}")
    if any(FAULTS[name].own_disk for name in names) and MARK not in os.environ:
        # A user without privileges may mount a disk in namespaces of its own.
        own = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(own[0], own, {**os.environ, MARK: "none"})
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        reference = undisturbed(folder / "reference", args)
        print(f"undisturbed: {reference.seconds:.0f} s", flush=True)
        results = []
        for number in range(args.times):
            for name in names:
                result, tries = None, 0
                while result is None or not (result.struck or result.problems):
                    tries += 1
                    result = try_once(name, folder / f"{name}-{number}-{tries}", reference, moments.random(), args)
                    if result is not None:
                        said = "; ".join(result.problems) or ("ok" if result.struck else "too late, not counted")
                        about = f"exit {result.code}, {result.seconds:.0f} s, {said}"
                        print(f"{name} at {result.moment:.0%}: {about}", flush=True)
                results.append(result)
    print(table(results))
    sys.exit(any(r.problems for r in results))


if __name__ == "__main__":
    main()
