"""Every measurement of docs/performance.md and docs/parallel.md on this machine's GPUs, side by side on free cards.

    python scripts/bench_all.py --plan                                    the commands, nothing is run
    python scripts/bench_all.py --model FOLDER --out DIR [--cards 0,1] [--only start,step] [--minutes 60]

`--model` is a folder of SmolLM2-135M-Instruct (scripts/import_gguf.py makes one). A measurement begins, in the order
below, when as many cards are free as it needs; DIR/NAME.log has its output. Those of a host's times (start, step,
rollout, decode) suffer from others beside them: `--alone` runs one at a time. With `--minutes` none begins that would
not end in time by its usual length, and whatever still runs then is stopped. Exit code 1 where one failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHAIN_SUM = "recipes/smollm2_chain_sum.yaml"
SMALL = "policy.model={model} train.checkpoint=weights --steps 4"
LARGE = (
    "--shape qwen3-4b --tokenizer {model} rollout.engines=1 learner.gradient_checkpointing=true "
    "rollout.prompts_per_step=16 train.checkpoint=weights --steps 4"
)
STEP = "--device cuda --model {model} --prompts 64 --group 8 --tokens 512 --steps 3"
AHEAD = "--seeds 1 train.steps=40 train.eval_every=40 rollout.placement=separate"
HYBRID_AHEAD = "sft.steps=300 algorithm.updates_per_batch=4 --folder {out}/ahead"
DENSE_AHEAD = "policy.model={model} rollout.engines=1 --folder {out}/ahead_smollm2"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A script of this folder and its arguments, in which {model} and {out} are the command's."""

    name: str
    command: str
    cards: int = 1
    minutes: float = 2
    """It usually takes on an H200."""

    def words(self, model: str, out: Path) -> list[str]:
        script, *arguments = shlex.split(self.command)
        return [
            sys.executable,
            str(Path("scripts", script)),
            *(word.format(model=model, out=out) for word in arguments),
        ]


MEASUREMENTS = (
    Measurement("step", f"bench_step.py {STEP}", 1, 5),
    Measurement("lightning", "bench_lightning.py --lengths 32768", 1, 3.5),
    Measurement("start", f"bench_start.py {CHAIN_SUM} {SMALL}"),
    Measurement("start_4b", f"bench_start.py {CHAIN_SUM} {LARGE}", 1, 3),
    Measurement("rollout", "bench_rollout.py --model {model} --engines 1,2", 1, 3),
    Measurement("decode_hybrid", "bench_decode.py --hybrid --kernels"),
    Measurement("decode", "bench_decode.py --model {model} --check"),
    Measurement("lightning_64", "bench_lightning.py --skip-peer --dim 64", 1, 1),
    Measurement("lightning_256", "bench_lightning.py --skip-peer --dim 256", 1, 1),
    Measurement("tiles", "tune_lightning.py --seconds 80 --out {out}/tiles.json"),
    Measurement("loss", "bench_loss.py"),
    Measurement("delta", "bench_delta.py", 1, 4),
    Measurement("families", "bench_hybrid_engine.py --tokens 256", 1, 6),
    Measurement("drafts", "bench_speculative.py --model {model} --sequences 1,8,64 --tokens 192 --calls 2"),
    Measurement("heads", "bench_speculative.py --method mtp --right 0.8 --k 3 --sequences 1,8,64 --tokens 192"),
    Measurement("ahead", f"bench_async.py recipes/lightning_30m.yaml {AHEAD} {HYBRID_AHEAD}", 2, 4),
    Measurement("ahead_smollm2", f"bench_async.py {CHAIN_SUM} {AHEAD} {DENSE_AHEAD}", 2, 5),
    Measurement("shards", "bench_sharding.py --out {out}/shards.json", 2, 6),
    Measurement("latents", "bench_context.py latents --tokens 8192,65536,262144 --ranks 2 --out {out}/latents.json", 2),
    Measurement("context", "bench_context.py --out {out}/context.json", 2, 6),
    Measurement("experts", "bench_experts.py --memory 0 --out {out}/experts.json", 2, 4),
    Measurement("long_run", "bench_long_run.py --out {out}/long", 2, 7),
    Measurement("mesh", "bench_mesh.py gradients --out {out}/mesh.json", 4, 12),
    Measurement("mesh_context", "bench_mesh.py context experts --folder {out}/mesh", 4, 15),
    Measurement("mesh_runs", "bench_mesh.py runs --folder {out}/mesh", 4, 60),
)


class Cards:
    """The free ones."""

    def __init__(self, names: Sequence[str]) -> None:
        self._free, self._changed = list(names), asyncio.Condition()

    async def take(self, count: int) -> list[str]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            taken, self._free = self._free[:count], self._free[count:]
            return taken

    async def give(self, names: Sequence[str]) -> None:
        async with self._changed:
            self._free = sorted([*self._free, *names])
            self._changed.notify_all()


async def run(one: Measurement, cards: Sequence[str], model: str, out: Path, until: float) -> bool:
    """Its output goes into its log; False where it fails or has no time left."""
    print(f"{one.name} begins on {', '.join(cards)}", flush=True)
    begun = time.monotonic()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(cards), "PYTHONUNBUFFERED": "1"}
    with (out / f"{one.name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *one.words(model, out), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = await asyncio.wait_for(process.wait(), until - begun)
        except TimeoutError:
            code = None
        finally:
            # A Ray cluster ends with the process that began it; what hangs does not.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    said = "was stopped" if code is None else f"ended with exit code {code}"
    print(f"{one.name} {said} after {time.monotonic() - begun:.0f} s: {out / one.name}.log", flush=True)
    return code == 0


async def run_all(wanted: Sequence[Measurement], cards: Sequence[str], options: argparse.Namespace) -> bool:
    free, running = Cards(cards), list[asyncio.Task[bool]]()
    until = time.monotonic() + 60 * options.minutes

    async def one(measurement: Measurement, taken: Sequence[str]) -> bool:
        try:
            return await run(measurement, taken, options.model, options.out, until)
        finally:
            await free.give(taken)

    for measurement in wanted:
        if measurement.cards > len(cards):
            print(f"{measurement.name} needs {measurement.cards} cards", flush=True)
            continue
        taken = await free.take(len(cards) if options.alone else measurement.cards)
        if time.monotonic() + 60 * measurement.minutes > until:
            print(f"{measurement.name} has no time left", flush=True)
            await free.give(taken)
            continue
        running.append(asyncio.create_task(one(measurement, taken)))
    return all([await task for task in running])


def cards_here() -> list[str]:
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the commands")
    parser.add_argument("--model", default="FOLDER", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_all"), help="folder of the logs")
    parser.add_argument("--cards", help="numbers, separated by commas; all where it is left out")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--alone", action="store_true", help="one at a time")
    parser.add_argument("--minutes", type=float, default=24 * 60)
    options = parser.parse_args()
    known = {one.name: one for one in MEASUREMENTS}
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no measurement {unknown[0]!r}; there are {', '.join(known)}")
    wanted = [known[name] for name in names]
    options.out = options.out.absolute()
    if options.plan:
        for one in wanted:
            words = shlex.join(one.words(options.model, options.out)[1:])
            print(f"{one.name}: {one.cards} card{'s' if one.cards > 1 else ''}, {one.minutes:g} min: python {words}")
        return
    cards = options.cards.split(",") if options.cards else cards_here()
    if not cards:
        raise SystemExit("bench_all.py runs measurements of GPUs, and there is none here")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        passed = asyncio.run(run_all(wanted, cards, options))
    except KeyboardInterrupt:
        sys.exit("interrupted: what ran was stopped")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
