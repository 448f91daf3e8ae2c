"""A shared-memory channel between a client and a server of its host: requests, replies, and a doorbell.

A channel is a segment that both have mapped. The client writes a payload there and finds the reply there; a message
then only says where the bytes are. A client has a channel for each of its connections, keeps it, and replaces it by a
new one when it does not know whether the server is done with it.

The segment begins with a doorbell: three words (see ``_shared.c``) and a ``BufferLayout``. The client writes a request,
stores the first word and waits for the second; a thread of the server waits for the first, answers and stores the
second. The first request of a channel goes through Ray, and so does each that the doorbell does not answer, so that
Ray alone decides which server there is.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from tensorkv.runtime import shield
from tensorkv.shard.pool import default_threads

from .segment import LINE, Segment, aligned, can_share

try:
    from tensorkv.runtime import _shared
except ImportError:
    _shared = None  # type: ignore[assignment]

# Where the words, the layout and the reply's message begin.
_REQUESTED, _REPLIED, _CLOSED, _LAYOUT, _REPLY = (line * LINE for line in range(5))
# Bytes for the message of a reply, its length included. A longer one is asked for again, through Ray.
_REPLY_NBYTES = 4096
HEADER_NBYTES = _REPLY + _REPLY_NBYTES
"""Bytes before the buffers of a channel."""

_LENGTH = struct.Struct("Q")
# How often a wait checks whether the other process is alive.
_CHECK_S = 0.05
_IDLE_S = 1.0
# Long enough for a small request, where there are cores for both.
_SPIN_S = 50e-6 if default_threads() > 2 else 0.0
# The byte of a channel that its server holds a lock on.
_SERVER = 0
# Memory that is touched for the first time costs twenty times a copy: grow seldom.
_GROWTH = 1.5


class BufferLayout(NamedTuple):
    """Where a request's message, its payload and the reply's payload lie in a channel, in bytes."""

    message_at: int
    message_nbytes: int
    payload_at: int
    payload_nbytes: int
    reply_at: int
    reply_nbytes: int

    @classmethod
    def of(cls, message_nbytes: int, payload_nbytes: int, reply_nbytes: int) -> BufferLayout:
        """Return a layout of buffers of these sizes."""
        payload_at = HEADER_NBYTES + aligned(message_nbytes)
        reply_at = payload_at + aligned(payload_nbytes)
        return cls(HEADER_NBYTES, message_nbytes, payload_at, payload_nbytes, reply_at, reply_nbytes)

    @property
    def end(self) -> int:
        """The bytes that a segment needs."""
        return self.reply_at + aligned(self.reply_nbytes)


_LAYOUT_FORMAT = struct.Struct("6Q")
_EMPTY = BufferLayout(0, 0, 0, 0, 0, 0)
Handler = Callable[[bytes, torch.Tensor, torch.Tensor], bytes]


# ---------------------------------------------------------------- client


class Doorbell:
    """The client's side of a doorbell.

    Args:
        segment: of the channel.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._requested = 1
        self._replied = _LENGTH.pack(segment.address + _REPLIED)

    @property
    def is_served(self) -> bool:
        """Whether a server's thread waits for notifications."""
        return _shared is not None and _shared.load(self._segment.address + _REPLIED) > 0

    def notify(self, message: bytes, layout: BufferLayout) -> None:
        """Write a request's message, and wake the server."""
        memory, at = self._segment.memory, layout.message_at
        memory[at : at + len(message)] = message
        _LAYOUT_FORMAT.pack_into(memory, _LAYOUT, *layout)
        self._requested += 1
        _shared.store(self._segment.address + _REQUESTED, self._requested)

    def wait(self, timeout_s: float) -> bytes:
        """Wait for the reply's message; an empty one says that the request has to go through Ray.

        Raises:
            TimeoutError: no reply came in time.
            ConnectionError: the server's process has ended.
        """
        deadline, closed, left = time.monotonic() + timeout_s, self._segment.address + _CLOSED, timeout_s
        while not _shared.wait(self._replied, self._requested, closed, min(_CHECK_S, left), _SPIN_S):
            shield.check()
            if not self._segment.is_alive(_SERVER):
                raise ConnectionError
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
        (nbytes,) = _LENGTH.unpack_from(self._segment.memory, _REPLY)
        return bytes(self._segment.memory[_REPLY + _LENGTH.size : _REPLY + _LENGTH.size + nbytes])

    def close(self) -> None:
        """Let the server's thread end."""
        if _shared is not None:
            _shared.store(self._segment.address + _CLOSED, 1)
            _shared.wake(self._segment.address + _REQUESTED)


class SharedMemoryChannel:
    """A client's side."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._layout = _EMPTY

    def allocate(self, payload_nbytes: int, reply_nbytes: int, message_nbytes: int = 0) -> torch.Tensor:
        """Return memory for a payload, with room for a reply and a message.

        Raises:
            OSError: there is no memory.
        """
        self._layout = BufferLayout.of(message_nbytes, payload_nbytes, reply_nbytes)
        needed = self._layout.end
        if self._segment is None or self._segment.nbytes < needed:
            self.close()
            self._segment = Segment(aligned(int(needed * _GROWTH)) if needed < 1 << 28 else needed)
            self._doorbell = Doorbell(self._segment)
        return self.payload

    def notify(self, message: bytes) -> bool:
        """Send a request through the doorbell; return False if no server waits for it, or it is too long."""
        if self._segment is None or len(message) > self._layout.message_nbytes or not self._doorbell.is_served:
            return False
        self._doorbell.notify(message, self._layout._replace(message_nbytes=len(message)))
        return True

    def wait(self, timeout_s: float) -> bytes:
        """Wait for the reply to ``notify``; as ``Doorbell.wait``."""
        return self._doorbell.wait(timeout_s)

    def replace(self) -> None:
        """Continue with new memory, into which the payload is copied; a server may still use the old.

        Raises:
            OSError: there is no memory.
        """
        layout, payload = self._layout, self.payload
        if self._segment is not None:
            self.close()
            self.allocate(layout.payload_nbytes, layout.reply_nbytes, layout.message_nbytes).copy_(payload)

    def describe(self) -> list[Any] | None:
        """Return what a server needs to open the channel, as plain data."""
        if self._segment is None:
            return None
        return [self._segment.name, self._segment.nbytes, *self._layout[2:]]

    @property
    def payload(self) -> torch.Tensor:
        """The bytes to send."""
        return self._slice(*self._layout[2:4])

    @property
    def reply(self) -> torch.Tensor:
        """The bytes that the server may have written."""
        return self._slice(*self._layout[4:])

    def close(self) -> None:
        """Release the memory."""
        if self._segment is not None:
            self._doorbell.close()
            self._segment.close_file()
            self._segment = None

    def _slice(self, at: int, nbytes: int) -> torch.Tensor:
        if self._segment is None:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return self._segment.tensor(at, (nbytes,), torch.uint8)


# ---------------------------------------------------------------- server


class DoorbellServer:
    """The server's side of a doorbell: a thread that answers the requests of one channel.

    Args:
        segment: of the channel.
        handle: given message, payload and room for a reply's payload, returns the reply's message.
        is_wanted: called now and then; False ends the thread.
        forget: called at the end.

    Raises:
        RuntimeError: the system gives no thread; nothing waits for notifications.
    """

    def __init__(
        self, segment: Segment, handle: Handler, is_wanted: Callable[[], bool], forget: Callable[[], None]
    ) -> None:
        self._segment, self._handle, self._is_wanted, self._forget = segment, handle, is_wanted, forget
        # The kernel releases this lock when the process ends, which the client sees.
        segment.mark_alive(_SERVER)
        threading.Thread(target=self._serve, name="tensorkv-doorbell", daemon=True).start()
        # From now on the client uses the doorbell.
        _shared.store(segment.address + _REPLIED, 1)

    def _serve(self) -> None:
        segment, replied = self._segment, 1
        requested, closed = _LENGTH.pack(segment.address + _REQUESTED), segment.address + _CLOSED
        while not _shared.load(closed):
            if _shared.wait(requested, replied + 1, closed, _IDLE_S, 0.0):
                replied += 1
                self._write(self._reply())
                _shared.store(segment.address + _REPLIED, replied)
            elif not self._is_wanted():
                break
        segment.close_file()
        self._forget()

    def _reply(self) -> bytes:
        layout = BufferLayout._make(_LAYOUT_FORMAT.unpack_from(self._segment.memory, _LAYOUT))
        buffers = (layout[0:2], layout[2:4], layout[4:6])
        if any(at < HEADER_NBYTES or at + nbytes > self._segment.nbytes for at, nbytes in buffers):
            return b""
        message, payload, room = (self._segment.tensor(at, (nbytes,), torch.uint8) for at, nbytes in buffers)
        try:
            return self._handle(bytes(message.numpy().data), payload, room)
        except Exception:
            # The client sends the request again, through Ray, which carries the error.
            return b""

    def _write(self, reply: bytes) -> None:
        if _LENGTH.size + len(reply) > _REPLY_NBYTES:
            reply = b""
        _LENGTH.pack_into(self._segment.memory, _REPLY, len(reply))
        self._segment.memory[_REPLY + _LENGTH.size : _REPLY + _LENGTH.size + len(reply)] = reply


class ChannelServer:
    """A server's side: the channel of each client.

    Args:
        handle: answers requests that come through doorbells (None: all requests come through Ray).
    """

    def __init__(self, handle: Handler | None = None) -> None:
        self._handle = handle if can_share() else None
        self._lock = threading.Lock()
        self._open: dict[str, Segment] = {}

    def find(self, client: str, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the payload of a request, and room for the payload of its reply.

        Args:
            client: that sent the request; its earlier channel is closed.
            described: as ``SharedMemoryChannel.describe`` has it.

        Raises:
            OSError: it cannot be opened here, or is not the client's.
        """
        name, nbytes, at, payload_nbytes, reply_at, reply_nbytes = described
        segment = self._open.get(client)
        if segment is None or segment.name != name:
            segment = self._accept(client, Segment(nbytes, name))
        sizes = (at, payload_nbytes, reply_at, reply_nbytes)
        if min(sizes) < 0 or max(at + payload_nbytes, reply_at + reply_nbytes) > segment.nbytes:
            raise OSError(f"{name}: a payload or a reply outside of the channel")
        return (
            segment.tensor(at, (payload_nbytes,), torch.uint8),
            segment.tensor(reply_at, (reply_nbytes,), torch.uint8),
        )

    def _accept(self, client: str, segment: Segment) -> Segment:
        with self._lock:
            self._open[client] = segment
        if self._handle is None or segment.nbytes < HEADER_NBYTES or _was_served(segment):
            # The client's next notification is not answered, and it continues with new memory.
            segment.close_file()
            return segment
        try:
            DoorbellServer(
                segment, self._handle, partial(self._has, client, segment), partial(self._forget, client, segment)
            )
        except (OSError, RuntimeError):
            # The client continues through Ray.
            segment.close_file()
        return segment

    def _has(self, client: str, segment: Segment) -> bool:
        return self._open.get(client) is segment

    def _forget(self, client: str, segment: Segment) -> None:
        with self._lock:
            if self._has(client, segment):
                del self._open[client]

    def close_all_but(self, owners: Sequence[str]) -> None:
        """Release the channels of clients whose process, with which their name begins, is not among these."""
        alive = set(owners)
        with self._lock:
            for client in [client for client in self._open if client.partition(".")[0] not in alive]:
                del self._open[client]


def _was_served(segment: Segment) -> bool:
    """Return whether a server has answered requests of a channel; a second one would answer the last one again."""
    return _shared.load(segment.address + _REPLIED) > 0
