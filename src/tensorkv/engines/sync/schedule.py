"""Schedule: how one list of keys travels, in buckets that fit into a slot of a staging buffer.

A schedule is made once for a list of keys and used at every call that names them: which pieces of which values lie in
which bucket, who updates them, and their addresses as columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.engines import partition
from tensorkv.engines.partition import Piece, Run
from tensorkv.shard import native, reduce
from tensorkv.shard.plan import Column, Form
from tensorkv.transport.segment import LINE, aligned

from .host import HostGroup

# What a worker stages at a time: small enough to be in the shared cache when the others read it; over hosts, long
# enough for a message.
SLOT_NBYTES = 1 << 20
SLOT_NBYTES_OVER_HOSTS = 16 << 20
# Slots of the staging buffer that calls share: one is filled while others are summed and copied out.
RING = 4
# Pushes of at most so many bytes share a staging buffer, too: each takes the next slot of it.
SMALL_NBYTES = 64 << 10

Tensors = Sequence[torch.Tensor]


@dataclass(slots=True)
class PartitionedValue:
    """What every worker knows of a dense key.

    Args:
        value: the whole of it, in memory that the workers of the host share.
        borders: the rows where each owner's part begins, and the number of rows.
    """

    value: torch.Tensor
    borders: list[int]

    @property
    def flat(self) -> torch.Tensor:
        """The value, element by element."""
        return self.value.view(-1)

    def span(self, owner: int) -> tuple[int, int]:
        """Return which elements an owner updates."""
        rows = self.borders[-1]
        width = self.value.numel() // rows if rows else 0
        return self.borders[owner] * width, self.borders[owner + 1] * width

    def part(self, owner: int) -> torch.Tensor:
        """Return an owner's part as a value of its own, with the rows that it updates."""
        start, stop = self.borders[owner], self.borders[owner + 1]
        if not self.value.ndim:
            return self.value if stop > start else self.flat[:0]
        return self.value[start:stop]


class StagingBuffer:
    """Shared memory in which the workers of a host put their parts for each other, slot by slot.

    A slot has three words of each worker: it has filled the slot, it has read it, and the values that were made of it
    can be copied out. They count how often the slot was used.

    Args:
        host: whose workers share it.
        slots: how many.
        slot_nbytes: of one worker's parts in a slot.
    """

    def __init__(self, host: HostGroup, slots: int, slot_nbytes: int) -> None:
        size = host.size
        self._row = aligned(slot_nbytes)
        words = slots * 3 * size
        self._data = words * LINE
        self.segment = host.allocate(self._data + slots * size * self._row, words)
        self.slots = slots
        self._uses = [0] * slots
        self._size = size
        self.filled, self.read, self.ready = (
            [self._column(slot, which) for slot in range(slots)] for which in range(3)
        )
        # Of each slot, the addresses of this worker's own words.
        self.own_filled, self.own_read, self.own_ready = (
            [self._word(slot, which, host.local_rank) for slot in range(slots)] for which in range(3)
        )

    def _word(self, slot: int, which: int, worker: int) -> int:
        return self.segment.address + LINE * ((slot * 3 + which) * self._size + worker)

    def _column(self, slot: int, which: int) -> bytes:
        return array("Q", [self._word(slot, which, worker) for worker in range(self._size)]).tobytes()

    def use(self, slot: int) -> int:
        """Use a slot once more; return what its words count after this use."""
        self._uses[slot] += 1
        return self._uses[slot]

    def bases(self, slot: int) -> np.ndarray[Any, Any]:
        """Return where the parts of each worker begin in a slot."""
        rows = np.arange(slot * self._size, (slot + 1) * self._size, dtype=np.uint64)
        found: np.ndarray[Any, Any] = rows * np.uint64(self._row) + np.uint64(self.segment.address + self._data)
        return found

    def tensor(self, slot: int, worker: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what a worker puts at an offset of a slot."""
        at = self._data + (slot * self._size + worker) * self._row + offset
        return self.segment.tensor(at, (count,), dtype)


@dataclass(slots=True)
class BucketSegment:
    """The pieces of one bucket that have one dtype, in the order of their owners.

    Args:
        dtype: of the values.
        pieces: as ``partition.cut`` made them.
        own: which of them this worker updates.
        staging: the buffer for parts.
        slot: of the buffer.
        values: the piece of each value.
    """

    dtype: torch.dtype
    pieces: list[Piece]
    own: slice
    staging: StagingBuffer
    slot: int
    values: list[torch.Tensor]
    sum_dtype: torch.dtype = field(init=False)
    counts: list[int] = field(init=False)
    keys: np.ndarray[Any, Any] = field(init=False)
    starts: np.ndarray[Any, Any] = field(init=False)
    staged_columns: list[bytes] = field(init=False)
    value_column: bytes = field(init=False)
    _staged: dict[int, list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.sum_dtype = interop.accumulator(self.dtype)
        self.counts = [piece.stop - piece.start for piece in self.pieces]
        self.keys = np.array([piece.key for piece in self.pieces], np.int64)
        self.starts = np.array([piece.start * self.dtype.itemsize for piece in self.pieces], np.uint64)
        self.value_column = native.column_of(self.values)
        self._find_staged()

    def _find_staged(self) -> None:
        offsets = np.array([piece.offset for piece in self.pieces], np.uint64)
        self.staged_columns = [(base + offsets).tobytes() for base in self.staging.bases(self.slot)]
        self._staged = {}

    def at(self, slot: int) -> BucketSegment:
        """Return the same pieces in another slot."""
        segment = copy(self)
        segment.slot = slot
        segment._find_staged()
        return segment

    def staged(self, worker: int) -> list[torch.Tensor]:
        """Return a worker's part of each piece in the staging buffer."""
        if worker not in self._staged:
            self._staged[worker] = [
                self.staging.tensor(self.slot, worker, piece.offset, count, self.sum_dtype)
                for piece, count in zip(self.pieces, self.counts, strict=True)
            ]
        return self._staged[worker]

    def column(self, bases: np.ndarray[Any, Any]) -> bytes:
        """Return where the pieces begin in whole arrays, one of each key."""
        column: bytes = (bases[self.keys] + self.starts).tobytes()
        return column

    def columns(self, arrays: Arrays) -> list[bytes]:
        """Return where the pieces begin in a call's arrays, which are plain."""
        return [self.column(base) for base in arrays.bases or ()]

    def own_columns(self, columns: Sequence[bytes]) -> list[bytes]:
        """Return of columns what belongs to this worker's pieces."""
        return [_cut(column, self.own) for column in columns]

    def sum(self, outs: list[bytes], parts: list[bytes], cut: slice, past_cache: int = 0) -> None:
        """Sum columns of some pieces in one pass; so many of the last outs are stored past the processor's cache."""
        counts = self.counts[cut]
        if counts and outs:
            native.Pass(outs, parts, counts, self.dtype).jobs(1, past_cache=past_cache)[0]()

    @property
    def others(self) -> list[slice]:
        """The pieces that other workers update."""
        return [slice(0, self.own.start), slice(self.own.stop, len(self.pieces))]

    @property
    def whole(self) -> list[slice]:
        """All pieces."""
        return [slice(0, len(self.pieces))]

    def pack(self, worker: int, parts: Arrays, cuts: Sequence[slice]) -> None:
        """Put the sum of this worker's own parts into the staging buffer; of plain parts, only these pieces."""
        if parts.bases is None:
            for target, piece in zip(self.staged(worker), self.pieces, strict=True):
                reduce.sum_piece(target, [part[piece.start : piece.stop] for part in parts.flat[piece.key]])
            return
        staged, columns = self.staged_columns[worker], self.columns(parts)
        for cut in cuts:
            self.sum([_cut(staged, cut)], [_cut(column, cut) for column in columns], cut)

    def copy_out(self, outs: Arrays, past_cache: bool) -> None:
        """Copy the values of all pieces into the outs, which are all plain."""
        columns = self.columns(outs)
        self.sum(columns, [self.value_column], slice(0, len(self.pieces)), len(columns) if past_cache else 0)


@dataclass(slots=True)
class Bucket:
    """One use of a slot of a staging buffer.

    Args:
        segments: by dtype.
        own: those of them that have pieces which this worker updates.
        slot: of the buffer.
        use: what the words of the slot count after this use.
    """

    segments: list[BucketSegment]
    own: list[BucketSegment]
    slot: int
    use: int


class Schedule:
    """A list of keys, cut into buckets.

    Args:
        values: of these keys.
        local_rank: of this worker.
        owners: how many workers of the host update values.
        slot_nbytes: the most bytes of one bucket.
    """

    def __init__(self, values: Sequence[PartitionedValue], local_rank: int, owners: int, slot_nbytes: int) -> None:
        self.values = values
        self._local_rank = local_rank
        sum_dtypes = [interop.accumulator(each.value.dtype) for each in values]
        runs = [
            [
                Run(key, *each.span(owner), sum_dtypes[key].itemsize)
                for key, each in enumerate(values)
                if each.borders[owner] < each.borders[owner + 1] and each.value.numel()
            ]
            for owner in range(owners)
        ]
        self._buckets = partition.cut(runs, slot_nbytes)
        ends = [p.offset + (p.stop - p.start) * sum_dtypes[p.key].itemsize for pieces in self._buckets for p in pieces]
        self.slot_nbytes = max(ends, default=0)
        dtypes = {each.value.dtype for each in values}
        # For calls that name these keys again; None where they have no form in common.
        self.form = Form([each.value.shape for each in values], dtypes.pop()) if len(dtypes) == 1 else None
        if self.form is not None and not native.can_sum(self.form.dtype):
            self.form = None
        self.texts: dict[str, str] = {}
        self._segments: dict[StagingBuffer, list[list[BucketSegment]]] = {}
        self.own_staging: StagingBuffer | None = None

    @property
    def num_slots(self) -> int:
        """How many slots a staging buffer needs to hold all buckets."""
        return max(1, len(self._buckets))

    @property
    def staging_nbytes(self) -> int:
        """The bytes of one worker's parts in a staging buffer with a slot for each bucket."""
        return len(self._buckets) * aligned(self.slot_nbytes)

    @property
    def is_small(self) -> bool:
        """Whether the parts fit into a slot for small pushes."""
        return len(self._buckets) <= 1 and self.slot_nbytes <= SMALL_NBYTES

    def buckets(self, staging: StagingBuffer, first: int = 0) -> list[Bucket]:
        """Return the buckets for one use of a staging buffer.

        Args:
            staging: the buffer.
            first: the slot of the first bucket; the others take the next ones in turn.
        """
        known = self._segments.get(staging)
        if known is None:
            known = self._segments[staging] = [
                self._make_segments(pieces, staging, index % staging.slots)
                for index, pieces in enumerate(self._buckets)
            ]
        found = []
        for index, segments in enumerate(known):
            slot = (first + index) % staging.slots
            moved = [segment.at(slot) for segment in segments] if first else segments
            own = [segment for segment in moved if segment.own.stop > segment.own.start]
            found.append(Bucket(moved, own, slot, staging.use(slot)))
        return found

    def fill(self, targets: Sequence[Column]) -> None:
        """Copy whole values to arrays that have the schedule's form."""
        if self.form is not None and targets:
            values = native.column_of([each.value for each in self.values])
            sums = native.Pass([each.addresses for each in targets], [values], self.form.counts, self.form.dtype)
            sums.jobs(1)[0]()

    def _make_segments(self, bucket: Sequence[Piece], staging: StagingBuffer, slot: int) -> list[BucketSegment]:
        by_dtype: dict[torch.dtype, list[Piece]] = {}
        for piece in bucket:
            by_dtype.setdefault(self.values[piece.key].value.dtype, []).append(piece)
        segments = []
        for dtype, pieces in by_dtype.items():
            mine = [index for index, piece in enumerate(pieces) if piece.owner == self._local_rank]
            own = slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)
            values = [self.values[p.key].flat[p.start : p.stop] for p in pieces]
            segments.append(BucketSegment(dtype, pieces, own, staging, slot, values))
        return segments


class Arrays:
    """One call's parts or outs: as whole arrays, and as columns of addresses where all are plain.

    Args:
        groups: per key, its arrays.
        bases: per part or out, the address of each key's array; None where an array is not plain.
        columns: the arrays instead of ``groups``, where they have been checked by the column.
    """

    def __init__(
        self,
        groups: Sequence[Tensors],
        bases: list[np.ndarray[Any, Any]] | None,
        columns: Sequence[Column] = (),
    ) -> None:
        self.groups, self.bases, self._columns = groups, bases, columns

    def first(self, key: int) -> torch.Tensor:
        """Return the first array of a key."""
        return interop.take(self._columns[0].arrays[key]) if self._columns else self.groups[key][0]

    @cached_property
    def flat(self) -> list[list[torch.Tensor]]:
        """The arrays with their elements in order: copied once, and not for each piece."""
        return [[array.reshape(-1) for array in group] for group in self.groups]

    @classmethod
    def of_columns(cls, columns: Sequence[Column]) -> Arrays:
        """Return plain arrays that have been checked by the column."""
        return cls((), [np.frombuffer(column.addresses, np.uint64) for column in columns], columns)

    @classmethod
    def of(cls, groups: Sequence[Tensors], dtypes: Sequence[torch.dtype]) -> Arrays:
        """Check arrays one by one.

        Args:
            groups: per key, its arrays.
            dtypes: per key, the dtype of a plain array.
        """
        counts = set(map(len, groups))
        plain = (
            len(counts) == 1
            and max(counts) <= native.MOST_COLUMNS
            and all(
                native.can_sum(dtype) and array.dtype is dtype and array.is_cpu and array.is_contiguous()
                for group, dtype in zip(groups, dtypes, strict=True)
                for array in group
            )
        )
        if not plain:
            return cls(groups, None)
        count = counts.pop()
        bases = [np.array([group[index].data_ptr() for group in groups], np.uint64) for index in range(count)]
        return cls(groups, bases)


def _cut(column: bytes, cut: slice) -> bytes:
    return column[8 * cut.start : 8 * cut.stop]
