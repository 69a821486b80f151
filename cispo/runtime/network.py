"""Addresses that a run's processes listen on.

    actor of a node --listen_on(its address)--> gloo, NCCL and vLLM bind to that interface and no other
    rank 0 --open_store(host, port)--> the rendezvous of a process group, on that address and no other

The node of a cluster that CISPO starts itself has the address 127.0.0.1, so no socket of a run is reachable from
outside the machine (test_cluster.py watches a whole run for one).
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOPBACK = "127.0.0.1"


def host_and_port(address: str, default_port: int) -> tuple[str, int]:
    """Splits "host:port", "scheme://host:port" or "[::1]:port". Raises ValueError where there is no host."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    if not parts.hostname:
        raise ValueError(f"{address!r} names no host")
    return parts.hostname, parts.port or default_port


def in_url(host: str) -> str:
    """The host in the form that precedes a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface with the address; None where none has it."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def listen_on(address: str) -> None:
    """Makes gloo, NCCL and vLLM in this process listen on the interface of `address` alone.

    Variables that are set already win: a cluster may have a faster network than the one that Ray uses.
    """
    os.environ.setdefault("VLLM_HOST_IP", address)
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def free_port(host: str) -> int:
    """A port on which no process of this machine listens at the moment."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def open_store(host: str, port: int, world: int, *, timeout: timedelta) -> TCPStore:
    """The store through which `world` ranks find each other, served by this process; port 0 takes a free one.

    The listening socket is bound here, because torch's own would be on every interface of the machine.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    listener = socket.socket(_family(host))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(world)
    port = listener.getsockname()[1]
    # The store owns the socket from here on and closes it.
    return TCPStore(
        host, port, world, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
