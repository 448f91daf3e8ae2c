"""The tables of a server that survive its restart. Each change of them is an event, logged before it is applied.

A server that is restarted replays its log and has the same tables, so what it has promised holds: its clients and
their ranks, the round of each worker, what rank 0 has broadcast, and which collective calls are completed. There is no
clock and no lock in here: heartbeats are in ``Membership``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import StorageError
from tensorkv.storage.dedup import AppliedRequests, process_of

from .staleness import StalenessClock

# Broadcasts that are kept, for workers that ask later or whose reply was lost.
_KEPT_TEXTS = 64
# Clients that have disconnected, whose late messages are refused, and that were idle for too long, whose requests are
# still applied once if they come back. At most twice as many are kept.
_KEPT_CLIENTS = 1024
# Lists of keys whose rounds are counted.
_KEPT_LISTS = 10_000

CollectiveCounts = tuple[int, int, int]
"""How many barriers, broadcasts and leaves are completed."""


class ServerTables(AppliedRequests):
    """The tables of one server, beside its dedup table.

    Args:
        staleness: of the workers.

    >>> tables = ServerTables(StalenessClock(2, heartbeat_timeout_s=5))
    >>> tables.apply([["member", "a"], ["rank", 1, "a", [0, 0, 0], 0]])
    >>> tables.members, tables.holders
    ({'a': 1}, {1: 'a'})
    >>> tables.apply([["bye", "a"]])
    >>> tables.members, tables.holders
    ({}, {1: ''})
    """

    def __init__(self, staleness: StalenessClock) -> None:
        super().__init__()
        self.staleness = staleness
        self.members: dict[str, int | None] = {}
        """The clients of this server, and their ranks."""
        self.disconnected: dict[str, None] = {}
        self.idle: dict[str, None] = {}
        """Clients that were idle for too long, or used the folder before, and may come back."""
        self.holders: dict[int, str] = {}
        """The client that has, or had last, each rank; "" if that client has disconnected."""
        self.starts: dict[str, CollectiveCounts] = {}
        """What was completed when each worker connected."""
        self.barriers = 0
        self.leaves = 0
        self.leaving: set[int] = set()
        self.texts: dict[int, str] = {}
        self.rules: tuple[int, str | None] = (0, None)
        """How often rank 0 has set the rule, and the name of its last optimizer (None: assignment)."""
        self.claimant: tuple[str, int] = ("", 0)
        """The client that creates or deletes keys, and the number of its claim."""
        self.claimed: dict[str, int] = {}
        """Of each client, the number of its last claim that it has given back."""
        self.is_ending = False
        self.lists: dict[str, int] = {}
        """Of each list of keys that is pushed in rounds, the last round that is closed."""

    @property
    def completed(self) -> CollectiveCounts:
        """How many barriers, broadcasts and leaves are completed."""
        return (self.barriers, max(self.texts, default=0), self.leaves)

    def apply(self, events: Sequence[Any]) -> None:
        """Apply events, in order.

        Raises:
            StorageError: an event that no server writes.
        """
        for name, *arguments in events:
            method = getattr(self, f"_on_{name}", None)
            if method is None:
                raise StorageError(f"unknown event {name!r}; it may be of a newer version of tensorkv")
            method(*arguments)

    def _count(self, client: str, seq: int, words: Mapping[str, Any], keys: Sequence[Key]) -> None:
        super()._count(client, seq, words, keys)
        if words.get("rank") is not None:
            self.staleness.count_push(words["rank"], keys)
        if words.get("step"):
            name, number = words["step"]
            # The list that was pushed last goes to the end; the one that was not pushed for longest is dropped.
            self.lists[name] = max(number, self.lists.pop(name, 0))
            if len(self.lists) > _KEPT_LISTS:
                del self.lists[next(iter(self.lists))]

    # ------------------------------------------------------------ events, by the names that logs have for them

    def _on_new(self) -> None:
        """Begin a store; the clients that used the folder before are none of it."""
        self.forget(self.disconnected)
        self.restore(dict(self.last), {"idle": dict.fromkeys(map(process_of, self.last))})
        self._forget_oldest(self.idle)

    def _on_member(self, owner: str) -> None:
        self.members.setdefault(owner, None)
        self.idle.pop(owner, None)

    def _on_rank(self, rank: int, owner: str, start: Sequence[int], base: int | None) -> None:
        """Give a rank to a worker; with a base, its rounds begin there."""
        for other in [each for each, held in self.members.items() if held == rank and each != owner]:
            self.members[other] = None
        self.members[owner], self.holders[rank] = rank, owner
        self.idle.pop(owner, None)
        self.starts.setdefault(owner, (start[0], start[1], start[2]))
        if base is not None:
            self.leaving.discard(rank)
            self.staleness.start(rank, base)

    def _on_base(self, rank: int, base: int) -> None:
        self.staleness.set_base(rank, base)

    def _on_gone(self, owner: str) -> None:
        """Remove a client that was idle for too long."""
        self._remove(owner)
        self.idle[owner] = None
        self._forget_oldest(self.idle)

    def _on_bye(self, owner: str) -> None:
        """Remove a client that has disconnected."""
        rank = self.members.get(owner)
        if rank is not None:
            self.staleness.disconnect(rank)
            self.leaving.discard(rank)
            # The next worker of this rank replaces one that has ended.
            self.holders[rank] = ""
        self._remove(owner)
        self.disconnected[owner] = None
        self._forget_oldest(self.disconnected)

    def _remove(self, owner: str) -> None:
        self.members.pop(owner, None)
        self.starts.pop(owner, None)
        self.claimed.pop(owner, None)

    def _forget_oldest(self, ended: dict[str, None]) -> None:
        """Forget clients that have ended long ago; many at once, since that looks at every client."""
        if len(ended) > 2 * _KEPT_CLIENTS:
            oldest = dict.fromkeys(list(ended)[:-_KEPT_CLIENTS])
            self.forget(oldest)
            for owner in oldest:
                del ended[owner]

    def forget_keys(self, keys: Iterable[Key]) -> None:
        """Forget how often keys that are gone were pushed."""
        self.staleness.forget_keys(keys)

    def _on_leave(self, rank: int) -> None:
        self.staleness.leave(rank)
        self.leaving.add(rank)

    def _on_all_left(self, number: int) -> None:
        """Wait for all workers again, at once: the first to continue has to wait for the others."""
        self.leaves = max(self.leaves, number)
        self.staleness.start_all(sorted(self.leaving))
        self.leaving.clear()

    def _on_met(self, number: int) -> None:
        self.barriers = max(self.barriers, number)

    def _on_text(self, number: int, text: str) -> None:
        self.texts.setdefault(number, text)
        self.texts.pop(number - _KEPT_TEXTS, None)

    def _on_rules(self, number: int, name: str | None) -> None:
        self.rules = (number, name)

    def _on_claim(self, owner: str, number: int) -> None:
        self.claimant = (owner, number)

    def _on_unclaim(self, owner: str, number: int) -> None:
        self.claimed[owner] = max(number, self.claimed.get(owner, 0))
        if self.claimant == (owner, number):
            self.claimant = ("", 0)

    def _on_ending(self) -> None:
        self.is_ending = True

    # ------------------------------------------------------------ in a snapshot of the log

    def describe(self) -> dict[str, Any]:
        """Return everything but ``last``, as plain data."""
        return {
            **super().describe(),
            "members": self.members,
            "gone": list(self.disconnected),
            "idle": list(self.idle),
            "holders": list(self.holders.items()),
            "starts": self.starts,
            "over": [self.barriers, self.leaves],
            "leaving": sorted(self.leaving),
            "texts": list(self.texts.items()),
            "rules": self.rules,
            "claimant": self.claimant,
            "claimed": self.claimed,
            "is_ending": self.is_ending,
            "rounds": self.staleness.to_plain(),
            "lists": self.lists,
        }

    def restore(self, last: Mapping[Any, Any], described: Mapping[str, Any]) -> None:
        """Replace the tables by those of a snapshot."""
        super().restore(last, described)
        get = described.get
        self.members, self.disconnected = dict(get("members", {})), dict.fromkeys(get("gone", ()))
        self.idle = dict.fromkeys(get("idle", ()))
        self.holders, self.texts = dict(get("holders", ())), dict(get("texts", ()))
        times, name = get("rules", (0, None))
        self.rules = (times, name)
        self.starts = {owner: (counts[0], counts[1], counts[2]) for owner, counts in get("starts", {}).items()}
        self.barriers, self.leaves = get("over", (0, 0))
        self.leaving, self.claimed = set(get("leaving", ())), dict(get("claimed", {}))
        owner, number = get("claimant", ("", 0))
        self.claimant, self.is_ending = (owner, number), get("is_ending", False)
        self.staleness.restore(get("rounds", ()))
        self.lists.clear()
        self.lists.update(get("lists", {}))
