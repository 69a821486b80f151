"""The sampled attempts of a run folder, as arrays for a page: samples/KIND_STEP.parquet -> Samples.

Files of earlier versions lack columns, and the newest file of a run in progress may be half written: both are left out
with a note. Nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cispo.algorithms.dropped_tokens import BANDS
from cispo.algorithms.losses import ppo_drops
from cispo.errors import UserError
from cispo.output.token_values import SAMPLER, Floats

if TYPE_CHECKING:
    import pyarrow as pa

# Tokens of a page at most: about 20 bytes each. Further attempts show their text alone.
_MAX_TOKENS = 2_000_000

VALUES = ("weight", "ratio", "advantage", "entropy", "gap", "logprob")
"""Per-token values of the page; gap is the learner's log-probability minus the sampler's."""

PPO_DROPS, KEPT, DROPPED = 1, 2, 4
"""Flags of a token: PPO's clip would give it no gradient; this run's loss gave it one; it gave it none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of one attempt after its prompt."""

    ids: np.ndarray
    """[n] int32."""
    spans: list[int]
    """Tokens sampled and tokens read, alternating from the first reply on."""
    values: Mapping[str, Floats]
    """Name of VALUES -> [sampled tokens]."""
    flags: np.ndarray
    """[sampled tokens] uint8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One row of a samples file."""

    kind: str
    """The set: "train", or one of held-out prompts."""
    step: int
    prompt_id: int
    index: int
    prompt: str
    completion: str
    reward: float
    rewards: Mapping[str, float]
    extra: Mapping[str, object]
    finish_reason: str
    length: int
    version: int
    status: str = ""
    messages: Sequence[Mapping[str, object]] = ()
    turn_rewards: Sequence[Mapping[str, float]] = ()
    update: int | None = None
    tokens: Tokens | None = None


@dataclass(slots=True)
class Samples:
    """The attempts of a page, in the order of their steps."""

    attempts: list[Attempt] = field(default_factory=list)
    total: int = 0
    """Attempts in the run's files."""
    notes: list[str] = field(default_factory=list)
    """Sentences about parts that are left out."""


def read_samples(run: Path, limit: int) -> Samples:
    """At most `limit` attempts of all sets and steps. Raises UserError where the run has none.

    Of each file the first attempts stay, those with per-token values before others: the same held-out prompts of every
    evaluation.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist")
    named = [(m[1], int(m[2]), f) for f in (run / "samples").glob("*.parquet") if (m := _name(f))]
    if not named:
        raise UserError(f"{run} holds no samples (samples/*.parquet): is it a run folder?")
    found, tables = Samples(), list[tuple[str, "pa.Table"]]()
    for kind, _, file in sorted(named, key=lambda item: (item[1], item[0])):
        try:
            tables.append((kind, pq.read_table(file)))
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            found.notes.append(f"{file.name} cannot be read and is left out: {reason:.120}")
    found.total = sum(table.num_rows for _, table in tables)
    for kind, table in tables:
        share = table.num_rows if found.total <= limit else max(table.num_rows * limit // found.total, 1)
        found.attempts += _attempts(kind, table, share)
    if len(found.attempts) < found.total:
        found.notes.append(f"{len(found.attempts):,} of {found.total:,} attempts are shown (--samples)")
    _bound_tokens(found)
    return found


def _name(file: Path) -> re.Match[str] | None:
    return re.fullmatch(r"(.+)_(\d+)", file.stem)


def _attempts(kind: str, table: pa.Table, share: int) -> list[Attempt]:
    known = table["sequence"].is_valid().to_numpy() if "sequence" in table.column_names else np.zeros(table.num_rows)
    order = np.argsort(~known.astype(bool), kind="stable")[:share]
    table = table.take(np.sort(order))
    heavy = {"token_ids", "sequence", "spans", SAMPLER, "learner_logprobs", "old_logprobs"}
    heavy |= {"ratio", "weight", "entropy", "advantages"}
    lists = {name: _rows(table[name]) for name in heavy & set(table.column_names)}
    rows = table.drop_columns(sorted(heavy & set(table.column_names))).to_pylist()
    none: list[np.ndarray | None] = [None] * len(rows)
    return [
        _attempt(kind, row, {name: lists.get(name, none)[number] for name in heavy}) for number, row in enumerate(rows)
    ]


def _rows(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """The lists of a column as arrays."""
    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b] if ok else None for a, b, ok in zip(offsets, offsets[1:], valid, strict=False)]


def _attempt(kind: str, row: Mapping[str, object], lists: Mapping[str, np.ndarray | None]) -> Attempt:
    turns = _json(row.get("turns"), list)
    return Attempt(
        kind=kind,
        step=_int(row.get("step")),
        prompt_id=_int(row.get("prompt_id")),
        index=_int(row.get("index")),
        prompt=str(row.get("prompt") or ""),
        completion=str(row.get("completion") or ""),
        reward=float(str(row.get("reward") or 0.0)),
        rewards={str(k): float(v) for k, v in _json(row.get("rewards"), dict).items()},
        extra=_json(row.get("extra"), dict),
        finish_reason=str(row.get("finish_reason") or ""),
        length=_int(row.get("length")),
        version=_int(row.get("version")),
        status=str(row.get("status") or ""),
        messages=[m for m in _json(row.get("messages"), list) if isinstance(m, dict)],
        turn_rewards=[t.get("rewards", {}) for t in turns if isinstance(t, dict)],
        update=None if row.get("update") is None else _int(row["update"]),
        tokens=_tokens(lists),
    )


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _json(text: object, kind: type) -> ...:
    """The JSON value of a column, an empty one where it is missing or of another type."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        value = None
    return value if isinstance(value, kind) else kind()


def _tokens(lists: Mapping[str, np.ndarray | None]) -> Tokens | None:
    sequence, spans = lists["sequence"], lists["spans"]
    if sequence is None or spans is None or not len(spans):
        ids = lists["token_ids"]
        if ids is None:
            return None
        return Tokens(ids=ids, spans=[len(ids)], values={}, flags=np.zeros(len(ids), np.uint8))
    values = token_values(lists)
    sampled = int(spans[1::2].sum())
    return Tokens(ids=sequence[spans[0] :], spans=spans[1:].tolist(), values=values, flags=token_flags(values, sampled))


def token_values(lists: Mapping[str, np.ndarray | None]) -> dict[str, Floats]:
    """The values of one attempt by their names in VALUES; those that were not logged are missing."""
    sampler = lists[SAMPLER]
    learner = lists["learner_logprobs"] if lists["old_logprobs"] is None else lists["old_logprobs"]
    found = {
        "weight": lists["weight"],
        "ratio": lists["ratio"],
        "advantage": lists["advantages"],
        "entropy": lists["entropy"],
        "gap": None if sampler is None or learner is None else learner - sampler,
        "logprob": sampler,
    }
    return {name: values for name, values in found.items() if values is not None}


def token_flags(values: Mapping[str, Floats], sampled: int) -> np.ndarray:
    """[sampled] uint8: the flags of each token, 0 where it was not trained on."""
    flags = np.zeros(sampled, np.uint8)
    if {"ratio", "advantage", "weight"} <= values.keys():
        low, high = BANDS["ppo"]
        ratio, advantage = torch.tensor(values["ratio"]), torch.tensor(values["advantage"])
        drops = ppo_drops(ratio, advantage, clip_low=low, clip_high=high).numpy()
        kept, counts = values["weight"] != 0, values["advantage"] != 0
        flags = (PPO_DROPS * drops + KEPT * (kept & counts) + DROPPED * (~kept & counts)).astype(np.uint8)
    return flags


def _bound_tokens(found: Samples) -> None:
    """Leaves out the tokens of the attempts beyond _MAX_TOKENS, those without values first."""
    from dataclasses import replace

    order = sorted(
        range(len(found.attempts)),
        key=lambda i: 0 if (t := found.attempts[i].tokens) is not None and "weight" in t.values else 1,
    )
    left, without = _MAX_TOKENS, 0
    for i in order:
        tokens = found.attempts[i].tokens
        if tokens is None:
            continue
        if len(tokens.ids) > left:
            found.attempts[i] = replace(found.attempts[i], tokens=None)
            without += 1
        else:
            left -= len(tokens.ids)
    if without:
        found.notes.append(f"{without:,} attempts are shown as text alone: the page holds {_MAX_TOKENS:,} tokens")
