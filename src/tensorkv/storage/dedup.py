"""Dedup table: which request of each client was applied last, so that one that is sent again is not applied twice."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import StorageError, TensorKVError
from tensorkv.shard.changes import RequestIds


def process_of(client: str) -> str:
    """Return the process of a client, with which its name begins.

    >>> process_of("3f2a.1")
    '3f2a'
    """
    return client.partition(".")[0]


class AppliedRequests:
    """The last applied request of each client.

    A client numbers its requests from 1 and sends one at a time: the next one when the last is answered. A request asks
    for one change of a shard. A request id is a pair of client and number, or these and a dict of plain data; a log has
    it with the change, and it is counted again when the log is replayed.

    >>> applied = AppliedRequests()
    >>> applied.add([("worker-a", 1)])
    >>> applied.has_applied("worker-a", 1), applied.has_applied("worker-a", 2)
    (True, False)
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.fans: dict[str, tuple[int, list[int]]] = {}
        """Of each client, the number of its last request that went to several servers, and to which."""
        self.refused: dict[str, tuple[int, TensorKVError]] = {}
        """Of each client, the number of its last request that was refused, and why; of this process alone."""

    def forget(self, processes: Container[str]) -> None:
        """Forget the requests of processes that send no more."""
        tables: list[dict[str, Any]] = [self.last, self.fans, self.refused]
        for table in tables:
            for client in [each for each in table if process_of(each) in processes]:
                del table[client]

    def forget_keys(self, keys: Iterable[Key]) -> None:
        """Forget how often keys that are gone were pushed; this class counts no pushes."""

    def has_applied(self, client: str, seq: int) -> bool:
        """Return whether a request has been applied."""
        return seq <= self.last.get(client, 0)

    def has_ended(self, client: str, seq: int) -> bool:
        """Return whether a request has been applied or refused, so that nobody waits for it."""
        return self.has_applied(client, seq) or self.refusal(client, seq) is not None

    def refusal(self, client: str, seq: int) -> TensorKVError | None:
        """Return why a request was refused, or one after it, so that a late copy of it is not applied."""
        number, error = self.refused.get(client, (0, None))
        return error if seq <= number else None

    def add(self, requests: RequestIds, keys: Sequence[Key] = ()) -> None:
        """Count requests as applied, each once; an earlier one that arrives late does not undo a later one.

        Args:
            requests: that one change has answered.
            keys: whose values the change has updated.
        """
        for client, seq, *words in requests:
            if not self.has_applied(client, seq):
                self.last[client] = seq
                self._count(client, seq, words[0] if words else {}, keys)

    def replay(self, requests: Any, keys: Sequence[Key]) -> None:
        """Count the requests of a record of a log.

        Raises:
            StorageError: malformed request ids.
        """
        for client, seq, *words in requests:
            if type(client) is not str or type(seq) is not int or not all(isinstance(each, dict) for each in words):
                raise StorageError(f"malformed request id: client {client!r}, number {seq!r}")
        self.add(requests, keys)

    def _count(self, client: str, seq: int, words: Mapping[str, Any], keys: Sequence[Key]) -> None:
        if words.get("fan"):
            self.fans[client] = (seq, words["fan"])

    # ------------------------------------------------------------ in a log and a snapshot

    def apply(self, events: Sequence[Any]) -> None:
        """Take over events that change other tables; this class has none."""

    def describe(self) -> dict[str, Any]:
        """Return everything but ``last``, as plain data."""
        return {"fans": self.fans} if self.fans else {}

    def restore(self, last: Mapping[Any, Any], described: Mapping[str, Any]) -> None:
        """Replace everything by what a snapshot contains.

        Raises:
            StorageError: malformed.
        """
        self.last.clear()
        self.replay(list(last.items()), ())
        self.fans = {client: (seq, fan) for client, (seq, fan) in described.get("fans", {}).items()}
