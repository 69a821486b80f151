"""A tracker as accelerate's users write one: it appends what it gets to a file named by its environment."""

from __future__ import annotations

import json
import os
from typing import Any

from accelerate.tracking import GeneralTracker


class FileTracker(GeneralTracker):
    name = "file"
    requires_logging_directory = False
    run_id: str | None = None

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> None:
        return None

    def _write(self, **values: object) -> None:
        with open(os.environ["FAKE_TRACKER"], "a") as file:
            file.write(json.dumps(values) + "\n")

    def start(self) -> None:
        resumed, self.run_id = self.run_id, self.run_id or "made up"
        self._write(start=self.run_name, resumed=resumed)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write(config=values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        if step == int(os.environ.get("FAKE_TRACKER_FAILS", "-1")):
            raise ConnectionError("no route to host")
        self._write(step=step, values=values)

    def log_table(self, table_name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self._write(table=table_name, columns=columns, rows=data, step=step)

    def finish(self) -> None:
        self._write(finish=True)


class NoStart(FileTracker):
    def start(self) -> None:
        raise SystemExit("please log in")


class Dies(FileTracker):
    def log(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        os._exit(7)
