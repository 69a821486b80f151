"""The Ray cluster of a run's actors: one of this machine for the run's lifetime, or an existing one.

    RAY_ADDRESS unset        a cluster of this machine, on 127.0.0.1, gone with the run
    RAY_ADDRESS host:port    an existing one; this process is on one of its nodes (`ray job submit` sets it so)
    RAY_ADDRESS ray://...    an existing one, through Ray Client: this process may be elsewhere

    connect -> reserve bundles -> Reservation: the node of each bundle -> check_paths there -> actors (`actors`)

A run reserves two groups of bundles, one for the learner ranks and one for the engines, each on as few nodes as
possible: every optimizer step ends in a sum over the ranks, every engine takes every version of the weights, and nodes
that a run leaves free stay whole for the next run. All bundles are reserved before an actor starts, on one machine too.
A recipe that is too large is then refused before vLLM is imported, the nodes are known when the transport of the
weights is chosen, and a restarted engine comes back to its bundle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cispo.errors import RunError, UserError
from cispo.runtime.fork_server import Imports
from cispo.runtime.interrupts import kept_handlers
from cispo.runtime.local_cluster import LocalCluster, root_folder
from cispo.runtime.ray_address import check_ray_address, cluster_is_named
from cispo.runtime.ship_code import shipped_code

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

Bundle = Mapping[str, float]
"""CPUs and GPUs that are reserved together on one node: {"CPU": 1, "GPU": 0.5}."""

_RESERVE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """The bundles that a run has reserved.

    Example: Reservation((learners, engines), positions=((0, 0), (0, 1), (1, 0)), nodes=("a7dd", "a7dd", "90fe"))
    """

    groups: tuple[PlacementGroup, ...] = ()
    positions: tuple[tuple[int, int], ...] = ()
    """(group, index within the group) of each bundle."""
    nodes: tuple[str, ...] = ()
    """Node id of each bundle."""

    def strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        """Ray's scheduling strategy that puts an actor or a task into a bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, index = self.positions[bundle]
        return PlacementGroupSchedulingStrategy(self.groups[group], placement_group_bundle_index=index)


_local: LocalCluster | None = None
"""The cluster that this process has started."""


def connect(processes: int, imports: Imports | None = None) -> Callable[[], None] | None:
    """Joins the cluster that RAY_ADDRESS names, or starts one of this machine with a CPU for each of `processes`.

    The processes of a new cluster share `imports`, if it is given any.

    Returns the function that leaves or ends it; None where this process is in a cluster already. Raises UserError where
    RAY_ADDRESS is malformed, or no cluster there lets this process join.
    """
    # Ray must not be imported before its environment is set here and in `_start_local`.
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return None
    # Ray's handler of SIGTERM in C++ prints a stack and aborts.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return _start_local(processes, imports)
    return _join(address)


def check_settings() -> None:
    """Raises UserError where `connect` would refuse the temporary folder for a new cluster. Starts nothing."""
    if not cluster_is_named():
        root_folder()


def check() -> None:
    """Raises RunError where the cluster that this process has started is broken."""
    if _local is not None:
        _local.check()


def is_alive() -> bool:
    """False where calls to the cluster would block, because it is broken."""
    return _local is None or _local.is_alive


def _start_local(processes: int, imports: Imports | None) -> Callable[[], None]:
    # Ray has no option for loopback on Linux, but with this variable, which it reads when it is imported, it knows its
    # node as 127.0.0.1, as it does on Windows and macOS.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Workers register when their libraries are imported, once in a while from a cold disk.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    global _local
    # Without address="local" Ray would join any other cluster that runs on this machine.
    with _our_signals():
        _local = LocalCluster(_quiet_init(), max(os.cpu_count() or 1, processes), imports)
    return _stop_local


def _stop_local() -> None:
    global _local
    assert _local is not None
    _local.stop()
    _local = None


def _join(address: str) -> Callable[[], None]:
    check_ray_address(address)
    import ray
    from ray.exceptions import RaySystemError

    join = partial(_quiet_init(), address=address, runtime_env=shipped_code())
    try:
        with _our_signals():
            try:
                join()
            except ConnectionAbortedError:
                # The server that Ray Client starts for each client on the head node sometimes dies while it forks.
                join()
    except (ConnectionError, RaySystemError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"RAY_ADDRESS {address}: the Ray cluster there does not let us join: {reason:.300}") from None
    return ray.shutdown


def _quiet_init() -> Callable[..., object]:
    """ray.init with its messages off, and off too the one at every start that its token authentication is on."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    return partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)


@contextlib.contextmanager
def _our_signals() -> Iterator[None]:
    """A block with ray.init: SIGTERM stays ours, during the seconds that it takes as well."""
    from ray._private import utils

    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        with kept_handlers():
            yield
    finally:
        utils.set_sigterm_handler = original


def total(kind: Literal["CPU", "GPU"]) -> int:
    """CPUs or GPUs of the whole cluster."""
    import ray

    return int(ray.cluster_resources().get(kind, 0))


async def reserve(groups: Sequence[Sequence[Bundle]]) -> Reservation:
    """Reserves each group's bundles on as few nodes as possible; waits a while for those that other runs hold.

    Raises UserError where the whole cluster is too small, and RunError where the wait was in vain.
    """
    import ray

    wanted = [[dict(bundle) for bundle in group] for group in groups if group]
    _check_size([bundle for group in wanted for bundle in group])
    made = [ray.util.placement_group(group, strategy="PACK") for group in wanted]
    positions = [(number, index) for number, group in enumerate(wanted) for index in range(len(group))]
    try:
        await asyncio.wait_for(_all_ready(made), _RESERVE_SECONDS)
    except TimeoutError:
        _remove(made)
        raise RunError(
            f"the Ray cluster is large enough, but had no room for {_amount(wanted)} within {_RESERVE_SECONDS:.0f} s: "
            "other runs hold it, or its nodes are too small one by one"
        ) from None
    except BaseException:
        _remove(made)
        raise
    tables = [ray.util.placement_group_table(group)["bundles_to_node_id"] for group in made]
    return Reservation(tuple(made), tuple(positions), tuple(tables[group][index] for group, index in positions))


async def _all_ready(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        await group.ready()


def _remove(groups: Sequence[PlacementGroup]) -> None:
    import ray

    for group in groups:
        ray.util.remove_placement_group(group)


def release(reservation: Reservation) -> None:
    _remove(reservation.groups)


def _check_size(bundles: Sequence[Bundle]) -> None:
    """UserError where the cluster has fewer CPUs or GPUs than the bundles, or no node that holds the largest one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind in ("CPU", "GPU"):
        has, needs = (sum(part.get(kind, 0) for part in parts) for parts in (nodes, bundles))
        if needs > has:
            raise UserError(
                f"the Ray cluster has {has:g} {kind}s on {len(nodes)} nodes, and the recipe's learners and engines "
                f"need {needs:g}"
            )
    for bundle in bundles:
        if not any(all(node.get(kind, 0) >= amount for kind, amount in bundle.items()) for node in nodes):
            raise UserError(f"no node of the Ray cluster has {_amount([[bundle]])}, which one part of the recipe needs")


def _amount(groups: Sequence[Sequence[Bundle]]) -> str:
    totals = {kind: sum(bundle.get(kind, 0) for group in groups for bundle in group) for kind in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {kind}s" for kind, amount in totals.items() if amount)


def is_home(reservation: Reservation) -> bool:
    """Whether every bundle is on this process's own node, so that files and shared memory need no network."""
    import ray

    if ray.util.client.ray.is_connected():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return set(reservation.nodes) <= {ray.get_runtime_context().get_node_id()}


async def check_paths(reservation: Reservation, paths: Mapping[str, str]) -> None:
    """`paths` is recipe key -> path. Raises UserError where a node of the reservation does not see one of them."""
    import ray

    look = ray.remote(_missing)
    bundles = {node: number for number, node in enumerate(reservation.nodes)}
    answers = [
        look.options(num_cpus=0, scheduling_strategy=reservation.strategy(bundle)).remote(dict(paths))
        for bundle in bundles.values()
    ]
    for answer in answers:
        missing, address = await answer
        if missing:
            raise UserError(
                f"{missing}: {paths[missing]} is not seen from node {address} of the Ray cluster: it must be on a file "
                "system that all nodes and this process share (docs/cluster.md)"
            )


def _missing(paths: Mapping[str, str]) -> tuple[str | None, str]:
    """The first key with a path that does not exist on this node, and the node's address."""
    import ray

    missing = next((key for key, path in paths.items() if not Path(path).exists()), None)
    return missing, ray.util.get_node_ip_address()
