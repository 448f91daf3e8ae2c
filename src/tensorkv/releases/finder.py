"""ChangeFinder: the changes between the releases of a shard, found once for all readers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tensorkv.arrays.arguments import Key
from tensorkv.errors import ArgumentError, ReleaseNotFoundError, SnapshotError, quote
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.shard import Shard, ShardSnapshot

from .changes import KeyChange, Pair, compare, deleted, digests_of, release_digest

# Pairs of releases of which the changes are kept.
_REMEMBERED_PAIRS = 4

# Values that are looked at together, without a push in between.
_GROUP_NBYTES = 16 << 20


def _groups(entries: Sequence[FrozenEntry]) -> Iterator[list[FrozenEntry]]:
    """Return entries in groups that do not take long."""
    group: list[FrozenEntry] = []
    nbytes = 0
    for entry in entries:
        group.append(entry)
        nbytes += entry.value.nbytes
        if nbytes >= _GROUP_NBYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


PlaceOf = Callable[[FrozenEntry], tuple[int, int]]
"""Returns where in its value the first element of what is held of a key is, and how many elements the value has."""


def _whole(entry: FrozenEntry) -> tuple[int, int]:
    return 0, entry.spec.shape.numel()


class ChangeFinder:
    """Finds changes between releases of a shard, and keeps those of the last few pairs of releases.

    Args:
        shard: that has the releases.
        place_of: tells what is held of a key.
    """

    def __init__(self, shard: Shard, place_of: PlaceOf = _whole) -> None:
        self._shard, self._place_of = shard, place_of
        # With the two snapshots: after a load other releases may have the names.
        self._found: dict[tuple[str, str], tuple[ShardSnapshot, ShardSnapshot, Sequence[KeyChange]]] = {}
        self._lock = threading.Lock()

    def changes(
        self, name: str, opened: Shard, since: str | None, *, unknown_ok: bool = False
    ) -> tuple[str | None, Sequence[KeyChange]]:
        """Return what has changed of each key in one release since another one.

        Args:
            name: of the release.
            opened: its values, as the reader has opened them.
            since: name of the other one (None: return all values).
            unknown_ok: whether ``since`` may be one that was never published here.

        Returns:
            The older release and the changes, as of ``compare``; None and all values if it is not held any more.

        Raises:
            ReleaseNotFoundError: there never was a release ``since``, or ``name`` was dropped.
            SnapshotError: a load has replaced the release.
            ArgumentError: ``since`` is newer than ``name``.
        """
        self._shard.refuse_calls_by_updater()
        with self._lock, self._held(name, opened) as new:
            if since is None:
                return None, self._compare(new, None)
            if not unknown_ok and self._shard.number_of_release(since) > self._shard.number_of_release(name):
                raise ArgumentError(
                    f"changes: since={quote(since)} is newer than the release {quote(name)}; ask that one for its "
                    "changes"
                )
            with ExitStack() as stack:
                try:
                    old = stack.enter_context(self._held(since))
                except ReleaseNotFoundError:
                    return None, self._compare(new, None)
                known = self._found.get((name, since))
                if known is not None and known[0] is new and known[1] is old:
                    return since, known[2]
                found = self._compare(new, old)
                self._forget()
                self._found[name, since] = new, old, found
                return since, found

    def digest(self, name: str, opened: Shard) -> str:
        """Return the digest of a release.

        Args:
            name, opened: as for ``changes``, and so are the errors.
        """
        numbers = self.digests(name, opened)
        with self._held(name, opened) as snapshot:
            return release_digest((key, entry.spec, numbers[key]) for key, entry in snapshot.held.items())

    def digests(self, name: str, opened: Shard) -> dict[Key, int]:
        """Return the digest of what is held of each key of a release.

        Args:
            name, opened: as for ``changes``, and so are the errors.
        """
        found: dict[Key, int] = {}
        self._shard.refuse_calls_by_updater()
        with self._lock, self._held(name, opened) as snapshot:
            for entries in _groups(list(snapshot.held.values())):
                firsts = [self._place_of(entry)[0] for entry in entries]
                with snapshot.reading(entries):
                    numbers = digests_of(entries, firsts, self._shard.pool)
                found.update(zip([entry.key for entry in entries], numbers, strict=True))
        return found

    def _compare(self, new: ShardSnapshot, old: ShardSnapshot | None) -> Sequence[KeyChange]:
        found: list[KeyChange] = []
        earlier = {} if old is None else old.held
        # The lock is free between groups, so that pushes go on; what a snapshot holds stays as it is.
        for entries in _groups(list(new.held.values())):
            pairs = []
            for entry in entries:
                before = earlier.get(entry.key)
                if before is not None and not self._is_comparable(before, entry):
                    before = None
                pairs.append(Pair(before, entry, *self._place_of(entry)))
            with new.reading([*entries, *(pair.old for pair in pairs if pair.old is not None)]):
                found += compare(pairs, self._shard.pool)
        for key, before in earlier.items():
            after = new.held.get(key)
            if after is None or not self._is_comparable(before, after):
                with new.reading([before]):
                    found.append(deleted(before, self._place_of(before)[0], self._shard.pool))
        return found

    def _is_comparable(self, old: FrozenEntry, new: FrozenEntry) -> bool:
        """Return whether two releases hold the same piece of a key, perhaps with other elements or rows."""
        if old is new:
            return True
        kinds = [(each.spec.shape, each.spec.dtype, each.spec.is_table, each.spec.init) for each in (old, new)]
        # Of another whole value a piece may be as large, and begin elsewhere.
        return kinds[0] == kinds[1] and self._place_of(old) == self._place_of(new)

    def _forget(self) -> None:
        """Make room for one more pair of releases."""
        for pair in list(self._found):
            if len(self._found) >= _REMEMBERED_PAIRS or pair[0] not in self._shard.releases:
                del self._found[pair]

    @contextmanager
    def _held(self, name: str, opened: Shard | None = None) -> Iterator[ShardSnapshot]:
        """Give the values of a release, which stays meanwhile; raise if they are not those that were opened."""
        with self._shard.held_release(name) as held:
            if opened is not None and opened is not held.snapshot:
                raise SnapshotError(f"the release {quote(name)} that was open was replaced by load; open it again")
            yield held.snapshot
            # A load meanwhile has left it without keys.
            held.snapshot.refuse_closed()
