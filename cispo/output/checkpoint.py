"""Checkpoints of a run: written whole or not at all, in the background; `--resume` continues from the newest.

    checkpoints/.draft  --every file on the disk, then one rename-->  step_000012

    checkpoints/step_000012/   config.json  model.safetensors  tokenizer ...    a model folder, as transformers reads it
                               model-00001-of-00004.safetensors ... index       its weights in parts, of sharded ranks
                               cispo.json                                       step, versions, size and hash of files
                .../training/  driver.json  driver.safetensors                  state of the training loop
                               learner.safetensors  critic.safetensors          optimizers, float32 masters, the critic
                               learner-00001-of-00004.safetensors ...           the same as rows, a file a sharded rank
    checkpoints/best.json      the step with the best accuracy on the held-out prompts, or train.best

A checkpoint holds no state of a random generator: seeds come from identities (`seeds`). A draft is complete once every
rank has written its files. Tensors are whole, or rows with their place in the whole, so a resumed run may have another
number of ranks. Only JSON and safetensors are read.
"""

from __future__ import annotations

import json
import math
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
from cispo.files import disk_errors, read_json, save_tensors, write_json
from cispo.output.integrity import check_sealed, damage, seal

_DRAFT = ".draft"
_BEST = "best.json"
_STATE = "training/driver.json"


class CheckpointFolder:
    """The checkpoints of one run. The newest `keep` stay, and the best."""

    def __init__(self, run: Path, keep: int, metric: str = "eval/accuracy") -> None:
        """`metric` decides on the best checkpoint, the higher the better."""
        self.folder = run / "checkpoints"
        self.keep = keep
        self.metric = metric

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A new empty draft folder, which `finish` turns into a checkpoint.

        Raises RunError where the disk refuses, after removing the draft.
        """
        draft = self.folder / _DRAFT
        with self.completing():
            shutil.rmtree(draft, ignore_errors=True)
            # Without parents: a run folder that was removed must not come back with nothing but a checkpoint.
            self.folder.mkdir(exist_ok=True)
            draft.mkdir()
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

        `score` is its value of `metric`; the checkpoint with the best one stays at any age. Raises RunError where the
        disk refuses; earlier checkpoints are then unchanged.
        """
        draft, final = self.folder / _DRAFT, self.folder / f"step_{step:06d}"
        assert not final.is_dir(), f"{final} is there already"
        with self.completing():
            seal(draft, {"cispo_version": __version__, "step": step, **facts})
            for file in draft.rglob("*"):
                _to_disk(file)
            _to_disk(draft)
            os.replace(draft, final)
            _to_disk(self.folder)
            if score is not None and score >= self.best_score():
                write_json(self.folder / _BEST, {"step": step, self.metric: score})
        for old in self.whole()[: -self.keep]:
            if old != self.best():
                shutil.rmtree(old, ignore_errors=True)
        return final

    def steps(self) -> list[Path]:
        """Every folder with a checkpoint's name, whole or not, oldest first."""
        return sorted((f for f in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", f.name)), key=step_of)

    def whole(self) -> list[Path]:
        """The checkpoints in which every file has the size it was written with, oldest first."""
        return [folder for folder in self.steps() if damage(folder, hashes=False) is None]

    def last(self) -> Path | None:
        """The newest whole checkpoint from which a run can be resumed; hashes are not looked at."""
        resumable = [folder for folder in self.whole() if (folder / _STATE).exists()]
        return resumable[-1] if resumable else None

    def resume_point(self, logged: int, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was written and up to which the log is whole, None where there is none.

        `logged` is the last step of the log's whole part. A damaged checkpoint is named in a warning and moved aside.
        Raises UserError where all are damaged.
        """
        damaged: dict[Path, str] = {}
        intact: list[Path] = []
        for folder in reversed(self.steps()):
            problem = _problem(folder)
            if problem is not None:
                damaged[folder] = problem
            elif (folder / _STATE).exists():
                intact.append(folder)
                if step_of(folder) <= logged:
                    break
        if damaged and not intact:
            newest, problem = next(iter(damaged.items()))
            raise UserError(f"--resume: no checkpoint in {self.folder} is whole: in {newest.name}, {problem}")
        for folder, problem in damaged.items():
            aside = folder.with_name(f"damaged_{folder.name}")
            say(f"checkpoint {folder.name} is damaged and moved to {aside.name}: {problem}")
            with disk_errors(folder):
                _remove(aside)
                folder.rename(aside)
        self._check_best(say)
        if not intact:
            return None
        covered = step_of(intact[-1]) <= logged
        if step_of(intact[0]) > logged:
            rest = "later steps are made again" if covered else "rows that cannot be read are left out"
            say(f"metrics.jsonl is whole up to step {logged} only: {rest}")
        return intact[-1] if covered else intact[0]

    def best(self) -> Path | None:
        step, _ = self._best()
        return None if step is None else self.folder / f"step_{step:06d}"

    def best_score(self) -> float:
        return self._best()[1]

    def forget_after(self, step: int) -> None:
        """Removes checkpoints of later steps and any draft, before a run is resumed from `step`."""
        _remove(self.folder / _DRAFT)
        for folder in self.steps():
            if step_of(folder) > step:
                _remove(folder)
        best, _ = self._best()
        if best is not None and best > step:
            (self.folder / _BEST).unlink()

    def _best(self) -> tuple[int | None, float]:
        """(step, score) of best.json; (None, -inf) before the first score, and where the file cannot be read."""
        try:
            facts = json.loads((self.folder / _BEST).read_text(encoding="utf-8"))
            step, score = facts["step"], float(facts[self.metric])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None, -math.inf
        return (step, score) if isinstance(step, int) and math.isfinite(score) else (None, -math.inf)

    def _check_best(self, say: Callable[[str], None]) -> None:
        """Removes a best.json that cannot be read, or names a checkpoint that is gone."""
        file, best = self.folder / _BEST, self.best()
        if os.path.lexists(file) and (best is None or not best.is_dir()):
            say(f"{file} is damaged or by another metric: the best checkpoint is chosen anew")
            with disk_errors(file):
                _remove(file)


class Savers(Protocol):
    """The learner and critic ranks, which write their own tensors."""

    async def start_save(self, folder: Path, *, full: bool) -> None:
        """Copies policy, critic and, if `full`, optimizers to the host, and starts to write them."""
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
    full: bool = True
    """Whether checkpoints hold the optimizers."""
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
            await self.workers.start_save(draft, full=self.full)
            self.save_tokenizer(draft)
            save_tensors(tensors, draft / "training" / "driver.safetensors")
            write_json(draft / _STATE, state)
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
    """The folder as a path. Raises UserError where it holds no policy, or weights that are not as they were written."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"checkpoint {folder} does not exist")
    if not (path / "config.json").exists():
        hint = sorted(path.glob("checkpoints/step_*"))
        raise UserError(
            f"checkpoint {folder} has no config.json" + (f" (a run folder? try {hint[-1]})" if hint else "")
        )
    check_sealed(path, "checkpoint", only="*.safetensors")
    return path


def _problem(folder: Path) -> str | None:
    """The damage of a checkpoint from which a run is to be resumed, None where there is none."""
    problem = damage(folder, hashes=True)
    if problem is None and (folder / _STATE).exists():
        try:
            # A checkpoint of version 0.1.0 has no hashes.
            if read_json(folder / _STATE).get("finished") != step_of(folder):
                return f"{_STATE} is of another step"
        except UserError:
            return f"{_STATE} cannot be read"
    return problem


def _remove(path: Path) -> None:
    """Removes a folder or a file, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """fsync of a file or folder: the rename must not reach the disk before the contents of the renamed folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
