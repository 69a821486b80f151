"""Start, weight sync and end of a run: seconds by their parts, on a CPU and on GPUs alike.

    python scripts/bench_start.py RECIPE [key=value ...] [--steps 3] [--runs 2]
    python scripts/bench_start.py recipes/smollm2_chain_sum.yaml --shape qwen3-4b --tokenizer FOLDER

`--shape` is a policy of random weights, one of bench_sharding.py's, in place of the recipe's. Each run is
`cispo train RECIPE key=value ...` of `steps` steps in a temporary folder, in a process of its own. The first run on a
machine fills the caches of files and kernels, the second one shows a usual start.

    start    `time/start` and its parts, of the first step's metrics: from the process to the first prompt of step 1,
             warm-up and first evaluation included. Parts with "/" lie inside the learners' and engines' processes and
             overlap with the driver's. Beside it the processor seconds of all processes until then, which depend less
             on the machine's load, and both at the first step of the warm-up.
    sync     `time/sync` and its parts: median, smallest and largest of the steps; spread is largest over smallest
    close    from the last step's metrics to the end of the process: last evaluation aside, the last checkpoint,
             summary and shutdown
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from bench_sharding import POLICIES

_POLL_SECONDS = 0.05


class Measured(NamedTuple):
    """One run."""

    rows: list[dict[str, float]]
    """Its metrics, a step each, from step 1 on."""
    close: float
    processor: float
    """Processor seconds of all its processes until the first step."""
    warm_up: tuple[float, float] | None
    """Seconds and processor seconds until the first step of the warm-up."""


def run(recipe: str, overrides: list[str], steps: int) -> Measured:
    """Raises SystemExit where the run fails, with its output."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        own = [f"output_dir={folder}", "name=run", f"train.steps={steps}", "train.eval_every=0"]
        command = [sys.executable, "-m", "cispo.cli", "train", recipe, *own, *overrides]
        metrics, sft = (Path(folder) / "run" / name for name in ("metrics.jsonl", "sft.jsonl"))
        with open(Path(folder) / "output", "w+") as output:
            begun = time.time()
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            used: list[tuple[float, float]] = []
            last, warm_up = 0.0, None
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
                if not last and len(_rows(metrics)) == steps:
                    last = time.time()
                if warm_up is None and _rows(sft):
                    warm_up = time.time() - begun, _processor_seconds(child.pid)
                if not used or time.time() - begun - used[-1][0] > 0.3:
                    used.append((time.time() - begun, _processor_seconds(child.pid)))
            ended = time.time()
            if child.returncode:
                output.seek(0)
                raise SystemExit(output.read())
        rows = _rows(metrics)
        start = rows[0]["time/start"]
        return Measured(rows, ended - last, max(seconds for at, seconds in used if at <= start), warm_up)


def _rows(file: Path) -> list[dict[str, float]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if row["step"] > 0]


def _processor_seconds(pid: int) -> float:
    """Of a process and all below it."""
    total = 0.0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return total
    for process in processes:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def show(measured: Measured) -> None:
    first, rows = measured.rows[0], measured.rows
    print(f"  start {first['time/start']:8.2f}   {measured.processor:.1f} processor seconds")
    if measured.warm_up is not None:
        print("    first step of the warm-up {:8.2f}   {:.1f} processor seconds".format(*measured.warm_up))
    for name, seconds in first.items():
        part = name.removeprefix("time/start/")
        if part != name:
            print(f"    {part:<22}{seconds:8.2f}")
    print("  sync    median  smallest  largest  spread")
    for name in ("time/sync", *(key for key in rows[-1] if key.startswith("time/sync/"))):
        values = [row[name] for row in rows if name in row]
        low, high = min(values), max(values)
        spread = f"{high / low:8.2f}" if low > 0 else ""
        part = name.removeprefix("time/sync").removeprefix("/") or "all"
        print(f"    {part:<8}{statistics.median(values):8.4f}{low:10.4f}{high:9.4f}{spread}")
    print(f"  close {measured.close:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shape", choices=sorted(POLICIES))
    parser.add_argument("--tokenizer", help="folder, beside --shape")
    arguments = parser.parse_intermixed_args()
    overrides = list(arguments.overrides)
    if arguments.shape:
        config = {"max_position_embeddings": 4096, **POLICIES[arguments.shape]}
        policy = {"model": None, "config": config, "tokenizer": arguments.tokenizer}
        overrides += [f"policy={json.dumps(policy)}"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    print(f"{arguments.recipe} {' '.join(arguments.overrides)} {arguments.shape or ''} on {device}")
    for number in range(1, arguments.runs + 1):
        print(f"run {number}, load of the machine {os.getloadavg()[0]:.1f}")
        show(run(arguments.recipe, overrides, arguments.steps))


if __name__ == "__main__":
    main()
