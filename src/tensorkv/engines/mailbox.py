"""Mailbox: memory in which a client lays what it sends and finds what it gets, if the server is on its host.

A message then holds only where the bytes are. A client has a mailbox for each of its requests under way, keeps it,
and gives it up for a new one when it does not know whether the server is done with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch

from .segment import LINE, Segment, aligned

# Memory that is touched for the first time costs twenty times a copy: grow seldom.
_GROWTH = 1.5
_NONCE_NBYTES = 16


class Mailbox:
    """A client's side."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._places = (0, 0, 0, 0)

    def take_room(self, payload_nbytes: int, reply_nbytes: int) -> torch.Tensor:
        """Return memory for a payload of so many bytes, with room for a reply behind it.

        Raises:
            OSError: there is no memory.
        """
        reply_at = LINE + aligned(payload_nbytes)
        needed = reply_at + aligned(reply_nbytes)
        if self._segment is None or self._segment.nbytes < needed:
            self.give_up()
            self._segment = Segment(aligned(int(needed * _GROWTH)) if needed < 1 << 28 else needed)
            self._nonce = secrets.token_bytes(_NONCE_NBYTES)
            self._segment.memory[:_NONCE_NBYTES] = self._nonce
        self._places = (LINE, payload_nbytes, reply_at, reply_nbytes)
        return self._slice(LINE, payload_nbytes)

    def move(self) -> None:
        """Go on with new memory, into which the payload is copied; a server may still use the old."""
        old, (at, nbytes, _, reply_nbytes) = self._segment, self._places
        if old is not None:
            payload = old.tensor(at, (nbytes,), torch.uint8)
            old.close_file()
            self._segment = None
            self.take_room(nbytes, reply_nbytes).copy_(payload)

    def describe(self) -> list[Any] | None:
        """Return what a server needs to know, as plain data."""
        if self._segment is None:
            return None
        return [self._segment.path, self._segment.nbytes, self._nonce.hex(), *self._places]

    @property
    def payload(self) -> torch.Tensor:
        """The bytes to send."""
        return self._slice(*self._places[:2])

    @property
    def reply(self) -> torch.Tensor:
        """The bytes that the server may have written."""
        return self._slice(*self._places[2:])

    def give_up(self) -> None:
        """Let go of the memory."""
        if self._segment is not None:
            self._segment.close_file()
            self._segment = None

    def _slice(self, at: int, nbytes: int) -> torch.Tensor:
        if self._segment is None:
            return torch.empty(0, dtype=torch.uint8)
        return self._segment.tensor(at, (nbytes,), torch.uint8)


class OpenMailboxes:
    """A server's side: the mailbox of each client."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, Segment]] = {}

    def find(self, client: str, described: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return payload and room for a reply.

        Args:
            client: whose mailbox it is; one that it had before is closed.
            described: what the client says of it.

        Raises:
            OSError: it cannot be opened here, or is not the one that was meant.
        """
        path, nbytes, nonce, at, payload_nbytes, reply_at, reply_nbytes = described
        known, segment = self._open.get(client, ("", None))
        if segment is None or known != nonce:
            segment = Segment(nbytes, path)
            segment.close_file()
            if bytes(segment.memory[:_NONCE_NBYTES]).hex() != nonce:
                raise OSError(f"{path} is not the mailbox that was meant")
            self._open[client] = (nonce, segment)
        sizes = (at, payload_nbytes, reply_at, reply_nbytes)
        if min(sizes) < 0 or max(at + payload_nbytes, reply_at + reply_nbytes) > segment.nbytes:
            raise OSError(f"{path}: a payload or a reply outside of the mailbox")
        return (
            segment.tensor(at, (payload_nbytes,), torch.uint8),
            segment.tensor(reply_at, (reply_nbytes,), torch.uint8),
        )

    def close_all_but(self, owners: Sequence[str]) -> None:
        """Let go of the memory of clients whose process, which their name begins with, is gone."""
        alive = set(owners)
        for client in [client for client in self._open if client.partition(".")[0] not in alive]:
            self._open.pop(client, None)
