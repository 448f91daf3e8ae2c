"""Clients: which request of each client was applied last, so that one that comes again is not applied twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import StorageError

# Threads answer requests side by side; each sees its own.
_running: ContextVar[tuple[Clients | None, Sequence[Any]]] = ContextVar("_running", default=(None, ()))


class Clients:
    """The last applied request of each client.

    A client numbers its requests from 1 and sends one at a time: the next when the last is answered. What a
    request asks for is one change of a shard: one call of ``init``, ``push``, ``pushpull``, ``delete`` and so on.
    Requests of several clients may be answered by several threads; the same request by one at a time.

    A request is a pair of client and number, or these and a dict of plain data. A durable shard logs it with the
    change, and counts it again when it reads its log.

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
        self.fans: dict[str, tuple[int, list[int]]] = {}
        """Of each client, the number of its last request that went to several servers, and to which."""

    @property
    def current(self) -> Sequence[Any]:
        """The requests that are being applied here."""
        owner, requests = _running.get()
        return requests if owner is self else ()

    def has_applied(self, client: str, seq: int) -> bool:
        """Tell whether a request has been applied."""
        return seq <= self.last.get(client, 0)

    @contextmanager
    def request(
        self, client: str, seq: int, words: Mapping[str, Any] | None = None, keys: Sequence[Key] = ()
    ) -> Iterator[bool]:
        """Give whether a request is new; it counts as applied when the block ends without an error."""
        if self.has_applied(client, seq):
            yield False
            return
        with self.together([(client, seq, dict(words)) if words else (client, seq)], keys):
            yield True

    @contextmanager
    def together(self, requests: Sequence[Any], keys: Sequence[Key] = ()) -> Iterator[None]:
        """Apply several requests in one change of some keys; they count when the block ends without an error."""
        token = _running.set((self, requests))
        try:
            yield
            self.done(requests, keys)
        finally:
            _running.reset(token)

    def done(self, requests: Sequence[Any], keys: Sequence[Key] = ()) -> None:
        """Count requests as applied, each once; one that comes late does not undo the count of a later one."""
        for client, seq, *words in requests:
            if not self.has_applied(client, seq):
                self.last[client] = seq
                self._count(client, seq, words[0] if words else {}, keys)

    def replay(self, requests: Any, keys: Sequence[Key]) -> None:
        """Count the requests of a record of a log.

        Raises:
            StorageError: they are none.
        """
        for client, seq, *words in requests:
            if type(client) is not str or type(seq) is not int or not all(isinstance(each, dict) for each in words):
                raise StorageError(f"a client {client!r} with request {seq!r}")
        self.done(requests, keys)

    def _count(self, client: str, seq: int, words: Mapping[str, Any], keys: Sequence[Key]) -> None:
        if words.get("fan"):
            self.fans[client] = (seq, words["fan"])

    # ------------------------------------------------------------ in a log and a snapshot

    def apply(self, events: Sequence[Any]) -> None:
        """Take over what has changed besides; there is nothing here that could."""

    def describe(self) -> dict[str, Any]:
        """Return everything but ``last``, as plain data."""
        return {"fans": self.fans} if self.fans else {}

    def restore(self, last: Mapping[Any, Any], described: Mapping[str, Any]) -> None:
        """Become what a snapshot holds; nothing but that.

        Raises:
            StorageError: no clients.
        """
        self.last.clear()
        self.replay(list(last.items()), ())
        self.fans = {client: (seq, fan) for client, (seq, fan) in described.get("fans", {}).items()}
