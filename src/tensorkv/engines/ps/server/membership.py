"""Attendance: which workers are here, and where all of them meet. Server 0's is the one that counts for meetings.

What it decides is an event of ``Memory``; who has been heard of, and when, is known here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from tensorkv.errors import ArgumentError, StorageError, StoreClosedError

from .memory import Memory, Start
from .wait import Monitor

# How long servers stay for clients that did not say goodbye and may only be busy, and without any.
FORGOTTEN_S = 120.0


class Attendance:
    """Workers and other clients of a server.

    Args:
        monitor: of the server.
        memory: of the server.
        remember: makes events happen in the memory, and logs them first.
        num_workers: ranks that are expected.
        lost_after_s: how long a silent worker is waited for.
        now: a clock in seconds.
    """

    def __init__(
        self,
        monitor: Monitor,
        memory: Memory,
        remember: Callable[..., None],
        num_workers: int,
        lost_after_s: float,
        now: Callable[[], float],
    ) -> None:
        self._monitor, self._memory, self._remember = monitor, memory, remember
        self._num_workers = num_workers
        self._lost_after_s = lost_after_s
        self._now = now
        self.rounds = memory.rounds
        self._heard: dict[str, float] = {}
        # Who wants a rank that another may still have, and since when.
        self._asked: dict[str, float] = {}
        # Of each worker, the last meeting it has come to. Whoever waits there asks again.
        self._at: dict[int, int] = {}

    def begin_again(self) -> None:
        """Go on after a restart: those who were here are waited for as if they had been heard of just now."""
        memory, now = self._memory, self._now()
        self._heard = dict.fromkeys(memory.members, now)
        for rank, holder in memory.holders.items():
            if rank >= self._num_workers:
                continue
            if holder in memory.members:
                self.rounds.seen(rank)
            elif holder:
                self.rounds.lose(rank)

    def hear(self, head: Mapping[str, Any]) -> None:
        """Note that a client is alive; one without an owner only looks, and counts for nothing."""
        if head["owner"] is None:
            return
        owner, rank, memory = str(head["owner"]), head.get("rank"), self._memory
        if rank is not None and (type(rank) is not int or not 0 <= rank < self._num_workers):
            raise ArgumentError(f"a worker's rank is {rank!r}; expected less than {self._num_workers}")
        if owner in memory.gone or self.is_closed_to(owner):
            raise StoreClosedError("a message that was late, to a store that its client, or everybody, has closed")
        self._heard[owner] = self._now()
        if owner not in memory.members or (rank is not None and memory.members[owner] != rank):
            self._know(owner, rank)
        if rank is not None and memory.holders.get(rank) == owner and self.rounds.seen(rank):
            # With a disk that takes nothing it stays lost, and tries again with its next request.
            with self._monitor, suppress(StorageError):
                self._remember(["base", rank, self.rounds.base_of(rank)])
                self.rounds.find(rank)

    def _know(self, owner: str, rank: int | None) -> None:
        """Remember a client, and who has a rank, as far as the disk takes it."""
        memory = self._memory
        with self._monitor, suppress(StorageError):
            if owner not in memory.members:
                self._remember(["member", owner])
            holder = memory.holders.get(rank) if rank is not None else None
            if rank is not None and (holder == owner or holder not in self.clients()):
                self._take(rank, owner, memory.starts.get(owner, (0, 0, 0)))

    def _take(self, rank: int, owner: str, start: Start) -> None:
        """Give a rank to a worker; one that follows another begins where the slowest is, and is expected."""
        before = self._memory.holders.get(rank)
        follows = before is not None and before != owner and rank < self._num_workers
        self._remember(["rank", rank, owner, list(start), self.rounds.slowest_but(rank) if follows else None])

    def clients(self, silent_s: float | None = None) -> list[str]:
        """Return the clients that have been heard of lately, or in so many seconds."""
        horizon = self._now() - (self._lost_after_s if silent_s is None else silent_s)
        return [client for client, heard in list(self._heard.items()) if heard >= horizon]

    def take_rank(self, client: str, wanted: int | None) -> tuple[int, Start]:
        """Return the rank of a new worker: the one it asks for, or the first that nobody alive has.

        Also how many meetings, texts and leaves are over for it: all that there were, if it follows one that is gone.
        """
        if wanted is not None and (type(wanted) is not int or wanted < 0):
            raise ArgumentError(f"create: rank is {wanted!r}; expected an int of at least 0")
        memory = self._memory
        with self._monitor:
            alive = set(self.clients())
            holders = memory.holders
            mine = memory.members.get(client)
            free = (rank for rank in range(len(holders) + 1) if holders.get(rank) not in alive - {client})
            rank = wanted if wanted is not None else next(free) if mine is None else mine
            holder = holders.get(rank)
            if holder is not None and holder in alive - {client}:
                # One that was killed just now counts as alive until it has been silent for long enough.
                since = self._asked.setdefault(client, self._now())
                self._monitor.wait_until(
                    lambda: holder not in self.clients() or self._heard[holder] > since,
                    lambda: f"rank {rank}, whose last worker may have ended",
                )
                del self._asked[client]
            if holders.get(rank) in set(self.clients()) - {client}:
                raise ArgumentError(f"create: rank {rank} is another worker that is alive; give each a RANK of its own")
            start = memory.starts.get(client, memory.over if rank in holders else (0, 0, 0))
            if memory.members.get(client) != rank or holders.get(rank) != client:
                self._take(rank, client, start)
            if rank < self._num_workers:
                self.rounds.seen(rank)
                self.rounds.find(rank)
            return rank, start

    def is_closed_to(self, owner: str) -> bool:
        """Tell whether the last client has closed the store, and this is another."""
        return self._memory.is_ending and owner not in self._memory.members

    def claim(self, owner: str, number: int, *, wants: bool) -> None:
        """Let one process at a time make and delete keys; it numbers its claims."""
        memory = self._memory
        with self._monitor:
            if not wants:
                self._remember(["unclaim", owner, number])
                self._monitor.changed()
                return
            self._monitor.wait_until(
                lambda: memory.claimant[0] in ("", owner) or memory.claimant[0] not in self.clients(),
                lambda: "another client, which makes or deletes keys",
            )
            if number > memory.claimed.get(owner, 0) and memory.claimant != (owner, number):
                self._remember(["claim", owner, number])

    def forget(self, client: str) -> None:
        """Let a client go that has said goodbye."""
        with self._monitor:
            self._heard.pop(client, None)
            if client in self._memory.members:
                with suppress(StorageError):
                    self._remember(["bye", client])
            self._monitor.changed()

    def forget_the_silent(self) -> None:
        """Let clients go that nobody has heard of for very long."""
        if len(self._heard) == len(self.clients(FORGOTTEN_S)):
            return
        with self._monitor, suppress(StorageError):
            for client in set(self._heard) - set(self.clients(FORGOTTEN_S)):
                self._remember(["gone", client])
                del self._heard[client]

    def count(self) -> tuple[int, int]:
        """Return how many clients have been heard of lately, and how many are silent and may only be busy."""
        here = len(self.clients())
        return here, max(0, len(self.clients(FORGOTTEN_S)) - here)

    def may_end(self) -> bool:
        """Tell whether no client is left, not even a silent one; from then on nobody is let in."""
        with self._monitor:
            if not self._memory.is_ending and not self.clients(FORGOTTEN_S):
                self._remember(["ending"])
            return self._memory.is_ending

    def leave(self, number: int, rank: int) -> None:
        """Let a worker push no more; return when every worker has left for the ``number``th time, and is back."""
        memory, rounds = self._memory, self.rounds
        with self._monitor:
            if memory.left >= number:
                return
            if rank not in memory.leaving:
                self._remember(["leave", rank])
                self._monitor.changed()
            self._monitor.wait_until(
                lambda: memory.left >= number or rounds.all_left(),
                lambda: f"{rounds.describe(rounds.live())}, which have not left yet",
            )
            if memory.left < number:
                self._remember(["all_left", number])
                self._monitor.changed()

    def meet(self, number: int, rank: int) -> None:
        """Return when every live worker has come to meeting ``number``."""
        memory = self._memory
        with self._monitor:
            # Who has come to a later one has been to this one.
            self._at[rank] = max(number, self._at.get(rank, 0))
            self._monitor.changed()
            self._monitor.wait_until(
                lambda: memory.met >= number or not self._missing(number),
                lambda: f"{self.rounds.describe(self._missing(number))}, which have not come to the barrier yet",
            )
            if memory.met < number:
                self._remember(["met", number])

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in self.rounds.live() if self._at.get(rank, 0) < number]

    def tell(self, number: int, text: str | None) -> str:
        """Return text ``number`` to everybody, once rank 0 has given it."""
        texts = self._memory.texts
        with self._monitor:
            if text is not None and number not in texts:
                self._remember(["text", number, text])
                self._monitor.changed()
            self._monitor.wait_until(lambda: number in self._memory.texts, lambda: "rank 0, which has not told it yet")
            return self._memory.texts[number]
