"""The base of contenders: each does a work in one way, and is checked against the same results.

A library is imported only by the contender that uses it: MXNet runs in a process that has no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.work import Verb, Work, check, make_parts, new_outs


class Contender:
    """Does one work again and again; counts the updates, so that it can check itself.

    Args:
        work: what to do.
        rank: the only part of each key that this process pushes; None pushes all parts.
    """

    WORK: ClassVar[type[Any]] = Work

    def __init__(self, work: Work, rank: int | None = None) -> None:
        self.work = work
        self.rank = rank
        self.steps = 0
        self.scale = 1
        self.parts: list[Any] = make_parts(work, self.pushed())
        self.outs: list[Any] = new_outs(work)

    def pushed(self) -> Sequence[int]:
        """Return which parts of each key this process pushes."""
        return range(self.work.parts) if self.rank is None else (self.rank,)

    @staticmethod
    def start() -> dict[str, str]:
        """Import the library and join the group that all works have in common; return versions."""
        return {}

    def open(self, port: int, **options: Any) -> None:
        """Make what the first call needs.

        Args:
            port: free, and the same for every rank.
            **options: of the team.
        """

    def prepare(self, verb: Verb, calls: int) -> None:
        """Do before so many calls what is not to be timed."""

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Do ``verb`` with all keys so many times; return the seconds of one."""
        call = self.calls()[verb]
        self.steps += calls
        start = perf_counter()
        for _ in range(calls):
            call()
        return (perf_counter() - start) / calls

    def calls(self) -> dict[Verb, Callable[[], None]]:
        """Return, for each verb, a function that does it to all keys and returns when the work is done."""
        raise NotImplementedError

    def renew(self) -> None:
        """Invalidate old results: NaN in the outs, and for assign other parts."""
        for out in self.outs:
            out[:] = np.nan
        if self.work.rule == "assign":
            self.scale *= 2
            for group in self.parts:
                for part in group:
                    part *= 2

    def check(self) -> None:
        """Raise ``WrongResultError`` unless the outs are right."""
        check(self.work, self.steps, self.scale, self.out)

    def out(self, key: int) -> Any:
        """Return what was pulled of a key, as a NumPy array."""
        return np.asarray(self.outs[key])

    def close(self) -> None:
        """Release what garbage collection does not."""


def one_or_list(work: Work, groups: list[Any]) -> Any:
    """Return what a user would write: one key's array or parts, or a list of one entry for each key."""
    groups = [group[0] if isinstance(group, list) and len(group) == 1 else group for group in groups]
    return groups[0] if work.keys == 1 else groups
