"""A channel between a client and a server of its host: messages over a Unix socket, bulk payloads in shared memory.

A server listens in the abstract namespace, so no file is left behind when it is killed. It passes its address and a key
on through Ray, and answers only processes of its own user that send the key first. Both change with each start of the
server, so nothing that was meant for its previous incarnation reaches it.

Sockets are used directly, not through ``multiprocessing.connection``: a message may be longer than the kernel's buffer,
and sending it to a stopped server must end with the deadline, or when the caller is interrupted.
"""

from __future__ import annotations

import errno
import hmac
import logging
import math
import os
import secrets
import select
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

import torch

from tensorkv.runtime import forks, shield

from .segment import Segment, aligned

_logger = logging.getLogger(__name__)

# Before each message, its bytes.
_LENGTH = struct.Struct("<Q")
# Of the process at the other end: process ID, user ID, group ID.
_CREDENTIALS = struct.Struct("3i")
# One system call receives a message of up to so many bytes.
_CHUNK_NBYTES = 64 << 10
# How often a wait with a deadline checks it and whether its caller was interrupted.
_CHECK_S = 0.05
# How long a server that can accept no connection, for lack of descriptors, waits before it tries again.
_ACCEPT_PAUSE_S = 0.1
# The kernel closes the files of a process shortly before the process has ended.
_EXIT_S = 5.0
# Up to here, memory is taken for larger messages, too.
_MOST_GROWING_NBYTES = 1 << 28


class Connection:
    """One end of a connection, on which messages are sent and received.

    Args:
        connected: its socket, which now belongs to the connection.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._descriptor = connected.detach()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._descriptor, select.POLLIN)
        self._writable.register(self._descriptor, select.POLLOUT)
        forks.pin_in_children(self)
        forks.close_in_children(self._descriptor)

    def wait_until_open(self, deadline: float) -> None:
        """Wait until a connection that was begun is there; errors are those of ``send``, and what connecting raises."""
        _wait(self._writable, deadline)
        with socket.socket(fileno=os.dup(self._descriptor)) as connected:
            failed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def send(self, message: bytes, deadline: float = math.inf) -> None:
        """Send a message.

        Args:
            message: any bytes.
            deadline: by ``time.monotonic``.

        Raises:
            TimeoutError: the deadline has passed; the connection is of no more use.
            ConnectionError: the other end is closed.
        """
        self.send_bytes(memoryview(_LENGTH.pack(len(message)) + message), deadline)

    def send_bytes(self, left: memoryview, deadline: float = math.inf, patience_s: float = math.inf) -> None:
        """Send bytes whose number the other end knows.

        Args:
            left: the bytes.
            deadline: as for ``send``, and so are the errors.
            patience_s: how long to wait while none of them can be sent, before the deadline.
        """
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                _wait(self._writable, min(deadline, time.monotonic() + patience_s))

    def receive_bytes(self, left: memoryview, deadline: float = math.inf, patience_s: float = math.inf) -> None:
        """Fill memory with what the other end sends; arguments and errors are those of ``send_bytes``."""
        while left:
            _wait(self._readable, min(deadline, time.monotonic() + patience_s))
            count = os.readv(self._descriptor, [left])
            if not count:
                raise ConnectionResetError("the other end of the connection is closed")
            left = left[count:]

    def receive(self, deadline: float = math.inf, most_nbytes: float = math.inf) -> bytearray:
        """Return the next message; arguments and errors are those of ``send``.

        Args:
            deadline: by ``time.monotonic``.
            most_nbytes: a longer message is a ``ConnectionAbortedError``.
        """
        (nbytes,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size, deadline))
        if nbytes > most_nbytes:
            raise ConnectionAbortedError(f"a message of {nbytes} bytes, where {most_nbytes} are allowed")
        return self._receive_exactly(nbytes, deadline)

    def _receive_exactly(self, nbytes: int, deadline: float) -> bytearray:
        """Return so many bytes, and leave in the socket what comes after them."""
        # It grows with what comes: the other end may announce more than it has.
        found = bytearray()
        while len(found) < nbytes:
            _wait(self._readable, deadline)
            some = os.read(self._descriptor, min(_CHUNK_NBYTES, nbytes - len(found)))
            if not some:
                raise ConnectionResetError("the other end of the connection is closed")
            found += some
        return found

    def close(self) -> None:
        """Close this end."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def _wait(poll: select.poll, deadline: float) -> None:
    """Wait until a descriptor is ready."""
    while not poll.poll(None if deadline == math.inf else 1000 * _CHECK_S):
        shield.check()
        if time.monotonic() >= deadline:
            raise TimeoutError


def connect(address: Sequence[str], deadline: float) -> Connection:
    """Connect to a server of this host.

    Args:
        address: as ``SocketServer.address`` has it.
        deadline: by ``time.monotonic``.

    Raises:
        TimeoutError: the server has not answered.
        OSError: it has ended, has no thread for the connection, or another user's process listens there.
    """
    name, key = address
    with socket.socket(socket.AF_UNIX) as connected:
        # The kernel makes the connection at once, or says that too many wait for the server.
        connected.setblocking(False)
        connected.connect(f"\0{name}")
        if _peer(connected)[1] != os.geteuid():
            raise PermissionError(f"a process of another user listens at {name}")
        connection = Connection(connected)
    try:
        connection.send(key.encode(), deadline)
        connection.receive(deadline)
    except BaseException:
        connection.close()
        raise
    return connection


class Listener(ABC):
    """A server's side: it accepts connections, and answers the requests of each in a thread of its own.

    Args:
        listener: the socket that accepts.
        handle: given a request and the buffers of its connection, returns the reply. An ``OSError`` closes the
            connection.
        ended: called with the owner that requests of a connection have named, when its process has ended. Where
            processes of the client cannot be seen, as on another host, it is not called.

    Raises:
        OSError, RuntimeError: the system gives no socket, or no thread.
    """

    def __init__(self, listener: socket.socket, handle: Handler, ended: Callable[[str], None]) -> None:
        self._handle, self._ended, self._listener = handle, ended, listener
        self._listener.listen()
        forks.pin_in_children(self._listener)
        forks.close_in_children(self._listener.fileno())
        threading.Thread(target=self._accept, name="tensorkv-accept", daemon=True).start()

    def close(self) -> None:
        """Accept no more connections; each that is open ends when its client closes it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    # It was closed.
                    break
                _logger.warning("cannot accept a client's connection: %s", error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            try:
                arguments = (accepted, self._admit(accepted))
                threading.Thread(target=self._serve, args=arguments, name="tensorkv-serve", daemon=True).start()
            except (OSError, RuntimeError):
                # A client for which there is no thread continues through Ray.
                accepted.close()
        self._listener.close()

    def _serve(self, accepted: socket.socket, process: int) -> None:
        # The client's memory is released before its process is waited for.
        owner = self._answer(Connection(accepted))
        if owner is not None and _has_ended(process):
            self._ended(owner)

    def _answer(self, connection: Connection) -> str | None:
        buffers = self._buffers_of(connection)
        with closing(connection), suppress(OSError):
            if self._knows(connection):
                while True:
                    connection.send(self._handle(connection.receive(), buffers))
                    buffers.end_reply()
        return buffers.owner

    @abstractmethod
    def _admit(self, accepted: socket.socket) -> int:
        """Return the process at the other end (0: it cannot be seen); raise ``PermissionError`` if it is to go."""

    @abstractmethod
    def _knows(self, connection: Connection) -> bool:
        """Return whether the other end has shown that it knows the key."""

    @abstractmethod
    def _buffers_of(self, connection: Connection) -> OpenBuffers:
        """Return the buffers of a new connection."""


class SocketServer(Listener):
    """A server's side of connections within a host; arguments and errors are those of ``Listener``."""

    def __init__(self, handle: Handler, ended: Callable[[str], None] = lambda _: None) -> None:
        self.address = [f"tensorkv-{secrets.token_hex(8)}", secrets.token_hex(16)]
        """Where it listens, and the key that a client sends first."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{self.address[0]}")
        super().__init__(listener, handle, ended)

    def _admit(self, accepted: socket.socket) -> int:
        process, user = _peer(accepted)
        if user != os.geteuid():
            raise PermissionError
        return process

    def _knows(self, connection: Connection) -> bool:
        knows = hmac.compare_digest(connection.receive(), self.address[1].encode())
        if knows:
            connection.send(b"")
        return knows

    def _buffers_of(self, connection: Connection) -> OpenBuffers:
        return OpenSharedBuffers()


def _peer(connected: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end; process 0 is one that cannot be seen from here."""
    told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(told)
    return process, user


def _has_ended(process: int) -> bool:
    """Return whether a process has ended, or ends within a moment; False if that cannot be found out."""
    if process == 0:
        return False
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        ends = select.poll()
        ends.register(descriptor, select.POLLIN)
        return bool(ends.poll(1000 * _EXIT_S))
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- bulk payloads


class Buffers(ABC):
    """A client's memory for a payload to send, with room for the payload of the reply.

    A client has them for each of its connections, keeps them, and replaces them by new ones when it does not know
    whether the server is done with them.
    """

    @abstractmethod
    def allocate(self, payload_nbytes: int, reply_nbytes: int) -> torch.Tensor:
        """Return memory for a payload, with room for a reply.

        Raises:
            OSError: there is no memory.
        """

    @abstractmethod
    def replace(self, payload: torch.Tensor) -> torch.Tensor:
        """Continue with memory that no server uses; return it with the payload.

        Raises:
            OSError: there is no memory.
        """

    @abstractmethod
    def describe(self) -> list[Any]:
        """Return what a server needs to find the payload and the room, as plain data."""

    @abstractmethod
    def send(self, connection: Connection, deadline: float) -> None:
        """Send the payload behind the message that describes it; errors are those of ``Connection.send``."""

    @abstractmethod
    def receive(self, connection: Connection, nbytes: int, deadline: float) -> torch.Tensor:
        """Return the payload of a reply, behind its message; errors are those of ``Connection.receive``."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory; tensors that lie in it stay valid."""


def growing(nbytes: int) -> int:
    """Return how much memory to take where so many bytes are needed, and perhaps more later.

    Memory that is touched for the first time costs twenty times a copy, so it grows seldom.
    """
    return nbytes + nbytes // 2 if nbytes < _MOST_GROWING_NBYTES else nbytes


class SharedBuffers(Buffers):
    """Memory that a client shares with a server of its host."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._payload_nbytes = self._reply_nbytes = 0

    def allocate(self, payload_nbytes: int, reply_nbytes: int) -> torch.Tensor:
        needed = aligned(payload_nbytes) + aligned(reply_nbytes)
        if self._segment is None or self._segment.nbytes < needed:
            self.close()
            self._segment = Segment(aligned(growing(needed)))
        self._payload_nbytes, self._reply_nbytes = payload_nbytes, reply_nbytes
        return self._segment.bytes_at(0, payload_nbytes)

    def replace(self, payload: torch.Tensor) -> torch.Tensor:
        # A server may still use the old memory.
        self.close()
        return self.allocate(self._payload_nbytes, self._reply_nbytes).copy_(payload)

    def describe(self) -> list[Any]:
        segment = self._allocated()
        return [segment.name, segment.nbytes, self._payload_nbytes, self._reply_nbytes]

    def send(self, connection: Connection, deadline: float) -> None:
        """Do nothing: the payload is where the server sees it."""

    def receive(self, connection: Connection, nbytes: int, deadline: float) -> torch.Tensor:
        return self._allocated().bytes_at(aligned(self._payload_nbytes), nbytes)

    def _allocated(self) -> Segment:
        if self._segment is None:
            raise RuntimeError("no memory was allocated")
        return self._segment

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close_file()
            self._segment = None


class OpenBuffers(ABC):
    """A server's side: the buffers of one connection."""

    def __init__(self) -> None:
        self.owner: str | None = None
        """The client, once a request has said it."""
        self.reply_nbytes = 0
        """How much of the room for a reply the server has filled."""

    @abstractmethod
    def find(self, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the payload of a request, and room for the payload of its reply.

        Args:
            described: as ``Buffers.describe`` has it.

        Raises:
            OSError: they cannot be opened here, or are not the client's.
        """

    def end_reply(self) -> None:
        """Do what is to be done when the message of a reply has been sent."""


class OpenSharedBuffers(OpenBuffers):
    """Memory that a client of this host shares."""

    def __init__(self) -> None:
        super().__init__()
        self._segment: Segment | None = None

    def find(self, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        name, nbytes, payload_nbytes, reply_nbytes = described
        if self._segment is None or self._segment.name != name:
            self._segment = Segment(nbytes, name)
            self._segment.close_file()
        if min(payload_nbytes, reply_nbytes) < 0 or aligned(payload_nbytes) + reply_nbytes > self._segment.nbytes:
            raise OSError(f"{name}: a payload or a reply outside of the shared memory")
        return (
            self._segment.bytes_at(0, payload_nbytes),
            self._segment.bytes_at(aligned(payload_nbytes), reply_nbytes),
        )


Handler = Callable[[bytearray, OpenBuffers], bytes]
