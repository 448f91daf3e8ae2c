"""Views: all values as they were at one moment, kept while somebody holds them.

A value is copied when it is about to change and a view still needs it, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.rows import Rows
from tensorkv.errors import ArgumentError, KeyNotFoundError, SnapshotError, quote
from tensorkv.shard.entry import Entry
from tensorkv.shard.shard import Shard
from tensorkv.shard.table import Table


@dataclass(slots=True)
class _View:
    client: str
    entries: Mapping[Key, Entry]
    versions: Mapping[Key, int]
    notes: Mapping[Key, Any]
    copies: dict[Key, torch.Tensor | Table] = field(default_factory=dict)


class Views:
    """The views of one shard that are held.

    Args:
        keep: how many at a time.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._views: dict[str, _View] = {}

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def describe(self, name: str) -> list[list[Any]]:
        """Return every key of a view with its version, and the note on where its pieces are."""
        view = self._views[name]
        return [[key, version, view.notes[key]] for key, version in view.versions.items()]

    def add(self, name: str, client: str, shard: Shard, note_of: Callable[[Key], Any]) -> None:
        """Hold what a shard has now, and the notes on its keys."""
        if name not in self._views and len(self._views) >= self._keep:
            raise SnapshotError(
                f"snapshot: {self._keep} are held, as many as keep=; close one, or choose a larger keep"
            )
        with shard.frozen() as (entries, _):
            held = {entry.key: entry for entry in entries}
            versions = {entry.key: entry.version for entry in entries}
            self._views[name] = _View(client, held, versions, {key: note_of(key) for key in held})

    def save(self, keys: Sequence[Key]) -> None:
        """Copy values that are about to change, for the views that have none yet."""
        for view in self._views.values():
            for key in keys:
                entry = view.entries.get(key)
                if entry is not None and key not in view.copies:
                    view.copies[key] = self._copy(key, entry)

    def read(self, name: str, keys: Sequence[Key]) -> list[torch.Tensor]:
        """Return dense values as a view has them; for reading at once only."""
        found = []
        for value in self._values(name, keys):
            if isinstance(value, Table):
                raise ArgumentError("snapshot: a table has no dense value; pull rows of it")
            found.append(value)
        return found

    def read_rows(self, name: str, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of rows as a view has them."""
        found = []
        for value, own in zip(self._values(name, keys), ids, strict=True):
            rows = value.read(own) if isinstance(value, Table) else value[own]
            found.append(Rows(own, rows, value.num_rows if isinstance(value, Table) else len(value)))
        return found

    def drop(self, name: str) -> None:
        """Hold a view no more."""
        self._views.pop(name, None)

    def drop_all_but_of(self, clients: Sequence[str]) -> None:
        """Drop the views of clients that are gone."""
        for name in [name for name, view in self._views.items() if view.client not in clients]:
            del self._views[name]

    def _values(self, name: str, keys: Sequence[Key]) -> list[torch.Tensor | Table]:
        view = self._views.get(name)
        if view is None:
            raise SnapshotError(
                "this snapshot is not held any more: it was closed, its process was silent for too long, or a server "
                "has started again; take another"
            )
        missing = [key for key in keys if key not in view.entries]
        if missing:
            raise KeyNotFoundError(f"snapshot: {quote(missing[0])} was not there when it was taken")
        return [view.copies[key] if key in view.copies else view.entries[key].value for key in keys]

    def _copy(self, key: Key, entry: Entry) -> torch.Tensor | Table:
        for view in self._views.values():
            # Views without a change in between share a copy.
            if key in view.copies and view.entries.get(key) is entry and view.versions[key] == entry.version:
                return view.copies[key]
        value = entry.value
        return Table.of(value.to_rows(), value.device) if isinstance(value, Table) else value.clone()
