"""A reinforcement learning run of long completions: seconds of rollout, reward, update and weight sync of each step.

    python scripts/bench_long_run.py --out DIR                                     128K tokens, two GPUs
    python scripts/bench_long_run.py --out DIR --tokens 8192 --steps 2 [KEY=VALUE ...]
    python scripts/bench_long_run.py --out DIR --tiny                              a check of the script on a CPU

The recipe is long_context. Its policy is drawn at random; its head has a row of zeros for the end-of-sequence token and
large rows for all others: next to no completion ends before its limit, so that all have `--tokens`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT = 64
"""Tokens of a context for the prompt."""
SHARP = 7.5
"""Factor of the head's rows: logits are normal with a deviation of about 7."""
PARTS = ("time/step", "time/rollout", "time/reward", "time/learn", "time/sync")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}


def endless_policy(folder: Path, recipe: Path, changes: Mapping[str, object]) -> None:
    """Writes a policy of the recipe's shape and its tokenizer into `folder`."""
    import torch
    import yaml
    from transformers import AutoTokenizer

    from cispo.policies.loading import init_policy, save_policy

    tokenizer = AutoTokenizer.from_pretrained(recipe.parent / "tokenizers" / "chars")
    config = {**yaml.safe_load(recipe.read_text())["policy"]["config"], **changes}
    config |= {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = init_policy(config, 0, torch.bfloat16, device)
    with torch.no_grad():
        policy.lm_head_weight.mul_(SHARP)[tokenizer.eos_token_id] = 0.0
    save_policy(policy, folder)
    tokenizer.save_pretrained(folder)


def lines(rows: list[dict[str, Any]], completions: int) -> Iterator[str]:
    """Seconds of each step, and the mean length of its completions."""
    names = [name.removeprefix("time/") for name in PARTS]
    yield f"| step | tokens a completion | {' s | '.join(names)} s | sampled tokens/s | mismatch: mean, largest |"
    yield "|---" * (len(PARTS) + 4) + "|"
    for row in rows:
        seconds = " | ".join(f"{row.get(name, 0.0):.2f}" for name in PARTS)
        gap = f"{row['mismatch/logprob_mean']:.1e}, {row['mismatch/logprob_max']:.1e}"
        length, speed = row["tokens_in_loss"] / completions, row["rollout/tokens_per_s"]
        yield f"| {row['step']} | {length:,.0f} | {seconds} | {speed:,.0f} | {gap} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the policy and the run")
    parser.add_argument("--tokens", type=int, default=131072, help="of a completion")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=1, help="of a step, with four completions each")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="further changes to the recipe")
    args = parser.parse_args()
    recipe, folder = HERE.parent / "recipes" / "long_context.yaml", args.out / "policy"
    tokens = 96 if args.tiny else args.tokens
    endless_policy(folder, recipe, TINY if args.tiny else {})
    keys = [f"policy.model={folder.absolute()}", "policy.config=null", "policy.tokenizer=null"]
    keys += [f"output_dir={args.out.absolute()}", "name=long", f"train.steps={args.steps}", "eval=null"]
    keys += [f"rollout.prompts_per_step={args.prompts}", f"rollout.max_tokens={tokens}"]
    keys += [f"rollout.max_context={tokens + PROMPT}", "rollout.repetition.run_length=0"]
    keys += ["curriculum.length_stages=[]", f"learner.tokens_per_micro_batch={(tokens + PROMPT) // 2 + 1}"]
    command = [sys.executable, "-m", "cispo.cli", "train", str(recipe), *keys, *args.keys]
    done = subprocess.run(command, cwd=HERE.parent, check=False)
    file = args.out / "long" / "metrics.jsonl"
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        print("\n".join(lines([row for row in rows if "time/step" in row], 4 * args.prompts)))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
