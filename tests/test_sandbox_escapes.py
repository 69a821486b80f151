"""Ways out of the sandbox that were found, and their kind: sockets, queues, machine-wide resources, hidden files."""

# ruff: noqa: F811 (fixtures of another file)

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_sandbox import ROOT, Run, mechanism, run  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("no_other_sandboxes")


def test_a_socket_in_the_file_system_of_another_process(run: Run, tmp_path: Path) -> None:
    """A socket pair of datagrams sends to any path, which Landlock does not govern."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as victim, socket.socket(socket.AF_UNIX) as listener:
        victim.bind(str(tmp_path / "datagrams"))
        listener.bind(str(tmp_path / "stream"))
        listener.listen()
        code = f"""
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW, socket.SOCK_STREAM):
    for path in ({str(tmp_path / "datagrams")!r}, {str(tmp_path / "stream")!r}):
        try:
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            one.sendto(b"here", path)
            print("sent", kind)
        except PermissionError:
            pass
        try:
            one, other = socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
            one.sendmsg([b"here"], [], 0, path)
            print("sent", kind)
        except PermissionError:
            pass
one, other = socket.socketpair()
one.sendall(b"inside")
print(other.recv(9))
"""
        assert run(code).stdout == "b'inside'\n"
        for end in (victim, listener):
            end.setblocking(False)
        with pytest.raises(BlockingIOError):
            victim.recv(9)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_system_v_objects_of_another_process(run: Run) -> None:
    """Queues, shared memory and semaphores of the same user, which namespaces alone would hide."""
    libc = ctypes.CDLL(None, use_errno=True)
    queue, memory, semaphores = libc.msgget(0, 0o1666), libc.shmget(0, 4096, 0o1666), libc.semget(0, 1, 0o1666)
    message = ctypes.create_string_buffer(struct.pack("@l4s", 1, b"kept"))
    try:
        assert min(queue, memory, semaphores) >= 0 and libc.msgsnd(queue, message, 4, 0) == 0
        code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(512)
for name, arguments in (("msgrcv", ({queue}, buffer, 64, 0, 0o4000)), ("msgsnd", ({queue}, buffer, 4, 0o4000)),
                        ("msgctl", ({queue}, 0, buffer)), ("msgctl", ({queue}, 2, buffer)),
                        ("shmctl", ({memory}, 0, None)), ("shmctl", ({memory}, 2, buffer)),
                        ("semctl", ({semaphores}, 0, 0)), ("semctl", ({semaphores}, 0, 16, 7)),
                        ("semop", ({semaphores}, buffer, 1)), ("semtimedop", ({semaphores}, buffer, 1, None)),
                        ("msgget", (0, 0o1600)), ("shmget", (0, 4096, 0o1600)), ("semget", (0, 1, 0o1600))):
    print(getattr(libc, name)(*arguments), errno.errorcode[ctypes.get_errno()])
print(ctypes.c_long(libc.shmat({memory}, None, 0)).value)
"""
        assert run(code).stdout == "-1 EPERM\n" * 13 + "-1\n"
        assert libc.msgrcv(queue, message, 4, 0, 0o4000) == 4 and message.raw[8:12] == b"kept"
    finally:
        libc.msgctl(queue, 0, None)
        libc.shmctl(memory, 0, None)
        libc.semctl(semaphores, 0, 0)


def test_resources_of_the_whole_machine(run: Run) -> None:
    """Asynchronous reads and writes, huge pages, locked memory, timers and watches are counted for all programs."""
    setup, submit, timer = (0, 2, 107) if os.uname().machine == "aarch64" else (206, 209, 222)
    code = f"""
import ctypes, errno, mmap
libc = ctypes.CDLL(None, use_errno=True)
context = ctypes.c_ulong(0)
for number, arguments in (({setup}, (65536, ctypes.byref(context))), ({submit}, (0, 0, None)),
                          ({timer}, (0, None, ctypes.byref(context)))):
    print(libc.syscall(number, *arguments), errno.errorcode[ctypes.get_errno()])
for name, arguments in (("mlockall", (3,)), ("mlock", (ctypes.byref(context), 8)), ("swapoff", (b"/x",)), ("sync", ()),
                        ("fanotify_init", (0, 0)), ("setpriority", (0, 0, -5))):
    print(getattr(libc, name)(*arguments) * (name != "sync"), name == "sync" or errno.errorcode[ctypes.get_errno()])
try:
    mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
except PermissionError:
    print("no huge pages")
"""
    before = Path("/proc/sys/fs/aio-nr").read_text() if Path("/proc/sys/fs/aio-nr").exists() else ""
    lines = run(code).stdout.splitlines()
    assert lines[:3] == ["-1 EPERM"] * 3 and lines[-1] == "no huge pages"
    assert [line.split()[0] for line in lines[3:-1]] == ["-1", "-1", "-1", "0", "-1", "-1"]
    assert before == (Path("/proc/sys/fs/aio-nr").read_text() if before else "")


HOARD = """
import ctypes, mmap, os, socket, time
libc, kept = ctypes.CDLL(None, use_errno=True), []
for number in range(60):
    with open("file", "wb") as file:
        file.write(b"x" * 900_000)
    descriptor = os.open("file", os.O_RDWR)
    os.unlink("file")
    {keep}
    # At most six seconds, for the limit to act.
    time.sleep(0.1)
print("kept all")
"""


@pytest.mark.parametrize(
    "keep",
    [
        "kept.append(descriptor)",
        "kept.append(mmap.mmap(descriptor, 0)); os.close(descriptor)",
        # A mapping without a descriptor, of one page: its file stays whole.
        "libc.mmap(None, 4096, 1, 2, descriptor, 0); os.close(descriptor)",
        "kept.append(socket.socketpair()); socket.send_fds(kept[-1][0], [b'x'], [descriptor]); os.close(descriptor)",
    ],
    ids=["descriptor", "mapping", "hidden-mapping", "in-flight"],
)
def test_deleted_files_count_as_files(run: Run, keep: str) -> None:
    result = run(HOARD.format(keep=keep), disk_mb=1)
    assert not result.ok and "kept all" not in result.stdout
    assert result.stopped == "disk" or "No space left" in result.stderr or "not permitted" in result.stderr


def test_files_that_are_deleted_while_they_are_used(run: Run) -> None:
    """The ways of programs that do not hoard."""
    code = """
import mmap, sqlite3, tempfile, time
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 100_000)
    file.flush()
    with mmap.mmap(file.fileno(), 0) as mapped:
        time.sleep(0.3)
        print(mapped[:1])
shared = mmap.mmap(-1, 1 << 20)
shared[0] = 1
with sqlite3.connect("data") as data:
    data.execute("create table t(x)")
    data.executemany("insert into t values (?)", [(i,) for i in range(100)])
    print(data.execute("select sum(x) from t").fetchone()[0])
time.sleep(0.2)
"""
    assert run(code, disk_mb=1).stdout == "b'x'\n4950\n"


def test_numpy_computes_under_the_filter() -> None:
    """Programs get no numpy, but the filter is the place where a library of theirs would fail."""
    code = """
import os
from cispo.sandbox import seccomp
from cispo.sandbox.kernel import PR_SET_NO_NEW_PRIVS, call
call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
seccomp.install()
program = "import numpy as n; a = n.random.default_rng(0).random((300, 300))"
program += "; print(n.allclose(a @ n.linalg.inv(a), n.eye(300)))"
os.execv(os.environ["PYTHON"], [os.environ["PYTHON"], "-c", program])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
