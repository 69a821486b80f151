"""The study of docs/cispo-vs-baselines.md: policies x arms x updates a batch x staleness x learning rates x seeds.

    python scripts/bench_study.py --out DIR --minutes 8 --workers 10        runs what is missing in DIR, for 8 minutes
    python scripts/bench_study.py --out DIR --grid gpu --device cuda --workers 10 --starts 1 --model smollm2_135m=FOLDER
    python scripts/bench_study.py --out DIR --plot-only                     tables and figures of the results in DIR

    DIR/results/POLICY/ARM-k4-s0-lr0.0002-seed0.json      a run that ended; runs of several machines merge by copying
    DIR/warm/POLICY-0/                                    the policy after the warm-up of seed 0
    DIR/study.md  DIR/*.png

Runs go seed after seed, so that the table is balanced whenever the time ends. A run starts only if one like it ended in
less time than is left; one that is cut short leaves nothing and runs again the next time. `--starts 1` gives all seeds
the warm-up of the first; seeds then differ in prompts and sampling. A worker serves one run after another in one
process, beside other workers, on a machine's GPUs in turn; with `runtime=ray` or `rollout.engine=vllm` behind the
options each run has a process of its own. `--grid` names a list of `study_plan.GRIDS` in place of policies, regimes,
arms, rates and seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench_all import cards_here
from study_plan import (
    ARMS,
    GRIDS,
    POLICIES,
    STEPS,
    Grid,
    Order,
    Queue,
    Regime,
    Task,
    load,
    tasks_of_grids,
    warm_folder,
)

ROOT = Path(__file__).resolve().parents[1]


# One run, in a worker


def warm_up(out: Path, policy: str, start: int, model: str | None, keys: Sequence[str]) -> None:
    """Trains a policy on the demonstrations, and puts it into its folder at once when it is whole.

    `model` is the folder of a pretrained one. Its tokenizer goes along without the chat template: the texts of the task
    go on where a prompt ends.
    """
    from cispo.commands.train import sft
    from cispo.rollout.renderer import load_tokenizer

    recipe = ROOT / "recipes" / f"{POLICIES[policy]}.yaml"
    work = out / "work" / f"warm-{policy}-{start}"
    shutil.rmtree(work, ignore_errors=True)
    if model is not None:
        tokenizer = load_tokenizer(model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(str(work / "tokenizer"))
        keys = [*keys, f"policy.model={model}", f"policy.tokenizer={work / 'tokenizer'}"]
    made = sft(recipe, [*keys, f"seed={start}", "name=warm", f"output_dir={work}", "logging=[]"])
    goal = warm_folder(out, policy, start)
    goal.parent.mkdir(parents=True, exist_ok=True)
    os.rename(made, goal)
    shutil.rmtree(work)


def train(out: Path, task: Task, start: int, keys: Sequence[str]) -> None:
    """One run through `cispo compare`'s plan, and its result file. Raises RunError where it broke."""
    from rich.console import Console
    from study_results import result_of

    from cispo.compare.command import run_arms, run_folder
    from cispo.compare.plan import make_plan
    from cispo.errors import RunError
    from cispo.files import read_json, write_json
    from cispo.runtime.interrupts import Interrupts

    work = out / "work" / task.policy
    shutil.rmtree(work / task.name, ignore_errors=True)
    recipe = str(ROOT / "recipes" / f"{POLICIES[task.policy]}.yaml")
    items = [
        recipe, f"policy.model={warm_folder(out, task.policy, start)}", "policy.config=null", "policy.tokenizer=null",
        "sft=null", "algorithm.kl_coef=0", f"learner.lr={task.lr!r}", f"seed={task.seed}", f"output_dir={work}",
        f"control.max_staleness={task.staleness}", *_length(task), "train.save_every=100000",
        "train.checkpoint=weights", "train.token_samples=100000", "logging=[]", "reward.workers=1", *keys,
    ]  # fmt: skip
    plan = make_plan(
        items, algorithms=task.arm, seeds=1, metric="eval/accuracy", updates=str(task.updates), name=task.name
    )
    interrupts = Interrupts(lambda _: None)
    begun = time.perf_counter()
    asyncio.run(run_arms(plan, 1, Console(file=io.StringIO()), interrupts, None))
    folder = run_folder(plan, plan.arms[0], 0)
    outcome = read_json(folder / "outcome.json")
    if outcome["status"] == "failed":
        raise RunError(f"{task.name}: {outcome['sentence']}; see {folder}")
    file = task.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"task": asdict(task), "start": start, "status": outcome["status"], "machine": _machine()}
    write_json(file, found | {"seconds": round(time.perf_counter() - begun, 1)} | result_of(folder))
    shutil.rmtree(work / task.name)


def _free_memory() -> None:
    """Gives the last run's memory on a GPU back, for the workers beside this one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _length(task: Task) -> list[str]:
    steps = STEPS.get(task.regime)
    return [f"train.steps={steps}", f"train.eval_every={steps // 5}"] if steps else []


def _machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__}"


def serve() -> None:
    """A worker: one order a line on stdin, one answer a line on the first stdout; all else goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import cispo.compare.command  # noqa: F401  imports while the worker before it trains

    for line in sys.stdin:
        order = json.loads(line)
        out, keys = Path(order["out"]), order["keys"]
        try:
            if "task" in order:
                train(out, Task(**order["task"]), order["start"], keys)
            else:
                warm_up(out, order["policy"], order["start"], order["model"], keys)
            _free_memory()
            answers.write("done\n")
        except Exception as error:
            answers.write(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}\n")


# Slots


class Slot(threading.Thread):
    """One run at a time, in a worker that serves many; with `fresh` in one of its own, started ahead."""

    def __init__(
        self, queue: Queue, number: int, keys: Sequence[str], models: Mapping[str, str], *, fresh: bool
    ) -> None:
        super().__init__(daemon=True)
        self.queue, self.number, self.keys, self.models, self.fresh = queue, number, list(keys), models, fresh
        self.workers: list[subprocess.Popen[str]] = []
        self.environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        cards = cards_here() if "device=cuda" in keys else []
        if cards:
            self.environment["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]

    def run(self) -> None:
        worker = self._worker()
        while True:
            order = self.queue.next(time.monotonic())
            if order == "wait":
                time.sleep(0.5)
                continue
            if isinstance(order, str):
                break
            ahead = self._worker() if self.fresh else worker
            begun = time.monotonic()
            answer = self._serve(worker, order)
            seconds = time.monotonic() - begun
            name = (
                f"warm-up {order.policy} {order.start}" if order.task is None else f"{order.policy} {order.task.name}"
            )
            print(f"{time.strftime('%H:%M:%S')} {name}: {answer} {seconds:.0f} s", flush=True)
            if answer == "done":
                self.queue.ended(order, seconds)
            else:
                self.queue.failed(order)
                worker.kill()
            if self.fresh:
                worker.stdin.close() if worker.stdin else None
                worker = ahead
            elif worker.poll() is not None or answer != "done":
                worker = self._worker()
        self.close()

    def _serve(self, worker: subprocess.Popen[str], order: Order) -> str:
        assert worker.stdin and worker.stdout
        line: dict[str, object] = {"out": str(self.queue.out), "start": order.start, "keys": self.keys}
        if order.task is None:
            line |= {"policy": order.policy, "model": self.models.get(order.policy)}
        else:
            line |= {"task": asdict(order.task)}
        try:
            worker.stdin.write(json.dumps(line) + "\n")
            worker.stdin.flush()
            return worker.stdout.readline().strip() or f"the worker ended ({worker.wait()})"
        except OSError as error:
            return str(error)

    def _worker(self) -> subprocess.Popen[str]:
        log = (self.queue.out / "work" / f"worker-{os.getpid()}-{self.number}.log").open("ab")
        worker = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            env=self.environment,
        )  # fmt: skip
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        """Ends the slot's workers with all that they started."""
        for worker in self.workers:
            try:
                os.killpg(worker.pid, 9)
            except ProcessLookupError:
                continue
            worker.wait()


def run(
    queue: Queue, workers: int, keys: Sequence[str], *, fresh: bool, models: Mapping[str, str] | None = None
) -> None:
    """`models` are the folders of pretrained policies, by the policy's name."""
    (queue.out / "work").mkdir(parents=True, exist_ok=True)
    slots = [Slot(queue, number, keys, models or {}, fresh=fresh) for number in range(workers)]
    for slot in slots:
        slot.start()
    try:
        for slot in slots:
            slot.join(max(0.0, queue.deadline - time.monotonic()))
    finally:
        for slot in slots:
            slot.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--policies", default="lightning_1m", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--regimes", default="16:0,4:0,1:0", help="updates a batch : staleness")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rates", default="1e-4,3e-4", help="learning rates of every arm")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--grid", choices=tuple(GRIDS), help="a list of runs by name, in place of the five above")
    parser.add_argument("--model", action="append", default=[], metavar="POLICY=FOLDER", help="of a pretrained policy")
    parser.add_argument("--starts", type=int, default=0, help="warm-ups that the seeds share in turn; 0: one each")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--expect", type=float, default=60.0, help="seconds of a run of which none has ended yet")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="changes to every run")
    args = parser.parse_args()
    if args.serve:
        return serve()
    out: Path = args.out.resolve()
    if not args.plot_only:
        deadline = time.monotonic() + 60 * args.minutes
        asked = Grid(
            policies=args.policies.split(","),
            regimes=[Regime.of(text) for text in args.regimes.split(",")],
            arms=args.arms.split(","),
            rates=[float(rate) for rate in args.rates.split(",")],
            seeds=[int(seed) for seed in args.seeds.split(",")],
        )
        tasks = tasks_of_grids(GRIDS[args.grid] if args.grid else [asked])
        queue = Queue(out, tasks, starts=args.starts, deadline=deadline, expect=args.expect)
        print(f"{len(tasks) - len(queue.waiting)} of {len(tasks)} runs ended", flush=True)
        form = [f"device={args.device}", "runtime=local", "rollout.engine=torch"]
        fresh = bool({"runtime=ray", "rollout.engine=vllm"} & set(args.keys))
        models = dict(text.split("=", 1) for text in args.model)
        run(queue, args.workers, [*form, *args.keys], fresh=fresh, models=models)
    else:
        from study_report import write_report

        write_report(out, list(load(out)))


if __name__ == "__main__":
    main()
