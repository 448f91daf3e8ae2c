"""Message: the pieces of a chunk that one worker owns, side by side for another host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .route import Leg
from .segment import aligned


@dataclass(slots=True)
class Message:
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
    def new(cls, wanted: Sequence[tuple[Leg, torch.dtype]]) -> Message:
        """Return memory for the pieces of legs, in a dtype for each."""
        counts = [sum(leg.counts[leg.own]) for leg, _ in wanted]
        sizes = [aligned(count * dtype.itemsize) for count, (_, dtype) in zip(counts, wanted, strict=True)]
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        rooms = [
            place[: count * dtype.itemsize].view(dtype)
            for place, count, (_, dtype) in zip(torch.split(whole, sizes), counts, wanted, strict=True)
        ]
        return cls(whole, rooms)

    @classmethod
    def of_values(cls, legs: Sequence[Leg]) -> Message:
        """Return memory for the values of pieces: that of the value itself if it is one piece."""
        if len(legs) == 1 and len(legs[0].values[legs[0].own]) == 1:
            value = legs[0].values[legs[0].own][0]
            flat = value.view(torch.uint8)
            # As long as the message that workers elsewhere make.
            if flat.numel() == aligned(flat.numel()):
                return cls(flat, [value], True)
        return cls.new([(leg, leg.dtype) for leg in legs])

    def pack(self, legs: Sequence[Leg]) -> None:
        """Copy values into the message."""
        if not self.is_value:
            for leg, room in zip(legs, self.rooms, strict=True):
                torch._foreach_copy_(pieces(leg, room), leg.values[leg.own])

    def unpack(self, legs: Sequence[Leg]) -> None:
        """Copy the message into values."""
        if not self.is_value:
            for leg, room in zip(legs, self.rooms, strict=True):
                torch._foreach_copy_(leg.values[leg.own], pieces(leg, room))


def pieces(leg: Leg, room: torch.Tensor) -> list[torch.Tensor]:
    """Return a leg's own pieces in a room of a message."""
    return list(torch.split(room, leg.counts[leg.own]))
