"""How values lie over servers: the placement of one key, and the layout of the keys of a call, server by server."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Slot, decode_layout, encode_layout
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import native, reduce
from tensorkv.shard.plan import Form
from tensorkv.shard.pool import Pool
from tensorkv.storage import manifest

Parts = Sequence[Sequence[torch.Tensor]]
# Copies of more elements than this are divided between threads.
_PARALLEL_NUMEL = 1 << 18


@dataclass(frozen=True, slots=True)
class KeyPlacement:
    """The metadata of a key that clients need: its spec, and which server holds which rows.

    Args:
        spec: of the whole value.
        pieces: server, first row and row after the last of each piece; of a table, every server with all rows.
        order: of the keys' inits.
    """

    spec: KeySpec
    pieces: Sequence[tuple[int, int, int]]
    order: int = 0

    @property
    def servers(self) -> list[int]:
        """The servers that hold a piece."""
        return [server for server, _, _ in self.pieces]

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

    def rows_of(self, server: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Select the row ids that a server holds; rows of a table are on the server ``id % num_servers``.

        Returns:
            The ids as the server numbers its rows, and a mask of them in ``ids``; None: the server holds no piece.
        """
        piece = self.piece_of(server)
        if piece is None:
            return None
        if self.spec.is_table:
            mine = ids % len(self.pieces) == server
            return ids[mine], mine
        start, stop = piece
        mine = (ids >= start) & (ids < stop)
        return ids[mine] - start, mine

    def to_metadata(self) -> dict[str, Any]:
        """Return plain data, which servers keep with the key."""
        origin = self.spec.origin
        return {
            "shape": list(self.spec.shape),
            "dtype": interop.dtype_name(self.spec.dtype),
            "library": origin.library,
            "device": str(origin.device) if origin.library == "torch" else None,
            "table": self.spec.is_table,
            "pieces": [list(piece) for piece in self.pieces],
            "order": self.order,
        }

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> KeyPlacement:
        """Return what ``to_metadata`` was called on."""
        dtype: torch.dtype = getattr(torch, data["dtype"])
        spec = KeySpec(torch.Size(data["shape"]), dtype, manifest.origin_of(data), data["table"])
        return cls(spec, [(server, start, stop) for server, start, stop in data["pieces"]], data["order"])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of a key's value: which rows, and which elements of the flattened value."""

    key: int
    start: int
    stop: int
    first: int
    count: int


def describe(keys: Sequence[Key], placements: Sequence[KeyPlacement]) -> dict[str, list[Any]]:
    """Return the metadata of keys as columns, as ``Init`` has them: metadata that several keys share stand once."""
    kinds: list[Any] = []
    found: dict[Any, int] = {}
    indices = []
    for placement in placements:
        index = found.setdefault((placement.spec, tuple(placement.pieces)), len(kinds))
        if index == len(kinds):
            kinds.append({name: each for name, each in placement.to_metadata().items() if name != "order"})
        indices.append(index)
    orders = [placement.order for placement in placements]
    return {"kinds": kinds, "keys": list(keys), "indices": indices, "orders": orders}


class ServerLayout:
    """How the pieces that one server holds of a call's keys lie in a payload, one after another.

    Args:
        server: its index.
        keys: of the call.
        placements: of each key.
        dtypes: in which each key travels.
    """

    def __init__(
        self, server: int, keys: Sequence[Key], placements: Sequence[KeyPlacement], dtypes: Sequence[torch.dtype]
    ) -> None:
        self.server = server
        self.pieces: list[_Piece] = []
        described, nbytes = [], 0
        for index, placement in enumerate(placements):
            piece = placement.piece_of(server)
            if piece is not None:
                start, stop = piece
                step, itemsize = math.prod(placement.spec.shape[1:]), dtypes[index].itemsize
                self.pieces.append(_Piece(index, start, stop, start * step, (stop - start) * step))
                nbytes += -nbytes % itemsize + (stop - start) * step * itemsize
                described.append((keys[index], "sum", dtypes[index], placement.shape(start, stop)))
        self.layout = encode_layout(described)
        self.keys = json.dumps([keys[piece.key] for piece in self.pieces]).encode()
        # By this a server tells whether its values are what the client takes them to be.
        self.checksum = zlib.crc32(self.layout)
        self.nbytes = nbytes
        # Of each piece: its key, and the bytes from the beginning of the key's array to the piece.
        self._index = np.array([piece.key for piece in self.pieces], np.int64)
        self._skips = np.array([p.first * dtypes[p.key].itemsize for p in self.pieces], np.uint64)
        self._counts = [piece.count for piece in self.pieces]

    @cached_property
    def _places(self) -> Sequence[Slot]:
        """Where each piece lies, for values that are not gathered or scattered by the column."""
        return decode_layout(self.layout)

    def gather(self, parts: Parts, room: torch.Tensor) -> None:
        """Write the sums of the pieces to ``room``."""
        for piece, place in zip(self.pieces, self._places, strict=True):
            target = room[place.start : place.stop].view(place.dtype).view(place.shape)
            own = [part[piece.start : piece.stop] if part.ndim else part for part in parts[piece.key]]
            if target.numel():
                reduce.sum_into(target, own)

    def scatter(self, values: torch.Tensor, outs: Parts) -> None:
        """Copy the pieces to the outputs."""
        for piece, place in zip(self.pieces, self._places, strict=True):
            value = values[place.start : place.stop].view(place.dtype).view(place.shape)
            for out in outs[piece.key]:
                (out[piece.start : piece.stop] if out.ndim else out).copy_(value)

    def gather_columns(self, dtype: torch.dtype, columns: Sequence[bytes], room: torch.Tensor, pool: Pool) -> None:
        """Write the sums of the pieces to ``room``, given columns with the address of each key's array."""
        target = native.column_beside(room.view(dtype), self._counts)
        self._sum(dtype, [target], [self._addresses(column) for column in columns], pool)

    def scatter_columns(self, dtype: torch.dtype, values: torch.Tensor, columns: Sequence[bytes], pool: Pool) -> None:
        """Copy the pieces to the outputs, given columns with the address of each key's array."""
        source = native.column_beside(values.view(dtype), self._counts)
        self._sum(dtype, [self._addresses(column) for column in columns], [source], pool)

    def _addresses(self, column: bytes) -> bytes:
        return (np.frombuffer(column, np.uint64)[self._index] + self._skips).tobytes()

    def _sum(self, dtype: torch.dtype, targets: list[bytes], sources: list[bytes], pool: Pool) -> None:
        sums = native.Pass(targets, sources, self._counts, dtype)
        if sum(self._counts) >= _PARALLEL_NUMEL:
            pool.run(sums.jobs(pool.threads))
        else:
            sums.jobs(1)[0]()


class Layout:
    """How a list of keys lies over servers.

    Args:
        keys: in order.
        placements: of each key.
        wide: send sums of float16 and bfloat16 in float32, for the server to add before it rounds.
    """

    def __init__(self, keys: Sequence[Key], placements: Sequence[KeyPlacement], *, wide: bool) -> None:
        self.keys = list(keys)
        self.specs = [each.spec for each in placements]
        dtypes = [each.spec.dtype for each in placements]
        sent = [interop.accumulator(dtype) for dtype in dtypes] if wide else dtypes
        servers = sorted({server for each in placements for server in each.servers})
        self.pushed = [ServerLayout(server, keys, placements, sent) for server in servers]
        # Pulled values always have the dtypes of the keys.
        self.pulled = (
            self.pushed if sent == dtypes else [ServerLayout(server, keys, placements, dtypes) for server in servers]
        )
        self._sent = sent

    @cached_property
    def name(self) -> str:
        """The name of this list of keys in rounds."""
        return list_name(self.keys)

    @cached_property
    def form(self) -> Form | None:
        """What the keys' arrays must be to be packed by the column; None if they have several dtypes."""
        if not self._sent:
            return None
        dtype = self._sent[0]
        is_uniform = all(each is dtype for each in self._sent) and self.pulled is self.pushed
        if not is_uniform or not native.can_sum(dtype):
            return None
        return Form([spec.shape for spec in self.specs], dtype)

    @cached_property
    def has_tables(self) -> bool:
        """Whether a key has no dense value."""
        return any(spec.is_table for spec in self.specs)


def list_name(keys: Sequence[Key]) -> str:
    """Return a short name of a list of keys, the same for every worker."""
    return f"{zlib.crc32(json.dumps(list(keys)).encode()):08x}"
