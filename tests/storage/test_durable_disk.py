"""Folders and disks as they may be: full, read-only, failing, of another user, with links in them."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

import tensorkv
from tensorkv import StorageError
from tensorkv.storage.durable import open_shard
from tests.support.checkpoints import snapshot

FULL = """
import sys
import numpy as np, tensorkv
from tensorkv import StorageError
kv = tensorkv.create("local", path=sys.argv[1], durability=sys.argv[2])
kv.init("w", np.zeros(5000, np.float32))
kv.set_optimizer("sgd", lr=1.0, maximize=True)
done = refused = again = 0
while refused < 20:
    try:
        kv.push("w", np.ones(5000, np.float32))
        done += 1
        again += refused >= 5
    except StorageError as error:
        assert "No space left" in str(error) or "nothing can be written" in str(error), error
        refused += 1
        if refused == 5:
            import os; os.unlink(sys.argv[1] + "/../ballast")
            kv.close()
            kv = tensorkv.create("local", path=sys.argv[1], durability=sys.argv[2])
    assert (kv.pull("w") == done).all(), (kv.pull("w")[0], done)
assert again, "with more room there should have been more pushes"
kv.close()
"""
MOUNTED = 'mount -t tmpfs -o size=400k tmpfs "$0" && head -c 80000 /dev/zero > "$0/ballast" && exec "$@"'
READ_ONLY = """
import sys
import tensorkv
try:
    tensorkv.create("local", path=sys.argv[1])
except tensorkv.StorageError as error:
    print(error)
"""


def in_a_mount_namespace(script, *arguments):
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    command = ["unshare", "-m", "sh", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_a_full_disk(durability, tmp_path):
    shown = in_a_mount_namespace(
        MOUNTED, tmp_path, sys.executable, "-W", "error", "-c", FULL, tmp_path / "store", durability
    )
    assert shown.returncode == 0, shown.stderr[-2000:]


def test_a_folder_that_is_read_only(tmp_path):
    tensorkv.create("local", path=tmp_path).close()
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    shown = in_a_mount_namespace(script, tmp_path, sys.executable, "-c", READ_ONLY, tmp_path)
    assert "Read-only file system" in shown.stdout, shown.stderr[-2000:]


def pushed(kv, value):
    kv.push("w", np.full(10_000, value, np.float32))


@pytest.fixture
def kv(tmp_path):
    made = tensorkv.create("local", path=tmp_path / "store", durability="disk")
    made.init("w", np.zeros(10_000, np.float32))
    pushed(made, 1)
    yield made
    made.close()


def test_a_limit_on_the_size_of_files(kv, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = snapshot(kv)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            pushed(kv, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(kv) == before
    pushed(kv, 3)
    kv.close()
    again = tensorkv.create("local", path=tmp_path / "store")
    assert again.pull("w")[0] == 3
    again.close()


@pytest.mark.parametrize("stride", [1, 2])
def test_nothing_is_told_of_a_push_that_was_not_written(stride, kv, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    kv.set_optimizer("sgd", lr=1.0, max_grad_norm=1.0)
    gradient = np.ones(20_000, np.float32)[: 10_000 * stride : stride]
    kv.push("w", gradient)
    assert kv.last_push.grad_norm == 100
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(StorageError, match="No space left"):
            kv.push("w", gradient)
    assert kv.last_push == (None, None)


@pytest.mark.parametrize("calls", [["pwritev"], ["fdatasync"], ["pwritev", "ftruncate"]])
def test_a_disk_that_fails(calls, kv, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = snapshot(kv)
    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match="Input/output error"):
            pushed(kv, 2)
    assert snapshot(kv) == before
    if calls == ["pwritev"]:
        pushed(kv, 3)
    else:
        # What the disk has may not be what was read from it: no change counts any more.
        with pytest.raises(StorageError, match="nothing can be written"):
            pushed(kv, 3)
    after = snapshot(kv)
    kv.close()
    again = tensorkv.create("local", path=tmp_path / "store")
    assert snapshot(again) == after
    again.close()


def refused(folder, *words):
    with pytest.raises(StorageError) as caught:
        open_shard(str(folder), wait_s=0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_folders_of_another_user(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    refused(tmp_path / "file", "cannot open the folder")
    refused(tmp_path / "file" / "below", "cannot open the folder")
    refused(tmp_path, "other files", "file")
    kv = tensorkv.create("local")
    kv.init("w", np.zeros(1))
    kv.save(tmp_path / "saved")
    refused(tmp_path / "saved", "a checkpoint", "load()")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_two_stores_on_one_path(kv, tmp_path):
    refused(tmp_path / "store", "a store of this process has this folder open")
    pushed(kv, 2)
    assert kv.pull("w")[0] == 2


STRANGE = {
    "link": lambda path, other: path.symlink_to(other),
    "link to nowhere": lambda path, other: path.symlink_to(other.with_name("nowhere")),
    "pipe": lambda path, other: os.mkfifo(path),
    "folder": lambda path, other: path.mkdir(),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize(
    "name",
    ["lock", "snapshot-0000000000000001.tkv", "log-0000000000000001-00000000.tkv", "log-0000000000000001-00000001.tkv"],
)
def test_no_file_where_one_should_be(name, strange, tmp_path):
    folder, other = tmp_path / "store", tmp_path / "other"
    folder.mkdir()
    other.write_bytes(b"mine")
    STRANGE[strange](folder / name, other)
    refused(folder)
    assert other.read_bytes() == b"mine"
    assert not other.with_name("nowhere").exists()


@pytest.mark.parametrize("strange", STRANGE)
def test_no_file_where_a_snapshot_is_to_be_written(strange, tmp_path, caplog):
    folder, other = tmp_path / "store", tmp_path / "other"
    other.write_bytes(b"mine")
    kv = tensorkv.create("local", path=folder, log_nbytes=1)
    STRANGE[strange](folder / "snapshot-0000000000000002.tmp", other)
    kv.init("w", np.ones(1))
    assert bool(caplog.records) == (strange == "folder")
    kv.push("w", np.full(1, 2.0))
    kv.close()
    assert other.read_bytes() == b"mine"
    kv = tensorkv.create("local", path=folder)
    assert kv.pull("w").tolist() == [2]
    kv.close()
