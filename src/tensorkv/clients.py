"""Clients: which request of each client was applied last, so that one that comes again is not applied twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Clients:
    """The last applied request of each client.

    A client numbers its requests from 1 and sends one at a time: the next when the last is answered.

    >>> clients = Clients()
    >>> with clients.request("worker-a", 1) as is_new:
    ...     is_new
    True
    >>> with clients.request("worker-a", 1) as is_new:
    ...     is_new
    False
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.current: tuple[str, int] | None = None
        """Client and number of the request that is being applied."""

    @contextmanager
    def request(self, client: str, seq: int) -> Iterator[bool]:
        """Give whether a request is new; it counts as applied when the block ends without an error."""
        if seq <= self.last.get(client, 0):
            yield False
            return
        self.current = (client, seq)
        try:
            yield True
            self.done()
        finally:
            self.current = None

    def done(self) -> None:
        """Count the current request as applied."""
        if self.current is not None:
            client, seq = self.current
            self.last[client] = seq
