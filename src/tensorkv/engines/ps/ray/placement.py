"""Placement: on which node of a cluster each server runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tensorkv.errors import ArgumentError, show

_POLL_S = 0.2
# What Ray calls some resources when an actor asks for them.
_WORDS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
# Ray puts an actor that asks for no resource at all on any node, whatever its scheduling strategy.
_ANY_NBYTES = 1
_HEAD = "node:__internal_head__"


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
    placement: str | Mapping[str, Mapping[str, Any]],
    num_servers: int,
    timeout_s: float,
    look: Callable[[], Sequence[Node]] = live_nodes,
) -> list[Place]:
    """Return where each server is to run.

    Args:
        placement: ``"spread"``, ``"pack"``, or what servers ask for by name; the others are spread.
        num_servers: how many there are.
        timeout_s: how long to wait for nodes that a server asks for.
        look: returns the live nodes.

    Raises:
        ArgumentError: no such node is there in time; the message lists those that are.
    """
    deadline = time.monotonic() + timeout_s
    chosen: Mapping[str, Mapping[str, Any]] = {} if isinstance(placement, str) else placement
    nodes = look()
    # Where whoever runs the cluster wants no work (a head without CPUs, as on Kubernetes) is no server.
    nodes = [node for node in nodes if node.resources.get("CPU", 0) > 0] or nodes
    found = []
    for index in range(num_servers):
        name = f"server-{index}"
        if name in chosen:
            found.append(_asked_for(name, chosen[name], deadline, look))
            continue
        node = nodes[0 if placement == "pack" else index % len(nodes)]
        found.append(_on(node, may_move=True))
    return found


def _asked_for(name: str, wanted: Mapping[str, Any], deadline: float, look: Callable[[], Sequence[Node]]) -> Place:
    while True:
        nodes = look()
        for node in nodes:
            if "node" in wanted and node.is_called(wanted["node"]):
                return _on(node, may_move=False)
            if "resources" in wanted and node.has(wanted["resources"]):
                return _resources(wanted["resources"])
        if time.monotonic() > deadline:
            raise ArgumentError(
                f"create: placement wants {show(dict(wanted))} for {name}, and no node is or has that; the cluster has "
                + "; ".join(map(str, nodes))
            )
        time.sleep(_POLL_S)


def _on(node: Node, *, may_move: bool) -> Place:
    """Return a place on a node; a server that may move is restarted elsewhere if the node is lost."""
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=may_move)
    return Place({"scheduling_strategy": strategy, "memory": _ANY_NBYTES}, node.host)


def _resources(wanted: Mapping[str, float]) -> Place:
    own = {word: amount for word, amount in wanted.items() if word not in _WORDS}
    return Place({"resources": own, **{_WORDS[word]: wanted[word] for word in _WORDS if word in wanted}})
