"""LM head, log-probability and CISPO loss, forward and backward, beside Liger and the plain formula: time and memory.

    python scripts/bench_loss.py [--hidden 2048] [--vocabulary 151936] [--tokens 8192] [--skip-peer]

bfloat16 hidden states and weight; times are medians. The floor is three matrix products of the whole; extra memory is
the peak above the memory of the inputs, gradients included. Errors are |gradient - exact| / |exact| against the plain
formula in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from cispo.ops.logprobs import fused_token_loss, token_logprobs

SEQUENCES = 8
Gradients = tuple[Tensor, ...]


def median(step: Callable[[], object]) -> float:
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    return float(do_bench(step, warmup=50, rep=300, return_mode="median"))


def extra_memory(step: Callable[[], object]) -> float:
    """Gigabytes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def floor(hidden: Tensor, weight: Tensor) -> float:
    """Three products, in chunks of 1,024 rows that fit beside everything else."""
    rows = hidden[:1024]
    logits = torch.randn(len(rows), len(weight), device="cuda").bfloat16()
    products = (lambda: rows @ weight.T, lambda: logits @ weight, lambda: logits.T @ rows)
    return sum(median(product) for product in products) * len(hidden) / len(rows)


def contestants(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, skip_peer: bool
) -> dict[str, Callable[[], Gradients]]:
    """Each returns the gradients of hidden and weight; on-policy, so every ratio is 1 and inside its cap."""
    leaves = hidden, weight

    def cispo(logprobs: Tensor, part: slice) -> Tensor:
        ratio = (logprobs - logprobs.detach()).exp().clamp(max=5.0).detach()
        return -ratio * advantages[part] * logprobs

    def fused() -> Gradients:
        loss, _, _ = fused_token_loss(hidden, weight, targets, lambda logprobs, _, part: cispo(logprobs, part))
        return torch.autograd.grad(loss, leaves)

    def unfused() -> Gradients:
        logprobs, _ = token_logprobs(hidden, weight, targets)
        return torch.autograd.grad(cispo(logprobs, slice(None)).sum(), leaves)

    def plain(wide: bool = False) -> Gradients:
        h, w = (x.detach().float().requires_grad_() for x in leaves) if wide else leaves
        logits = (h @ w.T).float()
        logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        del logits
        return torch.autograd.grad(cispo(logprobs, slice(None)).sum(), (h, w))

    found = {
        "exact": lambda: plain(wide=True),
        "fused_token_loss": fused,
        "token_logprobs": unfused,
        "plain, float32 logits": plain,
    }
    if not skip_peer:
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]
        except ImportError:
            print("liger-kernel is not installed")
        else:
            peer = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=5.0)
            rows = hidden.view(SEQUENCES, -1, hidden.shape[1]), targets.view(SEQUENCES, -1)
            mask = torch.ones_like(rows[1])
            per_sequence = advantages.view(SEQUENCES, -1)[:, 0] * len(targets)

            def liger() -> Gradients:
                loss = peer(rows[0], weight, rows[1], mask, per_sequence)[0]
                return torch.autograd.grad(loss, leaves)

            found["Liger, cispo"] = liger
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=8192, help="a multiple of 1024")
    parser.add_argument("--skip-peer", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_loss.py measures GPU memory and time, and there is no GPU here")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, device="cuda", generator=generator) * 0.02
    weight = weight.bfloat16().requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), device="cuda", generator=generator)
    # One advantage a sequence, as GRPO's kin have; the token mean is in it.
    advantages = torch.randn(SEQUENCES, device="cuda", generator=generator).repeat_interleave(
        options.tokens // SEQUENCES
    )
    runs = contestants(hidden, weight, targets, advantages / options.tokens, options.skip_peer)
    shape = f"{options.tokens} x {options.hidden} x {options.vocabulary}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; tokens x hidden x vocabulary = {shape}")
    least = floor(hidden.detach(), weight.detach())
    print(f"{'three products':<24} {least:8.2f} ms")
    exact = runs.pop("exact")()
    for name, run in runs.items():
        memory = extra_memory(run)
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(run(), exact, strict=True)]
        time = median(run)
        print(
            f"{name:<24} {time:8.2f} ms  {time / least:6.2f} x floor  {memory:6.2f} GB extra"
            f"  errors: d hidden {errors[0]:.1e}, d weight {errors[1]:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
