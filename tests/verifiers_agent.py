"""An agent whose loop is a verifiers environment in a virtual environment of its own, named by VERIFIERS_PYTHON."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

PROGRAM = Path(__file__).with_name("verifiers_program.py")


class Program:
    """The other Python: one process for all attempts of a session process."""

    def __init__(self, taskset: str) -> None:
        command = [os.environ["VERIFIERS_PYTHON"], str(PROGRAM), taskset]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: dict[int, SimpleQueue[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def play(self, **request: object) -> float:
        """The reward of an episode."""
        assert self._process.stdin is not None
        answer = SimpleQueue[dict[str, Any]]()
        with self._lock:
            number = next(self._numbers)
            self._answers[number] = answer
            print(json.dumps({"id": number, **request}), file=self._process.stdin, flush=True)
        result = answer.get()
        if result["errors"]:
            raise RuntimeError(f"verifiers: {result['errors'][0]}")
        return result["reward"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            result = json.loads(line)
            self._answers.pop(result["id"]).put(result)
        for answer in self._answers.values():
            answer.put({"errors": ["the program ended"]})


_PROGRAMS = dict[str, Program]()
_STARTING = threading.Lock()


def solve(base_url: str, api_key: str, taskset: str, messages: list[Any], table: str, answer: str) -> float:
    with _STARTING:
        program = _PROGRAMS.setdefault(taskset, Program(taskset)) if taskset not in _PROGRAMS else _PROGRAMS[taskset]
    columns = {"prompt": messages[0]["content"], "table": table, "answer": answer}
    return program.play(base_url=base_url, api_key=api_key, columns=columns)
