"""Scalars for TensorBoard, written as they come.

TensorBoard's own writer has a thread, which prints a traceback where the disk is full.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

# tensorboard declares protobuf's generated classes in a way that type checkers do not see.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """The event file of one run. Every method raises OSError where the disk refuses."""

    def __init__(self, folder: Path, name: str, *, purge_step: int | None = None) -> None:
        """`purge_step` hides this and later steps in earlier event files of the folder."""
        place = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{name}"
        self._file = (folder / f"events.out.tfevents.{place}").open("xb")
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(step=purge_step, file_version="brain.Event:2"))
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event for all values of a step."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
