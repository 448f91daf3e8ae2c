"""Files of records: written from buffers without a copy, read with nothing in them trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from tensorkv.errors import JournalError

from .folder import Folder
from .record import END, FRAME_NBYTES, Frame, Record, read_frame, read_record

# A call of the system takes at most 1024 buffers and 2 GiB.
_BUFFERS, _CALL_NBYTES = 512, 1 << 30


def write(descriptor: int, buffers: Sequence[Any], at: int) -> int:
    """Write buffers one after another; return where they end.

    Raises:
        OSError: some of the bytes may be written then.
    """
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    first = 0
    while first < len(left):
        call, nbytes = [], 0
        for buffer in left[first : first + _BUFFERS]:
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
    """The records of one file, in order.

    Args:
        folder: where the file is.
        name: of a regular file; links out of the folder are not followed.

    Raises:
        JournalError: it cannot be read.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self.file = folder / name
        self.is_torn = False
        self.record_nbytes = 0
        """Of the record given last."""
        try:
            self._descriptor = folder.open(name, os.O_RDONLY)
        except OSError as error:
            raise JournalError(f"{self.file}: cannot be read: {error}") from error
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def records(self) -> Iterator[tuple[int, Record]]:
        """Give lsn and record until the file ends, or only zeros follow, or a write ended early (``is_torn``).

        Raises:
            JournalError: damaged. Where the end of a record is there, its writer has finished it, and it may
                have been acknowledged: it is not left out.
        """
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise JournalError(f"{self.file}: not a regular file")
            self._size = status.st_size
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
            raise JournalError(f"{self.file}: cannot be read: {error}") from error

    def _record(self, at: int) -> tuple[int, Record, int] | None:
        head = at + FRAME_NBYTES
        if head > self._size:
            return None
        try:
            frame = self._frame(at)
            if frame is None or at + frame.nbytes > self._size:
                return None
            words, end = head + frame.words, at + frame.nbytes
            mark = bytes(self._bytes(end - len(END), end))
            if not mark[-1] and self._is_blank(end):
                return None
            record = read_record(frame, bytes(self._bytes(head, words)), self._bytes(words, end - len(END)))
            if mark != END:
                raise JournalError("a damaged record: its end does not fit")
            return frame.lsn, record, end
        except JournalError as error:
            raise JournalError(
                f"{self.file}: damaged at byte {at}: {error}; restore the folder from a copy, or cut the file off "
                "there and lose what was pushed since"
            ) from None

    def _frame(self, at: int) -> Frame | None:
        """Return the frame, None where the log ends: there, and behind what was not finished, are only zeros."""
        behind = at + FRAME_NBYTES
        try:
            return read_frame(bytes(self._bytes(at, behind)))
        except JournalError:
            if self._is_blank(behind):
                return None
            raise

    def _is_blank(self, at: int) -> bool:
        """Tell whether there are only zeros, or nothing, from here on."""
        step = 1 << 20
        pieces = ((start, min(start + step, self._size)) for start in range(at, self._size, step))
        return not any(np.frombuffer(self._bytes(*piece), np.uint8).any() for piece in pieces)

    def _bytes(self, start: int, stop: int) -> Any:
        # NumPy's memory is aligned for every dtype.
        room = np.empty(stop - start, np.uint8).data
        done = 0
        while done < len(room):
            count = os.preadv(self._descriptor, [room[done : done + _CALL_NBYTES]], start + done)
            if not count:
                raise JournalError("it became shorter while it was read")
            done += count
        return room
