"""Fault injection: real runs are killed, hung, starved or signalled at random moments, resumed, and compared.

    scripts/inject_faults.py --times 10                              every fault, a table at the end
    scripts/inject_faults.py kill-driver kill-engine --times 3 rollout.engine=vllm

Each trial runs a small recipe on Ray, injects a fault of `FAULTS`, resumes the run where it ended, and compares it with
an undisturbed run: metrics (but times), sampled tokens, weights and optimizer must be equal bit for bit. A trial counts
as a hang where it does not end within --limit seconds, as orphans where a process of it is alive 60 s after its end, as
lost where a whole checkpoint from before the fault is gone, and as unsaved where a run that was told to stop did not
save its last step. Where the run was over before the fault had an effect, the trial is repeated at another moment, and
counts only if it found a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, MARK, Trial, WrongResponse


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


def state(trial: Trial) -> dict[str, object]:
    """`state_of` all runs of a trial."""
    return {f"{run.relative_to(trial.folder)}/{k}": v for run in trial.runs() for k, v in state_of(run).items()}


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
    last_line: str
    """Of the output of the disturbed run."""


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
    try:
        acted = fault.act(trial)
    except WrongResponse as error:
        acted = True
        problems.append(str(error))
    code, output = trial.end()
    last_line = (output.strip().splitlines() or [""])[-1]
    if code not in (0, *fault.ends_with):
        problems.append(f"{'hang' if code is None else f'exit code {code}'}: {output[-600:]}")
    if "Traceback" in output and fault.quiet:
        problems.append(f"traceback: {output[-1500:]}")
    problems += [f"orphans: {names}" for names in [trial.orphans()] if names]
    if "finishing the step and saving" in output and code == 130 and name != "ctrl-c-twice":
        problems += [f"unsaved: {run}" for run in [trial.unsaved()] if run]
    # A disk mounted over the checkpoints hides them.
    fault.undo(trial)
    # A run removes older checkpoints in favour of newer ones, so only the newest must have a successor.
    for run in () if fault.removes else {str(Path(c).parent) for c in before}:
        newest = max(c for c in before if c.startswith(run))
        if max((c for c in trial.checkpoints() if c.startswith(run)), default="") < newest:
            problems.append(f"lost: {newest}")
    # A comparison goes on with its other runs after a failure, and may end with exit code 0.
    struck = acted and (code in fault.ends_with or args.compare) and re.search(fault.says, output) is not None
    if (code != 0 and code is not None) or args.compare:
        # A short watchdog is for the fault: on a busy machine it would end the start of an undisturbed run.
        trial.overrides = [item for item in trial.overrides if not item.startswith("control.")]
        trial.start()
        again, output = trial.end()
        if fault.resumed_says and struck and not re.search(fault.resumed_says, output):
            problems.append(f"resumed in silence: {output[-600:]}")
        if again != 0:
            problems.append(f"the resumed run ended with {again}: {output[-600:]}")
        problems += [f"orphans after the resumed run: {names}" for names in [trial.orphans()] if names]
    if not problems and (key := difference(reference.state, state(trial))):
        problems.append(f"not the same run: {key}")
    if fault.own_disk:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    if not problems and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(name, moment, code, problems, time.monotonic() - started, struck, last_line)


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
    return Reference(state(trial), time.monotonic() - started)


def table(results: Sequence[Result]) -> str:
    lines = ["| fault | trials | ended by | hangs | lost or unsaved | orphans | not the same run | other |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r.fault for r in results):
        own = [r for r in results if r.fault == name]
        codes = [str(r.code) for r in own]
        ended = ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes)))
        kinds = (("hang",), ("lost", "unsaved"), ("orphans",), ("not the same",))
        counts = [sum(any(p.startswith(kind) for p in r.problems) for r in own) for kind in kinds]
        other = sum(any(not p.startswith(sum(kinds, ())) for p in r.problems) for r in own)
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
    if any(FAULTS[name].own_disk or FAULTS[name].mounts for name in names) and MARK not in os.environ:
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
                        counted = "ok" if result.struck else f"too late, not counted: {result.last_line:.200}"
                        said = "; ".join(result.problems) or counted
                        about = f"exit {result.code}, {result.seconds:.0f} s, {said}"
                        print(f"{name} at {result.moment:.0%}: {about}", flush=True)
                results.append(result)
    print(table(results))
    sys.exit(any(r.problems for r in results))


if __name__ == "__main__":
    main()
