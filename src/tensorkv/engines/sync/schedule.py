"""Schedule: how one list of keys travels, in buckets that fit into a slot of a staging buffer.

A schedule is made once for a list of keys and used at every call that names them: which pieces of which values lie in
which bucket, who updates them, and their addresses as columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines import partition
from tensorkv.engines.partition import Numbers, Pieces, Runs
from tensorkv.engines.transport.segment import LINE, aligned
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Entry
from tensorkv.shard.rules import Rule

from .host import HostGroup, Signature, number_of

# What a worker stages at a time: small enough to be in the shared cache when the others read it; over hosts, long
# enough for a message.
SLOT_NBYTES = 1 << 20
SLOT_NBYTES_OVER_HOSTS = 16 << 20
# Slots of the staging buffer that calls share: one is filled while others are summed and copied out.
RING = 4
# Pushes of at most so many bytes share a staging buffer, too: each takes the next slot of it.
SMALL_NBYTES = 64 << 10

Tensors = Sequence[torch.Tensor]


class PartitionedEntry(Entry):
    """What a worker holds of a dense key: the rows that it updates, and the whole that the workers of the host share.

    Args:
        key, spec: of the key.
        whole: the whole value, in memory that the workers of the host share.
        borders: the rows where each owner's part begins, and the number of rows.
        owner: of the rows that are this worker's value.
    """

    __slots__ = ()

    def __init__(self, key: Key, spec: KeySpec, whole: torch.Tensor, borders: list[int], owner: int) -> None:
        self.whole = whole
        self.digest = number_of(key)
        super().__init__(key, spec, self.divide(borders, owner))

    @property
    def flat(self) -> torch.Tensor:
        """The whole value, element by element."""
        flat: torch.Tensor = self.whole.view(-1)
        return flat

    def divide(self, borders: list[int], owner: int) -> torch.Tensor:
        """Divide the whole between owners, and return an owner's part as a value of its own."""
        self.borders = borders
        start, stop = borders[owner], borders[owner + 1]
        whole: torch.Tensor = self.whole
        if not whole.ndim:
            return whole if stop > start else self.flat[:0]
        return whole[start:stop]


class StagingBuffer:
    """Shared memory in which the workers of a host put their parts for each other, slot by slot.

    A slot has three words of each worker: it has filled the slot, it has read it, and the values that were made of it
    can be copied out. They count how often the slot was used.

    Args:
        host: whose workers share it.
        slots: how many.
        slot_nbytes: of one worker's parts in a slot.
        counts: whether there is room, beside the parts, for the number of parts that each piece is the sum of.
    """

    def __init__(self, host: HostGroup, slots: int, slot_nbytes: int, *, counts: bool) -> None:
        size = host.size
        # A piece begins a line, and so there are at most as many.
        self._room = aligned(slot_nbytes) // LINE if counts else 0
        self._counts_at = aligned(slot_nbytes)
        self._row = self._counts_at + aligned(8 * self._room)
        words = slots * 3 * size
        self._data = words * LINE
        self.segment = host.allocate(self._data + slots * size * self._row, words)
        self.slots = slots
        self.nbytes = slots * self._counts_at
        """The bytes of one worker's parts in all slots."""
        self._uses = array("Q", [0] * slots)
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

    def places(self) -> tuple[int, int, int, int, int, int]:
        """Return how many slots there are, and where what is in them, as ``native.SharedReduce`` takes it."""
        address = self.segment.address
        return self.slots, self._row, self._counts_at, address, address + self._data, self._uses.buffer_info()[0]

    def bases(self, slot: int) -> np.ndarray[Any, Any]:
        """Return where the parts of each worker begin in a slot."""
        rows = np.arange(slot * self._size, (slot + 1) * self._size, dtype=np.uint64)
        found: np.ndarray[Any, Any] = rows * np.uint64(self._row) + np.uint64(self.segment.address + self._data)
        return found

    def tensor(self, slot: int, worker: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what a worker puts at an offset of a slot."""
        at = self._data + (slot * self._size + worker) * self._row + offset
        return self.segment.tensor(at, (count,), dtype)

    def counts(self, slot: int, worker: int) -> Numbers:
        """Return how many parts the piece that begins on each line of a slot is the sum of, as a worker has put it."""
        found: Numbers = self.tensor(slot, worker, self._counts_at, self._room, torch.int64).numpy()
        return found


class Layout:
    """Where the values of a list of keys are, and what each worker updates of them.

    Args:
        keys: of one call.
        values: of these keys.
        local_rank: of this worker.
        owners: how many workers of the host update values.
    """

    def __init__(self, keys: tuple[Key, ...], values: Sequence[PartitionedEntry], local_rank: int, owners: int) -> None:
        self.keys, self.values, self.local_rank, self.owners = keys, values, local_rank, owners
        tensors: list[torch.Tensor] = [each.whole for each in values]
        self.addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
        dtypes = [tensor.dtype for tensor in tensors]
        self.dtypes = list(dict.fromkeys(dtypes))
        self.dtype_of = np.array([self.dtypes.index(dtype) for dtype in dtypes], np.int64)
        self.itemsizes = np.array([interop.accumulator(dtype).itemsize for dtype in self.dtypes], np.int64)[
            self.dtype_of
        ]
        borders = np.array([each.borders for each in values], np.int64).reshape(len(keys), owners + 2)
        numels = np.array([tensor.numel() for tensor in tensors], np.int64)
        widths = numels // np.maximum(borders[:, -1], 1)
        spans = borders * widths[:, None]
        counts = np.diff(spans)[:, :owners].T
        owner, key = np.nonzero(counts)
        self.runs = Runs(owner, key, spans[key, owner], counts[owner, key], self.itemsizes[key])
        self.own_starts: Numbers = spans[:, min(local_rank, owners)]
        """Where this worker's part of each value begins."""

    @cached_property
    def own(self) -> Numbers:
        """Places of the keys of which this worker updates pieces that the compiled part can take."""
        can_take = np.array([dtype in native.DTYPES for dtype in self.dtypes], bool)
        own = self.runs.key[self.runs.owner == self.local_rank]
        plain: Numbers = own[can_take[self.dtype_of[own]]]
        return plain

    @cached_property
    def own_keys(self) -> list[Key]:
        """The keys that ``own`` means."""
        return [self.keys[place] for place in self.own]

    @cached_property
    def other_keys(self) -> list[Key]:
        """All other keys."""
        return [self.keys[place] for place in np.flatnonzero(self.own_places < 0)]

    @cached_property
    def own_places(self) -> Numbers:
        """For each key its place in ``own``, or -1."""
        places = np.full(len(self.keys), -1)
        places[self.own] = np.arange(len(self.own))
        return places


class BucketSegment:
    """The pieces of one bucket that have one dtype, in the order of their owners.

    Args:
        layout: of the keys.
        dtype: of the values.
        pieces: as ``partition.cut`` made them.
        staging: the buffer for parts.
        slot: of the buffer.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, pieces: Pieces, staging: StagingBuffer, slot: int) -> None:
        self._layout, self.dtype, self.pieces = layout, dtype, pieces
        self.sum_dtype = interop.accumulator(dtype)
        worker = layout.local_rank
        self.own = slice(*map(int, np.searchsorted(pieces.owner, [worker, worker + 1])))
        """Those that this worker updates."""
        starts = pieces.start.astype(np.uint64) * np.uint64(dtype.itemsize)
        self.value_column: bytes = (layout.addresses[pieces.key] + starts).tobytes()
        self.triples = _triples(pieces.key, pieces)
        """The pieces as the compiled part takes them: the place of the key, the first element, how many."""
        own = pieces.take(self.own)
        self.own_starts = own.start - layout.own_starts[own.key]
        """Where this worker's pieces begin in its own part of their values."""
        self.own_triples = _triples(layout.own_places[own.key], own)
        """This worker's pieces, by place among its own keys."""
        self.own_pieces: bytes = _cut(self.triples, self.own, 24)
        """This worker's pieces, in whole values."""
        self.own_values_column: bytes = _cut(self.value_column, self.own)
        cuts = [slice(0, self.own.start), self.own, slice(self.own.stop, len(pieces.key))]
        self._cuts = [(cut, _cut(self.triples, cut, 24)) for cut in cuts if cut.start < cut.stop]
        self._find_staged(staging, slot)

    def _find_staged(self, staging: StagingBuffer, slot: int) -> None:
        self._staging, self._slot = staging, slot
        offsets = self.pieces.offset.astype(np.uint64)
        columns: list[bytes] = [(base + offsets).tobytes() for base in staging.bases(slot)]
        self.own_staged = [_cut(column, self.own) for column in columns]
        """Of each worker, where its parts of this worker's pieces are."""
        column = columns[self._layout.local_rank]
        staged = [Staged(cut, triples, _cut(column, cut)) for cut, triples in self._cuts]
        self.staged_own = [each for each in staged if each.cut == self.own]
        """Where this worker puts its parts of its own pieces, and of those that others update."""
        self.staged_others = [each for each in staged if each.cut != self.own]
        self._staged: dict[tuple[int, int], torch.Tensor] = {}

    def at(self, slot: int) -> BucketSegment:
        """Return the same pieces in another slot."""
        segment = copy(self)
        segment._find_staged(self._staging, slot)
        return segment

    @property
    def own_counts(self) -> list[int]:
        """How many elements each of this worker's pieces has."""
        counts: list[int] = self.pieces.count[self.own].tolist()
        return counts

    def key(self, at: int) -> int:
        """Return the place of a piece's key in the call."""
        return int(self.pieces.key[at])

    def piece(self, at: int, flat: torch.Tensor) -> torch.Tensor:
        """Return a piece of an array of its key."""
        start = int(self.pieces.start[at])
        return flat[start : start + int(self.pieces.count[at])]

    def own_value(self) -> torch.Tensor:
        """Return the value of which this worker's first piece is one."""
        value: torch.Tensor = self._layout.values[self.key(self.own.start)].whole
        return value

    def own_values(self) -> list[torch.Tensor]:
        """Return this worker's pieces of the values."""
        values = self._layout.values
        return [self.piece(at, values[self.key(at)].flat) for at in range(self.own.start, self.own.stop)]

    def staged(self, worker: int, at: int) -> torch.Tensor:
        """Return a worker's part of a piece in the staging buffer."""
        if (worker, at) not in self._staged:
            offset, count = int(self.pieces.offset[at]), int(self.pieces.count[at])
            self._staged[worker, at] = self._staging.tensor(self._slot, worker, offset, count, self.sum_dtype)
        return self._staged[worker, at]

    def pack(self, parts: Arrays, staged: Sequence[Staged]) -> None:
        """Put the sums of this worker's own parts into the staging buffer, for some of the pieces."""
        worker = self._layout.local_rank
        for each in staged:
            if parts.batch is not None and parts.places is None:
                parts.batch.sum_pieces(each.triples, [each.column], True)
                continue
            rest = np.arange(each.cut.start, each.cut.stop)
            if parts.batch is not None and parts.places is not None:
                places = parts.places[self.pieces.key[each.cut]]
                plain, rest = rest[places >= 0], rest[places < 0]
                triples = _triples(places[places >= 0], self.pieces.take(plain))
                column = np.frombuffer(each.column, np.uint64)[plain - each.cut.start]
                parts.batch.sum_pieces(triples, [column.tobytes()], True)
            for at in rest.tolist():
                flats = parts.flat(self.key(at))
                with torch.no_grad():
                    reduce.sum_piece(self.staged(worker, at), [self.piece(at, flat) for flat in flats])


class Staged(NamedTuple):
    """Pieces that a worker puts into the staging buffer.

    Args:
        cut: which of a segment's.
        triples: the pieces as the compiled part takes them.
        column: where they go.
    """

    cut: slice
    triples: bytes
    column: bytes


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
        layout: of the keys.
        slot_nbytes: the most bytes of one bucket.
    """

    def __init__(self, layout: Layout, slot_nbytes: int) -> None:
        self.layout = layout
        self._buckets = partition.cut(layout.runs, layout.owners, slot_nbytes)
        ends = [(each.offset + each.count * layout.itemsizes[each.key]).max() for each in self._buckets]
        self.slot_nbytes = int(max(ends, default=0))
        self.signatures: dict[str, Signature] = {}
        """By verb, what other workers compare of calls that name these keys."""
        self.rule: Rule | None = None
        """The last rule that the keys were checked for."""
        self.sees_whole = False
        """Whether that rule changes a value only when its whole sum has come."""
        self._segments: dict[StagingBuffer, list[list[BucketSegment]]] = {}

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

    def _make_segments(self, bucket: Pieces, staging: StagingBuffer, slot: int) -> list[BucketSegment]:
        dtype_of = self.layout.dtype_of[bucket.key]
        return [
            BucketSegment(self.layout, dtype, bucket.take(dtype_of == index), staging, slot)
            for index, dtype in enumerate(self.layout.dtypes)
            if (dtype_of == index).any()
        ]


class Arrays:
    """One call's parts or outs.

    Args:
        groups: per key, its arrays, or the only one.
        batch: the compiled part's, of the keys whose arrays are plain.
        places: of each key in the batch, -1 for one whose arrays are not plain; None: all are, in order.
    """

    def __init__(
        self, groups: Sequence[Any], batch: native.Batch | None, places: np.ndarray[Any, Any] | None = None
    ) -> None:
        self._groups, self.batch, self.places = groups, batch, places
        self._flat: dict[int, list[torch.Tensor]] = {}

    def first(self, key: int) -> torch.Tensor:
        """Return the first array of a key."""
        group = self._groups[key]
        return interop.take(group[0] if isinstance(group, list | tuple) else group)

    def flat(self, key: int) -> list[torch.Tensor]:
        """Return the arrays of a key with their elements in order: copied once, and not for each piece."""
        if key not in self._flat:
            self._flat[key] = [array.reshape(-1) for array in self._groups[key]]
        return self._flat[key]

    @cached_property
    def counts(self) -> Numbers:
        """How many arrays each key has."""
        if self.batch is not None and self.places is None:
            return np.frombuffer(self.batch.part_counts, np.int64)
        return np.array([len(group) for group in self._groups], np.int64)

    def own_column(self, segment: BucketSegment) -> bytes | None:
        """Return where this worker's pieces are in the arrays; None where they are not to be read there."""
        if self.batch is None or self.places is not None or segment.sum_dtype is not segment.dtype:
            return None
        return self.batch.part_column(segment.own_pieces)

    @classmethod
    def of(cls, values: dict[Key, PartitionedEntry], keys: Sequence[Key], groups: Sequence[Tensors]) -> Arrays:
        """Return the parts of a call, those that are plain as a batch."""
        if not native.can_look():
            return cls(groups, None)
        batch = native.look(values, keys, groups, None, None, None)
        if batch is not None:
            return cls(groups, batch)
        pairs = enumerate(zip(keys, groups, strict=True))
        plain = [index for index, (key, group) in pairs if native.is_plain([values[key].whole, *group])]
        batch = native.look(values, [keys[i] for i in plain], [groups[i] for i in plain], None, None, None)
        if batch is None:
            return cls(groups, None)
        places = np.full(len(keys), -1)
        places[plain] = np.arange(len(plain))
        return cls(groups, batch, places)


def _triples(keys: Numbers, pieces: Pieces) -> bytes:
    """Return pieces as the compiled part takes them: for each the place of its key, its first element, how many."""
    return np.stack([keys, pieces.start, pieces.count], 1).tobytes()


def _cut(column: bytes, cut: slice, width: int = 8) -> bytes:
    return column[width * cut.start : width * cut.stop]
