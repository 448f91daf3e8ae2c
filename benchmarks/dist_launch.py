"""Launch: how the processes of each contender are started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_teams import Process, Team, free_port
from peers import HERE

_MEMBER = str(HERE / "dist_process.py")


def torchrun(name: str, ranks: int, member: str | None = None, **team: Any) -> Team:
    """Start ranks as torchrun does, all on this host.

    Args:
        name: of the contender.
        ranks: how many.
        member: what each of them is, if that has another name.
        **team: more of what a ``Team`` takes.
    """
    port, member = free_port(), member or name
    processes = [_torchrun_rank(member, rank, ranks, ranks, "127.0.0.1", port, "lo") for rank in range(ranks)]
    return Team(name, ranks, processes, **team)


def torchrun_on_hosts(name: str, ranks: int, hosts: Sequence[tuple[Sequence[str], str, str]]) -> Team:
    """Start ranks as torchrun does, as many on each host.

    Args:
        name: of the contender.
        ranks: on all hosts together.
        hosts: of each, what is put before a command to run it there, its address and its interface.
    """
    per_host, port = ranks // len(hosts), free_port()
    _, first_address, _ = hosts[0]
    processes = []
    for rank in range(ranks):
        prefix, _, interface = hosts[rank // per_host]
        here = _torchrun_rank(name, rank, ranks, per_host, first_address, port, interface)
        processes.append(Process([*prefix, *here.command], here.environment))
    return Team(name, ranks, processes)


def _torchrun_rank(name: str, rank: int, ranks: int, per_host: int, address: str, port: int, interface: str) -> Process:
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GROUP_RANK": str(rank // per_host),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface,
    }
    return Process([sys.executable, _MEMBER, name], environment)


def mxnet(servers: int, python: str, ranks: int, member: str = "mxnet", **team: Any) -> Team:
    """Start a scheduler, servers and workers of MXNet on this host; ``member`` and ``team`` as for ``torchrun``."""
    environment = {
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_NUM_WORKER": str(ranks),
        "DMLC_NUM_SERVER": str(servers),
        "DMLC_INTERFACE": "lo",
    }
    # At its import, MXNet sees what it is to be.
    helper = [python, "-c", "import mxnet"]
    processes = [Process(helper, {**environment, "DMLC_ROLE": "scheduler"}, helps=True)]
    processes += [Process(helper, {**environment, "DMLC_ROLE": "server"}, helps=True) for _ in range(servers)]
    for rank in range(ranks):
        own = {**environment, "DMLC_ROLE": "worker", "RANK": str(rank)}
        processes.append(Process([python, _MEMBER, member], own))
    return Team(f"mxnet{servers}", ranks, processes, **team)


def mpi(python: str, ranks: int) -> Team:
    """Start ranks with the starter of MPI that is beside a Python, on this host."""
    starter = Path(python).with_name("mpiexec")
    return Team("mpi", ranks, [Process([str(starter), "-n", str(ranks), python, _MEMBER, "mpi"], {})])
