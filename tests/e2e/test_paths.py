"""Paths: each is what it was when it was given, and a store in a folder stays with that folder."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tensorkv
from tensorkv.storage import checkpoint
from tests.support.descriptors import open_files

ENGINES = ["local", "device", "dist_sync"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fill(kv, number):
    """Push until the store has replaced its files several times."""
    if "w" not in kv:
        kv.init("w", np.zeros(1000, np.float32))
    for _ in range(30):
        kv.push("w", np.full(1000, number, np.float32))
    assert kv.stats()["wal"]["snapshots"] > 1


def held(folder):
    with tensorkv.create("local", path=folder) as kv:
        return kv.info("w").version, set(kv.pull("w").tolist())


def change_directory(tmp_path):
    os.chdir(tmp_path / "other")


def rename(tmp_path):
    (tmp_path / "own").rename(tmp_path / "moved")
    (tmp_path / "other").rename(tmp_path / "own")


def replace_link(tmp_path):
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")


@pytest.mark.parametrize(
    ("path", "meanwhile", "mine", "others"),
    [
        ("own/kept", change_directory, "own/kept", "other/own/kept"),
        ("own/kept", rename, "moved/kept", "own/kept"),
        ("link/kept", replace_link, "own/kept", "other/kept"),
    ],
)
def test_a_store_stays_with_its_folder(path, meanwhile, mine, others, tmp_path, monkeypatch):
    """Another store's folder stands where the path of the first leads after the change."""
    (tmp_path / "own").mkdir()
    (tmp_path / "other" / "own").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    kept = {change_directory: "other/own/kept", rename: "other/kept", replace_link: "other/kept"}[meanwhile]
    with tensorkv.create("local", path=tmp_path / kept, log_nbytes=20_000) as kv:
        fill(kv, 8)
    before = contents(tmp_path / kept)
    monkeypatch.chdir(tmp_path)
    with tensorkv.create("local", path=path, log_nbytes=20_000) as kv:
        fill(kv, 1)
        meanwhile(tmp_path)
        fill(kv, 2)
    assert contents(tmp_path / others) == before
    assert held(tmp_path / mine) == (60, {2.0})
    assert held(tmp_path / others) == (30, {8.0})


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_a_folder_that_was_removed_takes_no_push(what, tmp_path):
    with tensorkv.create("local", path=tmp_path / "kept") as kv:
        kv.init("w", np.zeros(2))
        if what == "folder":
            shutil.rmtree(tmp_path / "kept")
        else:
            (tmp_path / "kept" / "lock").unlink()
        with pytest.raises(tensorkv.StorageError, match="was removed"):
            kv.push("w", np.ones(2))
        assert kv.pull("w").tolist() == [0, 0]


def test_a_closed_store_holds_no_descriptor(tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    assert open_files(str(tmp_path))
    kv.close()
    assert not open_files(str(tmp_path))


NAMES = ["with space", "new\nline", "quo'te\"s", "ümläut-日本", os.fsdecode(b"not UTF-8 \xff\xfe"), "-dash", "%20#?:*~"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_folders_have_any_name(name, tmp_path, monkeypatch, capfd):
    """Of a store, of checkpoints and for the command line, and as the working directory."""
    for engine in ENGINES:
        with tensorkv.create(engine) as kv:
            kv.init("w", np.ones(2))
            kv.set_optimizer("sgd", lr=0.5, momentum=0.9)
            kv.push("w", np.ones(2))
            for _ in range(2):
                kv.save(tmp_path / name / engine)
                kv.save_optimizer_states(str(tmp_path / name / f"{engine}-states"))
            kv.load(str(tmp_path / name / engine))
            kv.load_optimizer_states(tmp_path / name / f"{engine}-states")
            assert kv.pull("w").tolist() == [0.5, 0.5]
    monkeypatch.chdir(tmp_path / name)
    for path in (tmp_path / name / name, name):
        with tensorkv.create("local", path=path, log_nbytes=20_000) as kv:
            fill(kv, 3)
    assert held(name) == (60, {3.0})
    main = pytest.importorskip("tensorkv.cli.main", exc_type=ModuleNotFoundError).main
    for path in (tmp_path / name / "local", tmp_path / name / name):
        assert main(["inspect", "--verify", str(path)]) == 0
        assert '"w"' in capfd.readouterr().out


BARE = """
import os, sys
sys.stdin.close()
import numpy as np, torch
import tensorkv
for type in ("local", "device", "dist_sync"):
    with tensorkv.create(type) as kv:
        kv.init("w", np.zeros(3))
        kv.set_optimizer("adam", lr=0.1)
        kv.push("w", [np.ones(3), torch.ones(3, dtype=torch.float64)])
        kv.save(sys.argv[1])
        kv.load(sys.argv[1])
        if abs(kv.pull("w")[0] + 0.1) > 1e-6:
            sys.exit("wrong value")
for _ in range(2):
    with tensorkv.create("local", path=sys.argv[1] + "-store") as kv:
        if "w" not in kv:
            kv.init("w", np.zeros(3))
        kv.push("w", np.ones(3))
sys.stderr.write("done")
"""


def test_a_process_without_surroundings(tmp_path):
    """Without variables, home, locale, UTF-8 and terminal, in a directory that takes no file even of root's."""
    folder = os.fsencode(tmp_path) + b"/\xc3\xa4\xff"
    command = [sys.executable, "-I", "-X", "utf8=0", "-W", "error", "-c", BARE, folder]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command,
            cwd="/proc",
            env={"LC_ALL": "C", "PATH": "/nowhere"},
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            umask=0o077,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (0, b"done")
    modes = {path.stat().st_mode & 0o077 for path in tmp_path.rglob("*")}
    assert modes == {0}


@pytest.mark.parametrize("type", ENGINES)
@pytest.mark.parametrize("way", ["save", "save_optimizer_states"])
def test_checkpoints_are_where_the_call_said(way, type, tmp_path, monkeypatch):
    """The working directory changes as soon as the engine has been called, as another thread may change it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    with tensorkv.create(type) as kv:
        engine = kv._engine

        def moving(call):
            def moved(*arguments, **named):
                monkeypatch.chdir(tmp_path / "there")
                return call(*arguments, **named)

            return moved

        monkeypatch.setattr(engine, "save", moving(engine.save))
        monkeypatch.setattr(engine, "load", moving(engine.load))
        kv.init("w", np.ones(2))
        kv.set_optimizer("sgd", lr=0.5)
        for name in (way, way.replace("save", "load")):
            monkeypatch.chdir(tmp_path / "here")
            getattr(kv, name)("checkpoint")
            assert os.getcwd() == str(tmp_path / "there")
    assert os.listdir(tmp_path / "here") == ["checkpoint"]
    assert os.listdir(tmp_path / "there") == []


def test_a_save_whose_folder_is_replaced_meanwhile(tmp_path, monkeypatch):
    """The checkpoint that stands at the path by then stays what it is."""
    real = checkpoint.write_files

    def write_and_move(*arguments):
        written = real(*arguments)
        (tmp_path / "now").rename(tmp_path / "moved")
        (tmp_path / "older").rename(tmp_path / "now")
        return written

    with tensorkv.create() as kv:
        kv.init("w", np.ones(2))
        kv.save(tmp_path / "older")
        kv.push("w", np.zeros(2))
        before = contents(tmp_path / "older")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_files", write_and_move)
            with pytest.raises(tensorkv.CheckpointError, match="renamed or replaced meanwhile"):
                kv.save(tmp_path / "now")
        assert contents(tmp_path / "now") == before
        kv.save(tmp_path / "moved")
        kv.load(tmp_path / "now")
        assert kv.pull("w").tolist() == [1, 1]
        kv.load(tmp_path / "moved")
        assert kv.pull("w").tolist() == [0, 0]


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(tensorkv.ArgumentError, match=r"working directory .* is gone"):
        tensorkv.create("local", path="kept")
    with tensorkv.create("local", path=tmp_path / "kept") as kv:
        kv.init("w", np.ones(2))
        with pytest.raises(tensorkv.ArgumentError, match=r"working directory .* is gone"):
            kv.save("checkpoint")
        kv.save(tmp_path / "checkpoint")


@pytest.mark.parametrize("path", [5, None, b"bytes", "", "nul\0"])
def test_what_is_no_path(path, tmp_path):
    with tensorkv.create() as kv:
        for name in ("save", "load", "load_optimizer_states"):
            with pytest.raises(tensorkv.ArgumentError, match=f"{name}: path is"):
                getattr(kv, name)(path)
