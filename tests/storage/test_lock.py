"""The lock of a folder: one holder at a time, in one process and in several."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

import tensorkv
from tensorkv import StorageError
from tensorkv.storage.folder import Folder
from tensorkv.storage.lock import FolderLock, is_locked, read_stamp
from tests.support.until import LIMIT_S

HOLD = """
import os, sys
from tensorkv.storage.folder import Folder
from tensorkv.storage.lock import FolderLock
lock = FolderLock(Folder(sys.argv[1]), 0, stamp="of a server")
if len(sys.argv) > 2 and not os.fork():
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder, *how):
    program = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *how], stdin=-1, stdout=-1, text=True)
    assert program.stdout.readline() == "held\n"
    return program


def test_two_in_one_process(tmp_path):
    first = FolderLock(Folder(tmp_path), 0)
    # It is not waited for: nobody else runs that could close it.
    with pytest.raises(StorageError, match=r"a store of this process has this folder open; close it first"):
        FolderLock(Folder(tmp_path), 3600)
    first.close()
    second = FolderLock(Folder(tmp_path), 0)
    assert second.epoch == first.epoch + 1
    second.close()


def test_looking_whether_a_folder_is_locked_takes_no_lock(tmp_path):
    assert not is_locked(tmp_path / "none")
    assert not is_locked(tmp_path)
    lock = FolderLock(Folder(tmp_path), 0)
    assert is_locked(tmp_path)
    lock.close()
    assert not is_locked(tmp_path)
    holder = hold(tmp_path)
    assert is_locked(tmp_path)
    holder.kill()
    holder.communicate()
    assert not is_locked(tmp_path)
    FolderLock(Folder(tmp_path), 0).close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_store_that_is_dropped_lets_go_when_the_next_one_comes(tmp_path):
    """A cell of a notebook that is run again, whose old store is in a cycle of references."""
    kv = tensorkv.create("local", path=tmp_path / "store")
    kv.init("w", np.ones(2))
    with pytest.raises(StorageError, match="a store of this process has this folder open"):
        tensorkv.create("local", path=tmp_path / "store")
    kv.itself = kv
    gc.disable()
    try:
        del kv
        kv = tensorkv.create("local", path=tmp_path / "store")
        assert kv.pull("w").tolist() == [1, 1]
        kv.close()
    finally:
        gc.enable()
        gc.collect()


def test_a_process_that_is_killed_lets_go(tmp_path):
    program = hold(tmp_path)
    with pytest.raises(StorageError, match=rf"another store has this folder open \(process {program.pid}\); close it"):
        FolderLock(Folder(tmp_path), 0)
    program.kill()
    lock = FolderLock(Folder(tmp_path), LIMIT_S)
    assert lock.epoch == 2
    lock.close()
    program.communicate()


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    program = hold(tmp_path, "fork")
    try:
        program.kill()
        program.wait()
        FolderLock(Folder(tmp_path), LIMIT_S).close()
        assert children_of(program.pid, tmp_path), "the child should live"
    finally:
        for child in children_of(program.pid, tmp_path):
            os.kill(child, 9)
        program.stdin.close()
        program.stdout.close()


def children_of(pid, folder):
    """Return the processes that were started with this folder and are not this one's child."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != pid:
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if str(folder).encode() in words and b"fork" in words:
                found.append(int(name))
    return found


@pytest.mark.parametrize("content", [b"hello", b"-000000000000001", b"ffffffffffffffff", b"1000000000000000 1\n"])
def test_a_file_that_is_no_lock_is_left_alone(content, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(StorageError, match="not the lock file of a store"):
        FolderLock(Folder(tmp_path), 0)
    assert (tmp_path / "lock").read_bytes() == content


def test_a_file_whose_data_a_loss_of_power_has_kept_from_the_disk_is_a_lock(tmp_path):
    (tmp_path / "lock").write_bytes(bytes(28))
    lock = FolderLock(Folder(tmp_path), 0, least_epoch=3)
    lock.check()
    assert lock.epoch == 4
    lock.close()


def test_a_later_holder_is_noticed(tmp_path):
    lock = FolderLock(Folder(tmp_path), 0)
    lock.check()
    assert not lock.is_superseded
    with open(tmp_path / "lock", "r+b") as file:
        file.write(b"%016x" % 7)
    assert lock.is_superseded
    with pytest.raises(StorageError, match="another process has opened this store, taking this one for dead"):
        lock.check()
    lock.close()


def test_the_stamp_is_that_of_the_last_opening(tmp_path):
    assert read_stamp(str(tmp_path / "nowhere")) is None
    assert read_stamp(str(tmp_path)) is None
    for stamp in ("a" * 32, "b", ""):
        FolderLock(Folder(tmp_path), 0, stamp=stamp).close()
        assert read_stamp(str(tmp_path)) == stamp
    for content in (b"\xff\xfe", b"x" * 4096):
        (tmp_path / FolderLock.NAME).write_bytes(content)
        assert not read_stamp(str(tmp_path))
