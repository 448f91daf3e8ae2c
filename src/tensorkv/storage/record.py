"""Record: a few words of JSON and some tensors as one run of bytes, with lengths and checksums.

A log and a snapshot are files of records. docs/journal-format.md has the format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.errors import JournalError

from .checksum import crc32

MAGIC = b"tkv1"
# Magic, checksum of the rest of the frame, lsn, bytes of head, layout and payload, checksum of the first two and of
# the payload.
_FRAME = struct.Struct("<4sIQIIQII")
FRAME_NBYTES = _FRAME.size
# Behind every record: a write that the machine did not finish leaves zeros here, or nothing.
END = b"end\n"
_DTYPES = {interop.dtype_name(dtype): dtype for dtype in interop.DTYPES}
# More is not read into memory on a file's word, and so not written either.
_MOST_WORDS = 1 << 28


class Item(NamedTuple):
    """A tensor of a record, and what it is: of which key, in which role."""

    key: Key
    role: str
    tensor: torch.Tensor


class Place(NamedTuple):
    """Where in a payload a tensor lies."""

    key: Key
    role: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Record:
    """What is written at once.

    Args:
        head: plain data, for JSON.
        layout: what the payload holds, as ``layout`` makes it.
        payload: its bytes, in one or more buffers.
        checksum: of the payload, where it is known.
    """

    head: dict[str, Any]
    layout: bytes = b"[]"
    payload: Sequence[Any] = ()
    checksum: int | None = None

    def items(self) -> list[Item]:
        """Return the tensors of a record that was read; they share its memory.

        Raises:
            JournalError: the layout is not that of the payload.
        """
        (payload,) = self.payload
        return unpack(self.layout, payload)


def pack(head: dict[str, Any], items: Sequence[Item]) -> Record:
    """Return a record of tensors, which share their memory with it where they are contiguous on the CPU.

    >>> record = pack({"verb": "push"}, [Item("w", "sum", torch.ones(3)), Item("n", "sum", torch.tensor(7))])
    >>> record.layout
    b'[["w","sum","float32",[3]],["n","sum","int64",[]]]'
    >>> [len(buffer) for buffer in record.payload]
    [12, 4, 8]
    """
    buffers: list[Any] = []
    run = _Run()
    at = 0
    for _, _, tensor in items:
        gap = -at % tensor.dtype.itemsize
        if gap:
            buffers += run.end()
            buffers.append(bytes(gap))
        if tensor.numel() and not run.takes(tensor):
            buffers += run.end()
            run.begin(tensor)
        at += gap + tensor.nbytes
    return Record(head, layout(items), buffers + run.end())


class _Run:
    """Tensors that lie side by side, which are one buffer: many small ones would each cost as much as a large one."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._next = self._nbytes = 0

    def begin(self, tensor: torch.Tensor) -> None:
        self._first, self._nbytes = tensor, tensor.nbytes
        self._next = tensor.data_ptr() + tensor.nbytes if tensor.is_cpu and tensor.is_contiguous() else -1

    def takes(self, tensor: torch.Tensor) -> bool:
        if self._first is None or tensor.data_ptr() != self._next or not tensor.is_contiguous():
            return False
        if tensor.untyped_storage().data_ptr() != self._first.untyped_storage().data_ptr():
            return False
        self._next += tensor.nbytes
        self._nbytes += tensor.nbytes
        return True

    def end(self) -> list[Any]:
        first, self._first = self._first, None
        if first is None:
            return []
        if self._nbytes == first.nbytes:
            return [nbytes_of(first)]
        at = first.storage_offset() * first.dtype.itemsize
        flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(first.untyped_storage(), at, (self._nbytes,))  # type: ignore[call-overload]
        return [flat.numpy().data]


def layout(items: Sequence[Item]) -> bytes:
    """Return what says how tensors lie in a payload: one after another, each at a multiple of its element's size."""
    return describe([(key, role, tensor.dtype, tensor.shape) for key, role, tensor in items])


def describe(items: Iterable[tuple[Key, str, torch.dtype, Sequence[int]]]) -> bytes:
    """Return the layout of tensors of which key, role, dtype and shape are known."""
    described = [[key, role, interop.dtype_name(dtype), list(shape)] for key, role, dtype, shape in items]
    return json.dumps(described, separators=(",", ":")).encode()


def nbytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements as bytes; of a contiguous one on the CPU, its own memory."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def unpack(layout: bytes, payload: Any) -> list[Item]:
    """Return the tensors in a payload.

    Args:
        layout: as in a record.
        payload: a contiguous buffer of bytes, whose memory the tensors share.

    Raises:
        JournalError: the two do not fit.
    """
    # A writable view, though nobody writes: torch warns about the others.
    flat = (
        interop.take(np.frombuffer(payload, np.uint8))
        if len(payload)
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    found = places(layout)
    if (found[-1].stop if found else 0) != len(flat):
        raise JournalError(
            f"a record's payload has {len(flat)} bytes, its layout says {found[-1].stop if found else 0}"
        )
    items = []
    for key, role, dtype, shape, start, stop in found:
        piece = flat[start:stop]
        if dtype is torch.bool and bool((piece > 1).any()):
            raise JournalError(f"a record's tensor {key!r} has bytes that are no bool")
        items.append(Item(key, role, piece.view(dtype).view(shape)))
    return items


@lru_cache(maxsize=32)
def places(layout: bytes) -> tuple[Place, ...]:
    """Return what a layout says, checked; one that came before costs nothing.

    Raises:
        JournalError: anything that ``pack`` would not have written.
    """
    try:
        described = json.loads(layout)
        found = []
        at = 0
        for key, role, name, sizes in described:
            dtype = _DTYPES[name]
            fits = type(key) in (str, int) and type(role) is str and all(type(n) is int and n >= 0 for n in sizes)
            shape = torch.Size(sizes)
            start = at + -at % dtype.itemsize
            at = start + math.prod(sizes) * dtype.itemsize
            if not fits or at >= 1 << 62:
                raise ValueError(f"{key!r} {role!r} {sizes!r}")
            found.append(Place(key, role, dtype, shape, start, at))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, RuntimeError) as error:
        raise JournalError(f"a record's layout cannot be read: {error}") from None
    return tuple(found)


# ---------------------------------------------------------------- frames


def frame(record: Record, lsn: int) -> list[Any]:
    """Return the buffers of a record as they stand in a file.

    Raises:
        JournalError: it is one that ``read_frame`` would refuse.
    """
    head = json.dumps(record.head, separators=(",", ":"), allow_nan=False).encode()
    if len(head) + len(record.layout) > _MOST_WORDS:
        raise JournalError(f"a record with a head of {len(head) + len(record.layout)} bytes could not be read again")
    checksum = record.checksum
    if checksum is None:
        checksum = 0
        for buffer in record.payload:
            checksum = crc32(buffer, checksum)
    words = crc32(record.layout, crc32(head))
    nbytes = sum(len(buffer) for buffer in record.payload)
    numbers = (lsn, len(head), len(record.layout), nbytes, words, checksum)
    framed = _FRAME.pack(MAGIC, crc32(_FRAME.pack(MAGIC, 0, *numbers)[8:]), *numbers)
    return [framed, head, record.layout, *record.payload, END]


class Frame(NamedTuple):
    """What a frame says of the record behind it."""

    lsn: int
    head_nbytes: int
    layout_nbytes: int
    payload_nbytes: int
    words_checksum: int
    payload_checksum: int

    @property
    def words(self) -> int:
        """Bytes of head and layout, which stand right behind the frame."""
        return self.head_nbytes + self.layout_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole record, frame and end mark included."""
        return FRAME_NBYTES + self.words + self.payload_nbytes + len(END)


def read_frame(data: bytes) -> Frame:
    """Check and read the bytes of a frame.

    Raises:
        JournalError: damaged, or no frame.
    """
    magic, checksum, *numbers = _FRAME.unpack(data)
    if magic != MAGIC or checksum != crc32(data[8:]):
        raise JournalError("no frame of a record, or a damaged one")
    found = Frame(*numbers)
    if found.words > _MOST_WORDS:
        raise JournalError(f"a record with a head of {found.words} bytes")
    return found


def read_record(frame: Frame, words: bytes, payload: Any) -> Record:
    """Check and read what stands behind a frame.

    Args:
        frame: as it was read.
        words: the bytes of head and layout.
        payload: the bytes behind them, in memory that is aligned for every dtype.

    Raises:
        JournalError: damaged, or not what ``frame`` wrote.
    """
    if crc32(words) != frame.words_checksum or crc32(payload) != frame.payload_checksum:
        raise JournalError("a damaged record: its checksum does not fit")
    try:
        head = json.loads(words[: frame.head_nbytes])
    except (ValueError, RecursionError) as error:
        raise JournalError(f"a record's head is not JSON: {error}") from None
    if not isinstance(head, dict):
        raise JournalError("a record's head is no JSON object")
    return Record(head, words[frame.head_nbytes :], [payload])
