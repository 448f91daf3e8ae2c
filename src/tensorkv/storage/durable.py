"""DurableShard: a Shard whose every change is written to a log before it is made.

A change is checked, its sums are made beside the values, it is written to the log, and then applied. Opening the
folder again reads the snapshot and makes the logged changes once more, by the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, encode_layout, raw_bytes
from tensorkv.arrays.rows import Rows
from tensorkv.errors import StorageError, quote
from tensorkv.shard import nonfinite
from tensorkv.shard.entry import Batch, Entry
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.optimizers import Optimizer
from tensorkv.shard.plan import Column, Plan
from tensorkv.shard.pool import OneTorchThread
from tensorkv.shard.rules import Assign, CallUpdater, LostUpdater, Rule, check_push
from tensorkv.shard.shard import Shard

from . import changes, manifest
from .dedup import Clients
from .record import Record
from .wal import Durability, WriteAheadLog

# So many records are replayed before what they led to is compared with what it was.
DIGEST_EVERY = 64
# Small tensors of a snapshot share a record.
_TOGETHER = 1 << 20

_logger = logging.getLogger(__name__)


class DurableShard(Shard):
    """Values that outlive their process.

    Args:
        path: a folder of this shard's own.
        durability, log_nbytes, wait_s: as for ``WriteAheadLog``.
        nonfinite, threads: as for ``Shard``.
        clients: whose requests are logged with what they change.

    Raises:
        StorageError: another process has the folder open, or what is in it cannot be trusted.
    """

    def __init__(
        self,
        path: str,
        *,
        durability: Durability = "process",
        log_nbytes: int | None = None,
        wait_s: float = 10.0,
        nonfinite: NonFinite = "pass",
        threads: int | None = None,
        clients: Clients | None = None,
    ) -> None:
        super().__init__(nonfinite=nonfinite, threads=threads)
        self.clients = Clients() if clients is None else clients
        self.notes: dict[str, Any] = {}
        self._broken: str | None = None
        self._layouts: WeakKeyDictionary[Plan, bytes] = WeakKeyDictionary()
        self._touched: dict[Key, list[torch.Tensor] | None] = {}
        self._unproven = 0
        self._wal = WriteAheadLog(path, durability, log_nbytes, wait_s)
        try:
            # What torch computes may depend on its number of threads: pushes and replays have one.
            with OneTorchThread():
                self._recover()
        except BaseException:
            self._wal.close()
            raise

    @property
    def wal_counts(self) -> dict[str, int]:
        """Records and bytes written, snapshots made, and the length of the log in bytes."""
        return {**self._wal.counts, "log_nbytes": self._wal.nbytes, "lsn": self._wal.lsn}

    def one(self, key: Key, value: Any, out: Any) -> int | None:
        if value is not None:
            return None
        self._refuse_broken()
        return super().one(key, value, out)

    def entry(self, verb: str, key: Key) -> Entry:
        self._refuse_broken()
        return super().entry(verb, key)

    def _plan(self, keys: Sequence[Key], *, pushes: bool) -> Plan | None:
        plan = super()._plan(keys, pushes=pushes)
        # Sums that are logged are made beside the values, which costs more than a plan gains without the kernel.
        return plan if plan is None or plan.is_compiled or not pushes else None

    # ------------------------------------------------------------ every change, logged

    def _hold(self, entries: Sequence[Entry]) -> None:
        body, tensors = manifest.describe("store", entries, Assign())
        items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
        self._commit(Record.pack({"verb": "init", "body": body}, items), partial(super()._hold, entries))

    def _forget(self, keys: Sequence[Key]) -> None:
        self._commit(Record({"verb": "delete", "keys": list(keys)}), partial(self._drop, keys))

    def _take_rule(self, rule: Rule) -> None:
        self._commit(Record({"verb": "rule", **changes.describe_rule(rule)}), partial(self._change_rule, rule))

    def _apply(
        self, entries: Sequence[Entry], parts: Sequence[list[Any]], outs: Sequence[Sequence[torch.Tensor]]
    ) -> bool:
        if isinstance(self._rule, CallUpdater):
            self._update(self._rule, entries, parts)
            return False
        pairs = zip(entries, parts, strict=True)
        sums = [nonfinite.total(entry, key_parts, may_share=True) for entry, key_parts in pairs]
        record = Record.pack({"verb": "push"}, changes.items_of(entries, sums))
        change = partial(super()._apply, entries, [[total] for total in sums], outs)
        filled: bool = self._commit(record, change, entries, sums)
        return filled

    def _apply_plan(
        self, plan: Plan, columns: list[Column], targets: list[Column], optimizer: Optimizer | None
    ) -> None:
        if not columns:
            super()._apply_plan(plan, columns, targets, optimizer)
            return
        total = plan.total(columns)
        layout = self._layouts.get(plan)
        if layout is None:
            layout = encode_layout([(entry.key, "sum", entry.spec.dtype, entry.spec.shape) for entry in plan.entries])
            self._layouts[plan] = layout
        record = Record({"verb": "push"}, layout, [raw_bytes(total)])
        change = partial(super()._apply_plan, plan, [plan.form.flat(total)], targets, optimizer)
        self._commit(record, change, plan.entries, [total] * len(plan.entries))

    def _update(self, rule: CallUpdater, entries: Sequence[Entry], parts: Sequence[list[Any]]) -> None:
        """Take over what an updater makes of values, which no replay could make again."""
        made: list[Any] = []
        try:
            for entry, key_parts in zip(entries, parts, strict=True):
                made.append(changes.updated(rule, entry, nonfinite.total(entry, key_parts, may_share=False)))
        except BaseException:
            # The keys before the one that failed are changed, as in any store; but a request is whole or not made.
            if made and not self.clients.current:
                self._put(entries[: len(made)], made)
            raise
        self._put(entries, made)

    def _put(self, entries: Sequence[Entry], made: Sequence[Any]) -> None:
        self._commit(
            Record.pack({"verb": "put"}, changes.items_of(entries, made)),
            partial(changes.put, entries, made),
            entries,
            made,
        )

    def _become(self, entries: Sequence[Entry], rule: Rule) -> None:
        self._write_down(partial(super()._become, entries, rule))

    def _take_states(self, saved: Sequence[Entry], rule: Rule) -> None:
        self._write_down(partial(super()._take_states, saved, rule))

    def note(self, name: str, data: Any) -> None:
        """Keep some plain data, for JSON, beside the values; None takes it away."""
        with self._lock:
            self._commit(Record({"verb": "note", "name": name, "data": data}), partial(self._take_note, name, data))

    def remember(self, events: Sequence[Any]) -> None:
        """Have the clients take over what has changed besides their requests, plain data for JSON."""
        with self._lock:
            self._commit(Record({"verb": "session", "events": list(events)}), partial(self.clients.apply, events))

    def _take_note(self, name: str, data: Any) -> None:
        if data is None:
            self.notes.pop(name, None)
        else:
            self.notes[name] = data

    def close(self) -> None:
        with self._lock:
            # One that is broken may be closed.
            super().refuse_reentry()
            self._broken = None
            try:
                super().close()
            finally:
                self._wal.close()

    def refuse_reentry(self) -> None:
        """Raise UpdaterError if an updater is running, StorageError if memory may not be what the log says."""
        super().refuse_reentry()
        self._refuse_broken()

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise StorageError(f"{self._wal.path}: {self._broken}; close this store and open it again")

    def _commit(
        self, record: Record, change: Callable[[], Any], entries: Sequence[Entry] = (), sums: Sequence[Any] = ()
    ) -> Any:
        requests = list(self.clients.current)
        if requests:
            record = replace(record, head={**record.head, "requests": requests})
        with OneTorchThread():
            self._wal.append(record)
            try:
                result = change()
            except BaseException:
                self._take_back(self._wal.undo)
                raise
            self.clients.done(requests, [entry.key for entry in entries])
            self._note(entries, sums)
            self._look_after_the_log()
        return result

    def _take_back(self, undo: Callable[[], None] | None = None) -> None:
        """Become what the log says, a change having failed."""
        try:
            if undo is not None:
                undo()
            self._recover()
        except BaseException as error:
            self._broken = f"a change failed halfway and could not be taken back ({error})"
            raise

    def _look_after_the_log(self) -> None:
        # The change counts already, whatever goes wrong here.
        try:
            if self._unproven >= DIGEST_EVERY:
                self._wal.append(Record({"verb": "digest", "keys": self._digests()}))
                self._touched, self._unproven = {}, 0
            if self._wal.is_due(self._state_nbytes):
                # Whoever replays from before the snapshot has to begin anew where those do who replay from it.
                self._wal.append(Record({"verb": "mark"}))
                self._touched, self._unproven = {}, 0
                self._wal.begin_snapshot(self._snapshot_records())
        except Exception as error:
            _logger.warning("%s: no digest or snapshot: %s", self._wal.path, error)

    def _write_down(self, change: Callable[[], None]) -> None:
        """Make a change that is too large for the log, and a snapshot of what it leads to."""
        requests = list(self.clients.current)

        with OneTorchThread():
            try:
                change()
                self.clients.done(requests)
                if not self._snapshot():
                    raise StorageError(f"{self._wal.path}: what was loaded cannot be written; all is as it was")
            except BaseException:
                self._take_back()
                raise

    def _snapshot(self) -> bool:
        made = self._wal.snapshot(self._snapshot_records())
        if made:
            self._touched, self._unproven = {}, 0
        return made

    def _snapshot_records(self) -> Iterator[Record]:
        body, tensors = manifest.describe("store", list(self._entries.values()), self._rule)
        group: list[Item] = []
        nbytes = 0
        # What lies side by side is written at once.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            group.append(Item(name, "tensor", tensor))
            nbytes += tensor.nbytes
            if nbytes > _TOGETHER:
                yield Record.pack({"verb": "tensors"}, group)
                group, nbytes = [], 0
        yield Record.pack({"verb": "tensors"}, group)
        yield Record({"verb": "end", "body": body, **self._described_clients(), "notes": self.notes})

    def _described_clients(self) -> dict[str, Any]:
        session = self.clients.describe()
        return {"clients": self.clients.last, **({"session": session} if session else {})}

    def _state_nbytes(self) -> int:
        return sum(e.value.nbytes + sum(t.nbytes for t in e.state.values()) for e in self._entries.values())

    # ------------------------------------------------------------ recovery

    def _recover(self) -> None:
        """Become what the log says."""
        self._plans.clear()
        self._entries, self._key_type, self._rule = {}, None, Assign()
        self.clients.restore({}, {})
        self.notes.clear()
        self._touched, self._unproven = {}, 0
        tensors: manifest.Tensors = {}
        for record, of_snapshot in self._wal.read():
            try:
                if of_snapshot:
                    self._take_snapshot_record(record, tensors)
                else:
                    self._replay(record)
            except StorageError as error:
                raise StorageError(f"{self._wal.path}: record {self._wal.lsn}: {error}") from None
            except Exception as error:  # whatever the data leads to
                raise StorageError(
                    f"{self._wal.path}: record {self._wal.lsn} is not one that a store writes: {error}"
                ) from error
        self._wal.begin()

    def _take_snapshot_record(self, record: Record, tensors: manifest.Tensors) -> None:
        changes.name_tensors(record, tensors)
        if record.head["verb"] != "end":
            return
        contents = changes.restore(record.head["body"], tensors, None)
        Shard._hold(self, contents.entries)
        self._rule = LostUpdater() if contents.rule is None else contents.rule
        self.clients.restore(record.head["clients"], record.head.get("session", {}))
        self.notes.update(record.head["notes"])

    def _replay(self, record: Record) -> None:
        head = record.head
        entries: list[Entry] = []
        match head.get("verb"):
            case "push":
                entries = self._replay_push(record)
            case "put":
                entries, made = self._read_items(record)
                changes.put(entries, made)
                self._note(entries, made)
            case "init":
                contents = changes.restore(head["body"], changes.name_tensors(record, {}), self._rule)
                self.check_new([entry.key for entry in contents.entries])
                Shard._hold(self, contents.entries)
                self._note((), ())
            case "delete":
                self._drop(changes.as_list(head["keys"]))
                self._note((), ())
            case "rule":
                self._change_rule(changes.restore_rule(head, self._entries))
                self._note((), ())
            case "note":
                self._take_note(head["name"], head["data"])
                self._note((), ())
            case "session":
                self.clients.apply(changes.as_list(head["events"]))
                self._note((), ())
            case "mark":
                self._touched, self._unproven = {}, 0
            case "digest":
                self._check_digests(head["keys"])
            case verb:
                raise StorageError(f"{verb!r} is unknown to this version of tensorkv; use a newer one")
        self.clients.replay(head.get("requests", ()), [entry.key for entry in entries])

    def _replay_push(self, record: Record) -> list[Entry]:
        entries, sums = self._read_items(record)
        keys, parts = [entry.key for entry in entries], [[total] for total in sums]
        check_push(Batch("push", keys, parts), entries, self._rule)
        Shard._apply(self, entries, parts, ())
        self._note(entries, sums)
        return entries

    def _read_items(self, record: Record) -> tuple[list[Entry], list[Any]]:
        items = iter(record.items())
        entries: list[Entry] = []
        sums: list[Any] = []
        for item in items:
            entry = self.entry("push", item.key)
            entries.append(entry)
            sums.append(changes.read_sum(entry, item, items))
        if len({entry.key for entry in entries}) < len(entries):
            raise StorageError("a key stands there twice")
        return entries, sums

    def _drop(self, keys: Sequence[Key]) -> None:
        Shard._forget(self, keys)
        for key in keys:
            # A key that comes again may have other rows, or none.
            self._touched.pop(key, None)

    def _change_rule(self, rule: Rule) -> None:
        Shard._take_rule(self, rule)

    # ------------------------------------------------------------ digests

    def _note(self, entries: Sequence[Entry], sums: Sequence[Any]) -> None:
        """Remember what the next digest is to cover: every value, or row of one, that has changed."""
        self._unproven += 1
        for entry, total in zip(entries, sums, strict=True):
            if not isinstance(total, Rows):
                self._touched[entry.key] = None
            elif (ids := self._touched.setdefault(entry.key, [])) is not None:
                ids.append(total.ids)

    def _digests(self) -> list[list[Any]]:
        """Return each touched key with a checksum of its version, its value and its state."""
        return [
            [key, changes.digest(self._entries[key], ids)] for key, ids in self._touched.items() if key in self._entries
        ]

    def _check_digests(self, written: Any) -> None:
        mine = self._digests()
        if mine != written:
            differ = next((key for (key, _), other in zip(mine, written, strict=False) if [key, _] != other), None)
            raise StorageError(
                f"replaying the log does not lead to what it led to before (first at {quote(differ)}): another "
                "processor or version of torch, or an array that was changed during its push; open the store where "
                "it was written, save() it there and load() it here"
            )
        self._touched, self._unproven = {}, 0
