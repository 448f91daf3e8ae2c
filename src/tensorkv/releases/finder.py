"""ChangeFinder: the changes between the releases of a shard, found once for all readers."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tensorkv.arrays.arguments import Key
from tensorkv.errors import ArgumentError, ReleaseNotFoundError, quote
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.shard import Shard, ShardSnapshot

from .changes import KeyChange, compare, content_digest, deleted, is_comparable

# Pairs of releases of which the changes are kept.
_REMEMBERED_PAIRS = 4
# Longer than a comparison takes.
_LEASE_S = 3600.0

PlaceOf = Callable[[FrozenEntry], tuple[int, int]]
"""Returns where in its value the first element of what is held of a key is, and how many elements the value has."""


def whole_value(entry: FrozenEntry) -> tuple[int, int]:
    """Return the place of what is held of a key where that is all of its value."""
    return 0, entry.spec.shape.numel()


class ChangeFinder:
    """Finds changes between releases of a shard, and keeps those of the last few pairs of releases.

    Args:
        shard: that has the releases.
        place_of: where in its value the piece that the shard has of a key begins.
    """

    def __init__(self, shard: Shard, place_of: PlaceOf = whole_value) -> None:
        self._shard, self._place_of = shard, place_of
        self._found: dict[tuple[str, str], Sequence[KeyChange]] = {}
        self._lock = threading.Lock()

    def changes(self, name: str, since: str) -> tuple[str | None, Sequence[KeyChange]]:
        """Return what has changed of each key in one release since another one.

        Returns:
            The older release and the changes; None and all values if it is not held any more.

        Raises:
            ReleaseNotFoundError: there never was a release ``since``, or ``name`` was dropped.
            ArgumentError: ``since`` is newer than ``name``.
        """
        with self._lock, self._held(name) as new:
            if self._shard.number_of_release(since) > self._shard.number_of_release(name):
                raise ArgumentError(
                    f"changes: since={quote(since)} is newer than the release {quote(name)}; ask that one for its "
                    "changes"
                )
            with ExitStack() as stack:
                try:
                    old = stack.enter_context(self._held(since))
                except ReleaseNotFoundError:
                    return None, self._compare(new, None)
                found = self._found.get((name, since))
                if found is None:
                    found = self._compare(new, old)
                    self._remember(name, since, found)
                return since, found

    def digests(self, name: str) -> dict[Key, int]:
        """Return the digest of each key of a release.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
        """
        found = {}
        with self._lock, self._held(name) as snapshot:
            for key, entry in snapshot.held.items():
                with snapshot.reading():
                    found[key] = content_digest(entry, self._place_of(entry)[0], self._shard.pool)
        return found

    def _compare(self, new: ShardSnapshot, old: ShardSnapshot | None) -> Sequence[KeyChange]:
        found = []
        pool, earlier = self._shard.pool, {} if old is None else old.held
        # The lock is free between keys, so that pushes go on; what a snapshot holds stays as it is.
        for key, entry in new.held.items():
            first, numel = self._place_of(entry)
            before = earlier.get(key)
            with new.reading():
                if before is not None and not is_comparable(before, entry):
                    before = None
                found.append(compare(before, entry, first=first, numel=numel, pool=pool))
        for key, before in earlier.items():
            if not is_comparable(before, new.held.get(key)):
                with new.reading():
                    found.append(deleted(before, first=self._place_of(before)[0], pool=pool))
        return found

    def _remember(self, name: str, since: str, found: Sequence[KeyChange]) -> None:
        for pair in list(self._found):
            if len(self._found) >= _REMEMBERED_PAIRS or pair[0] not in self._shard.releases:
                del self._found[pair]
        self._found[name, since] = found

    @contextmanager
    def _held(self, name: str) -> Iterator[ShardSnapshot]:
        """Give the values of a release, which stays meanwhile."""
        reader = secrets.token_hex(8)
        held = self._shard.hold_release(name, reader, _LEASE_S)
        try:
            yield held.snapshot
        finally:
            self._shard.let_go(name, reader)
