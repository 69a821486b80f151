"""Time and memory from the start of a run to its first prompts, of a large training set.

    python scripts/bench_data.py --rows 1000000

A process for each form of file (.jsonl, .parquet) loads it, checks the prompts, the columns that a reward needs, takes
the prompts of a step, and then computes the fingerprint that a checkpoint stores. Rows have the columns of GSM8K.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def row(number: int) -> dict[str, str]:
    """A problem of about 300 characters."""
    return {
        "question": f"Problem {number}: " + f"a farmer sells {number % 97} eggs on each of {number % 13} days. " * 3,
        "answer": f"He sells {number % 97} * {number % 13} eggs, day by day, to his neighbours.\n#### {number}",
    }


def write(file: Path, rows: int) -> None:
    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(row(number)) + "\n" for number in range(rows))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, pa.schema({"question": pa.string(), "answer": pa.string()})) as writer:
        for start in range(0, rows, 100_000):
            values = [row(number) for number in range(start, min(start + 100_000, rows))]
            writer.write_table(pa.Table.from_pylist(values))


def measure(file: str) -> dict[str, float]:
    """Seconds and gigabytes (peak of this process) after each stage."""
    from cispo.recipe.load import load_recipe
    from cispo.rollout.prompt_source import prompt_source_of
    from cispo.rollout.prompts import distinct, prompts_of
    from cispo.rollout.renderer import renderer_of

    given = "data.sources=[{name: rows, source: " + json.dumps(file) + ", prompt: '{question}'}]"
    recipe = load_recipe("quickstart", [given, "rollout.max_context=1024"])
    renderer = renderer_of(recipe)
    assert recipe.data is not None
    found: dict[str, float] = {"GB before": peak()}
    wall, processor = time.perf_counter(), time.process_time()
    prompts = prompts_of(recipe.data, "data", renderer, recipe)
    columns = [sorted(prompt.columns) for prompt in distinct(prompts)]
    source = prompt_source_of(recipe, prompts)
    taken = source.take(64)
    assert len(taken) == 64 and columns == [["answer", "question"]]
    found |= {"s to first prompts": time.perf_counter() - wall, "of processor": time.process_time() - processor}
    found["GB then"] = peak()
    wall = time.perf_counter()
    source.state_dict()
    found |= {"s of fingerprint": time.perf_counter() - wall, "GB at the end": peak(), "rows": len(prompts)}
    return found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".jsonl", ".parquet"):
            file = Path(folder) / f"rows{suffix}"
            write(file, arguments.rows)
            command = [sys.executable, __file__, "--measure", str(file)]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            values = json.loads(result.stdout.splitlines()[-1])
            size = file.stat().st_size / 2**30
            print(f"{suffix} {size:.2f} GB: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
            file.unlink()


if __name__ == "__main__":
    main()
