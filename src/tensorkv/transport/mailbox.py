"""Mailbox: memory in which a client lays what it sends and finds what it gets, if the server is on its host.

A message then holds only where the bytes are. A client has a mailbox for each of its requests under way, keeps it,
and gives it up for a new one when it does not know whether the server is done with it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .bell import HEAD_NBYTES, Answer, Attendant, Bell, Sheet, layout, was_attended
from .segment import Segment, aligned, can_share

# Memory that is touched for the first time costs twenty times a copy: grow seldom.
_GROWTH = 1.5
_NOTHING = Sheet(0, 0, 0, 0, 0, 0)


class Mailbox:
    """A client's side."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._sheet = _NOTHING

    def take_room(self, payload_nbytes: int, reply_nbytes: int, message_nbytes: int = 0) -> torch.Tensor:
        """Return memory for a payload, with room for a reply and a message.

        Raises:
            OSError: there is no memory.
        """
        self._sheet, needed = layout(message_nbytes, payload_nbytes, reply_nbytes)
        if self._segment is None or self._segment.nbytes < needed:
            self.give_up()
            self._segment = Segment(aligned(int(needed * _GROWTH)) if needed < 1 << 28 else needed)
            self._bell = Bell(self._segment)
        return self.payload

    def ring(self, message: bytes) -> bool:
        """Ask the server that attends this mailbox; False: nobody does, or there is no room for the message."""
        if self._segment is None or len(message) > self._sheet.message_nbytes or not self._bell.is_attended:
            return False
        self._bell.ring(message, self._sheet._replace(message_nbytes=len(message)))
        return True

    def hear(self, timeout_s: float) -> bytes:
        """Wait for the answer to a ring, as ``Bell.hear`` does."""
        return self._bell.hear(timeout_s)

    def move(self) -> None:
        """Go on with new memory, into which the payload is copied; a server may still use the old.

        Raises:
            OSError: there is no memory.
        """
        sheet, payload = self._sheet, self.payload
        if self._segment is not None:
            self.give_up()
            self.take_room(sheet.payload_nbytes, sheet.reply_nbytes, sheet.message_nbytes).copy_(payload)

    def describe(self) -> list[Any] | None:
        """Return what a server needs to know, as plain data."""
        if self._segment is None:
            return None
        return [self._segment.name, self._segment.nbytes, *self._sheet[2:]]

    @property
    def payload(self) -> torch.Tensor:
        """The bytes to send."""
        return self._slice(*self._sheet[2:4])

    @property
    def reply(self) -> torch.Tensor:
        """The bytes that the server may have written."""
        return self._slice(*self._sheet[4:])

    def give_up(self) -> None:
        """Let go of the memory."""
        if self._segment is not None:
            self._bell.end()
            self._segment.close_file()
            self._segment = None

    def _slice(self, at: int, nbytes: int) -> torch.Tensor:
        if self._segment is None:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return self._segment.tensor(at, (nbytes,), torch.uint8)


class OpenMailboxes:
    """A server's side: the mailbox of each client.

    Args:
        answer: what is asked by ringing; None: clients ask through Ray alone.
    """

    def __init__(self, answer: Answer | None = None) -> None:
        self._answer = answer if can_share() else None
        self._lock = threading.Lock()
        self._open: dict[str, Segment] = {}

    def find(self, client: str, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return payload and room for a reply.

        Args:
            client: whose mailbox it is; one that it had before is closed.
            described: what the client says of it.

        Raises:
            OSError: it cannot be opened here, or is not the one that was meant.
        """
        name, nbytes, at, payload_nbytes, reply_at, reply_nbytes = described
        segment = self._open.get(client)
        if segment is None or segment.name != name:
            segment = self._enter(client, Segment(nbytes, name))
        sizes = (at, payload_nbytes, reply_at, reply_nbytes)
        if min(sizes) < 0 or max(at + payload_nbytes, reply_at + reply_nbytes) > segment.nbytes:
            raise OSError(f"{name}: a payload or a reply outside of the mailbox")
        return (
            segment.tensor(at, (payload_nbytes,), torch.uint8),
            segment.tensor(reply_at, (reply_nbytes,), torch.uint8),
        )

    def _enter(self, client: str, segment: Segment) -> Segment:
        with self._lock:
            self._open[client] = segment
        if self._answer is None or segment.nbytes < HEAD_NBYTES or was_attended(segment):
            # The client's next ring is not answered, and it goes on with new memory.
            segment.close_file()
            return segment
        try:
            Attendant(
                segment, self._answer, partial(self._has, client, segment), partial(self._forget, client, segment)
            )
        except (OSError, RuntimeError):
            # The client asks through Ray.
            segment.close_file()
        return segment

    def _has(self, client: str, segment: Segment) -> bool:
        return self._open.get(client) is segment

    def _forget(self, client: str, segment: Segment) -> None:
        with self._lock:
            if self._has(client, segment):
                del self._open[client]

    def close_all_but(self, owners: Sequence[str]) -> None:
        """Let go of the memory of clients whose process, which their name begins with, is gone."""
        alive = set(owners)
        with self._lock:
            for client in [client for client in self._open if client.partition(".")[0] not in alive]:
                del self._open[client]
