"""Decide with all workers what a call does with its sums: scale them, leave some of them out, or refuse them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from tensorkv.arrays.arguments import Key
from tensorkv.errors import quote
from tensorkv.runtime.shield import Steps
from tensorkv.shard.nonfinite import NonFinitePolicy, clip
from tensorkv.shard.norm import Clipping, PushResult, SquareSum

from .group import ProcessGroup
from .host import HostGroup


class Sums(Protocol):
    """A worker's sums of one call: of its parts of the values, by the places of their keys."""

    def squares(self) -> SquareSum:
        """Return the sum of the squares of those that are not left out, rescaled before."""

    def count_nonfinite(self) -> Mapping[int, int]:
        """Return how many elements are NaN or Inf; keys without any may be missing."""

    def leave_out(self, places: set[int]) -> None:
        """Leave out these keys."""


class Decision(NamedTuple):
    """What all workers do with the sums of a call.

    Args:
        left_out: the places of keys that are not updated.
        scale: of all gradients.
        result: what the caller is told.
    """

    left_out: set[int]
    scale: float
    result: PushResult


class Decisions:
    """Makes the decisions of one worker, which are those of all.

    Args:
        group: of all workers.
        host: of this worker.
        policy: for sums with NaN or Inf.
        is_repeated: whether each host has all of the sums, and not one of them alone.
        counts: whether this worker's counts of NaN and Inf are to be added to those of the others.
    """

    def __init__(
        self,
        group: ProcessGroup,
        host: HostGroup,
        policy: NonFinitePolicy,
        *,
        is_repeated: bool = False,
        counts: bool = True,
    ) -> None:
        self._group, self._host, self._policy = group, host, policy
        self._is_of_host, self._counts = is_repeated or len(group.hosts) == 1, counts

    def make(
        self, verb: str, keys: Sequence[Key], sums: Sums, clipping: Clipping | None, row_squares: SquareSum
    ) -> Steps[Decision]:
        """Decide on a call, when this worker's sums are made; all workers do this.

        Args:
            verb, keys: of the call.
            sums: of this worker.
            clipping: of the gradients (None: there is none).
            row_squares: of the gradients that the same call has as Rows, which every worker knows.

        Raises:
            NonFiniteError: on every worker, if the policy refuses a sum.
        """
        squares, left_out = (yield from self._total(sums.squares())), set[int]()
        # A NaN or Inf among the sums is one among the squares.
        if self._policy.checks and squares.rest != 0:
            yield
            names = [f"{verb}({quote(key)})" for key in keys]
            left_out = self._policy.left_out(sums.count_nonfinite() if self._counts else {}, names)
            if left_out:
                sums.leave_out(left_out)
                squares = yield from self._total(sums.squares())
        found_inf = bool(left_out) if self._policy.checks else None
        return Decision(left_out, *clip(squares + row_squares, clipping, found_inf))

    def _total(self, mine: SquareSum) -> Steps[SquareSum]:
        """Return the sum over all workers."""
        if self._is_of_host:
            data = yield from self._host.exchange(json.dumps(mine.to_plain()).encode())
            found = [json.loads(each) for each in data]
        else:
            found = self._group.all_gather_json(mine.to_plain())
        return sum(map(SquareSum.from_plain, found), SquareSum())
