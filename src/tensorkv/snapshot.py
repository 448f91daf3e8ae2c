"""Snapshot: all values of a store as they were at one moment, for reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from tensorkv.arrays.arguments import Key


class Snapshot:
    """All values of a store as they were at one moment.

    Made by ``KVStore.snapshot``; also a context manager that closes itself.
    """

    def __init__(self, store: Any, versions: Mapping[Key, int], owner: Any = None) -> None:
        self._store = store
        # The store that it was taken of, which is there as long as this is.
        self._owner = owner
        self.versions = dict(versions)
        """How many updates each key had had."""

    def keys(self) -> list[Key]:
        """Return every key, in the order of init."""
        return list(self.versions)

    def pull(self, key: Any, out: Any = None, *, like: Any = None) -> Any:
        """Copy values, as ``KVStore.pull`` does.

        Raises:
            SnapshotError: it is not held any more.
            As ``KVStore.pull``.
        """
        return self._store.pull(key, out, like=like)

    def row_sparse_pull(self, key: Any, out: Any = None, *, row_ids: Any = None) -> Any:
        """Copy rows, as ``KVStore.row_sparse_pull`` does.

        Raises:
            SnapshotError: it is not held any more.
            As ``KVStore.row_sparse_pull``.
        """
        return self._store.row_sparse_pull(key, out, row_ids=row_ids)

    def close(self) -> None:
        """Hold it no more."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Snapshot({len(self.versions)} keys)"
