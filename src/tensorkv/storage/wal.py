"""Write-ahead log (WAL): a folder with a snapshot of a shard and log segments of what has changed since.

``append`` returns when the record is as safe as the durability asks for. docs/wal-format.md has the format of the
folder. The log does not know what records mean.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from tensorkv.errors import ArgumentError, StorageError, show

from . import record
from .folder import Folder, sync
from .lock import FolderLock
from .record import Record, frame

Durability = Literal["process", "disk"]

SNAPSHOT_NAME = re.compile(r"snapshot-([0-9a-f]{16})\.tkv")
SEGMENT_NAME = re.compile(r"log-([0-9a-f]{16})-([0-9a-f]{8})\.tkv")
_UNFINISHED_NAME = re.compile(r"snapshot-[0-9a-f]{16}\.tmp")
# By default the log grows to twice the state, and at most to this; a short log is not worth a snapshot.
MAX_LOG_NBYTES = 1 << 30
_MIN_LOG_NBYTES = 1 << 27
# Every opening begins a segment; so many are worth a snapshot.
_MAX_SEGMENTS = 16

_logger = logging.getLogger(__name__)


class WriteAheadLog:
    """The folder of one durable shard, open for one process.

    Args:
        path: of the folder, which is created if it does not exist.
        durability: ``"process"``: an appended record survives the end of this process, however it ends;
            ``"disk"``: that of the machine as well.
        log_nbytes: how long the log may grow before a snapshot is due (None: twice the state, at most 1 GiB).
        wait_s: how long to wait for another process that has the folder open.

    Raises:
        ArgumentError: an option out of range.
        StorageError: another process has the folder open, it holds something else, or it cannot be written.
    """

    def __init__(
        self, path: str, durability: Durability, log_nbytes: int | None = None, wait_s: float = 10.0, stamp: str = ""
    ) -> None:
        if not isinstance(durability, str) or durability not in ("process", "disk"):
            raise ArgumentError(f'durability is {show(durability)}; with a path, expected "process" or "disk"')
        if log_nbytes is not None and (type(log_nbytes) is not int or log_nbytes < 1):
            raise ArgumentError(f"log_nbytes is {show(log_nbytes)}; expected a number of bytes, or None")
        self.path = path
        self._durability = durability
        self._log_nbytes = log_nbytes
        self._max_nbytes = log_nbytes or _MIN_LOG_NBYTES
        self.lsn = 0
        """Number of the last record (log sequence number)."""
        self.nbytes = 0
        """Bytes of log written since the last snapshot."""
        self._undo_end = self._undo_nbytes = 0
        # After a snapshot that failed, the next is due when the log has become this long.
        self._retry_nbytes = 0
        self._segments = 0
        self._finishing: threading.Thread | None = None
        self._is_renamed = False
        self.counts = {"records": 0, "nbytes": 0, "snapshots": 0, "failed_snapshots": 0}
        self._folder = self._open_folder()
        try:
            self._check_foreign()
            with self._explaining("lock the folder"):
                # Segments that begin with the same record are sorted by epoch.
                epochs = [epoch for _, epoch, _ in _files(self._folder)[1]]
                self._lock = FolderLock(self._folder, wait_s, max(epochs, default=0), stamp)
        except BaseException:
            self._folder.close()
            raise
        self._segment = SegmentWriter(self._folder, to_disk=durability == "disk")

    # ------------------------------------------------------------ reading

    def read(self) -> Iterator[tuple[Record, bool]]:
        """Yield every record that counts, oldest first, and whether it is part of the snapshot.

        Raises:
            StorageError: a damaged or missing file. A segment that ends inside a record was cut off when its
                writer ended: that record was never acknowledged, and is not yielded.
        """
        self.wait_for_snapshot()
        reader = LogReader(self._folder)
        self.lsn, self.nbytes, self._segments = reader.lsn, 0, reader.num_segments
        for each in reader.records():
            self.lsn, self.nbytes = reader.lsn, reader.nbytes
            yield each

    # ------------------------------------------------------------ writing

    def begin(self) -> None:
        """Begin a segment of this process's own after what was read.

        Raises:
            StorageError: it cannot be written.
        """
        with self._explaining("begin a log segment"):
            self._tidy()
            if self._durability == "disk":
                # Writers that were killed, or had another durability, may not have synced what counts from now on.
                for _, _, name in _files(self._folder)[1]:
                    self._folder.sync_file(name)
            self._begin_segment()

    @property
    def is_superseded(self) -> bool:
        """Whether another process has opened the folder since."""
        return self._lock.is_superseded

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be appended any more."""
        return self._segment.broken is not None

    def append(self, each: Record) -> None:
        """Append a record; it counts when this returns.

        Raises:
            StorageError: it does not count. If its bytes could not be removed, or the folder does not belong to this
                process any more, nothing can be appended from now on.
        """
        self._check_writable()
        with self._explaining("append to the log"):
            self._lock.check()
            end = self._segment.end
            self._segment.write(frame(each, self.lsn + 1))
            self._check_holder()
        written = self._segment.end - end
        self._undo_end, self._undo_nbytes = end, written
        self.lsn, self.nbytes = self.lsn + 1, self.nbytes + written
        self.counts["records"] += 1
        self.counts["nbytes"] += written

    def undo(self) -> None:
        """Remove the record that was appended last.

        Raises:
            StorageError: it cannot be removed, and counts; nothing can be appended from now on.
        """
        with self._explaining("remove a record"):
            self._check_holder()
            self._segment.truncate(self._undo_end)
        if self._segment.broken is not None:
            raise StorageError(
                f"{self.path}: a record could not be removed; it will be applied when the store is opened"
            )
        self.lsn, self.nbytes = self.lsn - 1, self.nbytes - self._undo_nbytes

    def is_due(self, state_nbytes: Callable[[], int]) -> bool:
        """Return whether the log has grown so long that a snapshot should be made.

        Args:
            state_nbytes: returns the bytes that a snapshot would have; called rarely, since it looks at every key.
        """
        if self._segment.broken is not None or self.nbytes < self._retry_nbytes:
            return False
        if self._finishing is not None and self._finishing.is_alive() and self.nbytes <= 2 * self._max_nbytes:
            # Pushes do not wait for the disk until the log is twice as long as it should be.
            return False
        if self.nbytes > self._max_nbytes and self._log_nbytes is None:
            self._max_nbytes = max(_MIN_LOG_NBYTES, min(MAX_LOG_NBYTES, 2 * state_nbytes()))
        return self.nbytes > self._max_nbytes or self._segments > _MAX_SEGMENTS

    def snapshot(self, records: Iterable[Record]) -> bool:
        """Replace snapshot and log by a new snapshot; if that fails, the old ones stay in force.

        Args:
            records: the whole state; the verb of the last one is ``"end"``.

        Returns:
            Whether it was made; a disk that has no room for a snapshot may have room for the log.

        Raises:
            StorageError: it was renamed, and the disk may lose the new name; nothing can be appended from now on.
        """
        # An earlier snapshot that is still being finished is not this one.
        self.wait_for_snapshot()
        made, self._is_renamed = self.counts["snapshots"], False
        self.begin_snapshot(records)
        self.wait_for_snapshot()
        is_made = self.counts["snapshots"] > made
        if self._is_renamed and not is_made:
            self._segment.broken = "the disk failed, and a snapshot may count or not"
            self._check_writable()
        return is_made

    def begin_snapshot(self, records: Iterable[Record]) -> None:
        """Do ``snapshot``, but wait for the disk in a thread, while the next segment is written.

        Until the snapshot is on disk, the old snapshot and all segments are in force.
        """
        self.wait_for_snapshot()
        self._check_writable()
        temporary = f"snapshot-{self.lsn:016x}.tmp"
        try:
            with self._explaining("make a snapshot"):
                self._lock.check()
                descriptor = self._write_snapshot(temporary, records)
                try:
                    self._begin_segment()
                except BaseException:
                    os.close(descriptor)
                    raise
        except BaseException as error:
            self._abandon_snapshot(temporary, error)
            if not isinstance(error, Exception):
                raise
            return
        self._retry_nbytes = self.nbytes = 0
        finishing = threading.Thread(target=self._finish_snapshot, args=(temporary, descriptor, self.lsn), daemon=True)
        try:
            finishing.start()
        except RuntimeError:
            # No thread can be started while the interpreter ends.
            self._finish_snapshot(temporary, descriptor, self.lsn)
        else:
            self._finishing = finishing

    def wait_for_snapshot(self) -> None:
        """Wait for the thread that finishes a snapshot."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def _write_snapshot(self, temporary: str, records: Iterable[Record]) -> int:
        """Write a snapshot that is not in force yet; return its descriptor."""
        self._folder.remove(temporary)
        descriptor = self._folder.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            end = 0
            for each in records:
                end = record.write(descriptor, frame(each, self.lsn), end)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _finish_snapshot(self, temporary: str, descriptor: int, lsn: int) -> None:
        try:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._lock.check()
            self._folder.replace(temporary, temporary.replace(".tmp", ".tkv"))
            self._is_renamed = True
            self._folder.sync()
            self.counts["snapshots"] += 1
            self._segments = 1
        except BaseException as error:
            self._abandon_snapshot(temporary, error)
            return
        try:
            self._remove_replaced(lsn)
        except BaseException as error:
            _logger.warning("%s: old files could not be removed: %s", self.path, error)

    def _abandon_snapshot(self, temporary: str, error: BaseException) -> None:
        """Remove a snapshot that failed; the old one stays in force."""
        with suppress(OSError):
            self._folder.remove(temporary)
        self.counts["failed_snapshots"] += 1
        # The next attempt is not at the next record, which would most likely fail as well.
        self._retry_nbytes = self.nbytes + max(self.nbytes, self._max_nbytes) // 4
        _logger.warning("%s: no snapshot, the log goes on: %s", self.path, error)

    def _tidy(self) -> None:
        """Remove files that ``read`` skips, left by processes that ended before they could remove them."""
        snapshots, segments = _files(self._folder)
        needed = _first_needed(snapshots, segments)
        old = [name for _, name in snapshots[:-1]] + [name for _, _, name in segments[:needed]]
        # Of segments that begin with the same record, only the last has records that count.
        old += [one[2] for one, next_one in pairwise(segments[needed:]) if one[0] == next_one[0]]
        if not self.is_superseded:
            # Otherwise another process may be writing it.
            old += self._unfinished()
        if old:
            # The snapshot has to be safe under its name before what it replaces is removed.
            self._folder.sync()
            self._remove(old)

    def _remove_replaced(self, made: int) -> None:
        """Remove what a snapshot has replaced; what cannot be removed now, the next snapshot removes."""
        with suppress(OSError):
            snapshots, segments = _files(self._folder)
            old = [name for lsn, name in snapshots if lsn < made]
            old += [name for first, _, name in segments if first <= made]
            old += self._unfinished()
            self._remove(old)

    def _unfinished(self) -> list[str]:
        return [name for name in self._folder.names() if _UNFINISHED_NAME.fullmatch(name)]

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                self._folder.remove(name)

    def close(self) -> None:
        """Unlock and close the folder."""
        self.wait_for_snapshot()
        self._segment.close()
        self._lock.close()
        self._folder.close()

    # ------------------------------------------------------------ inside

    def _open_folder(self) -> Folder:
        with self._explaining("open the folder"):
            path = Path(self.path)
            missing = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for each in missing:
                sync(each.parent)
            if not missing:
                # Whoever has made it may not have done so, and may not let this user do it.
                with suppress(PermissionError):
                    sync(path.parent)
            return Folder(path)

    def _check_foreign(self) -> None:
        with self._explaining("list the folder"):
            names = set(self._folder.names()) - {FolderLock.NAME}
            own = (SNAPSHOT_NAME, SEGMENT_NAME, _UNFINISHED_NAME)
            foreign = sorted(name for name in names if not any(pattern.fullmatch(name) for pattern in own))
        if foreign:
            what = "a checkpoint; make a store and load() it" if "manifest.json" in foreign else "other files"
            raise StorageError(f"{self.path}: holds {what} ({foreign[0]}); give a new or empty directory")

    def _begin_segment(self) -> None:
        self._segment.begin(f"log-{self.lsn + 1:016x}-{self._lock.epoch:08x}.tkv")
        self._undo_end = 0
        self._segments += 1

    def _check_writable(self) -> None:
        if self._segment.broken is not None:
            raise StorageError(f"{self.path}: nothing can be written: {self._segment.broken}; open the store again")

    def _check_holder(self) -> None:
        try:
            self._lock.check()
        except BaseException as error:
            # The process that has the folder now may have read this segment: it must stay as it is.
            self._segment.broken = str(error)
            raise

    @contextmanager
    def _explaining(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path}: cannot {doing}: {error}") from error


class LogReader:
    """Reads the records of a folder that count, as of now; it changes nothing, and another process may have the folder.

    Args:
        folder: of the log.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        snapshots, segments = _files(folder)
        self._snapshot = snapshots[-1][1] if snapshots else None
        self._segments = [(first, name) for first, _, name in segments[_first_needed(snapshots, segments) :]]
        self.lsn = snapshots[-1][0] if snapshots else 0
        """Number of the last record that was read, or of the snapshot."""
        self.nbytes = 0
        """Bytes of log that were read since the snapshot."""

    @property
    def num_segments(self) -> int:
        """How many log segments are read."""
        return len(self._segments)

    @property
    def names(self) -> list[str]:
        """The files that are read, oldest first."""
        return [name for name in (self._snapshot, *(name for _, name in self._segments)) if name is not None]

    def records(self) -> Iterator[tuple[Record, bool]]:
        """Yield every record, oldest first, and whether it is part of the snapshot.

        Raises:
            StorageError: as for ``WriteAheadLog.read``.
        """
        if self._snapshot is not None:
            yield from ((each, True) for each in self._read_snapshot(self._snapshot))
        for index, (first, name) in enumerate(self._segments):
            following = self._segments[index + 1][0] if index + 1 < len(self._segments) else None
            yield from ((each, False) for each in self._read_segment(name, first, following))

    def _read_snapshot(self, name: str) -> Iterator[Record]:
        ended = False
        with record.Reader(self._folder, name) as reader:
            for found, each in reader.records():
                if ended or found != self.lsn:
                    raise StorageError(f"{reader.file}: records of different snapshots")
                ended = each.head.get("verb") == "end"
                yield each
        if not ended or reader.is_torn:
            raise StorageError(f"{reader.file}: damaged: it ends early; {record.RESTORE}")

    def _read_segment(self, name: str, first: int, following: int | None) -> Iterator[Record]:
        if first > self.lsn + 1:
            self._missing(name, self.lsn + 1, first)
        expected = first
        later = "" if following is None else " and remove the log files of higher numbers"
        remedy = f"{record.RESTORE}, or truncate the file there{later}; what was pushed since is lost then"
        with record.Reader(self._folder, name, remedy) as reader:
            for lsn, each in reader.records():
                # A process that took this writer for dead has begun the next segment where it found this one to end.
                if following is not None and lsn >= following:
                    break
                if lsn != expected:
                    self._missing(name, expected, lsn)
                expected += 1
                if lsn <= self.lsn:
                    continue
                if lsn != self.lsn + 1:
                    self._missing(name, self.lsn + 1, lsn)
                self.lsn, self.nbytes = lsn, self.nbytes + reader.record_nbytes
                yield each
        if following is not None and self.lsn + 1 != following:
            self._missing(name, self.lsn + 1, following)

    def _missing(self, name: str, lsn: int, found: int) -> NoReturn:
        raise StorageError(f"{self._folder / name}: record {lsn} is missing, {found} comes next; {record.RESTORE}")


def _files(folder: Folder) -> tuple[list[tuple[int, str]], list[tuple[int, int, str]]]:
    """Return snapshots (last record, name) and segments (first record, epoch, name), oldest first."""
    names = folder.names()
    snapshots = [(int(found[1], 16), found[0]) for found in map(SNAPSHOT_NAME.fullmatch, names) if found]
    segments = [
        (int(found[1], 16), int(found[2], 16), found[0]) for found in map(SEGMENT_NAME.fullmatch, names) if found
    ]
    return sorted(snapshots), sorted(segments)


def _first_needed(snapshots: Sequence[tuple[int, str]], segments: Sequence[tuple[int, int, str]]) -> int:
    # The last segment that begins at or before the first record that the snapshot lacks may contain that record.
    lsn = snapshots[-1][0] if snapshots else 0
    return max(0, sum(first <= lsn + 1 for first, _, _ in segments) - 1)


class SegmentWriter:
    """Appends to one log segment at a time, and truncates it to its last whole record where a write fails.

    Args:
        folder: of the log.
        to_disk: whether a write returns only when it is on disk.
    """

    def __init__(self, folder: Folder, *, to_disk: bool) -> None:
        self._folder, self._to_disk = folder, to_disk
        self._file: int | None = None
        self._name = ""
        self.end = 0
        """Bytes of the segment's whole records."""
        self.broken: str | None = None
        """Why nothing can be written any more."""

    def __del__(self) -> None:
        # The file of a store that was not closed.
        if self._file is not None:
            os.close(self._file)

    def begin(self, name: str) -> None:
        """Continue in a new segment."""
        if name == self._name:
            # It has no record yet.
            return
        descriptor: int | None = None
        try:
            descriptor = self._folder.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if self._to_disk:
                self._folder.sync()
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            # The segment before goes on. Readers would skip its records from the beginning of the new one on.
            if not self._is_removed(name):
                self.broken = "a log segment was begun and could not be removed"
            raise
        old, self._file, self._name, self.end = self._file, descriptor, name, 0
        if old is not None:
            os.close(old)

    def write(self, buffers: Sequence[Any]) -> None:
        """Append a record; if that fails, remove what was written of it."""
        end = self.end
        try:
            self.end = record.write(self._descriptor(), buffers, end)
            if self._to_disk:
                self._sync()
        except BaseException:
            self.truncate(end)
            raise

    def truncate(self, end: int) -> None:
        """Remove what was written after ``end``."""
        try:
            os.ftruncate(self._descriptor(), end)
            self.end = end
            if self._to_disk and self.broken is None:
                self._sync()
        except OSError as error:
            self.broken = f"a record could not be removed ({error})"

    def close(self) -> None:
        """Close the segment; later writes fail."""
        file, self._file, self.broken = self._file, None, "it was closed"
        if file is not None:
            os.close(file)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._descriptor())
        except OSError as error:
            # The system may drop what it could not write: another fdatasync would succeed and mean nothing.
            self.broken = f"the disk failed ({error})"
            raise

    def _descriptor(self) -> int:
        if self._file is None:
            raise OSError("the log is not open")
        return self._file

    def _is_removed(self, name: str) -> bool:
        try:
            self._folder.remove(name)
            if self._to_disk:
                # Else a loss of power may bring it back.
                self._folder.sync()
        except OSError:
            return False
        return True
