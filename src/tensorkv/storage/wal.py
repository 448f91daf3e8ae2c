"""Journal: a folder with a snapshot of a shard and a log of what has changed since, written before it counts.

``append`` returns when the record is as safe as the durability asks for. What stands in the folder is one
snapshot, the log behind it, and a lock; docs/journal-format.md has the format. What a record means is not
known here.
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
from typing import Literal, NoReturn

from tensorkv.errors import ArgumentError, JournalError, show

from . import record_file
from .folder import Folder, sync
from .lock import FolderLock
from .log_file import LogFile
from .record import Record, frame
from .spares import NAME as SPARE
from .spares import Spares

Durability = Literal["process", "disk"]

_SNAPSHOT = re.compile(r"snapshot-([0-9a-f]{16})\.tkv")
_LOG = re.compile(r"log-([0-9a-f]{16})-([0-9a-f]{8})\.tkv")
_TEMPORARY = re.compile(r"snapshot-[0-9a-f]{16}\.tmp")
# A log is at most as long as twice the state, and this; a short one is not worth a snapshot.
LOG_NBYTES = 1 << 30
_SHORT_LOG = 1 << 27
# Every opening begins a log of its own; so many are worth a snapshot.
_MOST_LOGS = 16

_logger = logging.getLogger(__name__)


class Journal:
    """The folder of one durable shard, open for one process.

    Args:
        path: of the folder, which is made if it is not there.
        durability: ``"process"``: an appended record survives the end of this process, however it ends;
            ``"disk"``: that of the machine as well.
        log_nbytes: how long the log may grow before a snapshot is due (None: twice the state, at most 1 GiB).
        wait_s: how long to wait for another process that has the folder open.

    Raises:
        ArgumentError: an option out of range.
        JournalError: another process has the folder open, it holds something else, or it cannot be written.
    """

    def __init__(self, path: str, durability: Durability, log_nbytes: int | None = None, wait_s: float = 10.0) -> None:
        if not isinstance(durability, str) or durability not in ("process", "disk"):
            raise ArgumentError(f'durability is {show(durability)}; with a path, expected "process" or "disk"')
        if log_nbytes is not None and (type(log_nbytes) is not int or log_nbytes < 1):
            raise ArgumentError(f"log_nbytes is {show(log_nbytes)}; expected a number of bytes, or None")
        self.path = path
        self._to_disk = durability == "disk"
        self._log_nbytes = log_nbytes
        self._most_nbytes = log_nbytes or _SHORT_LOG
        self.lsn = 0
        self.nbytes = 0
        """Of the log behind the snapshot."""
        self._undo_end = self._undo_nbytes = 0
        self._retry_nbytes = 0
        self._logs = 0
        self._finishing: threading.Thread | None = None
        self._is_named = False
        self.counts = {"records": 0, "nbytes": 0, "snapshots": 0, "failed_snapshots": 0}
        self._folder = self._open_folder()
        try:
            self._check_foreign()
            with self._explaining("lock the folder"):
                # Logs sort by it where they begin alike.
                epochs = [epoch for _, epoch, _ in self._files()[1]]
                self._lock = FolderLock(self._folder, wait_s, max(epochs, default=0))
        except BaseException:
            self._folder.close()
            raise
        # What the machine leaves of files that were written over says nothing of which bytes are old.
        self._spares = None if self._to_disk else Spares(self._folder, self._lock.epoch)
        self._log = LogFile(self._folder, to_disk=self._to_disk, spares=self._spares)

    # ------------------------------------------------------------ reading

    def read(self) -> Iterator[tuple[Record, bool]]:
        """Give every record that counts, oldest first, and whether it is of the snapshot.

        Raises:
            JournalError: a damaged or missing file. A log that ends inside a record has been cut off by the
                end of its writer: that record was never acknowledged, and is not given.
        """
        self.settle()
        snapshots, logs = self._files()
        self.lsn, self.nbytes = (snapshots[-1][0] if snapshots else 0), 0
        if snapshots:
            yield from ((record, True) for record in self._read_snapshot(snapshots[-1][1], self.lsn))
        behind = [(first, name) for first, _, name in logs[self._first_to_read(snapshots, logs) :]]
        self._logs = len(behind)
        for index, (first, name) in enumerate(behind):
            following = behind[index + 1][0] if index + 1 < len(behind) else None
            yield from ((record, False) for record in self._read_log(name, first, following))

    def _first_to_read(self, snapshots: Sequence[tuple[int, str]], logs: Sequence[tuple[int, int, str]]) -> int:
        # The last log that begins before what the snapshot lacks may hold it, after what the snapshot has.
        lsn = snapshots[-1][0] if snapshots else 0
        return max(0, sum(first <= lsn + 1 for first, _, _ in logs) - 1)

    def _files(self) -> tuple[list[tuple[int, str]], list[tuple[int, int, str]]]:
        names = self._folder.names()
        snapshots = [(int(found[1], 16), found[0]) for found in map(_SNAPSHOT.fullmatch, names) if found]
        logs = [(int(found[1], 16), int(found[2], 16), found[0]) for found in map(_LOG.fullmatch, names) if found]
        return sorted(snapshots), sorted(logs)

    def _read_snapshot(self, name: str, lsn: int) -> Iterator[Record]:
        ended = False
        with record_file.Reader(self._folder, name) as reader:
            for found, record in reader.records():
                if ended or found != lsn:
                    raise JournalError(f"{reader.file}: records that do not belong together")
                ended = record.head.get("verb") == "end"
                yield record
        if not ended or reader.is_torn:
            raise JournalError(f"{reader.file}: damaged: it ends early; restore the folder from a copy")

    def _read_log(self, name: str, first: int, following: int | None) -> Iterator[Record]:
        if first > self.lsn + 1:
            self._missing(name, self.lsn + 1, first)
        expected = first
        with record_file.Reader(self._folder, name) as reader:
            for lsn, record in reader.records():
                # Whoever opened the folder after this writer has gone on from where it found the log to end.
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
                yield record
        if following is not None and self.lsn + 1 != following:
            self._missing(name, self.lsn + 1, following)

    def _missing(self, name: str, lsn: int, found: int) -> NoReturn:
        raise JournalError(
            f"{self._folder / name}: record {lsn} is missing, {found} comes next; restore the folder from a copy"
        )

    # ------------------------------------------------------------ writing

    def begin(self) -> None:
        """Start a log of this process's own behind what was read.

        Raises:
            JournalError: it cannot be written.
        """
        with self._explaining("begin a log"):
            self._tidy()
            self._start_log()

    def append(self, record: Record) -> None:
        """Write a record behind the others; it counts when this returns.

        Raises:
            JournalError: it does not count; where its bytes could not be taken back, or the folder is not this
                process's any more, nothing can be appended from now on.
        """
        self._check()
        with self._explaining("append to the log"):
            self._lock.check()
            end = self._log.end
            try:
                self._log.write(frame(record, self.lsn + 1))
            except BaseException:
                if self._spares is not None:
                    # The disk may be full.
                    self._spares.remove()
                raise
            self._check_holder()
        written = self._log.end - end
        self._undo_end, self._undo_nbytes = end, written
        self.lsn, self.nbytes = self.lsn + 1, self.nbytes + written
        self.counts["records"] += 1
        self.counts["nbytes"] += written

    def undo(self) -> None:
        """Take the record back that was appended last.

        Raises:
            JournalError: it cannot be taken back, and counts; nothing can be appended from now on.
        """
        with self._explaining("take a record back"):
            self._check_holder()
            self._log.cut(self._undo_end)
        if self._log.broken is not None:
            raise JournalError(f"{self.path}: a record could not be taken back and will count when the store is opened")
        self.lsn, self.nbytes = self.lsn - 1, self.nbytes - self._undo_nbytes

    def is_due(self, state_nbytes: Callable[[], int]) -> bool:
        """Tell whether the log has grown so long that a snapshot is to be made.

        Args:
            state_nbytes: what there is to write; asked for seldom, since it takes a look at every key.
        """
        if self._log.broken is not None or self.nbytes < self._retry_nbytes:
            return False
        if self._finishing is not None and self._finishing.is_alive() and self.nbytes <= 2 * self._most_nbytes:
            # Pushes do not wait for the disk as long as the log is not twice what it should be.
            return False
        if self.nbytes > self._most_nbytes and self._log_nbytes is None:
            self._most_nbytes = max(_SHORT_LOG, min(LOG_NBYTES, 2 * state_nbytes()))
        return self.nbytes > self._most_nbytes or self._logs > _MOST_LOGS

    def snapshot(self, records: Iterable[Record]) -> bool:
        """Replace snapshot and log by a new snapshot; whatever ends it early leaves the old ones in force.

        Args:
            records: the whole state, the last one's verb being ``"end"``.

        Returns:
            Whether it was made; a disk that has no room for one may have room for the log.

        Raises:
            JournalError: it has its name, which the disk may forget; nothing can be appended from now on.
        """
        # One that is under way is not this one.
        self.settle()
        made, self._is_named = self.counts["snapshots"], False
        self.snapshot_behind(records)
        self.settle()
        is_made = self.counts["snapshots"] > made
        if self._is_named and not is_made:
            self._log.broken = "the disk failed, and a snapshot may count or not"
            self._check()
        return is_made

    def snapshot_behind(self, records: Iterable[Record]) -> None:
        """Do ``snapshot``, but wait for the disk in a thread, while the next log is written.

        Until the disk has it, the old snapshot and both logs are in force.
        """
        self.settle()
        self._check()
        temporary = f"snapshot-{self.lsn:016x}.tmp"
        try:
            with self._explaining("make a snapshot"):
                self._lock.check()
                descriptor = self._write_snapshot(temporary, records)
                try:
                    self._start_log()
                except BaseException:
                    os.close(descriptor)
                    raise
        except BaseException as error:
            self._fail(temporary, error)
            if not isinstance(error, Exception):
                raise
            return
        self._retry_nbytes = self.nbytes = 0
        finishing = threading.Thread(target=self._finish, args=(temporary, descriptor, self.lsn), daemon=True)
        try:
            finishing.start()
        except RuntimeError:
            # No more threads are to be had, as when the interpreter ends.
            self._finish(temporary, descriptor, self.lsn)
        else:
            self._finishing = finishing

    def settle(self) -> None:
        """Wait for the thread that finishes a snapshot."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def _finish(self, temporary: str, descriptor: int, lsn: int) -> None:
        try:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._lock.check()
            self._folder.replace(temporary, temporary.replace(".tmp", ".tkv"))
            self._is_named = True
            self._sync_folder()
            self.counts["snapshots"] += 1
            self._logs = 1
        except BaseException as error:
            self._fail(temporary, error)
            return
        try:
            self._remove_old(lsn)
        except BaseException as error:
            _logger.warning("%s: old files are left: %s", self.path, error)

    def _fail(self, temporary: str, error: BaseException) -> None:
        """Leave the old snapshot in force."""
        with suppress(OSError):
            self._folder.remove(temporary)
        if self._spares is not None:
            self._spares.remove()
        self.counts["failed_snapshots"] += 1
        # Not at every record from now on.
        self._retry_nbytes = self.nbytes + max(self.nbytes, self._most_nbytes) // 4
        _logger.warning("%s: no snapshot, the log goes on: %s", self.path, error)

    def _tidy(self) -> None:
        """Remove what ``read`` passes over: left by processes that ended before they could."""
        snapshots, logs = self._files()
        behind = self._first_to_read(snapshots, logs)
        old = [name for _, name in snapshots[:-1]] + [name for _, _, name in logs[:behind]]
        # Of logs that begin alike, the last has gone on from where the others did not come.
        old += [one[2] for one, next_one in pairwise(logs[behind:]) if one[0] == next_one[0]]
        old += filter(SPARE.fullmatch, self._folder.names())
        if old:
            # The snapshot has to be safe under its name before what it replaces goes.
            self._sync_folder()
            self._remove(old)

    def _remove_old(self, made: int) -> None:
        """Remove what a snapshot has made useless; what cannot be removed now, the next one removes."""
        old: list[str] = []
        with suppress(OSError):
            snapshots, logs = self._files()
            old += [name for lsn, name in snapshots if lsn < made]
            if self._spares is not None and old:
                self._spares.keep_snapshot(old.pop())
            mine = [name for first, epoch, name in logs if first <= made and epoch == self._lock.epoch]
            old += [name for first, _, name in logs if first <= made and name not in mine[-1:]]
            old += [name for name in self._folder.names() if _TEMPORARY.fullmatch(name)]
            if self._spares is not None and mine:
                self._spares.keep_log(mine.pop())
            old += mine[-1:]
        self._remove(old)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                self._folder.remove(name)

    def close(self) -> None:
        """Let go of the folder."""
        self.settle()
        if self._spares is not None:
            self._spares.remove()
            with suppress(OSError, JournalError):
                self._lock.check()
                self._log.trim()
        self._log.close()
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
            return Folder(path)

    def _check_foreign(self) -> None:
        with self._explaining("list the folder"):
            names = set(self._folder.names()) - {FolderLock.NAME}
            foreign = sorted(n for n in names if not any(p.fullmatch(n) for p in (_SNAPSHOT, _LOG, _TEMPORARY, SPARE)))
        if foreign:
            what = "a checkpoint; make a store and load() it" if "manifest.json" in foreign else "other files"
            raise JournalError(f"{self.path}: holds {what} ({foreign[0]}); give a new or empty directory")

    def _write_snapshot(self, temporary: str, records: Iterable[Record]) -> int:
        """Write a snapshot that is not in force; return its descriptor."""
        self._folder.remove(temporary)
        flags = os.O_WRONLY
        if self._spares is None or not self._spares.give_snapshot(temporary):
            flags |= os.O_CREAT | os.O_EXCL
        descriptor = self._folder.open(temporary, flags)
        try:
            end = 0
            for record in records:
                end = record_file.write(descriptor, frame(record, self.lsn), end)
            if not flags & os.O_EXCL:
                os.ftruncate(descriptor, end)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _start_log(self) -> None:
        self._log.start(f"log-{self.lsn + 1:016x}-{self._lock.epoch:08x}.tkv")
        self._undo_end = 0
        self._logs += 1

    def _check(self) -> None:
        if self._log.broken is not None:
            raise JournalError(f"{self.path}: nothing can be written: {self._log.broken}; open the store again")

    def _check_holder(self) -> None:
        try:
            self._lock.check()
        except BaseException as error:
            # Whoever has the folder now may have read what stands in this log: it must stay as it is.
            self._log.broken = str(error)
            raise

    def _sync_folder(self) -> None:
        self._folder.sync()

    @contextmanager
    def _explaining(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(f"{self.path}: cannot {doing}: {error}") from error
