"""Shard: the one place where values, optimizer state and versions live, and where pushes are applied.

A shard knows nothing of processes, files or frameworks. Engines decide where shards are and when
they are called; checks, sums, updates and versions are written once, here.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import compress
from typing import Any, Protocol

import torch

from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.keytable import KeyTable
from tensorkv.arrays.packing import flat_bytes, json_keys
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows, unchecked_rows
from tensorkv.arrays.slices import Slices, join_slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import (
    OptimizerError,
    SnapshotError,
    StorageError,
    StoreClosedError,
    UpdaterError,
    quote,
)
from tensorkv.runtime import collector, shield
from tensorkv.runtime.modes import outside_modes

from . import native, reduce
from .changes import (
    Change,
    Delete,
    Init,
    PlainPush,
    Publish,
    Push,
    Put,
    RequestIds,
    Restore,
    RestoreStates,
    SetNotes,
    SetRule,
    ShowRelease,
    TakenSlices,
    Unpublish,
)
from .entry import Batch, Entry, FrozenEntry, Part, check_complete
from .fused import AVERAGE
from .nonfinite import NonFinite, NonFinitePolicy
from .norm import PushResult
from .optimizers import OptimizerSpec
from .pool import Pool
from .reduce import Reduce, averages
from .releases import HeldRelease, Releases, SavedRelease, SavedReleases
from .rules import Assign, CallUpdater, Rule, StepOptimizer, Updater, check_ids, check_outs, check_push
from .table import Table

# With fewer elements each, what a copy costs is what Python says of it: several threads would wait for each other.
_LARGE_NUMEL = 1 << 12


class Lock:
    """Held while a shard is read or changed; its holder may take it again.

    ``depth`` counts how often it is held; compiled code does a call at once only while it is not held.
    """

    __slots__ = ("_lock", "depth")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self._lock.release()


class Log(Protocol):
    """Writes the changes of a shard before they are applied, so that they can be replayed."""

    def commit(self, shard: Shard, change: Change) -> bool:
        """Write a change, then have the shard apply it; return what ``Shard.apply`` returns."""

    @property
    def counts(self) -> dict[str, int]:
        """What was written, and how often."""

    @property
    def is_superseded(self) -> bool:
        """Whether another process writes there now, and the values here are old."""

    def close(self) -> None:
        """Write nothing any more."""


class Shard(native.ShardFields):
    """Values by key, and how pushes change them.

    Every public method may be called from several threads; a batch is applied as a whole.

    Args:
        on_device: keep values on the device of their arrays (else on the CPU).
        nonfinite: what a push of NaN or Inf does: ``"pass"``, ``"raise"``, ``"skip"`` that key's update, or
            ``"skip_step"``, the whole push.
        reduce: whether a push takes the ``"sum"`` or the ``"mean"`` of the parts of a key.
        threads: that sum and update (None: as ``default_threads`` says).
    """

    def __init__(
        self,
        *,
        on_device: bool = False,
        nonfinite: NonFinite = "pass",
        reduce: Reduce = "sum",
        threads: int | None = None,
    ) -> None:
        self._entries: KeyTable[Entry] = KeyTable()
        self.on_device = on_device
        self._nonfinite = NonFinitePolicy(nonfinite)
        self.averages = averages(reduce)
        self.pool = Pool(threads)
        self._lock = Lock()
        self.frozen_lock = Lock()
        """Held while a snapshot is read, or gets its own copies of values; after ``_lock`` where both are held."""
        # Values that snapshots share and that have not changed since.
        self._num_frozen = 0
        self.releases = Releases()
        """Snapshots that have a name."""
        self.last_push = PushResult()
        """What was found out about the last push."""
        self._looks = native.can_look()
        self._use(Assign())
        self._closed = False
        self._broken: str | None = None
        self.log: Log | None = None
        """Writes each change before it is applied; without it, values end with the process."""
        self.notes: dict[str, Any] = {}
        """Plain data that is kept beside the values."""
        self.make_like: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = _empty_like
        """Returns new memory for values that replace others."""
        self._in_order: Callable[[Sequence[Entry]], AbstractContextManager[Any]]
        self._in_order = stream_order if on_device else nullcontext

    # ------------------------------------------------------------ the verbs

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        """Hold copies of new values; all keys or none."""
        with self._lock, kept(), collector.paused():
            self.refuse_reentry()
            self.check_new(keys)
            copies = iter(self.copies([value for value in values if not isinstance(value, Rows)]))
            made = [
                Entry(key, spec, self._table_of(key, value) if isinstance(value, Rows) else next(copies))
                for key, value, spec in zip(keys, values, specs, strict=True)
            ]
            # The copies are queued already; work on the values comes after them.
            with self._in_order(made):
                self._commit(Init(made))

    def push(
        self, batch: Batch, *, requests: RequestIds = (), scale: float | None = None, must_complete: bool = False
    ) -> None:
        """Sum the parts of each key and apply the update rule; the whole batch is checked first.

        Args:
            batch: of the push.
            requests: ids of the requests that it answers, for a log.
            scale: of all gradients, if others have decided on it, by the sums of more keys than are here.
            must_complete: refuse slices that leave a value incomplete.
        """
        with self._lock:
            self.refuse_reentry()
            with kept():
                self._push(batch, (), requests, scale, must_complete)

    def pull(
        self,
        keys: Sequence[Key],
        outs: Sequence[Sequence[torch.Tensor]],
        regions: Sequence[Region] | None = None,
    ) -> None:
        """Copy values, or a part of each, into tensors of their shapes."""
        with self._lock:
            self.refuse_reentry()
            self._pull(keys, outs, regions)

    def pushpull(
        self,
        batch: Batch,
        outs: Sequence[Sequence[torch.Tensor]],
        *,
        requests: RequestIds = (),
        scale: float | None = None,
    ) -> None:
        """Push, then pull the same keys, with nothing in between; see ``push``."""
        with self._lock:
            self.refuse_reentry()
            with kept():
                filled = self._push(batch, outs, requests, scale, must_complete=True)
            if not filled:
                self._pull(batch.keys, outs)

    def try_compiled(self, call: native.Call, *, requests: RequestIds = (), scale: float | None = None) -> bool:
        """Make a call in compiled code if its arrays and the values are plain.

        Args:
            call: what the caller asked for.
            requests: ids of the requests that a push answers, for a log.
            scale: as for ``push``.

        Returns:
            True if the call was made; False if nothing was done, and the call has to be parsed.
        """
        if scale not in (None, 1.0) and not self._decides:
            return False
        found = call.run(self)
        if found is None or found is True:
            return found is True
        with outside_modes():
            return shield.defer(self._make_plain, call, found, requests, scale)

    def _make_plain(self, call: native.Call, batch: native.Batch, requests: RequestIds, scale: float | None) -> bool:
        """Make a plain call that is long, is logged, is the first step of keys, or depends on the sums of all keys."""
        with self._lock:
            self.refuse_reentry()
            if call.verb == "pull":
                is_begun = batch.begin(native.leaves_cache(batch.nbytes), self._entries)
                if is_begun:
                    self._run(batch)
                return is_begun
            result = None
            if self._decides:
                clipping = self._rule.clipping if scale is None else None
                # Of a push that is refused nothing is told.
                self.last_push = PushResult()
                decided = self._nonfinite.decide_plain(batch, clipping, self.pool)
                if decided is None:
                    return False
                found, result = decided
                batch.scale = found if scale is None else scale
            if self._steps is None or not self._begin(batch, self._entries, self._steps[0]):
                return False
            sums = None if self.log is None else self._sums_of(batch)
            self._commit(PlainPush(batch, batch.cells, sums, requests=requests))
            if result is not None:
                self.last_push = result
            return True

    def _begin(self, batch: native.Batch, entries: dict[Key, Entry], step: Any) -> bool:
        """Begin a batch that steps entries, with the states it needs; return whether it can be run."""
        if batch.unready is not None:
            self.complete(batch.unready)
        return batch.begin(native.leaves_cache(batch.nbytes), entries, step)

    def updates(self, keys: Sequence[Key]) -> native.Batch | None:
        """Return a batch that updates dense values from pieces of their sums, and counts that when it is finished.

        Only its maker may update these values until then.

        Args:
            keys: whose parts the rule can update.

        Returns:
            None where a value or its state is not plain, or the rule takes other sums.
        """
        with self._lock:
            return self._begun(self._entries, keys, None, None)

    def complete(self, entries: Sequence[Entry]) -> None:
        """Add to the states of plain values what the optimizer's next step asks for."""
        if isinstance(self._rule, StepOptimizer):
            with kept():
                self._rule.optimizer.begin_all(entries, self.pool)

    def count_updates(self, keys: Sequence[Key]) -> None:
        """Count an update of values of which this shard holds nothing that has changed."""
        batch = native.look(self._entries, keys, None, None, None, None) if native.can_look() else None
        if batch is not None:
            batch.finish()
            return
        for key in keys:
            self._entries[key].version += 1

    def _begun(
        self, entries: dict[Key, Entry], keys: Sequence[Key], values: Any, outs: Any, rule: Rule | None = None
    ) -> native.Batch | None:
        """Return a batch that updates values by a rule, begun, with the states it needs; None if not plain."""
        steps = (rule or self._rule).plain_steps
        if steps is None or not native.can_look():
            return None
        batch = native.look(entries, keys, values, outs, *steps)
        return batch if batch is not None and self._begin(batch, entries, steps[0]) else None

    def _sums_of(self, batch: native.Batch) -> torch.Tensor:
        """Return the sums of a batch, as bytes one after another; if they are made for that, have it push them."""
        if batch.sums is not None:
            return flat_bytes(interop.take(batch.sums))
        pieces, places, nbytes = batch.packed()
        sums = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        column = native.moved_by(places, sums.data_ptr())
        self.pool.share(batch.numel, partial(batch.sum_pieces, pieces, [column], False))
        batch.take_sums(sums)
        return sums

    def _run(self, batch: native.Batch) -> None:
        """Do a batch that was begun."""
        self.pool.share(batch.numel, batch.run)
        batch.finish()

    def pull_rows(
        self, keys: Sequence[Key], ids: Sequence[torch.Tensor], outs: Sequence[torch.Tensor | None] | None = None
    ) -> list[Rows]:
        """Return copies of rows; ids are unique and sorted.

        Args:
            keys: whose rows.
            ids: of each key.
            outs: contiguous memory for the rows of each key, of its dtype (None: new memory).
        """
        with self._lock:
            self.refuse_reentry()
            entries = [self.entry("row_sparse_pull", key) for key in keys]
            check_complete("row_sparse_pull", entries)
            check_ids("row_sparse_pull", entries, ids)
            with self._in_order(entries):
                return [
                    unchecked_rows(own, entry.read_rows(own.to(entry.value.device), out), entry.spec.shape[0])
                    for entry, own, out in zip(entries, ids, outs or [None] * len(keys), strict=True)
                ]

    def delete(self, keys: Sequence[Key], *, requests: RequestIds = ()) -> None:
        """Forget values and their optimizer state; all keys or none."""
        with self._lock:
            self.refuse_reentry()
            for key in keys:
                self.entry("delete", key)
            self._commit(Delete(keys, requests=requests))

    # ------------------------------------------------------------ the update rule

    def set_updater(self, updater: Updater | None, *, requests: RequestIds = ()) -> None:
        """Apply ``updater(key, received, stored)`` to each sum; None restores assignment."""
        with self._lock:
            self.refuse_reentry()
            self._commit(SetRule(Assign() if updater is None else CallUpdater(updater), requests=requests))

    def set_optimizer(self, spec: OptimizerSpec, *, requests: RequestIds = ()) -> None:
        """Step an optimizer with each sum as the gradient; one of the same name keeps its state.

        Hyperparameters of keys that the shard does not have are left out.
        """
        rule = StepOptimizer(spec)
        with self._lock:
            self.refuse_reentry()
            # Another client may have deleted keys whose numbers come with it.
            self._commit(SetRule(rule.of_keys(self._entries), requests=requests))

    def set_hyperparameters(
        self, numbers: dict[str, Any], keys: Sequence[Key] | None, *, requests: RequestIds = ()
    ) -> None:
        """Change hyperparameters for some keys, or for all (which ends what was set for some)."""
        with self._lock:
            self.refuse_reentry()
            self._commit(SetRule(self._changed_rule(numbers, keys), requests=requests))

    def _changed_rule(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> StepOptimizer:
        if not isinstance(self._rule, StepOptimizer):
            raise OptimizerError("set_hyperparameters: the store has no optimizer; call set_optimizer first")
        for key in keys or ():
            self.entry("set_hyperparameters", key)
        return self._rule.changed(numbers, keys)

    def check_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        """Raise what ``set_hyperparameters`` would raise; changes nothing."""
        self._changed_rule(numbers, keys)

    @property
    def rule(self) -> Rule:
        """What is done with sums."""
        return self._rule

    @property
    def has_updater(self) -> bool:
        """Whether a function updates values."""
        return isinstance(self._rule, CallUpdater)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer's description, None without one."""
        return self._rule.optimizer.spec if isinstance(self._rule, StepOptimizer) else None

    @property
    def skips_steps(self) -> bool:
        """Whether one sum that is not finite has all of a push left out."""
        return self._nonfinite.skips_steps

    @property
    def nonfinite_counts(self) -> dict[str, int]:
        """How many pushes were refused, and how many updates left out, for NaN or Inf."""
        return self._nonfinite.counts

    # ------------------------------------------------------------ looking

    def keys(self) -> list[Key]:
        """Keys in the order of their init."""
        return list(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, verb: str, key: Key) -> Entry:
        """Return what is held of a key.

        Raises:
            KeyNotFoundError: there is none; the message names the nearest key.
            StoreClosedError: there is none since ``close``.
        """
        if self._broken is not None:
            self._refuse_broken()
        found = self._entries.get(key)
        if found is None and self._closed:
            raise StoreClosedError(f"{verb}({quote(key)}): this store was closed; create another")
        return self._entries.find(verb, key) if found is None else found

    def entries(self, keys: Sequence[Key]) -> list[Entry] | None:
        """Return what is held of some keys, None if ``entry`` would raise for one of them."""
        found = list(map(self._entries.get, keys))
        if self._broken is not None or None in found:
            return None
        return found  # type: ignore[return-value]

    def fail(self, problem: str) -> None:
        """Raise StorageError with this message from every call but ``close``: values may not be what the log says."""
        self._broken, self._looks = problem, False

    def close(self) -> None:
        """Drop everything, end the threads and close the log; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._refuse_use()
            self._closed = True
            try:
                self.releases.close()
                self._entries.clear()
                with self.frozen_lock:
                    self.pool.close()
            finally:
                if self.log is not None:
                    self.log.close()

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def frozen(self, *, releases: bool = False) -> Iterator[tuple[list[Entry], Rule]]:
        """Give every entry and the rule for reading while no other thread can push.

        Args:
            releases: whether what releases hold is read as well.
        """
        with self._lock:
            self.refuse_reentry()
            entries = list(self._entries.values())
            held = self.releases.lasting() if releases else []
            with self._in_order([*entries, *(each for release in held for each in release.snapshot.held.values())]):
                yield entries, self._rule

    def freeze(self, keys: Sequence[Key] | None = None) -> list[FrozenEntry]:
        """Return what one more snapshot holds of some keys, or of all, without a copy of their values."""
        with self._lock:
            self.refuse_reentry()
            chosen = self._entries if keys is None else dict.fromkeys(keys)
            entries = [self.entry("snapshot", key) for key in chosen]
            check_complete("snapshot", entries)
            self._num_frozen += sum([entry.frozen is None for entry in entries])
            frozen: list[FrozenEntry] = [entry.freeze() for entry in entries]
            if self.notes:
                for entry, name in zip(frozen, json_keys([entry.key for entry in frozen]), strict=True):
                    entry.note = self.notes.get(name)
            return frozen

    def hold(self, entries: Sequence[FrozenEntry]) -> Sequence[FrozenEntry]:
        """Hold what a snapshot holds once more, until ``release``."""
        with self._lock:
            for entry in entries:
                entry.holders += 1
            return entries

    def shares(self, frozen: FrozenEntry) -> bool:
        """Return whether what snapshots hold of a key is its present value."""
        return self._entries.get(frozen.key) is frozen.source and frozen.source.frozen is frozen

    def release(self, entries: Sequence[FrozenEntry]) -> None:
        """Let go of what a snapshot holds."""
        with self._lock, self.frozen_lock:
            self._num_frozen -= sum([entry.release() for entry in entries])

    def move(
        self, entries: Sequence[FrozenEntry], make_like: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        """Bring dense values that snapshots hold to other memory; one that has not changed since moves with them.

        Args:
            entries: of the values.
            make_like: returns the memory, given the values; what it raises changes nothing.
        """
        with self._lock, kept(), self.frozen_lock:
            moved = make_like([entry.tensor for entry in entries])
            self._copy_all([(value, entry.tensor) for entry, value in zip(entries, moved, strict=True)])
            for entry, value in zip(entries, moved, strict=True):
                if entry.source.frozen is entry:
                    entry.source.value, entry.source.spare = value, None
                entry.value = value
            sources = [entry.source for entry in entries if self.shares(entry)]
            self._see_again([source.key for source in sources])

    def publish(self, name: str, keys: Sequence[Key] | None, keep: int | None, *, requests: RequestIds = ()) -> None:
        """Hold the present values of some keys, or of all, as a release; keep so many of the newest (None: all)."""
        with self._lock:
            self.refuse_reentry()
            self.releases.check_new(name)
            self.check_complete("publish", keys)
            self._commit(Publish(name, self.releases.next_number, keys, keep=keep, requests=requests))

    def unpublish(self, name: str, *, hidden_ok: bool = False, requests: RequestIds = ()) -> None:
        """Drop a release, once nobody reads it; ``hidden_ok``: or one that readers do not see."""
        with self._lock:
            self.refuse_reentry()
            if not hidden_ok:
                self.releases.find(name)
            self._commit(Unpublish([name], requests=requests))

    def held_releases(self) -> list[HeldRelease]:
        """Return the releases that readers see, from the oldest to the newest."""
        with self._lock:
            self.refuse_reentry()
            return self.releases.visible()

    def number_of_release(self, name: str) -> int:
        """Return the number of a release that is here, or was."""
        with self._lock:
            return self.releases.number_of(name)

    def hold_release(self, name: str, reader: str, lease_s: float) -> HeldRelease:
        """Return a release, which stays until a reader's lease has ended; ``Releases.hold``."""
        with self._lock:
            self.refuse_reentry()
            return self.releases.hold(name, reader, lease_s)

    @contextmanager
    def comparing(self, name: str, reader: str, lease_s: float) -> Iterator[None]:
        """Hold a release for a reader in this block, however long it takes, and for a whole lease from its end on."""
        with self._lock:
            self.refuse_reentry()
            self.releases.begin_comparison(name, reader, lease_s)
        try:
            yield
        finally:
            with self._lock:
                self.releases.end_comparison(name, reader, lease_s)

    @contextmanager
    def held_release(self, name: str) -> Iterator[HeldRelease]:
        """Give a release that stays as long as this block, whatever the leases of its readers."""
        reader = secrets.token_hex(8)
        found = self.hold_release(name, reader, math.inf)
        try:
            yield found
        finally:
            self.let_go(name, reader)

    def newest_release(self, after: str | None) -> str | None:
        """Return the name of the newest release after another one (None: any), if there is one."""
        with self._lock:
            self.refuse_reentry()
            found = self.releases.newest(after)
            return None if found is None else found.name

    def hold_newest(self, after: str | None, reader: str, lease_s: float) -> HeldRelease | None:
        """Return the newest release after another one (None: any) for a reader, if there is one."""
        with self._lock:
            self.refuse_reentry()
            found = self.releases.newest(after)
            return None if found is None else self.releases.hold(found.name, reader, lease_s)

    def has_lease(self, name: str, reader: str) -> bool:
        """Return whether a reader's lease goes on."""
        with self._lock:
            return self.releases.has_lease(name, reader)

    def let_go(self, name: str, reader: str) -> None:
        """End a reader's lease."""
        with self._lock:
            self.releases.let_go(name, reader)

    def add(self, entries: Sequence[Entry], *, requests: RequestIds = ()) -> None:
        """Add entries that were made elsewhere, without a copy of their values."""
        with self._lock:
            self._commit(Init(entries, requests=requests))

    def restore(
        self,
        entries: Sequence[Entry],
        rule: Rule | None,
        releases: SavedReleases | None = None,
        notes: Mapping[str, Any] | None = None,
        *,
        requests: RequestIds = (),
    ) -> None:
        """Replace all entries, the rule, the releases and the notes (None: the present ones stay)."""
        with self._lock:
            self.refuse_reentry()
            self._commit(Restore(entries, self._rule if rule is None else rule, releases, notes, requests=requests))
            self.releases.drop_replaced()

    def restore_states(self, entries: Sequence[Entry], rule: Rule | None, *, requests: RequestIds = ()) -> None:
        """Take over the optimizer states of these entries, whose shapes are this shard's; other states are dropped."""
        with self._lock:
            self.refuse_reentry()
            self._commit(RestoreStates(entries, self._rule if rule is None else rule, requests=requests))

    def commit(self, change: Change) -> None:
        """Make a change that needs no check, such as ``SetNotes``."""
        with self._lock:
            self.refuse_reentry()
            self._commit(change)

    # ------------------------------------------------------------ checks, which change nothing

    def check(self, batch: Batch) -> None:
        """Raise what a push of a batch would raise."""
        with self._lock:
            self.refuse_reentry()
            check_push(batch, [self.entry(batch.verb, key) for key in batch.keys], self._rule, self.averages)

    def check_complete(self, verb: str, keys: Sequence[Key] | None = None) -> None:
        """Raise if one of these values, or of all, cannot be read, since slices of a push are missing."""
        with self._lock:
            chosen = self._entries.values() if keys is None else [self.entry(verb, key) for key in keys]
            check_complete(verb, chosen)

    def check_new(self, keys: Sequence[Key]) -> None:
        """Raise if a key cannot be initialised."""
        self.refuse_reentry()
        self._entries.check_new(keys)

    def refuse_calls_by_updater(self) -> None:
        """Raise what ``refuse_reentry`` raises; the updater of another thread's push is waited for."""
        with self._lock:
            self.refuse_reentry()

    def refuse_reentry(self) -> None:
        """Raise an error if an updater is running, after ``close``, and after ``fail``; no other thread may push."""
        self._refuse_use()
        self._refuse_broken()

    def _refuse_use(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed; create another")
        if self._rule.running:
            raise UpdaterError("an updater called the store that runs it; do this after the push has returned")

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise StorageError(self._broken)

    # ------------------------------------------------------------ changes, the lock being held

    def _commit(self, change: Change) -> bool:
        """Make a change that was checked, by way of the log if there is one; return what ``apply`` returns."""
        return self.apply(change) if self.log is None else self.log.commit(self, change)

    def apply(self, change: Change) -> bool:
        """Make a change that was checked.

        Every verb changes entries and the rule through here, but for short calls of plain arrays (``plain``).

        Returns:
            Whether the outs of a push were filled on the way.
        """
        if self._num_frozen and isinstance(change, Push | PlainPush | Put):
            self._thaw(change.entries, change.batch if isinstance(change, PlainPush) else None)
        if isinstance(change, Push | Put):
            return self._apply_with_slices(change)
        return self._apply(change)

    def _apply_with_slices(self, change: Push | Put) -> bool:
        """Make a change, and keep or drop slices; where an update fails halfway, those of other keys stay."""
        versions = [entry.version for entry in change.slices.ended]
        # Compiled code does not update a value with slices, and does not fail halfway.
        is_late = isinstance(self._rule, CallUpdater)
        for entry in () if is_late else change.slices.ended:
            entry.incomplete = None
        is_done = False
        try:
            filled = self._apply(change)
            is_done = True
        finally:
            for entry, version in zip(change.slices.ended, versions, strict=True):
                if is_done or entry.version > version:
                    entry.incomplete = None
        for entry, slices in change.slices.kept:
            held = slices.placed(_memory_for(entry))
            entry.incomplete = held if entry.incomplete is None else entry.incomplete.plus(held)
        return filled

    def _apply(self, change: Change) -> bool:  # noqa: C901 - one case for each kind of change
        """Make a change, but for slices."""
        match change:
            case Push(entries=entries, parts=parts, outs=outs, scale=scale):
                return bool(entries) and self._update(entries, parts, outs, self._rule.scaled(scale))
            case PlainPush(batch=batch):
                self._run(batch)
                return True
            case Put(entries=entries, values=values):
                _put(entries, values)
            case Init(entries=entries):
                self._entries.update({entry.key: entry for entry in entries})
            case Delete(keys=keys):
                for key in keys:
                    del self._entries[key]
                self._keep_overrides()
            case SetRule(rule=rule):
                self._set_rule(rule)
            case Restore(entries=entries, rule=rule, releases=releases, notes=notes):
                for entry in entries:
                    # Others are kept, where they are.
                    if entry is not self._entries.get(entry.key):
                        self._to_device(entry)
                self._entries = KeyTable({entry.key: entry for entry in entries})
                self._use(rule)
                self._keep_overrides()
                if notes is not None:
                    self.notes = dict(notes)
                if releases is not None:
                    self._restore_releases(releases)
            case RestoreStates(entries=entries, rule=rule):
                self._restore_states(entries, rule)
            case Publish(name=name, number=number):
                snapshot = ShardSnapshot(self, self.freeze(change.keys))
                self.releases.add(name, number, snapshot, change.owner, change.attempt)
                if change.is_visible:
                    self.releases.show(name, change.keep)
            case ShowRelease(name=name, keep=keep):
                self.releases.show(name, keep)
            case Unpublish(names=names):
                for name in names:
                    self.releases.remove(name)
            case SetNotes(notes=notes):
                self.notes |= notes
                for name in [name for name, data in notes.items() if data is None]:
                    del self.notes[name]
            case _:
                raise TypeError(f"a shard has no change {type(change).__name__}")
        return False

    def _thaw(self, changing: Sequence[Entry], batch: native.Batch | None = None) -> None:
        """Leave values that are about to change, by a plain batch if given, to the snapshots that share them."""
        entries = [entry for entry in changing if entry.frozen is not None]
        if not entries:
            return
        dense = [entry for entry in entries if not isinstance(entry.value, Table)]
        with kept(), self.frozen_lock, self._in_order([*entries, *(entry.frozen for entry in entries)]):
            for entry in entries:
                if isinstance(entry.value, Table):
                    entry.frozen.value = entry.value.copy()
            lacking = [entry for entry in dense if entry.spare is None]
            for entry, memory in zip(lacking, self.make_like([entry.tensor for entry in lacking]), strict=True):
                entry.spare = memory
            # What is assigned does not depend on what there was, and compiled code does not fail halfway.
            if batch is None or not isinstance(self._rule, Assign):
                self._copy_dense(dense)
            for entry in dense:
                entry.value, entry.spare = entry.spare, None
            for entry in entries:
                entry.frozen = None
            self._num_frozen -= len(entries)
            # It writes where its keys' values were seen last.
            if batch is not None and not self._is_seen_again(batch, [entry.key for entry in dense]):
                raise RuntimeError("values that were copied are not plain any more")

    def _is_seen_again(self, batch: native.Batch, keys: Sequence[Key]) -> bool:
        """Look at values that have moved, and begin a batch again."""
        self._see_again(keys)
        steps = self._steps
        return steps is not None and batch.begin(batch.past_cache, self._entries, steps[0])

    def _see_again(self, keys: Sequence[Key]) -> None:
        """Have the compiled part see where values are now, and let go of where they were."""
        if native.can_look():
            native.look(self._entries, keys, None, None, None, None)

    def _copy_dense(self, entries: Sequence[Entry]) -> None:
        """Copy dense values of this shard into their spare memory."""
        keys, copies = [entry.key for entry in entries], [entry.spare for entry in entries]
        batch = native.look(self._entries, keys, None, copies, None, None) if native.can_look() else None
        if batch is not None and batch.begin(native.leaves_cache(batch.nbytes), self._entries):
            self.pool.share(batch.numel, batch.run)
        else:
            self._copy_all([(copy, entry.value) for copy, entry in zip(copies, entries, strict=True)])  # type: ignore[misc]

    def _copy_all(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy tensors, each into the first one of its pair."""
        is_large = sum([out.numel() for out, _ in pairs]) >= _LARGE_NUMEL * len(pairs)
        if is_large and self.pool.is_worth([tensor for pair in pairs for tensor in pair]):
            self.pool.run(reduce.copies(pairs, self.pool.threads))
        elif self.on_device:
            _copy_by_dtype(pairs)
        elif pairs:
            torch._foreach_copy_([out for out, _ in pairs], [value for _, value in pairs])

    def _update(
        self, entries: Sequence[Entry], parts: Sequence[list[Any]], outs: Sequence[Sequence[torch.Tensor]], rule: Rule
    ) -> bool:
        """Update values by a rule from the sums of their parts; return whether the outs were filled on the way."""
        if any(isinstance(part, Rows) for key_parts in parts for part in key_parts):
            entries, parts, outs = self._push_rows(entries, parts, outs, rule)
        if outs and all(outs) and self._update_plain(entries, parts, outs, rule):
            return True
        if not self._update_plain(entries, parts, None, rule):
            pairs = zip(entries, parts, strict=True)
            each = [not self._update_plain([entry], [own], None, rule) for entry, own in pairs]
            self._update_rest(list(compress(entries, each)), list(compress(parts, each)), rule)
        return False

    def _update_rest(self, entries: Sequence[Entry], parts: Sequence[list[Any]], rule: Rule) -> None:
        """Update values whose parts are not plain: of small ones, which are many, the sums are made beside."""
        large: list[int] = list(range(len(entries)))
        if isinstance(rule, StepOptimizer) and rule.plain_steps is not None:
            small: list[int] = []
            large, numel = [], 0
            for index, entry in enumerate(entries):
                size = entry.spec.shape.numel()
                if numel + size > reduce.SLICE:
                    large += self._update_small(small, entries, parts, rule)
                    small, numel = [], 0
                if size > reduce.SLICE or entry.value.device.type != "cpu":
                    large.append(index)
                else:
                    small.append(index)
                    numel += size
            large += self._update_small(small, entries, parts, rule)
        if large:
            rule.apply([entries[i] for i in large], [parts[i] for i in large], self.pool)

    def _update_small(
        self, indices: list[int], entries: Sequence[Entry], parts: Sequence[list[Any]], rule: Rule
    ) -> list[int]:
        """Update some values in one pass over their sums; return those for which that was not done."""
        mine = [entries[index] for index in indices]
        sums = [[reduce.total(entries[index].tensor, parts[index])] for index in indices]
        return [] if self._update_plain(mine, sums, None, rule) else indices

    def _update_plain(self, entries: Sequence[Entry], parts: Sequence[list[Any]], outs: Any, rule: Rule) -> bool:
        """Update values in one pass if they and their parts are plain; return whether it was done."""
        by_key = {entry.key: entry for entry in entries}
        batch = self._begun(by_key, list(by_key), parts, outs, rule) if entries else None
        if batch is not None:
            self._run(batch)
        return batch is not None

    def _push_rows(
        self, entries: Sequence[Entry], parts: Sequence[list[Any]], outs: Sequence[Sequence[torch.Tensor]], rule: Rule
    ) -> tuple[list[Entry], list[list[Part]], list[Sequence[torch.Tensor]]]:
        """Apply what was pushed as Rows alone; return the rest, Rows beside dense parts made dense.

        The rest has no outs if they are not all that there are.
        """
        rest: tuple[list[Entry], list[list[Part]], list[Sequence[torch.Tensor]]] = ([], [], [])
        is_filled = len(outs) == len(entries)
        # It may find ids that another thread has changed.
        merged = {
            entry.key: entry.merged(key_parts)
            for entry, key_parts in zip(entries, parts, strict=True)
            if all(isinstance(part, Rows) for part in key_parts)
        }
        for position, (entry, key_parts) in enumerate(zip(entries, parts, strict=True)):
            own = outs[position] if is_filled else ()
            if entry.key in merged:
                rule.apply_rows(entry, merged.pop(entry.key))
                is_filled = is_filled and not own
            else:
                rest[0].append(entry)
                rest[1].append([entry.dense(part) for part in key_parts])
                rest[2].append(own)
        return rest[0], rest[1], rest[2] if is_filled else []

    def _set_rule(self, rule: Rule) -> None:
        new = rule.optimizer.spec.name if isinstance(rule, StepOptimizer) else None
        if new is None or self.optimizer is None or self.optimizer.name != new:
            self._drop_states()
        elif self.optimizer.ema is not None and rule.optimizer.spec.ema is None:  # type: ignore[attr-defined]
            self._drop_states(AVERAGE)
        self._use(rule)

    def _use(self, rule: Rule) -> None:
        self._rule = rule
        self._steps = rule.plain_steps
        self._decides = self._nonfinite.checks or rule.clipping is not None
        if not self._decides:
            # Pushes do not set it any more.
            self.last_push = PushResult()

    def _restore_releases(self, saved: SavedReleases) -> None:
        held = []
        for release in saved.held:
            copies = {each.key: each for each in release.entries if isinstance(each, FrozenEntry)}
            present = self.freeze([each.key for each in release.entries if each.key not in copies])
            for copy in copies.values():
                self._to_device(copy)
                copy.holders += 1
            found = {**copies, **{each.key: each for each in present}}
            snapshot = ShardSnapshot(self, [found[each.key] for each in release.entries])
            whose = release.owner, release.attempt, release.is_visible
            held.append(HeldRelease(release.name, release.number, snapshot, *whose))
        self.releases.replace(saved.numbers, held, saved.generation)

    def saved_releases(self, *, visible_only: bool = True) -> SavedReleases:
        """Return the releases for a checkpoint or for the log, while ``frozen`` holds the shard.

        Args:
            visible_only: leave out those that readers do not see yet.
        """
        held = []
        for release in sorted(self.releases.lasting(), key=lambda each: each.number):
            if release.is_visible or not visible_only:
                frozen = release.snapshot.held.values()
                entries = [each.source if self.shares(each) else each for each in frozen]
                whose = release.owner, release.attempt, release.is_visible
                held.append(SavedRelease(release.name, release.number, entries, *whose))
        return SavedReleases(dict(self.releases.numbers), held, self.releases.generation)

    def _restore_states(self, saved: Sequence[Entry], rule: Rule) -> None:
        mine = [self.entry("load_optimizer_states", entry.key) for entry in saved]
        # The states may be of rows that a table does not hold yet.
        self._thaw([entry for entry in mine if isinstance(entry.value, Table)])
        self._drop_states()
        with self._in_order(mine):
            for entry, other in zip(mine, saved, strict=True):
                entry.state = other.state
                entry.move(entry.value.device)
                if isinstance(entry.value, Table) and isinstance(other.value, Table):
                    entry.value.take_columns(other.value)
        self._use(rule)

    def _drop_states(self, name: str | None = None) -> None:
        """Forget the optimizer's state, or the state of one name."""
        for entry in self._entries.values():
            if name is None:
                entry.state = {}
            else:
                entry.state.pop(name, None)
            if isinstance(entry.value, Table):
                entry.value.drop_columns(name)

    def _keep_overrides(self) -> None:
        """Drop the hyperparameters of keys that were removed."""
        if isinstance(self._rule, StepOptimizer):
            self._use(self._rule.of_keys(self._entries))

    # ------------------------------------------------------------ push and pull, the lock being held

    def _push(
        self,
        batch: Batch,
        outs: Sequence[Sequence[torch.Tensor]],
        requests: RequestIds,
        scale: float | None,
        must_complete: bool,
    ) -> bool:
        """Check and push a batch; return whether its outs were filled on the way."""
        entries = [self.entry(batch.verb, key) for key in batch.keys]
        check_push(batch, entries, self._rule, self.averages)
        slices = TakenSlices()
        pushed = batch.keys
        with self._in_order(entries) if batch.has_slices else nullcontext():
            if batch.has_slices:
                batch, entries, slices = self._take_slices(batch, entries, must_complete)
            if must_complete:
                ended = {entry.key for entry in slices.ended}
                check_complete(batch.verb, (entry for entry in entries if entry.key not in ended))
            parts: list[list[Any]] = batch.parts
            if self.on_device:
                move_to_parts(entries, parts)
            gathered = dict(zip(batch.keys, parts, strict=True))
            with self._in_order(entries):
                found, result = 1.0, None
                if self._decides or self.averages:
                    clipping = self._rule.clipping if scale is None else None
                    # Of a push that is refused nothing is told.
                    self.last_push = PushResult()
                    kept, parts, found, result = self._nonfinite.decide(batch, entries, self.averages, clipping)
                    entries = list(kept)
                scale = found if scale is None else scale
                change = Push(entries, parts, outs, scale, slices, requests=requests)
                if len(entries) + len(slices.kept) < len(pushed):
                    counted = set(change.updated())
                    change.others = [key for key in pushed if key not in counted]
                filled = self._commit(change)
                if result is not None:
                    self.last_push = result
            for entry in slices.ended:
                # For the next slices, or the next change under a snapshot.
                (memory,) = gathered[entry.key]
                if entry.spare is None and memory.device == entry.value.device:
                    entry.spare = memory
            return filled

    def check_slices(self, key: Key, bounds: torch.Tensor, *, must_complete: bool) -> None:
        """Raise what a push of slices would raise, of which only the bounds are known."""
        with self._lock:
            self.refuse_reentry()
            entry = self.entry("push", key)
            self._joined(f"push({quote(key)})", entry, Slices.from_bounds(bounds, entry.spec.dtype), must_complete)

    def _joined(self, name: str, entry: Entry, slices: Slices, must_complete: bool) -> Slices:
        """Return new slices of a value and those that have come before."""
        found = slices if entry.incomplete is None else join_slices(name, [entry.incomplete, slices])
        # Of a replica that pushes nothing, the value may be complete already.
        has_come = bool(slices.regions) or entry.incomplete is not None
        if must_complete and has_come and not found.is_complete:
            raise found.incomplete_error(name)
        return found

    def _take_slices(
        self, batch: Batch, entries: Sequence[Entry], must_complete: bool
    ) -> tuple[Batch, list[Entry], TakenSlices]:
        """Make whole parts of slices that are all there; return the push of whole parts, and what else is to be done.

        Raises:
            IncompleteValueError: slices leave a value incomplete, and must not.
            ValueMismatchError: a slice overlaps one that has come.
            NonFiniteError: a slice is not finite, and the policy refuses it.
        """
        # A step that spans several pushes cannot be left out as a whole.
        must_complete = must_complete or self._nonfinite.skips_steps
        cast = {
            entry.key: own[0].to(entry.spec.dtype)
            for entry, own in zip(entries, batch.parts, strict=True)
            if isinstance(own[0], Slices)
        }
        for key, each in cast.items():
            self._nonfinite.check_part(batch.name(key), each)
        keys: list[Key] = []
        parts: list[list[Any]] = []
        counts: list[int] = []
        whole: list[Entry] = []
        waiting: list[tuple[Entry, Slices]] = []
        ended: list[Entry] = []
        for place, (entry, own) in enumerate(zip(entries, batch.parts, strict=True)):
            new = cast.get(entry.key)
            if new is not None:
                found = self._joined(batch.name(entry.key), entry, new, must_complete)
                if not found.is_complete:
                    if not new.is_empty:
                        waiting.append((entry, new))
                    continue
                ended.append(entry)
                own = [new.placed(_memory_for(entry)).memory]
            keys.append(entry.key)
            parts.append(own)
            counts.append(len(own) if batch.counts is None else batch.counts[place])
            whole.append(entry)
        return Batch(batch.verb, keys, parts, counts), whole, TakenSlices(waiting, ended)

    def _pull(
        self,
        keys: Sequence[Key],
        outs: Sequence[Sequence[torch.Tensor]],
        regions: Sequence[Region] | None = None,
    ) -> None:
        entries = [self.entry("pull", key) for key in keys]
        check_complete("pull", entries)
        check_outs("pull", entries, outs, regions)
        with self._in_order(entries):
            values = [entry.tensor for entry in entries]
            if regions is not None:
                values = [region.of(value) for region, value in zip(regions, values, strict=True)]
            self._copy_all([(out, value) for value, own in zip(values, outs, strict=True) for out in own])

    def _to_device(self, entry: Entry) -> None:
        if self.on_device and isinstance(entry.spec.origin.device, torch.device):
            entry.move(entry.spec.origin.device)

    def copies(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of values as a shard holds them."""
        device = None if self.on_device else "cpu"
        made = [torch.empty_like(value, memory_format=torch.contiguous_format, device=device) for value in values]
        self._copy_all(list(zip(made, values, strict=True)))
        return made

    def _table_of(self, key: Key, value: Rows) -> Table:
        device = value.values.device if self.on_device else "cpu"
        return Table.of(rows.merge([value], may_share=True), device, key)


class ShardSnapshot(Shard):
    """The present values of a shard, for reading only.

    The first change of a value after that leaves it to the snapshots that share it, and is made in other memory.

    Args:
        shard: whose values.
        frozen: what ``Shard.freeze`` has returned for this snapshot.
    """

    def __init__(self, shard: Shard, frozen: Sequence[FrozenEntry]) -> None:
        super().__init__(on_device=shard.on_device, threads=shard.pool.threads)
        self.pool, self._lock = shard.pool, shard.frozen_lock
        self._source = shard
        self.held: dict[Key, FrozenEntry] = {entry.key: entry for entry in frozen}
        """What is held of each key."""
        self._entries: KeyTable[Entry] = KeyTable(self.held)
        self.versions = {key: entry.version for key, entry in self.held.items()}
        """How many updates each key had had."""

    @contextmanager
    def reading(self, entries: Sequence[FrozenEntry]) -> Iterator[None]:
        """Return a block in which some values stay as they are, and where they are.

        Raises:
            SnapshotError: the snapshot was dropped.
        """
        with self._lock:
            self.refuse_closed()
            with self._in_order(entries):
                yield

    def refuse_closed(self) -> None:
        """Raise SnapshotError if the snapshot was dropped."""
        if self._closed:
            raise SnapshotError("this snapshot was dropped; take another")

    def entry(self, verb: str, key: Key) -> Entry:
        """Return what is held of a key.

        Raises:
            SnapshotError: the snapshot was dropped.
            KeyNotFoundError: the key was not there when it was taken.
        """
        if self._closed:
            raise SnapshotError(f"{verb}({quote(key)}): this snapshot was dropped; take another")
        return super().entry(verb, key)

    def close(self) -> None:
        """Let go of the values."""
        with self._lock:
            frozen, self.held = self.held, {}
            self._closed = True
            self._entries.clear()
        self._source.release(list(frozen.values()))


def _put(entries: Sequence[Entry], values: Sequence[Any]) -> None:
    for entry, value in zip(entries, values, strict=True):
        if isinstance(value, Rows):
            entry.write_rows(value)
        else:
            entry.tensor.copy_(value)
        entry.version += 1


def _memory_for(entry: Entry) -> torch.Tensor:
    """Return memory in which the slices of a value are gathered."""
    if entry.incomplete is not None:
        memory: torch.Tensor = entry.incomplete.memory
        return memory
    spare, entry.spare = entry.spare, None
    return torch.empty_like(entry.tensor) if spare is None else spare


def _empty_like(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(value) for value in values]


def kept() -> AbstractContextManager[Any]:
    """Tensors that a store keeps must be normal ones, also when the caller is in torch.inference_mode()."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


# ---------------------------------------------------------------- values on CUDA devices


def _copy_by_dtype(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors, each into the first one of its pair.

    On a GPU, torch before 2.11 writes outs of several dtypes as if all had that of the first one
    (https://github.com/pytorch/pytorch/issues/173383), and some versions have no kernel for unsigned integers.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for out, value in pairs:
        same = out.dtype is value.dtype
        pair = (interop.signed(out), interop.signed(value)) if same else (out, value)
        groups.setdefault((out.dtype, value.dtype), []).append(pair)
    for group in groups.values():
        torch._foreach_copy_([out for out, _ in group], [value for _, value in group])


@contextmanager
def stream_order(entries: Sequence[Entry]) -> Iterator[None]:
    """Put work on CUDA values after all earlier work on them, whatever stream the caller is on."""
    on_cuda = [entry for entry in entries if entry.value.device.type == "cuda"]
    for entry in on_cuda:
        if entry.ready is not None:
            torch.cuda.current_stream(entry.value.device).wait_event(entry.ready)
    try:
        yield
    finally:
        for entry in on_cuda:
            # An entry that was replaced may have moved to the CPU.
            if entry.value.device.type == "cuda":
                entry.ready = torch.cuda.current_stream(entry.value.device).record_event()


def move_to_parts(entries: Sequence[Entry], parts: Sequence[Sequence[Any]]) -> None:
    """Bring CPU values to the GPU where their parts are, once: from then on they stay there."""
    for entry, key_parts in zip(entries, parts, strict=True):
        tensors = [part.values if isinstance(part, Rows) else part for part in key_parts]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None and entry.value.device.type == "cpu":
            entry.move(device)
