"""Reads: the values of a shard that clients of its host read where they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.engines.transport.shared_values import Places, SharedValues
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.shard import Shard

_logger = logging.getLogger(__name__)

# A read that was not ended for so long was given up.
_LONGEST_S = 60.0


class _Read(NamedTuple):
    owner: str
    seq: int
    entries: Sequence[FrozenEntry] | None
    """None: it has ended, and a late copy of its request begins none."""
    until: float


class Reads:
    """The reads of one shard.

    Values are brought to shared memory when they are first read, and their replacements are made there.

    Args:
        shard: whose values.
        now: a clock in seconds.
    """

    def __init__(self, shard: Shard, now: Callable[[], float] = time.monotonic) -> None:
        self._shard, self._now, self._memory = shard, now, SharedValues()
        # By session, which has one read at a time.
        self._reads: dict[str, _Read] = {}
        shard.make_like = self._make_like

    def find(self, entries: Sequence[FrozenEntry]) -> Places | None:
        """Return where values are that a snapshot holds; None if no other process can read them."""
        try:
            elsewhere = [entry for entry in entries if not self._memory.has(entry.tensor)]
            if elsewhere:
                self._shard.move(elsewhere, self._memory.like)
        except OSError as error:
            _logger.warning("values cannot be read in place, so they are copied for each reader: %s", error)
            return None
        return self._memory.find([entry.tensor for entry in entries])

    def begin(
        self, keys: Sequence[Key], session: str, owner: str, seq: int, held: Sequence[FrozenEntry] | None = None
    ) -> Places | None:
        """Return where values are, and keep them as they are until this read, or the next one, is ended.

        Args:
            keys: of the values.
            session: of a client, which has one read at a time.
            owner: the client.
            seq: of the request; one that is sent again is told of the same values.
            held: what a snapshot holds of the keys (None: their present values are read).

        Returns:
            None if no other process can read them, or if the client has had its answer, and gone on.
        """
        self._drop_expired()
        last = self._reads.get(session)
        if last is not None and seq == last.seq and last.entries is not None:
            return self.find(last.entries)
        if last is not None and seq <= last.seq:
            return None
        self._end(session)
        entries = self._shard.freeze(keys) if held is None else self._shard.hold(held)
        found = self.find(entries)
        if found is None:
            self._shard.release(entries)
        else:
            self._reads[session] = _Read(owner, seq, entries, self._now() + _LONGEST_S)
        return found

    def end(self, session: str, seq: int) -> bool:
        """Let values change, and return whether they were kept until now.

        Args:
            session: of the client.
            seq: of the request, which ends the read before it.
        """
        read = self._reads.get(session)
        return read is not None and read.seq < seq and self._end(session)

    def _end(self, session: str) -> bool:
        read = self._reads.get(session)
        if read is None or read.entries is None:
            return False
        self._reads[session] = read._replace(entries=None)
        self._shard.release(read.entries)
        return True

    def drop_all_but_of(self, owners: Sequence[str]) -> None:
        """End the reads of clients that are not among these, and those that were given up."""
        for session in [session for session, read in self._reads.items() if read.owner not in owners]:
            self._end(session)
            del self._reads[session]
        self._drop_expired()

    def _drop_expired(self) -> None:
        now = self._now()
        for session in [session for session, read in self._reads.items() if read.until <= now]:
            self._end(session)

    def _make_like(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return new memory for values that replace others, where readers find it if these were read."""
        shared = [index for index, value in enumerate(values) if self._memory.has(value)]
        made: dict[int, torch.Tensor] = {}
        try:
            made = dict(zip(shared, self._memory.like([values[index] for index in shared]), strict=True))
        except OSError as error:
            _logger.warning("no memory that readers share for values that are pushed: %s", error)
        return [made[i] if i in made else torch.empty_like(value) for i, value in enumerate(values)]
