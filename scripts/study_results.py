"""The numbers of one run of `bench_study.py` that its result file keeps: curves, and the trained tokens by kind.

    metrics.jsonl              -> history: [{step, eval/accuracy, entropy, ...}]
    samples/train_*.parquet    -> steps: [{step, marked, kinds: {mark | other: {pos, neg, ppo_dropped_pos, ...}}}]
    samples/eval_*.parquet     -> held_out: [{step, marked}]

A mark is the token that begins a check; `marked` is the share of completions that hold one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MARK = "!"
HISTORY = (
    "step", "total/tokens", "total/completions", "total/seconds", "eval/accuracy", "eval/accuracy_stderr",
    "reward/mean", "entropy", "grad_norm", "length/mean", "learner/updates", "is/ratio_p99", "is/ratio_max",
    "is/clip_frac",
    "is/dropped_frac_posadv", "is/dropped_frac_negadv", "is/ppo_dropped_posadv", "is/ppo_dropped_negadv",
    "is/dapo_dropped_posadv", "is/dapo_dropped_negadv", "staleness/mean", "time/step",
)  # fmt: skip
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
CLIP = 0.2
"""PPO's band."""

# Any: rows of parquet files and JSON.
Row = Mapping[str, Any]


def result_of(folder: Path) -> dict[str, Any]:
    from cispo.output.folder import read_metrics

    rows = read_metrics(folder / "metrics.jsonl")
    mark = _mark_id(folder)
    return {
        "recipe": (folder / "recipe.yaml").read_text(),
        "history": [{name: _short(row[name]) for name in HISTORY if name in row} for row in rows],
        "steps": [step_of(_rows(file), mark) | {"step": _step(file)} for file in _files(folder, "train")],
        "held_out": [{"step": _step(file), "marked": marked(_rows(file))} for file in _files(folder, "eval")],
    }


def step_of(rows: Sequence[Row], mark: int) -> dict[str, Any]:
    """The share of marked completions, and counts and ratios of trained tokens by kind."""
    ids, ratio, weight, advantages = [], [], [], []
    for row in rows:
        if row.get("ratio") is None:
            continue
        sequence, spans = row["sequence"], row["spans"]
        assert len(spans) == 2, "a study's completions have one turn"
        ids += sequence[spans[0] :]
        ratio += row["ratio"]
        weight += row["weight"]
        advantages += row["advantages"]
    kinds = by_kind(np.array(ids), np.array(ratio), np.array(weight), np.array(advantages), mark) if ids else {}
    return {"marked": marked(rows), "kinds": kinds}


def by_kind(
    ids: np.ndarray, ratio: np.ndarray, weight: np.ndarray, advantages: np.ndarray, mark: int
) -> dict[str, dict[str, Any]]:
    """Counts of the trained tokens [N], of marks and of the others, by the sign of their advantage.

    ppo_dropped: those that PPO's band would have left without gradient; dropped: those that this run's loss did.
    """
    found = {}
    for kind, own in (("mark", ids == mark), ("other", ids != mark)):
        r, counts = ratio[own], dict[str, Any]()
        signs = {"pos": advantages[own] > 0, "neg": advantages[own] < 0}
        beyond = {"pos": r > 1 + CLIP, "neg": r < 1 - CLIP}
        for sign, mask in signs.items():
            counts[sign] = int(mask.sum())
            counts[f"ppo_dropped_{sign}"] = int((mask & beyond[sign]).sum())
            counts[f"dropped_{sign}"] = int((mask & (weight[own] == 0)).sum())
        if len(r):
            counts["ratio"] = [_short(float(q)) for q in np.quantile(r, QUANTILES)]
        found[kind] = counts
    return found


def marked(rows: Sequence[Row]) -> float:
    return round(sum(MARK in row["completion"] for row in rows) / max(len(rows), 1), 4)


def _mark_id(folder: Path) -> int:
    """The id of the mark in the policy's tokenizer."""
    from cispo.recipe.load import read_stored
    from cispo.rollout.renderer import renderer_of

    (token,) = renderer_of(read_stored(folder / "recipe.yaml")).tokenizer.encode(MARK, add_special_tokens=False)
    return token


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "samples").glob(f"{kind}_*.parquet"))


def _step(file: Path) -> int:
    (number,) = re.findall(r"_(\d+)$", file.stem)
    return int(number)


def _rows(file: Path) -> list[Row]:
    import pyarrow.parquet as pq

    wanted = ("completion", "sequence", "spans", "ratio", "weight", "advantages")
    names = [name for name in pq.read_schema(file).names if name in wanted]
    return pq.read_table(file, columns=names).to_pylist()


def _short(value: float) -> float:
    return float(f"{value:.5g}")
