"""Attendance: which workers are here, and where all of them meet. Server 0's is the one that counts for meetings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .rounds import Rounds
from .waits import Monitor

# How long servers stay for clients that did not say goodbye and may only be busy, and without any.
FORGOTTEN_S = 120.0
# Texts that are remembered, for workers whose answer was lost.
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
        self._num_workers = num_workers
        self._lost_after_s = lost_after_s
        self.rounds = Rounds(num_workers, lost_after_s)
        self._heard: dict[str, float] = {}
        self._ranks: dict[int, str] = {}
        # Who makes or deletes keys, and of each process the number of its last claim that is over.
        self._claimant: tuple[str, int] = ("", 0)
        self._claimed: dict[str, int] = {}
        self._starts: dict[str, tuple[int, int, int]] = {}
        # Of each worker, the last meeting it has come to; and the last one to which all had come.
        self._at: dict[int, int] = {}
        self._met = 0
        self._leaving: set[int] = set()
        self._left = 0
        self._texts: dict[int, str] = {}

    def hear(self, head: Mapping[str, Any]) -> None:
        """Note that a client is alive; one without an owner only looks, and counts for nothing."""
        if head["owner"] is None:
            return
        owner, rank = str(head["owner"]), head.get("rank")
        if rank is not None and (type(rank) is not int or not 0 <= rank < self._num_workers):
            raise ArgumentError(f"a worker's rank is {rank!r}; expected less than {self._num_workers}")
        self._heard[owner] = time.monotonic()
        if rank is not None:
            self._know(rank, owner)
            self.rounds.seen(rank)

    def _know(self, rank: int, owner: str) -> None:
        """Remember who has a rank; a worker that follows one that is gone is expected as that one was."""
        holder = self._ranks.get(rank)
        if holder != owner and holder not in self.clients():
            with self._monitor:
                self._ranks[rank] = owner
                self.rounds.come_back(rank)

    def clients(self, silent_s: float | None = None) -> list[str]:
        """Return the clients that have been heard of lately, or in so many seconds."""
        horizon = time.monotonic() - (self._lost_after_s if silent_s is None else silent_s)
        return [client for client, heard in list(self._heard.items()) if heard >= horizon]

    def take_rank(self, client: str, wanted: int | None) -> tuple[int, tuple[int, int, int]]:
        """Return the rank of a new worker: the one it asks for, or the first that nobody alive has.

        Also how many meetings, texts and leaves are over for it: all that there were, if it follows one that is gone.
        """
        if wanted is not None and (type(wanted) is not int or wanted < 0):
            raise ArgumentError(f"create: rank is {wanted!r}; expected an int of at least 0")
        with self._monitor:
            alive = set(self.clients())
            free = (rank for rank in range(len(self._ranks) + 1) if self._ranks.get(rank) not in alive - {client})
            rank = next(free) if wanted is None else wanted
            holder = self._ranks.get(rank)
            if holder in alive - {client}:
                raise ArgumentError(f"create: rank {rank} is another worker that is alive; give each a RANK of its own")
            over = (self._met, max(self._texts, default=0), self._left) if rank in self._ranks else (0, 0, 0)
            start = self._starts.setdefault(client, over)
            if rank < self._num_workers:
                self._know(rank, client)
            self._ranks[rank] = client
            return rank, start

    def claim(self, owner: str, number: int, *, wants: bool) -> None:
        """Let one process at a time make and delete keys; it numbers its claims."""
        with self._monitor:
            if not wants:
                self._claimed[owner] = max(number, self._claimed.get(owner, 0))
                if self._claimant == (owner, number):
                    self._claimant = ("", 0)
                    self._monitor.changed()
                return
            self._monitor.wait_until(
                lambda: self._claimant[0] in ("", owner) or self._claimant[0] not in self.clients(),
                lambda: "another client, which makes or deletes keys",
            )
            if number > self._claimed.get(owner, 0):
                self._claimant = (owner, number)

    def forget(self, client: str, rank: int | None) -> None:
        """Let a client go that has said goodbye."""
        with self._monitor:
            self._heard.pop(client, None)
            self._starts.pop(client, None)
            if rank is not None:
                self.rounds.end(rank)
                self._leaving.discard(rank)
                # Whoever has it next follows one that is gone.
                self._ranks[rank] = ""
            self._monitor.changed()

    def leave(self, number: int, rank: int) -> None:
        """Let a worker push no more; return when every worker has left for the ``number``th time, and is back."""
        with self._monitor:
            if self._left >= number:
                return
            self.rounds.leave(rank)
            self._leaving.add(rank)
            self._monitor.changed()
            self._monitor.wait_until(
                lambda: self._left >= number or self.rounds.all_left(),
                lambda: f"{self.rounds.describe(self.rounds.live())}, which have not left yet",
            )
            if self._left < number:
                # All at once: whoever goes on first is to wait for the others.
                self._left = number
                for each in self._leaving:
                    self.rounds.come_back(each)
                self._leaving.clear()
                self._monitor.changed()

    def meet(self, number: int, rank: int) -> None:
        """Return when every live worker has come to meeting ``number``."""
        with self._monitor:
            # Who has come to a later one has been to this one, even if the server has begun again since.
            self._at[rank] = max(number, self._at.get(rank, 0))
            self._monitor.changed()
            self._monitor.wait_until(
                lambda: not self._missing(number),
                lambda: f"{self.rounds.describe(self._missing(number))}, which have not come to the barrier yet",
            )
            self._met = max(self._met, number)

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in self.rounds.live() if self._at.get(rank, 0) < number]

    def tell(self, number: int, text: str | None) -> str:
        """Return text ``number`` to everybody, once rank 0 has given it."""
        with self._monitor:
            if text is not None:
                self._texts.setdefault(number, text)
                self._texts.pop(number - _REMEMBERED, None)
                self._monitor.changed()
            self._monitor.wait_until(lambda: number in self._texts, lambda: "rank 0, which has not told it yet")
            return self._texts[number]
