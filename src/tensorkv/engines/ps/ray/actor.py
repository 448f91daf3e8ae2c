"""A server as a Ray actor, and its connections and shared memory with clients of its host."""

from __future__ import annotations

import gc
import ipaddress
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError

from tensorkv.engines.ps.server.awaited import AwaitedServer, SpareServer, check_num_servers, why_not_the_folder
from tensorkv.engines.ps.server.membership import IDLE_TIMEOUT_S
from tensorkv.engines.ps.server.server import Server
from tensorkv.engines.transport.channel import Handler, Listener, OpenBuffers, SocketServer
from tensorkv.engines.transport.network import NetworkServer
from tensorkv.engines.transport.rendezvous import host_id
from tensorkv.engines.transport.segment import can_share
from tensorkv.errors import StorageError, StoreClosedError, TensorKVError
from tensorkv.storage.lock import is_locked

from ..messages import Reply, join, split
from ..options import PSOptions
from . import _compat
from .metrics import ServerMetrics

NAMESPACE = "tensorkv"
# Up to here a payload travels inside of its message, and Ray puts it into no object store.
INLINE_NBYTES = 64 << 10

# New objects between two collections, instead of 700.
_GC_THRESHOLD = 50_000
_WATCH_S = 1.0
_ENDING_S = 10.0
# How often a spare looks whether the server is still there.
_LOOK_S = 10.0

_logger = logging.getLogger(__name__)
L = TypeVar("L", bound=Listener)


class ServerActor:
    """One parameter server.

    Args:
        options: of the store, as JSON, so that a restart needs nothing from Ray's object store.
        index: of the server.
        stamp: of its folder, as for ``FolderLock``: a restarted server opens no other one.
        home: the host on which it is to be started, "" if Ray chooses.
        is_spare: whether another actor of the same folder serves as long as it lives.
    """

    def __init__(self, options: str, index: int, stamp: str = "", home: str = "", *, is_spare: bool = False) -> None:
        context = ray.get_runtime_context()
        self._options, self._index, self._stamp, self._home = PSOptions(**json.loads(options)), index, stamp, home
        self._is_spare, self._opening = is_spare, threading.Lock()
        self._server = self._open(comes_back=is_spare or context.was_current_actor_reconstructed)
        self._listener = _listen(self.serve_connection, lambda owner: self._server.mark_dead(owner))
        self._network = _listen_to_hosts(self.serve_connection)
        name = (context.get_actor_name() or "").rpartition("/")[0]
        has_twin = self._options.path is not None and self._options.spare
        self._twin = (f"{name}/{index}" if is_spare else spare_name(name, index, stamp)) if has_twin else ""
        self._metrics = ServerMetrics(name, index)
        # Keeps what the libraries have made out of every later garbage collection.
        gc.collect()
        gc.freeze()
        # Metadata of thousands of keys are many objects and no garbage: by default they would be looked through so
        # often that it doubles the time of an init or a load.
        gc.set_threshold(_GC_THRESHOLD)
        threading.Thread(target=self._watch, daemon=True).start()

    def _open(self, *, comes_back: bool) -> Server | AwaitedServer | SpareServer:
        """Return the server, or what answers while another process has the folder, or while it is not there."""
        folder = self._options.folder(self._index)
        if comes_back and folder is not None:
            if self._options.spare and is_locked(folder):
                return SpareServer()
            why = why_not_the_folder(folder, self._stamp, self._index, self._home)
            if why is not None:
                return SpareServer() if self._is_spare else AwaitedServer(why, self._options.heartbeat_timeout_s)
        elif folder is not None:
            check_num_servers(folder, self._options.num_servers)
        try:
            return Server(self._options, self._index, comes_back=comes_back, stamp=self._stamp)
        except StorageError as error:
            if not comes_back or folder is None or not is_locked(folder):
                raise
            if self._options.spare:
                # Both have been asked at the same time, and the other one was faster.
                return SpareServer()
            # Its last process is not dead: it is on a host that hangs, or that no network leads to.
            why = f"server {self._index}: {error}; it serves as soon as that process has ended"
            return AwaitedServer(why, self._options.heartbeat_timeout_s)

    def serve(self, message: bytes, payload: Any = None) -> Any:
        """Answer a message that came through Ray, whose payload is in it or beside it."""
        head, layout, inline = split(message)
        return through_ray(self._server.serve(head, layout, inline if payload is None else payload))

    def serve_connection(self, message: bytes | bytearray, buffers: OpenBuffers) -> bytes:
        """Answer a message that came over a connection, whose payload is in it or in the client's buffers.

        Returns:
            The reply; an empty one says that the request has to go through Ray.
        """
        out, payload = None, None
        try:
            head, layout, inline = split(message)
            owner = head.get("owner")
            buffers.owner = owner if isinstance(owner, str) else None
            described = head.pop("buffers", None)
            if described is not None:
                sent, out = buffers.find(described)
                payload = sent.numpy()
        except (OSError, TypeError, ValueError, LookupError, AttributeError, struct.error) as error:
            _logger.warning("a client's request cannot be read, so it continues through Ray: %s", error)
            return b""
        reply = self._server.serve(head, layout, inline if payload is None else payload, out)
        if out is not None and reply.payload is not None and reply.payload.data_ptr() == out.data_ptr():
            buffers.reply_nbytes = len(reply.payload)
            return join({**reply.head, "in_buffers": len(reply.payload)})
        return _joined(reply)

    def place(self) -> list[Any]:
        """Return where this server is; a spare takes over first, if its twin has ended.

        Returns:
            Host, process, authentication mode, Ray node, stamp of the folder, the host's name, and where it listens:
            an address for clients of this host, and one for others, each None where it does not listen. None instead
            of both: it is a spare.
        """
        self._take_over()
        node = ray.get_runtime_context().get_node_id()
        mine = [host_id(), os.getpid(), _compat.authentication_mode(), node, self._stamp, socket.gethostname()]
        if isinstance(self._server, SpareServer) or self._server.is_superseded:
            return [*mine, None]
        return [*mine, [self._listener and self._listener.address, self._network and self._network.address]]

    def _take_over(self) -> None:
        """Serve instead of a twin that has ended."""
        with self._opening:
            if isinstance(self._server, SpareServer):
                try:
                    self._server = self._open(comes_back=True)
                except StorageError as error:
                    _logger.warning("a spare server cannot open the folder: %s", error)

    def options(self) -> dict[str, Any]:
        """Return the options of the store."""
        return self._options.of_store()

    def stop(self) -> None:
        """Release the folder, before the process is killed."""
        self._server.close()

    def _watch(self) -> None:
        """Export metrics; end after an idle timeout without a live client, since no client would end the servers.

        If another server of the store is dead, end as soon as there is no live client.
        """
        alone_since = time.monotonic()
        # Usually the last client ends the servers; it may have been killed.
        while time.monotonic() - alone_since < (_ENDING_S if self._server.is_ending else IDLE_TIMEOUT_S):
            time.sleep(_WATCH_S)
            if isinstance(self._server, SpareServer):
                if time.monotonic() - alone_since >= _LOOK_S and find_actor(self._twin) is not None:
                    alone_since = time.monotonic()
                continue
            if self._server.is_superseded:
                _logger.warning("another process has opened the folder of server %s: this one ends", self._index)
                os._exit(1)
            if isinstance(self._server, AwaitedServer):
                self._look_for_folder(self._server)
            else:
                # Without them if it was told to stop, or cannot read its values any more: it has to end all the same.
                with suppress(TensorKVError):
                    self._metrics.export(self._server.stats())
            if self._server.owners():
                alone_since = time.monotonic()
            elif self._server.is_broken:
                break
        try:
            twin = find_actor(self._twin)
            if twin is not None:
                # It would take over otherwise.
                ray.kill(twin)
            with suppress(StoreClosedError):
                self._server.close()
        finally:
            # Ray would restart an actor whose process ended in any other way.
            ray.kill(ray.get_runtime_context().current_actor)

    def _look_for_folder(self, awaited: AwaitedServer) -> None:
        """Open the folder if it is there again."""
        try:
            opened = self._open(comes_back=True)
        except Exception as error:
            # Of whatever kind: it may be better at the next look, and this server has to end by itself in any case.
            _logger.warning("a folder that was waited for cannot be opened: %s", error)
            return
        # One that is awaited still keeps the clients that it knows.
        if not isinstance(opened, AwaitedServer):
            self._server = opened
            _logger.warning("the folder %s is there again", self._options.folder(self._index))
            awaited.end()


def spare_name(name: str, index: int, stamp: str) -> str:
    """Return the name of the actor that is the spare of a server, of one start of a store."""
    return f"{name}/{index}-{stamp}"


def find_actor(name: str) -> Any:
    """Return the actor of a name, None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE) if name else None
    except ValueError:
        return None


def through_ray(reply: Reply) -> bytes | list[Any]:
    """Return what Ray carries of a reply: one message, or one with a large payload beside it."""
    if reply.payload is None or len(reply.payload) <= INLINE_NBYTES:
        return _joined(reply)
    return [join(reply.head), np.asarray(reply.payload.numpy())]


def _joined(reply: Reply) -> bytes:
    """Return a reply as one message."""
    return join(reply.head, payload=b"" if reply.payload is None else reply.payload.numpy().data)


def _listen(handle: Handler, ended: Callable[[str], None]) -> SocketServer | None:
    """Listen for clients of this host; None where they cannot share memory."""
    return _try_to_listen("this host", lambda: SocketServer(handle, ended)) if can_share() else None


def _listen_to_hosts(handle: Handler) -> NetworkServer | None:
    """Listen for clients of other hosts, at the address of this node; None if there are none."""
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    with suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return None
    return _try_to_listen("other hosts", lambda: NetworkServer(address, handle))


def _try_to_listen(clients: str, make: Callable[[], L]) -> L | None:
    """Return a listener; None if the system gives no socket or thread."""
    try:
        return make()
    except (OSError, RuntimeError) as error:
        _logger.warning("clients of %s send their requests through Ray: %s", clients, error)
        return None


def why(error: BaseException) -> str:
    """Return the essential line of an error of Ray, whose messages have forty lines."""
    text = str(error)
    if "running low on memory" in text or isinstance(error, OutOfMemoryError):
        return (
            "Ray's memory monitor has killed its process, since the machine was short of memory; give it fewer or "
            "smaller values, more hosts, or more memory"
        )
    # Of a traceback, the line of the error itself.
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return lines[-1].partition("Error: ")[2] if lines else text.strip().partition("\n")[0]
