"""Sessions: a client of servers that numbers its requests and sends one at a time, to several servers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.packing import Packed
from tensorkv.engines.transport.shared_values import ValuesInPlace
from tensorkv.errors import PushOutcomeUnknownError, StoreClosedError, WaitTimeoutError

from ..messages import Message, encode
from .rpc import ServerConnection, ServerReply

Fill = Callable[[torch.Tensor], Any]


class ServerRequest(NamedTuple):
    """A request to one server.

    Args:
        server: its index.
        message: to it.
        layout: of the payload; for a pull, the keys.
        nbytes: of the payload.
        fill: writes the payload to the memory that it is given.
        reply_nbytes: of the values that come back.
        servers: all servers of the request (None: those to which it is sent now).
    """

    server: int
    message: Message
    layout: bytes = b"[]"
    nbytes: int = 0
    fill: Fill | None = None
    reply_nbytes: int = 0
    servers: list[int] | None = None

    @classmethod
    def of_tensors(cls, server: int, message: Message, packed: Packed, reply_nbytes: int = 0) -> ServerRequest:
        """Return a request whose payload is packed tensors."""
        nbytes = sum(len(buffer) for buffer in packed.payload)
        return cls(server, message, packed.layout, nbytes, partial(_copy, packed.payload), reply_nbytes)


def _copy(buffers: Sequence[Any], room: torch.Tensor) -> None:
    at, memory = 0, room.numpy()
    for buffer in buffers:
        memory[at : at + len(buffer)] = memoryview(buffer)
        at += len(buffer)


class Session:
    """The sender of numbered requests.

    Args:
        owner: the process, as servers know it.
        number: of the session.
        connections: to every server.
        rank: of the worker (None: a reader).
        given_up: of each client, the number of its last request to several servers that it does not send again though
            one may not have got it; servers are to be told.
    """

    def __init__(
        self,
        owner: str,
        number: int,
        connections: Sequence[ServerConnection],
        rank: int | None,
        given_up: dict[str, int],
    ) -> None:
        self._client = f"{owner}.{number}"
        self._sender = {"owner": owner, "client": self._client, "rank": rank}
        self._connections, self._given_up = connections, given_up
        self._seq = 0
        self.is_idle = True
        """Whether every request has been answered."""

    def send(
        self, requests: Sequence[ServerRequest], *, timeout_s: float | None = None, retry: bool = False
    ) -> list[ServerReply]:
        """Send one request to each of some servers and return their replies, in order.

        Args:
            requests: at most one for each server.
            timeout_s: how long to wait for replies (None: as long as each connection does).
            retry: whether this is the last request once more, for servers that have not applied it.

        Raises:
            As ``ServerConnection.finish``, after every server has answered.
        """
        outcomes = self.outcomes(requests, timeout_s=timeout_s, retry=retry)
        failures = [each for each in outcomes if isinstance(each, Exception)]
        if failures:
            # A push was applied if no server has failed but those that have applied it.
            raise min(failures, key=lambda error: isinstance(error, WaitTimeoutError) and error.applied)
        return [each for each in outcomes if isinstance(each, ServerReply)]

    def outcomes(
        self, requests: Sequence[ServerRequest], *, timeout_s: float | None = None, retry: bool = False
    ) -> list[ServerReply | Exception]:
        """Send one request to each of some servers and return each reply, or the error, in order."""
        self._seq += not retry
        try:
            found = self._exchange(requests, timeout_s)
        except BaseException:
            self._give_up(requests)
            raise
        if any(isinstance(each, PushOutcomeUnknownError | WaitTimeoutError) for each in found):
            self._give_up(requests)
        return found

    def _give_up(self, requests: Sequence[ServerRequest]) -> None:
        if len(requests) > 1 or any(len(each.servers or ()) > 1 for each in requests):
            self._given_up[self._client] = self._seq

    def _exchange(self, requests: Sequence[ServerRequest], timeout_s: float | None) -> list[ServerReply | Exception]:
        servers = [request.server for request in requests]
        self.is_idle = False
        for request in requests:
            connection = self._connections[request.server]
            sender: dict[str, Any] = {**self._sender, "seq": self._seq}
            if len(request.servers or servers) > 1:
                sender["servers"] = request.servers or servers
            head = encode(request.message, sender)
            payload = connection.allocate(request.nbytes, request.reply_nbytes)
            if request.fill is not None:
                request.fill(payload)
            connection.start(head, request.layout, timeout_s=timeout_s)
        found: list[ServerReply | Exception] = []
        for server in servers:
            try:
                found.append(self._connections[server].finish())
            except Exception as error:
                found.append(error)
        self.is_idle = True
        return found

    def values_in_place(self, server: int, reply: ServerReply) -> ValuesInPlace:
        """Return the values of a reply that says where they are; raise OSError if they cannot be read from here."""
        return self._connections[server].values_in_place(reply)

    @property
    def resent(self) -> int:
        """How many requests were sent again."""
        return sum(connection.resent for connection in self._connections)

    @property
    def socket_requests(self) -> int:
        """How many requests went over a socket instead of through Ray."""
        return sum(connection.socket_requests for connection in self._connections)

    def close(self) -> None:
        """Release connections and shared memory."""
        for connection in self._connections:
            connection.close()


class SessionPool:
    """As many sessions as there are threads that call at the same time.

    Args:
        make: returns the session of a number.
    """

    def __init__(self, make: Callable[[int], Session]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self._free: list[Session] = []
        self._open: set[Session] = set()
        self._made = self._times_cleared = 0
        # Of sessions that were closed: requests that were sent again, and over a socket.
        self._resent = self._socket_requests = 0

    @contextmanager
    def take(self) -> Iterator[Session]:
        """Lend a session that no other thread uses.

        Raises:
            StoreClosedError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise StoreClosedError("this store was closed; create another")
            if not self._free:
                # Numbers are not used twice: servers remember the last request of each session.
                self._free.append(self._make(self._made))
                self._made += 1
                self._open.add(self._free[-1])
            session, times = self._free.pop(), self._times_cleared
        try:
            yield session
        finally:
            with self._lock:
                # A session that was interrupted may have a request on its way.
                if session.is_idle and times == self._times_cleared and not self._closed:
                    self._free.append(session)
                else:
                    self._drop(session)

    def _drop(self, session: Session) -> None:
        session.close()
        self._open.discard(session)
        self._resent += session.resent
        self._socket_requests += session.socket_requests

    @property
    def resent(self) -> int:
        """How many requests were sent again."""
        with self._lock:
            return self._resent + sum(session.resent for session in self._open)

    @property
    def socket_requests(self) -> int:
        """How many requests went over a socket instead of through Ray."""
        with self._lock:
            return self._socket_requests + sum(session.socket_requests for session in self._open)

    def clear(self) -> None:
        """Drop all sessions, those in use when they come back; the next one is a new session for servers."""
        with self._lock:
            self._times_cleared += 1
            for session in self._free:
                self._drop(session)
            self._free.clear()

    def close(self) -> None:
        """Lend no more sessions; those in use are closed when they come back."""
        with self._lock:
            self._closed = True
        self.clear()
