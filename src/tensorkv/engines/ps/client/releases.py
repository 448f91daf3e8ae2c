"""Releases of a store on servers: published on all of them or none, and read at any of their pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.engines.base import RENEW_AFTER, Outs, ReleaseReader, held_s, no_release
from tensorkv.engines.call import Call
from tensorkv.errors import (
    PushOutcomeUnknownError,
    ReleaseExistsError,
    ReleaseNotFoundError,
    ServerDeadError,
    SnapshotError,
    TensorKVError,
    WaitTimeoutError,
    WorkerError,
    quote,
)
from tensorkv.releases import elements
from tensorkv.releases.changes import Changes, KeyChange, release_digest, with_values

from ..messages import (
    Digests,
    DropSnapshot,
    EndRead,
    FindChanges,
    KeepReleases,
    ListReleases,
    OpenRelease,
    Publish,
    ShowRelease,
    Unpublish,
    WaitForRelease,
)
from ..released import OwnedPiece, PieceChange, decode_changes, merge
from .data import DataClient
from .layout import PlacedKey
from .rpc import ServerReply
from .session import ServerRequest, SessionPool
from .snapshot import RemoteSnapshot, SnapshotClient, Told

T = TypeVar("T")
# How long to wait before a release is looked for again that not all servers had.
_PAUSE_S = 0.01
# How long a server that is to hold a release for longer may take to answer.
_RENEW_S = 1.0


class ReleaseClient:
    """Publishes releases, and opens them.

    Server 0 decides which releases there are: one that readers see there is on all others, whether these know that it
    is finished or not. What server 0 does not have, because whoever published it has died, others drop with the next.

    Args:
        sessions: with the servers.
        data: of this client.
        snapshots: of this client.
        num_servers: of the store.
    """

    def __init__(self, sessions: SessionPool, data: DataClient, snapshots: SnapshotClient, num_servers: int) -> None:
        self.sessions, self.data, self._snapshots = sessions, data, snapshots
        self.servers = range(num_servers)

    def publish(self, name: str, keys: Sequence[Key] | None, keep: int | None) -> None:
        """Hold the present values of some keys, or of all, as a release."""
        listed = None if keys is None else list(keys)
        if len(self.servers) == 1:
            self._ask([0], Publish(release=name, keys=listed, keep=keep))
            return
        try:
            self._snapshots.commit_release(name, listed)
        except ReleaseExistsError:
            raise
        except BaseException:
            # A server has no room, slices are missing, a signal came ... Readers have not seen it.
            self._forget(name)
            raise
        try:
            (told,) = self._ask([0], ShowRelease(release=name, keep=keep))
        except BaseException:
            # It took too long, server 0 was restarted meanwhile or cannot write, a signal came ...
            self._forget(name)
            raise
        self._drop_others(told)

    def _forget(self, name: str) -> None:
        """Have servers drop a release that this client has begun, and that readers have not seen."""
        with suppress(TensorKVError):
            (told,) = self._ask([0], Unpublish(release=name, missing_ok=True))
            # Server 0 may have shown it, though its reply was lost.
            if name not in told.head["releases"]:
                self._ask(self.servers[1:], Unpublish(release=name, missing_ok=True))

    def unpublish(self, name: str) -> None:
        """Drop a release, once nobody reads it."""
        (told,) = self._ask([0], Unpublish(release=name))
        self._drop_others(told)

    def _drop_others(self, told: ServerReply) -> None:
        """Have the other servers drop the releases that server 0 does not have any more."""
        if len(self.servers) > 1:
            fields = {name: told.head[name] for name in ("number", "releases", "generation")}
            self._ask(self.servers[1:], KeepReleases(**fields))

    def listed(self) -> list[tuple[str, int]]:
        """Return names and numbers of the releases, from the oldest to the newest."""
        (told,) = self._ask([0], ListReleases())
        return [(name, number) for name, number in told.head["releases"]]

    def open(self, name: str, lease_s: float, timeout_s: float | None = None) -> RemoteRelease:
        """Open a release for reading."""
        self._snapshots.drop_abandoned()
        token, before = secrets.token_hex(8), self._snapshots.told
        known = [None] * len(self.servers) if before is None else [each.changes for each in before.listings]
        message = OpenRelease(release=name, snapshot=token, lease_s=held_s(lease_s))
        requests = [
            ServerRequest(server, replace(message, known=own)) for server, own in zip(self.servers, known, strict=True)
        ]
        try:
            with self.sessions.take() as session:
                told = [reply.head for reply in session.send(requests, timeout_s=timeout_s)]
            if len({each["generation"] for each in told}) > 1:
                raise ReleaseNotFoundError(f"the release {quote(name)} is being replaced by load; open it again")
            return RemoteRelease(self, self._snapshots, name, token, lease_s, told, before)
        except TensorKVError:
            self._snapshots.drop(token, _RENEW_S)
            raise

    def wait(self, after: str | None, timeout_s: float, lease_s: float) -> RemoteRelease:
        """Wait for a release that is newer than another one, and open the newest."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                (told,) = self._ask([0], WaitForRelease(after=after), max(0.001, deadline - time.monotonic()))
            except (WaitTimeoutError, PushOutcomeUnknownError) as error:
                # The latter if the server could not be reached all the time.
                raise no_release(after, timeout_s) from error
            # Others may have dropped it meanwhile, or a load may not have reached all servers.
            if told.head["name"] is not None:
                try:
                    return self.open(told.head["name"], lease_s, max(0.001, deadline - time.monotonic()))
                except ReleaseNotFoundError:
                    pass
                except (WaitTimeoutError, PushOutcomeUnknownError) as error:
                    raise no_release(after, timeout_s) from error
            if time.monotonic() >= deadline:
                raise no_release(after, timeout_s)
            time.sleep(_PAUSE_S)

    def _ask(self, servers: Sequence[int], message: Any, timeout_s: float | None = None) -> list[ServerReply]:
        with self.sessions.take() as session:
            replies = session.send([ServerRequest(server, message) for server in servers], timeout_s=timeout_s)
            # Replies lie in memory that the next request uses.
            return [reply._replace(payload=reply.payload.clone()) for reply in replies]

    def ask_for(self, message: Any, timeout_s: float | None = None) -> list[ServerReply]:
        """Return the replies of all servers to a message."""
        return self._ask(self.servers, message, timeout_s)


class RemoteRelease(RemoteSnapshot, ReleaseReader):
    """A release that servers hold; an engine for reading.

    Args:
        client: that has opened it.
        snapshots: of the client.
        name: of the release.
        token: under which servers hold it for this reader.
        lease_s: how long it stays after it was last read.
        told: what each server has told of it.
        before: what servers had told before.
    """

    def __init__(
        self,
        client: ReleaseClient,
        snapshots: SnapshotClient,
        name: str,
        token: str,
        lease_s: float,
        told: Sequence[Mapping[str, Any]],
        before: Told | None,
    ) -> None:
        placed, versions, self._held = snapshots.placed(token, told, before)
        """The keys of which each server holds something."""
        RemoteSnapshot.__init__(self, snapshots, client.data, token, placed, versions)
        ReleaseReader.__init__(self, name, told[0]["number"], versions)
        self._releases, self._lease_s, self._generation = client, lease_s, told[0]["generation"]
        self._renewed = time.monotonic()

    def _again(self, work: Callable[..., T], *args: Any) -> T:
        """Do work; if a server has been restarted and does not know this reader, open the release there once more."""
        try:
            self._renew()
            return work(*args)
        except SnapshotError:
            held, generation = held_s(self._lease_s), self._generation
            message = OpenRelease(release=self.name, snapshot=self._name, lease_s=held, generation=generation)
            self.protect(self._releases.ask_for, message)
            return work(*args)

    def _renew(self) -> None:
        """Hold the release for longer, on the servers as well that hold none of the keys that are read."""
        now = time.monotonic()
        if len(self._releases.servers) > 1 and now - self._renewed > self._lease_s * RENEW_AFTER:
            self._renewed = now
            # A server that does not answer must not keep this reader from what the others have.
            with suppress(WaitTimeoutError, PushOutcomeUnknownError, ServerDeadError):
                self.protect(self._releases.ask_for, EndRead(snapshot=self._name), _RENEW_S)

    def pull(self, call: Call) -> None:
        self._again(super().pull, call)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._again(super().pull_regions, keys, regions, outs)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._again(super().pull_rows, keys, ids)

    def digest(self) -> str:
        replies = self._again(self._releases.ask_for, Digests(release=self.name, snapshot=self._name))
        digests: dict[Key, int] = {}
        for reply in replies:
            for key, number in zip(reply.head["keys"], reply.payload.numpy().view(np.uint64).tolist(), strict=True):
                digests[key] = elements.add(digests.get(key, 0), number)
        return release_digest((key, placed.placement.spec, digests[key]) for key, placed in self._placed.items())

    def changes(self, since: str) -> Changes:
        """Return what has changed since another release; all values if a server does not hold that any more.

        They are exact, whatever ``pull_dtype`` is: the digest is that of the values on the servers.
        """
        replies = self._find_changes(since)
        base: str | None = since
        found = None if any(reply.head["base"] is None for reply in replies) else self._merged(since, replies)
        if found is None:
            # Not since a release that only some servers hold.
            base, found = None, self._merged(None, self._find_changes(None)) or []
        return Changes(base, self.name, self._again(with_values, found, self._pull_whole))

    def _pull_whole(self, keys: Sequence[Key], outs: Outs) -> None:
        self._data.pull(keys, outs, self._placed.exact)

    def _find_changes(self, since: str | None) -> list[ServerReply]:
        message = FindChanges(release=self.name, since=since, snapshot=self._name)
        return self._again(self._releases.ask_for, message)

    def _merged(self, since: str | None, replies: Sequence[ServerReply]) -> list[KeyChange] | None:
        """Return the changes of whole values; None: they are to be asked for without the older release.

        Args:
            since: the older release.
            replies: of the servers.
        """
        pieces: dict[Key, dict[int, PieceChange]] = {}
        gone: dict[Key, dict[int, PieceChange]] = {}
        for server, (reply, keys) in enumerate(zip(replies, self._held, strict=True)):
            lost = reply.head["deleted"]
            found = decode_changes(reply.payload.numpy(), len(keys) + len(lost))
            for key, change in zip(keys, found, strict=False):
                pieces.setdefault(key, {})[server] = change
            for key, change in zip(lost, found[len(keys) :], strict=True):
                gone.setdefault(key, {})[server] = change
        self._again(self._pull_pieces, pieces)
        merged = [_merge(key, placed, pieces[key]) for key, placed in self._placed.items()]
        if gone and since is not None:
            try:
                older = self._releases.open(since, self._lease_s)
            except ReleaseNotFoundError:
                return None
            merged += [_merge(key, older._placed[key], own) for key, own in gone.items() if key in older._placed]
            older.close()
        whole = [each for each in merged if each is not None]
        return whole if len(whole) == len(merged) else None

    def _pull_pieces(self, changes: Mapping[Key, dict[int, PieceChange]]) -> None:
        """Add the values of pieces that have changed as a whole while others of the same key have not."""
        wanted = []
        for key, own in changes.items():
            placement = self._placed[key].placement
            kinds = {each.kind for each in own.values()}
            if "dense" in kinds and len(kinds) > 1 and not placement.spec.is_table:
                others = [(0, size) for size in placement.spec.shape[1:]]
                for server, start, stop in placement.pieces:
                    if own[server].kind == "dense":
                        wanted.append((key, server, Region(((start, stop), *others))))
        keys, regions = [key for key, _, _ in wanted], [region for _, _, region in wanted]
        dtypes = [self._placed[key].placement.spec.dtype for key in keys]
        parts = [
            torch.empty(region.shape, dtype=dtype, device="cpu") for region, dtype in zip(regions, dtypes, strict=True)
        ]
        if wanted:
            self._data.pull_regions(keys, regions, [[part] for part in parts], self._placed.exact)
        for (key, server, _), part in zip(wanted, parts, strict=True):
            changes[key][server] = changes[key][server]._replace(content=elements.bytes_of(part))

    def close(self) -> None:
        """Let go of it."""
        with suppress(TensorKVError):
            self._releases.ask_for(DropSnapshot(snapshot=self._name))


def _merge(key: Key, placed: PlacedKey, changes: Mapping[int, PieceChange]) -> KeyChange | None:
    placement = placed.placement
    if any(server not in changes for server in placement.servers):
        raise WorkerError("changes: a server has sent a malformed reply")
    row = placement.spec.shape[1:].numel()
    found = [OwnedPiece(start * row, stop * row, changes[server]) for server, start, stop in placement.pieces]
    return merge(key, placement.spec, found)
