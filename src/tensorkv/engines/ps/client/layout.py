"""How values lie over servers: the placement of each key, and the layout of the keys of a call, server by server."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.keytable import KeyTable
from tensorkv.arrays.packing import Slot, decode_layout, join_layout, place
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rowinit import RowInit
from tensorkv.arrays.spec import KeySpec, numbered
from tensorkv.engines.transport.shared_values import ValuesInPlace
from tensorkv.runtime.recent import Recent
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Entry
from tensorkv.shard.pool import Pool
from tensorkv.shard.table import Table
from tensorkv.storage import manifest

from ..messages import PULL_DTYPES, can_code, pulled_dtype

# Values of a server are read where they are if they have so many bytes, and so many on average.
_IN_PLACE_NBYTES = 1 << 20
_IN_PLACE_MEAN_NBYTES = 16 << 10
# Copies of more elements than this are divided between threads.
_PARALLEL_NUMEL = 1 << 18
_REMEMBERED_LAYOUTS = 256


class KeyPlacement:
    """Where a value lies; one object for all keys of the same spec whose rows are on the same servers.

    Args:
        spec: of the whole value.
        pieces: server, first row and row after the last of each piece; of a table, every server with all rows.
    """

    __slots__ = ("described", "loads", "pieces", "servers", "spec")

    def __init__(self, spec: KeySpec, pieces: Sequence[tuple[int, int, int]]) -> None:
        self.spec, self.pieces = spec, pieces
        self.servers = [server for server, _, _ in pieces]
        """The servers that hold a piece."""
        dense = () if spec.is_table else pieces
        self.loads = [(at, self.shape(start, stop).numel() * spec.dtype.itemsize) for at, start, stop in dense]
        """Each server that holds a piece, and the bytes of it."""
        self.described = native.describe(spec)
        """What a ``Cell`` says of the value; None if the compiled part has no such values."""

    def shape(self, start: int, stop: int) -> torch.Size:
        """Return the shape of some rows; a 0-d value has one row."""
        return torch.Size((stop - start, *self.spec.shape[1:])) if self.spec.shape else self.spec.shape

    def piece_of(self, server: int) -> tuple[int, int] | None:
        """Return the first row that a server holds and the row after its last; None: it holds none."""
        return next(((start, stop) for owner, start, stop in self.pieces if owner == server), None)

    def slice_of(self, server: int, value: torch.Tensor) -> torch.Tensor | None:
        """Return the rows of a dense value that a server holds, as a view; None: it holds none."""
        piece = self.piece_of(server)
        if piece is None:
            return None
        return value[piece[0] : piece[1]] if value.ndim else value

    def rows_of(self, server: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Select the row ids that a server holds; rows of a table are on the server ``id % num_servers``.

        Returns:
            The ids as the server numbers its rows, and their places in ``ids`` (None: all of them, in order); None: the
            server holds no piece.
        """
        piece = self.piece_of(server)
        if piece is None:
            return None
        if len(self.pieces) == 1:
            return ids, None
        start, stop = piece
        mine = ids % len(self.pieces) == server if self.spec.is_table else (ids >= start) & (ids < stop)
        places = mine.nonzero()[:, 0]
        chosen = ids[places]
        return chosen if self.spec.is_table else chosen - start, places

    def region_of(self, server: int, region: Region) -> tuple[Region, int] | None:
        """Return what a server holds of a part of a dense value, and the place of its first row in the part."""
        piece = self.piece_of(server)
        return None if piece is None else region.within(*piece)

    def to_metadata(self) -> dict[str, Any]:
        """Return what the metadata of all these keys have in common, as plain data."""
        origin = self.spec.origin
        return {
            "shape": list(self.spec.shape),
            "dtype": interop.dtype_name(self.spec.dtype),
            "library": origin.library,
            "device": str(origin.device) if origin.library == "torch" else None,
            "table": self.spec.is_table,
            "pieces": [list(piece) for piece in self.pieces],
            **manifest.describe_init(self.spec),
        }

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> KeyPlacement:
        """Return what ``to_metadata`` was called on."""
        dtype: torch.dtype = getattr(torch, data["dtype"])
        init = RowInit.from_json(data["init"]) if "init" in data else None
        spec = KeySpec(torch.Size(data["shape"]), dtype, manifest.origin_of(data), data["table"], init)
        return cls(spec, [(server, start, stop) for server, start, stop in data["pieces"]])


class PlacedKey(native.Cell):
    """A key that servers hold, as a cell whose value is elsewhere.

    Args:
        placement: of its value.
        order: of the keys' inits.
    """

    __slots__ = ("order", "placement")

    def __init__(self, placement: KeyPlacement, order: int) -> None:
        self.placement, self.order = placement, order
        self.spec, self.value = placement.spec, placement.described

    def to_metadata(self) -> dict[str, Any]:
        """Return plain data, which servers keep with the key."""
        return {**self.placement.to_metadata(), "order": self.order}

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> PlacedKey:
        """Return what ``to_metadata`` was called on."""
        return cls(KeyPlacement.from_metadata(data), data["order"])


class PlacedKeys(KeyTable[PlacedKey]):
    """Keys that servers hold at one time, with the layouts of the calls that were made of them.

    Threads read it without a lock: it is made as a whole, and replaced when keys change.

    Args:
        placed: by key, in the order of init.
        wide, pull_dtype: as for ``Layout``.
        snapshot: the name of the snapshot whose keys they are (None: the present ones).
    """

    def __init__(
        self,
        placed: Mapping[Key, PlacedKey] | Iterable[tuple[Key, PlacedKey]] = (),
        *,
        wide: bool = False,
        pull_dtype: str | None = None,
        snapshot: str | None = None,
    ) -> None:
        super().__init__(placed)
        self._wide, self.pull_dtype, self.snapshot = wide, pull_dtype, snapshot
        self._layouts: Recent[tuple[Key, ...], Layout] = Recent(_REMEMBERED_LAYOUTS)
        self._entries: dict[Key, Entry] = {}

    def of_snapshot(self, snapshot: str | None) -> PlacedKeys:
        """Return the same keys as another snapshot has them (None: the present ones), which share their layouts."""
        found = PlacedKeys(self, wide=self._wide, pull_dtype=self.pull_dtype, snapshot=snapshot)
        found._layouts, found._entries = self._layouts, self._entries
        return found

    @cached_property
    def exact(self) -> PlacedKeys:
        """The same keys, whose values are pulled as they are."""
        return self if self.pull_dtype is None else PlacedKeys(self, wide=self._wide, snapshot=self.snapshot)

    def extended(self, new: Mapping[Key, PlacedKey]) -> PlacedKeys:
        """Return these keys with new ones after them, which share their layouts."""
        found = self.of_snapshot(self.snapshot)
        found.update(new)
        found.loads = self.loads + _loads_of(new.values())
        found.next_order = max(self.next_order, _next_order(new.values()))
        return found

    def without(self, keys: Iterable[Key]) -> PlacedKeys:
        """Return these keys without some of them."""
        found = PlacedKeys(self, wide=self._wide, pull_dtype=self.pull_dtype, snapshot=self.snapshot)
        gone = [found.pop(key) for key in keys]
        found.loads, found.next_order = self.loads - _loads_of(gone), self.next_order
        return found

    @cached_property
    def loads(self) -> Counter[int]:
        """The bytes that each server holds of dense values."""
        return _loads_of(self.values())

    @cached_property
    def next_order(self) -> int:
        """The order of the first key that is to come after these."""
        return _next_order(self.values())

    def layout(self, keys: Sequence[Key]) -> Layout:
        """Return the layout of some of the keys, each given once."""
        called = tuple(keys)
        layout = self._layouts.get(called)
        if layout is None:
            placements = [self[key].placement for key in keys]
            layout = Layout(keys, placements, wide=self._wide, pull_dtype=self.pull_dtype)
            self._layouts.keep(called, layout, layout.num_pieces, len(self))
        return layout

    def entry(self, key: Key) -> Entry:
        """Return an entry without values, for checks."""
        entry = self._entries.get(key)
        if entry is None:
            spec = self[key].placement.spec
            value: torch.Tensor | Table
            if spec.is_table:
                value = Table(spec.shape[0], spec.shape[1:], spec.dtype)
            else:
                value = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            entry = self._entries[key] = Entry(key, spec, value)
        return entry

    def look(
        self, keys: Sequence[Key], *, parts: Sequence[Any] | None = None, outs: Sequence[Any] | None = None
    ) -> Arrays:
        """Return a batch of the parts, or of the outs, of some keys if all are plain; otherwise what was given."""
        batch: Any = native.look(self, keys, parts, outs, None, None) if native.can_look() else None
        given: Any = parts if outs is None else outs
        arrays: Arrays = given if batch is None else batch
        return arrays


def _loads_of(placed: Iterable[PlacedKey]) -> Counter[int]:
    loads: Counter[int] = Counter()
    for placement, times in Counter(each.placement for each in placed).items():
        for server, nbytes in placement.loads:
            loads[server] += times * nbytes
    return loads


def _next_order(placed: Iterable[PlacedKey]) -> int:
    return 1 + max((each.order for each in placed), default=-1)


Arrays = native.Batch | Sequence[Sequence[torch.Tensor]]
"""The parts or outs of each key of a call: as ``native.look`` has seen them, or tensors of any kind."""


def describe(keys: Sequence[Key], placed: Sequence[PlacedKey]) -> dict[str, list[Any]]:
    """Return the metadata of keys as columns, as ``Init`` has them: metadata that several keys share is listed once."""
    kinds, numbers = numbered(each.placement for each in placed)
    return {
        "kinds": [placement.to_metadata() for placement in kinds],
        "keys": list(keys),
        "indices": numbers,
        "orders": [each.order for each in placed],
    }


class _Share:
    """What one server holds of the values of a placement."""

    def __init__(self, placement: KeyPlacement, server: int, dtype: torch.dtype) -> None:
        rows = placement.piece_of(server)
        self.start, self.stop = rows or (0, 0)
        numel = math.prod(placement.spec.shape[1:])
        # A table has no dense value.
        self.count = 0 if placement.spec.is_table else (self.stop - self.start) * numel
        self.first, self.itemsize = self.start * numel, dtype.itemsize
        self.is_there = rows is not None
        self.described = ("sum", dtype, placement.shape(self.start, self.stop))


class ServerLayout:
    """How the pieces that one server holds of a call's keys lie in a payload, one after another.

    Args:
        server: its index.
        keys: of the call.
        placements: each once.
        indices: of each key's placement.
        wide: whether sums of float16 and bfloat16 travel in float32.
        pull_dtype: in which values of float32 and float64 travel (None: in their own).
    """

    def __init__(
        self,
        server: int,
        keys: Sequence[Key],
        placements: Sequence[KeyPlacement],
        indices: Any,
        *,
        wide: bool = False,
        pull_dtype: str | None = None,
    ) -> None:
        self.server, self._wide = server, wide
        # As the compiled part takes it.
        self._columns_as = 0 if pull_dtype is None else native.DTYPES[PULL_DTYPES[pull_dtype]]
        dtypes = [each.spec.dtype for each in placements]
        sent = [interop.accumulator(dtype) if wide else pulled_dtype(dtype, pull_dtype) for dtype in dtypes]
        self._shares = [_Share(each, server, dtype) for each, dtype in zip(placements, sent, strict=True)]
        there = np.array([share.is_there for share in self._shares], bool)[indices]
        self.indices = np.flatnonzero(there)
        """The places in the call of the keys of which the server holds a piece."""
        own = indices[there]
        self._numbers: list[int] = own.tolist()
        self._keys = list(keys) if len(self.indices) == len(keys) else [keys[index] for index in self.indices.tolist()]
        numbers = [(share.first, share.count, share.itemsize) for share in self._shares]
        firsts, counts, itemsizes = np.array(numbers, np.int64).reshape(-1, 3)[own].T
        self._numel = int(counts.sum())
        itemsize_of = np.array([dtype.itemsize for dtype in dtypes], np.int64)
        self.raw_nbytes = int((counts * itemsize_of[own]).sum())
        """The bytes of the values in their own dtypes."""
        # As the compiled part takes pieces: place of the key in the call, first element, how many.
        self._pieces = np.stack([self.indices, firsts, counts], 1).tobytes()
        sizes = [(share.itemsize, share.count * share.itemsize) for share in self._shares]
        self._starts, self.nbytes = place(sizes, self._numbers)
        self._sizes, self.num_keys = counts * itemsizes, len(self._keys)
        self.is_read_in_place = self.nbytes >= max(_IN_PLACE_NBYTES, _IN_PLACE_MEAN_NBYTES * self.num_keys)
        """Whether the values are so large that it is worth a request more to read them where they are."""

    @cached_property
    def layout(self) -> bytes:
        """The description of the payload."""
        return join_layout(self._keys, [share.described for share in self._shares], self._numbers)

    @cached_property
    def keys(self) -> bytes:
        """The keys of the pieces, as a pull lists them."""
        return json.dumps(self._keys).encode()

    @cached_property
    def checksum(self) -> int:
        """A checksum of the layout; the server refuses a request whose checksum is not that of its own values."""
        return zlib.crc32(self.layout)

    @cached_property
    def _places(self) -> Sequence[tuple[int, _Share, Slot]]:
        """Of each piece: the place of its key, its rows and its bytes, for arrays that are not plain."""
        shares = [self._shares[number] for number in self._numbers]
        return list(zip(self.indices.tolist(), shares, decode_layout(self.layout), strict=True))

    def gather(self, room: torch.Tensor, parts: Arrays, pool: Pool) -> None:
        """Write the sums of the pieces to ``room``."""
        if isinstance(parts, Sequence):
            for index, share, slot in self._places:
                target = room[slot.start : slot.stop].view(slot.dtype).view(slot.shape)
                own = [part[share.start : share.stop] if part.ndim else part for part in parts[index]]
                if target.numel():
                    reduce.sum_into(target, own)
        else:
            self._run(parts.sum_pieces, self._starts + np.uint64(room.data_ptr()), pool, int(self._wide))

    def scatter(self, values: torch.Tensor | ValuesInPlace, outs: Arrays, pool: Pool) -> None:
        """Copy the pieces, of a payload or from where they are, to the outputs.

        Raises:
            OSError: they are not where they should be.
        """
        if isinstance(values, ValuesInPlace):
            addresses = values.addresses(self._sizes)
        else:
            addresses = self._starts + np.uint64(values.data_ptr())
        if not isinstance(outs, Sequence):
            self._run(outs.copy_pieces, addresses, pool, self._columns_as)
            return
        for number, (index, share, slot) in enumerate(self._places):
            if isinstance(values, ValuesInPlace):
                value = values.tensor(number, slot.shape, slot.dtype)
            else:
                value = values[slot.start : slot.stop].view(slot.dtype).view(slot.shape)
            for out in outs[index]:
                (out[share.start : share.stop] if out.ndim else out).copy_(value)

    def _run(self, move: Any, addresses: Any, pool: Pool, columns_as: int) -> None:
        """Move all pieces between a batch and where they lie, large ones by several threads."""
        pieces, columns = self._pieces, [addresses.tobytes()]
        if self._numel < _PARALLEL_NUMEL:
            move(pieces, columns, columns_as, 0, self._numel)
        else:
            pool.share(self._numel, partial(move, pieces, columns, columns_as), least=_PARALLEL_NUMEL)


class Layout:
    """How the values of a list of keys are divided over servers, and where the pieces lie in payloads.

    Args:
        keys: in order.
        placements: of each key.
        wide: send sums of float16 and bfloat16 in float32, for the server to add before it rounds.
        pull_dtype: in which values of float32 and float64 are pulled (None: in their own).
    """

    def __init__(
        self,
        keys: Sequence[Key],
        placements: Sequence[KeyPlacement],
        *,
        wide: bool,
        pull_dtype: str | None = None,
    ) -> None:
        self.keys, self.placements, self.pull_dtype = list(keys), placements, pull_dtype
        distinct, numbers = numbered(placements)
        indices = np.array(numbers, np.int64)
        servers = sorted({server for each in distinct for server in each.servers})
        dtypes = {each.spec.dtype for each in distinct}
        self.is_floating = all(dtype.is_floating_point for dtype in dtypes)
        """Whether all values are of floating-point numbers."""
        self.can_code = can_code(each.spec for each in distinct)
        """Whether gradients of all keys are compressed."""
        self.pushed = [ServerLayout(server, self.keys, distinct, indices, wide=wide) for server in servers]
        self.pulled = self.pushed
        if (wide and not dtypes.isdisjoint(interop.LOW_PRECISION)) or pull_dtype is not None:
            self.pulled = [
                ServerLayout(server, self.keys, distinct, indices, pull_dtype=pull_dtype) for server in servers
            ]

    @property
    def num_pieces(self) -> int:
        """How many pieces are described here."""
        return sum(each.num_keys for each in {*self.pushed, *self.pulled})

    @cached_property
    def name(self) -> str:
        """The name of this list of keys in rounds."""
        return list_name(self.keys)


def list_name(keys: Sequence[Key]) -> str:
    """Return a short name of a list of keys, the same for every worker."""
    return blake2b(json.dumps(list(keys)).encode(), digest_size=16).hexdigest()
