"""Gathering: pushes of workers in step, held until the round is complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..entry import Part
from ..errors import TensorKVError, WorkerError
from ..keys import Key


@dataclass(slots=True)
class Pushed:
    """One worker's push: its number, one part for each key, and what is logged of it."""

    client: str
    seq: int
    parts: Sequence[Part]
    words: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Round:
    pushed: dict[int, Pushed] = field(default_factory=dict)


Apply = Callable[[Sequence[Key], Sequence[list[Part]], Sequence[Pushed]], None]


class Gathering:
    """The open round of each list of keys.

    Args:
        apply: is given the keys, for each key the parts in the order of ranks, and the pushes that brought them.
    """

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._rounds: dict[tuple[Key, ...], _Round] = {}
        self._refused: dict[str, tuple[int, str]] = {}

    def add(self, keys: tuple[Key, ...], rank: int, pushed: Pushed) -> None:
        """Take a push into the open round of its keys; a resent one is there already."""
        self._rounds.setdefault(keys, _Round()).pushed[rank] = pushed

    def refused(self, client: str, seq: int) -> TensorKVError | None:
        """Return why the round with this push was refused, if it was."""
        found = self._refused.get(client)
        return WorkerError(found[1]) if found is not None and found[0] == seq else None

    def close(self, live: Sequence[int], admits: Callable[[str, int], bool]) -> None:
        """Apply every round to which each live worker has come, and whose requests may be applied now."""
        for keys, waiting in list(self._rounds.items()):
            free = all(admits(each.client, each.seq) for each in waiting.pushed.values())
            if waiting.pushed.keys() >= set(live) and free:
                del self._rounds[keys]
                self._finish(keys, waiting.pushed)

    def awaited(self, keys: tuple[Key, ...], live: Sequence[int]) -> list[int]:
        """Return the live workers whose push is missing."""
        here = self._rounds.get(keys)
        return [] if here is None else sorted(set(live) - here.pushed.keys())

    def _finish(self, keys: Sequence[Key], pushed: Mapping[int, Pushed]) -> None:
        by_rank = [pushed[rank] for rank in sorted(pushed)]
        parts = [[each.parts[index] for each in by_rank] for index in range(len(keys))]
        try:
            self._apply(keys, parts, by_rank)
        except Exception as error:
            # All of them hear of it: one that did not would wait for the others' next round.
            for each in by_rank:
                self._refused[each.client] = (each.seq, f"the round was refused: {type(error).__name__}: {error}")
