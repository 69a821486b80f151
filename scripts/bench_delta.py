"""The delta rule and the short convolution beside flash-linear-attention and the token loop, at real head sizes.

    python scripts/bench_delta.py [--tokens 16384] [--only errors train decode prefill convolution] [--device cpu]

    train         one layer on packed documents of 16 to 4,096 tokens, bfloat16: forward, forward and backward, memory
    errors        |x - exact| / |exact| of outputs, states and gradients against float64, at 4,096 tokens
    decode        one token of each of 256 sequences by slot of a cache, in a CUDA graph; several tiles
    prefill       prompts by slot: many short ones, and one long
    convolution   packed documents, bfloat16, width 4, and one token of each of 256 sequences

gdn is Qwen3-Next's layer (16 key heads, 32 value heads, 128 x 128), kda Kimi-Linear's (32 heads, 128 x 128). `ours` is
the form that the op chooses, `chunks` the plain torch form, `naive` the recurrence in torch (a sixteenth of the tokens,
times 16). A contestant that fails says so and is left out. Times are medians in milliseconds; ratios are to `ours`. On
a CPU only the torch forms run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.convolution import convolve, convolve_decode, convolve_step
from cispo.ops.delta import DELTA, delta_decode, delta_prefill, delta_step
from cispo.ops.reference import delta_recurrence

Rule = Callable[..., tuple[Tensor, Tensor | None]]
Mix = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[], object]

KINDS = {"gdn": (16, 32, 128, 128), "kda": (32, 32, 128, 128)}
"""Key heads, value heads, K, V."""
CHANNELS = 8192
"""Of Qwen3-Next's convolution: q, k and v."""
WIDTH, SEQUENCES = 4, 256

step_by_slot: Callable[..., Tensor] = delta_decode
prompts_by_slot: Callable[..., Tensor] = delta_prefill
step_in_torch: Callable[..., Tensor] = delta_step
token_loop: Rule = delta_recurrence


class Bench:
    def __init__(self, device: str, tokens: int) -> None:
        self.device, self.tokens = torch.device(device), tokens

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def lengths(self, tokens: int, longest: int = 4096) -> list[int]:
        """Ragged documents, log-uniform, `tokens` together."""
        generator = torch.Generator().manual_seed(0)
        found: list[int] = []
        while sum(found) < tokens:
            length = int(16 * (longest / 16) ** float(torch.rand((), generator=generator)))
            found.append(min(length, tokens - sum(found)))
        return found

    def bounds(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def inputs(self, kind: str, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v in `dtype`, decays and betas in float32 as a layer makes them: A_log from -3 to 1, dt_bias normal."""
        torch.manual_seed(0)
        groups, heads, key, value = KINDS[kind]
        q, k = (F.normalize(self.normal(tokens, groups, key), dim=-1) for _ in range(2))
        v = self.normal(tokens, heads, value)
        rate = torch.linspace(-3, 1, heads, device=self.device).exp()
        gate = F.softplus(self.normal(tokens, heads, key) + self.normal(heads, key) - 1)
        g = -rate[:, None] * gate if kind == "kda" else -rate * gate[..., 0]
        return [(q * key**-0.5).to(dtype), k.to(dtype), v.to(dtype), g, self.normal(tokens, heads).sigmoid()]

    def median(self, step: Step, graph: bool = False) -> float:
        if self.gpu:
            from triton.testing import do_bench, do_bench_cudagraph  # pyright: ignore[reportMissingImports]

            if graph:
                return float(do_bench_cudagraph(step, rep=100, return_mode="median"))
            return float(do_bench(step, warmup=25, rep=150, return_mode="median"))
        times = []
        for _ in range(4):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times[1:])

    def memory(self, step: Step) -> float:
        """GiB above those in use before."""
        if not self.gpu:
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def copy_rate(self) -> float:
        """Bytes a millisecond, read and written."""
        source = torch.empty(1 << (30 if self.gpu else 24), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median(lambda: target.copy_(source))


def fla_rule() -> Rule:
    import fla.ops.gated_delta_rule  # pyright: ignore[reportMissingImports]  # noqa: F401

    from cispo.ops import delta_fla

    return delta_fla.attend


def fla_step(kind: str) -> Callable[..., Tensor]:
    """One token of each sequence by the recurrent kernels: states out of place, as rows."""
    if kind == "kda":
        from fla.ops.kda import fused_recurrent_kda as run  # pyright: ignore[reportMissingImports]
    else:
        from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
            fused_recurrent_gated_delta_rule as run,
        )

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, states: Tensor) -> Tensor:
        q, k, v, g, b = (x[:, None] for x in (q, k, v, g, b))
        return run(q=q, k=k, v=v, g=g, beta=b, scale=1.0, initial_state=states, output_final_state=True)[0]

    return step


def chunks(*inputs: Tensor | bool | None) -> tuple[Tensor, Tensor | None]:
    return DELTA.packed(*inputs, backend="torch")


T = TypeVar("T")


def attempt(name: str, make: Callable[[], T]) -> T | None:
    """The value, or a line that says why there is none."""
    try:
        return make()
    except Exception as error:  # a contestant may lack a library, a shape or memory
        print(f"    {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def table(title: str, times: Mapping[str, float | None], notes: Mapping[str, str] | None = None) -> None:
    """A row a contestant: milliseconds, and how many times `ours`."""
    print(title)
    base = times.get("ours")
    for name, milliseconds in times.items():
        if milliseconds is not None:
            ratio = f"{milliseconds / base:8.2f}x" if base else ""
            print(f"    {name:<22} {milliseconds:10.3f} ms {ratio} {(notes or {}).get(name, '')}", flush=True)


def compare(bench: Bench, title: str, steps: Mapping[str, Step], graph: bool = False, memory: bool = False) -> None:
    used = {name: attempt(name, partial(bench.memory, step)) for name, step in steps.items()} if memory else {}
    times = {name: attempt(name, partial(bench.median, step, graph)) for name, step in steps.items()}
    table(title, times, {name: f"{gib:6.2f} GiB" for name, gib in used.items() if gib})


def train(bench: Bench, kind: str) -> None:
    lengths = bench.lengths(bench.tokens)
    bounds, data = bench.bounds(lengths), bench.inputs(kind, bench.tokens, torch.bfloat16)
    grad = torch.randn_like(data[2])
    part = bench.tokens // 16
    few, few_bounds = [x[:part] for x in data], bench.bounds(bench.lengths(part))

    def forward(rule: Rule) -> object:
        with torch.no_grad():
            return rule(*data, bounds, None, False)

    def both(rule: Rule) -> object:
        leaves = [x.detach().requires_grad_() for x in data]
        return torch.autograd.grad(rule(*leaves, bounds, None, False)[0], leaves, grad)

    def loop_forward() -> object:
        with torch.no_grad():
            return token_loop(*few, few_bounds)

    def loop() -> object:
        leaves = [x.detach().requires_grad_() for x in few]
        return torch.autograd.grad(token_loop(*leaves, few_bounds)[0], leaves, grad[:part])

    print(f"\n{kind} {KINDS[kind]}, bfloat16, {bench.tokens} tokens in {len(lengths)} documents up to {max(lengths)}")
    rules = contestants(bench)
    compare(bench, "  forward", {name: partial(forward, rule) for name, rule in rules.items()})
    title = "  forward and backward, and its memory"
    compare(bench, title, {name: partial(both, rule) for name, rule in rules.items()}, memory=True)
    naive = attempt("naive", lambda: 16 * bench.median(loop_forward)), attempt("naive", lambda: 16 * bench.median(loop))
    table("  the token loop", dict(zip(("naive, forward", "naive, both"), naive, strict=True)))


def contestants(bench: Bench) -> dict[str, Rule]:
    rules: dict[str, Rule] = {"ours": DELTA.packed, "chunks": chunks}
    peer = attempt("fla", fla_rule) if bench.gpu else None
    return rules if peer is None else {**rules, "fla": peer}


def errors(bench: Bench, kind: str) -> None:
    names = ("o", "state", "dq", "dk", "dv", "dg", "dbeta")
    tokens = min(bench.tokens, 4096)
    lengths = bench.lengths(tokens)
    bounds = bench.bounds(lengths)

    def results(rule: Rule, data: Sequence[Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        grads = [bench.normal(*data[2].shape).bfloat16(), bench.normal(len(lengths), *KINDS[kind][1:]).bfloat16()]
        leaves = [x.detach().requires_grad_() for x in data]
        o, state = rule(*leaves, bounds, None, True)
        assert state is not None
        found = torch.autograd.grad((o, state), leaves, [grads[0].to(o), grads[1].to(state)])
        return [x.detach() for x in (o, state, *found)]

    print(f"\n{kind}: errors against float64, {tokens} tokens in {len(lengths)} documents")
    print(f"    {'':<18}" + "".join(f"{name:>9}" for name in names))
    for dtype in (torch.bfloat16, torch.float32):
        data = bench.inputs(kind, tokens, dtype)
        exact = results(chunks, [x.double() for x in data])
        for name, rule in contestants(bench).items():
            mine = attempt(name, partial(results, rule, data))
            if mine is not None:
                found = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True)]
                print(f"    {f'{name} {str(dtype)[6:]}':<18}" + "".join(f"{e:9.1e}" for e in found), flush=True)


def decode(bench: Bench, kind: str) -> None:
    _, heads, key, value = KINDS[kind]
    data = bench.inputs(kind, SEQUENCES, torch.bfloat16)
    cache = bench.normal(SEQUENCES, heads, key, value)
    slots = torch.randperm(SEQUENCES, device=bench.device).int()
    fresh = torch.zeros(SEQUENCES, dtype=torch.bool, device=bench.device)
    steps: dict[str, Step] = {
        "ours": lambda: step_by_slot(*data, cache, slots, fresh),
        "torch, in place": lambda: step_in_torch(*data, cache),
    }
    if bench.gpu:
        from cispo.ops import delta_triton

        kernel: Callable[..., Tensor] = delta_triton.decode
        for block, warps in ((8, 1), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)):
            tiles = delta_triton.Tiles(block, warps)
            steps[f"block {block}, {warps} warps"] = partial(kernel, *data, cache, slots, fresh, tiles=tiles)
        peer = attempt("fla", partial(fla_step, kind))
        if peer is not None:
            steps["fla, states copied"] = lambda: peer(*data, cache)
    floor = 2 * cache.numel() * 4 / bench.copy_rate()
    title = f"\n{kind}: decode of {SEQUENCES} sequences; floor {floor:.3f} ms (each state read and written)"
    compare(bench, title, steps, graph=bench.gpu)


def prefill(bench: Bench, kind: str) -> None:
    for lengths in (bench.lengths(bench.tokens // 2, 512), [min(8192, bench.tokens)]):
        prefill_of(bench, kind, lengths)


def prefill_of(bench: Bench, kind: str, lengths: Sequence[int]) -> None:
    _, heads, key, value = KINDS[kind]
    tokens, bounds = sum(lengths), bench.bounds(lengths)
    data = bench.inputs(kind, tokens, torch.bfloat16)
    cache = bench.normal(len(lengths), heads, key, value)
    slots = torch.arange(len(lengths), device=bench.device)
    fresh = torch.ones(len(lengths), dtype=torch.bool, device=bench.device)
    steps: dict[str, Step] = {
        "ours": lambda: prompts_by_slot(*data, bounds, cache, slots, fresh),
        "chunks": lambda: chunks(*data, bounds, cache, True),
    }
    if bench.gpu:
        from cispo.ops import delta_triton

        kernel: Callable[..., Tensor] = delta_triton.prefill
        for block, warps in ((4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (32, 2), (32, 4)):
            tiles = delta_triton.Tiles(block, warps)
            steps[f"block {block}, {warps} warps"] = partial(kernel, *data, bounds, cache, slots, fresh, tiles=tiles)
        peer = attempt("fla", fla_rule)
        if peer is not None:
            steps["fla, states copied"] = lambda: peer(*data, bounds, cache, True)
    with torch.no_grad():
        title = f"\n{kind}: prefill by slot, {tokens} tokens in {len(lengths)} prompts up to {max(lengths)}"
        compare(bench, title, steps)


def fla_mix(bounds: Tensor) -> Mix:
    from fla.modules.causal_conv1d import causal_conv1d  # pyright: ignore[reportMissingImports]

    return lambda x, w: causal_conv1d(x[None], w, activation="silu", cu_seqlens=bounds)[0][0]


def convolution(bench: Bench) -> None:
    torch.manual_seed(0)
    lengths = bench.lengths(bench.tokens)
    bounds, channels = bench.bounds(lengths), CHANNELS if bench.gpu else 512
    x, weight = bench.normal(bench.tokens, channels).bfloat16(), bench.normal(channels, WIDTH).bfloat16()
    grad = torch.randn_like(x)
    mixes: dict[str, Mix] = {
        "ours": lambda x, w: convolve(x, w, bounds)[0],
        "torch": lambda x, w: convolve(x, w, bounds, backend="torch")[0],
    }
    peer = attempt("fla", partial(fla_mix, bounds)) if bench.gpu else None
    if peer is not None:
        mixes["fla"] = peer

    def forward(mix: Mix) -> object:
        with torch.no_grad():
            return mix(x, weight)

    def both(mix: Mix) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(mix(leaves[0], leaves[1]), leaves, grad)

    floor = x.nbytes / bench.copy_rate()
    print(f"\nconvolution, {bench.tokens} tokens in {len(lengths)} documents, {channels} channels, bfloat16")
    steps = {name: partial(forward, mix) for name, mix in mixes.items()}
    compare(bench, f"  forward, floor {2 * floor:.3f} ms (x read, y written)", steps)
    title = f"  forward and backward, floor {5 * floor:.3f} ms, and its memory"
    compare(bench, title, {name: partial(both, mix) for name, mix in mixes.items()}, memory=True)
    exact = both(lambda x, w: convolve(x.double(), w.double(), bounds, backend="torch")[0].to(x.dtype))
    for name, mix in mixes.items():
        mine = attempt(name, partial(both, mix))
        if mine is not None:
            found = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(mine, exact, strict=True)]
            print(f"    {name}: errors of dx {found[0]:.1e}, dw {found[1]:.1e}")
    rows, cache = x[:SEQUENCES], bench.normal(SEQUENCES, WIDTH - 1, channels)
    slots = torch.randperm(len(rows), device=bench.device).int()
    steps = {
        "ours": lambda: convolve_decode(rows, weight, cache, slots),
        "torch, in place": lambda: convolve_step(rows, weight, cache[: len(rows)]),
    }
    compare(bench, f"  decode of {len(rows)} sequences", steps, graph=bench.gpu)


def each_kind(section: Callable[[Bench, str], None], bench: Bench) -> None:
    for kind in KINDS:
        attempt(kind, partial(section, bench, kind))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "errors": partial(each_kind, errors),
    "train": partial(each_kind, train),
    "decode": partial(each_kind, decode),
    "prefill": partial(each_kind, prefill),
    "convolution": convolution,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    bench = Bench(options.device, options.tokens)
    name = torch.cuda.get_device_name() if bench.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; copy {bench.copy_rate() / 1e9:.2f} TB/s")
    for section in options.only:
        start = time.perf_counter()
        attempt(section, partial(SECTIONS[section], bench))
        print(f"  ({section}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
