"""Rendezvous: processes that a launcher has started find each other, and agree on a name for this start."""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tensorkv.errors import ArgumentError, RankDeadError
from tensorkv.runtime import forks

# How often a worker looks whether rank 0 has answered, or announced another start.
_POLL_S = 0.02
# What MPI's launchers set, of which torchrun's variables are no part.
_SIZES_ELSEWHERE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# The rendezvous store that torchrun's variables name; its server lives as long as rank 0's process. And how many times
# this process had forked from others then: a child is another worker, and must not speak on its parent's connection.
_connection: Any = None
_forks = 0


def launched(*, strict: bool = True) -> tuple[int, int]:
    """Return the rank and the number of workers that a launcher has given this process; 0 and 1 without a launcher.

    Args:
        strict: False returns 0 and 1 instead of raising, for a caller that was told the number of workers.

    Raises:
        ArgumentError: RANK and WORLD_SIZE are not both set, or are no such numbers; or a launcher that sets neither has
            started several processes, each of which would train alone.
    """
    try:
        return _launched()
    except ArgumentError:
        if strict:
            raise
        return 0, 1


def _launched() -> tuple[int, int]:
    rank, size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None and size is None:
        for name in _SIZES_ELSEWHERE:
            if os.environ.get(name, "1") != "1":
                raise ArgumentError(
                    f"create: {name} is {os.environ[name]}, and RANK and WORLD_SIZE are not set; start the workers "
                    "with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each"
                )
        return 0, 1
    if size == "1":
        return 0, 1
    if rank is None or size is None or not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ArgumentError(
            f"create: RANK is {rank or 'not set'} and WORLD_SIZE is {size or 'not set'}; expected a rank below the "
            "number of workers, as torchrun sets them, or neither"
        )
    return int(rank), int(size)


def connect(timeout: timedelta) -> tuple[Any, int, int]:
    """Join the rendezvous store at MASTER_ADDR and MASTER_PORT; return it, the rank and the number of workers.

    Raises:
        ArgumentError: a variable that a launcher sets is missing or invalid.
    """
    global _connection, _forks
    if _connection is None or _forks != forks.count:
        _connection, _forks = _connect(timeout), forks.count
        forks.pin_in_children(_connection[0])
    found: tuple[Any, int, int] = _connection
    return found


def _connect(timeout: timedelta) -> tuple[Any, int, int]:
    rank, size = launched()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise ArgumentError(
            f"create: RANK and WORLD_SIZE are set, MASTER_ADDR is {host or 'not set'} and MASTER_PORT is "
            f"{port or 'not set'}; start the workers with torchrun, or set the address and port of rank 0 in each"
        )
    is_loopback = host == "localhost" or host.startswith("127.")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not is_loopback:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        return store, rank, size
    descriptor = _listen(host, int(port)) if rank == 0 else None
    at = host, int(port)
    store = TCPStore(
        *at, size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
    )
    return store, rank, size


def _listen(host: str, port: int) -> int | None:
    """Return a listening socket for a rendezvous store; None if the port is taken, as by an earlier process group.

    torch would listen on every address of this host. It uses its own server at a port that is taken, and raises if
    another process listens there.
    """
    try:
        descriptor = socket.create_server((host, port)).detach()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    forks.close_in_children(descriptor)
    return descriptor


def network_id() -> str:
    """Return what processes have in common that reach each other on loopback: host name, kernel and network."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {_namespace('net')}"


def host_id() -> str:
    """Return what processes have in common that can share memory: also the PID namespace."""
    return f"{network_id()} {_namespace('pid')}"


def _namespace(kind: str) -> str:
    path = f"/proc/self/ns/{kind}"
    return os.readlink(path) if os.path.lexists(path) else ""


def agree_on_start(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """Return a name for this start, the same for all workers and for no other start.

    A rendezvous store outlives the stores that use it, failed starts, and under torchrun also the workers, which are
    restarted; so it may hold what rank 0 announced in an earlier start. A worker that finds an announcement answers
    with a new token. It accepts the announcement when rank 0 has acknowledged the token, which rank 0 does when it has
    read the tokens of all workers.

    Raises:
        RankDeadError: not all workers joined in time.
    """
    mine = uuid4().hex
    if rank == 0:
        store.set("start", mine)
        tokens: dict[int, str] = {}
        turn = 0
        while missing := set(range(1, size)) - tokens.keys():
            turn += 1
            other, token = json.loads(get(store, f"{mine}/hello/{turn}", min(missing), size, timeout_s))
            tokens[other] = token
        for token in tokens.values():
            store.set(f"{mine}/welcome/{token}", b"")
        return mine
    found, deadline = "", monotonic() + timeout_s
    try:
        while monotonic() < deadline:
            start = get(store, "start", 0, size, timeout_s).decode()
            # First: rank 0 may have acknowledged this worker, and announced the next store of these workers since.
            if found and store.check([f"{found}/welcome/{mine}"]):
                return found
            if start != found:
                found = start
                turn = store.add(f"{start}/turns", 1)
                store.set(f"{start}/hello/{turn}", json.dumps([rank, mine]))
                continue
            sleep(_POLL_S)
        missing = set(range(1, size)) - _answered(store, found)
    except dist.DistNetworkError as error:
        raise _store_ended(size) from error
    raise _not_joined(min(missing, default=0), size, timeout_s)


def _answered(store: Any, start: str) -> set[int]:
    """Return the ranks that have answered an announcement of rank 0."""
    answers = [f"{start}/hello/{turn}" for turn in range(1, 1 + store.add(f"{start}/turns", 0))]
    return {json.loads(store.get(answer))[0] for answer in answers if store.check([answer])}


def get(store: Any, key: str, rank: int, size: int, timeout_s: float) -> bytes:
    """Return what a rank has put under a key, as soon as it is there."""
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        value: bytes = store.get(key)
    except dist.DistNetworkError as error:
        raise _store_ended(size) from error
    except dist.DistError as error:
        raise _not_joined(rank, size, timeout_s) from error
    return value


def _not_joined(rank: int, size: int, timeout_s: float) -> RankDeadError:
    return RankDeadError(
        f"rank {rank} of {size} did not join within {timeout_s:g} s; check that it is running and was started with the "
        "same MASTER_ADDR and MASTER_PORT, or raise timeout_s"
    )


def _store_ended(size: int) -> RankDeadError:
    return RankDeadError(
        f"{store_keeper()} died or ended early, before all {size} workers had joined; its output may say why"
    )


def store_keeper() -> str:
    """Return whose process runs the rendezvous store, which ends with it."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
