"""Start or join a Ray cluster, check that it is not open to the network, and start or find the server actors."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, ActorUnavailableError, RayActorError, RayError
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from tensorkv.engines.ps.server.awaited import check_num_servers, new_stamp
from tensorkv.engines.transport.rendezvous import agree_on_start, connect, launched
from tensorkv.errors import ArgumentError, RankDeadError, ServerDeadError, StorageError, TensorKVError, quote

from ..messages import Disconnect, encode, join, split
from ..options import PSOptions
from . import _compat, fork, placement, safety
from .actor import NAMESPACE, ServerActor, find_actor, spare_name, why
from .handle import ServerHandle

# Requests that a server handles at a time, each in a thread.
_THREADS = 64
_OBJECT_STORE_NBYTES = 1 << 30

# How long a create that has failed waits for what it ends.
_ENDING_S = 5.0
# A cluster may start at the same time as its first workers.
_STARTING_S = 10.0

# How many stores of this process use the Ray that it has started.
_started = 0
_lock = threading.RLock()
# RAY_AUTH_MODE before this process started a Ray.
_auth_mode: str | None = None

_logger = logging.getLogger("tensorkv")


def enter(address: str | None, timeout_s: float, *, insecure: bool = False) -> bool:
    """Join or start a Ray cluster; return whether this process has started it, and has to end it.

    Args:
        address: of a cluster (None: ``RAY_ADDRESS``, or the one that this process is in already).
        timeout_s: how long to wait for another process to start one.
        insecure: use a token even if other users of this machine can read it.

    Raises:
        ArgumentError: workers on several hosts, and no cluster, or no address of one; a token that others can read.
        RankDeadError: the process that starts one did not join in time.
        ServerDeadError: no cluster answers at the address.
    """
    with _lock:
        return _enter(_address(address), timeout_s, insecure)


def _enter(address: str | None, timeout_s: float, insecure: bool) -> bool:
    global _started
    fork.check()
    if ray.is_initialized():
        _started += _started > 0
        return _started > 0
    # A dead server is told from a slow one in milliseconds instead of seconds.
    _set({"RAY_timeout_ms_task_wait_for_death_info": "0"})
    if not insecure:
        safety.check_token()
    if address is not None:
        _join(address, min(timeout_s, _STARTING_S))
        return False
    # PSOptions is strict where it asks for the number of workers.
    rank, size = launched(strict=False)
    if size > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ArgumentError(
            "create: the workers are on several hosts, and there is no Ray cluster; start one and set RAY_ADDRESS"
        )
    # In every process: if it cannot be made, none waits for the one that starts Ray.
    safety.ensure_token()
    if size == 1:
        _start()
        return True
    return _start_together(rank, timeout_s)


def find(name: str, address: str | None) -> None:
    """Join a cluster that has a store of this name; start none.

    Args:
        name: of the store.
        address: of the cluster (None: ``RAY_ADDRESS``, else those of this machine are tried).

    Raises:
        ServerDeadError: there is no such store; the message names the stores that were found.
    """
    address = _address(address)
    stores: set[str] = set()
    if ray.is_initialized():
        stores |= _store_names()
        if name in stores:
            return
    else:
        for each in [address] if address not in (None, "auto") else _clusters_here():
            try:
                _join(str(each), 0)
            except ServerDeadError:
                if address not in (None, "auto"):
                    raise
                continue
            stores |= _store_names()
            if name in stores:
                return
            _compat.shutdown()
    known = f"there are {', '.join(map(quote, sorted(stores)))}" if stores else "none is running"
    where = "on this machine" if address in (None, "auto") else f"at {address}"
    raise ServerDeadError(f"no store {quote(name)} {where}; {known}")


def _address(given: str | None) -> str | None:
    """Return the address of the cluster to join; None: none is named, which Ray calls "local".

    Raises:
        ArgumentError: it is not an address.
    """
    address = given or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto", "local"):
        return None if address == "local" else address
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or "/" in host or not port.isdigit():
        raise ArgumentError(
            f'create: address is {address!r}; expected host:port of a Ray cluster, or "auto"; a process joins it as '
            "part of it, on one of its hosts, not through a Ray Client"
        )
    return address


def _wait_to_listen(address: str, timeout_s: float) -> None:
    """Wait until the address accepts connections; Ray itself would try for minutes, then end the process."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _clusters_here() -> list[str]:
    """Return the addresses of the clusters on this machine, those on loopback, which stores start, first."""
    return sorted(_compat.cluster_addresses(), key=lambda each: (not each.startswith(f"{_compat.LOOPBACK}:"), each))


def _store_names() -> set[str]:
    named = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
    return {name.rpartition("/")[0] for name in named if "/" in name}


def is_last(started: bool) -> bool:
    """Return whether leaving ends the cluster."""
    return started and _started == 1


def leave(started: bool) -> None:
    """Leave the cluster; end it if this process has started it and no other store of the process uses it."""
    global _started
    with _lock:
        if started:
            _started -= 1
            if _started == 0:
                _compat.shutdown()
                _set_auth_mode(_auth_mode)


def _set(variables: Mapping[str, str]) -> None:
    """Set variables that Ray reads, unless the user has set them, for this process and those that it starts."""
    for name, text in variables.items():
        os.environ.setdefault(name, text)
    _compat.read_environment()


def _set_auth_mode(mode: str | None) -> None:
    if mode is None:
        os.environ.pop("RAY_AUTH_MODE", None)
    else:
        os.environ["RAY_AUTH_MODE"] = mode
    _compat.read_environment()


def _start() -> None:
    global _started, _auth_mode
    # Servers have the priority of workers.
    _set({"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    # Other users of this machine are kept out by a token, whatever the environment says: what it says is meant for a
    # cluster that the user has started.
    _auth_mode = os.environ.get("RAY_AUTH_MODE")
    _set_auth_mode("token")
    try:
        with safety.quiet_forks():
            _compat.init_on_loopback(
                # Does not join another user's cluster on this machine, and does not look for one that has ended.
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=NAMESPACE,
                object_store_memory=_OBJECT_STORE_NBYTES,
            )
    except BaseException as error:
        # Ends what has been started of the node.
        _compat.shutdown()
        _set_auth_mode(_auth_mode)
        # Where a node is late, Ray raises Exception itself.
        if isinstance(error, Exception) and not isinstance(error, TensorKVError):
            hint = "; set TMPDIR to a shorter path" if "AF_UNIX" in str(error) else ""
            raise ServerDeadError(f"create: Ray could not be started on this machine: {why(error)}{hint}") from error
        raise
    _started = 1
    found = _open_addresses()
    if found:
        _logger.warning("tensorkv: Ray listens on %s; only its token keeps other hosts out", ", ".join(found))


def _open_addresses() -> list[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return safety.open_addresses(ray.get_runtime_context().gcs_address, nodes)


def _join(address: str, timeout_s: float) -> None:
    """Join a cluster, waiting until it accepts connections.

    Raises:
        ServerDeadError: no cluster answers in time.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    mode = os.environ.get("RAY_AUTH_MODE")
    try:
        if address != "auto":
            _wait_to_listen(address, timeout_s)
        host, _, port = address.rpartition(":")
        with safety.quiet_forks():
            if host == _compat.LOOPBACK and safety.is_local(int(port)):
                # Started by a store, which asks for this user's token. A cluster that asks for none takes it as well.
                safety.ensure_token()
                _set_auth_mode("token")
                _compat.init_on_loopback(address=address, **common)
            else:
                ray.init(address=address, **common)
    except Exception as error:  # as Ray itself raises where a node is late
        if isinstance(error, TensorKVError):
            raise
        hint = "" if os.environ.get("RAY_AUTH_MODE") == "token" else "; if it asks for a token, set RAY_AUTH_MODE=token"
        _set_auth_mode(mode)
        raise ServerDeadError(f"no Ray cluster answers at {address}: {why(error)}{hint}") from error


def _start_together(rank: int, timeout_s: float) -> bool:
    """Have rank 0 start a cluster and the others join it."""
    wait = timedelta(seconds=timeout_s)
    try:
        store, _, size = connect(wait)
        store = PrefixStore("tensorkv/ray", store)
        store = PrefixStore(agree_on_start(store, rank, size, timeout_s), store)
    except (OSError, RuntimeError) as error:
        raise RankDeadError(f"create: the rendezvous at MASTER_ADDR and MASTER_PORT failed: {error}") from error
    if rank == 0:
        try:
            _start()
        except BaseException as error:
            store.set("outcome", json.dumps({"error": str(error) or type(error).__name__}))
            raise
        store.set("outcome", json.dumps({"address": ray.get_runtime_context().gcs_address}))
        return True
    try:
        store.wait(["outcome"], wait)
        outcome = json.loads(store.get("outcome"))
    except (KeyError, OSError, ValueError, RuntimeError) as error:
        raise RankDeadError(f"create: rank 0 has not started Ray: {error}") from error
    if "error" in outcome:
        raise ServerDeadError(f"{outcome['error']} (on rank 0)")
    _join(outcome["address"], timeout_s)
    return False


# ---------------------------------------------------------------- servers


def find_servers(name: str, timeout_s: float) -> tuple[list[ServerHandle], PSOptions] | None:
    """Return the servers of a running store and its options; None if there is no such store.

    Raises:
        ServerDeadError: one of them has ended, and others are running.
    """
    deadline, missing = time.monotonic() + timeout_s, None
    while True:
        first = _get(name, 0)
        if first is None:
            return None
        try:
            options = PSOptions(**_ask(first, "options", name, max(0.001, deadline - time.monotonic())))
            actors = [first, *(_get(name, index) for index in range(1, options.num_servers))]
            if None not in actors:
                has_spares = options.path is not None and options.spare
                spares = [partial(_get_spare, name, index) if has_spares else None for index in range(len(actors))]
                return [ServerHandle(*each) for each in zip(actors, spares, strict=True)], options
            missing = actors.index(None)
        except ServerDeadError:
            # It is just ending; the next look finds none, or a new one.
            if time.monotonic() > deadline and missing is None:
                raise
        if time.monotonic() > deadline:
            raise ServerDeadError(
                f"create({name!r}): server {missing} of {options.num_servers} has ended, and what it held is lost; "
                "the others end when every process that has this store open has closed it: close it everywhere, then "
                "create it again, or choose another name"
            )
        # Another client may be starting the servers, or closing the store.
        time.sleep(0.02)


def make_servers(options: PSOptions) -> tuple[list[ServerHandle], PSOptions]:
    """Start the servers of a store; return those of another client if it was faster.

    Raises:
        ArgumentError: a node that a server is to run on is not there.
        ServerDeadError: a server does not start within the timeout, as where no node has its resources free.
        StorageError: a server's folder cannot be opened.
    """
    name, timeout_s = options.name, options.timeout_s
    _check_folders(options)
    _wait_for_the_end(name, options.num_servers, timeout_s)
    places = placement.of_servers(options)
    stamps = [new_stamp(options.num_servers) for _ in places]
    has_spares = options.path is not None and options.spare
    # Actors, and those of them that were started here and not by another client.
    actors, own = [], []
    try:
        for index, (place, stamp) in enumerate(zip(places, stamps, strict=True)):
            actor, is_new = _make(options, index, place, stamp)
            actors.append(actor)
            own += [actor] if is_new else []
        for index, (actor, place, stamp) in enumerate(zip(actors, places, stamps, strict=True)):
            _, _, _, node, *_ = _ask(actor, "place", name, timeout_s)
            if has_spares and actor in own:
                # It starts while the store is used.
                own.append(_make(options, index, placement.of_spare(place, node), stamp, is_spare=True)[0])
        found = find_servers(name, timeout_s)
        if found is None:
            raise ServerDeadError(f"create({name!r}): the servers ended at once")
        return found
    except BaseException:
        # They would keep their folders, and the name, until they end by themselves; and one that waits for resources
        # does not end.
        if not actors or not end_if_unused(actors[0]):
            raise
        for actor in reversed(own):
            ray.kill(actor)
        raise


def end_if_unused(first: Any) -> bool:
    """Return whether no client uses a store; if so, its server 0, where clients connect first, refuses new ones."""
    owner = secrets.token_hex(8)
    message = join(encode(Disconnect(), {"owner": owner, "client": f"{owner}.0", "seq": 1}))
    try:
        head = split(ray.get(first.serve.remote(message), timeout=_ENDING_S))[0]
    except RayError:
        # No client is served before server 0 runs.
        return True
    return not head.get("clients") and not head.get("dead_clients")


def _wait_for_the_end(name: str, num_servers: int, timeout_s: float) -> None:
    """Wait until the servers of an ended store of this name have ended, too.

    Raises:
        ServerDeadError: they are still running after the timeout.
    """
    deadline = time.monotonic() + timeout_s
    while _get(name, 0) is None and any(_get(name, index) is not None for index in range(1, num_servers)):
        if time.monotonic() > deadline:
            raise ServerDeadError(
                f"create({name!r}): server 0 of the store has ended, and what it held is lost; the others end when "
                "every process that has this store open has closed it: close it everywhere, then create it again, or "
                "choose another name"
            )
        time.sleep(0.05)


def places(servers: Sequence[ServerHandle], name: str, insecure: bool, timeout_s: float) -> list[list[Any]]:
    """Return the place of each server of a store; raise if other hosts can reach the cluster without a token.

    Raises:
        ArgumentError: a cluster that other hosts can connect to and that asks for no token.
    """
    found = [_retry(server.place, name, timeout_s) for server in servers]
    if insecure or all(place[2] for place in found):
        return found
    addresses = _open_addresses()
    if addresses:
        raise ArgumentError(
            f"create: the Ray cluster accepts connections from other hosts (at {', '.join(addresses[:3])}) and asks "
            "for no token: any process that reaches it can run code there; start it with RAY_AUTH_MODE=token, or pass "
            "insecure=True if nobody else can"
        )
    return found


def stop_servers(servers: Sequence[ServerHandle]) -> None:
    """End servers and their spares, so that Ray does not restart them."""
    for server in servers:
        server.stop()


def _check_folders(options: PSOptions) -> None:
    if options.path is None:
        return
    folders = [Path(options.path, f"server-{index}") for index in range(options.num_servers)]
    # On several hosts, the other ones may be elsewhere; each server checks its own where it runs.
    known = [folder for folder in folders if folder.exists()]
    for folder in known:
        check_num_servers(str(folder), options.num_servers)
    if known and len(known) < len(folders) and len(placement.live_nodes()) == 1:
        missing = next(folder for folder in folders if folder not in known)
        raise StorageError(
            f"{missing}: is not there, and {known[0]} is; bring it back, or remove the others if the store is new"
        )


def _make(
    options: PSOptions, index: int, place: placement.Place, stamp: str, *, is_spare: bool = False
) -> tuple[Any, bool]:
    """Start a server, unless there is one; return its actor, and whether it is new."""
    of_actor: dict[str, Any] = {
        "name": spare_name(options.name, index, stamp) if is_spare else f"{options.name}/{index}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": _THREADS,
        # A server without a folder would come back empty, unnoticed.
        "max_restarts": 0 if options.path is None else -1,
        "max_task_retries": 0,
        "enable_task_events": False,
        **place.options,
    }
    actor = ray.remote(ServerActor).options(**of_actor)
    while True:
        try:
            return actor.remote(json.dumps(options.of_store()), index, stamp, place.host, is_spare=is_spare), True
        except ActorAlreadyExistsError:
            # Another client was faster, and may have ended its servers since, if its create has failed.
            found = find_actor(of_actor["name"])
            if found is not None:
                return found, False
            time.sleep(0.01)


def _get(name: str, index: int) -> Any:
    return find_actor(f"{name}/{index}")


def _get_spare(name: str, index: int, stamp: str) -> Any:
    return find_actor(spare_name(name, index, stamp))


def _ask(actor: Any, method: str, name: str, timeout_s: float) -> Any:
    """Call an idempotent method of a server, and again while the server is being restarted."""
    try:
        return _retry(lambda left: ray.get(getattr(actor, method).remote(), timeout=left), name, timeout_s)
    except ServerDeadError as error:
        wanted = _compat.awaited_resources(actor)
        if wanted is None:
            raise
        asked = ", ".join(f"{word} {amount:g}" for word, amount in sorted(wanted.items()))
        raise ServerDeadError(
            f"create({name!r}): a server of this name waits for resources that no node has free ({asked}; the nodes "
            f"are {'; '.join(map(str, placement.live_nodes()))}); free them or add a node, let the process that has "
            "started the servers end and give another placement=, or choose another name"
        ) from error


def _retry(call: Callable[[float], Any], name: str, timeout_s: float) -> Any:
    """Make a call that is given the seconds left, and again while a server is being restarted."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call(max(0.001, deadline - time.monotonic()))
        except RayActorError as error:
            if isinstance(error, ActorUnavailableError) and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            text = str(error)
            kind = StorageError if "StorageError" in text else ServerDeadError
            raise kind(f"create({name!r}): a server could not start: {why(error)}") from error
        except RayError as error:
            raise ServerDeadError(f"create({name!r}): a server does not answer: {why(error)}") from error
