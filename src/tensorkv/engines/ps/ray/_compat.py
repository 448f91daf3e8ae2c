"""Use what Ray has no public interface for. A version of Ray may change it: tests/ps/test_compat.py names each."""

from __future__ import annotations

import atexit
from typing import Any

import ray
import ray._private.worker as worker
from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)

# Ray binds its sockets to the loopback interface if the address of its node is exactly this one, and to every
# interface otherwise, whatever the address.
LOOPBACK = "127.0.0.1"


def init_on_loopback(**options: Any) -> None:
    """Call ``ray.init`` for a node whose address is 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    # Otherwise Ray replaces the address by that of the network. This is Ray's own word for "this cluster has one node",
    # which is its default on macOS and Windows.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(_node_ip_address=LOOPBACK, **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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
    from ray._private import services

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
