"""Checkpoints of a run: written whole or not at all, in the background; `--resume` continues from the newest.

    checkpoints/.draft  --every file on the disk, then one rename-->  step_000012

    checkpoints/step_000012/   config.json  model.safetensors  tokenizer ...    a model folder, as transformers reads it
                               cispo.json                                       step, versions, size of every file
                .../training/  driver.json  driver.safetensors                  state of the training loop
                               learner.safetensors  critic.safetensors          optimizers, float32 masters, the critic
    checkpoints/best.json      the step with the best accuracy on the held-out prompts

A checkpoint holds no state of a random generator: seeds come from identities (`seeds`). Ranks hold the same tensors, so
a resumed run may have another number of them. Only JSON and safetensors are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cispo import __version__
from cispo.errors import UserError
from cispo.files import disk_errors, save_tensors, write_json

_DRAFT = ".draft"
_FACTS = "cispo.json"
_BEST = "best.json"


class CheckpointFolder:
    """The checkpoints of one run. The newest `keep` stay, and the best."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A new empty draft folder, which `finish` turns into a checkpoint.

        Raises RunError where the disk refuses, after removing the draft.
        """
        draft = self.folder / _DRAFT
        with self.completing():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft

    @contextmanager
    def completing(self) -> Iterator[None]:
        """A block in which any error removes the draft and frees its disk space."""
        try:
            with disk_errors(self.folder / _DRAFT):
                yield
        except BaseException:
            shutil.rmtree(self.folder / _DRAFT, ignore_errors=True)
            raise

    def finish(self, step: int, facts: Mapping[str, object], *, score: float | None = None) -> Path:
        """Makes the draft the checkpoint of `step`, then removes the oldest beyond `keep`.

        `score` is its held-out accuracy; the checkpoint with the best one stays at any age. Raises RunError where the
        disk refuses; earlier checkpoints are then unchanged.
        """
        draft, final = self.folder / _DRAFT, self.folder / f"step_{step:06d}"
        assert not final.exists(), f"{final} is there already"
        with self.completing():
            sizes = {str(f.relative_to(draft)): f.stat().st_size for f in sorted(draft.rglob("*")) if f.is_file()}
            write_json(draft / _FACTS, {"cispo_version": __version__, "step": step, **facts, "files": sizes})
            for file in draft.rglob("*"):
                _to_disk(file)
            _to_disk(draft)
            os.replace(draft, final)
            _to_disk(self.folder)
            if score is not None and score >= self.best_score():
                write_json(self.folder / _BEST, {"step": step, "eval/accuracy": score})
        for old in self.whole()[: -self.keep]:
            if old != self.best():
                shutil.rmtree(old, ignore_errors=True)
        return final

    def whole(self) -> list[Path]:
        """The checkpoints in which every file has the size it was written with, oldest first."""
        return [folder for folder in sorted(self.folder.glob("step_*")) if _is_whole(folder)]

    def last(self) -> Path | None:
        """The newest whole checkpoint from which a run can be resumed."""
        resumable = [folder for folder in self.whole() if (folder / "training" / "driver.json").exists()]
        return resumable[-1] if resumable else None

    def best(self) -> Path | None:
        step, _ = self._best()
        return None if step is None else self.folder / f"step_{step:06d}"

    def best_score(self) -> float:
        return self._best()[1]

    def forget_after(self, step: int) -> None:
        """Removes checkpoints of later steps and any draft, before a run is resumed from `step`."""
        shutil.rmtree(self.folder / _DRAFT, ignore_errors=True)
        for folder in self.folder.glob("step_*"):
            if folder.name > f"step_{step:06d}":
                shutil.rmtree(folder, ignore_errors=True)
        best, _ = self._best()
        if best is not None and best > step:
            (self.folder / _BEST).unlink()

    def _best(self) -> tuple[int | None, float]:
        """(step, score) of best.json; (None, -inf) before the first score."""
        file = self.folder / _BEST
        if not file.exists():
            return None, float("-inf")
        facts = json.loads(file.read_text())
        return facts["step"], facts["eval/accuracy"]


class Savers(Protocol):
    """The learner and critic ranks, which write their own tensors."""

    async def start_save(self, folder: Path) -> None:
        """Copies policy, critic and optimizers to the host, and starts to write them."""
        ...

    async def saved(self, *, wait: bool) -> bool:
        """Whether all of it is on the disk; `wait` blocks until it is."""
        ...


@dataclass(slots=True, kw_only=True)
class CheckpointWriter:
    """Writes checkpoints while the run goes on, one at a time.

    begin --copies of all tensors--> draft, written by threads of the ranks --settle: rename--> checkpoint
    """

    folder: CheckpointFolder
    workers: Savers
    save_tokenizer: Callable[[Path], object]
    saved: int = -1
    """Step of the last checkpoint that was begun, or from which the run was resumed."""
    _complete: Callable[[], object] | None = None
    """Turns the draft that is being written into a checkpoint."""

    async def begin(
        self,
        step: int,
        state: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        *,
        facts: Mapping[str, object],
        score: float | None,
    ) -> None:
        """Copies policy, critic and optimizers as they are; `state` and `tensors` are the driver's.

        Raises RunError where the disk refuses.
        """
        await self.settle(wait=True)
        with self.folder.writing() as draft:
            await self.workers.start_save(draft)
            self.save_tokenizer(draft)
            save_tensors(tensors, draft / "training" / "driver.safetensors")
            write_json(draft / "training" / "driver.json", state)
        self._complete = partial(self.folder.finish, step, facts, score=score)
        self.saved = step

    async def settle(self, *, wait: bool) -> None:
        """Completes the checkpoint that was begun once it is on the disk. Raises RunError where the disk refuses."""
        if self._complete is None:
            return
        with self.folder.completing():
            if await self.workers.saved(wait=wait):
                self._complete()
                self._complete = None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def check_checkpoint(folder: str) -> Path:
    """The folder as a path. Raises UserError where it holds no policy."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    if not (path / "config.json").exists():
        hint = sorted(path.glob("checkpoints/step_*"))
        raise UserError(
            f"checkpoint {folder} has no config.json" + (f" (a run folder? try {hint[-1]})" if hint else "")
        )
    return path


def _is_whole(folder: Path) -> bool:
    if not re.fullmatch(r"step_\d+", folder.name) or not (folder / _FACTS).exists():
        return False
    try:
        files = json.loads((folder / _FACTS).read_text()).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def _to_disk(path: Path) -> None:
    """fsync of a file or folder: the rename must not reach the disk before the contents of the renamed folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
