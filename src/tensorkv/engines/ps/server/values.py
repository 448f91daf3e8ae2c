"""ServedValues: the values of a shard, or of a snapshot of it, as replies have them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import decode_layout, encode_layout, join_layout, layout_nbytes, place, unpack, views
from tensorkv.arrays.regions import Region
from tensorkv.arrays.spec import numbered
from tensorkv.compression import Traffic
from tensorkv.errors import ArgumentError, ValueMismatchError, quote
from tensorkv.runtime.recent import Recent
from tensorkv.shard import native
from tensorkv.shard.shard import Shard

from ..messages import Pull, PullRows, Reply, Request, ids_of, keys_of, pulled_dtype, room_for

# Lists of keys that are pulled together.
REMEMBERED_LAYOUTS = 1024


class ServedLayout(NamedTuple):
    """How values lie one after another in a reply.

    Args:
        text: as ``encode_layout`` makes it.
        checksum: of the text.
        nbytes: of the values.
    """

    text: bytes
    checksum: int
    nbytes: int


Layouts = Recent[tuple[tuple[Key, ...], str | None], ServedLayout]
"""Of lists of keys and the dtypes in which they are pulled, how their values lie in a reply."""


class Room:
    """Memory for the values of some keys, one after another.

    Args:
        layout: of the values.
        nbytes: of all of them.
        out: memory to use if it is large enough (None: new memory).
    """

    def __init__(self, layout: bytes, nbytes: int, out: torch.Tensor | None = None) -> None:
        self._layout = layout
        self.payload = room_for(nbytes, out)

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Each value."""
        return views(self.payload, decode_layout(self._layout))


class ServedValues:
    """The values of a shard in replies.

    Args:
        shard: that has them.
        traffic: counts pulls in other dtypes than those of values.
        layouts: what is known of lists of keys; shared by those who serve the same keys.
    """

    def __init__(self, shard: Shard, traffic: Traffic, layouts: Layouts | None = None) -> None:
        self.shard, self._traffic = shard, traffic
        self._layouts: Layouts = Recent(REMEMBERED_LAYOUTS) if layouts is None else layouts

    def forget_layouts(self) -> None:
        """Look at keys again, which may be others than before."""
        self._layouts.clear()

    def values(self, keys: tuple[Key, ...], out: torch.Tensor | None, checksum: Any, pull_dtype: str | None) -> Reply:
        """Return values.

        Args:
            keys: whose values.
            out: memory in which they are put if they fit.
            checksum: of the layout that the client expects.
            pull_dtype: as of ``Push``.
        """
        return self.filled(keys, self.room(keys, out, checksum, pull_dtype), pull_dtype)

    def room(
        self, keys: tuple[Key, ...], out: torch.Tensor | None, checksum: Any, pull_dtype: str | None = None
    ) -> Room:
        """Return memory for values; raise if the client expects another layout."""
        found = self.layout(keys, checksum, pull_dtype)
        return Room(found.text, found.nbytes, out)

    def filled(self, keys: tuple[Key, ...], room: Room, pull_dtype: str | None) -> Reply:
        """Return a reply with values."""
        if pull_dtype is not None:
            self._fill_narrow(keys, room)
        elif not self.shard.try_compiled(native.Call(None, "pull", keys, None, room.payload, 0, None, False, True)):
            self.shard.pull(keys, [[each] for each in room.tensors])
        return Reply({}, room.payload)

    def _fill_narrow(self, keys: tuple[Key, ...], room: Room) -> None:
        """Fill memory with values, rounded to its dtypes."""
        outs = [[each] for each in room.tensors]
        if not self.shard.try_compiled(native.Call(None, "pull", list(keys), None, outs, 0)):
            self.shard.pull(keys, outs)
        raw_nbytes = sum(self.shard.entry("pull", key).value.nbytes for key in keys)
        self._traffic.add_sent(len(room.payload), raw_nbytes)

    def regions(self, request: Request[Pull]) -> Reply:
        """Return the parts of values that a request names."""
        keys, message = keys_of(request.layout), request.message
        specs = [self.shard.entry("pull", key).spec for key in keys]
        wanted = message.regions or []
        if len(wanted) != len(keys):
            raise ArgumentError(f"pull: {len(wanted)} regions of {len(keys)} keys")
        regions = [Region.from_json(each, spec) for each, spec in zip(wanted, specs, strict=True)]
        lies = encode_layout(
            (key, "region", pulled_dtype(spec.dtype, message.pull_dtype), region.shape)
            for key, spec, region in zip(keys, specs, regions, strict=True)
        )
        _check_same(keys, zlib.crc32(lies), message.checksum)
        room = Room(lies, layout_nbytes(lies), request.out)
        self.shard.pull(keys, [[each] for each in room.tensors], regions)
        if message.pull_dtype is not None:
            raw = sum(region.shape.numel() * spec.dtype.itemsize for region, spec in zip(regions, specs, strict=True))
            self._traffic.add_sent(len(room.payload), raw)
        return Reply({}, room.payload)

    def rows(self, request: Request[PullRows]) -> Reply:
        """Return the rows that a request names."""
        items = unpack(request.layout, request.payload)
        keys, ids = [item.key for item in items], [ids_of(item) for item in items]
        narrow = request.message.pull_dtype
        specs = [self.shard.entry("row_sparse_pull", key).spec for key in keys]
        lies = encode_layout(
            (key, "rows", pulled_dtype(spec.dtype, narrow), (len(own), *spec.shape[1:]))
            for key, own, spec in zip(keys, ids, specs, strict=True)
        )
        room = Room(lies, layout_nbytes(lies), request.out)
        if narrow is None:
            self.shard.pull_rows(keys, ids, room.tensors)
        else:
            found = self.shard.pull_rows(keys, ids)
            for each, rows in zip(room.tensors, found, strict=True):
                each.copy_(rows.values)
            self._traffic.add_sent(len(room.payload), sum(rows.values.nbytes for rows in found))
        return Reply({"layout": lies.decode()}, room.payload)

    def layout(self, keys: tuple[Key, ...], checksum: Any, pull_dtype: str | None) -> ServedLayout:
        """Return how values lie in a reply; raise if the client expects another layout."""
        found = self.layout_of(keys, pull_dtype)
        if found is None:
            tables = [key for key in keys if self.shard.entry("pull", key).spec.is_table]
            # A client with fresh metadata does not ask for this.
            _check_same(tables, -1, checksum)
            raise ArgumentError(f"pull({quote(tables[0])}): a table has no dense value; pull rows of it")
        _check_same(keys, found.checksum, checksum)
        return found

    def layout_of(self, keys: tuple[Key, ...], pull_dtype: str | None = None) -> ServedLayout | None:
        """Return how the values of keys lie one after another; None if one is not there, or has no dense value."""
        found = self._layouts.get((keys, pull_dtype))
        entries = self.shard.entries(keys) if found is None else None
        if entries is not None:
            specs, numbers = numbered(entry.spec for entry in entries)
            if any(spec.is_table for spec in specs):
                return None
            # Named as the client names them: it compares.
            kinds = [("sum", pulled_dtype(spec.dtype, pull_dtype), spec.shape) for spec in specs]
            layout = join_layout(keys, kinds, numbers)
            _, nbytes = place([(dtype.itemsize, shape.numel() * dtype.itemsize) for _, dtype, shape in kinds], numbers)
            found = ServedLayout(layout, zlib.crc32(layout), nbytes)
            self._layouts.keep((keys, pull_dtype), found, len(keys), len(self.shard))
        return found


def _check_same(keys: Sequence[Key], checksum: int, expected: Any) -> None:
    if expected is not None and expected != checksum:
        raise ValueMismatchError(
            f"{', '.join(map(quote, keys[:3]))}: another client has re-created a key with another shape or dtype; "
            "call again"
        )
