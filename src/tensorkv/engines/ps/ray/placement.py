"""Placement: on which node of a cluster each server runs, and how much it may hold."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tensorkv.errors import ArgumentError, show

from ..options import PSOptions

_POLL_S = 0.2
# What Ray calls some resources when an actor asks for them.
_WORDS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
# Ray puts an actor that asks for no resource at all on any node, whatever its scheduling strategy.
_ANY_NBYTES = 1
_HEAD = "node:__internal_head__"
# Every node has one unit of a resource with its address: what asks for some of it waits for a node of that address.
_PINNED = 0.001
# Servers whose memory differs by less get the same share.
_ALIKE = 1.25


class Node(NamedTuple):
    """A live node of a cluster.

    Args:
        id: of Ray.
        host: its name.
        address: its IP address.
        resources: in total, by name.
        is_head: whether it is the head.
    """

    id: str
    host: str
    address: str
    resources: Mapping[str, float]
    is_head: bool

    def is_called(self, name: str) -> bool:
        """Return whether a user may mean this node by a name."""
        return name in (self.id, self.host, self.address)

    def has(self, wanted: Mapping[str, float]) -> bool:
        """Return whether a server that wants resources could ever run here."""
        return all(self.resources.get(word, 0) >= amount for word, amount in wanted.items())

    def __str__(self) -> str:
        own = [word for word in self.resources if not word.startswith(("node:", "object_store_memory"))]
        amounts = ", ".join(f"{word} {self.resources[word]:g}" for word in sorted(own))
        return f"{self.host} ({self.address}; {amounts})"


class Place(NamedTuple):
    """Where a server is to run.

    Args:
        options: of its actor.
        host: the name of the node's host, "" if Ray chooses the node.
    """

    options: dict[str, Any]
    host: str = ""


def live_nodes() -> list[Node]:
    """Return the live nodes, the head first and the others by address: every client has the same order."""
    told: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [
        Node(each["NodeID"], each["NodeManagerHostname"], each["NodeManagerAddress"], found, _HEAD in found)
        for each in told
        if each["Alive"]
        for found in [each.get("Resources") or {}]
    ]
    return sorted(nodes, key=lambda node: (not node.is_head, node.address, node.id))


def of_servers(
    options: PSOptions,
    look: Callable[[], Sequence[Node]] = live_nodes,
    is_shared: Callable[[str, Sequence[Node], float], bool] | None = None,
) -> list[Place]:
    """Return where each server is to run.

    Args:
        options: of the store.
        look: returns the live nodes.
        is_shared: tells whether all nodes see the same folder (None: look there).

    Raises:
        ArgumentError: no such node is there in time; the message lists those that are.
    """
    placement, deadline = options.placement, time.monotonic() + options.timeout_s
    chosen: Mapping[str, Mapping[str, Any]] = {} if isinstance(placement, str) else placement
    nodes = look()
    # Where whoever runs the cluster wants no work (a head without CPUs, as on Kubernetes) is no server.
    nodes = [node for node in nodes if node.resources.get("CPU", 0) > 0] or nodes
    # A server finds its folder again where it was, unless every node has it.
    is_pinned = options.path is not None and not (is_shared or _is_shared)(options.path, nodes, options.timeout_s)
    found = []
    for index in range(options.num_servers):
        name = f"server-{index}"
        if name in chosen:
            found.append(_asked_for(name, chosen[name], deadline, look))
            continue
        node = nodes[0 if placement == "pack" else index % len(nodes)]
        found.append(_on(node, is_pinned=is_pinned))
    return found


def _is_shared(path: str, nodes: Sequence[Node], timeout_s: float) -> bool:
    """Return whether a path leads to the same folder on all nodes: what one writes there, the others see."""
    mark = os.path.join(path, f".seen-{secrets.token_hex(8)}")

    def begin(work: Callable[[str], Any], node: Node) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "memory": _ANY_NBYTES, "max_retries": 0, "enable_task_events": False}
        return ray.remote(work).options(scheduling_strategy=strategy, **options).remote(mark)

    first, *others = nodes
    if not others:
        return True
    try:
        ray.get(begin(_leave_mark, first), timeout=timeout_s)
        return all(ray.get([begin(os.path.exists, node) for node in others], timeout=timeout_s))
    except RayError:
        # The server that is to write there says why it cannot, or waits for a node that is just ending.
        return False
    finally:
        with suppress(RayError):
            ray.get(begin(_remove_mark, first), timeout=timeout_s)


def _leave_mark(mark: str) -> None:
    os.makedirs(os.path.dirname(mark), mode=0o700, exist_ok=True)
    with open(mark, "x"):
        pass


def _remove_mark(mark: str) -> None:
    with suppress(OSError):
        os.remove(mark)


def weights(options: PSOptions, on: Sequence[str], look: Callable[[], Sequence[Node]] = live_nodes) -> list[int]:
    """Return how much each server may hold, compared with the others: by the memory that it has to itself.

    Args:
        options: of the store.
        on: the id of each server's node.
        look: returns the live nodes.
    """
    chosen: Mapping[str, Mapping[str, Any]] = {} if isinstance(options.placement, str) else options.placement
    asked = [chosen.get(f"server-{index}", {}).get("resources", {}).get("memory", 0) for index in range(len(on))]
    memory = {node.id: node.resources.get("memory", 0) for node in look()} if len(on) > 1 else {}
    sharing = Counter(on)
    nbytes = [own or memory.get(node, 0) / sharing[node] for own, node in zip(asked, on, strict=True)]
    if min(nbytes) <= 0 or max(nbytes) <= _ALIKE * min(nbytes):
        return [1] * len(on)
    # As a few digits, so that clients who look at different times find the same.
    return [max(1, round(100 * each / max(nbytes))) for each in nbytes]


def _asked_for(name: str, wanted: Mapping[str, Any], deadline: float, look: Callable[[], Sequence[Node]]) -> Place:
    while True:
        nodes = look()
        for node in nodes:
            if "node" in wanted and node.is_called(wanted["node"]):
                return _on(node, is_pinned=True)
            if "resources" in wanted and node.has(wanted["resources"]):
                return _resources(wanted["resources"])
        if time.monotonic() > deadline:
            raise ArgumentError(
                f"create: placement wants {show(dict(wanted))} for {name}, and no node is or has that; the cluster has "
                + "; ".join(map(str, nodes))
            )
        time.sleep(_POLL_S)


def _on(node: Node, *, is_pinned: bool) -> Place:
    """Return a place on a node. If the node is lost, a server that is pinned waits for one with its address."""
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=True)
    own = {"resources": {f"node:{node.address}": _PINNED}} if is_pinned else {}
    return Place({"scheduling_strategy": strategy, "memory": _ANY_NBYTES, **own}, node.host)


def of_spare(place: Place, node: str) -> Place:
    """Return where the spare of a server is to run: on its node, without the resources that were chosen for it."""
    if "scheduling_strategy" in place.options:
        return place
    strategy = NodeAffinitySchedulingStrategy(node, soft=True)
    return Place({"scheduling_strategy": strategy, "memory": _ANY_NBYTES}, place.host)


def _resources(wanted: Mapping[str, float]) -> Place:
    own = {word: amount for word, amount in wanted.items() if word not in _WORDS}
    return Place({"resources": own, **{_WORDS[word]: wanted[word] for word in _WORDS if word in wanted}})
