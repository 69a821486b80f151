"""Tiles of the experts of a decode step, of our kernels and of vLLM's: tries a table, checks each, times what passes.

    python scripts/tune_experts.py [--seconds 75] [--shapes long_context lightning_30m] [--tokens 32 8 64 128 512]

bfloat16, random experts. Workers compile side by side, run each candidate and compare it with vLLM's own tiles (norm of
the difference over the norm; at most 2e-2); one that is wrong or does not fit is left out. Then one process times them,
vLLM's own tiles among them, as replays of a CUDA graph of twenty calls: from chosen experts to the mixture with vLLM's
kernels, to the rows of `ops.experts` with ours, which are weighed elsewhere. Each call has operands of its own, as a
model's layers have: the weights of small experts would stay in the card's cache from call to call. The floor is the
weights of the chosen experts at the speed of a large copy. Winners over vLLM's own by at least 3 % are printed as
entries of `cispo/policies/expert_tiles.py`; ours are `GATE_UP` and `DOWN` of `cispo/ops/experts_triton.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product

import torch
from bench_lightning import copy_rate
from torch import Tensor
from vllm.model_executor.layers.fused_moe import fused_experts, override_config

from cispo.ops.experts import FEW_TOKENS
from cispo.ops.experts_triton import DOWN, GATE_UP, Tiles, expert_rows
from cispo.policies.expert_tiles import ExpertShape, ExpertTiles

SHAPES = {
    "long_context": ExpertShape(8, 2048, 1408, 2),
    "lightning_30m": ExpertShape(8, 512, 256, 2),
    "16 experts": ExpertShape(16, 2048, 1408, 2),
    "64 experts": ExpertShape(64, 2048, 512, 8),
}
CALLS = 20
MARGIN = 0.97
LIMIT = 2e-2
SHARED_MEMORY = 227 * 1024

Case = tuple[ExpertShape, int]
"""A shape and the tokens of a pass."""
Ours = tuple[Tiles, Tiles]
"""Of the first product and of the second."""
Candidate = ExpertTiles | Ours


def of_vllm(tokens: int) -> list[Candidate]:
    """Tiles worth a try: few rows of an expert for few tokens, and what fits into a multiprocessor's memory."""
    if tokens <= FEW_TOKENS:
        found = product((16,), (32, 64, 128), (64, 128, 256), (4, 8), (3, 4))
    else:
        found = product((16, 32) if tokens <= 128 else (64, 128), (64, 128), (64, 128), (4, 8), (3, 4))
    tiles = [ExpertTiles(*numbers) for numbers in found]
    # Eight warps have too little to do on a narrow tile of few rows.
    tiles = [t for t in tiles if t.warps == 4 or t.rows * t.columns >= 2048]
    return [t for t in tiles if 2 * t.stages * t.depth * (t.rows + t.columns) <= SHARED_MEMORY]


def of_ours(tokens: int) -> list[Candidate]:
    """One of the two products with other tiles."""
    if tokens > FEW_TOKENS:
        return []
    tiles = [Tiles(c, d, w, s) for c, d, w, s in product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5))]
    tiles = [t for t in tiles if (t.warps == 4 or t.columns == 128) and (t.stages == 4 or t.depth * t.columns <= 8192)]
    first = [t for t in tiles if 2 * t.stages * t.depth * (2 * t.columns + 32) <= SHARED_MEMORY]
    second = [t for t in tiles if 2 * t.stages * t.depth * (t.columns + 32) <= SHARED_MEMORY]
    return [*((t, DOWN) for t in first), *((GATE_UP, t) for t in second)]


def inputs(case: Case, call: int = 0) -> tuple[Tensor, ...]:
    """x, the two weights, and weights and experts of each token."""
    shape, tokens = case
    torch.manual_seed(tokens * CALLS + call)
    experts, hidden, width, top_k = shape
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(experts, 2 * width, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
    down = torch.randn(experts, hidden, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    weights, chosen = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(top_k)
    return x, gate_up, down, weights, chosen.int()


def run(data: tuple[Tensor, ...], candidate: Candidate | None) -> Tensor:
    """The mixture by vLLM's kernels, with the tiles or with vLLM's own, or the rows by ours."""
    x, gate_up, down, weights, chosen = data
    if candidate is None or isinstance(candidate, ExpertTiles):
        with override_config(None if candidate is None else candidate.config):
            return fused_experts(x, gate_up, down, weights, chosen)
    return expert_rows(x, gate_up, down, chosen, *candidate)


_inputs: dict[Case, tuple[tuple[Tensor, ...], Tensor]] = {}
"""A worker's operands and vLLM's result with its own tiles."""


def is_right(case: Case, candidate: Candidate) -> bool:
    """In a worker: compiles, runs, and compares."""
    if case not in _inputs:
        data = inputs(case)
        _inputs[case] = data, run(data, None).float()
    data, exact = _inputs[case]
    found = run(data, candidate).float()
    if found.ndim == 3:
        found = (found * data[3][..., None]).sum(1)
    return float((found - exact).norm() / exact.norm()) <= LIMIT


def check(cases: list[Case], workers: int, until: float) -> dict[Case, list[Candidate]]:
    """The candidates of each case that are right."""
    right: dict[Case, list[Candidate]] = {case: [] for case in cases}
    # fork: the modules are there, and CUDA starts in the workers alone.
    assert not torch.cuda.is_initialized()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        wanted = [(case, tiles) for case in cases for tiles in [*of_ours(case[1]), *of_vllm(case[1])]]
        tasks = {pool.submit(is_right, *both): both for both in wanted}
        try:
            for task in as_completed(tasks, max(1.0, until - time.monotonic())):
                case, tiles = tasks[task]
                problem = task.exception()
                if problem is None and task.result():
                    right[case].append(tiles)
                else:
                    reason = "another result" if problem is None else str(problem).partition("\n")[0]
                    print(f"left out: {case[1]} tokens {tiles}: {reason}")
        except TimeoutError:
            print(f"{sum(not task.done() for task in tasks)} of {len(tasks)} candidates were not reached")
            pool.shutdown(wait=True, cancel_futures=True)
    return right


def microseconds(calls: list[tuple[Tensor, ...]], candidate: Candidate | None) -> float:
    """Of a call, the least of five replays."""
    run(calls[0], candidate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for data in calls:
            run(data, candidate)
    return min(_replays(graph)) / len(calls)


def _replays(graph: torch.cuda.CUDAGraph) -> Iterator[float]:
    for _ in range(5):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        yield 1e3 * begun.elapsed_time(ended)


def compare(case: Case, right: list[Candidate], rate: float, until: float) -> ExpertTiles | None:
    """Prints the best of a case beside vLLM's own; returns vLLM's winner, None where its own tiles are as good.

    `rate` in bytes a microsecond.
    """
    shape, tokens = case
    calls = [inputs(case, call) for call in range(CALLS)]
    own = microseconds(calls, None)
    times = {tiles: microseconds(calls, tiles) for tiles in right if time.monotonic() < until}
    chosen = sum(len(call[4].unique()) for call in calls) / len(calls)
    floor = chosen * 3 * shape.hidden * shape.width * 2 / rate
    print(f"\n{tuple(shape)}, {tokens} tokens: floor {floor:.1f} us, vLLM's own {own:.1f}")
    best = sorted((t for t in times if isinstance(t, ExpertTiles)), key=times.__getitem__)
    ours = [t for t in times if not isinstance(t, ExpertTiles)]
    first = sorted((t for t in ours if t[1] == DOWN), key=times.__getitem__)
    second = sorted((t for t in ours if t[0] == GATE_UP), key=times.__getitem__)
    if first and second:
        both = first[0][0], second[0][1]
        times[both] = microseconds(calls, both)
        first.insert(0, both)
    for tiles in [*best[:4], *first[:5], *second[:4]]:
        name = "vLLM" if isinstance(tiles, ExpertTiles) else "ours"
        numbers = tuple(tiles) if isinstance(tiles, ExpertTiles) else f"{tuple(tiles[0])}, {tuple(tiles[1])}"
        print(f"  {times[tiles]:7.1f}  {times[tiles] / own:.2f} of vLLM's own  {name} {numbers}", flush=True)
    return best[0] if best and times[best[0]] < MARGIN * own else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["long_context", "lightning_30m"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 8, 64, 128, 512])
    parser.add_argument("--workers", type=int, default=14)
    options = parser.parse_args()
    begun = time.monotonic()
    shapes = [SHAPES[name] for name in options.shapes]
    cases = [(shape, tokens) for tokens in options.tokens for shape in shapes]
    right = check(cases, options.workers, begun + options.seconds * 0.65)
    print(f"{sum(map(len, right.values()))} candidates are right after {time.monotonic() - begun:.0f} s", flush=True)
    rate, until = copy_rate() / 1e3, begun + options.seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {rate / 1e6:.2f} TB/s")
    print("us a call; vLLM: rows, columns, depth, warps, stages; ours: columns, depth, warps, stages of both products")
    winners = {case: compare(case, right[case], rate, until) for case in cases}
    print("\nCARDS[...] = {")
    for shape in shapes:
        found = {tokens: tuple(w) for (of, tokens), w in sorted(winners.items()) if of == shape and w is not None}
        print(f"    {shape}: {found},")
    print(f"}}\ntook {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
