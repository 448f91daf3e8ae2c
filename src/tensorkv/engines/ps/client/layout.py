"""Spread: how a call's keys lie over servers. Values are packed server by server, and what comes back is unpacked."""

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
from tensorkv.arrays.packing import decode_layout, encode_layout
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import native, reduce
from tensorkv.shard.plan import Form
from tensorkv.shard.pool import Pool
from tensorkv.storage import manifest

Parts = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Held:
    """What a client knows of a key.

    Args:
        spec: of the whole value.
        pieces: server, first row and the row behind the last of each; of a table, every server with all rows.
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
        """Return the shape of some rows; a 0-d value has one."""
        return torch.Size((stop - start, *self.spec.shape[1:])) if self.spec.shape else self.spec.shape


@dataclass(frozen=True, slots=True)
class _Piece:
    key: int
    start: int
    stop: int
    first: int
    count: int


class Share:
    """What one server has of a call's keys.

    Args:
        server: which.
        keys: of the call.
        held: of each key.
        dtypes: in which each key travels.
    """

    def __init__(self, server: int, keys: Sequence[Key], held: Sequence[Held], dtypes: Sequence[torch.dtype]) -> None:
        self.server = server
        self.pieces: list[_Piece] = []
        described = []
        for index, each in enumerate(held):
            for owner, start, stop in each.pieces:
                if owner == server:
                    step = math.prod(each.spec.shape[1:])
                    self.pieces.append(_Piece(index, start, stop, start * step, (stop - start) * step))
                    described.append((keys[index], "sum", dtypes[index], each.shape(start, stop)))
        self.layout = encode_layout(described)
        self.keys = json.dumps([keys[piece.key] for piece in self.pieces]).encode()
        # By which a server tells whether its values are what this client takes them to be.
        self.checksum = zlib.crc32(self.layout)
        self._places = decode_layout(self.layout)
        self.nbytes = self._places[-1].stop if self._places else 0
        # For columns of addresses: which key, and where in its array the piece begins.
        self._index = np.array([piece.key for piece in self.pieces], np.int64)
        self._skips = np.array([p.first * dtypes[p.key].itemsize for p in self.pieces], np.uint64)
        self.counts = [piece.count for piece in self.pieces]

    def addresses(self, column: bytes) -> bytes:
        """Return where the pieces of a column's arrays begin."""
        return (np.frombuffer(column, np.uint64)[self._index] + self._skips).tobytes()

    def gather(self, parts: Parts, room: torch.Tensor) -> None:
        """Lay the sums of the pieces out in ``room``."""
        for piece, place in zip(self.pieces, self._places, strict=True):
            target = room[place.start : place.stop].view(place.dtype).view(place.shape)
            own = [part[piece.start : piece.stop] if part.ndim else part for part in parts[piece.key]]
            if target.numel():
                reduce.sum_into(target, own)

    def scatter(self, values: torch.Tensor, outs: Parts) -> None:
        """Copy the pieces to the outs."""
        for piece, place in zip(self.pieces, self._places, strict=True):
            value = values[place.start : place.stop].view(place.dtype).view(place.shape)
            for out in outs[piece.key]:
                (out[piece.start : piece.stop] if out.ndim else out).copy_(value)


class Route:
    """How a list of keys lies over servers.

    Args:
        keys: in order.
        held: of each key.
        wide: send sums of float16 and bfloat16 in float32, for others to be added before they are rounded.
    """

    def __init__(self, keys: Sequence[Key], held: Sequence[Held], *, wide: bool) -> None:
        self.keys = list(keys)
        self.specs = [each.spec for each in held]
        dtypes = [each.spec.dtype for each in held]
        sent = [interop.accumulator(dtype) for dtype in dtypes] if wide else dtypes
        servers = sorted({server for each in held for server in each.servers})
        self.shares = [Share(server, keys, held, sent) for server in servers]
        # What comes back is always of the values' own dtypes.
        self.replies = self.shares if sent == dtypes else [Share(server, keys, held, dtypes) for server in servers]
        self._sent = sent

    @cached_property
    def name(self) -> str:
        """By which servers know this list of keys in a round."""
        return list_name(self.keys)

    @cached_property
    def form(self) -> Form | None:
        """What the keys' arrays must be to be packed by the column; None if they are of several dtypes."""
        if not self._sent:
            return None
        dtype = self._sent[0]
        if (
            any(each is not dtype for each in self._sent)
            or self.replies is not self.shares
            or not native.can_sum(dtype)
        ):
            return None
        return Form([spec.shape for spec in self.specs], dtype)

    @cached_property
    def has_tables(self) -> bool:
        """Whether a key has no dense value."""
        return any(spec.is_table for spec in self.specs)


def list_name(keys: Sequence[Key]) -> str:
    """Return a short name of a list of keys, the same for every worker."""
    return f"{zlib.crc32(json.dumps(list(keys)).encode()):08x}"


def gather(share: Share, dtype: torch.dtype, columns: Sequence[bytes], room: torch.Tensor, pool: Pool) -> None:
    """Lay the sums of whole columns of arrays out in ``room``."""
    target = native.column_beside(room.view(dtype), share.counts)
    _run(native.Sums([target], [share.addresses(column) for column in columns], share.counts, dtype), pool)


def scatter(share: Share, dtype: torch.dtype, values: torch.Tensor, columns: Sequence[bytes], pool: Pool) -> None:
    """Copy values to whole columns of arrays."""
    source = native.column_beside(values.view(dtype), share.counts)
    _run(native.Sums([share.addresses(column) for column in columns], [source], share.counts, dtype), pool)


def _run(sums: native.Sums, pool: Pool) -> None:
    if sum(sums.counts) >= 1 << 18:
        pool.run(sums.jobs(pool.threads))
    else:
        sums.jobs(1)[0]()


def to_note(held: Held) -> dict[str, Any]:
    """Return what a server keeps for other clients of where a key is, as plain data."""
    origin = held.spec.origin
    return {
        "shape": list(held.spec.shape),
        "dtype": interop.dtype_name(held.spec.dtype),
        "library": origin.library,
        "device": str(origin.device) if origin.library == "torch" else None,
        "table": held.spec.is_table,
        "pieces": [list(piece) for piece in held.pieces],
        "order": held.order,
    }


def from_note(note: Mapping[str, Any]) -> Held:
    """Return what ``to_note`` was given."""
    dtype: torch.dtype = getattr(torch, note["dtype"])
    spec = KeySpec(torch.Size(note["shape"]), dtype, manifest.origin_of(note), note["table"])
    return Held(spec, [(server, start, stop) for server, start, stop in note["pieces"]], note["order"])
