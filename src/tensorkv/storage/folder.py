"""Folder: a directory that is held open. Its files are reached through it, even if its path leads elsewhere by now."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

# Neither follow a link out of the folder nor wait on a pipe.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Folder:
    """A directory, held by a descriptor until ``close``.

    Files are named relative to the descriptor, so a rename of the directory, a mount over its path or a change of the
    working directory leads nowhere else.

    Args:
        path: of a directory that exists; shown in messages.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Also when the owner is garbage-collected without ``close``.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._close.atexit = False

    def open(self, name: str, flags: int) -> int:
        """Open a file and return its descriptor; new files are readable by their owner only."""
        return os.open(name, flags | _FLAGS, 0o600, dir_fd=self._descriptor)

    def names(self) -> list[str]:
        """List the files."""
        # Listing through the descriptor itself would move the position that all threads share.
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            return os.listdir(own)
        finally:
            os.close(own)

    def replace(self, source: str, target: str) -> None:
        """Give a file another name, in place of the file that has it."""
        os.replace(source, target, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def sync(self) -> None:
        """Make the names in it safe from a loss of power."""
        os.fsync(self._descriptor)

    def sync_file(self, name: str) -> None:
        """Make the data of a file safe from a loss of power, whoever has written it."""
        descriptor = self.open(name, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the directory."""
        self._close()

    def __truediv__(self, name: str) -> Path:
        """Return a path for messages."""
        return self.path / name


def sync(path: Path) -> None:
    """Make the names in a directory safe from a loss of power."""
    folder = Folder(path)
    try:
        folder.sync()
    finally:
        folder.close()
