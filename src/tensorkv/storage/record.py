"""Records: the unit of a write-ahead log and of its snapshots, as bytes and in files.

A record is a JSON head and some packed tensors, framed with lengths and checksums. Files are written from buffers
without a copy, and nothing that is read is trusted. docs/wal-format.md has the format.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from tensorkv.arrays.packing import Item, LayoutError, pack, unpack
from tensorkv.errors import StorageError

from .folder import Folder

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # not built for this processor: zlib gives the same values at a fraction of the speed
    from zlib import crc32 as crc32

MAGIC = b"tkv1"
_ANY_MAGIC = re.compile(rb"tkv\d")
# Magic, checksum of the rest of the frame, lsn, bytes of head, layout and payload, checksum of head and layout,
# checksum of the payload.
_FRAME = struct.Struct("<4sIQIIQII")
FRAME_NBYTES = _FRAME.size
# After every record: an unfinished write leaves zeros here, or nothing.
END = b"end\n"
# So much head and layout is read into memory at most, whatever a file says, and so no more is written.
_MAX_HEAD_NBYTES = 1 << 28
# One call of the system takes at most 1024 buffers and 2 GiB.
_CALL_BUFFERS, _CALL_NBYTES = 512, 1 << 30
RESTORE = "restore the folder from a copy"


@dataclass(frozen=True, slots=True)
class Record:
    """Plain data and packed tensors, which are written in one piece.

    Args:
        head: plain data, for JSON.
        layout: of the payload, see ``packing``.
        payload: the bytes of the tensors, in one or more buffers.
    """

    head: dict[str, Any]
    layout: bytes = b"[]"
    payload: Sequence[Any] = ()

    @classmethod
    def pack(cls, head: dict[str, Any], items: Sequence[Item]) -> Self:
        """Return a record of tensors, which shares their memory where they are contiguous on the CPU."""
        return cls(head, *pack(items))

    def items(self) -> list[Item]:
        """Return the tensors of a record that was read; they share its memory.

        Raises:
            StorageError: the layout does not match the payload.
        """
        (payload,) = self.payload
        try:
            return unpack(self.layout, payload)
        except LayoutError as error:
            raise StorageError(f"a record's tensors cannot be read: {error}") from None


# ---------------------------------------------------------------- bytes


def frame(record: Record, lsn: int) -> list[Any]:
    """Return the bytes of a record in a file, as a list of buffers.

    Raises:
        StorageError: the head is longer than ``read_frame`` accepts.
    """
    head = json.dumps(record.head, separators=(",", ":"), allow_nan=False).encode()
    if len(head) + len(record.layout) > _MAX_HEAD_NBYTES:
        raise StorageError(
            f"a record's head and layout have {len(head) + len(record.layout)} bytes; "
            f"at most {_MAX_HEAD_NBYTES} can be read again"
        )
    payload_checksum = nbytes = 0
    for buffer in record.payload:
        payload_checksum = crc32(buffer, payload_checksum)
        nbytes += len(buffer)
    head_checksum = crc32(record.layout, crc32(head))
    numbers = (lsn, len(head), len(record.layout), nbytes, head_checksum, payload_checksum)
    framed = _FRAME.pack(MAGIC, crc32(_FRAME.pack(MAGIC, 0, *numbers)[8:]), *numbers)
    return [framed, head, record.layout, *record.payload, END]


class Frame(NamedTuple):
    """The numbers at the beginning of a record."""

    lsn: int
    json_nbytes: int
    layout_nbytes: int
    payload_nbytes: int
    head_checksum: int
    payload_checksum: int

    @property
    def head_nbytes(self) -> int:
        """Bytes of JSON head and layout, which follow the frame."""
        return self.json_nbytes + self.layout_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole record, frame and end mark included."""
        return FRAME_NBYTES + self.head_nbytes + self.payload_nbytes + len(END)


def read_frame(data: bytes) -> Frame:
    """Check and decode the bytes of a frame.

    Raises:
        StorageError: damaged, or not a frame.
    """
    magic, checksum, *numbers = _FRAME.unpack(data)
    if magic != MAGIC or checksum != crc32(data[8:]):
        raise StorageError("not the frame of a record, or a damaged one")
    found = Frame(*numbers)
    if found.head_nbytes > _MAX_HEAD_NBYTES:
        raise StorageError(f"a record with a head of {found.head_nbytes} bytes, expected at most {_MAX_HEAD_NBYTES}")
    return found


def read_record(frame: Frame, head: bytes, payload: Any) -> Record:
    """Check and decode what follows a frame.

    Args:
        frame: as it was read.
        head: the bytes of JSON head and layout.
        payload: the bytes after them, in memory that is aligned for every dtype.

    Raises:
        StorageError: damaged, or not what ``frame`` writes.
    """
    if crc32(head) != frame.head_checksum or crc32(payload) != frame.payload_checksum:
        raise StorageError("a damaged record: its checksum does not match")
    try:
        plain = json.loads(head[: frame.json_nbytes])
    except (ValueError, RecursionError) as error:
        raise StorageError(f"a record's head is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise StorageError(f"a record's head is a JSON {type(plain).__name__}, expected an object")
    return Record(plain, head[frame.json_nbytes :], [payload])


# ---------------------------------------------------------------- files


def write(descriptor: int, buffers: Sequence[Any], at: int) -> int:
    """Write buffers one after another; return where they end.

    Raises:
        OSError: some of the bytes may be written then.
    """
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    first = 0
    while first < len(left):
        call, nbytes = [], 0
        for buffer in left[first : first + _CALL_BUFFERS]:
            call.append(buffer[: _CALL_NBYTES - nbytes])
            nbytes += len(call[-1])
            if nbytes == _CALL_NBYTES:
                break
        written = os.pwritev(descriptor, call, at)
        at += written
        while first < len(left) and written >= len(left[first]):
            written -= len(left[first])
            first += 1
        if written:
            left[first] = left[first][written:]
    return at


class Reader:
    """Reads the records of one file, in order.

    Args:
        folder: where the file is.
        name: of a regular file; links out of the folder are not followed.
        remedy: what can be done where it is damaged, for the message.

    Raises:
        StorageError: the file cannot be read.
    """

    def __init__(self, folder: Folder, name: str, remedy: str = RESTORE) -> None:
        self.file = folder / name
        self._remedy = remedy
        self.is_torn = False
        self.record_nbytes = 0
        """Bytes of the record that was yielded last."""
        try:
            self._descriptor = folder.open(name, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{self.file}: cannot be read: {error}") from error
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def records(self) -> Iterator[tuple[int, Record]]:
        """Yield lsn and record up to the end of the log: the end of the file, zeros, or an unfinished write.

        An unfinished write sets ``is_torn``; its record was never acknowledged.

        Raises:
            StorageError: damaged. A record whose end mark is there was written as a whole and may have been
                acknowledged, so it is not skipped.
        """
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{self.file}: not a regular file")
            self._size = status.st_size
            self._check_version()
            at = 0
            while at < self._size:
                found = self._record(at)
                if found is None:
                    self.is_torn = True
                    return
                lsn, record, end = found
                self.record_nbytes, at = end - at, end
                yield lsn, record
        except OSError as error:
            raise StorageError(f"{self.file}: cannot be read: {error}") from error

    def _check_version(self) -> None:
        magic = bytes(self._bytes(0, min(len(MAGIC), self._size)))
        if magic != MAGIC and _ANY_MAGIC.fullmatch(magic):
            raise StorageError(
                f"{self.file}: of another version, {magic.decode()}; this one reads {MAGIC.decode()}. Open the folder "
                "with a version of tensorkv that reads it, and save a checkpoint there to pass the values on"
            )

    def _record(self, at: int) -> tuple[int, Record, int] | None:
        start = at + FRAME_NBYTES
        if start > self._size:
            return None
        try:
            frame = self._frame(at)
            if frame is None or at + frame.nbytes > self._size:
                return None
            payload, end = start + frame.head_nbytes, at + frame.nbytes
            mark = bytes(self._bytes(end - len(END), end))
            if not mark[-1] and self._is_blank(end):
                return None
            record = read_record(frame, bytes(self._bytes(start, payload)), self._bytes(payload, end - len(END)))
            if mark != END:
                raise StorageError("a damaged record: its end mark does not match")
            return frame.lsn, record, end
        except StorageError as error:
            raise StorageError(f"{self.file}: damaged at byte {at}: {error}; {self._remedy}") from None

    def _frame(self, at: int) -> Frame | None:
        """Return the frame; None where the log ends, with zeros or with an unfinished frame followed by zeros."""
        end = at + FRAME_NBYTES
        try:
            return read_frame(bytes(self._bytes(at, end)))
        except StorageError:
            if self._is_blank(end):
                return None
            raise

    def _is_blank(self, at: int) -> bool:
        """Return whether there are only zeros, or nothing, from here on."""
        step = 1 << 20
        pieces = ((start, min(start + step, self._size)) for start in range(at, self._size, step))
        return not any(np.frombuffer(self._bytes(*piece), np.uint8).any() for piece in pieces)

    def _bytes(self, start: int, stop: int) -> Any:
        # NumPy's memory is aligned for every dtype.
        memory = np.empty(stop - start, np.uint8).data
        done = 0
        while done < len(memory):
            count = os.preadv(self._descriptor, [memory[done : done + _CALL_NBYTES]], start + done)
            if not count:
                raise StorageError("the file became shorter while it was read")
            done += count
        return memory
