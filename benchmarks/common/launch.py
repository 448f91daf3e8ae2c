"""Launch: how the processes of each contender are started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.team import Process, Team, free_port


def alone(name: str, member: str, python: str = sys.executable, **team: Any) -> Team:
    """Start one process that is not part of a group.

    Args:
        name: of the contender.
        member: module and class of the contender.
        python: the interpreter that has its library.
        **team: more of what a ``Team`` takes.
    """
    return Team(name, 1, [Process(_command(python, member), {})], **team)


Places = Sequence[tuple[Sequence[str], str, str]]
"""Of each host, what stands before a command to run it there, its address, and its interface."""
_HERE: Places = (((), "127.0.0.1", "lo"),)


def torchrun(
    name: str,
    ranks: int,
    member: str,
    hosts: Places = _HERE,
    environment: Mapping[str, str] | None = None,
    **team: Any,
) -> Team:
    """Start ranks as torchrun does, as many on each host.

    Args:
        name: of the contender.
        ranks: on all hosts together.
        member: module and class of the contender.
        hosts: on which.
        environment: more variables.
        **team: more of what a ``Team`` takes.
    """
    per_host, port = ranks // len(hosts), free_port()
    processes = []
    for rank in range(ranks):
        prefix, _, interface = hosts[rank // per_host]
        own = _threads(ranks) | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank % per_host),
            "LOCAL_WORLD_SIZE": str(per_host),
            "GROUP_RANK": str(rank // per_host),
            "MASTER_ADDR": hosts[0][1],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": interface,
        }
        processes.append(Process([*prefix, *_command(sys.executable, member)], own | dict(environment or {})))
    return Team(name, ranks, processes, **team)


def mxnet(
    name: str, servers: int, python: str, ranks: int, member: str, hosts: Places = _HERE, **team: Any
) -> Team:  # fmt: skip
    """Start a scheduler, servers and workers of MXNet, as many of each on each host; arguments as for ``torchrun``."""
    common = _threads(ranks) | {
        "DMLC_PS_ROOT_URI": hosts[0][1],
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_NUM_WORKER": str(ranks),
        "DMLC_NUM_SERVER": str(servers),
    }

    def start(role: str, number: int, count: int, command: Sequence[str]) -> Process:
        prefix, address, interface = hosts[number * len(hosts) // count]
        own = {"DMLC_ROLE": role, "DMLC_INTERFACE": interface, "DMLC_NODE_HOST": address, "RANK": str(number)}
        return Process([*prefix, *command], common | own, helps=role != "worker")

    # At its import, MXNet sees what it is to be.
    helper = [python, "-c", "import mxnet"]
    processes = [start("scheduler", 0, 1, helper)]
    processes += [start("server", number, servers, helper) for number in range(servers)]
    processes += [start("worker", rank, ranks, _command(python, member)) for rank in range(ranks)]
    return Team(name, ranks, processes, **team)


def redis(name: str, server: str, folder: str, python: str, member: str, ranks: int = 1, **team: Any) -> Team:
    """Start a Redis server that writes nothing to disk, and its clients.

    Args:
        name: of the contender.
        server: the program of the server.
        folder: where its socket is.
        python: the interpreter that has its library.
        member: module and class of the contender.
        ranks: how many clients.
        **team: more of what a ``Team`` takes.
    """
    socket = {"REDIS_SOCKET": f"{folder}/redis"}
    words = ["--unixsocket", socket["REDIS_SOCKET"], "--port", "0", "--save", "", "--appendonly", "no"]
    own = [_threads(ranks) | socket | {"RANK": str(rank)} for rank in range(ranks)]
    clients = [Process(_command(python, member), each) for each in own]
    return Team(name, ranks, [Process([server, *words], {}, helps=True), *clients], **team)


def mpi(name: str, python: str, ranks: int, member: str, **team: Any) -> Team:
    """Start ranks with the ``mpiexec`` that is beside a Python, on this host; arguments as for ``torchrun``."""
    starter = str(Path(python).with_name("mpiexec"))
    return Team(name, ranks, [Process([starter, "-n", str(ranks), *_command(python, member)], _threads(ranks))], **team)


def _command(python: str, member: str) -> list[str]:
    return [python, "-m", "benchmarks.common.process", member]


def _threads(ranks: int) -> dict[str, str]:
    # As torchrun sets it, where ranks share the cores; all contenders heed it, tensorkv's clients too. MXNet is not
    # slower by it.
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if ranks > 1 else {}
