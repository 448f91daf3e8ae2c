"""Paths: each is what it was when it was given, and a store in a folder stays with that folder."""

import os
import shutil

import numpy as np
import pytest

import tensorkv
from tensorkv.storage import checkpoint

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
    before = set(os.listdir("/proc/self/fd"))
    kv = tensorkv.create("local", path=tmp_path)
    assert set(os.listdir("/proc/self/fd")) > before
    kv.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("type", ENGINES)
@pytest.mark.parametrize("way", ["save", "save_optimizer_states"])
def test_checkpoints_are_where_the_call_said(way, type, tmp_path, monkeypatch):
    """The working directory changes as soon as the engine has been called, as another thread may change it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    with tensorkv.create(type) as kv:
        engine = kv._engine

        def moving(call):
            def moved(*arguments):
                monkeypatch.chdir(tmp_path / "there")
                return call(*arguments)

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
