"""Spares: files that a journal has done with, written over instead of new ones.

Memory for the pages of a new file costs several times what the copy into pages that are there does. A spare log is
all zeros, which is what readers take for the end of a log; a spare snapshot is cut to its length before it counts.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

NAME = re.compile(r"spare-[0-9a-f]{8}-(log|snapshot)\.tmp")
_ZEROS = bytes(1 << 20)


class Spares:
    """At most one log and one snapshot of one writer.

    Args:
        folder: of the journal.
        epoch: of the writer, so that none takes another's.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        self._log = folder / f"spare-{epoch:08x}-log.tmp"
        self._snapshot = folder / f"spare-{epoch:08x}-snapshot.tmp"
        self._folder = folder
        self._ready: set[Path] = set()

    def keep_log(self, name: str) -> None:
        """Make a spare of a log that nobody reads any more.

        Raises:
            OSError: it is not one now; the file may be left under its new name.
        """
        self._ready.discard(self._log)
        os.replace(self._folder / name, self._log)
        descriptor = os.open(self._log, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
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
        os.replace(self._folder / name, self._snapshot)
        self._ready.add(self._snapshot)

    def remove(self) -> None:
        """Give their room back, as far as can be."""
        for file in (self._log, self._snapshot):
            self._ready.discard(file)
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def give_log(self, file: Path) -> bool:
        """Put the spare log, all zeros, where a new log is to be; False: there is none."""
        return self._give(self._log, file)

    def give_snapshot(self, file: Path) -> bool:
        """Put the spare snapshot where a new one is to be written; False: there is none."""
        return self._give(self._snapshot, file)

    def _give(self, spare: Path, file: Path) -> bool:
        if spare not in self._ready:
            return False
        self._ready.discard(spare)
        try:
            os.replace(spare, file)
        except OSError:
            # Without it, everything works as it did.
            with suppress(OSError):
                spare.unlink(missing_ok=True)
            return False
        return True
