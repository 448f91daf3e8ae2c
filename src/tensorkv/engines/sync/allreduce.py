"""AllReduce: the sums of one call over all workers, and the update that they make, bucket by bucket.

A bucket passes four stages. ``stage_in``: every worker puts its parts into the staging buffer. ``reduce``: each owner
sums everyone's parts of its pieces and updates the values, or sends the sums to the next host. ``return_values``: the
last host's values come back. ``copy_out``: outputs are written, when the values of all buckets are there; so a call
that fails, because another worker dies for example, leaves them as they were. A stage that may have to wait for long
for another worker yields before it does (see ``shield.run_steps``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tensorkv.engines.partition import Numbers
from tensorkv.engines.transport.segment import LINE, aligned
from tensorkv.errors import NonFiniteError
from tensorkv.runtime.shield import Steps
from tensorkv.shard import native, reduce
from tensorkv.shard.changes import Push
from tensorkv.shard.entry import Entry
from tensorkv.shard.nonfinite import NonFinitePolicy, squares_of
from tensorkv.shard.norm import PushResult, SquareSum
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import Assign, Step, WholeStep
from tensorkv.shard.shard import Shard

from .chain import Chain
from .decision import Decisions
from .host import Collective, HostGroup
from .schedule import Arrays, Bucket, BucketSegment, Schedule, StagingBuffer

# One call runs in one thread: its workers share the cores.
_POOL = Pool(1)


class Update:
    """What one call does with its sums: the update of each key, whose sum comes piece by piece.

    Args:
        verb: of the call, for messages.
        shard: with this worker's part of each key.
        schedule: of the keys, which were checked for the shard's rule.
        policy: for sums with NaN or Inf.
        decisions: of this worker.
        row_squares: of the gradients that the same call has as Rows, which every worker knows.
        updates_empty: whether this worker updates values without elements, of which no piece comes.
    """

    def __init__(
        self,
        verb: str,
        shard: Shard,
        schedule: Schedule,
        policy: NonFinitePolicy,
        decisions: Decisions,
        row_squares: SquareSum,
        updates_empty: bool,
    ) -> None:
        self._verb, self._shard, self._layout, self._policy = verb, shard, schedule.layout, policy
        self._rule, self._decisions, self._row_squares = shard.rule, decisions, row_squares
        self._decides = policy.checks or shard.rule.clipping is not None
        self._updates_empty = updates_empty
        # Whether values change only when all sums have come.
        self.is_at_end = self._decides or schedule.sees_whole
        self.assigns = isinstance(self._rule, Assign) and not self._decides
        self.averages = shard.averages
        """Whether each sum is divided by the number of its parts."""
        self._steps: dict[int, Step] = {}
        # By position of the key, what its update raised.
        self.failed: list[tuple[int, Exception]] = []
        self.refusal: NonFiniteError | None = None
        self.scale = 1.0
        """Of all gradients of the call."""
        self.result = PushResult()
        self.left_out: set[int] = set()
        """The positions of keys that are not to change."""

    @cached_property
    def entries(self) -> list[Entry]:
        """This worker's part of each key."""
        return [self._shard.entry(self._verb, key) for key in self._layout.keys]

    @cached_property
    def _batch(self) -> native.Batch | None:
        """What the compiled part updates; made in the turn of the call, since it counts the steps before."""
        return None if self.is_at_end else self._shard.updates(self._layout.own_keys)

    def take(self, segment: BucketSegment, columns: list[bytes], divisors: Numbers | None) -> bool:
        """Update this worker's pieces of a segment from columns of parts; False: they are to be given to ``apply``.

        Args:
            segment: of a bucket.
            columns: of parts.
            divisors: of the sum of each piece (None: they are not divided).
        """
        if segment.dtype not in native.DTYPES or self._batch is None:
            return False
        packed = None if divisors is None else divisors.astype(np.float64).tobytes()
        self._batch.update_pieces(segment.own_triples, columns, True, packed)
        return True

    def apply(self, key: int, start: int, stop: int, parts: Sequence[torch.Tensor], divisor: int) -> None:
        """Take the sum of parts, divided, for some elements of this worker's part of a key."""
        self._step(key).apply(start, stop, parts, divisor)

    def _step(self, key: int) -> Step:
        if key not in self._steps:
            entry = self.entries[key]
            whole = self._decides
            self._steps[key] = WholeStep(self._rule, entry, _POOL) if whole else self._rule.step(entry, _POOL)
        return self._steps[key]

    def finish(self) -> Steps[None]:
        """Count the update of every key, once, on every worker."""
        batch = self.__dict__.get("_batch")
        if batch is not None:
            batch.finish()
        if not self._steps and not self.is_at_end:
            self._shard.count_updates(self._layout.keys if batch is None else self._layout.other_keys)
            return
        if self.is_at_end and self._updates_empty:
            for key, entry in enumerate(self.entries):
                if not entry.spec.shape.numel():
                    self._step(key)
        if self._decides:
            yield from self._decide()
        with torch.no_grad():
            self._finish_steps(self.left_out if batch is None else {*self.left_out, *self._layout.own.tolist()})

    def _finish_steps(self, counted: set[int]) -> None:
        for key, entry in enumerate(self.entries):
            if key in counted:
                continue
            version = entry.version
            step = self._steps.pop(key, None)
            try:
                if step is not None:
                    step.finish()
                entry.version = version + 1
            except Exception as error:
                self.failed.append((key, error))

    def _decide(self) -> Steps[None]:
        """Decide on the update with all workers, and update this worker's parts of the keys together."""
        keys, clipping = self._layout.keys, self._rule.clipping
        try:
            decision = yield from self._decisions.make(self._verb, keys, self, clipping, self._row_squares)
        except NonFiniteError as error:
            # Raised when the values have gone back to all workers, who wait for them.
            self.refusal = error
            self.left_out = set(range(len(keys)))
            return
        _, self.scale, self.result = decision
        if self._shard.has_updater:
            return
        with torch.no_grad():
            mine = self._whole_steps()
            entries, parts = [self.entries[key] for key in mine], self._parts_of(mine)
            for entry, part in zip(entries, parts, strict=True):
                part.is_new = entry.is_new
            self._shard.apply(Push(parts, [[step.total] for step in mine.values()], scale=self.scale))
            for key, entry, part in zip(mine, entries, parts, strict=True):
                entry.state, entry.is_new = part.state, part.is_new
                del self._steps[key]

    @property
    def is_skipped(self) -> bool:
        """Whether nothing of the call is to change."""
        return self._policy.skips_steps and bool(self.left_out)

    def _whole_steps(self) -> dict[int, WholeStep]:
        steps = self._steps.items()
        return {key: step for key, step in steps if key not in self.left_out and isinstance(step, WholeStep)}

    def _parts_of(self, keys: Iterable[int]) -> list[Entry]:
        # Sums are as the parts of values that this worker updates, and not as the whole values.
        return [self.entries[key].copy() for key in keys]

    def squares(self) -> SquareSum:
        """As of ``Sums``."""
        mine, rescale = self._whole_steps(), 1.0 if self._rule.clipping is None else self._rule.clipping.rescale
        return squares_of(self._parts_of(mine), [step.total for step in mine.values()], rescale)

    def count_nonfinite(self) -> dict[int, int]:
        """As of ``Sums``."""
        return {key: step.count_nonfinite() for key, step in self._whole_steps().items()}

    def leave_out(self, places: set[int]) -> None:
        """As of ``Sums``."""
        self.left_out = places


class AllReduce:
    """One call with dense parts.

    Args:
        host: of this worker.
        chain: to other hosts.
        call: that all workers enter.
        schedule: of the call's keys.
        staging: the buffer for parts.
        update: what the sums do.
        first: the slot of the first bucket.
    """

    def __init__(
        self,
        host: HostGroup,
        chain: Chain,
        call: Collective,
        schedule: Schedule,
        staging: StagingBuffer,
        update: Update,
        first: int = 0,
    ) -> None:
        self._host, self._chain, self._schedule = host, chain, schedule
        self.call, self.staging, self.update = call, staging, update
        self._buckets = schedule.buckets(staging, first)
        self._owner_words = 8 * chain.owners
        # This worker's parts while only some buckets are staged.
        self._parts: Arrays | None = None
        # Parts whose own pieces are read where they are: only what others sum is staged.
        self._direct: Arrays | None = None
        # Whether they are sums over all workers, of which this one needs those of its own pieces.
        self._is_summed = False
        self._incoming: dict[int, tuple[PackedBuffer, object]] = {}
        self._returning: dict[int, tuple[PackedBuffer, object]] = {}

    # ------------------------------------------------------------ a call

    def stage_all(self, parts: Arrays) -> Steps[None]:
        """Stage all of this worker's parts, which the caller may overwrite afterwards."""
        self._parts = parts
        for index in range(len(self._buckets)):
            yield from self.stage_in(index)
        self._parts = None

    def start(self, parts: Arrays) -> Steps[None]:
        """Stage this worker's parts of the first bucket; ``run`` stages the others."""
        self._parts = parts
        self._direct = parts
        if self._buckets:
            yield from self.stage_in(0)

    def run(self) -> Steps[None]:
        """Make the values, all workers having agreed on the call; the stages of different buckets overlap."""
        count = len(self._buckets)
        if not count:
            yield from self.update.finish()
        # A bucket goes to the last host and back while the next ones follow it.
        return_lag = count if self.update.is_at_end else 4 * self._chain.hosts_after
        stages: list[tuple[int, Callable[[int], Steps[None]]]]
        stages = [(0, self.reduce), (return_lag, self.return_values)]
        if self._parts is not None:
            stages.insert(0, (-1, self.stage_in))
        for turn in range(count + return_lag):
            for lag, stage in stages:
                if 0 <= turn - lag < count:
                    yield from stage(turn - lag)
        if self._chain.has_neighbours:
            self._chain.flush()

    def is_staged(self) -> bool:
        """Tell whether all members of this host have staged their parts."""
        return all(self._host.is_reached(self._filled(bucket), bucket.use) for bucket in self._buckets)

    def wait_for_values(self) -> Steps[None]:
        """Wait until every owner has made its values."""
        for bucket in self._buckets:
            yield from self._host.reach(self.staging.ready[bucket.slot][: self._owner_words], bucket.use)

    def copy_out(self, outs: native.Batch) -> None:
        """Copy the values, which are all there, to plain outputs."""
        for bucket in self._buckets:
            for segment in bucket.segments:
                outs.copy_pieces(segment.triples, [segment.value_column])

    def take_sums(self, sums: Arrays) -> Steps[None]:
        """Take the sums of all workers, which each worker has, instead of parts that are staged."""
        self.call.members, self.call.sum_comes = [self._host.local_rank], False
        self._is_summed = True
        yield from self.start(sums)

    # ------------------------------------------------------------ the stages of one bucket

    def stage_in(self, index: int) -> Steps[None]:
        """Put this worker's parts into the staging buffer, once its slot has been read."""
        bucket = self._buckets[index]
        parts: Any = self._parts
        yield from self._host.reach(self.staging.read[bucket.slot][: self._owner_words], bucket.use - 1)
        for segment in bucket.segments:
            if not self._is_summed:
                segment.pack(parts, segment.staged_others)
            if self._direct_column(segment) is None:
                segment.pack(parts, segment.staged_own)
        if self.update.averages:
            counts = self.staging.counts(bucket.slot, self._host.local_rank)
            for segment in bucket.segments:
                counts[segment.pieces.offset // LINE] = parts.counts[segment.pieces.key]
        self._host.store(self.staging.own_filled[bucket.slot], bucket.use)

    def reduce(self, index: int) -> Steps[None]:
        """Update the pieces that this worker owns, or send their sums to the next host."""
        bucket = self._buckets[index]
        if self._chain.is_owner:
            members = self._members
            yield from self._host.reach(self._filled(bucket), bucket.use, members)
            earlier = self._receive(index) if self.call.sum_comes else None
            counts = self._counts(bucket, members, earlier) if self.update.averages else None
            sums = self._sum(bucket.own, members, earlier, counts)
            self._host.store(self.staging.own_read[bucket.slot], bucket.use)
            if bucket.own and not self._chain.is_last:
                self._send_on(index, sums)
        if index == len(self._buckets) - 1:
            yield from self.update.finish()

    def return_values(self, index: int) -> Steps[None]:
        """Have the values of this worker's pieces in place, here and on the host before."""
        yield from ()
        if not self._chain.is_owner:
            return
        bucket = self._buckets[index]
        values: PackedBuffer | None = None
        if not self._chain.is_last and bucket.own:
            values, work = self._returning.pop(index)
            self._chain.wait(work, self._chain.next)
            values.unpack(bucket.own)
        if self._chain.prev is not None and bucket.own:
            if values is None:
                values = PackedBuffer.of_values(bucket.own)
                values.pack(bucket.own)
            self._chain.isend(values.whole, self._chain.prev)
        self._host.store(self.staging.own_ready[bucket.slot], bucket.use)

    # ------------------------------------------------------------ sums

    @property
    def _members(self) -> list[int]:
        return self.call.members or []

    def _filled(self, bucket: Bucket) -> bytes:
        """Return the words of a bucket that members of this host store when they have staged their parts."""
        column, members = self.staging.filled[bucket.slot], self._members
        if len(members) == self._host.size:
            return column
        return b"".join(column[8 * worker : 8 * worker + 8] for worker in members)

    def _counts(self, bucket: Bucket, members: list[int], earlier: PackedBuffer | None) -> list[Numbers]:
        """Return, for each segment of which this worker owns pieces, of how many parts their sums are up to here."""
        staged = [self.staging.counts(bucket.slot, worker) for worker in members]
        lines = [segment.pieces.offset[segment.own] // LINE for segment in bucket.own]
        counts: list[Numbers] = [sum((each[own] for each in staged), np.zeros(len(own), np.int64)) for own in lines]
        if earlier is not None:
            before = np.split(earlier.flats[-1].numpy(), np.cumsum([len(own) for own in counts])[:-1])
            counts = [own + those for own, those in zip(counts, before, strict=True)]
        return counts

    def _sum(
        self,
        segments: list[BucketSegment],
        members: list[int],
        earlier: PackedBuffer | None,
        counts: list[Numbers] | None,
    ) -> PackedBuffer | None:
        """Update values, or return the sums for the next host; None where there are no parts up to here."""
        sums: PackedBuffer | None = None
        if not self._chain.is_last:
            if not members or not segments:
                return earlier
            alone = earlier is None and members == [self._host.local_rank]
            if alone and self._direct is not None and counts is None:
                sums = PackedBuffer.of_parts(segments, self._direct)
            if sums is not None:
                return sums
            sums = PackedBuffer.new([(segment, segment.sum_dtype) for segment in segments], counts)
        for index, segment in enumerate(segments):
            before = None if earlier is None else earlier.flats[index]
            own = None if counts is None or sums is not None else counts[index]
            self._sum_segment(segment, members, before, None if sums is None else sums.flats[index], own)
        return sums

    def _sum_segment(
        self,
        segment: BucketSegment,
        members: list[int],
        earlier: torch.Tensor | None,
        sums: torch.Tensor | None,
        divisors: Numbers | None,
    ) -> None:
        """Add the members' parts of this worker's pieces to the sum from the host before.

        Args:
            segment: of a bucket.
            members: of this host, whose parts are added in this order.
            earlier: the sum from the host before; None if none comes.
            sums: where the sums go; None: they update values.
            divisors: of the sums before they update values (None: they are not divided).
        """
        if native.can_sum(segment.sum_dtype):
            columns = [self._column(segment, worker) for worker in members]
            if earlier is not None:
                columns.insert(0, native.column_beside(earlier, segment.own_counts))
            if sums is not None:
                counts = segment.own_counts
                _sum_columns(native.column_beside(sums, counts), columns, counts, segment.sum_dtype)
                return
            if self.update.take(segment, columns, divisors):
                return
        before = None if earlier is None else _split(segment, earlier)
        targets = None if sums is None else _split(segment, sums)
        if self._direct is not None:
            # What takes pieces as tensors finds them in the staging buffer.
            segment.pack(self._direct, segment.staged_own)
        with torch.no_grad():
            self._sum_tensors(segment, members, before, targets, divisors)

    def _sum_tensors(
        self,
        segment: BucketSegment,
        members: list[int],
        before: list[torch.Tensor] | None,
        targets: list[torch.Tensor] | None,
        divisors: Numbers | None,
    ) -> None:
        for index, at in enumerate(range(segment.own.start, segment.own.stop)):
            parts = [segment.staged(worker, at) for worker in members]
            if before is not None:
                parts.insert(0, before[index])
            if targets is not None:
                reduce.sum_piece(targets[index], parts)
            else:
                start = int(segment.own_starts[index])
                stop, divisor = start + int(segment.pieces.count[at]), 1 if divisors is None else int(divisors[index])
                self.update.apply(segment.key(at), start, stop, parts, divisor)

    def _column(self, segment: BucketSegment, worker: int) -> bytes:
        """Return where a worker's parts of this worker's pieces can be read."""
        direct = self._direct_column(segment) if worker == self._host.local_rank else None
        return segment.own_staged[worker] if direct is None else direct

    def _direct_column(self, segment: BucketSegment) -> bytes | None:
        """Return where this worker's own parts of its pieces are, if they are not staged."""
        return None if self._direct is None else self._direct.own_column(segment)

    # ------------------------------------------------------------ between hosts

    def _receive(self, index: int) -> PackedBuffer | None:
        """Return what the hosts before have summed of this worker's pieces, asking for the next bucket already."""
        for each in range(index, min(index + 2, len(self._buckets))):
            own = self._buckets[each].own
            if each not in self._incoming and own:
                buffer = self._buffer_for_sums(own)
                self._incoming[each] = buffer, self._chain.irecv(buffer.whole, self._chain.prev)
        if not self._buckets[index].own:
            return None
        buffer, work = self._incoming.pop(index)
        self._chain.wait(work, self._chain.prev)
        return buffer

    def _buffer_for_sums(self, segments: list[BucketSegment]) -> PackedBuffer:
        """Return memory for the sums of the hosts before: the values themselves where these are only added to."""
        # A worker that has left may read values at any time.
        in_place = len(self._members) == self._host.size and self.update.assigns and self._chain.is_last
        if self.update.averages:
            pieces = sum(len(segment.own_counts) for segment in segments)
            return PackedBuffer.new(
                [(segment, segment.sum_dtype) for segment in segments], [np.zeros(pieces, np.int64)]
            )
        if in_place and all(native.can_sum(segment.dtype) for segment in segments):
            return PackedBuffer.of_values(segments)
        return PackedBuffer.new([(segment, segment.sum_dtype) for segment in segments])

    def _send_on(self, index: int, sums: PackedBuffer | None) -> None:
        after = self._chain.next
        if sums is not None:
            self._chain.isend(sums.whole, after)
        values = PackedBuffer.of_values(self._buckets[index].own)
        self._returning[index] = values, self._chain.irecv(values.whole, after)


@dataclass(slots=True)
class PackedBuffer:
    """The pieces of a bucket that one worker owns, side by side for another host.

    Args:
        whole: the memory that is sent.
        flats: of each segment, its pieces in it.
        is_value: whether this is the memory of the values themselves.
    """

    whole: torch.Tensor
    flats: list[torch.Tensor]
    is_value: bool = False

    @classmethod
    def new(
        cls, wanted: Sequence[tuple[BucketSegment, torch.dtype]], counts: Sequence[Numbers] | None = None
    ) -> PackedBuffer:
        """Return memory for the pieces of segments, in a dtype for each; after them, of how many parts they are."""
        lies = [(sum(segment.own_counts), dtype) for segment, dtype in wanted]
        if counts is not None:
            lies.append((sum(map(len, counts)), torch.int64))
        sizes = [aligned(count * dtype.itemsize) for count, dtype in lies]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        flats = [
            place[: count * dtype.itemsize].view(dtype)
            for place, (count, dtype) in zip(torch.split(whole, sizes), lies, strict=True)
        ]
        if counts is not None:
            flats[-1].numpy()[:] = np.concatenate(counts)
        return cls(whole, flats)

    @classmethod
    def of_values(cls, segments: Sequence[BucketSegment]) -> PackedBuffer:
        """Return memory for the values of pieces: that of the values themselves if they lie side by side."""
        segment = segments[0]
        found = _side_by_side(segments, segment.own_values_column, segment.own_value())
        if found is None:
            return cls.new([(segment, segment.dtype) for segment in segments])
        return cls(found, [found.view(segment.dtype)], True)

    @classmethod
    def of_parts(cls, segments: Sequence[BucketSegment], parts: Arrays) -> PackedBuffer | None:
        """Return the memory of a worker's plain parts if the pieces lie side by side; None otherwise."""
        segment = segments[0]
        column = parts.own_column(segment)
        found = None if column is None else _side_by_side(segments, column, parts.first(segment.key(segment.own.start)))
        return None if found is None else cls(found, [found.view(segment.dtype)])

    def pack(self, segments: Sequence[BucketSegment]) -> None:
        """Copy values into the buffer."""
        for segment, flat in () if self.is_value else zip(segments, self.flats, strict=True):
            if native.can_sum(segment.dtype):
                counts, values = segment.own_counts, segment.own_values_column
                _sum_columns(native.column_beside(flat, counts), [values], counts, segment.dtype)
            else:
                torch._foreach_copy_(_split(segment, flat), segment.own_values())

    def unpack(self, segments: Sequence[BucketSegment]) -> None:
        """Copy the buffer into values."""
        for segment, flat in () if self.is_value else zip(segments, self.flats, strict=True):
            if native.can_sum(segment.dtype):
                counts, values = segment.own_counts, segment.own_values_column
                _sum_columns(values, [native.column_beside(flat, counts)], counts, segment.dtype)
            else:
                torch._foreach_copy_(segment.own_values(), _split(segment, flat))


def _sum_columns(out: bytes, parts: list[bytes], counts: list[int], dtype: torch.dtype) -> None:
    """Write the sums of columns of parts where a column says."""
    native.Pass([out], parts, counts, dtype).jobs(1, past_cache=0)[0]()


def _side_by_side(segments: Sequence[BucketSegment], column: bytes, first: torch.Tensor) -> torch.Tensor | None:
    """Return the bytes of a segment's own pieces if they lie in one piece of memory, padded as a buffer is.

    Args:
        segments: only one of them can.
        column: the addresses of these pieces.
        first: a tensor in whose storage the first piece lies.
    """
    segment = segments[0]
    addresses = np.frombuffer(column, np.uint64)
    nbytes = np.array(segment.own_counts, np.uint64) * np.uint64(segment.dtype.itemsize)
    total = int(nbytes.sum())
    if len(segments) > 1 or total != aligned(total) or (addresses[1:] != addresses[:-1] + nbytes[:-1]).any():
        return None
    storage = first.untyped_storage()
    offset = int(addresses[0]) - storage.data_ptr()
    if offset < 0 or offset + total > storage.nbytes() or offset % segment.dtype.itemsize:
        return None
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, offset, (total,), (1,))


def _split(segment: BucketSegment, flat: torch.Tensor) -> list[torch.Tensor]:
    """Return a segment's own pieces in its part of a buffer."""
    return list(torch.split(flat, segment.own_counts))
