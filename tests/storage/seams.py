"""Seams of a durable shard where a test lets something go wrong: before, inside or after a step of a push."""

import os

from tensorkv.shard import nonfinite, shard
from tensorkv.storage import durable, wal
from tensorkv.storage.folder import Folder
from tensorkv.storage.wal import WriteAheadLog

# Name of the seam: where the step is found, its name there, and when it goes wrong.
SEAMS = {
    "check": (shard, "check_push", "before"),
    "sum": (nonfinite, "total", "before"),
    "frame": (wal, "frame", "after"),
    "write, not begun": (os, "pwritev", "before"),
    "write, half done": (os, "pwritev", "half"),
    "write, done": (os, "pwritev", "after"),
    "sync of the log": (os, "fdatasync", "after"),
    "change, not begun": (shard.Shard, "_update", "before"),
    "change, done": (shard.Shard, "_update", "after"),
    "sum of plain arrays": (shard.Shard, "_sums_of", "before"),
    "pass, not begun": (shard.Shard, "_run", "before"),
    "pass, done": (shard.Shard, "_run", "after"),
    "digest": (durable._Digests, "of", "before"),
    "snapshot": (WriteAheadLog, "_write_snapshot", "before"),
    "sync of the snapshot": (os, "fsync", "before"),
    "rename, not done": (os, "replace", "before"),
    "rename, done": (os, "replace", "after"),
    "sync of the folder": (Folder, "sync", "before"),
    "new segment": (WriteAheadLog, "_begin_segment", "before"),
    "new segment, begun": (WriteAheadLog, "_begin_segment", "after"),
    "removal": (os, "unlink", "before"),
}


class Seam:
    """A step that goes wrong once.

    Args:
        name: in ``SEAMS``.
        number: of the call that goes wrong.
        fail: what it does then.
    """

    def __init__(self, name, number, fail):
        self._owner, self._step, self._part = SEAMS[name]
        self._left = number
        self._fail = fail
        self._real = getattr(self._owner, self._step)
        self.fired = False

    def __enter__(self):
        def step(*arguments, **options):
            return self._call(*arguments, **options)

        setattr(self._owner, self._step, step)
        return self

    def __exit__(self, *_):
        setattr(self._owner, self._step, self._real)

    def _call(self, *arguments, **options):
        self._left -= 1
        if self._left:
            return self._real(*arguments, **options)
        self.fired = True
        if self._part == "half":
            descriptor, buffers, at = arguments
            whole = b"".join(bytes(buffer) for buffer in buffers)
            os.pwrite(descriptor, whole[: len(whole) // 2], at)
        elif self._part == "after":
            self._real(*arguments, **options)
        self._fail()
        raise AssertionError("nothing went wrong")
