"""Snapshots on one server: a barrier that makes them consistent over all servers, and values kept until they change.

A client takes a snapshot in two phases. It has every server hold new requests (``prepare``) and learns which requests
have reached some of the servers that they go to. Then it has the other servers apply those too, take the snapshot and
go on (``commit``). This is a consistent cut in the sense of Chandy and Lamport, "Distributed Snapshots", ACM TOCS 1985,
for clients that send one request at a time.
"""

from __future__ import annotations

import time
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
from tensorkv.storage.dedup import AppliedRequests

from .wait import Condition

# A snapshot whose client has died is aborted after so long.
_LIMIT_S = 10.0


class SnapshotBarrier:
    """What one server knows of a snapshot that is being taken.

    Args:
        condition, clients: of the server.
        index: of the server.
        now: a clock in seconds.
    """

    def __init__(
        self, condition: Condition, clients: AppliedRequests, index: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._condition, self._clients, self._index, self._now = condition, clients, index, now
        self._owner: str | None = None
        self._ended: tuple[str, int] = ("", 0)
        self._until = 0.0
        self._admitted: Mapping[str, int] = {}

    def admit(self, client: str, seq: int) -> None:
        """Wait until a new request may be applied."""
        self._condition.wait_for(lambda: self.admits(client, seq), lambda: "a snapshot that is being taken")

    def admits(self, client: str, seq: int) -> bool:
        """Return whether a request may be applied now."""
        return not self._is_prepared() or seq <= self._admitted.get(client, 0)

    def prepare(self, owner: str, seq: int, alive: Sequence[str]) -> dict[str, Any]:
        """Hold new requests; return each client's last request to several servers, and the servers.

        Args:
            owner: the client that takes the snapshot.
            seq: of its request.
            alive: processes whose requests may still be on their way to other servers.
        """
        self._condition.wait_for(
            lambda: not self._is_prepared() or self._owner == owner, lambda: "another snapshot that is being taken"
        )
        if self._ended[0] == owner and self._ended[1] >= seq:
            raise SnapshotError("snapshot: late request; this snapshot has ended")
        if not self._is_prepared():
            self._owner, self._until, self._admitted = owner, self._now() + _LIMIT_S, {}
        processes = set(alive)
        return {
            client: list(last) for client, last in self._clients.fans.items() if client.partition(".")[0] in processes
        }

    def commit(self, owner: str, seq: int, wanted: Mapping[str, Sequence[Any]], take: Callable[[], Any]) -> Any:
        """Wait for the requests that other servers have applied, take the snapshot, and go on.

        Args:
            owner: of the snapshot.
            seq: of its request.
            wanted: by client, the number of its last request and the servers to which it goes.
            take: called when this server has applied all of them.

        Raises:
            SnapshotError: the snapshot was aborted in the meantime.
        """
        mine = {client: number for client, (number, servers) in wanted.items() if self._index in servers}
        self._check_prepared(owner)
        self._admitted = mine
        self._condition.notify_all()
        self._condition.wait_for(
            lambda: all(self._clients.has_applied(client, seq) for client, seq in mine.items()),
            lambda: f"requests of {len(mine)} workers that are on their way",
        )
        # It may have ended during the wait.
        self._check_prepared(owner)
        taken = take()
        self.abort(owner, seq)
        return taken

    def abort(self, owner: str, seq: int) -> None:
        """Apply new requests again."""
        if self._owner == owner:
            self._owner, self._ended = None, (owner, seq)
            self._condition.notify_all()

    def _check_prepared(self, owner: str) -> None:
        if not self._is_prepared() or self._owner != owner:
            raise SnapshotError("snapshot: it took too long and was aborted; take another")

    def _is_prepared(self) -> bool:
        return self._owner is not None and self._now() < self._until


@dataclass(slots=True)
class _Snapshot:
    client: str
    entries: Mapping[Key, Entry]
    versions: Mapping[Key, int]
    metadata: Mapping[Key, Any]
    copies: dict[Key, torch.Tensor | Table] = field(default_factory=dict)


class CopyOnWriteSnapshots:
    """The snapshots of one shard: a value is copied when it is about to change and a snapshot still needs it.

    Args:
        keep: how many may be held at a time.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._snapshots: dict[str, _Snapshot] = {}

    def __len__(self) -> int:
        return len(self._snapshots)

    def __contains__(self, name: object) -> bool:
        return name in self._snapshots

    def describe(self, name: str) -> list[list[Any]]:
        """Return every key of a snapshot with its version and its metadata."""
        snapshot = self._snapshots[name]
        return [[key, version, snapshot.metadata[key]] for key, version in snapshot.versions.items()]

    def take(self, name: str, client: str, shard: Shard, metadata_of: Callable[[Key], Any]) -> None:
        """Hold the present values of a shard, and the metadata of its keys."""
        if name not in self._snapshots and len(self._snapshots) >= self._keep:
            raise SnapshotError(
                f"snapshot: {self._keep} are held already, as many as keep= allows; close one, or raise keep"
            )
        with shard.frozen() as (entries, _):
            held = {entry.key: entry for entry in entries}
            versions = {entry.key: entry.version for entry in entries}
            self._snapshots[name] = _Snapshot(client, held, versions, {key: metadata_of(key) for key in held})

    def before_change(self, keys: Sequence[Key]) -> None:
        """Copy values that are about to change, for the snapshots that have no copy yet."""
        for snapshot in self._snapshots.values():
            for key in keys:
                entry = snapshot.entries.get(key)
                if entry is not None and key not in snapshot.copies:
                    snapshot.copies[key] = self._copy(key, entry)

    def read(self, name: str, keys: Sequence[Key]) -> list[torch.Tensor]:
        """Return the dense values of a snapshot, to be read before the next change."""
        found = []
        for value in self._values(name, keys):
            if isinstance(value, Table):
                raise ArgumentError("snapshot: a table has no dense value; pull rows of it")
            found.append(value)
        return found

    def read_rows(self, name: str, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of rows of a snapshot."""
        found = []
        for value, own in zip(self._values(name, keys), ids, strict=True):
            rows = value.read(own) if isinstance(value, Table) else value[own]
            found.append(Rows(own, rows, value.num_rows if isinstance(value, Table) else len(value)))
        return found

    def drop(self, name: str) -> None:
        """Release a snapshot."""
        self._snapshots.pop(name, None)

    def drop_all_but_of(self, clients: Sequence[str]) -> None:
        """Release the snapshots of clients that are not among these."""
        for name in [name for name, snapshot in self._snapshots.items() if snapshot.client not in clients]:
            del self._snapshots[name]

    def _values(self, name: str, keys: Sequence[Key]) -> list[torch.Tensor | Table]:
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            raise SnapshotError(
                "this snapshot is no longer held: it was closed, the heartbeats of its process stopped, or a server "
                "was restarted; take another"
            )
        missing = [key for key in keys if key not in snapshot.entries]
        if missing:
            raise KeyNotFoundError(f"snapshot: {quote(missing[0])} was not there when it was taken")
        return [snapshot.copies[key] if key in snapshot.copies else snapshot.entries[key].value for key in keys]

    def _copy(self, key: Key, entry: Entry) -> torch.Tensor | Table:
        for snapshot in self._snapshots.values():
            # Snapshots without a change in between share a copy.
            is_same = snapshot.entries.get(key) is entry and snapshot.versions[key] == entry.version
            if is_same and key in snapshot.copies:
                return snapshot.copies[key]
        value = entry.value
        return value.copy() if isinstance(value, Table) else value.clone()
