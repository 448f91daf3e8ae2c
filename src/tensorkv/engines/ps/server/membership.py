"""Membership: which clients use a server, which worker has which rank, and the calls that all workers make together.

Server 0 decides for the whole store. What is decided is an event of ``ServerTables``; heartbeats are known here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from tensorkv.errors import ArgumentError, StorageError, StoreClosedError

from ..messages import Sender
from .tables import CollectiveCounts, ServerTables
from .wait import Condition

# How long servers run for clients that did not disconnect and may only be busy, and without any client.
IDLE_TIMEOUT_S = 120.0


class Membership:
    """Workers and other clients of a server.

    Args:
        condition: of the server.
        tables: of the server.
        record: logs events and applies them to the tables.
        num_workers: ranks that are expected.
        heartbeat_timeout_s: a client that has not been heard of for so long is dead.
        now: a clock in seconds.
    """

    def __init__(
        self,
        condition: Condition,
        tables: ServerTables,
        record: Callable[..., None],
        num_workers: int,
        heartbeat_timeout_s: float,
        now: Callable[[], float],
    ) -> None:
        self._condition, self._tables, self._record = condition, tables, record
        self._num_workers = num_workers
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._now = now
        self.staleness = tables.staleness
        self._last_seen: dict[str, float] = {}
        # Which clients want a rank whose worker may still be alive, and since when.
        self._wants_rank_since: dict[str, float] = {}
        # Of each worker, the last barrier that it has reached. After a restart of the server, workers ask again.
        self._barrier_of: dict[int, int] = {}

    # ------------------------------------------------------------ who is alive

    def recover(self) -> None:
        """Continue after a restart: give every known client a heartbeat timeout to send its next message."""
        tables, now = self._tables, self._now()
        self._last_seen = dict.fromkeys(tables.members, now)
        for rank, holder in tables.holders.items():
            if rank >= self._num_workers:
                continue
            if holder in tables.members:
                self.staleness.heartbeat(rank)
            elif holder:
                self.staleness.mark_dead(rank)

    def heartbeat(self, sender: Sender) -> None:
        """Note that the sender of a request is alive; an observer has no owner and counts for nothing."""
        owner, rank, tables = sender.owner, sender.rank, self._tables
        if rank is not None and not 0 <= rank < self._num_workers:
            raise ArgumentError(f"invalid rank {rank!r}; expected an int below num_workers={self._num_workers}")
        if owner is None:
            return
        if owner in tables.disconnected or self.is_closed_to(owner):
            raise StoreClosedError("late message to a store that its client, or the last client, has closed")
        self._last_seen[owner] = self._now()
        if owner not in tables.members or (rank is not None and tables.members.get(owner) != rank):
            self._add_member(owner, rank)
        if rank is not None and tables.holders.get(rank) == owner and self.staleness.heartbeat(rank):
            # While the disk takes no writes the worker stays dead, and its next message tries again.
            with self._condition, suppress(StorageError):
                self._record(["base", rank, self.staleness.base_for_revival(rank)])
                self.staleness.revive(rank)

    def _add_member(self, owner: str, rank: int | None) -> None:
        """Record a client, and the rank that it has, as far as the disk takes it."""
        tables = self._tables
        with self._condition, suppress(StorageError):
            if owner not in tables.members:
                self._record(["member", owner])
            holder = tables.holders.get(rank) if rank is not None else None
            if rank is not None and (holder == owner or holder not in self.clients()):
                self._assign_rank(rank, owner, tables.starts.get(owner, (0, 0, 0)))

    def clients(self, within_s: float | None = None) -> list[str]:
        """Return the clients heard of within the heartbeat timeout, or within so many seconds."""
        horizon = self._now() - (self._heartbeat_timeout_s if within_s is None else within_s)
        return [client for client, seen in list(self._last_seen.items()) if seen >= horizon]

    def count(self) -> tuple[int, int]:
        """Return how many clients are alive, and how many are dead for less than the idle timeout."""
        alive = len(self.clients())
        return alive, max(0, len(self.clients(IDLE_TIMEOUT_S)) - alive)

    def disconnect(self, client: str) -> None:
        """Remove a client that closes the store."""
        with self._condition:
            self._last_seen.pop(client, None)
            if client in self._tables.members:
                with suppress(StorageError):
                    self._record(["bye", client])
            self._condition.notify_all()

    def mark_dead(self, client: str) -> None:
        """Count a client as dead now: its process has ended without disconnecting."""
        with self._condition:
            if client not in self._last_seen:
                return
            self._last_seen[client] = math.nextafter(self._now() - self._heartbeat_timeout_s, -math.inf)
            rank = self._tables.members.get(client)
            if rank is not None and rank < self._num_workers and self._tables.holders.get(rank) == client:
                self.staleness.mark_dead(rank)
            self._condition.notify_all()

    def remove_idle(self) -> None:
        """Remove clients that have not been heard of for the idle timeout."""
        if len(self._last_seen) == len(self.clients(IDLE_TIMEOUT_S)):
            return
        with self._condition, suppress(StorageError):
            for client in set(self._last_seen) - set(self.clients(IDLE_TIMEOUT_S)):
                self._record(["gone", client])
                del self._last_seen[client]

    def end_if_unused(self) -> None:
        """End the store, and accept no client from then on, if no client is left, not even a dead one."""
        with self._condition:
            if not self._tables.is_ending and not self.clients(IDLE_TIMEOUT_S):
                self._record(["ending"])

    def is_closed_to(self, owner: str | None) -> bool:
        """Return whether the store is ending and this client was not part of it."""
        return self._tables.is_ending and owner not in self._tables.members

    # ------------------------------------------------------------ ranks

    def take_rank(self, client: str, wanted: int | None, *, is_reader: bool = False) -> tuple[int, CollectiveCounts]:
        """Return the rank of a new worker, and how many collective calls are completed for it.

        Args:
            client: that wants a rank.
            wanted: the rank (None: the first that no live worker has).
            is_reader: whether the first is one that no worker may have.

        Returns:
            The rank and the counts: all that there were, if the worker replaces a dead one.
        """
        if wanted is not None and wanted < 0:
            raise ArgumentError(f"create: invalid rank {wanted!r}; expected an int of at least 0")
        tables = self._tables
        with self._condition:
            others = set(self.clients()) - {client}
            holders = tables.holders
            mine = tables.members.get(client)
            first = self._num_workers if is_reader else 0
            free = (rank for rank in range(first, first + len(holders) + 1) if holders.get(rank) not in others)
            rank = wanted if wanted is not None else next(free) if mine is None else mine
            holder = holders.get(rank)
            if holder is not None and holder in others:
                # A worker that was killed just now counts as alive until its heartbeat timeout.
                since = self._wants_rank_since.setdefault(client, self._now())
                self._condition.wait_for(
                    lambda: holder not in self.clients() or self._last_seen[holder] > since,
                    lambda: f"rank {rank}, whose last worker may have ended",
                )
                del self._wants_rank_since[client]
            if holders.get(rank) in set(self.clients()) - {client}:
                raise ArgumentError(
                    f"create: rank {rank} is taken by a live worker; give each worker a RANK of its own"
                )
            start = tables.starts.get(client, tables.completed if rank in holders else (0, 0, 0))
            if tables.members.get(client) != rank or holders.get(rank) != client:
                self._assign_rank(rank, client, start)
            if rank < self._num_workers:
                self.staleness.heartbeat(rank)
                self.staleness.revive(rank)
            return rank, start

    def _assign_rank(self, rank: int, owner: str, start: CollectiveCounts) -> None:
        """Give a rank to a worker; a replacement begins at the round of the slowest worker."""
        before = self._tables.holders.get(rank)
        replaces = before is not None and before != owner and rank < self._num_workers
        base = self.staleness.slowest_but(rank) if replaces else None
        self._record(["rank", rank, owner, list(start), base])

    # ------------------------------------------------------------ calls of all workers

    def claim(self, owner: str, number: int) -> None:
        """Let one client at a time create and delete keys; each client numbers its claims."""
        tables = self._tables
        with self._condition:
            self._condition.wait_for(
                lambda: tables.claimant[0] in ("", owner) or tables.claimant[0] not in self.clients(),
                lambda: "another client that creates or deletes keys",
            )
            if number > tables.claimed.get(owner, 0) and tables.claimant != (owner, number):
                self._record(["claim", owner, number])

    def unclaim(self, owner: str, number: int) -> None:
        """Let other clients create and delete keys again."""
        with self._condition:
            self._record(["unclaim", owner, number])
            self._condition.notify_all()

    def leave(self, number: int, rank: int) -> None:
        """Count a worker as left; return when all have left for the ``number``th time, and are waited for again."""
        tables, staleness = self._tables, self.staleness
        with self._condition:
            if tables.leaves >= number:
                return
            if rank not in tables.leaving:
                self._record(["leave", rank])
                self._condition.notify_all()
            self._condition.wait_for(
                lambda: tables.leaves >= number or staleness.all_left(),
                lambda: f"{staleness.describe(staleness.live())}, which have not left yet",
            )
            if tables.leaves < number:
                self._record(["all_left", number])
                self._condition.notify_all()

    def barrier(self, number: int, rank: int) -> None:
        """Return when every live worker has reached barrier ``number``."""
        tables = self._tables
        with self._condition:
            # A worker that has reached a later barrier has passed this one.
            self._barrier_of[rank] = max(number, self._barrier_of.get(rank, 0))
            self._condition.notify_all()
            self._condition.wait_for(
                lambda: tables.barriers >= number or not self._missing(number),
                lambda: f"{self.staleness.describe(self._missing(number))}, which have not reached the barrier yet",
            )
            if tables.barriers < number:
                self._record(["met", number])

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in self.staleness.live() if self._barrier_of.get(rank, 0) < number]

    def count_rules(self, number: int, name: str | None) -> None:
        """Note how often rank 0 has set the rule, and its optimizer (None: assignment)."""
        with self._condition:
            if number > self._tables.rules[0]:
                self._record(["rules", number, name])
                self._condition.notify_all()

    def wait_for_rule(self, number: int) -> tuple[int, str | None]:
        """Return, when rank 0 has set the rule so often, what ``count_rules`` has noted last."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._tables.rules[0] >= number,
                lambda: f"rank 0, which has not set update rule number {number} yet, but {self._tables.rules[0]}",
            )
            return self._tables.rules

    def broadcast(self, number: int, text: str | None) -> str:
        """Return text ``number`` to every worker, once rank 0 has sent it; the others send None."""
        texts = self._tables.texts
        with self._condition:
            if text is not None and number not in texts:
                self._record(["text", number, text])
                self._condition.notify_all()
            self._condition.wait_for(
                lambda: number in self._tables.texts, lambda: "rank 0, which has not sent its text yet"
            )
            return self._tables.texts[number]
