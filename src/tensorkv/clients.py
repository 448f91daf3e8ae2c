"""Clients: which request of each client was applied last, so that one that comes again is not applied twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

# Threads answer requests side by side; each sees its own.
_running: ContextVar[tuple[Clients | None, Sequence[tuple[str, int]]]] = ContextVar("_running", default=(None, ()))


class Clients:
    """The last applied request of each client.

    A client numbers its requests from 1 and sends one at a time: the next when the last is answered. What a
    request asks for is one change of a shard: one call of ``init``, ``push``, ``pushpull``, ``delete`` and so on.
    Requests of several clients may be answered by several threads; the same request by one at a time.

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

    @property
    def current(self) -> Sequence[tuple[str, int]]:
        """Clients and numbers of the requests that are being applied here."""
        owner, requests = _running.get()
        return requests if owner is self else ()

    def has_applied(self, client: str, seq: int) -> bool:
        """Tell whether a request has been applied."""
        return seq <= self.last.get(client, 0)

    @contextmanager
    def request(self, client: str, seq: int) -> Iterator[bool]:
        """Give whether a request is new; it counts as applied when the block ends without an error."""
        if self.has_applied(client, seq):
            yield False
            return
        with self.together([(client, seq)]):
            yield True

    @contextmanager
    def together(self, requests: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Apply several requests in one change; they count when the block ends without an error."""
        token = _running.set((self, requests))
        try:
            yield
            self.done(requests)
        finally:
            _running.reset(token)

    def done(self, requests: Sequence[tuple[str, int]]) -> None:
        """Count requests as applied; one that comes late does not undo the count of a later one."""
        for client, seq in requests:
            self.last[client] = max(seq, self.last.get(client, 0))
