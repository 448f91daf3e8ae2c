"""Durable shards: every change is written to a write-ahead log before it is applied.

A change is checked, its sums are made beside the values, it is written to the log, and then it is applied. Opening the
folder reads the snapshot and replays the logged changes, by the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, raw_bytes
from tensorkv.arrays.rows import Rows
from tensorkv.errors import StorageError, quote
from tensorkv.shard import nonfinite
from tensorkv.shard.changes import Change, Delete, PlainPush, Push, Put, Restore, RestoreStates, SetRule, TakenSlices
from tensorkv.shard.entry import Entry
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.pool import OneTorchThread
from tensorkv.shard.reduce import Reduce
from tensorkv.shard.rules import Assign, CallUpdater, LostUpdater, Rule
from tensorkv.shard.shard import Shard

from . import manifest
from .changes import Events, add_tensors, decode, encode, read_contents, read_slices, slice_items
from .dedup import AppliedRequests
from .record import Record, crc32
from .wal import Durability, WriteAheadLog

# So many changes are replayed before their result is compared with the digest of the original values.
DIGEST_EVERY = 64
# Small tensors of a snapshot share a record.
_GROUP_NBYTES = 1 << 20

_logger = logging.getLogger(__name__)


def open_shard(
    path: str,
    *,
    durability: Durability = "process",
    log_nbytes: int | None = None,
    wait_s: float = 10.0,
    stamp: str = "",
    nonfinite: NonFinite = "pass",
    reduce: Reduce = "sum",
    threads: int | None = None,
    applied: AppliedRequests | None = None,
) -> Shard:
    """Open a shard that is kept in a folder; ``Shard.close`` closes the folder.

    Args:
        path: a folder of this shard's own.
        durability, log_nbytes, wait_s, stamp: as for ``WriteAheadLog``.
        nonfinite, reduce, threads: as for ``Shard``.
        applied: a dedup table that is kept with the values.

    Raises:
        StorageError: another process has the folder open, or its files are damaged.
    """
    shard = Shard(nonfinite=nonfinite, reduce=reduce, threads=threads)
    wal = WriteAheadLog(path, durability, log_nbytes, wait_s, stamp)
    log = shard.log = DurableLog(wal, AppliedRequests() if applied is None else applied)
    try:
        # What torch computes may depend on its number of threads: pushes and replays have one.
        with OneTorchThread():
            log.recover(shard)
    except BaseException:
        log.close()
        raise
    return shard


class DurableLog:
    """Writes the changes of a shard to a write-ahead log and replays them.

    Args:
        wal: where they are written.
        applied: the dedup table, which is logged with the changes.
    """

    def __init__(self, wal: WriteAheadLog, applied: AppliedRequests) -> None:
        self._wal = wal
        self.applied = applied
        self._digests = _Digests()

    @property
    def counts(self) -> dict[str, int]:
        """Records and bytes written, snapshots made, the length of the log in bytes, and its last record."""
        return {**self._wal.counts, "log_nbytes": self._wal.nbytes, "lsn": self._wal.lsn}

    @property
    def is_superseded(self) -> bool:
        """Whether another process has opened the folder since, and the values here are old."""
        return self._wal.is_superseded

    def close(self) -> None:
        """Close the folder."""
        self._wal.close()

    # ------------------------------------------------------------ log, then apply

    def commit(self, shard: Shard, change: Change) -> bool:
        """Log a change and apply it; if that fails, nothing has changed."""
        match change:
            case Push() if isinstance(shard.rule, CallUpdater):
                return self._commit_updated(shard, change, shard.rule)
            case Push():
                return self._commit_logged(shard, change.summed())
            case Restore() | RestoreStates():
                return self._commit_snapshot(shard, change)
        return self._commit_logged(shard, change)

    def _commit_logged(self, shard: Shard, change: Change) -> bool:
        with OneTorchThread():
            self._wal.append(encode(change))
            rule = shard.rule
            try:
                filled = self._apply(shard, change)
                if change.requests:
                    self.applied.add(change.requests, change.updated())
            except BaseException:
                self._roll_back(shard, rule, self._wal.undo)
                raise
            self._digests.note(change)
            self._maintain(shard)
        return filled

    def _commit_updated(self, shard: Shard, change: Push, rule: CallUpdater) -> bool:
        """Log the values that an updater computes, since no replay can run it again."""
        values: list[Any] = []
        try:
            for entry, parts in zip(change.entries, change.parts, strict=True):
                total = nonfinite.total(entry, parts, may_share=False)
                is_rows = isinstance(total, Rows)
                values.append(rule.updated_rows(entry, total) if is_rows else rule.updated(entry, total))
        except BaseException:
            # As in any store, the keys before the one that failed are updated; but a request is applied as a whole.
            if values and not change.requests:
                done = change.entries[: len(values)]
                ended = [entry for entry in change.slices.ended if entry.key in {each.key for each in done}]
                self._commit_logged(shard, Put(done, values, TakenSlices(ended=ended)))
            raise
        return self._commit_logged(shard, Put(change.entries, values, change.slices, requests=change.requests))

    def _commit_snapshot(self, shard: Shard, change: Change) -> bool:
        """Make a change that is too large for the log, and a snapshot of its result."""
        with OneTorchThread():
            rule = shard.rule
            try:
                self._apply(shard, change)
                self.applied.add(change.requests)
                if not self.snapshot(shard):
                    raise StorageError(f"{self._wal.path}: what was loaded cannot be written; nothing has changed")
            except BaseException:
                self._roll_back(shard, rule)
                raise
        return False

    def _apply(self, shard: Shard, change: Change) -> bool:
        if isinstance(change, Events):
            self.applied.apply(change.events)
            return False
        before = change.keys if isinstance(change, Delete) else shard.keys() if isinstance(change, Restore) else ()
        filled = shard.apply(change)
        if before:
            self.applied.forget_keys([key for key in before if key not in shard])
        return filled

    def _roll_back(self, shard: Shard, rule: Rule, undo: Callable[[], None] | None = None) -> None:
        """Restore a shard from the log, after a change that failed halfway.

        Args:
            shard: to be restored.
            rule: before the change.
            undo: removes the change from the log.
        """
        before = shard.releases.before_replace()
        try:
            if undo is not None:
                undo()
            self.recover(shard)
            # A log has no function and no readers.
            if isinstance(rule, CallUpdater) and isinstance(shard.rule, LostUpdater):
                shard.apply(SetRule(rule))
            # Otherwise the folder may have the releases that were loaded.
            if not self._wal.is_broken:
                shard.releases.take_readers(before)
        except BaseException as error:
            shard.fail(
                f"{self._wal.path}: a change failed halfway and could not be undone ({error}); "
                "close this store and open it again"
            )
            raise

    # ------------------------------------------------------------ digests and snapshots

    def _maintain(self, shard: Shard) -> None:
        # The change counts already, whatever goes wrong here.
        try:
            if self._digests.count >= DIGEST_EVERY:
                self._wal.append(Record({"verb": "digest", "keys": self._digests.of(shard)}))
                self._digests.clear()
            if self._wal.is_due(lambda: _nbytes(shard)):
                # A replay from an older snapshot must begin its next digest where a replay from this one does.
                self._wal.append(Record({"verb": "mark"}))
                self._digests.clear()
                self._wal.begin_snapshot(self._snapshot_records(shard))
        except Exception as error:
            _logger.warning("%s: no digest or snapshot: %s", self._wal.path, error)

    def snapshot(self, shard: Shard) -> bool:
        """Replace the log by a snapshot; return whether there was room for it."""
        made = self._wal.snapshot(self._snapshot_records(shard))
        if made:
            self._digests.clear()
        return made

    def _snapshot_records(self, shard: Shard) -> Iterator[Record]:
        with shard.frozen() as (entries, rule):
            releases = shard.saved_releases(visible_only=False)
            is_used = releases.numbers or releases.held
            body, tensors = manifest.describe("store", entries, rule, releases=releases if is_used else None)
            waiting = [(entry.key, entry.incomplete) for entry in entries if entry.incomplete is not None]
        for place, (key, slices) in enumerate(waiting):
            tensors |= {f"slices/{place}/{item.role}": item.tensor for item in slice_items(key, slices)}
        group: list[Item] = []
        nbytes = 0
        # Adjacent tensors are written at once.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            group.append(Item(name, "tensor", tensor))
            nbytes += tensor.nbytes
            if nbytes > _GROUP_NBYTES:
                yield Record.pack({"verb": "tensors"}, group)
                group, nbytes = [], 0
        yield Record.pack({"verb": "tensors"}, group)
        session = self.applied.describe()
        applied = {"clients": self.applied.last, **({"session": session} if session else {})}
        slices = {"slices": [key for key, _ in waiting]} if waiting else {}
        yield Record({"verb": "end", "body": body, **applied, **slices, "notes": shard.notes})

    # ------------------------------------------------------------ replay

    def recover(self, shard: Shard) -> None:
        """Restore a shard from the folder, and begin a log segment.

        Raises:
            StorageError: damaged, or not what a shard writes.
        """
        shard.apply(Restore([], Assign()))
        shard.notes.clear()
        shard.releases.clear()
        self.applied.restore({}, {})
        self._digests.clear()
        tensors: manifest.Tensors = {}
        for record, is_snapshot in self._wal.read():
            try:
                if is_snapshot:
                    self._replay_snapshot(shard, record, tensors)
                else:
                    self._replay(shard, record)
            except StorageError as error:
                raise StorageError(f"{self._wal.path}: record {self._wal.lsn}: {error}") from None
            except Exception as error:  # whatever malformed data leads to
                raise StorageError(
                    f"{self._wal.path}: record {self._wal.lsn} is not one that a store writes: {error}"
                ) from error
        self._wal.begin()

    def _replay_snapshot(self, shard: Shard, record: Record, tensors: manifest.Tensors) -> None:
        head = record.head
        add_tensors(record, tensors)
        if head["verb"] != "end":
            return
        waiting = [
            Item(key, role, tensors.pop(f"slices/{place}/{role}"))
            for place, key in enumerate(head.get("slices", ()))
            for role in ("bounds", "slices")
        ]
        contents = read_contents(head["body"], tensors, None)
        rule = LostUpdater() if contents.rule is None else contents.rule
        shard.apply(Restore(contents.entries, rule, contents.releases, head["notes"]))
        self.applied.restore(head["clients"], head.get("session", {}))
        # Releases have values from before that are whole.
        shard.apply(Push([], [], slices=TakenSlices(read_slices(waiting, shard))))

    def _replay(self, shard: Shard, record: Record) -> None:
        head = record.head
        match head.get("verb"):
            case "mark":
                self._digests.clear()
            case "digest":
                self._digests.check(shard, head["keys"])
            case _:
                change = decode(record, shard)
                self._apply(shard, change)
                self.applied.replay(head.get("requests", ()), change.updated())
                self._digests.note(change)


class _Digests:
    """Checksums of what has changed since the last digest; a replay has to give the same."""

    def __init__(self) -> None:
        self.count = 0
        """Changes since the last digest."""
        # Of a key that received rows only: their ids.
        self._changed: dict[Key, list[torch.Tensor] | None] = {}

    def clear(self) -> None:
        self.count, self._changed = 0, {}

    def note(self, change: Change) -> None:
        """Remember what the next digest has to cover: each value, or rows of it, that has changed."""
        self.count += 1
        match change:
            case Push(entries=entries, parts=parts):
                for entry, (total,) in zip(entries, parts, strict=True):
                    self._note(entry, total)
            case Put(entries=entries, values=values):
                for entry, value in zip(entries, values, strict=True):
                    self._note(entry, value)
            case PlainPush():
                self._changed.update(dict.fromkeys(change.updated()))
            case Delete(keys=keys):
                for key in keys:
                    # A key that is initialised again may have other rows, or none.
                    self._changed.pop(key, None)

    def _note(self, entry: Entry, total: Any) -> None:
        if not isinstance(total, Rows):
            self._changed[entry.key] = None
        elif (ids := self._changed.setdefault(entry.key, [])) is not None:
            # The caller may change its ids after the push.
            ids.append(total.ids.clone())

    def of(self, shard: Shard) -> list[list[Any]]:
        """Return each changed key with a checksum of its version, value and state."""
        return [[key, _checksum(shard.entry("push", key), ids)] for key, ids in self._changed.items() if key in shard]

    def check(self, shard: Shard, written: Any) -> None:
        """Raise StorageError if a replay has not led to the checksums that were written."""
        mine = self.of(shard)
        if mine != written:
            differ = next((key for (key, _), other in zip(mine, written, strict=False) if [key, _] != other), None)
            raise StorageError(
                f"replaying the log gives other values than before (first at {quote(differ)}); causes are another "
                "processor or version of torch, or an array that was changed during its push; open the store where it "
                "was written, save() it there and load() it here"
            )
        self.clear()


def _checksum(entry: Entry, ids: list[torch.Tensor] | None) -> int:
    """Return a checksum of a key's version, value and state (of ``ids``: those rows of the value)."""
    states = [entry.state[name] for name in sorted(entry.state)]
    tensors: list[Any] = [entry.value, *states]
    if ids is not None:
        tensors = [entry.read_rows(torch.unique(torch.cat(ids))), *(state for state in states if state.numel() == 1)]
    checksum = crc32(str(entry.version).encode())
    for tensor in tensors:
        checksum = crc32(raw_bytes(tensor), checksum)
    return checksum


def _nbytes(shard: Shard) -> int:
    with shard.frozen() as (entries, _):
        return sum(e.value.nbytes + sum(state.nbytes for state in e.state.values()) for e in entries)
