"""LogFile: the log that a journal writes, one file at a time, cut back to its last whole record where a write fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import record_file
from .folder import Folder
from .spares import Spares


class LogFile:
    """What one process writes behind a snapshot.

    Args:
        folder: of the journal.
        to_disk: whether a write returns when the disk has it.
        spares: files to write over; None: every file is new.
    """

    def __init__(self, folder: Folder, *, to_disk: bool, spares: Spares | None) -> None:
        self._folder, self._to_disk, self._spares = folder, to_disk, spares
        self._file: int | None = None
        self._name = ""
        self.end = 0
        self.broken: str | None = None
        """Why nothing can be written any more."""

    def __del__(self) -> None:
        # Of a store that is forgotten and never closed.
        if self._file is not None:
            os.close(self._file)

    def start(self, name: str) -> None:
        """Go on in another file."""
        if name == self._name:
            # It has no record yet.
            return
        descriptor: int | None = None
        try:
            flags = os.O_RDWR
            if self._spares is None or not self._spares.give_log(name):
                flags |= os.O_CREAT | os.O_TRUNC
            descriptor = self._folder.open(name, flags)
            if self._to_disk:
                self._folder.sync()
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            # The log before goes on, and readers would not look in it for what comes behind where this one begins.
            if not self._is_gone(name):
                self.broken = "a log was begun and could not be taken back"
            raise
        old, self._file, self._name, self.end = self._file, descriptor, name, 0
        if old is not None:
            os.close(old)

    def write(self, buffers: Sequence[Any]) -> None:
        """Write a record behind the others; where that fails, it is taken back."""
        end = self.end
        try:
            self.end = record_file.write(self._descriptor(), buffers, end)
            if self._to_disk:
                self._sync()
        except BaseException:
            self.cut(end)
            raise

    def cut(self, end: int) -> None:
        """Take back what stands behind."""
        try:
            os.ftruncate(self._descriptor(), end)
            self.end = end
            if self._to_disk and self.broken is None:
                self._sync()
        except OSError as error:
            self.broken = f"a record could not be taken back ({error})"

    def trim(self) -> None:
        """Cut off the zeros of a file that was a spare, as far as can be."""
        if self._file is not None and self.broken is None:
            with suppress(OSError):
                os.ftruncate(self._file, self.end)

    def close(self) -> None:
        """Write nothing any more."""
        file, self._file, self.broken = self._file, None, "it was closed"
        if file is not None:
            os.close(file)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._descriptor())
        except OSError as error:
            # What the system could not write once it may forget: another try would succeed and mean nothing.
            self.broken = f"the disk failed ({error})"
            raise

    def _descriptor(self) -> int:
        if self._file is None:
            raise OSError("the log is not open")
        return self._file

    def _is_gone(self, name: str) -> bool:
        try:
            self._folder.remove(name)
        except OSError:
            return False
        return True
