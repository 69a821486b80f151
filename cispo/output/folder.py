"""The run folder: its name, its lock, and the files of metrics and sampled completions.

runs/<name>/recipe.yaml  metrics.jsonl  events.out.tfevents.*  samples/train_000010.parquet
            checkpoints/step_000120/  learning_curve.png  dropped_tokens.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cispo.errors import Diverged, UserError
from cispo.files import disk_errors, write_text
from cispo.types import TrajectoryGroup


def create_run_folder(output_dir: str, name: str) -> Path:
    """Makes `output_dir/name`, or where that holds a run already `name-2`, `name-3` ... Nothing is overwritten.

    Raises UserError where output_dir cannot be written.
    """
    try:
        for number in range(1, 10_000):
            folder = Path(output_dir) / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True, exist_ok=False)
                return folder
            except FileExistsError:
                if folder.is_dir() and not any(folder.iterdir()):
                    return folder
    except OSError as error:
        raise UserError(f"output_dir {output_dir!r} cannot be written: {error.strerror}") from None
    raise UserError(f"output_dir {output_dir!r} holds ten thousand runs named {name!r}")


def last_run_folder(output_dir: str, name: str) -> Path:
    """The newest run folder of a name. Raises UserError where there is none."""
    found = [f for f in Path(output_dir).glob(f"{name}*") if re.fullmatch(rf"{re.escape(name)}(-\d+)?", f.name)]
    found = [f for f in found if (f / "recipe.yaml").exists()]
    if not found:
        raise UserError(f"--resume: {Path(output_dir) / name} holds no run")
    return max(found, key=lambda f: int(f.name[len(name) + 1 :] or 1))


@contextlib.contextmanager
def only_user_of(folder: Path) -> Iterator[None]:
    """Locks a run folder for this process. Raises UserError where another process holds the lock."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use: another process is running in it") from None
        yield


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl, [] where there is no file. An unfinished last line, left by a killed run, is dropped."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


class RunLog:
    """Writer of one run's metrics (`name`.jsonl and TensorBoard) and sampled completions (parquet)."""

    def __init__(self, folder: Path, name: str = "metrics", *, after: int = -1) -> None:
        """Continues a log after step `after`: rows and samples that the run wrote of later steps are removed."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        file = folder / f"{name}.jsonl"
        self.history: list[dict[str, float]] = [row for row in read_metrics(file) if row["step"] <= after]
        with disk_errors(folder):
            write_text(file, "".join(json.dumps(row) + "\n" for row in self.history))
            self._lines = file.open("a", buffering=1)
            self._board = SummaryWriter(str(folder), purge_step=after + 1 if after >= 0 else None)
        for parquet in (folder / "samples").glob("*.parquet"):
            if int(parquet.stem.rpartition("_")[2]) > after:
                parquet.unlink()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step. Raises Diverged where a value is not finite."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise Diverged(
                f"{broken[0]} is not finite at step {step}: the policy has diverged (learner.lr is too high?)"
            )
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        row = {"step": step, **values}
        self.history.append(row)
        with disk_errors(self.folder):
            self._lines.write(json.dumps(row) + "\n")
            # One event for all values: TensorBoard's queue holds ten events, and adding to a full queue blocks.
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            assert self._board.file_writer is not None, "the log is closed"
            self._board.file_writer.add_summary(Summary(value=scalars), step)

    def samples(self, step: int, groups: Sequence[TrajectoryGroup], *, kind: str = "train") -> None:
        """Writes samples/`kind`_`step`.parquet, one row a completion."""
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
            }
            for group in groups
            for t in group.trajectories
        ]
        if rows:
            with disk_errors(self.folder):
                (self.folder / "samples").mkdir(exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows), self.folder / "samples" / f"{kind}_{step:06d}.parquet")

    def dropped_tokens(self, rows: Sequence[Mapping[str, int | str]]) -> None:
        """Writes dropped_tokens.json: the tokens that PPO's clip would have dropped, most frequent first."""
        (self.folder / "dropped_tokens.json").write_text(json.dumps(list(rows), indent=1) + "\n")

    def close(self) -> None:
        with disk_errors(self.folder):
            self._lines.close()
            self._board.close()
