"""The files of a run folder: metrics and sampled completions. Its name and lock are `run_folder`'s.

runs/<name>/recipe.yaml  .lock  metrics.jsonl  events.out.tfevents.*  samples/train_000010.parquet
            checkpoints/step_000120/  learning_curve.png  dropped_tokens.json
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cispo.errors import Diverged, UserError
from cispo.files import disk_errors, write_text
from cispo.output.token_values import TokenRow, token_arrays
from cispo.types import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from cispo.output.trackers import Trackers


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl, [] where there is no file. An unfinished last line, left by a killed run, is dropped.

    Raises UserError naming a line that cannot be read.
    """
    rows = []
    for number, row in enumerate(_lines(file), 1):
        if row is None:
            raise UserError(f"{file}: line {number} is damaged")
        rows.append(row)
    return rows


def logged_steps(folder: Path) -> int:
    """The last step up to which metrics.jsonl has every row, -1 without the first."""
    steps = [row["step"] for row in _lines(folder / "metrics.jsonl") if row is not None]
    return next((number - 1 for number, step in enumerate(steps) if step != number), len(steps) - 1)


def _lines(file: Path) -> Iterator[dict[str, float] | None]:
    """The row of every whole line, None where it is damaged."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
            good = isinstance(row["step"], int) and all(isinstance(value, int | float) for value in row.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        yield row if good else None


class RunLog:
    """Writer of one run's metrics (`name`.jsonl, TensorBoard, trackers) and sampled completions (parquet)."""

    def __init__(
        self,
        folder: Path,
        name: str = "metrics",
        *,
        after: int = -1,
        board: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        """Continues a log after step `after`: rows and samples that the run wrote of later steps are removed.

        `board` writes TensorBoard's files. Steps that `trackers` have from before a resume are not sent again.
        """
        self.folder = folder
        self._trackers = trackers
        with disk_errors(folder):
            file = folder / f"{name}.jsonl"
            rows = [row for row in _lines(file) if row is not None]
            self._tracked = max((int(row["step"]) for row in rows), default=-1)
            self.history = [row for row in rows if row["step"] <= after]
            write_text(file, "".join(json.dumps(row) + "\n" for row in self.history))
            self._lines = file.open("a", buffering=1, encoding="utf-8")
            self._board = None
            if board:
                from cispo.output.board import Board

                self._board = Board(folder, name, purge_step=after + 1 if after >= 0 else None)
            for parquet in (folder / "samples").glob("*.parquet"):
                own = re.fullmatch(r"(?:train|eval(?:-[\w.-]+)?)_(\d+)", parquet.stem)
                if own and int(own[1]) > after:
                    parquet.unlink()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step. Raises Diverged where a value is not finite."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise Diverged(
                f"{broken[0]} is not finite at step {step}: the policy has diverged (learner.lr is too high?)"
            )
        row = {"step": step, **values}
        self.history.append(row)
        with disk_errors(self.folder):
            self._lines.write(json.dumps(row) + "\n")
            if self._board is not None:
                self._board.scalars(step, values)
        if self._trackers is not None and step > self._tracked:
            self._trackers.log(step, values)

    def samples(
        self,
        step: int,
        groups: Sequence[TrajectoryGroup],
        *,
        kind: str = "train",
        tokens: Sequence[TokenRow | None] = (),
    ) -> None:
        """Writes samples/`kind`_`step`.parquet, one row a completion; `tokens` has the per-token values of each."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "step": step,
                "prompt_id": group.prompt.id,
                "index": t.index,
                "prompt": "\n".join(str(m["content"]) for m in group.prompt.messages),
                "completion": t.text,
                "reward": t.reward,
                "rewards": json.dumps(dict(t.rewards)),
                "extra": json.dumps(dict(t.extra), default=str),
                "finish_reason": t.finish_reason.value,
                "length": t.length,
                "token_ids": list(t.turns[-1].completion.token_ids),
                "version": min(min(turn.completion.versions) for turn in t.turns),
                "version_max": max(max(turn.completion.versions) for turn in t.turns),
                **_conversation(t),
            }
            for group in groups
            for t in group.trajectories
        ]
        if rows:
            with disk_errors(self.folder):
                (self.folder / "samples").mkdir(exist_ok=True)
                table = pa.Table.from_pylist(rows)
                for name, values in token_arrays(tokens).items():
                    table = table.append_column(name, values)
                pq.write_table(table, self.folder / "samples" / f"{kind}_{step:06d}.parquet")
        if self._trackers is not None and kind == "train" and step > self._tracked:
            self._trackers.table(step, groups)

    def dropped_tokens(self, rows: Sequence[Mapping[str, int | str]]) -> None:
        """Writes dropped_tokens.json: the tokens that PPO's clip would have dropped, most frequent first."""
        with disk_errors(self.folder):
            write_text(self.folder / "dropped_tokens.json", json.dumps(list(rows), indent=1) + "\n")

    def close(self) -> None:
        try:
            with disk_errors(self.folder):
                self._lines.close()
                if self._board is not None:
                    self._board.close()
        finally:
            if self._trackers is not None:
                self._trackers.close()


def _conversation(t: Trajectory) -> dict[str, object]:
    """Further columns of an attempt with tools or an environment: its end, its turns and its messages as JSON."""
    if not t.status:
        return {}
    turns = [
        {"tokens": len(turn.completion.token_ids), "context": len(turn.context_ids), "rewards": dict(turn.rewards)}
        for turn in t.turns
    ]
    messages = json.dumps(t.messages, ensure_ascii=False, default=str)
    return {"status": t.status, "turns": json.dumps(turns), "messages": messages, "events": json.dumps(dict(t.events))}
