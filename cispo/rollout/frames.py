"""Messages between the driver and a process of user code: 8 bytes of length and a pickle, over a socket."""

from __future__ import annotations

import pickle
import socket
import struct
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
