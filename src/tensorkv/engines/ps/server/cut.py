"""Cut: one moment that is the same for several servers, so that no push is before it on one and after it on another.

Whoever takes a snapshot has every server hold new requests (``freeze``), learns which requests have reached some of
the servers they go to, has the others apply those too, and lets each server look and go on (``settle``). This is a
consistent cut in the sense of Chandy and Lamport, "Distributed Snapshots", ACM TOCS 1985, for clients that send one
request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorkv.errors import SnapshotError
from tensorkv.storage.dedup import Clients

from .wait import Monitor

# A freeze whose owner is gone ends by itself.
_LIMIT_S = 10.0


class Cut:
    """What one server knows of a cut under way.

    Args:
        monitor, clients: of the server.
        index: of the server.
        now: a clock in seconds.
    """

    def __init__(
        self, monitor: Monitor, clients: Clients, index: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._monitor, self._clients, self._index, self._now = monitor, clients, index, now
        self._owner: str | None = None
        self._ended: tuple[str, int] = ("", 0)
        self._until = 0.0
        self._admitted: Mapping[str, int] = {}

    def admit(self, client: str, seq: int) -> None:
        """Wait until a new request may be applied."""
        self._monitor.wait_until(lambda: self.admits(client, seq), lambda: "a snapshot that is being taken")

    def admits(self, client: str, seq: int) -> bool:
        """Tell whether a request may be applied now."""
        return not self._is_frozen() or seq <= self._admitted.get(client, 0)

    def freeze(self, owner: str, seq: int, alive: Sequence[str]) -> dict[str, Any]:
        """Hold new requests; return each client's last request to several servers, and which.

        Args:
            owner: the client that freezes.
            seq: of its request.
            alive: processes whose requests may still be on their way to other servers.
        """
        self._monitor.wait_until(
            lambda: not self._is_frozen() or self._owner == owner, lambda: "another snapshot that is being taken"
        )
        if self._ended[0] == owner and self._ended[1] >= seq:
            raise SnapshotError("snapshot: a request that comes late; this one is over")
        if not self._is_frozen():
            self._owner, self._until, self._admitted = owner, self._now() + _LIMIT_S, {}
        processes = set(alive)
        return {
            client: list(last) for client, last in self._clients.fans.items() if client.partition(".")[0] in processes
        }

    def settle(self, owner: str, seq: int, wanted: Mapping[str, Sequence[Any]], look: Callable[[], Any]) -> Any:
        """Have the requests applied that others have applied, then look, and go on.

        Args:
            owner: of the freeze.
            seq: of its request.
            wanted: by client, the number of its last request and the servers to which it goes.
            look: called when this server has applied what it should have.

        Raises:
            SnapshotError: the freeze has ended in the meantime.
        """
        mine = {client: number for client, (number, fan) in wanted.items() if self._index in fan}
        self._check_frozen(owner)
        self._admitted = mine
        self._monitor.changed()
        self._monitor.wait_until(
            lambda: all(self._clients.has_applied(client, seq) for client, seq in mine.items()),
            lambda: f"requests of {len(mine)} workers that are on their way",
        )
        # It may have ended while this waited.
        self._check_frozen(owner)
        found = look()
        self.thaw(owner, seq)
        return found

    def thaw(self, owner: str, seq: int) -> None:
        """Go on."""
        if self._owner == owner:
            self._owner, self._ended = None, (owner, seq)
            self._monitor.changed()

    def _check_frozen(self, owner: str) -> None:
        if not self._is_frozen() or self._owner != owner:
            raise SnapshotError("snapshot: it took too long, and the servers went on; take another")

    def _is_frozen(self) -> bool:
        return self._owner is not None and self._now() < self._until
