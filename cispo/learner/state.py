"""Training state on the disk: whole tensors in one file, or each rank's rows in a file of its own.

    training/learner.safetensors                                         ranks with whole copies: rank 0 writes
    training/learner-00001-of-00004.safetensors ...                      shards: every rank writes its rows
             header: {"rows": {tensor: [shape of the whole, first row, and of distributed experts the part of a row:
                                        axis, number of the part, parts, blocks]}}

Either form is read by any number of ranks, each taking the rows that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cispo.errors import UserError
from cispo.files import form_errors, save_tensors
from cispo.learner.rows import Rows, WidthShare

_ROWS = "rows"


class _Part(NamedTuple):
    """Consecutive rows of a tensor in a file, or a part of each of them."""

    file: Path
    first: int
    count: int
    share: WidthShare | None = None


def state_path(folder: str | Path, name: str, rank: int = 0, parts: int = 1) -> Path:
    """File of a rank's part of the state `name` in a checkpoint."""
    own = name if parts == 1 else f"{name}-{rank + 1:05d}-of-{parts:05d}"
    return Path(folder) / "training" / f"{own}.safetensors"


def write_state(state: Mapping[str, Rows], file: Path) -> None:
    """Writes one rank's rows. Raises RunError where the disk refuses."""
    split = {key: [list(r.shape), r.first, *_numbers(r.narrow)] for key, r in state.items() if r.split}
    save_tensors({key: r.values for key, r in state.items()}, file, {_ROWS: json.dumps(split)} if split else None)


def _numbers(share: WidthShare | None) -> tuple[int, ...]:
    return () if share is None else (share.axis, share.part, share.parts, share.blocks)


class StoredState:
    """The state `name` in a checkpoint. Raises UserError where a file is missing or is none."""

    def __init__(self, folder: str | Path, name: str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors."""
        self._parts: dict[str, list[_Part]] = {}
        for file in _files(folder, name):
            self._add(file)
        for key, parts in self._parts.items():
            shape = self.shapes[key]
            held = sum(Fraction(part.count, 1 if part.share is None else part.share.parts) for part in parts)
            if shape and held != shape[0]:
                raise UserError(f"{parts[0].file} and the files beside it lack rows of {key}")

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as stored, form_errors(file):
                split = json.loads((stored.metadata() or {}).get(_ROWS, "{}"))
                for key in stored.keys():
                    own = stored.get_slice(key).get_shape()
                    shape, first, *share = split.get(key, (own, 0))
                    self.shapes[key] = tuple(shape)
                    part = _Part(file, int(first), own[0] if own else 1, WidthShare(*share) if share else None)
                    self._parts.setdefault(key, []).append(part)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    def read(self, key: str, first: int, count: int) -> Tensor:
        """The rows [first, first + count) of a tensor; a scalar whole."""
        parts = sorted(self._parts[key], key=lambda part: part.first)
        if not self.shapes[key]:
            return _slice(parts[0].file, key, None)
        wanted = [(p, max(first, p.first), min(first + count, p.first + p.count)) for p in parts]
        found = [
            (p, low, _slice(p.file, key, slice(low - p.first, high - p.first))) for p, low, high in wanted if low < high
        ]
        if not any(p.share for p, _, _ in found):
            return torch.cat([values for _, _, values in found]) if found else _slice(parts[0].file, key, slice(0, 0))
        whole = found[0][2].new_empty(count, *self.shapes[key][1:])
        for p, low, values in found:
            rows = whole[low - first : low - first + len(values)]
            if p.share is None:
                rows.copy_(values)
            else:
                p.share.put(values, rows)
        return whole


def _slice(file: Path, key: str, rows: slice | None) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(key) if rows is None else stored.get_slice(key)[rows]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _files(folder: str | Path, name: str) -> list[Path]:
    whole = state_path(folder, name)
    parts = sorted(whole.parent.glob(f"{name}-*-of-*.safetensors"))
    if whole.exists() or not parts:
        return [whole]
    match = re.fullmatch(r".*-of-(\d+)", parts[0].stem)
    expected = [state_path(folder, name, rank, len(parts)) for rank in range(len(parts))]
    if match is None or parts != expected:
        raise UserError(f"{whole.parent} holds {len(parts)} of the parts of {name}, of which {parts[0].name} is one")
    return parts
