"""The driver's end of one reward worker: its start, its jobs, and the cause of its death."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import tempfile
from pathlib import Path

from cispo.errors import UserError
from cispo.files import disk_errors
from cispo.rollout.frames import frame, receive, receive_async, send, start_process
from cispo.rollout.reward_function import OUR_FILES, Failure
from cispo.rollout.reward_worker import LAST_CALL, START_SECONDS, Job, Ready, Reply, Setup

# Beyond twice the limit of a call: by then a working watchdog has ended the worker, on a busy machine too.
_SLACK_SECONDS = 10.0

# A batch system may signal all processes of a job, when it stops the job or asks for a checkpoint.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class WorkerDied(Exception):
    """The process ended; `suspects` is the number of jobs in it."""

    def __init__(self, process: WorkerProcess, suspects: int) -> None:
        super().__init__(f"reward worker ended with {suspects} jobs")
        self.suspects = suspects
        self._setup = process.setup
        self._exit_code = process.process.returncode
        self._last_call, self._report = process.read_black_box()
        self._timed_out = self._report.startswith("Timeout")

    @property
    def killed(self) -> bool:
        """Whether it was ended from outside, and not for its run time."""
        return -self._exit_code in _FROM_OUTSIDE and not self._timed_out

    def failure(self, job: Job) -> Failure:
        """The report of the death as a failure of this job."""
        job_id, function, completion = self._last_call
        if job_id != job.id:
            function, completion = job.functions[0], -1
        problem = self.how(self._setup.limits[function])
        if self._timed_out and self._setup.asynchronous:
            problem = f"blocked the event loop of the async rewards for more than {self._setup.timeout:g} s"
        return Failure(function, completion, problem, _line_of_user_code(self._report), self._timed_out, fatal=True)

    def how(self, limit: float) -> str:
        """The end of the process as a predicate; `limit` is its time limit in seconds."""
        if self._timed_out:
            return f"did not finish within {limit:g} s"
        if self._exit_code < 0:
            return f"crashed its process ({signal.Signals(-self._exit_code).name})"
        return f"ended its process with exit code {self._exit_code}"


class WorkerProcess:
    """A running worker with imported functions."""

    def __init__(self, setup: Setup) -> None:
        """Starts the process and blocks until its functions are imported.

        UserError naming a recipe key when an import fails, WorkerDied when the process ends during one, RunError when
        the temporary folder cannot be written.
        """
        self.setup = setup
        self.alive = True
        self._jobs: dict[int, asyncio.Future[Reply]] = {}
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        with disk_errors(Path(tempfile.gettempdir())):
            self._black_box = tempfile.TemporaryFile(buffering=0)
            self._black_box.write(LAST_CALL.pack(-1, -1, -1))
        self._socket, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._black_box.fileno())
        with theirs:
            self.process = start_process("cispo.rollout.reward_worker:main", fds)
        self.signatures = self._first_answer().signatures
        self._socket.setblocking(False)

    def _first_answer(self) -> Ready:
        self._socket.settimeout(START_SECONDS)
        try:
            send(self._socket, self.setup)
            ready = receive(self._socket, Ready)
        except (EOFError, OSError) as error:
            raise self._autopsy() from error
        if ready.error is not None:
            self.kill()
            raise UserError(ready.error)
        return ready

    async def run(self, job: Job) -> Reply:
        """The worker's answer to a job; WorkerDied when it ended instead. Several jobs may run at once."""
        message = frame(job)
        loop = asyncio.get_running_loop()
        self._jobs[job.id] = answer = loop.create_future()
        try:
            async with self._sending:
                await loop.sock_sendall(self._socket, message)
        except OSError:
            # The worker died: reading notices as well, and reports the cause.
            pass
        if self._reader is None or self._reader.done():
            self._reader = loop.create_task(self._read())
        try:
            await self._watch(answer)
            return await answer
        finally:
            self._jobs.pop(job.id, None)

    async def _watch(self, answer: asyncio.Future[Reply]) -> None:
        """Waits for an answer; ends a process that has begun no call for longer than a working watchdog allows."""
        before = None
        while not answer.done():
            await asyncio.wait({answer}, timeout=2 * self.setup.timeout + _SLACK_SECONDS)
            now = self.read_black_box()[0] if self.alive else None
            if not answer.done() and self.alive and now == before:
                self._bury()
            before = now

    async def _read(self) -> None:
        while self._jobs:
            try:
                reply = await receive_async(self._socket, Reply)
            except (EOFError, OSError):
                self._reader = None
                return self._bury()
            answer = self._jobs.pop(reply.id, None)
            if answer is not None and not answer.done():
                answer.set_result(reply)

    def _bury(self) -> None:
        death = self._autopsy()
        for answer in self._jobs.values():
            if not answer.done():
                answer.set_exception(death)

    def read_black_box(self) -> tuple[tuple[int, int, int], str]:
        """(job, function, completion) of the last call, and the traceback written at the process's end, if any."""
        content = os.pread(self._black_box.fileno(), 1 << 16, 0)
        return LAST_CALL.unpack_from(content), content[LAST_CALL.size :].decode(errors="replace")

    def kill(self) -> None:
        """Ends the worker at once, with the processes that its functions started."""
        if self.alive:
            self._autopsy()

    def _autopsy(self) -> WorkerDied:
        self.alive = False
        try:
            # A process already ending keeps its own exit code.
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()
        death = WorkerDied(self, len(self._jobs))
        if self._reader is not None and not self._reader.done():
            # Before the socket is closed: the loop knows it by its number, which the next worker's socket may get.
            self._reader.get_loop().remove_reader(self._socket)
            self._reader.cancel()
        self._socket.close()
        self._black_box.close()
        return death


def _line_of_user_code(report: str) -> str:
    """The reward function's place in faulthandler's traceback as "file, line N"; "" without a traceback.

    Frames come innermost first: the last one above ours in the main thread is the function, and the first one in the
    function's file is the line to name.
    """
    for section in report.split("(most recent call first):"):
        lines: list[tuple[str, str]] = re.findall(r'^  File "([^"]*)", line (\d+)', section, re.MULTILINE)
        files = [file for file, _ in lines]
        ours = next((i for i, file in enumerate(files) if Path(file).name in OUR_FILES), 0)
        if ours and files[-1] == "<string>":
            file, line = lines[files.index(files[ours - 1])]
            return f"{Path(file).name}, line {line}"
    return ""
