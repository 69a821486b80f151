"""The run folder: what a run leaves behind, and how it is written.

runs/<name>/recipe.yaml  metrics.jsonl  events.out.tfevents.*  samples/step_000010.parquet
            checkpoints/step_000120/  learning_curve.png  dropped_tokens.json
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cispo.types import Diverged, TrajectoryGroup, UserError


def create_run_folder(output_dir: str, name: str) -> Path:
    """Makes `output_dir/name`; where that holds a run already, `name-2`, `name-3` ... so that nothing is lost."""
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


class RunLog:
    """Writes one run's metrics (`name`.jsonl and TensorBoard) and sampled completions (parquet)."""

    def __init__(self, folder: Path, name: str = "metrics") -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        self.history: list[dict[str, float]] = []
        self._lines = (folder / f"{name}.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step; every value must be a finite number."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise Diverged(
                f"{broken[0]} is not finite at step {step}: the policy has diverged (learner.lr is too high?)"
            )
        row = {"step": step, **values}
        self.history.append(row)
        self._lines.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def samples(self, step: int, groups: Sequence[TrajectoryGroup], *, kind: str = "train") -> None:
        """Writes a step's completions, one row each."""
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
                "version": min(min(turn.completion.versions) for turn in t.turns),
                "version_max": max(max(turn.completion.versions) for turn in t.turns),
            }
            for group in groups
            for t in group.trajectories
        ]
        if rows:
            (self.folder / "samples").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), self.folder / "samples" / f"{kind}_{step:06d}.parquet")

    def dropped_tokens(self, rows: Sequence[Mapping[str, int | str]]) -> None:
        """Writes dropped_tokens.json: which tokens PPO's clip would have dropped, most often first."""
        (self.folder / "dropped_tokens.json").write_text(json.dumps(list(rows), indent=1) + "\n")

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def save_checkpoint(
    folder: Path, step: int, facts: Mapping[str, Any], policy: Path, save_tokenizer: Callable[[Path], object], keep: int
) -> Path:
    """Writes checkpoints/step_NNNNNN whole or not at all, then drops the oldest beyond `keep`.

    `policy` is a folder on the same disk that becomes the checkpoint: the tokenizer and `facts` (cispo.json) join it.
    """
    final = folder / "checkpoints" / f"step_{step:06d}"
    save_tokenizer(policy)
    (policy / "cispo.json").write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")
    final.parent.mkdir(exist_ok=True)
    os.replace(policy, final)
    for old in sorted(final.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return final


def check_checkpoint(folder: str) -> Path:
    """The folder, if a policy can be loaded from it."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    if not (path / "config.json").exists():
        hint = sorted(path.glob("checkpoints/step_*"))
        raise UserError(
            f"checkpoint {folder} has no config.json" + (f" (a run folder? try {hint[-1]})" if hint else "")
        )
    return path
