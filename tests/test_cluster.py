"""Runs on a Ray cluster of two nodes on this machine, and the sockets of a run that starts Ray itself."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cispo.errors import RunError, UserError
from cispo.runtime import ray_address, ship_code
from cispo.runtime.actors import RayRuntime, Resources
from cispo.runtime.network import free_port, host_and_port, open_store
from cispo.runtime.watchdog import Activity
from tests.test_end_to_end import QUICKSTART, ROOT, VARIED, metrics

RECIPE = [str(QUICKSTART), "sft.steps=4", "train.steps=2", "eval.limit=8", "learner.lr=1e-3", VARIED]
RECIPE += ["rollout.engine=vllm", "rollout.prompts_per_step=2", "rollout.group_size=4", "learner.ranks=2"]


@dataclass(frozen=True)
class TwoNodes:
    address: str
    client_address: str
    nodes: tuple[str, ...]
    """Node ids: one with a CPU, one with two."""


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        port = free_port("127.0.0.1")
        head: dict[str, object] = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2)
        nodes = tuple(node.node_id for node in cluster.list_all_nodes())
        yield TwoNodes(str(cluster.address), f"ray://127.0.0.1:{port}", nodes)
        # A test that failed may have left this process connected.
        ray.shutdown()
        cluster.shutdown()


def train(folder: Path, *overrides: str, address: str | None = None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment |= {"RAY_ADDRESS": address} if address else {}
    command = [sys.executable, "-m", "cispo.cli", "train", *RECIPE, f"output_dir={folder}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(run: subprocess.Popen[str]) -> None:
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output


def listening(run: subprocess.Popen[str]) -> dict[tuple[str, int], set[str]]:
    """(address, port) of every socket that the run listens on until its end -> names of the processes."""
    found: dict[tuple[str, int], set[str]] = {}
    root = psutil.Process(run.pid)
    while run.poll() is None:
        for process in [root, *root.children(recursive=True)]:
            try:
                for connection in process.net_connections("inet"):
                    bound = connection.type == socket.SOCK_DGRAM and not connection.raddr
                    if connection.status == psutil.CONN_LISTEN or bound:
                        found.setdefault((connection.laddr.ip, connection.laddr.port), set()).add(process.name())
            except psutil.Error:
                continue  # it has ended meanwhile
        time.sleep(0.25)
    return found


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], set[str]]]:
    """A run by broadcast in a cluster of its own, and the sockets that it listened on."""
    folder = tmp_path_factory.mktemp("one")
    run = train(folder, "rollout.weight_sync=broadcast")
    sockets = listening(run)
    finish(run)
    return folder / "quickstart", sockets


def test_a_run_listens_on_loopback_alone(one_node: tuple[Path, dict[tuple[str, int], set[str]]]) -> None:
    _, sockets = one_node
    owners = {name.partition(".")[0] for names in sockets.values() for name in names}
    # Ray's own sockets, the ranks' group, and the group that takes the weights to the engine.
    assert {"gcs_server", "raylet", "ray::learner-0", "ray::learner-1", "ray::engine-0"} <= owners
    outside = {place: names for place, names in sockets.items() if not is_loopback(place[0])}
    assert not outside


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def comparable(run: Path) -> list[dict[str, float]]:
    """Metrics of a run without times and speeds."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith(("per_s", "seconds"))}
        for row in metrics(run)
    ]


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step_000002" / "model.safetensors").read_bytes()


def test_two_nodes_and_one_and_either_way_of_the_weights_give_the_same_run(
    two_nodes: TwoNodes, one_node: tuple[Path, dict[tuple[str, int], set[str]]], tmp_path: Path
) -> None:
    """Bit for bit: broadcast on one node, a shared file there, and a broadcast from one node to the other."""
    finish(train(tmp_path / "two", address=two_nodes.address))
    finish(train(tmp_path / "file", "rollout.weight_sync=shared_memory"))
    first, _ = one_node
    for other in (tmp_path / "two" / "quickstart", tmp_path / "file" / "quickstart"):
        assert comparable(other) == comparable(first) and weights(other) == weights(first)
    assert sum(row.get("learner/updates", 0) for row in metrics(first)) == 2, "a run that learns nothing proves nothing"
    assert weights(first) != (first / "checkpoints" / "initial" / "model.safetensors").read_bytes()
    places = actor_nodes(two_nodes)
    assert places["learner-0"] == places["learner-1"] != places["engine-0"]
    assert not list((tmp_path / "two").glob(".weights-*")), "the folder that the nodes shared is removed"


def actor_nodes(two_nodes: TwoNodes) -> dict[str, str]:
    """Class -> node of each actor that the cluster has seen."""
    import ray
    from ray._private import state

    ray.init(address=two_nodes.address, log_to_driver=False, configure_logging=False)
    try:
        return {actor["ActorClassName"]: actor["Address"]["NodeID"] for actor in state.actors().values()}
    finally:
        ray.shutdown()


# A driver of the cluster that tries the verbs of RayRuntime, without the time that vLLM takes to start.
DRIVER = """
import asyncio, os, sys
from cispo.runtime.actors import RayRuntime, Resources
from cispo.errors import RunError, UserError
from cispo.runtime.watchdog import Activity
from my_parts import Part

async def main():
    runtime = RayRuntime(processes=3, activity=Activity())
    try:
        await runtime.reserve([[{"CPU": 1}, {"CPU": 1}], [{"CPU": 1}]])
        print("home", runtime.is_home())
        resources = [Resources(bundle=0), Resources(bundle=1)]
        ranks = await runtime.start_ranks(Part, name="learner", resources=resources)
        engine = await runtime.start(Part, name="engine-0", resources=Resources(bundle=2))
        print("nodes", *[await part.call("node") for part in (*ranks, engine)])
        print("met", *await asyncio.gather(*(rank.call("meet") for rank in ranks)))
        for method, error in (("refuse", UserError), ("fail", RunError)):
            try:
                await engine.call(method)
            except error as caught:
                print(method, caught)
        try:
            await runtime.check_paths({"policy": "/no/such/folder"})
        except UserError as caught:
            print("paths", caught)
        try:
            await engine.call("die")
        except RunError as caught:
            print("die", caught)
    finally:
        runtime.close()

asyncio.run(main())
"""

PARTS = """
import os
import torch
from cispo.errors import RunError, UserError
from my_words import WORD

class Part:
    def __init__(self, rank=0, world=1, address=""):
        self.place = rank, world, address

    def node(self):
        import ray
        return ray.get_runtime_context().get_node_id()

    def meet(self):
        from cispo.learner.parallel import join
        rank, world, address = self.place
        ranks = join(rank=rank, world=world, device=torch.device("cpu"), address=address)
        value = torch.tensor([rank + 1.0])
        ranks.sum([value])
        return value.item()

    def refuse(self):
        raise UserError(WORD)

    def fail(self):
        raise RunError(WORD)

    def die(self):
        os._exit(1)
"""


@pytest.mark.parametrize("way", ["address", pytest.param("client_address", marks=pytest.mark.slow)])
def test_parts_on_two_nodes_with_a_users_modules(way: str, two_nodes: TwoNodes, tmp_path: Path) -> None:
    """Directly and through Ray Client. The modules beside the script, and their imports, reach the nodes."""
    for name, text in (("driver", DRIVER), ("my_parts", PARTS), ("my_words", "WORD = 'no such word'\n")):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment |= {"RAY_ADDRESS": getattr(two_nodes, way), "PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Ray may report the killed process between them.
    said = {word: rest for word, _, rest in (line.partition(" ") for line in done.stdout.splitlines())}
    assert said["home"] == "False" and said["met"] == "3.0 3.0"
    first, second, engine = said["nodes"].split()
    assert first == second != engine and {first, engine} == set(two_nodes.nodes)
    assert said["refuse"] == said["fail"] == "no such word"
    assert said["paths"].startswith("policy: /no/such/folder is not seen from node")
    assert "engine-0 ended unexpectedly" in done.stdout


def test_what_a_cluster_has_no_room_for_is_refused(two_nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    async def refusals() -> None:
        with contextlib.ExitStack() as stack:
            runtime, other = (RayRuntime(processes=1, activity=Activity()) for _ in range(2))
            for each in (runtime, other):
                stack.callback(each.close)
            with pytest.raises(UserError, match="has 3 CPUs on 2 nodes, and .* need 4"):
                await runtime.reserve([[{"CPU": 1}] * 2, [{"CPU": 1}] * 2])
            with pytest.raises(UserError, match="has 0 GPUs on 2 nodes, and .* need 1"):
                await runtime.reserve([[{"CPU": 1, "GPU": 1}]])
            with pytest.raises(UserError, match="no node of the Ray cluster has 3 CPUs"):
                await runtime.reserve([[{"CPU": 3}]])
            await other.reserve([[{"CPU": 2}]])
            with monkeypatch.context() as patch:
                patch.setattr("cispo.runtime.cluster._RESERVE_SECONDS", 1.0)
                with pytest.raises(RunError, match="no room for 2 CPUs within 1 s: other runs hold it"):
                    await runtime.reserve([[{"CPU": 2}]])
            other.close()
            await runtime.reserve([[{"CPU": 2}]])  # the refused request is not still in the queue
            part = await runtime.start(dict, name="part", resources=Resources(bundle=0))
            assert await part.call("get", "x", 5) == 5

    asyncio.run(refusals())


def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> http.server.HTTPServer:
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_an_address_without_a_ray_cluster_is_refused_at_once(
    two_nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server = serving(http.server.SimpleHTTPRequestHandler)
    client_port = host_and_port(two_nodes.client_address, 0)[1]
    wrong = {
        f"127.0.0.1:{free_port('127.0.0.1')}": "Connection refused",
        f"ray://127.0.0.1:{free_port('127.0.0.1')}": "Connection refused",
        f"127.0.0.1:{server.server_port}": "not Ray",
        f"ray://127.0.0.1:{server.server_port}": "not Ray",
        f"ray://{two_nodes.address}": "not Ray Client's port",
        f"127.0.0.1:{client_port}": "not a cluster's port",
        "no.such.host.invalid:1": "no.such.host.invalid:1",
        "ray://": "neither host:port nor ray://host:port",
        "host:port": "neither host:port nor ray://host:port",
    }
    started = time.monotonic()
    for address, reason in wrong.items():
        with pytest.raises(UserError, match="^RAY_ADDRESS .*") as caught:
            ray_address.check_ray_address(address)
        assert reason in str(caught.value)
    for address in (two_nodes.address, two_nodes.client_address, "auto"):
        ray_address.check_ray_address(address)
    server.shutdown()
    assert time.monotonic() - started < 60


def test_a_cluster_that_wants_a_token_gets_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a gRPC server that checks tokens as Ray does. RAY_AUTH_MODE makes this process show its token."""
    import grpc

    def check(request: bytes, context: Any) -> bytes:
        shown = dict(context.invocation_metadata()).get("authorization")
        if shown != "Bearer right":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    methods = {"CheckAlive": grpc.unary_unary_rpc_method_handler(check)}
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods)])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        with pytest.raises(UserError, match="it wants a token: copy the cluster's to ~/.ray/auth_token"):
            ray_address.check_ray_address(address)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("wrong\n")
        with pytest.raises(UserError, match="it refuses our token"):
            ray_address.check_ray_address(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        ray_address.check_ray_address(address)
        assert os.environ["RAY_AUTH_MODE"] == "token"
    finally:
        server.stop(None)


def test_loaded_modules_that_are_not_installed_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipped_package"
    (package / "inner").mkdir(parents=True)
    for file in (package / "__init__.py", package / "inner" / "__init__.py", package / "inner" / "deep.py"):
        file.write_text("")
    (tmp_path / "shipped_file.py").write_text("")
    (tmp_path / "not_loaded.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("shipped_package.inner.deep", "shipped_file"):
        __import__(name)
    try:
        found = ship_code.loaded_sources()
        assert {package, tmp_path / "shipped_file.py", ROOT / "cispo"} <= set(found)
        assert tmp_path / "not_loaded.py" not in found
        assert not {path.name for path in found} & {"torch", "json", "psutil", "pytest"}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
        assert str(package) in ship_code.shipped_code()["py_modules"]
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"py_modules": ["gcs://x.zip"]}}))
        assert ship_code.shipped_code() == {}
        ship_code.check_output_dir("runs")
        (tmp_path / "_ray_pkg_0123").mkdir()
        monkeypatch.chdir(tmp_path / "_ray_pkg_0123")
        ship_code.check_output_dir(str(tmp_path / "runs"))
        with pytest.raises(UserError, match="output_dir 'runs' lies in the folder that Ray unpacked"):
            ship_code.check_output_dir("runs")
    finally:
        for name in ("shipped_package.inner.deep", "shipped_package.inner", "shipped_package", "shipped_file"):
            del sys.modules[name]


def test_a_store_is_heard_on_its_address_alone() -> None:
    from datetime import timedelta

    store = open_store("127.0.0.1", 0, 1, timeout=timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"
    listeners = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr.port == store.port}
    assert listeners == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("ray://head", ("head", 7)),
        ("tcp://[::1]:80", ("::1", 80)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert host_and_port(address, 7) == expected
