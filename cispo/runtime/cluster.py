"""The Ray cluster that a run's actors live in: one of this machine for a run's lifetime, or one that exists already.

    RAY_ADDRESS unset        a cluster of this machine, on 127.0.0.1, gone with the run
    RAY_ADDRESS host:port    an existing one; this process is on one of its nodes (`ray job submit` sets it so)
    RAY_ADDRESS ray://...    an existing one, through Ray Client: this process may be elsewhere

Reserved are two groups of bundles, that of the learner ranks and that of the engines, each on as few nodes as it fits
on. Every optimizer step ends in a sum over the ranks, and every engine takes every version of the weights: near is
faster, and what a cluster has beyond a run stays whole for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cispo.errors import RunError, UserError
from cispo.runtime.orphans import watch_over
from cispo.runtime.ray_address import check_ray_address
from cispo.runtime.ship_code import shipped_code

Bundle = Mapping[str, float]
"""What one seat reserves: CPU and GPU."""

_ROOM_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Room:
    """The bundles that a run has reserved.

    Example: Room(groups=(learners, engines), places=((0, 0), (0, 1), (1, 0)), nodes=("a7dd", "a7dd", "90fe"))
    """

    groups: tuple[Any, ...] = ()
    """Ray's placement groups."""
    places: tuple[tuple[int, int], ...] = ()
    """Of each bundle, in the order of reservation: its group and its place there."""
    nodes: tuple[str, ...] = ()
    """Of each bundle, the id of its node."""

    def strategy(self, bundle: int) -> Any:
        """Ray's scheduling strategy that puts an actor or a task into a bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, place = self.places[bundle]
        return PlacementGroupSchedulingStrategy(self.groups[group], placement_group_bundle_index=place)


def connect(processes: int) -> bool:
    """Joins the cluster that RAY_ADDRESS names, or starts one of this machine with a CPU for each of `processes`.

    False where this process is in a cluster already. Raises UserError where RAY_ADDRESS is wrong, nothing answers
    there, or the cluster refuses us.
    """
    # Ray must not be imported before `_start_local` has set its environment.
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        _start_local(processes)
    else:
        _join(address)
    return True


def _start_local(processes: int) -> None:
    # Read when Ray is imported. Ray knows one node on loopback, which is what it starts on Windows and macOS.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    watch_over()
    import ray

    # Without "local", Ray would join whatever cluster somebody left running on this machine.
    cpus = max(os.cpu_count() or 1, processes)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_quiet())


def _quiet() -> dict[str, Any]:
    # Ray would say at every start that its own token authentication is on.
    logging.getLogger("ray").setLevel(logging.ERROR)
    return {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


def _join(address: str) -> None:
    check_ray_address(address)
    import ray
    from ray.exceptions import RaySystemError

    arguments = {"address": address, "runtime_env": shipped_code(), **_quiet()}
    try:
        try:
            ray.init(**arguments)
        except ConnectionAbortedError:
            # The server that Ray Client starts for us on the head node sometimes dies while it forks.
            ray.init(**arguments)
    except (ConnectionError, RaySystemError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"RAY_ADDRESS {address}: the Ray cluster there does not let us join: {reason:.300}") from None


async def reserve(groups: Sequence[Sequence[Bundle]]) -> Room:
    """Reserves each group's bundles on as few nodes as it fits on; waits for room that other runs hold.

    Raises UserError where the cluster is too small for them, whoever holds it.
    """
    import ray

    wanted = [[dict(bundle) for bundle in group] for group in groups if group]
    _check_size([bundle for group in wanted for bundle in group])
    made = [ray.util.placement_group(group, strategy="PACK") for group in wanted]
    places = [(number, place) for number, group in enumerate(wanted) for place in range(len(group))]
    try:
        await asyncio.wait_for(_all_ready(made), _ROOM_SECONDS)
    except TimeoutError:
        _remove(made)
        raise RunError(
            f"the Ray cluster is large enough, but had no room for {_amount(wanted)} within {_ROOM_SECONDS:.0f} s: "
            "other runs hold it, or its nodes are too small one by one"
        ) from None
    except BaseException:
        _remove(made)
        raise
    tables = [ray.util.placement_group_table(group)["bundles_to_node_id"] for group in made]
    return Room(tuple(made), tuple(places), tuple(tables[group][place] for group, place in places))


async def _all_ready(groups: Sequence[Any]) -> None:
    for group in groups:
        await group.ready()


def _remove(groups: Sequence[Any]) -> None:
    import ray

    for group in groups:
        ray.util.remove_placement_group(group)


def release(room: Room) -> None:
    _remove(room.groups)


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
    return " and ".join(f"{total:g} {kind}s" for kind, total in totals.items() if total)


def is_home(room: Room) -> bool:
    """Whether every bundle is on this process's own node, so that files and shared memory need no network."""
    import ray

    if ray.util.client.ray.is_connected():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return set(room.nodes) <= {ray.get_runtime_context().get_node_id()}


async def check_paths(room: Room, paths: Mapping[str, str]) -> None:
    """Raises UserError where a node of the room does not see one of the paths; `paths` is by the recipe's key."""
    import ray

    look: Any = ray.remote(_missing)
    bundles = {node: number for number, node in enumerate(room.nodes)}
    answers = [
        look.options(num_cpus=0, scheduling_strategy=room.strategy(bundle)).remote(dict(paths))
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
    """The first key whose path does not exist on this node, and the node's address."""
    import ray

    missing = next((key for key, path in paths.items() if not Path(path).exists()), None)
    return missing, ray.util.get_node_ip_address()
