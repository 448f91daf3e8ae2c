"""Spares: files that a journal has done with, written over instead of new ones.

Memory for the pages of a new file costs several times what the copy into pages that are there does. A spare log is
all zeros, which is what readers take for the end of a log; a spare snapshot is cut to its length before it counts.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from .folder import Folder

NAME = re.compile(r"spare-[0-9a-f]{8}-(log|snapshot)\.tmp")
_ZEROS = bytes(1 << 20)


class Spares:
    """At most one log and one snapshot of one writer.

    Args:
        folder: of the journal.
        epoch: of the writer, so that none takes another's.
    """

    def __init__(self, folder: Folder, epoch: int) -> None:
        self._log = f"spare-{epoch:08x}-log.tmp"
        self._snapshot = f"spare-{epoch:08x}-snapshot.tmp"
        self._folder = folder
        self._ready: set[str] = set()

    def keep_log(self, name: str) -> None:
        """Make a spare of a log that nobody reads any more.

        Raises:
            OSError: it is not one now; the file may be left under its new name.
        """
        self._ready.discard(self._log)
        self._folder.replace(name, self._log)
        descriptor = self._folder.open(self._log, os.O_WRONLY)
        try:
            at, end = 0, os.fstat(descriptor).st_size
            while at < end:
                at += os.pwrite(descriptor, _ZEROS[: end - at], at)
        finally:
            os.close(descriptor)
        self._ready.add(self._log)

    def keep_snapshot(self, name: str) -> None:
        """Make a spare of a snapshot that nobody reads any more.

        Raises:
            OSError: it is not one now.
        """
        self._folder.replace(name, self._snapshot)
        self._ready.add(self._snapshot)

    def remove(self) -> None:
        """Give their room back, as far as can be."""
        for file in (self._log, self._snapshot):
            self._ready.discard(file)
            with suppress(OSError):
                self._folder.remove(file)

    def give_log(self, name: str) -> bool:
        """Put the spare log, all zeros, where a new log is to be; False: there is none."""
        return self._give(self._log, name)

    def give_snapshot(self, name: str) -> bool:
        """Put the spare snapshot where a new one is to be written; False: there is none."""
        return self._give(self._snapshot, name)

    def _give(self, spare: str, name: str) -> bool:
        if spare not in self._ready:
            return False
        self._ready.discard(spare)
        try:
            self._folder.replace(spare, name)
        except OSError:
            # Without it, everything works as it did.
            with suppress(OSError):
                self._folder.remove(spare)
            return False
        return True
