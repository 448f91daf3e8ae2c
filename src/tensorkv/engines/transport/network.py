"""A channel between a client and a server of different hosts: messages and bulk payloads over one TCP connection.

Ray takes three times as long to carry a large payload to another host and back, through two object stores. A server
listens at the address of its Ray node. It passes the port and a key on through Ray, which asks for its token, and
answers only who proves to know the key: each end sends a random challenge and an HMAC of both (RFC 2104, with SHA-256),
so the key is never sent. Like Ray's own connections, these are not encrypted.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from .channel import Buffers, Connection, Handler, Listener, OpenBuffers, growing

_CHALLENGE_NBYTES = 32
_PROOF_NBYTES = 64
# How long a stranger may take to prove that it knows the key, and how many may be about to.
_GREETING_S = 10.0
_MOST_STRANGERS = 64
# How long nothing may come, or go, in the middle of a payload.
PATIENCE_S = 10.0
# When the other host is looked for if nothing has come from it, how often, and how many times.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def connect(address: Sequence[Any], deadline: float) -> Connection:
    """Connect to a server of another host.

    Args:
        address: as ``NetworkServer.address`` has it.
        deadline: by ``time.monotonic``.

    Raises:
        TimeoutError: the server has not answered.
        OSError: it cannot be reached, has ended, or does not know the key.
    """
    host, port, key = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as connected:
        connected.setblocking(False)
        _tune(connected)
        begun = connected.connect_ex((host, port))
        if begun not in (0, errno.EINPROGRESS):
            raise OSError(begun, os.strerror(begun))
        connection = Connection(connected)
    try:
        connection.wait_until_open(deadline)
        theirs = connection.receive(deadline, _CHALLENGE_NBYTES)
        mine = secrets.token_bytes(_CHALLENGE_NBYTES)
        connection.send(mine + _proof(key, b"client", theirs, mine), deadline)
        proof = connection.receive(deadline, _PROOF_NBYTES)
        if not hmac.compare_digest(proof, _proof(key, b"server", theirs, mine)):
            raise PermissionError(f"what listens at {host}:{port} is not the server")
    except BaseException:
        connection.close()
        raise
    return connection


def _proof(key: str, role: bytes, server: bytes | bytearray, client: bytes | bytearray) -> bytes:
    """Return what only an end that knows the key can say of two challenges."""
    return hmac.digest(key.encode(), role + server + client, "sha256").hex().encode()


def _tune(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, number in _KEEPALIVE:
        connected.setsockopt(socket.IPPROTO_TCP, option, number)


class NetworkServer(Listener):
    """A server's side of connections between hosts.

    Args:
        host: the address at which to listen.
        handle: as for ``Listener``.

    Raises:
        OSError, RuntimeError: the system gives no socket, or no thread.
    """

    def __init__(self, host: str, handle: Handler) -> None:
        self._strangers = threading.Semaphore(_MOST_STRANGERS)
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        self.address = [host, listener.getsockname()[1], secrets.token_hex(32)]
        """Where it listens, and the key that both ends have to know."""
        super().__init__(listener, handle, lambda _: None)

    def _admit(self, accepted: socket.socket) -> int:
        _tune(accepted)
        return 0

    def _knows(self, connection: Connection) -> bool:
        if not self._strangers.acquire(blocking=False):
            return False
        try:
            key, deadline = self.address[2], time.monotonic() + _GREETING_S
            mine = secrets.token_bytes(_CHALLENGE_NBYTES)
            connection.send(mine, deadline)
            said = connection.receive(deadline, _CHALLENGE_NBYTES + _PROOF_NBYTES)
            theirs, proof = said[:_CHALLENGE_NBYTES], said[_CHALLENGE_NBYTES:]
            if not hmac.compare_digest(proof, _proof(key, b"client", mine, theirs)):
                return False
            connection.send(_proof(key, b"server", mine, theirs), deadline)
            return True
        finally:
            self._strangers.release()

    def _buffers_of(self, connection: Connection) -> OpenBuffers:
        return OpenStream(connection)


# ---------------------------------------------------------------- bulk payloads


def _view(memory: torch.Tensor) -> memoryview:
    return memory.numpy().data


class _Memory:
    """Memory that is kept, and grows."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, nbytes: int) -> torch.Tensor:
        """Return so many bytes of it.

        Raises:
            OSError: there is no memory.
        """
        if len(self._memory) < nbytes:
            self.drop()
            try:
                self._memory = torch.empty(growing(nbytes), dtype=torch.uint8, device="cpu")
            except RuntimeError as error:
                raise OSError(f"no memory for {nbytes} bytes") from error
        return self._memory[:nbytes]

    def drop(self) -> None:
        """Keep it no longer; tensors that lie in it stay valid."""
        self._memory = self._memory[:0].clone()


class StreamBuffers(Buffers):
    """Memory of a client whose payloads travel behind their messages."""

    def __init__(self) -> None:
        self._sending, self._receiving = _Memory(), _Memory()
        self._payload_nbytes = self._reply_nbytes = 0

    def allocate(self, payload_nbytes: int, reply_nbytes: int) -> torch.Tensor:
        self._payload_nbytes, self._reply_nbytes = payload_nbytes, reply_nbytes
        return self._sending.take(payload_nbytes)

    def replace(self, payload: torch.Tensor) -> torch.Tensor:
        return payload

    def describe(self) -> list[Any]:
        return [self._payload_nbytes, self._reply_nbytes]

    def send(self, connection: Connection, deadline: float) -> None:
        payload = self._sending.take(self._payload_nbytes)
        connection.send_bytes(_view(payload), deadline, PATIENCE_S)

    def receive(self, connection: Connection, nbytes: int, deadline: float) -> torch.Tensor:
        reply = self._receiving.take(nbytes)
        connection.receive_bytes(_view(reply), deadline, PATIENCE_S)
        return reply

    def close(self) -> None:
        self._sending.drop()
        self._receiving.drop()


class OpenStream(OpenBuffers):
    """A server's side of payloads that travel behind their messages.

    Args:
        connection: on which they travel.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection, self._payload, self._reply = connection, _Memory(), _Memory()

    def find(self, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        payload_nbytes, reply_nbytes = described
        if min(payload_nbytes, reply_nbytes) < 0:
            raise OSError("a payload of fewer than no bytes")
        payload = self._payload.take(payload_nbytes)
        self._connection.receive_bytes(_view(payload), patience_s=PATIENCE_S)
        return payload, self._reply.take(reply_nbytes)

    def end_reply(self) -> None:
        left, self.reply_nbytes = self.reply_nbytes, 0
        self._connection.send_bytes(_view(self._reply.take(left)), patience_s=PATIENCE_S)
