"""Lightning attention on a GPU beside flash-linear-attention and the memory floor: medians in milliseconds.

    python scripts/bench_lightning.py [--lengths 8192 32768 131072] [--heads 64] [--dim 128] [--skip-peer]

One document in bfloat16. The floor is what must move at the speed of a large copy: four tensors forward, and seven more
backward. `products` is the time of the products at the rate of a large one: 4 D (C + D) operations a token and head in
chunks of C = 64, and three times as many backward (dq, dk and dv are such passes). The peer is `chunk_lightning_attn`
(its slopes differ from MiniMax's, its cost does not); its first call searches its tile sizes for minutes. `issued`
times calls as a program makes them, `graph` replays of a CUDA graph, in which the host plays no part. Errors are
|ours - exact| / |exact| against the float64 form on eight heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from cispo.ops.lightning import lightning_attention, lightning_decode, lightning_prefill

Step = Callable[[], object]

CHUNK = 64
"""Tokens of a chunk: fewer mean fewer operations, and products too narrow for the matrix units."""


def median(step: Step) -> float:
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    return float(do_bench(step, warmup=50, rep=200, return_mode="median"))


def median_of_graph(step: Step) -> float:
    from triton.testing import do_bench_cudagraph  # pyright: ignore[reportMissingImports]

    return float(do_bench_cudagraph(step, rep=200, return_mode="median"))


def copy_rate() -> float:
    """Bytes a millisecond, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median(lambda: target.copy_(source))


def product_rate() -> float:
    """Operations a millisecond of a product of two random matrices of 8,192 rows in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median(lambda: a @ b)


def inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, [T, H, D]."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    return [torch.randn(tokens, heads, dim, device="cuda", generator=generator).to(dtype) for _ in range(4)]


def slopes_of(heads: int) -> Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device="cuda") / heads)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def contestants(tokens: int, heads: int, skip_peer: bool) -> dict[str, Callable[..., Tensor]]:
    slopes, bounds = slopes_of(heads), bounds_of([tokens])
    found = {"ours": lambda q, k, v: lightning_attention(q, k, v, slopes, bounds)[0]}
    if not skip_peer:
        try:
            from fla.ops.lightning_attn import chunk_lightning_attn  # pyright: ignore[reportMissingImports]
        except ImportError:
            print("flash-linear-attention is not installed")
        else:
            found["fla"] = lambda q, k, v: chunk_lightning_attn(q[None], k[None], v[None], 10, 80)[0][0]
    return found


def step_of(attend: Callable[..., Tensor], data: list[Tensor], backward: bool) -> Step:
    *leaves, grad = [x.detach().requires_grad_(backward) for x in data]
    if not backward:
        return lambda: attend(*leaves)
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad.detach())


def compare(lengths: list[int], heads: int, dim: int, skip_peer: bool) -> None:
    rate, products = copy_rate(), product_rate()
    copied = f"copy {rate / 1e9:.2f} TB/s, product {products / 1e9:.0f} TFLOP/s"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {copied}")
    print(f"H={heads} D={dim} bfloat16; ours, then fla; their ratio")
    print(f"{'':>8}  {'':<16} {'floor':>8} {'products':>8} {'issued':>18} {'ratio':>6} {'graph':>18} {'ratio':>6}")
    for tokens in lengths:
        data = inputs(tokens, heads, dim, torch.bfloat16)
        runs = contestants(tokens, heads, skip_peer)
        for name, tensors in (("forward", 4), ("forward+backward", 11)):
            floor = tensors * data[0].numel() * data[0].element_size() / rate
            passes = 1 if tensors == 4 else 4
            least = passes * 4 * (CHUNK + dim) * data[0].numel() / products
            steps = [step_of(attend, data, backward=tensors == 11) for attend in runs.values()]
            times = [(median(step), median_of_graph(step)) for step in steps]
            cells = []
            for kind in zip(*times, strict=True):
                cells.append(f"{' '.join(f'{t:8.3f}' for t in kind):>18} {kind[-1] / kind[0]:6.2f}")
            print(f"{tokens:>8}  {name:<16} {floor:8.3f} {least:8.3f} {' '.join(cells)}", flush=True)


def errors(heads: int, dim: int) -> None:
    for dtype, tokens in ((torch.bfloat16, 8192), (torch.float32, 2048)):
        rounded = [x.double() for x in inputs(tokens, heads, dim, dtype)]
        results = []
        for kind in (dtype, torch.float64):
            q, k, v, grad = (x.to(kind) for x in rounded)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out, _ = lightning_attention(q, k, v, slopes_of(heads), bounds_of([tokens]))
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        cells = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
        print(
            f"error of {dtype}, {tokens} tokens: "
            + "  ".join(f"{n} {e:.1e}" for n, e in zip("o dq dk dv".split(), cells, strict=True))
        )


def serving(heads: int, dim: int, sequences: int = 512) -> None:
    """A decode step of many sequences, and a prefill of ragged prompts, both by slot."""
    rate = copy_rate()
    cache = torch.randn(sequences, heads, dim, dim, device="cuda")
    slots = torch.randperm(sequences, device="cuda").int()
    q, k, v, _ = inputs(sequences, heads, dim, torch.bfloat16)
    floor = 2 * cache.numel() * 4 / rate
    slopes = slopes_of(heads)
    time = median_of_graph(lambda: lightning_decode(q, k, v, slopes, cache, slots))
    print(f"decode of {sequences} sequences: {time:.3f} ms, floor {floor:.3f} (each state read and written)")
    lengths = torch.randint(16, 513, (sequences // 4,), generator=torch.Generator().manual_seed(0)).tolist()
    q, k, v, _ = inputs(sum(lengths), heads, dim, torch.bfloat16)
    bounds, some = bounds_of(lengths), slots[: len(lengths)]
    floor = (4 * q.numel() * 2 + 2 * len(lengths) * cache[0].numel() * 4) / rate
    time = median(lambda: lightning_prefill(q, k, v, slopes, bounds, cache, some))
    print(f"prefill of {len(lengths)} prompts of 16 to 512, {sum(lengths)} tokens: {time:.3f} ms, floor {floor:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--skip-peer", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_lightning.py measures GPU kernels, and there is no GPU here")
    errors(8, options.dim)
    compare(options.lengths, options.heads, options.dim, options.skip_peer)
    serving(options.heads, options.dim)


if __name__ == "__main__":
    main()
