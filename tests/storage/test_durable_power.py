"""Power loss: with durability="disk", what was acknowledged is in whatever folder the disk may have kept."""

import errno
import os
import random
import tempfile
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from tensorkv import StorageError
from tensorkv.storage import durable, wal
from tensorkv.storage.folder import Folder
from tensorkv.storage.wal import SegmentWriter, WriteAheadLog
from tests.storage import kills
from tests.storage.power import AtLast, AtOnce, Disk
from tests.support.amount import amount

SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))
ROUNDS = amount(4, 20)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setattr(durable, "DIGEST_EVERY", 5)
    random.seed(SEED)
    if not kills.HISTORY:
        kills.write_history()


def open_shard(folder):
    return durable.open_shard(folder, durability="disk", log_nbytes=2000, threads=1, wait_s=0)


class Killed(BaseException):
    """The process has ended."""


def kill(shard, i):
    """End the process of a shard after it has written a push, and before it has synced it."""
    with patch.object(SegmentWriter, "_sync", side_effect=Killed), patch.object(SegmentWriter, "truncate"):
        with pytest.raises(Killed):
            kills.push(shard, i)
        shard.close()


def lose_power(folder, pushes, chance):
    """Push, and let the power go again and again; return the folders left, with what was acknowledged then."""
    left = []
    acknowledged = [None]

    def perhaps_lose_power():
        if random.random() < chance and acknowledged[0] is not None:
            left.append((f"{folder}-{len(left)}", acknowledged[0]))
            disk.left(left[-1][0])

    with Disk(folder) as disk:
        disk.at_call = perhaps_lose_power
        shard = open_shard(folder)
        kills.prepare(shard)
        for i in range(pushes):
            acknowledged[0] = i
            if random.random() < 0.1:
                kill(shard, i)
                shard = open_shard(folder)
                # The push counts from now on: a client that repeats it is told so.
                assert kills.bits(shard) == kills.HISTORY[i + 1]
            else:
                kills.push(shard, i)
            acknowledged[0] = i + 1
            perhaps_lose_power()
            if random.random() < 0.1:
                shard.close()
                shard = open_shard(folder)
        shard.close()
        assert disk.syncs
    return left


def check(left):
    for folder, acknowledged in left:
        shard = open_shard(folder)
        try:
            assert kills.bits(shard) in kills.HISTORY[acknowledged : acknowledged + 2], folder
            kills.push(shard, acknowledged)
            assert kills.bits(shard) == kills.HISTORY[acknowledged + 1], folder
        finally:
            shard.close()


def run(rounds):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as parent:
        count = 0
        for each in range(rounds):
            left = lose_power(os.path.join(parent, str(each)), 60, 0.1)
            count += len(left)
            check(left)
        return count


@pytest.mark.parametrize("thread", [AtOnce, AtLast])
def test_acknowledged_pushes_survive_a_loss_of_power(thread, monkeypatch):
    # Snapshots are finished in a thread: here as soon and as late as that can be, so that a run can be repeated.
    monkeypatch.setattr(wal, "threading", SimpleNamespace(Thread=thread))
    assert run(ROUNDS) > 25 * ROUNDS


def test_a_segment_that_could_not_be_begun_does_not_come_back(tmp_path, monkeypatch):
    """With its name back, records that were written after it to the segment before would be skipped."""
    real, failures = Folder.sync, [OSError(errno.EIO, "Input/output error")]

    def sync(self):
        if failures:
            raise failures.pop()
        real(self)

    with Disk(tmp_path / "store") as disk:
        shard = durable.open_shard(str(tmp_path / "store"), durability="disk", threads=1)
        kills.prepare(shard)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "sync", sync)
            assert not shard.log.snapshot(shard)
        assert not failures
        kills.push(shard, 0)
        left = [(str(tmp_path / str(number)), 1) for number in range(20)]
        for folder, _ in left:
            disk.left(folder)
        shard.close()
    check(left)


def finish_without_sync(self, temporary, descriptor, lsn):
    os.close(descriptor)
    self._folder.replace(temporary, temporary.replace(".tmp", ".tkv"))
    self._folder.sync()
    self._remove_replaced(lsn)


PLANTS = {
    "folders": (Folder, "sync", lambda self: None),
    "the log": (SegmentWriter, "_sync", lambda self: None),
    "the logs of others": (Folder, "sync_file", lambda self, name: None),
    "snapshots": (WriteAheadLog, "_finish_snapshot", finish_without_sync),
}


@pytest.mark.release
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_not_synced_is_noticed(plant, monkeypatch):
    monkeypatch.setattr(wal, "threading", SimpleNamespace(Thread=AtOnce))
    monkeypatch.setattr(*PLANTS[plant])
    with pytest.raises((AssertionError, StorageError)):
        run(20)
