"""Where the rows of a table are: the place of each id that it holds, in the order in which the ids came."""

from __future__ import annotations

from typing import Protocol

import torch

from tensorkv.compiled import _tables


class Index(Protocol):
    """Ids and their places, which are counted from 0."""

    def __len__(self) -> int:
        """Return how many ids are held."""

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the places of ids, -1 for those that are not held, and how many are not."""

    def add(self, ids: torch.Tensor) -> None:
        """Hold ids that are unique and not held yet, at the next places."""

    def ids(self) -> torch.Tensor:
        """Return the ids held, sorted; for reading only."""


class HashIndex:
    """Ids in a hash table: finding or adding one costs the same for any number of them, about 40 bytes each.

    >>> index = HashIndex()
    >>> index.add(torch.tensor([7, 2]))
    >>> index.find(torch.tensor([2, 3])), index.ids()
    ((tensor([ 1, -1]), 1), tensor([2, 7]))
    """

    def __init__(self) -> None:
        self._count = 0
        self._slots = _empty_slots(16)
        self._held = torch.empty(8, dtype=torch.int64, device="cpu")
        self._sorted: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        ids = ids.contiguous()
        places = torch.empty_like(ids)
        return places, _tables.find(*self._addresses, ids.data_ptr(), len(ids), places.data_ptr())

    def add(self, ids: torch.Tensor) -> None:
        ids = ids.contiguous()
        needed = self._count + len(ids)
        held, slots = self._held, self._slots
        if needed > len(held):
            held = torch.empty(max(needed, len(held) + len(held) // 2), dtype=torch.int64, device="cpu")
            held[: self._count] = self._held[: self._count]
        if 3 * needed > 2 * len(slots):
            slots = _empty_slots(1 << (2 * needed - 1).bit_length())
            _tables.add(slots.data_ptr(), len(slots), held.data_ptr(), held.data_ptr(), self._count, 0)
        self._held, self._slots, self._sorted = held, slots, None
        _tables.add(*self._addresses, ids.data_ptr(), len(ids), self._count)
        self._count = needed

    def ids(self) -> torch.Tensor:
        if self._sorted is None:
            self._sorted = torch.sort(self._held[: self._count])[0]
        return self._sorted

    @property
    def _addresses(self) -> tuple[int, int, int]:
        return self._slots.data_ptr(), len(self._slots), self._held.data_ptr()


def _empty_slots(count: int) -> torch.Tensor:
    return torch.full((count,), -1, dtype=torch.int64, device="cpu")


class SortedIndex:
    """Sorted ids: finding q of n costs q binary searches, and adding some a copy of all.

    >>> index = SortedIndex()
    >>> index.add(torch.tensor([7, 2]))
    >>> index.find(torch.tensor([2, 3])), index.ids()
    ((tensor([ 1, -1]), 1), tensor([2, 7]))
    """

    def __init__(self) -> None:
        self._ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        if not len(self._ids):
            return torch.full_like(ids, -1), len(ids)
        spots = torch.searchsorted(self._ids, ids.contiguous()).clamp_(max=len(self._ids) - 1)
        absent = self._ids[spots] != ids
        return self._places[spots].masked_fill_(absent, -1), int(absent.sum())

    def add(self, ids: torch.Tensor) -> None:
        count = len(self)
        places = torch.cat([self._places, torch.arange(count, count + len(ids), device="cpu")])
        self._ids, order = torch.sort(torch.cat([self._ids, ids]))
        self._places = places[order]

    def ids(self) -> torch.Tensor:
        return self._ids


def new_index() -> Index:
    """Return an empty index, of the faster kind if the compiled part is there."""
    return SortedIndex() if _tables is None else HashIndex()
