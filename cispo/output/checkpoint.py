"""Checkpoints of a run: written whole or not at all, in the background; the last one is what `--resume` goes on from.

    checkpoints/step_000012/   config.json  model.safetensors  tokenizer ...    a model folder, as transformers reads it
                               cispo.json                                       what it is, and the size of every file
                .../training/  driver.json  driver.safetensors                  where the loop stands
                               learner.safetensors  critic.safetensors          optimizers, float32 masters, the critic
    checkpoints/best.json      which step was best on the held-out prompts

A draft becomes a checkpoint by one rename, once every file is on the disk. Only JSON and safetensors are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cispo.errors import UserError
from cispo.files import disk_errors, save_tensors, write_json
from cispo.workers import Workers

_DRAFT = ".draft"
_FACTS = "cispo.json"
_BEST = "best.json"


class CheckpointFolder:
    """The checkpoints of one run, of which the newest `keep` stay, and the best."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A new empty folder to write into, which `finish` turns into a checkpoint.

        Raises RunError where the disk refuses; what was written then goes.
        """
        draft = self.folder / _DRAFT
        with self.completing():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft

    @contextmanager
    def completing(self) -> Iterator[None]:
        """A block in which an error gives up the draft, and the room that it takes on the disk."""
        try:
            with disk_errors(self.folder / _DRAFT):
                yield
        except BaseException:
            shutil.rmtree(self.folder / _DRAFT, ignore_errors=True)
            raise

    def finish(self, step: int, facts: Mapping[str, Any], *, score: float | None = None) -> Path:
        """Makes the draft the checkpoint of `step`, then drops the oldest beyond `keep`.

        `score` is its held-out accuracy: the best one so far stays, however old it gets. Raises RunError where the disk
        refuses; earlier checkpoints are then as they were.
        """
        draft, final = self.folder / _DRAFT, self.folder / f"step_{step:06d}"
        assert not final.exists(), f"{final} is there already"
        with self.completing():
            sizes = {str(f.relative_to(draft)): f.stat().st_size for f in sorted(draft.rglob("*")) if f.is_file()}
            write_json(draft / _FACTS, {"step": step, **facts, "files": sizes})
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
        """Every checkpoint whose files are all there with the sizes they were written with, oldest first."""
        return [folder for folder in sorted(self.folder.glob("step_*")) if _is_whole(folder)]

    def last(self) -> Path | None:
        """The newest whole checkpoint that a run can go on from."""
        resumable = [folder for folder in self.whole() if (folder / "training" / "driver.json").exists()]
        return resumable[-1] if resumable else None

    def best(self) -> Path | None:
        facts = self._best_facts()
        return self.folder / f"step_{facts['step']:06d}" if facts else None

    def best_score(self) -> float:
        return self._best_facts().get("eval/accuracy", float("-inf"))

    def forget_after(self, step: int) -> None:
        """Drops what a run left that got further than the checkpoint it goes on from."""
        shutil.rmtree(self.folder / _DRAFT, ignore_errors=True)
        for folder in self.folder.glob("step_*"):
            if folder.name > f"step_{step:06d}":
                shutil.rmtree(folder, ignore_errors=True)
        if self._best_facts().get("step", step) > step:
            (self.folder / _BEST).unlink()

    def _best_facts(self) -> dict[str, Any]:
        file = self.folder / _BEST
        return json.loads(file.read_text()) if file.exists() else {}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


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


def _is_whole(folder: Path) -> bool:
    if not re.fullmatch(r"step_\d+", folder.name) or not (folder / _FACTS).exists():
        return False
    try:
        files = json.loads((folder / _FACTS).read_text()).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def _to_disk(path: Path) -> None:
    """A rename must not reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True, kw_only=True)
class CheckpointWriter:
    """At most one checkpoint is being written at a time."""

    folder: CheckpointFolder
    workers: Workers
    save_tokenizer: Callable[[Path], object]
    saved: int = -1
    """The step of the last checkpoint that was begun, or that the run goes on from."""
    _pending: dict[str, Any] | None = None
    """What completes the one that is being written."""

    async def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        facts: Mapping[str, Any],
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
        self._pending = {"step": step, "facts": facts, "score": score}
        self.saved = step

    async def settle(self, *, wait: bool) -> None:
        """Completes the checkpoint that was begun once it is on the disk. Raises RunError where the disk refused."""
        if self._pending is None:
            return
        with self.folder.completing():
            if await self.workers.saved(wait=wait):
                self.folder.finish(**self._pending)
                self._pending = None
