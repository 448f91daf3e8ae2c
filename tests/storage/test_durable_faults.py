"""Something goes wrong at a seam of a durable shard, and the process lives on: nothing is lost, doubled or made up."""

import errno
import os
import random
import sys
import tempfile

import pytest

from tensorkv import StorageError, ValueMismatchError
from tensorkv.storage import durable
from tensorkv.storage.durable import DurableLog, open_shard
from tensorkv.storage.wal import SegmentWriter
from tests.storage import kills
from tests.storage.seams import SEAMS, Seam
from tests.support.amount import amount

SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))
PUSHES = 7
TIMES = amount(5, 50)
# A snapshot about every second push.
LOG_NBYTES = 700


@pytest.fixture(autouse=True)
def _short_digests(monkeypatch):
    monkeypatch.setattr(durable, "DIGEST_EVERY", 3)


@pytest.fixture(scope="module", autouse=True)
def _history():
    if not kills.HISTORY:
        kills.write_history()


def fail_io():
    raise OSError(errno.EIO, "the disk failed")


def fail_memory():
    raise MemoryError("no memory")


def interrupt():
    raise KeyboardInterrupt


def look(shard, i, *, applied):
    """Compare everything that a shard holds with what i pushes lead to (not applied: or one more)."""
    assert kills.bits(shard) in kills.HISTORY[i : i + (1 if applied else 2)]


def push_until_applied(shard, i, reopen):
    """Push number i, and again as its client would; return the shard, opened again if it has to be."""
    try:
        kills.push(shard, i)
        return shard
    except (OSError, MemoryError, KeyboardInterrupt, StorageError):
        pass
    try:
        look(shard, i, applied=False)
        kills.push(shard, i)
    except StorageError:
        # It serves nothing any more, or takes no changes; opened again it does both.
        shard.close()
        shard = reopen()
        look(shard, i, applied=False)
        kills.push(shard, i)
    return shard


def run(folder, seam, fail, number, durability):
    """Push while one step goes wrong; return whether it did."""

    def reopen():
        return open_shard(folder, durability=durability, log_nbytes=LOG_NBYTES, threads=1, wait_s=0)

    shard = reopen()
    try:
        kills.prepare(shard)
        with Seam(seam, number, fail) as fault:
            for i in range(PUSHES):
                shard = push_until_applied(shard, i, reopen)
                # On a busy machine the next snapshot would be put off, and the fault would not strike.
                shard.log._wal.wait_for_snapshot()
                look(shard, i + 1, applied=True)
                if fault.fired and random.random() < 0.5:
                    # Before the next snapshot, which would hide what is wrong with the log.
                    shard.close()
                    shard = reopen()
                    look(shard, i + 1, applied=True)
        shard.close()
        shard = reopen()
        look(shard, PUSHES, applied=True)
        return fault.fired
    finally:
        shard.close()


def run_often(seam, fail):
    levels = ["disk"] if seam == "sync of the log" else ["process", "disk"]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        return sum(
            run(os.path.join(folder, str(time)), seam, fail, random.randrange(1, 4), random.choice(levels))
            for time in range(TIMES)
        )


@pytest.mark.parametrize("fail", [fail_io, fail_memory, interrupt])
@pytest.mark.parametrize("seam", SEAMS)
def test_a_step_that_fails_is_made_good(seam, fail, caplog):
    random.seed(f"{SEED} {seam} {fail.__name__}")
    assert run_often(seam, fail) >= amount(1, TIMES // 2 + 1), "the fault seldom struck"


def change_first(monkeypatch):
    real = DurableLog._commit_logged

    def commit(self, shard, change):
        done = self._apply(shard, change)
        with monkeypatch.context() as patch:
            patch.setattr(DurableLog, "_apply", lambda *_: done)
            return real(self, shard, change)

    monkeypatch.setattr(DurableLog, "_commit_logged", commit)
    return "write, not begun", fail_io


def never_undo(monkeypatch):
    monkeypatch.setattr(DurableLog, "_roll_back", lambda *_: None)
    return "change, not begun", fail_memory


def leave_a_log_that_was_not_begun(monkeypatch):
    monkeypatch.setattr(SegmentWriter, "_is_removed", lambda self, name: True)
    return "sync of the folder", fail_io


@pytest.mark.release
@pytest.mark.parametrize("plant", [change_first, never_undo, leave_a_log_that_was_not_begun])
def test_planted_faults_are_noticed(plant, monkeypatch):
    seam, fail = plant(monkeypatch)
    # Fewer snapshots, which make good what is wrong with a log.
    monkeypatch.setattr(sys.modules[__name__], "LOG_NBYTES", 1500)
    monkeypatch.setattr(sys.modules[__name__], "PUSHES", 9)
    monkeypatch.setattr(sys.modules[__name__], "TIMES", 200)
    random.seed(SEED)
    # Slices that come a second time overlap.
    with pytest.raises((AssertionError, StorageError, ValueMismatchError)):
        run_often(seam, fail)
