"""FolderLock: one process at a time has a folder open, and one that was taken for dead notices.

The kernel lets go of the lock however its holder ends. Where the lock itself cannot be trusted (some network
file systems), the epoch in its file tells a holder that another has come after it.
"""

from __future__ import annotations

import fcntl
import gc
import os
import time
import weakref

from tensorkv.errors import JournalError

from .folder import Folder

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The lock of a folder, taken until ``close`` or the end of the process.

    Args:
        folder: to be locked.
        wait_s: how long to wait for another holder; a process that was killed may take a moment to end.
        least_epoch: what the epoch exceeds, even if the lock's file was removed.

    Raises:
        OSError: the file cannot be opened or written.
        JournalError: another holder has not let go in time; the message has its process id. A holder in this process
            is not waited for.
    """

    NAME = "lock"
    _MOST_EPOCHS = 1 << 31

    def __init__(self, folder: Folder, wait_s: float, least_epoch: int = 0) -> None:
        self._folder = folder
        # A file object, which a store that is forgotten and never closed lets go of.
        self._file = open(folder.open(self.NAME, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)  # noqa: SIM115
        try:
            self._take(time.monotonic() + wait_s)
            self.epoch = max(self._read_epoch(), least_epoch) + 1
            # In place, so that whoever has the file open sees it.
            os.pwrite(self._file.fileno(), f"{self.epoch:016x} {os.getpid():>10}\n".encode(), 0)
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def check(self) -> None:
        """Raise JournalError if another process has opened the folder since, or the folder was removed."""
        if self._read_epoch() != self.epoch:
            raise JournalError(
                f"{self._folder.path}: another process has opened this store since, as if this one had died; "
                "nothing can be written from here; close this store"
            )
        if not os.fstat(self._file.fileno()).st_nlink:
            raise JournalError(
                f"{self._folder.path}: its lock file was removed, most likely with the whole folder; nothing can be "
                "written from here; close this store"
            )

    def close(self) -> None:
        """Let go."""
        _held.discard(self)
        self._file.close()

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._is_held_here():
                    # A store that nobody can reach any more may still be waiting for the garbage collector.
                    gc.collect()
                    if self._is_held_here():
                        raise JournalError(
                            f"{self._folder.path}: a store of this very process has this folder open; close it first "
                            "(kv.close(), or a with block), or give another path"
                        ) from None
                    continue
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                holder = os.pread(self._file.fileno(), 27, 17).decode("ascii", "replace").strip()
                raise JournalError(
                    f"{self._folder.path}: another store has this folder open (process {holder}); "
                    "close it, or give another path"
                ) from None

    def _is_held_here(self) -> bool:
        """Tell whether another lock of this process is on the same file."""
        mine = os.fstat(self._file.fileno())
        return any(os.path.samestat(mine, os.fstat(other._file.fileno())) for other in list(_held))

    def _read_epoch(self) -> int:
        text = os.pread(self._file.fileno(), 16, 0)
        try:
            epoch = int(text, 16) if text else 0
        except ValueError:
            epoch = -1
        if not 0 <= epoch < self._MOST_EPOCHS:
            raise JournalError(f"{self._folder / self.NAME}: not a lock of a store; remove it if no store is open")
        return epoch


def _let_go_in_child() -> None:
    # A forked data loader must not keep its parent's lock when that has died.
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go_in_child)
