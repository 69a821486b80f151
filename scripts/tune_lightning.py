"""Tiles of lightning attention's kernels on this card: tries a table of them, checks each and times what passes.

    python scripts/tune_lightning.py [--seconds 150] [--dims 64 128 256] [--lengths 8192 32768] [--out FILE]

bfloat16, one document. Workers compile side by side, run each candidate on a short document that ends inside a chunk
and compare it with the default tiles (norm of the difference over the norm; at most 1e-2); one that is wrong, does not
fit or hangs is left out. Then one process times those of the shortest document, and the best five of each pass on the
longer ones, as replays of a CUDA graph. The floor is what each pass must move at the speed of a large copy: four
tensors for o and for dq, six for dk and dv. The winners are entries of `cispo/ops/lightning_tiles.py`, `CARDS`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

import torch
from bench_lightning import bounds_of, copy_rate, inputs, slopes_of
from torch import Tensor
from triton.testing import do_bench_cudagraph  # pyright: ignore[reportMissingImports]

from cispo.ops import lightning_tiles, lightning_triton
from cispo.ops.lightning_tiles import Pass, Tiles, tiles_of

PASSES: tuple[Pass, ...] = ("out", "dq", "dk_dv")
MOVED = {"out": 4, "dq": 4, "dk_dv": 6}
"""Tensors that a pass reads and writes."""
FEW = 2000 + 9
"""Tokens of the check: several segments, the last chunk not full."""


class Candidate(NamedTuple):
    dim: int
    kind: Pass
    tiles: Tiles


def candidates(dim: int) -> list[Tiles]:
    """Tiles worth a try at a head dimension: chunk, block, warps, stages, resident, overlapped."""
    if dim == 256:
        found = [Tiles(32, 64, 8, 3, 1), Tiles(32, 64, 4, 2, 2), Tiles(64, 64, 8, 2, 1), Tiles(32, 128, 8, 2, 1)]
        return [*found, Tiles(64, 64, 8, 2, 1, True), Tiles(64, 64, 4, 2, 1, True), Tiles(64, 128, 8, 2, 1, True)]
    found = [Tiles(64, 64, 4, 2, 2), Tiles(64, 64, 4, 3, 1)]
    found += [Tiles(64, 64, 4, s, r, True) for s, r in ((2, 1), (2, 2), (3, 1), (4, 1), (5, 1))]
    found += [Tiles(64, 64, 8, s, 1, True) for s in (2, 3, 4)]
    if dim == 64:
        return [*found, Tiles(64, 64, 4, 3, 2), *(Tiles(64, 64, 4, s, r, True) for s, r in ((3, 2), (2, 3), (4, 2)))]
    return [*found, Tiles(128, 64, 8, 2, 1, True), *(Tiles(64, 128, 8, s, 1, True) for s in (2, 3, 4))]


@contextmanager
def chosen(candidate: Candidate) -> Iterator[None]:
    """The candidate in place of the card's own tiles."""
    entries: dict[tuple[Pass, int], Tiles] = {(candidate.kind, candidate.dim): candidate.tiles}
    if candidate.kind != "dk_dv":  # their segments are cut alike
        other: Pass = "dq" if candidate.kind == "out" else "out"
        entries[other, candidate.dim] = candidate.tiles
    before = dict(lightning_tiles.CARDS)
    lightning_tiles.CARDS.clear()
    lightning_tiles.CARDS[""] = entries
    try:
        yield
    finally:
        lightning_tiles.CARDS.clear()
        lightning_tiles.CARDS.update(before)


def step_of(kind: Pass, data: list[Tensor], heads: int) -> Callable[[], list[Tensor]]:
    """The pass alone, with the pass over segments that it needs (dq takes the one of o)."""
    q, k, v, grad = data
    slopes, bounds = slopes_of(heads), bounds_of([len(q)])
    if kind == "out":
        return lambda: [lightning_triton.attend(q, k, v, slopes, bounds)[0]]
    if kind == "dq":
        return lambda: [lightning_triton.query_gradient((q, k, v), grad, slopes, bounds)]
    return lambda: list(lightning_triton.key_value_gradients((q, k, v), grad, slopes, bounds))


def error_of(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of |ours - exact| / |exact|; infinite where a value is not finite."""
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours, exact, strict=True)]
    return max(errors) if all(torch.isfinite(a).all() for a in ours) else float("inf")


def try_out(todo: multiprocessing.Queue[Candidate], done: multiprocessing.Queue[tuple[Candidate, float, str]]) -> None:
    """A worker: compiles candidates, runs each and reports its error; one that fails is its last."""
    heads = 64
    while True:
        candidate = todo.get()
        try:
            data = inputs(FEW, heads, candidate.dim, torch.bfloat16)
            step = step_of(candidate.kind, data, heads)
            exact = step()
            with chosen(candidate):
                results = [step() for _ in range(4)]
            same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
            error = error_of(results[0], exact) if same else float("inf")
            done.put((candidate, error, "" if same else "its results move: a race"))
        except Exception as problem:  # of any type: a candidate that fails is left out
            done.put((candidate, float("inf"), f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"))
            # A failed kernel leaves no usable device behind; the queue's thread needs the time to send.
            done.close()
            done.join_thread()
            return


def check(wanted: list[Candidate], workers: int, until: float) -> set[Candidate]:
    """The candidates that are right; a worker that hangs, fails or dies takes one candidate with it."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for candidate in wanted:
        todo.put(candidate)
    processes: list[SpawnProcess] = []
    right: set[Candidate] = set()
    answered, quiet_since = 0, time.monotonic()
    while answered < len(wanted) and time.monotonic() < until:
        alive = sum(process.is_alive() for process in processes)
        for _ in range(min(workers, len(wanted) - answered) - alive):
            processes.append(context.Process(target=try_out, args=(todo, done), daemon=True))
            processes[-1].start()
        try:
            candidate, error, problem = done.get(timeout=1)
        except queue.Empty:
            if answered and time.monotonic() - quiet_since > 20:
                break
            continue
        answered, quiet_since = answered + 1, time.monotonic()
        if error <= 1e-2:
            right.add(candidate)
        else:
            print(f"left out: {candidate.dim} {candidate.kind} {tuple(candidate.tiles)}: error {error:.1e} {problem}")
    for process in processes:
        process.kill()
        process.join()
    print(f"{len(right)} of {len(wanted)} candidates are right, {len(wanted) - answered} gave no answer", flush=True)
    return right


def time_of(candidate: Candidate, step: Callable[[], list[Tensor]], exact: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of a pass, and its error."""
    with chosen(candidate):
        error = error_of(step(), exact)
        return float(do_bench_cudagraph(step, rep=10, return_mode="median")), error


def compare(
    dim: int, kind: Pass, right: set[Candidate], lengths: list[int], heads: int, rate: float, until: float
) -> list[dict[str, object]]:
    """Times a pass, prints its table and returns the rows."""
    own = Candidate(dim, kind, tiles_of(torch.cuda.get_device_name(), kind, torch.bfloat16, dim))
    left = sorted(candidate for candidate in right | {own} if (candidate.dim, candidate.kind) == (dim, kind))
    rows: list[dict[str, object]] = []
    for tokens in lengths:
        data = inputs(tokens, heads, dim, torch.bfloat16)
        floor = MOVED[kind] * data[0].numel() * 2 / rate
        step = step_of(kind, data, heads)
        exact = step()
        found = {candidate: time_of(candidate, step, exact) for candidate in left if time.monotonic() < until}
        ordered = sorted(found, key=found.__getitem__)
        print(f"\nD={dim} {kind} {tokens} tokens, floor {floor:.3f} ms")
        for candidate in ordered:
            time_taken, error = found[candidate]
            mark = "own" if candidate == own else ""
            print(f"  {time_taken:8.3f} {time_taken / floor:6.2f}  {error:.0e} {mark:<4} {tuple(candidate.tiles)}")
            row = {"dim": dim, "pass": kind, "tokens": tokens, "ms": time_taken, "floor": floor, "error": error}
            rows.append(row | {"tiles": tuple(candidate.tiles), "own": candidate == own})
        left = [*{own, *ordered[:5]}]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_lightning.py measures GPU kernels, and there is no GPU here")
    begun = time.monotonic()
    wanted = [Candidate(dim, kind, tiles) for dim in options.dims for kind in PASSES for tiles in candidates(dim)]
    right = check(wanted, options.workers, begun + options.seconds * 0.6)
    print(f"checked after {time.monotonic() - begun:.0f} s", flush=True)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {rate / 1e9:.2f} TB/s; H={options.heads}")
    print("ms, of the floor, error, tiles (chunk, block, warps, stages, resident, overlapped)")
    rows: list[dict[str, object]] = []
    for dim in options.dims:
        for kind in PASSES:
            rows += compare(dim, kind, right, options.lengths, options.heads, rate, begun + options.seconds)
            if options.out:
                options.out.write_text(json.dumps({"copy": rate, "rows": rows}, indent=1))
    print(f"took {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
