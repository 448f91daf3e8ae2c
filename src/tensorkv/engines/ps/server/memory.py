"""Memory: what a server must not forget, as tables. Each change of them is an event, logged before it counts.

A server that is restarted reads its log and has the same tables, so that what it has promised holds: which clients
there are and what rank each has, how far each worker is, what rank 0 has told, and what is over. There is no clock in
here and no lock: who has been heard of, and when, is ``Attendance``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import StorageError
from tensorkv.storage.dedup import Clients

from .rounds import Rounds

# Texts that are remembered, for workers that come to them later or whose answer was lost.
_REMEMBERED = 64
# Clients that have said goodbye, whose late messages do not count.
_GONE = 1024
# Lists of keys whose rounds are counted.
_LISTS = 10_000

Start = tuple[int, int, int]


class Memory(Clients):
    """The tables of one server, beside the requests that it has applied.

    Args:
        rounds: of the workers.

    >>> memory = Memory(Rounds(2, lost_after_s=5))
    >>> memory.apply([["member", "a"], ["rank", 1, "a", [0, 0, 0], 0]])
    >>> memory.members, memory.holders
    ({'a': 1}, {1: 'a'})
    >>> memory.apply([["bye", "a"]])
    >>> memory.members, memory.holders
    ({}, {1: ''})
    """

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds
        self.members: dict[str, int | None] = {}
        """The processes that use this server, and their ranks."""
        self.gone: dict[str, None] = {}
        self.holders: dict[int, str] = {}
        """Who has had a rank last; "" if that client has said goodbye."""
        self.starts: dict[str, Start] = {}
        """Of each worker, how many meetings, texts and leaves were over when it came."""
        self.met = 0
        self.left = 0
        self.leaving: set[int] = set()
        self.texts: dict[int, str] = {}
        self.claimant: tuple[str, int] = ("", 0)
        """Who makes or deletes keys, and the number of that claim."""
        self.claimed: dict[str, int] = {}
        """Of each process, the number of its last claim that is over."""
        self.is_ending = False
        self.lists: dict[str, int] = {}
        """Of each list of keys that is pushed in step, the last round that is closed."""

    @property
    def over(self) -> Start:
        """How many meetings, texts and leaves are over."""
        return (self.met, max(self.texts, default=0), self.left)

    def apply(self, events: Sequence[Any]) -> None:
        """Make events happen, in order.

        Raises:
            StorageError: not those that a server writes.
        """
        for name, *rest in events:
            happen = getattr(self, f"_on_{name}", None)
            if happen is None:
                raise StorageError(f"an event {name!r} that is unknown to this version of tensorkv")
            happen(*rest)

    def _count(self, client: str, seq: int, words: Mapping[str, Any], keys: Sequence[Key]) -> None:
        super()._count(client, seq, words, keys)
        if words.get("rank") is not None:
            self.rounds.pushed(words["rank"], keys)
        if words.get("step"):
            name, number = words["step"]
            # Those that are pushed now come last, and the first are forgotten.
            self.lists[name] = max(number, self.lists.pop(name, 0))
            if len(self.lists) > _LISTS:
                del self.lists[next(iter(self.lists))]

    # ------------------------------------------------------------ events

    def _on_new(self) -> None:
        """A store begins: whoever used the folder before is of no concern."""
        self.restore(dict(self.last), {})

    def _on_member(self, owner: str) -> None:
        self.members.setdefault(owner, None)

    def _on_rank(self, rank: int, owner: str, start: Sequence[int], base: int | None) -> None:
        """A worker has a rank; with a base, it begins there."""
        for other in [each for each, held in self.members.items() if held == rank and each != owner]:
            self.members[other] = None
        self.members[owner], self.holders[rank] = rank, owner
        self.starts.setdefault(owner, (start[0], start[1], start[2]))
        if base is not None:
            self.leaving.discard(rank)
            self.rounds.begin(rank, base)

    def _on_base(self, rank: int, base: int) -> None:
        self.rounds.move(rank, base)

    def _on_gone(self, owner: str) -> None:
        """A client has been silent for very long."""
        self.members.pop(owner, None)
        self.starts.pop(owner, None)
        self.claimed.pop(owner, None)

    def _on_bye(self, owner: str) -> None:
        rank = self.members.get(owner)
        if rank is not None:
            self.rounds.end(rank)
            self.leaving.discard(rank)
            # Whoever has it next follows one that is gone.
            self.holders[rank] = ""
        self._on_gone(owner)
        self.gone[owner] = None
        if len(self.gone) > _GONE:
            del self.gone[next(iter(self.gone))]

    def _on_leave(self, rank: int) -> None:
        self.rounds.leave(rank)
        self.leaving.add(rank)

    def _on_all_left(self, number: int) -> None:
        """Every worker has left, and all are back at once: whoever goes on first is to wait for the others."""
        self.left = max(self.left, number)
        self.rounds.begin_all(sorted(self.leaving))
        self.leaving.clear()

    def _on_met(self, number: int) -> None:
        self.met = max(self.met, number)

    def _on_text(self, number: int, text: str) -> None:
        self.texts.setdefault(number, text)
        self.texts.pop(number - _REMEMBERED, None)

    def _on_claim(self, owner: str, number: int) -> None:
        self.claimant = (owner, number)

    def _on_unclaim(self, owner: str, number: int) -> None:
        self.claimed[owner] = max(number, self.claimed.get(owner, 0))
        if self.claimant == (owner, number):
            self.claimant = ("", 0)

    def _on_ending(self) -> None:
        self.is_ending = True

    # ------------------------------------------------------------ in a snapshot

    def describe(self) -> dict[str, Any]:
        """Return everything but ``last``, as plain data."""
        return {
            **super().describe(),
            "members": self.members,
            "gone": list(self.gone),
            "holders": list(self.holders.items()),
            "starts": self.starts,
            "over": [self.met, self.left],
            "leaving": sorted(self.leaving),
            "texts": list(self.texts.items()),
            "claimant": self.claimant,
            "claimed": self.claimed,
            "is_ending": self.is_ending,
            "rounds": self.rounds.to_plain(),
            "lists": self.lists,
        }

    def restore(self, last: Mapping[Any, Any], described: Mapping[str, Any]) -> None:
        """Become what a snapshot holds; nothing but that."""
        super().restore(last, described)
        get = described.get
        self.members, self.gone = dict(get("members", {})), dict.fromkeys(get("gone", ()))
        self.holders, self.texts = dict(get("holders", ())), dict(get("texts", ()))
        self.starts = {owner: (met, texts, left) for owner, (met, texts, left) in get("starts", {}).items()}
        self.met, self.left = get("over", (0, 0))
        self.leaving, self.claimed = set(get("leaving", ())), dict(get("claimed", {}))
        owner, number = get("claimant", ("", 0))
        self.claimant, self.is_ending = (owner, number), get("is_ending", False)
        self.rounds.restore(get("rounds", ()))
        self.lists.clear()
        self.lists.update(get("lists", {}))
