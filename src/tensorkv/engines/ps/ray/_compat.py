"""Use what Ray has no public interface for. A version of Ray may change it: tests/ps/test_compat.py names each."""

from __future__ import annotations

import atexit
import subprocess
import time
from contextlib import suppress
from typing import Any

import ray
import ray._private.worker as worker
from ray._private import ray_constants, services
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)

# Ray binds its sockets to the loopback interface if the address of its node is exactly this one, and to every
# interface otherwise, whatever the address.
LOOPBACK = "127.0.0.1"

# How long a node may take to start, and its processes to end. Ray's own limits, 30 seconds and one for each process,
# are too short for a busy machine.
_START_S = 120.0
_END_S = 60.0


def init_on_loopback(**options: Any) -> None:
    """Call ``ray.init`` for a node whose address is 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    look: Any = services.get_node
    deadline = time.monotonic() + _START_S

    def get_node(*args: Any) -> Any:
        while True:
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
    services.get_node = get_node
    try:
        ray.init(_node_ip_address=LOOPBACK, **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        services.get_node = look


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


def leave_to_parent() -> None:
    """Have the end of this forked child end nothing of its parent's cluster."""
    atexit.unregister(worker.shutdown)
    node = worker._global_node
    if node is not None:
        node.all_processes.clear()
