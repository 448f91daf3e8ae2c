"""Attendance: which workers are here, and where all of them meet. Server 0's is the one that counts for meetings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .rounds import Rounds
from .waits import Monitor

# Texts and meetings that are remembered, for workers whose answer was lost.
_REMEMBERED = 64


class Attendance:
    """Workers and other clients of a server.

    Args:
        monitor: of the server.
        num_workers: ranks that are expected.
        lost_after_s: how long a silent worker is waited for.
    """

    def __init__(self, monitor: Monitor, num_workers: int, lost_after_s: float) -> None:
        self._monitor = monitor
        self._lost_after_s = lost_after_s
        self.rounds = Rounds(num_workers, lost_after_s)
        self._heard: dict[str, float] = {}
        self._ranks: dict[int, str] = {}
        self._meetings: dict[int, set[int]] = {}
        self._texts: dict[int, str] = {}
        self._returned: dict[int, set[int]] = {}

    def hear(self, head: Mapping[str, Any]) -> None:
        """Note that a client is alive; one without an owner only looks, and counts for nothing."""
        if head["owner"] is None:
            return
        self._heard[str(head["owner"])] = time.monotonic()
        if head.get("rank") is not None:
            self.rounds.seen(head["rank"])

    def clients(self) -> list[str]:
        """Return the clients that have been heard of lately."""
        horizon = time.monotonic() - self._lost_after_s
        return [client for client, heard in list(self._heard.items()) if heard >= horizon]

    def take_rank(self, client: str, wanted: int | None) -> int:
        """Return the rank of a new worker: the one it asks for, or the first that nobody alive has."""
        with self._monitor:
            alive = set(self.clients())
            free = (rank for rank in range(len(self._ranks) + 1) if self._ranks.get(rank) not in alive - {client})
            rank = next(free) if wanted is None else wanted
            holder = self._ranks.get(rank)
            if holder in alive - {client}:
                raise ArgumentError(f"create: rank {rank} is another worker that is alive; give each a RANK of its own")
            self._ranks[rank] = client
            return rank

    def forget(self, client: str, rank: int | None) -> None:
        """Let a client go that has said goodbye."""
        with self._monitor:
            self._heard.pop(client, None)
            if rank is not None:
                self.rounds.leave(rank)
                self._ranks.pop(rank, None)
            self._monitor.changed()

    def leave(self, rank: int) -> None:
        """Let a worker push no more; return when every worker has left."""
        with self._monitor:
            self.rounds.leave(rank)
            self._monitor.changed()
            self._monitor.wait_until(
                self.rounds.all_left, lambda: f"ranks {self.rounds.live()}, which have not left yet"
            )

    def meet(self, number: int, rank: int) -> None:
        """Return when every live worker has come to meeting ``number``."""
        with self._monitor:
            here = self._meetings.setdefault(number, set())
            here.add(rank)
            self._meetings.pop(number - _REMEMBERED, None)
            self._monitor.changed()
            self._monitor.wait_until(
                lambda: here >= set(self.rounds.live()),
                lambda: f"ranks {sorted(set(self.rounds.live()) - here)}, which have not come to the barrier yet",
            )

    def tell(self, number: int, text: str | None) -> str:
        """Return text ``number`` to everybody, once rank 0 has given it."""
        with self._monitor:
            if text is not None:
                self._texts.setdefault(number, text)
                self._texts.pop(number - _REMEMBERED, None)
                self._monitor.changed()
            self._monitor.wait_until(lambda: number in self._texts, lambda: "rank 0, which has not told it yet")
            return self._texts[number]
