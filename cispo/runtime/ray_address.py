"""Check of RAY_ADDRESS before Ray uses it: a Ray cluster answers there, and takes our token if it asks for one.

    check_ray_address -> connect -> one gRPC call -> UserError, or RAY_AUTH_MODE is set as the cluster wants it

Ray itself tries for minutes, and ends the process where it meets another kind of server. A process must show a token to
a cluster that asks for one, and none to a cluster that does not, which could not call the process back.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cispo.errors import UserError
from cispo.runtime.network import host_and_port, in_url

_SECONDS = 10.0
_CLIENT = "ray://"
_CLIENT_PORT, _CLUSTER_PORT = 10001, 6379
_CLIENT_METHOD, _CLUSTER_METHOD = "/ray.rpc.RayletDriver/ClusterInfo", "/ray.rpc.NodeInfoGcsService/CheckAlive"

_WANTS_TOKEN = "it wants another token"


def cluster_is_named() -> bool:
    """Whether RAY_ADDRESS names a cluster that runs already, rather than a new one of this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def check_ray_address(address: str) -> None:
    """Raises UserError within about 20 s where no Ray cluster answers, or it does not take our token.

    Sets RAY_AUTH_MODE where the cluster asks for a token. "auto" and clusters with TLS pass: only Ray can check them.
    """
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    is_client = address.startswith(_CLIENT)
    try:
        host, port = host_and_port(address, _CLIENT_PORT if is_client else _CLUSTER_PORT)
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS {address} is neither host:port nor ray://host:port: {error}") from None
    problem = _ask(host, port, is_client, token=None)
    if problem == _WANTS_TOKEN:
        token = _token()
        problem = "it wants a token: copy the cluster's to ~/.ray/auth_token, or name it in RAY_AUTH_TOKEN"
        if token is not None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            problem = _ask(host, port, is_client, token=token)
    if problem == _WANTS_TOKEN:
        problem = "it refuses our token: copy the cluster's to ~/.ray/auth_token, or name it in RAY_AUTH_TOKEN"
    if problem is not None:
        raise UserError(f"RAY_ADDRESS {address}: no Ray cluster that we can join answers there ({problem})")


def _ask(host: str, port: int, is_client: bool, *, token: str | None) -> str | None:
    """The problem with the server at host:port, None where it is a Ray cluster."""
    import grpc

    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    method = _CLIENT_METHOD if is_client else _CLUSTER_METHOD
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"{in_url(host)}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            # Any other code is a Ray cluster's: Ray Client answers an empty request with NOT_FOUND.
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return _WANTS_TOKEN
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                if is_client:
                    return "it is not Ray Client's port, and a cluster's own port is named without ray://"
                return "it is not a cluster's port, and Ray Client's is named with ray:// in front"
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return "something listens there that is not Ray"
    return None


def _token() -> str | None:
    """The token that Ray would show: from the environment, the file that it names, or ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else None
