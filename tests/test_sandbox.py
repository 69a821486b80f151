"""The sandbox against programs that attack it, under both mechanisms: bounded in time, and without remains."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cispo.errors import RunError
from cispo.sandbox.run import Mechanism, SandboxResult, _interpreter, available_mechanisms, run_python
from cispo.sandbox.system_calls import ALLOWED, CONDITIONAL

pytestmark = pytest.mark.usefixtures("no_other_sandboxes")

ROOT = Path(__file__).parents[1]
Run = Callable[..., SandboxResult]


def ours() -> set[int]:
    """Process ids of the launchers and sandboxed programs on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"cispo.sandbox.launcher" in command or b"_sitebuiltins" in command:
            found.add(int(folder.name))
    return found


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("cispo-sandbox-*"))


def assert_nothing_left(processes: set[int], scratch: set[Path], within: float = 30.0) -> None:
    end = time.monotonic() + within
    while time.monotonic() < end and (ours() - processes or folders() - scratch):
        time.sleep(0.05)
    assert ours() - processes == set() and folders() - scratch == set()


@pytest.fixture(params=["namespaces", "landlock"])
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    if request.param not in available_mechanisms():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def run(mechanism: Mechanism) -> Iterator[Run]:
    """Runs a program, within its time and that of starting and ending it; checks that nothing remains."""
    processes, scratch = ours(), folders()

    def run(code: str, timeout: float = 20.0, **options) -> SandboxResult:
        started = time.monotonic()
        result = run_python(code, timeout=timeout, mechanism=mechanism, **options)
        assert time.monotonic() - started < timeout + 20.0
        return result

    yield run
    assert_nothing_left(processes, scratch)


def denied(result: SandboxResult) -> bool:
    return result.exit_code == 1 and "Operation not permitted" in result.stderr


def test_this_machine_can_contain_a_program() -> None:
    assert available_mechanisms()


def test_a_program_gets_its_input_and_returns_its_output(run: Run) -> None:
    result = run("print(input().upper(), 'ünï', exit.__class__.__name__)\nexit(3)", stdin="größe\n")
    assert (result.stdout, result.stderr, result.exit_code, result.stopped) == ("GRÖSSE ünï Quitter\n", "", 3, None)
    assert not result.ok and run("").ok


def test_a_dialogue_answers_each_output_of_a_program(run: Run) -> None:
    """The program's next input depends on its output; None closes its stdin."""
    code = """
import sys
print(1, flush=True)
for line in sys.stdin:
    print(int(line) + 1, flush=True)
print("end")
"""
    heard = bytearray()

    def double(output: bytes) -> bytes | None:
        """Answers each whole line; silent at a part of one."""
        heard.extend(output)
        if not output.endswith(b"\n"):
            return b""
        number = int(heard.split()[-1])
        return b"%d\n" % (2 * number) if number < 20 else None

    result = run(code, stdin=double)
    assert (result.stdout, result.stderr, result.ok) == ("1\n3\n7\n15\n31\nend\n", "", True)
    assert heard == b"1\n3\n7\n15\n31\n", "nothing is heard after the last answer"


def test_a_dialogue_longer_than_a_pipe(run: Run) -> None:
    answers = iter([b"x" * 3_000_000, None])
    parts: list[bytes] = []

    def answer(output: bytes) -> bytes | None:
        parts.append(output)
        return next(answers)

    code = "import sys\nprint('go', flush=True)\ntotal = len(sys.stdin.read(3_000_000))\nprint(total, flush=True)"
    code += "\nprint(len(sys.stdin.read()))"
    assert run(code, stdin=answer).stdout == "go\n3000000\n0\n" and b"".join(parts[:2]) == b"go\n3000000\n"


@pytest.mark.parametrize("code", ["print('a', flush=True)", "import os\nos.close(0)\nprint('a', flush=True)"])
def test_a_program_that_does_not_read_its_dialogue(run: Run, code: str) -> None:
    result = run(code, stdin=lambda output: b"y" * 1_000_000)
    assert result.ok and result.stdout == "a\n"


def test_a_dialogue_ends_with_its_limits(run: Run) -> None:
    """A program that waits for an answer that never comes, and one that answers for ever."""
    assert run("print('a', flush=True)\ninput()", stdin=lambda output: b"", timeout=1.0).stopped == "time"
    chatter = "import sys\nprint('a', flush=True)\nfor line in sys.stdin: print(line * 1000, flush=True)"
    assert run(chatter, stdin=lambda output: b"b\n", output_kb=64).stopped == "output"


def test_an_error_of_a_dialogue_ends_its_program(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run("print('a', flush=True)\nwhile True: pass", stdin=lambda output: b"%d" % (1 // 0))


def test_a_traceback_comes_back(run: Run) -> None:
    result = run("def f():\n    return 1 / 0\nf()")
    assert result.exit_code == 1 and result.stopped is None
    assert 'File "main.py", line 2, in f' in result.stderr and "ZeroDivisionError" in result.stderr


def test_names_of_the_launcher_do_not_leak_into_the_program(run: Run) -> None:
    result = run(
        "print([n for n in globals() if n.strip('_') not in ('annotations', 'builtins', 'doc', 'file')], __file__)"
    )
    assert result.stdout == "['__name__', '__package__', '__loader__', '__spec__'] main.py\n"


def test_the_same_program_gives_the_same_output(run: Run) -> None:
    code = "print({str(i) for i in range(50)})"
    assert run(code).stdout == run(code).stdout != ""


def test_an_endless_loop(run: Run) -> None:
    assert run("while True: pass", timeout=1.0).stopped == "time"


def test_sleeping_with_signals_ignored(run: Run) -> None:
    code = "import signal, time\nfor s in (2, 15, 24, 1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(1000)"
    assert run(code, timeout=1.0).stopped == "time"


def test_an_endless_loop_with_closed_outputs(run: Run) -> None:
    assert run("import os\nos.close(1); os.close(2)\nwhile True: pass", timeout=1.0).stopped == "time"


def test_a_fork_bomb(run: Run) -> None:
    assert denied(run("import os\nwhile True: os.fork()"))
    assert run("import subprocess, sys\nsubprocess.run([sys.executable, '-c', '0'])").exit_code == 1


def test_a_daemon(run: Run, tmp_path: Path) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
    assert denied(run(code))
    assert denied(run("import os\nos.setsid()"))


def test_a_thread_bomb(run: Run) -> None:
    code = """
import threading, time
threading.stack_size(1 << 15)
started = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        started += 1
except RuntimeError:
    print(started)
"""
    result = run(code)
    assert result.stopped == "threads" or (result.ok and int(result.stdout) <= 64)


def test_ten_gigabytes_of_memory(run: Run) -> None:
    assert run("x = bytearray(10 << 30)").stopped == "memory"
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").stopped == "memory"
    assert run("x = bytearray(100 << 20)").ok
    assert run("x = bytearray(100 << 20)", memory_mb=64).stopped == "memory"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_ten_gigabytes_of_output(run: Run, descriptor: int) -> None:
    code = f"import os\nfor _ in range(10 << 10): os.write({descriptor}, b'x' * (1 << 20))"
    result = run(code, output_kb=64)
    assert result.stopped == "output" and len(result.stdout + result.stderr) == 64 << 10


def test_ten_gigabytes_in_one_file(run: Run) -> None:
    code = "with open('big', 'wb') as f:\n    for _ in range(10 << 10): f.write(b'x' * (1 << 20))"
    result = run(code)
    assert result.stopped == "disk" or re.search("File too large|No space left", result.stderr)


def test_output_that_was_cut_is_no_success(run: Run) -> None:
    result = run("print('x' * 1500)", output_kb=1)
    assert (result.stopped, result.ok, result.stdout) == ("output", False, "x" * 1024)


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_very_many_files(run: Run, size: int) -> None:
    code = f"for i in range(100_000):\n    with open(str(i), 'wb') as f: f.write(b'x' * {size})"
    result = run(code)
    assert result.stopped == "disk" or "No space left" in result.stderr


def test_folders_nested_very_deeply(run: Run) -> None:
    code = "import os\nfor _ in range(1900):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()"
    result = run(code)
    assert result.ok or result.stopped == "disk"
    long = "import os\nfor _ in range(100):\n    os.mkdir('d' * 200); os.chdir('d' * 200)\nwhile True: pass"
    assert run(long, timeout=1.0).stopped in ("time", "disk")
    hidden = run("import os\nos.makedirs('a/b')\nos.mkdir('a/b/c', 0)\nos.mkdir('e', 0)\nimport time; time.sleep(0.2)")
    assert hidden.ok or hidden.stopped == "disk"
    assert run("import os\nos.mkdir('d'); os.mkdir('d/e'); open('d/e/f', 'w').close(); os.symlink('/', 'd/l')").ok


def test_reading_the_home_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    code = """
import os, sys
for top in sys.stdin.read().split():
    for folder, _, names in os.walk(top):
        for name in names:
            try:
                open(os.path.join(folder, name), "rb").close()
                print(os.path.join(folder, name))
            except OSError:
                pass
"""
    home, python = str(Path.home()), _interpreter()[1]
    result = run(code, stdin=f"{home} {tmp_path} {ROOT}", output_kb=8192)
    assert result.ok
    assert [path for path in result.stdout.split("\n")[:-1] if not any(path.startswith(p) for p in python)] == []
    for path in (
        tmp_path / "secret",
        ROOT / "cispo" / "sandbox" / "run.py",
        "/etc/passwd",
        "/proc/1/environ",
        "/proc/self/mem",
    ):
        assert run(f"open({str(path)!r})").exit_code == 1


def test_nothing_else_can_be_written(run: Run, tmp_path: Path) -> None:
    python, readable, _ = _interpreter()
    for folder in (str(tmp_path), "/", "/dev/shm", "/var/tmp", str(ROOT), os.path.dirname(os.__file__), readable[-1]):
        assert run(f"open({folder + '/written-by-the-sandbox'!r}, 'w')").exit_code == 1
    assert run(f"open({os.__file__!r}, 'a')").exit_code == 1
    assert not list(tmp_path.iterdir())
    # Truncation by opening to read, where Landlock has no right of its own for it.
    assert denied(run("import os\nos.open('main.py', os.O_RDONLY | os.O_TRUNC)"))


def kept(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns


def test_files_that_it_cannot_read_keep_their_mode_and_times(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    before = kept(file)
    for attack in (
        "chmod(p, 0)",
        "utime(p, (1, 1))",
        "chown(p, 1, 1)",
        "truncate(p, 0)",
        "unlink(p)",
        "rename(p, 'x')",
    ):
        assert run(f"import os\np = {str(file)!r}\nos.{attack}").exit_code == 1
    assert run(f"import os\nos.link({str(file)!r}, 'mine')").exit_code == 1
    assert file.read_text() == "kept" and kept(file) == before


def test_the_folder_it_works_in(run: Run) -> None:
    code = """
import os, tempfile
print(os.listdir("."))
os.mkdir("a")
open("a/b", "w").write("x")
os.rename("a/b", "a/c")
with tempfile.TemporaryFile() as f:
    f.write(b"y")
print(open("a/c").read())
"""
    assert run(code).stdout == "['main.py']\nx\n"


def test_a_socket(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert denied(run(f"import socket\nsocket.create_connection({address!r})"))
        for family in ("AF_INET", "AF_INET6", "AF_UNIX"):
            assert denied(run(f"import socket\nsocket.socket(socket.{family}, socket.SOCK_DGRAM)"))
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert run("import asyncio\nasyncio.run(asyncio.sleep(0))\nprint('ran')").stdout == "ran\n"


def test_the_environment_is_empty(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert run("import os\nprint(dict(os.environ), os.getenv('API_KEY'))").stdout == "{} None\n"


def test_no_file_of_the_caller_is_open(run: Run, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    code = """
import os
def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False
print([fd for fd in range(4096) if is_open(fd)])
"""
    try:
        assert run(code).stdout == "[0, 1, 2]\n"
    finally:
        os.close(descriptor)


def test_other_processes_are_out_of_reach(run: Run) -> None:
    victim = subprocess.Popen(["sleep", "1000"])
    try:
        code = f"""
import ctypes, os
libc, pids = ctypes.CDLL(None, use_errno=True), ({victim.pid}, {os.getpid()}, os.getppid(), -1, 0)
def call(name, *args):
    if getattr(libc, name)(*args) >= 0: print(name, args)
for pid in pids:
    call("kill", pid, 9)
    call("ptrace", 16, pid, 0, 0)
    call("syscall", 434, pid, 0)
    call("fcntl", 0, 8, pid)
    if pid > 0: call("prlimit", pid, 7, None, ctypes.create_string_buffer(16))
call("prctl", 1, 0, 0, 0, 0)
"""
        result = run(code)
        assert (result.stdout, result.ok) == ("", True)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_exotic_system_calls(run: Run) -> None:
    code = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, args in {"unshare": (0x10000000,), "mount": (b"x", b"/", b"tmpfs", 0, None), "chroot": (b".",),
                   "memfd_create": (b"x", 0), "shmget": (0, 4096, 0o1600), "inotify_init": ()}.items():
    print(name, getattr(libc, name)(*args), errno.errorcode[ctypes.get_errno()])
for number in (425, 434, 435, 437, 442, 463, 1000):
    print(number, libc.syscall(number, 0, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
"""
    lines = run(code).stdout.splitlines()
    assert len(lines) == 13 and all(" -1 E" in line for line in lines)
    assert {line.split()[-1] for line in lines[6:]} == {"ENOSYS"}


def test_it_has_no_privileges(run: Run) -> None:
    code = """
import ctypes, struct, os
data = ctypes.create_string_buffer(24)
ctypes.CDLL(None).capget(ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0)), data)
print(set(data.raw), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))
"""
    assert run(code).stdout == "{0} 1\n"


def test_in_namespaces_root_is_nobody() -> None:
    if "namespaces" not in available_mechanisms():
        pytest.skip("this machine has no namespaces")
    result = run_python("import os\nprint(os.getuid() != 0, os.getpid(), os.path.exists('/proc/self'))")
    assert result.stdout == "True 1 False\n"


def wait_for_programs(before: set[int], count: int) -> set[int]:
    end = time.monotonic() + 60
    while len(found := ours() - before) < count and time.monotonic() < end:
        time.sleep(0.05)
    assert len(found) == count
    return found


def test_a_caller_that_is_killed_leaves_nothing(mechanism: Mechanism) -> None:
    processes, scratch = ours(), folders()
    call = f"run_python('import time; time.sleep(1000)', timeout=999, mechanism={mechanism!r})"
    code = f"from cispo.sandbox.run import run_python; {call}"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    # The launcher and its program; the caller's own command line matches neither.
    wait_for_programs(processes, 2)
    time.sleep(0.2)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    assert_nothing_left(processes, scratch)


def test_a_launcher_that_is_killed_takes_its_program_along(mechanism: Mechanism) -> None:
    processes, errors = ours(), []

    def call() -> None:
        try:
            run_python("import time; time.sleep(1000)", timeout=999, mechanism=mechanism)
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    launcher = min(wait_for_programs(processes, 2))
    time.sleep(0.2)
    os.kill(launcher, signal.SIGKILL)
    thread.join(60)
    assert len(errors) == 1 and not thread.is_alive()
    assert_nothing_left(processes, folders())
    for folder in folders():
        # With its launcher dead, the folder has no process that would remove it.
        (folder / "main.py").unlink()
        folder.rmdir()


WITHOUT = """
import ctypes, struct, sys
from cispo.sandbox import seccomp
from cispo.sandbox.kernel import AARCH64, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, call
step = seccomp._step
code = step(0x20, 0)
for number in {numbers}:
    code += seccomp._on(number, step(0x06, 0x00050000 | 1))
code += step(0x06, 0x7FFF0000)
buffer = ctypes.create_string_buffer(code)
call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
call("prctl", PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program), 0, 0)
from cispo.sandbox.run import available_mechanisms, run_python
from cispo.errors import UserError
try:
    print(available_mechanisms(), run_python("print(6 * 7)").stdout)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("calls", "expected"), [("272 97", r"\('landlock',\) 42"), ("272 97 444", "refused: .*cannot be contained")]
)
def test_a_machine_that_denies_namespaces_or_everything(calls: str, expected: str) -> None:
    if "landlock" not in available_mechanisms():
        pytest.skip("this machine has no landlock")
    x86, arm, *rest = map(int, calls.split())
    code = WITHOUT.format(numbers=[arm if os.uname().machine == "aarch64" else x86, *rest])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.match(expected, done.stdout), done.stdout


@pytest.mark.parametrize(
    ("machine", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_system_calls(machine: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip("this machine has no kernel headers")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in found}
    if machine == 1:
        numbers["newfstatat"] = numbers["fstatat"]  # an alias in the header
    for name, pair in (ALLOWED | CONDITIONAL).items():
        assert numbers.get(name) == pair[machine], name
