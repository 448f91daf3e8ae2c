"""FolderLock: one process at a time has a folder open, and a holder that was taken for dead notices it.

The kernel releases the lock however its holder ends. Where the lock itself cannot be relied on (some network file
systems), the epoch in the lock's file serves as a fencing token: each opening raises it, and a holder that reads a
higher epoch than its own writes nothing any more.
"""

from __future__ import annotations

import fcntl
import gc
import os
import time
import weakref

from tensorkv.errors import StorageError

from .folder import Folder

# Of a lock's file, which anything could have written.
_MOST_NBYTES = 256

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The lock of a folder, taken until ``close`` or the end of the process.

    Args:
        folder: to be locked.
        wait_s: how long to wait for another holder; a process that was killed may take a moment to end.
        least_epoch: the new epoch is higher, even if the lock's file was removed.
        stamp: written beside the epoch, by which a process that comes back knows the folder.

    Raises:
        OSError: the file cannot be opened or written.
        StorageError: another holder has not released it in time; the message has its process id. A holder in this
            process is not waited for.
    """

    NAME = "lock"
    _MAX_EPOCHS = 1 << 31

    def __init__(self, folder: Folder, wait_s: float, least_epoch: int = 0, stamp: str = "") -> None:
        self._folder = folder
        # A file object, which is closed when a store that was not closed is garbage collected.
        self._file = open(folder.open(self.NAME, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)  # noqa: SIM115
        try:
            self._take(time.monotonic() + wait_s)
            self.epoch = max(self._read_epoch(), least_epoch) + 1
            # In place, so that other processes that have the file open see it.
            line = f"{self.epoch:016x} {os.getpid():>10}\n{stamp}\n".encode()
            os.pwrite(self._file.fileno(), line, 0)
            os.ftruncate(self._file.fileno(), len(line))
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def check(self) -> None:
        """Raise StorageError if another process has opened the folder since, or the folder was removed."""
        if self._read_epoch() != self.epoch:
            raise StorageError(
                f"{self._folder.path}: another process has opened this store, taking this one for dead; "
                "nothing can be written from here; close this store"
            )
        if not os.fstat(self._file.fileno()).st_nlink:
            raise StorageError(
                f"{self._folder.path}: its lock file was removed, most likely with the whole folder; nothing can be "
                "written from here; close this store"
            )

    @property
    def is_superseded(self) -> bool:
        """Whether another process has opened the folder since; False if its file cannot be read, or is closed."""
        try:
            return self._read_epoch() > self.epoch
        except (OSError, ValueError, StorageError):
            return False

    def close(self) -> None:
        """Release the lock."""
        _held.discard(self)
        self._file.close()

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._is_held_here():
                    # A store that is not referenced any more may still be waiting for the garbage collector.
                    gc.collect()
                    if self._is_held_here():
                        raise StorageError(
                            f"{self._folder.path}: a store of this process has this folder open; close it first "
                            "(kv.close(), or a with block), or give another path"
                        ) from None
                    continue
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                holder = os.pread(self._file.fileno(), 10, 17).decode("ascii", "replace").strip()
                raise StorageError(
                    f"{self._folder.path}: another store has this folder open (process {holder}); "
                    "close it, or give another path"
                ) from None

    def _is_held_here(self) -> bool:
        """Return whether another lock of this process is on the same file."""
        mine = os.fstat(self._file.fileno())
        return any(os.path.samestat(mine, os.fstat(other._file.fileno())) for other in list(_held))

    def _read_epoch(self) -> int:
        text = os.pread(self._file.fileno(), 16, 0)
        try:
            # Zeros are left of a file that a loss of power has caught before its data was on the disk.
            epoch = int(text, 16) if text.strip(b"\0") else 0
        except ValueError:
            epoch = -1
        if not 0 <= epoch < self._MAX_EPOCHS:
            raise StorageError(
                f"{self._folder / self.NAME}: not the lock file of a store; remove it if no store is open"
            )
        return epoch


def read_stamp(path: str) -> str | None:
    """Return the stamp that a folder got when it was opened last; None: it was not opened yet, or is not there."""
    try:
        with open(os.path.join(path, FolderLock.NAME), encoding="ascii") as file:
            return file.read(_MOST_NBYTES).partition("\n")[2].strip()
    except (OSError, ValueError):
        return None


def is_locked(path: str) -> bool:
    """Return whether a process has a folder open; False where there is no folder."""
    try:
        file = os.open(os.path.join(path, FolderLock.NAME), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _release_in_child() -> None:
    # A forked data loader must not keep the lock of its parent after the parent has died.
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_release_in_child)
