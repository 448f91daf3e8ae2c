"""Checksum: zlib's CRC-32, faster on long data where the processor multiplies without carries."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

try:
    from tensorkv.runtime import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Below, the call costs more than it saves.
_LONG_NBYTES = 4096
# Address, length and checksum of data.
_known: ContextVar[tuple[int, int, int] | None] = ContextVar("_known", default=None)


def crc32(data: Any, before: int = 0) -> int:
    """Return the CRC-32 of data that follow what had the checksum ``before``.

    Args:
        data: a contiguous buffer; its bytes count, whatever its elements are.
        before: of what came before.

    >>> crc32(b"tensor" * 1000, crc32(b"a")) == zlib.crc32(b"a" + b"tensor" * 1000)
    True
    """
    if _native is not None and memoryview(data).nbytes >= _LONG_NBYTES:
        found = _native.crc32(data, before)
        if found is not None:
            return found
    return zlib.crc32(data, before)


@contextmanager
def known(data: Any) -> Iterator[None]:
    """Make the checksum of data that stay as they are, and know it inside of the block.

    A server does so before its turn comes, since only one push at a time is logged.
    """
    token = _known.set((*_place(data), crc32(data)))
    try:
        yield
    finally:
        _known.reset(token)


def recall(buffers: Sequence[Any]) -> int | None:
    """Return the checksum of buffers that are, one behind the other, data of which it is known."""
    found = _known.get()
    if found is None:
        return None
    at, end = found[0], found[0] + found[1]
    for buffer in buffers:
        address, nbytes = _place(buffer)
        if address != at:
            return None
        at += nbytes
    return found[2] if at == end else None


def _place(buffer: Any) -> tuple[int, int]:
    array = np.frombuffer(buffer, np.uint8)
    return array.ctypes.data, array.nbytes
