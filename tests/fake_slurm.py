"""Slurm's commands on this machine, as far as the batch scripts of docs/cluster.md need them: `fake_slurm.py VERB ...`.

sbatch SCRIPT    runs it; its time is up once FAKE_SLURM_METRICS has three rows: the signal of `#SBATCH --signal`
                 goes to the script (B:) or to its step, once; after `scontrol requeue` the script starts again
srun COMMAND     a step: a process group of its own
scontrol         show hostnames; requeue
ray              symmetric-run without Ray: `ray stop` would end every Ray of this machine
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["FAKE_SLURM_STATE"])
STEP, REQUEUE = STATE / "step", STATE / "requeue"


def sbatch(script: str) -> int:
    options = re.findall(r"^#SBATCH (--\S+)$", Path(script).read_text(), re.MULTILINE)
    (to_script, name), *_ = (
        found.groups() for option in options if (found := re.fullmatch(r"--signal=(B:)?(\w+)@\d+", option))
    )
    mode = "a" if "--open-mode=append" in options else "w"
    for restart in range(3):
        REQUEUE.unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1"}
        job |= {"SLURM_GPUS_ON_NODE": "0", "SLURM_RESTART_COUNT": str(restart)}
        with (STATE / "slurm-7.out").open(mode) as out:
            process = subprocess.Popen(["bash", script], env=os.environ | job, stdout=out, stderr=out)
            while process.poll() is None:
                time.sleep(0.05)
                if restart == 0 and time_is_up():
                    number = getattr(signal, f"SIG{name}")
                    os.kill(process.pid, number) if to_script else os.killpg(int(STEP.read_text()), number)
                    process.wait()
        if not (REQUEUE.exists() and "--requeue" in options):
            return process.returncode
    return 1


def time_is_up() -> bool:
    file = Path(os.environ["FAKE_SLURM_METRICS"])
    return file.exists() and len(file.read_text().splitlines()) >= 3


def srun(*arguments: str) -> int:
    first = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
    process = subprocess.Popen(arguments[first:], start_new_session=True)
    STEP.write_text(str(process.pid))
    code = process.wait()
    return 128 - code if code < 0 else code


def scontrol(verb: str, *arguments: str) -> int:
    if verb == "requeue":
        assert arguments == ("7",)
        REQUEUE.touch()
    else:
        assert (verb, *arguments) == ("show", "hostnames", "localhost")
        print("localhost")
    return 0


def ray(verb: str, *arguments: str) -> int:
    if verb != "symmetric-run":
        return 0
    return subprocess.run(arguments[arguments.index("--") + 1 :], check=False).returncode


if __name__ == "__main__":
    verbs = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "ray": ray}
    sys.exit(verbs[sys.argv[1]](*sys.argv[2:]))
