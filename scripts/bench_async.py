"""Asynchronous against synchronous training: throughput and accuracy with the same recipe, seeds and prompts.

    scripts/bench_async.py recipes/quickstart.yaml --seeds 3
    scripts/bench_async.py recipes/lightning_30m.yaml --staleness 1,2 --seeds 3 train.steps=60

Runs `cispo compare` on the recipe with control.max_staleness 0 and others, one run at a time, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

# First steps, excluded from the times: graph capture, caches and first allocations.
_WARM = 2


def steps_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(runs: Sequence[Path]) -> dict[str, float]:
    """Medians and means over the runs (seeds) of one bound."""
    histories = [steps_of(run) for run in runs]
    steps = [[row for row in rows if row["step"] > _WARM] for rows in histories]

    def mean(name: str) -> float:
        return statistics.mean(row[name] for rows in steps for row in rows if name in row)

    accuracies = [next(r["eval/accuracy"] for r in reversed(rows) if "eval/accuracy" in r) for rows in histories]
    sampled = [rows[-1]["total/tokens"] - rows[0]["total/tokens"] for rows in steps]
    seconds = [rows[-1]["total/seconds"] - rows[0]["total/seconds"] for rows in steps]
    return {
        "seconds a step": statistics.median(row["time/step"] for rows in steps for row in rows),
        "waiting for rollouts": mean("time/rollout"),
        "learning": mean("time/learn"),
        "weight sync": mean("time/sync"),
        "tokens/s": statistics.median(t / s for t, s in zip(sampled, seconds, strict=True)),
        "staleness (mean)": mean("staleness/mean"),
        "staleness (max)": max(row["staleness/max"] for rows in steps for row in rows),
        "accuracy": statistics.mean(accuracies),
        "accuracy, lowest": min(accuracies),
        "accuracy, highest": max(accuracies),
    }


def table(arms: Mapping[str, Mapping[str, float]]) -> str:
    names = list(arms)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in arms[names[0]]:
        lines.append(f"| {row} | " + " | ".join(f"{arms[name][row]:.4g}" for name in names) + " |")
    base = arms[names[0]]["tokens/s"]
    lines.append("| throughput ratio | " + " | ".join(f"{arms[name]['tokens/s'] / base:.2f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--staleness", default="1", help="values of control.max_staleness, with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_async"))
    args = parser.parse_intermixed_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(args.recipe.read_text())
    recipes = []
    for bound in (0, *map(int, args.staleness.split(","))):
        # In the recipe's folder: its relative paths and its base stay valid.
        file = args.recipe.with_name(f"{args.recipe.stem}-staleness-{bound}.yaml")
        file.write_text(yaml.safe_dump({**values, "control": {**values.get("control", {}), "max_staleness": bound}}))
        recipes.append(file)
    command = [sys.executable, "-m", "cispo.cli", "compare", *map(str, recipes), "--seeds", str(args.seeds)]
    command += ["--parallel", "1", "--name", args.recipe.stem, f"output_dir={args.folder}", *args.overrides]
    try:
        subprocess.run(command, check=True)
    finally:
        for file in recipes:
            file.unlink(missing_ok=True)
    arms = {}
    for bound, file in zip((0, *args.staleness.split(",")), recipes, strict=True):
        folder = args.folder / args.recipe.stem / "arms" / file.stem
        arms[f"staleness {bound}"] = figures(sorted(folder.glob("seed_*")))
    print(table(arms))


if __name__ == "__main__":
    main()
