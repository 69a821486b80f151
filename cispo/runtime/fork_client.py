"""The raylet's command of a worker: asks the fork server for it, and else executes it. Imports Python's own modules.

python -I -S fork_client.py SOCKET SETUP_SCRIPT [options of Python] WORKER_SCRIPT [arguments ...]
"""

from __future__ import annotations

import array
import json
import os
import resource
import signal
import socket
import sys
import time

_LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE")


def ask(path: str, argv: list[str]) -> bool:
    """Whether the server has forked the worker. Waits for the server's imports."""
    umask = os.umask(0)
    os.umask(umask)
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    request = {
        "argv": argv,
        "env": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "niceness": os.nice(0),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "ignored": sorted(ignored),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "asked": time.time(),
    }
    text = json.dumps(request).encode()
    streams = array.array("i", [0, 1, 2])
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            if connection.recv(1) != b"?":
                return False
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
            connection.sendmsg([len(text).to_bytes(8, "big")], rights)
            connection.sendall(text)
            return connection.recv(1) == b"+"
    except OSError:
        return False


if __name__ == "__main__":
    if not ask(sys.argv[1], sys.argv[2:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
