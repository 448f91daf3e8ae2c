"""Use what Ray has no public interface for. A version of Ray may change it: tests/ps/test_compat.py names each."""

from __future__ import annotations

import atexit
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray._private.node as ray_node
import ray._private.worker as worker
from ray._private import ray_constants, services, state
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)
from ray.core.generated import gcs_pb2

# Ray binds its sockets to the loopback interface if the address of its node is exactly this one, and to every
# interface otherwise, whatever the address.
LOOPBACK = "127.0.0.1"

# How long a node may take to start, and its processes to end. Ray's own limits, 30 seconds and one for each process,
# are too short for a busy machine.
_START_S = 120.0
_END_S = 60.0
# How often a node is started whose raylet ends.
_STARTS = 3


def init_on_loopback(**options: Any) -> None:
    """Call ``ray.init`` for a node whose address is 127.0.0.1; start the node again if its raylet ends at once.

    A raylet ends if another process of its node takes longer than 15 seconds to start, as on a busy machine; that limit
    cannot be set (https://github.com/ray-project/ray/issues/65983).
    """
    deadline = time.monotonic() + _START_S
    with _patient_nodes(deadline) as nodes:
        while True:
            try:
                ray.init(_node_ip_address=LOOPBACK, **options)
                return
            except BaseException as error:
                if nodes:
                    nodes[-1].kill_all_processes(check_alive=False, allow_graceful=False)
                if not isinstance(error, _RayletEndedError) or len(nodes) == _STARTS or time.monotonic() > deadline:
                    raise


@contextmanager
def _patient_nodes(deadline: float) -> Iterator[list[Any]]:
    """Have Ray wait until a deadline for a node that starts, unless its raylet has ended; yield the nodes."""
    nodes: list[Any] = []
    node_type: Any = ray_node.Node
    look: Any = services.get_node
    before = ray_constants.ENABLE_RAY_CLUSTER

    class Node(node_type):  # type: ignore[misc]
        def start_ray_processes(self) -> Any:
            nodes.append(self)
            return super().start_ray_processes()

    def get_node(*args: Any) -> Any:
        while True:
            _check_raylet(nodes)
            try:
                return look(*args)
            except RuntimeError:
                # It is not there yet.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    # Otherwise Ray replaces the address by that of the network. This is Ray's own word for "this cluster has one node",
    # which is its default on macOS and Windows.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray_node.Node, services.get_node = Node, get_node  # type: ignore[misc]
    try:
        yield nodes
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        ray_node.Node, services.get_node = node_type, look  # type: ignore[misc]


class _RayletEndedError(Exception):
    """A node's raylet ended before the node had started."""


def _check_raylet(nodes: list[Any]) -> None:
    for node in nodes[-1:]:
        for raylet in node.all_processes.get("raylet", []):
            status = raylet.process.poll()
            if status is not None:
                where = f"{node.get_logs_dir_path()}/raylet.err"
                raise _RayletEndedError(f"a raylet ended with status {status}; see {where}")


def shutdown() -> None:
    """Call ``ray.shutdown``, and wait until the processes that it ends have ended."""
    node: Any = worker._global_node
    processes: list[Any] = (
        [] if node is None else [each.process for of_type in node.all_processes.values() for each in of_type]
    )
    ray.shutdown()
    deadline = time.monotonic() + _END_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def read_environment() -> None:
    """Have Ray read its environment variables again, which it has read when it was imported."""
    Config.initialize("")


def read_token() -> None:
    """Have Ray look for its token again; it may have looked before, and found none."""
    AuthenticationTokenLoader.instance().reset_cache()


def authentication_mode() -> int:
    """Return how this process authenticates itself; 0: not at all."""
    return int(get_authentication_mode())


def cluster_addresses() -> list[str]:
    """Return the addresses of the clusters that run on this machine."""
    found: Any = services.find_gcs_addresses
    # Its cache may be older than a cluster.
    found.cache_clear()
    return list(found())


def awaited_resources(actor: Any) -> dict[str, float] | None:
    """Return the resources for which an actor waits, since no node has them free; None: it does not wait for any."""
    known: Any = state.state
    found = known._connect_and_get_accessor().get_actor_info(actor._actor_id)
    told: Any = gcs_pb2.ActorTableData  # type: ignore[attr-defined]
    data = told.FromString(found) if found is not None else None
    if data is None or data.state != told.PENDING_CREATION:
        return None
    wanted: dict[str, float] = dict(data.required_resources)
    free: list[dict[str, float]] = list(known.available_resources_per_node().values())
    # Where a node has them, the actor's process is starting.
    is_starting = any(all(node.get(word, 0) >= amount for word, amount in wanted.items()) for node in free)
    return None if is_starting else wanted


def leave_to_parent() -> None:
    """Have the end of this forked child end nothing of its parent's cluster."""
    atexit.unregister(worker.shutdown)
    node = worker._global_node
    if node is not None:
        node.all_processes.clear()
