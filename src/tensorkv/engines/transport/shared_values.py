"""Values in memory that a server shares with the processes of its host, which read them where they lie.

So sixteen readers cost the server no copy. A reader holds a snapshot meanwhile: then the first change of a value is
made in other memory, and what it reads stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .segment import Segment, aligned

# Values that are brought here together share segments of up to so many bytes. Each takes a file descriptor, and its
# memory is free again when none of its values is there any more.
_SEGMENT_NBYTES = 64 << 20
# A reader keeps the segments open that its last reads have used.
_READS = 16


class Places(NamedTuple):
    """Where values lie.

    Args:
        segments: the name and the bytes of each.
        table: of each value, which segment, and the offset in it; two rows of int64.
    """

    segments: list[list[Any]]
    table: np.ndarray[Any, np.dtype[np.int64]]


class SharedValues:
    """The server's side: memory for values."""

    def __init__(self) -> None:
        # By the address where they begin, as long as a tensor lies in them.
        self._segments: dict[int, Segment] = {}

    def like(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return new tensors of the shapes and dtypes of others.

        Raises:
            OSError: there is no memory.
        """
        found: list[torch.Tensor] = []
        while len(found) < len(values):
            starts: list[int] = []
            nbytes = 0
            for value in values[len(found) :]:
                if starts and nbytes + value.nbytes > _SEGMENT_NBYTES:
                    break
                starts.append(nbytes)
                nbytes += aligned(value.nbytes)
            memory = self._allocate(nbytes)
            for at, value in zip(starts, values[len(found) :], strict=False):
                found.append(memory[at : at + value.nbytes].view(value.dtype).view(value.shape))
        return found

    def _allocate(self, nbytes: int) -> torch.Tensor:
        segment = Segment(nbytes)
        # torch lets go of the array when no tensor lies in its memory any more.
        array = segment.bytes_at(0, segment.nbytes).numpy()
        self._segments[segment.address] = segment
        weakref.finalize(array, _forget, self._segments, segment.address).atexit = False
        return torch.from_numpy(array)

    def has(self, value: torch.Tensor) -> bool:
        """Return whether a tensor lies in this memory."""
        return value.untyped_storage().data_ptr() in self._segments

    def find(self, values: Sequence[torch.Tensor]) -> Places | None:
        """Return where tensors lie; None if one of them lies elsewhere."""
        held = sorted(self._segments.items())
        if not held:
            return None
        starts = np.array([address for address, _ in held], np.int64)
        stops = starts + np.array([segment.nbytes for _, segment in held], np.int64)
        # Empty ones have no address.
        addresses = np.array([value.data_ptr() or held[0][0] for value in values], np.int64)
        indices = np.searchsorted(starts, addresses, "right") - 1
        if (indices < 0).any() or (addresses >= stops[indices]).any():
            return None
        used, which = np.unique(indices, return_inverse=True)
        segments = [held[index][1] for index in used.tolist()]
        return Places([[each.name, each.nbytes] for each in segments], np.stack([which, addresses - starts[indices]]))


def _forget(segments: dict[int, Segment], address: int) -> None:
    segments.pop(address).close_file()


class ValuesInPlace:
    """Values that are read where they lie.

    Args:
        segments: in which they lie.
        table: as of ``Places``.
    """

    def __init__(self, segments: Sequence[Segment], table: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._segments, self._table = segments, table

    def addresses(self, sizes: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return the address of each value, of so many bytes.

        Raises:
            OSError: one of them lies outside of its segment.
        """
        which, offsets = self._table
        ends = np.array([each.nbytes for each in self._segments], np.int64)[which]
        if (offsets < 0).any() or (offsets + sizes > ends).any():
            raise OSError("a value outside of the shared memory")
        bases = np.array([each.address for each in self._segments], np.uint64)
        found: np.ndarray[Any, np.dtype[np.uint64]] = bases[which] + offsets.astype(np.uint64)
        return found

    def tensor(self, index: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return one of the values."""
        which, offset = map(int, self._table[:, index])
        return self._segments[which].tensor(offset, shape, dtype)


class OpenValues:
    """The client's side: the segments of one server that it has open."""

    def __init__(self) -> None:
        self._open: dict[str, Segment] = {}
        self._used: dict[str, int] = {}
        self._reads = 0

    def find(self, segments: Sequence[Sequence[Any]], table: np.ndarray[Any, np.dtype[np.int64]]) -> ValuesInPlace:
        """Return the values that lie in places, for reading.

        Args:
            segments, table: as of ``Places``.

        Raises:
            OSError: the server has ended, or its memory cannot be opened here.
        """
        self._reads += 1
        found = []
        for name, nbytes in segments:
            segment = self._open.get(name)
            if segment is None:
                segment = self._open[name] = Segment(nbytes, name)
                segment.close_file()
            self._used[name] = self._reads
            found.append(segment)
        for name in [name for name, last in self._used.items() if last <= self._reads - _READS]:
            del self._open[name], self._used[name]
        return ValuesInPlace(found, table)
