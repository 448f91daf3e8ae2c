"""Gathering: pushes of workers in step, held until the round is complete.

Each worker numbers its pushes of a list of keys, and a round is what has the same number. So workers stay in step on
every server, even if one server has closed a round without a worker that another has waited for: a push that comes
behind its round is told where the others are, and is not taken into the next one, where it would be a round behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.errors import TensorKVError, WorkerError
from tensorkv.shard.entry import Part


@dataclass(slots=True)
class Pushed:
    """One worker's push: its number, one part for each key, and what is logged of it."""

    client: str
    seq: int
    parts: Sequence[Part]
    words: dict[str, Any] = field(default_factory=dict)
    before: Pushed | None = None
    """The push of this worker that it replaces, which timed out."""


@dataclass(slots=True)
class _List:
    """The open rounds of a list of keys."""

    keys: tuple[Key, ...]
    rounds: dict[int, dict[int, Pushed]] = field(default_factory=dict)
    # Of each worker, the first round that it may still come to.
    first: dict[int, int] = field(default_factory=dict)


Apply = Callable[[Sequence[Key], Sequence[list[Part]], Sequence[Pushed]], None]


class Gathering:
    """The open rounds of each list of keys.

    Args:
        apply: is given the keys, for each key the parts in the order of ranks, and the pushes that brought them.
        closed: of each list of keys, by its name, the last round that is closed.
    """

    def __init__(self, apply: Apply, closed: dict[str, int]) -> None:
        self._apply, self._closed = apply, closed
        self._lists: dict[str, _List] = {}
        self._refused: dict[str, tuple[int, str]] = {}

    def next(self, name: str) -> int:
        """Return the number of the first round of a list of keys that is not closed."""
        return self._closed.get(name, 0) + 1

    def add(self, name: str, keys: tuple[Key, ...], number: int, first: int, rank: int, pushed: Pushed) -> None:
        """Take a push into an open round; a resent one is there already, or in an earlier round.

        Args:
            name, keys: of the list of keys.
            number: of the round.
            first: the first round that this worker may still come to.
            rank: of the worker.
            pushed: what it has pushed.
        """
        here = self._lists.setdefault(name, _List(keys))
        here.first[rank] = max(first, here.first.get(rank, 0))
        for each in here.rounds.values():
            found = each.get(rank)
            if found is not None and (found.client, found.seq) == (pushed.client, pushed.seq):
                _put(each, rank, found.before)
        pushed.before = here.rounds.setdefault(number, {}).get(rank)
        here.rounds[number][rank] = pushed

    def refused(self, client: str, seq: int) -> TensorKVError | None:
        """Return why the round with this push was refused, if it was."""
        found = self._refused.get(client)
        return WorkerError(found[1]) if found is not None and found[0] == seq else None

    def close(self, live: Sequence[int], admits: Callable[[str, int], bool]) -> None:
        """Apply every round to which each live worker has come, and whose requests may be applied now."""
        for name, here in list(self._lists.items()):
            for number in sorted(here.rounds):
                pushed = here.rounds[number]
                free = all(admits(each.client, each.seq) for each in pushed.values())
                if not free or _missing(here, number, live):
                    break
                del here.rounds[number]
                # Also of a round that is refused, or to which nobody has come in the end.
                self._closed[name] = max(number, self._closed.get(name, 0))
                if pushed:
                    self.finish(here.keys, pushed)
            if not here.rounds:
                del self._lists[name]

    def awaited(self, name: str, number: int, live: Sequence[int]) -> list[int]:
        """Return the live workers whose push is missing."""
        here = self._lists.get(name)
        return [] if here is None else _missing(here, number, live)

    def finish(self, keys: Sequence[Key], pushed: Mapping[int, Pushed]) -> None:
        """Apply the pushes of a round, or of a worker that has missed it."""
        by_rank = [pushed[rank] for rank in sorted(pushed)]
        parts = [[each.parts[index] for each in by_rank] for index in range(len(keys))]
        try:
            self._apply(keys, parts, by_rank)
        except Exception as error:
            # All of them hear of it: one that did not would wait for the others' next round.
            for each in by_rank:
                self._refused[each.client] = (each.seq, f"the round was refused: {type(error).__name__}: {error}")


def _missing(here: _List, number: int, live: Sequence[int]) -> list[int]:
    pushed = here.rounds.get(number, {})
    return sorted(rank for rank in live if rank not in pushed and here.first.get(rank, 0) <= number)


def _put(pushed: dict[int, Pushed], rank: int, found: Pushed | None) -> None:
    if found is None:
        del pushed[rank]
    else:
        pushed[rank] = found
