"""Schedule: how one list of keys travels. Which pieces lie in which chunk and slot, who updates them, as columns.

A route is made once for a list of keys and used at every call that names them.
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

# What a worker lays out at a time: small enough to be in the shared cache when the others read it; over hosts,
# long enough for a message.
SLOT_NBYTES = 1 << 20
SLOT_NBYTES_OVER_HOSTS = 16 << 20
# Slots of the stage that calls share: one is filled while others are summed and copied out.
RING = 4
# Small pushes that go on while their caller does share a stage, too: each takes the next slot of it.
SMALL_NBYTES = 64 << 10

Tensors = Sequence[torch.Tensor]


@dataclass(slots=True)
class PartitionedValue:
    """What every worker knows of a dense key: the whole value, and whose rows are whose."""

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
    """Memory in which the workers of a host lay out their parts for each other, slot by slot.

    A slot has three words of each worker: it has filled the slot, it has read it, and the values that were
    made of it can be copied out. They count how often the slot was used.
    """

    def __init__(self, host: HostGroup, slots: int, slot_nbytes: int, doing: str) -> None:
        size = host.size
        self._row = aligned(slot_nbytes)
        words = slots * 3 * size
        self._data = words * LINE
        self.segment = host.share(self._data + slots * size * self._row, words, doing)
        self.slots = slots
        self.uses = [0] * slots
        # The slot that the next small push takes, and the last one that took each.
        self.turn = 0
        self.users: list[Any] = [None] * slots
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

    def bases(self, slot: int) -> np.ndarray[Any, Any]:
        """Return where the parts of each worker begin in a slot."""
        rows = np.arange(slot * self._size, (slot + 1) * self._size, dtype=np.uint64)
        found: np.ndarray[Any, Any] = rows * np.uint64(self._row) + np.uint64(self.segment.address + self._data)
        return found

    def tensor(self, slot: int, worker: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what a worker lays out at an offset of a slot."""
        at = self._data + (slot * self._size + worker) * self._row + offset
        return self.segment.tensor(at, (count,), dtype)


@dataclass(slots=True)
class BucketSegment:
    """The pieces of one chunk that have one dtype, in the order of their owners.

    Args:
        dtype: of the values.
        pieces: as ``placement.cut`` made them.
        own: which of them this worker updates.
        stage: where parts are laid out.
        slot: of the stage.
        values: the piece of each value.
    """

    dtype: torch.dtype
    pieces: list[Piece]
    own: slice
    stage: StagingBuffer
    slot: int
    values: list[torch.Tensor]
    wide: torch.dtype = field(init=False)
    counts: list[int] = field(init=False)
    keys: np.ndarray[Any, Any] = field(init=False)
    starts: np.ndarray[Any, Any] = field(init=False)
    room_columns: list[bytes] = field(init=False)
    value_column: bytes = field(init=False)
    _rooms: dict[int, list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.wide = interop.accumulator(self.dtype)
        self.counts = [piece.stop - piece.start for piece in self.pieces]
        self.keys = np.array([piece.key for piece in self.pieces], np.int64)
        self.starts = np.array([piece.start * self.dtype.itemsize for piece in self.pieces], np.uint64)
        self.value_column = native.column_of(self.values)
        self._find_rooms()

    def _find_rooms(self) -> None:
        offsets = np.array([piece.offset for piece in self.pieces], np.uint64)
        self.room_columns = [(base + offsets).tobytes() for base in self.stage.bases(self.slot)]
        self._rooms = {}

    def at(self, slot: int) -> BucketSegment:
        """Return the same pieces in another slot."""
        leg = copy(self)
        leg.slot = slot
        leg._find_rooms()
        return leg

    def rooms(self, worker: int) -> list[torch.Tensor]:
        """Return where each piece of a worker's parts lies in the stage."""
        if worker not in self._rooms:
            self._rooms[worker] = [
                self.stage.tensor(self.slot, worker, piece.offset, count, self.wide)
                for piece, count in zip(self.pieces, self.counts, strict=True)
            ]
        return self._rooms[worker]

    def column(self, bases: np.ndarray[Any, Any]) -> bytes:
        """Return where the pieces begin in whole arrays, one of each key."""
        column: bytes = (bases[self.keys] + self.starts).tobytes()
        return column

    @property
    def others(self) -> list[slice]:
        """The pieces that other workers update."""
        return [slice(0, self.own.start), slice(self.own.stop, len(self.pieces))]

    @property
    def whole(self) -> list[slice]:
        """All pieces."""
        return [slice(0, len(self.pieces))]

    def own_columns(self, columns: Sequence[bytes]) -> list[bytes]:
        """Return of columns what belongs to this worker's pieces."""
        return [_cut(column, self.own) for column in columns]

    def sums(self, outs: list[bytes], parts: list[bytes], cut: slice, past_cache: int = 0) -> None:
        """Sum columns of some pieces in one pass; so many of the last outs are stored past the processor's cache."""
        counts = self.counts[cut]
        if counts and outs:
            native.Sums(outs, parts, counts, self.dtype).jobs(1, past_cache=past_cache)[0]()


class Schedule:
    """A list of keys, cut into chunks.

    Args:
        keys: of the call.
        held: of these keys.
        host: of this worker's host.
        owners: how many of its workers update values.
        slot_nbytes: what one chunk may take.
    """

    def __init__(self, held: Sequence[PartitionedValue], host: HostGroup, owners: int, slot_nbytes: int) -> None:
        self.held = held
        self._host = host
        self._wide = [interop.accumulator(each.value.dtype) for each in held]
        runs = [
            [
                Run(key, *each.span(owner), self._wide[key].itemsize)
                for key, each in enumerate(held)
                if each.borders[owner] < each.borders[owner + 1] and each.value.numel()
            ]
            for owner in range(owners)
        ]
        self.chunks = partition.cut(runs, slot_nbytes)
        ends = [p.offset + (p.stop - p.start) * self._wide[p.key].itemsize for chunk in self.chunks for p in chunk]
        self.slot_nbytes = max(ends, default=0)
        dtypes = {each.value.dtype for each in held}
        # For calls that name these keys again; None where they have no form in common.
        self.form = Form([each.value.shape for each in held], dtypes.pop()) if len(dtypes) == 1 else None
        if self.form is not None and not native.can_sum(self.form.dtype):
            self.form = None
        self.texts: dict[str, str] = {}
        self._legs: dict[StagingBuffer, list[list[BucketSegment]]] = {}
        self.own_stage: StagingBuffer | None = None

    @property
    def stage_nbytes(self) -> int:
        """What one worker's parts take in a stage with a slot for each chunk."""
        return len(self.chunks) * aligned(self.slot_nbytes)

    @property
    def is_small(self) -> bool:
        """Whether a slot for small pushes has room for the parts."""
        return len(self.chunks) <= 1 and self.slot_nbytes <= SMALL_NBYTES

    def legs(self, stage: StagingBuffer, first: int) -> list[list[BucketSegment]]:
        """Return the legs of each chunk on a stage; chunk c is in slot first + c modulo their number."""
        known = self._legs.get(stage)
        if known is None:
            known = self._legs[stage] = [
                self._legs_of(chunk, stage, number % stage.slots) for number, chunk in enumerate(self.chunks)
            ]
        if first:
            return [[leg.at((first + number) % stage.slots) for leg in legs] for number, legs in enumerate(known)]
        return known

    def fill(self, targets: Sequence[Column]) -> None:
        """Copy whole values to arrays that have the route's form."""
        if self.form is not None and targets:
            values = native.column_of([each.value for each in self.held])
            sums = native.Sums([each.addresses for each in targets], [values], self.form.counts, self.form.dtype)
            sums.jobs(1)[0]()

    def _legs_of(self, chunk: Sequence[Piece], stage: StagingBuffer, slot: int) -> list[BucketSegment]:
        by_dtype: dict[torch.dtype, list[Piece]] = {}
        for piece in chunk:
            by_dtype.setdefault(self.held[piece.key].value.dtype, []).append(piece)
        legs = []
        for dtype, pieces in by_dtype.items():
            mine = [index for index, piece in enumerate(pieces) if piece.owner == self._host.local_rank]
            own = slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)
            values = [self.held[p.key].flat[p.start : p.stop] for p in pieces]
            legs.append(BucketSegment(dtype, pieces, own, stage, slot, values))
        return legs


class Arrays:
    """One call's parts or outs: as whole arrays, and as columns of addresses where all are plain."""

    def __init__(self, groups: Sequence[Tensors], bases: list[np.ndarray[Any, Any]] | None) -> None:
        self.groups, self.bases = groups, bases

    @cached_property
    def flat(self) -> list[list[torch.Tensor]]:
        """The arrays with their elements in order: copied once, and not for each piece."""
        return [[array.reshape(-1) for array in group] for group in self.groups]

    @classmethod
    def of_columns(cls, columns: Sequence[Column]) -> Arrays:
        """Return plain arrays that have been looked at by the column."""
        return cls([], [np.frombuffer(column.addresses, np.uint64) for column in columns])

    @classmethod
    def of(cls, groups: Sequence[Tensors], dtypes: Sequence[torch.dtype]) -> Arrays:
        """Look at arrays one by one.

        Args:
            groups: per key, its arrays.
            dtypes: per key, what a plain array has.
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

    def columns(self, leg: BucketSegment) -> list[bytes]:
        """Return a leg's pieces of these arrays, which are plain."""
        return [leg.column(base) for base in self.bases or ()]


def pack(leg: BucketSegment, me: int, parts: Arrays, cuts: Sequence[slice]) -> None:
    """Put the sum of this worker's own parts into the stage; of plain parts, only these pieces."""
    if parts.bases is not None:
        rooms, columns = leg.room_columns[me], parts.columns(leg)
        for cut in cuts:
            leg.sums([_cut(rooms, cut)], [_cut(column, cut) for column in columns], cut)
        return
    for room, piece in zip(leg.rooms(me), leg.pieces, strict=True):
        own = [part[piece.start : piece.stop] for part in parts.flat[piece.key]]
        reduce.sum_piece(room, own)


def copy_out(leg: BucketSegment, outs: Arrays, past_cache: bool) -> None:
    """Copy the values of all pieces into the outs, which are all plain."""
    columns = outs.columns(leg)
    leg.sums(columns, [leg.value_column], slice(0, len(leg.pieces)), len(columns) if past_cache else 0)


def _cut(column: bytes, cut: slice) -> bytes:
    return column[8 * cut.start : 8 * cut.stop]
