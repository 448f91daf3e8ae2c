"""PackedBuffer: the pieces of a chunk that one worker owns, side by side for another host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tensorkv.shard import native
from tensorkv.transport.segment import aligned

from .schedule import Arrays, BucketSegment


@dataclass(slots=True)
class PackedBuffer:
    """Flat tensors for the own pieces of legs.

    Args:
        whole: the memory that is sent.
        rooms: of each leg, its pieces in it.
        is_value: whether this is the memory of the value itself.
    """

    whole: torch.Tensor
    rooms: list[torch.Tensor]
    is_value: bool = False

    @classmethod
    def new(cls, wanted: Sequence[tuple[BucketSegment, torch.dtype]]) -> PackedBuffer:
        """Return memory for the pieces of legs, in a dtype for each."""
        counts = [sum(leg.counts[leg.own]) for leg, _ in wanted]
        sizes = [aligned(count * dtype.itemsize) for count, (_, dtype) in zip(counts, wanted, strict=True)]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        rooms = [
            place[: count * dtype.itemsize].view(dtype)
            for place, count, (_, dtype) in zip(torch.split(whole, sizes), counts, wanted, strict=True)
        ]
        return cls(whole, rooms)

    @classmethod
    def of_values(cls, legs: Sequence[BucketSegment]) -> PackedBuffer:
        """Return memory for the values of pieces: that of the values themselves if they lie side by side."""
        found = _side_by_side(legs, legs[0].value_column)
        if found is None:
            return cls.new([(leg, leg.dtype) for leg in legs])
        return cls(found, [found.view(legs[0].dtype)], True)

    @classmethod
    def of_parts(cls, legs: Sequence[BucketSegment], parts: Arrays) -> PackedBuffer | None:
        """Return the memory of a worker's plain parts if the pieces lie side by side; None otherwise."""
        found = _side_by_side(legs, *parts.columns(legs[0]))
        return None if found is None else cls(found, [found.view(legs[0].dtype)])

    def pack(self, legs: Sequence[BucketSegment]) -> None:
        """Copy values into the message."""
        for leg, room in () if self.is_value else zip(legs, self.rooms, strict=True):
            if native.can_sum(leg.dtype):
                target = native.column_beside(room, leg.counts[leg.own])
                leg.sums([target], leg.own_columns([leg.value_column]), leg.own)
            else:
                torch._foreach_copy_(pieces(leg, room), leg.values[leg.own])

    def unpack(self, legs: Sequence[BucketSegment]) -> None:
        """Copy the message into values."""
        for leg, room in () if self.is_value else zip(legs, self.rooms, strict=True):
            if native.can_sum(leg.dtype):
                source = native.column_beside(room, leg.counts[leg.own])
                leg.sums(leg.own_columns([leg.value_column]), [source], leg.own)
            else:
                torch._foreach_copy_(leg.values[leg.own], pieces(leg, room))


def _side_by_side(legs: Sequence[BucketSegment], column: bytes) -> torch.Tensor | None:
    """Return the memory of a leg's own pieces if it is what a message of them would be; its owner keeps it."""
    leg = legs[0]
    addresses = np.frombuffer(leg.own_columns([column])[0], np.uint64)
    nbytes = np.array(leg.counts[leg.own], np.uint64) * np.uint64(leg.dtype.itemsize)
    total = int(nbytes.sum())
    if len(legs) > 1 or total != aligned(total) or (addresses[1:] != addresses[:-1] + nbytes[:-1]).any():
        return None
    return torch.frombuffer((ctypes.c_uint8 * total).from_address(int(addresses[0])), dtype=torch.uint8)


def pieces(leg: BucketSegment, room: torch.Tensor) -> list[torch.Tensor]:
    """Return a leg's own pieces in a room of a message."""
    return list(torch.split(room, leg.counts[leg.own]))
