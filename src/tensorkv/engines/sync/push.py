"""Pushes and pulls of a dist_sync worker.

A push without an updater stages its parts and leaves the rest to the push queue. A pushpull, and every other call whose
end its caller has to see, goes through a small staging buffer that all calls share and that stays in cache. A worker
that has left takes part in the pushes of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, TypeVar

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.compression import (
    COMPRESSED_DTYPES,
    Compressor,
    PlainGradients,
    Sending,
    SumMemory,
    words_layout,
)
from tensorkv.engines.partition import Numbers
from tensorkv.errors import NonFiniteError, TensorKVError, WorkerError, WorkerMismatchError, message_of, quote
from tensorkv.runtime.recent import Recent
from tensorkv.runtime.shield import Steps, finish
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Batch, Entry, Part
from tensorkv.shard.nonfinite import NonFinitePolicy, clip, count_nonfinite
from tensorkv.shard.norm import PushResult, SquareSum
from tensorkv.shard.rules import check_outs, has_means
from tensorkv.shard.shard import Shard, kept
from tensorkv.shard.table import Table

from . import coded, sparse
from .allreduce import AllReduce, Update
from .chain import Chain
from .decision import Decisions
from .group import ProcessGroup
from .host import ENTRIES, LEFT, REFUSED, Collective, HostGroup, NoMemoryToShareError, Signature, describe
from .order import CollectiveOrder, PushQueue
from .schedule import (
    RING,
    SLOT_NBYTES,
    SLOT_NBYTES_OVER_HOSTS,
    SMALL_NBYTES,
    Arrays,
    Layout,
    PartitionedEntry,
    Schedule,
    StagingBuffer,
)

# Outputs that are larger together do not find the values in the cache afterwards.
_PAST_CACHE_NBYTES = 4 << 20
# How many schedules are remembered at least, and how often they may name each key together.
_MIN_SCHEDULES, _MAX_NAMED = 256, 4
# Lists of keys whose compressed pushes are remembered.
_MAX_GRADIENTS = 64
# What their staging buffers may take together: so many times the values, and at least so many bytes.
_MAX_STAGING, _MIN_STAGING_NBYTES = 4, 64 << 20

T = TypeVar("T")
Outs = Sequence[Sequence[torch.Tensor]]


class _UpdateFailedError(TensorKVError):
    """What an updater has raised on a worker, known to all of them; so the store goes on."""

    def __init__(self, error: Exception) -> None:
        super().__init__(message_of(error))
        self.error = error


def raising_failed(make: Callable[[Steps[T]], T], steps: Steps[T]) -> T:
    """Make the steps of a push, and raise what an updater has raised.

    Not within the steps: a generator cannot raise StopIteration.
    """
    try:
        return make(steps)
    except _UpdateFailedError as error:
        failed = error.error
    try:
        raise failed
    finally:
        # The traceback leads here, and with this would wait for the garbage collector.
        del failed


class _SharedSums:
    """The sums of a call that compiled code makes.

    Args:
        reduce: which makes them.
        batch: of the call.
    """

    def __init__(self, reduce: native.SharedReduce, batch: native.Batch) -> None:
        self._reduce, self._batch = reduce, batch
        self.count_nonfinite = reduce.count_nonfinite

    def squares(self) -> SquareSum:
        return SquareSum.of_batch(self._reduce.squares)

    def leave_out(self, places: set[int]) -> None:
        self._reduce.leave_out(bytes(place in places for place in range(len(self._batch.cells))))


class Pushes:
    """What one worker pushes and pulls.

    Args:
        group: of all workers.
        host: of this worker.
        chain: to other hosts.
        order: of this worker's collective calls.
        shard: what it updates.
        values: whole values, by key.
        policy: for sums with NaN or Inf.
        compressor: of this worker's gradients.
    """

    def __init__(
        self,
        group: ProcessGroup,
        host: HostGroup,
        chain: Chain,
        order: CollectiveOrder,
        shard: Shard,
        values: dict[Key, PartitionedEntry],
        policy: NonFinitePolicy,
        compressor: Compressor,
    ) -> None:
        self._group, self._host, self._chain, self._order = group, host, chain, order
        self._compressor, self._chain_alone = compressor, chain.alone()
        self._shard, self._values, self._policy = shard, values, policy
        self._queue = PushQueue(order, host, chain)
        self._decisions = Decisions(group, host, policy)
        # Of compressed gradients, whose sums are made on each host.
        self._decisions_alone = Decisions(group, host, policy, is_repeated=True, counts=chain.is_last)
        self._coded_sums = SumMemory()
        self._gradients: Recent[tuple[Key, ...], PlainGradients] = Recent(_MAX_GRADIENTS)
        # The last push of each key, until its values are known to be there.
        self._pending: dict[Key, AllReduce] = {}
        # By their keys, the least recently used first; and how many keys they name together.
        self._schedules: dict[tuple[Key, ...], Schedule] = {}
        self._num_named = 0
        # By their keys, the least recently pushed first. Workers drop the same ones: only deferred pushes, which all of
        # them make alike, those that have left too, add or move one.
        self._staging: dict[tuple[Key, ...], StagingBuffer] = {}
        self._slot_nbytes = SLOT_NBYTES if len(group.hosts) == 1 else SLOT_NBYTES_OVER_HOSTS
        # The staging buffer of all calls that are not deferred, and what makes plain ones of them in it on one host.
        self._ring: StagingBuffer | None = None
        self._shared: native.SharedReduce | None = None
        # That of small deferred pushes, the slot of the next one, and the last push in each slot.
        self._small: StagingBuffer | None = None
        self._small_slot = 0
        self.last_push = PushResult()
        """What was found out about the last push."""
        # Of the gradients that the present call has as Rows; and how its dense ones were updated.
        self._row_squares = SquareSum()
        self._update: Update | None = None
        self._small_pushes: list[AllReduce | None] = []

    # ------------------------------------------------------------ push

    def try_compiled(self, call: native.Call) -> Steps[bool]:
        """Make a call in compiled code if all arrays are plain; return False if nothing was done."""
        self._order.check()
        if self._compressor.codec is not None and call.verb != "pull":
            return (yield from self._push_plain_coded(call))
        has_sums = call.verb == "pushpull" or (call.verb == "push" and self._decides)
        if has_sums and self._shared is not None and self._shard.rule.plain_steps is not None:
            return (yield from self._push_plain(call))
        batch = call.look(self._values)
        if batch is None:
            return False
        verb, keys = call.verb, batch.keys
        # A pushpull has parts and outs.
        nbytes = batch.nbytes // 2 if verb == "pushpull" else batch.nbytes
        if not batch.begin(nbytes > _PAST_CACHE_NBYTES) or (verb != "pull" and not self._fits_rule(keys)):
            return False
        if verb == "pull":
            yield from self._settled(keys)
            batch.run(0, batch.numel)
        else:
            # Other threads may change the caller's lists.
            groups = (call.values,) if type(call.key) in (str, int) else tuple(call.values)
            outs = None if verb == "push" else batch
            yield from self._enter(
                self._signature(verb, keys),
                partial(self._push_dense, keys=keys, parts=Arrays(groups, batch), outs=outs, priority=call.priority),
            )
        # The update has been counted where it was made.
        batch.finish(False)
        return True

    def allocate(self) -> None:
        """Allocate what pushpulls stage their parts in, if all workers are on this host; all of them call this."""
        if self._ring is None and len(self._group.hosts) == 1:
            self._ring = self._new_ring()
            if native.can_look():
                self._shared = self._host.shared_reduce(self._slot_nbytes, self._ring.places())

    def _new_ring(self) -> StagingBuffer:
        return StagingBuffer(self._host, RING, self._slot_nbytes, counts=self._shard.averages)

    def _push_plain(self, call: native.Call) -> Steps[bool]:
        """Push plain arrays in memory that all workers share, and wait; return whether it was done."""
        try:
            yield from self._drained()
        except BaseException as error:
            # The other workers may make this call, whatever has ended this wait.
            self._order.break_off(error, call.verb)
        batch = call.look(self._values, self._shard)
        if batch is None:
            return False
        batch.past_cache = batch.nbytes > 2 * _PAST_CACHE_NBYTES
        blank = [] if batch.unready is None else [entry for entry in batch.unready if entry.is_blank]
        if batch.unready is not None:
            self._shard.complete(batch.unready)
            if not batch.begin(batch.past_cache):
                return False
        signature = Signature.of_keys(call.verb, batch.keys, self._values, batch)
        push = partial(self._reduce_shared, batch=batch, blank=blank)
        return (yield from self._enter(signature, push, waits=False))

    def _reduce_shared(self, call: Collective, batch: native.Batch, blank: Sequence[Entry]) -> Steps[bool]:
        """Push a batch.

        Args:
            call: that was entered.
            batch: of the call.
            blank: those of its entries that had no state before the call.
        """
        self._order.remember(call)
        reduce: Any = self._shared
        clipping, rescale = self._shard.rule.clipping, None
        if self._decides:
            rescale = 1.0 if clipping is None else clipping.rescale
        reduce.begin(batch, call.number, self._host.entry_offset(call.number), rescale)
        while (awaited := reduce.advance()) is not None:
            if awaited is True:
                yield from self._decide_shared(call.signature.verb, batch, blank)
            elif awaited:
                yield
                self._host.wait(*awaited)
            else:
                yield from self._order.agreement([call])
                reduce.agree(call.members or [])
        return True

    def _decide_shared(self, verb: str, batch: native.Batch, blank: Sequence[Entry]) -> Steps[None]:
        """Decide on the update of a batch whose sums are made."""
        reduce: Any = self._shared
        clipping, sums = self._shard.rule.clipping, _SharedSums(reduce, batch)
        try:
            decision = yield from self._decisions.make(verb, batch.keys, sums, clipping, SquareSum())
        except NonFiniteError:
            _clear(blank)
            reduce.refuse()
            # Others wait for this worker's word that its values are there.
            reduce.advance()
            raise
        self.last_push = decision.result
        if decision.left_out and blank:
            left_out = {batch.keys[place] for place in decision.left_out}
            _clear(entry for entry in blank if entry.key in left_out)
        reduce.decide(decision.scale)

    def _fits_rule(self, keys: tuple[Key, ...]) -> bool:
        """Tell whether the update rule can update these keys from dense parts."""
        schedule, rule = self._schedules.get(keys), self._shard.rule
        if schedule is not None and schedule.rule is rule:
            return True
        try:
            # What the compiled part can update, it can by dtype.
            for key in keys if rule.plain_steps is None else self._examples(keys):
                entry = self._shard.entry("push", key)
                rule.check(entry, by_rows=False)
                if self._shard.averages and not has_means(entry):
                    return False
        except TensorKVError:
            return False
        return True

    def _examples(self, keys: Sequence[Key]) -> list[Key]:
        """Return a key of each dtype."""
        return list({self._values[key].whole.dtype: key for key in keys}.values())

    def push(self, batch: Batch, outs: Outs | None, priority: int) -> None:
        """Push a batch; with outs, pull its keys."""
        with kept(), torch.no_grad():
            raising_failed(finish, self._order.steps(self._push(batch, outs, priority)))

    def _push(self, batch: Batch, outs: Outs | None, priority: int) -> Steps[None]:
        by_rows = [all(isinstance(part, Rows) for part in parts) for parts in batch.parts]
        keys, verb = tuple(batch.keys), "push" if outs is None else "pushpull"
        self._shard.check(batch)
        self._order.check()
        # What cannot be encoded raises before others hear of the call.
        sending = self._encode(batch, by_rows)
        if any(by_rows):
            signature = Signature(describe(verb, keys=batch.keys, rows=by_rows))
            push = partial(self._push_rows_and_dense, batch=batch, by_rows=by_rows, sending=sending)
        else:
            signature = self._signature(verb, keys)
            push = partial(
                self._push_groups,
                keys=keys,
                groups=batch.parts,
                outs=outs,
                priority=priority,
                sending=sending,
                counts=batch.counts,
            )
        filled = yield from self._enter(signature, push)
        if outs is not None and not filled:
            self.pull(keys, outs)

    def _encode(self, batch: Batch, by_rows: Sequence[bool]) -> Sending | None:
        """Return the words of the keys that are not pushed as Rows of a table; None: they are not compressed."""
        if self._compressor.codec is None:
            return None
        entries = [self._shard.entry(batch.verb, key) for key in batch.keys]
        chosen = [
            (entry, parts)
            for entry, parts, is_rows in zip(entries, batch.parts, by_rows, strict=True)
            if not (is_rows and entry.spec.is_table)
        ]
        owners, groups = [entry for entry, _ in chosen], [parts for _, parts in chosen]
        return coded.encode(self._compressor, batch.verb, self._group.rank, owners, groups)

    def _signature(self, verb: str, keys: tuple[Key, ...]) -> Signature:
        """Describe a push of dense parts to the other workers."""
        schedule = self._schedules.get(keys)
        signature = None if schedule is None else schedule.signatures.get(verb)
        if signature is None:
            batch = native.look(self._values, keys, None, None, None, None) if native.can_look() else None
            signature = Signature.of_keys(verb, keys, self._values, batch)
            if schedule is not None:
                schedule.signatures[verb] = signature
        return signature

    def _enter(
        self, signature: Signature, push: Callable[[Collective], Steps[bool]], *, waits: bool | None = None
    ) -> Steps[bool]:
        """Enter a push and make it; return whether its outputs have been written.

        Args:
            signature: of the push.
            push: makes it.
            waits: whether it waits for others without a yield before (None: as ``_waits_for_messages`` says).
        """
        self.last_push = PushResult()
        if (self._waits_for_messages if waits is None else waits) or not self._host.can_enter():
            yield
        try:
            return (yield from push(self._host.enter(signature)))
        except _UpdateFailedError:
            raise
        except BaseException as error:
            self._order.break_off(error, signature.text)

    @property
    def _waits_for_messages(self) -> bool:
        """Whether a push waits for messages of other workers, or runs a function of the caller's."""
        return self._chain.has_neighbours or self._decides or self._shard.has_updater

    @property
    def _decides(self) -> bool:
        """Whether what is done with a push depends on the sums of all its keys."""
        return self._policy.checks or self._shard.rule.clipping is not None

    def _push_groups(
        self,
        call: Collective,
        keys: tuple[Key, ...],
        groups: Sequence[Sequence[Part]],
        outs: Outs | None,
        priority: int,
        sending: Sending | None = None,
        counts: Sequence[int] | None = None,
    ) -> Steps[bool]:
        """Do ``_push_dense`` with parts and outputs as tensors, or Rows that become dense.

        Args:
            call: that was entered.
            keys, groups, outs, priority: of the call.
            sending: the words of the parts, which are pushed instead.
            counts: of how many parts each key's are (None: each is one).
        """
        if sending is not None:
            return (yield from self._push_coded(call, keys, sending, [len(group) for group in groups]))
        dense = [_dense(self._shard.entry("push", key), group) for key, group in zip(keys, groups, strict=True)]
        parts, targets = Arrays.of(self._values, keys, dense), None
        if counts is not None:
            parts.counts = np.array(counts, np.int64)
        if outs is not None and native.can_look():
            targets = native.look(self._values, keys, None, outs, None, None)
        if targets is None:
            return (yield from self._push_dense(call, keys, parts, None, priority))
        targets.begin(targets.nbytes > _PAST_CACHE_NBYTES)
        return (yield from self._push_dense(call, keys, parts, targets, priority))

    def _push_dense(
        self, call: Collective, keys: tuple[Key, ...], parts: Arrays, outs: native.Batch | None, priority: int
    ) -> Steps[bool]:
        """Push dense parts, and fill outputs if they are plain; return whether these have been written."""
        if call.signature.verb == "push" and self._can_defer:
            yield from self._defer(call, keys, parts, priority)
            return False
        allreduce = yield from self._run(call, keys, parts)
        self._raise_failed(allreduce)
        if outs is not None:
            allreduce.copy_out(outs)
        return outs is not None

    def _push_plain_coded(self, call: native.Call) -> Steps[bool]:
        """Push the words of plain arrays; return False if nothing was done."""
        batch = call.look(self._values)
        if batch is None or not self._fits_rule(batch.keys):
            return False
        keys, gradients = batch.keys, self._plain_gradients(batch.keys)
        if gradients is None:
            return False
        if not batch.begin(batch.nbytes > 2 * _PAST_CACHE_NBYTES):
            return False
        rank = self._group.rank
        sending = self._compressor.encode_all(call.verb, [(key, rank) for key in keys], gradients.of(batch))
        counts = np.frombuffer(batch.part_counts, np.int64)
        push = partial(
            self._push_coded,
            keys=keys,
            sending=sending,
            counts=counts,
            outs=batch if call.verb == "pushpull" else None,
        )
        yield from self._enter(self._signature(call.verb, keys), push)
        # The update has been counted where it was made.
        batch.finish(False)
        return True

    def _plain_gradients(self, keys: tuple[Key, ...]) -> PlainGradients | None:
        """Return what takes gradients of plain arrays; None: some are not compressed."""
        codec: Any = self._compressor.codec
        found = self._gradients.get(keys)
        if found is None or found.layout.codec != codec:
            wholes = [self._values[key].whole for key in keys]
            if not all(whole.dtype in COMPRESSED_DTYPES for whole in wholes):
                return None
            layout = words_layout(codec, tuple(tuple(whole.shape) for whole in wholes))
            found = PlainGradients(
                layout,
                range(len(keys)),
                [0] * len(keys),
                is_float32=all(whole.dtype is torch.float32 for whole in wholes),
            )
            self._gradients.keep(keys, found, len(keys), len(self._values))
        return found

    def _push_coded(
        self,
        call: Collective,
        keys: tuple[Key, ...],
        sending: Sending | None,
        counts: Sequence[int] | Numbers,
        outs: native.Batch | None = None,
    ) -> Steps[bool]:
        """Push words; each host makes the update for itself. Return whether outputs have been written.

        Args:
            call: on which a worker that has left has agreed already.
            keys: of the call.
            sending: of this worker (None: it has left).
            counts: of how many parts each key's are.
            outs: if they are plain.
        """
        yield from self._drained()
        self._order.remember(call)
        if sending is not None:
            self._order.agree([call])
        self._order.wait_for_all()
        if sending is None:
            codec: Any = self._compressor.codec
            layout = words_layout(codec, tuple(tuple(self._values[key].whole.shape) for key in keys))
        else:
            layout = sending.layout
        sums, counted = coded.exchange(self._compressor, self._group, layout, sending, counts, self._coded_sums)
        allreduce = yield from self._prepare(call, keys, deferred=False, is_repeated=True)
        entries = allreduce.update.entries
        versions = [entry.version for entry in entries]
        arrays = Arrays.of(self._values, keys, sums)
        arrays.counts = counted
        yield from allreduce.take_sums(arrays)
        yield from allreduce.run()
        yield from allreduce.wait_for_values()
        try:
            self._raise_failed(allreduce)
        finally:
            if sending is not None:
                self._compressor.settle(sending, entries, versions)
        if outs is not None:
            allreduce.copy_out(outs)
        return outs is not None

    @property
    def _can_defer(self) -> bool:
        """Whether nothing can go wrong with a push that its caller would have to hear of."""
        return not self._shard.has_updater and not self._decides

    def _defer(self, call: Collective, keys: tuple[Key, ...], parts: Arrays, priority: int) -> Steps[None]:
        """Stage a push and leave the rest to the queue."""
        allreduce = yield from self._prepare(call, keys, deferred=True)
        # Pushes of one key are applied in the order in which they were made.
        for earlier in self._pending_of(keys):
            yield from self._queue.done(earlier)
        yield from allreduce.stage_all(parts)
        for key in keys:
            self._pending[key] = allreduce
        self._queue.add(allreduce, priority)

    def _run(self, call: Collective, keys: tuple[Key, ...], parts: Arrays) -> Steps[AllReduce]:
        """Run a call to its end, when all values are there."""
        allreduce = yield from self._prepare(call, keys, deferred=False)
        yield from self._drained()
        yield from allreduce.start(parts)
        yield from self._order.agreement([call])
        yield from allreduce.run()
        yield from allreduce.wait_for_values()
        return allreduce

    def _push_rows_and_dense(
        self, call: Collective, batch: Batch, by_rows: Sequence[bool], sending: Sending | None
    ) -> Steps[bool]:
        """Push keys of which some came as Rows alone; no outputs are written."""
        yield from self._drained()
        self._order.remember(call)
        self._order.agree([call])
        self._order.wait_for_all()
        pairs = list(zip(batch.keys, batch.parts, by_rows, strict=True))
        rows: dict[Key, Any] = {key: parts for key, parts, is_rows in pairs if is_rows}
        dense = {key: parts for key, parts, is_rows in pairs if not is_rows}
        merged = self._gather_rows(batch.verb, rows, [len(parts) for parts in rows.values()])
        has_inner = bool(dense) and not self._skips(rows, merged)
        if has_inner:
            inner = self._host.enter(self._signature("push", tuple(dense)))
            counts = None if batch.counts is None else list(compress(batch.counts, map(not_, by_rows)))
            yield from self._push_groups(inner, tuple(dense), list(dense.values()), None, 0, sending, counts)
            # One thread at a time may step an optimizer, and this one goes on with the Rows.
            self._queue.wait_for()
        self._apply_decided(rows, merged, len(dense), has_inner=has_inner)
        return False

    def _skips(self, rows: Mapping[Key, Any], merged: Mapping[Key, Rows]) -> bool:
        """Tell whether a call is left out as a whole, since some of its Rows were."""
        return self._policy.skips_steps and len(merged) < len(rows)

    def _apply_decided(
        self, rows: Mapping[Key, Any], merged: Mapping[Key, Rows], num_dense: int, *, has_inner: bool
    ) -> None:
        """Update rows, after the dense keys of the call, by what was decided on all of them.

        Args:
            rows: what was pushed as Rows.
            merged: the sums of those that are not left out.
            num_dense: how many other keys the call has.
            has_inner: whether these were pushed.
        """
        found_inf = len(merged) < len(rows) if self._policy.checks else None
        update = self._update if has_inner and self._decides else None
        if update is None:
            scale, self.last_push = clip(self._row_squares, self._shard.rule.clipping, found_inf)
            self._policy.counts["skipped"] += num_dense if self._skips(rows, merged) else 0
        else:
            scale, self.last_push = update.scale, update.result._replace(found_inf=found_inf or update.result.found_inf)
            if update.is_skipped:
                self._policy.counts["skipped"] += len(merged)
                merged = {}
        self._row_squares = SquareSum()
        self._apply_rows(merged, scale)

    def _gather_rows(self, verb: str, parts: Mapping[Key, Sequence[Rows]], counts: Sequence[int]) -> dict[Key, Rows]:
        """Return the sums of all workers' Rows, without those that are left out.

        Args:
            verb: of the call.
            parts: of this worker.
            counts: how many of each key it has, none if it has left.
        """
        divisors = np.ones(len(parts), np.int64)
        if self._shard.averages:
            found = self._group.all_gather(torch.tensor(counts, dtype=torch.int64, device="cpu"))
            divisors = np.sum([each.numpy() for each in found], 0)
        merged = {
            key: sparse.gather(self._group, self._shard.entry(verb, key), own, divisor)
            for (key, own), divisor in zip(parts.items(), divisors.tolist(), strict=True)
        }
        self._host.barrier()
        if self._policy.checks:
            bad = {position: count_nonfinite(total) for position, total in enumerate(merged.values())}
            names = [f"{verb}({quote(key)})" for key in merged]
            left_out = self._policy.left_out(bad, names, is_whole=True)
            merged = {key: merged[key] for position, key in enumerate(merged) if position not in left_out}
        clipping = self._shard.rule.clipping
        self._row_squares = SquareSum()
        if clipping is not None:
            self._row_squares = sum((SquareSum.of(each, clipping.rescale) for each in merged.values()), SquareSum())
        return merged

    def _apply_rows(self, merged: Mapping[Key, Rows], scale: float) -> None:
        """Update rows, every worker doing the same with what all have pushed."""
        rule = self._shard.rule.scaled(scale)
        entries = [self._shard.entry("push", key) for key in merged]
        failed: list[tuple[int, Exception]] = []
        for position, (entry, total) in enumerate(zip(entries, merged.values(), strict=True)):
            try:
                if isinstance(entry.value, Table):
                    rule.apply_rows(entry, total)
                else:
                    updates = self._chain.is_last and self._chain.is_owner
                    owner = self._host.local_rank if updates else self._chain.owners
                    sparse.apply(rule, entry, self._values[entry.key], owner, total)
            except Exception as error:
                failed.append((position, error))
        self._host.barrier()
        if len(self._group.hosts) > 1:
            self._copy_rows(merged)
        self._raise_on_all(failed, entries)

    def _copy_rows(self, merged: Mapping[Key, Rows]) -> None:
        """Copy the rows that the last host has updated to the others."""
        source = self._group.hosts[-1][0]
        writes = self._host.local_rank == 0 and not self._chain.is_last
        for key, rows in merged.items():
            if key in self._values:
                sparse.copy_rows(self._group, self._values[key], rows.ids, source, writes)
        self._host.barrier()

    def _raise_failed(self, allreduce: AllReduce) -> None:
        """Raise, on every worker, what an updater has raised on one, or that a sum was refused."""
        self._update, self.last_push = allreduce.update, allreduce.update.result
        if allreduce.update.refusal is not None:
            self._row_squares = SquareSum()
            raise allreduce.update.refusal
        if allreduce.update.failed or self._shard.has_updater:
            self._raise_on_all(allreduce.update.failed, allreduce.update.entries)

    def _raise_on_all(self, mine: Sequence[tuple[int, Exception]], entries: Sequence[Entry]) -> None:
        """Raise, on every worker, what an updater has raised on one; its key counts no update."""
        if not self._shard.has_updater:
            for _, error in mine:
                raise error
            return
        described = [[position, type(error).__name__, message_of(error)[:1000]] for position, error in mine]
        found = self._group.all_gather_json(described)
        failed = [(rank, *each) for rank, own in enumerate(found) for each in own]
        for position in {position for _, position, _, _ in failed} - {position for position, _ in mine}:
            entries[position].version -= 1
        if mine:
            raise _UpdateFailedError(mine[0][1])
        if failed:
            rank, position, kind, message = failed[0]
            raise _UpdateFailedError(sparse.raised_elsewhere(rank, entries[position].key, kind, message))

    # ------------------------------------------------------------ pull

    def pull(self, keys: Sequence[Key], outs: Outs, regions: Sequence[Region] | None = None) -> None:
        """Copy values, or a part of each, out, after this worker's earlier pushes of these keys."""
        with self._order.lock:
            self._order.check()
            entries = [self._shard.entry("pull", key) for key in keys]
            check_outs("pull", entries, outs, regions)
            self.settle(keys)
            wanted = [None] * len(keys) if regions is None else regions
            pairs = [
                (out, self._part(key, region))
                for key, region, group in zip(keys, wanted, outs, strict=True)
                for out in group
            ]
            with torch.no_grad():
                for job in reduce.copies(pairs, 1):
                    job()

    def _part(self, key: Key, region: Region | None) -> torch.Tensor:
        whole = self._values[key].whole
        return whole if region is None else region.of(whole)

    def settle(self, keys: Sequence[Key]) -> None:
        """Wait until this worker's earlier pushes of some keys have made their values."""
        finish(self._settled(keys))

    def _settled(self, keys: Sequence[Key]) -> Steps[None]:
        if not self._pending:
            return
        for allreduce in self._pending_of(keys):
            yield from self._queue.done(allreduce)
            with self._order.ending_store(allreduce.call.signature):
                yield from allreduce.wait_for_values()
        # Only now: a call that is interrupted while it waits is made again.
        for key in keys:
            self._pending.pop(key, None)

    def drain(self) -> None:
        """Wait for all of this worker's earlier pushes."""
        finish(self._drained())

    def _drained(self) -> Steps[None]:
        yield from self._queue.done()
        yield from self._settled(list(self._pending))

    def _pending_of(self, keys: Sequence[Key]) -> list[AllReduce]:
        return list({id(each): each for key in keys if (each := self._pending.get(key))}.values())

    # ------------------------------------------------------------ pushes of others

    def leave(self) -> None:
        """Join the pushes of the others, without parts of this worker's, until every worker has left."""
        # Every worker hears of these, and the store goes on after them.
        common: list[type[BaseException]] = [_UpdateFailedError, NonFiniteError]
        if len(self._group.hosts) == 1:
            common.append(NoMemoryToShareError)
        with self._order.lock, kept(), torch.no_grad(), self._order.unbroken("leave"):
            self._order.check()
            self.drain()
            while (call := self._order.join()).digest != LEFT:
                if call.digest != REFUSED:
                    with suppress(*common):
                        self._serve(call)

    def _serve(self, call: Collective) -> None:
        """Take part in a push."""
        verb, _, rest = call.text.partition(" ")
        if verb not in ("push", "pushpull") or rest.startswith('{"slices"'):
            raise WorkerMismatchError(
                f"rank {self._group.rank} has left; the others may push and pull only, not {call.text[:200]}"
            )
        try:
            arguments = json.loads(rest)
        except ValueError:
            raise WorkerError(
                "leave: the other workers push a new list of keys that is too long to be sent to a worker that has left"
            ) from None
        keys, by_rows = arguments["keys"], arguments.get("rows")
        if by_rows is None:
            self._serve_dense(call, tuple(keys))
            return
        self._order.wait_for_all()
        chosen = [key for key, is_rows in zip(keys, by_rows, strict=True) if is_rows]
        nothing: dict[Key, Any] = {key: [sparse.no_rows(self._shard.entry(verb, key))] for key in chosen}
        merged = self._gather_rows(verb, nothing, [0] * len(chosen))
        has_inner = len(chosen) < len(keys) and not self._skips(nothing, merged)
        if has_inner:
            self._serve(self._order.join())
        self._apply_decided(nothing, merged, len(keys) - len(chosen), has_inner=has_inner)

    def _serve_dense(self, call: Collective, keys: tuple[Key, ...]) -> None:
        if self._compressor.codec is not None:
            finish(self._push_coded(call, keys, None, ()))
            return
        deferred = call.signature.verb == "push" and self._can_defer
        allreduce = finish(self._prepare(call, keys, deferred=deferred))
        finish(allreduce.run())
        if deferred:
            # No later one, since this worker takes calls in their order.
            self._chain.report_progress(-1)
        self._raise_failed(allreduce)

    # ------------------------------------------------------------ schedules and staging buffers

    def _prepare(
        self, call: Collective, keys: tuple[Key, ...], *, deferred: bool, is_repeated: bool = False
    ) -> Steps[AllReduce]:
        """Choose the staging buffer of a call; one that is new is allocated by all workers of the host.

        Args:
            call: that was entered.
            keys: of the call.
            deferred: whether the queue runs it.
            is_repeated: whether each host makes all of it.
        """
        schedule = self._schedule(keys)
        self._order.remember(call)
        first = 0
        if not deferred:
            if self._ring is None:
                yield from self._agreed_early(call)
                self._ring = self._new_ring()
            staging = self._ring
        elif schedule.is_small:
            staging, first = yield from self._next_small_slot(call)
        else:
            staging = yield from self._own_staging(keys, schedule, call)
        chain, decisions, row_squares = self._chain, self._decisions, self._row_squares
        if is_repeated:
            chain, decisions = self._chain_alone, self._decisions_alone
        updates_empty = chain.is_last and self._host.local_rank == 0
        update = Update(call.signature.verb, self._shard, schedule, self._policy, decisions, row_squares, updates_empty)
        allreduce = AllReduce(self._host, chain, call, schedule, staging, update, first)
        if staging is self._small:
            self._small_pushes[first] = allreduce
        return allreduce

    def _next_small_slot(self, call: Collective) -> Steps[tuple[StagingBuffer, int]]:
        if self._small is None:
            yield from self._agreed_early(call)
            self._small = StagingBuffer(self._host, ENTRIES, SMALL_NBYTES, counts=self._shard.averages)
            self._small_pushes = [None] * ENTRIES
        slot = self._small_slot
        self._small_slot = (slot + 1) % ENTRIES
        earlier = self._small_pushes[slot]
        if earlier is not None:
            yield from self._queue.done(earlier)
        return self._small, slot

    def _own_staging(self, keys: tuple[Key, ...], schedule: Schedule, call: Collective) -> Steps[StagingBuffer]:
        staging = self._staging.pop(keys, None)
        if staging is None:
            yield from self._make_room(schedule.staging_nbytes)
            yield from self._agreed_early(call)
            slots, nbytes = schedule.num_slots, schedule.slot_nbytes
            self._staging[keys] = staging = StagingBuffer(self._host, slots, nbytes, counts=self._shard.averages)
        else:
            self._staging[keys] = staging
            # Its slots are filled again only when what was staged before has been taken.
            yield from self._queue.done(staging)
        return staging

    def _agreed_early(self, call: Collective) -> Steps[None]:
        # Memory is shared by workers that make the same call, and calls are compared in order.
        yield
        self._queue.wait_for()
        self._host.agree(call)

    def _schedule(self, keys: tuple[Key, ...]) -> Schedule:
        schedule = self._schedules.pop(keys, None) or self._make_schedule(keys)
        self._schedules[keys] = schedule
        rule = self._shard.rule
        if schedule.rule is not rule:
            # Whether it does is a matter of the value's dtype.
            examples = [self._shard.entry("push", key) for key in self._examples(keys)]
            schedule.rule, schedule.sees_whole = rule, any(map(rule.sees_whole, examples))
        return schedule

    def _make_schedule(self, keys: tuple[Key, ...]) -> Schedule:
        while len(self._schedules) >= _MIN_SCHEDULES and self._num_named > _MAX_NAMED * len(self._values):
            self._drop_schedule(next(iter(self._schedules)))
        self._num_named += len(keys)
        values = [self._values[key] for key in keys]
        return Schedule(Layout(keys, values, self._host.local_rank, self._chain.owners), self._slot_nbytes)

    def _drop_schedule(self, keys: tuple[Key, ...]) -> None:
        if self._schedules.pop(keys, None) is not None:
            self._num_named -= len(keys)

    def _make_room(self, staging_nbytes: int) -> Steps[None]:
        """Drop the least recently used staging buffers until there is room for another one."""
        values = [each.whole for each in self._values.values()]
        nbytes = sum(value.numel() * interop.accumulator(value.dtype).itemsize for value in values)
        staged = {keys: each.nbytes for keys, each in self._staging.items()}
        room = max(_MIN_STAGING_NBYTES, _MAX_STAGING * nbytes) - staging_nbytes - sum(staged.values())
        for keys, freed in staged.items():
            if room >= 0:
                break
            yield from self._drop(keys)
            room += freed

    def forget(self, keys: Sequence[Key] | None = None) -> None:
        """Drop the schedules of some keys, or all, when no push is pending any more."""
        # The last push in a slot refers to values.
        self._small_pushes = [None] * len(self._small_pushes)
        self._coded_sums = SumMemory()
        self._gradients.clear()
        gone = None if keys is None else set(keys)
        for named in {**self._schedules, **self._staging}:
            if gone is None or not gone.isdisjoint(named):
                finish(self._drop(named))

    def _drop(self, keys: tuple[Key, ...]) -> Steps[None]:
        yield from self._settled(keys)
        self._drop_schedule(keys)
        staging = self._staging.pop(keys, None)
        if staging is not None:
            self._host.release(staging.segment)

    def close(self) -> None:
        """End the progress thread and let go of the memory."""
        self._queue.close()
        self._schedules.clear()
        self._staging.clear()
        self._pending.clear()
        self._small_pushes.clear()
        self._ring = self._small = self._shared = None


def _clear(entries: Iterable[Entry]) -> None:
    """Forget the states of entries."""
    for entry in entries:
        entry.state = {}


def _dense(entry: Entry, parts: Sequence[Part]) -> list[torch.Tensor]:
    """Return parts as dense CPU tensors, Rows in the dtype that sums are made in."""
    dense = [entry.dense(part) if isinstance(part, Rows) else part for part in parts]
    return [part if part.is_cpu else part.cpu() for part in dense]
