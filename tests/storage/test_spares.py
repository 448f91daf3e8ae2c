"""Old files of a journal: what becomes of them, and that a log never shows what was in one before."""

import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest

import tensorkv
from tensorkv.storage import wal
from tensorkv.storage.folder import Folder
from tensorkv.storage.log_file import LogFile
from tensorkv.storage.record_file import Reader
from tensorkv.storage.spares import Spares


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_spare_log_is_all_zeros(tmp_path):
    spares = Spares(Folder(tmp_path), 7)
    (tmp_path / "old").write_bytes(b"x" * 3_000_001)
    assert not spares.give_log("new")
    spares.keep_log("old")
    assert names(tmp_path) == ["spare-00000007-log.tmp"]
    assert spares.give_log("new")
    assert (tmp_path / "new").read_bytes() == bytes(3_000_001)
    assert not spares.give_log("another")


def test_a_log_that_could_not_be_blanked_is_not_given(tmp_path, monkeypatch):
    spares = Spares(Folder(tmp_path), 7)
    (tmp_path / "old").write_bytes(b"x" * 100)
    monkeypatch.setattr(os, "pwrite", Mock(side_effect=OSError("planted")))
    with pytest.raises(OSError, match="planted"):
        spares.keep_log("old")
    assert not spares.give_log("new")
    spares.remove()
    assert names(tmp_path) == []


def test_a_spare_that_is_gone_is_none(tmp_path):
    spares = Spares(Folder(tmp_path), 7)
    (tmp_path / "old").write_bytes(b"x")
    spares.keep_snapshot("old")
    (tmp_path / "spare-00000007-snapshot.tmp").unlink()
    assert not spares.give_snapshot("new")
    assert names(tmp_path) == []


def records(file):
    with Reader(Folder(file.parent), file.name) as reader:
        return [record.head for _, record in reader.records()]


def test_a_log_in_an_old_file_has_its_own_records_alone(tmp_path):
    spares = Spares(Folder(tmp_path), 1)
    log = LogFile(Folder(tmp_path), to_disk=False, spares=spares)
    log.start("first")
    for lsn in range(1, 20):
        log.write(wal.frame(wal.Record({"old": lsn}), lsn))
    log.start("second")
    spares.keep_log("first")
    log.start("third")
    assert names(tmp_path) == ["second", "third"]
    assert records(tmp_path / "third") == []
    log.write(wal.frame(wal.Record({"new": 20}), 20))
    assert records(tmp_path / "third") == [{"new": 20}]
    before = (tmp_path / "third").stat().st_size
    log.trim()
    assert (tmp_path / "third").stat().st_size < before
    assert records(tmp_path / "third") == [{"new": 20}]
    log.close()


def pushed(folder, times):
    with tensorkv.create("local", path=folder, log_nbytes=3000) as kv:
        if "w" not in kv:
            kv.init("w", np.zeros(100, np.float32))
        for _ in range(times):
            kv.push("w", kv.pull("w") + 1)
        return kv.stats()["journal"]


def test_a_store_writes_over_its_old_files_and_leaves_none(tmp_path, monkeypatch):
    given = []
    give = Spares._give
    monkeypatch.setattr(Spares, "_give", lambda self, *files: given.append(give(self, *files)) or given[-1])
    found = pushed(tmp_path, 100)
    assert found["snapshots"] > 3
    assert sum(given) > 3
    assert not [name for name in names(tmp_path) if name.startswith("spare")]
    with tensorkv.create("local", path=tmp_path) as kv:
        assert set(kv.pull("w").tolist()) == {100}


def test_spares_of_a_killed_process_are_removed(tmp_path):
    pushed(tmp_path, 3)
    for name in ("spare-00000001-log.tmp", "spare-00000001-snapshot.tmp"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    pushed(tmp_path, 3)
    assert not [name for name in names(tmp_path) if name.startswith("spare")]
    with tensorkv.create("local", path=tmp_path) as kv:
        assert set(kv.pull("w").tolist()) == {6}


def only_rename(self, name):
    self._folder.replace(name, self._log)
    self._ready.add(self._log)


@pytest.mark.parametrize("planted", [False, True])
def test_logs_that_are_not_blanked_would_be_noticed(planted, tmp_path, monkeypatch):
    """A folder as a kill would leave it, after each of many pushes; without the zeros, most cannot be read."""
    if planted:
        monkeypatch.setattr(Spares, "keep_log", only_rename)
    refused = 0
    with tensorkv.create("local", path=tmp_path / "store", log_nbytes=3000) as kv:
        kv.init("w", np.zeros(100, np.float32))
        for count in range(1, 60):
            kv.push("w", kv.pull("w") + 1)
            kv._engine._shard._journal.settle()
            shutil.copytree(tmp_path / "store", tmp_path / str(count))
            try:
                with tensorkv.create("local", path=tmp_path / str(count)) as left:
                    assert set(left.pull("w").tolist()) == {count}
            except (tensorkv.JournalError, AssertionError):
                refused += 1
    assert bool(refused) == planted
