"""Our packed policy beside stock transformers: forward and backward of the same tokens, microseconds a token.

    python scripts/bench_policy.py [--rounds 5]

Every round measures each contestant once, in turn, with one thread; the figures are medians and their ratio. Stock
transformers gets rows of equal length, its best case: it pads ragged ones, and packed ones attend to each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

CONFIG: dict[str, object] = {
    "model_type": "minimax",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.08,
}
SHAPES = [(256, 24), (32, 256), (4, 2048)]


def ours() -> Callable[[torch.Tensor], None]:
    from cispo.ops.logprobs import token_logprobs
    from cispo.policies.loading import init_policy

    policy = init_policy(CONFIG, seed=0)

    def step(rows: torch.Tensor) -> None:
        count, length = rows.shape
        positions = torch.arange(length).repeat(count)
        starts = torch.arange(0, count * length + 1, length, dtype=torch.int32)
        hidden = policy(rows.flatten(), positions, starts).hidden
        logprobs, _ = token_logprobs(hidden, policy.lm_head_weight, rows.flatten())
        logprobs.sum().backward()
        for parameter in policy.parameters():
            parameter.grad = None

    return step


def stock() -> Callable[[torch.Tensor], None]:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    model = MiniMaxForCausalLM(MiniMaxConfig(**{**CONFIG, "block_size": 64}))

    def step(rows: torch.Tensor) -> None:
        logits = model(rows, use_cache=False).logits
        logits.log_softmax(-1).gather(-1, rows[..., None]).sum().backward()
        model.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    contestants = {"ours, packed": ours(), "transformers": stock()}
    print(f"{'rows x tokens':>14}  " + "  ".join(f"{name:>16}" for name in contestants) + "    ratio")
    for count, length in SHAPES:
        rows = torch.randint(128, (count, length), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round in range(rounds + 1):
            for name, step in contestants.items():
                started = time.perf_counter()
                step(rows)
                if round:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
        medians = [statistics.median(s) / rows.numel() * 1e6 for s in seconds.values()]
        cells = "  ".join(f"{m:>10.0f} us/tok" for m in medians)
        print(f"{count:>7} x {length:<4}  {cells}    {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
