"""Memory that the processes of one host share. It has no name, so nothing can be left behind.

The kernel frees a segment when the last process that has mapped it is gone, however it went. Others open it
through /proc while its maker holds it open, which takes one user and one PID namespace. The size of /dev/shm
does not matter.

A process ID and a descriptor identify nothing: another process may have the same ones, in another PID namespace or
later. So a segment ends with a random token, which is part of the name that its maker passes on, and nothing is
mapped, read or written before the token has been found.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
from collections.abc import Sequence

import torch

from tensorkv import compiled
from tensorkv.compiled import _shared

LINE = 64
_TOKEN_NBYTES = 16

# struct flock of Linux on 64-bit processors: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


def why_not_shared() -> str:
    """Return what shared memory lacks here, "" if it has all: the compiled part, memfd and /proc.

    >>> why_not_shared()
    ''
    """
    if _shared is None:
        return f"tensorkv is {compiled.describe()}"
    if not hasattr(os, "memfd_create"):
        return "this system has no memfd_create"
    return "" if os.path.isdir("/proc/self/fd") else "this system has no /proc/self/fd"


def can_share() -> bool:
    """Return whether processes can share memory here."""
    return not why_not_shared()


class Segment:
    """Zeroed memory, all of which is there from the beginning.

    Args:
        nbytes: to make a new one.
        name: to open another process's, whose ``nbytes`` are the same.
        private: make memory of this process alone.

    Raises:
        OSError: no memory, or the other process's cannot be opened.
    """

    def __init__(self, nbytes: int, name: str | None = None, *, private: bool = False) -> None:
        self.nbytes = max(nbytes, LINE)
        self.words: range = range(0)
        is_new = name is None
        if private:
            self.descriptor = -1
            self._bytes = torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu")
            self.address = self._bytes.data_ptr()
            return
        if name is None:
            if self.nbytes > _available_nbytes():
                # The kernel would overcommit, and kill a process when the memory is used.
                raise OSError(errno.ENOMEM, f"no {self.nbytes:,} bytes of memory")
            self.descriptor = os.memfd_create("tensorkv", os.MFD_CLOEXEC)
        else:
            self.descriptor = _open(name, self.nbytes)
        try:
            if name is None:
                token = secrets.token_bytes(_TOKEN_NBYTES)
                # What is missing must be missed now, not as a bus error when it is touched.
                os.posix_fallocate(self.descriptor, 0, self.nbytes + _TOKEN_NBYTES)
                os.pwrite(self.descriptor, token, self.nbytes)
                # Not os.getpid(): /proc may be that of another PID namespace.
                name = f"/proc/{os.readlink('/proc/self')}/fd/{self.descriptor}#{token.hex()}"
            self._bytes = _map(self.descriptor, self.nbytes)
        except BaseException:
            if is_new:
                # torch keeps a descriptor of its own when it cannot map the file.
                os.ftruncate(self.descriptor, 0)
            self.close_file()
            raise
        self.name = name
        self.memory = memoryview(self._bytes.numpy().data)
        self.address = self._bytes.data_ptr()

    def set_words(self, count: int) -> None:
        """Say how many words the segment begins with."""
        self.words = range(self.address, self.address + count * LINE, LINE)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in this memory, at an offset that is a multiple of ``LINE``."""
        size = torch.Size(shape)
        return self.bytes_at(offset, size.numel() * dtype.itemsize).view(dtype).view(size)

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return so many bytes of this memory."""
        return self._bytes.narrow(0, offset, nbytes)

    def close_file(self) -> None:
        """Close the file: the memory stays, and no other process can open it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    # ------------------------------------------------------------ liveness of processes

    def mark_alive(self, rank: int) -> None:
        """Hold a lock that the kernel releases when this process ends; forked children do not hold it."""
        import fcntl

        fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def is_alive(self, rank: int) -> bool:
        """Return whether another process holds the lock of this rank."""
        import fcntl

        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
        kind: int = struct.unpack(_FLOCK, fcntl.fcntl(self.descriptor, fcntl.F_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK


def _open(name: str, nbytes: int) -> int:
    """Return a descriptor of another process's segment.

    Raises:
        OSError: it cannot be opened, or it is not the segment that its maker has named.
    """
    path, _, token = name.partition("#")
    # Opening a terminal or a device that happens to be there would have effects.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not the segment that was shared")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    # A byte more than there should be, to see where the file ends.
    if os.pread(descriptor, _TOKEN_NBYTES + 1, nbytes).hex() != token:
        os.close(descriptor)
        raise OSError(f"{path} is not the segment that was shared")
    return descriptor


def _map(descriptor: int, nbytes: int) -> torch.Tensor:
    # Not mmap.mmap, which keeps a descriptor for as long as the memory is used. This comes before any lock,
    # since to close a descriptor of a file ends the locks that this process has on it.
    try:
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, nbytes)
    except RuntimeError as error:
        raise OSError(f"memory cannot be shared: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)  # type: ignore[arg-type]


def _available_nbytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def aligned(nbytes: int) -> int:
    """Return the next multiple of ``LINE``."""
    return -(-nbytes // LINE) * LINE
