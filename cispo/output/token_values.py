"""Per-token values of some attempts of a step, on their way from the training pass to the samples' parquet files.

    groups, samples --begin--> the attempts that are recorded
    micro-batches and the TokenStats of an update --add--> ratio, weight, entropy ... of their tokens
    groups --rows--> one TokenRow or None an attempt --token_arrays--> columns of lists

The values are those that an update returns anyway: nothing is computed for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cispo.types import RankBatches, Sample, TokenStats, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float32]

SAMPLER = "sampler_logprobs"
TRAINED = ("learner_logprobs", "old_logprobs", "ratio", "weight", "entropy", "advantages")
"""Names of the values that an update gives, float32 lists with an entry a sampled token."""

_OF_STATS = {"learner_logprobs": "logprobs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """The tokens of one attempt with their values.

    Example: prompt (4, 5), reply (9, 2), observation (7,), reply (3,) is the sequence [4, 5, 9, 2, 7, 3] with the spans
    [2, 2, 1, 1]; values have an entry for each of 9, 2 and 3.
    """

    sequence: NDArray[np.int32]
    """All tokens, turn after turn; a turn that does not continue the one before has its whole prompt again."""
    spans: NDArray[np.int32]
    """Tokens read and tokens sampled, alternating, a pair a turn."""
    values: dict[str, Floats]
    """Name -> [sampled tokens]: SAMPLER, and those of TRAINED that the update had."""
    update: int | None = None
    """Number of the optimizer step, from 1 in each training step, that the trained values are of."""


class TokenRecorder:
    """Collects the values of at most `limit` attempts of each training step, the first that are trained on.

    Where a batch is read in several epochs, the last one's values stay.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._updates = 0
        self._samples: dict[int, list[Sample]] = {}
        """id of a trajectory -> its samples; they are kept alive here, so that an id stays theirs."""
        self._wanted: set[int] = set()
        """ids of those samples."""
        self._values: dict[int, tuple[int, dict[str, Floats]]] = {}
        """id of a sample -> (update, name -> values)."""

    def begin(self, groups: Sequence[TrajectoryGroup], samples: Sequence[Sample]) -> None:
        """Starts a step that trains on the samples of these groups, in the order of `to_samples`."""
        self._updates, self._samples, self._values = 0, {}, {}
        remaining = iter(samples)
        for trajectory in [t for group in groups for t in group.trajectories][: self.limit]:
            self._samples[id(trajectory)] = [next(remaining) for _ in trajectory.segments]
        self._wanted = {id(sample) for own in self._samples.values() for sample in own}

    def add(self, share: Sequence[Sample], batches: RankBatches, tokens: Sequence[TokenStats | None]) -> None:
        """Takes one update: the samples that were packed, their micro-batches and each rank's trained tokens.

        None stands for a rank without tokens, or for an update that was not taken.
        """
        self._updates += 1
        if not self._wanted:
            return
        for own, stats in zip(batches, tokens, strict=False):
            packed = [share[index] for mb in own for index in mb.sample_index]
            ends = list(accumulate(int(sample.loss_mask[1:].sum()) for sample in packed))
            # Ranks that read one micro-batch together have a part of its tokens each.
            if stats is None or not ends or len(stats.targets) != ends[-1]:
                continue
            for sample, start, end in zip(packed, [0, *ends], ends, strict=False):
                if id(sample) in self._wanted:
                    self._values[id(sample)] = self._updates, _part(stats, start, end)

    def rows(self, groups: Sequence[TrajectoryGroup]) -> list[TokenRow | None]:
        """A row for each attempt of the groups that is recorded, None for the others.

        Attempts that were not trained on have the sampler's values; they are recorded where there is room.
        """
        attempts = [t for group in groups for t in group.trajectories]
        room = self.limit - sum(id(t) in self._samples for t in attempts)
        rows: list[TokenRow | None] = []
        for trajectory in attempts:
            trained = id(trajectory) in self._samples
            room -= not trained
            rows.append(self._row(trajectory) if trained or room >= 0 else None)
        return rows

    def _row(self, trajectory: Trajectory) -> TokenRow:
        values: dict[str, Floats] = {
            SAMPLER: np.array([x for turn in trajectory.turns for x in turn.completion.logprobs], np.float32)
        }
        parts = [self._values.get(id(sample)) for sample in self._samples.get(id(trajectory), [])]
        known = [part for part in parts if part is not None]
        whole = bool(known) and len(known) == len(parts)
        if whole:
            values |= {name: np.concatenate([part[1][name] for part in known]) for name in known[0][1]}
        return TokenRow(
            sequence=np.array(
                [i for t in trajectory.turns for i in (*t.context_ids, *t.completion.token_ids)], np.int32
            ),
            spans=np.array(
                [n for t in trajectory.turns for n in (len(t.context_ids), len(t.completion.token_ids))], np.int32
            ),
            values=values,
            update=known[-1][0] if whole else None,
        )


def _part(stats: TokenStats, start: int, end: int) -> dict[str, Floats]:
    """Copies of tokens [start, end), so that the step's other tokens are freed."""
    found = {}
    for name in TRAINED:
        values = getattr(stats, _OF_STATS.get(name, name))
        if values is not None:
            found[name] = values[start:end].float().numpy().copy()
    return found


def token_arrays(rows: Sequence[TokenRow | None]) -> dict[str, pa.Array]:
    """Columns of a samples file, a row an attempt and null where it is not recorded; {} where none is."""
    import pyarrow as pa

    if not any(row is not None for row in rows):
        return {}
    names = [n for n in (SAMPLER, *TRAINED) if any(row is not None and n in row.values for row in rows)]
    return {
        "sequence": _lists([None if row is None else row.sequence for row in rows], np.int32),
        "spans": _lists([None if row is None else row.spans for row in rows], np.int32),
        "update": pa.array([None if row is None else row.update for row in rows], pa.int32()),
        **{name: _lists([None if row is None else row.values.get(name) for row in rows]) for name in names},
    }


def _lists(rows: Sequence[NDArray[np.int32] | Floats | None], dtype: type = np.float32) -> pa.Array:
    """A list array without a Python object a number."""
    import pyarrow as pa

    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([row for row in rows if row is not None] or [np.zeros(0, dtype)]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array([row is None for row in rows]))
