"""A cache of values that a server shares with all readers of its host, so that sixteen readers cost it one copy.

A copy is written once for each version and read by all of them. It is guarded by a sequence lock: numbers before the
values change when the memory is written again, by which a slow reader notices that it has to ask again.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .segment import LINE, Segment, aligned

# Lists of keys whose copies are kept, and memory for how many versions of each.
_LISTS = 8
_VERSIONS = 3


@dataclass(slots=True)
class _Slot:
    signature: Any = None
    place: list[Any] | None = None
    segments: list[Segment] = field(default_factory=list)
    turn: int = 0


class SharedCache:
    """The server's side: the copies of the lists of keys that were pulled last."""

    def __init__(self) -> None:
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()
        # Random, so that memory of a server that has ended is not taken for another's.
        self._sequence = secrets.randbits(48)

    def find(self, layout: bytes, signature: Any) -> list[Any] | None:
        """Return where the copy of these keys is, if they have not changed since it was made."""
        slot = self._slots.get(layout)
        return slot.place if slot is not None and slot.signature == signature else None

    def make(self, layout: bytes, signature: Any, nbytes: int, write: Callable[[torch.Tensor], Any]) -> list[Any]:
        """Make a copy and return where it is.

        Args:
            layout: of the keys.
            signature: of the values that ``write`` will write, or of earlier ones.
            nbytes: of the copy.
            write: writes the values into the memory that it is given.

        Raises:
            OSError: there is no memory.
        """
        slot = self._slots.setdefault(layout, _Slot())
        self._slots.move_to_end(layout)
        while len(self._slots) > _LISTS:
            for segment in self._slots.popitem(last=False)[1].segments:
                segment.close_file()
        if len(slot.segments) < _VERSIONS:
            slot.segments.append(Segment(LINE + aligned(nbytes)))
        slot.turn = (slot.turn + 1) % len(slot.segments)
        segment = slot.segments[slot.turn]
        if segment.nbytes < LINE + aligned(nbytes):
            # A key was re-created, and is larger now.
            segment.close_file()
            segment = slot.segments[slot.turn] = Segment(LINE + aligned(nbytes))
        slot.place, slot.signature = None, None
        self._sequence += 1
        numbers = segment.tensor(0, (2,), torch.int64)
        numbers[0] = self._sequence
        write(segment.tensor(LINE, (nbytes,), torch.uint8))
        numbers[1] = self._sequence
        slot.place, slot.signature = [segment.name, segment.nbytes, self._sequence, nbytes], signature
        return slot.place

    def forget(self, layout: bytes) -> None:
        """Drop the copy of these keys; the next one gets new memory."""
        slot = self._slots.pop(layout, None)
        for segment in slot.segments if slot is not None else ():
            segment.close_file()


class SharedCacheReader:
    """The client's side: the copies that it has open, by the names of their segments."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Segment] = OrderedDict()

    def find(self, place: list[Any]) -> torch.Tensor:
        """Return the bytes of a copy, for reading.

        Raises:
            OSError: the server has dropped it.
        """
        name, nbytes, _, own_nbytes = place
        segment = self._open.get(name)
        if segment is None:
            segment = Segment(nbytes, name)
            segment.close_file()
            self._open[name] = segment
            while len(self._open) > _LISTS * _VERSIONS:
                self._open.popitem(last=False)
        return segment.tensor(LINE, (own_nbytes,), torch.uint8)

    def is_intact(self, place: list[Any]) -> bool:
        """Return whether the copy was not written over since ``find``; if it was, ask the server again."""
        segment = self._open.get(place[0])
        if segment is None or segment.tensor(0, (2,), torch.int64).tolist() != [place[2], place[2]]:
            self._open.pop(place[0], None)
            return False
        return True
