"""Snapshots on one server: a barrier that makes them consistent over all servers, and values kept until they change.

A client takes a snapshot in two phases. It has every server hold new requests (``prepare``) and learns which requests
have reached some of the servers that they go to. Then it has the other servers apply those too, take the snapshot and
go on (``commit``). This is a consistent cut in the sense of Chandy and Lamport, "Distributed Snapshots", ACM TOCS 1985,
for clients that send one request at a time.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tensorkv.arrays.arguments import Key
from tensorkv.compression import Traffic
from tensorkv.errors import ReleaseNotFoundError, SnapshotError
from tensorkv.runtime.recent import Recent
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.releases import HeldRelease
from tensorkv.shard.shard import Shard, ShardSnapshot
from tensorkv.storage.dedup import AppliedRequests, process_of

from .listing import listed
from .values import REMEMBERED_LAYOUTS, Layouts, ServedValues
from .wait import Condition

# A snapshot whose client has died is aborted after so long.
_LIMIT_S = 10.0
# Clients whose late requests for a snapshot are refused.
_KEPT_ENDED = 1024


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
        # Of each client, the number of its last request for a snapshot that has ended.
        self._ended: dict[str, int] = {}
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
        if self._ended.get(owner, 0) >= seq:
            raise SnapshotError("snapshot: late request; this snapshot has ended")
        if not self._is_prepared():
            self._owner, self._until, self._admitted = owner, self._now() + _LIMIT_S, {}
        processes = set(alive)
        return {client: list(last) for client, last in self._clients.fans.items() if process_of(client) in processes}

    def commit(self, owner: str, seq: int, wanted: Mapping[str, Sequence[Any]], take: Callable[[], Any]) -> Any:
        """Wait for the requests that other servers have applied, take the snapshot, and go on; also if that fails.

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
            lambda: all(self._clients.has_ended(client, seq) for client, seq in mine.items()),
            lambda: f"requests of {len(mine)} workers that are on their way",
        )
        # It may have ended during the wait.
        self._check_prepared(owner)
        try:
            return take()
        finally:
            self.abort(owner, seq)

    def abort(self, owner: str, seq: int) -> None:
        """Apply new requests again."""
        if self._owner == owner:
            self._owner = None
            self._ended.pop(owner, None)
            self._ended[owner] = seq
            if len(self._ended) > _KEPT_ENDED:
                del self._ended[next(iter(self._ended))]
            self._condition.notify_all()

    def _check_prepared(self, owner: str) -> None:
        if not self._is_prepared() or self._owner != owner:
            raise SnapshotError("snapshot: it took too long and was aborted; take another")

    def _is_prepared(self) -> bool:
        return self._owner is not None and self._now() < self._until


@dataclass(slots=True)
class _Keys:
    """The keys of snapshots that have the same ones.

    Args:
        contents: each key, and the number of its metadata among the objects of this process.
        notes: the metadata, which have these numbers as long as they are here.
        name: which no others have.
        layouts: as of ``ServedValues``.
    """

    contents: list[tuple[Key, int]]
    notes: list[Any]
    name: str = field(default_factory=partial(secrets.token_hex, 8))
    layouts: Layouts = field(default_factory=partial(Recent, REMEMBERED_LAYOUTS))


@dataclass(slots=True)
class _Held:
    """What a client reads under a name.

    Args:
        client: the process.
        values: of the snapshot.
        snapshot: the values' shard.
        keys: of the snapshot.
        release: of which these are the values (None: it is a snapshot of this client's own).
        lease_s: how long it stays after it was read last.
    """

    client: str
    values: ServedValues
    snapshot: ShardSnapshot
    keys: _Keys
    release: str | None = None
    lease_s: float = 0.0


class HeldSnapshots:
    """The snapshots of one shard that clients read, and the releases that they have opened, by name.

    Args:
        shard: whose values they hold.
        keep: how many snapshots may be held at a time.
        traffic: as for ``ServedValues``.
    """

    def __init__(self, shard: Shard, keep: int, traffic: Traffic) -> None:
        self._shard, self._keep, self._traffic = shard, keep, traffic
        self._held: dict[str, _Held] = {}
        self._last_keys: _Keys | None = None

    def __len__(self) -> int:
        return sum(held.release is None for held in list(self._held.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def describe(self, name: str, known: str | None = None) -> dict[str, Any]:
        """Return a listing of the keys that are held under a name, with a name of its own, and their versions.

        Args:
            name: of what is held.
            known: name of a listing that the client has, and is not told again.
        """
        held = self._held[name]
        entries = list(held.snapshot.held.values())
        told = {"changes": held.keys.name, "versions": [entry.version for entry in entries]}
        if known == held.keys.name:
            return told
        return {**told, **listed([entry.key for entry in entries], held.keys.notes)}

    def take(self, name: str, client: str) -> None:
        """Hold the present values of the shard for a client."""
        if name not in self._held and len(self) >= self._keep:
            raise SnapshotError(
                f"snapshot: {self._keep} are held already, as many as keep= allows; close one, or raise keep"
            )
        self._add(name, client, ShardSnapshot(self._shard, self._shard.freeze()))

    def open_release(self, name: str, client: str, release: str, lease_s: float) -> HeldRelease:
        """Hold a release for a client, which may be held already.

        Raises:
            ReleaseNotFoundError: it was dropped, or never published.
        """
        found = self._shard.hold_release(release, name, lease_s)
        if name not in self._held:
            held = self._add(name, client, found.snapshot)
            held.release, held.lease_s = release, lease_s
        return found

    def _add(self, name: str, client: str, snapshot: ShardSnapshot) -> _Held:
        keys = _Keys([(entry.key, id(entry.note)) for entry in snapshot.held.values()], [])
        if self._last_keys is None or self._last_keys.contents != keys.contents:
            keys.notes += [entry.note for entry in snapshot.held.values()]
            self._last_keys = keys
        keys = self._last_keys
        self._held[name] = _Held(client, ServedValues(snapshot, self._traffic, keys.layouts), snapshot, keys)
        return self._held[name]

    def find(self, name: str) -> ServedValues:
        """Return what is held under a name; a release is held for longer then.

        Raises:
            SnapshotError: nothing is.
        """
        held = self._held.get(name)
        if held is not None and held.release is not None:
            try:
                self._shard.hold_release(held.release, name, held.lease_s)
            except ReleaseNotFoundError:
                self.drop(name)
                held = None
        if held is None:
            raise SnapshotError(
                "this snapshot is no longer held: it was closed, the heartbeats of its process stopped, its lease "
                "ended, or a server was restarted; take another"
            )
        return held.values

    @contextmanager
    def comparing(self, name: str, release: str) -> Iterator[ShardSnapshot]:
        """Give the values of a release that is open under a name, as ``Shard.comparing`` holds it.

        Raises:
            ReleaseNotFoundError, SnapshotError: it was dropped.
        """
        self.find(name)
        held = self._held[name]
        with self._shard.comparing(release, name, held.lease_s):
            yield held.snapshot

    def entries(self, name: str, keys: Sequence[Key]) -> list[FrozenEntry]:
        """Return what is held of some keys under a name that ``find`` has found."""
        held = self._held[name].snapshot.held
        return [held[key] for key in keys]

    def drop(self, name: str) -> None:
        """Let go of what is held under a name."""
        held = self._held.pop(name, None)
        if held is None:
            return
        if held.release is None:
            held.snapshot.close()
        else:
            self._shard.let_go(held.release, name)

    def drop_replaced(self) -> None:
        """Let go of all releases, which were replaced."""
        for name in [name for name, held in self._held.items() if held.release is not None]:
            self.drop(name)

    def drop_expired(self) -> None:
        """Let go of releases that were not read for so long that their leases have ended."""
        for name, held in list(self._held.items()):
            if held.release is not None and not self._shard.has_lease(held.release, name):
                self.drop(name)

    def drop_all_but_of(self, clients: Sequence[str]) -> None:
        """Let go of what is held for clients that are not among these."""
        for name in [name for name, held in self._held.items() if held.client not in clients]:
            self.drop(name)
