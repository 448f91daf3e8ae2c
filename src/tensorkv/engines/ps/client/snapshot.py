"""Snapshots of a store: all keys of all servers at one point in time, so that no push is in them by half."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import unpack
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.base import Outs, Reader
from tensorkv.engines.call import Call
from tensorkv.errors import KeyNotFoundError, SnapshotError, TensorKVError, quote
from tensorkv.runtime.modes import outside_modes
from tensorkv.storage import manifest
from tensorkv.storage.manifest import Contents

from ..messages import Abort, Commit, DropSnapshot, Prepare
from .data import DataClient
from .keymap import Listing, join_listings
from .layout import PlacedKey, PlacedKeys
from .session import ServerRequest, SessionPool


class ServerContents(NamedTuple):
    """Everything that one server holds, and where its keys lie."""

    contents: Contents
    placed: dict[Key, PlacedKey]


class Told(NamedTuple):
    """What servers have told of the keys that they hold for a client, and the keys that this makes."""

    listings: list[Listing]
    placed: PlacedKeys


class SnapshotClient:
    """Takes snapshots of a store.

    Args:
        sessions: with the servers.
        data: of this client.
        num_servers: of the store.
    """

    def __init__(self, sessions: SessionPool, data: DataClient, num_servers: int) -> None:
        self._sessions, self._data = sessions, data
        self._all = range(num_servers)
        self.told: Told | None = None
        """What servers have told last."""
        self.abandoned: list[str] = []
        """Snapshots that were dropped without ``close``."""

    def take(self) -> RemoteSnapshot:
        """Have every server hold its present values.

        Raises:
            SnapshotError: too many are held.
        """
        self.drop_abandoned()
        name = secrets.token_hex(8)
        try:
            told = [head for head, _ in self._take(Commit(wanted={}, snapshot=name))]
        except TensorKVError:
            self.drop(name)
            raise
        placed, versions, _ = self.placed(name, told)
        return RemoteSnapshot(self, self._data, name, placed, versions)

    def drop_abandoned(self) -> None:
        """Have servers release what was dropped without ``close``."""
        while True:
            try:
                name = self.abandoned.pop()
            except IndexError:
                # Another thread may have taken the last one.
                return
            self.drop(name)

    def placed(
        self, name: str, told: Sequence[Mapping[str, Any]], before: Told | None = None
    ) -> tuple[PlacedKeys, dict[Key, int], list[list[Key]]]:
        """Return the keys that servers hold under a name, and their versions; and the keys of each server.

        Args:
            name: under which they are read.
            told: of each server, the versions, and the keys with their metadata unless they are as before.
            before: what servers were told to be known.
        """
        earlier = [None] * len(told) if before is None else before.listings
        listings = [
            Listing.from_reply(head) if old is None or "keys" in head else old
            for head, old in zip(told, earlier, strict=True)
        ]
        if before is not None and all(new is old for new, old in zip(listings, earlier, strict=True)):
            placed = before.placed.of_snapshot(name)
        else:
            placed = PlacedKeys(pull_dtype=self._data.pull_dtype, snapshot=name)
            join_listings(listings, placed)
        self.told = Told(listings, placed)
        held = [list(listing.placed) for listing in listings]
        versions: dict[Key, int] = {}
        for head, keys in zip(told, held, strict=True):
            versions = {**dict(zip(keys, head["versions"], strict=True)), **versions}
        return placed, {key: versions[key] for key in placed}, held

    def commit_release(self, name: str, keys: list[Key] | None) -> None:
        """Have every server hold its present values of some keys, or of all, as a release that readers do not see.

        Raises:
            KeyNotFoundError: another client has deleted one of the keys.
        """
        told = [head["keys"] for head, _ in self._take_twice(Commit(wanted={}, release=name, keys=keys))]
        if keys is not None:
            held = set().union(*told)
            for key in keys:
                if key not in held:
                    raise KeyNotFoundError(
                        f"publish({quote(key)}): the key was deleted; leave it out, or init it again"
                    )

    def contents(self, *, releases: bool = False) -> list[ServerContents]:
        """Return everything that each server holds, with the releases if that is asked for."""
        found = []
        for head, payload in self._take_twice(Commit(wanted={}, releases=releases)):
            items = unpack(head["layout"].encode(), payload.numpy().data)
            # Replies lie in memory that the next request uses.
            tensors = {str(item.key): item.tensor.clone() for item in items}
            placed = {key: PlacedKey.from_metadata(data) for key, data in head["metadata"]}
            found.append(ServerContents(manifest.restore(head["body"], tensors), placed))
        return found

    def drop(self, name: str, timeout_s: float | None = None) -> None:
        """Have every server release a snapshot."""
        requests = [ServerRequest(server, DropSnapshot(snapshot=name)) for server in self._all]
        with suppress(TensorKVError), self._sessions.take() as session:
            session.send(requests, timeout_s=timeout_s)

    def _take_twice(self, commit: Commit) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Do as ``_take``, once more if a reply was lost or the snapshot was aborted because it took too long."""
        try:
            return self._take(commit)
        except SnapshotError:
            return self._take(commit)

    def _take(self, commit: Commit) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Run the two phases of a snapshot on every server, and return their replies to the second.

        Args:
            commit: the second phase, but for the requests that servers wait for, and the number of a release.
        """
        with self._sessions.take() as session:
            try:
                wanted: dict[str, list[Any]] = {}
                # Server 0 decides between clients that take snapshots at the same time: the first to prepare it.
                replies = session.send([ServerRequest(0, Prepare(release=commit.release))])
                number = replies[0].head.get("number", 0)
                if len(self._all) > 1:
                    replies += session.send([ServerRequest(server, Prepare()) for server in self._all[1:]])
                for reply in replies:
                    for client, (seq, servers) in reply.head["last_requests"].items():
                        if seq > wanted.get(client, [0])[0]:
                            wanted[client] = [seq, servers]
                attempt = "" if commit.release is None else secrets.token_hex(8)
                message = replace(commit, wanted=wanted, number=number, attempt=attempt)
                requests = [ServerRequest(server, message) for server in self._all]
                return [(reply.head, reply.payload.clone()) for reply in session.send(requests)]
            except BaseException:
                with suppress(TensorKVError):
                    session.send([ServerRequest(server, Abort()) for server in self._all])
                raise


class RemoteSnapshot(Reader):
    """A snapshot that servers hold; an engine for reading.

    Args:
        client: that has taken it.
        data: reads values.
        name: under which servers hold it.
        placed: its keys.
        versions: of its keys.
    """

    def __init__(
        self, client: SnapshotClient, data: DataClient, name: str, placed: PlacedKeys, versions: dict[Key, int]
    ) -> None:
        self._client, self._data, self._name, self._placed = client, data, name, placed
        self.versions: Mapping[Key, int] = versions

    def spec(self, verb: str, key: Key) -> KeySpec:
        placed = self._placed.get(key)
        if placed is None:
            raise KeyNotFoundError(f"{verb}({quote(key)}): the key was not there when this snapshot was taken")
        return placed.placement.spec

    def keys(self) -> list[Key]:
        return list(self._placed)

    def try_compiled(self, call: Call) -> bool:
        found = self._data.prepare(call, self._placed)
        if found is None:
            return False
        with outside_modes():
            self.protect(self._data.pull_plain, found)
        return True

    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        self._data.pull(keys, outs, self._placed)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._data.pull_regions(keys, regions, outs, self._placed)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._data.pull_rows(keys, ids, self._placed)

    def abandon(self) -> None:
        """Let the next snapshot release this one; the garbage collector calls it, at any point of the program."""
        self._client.abandoned.append(self._name)

    def close(self) -> None:
        self._client.drop(self._name)
