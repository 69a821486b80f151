"""A process of user code, and its messages to and from the driver: 8 bytes of length and a pickle, over a socket."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

HEADER = struct.Struct("<Q")
"""Length of a frame's pickle."""

_Message = TypeVar("_Message")


def frame(message: object) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def unframe(body: bytearray, kind: type[_Message]) -> _Message:
    """The message in a frame without its header."""
    message = pickle.loads(body)
    assert isinstance(message, kind)
    return message


def send(connection: socket.socket, message: object) -> None:
    connection.sendall(frame(message))


def receive(connection: socket.socket, kind: type[_Message]) -> _Message:
    """The next message; EOFError when the other end is gone."""
    return unframe(_receive_exactly(connection, HEADER.unpack(_receive_exactly(connection, HEADER.size))[0]), kind)


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise EOFError
        view = view[received:]
    return data


async def receive_async(connection: socket.socket, kind: type[_Message]) -> _Message:
    """`receive` on a socket that does not block."""
    size = HEADER.unpack(await _receive_exactly_async(connection, HEADER.size))[0]
    return unframe(await _receive_exactly_async(connection, size), kind)


async def _receive_exactly_async(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = await asyncio.get_running_loop().sock_recv_into(connection, view)
        if received == 0:
            raise EOFError
        view = view[received:]
    return data


def start_process(main: str, fds: Sequence[int], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that calls `main`, "module:name", with the file descriptors `fds`, which it inherits.

    `env` are further environment variables.
    """
    module, _, name = main.partition(":")
    arguments = ", ".join(map(str, fds))
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; {name}({arguments})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches the driver alone, and the process group can be killed as a whole.
        start_new_session=True,
        # The same order of sets of strings in every worker; one thread each, for there are many workers.
        env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", **os.environ, **(env or {})},
    )
