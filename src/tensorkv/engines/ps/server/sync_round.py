"""Rounds of mode ``sync``: pushes are held until each live worker has pushed, then applied as one sum.

Each worker numbers its pushes of a list of keys, and pushes with the same number are a round. So rounds are the same
on every server, even if one server has closed a round without a worker that another has waited for: a push that arrives
after its round is told the number of the next one instead of being added there, where it would be a round too late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import TensorKVError, WorkerError
from tensorkv.shard.entry import Part


@dataclass(slots=True)
class PendingPush:
    """One worker's push: its request id, one part for each key, and what is logged of it."""

    client: str
    seq: int
    parts: Sequence[Part]
    words: dict[str, Any] = field(default_factory=dict)
    replaced: PendingPush | None = None
    """The push of this worker that it replaces, which timed out."""
    counts: Sequence[int] | None = None
    """Of how many parts each part is the sum; None: of one."""


@dataclass(slots=True)
class _KeyList:
    """The open rounds of a list of keys."""

    keys: tuple[Key, ...]
    rounds: dict[int, dict[int, PendingPush]] = field(default_factory=dict)
    # Of each worker, the first round to which it may still push.
    first: dict[int, int] = field(default_factory=dict)

    def missing(self, number: int, live: Sequence[int]) -> list[int]:
        pushes = self.rounds.get(number, {})
        return sorted(rank for rank in live if rank not in pushes and self.first.get(rank, 0) <= number)

    def remove(self, rank: int, client: str, seq: int) -> None:
        """Remove a request of a worker from the round that it is in, if any."""
        for pushes in self.rounds.values():
            found = pushes.get(rank)
            if found is None or (found.client, found.seq) != (client, seq):
                continue
            if found.replaced is None:
                del pushes[rank]
            else:
                pushes[rank] = found.replaced


Apply = Callable[[Sequence[Key], Sequence[list[Part]], Sequence[PendingPush]], None]


class SyncRounds:
    """The open rounds of each list of keys.

    Args:
        apply: called with the keys, for each key the parts in the order of ranks, and the pushes of a round.
        closed: of each list of keys, by its name, the last round that is closed.
        refused: of each client, the number of its last request that was refused, and why.
    """

    def __init__(self, apply: Apply, closed: dict[str, int], refused: dict[str, tuple[int, TensorKVError]]) -> None:
        self._apply, self._closed, self._refused = apply, closed, refused
        self._lists: dict[str, _KeyList] = {}

    def next(self, name: str) -> int:
        """Return the number of the first round of a list of keys that is not closed."""
        return self._closed.get(name, 0) + 1

    def add(self, name: str, keys: tuple[Key, ...], number: int, first: int, rank: int, push: PendingPush) -> None:
        """Add a push to an open round; a request that is sent again is moved from the round that it was in.

        One that arrives after a later push of its client is left out.

        Args:
            name, keys: of the list of keys.
            number: of the round.
            first: the first round to which this worker may still push.
            rank: of the worker.
            push: of the worker.
        """
        if any(each.client == push.client and each.seq > push.seq for each in self._pending()):
            return
        found = self._lists.setdefault(name, _KeyList(keys))
        found.first[rank] = max(first, found.first.get(rank, 0))
        found.remove(rank, push.client, push.seq)
        pushes = found.rounds.setdefault(number, {})
        push.replaced = pushes.get(rank)
        if push.replaced is not None:
            push.replaced.replaced = None
        pushes[rank] = push

    def holds(self, client: str, seq: int) -> bool:
        """Return whether a push is in an open round."""
        return any((each.client, each.seq) == (client, seq) for each in self._pending())

    def _pending(self) -> Iterator[PendingPush]:
        for found in self._lists.values():
            for pushes in found.rounds.values():
                yield from pushes.values()

    def close(self, live: Sequence[int], admits: Callable[[str, int], bool]) -> None:
        """Apply every round to which each live worker has pushed, and whose requests may be applied now."""
        for name, found in list(self._lists.items()):
            for number in sorted(found.rounds):
                pushes = found.rounds[number]
                admitted = all(admits(each.client, each.seq) for each in pushes.values())
                if not admitted or found.missing(number, live):
                    break
                del found.rounds[number]
                # A round counts as closed also if it is refused, or if no worker has pushed in the end.
                self._closed[name] = max(number, self._closed.get(name, 0))
                if pushes:
                    self.apply(found.keys, pushes)
            if not found.rounds:
                del self._lists[name]

    def missing(self, name: str, number: int, live: Sequence[int]) -> list[int]:
        """Return the live workers that have not pushed to a round."""
        found = self._lists.get(name)
        return [] if found is None else found.missing(number, live)

    def apply(self, keys: Sequence[Key], pushes: Mapping[int, PendingPush]) -> None:
        """Apply the pushes of a round, or of a worker that was too late for it."""
        by_rank = [pushes[rank] for rank in sorted(pushes)]
        parts = [[each.parts[index] for each in by_rank] for index in range(len(keys))]
        try:
            self._apply(keys, parts, by_rank)
        except Exception as error:
            # Every worker of the round gets the error: one without would wait for the others' next round.
            for each in by_rank:
                if isinstance(error, TensorKVError):
                    kind, text = type(error), str(error)
                else:
                    kind, text = WorkerError, f"{type(error).__name__}: {error}"
                self._refused[each.client] = each.seq, kind(f"the round was refused: {text}")
