"""Copies: values that a server shares with all readers of its host, so that sixteen readers cost it one copy.

A copy is written once for each version and read by everybody; before its memory is written again, a mark in front of
it changes, by which a reader who was slow notices that it has to ask again.
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
class _Shelf:
    signature: Any = None
    place: list[Any] | None = None
    segments: list[Segment] = field(default_factory=list)
    turn: int = 0


class Copies:
    """A server's side."""

    def __init__(self) -> None:
        self._shelves: OrderedDict[bytes, _Shelf] = OrderedDict()
        # No two servers count alike: memory of one that is gone may seem to be another's.
        self._mark = secrets.randbits(48)

    def find(self, layout: bytes, signature: Any) -> list[Any] | None:
        """Return where the copy of these keys is, if they have not changed since it was made."""
        shelf = self._shelves.get(layout)
        return shelf.place if shelf is not None and shelf.signature == signature else None

    def make(self, layout: bytes, signature: Any, nbytes: int, write: Callable[[torch.Tensor], Any]) -> list[Any]:
        """Make a copy and return where it is.

        Args:
            layout: of the keys.
            signature: of the values that ``write`` is going to find, or earlier ones.
            nbytes: of the copy.
            write: puts the values into the memory it is given.

        Raises:
            OSError: there is no memory.
        """
        shelf = self._shelves.setdefault(layout, _Shelf())
        self._shelves.move_to_end(layout)
        while len(self._shelves) > _LISTS:
            for segment in self._shelves.popitem(last=False)[1].segments:
                segment.close_file()
        if len(shelf.segments) < _VERSIONS:
            shelf.segments.append(Segment(LINE + aligned(nbytes)))
        shelf.turn = (shelf.turn + 1) % len(shelf.segments)
        segment = shelf.segments[shelf.turn]
        if segment.nbytes < LINE + aligned(nbytes):
            # A key was made anew, and is larger now.
            segment.close_file()
            segment = shelf.segments[shelf.turn] = Segment(LINE + aligned(nbytes))
        shelf.place, shelf.signature = None, None
        self._mark += 1
        marks = segment.tensor(0, (2,), torch.int64)
        marks[0] = self._mark
        write(segment.tensor(LINE, (nbytes,), torch.uint8))
        marks[1] = self._mark
        shelf.place, shelf.signature = [segment.name, segment.nbytes, self._mark, nbytes], signature
        return shelf.place

    def forget(self, layout: bytes) -> None:
        """Make the next copy of these keys anew, in memory of its own."""
        shelf = self._shelves.pop(layout, None)
        for segment in shelf.segments if shelf is not None else ():
            segment.close_file()


class CopyReader:
    """A client's side: the copies that it has open, by the names of their segments."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Segment] = OrderedDict()

    def find(self, place: list[Any]) -> torch.Tensor:
        """Return the bytes of a copy, for reading.

        Raises:
            OSError: it is gone.
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

    def is_whole(self, place: list[Any]) -> bool:
        """Tell whether what was read since ``find`` is what was meant; if not, ask the server again."""
        segment = self._open.get(place[0])
        if segment is None or segment.tensor(0, (2,), torch.int64).tolist() != [place[2], place[2]]:
            self._open.pop(place[0], None)
            return False
        return True
