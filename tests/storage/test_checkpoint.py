"""Checkpoints: round trips, crashes at every step, I/O errors, damage."""

import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import CheckpointError, Rows
from tensorkv.runtime import forks
from tensorkv.shard.optimizers import CLASSES, ROWWISE
from tensorkv.storage import checkpoint
from tests.support.checkpoints import F32, body_of, refused, snapshot, store, table, train
from tests.support.processes import run

DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]
ODD_KEYS = [
    *("__metadata__", "a/b", "../x", "/", "Größe 重み 🙂", "two\nlines", "\0", "x" * 20_000, "state/step/w", " ", '"'),
    *("\ud800", "\\ud800", "\\", "value/w", "nan"),
]


def again(kv, folder):
    """Save, load into a new store, and expect the same bits."""
    kv.save(folder)
    other = tensorkv.create()
    other.load(folder)
    assert snapshot(other) == snapshot(kv)
    return other


def small(number):
    kv = tensorkv.create()
    kv.init(["a", "b"], [np.full(3, number, F32), np.full((2, 2), number, np.int64)])
    return kv


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)], ids=str)
def test_every_dtype(tmp_path, dtype, shape):
    kind = getattr(torch, dtype)
    bytes_held = torch.arange(2 * 3 * kind.itemsize).to(torch.uint8)
    if kind is torch.bool:
        bytes_held %= 2
    value = bytes_held.view(kind)[: int(np.prod(shape))].reshape(shape)
    with tensorkv.create() as kv:
        kv.init("w", value)
        if shape:
            kv.init("t", Rows(torch.arange(shape[0]) * 3, value, 1000))
        other = again(kv, tmp_path)
        assert torch.equal(other.pull("w"), value)
        assert other.info("w").dtype == dtype


def test_infinity_and_nan_keep_their_bits(tmp_path):
    with tensorkv.create() as kv:
        kv.init("w", np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324]))
        again(kv, tmp_path)


def test_int_keys(tmp_path):
    keys = [0, -1, 7, 2**63, -(2**70), 10**30]
    with tensorkv.create() as kv:
        kv.init(keys, [np.full(2, index) for index in range(len(keys))])
        other = again(kv, tmp_path)
        assert other.keys() == keys
        assert all(type(key) is int for key in other.keys())


def test_odd_str_keys(tmp_path):
    with tensorkv.create() as kv:
        kv.init(ODD_KEYS, [np.full(2, index, F32) for index in range(len(ODD_KEYS))])
        kv.set_optimizer("adam")
        kv.push(ODD_KEYS, [np.ones(2, F32)] * len(ODD_KEYS))
        kv.init([key + "t" for key in ODD_KEYS], [table()] * len(ODD_KEYS))
        kv.push("../xt", table())
        other = again(kv, tmp_path / "folder")
        assert other.keys() == [*ODD_KEYS, *(key + "t" for key in ODD_KEYS)]
    assert os.listdir(tmp_path) == ["folder"]


def test_versions(tmp_path):
    with tensorkv.create() as kv:
        kv.init(["a", "b"], [np.zeros(2), np.zeros(2)])
        for _ in range(3):
            kv.push("b", np.ones(2))
        other = again(kv, tmp_path)
        assert [other.info(key).version for key in "ab"] == [0, 3]
        other.push("b", np.ones(2))
        assert other.info("b").version == 4


def test_tables(tmp_path):
    with tensorkv.create() as kv:
        kv.init("huge", table(ids=(0, 1_999_999_999), num_rows=2_000_000_000))
        kv.init("largest", table(ids=(2**62,), num_rows=2**63 - 1))
        kv.init("empty", table(ids=(), num_rows=5))
        kv.init("nothing", table(ids=(), num_rows=0))
        kv.init("flat", Rows(np.array([3]), np.array([1.5]), 4))
        other = again(kv, tmp_path)
        assert other.row_sparse_pull("huge", row_ids=[5, 1_999_999_999]).values.tolist() == [[0, 0, 0], [3, 4, 5]]
        other.push("empty", table(ids=(4,), num_rows=5))
        assert other.row_sparse_pull("empty", row_ids=[4]).values.tolist() == [[0, 1, 2]]


def test_an_empty_store_replaces_what_was_there(tmp_path):
    with tensorkv.create() as kv, small(1) as other:
        kv.save(tmp_path)
        other.load(tmp_path)
        assert other.keys() == []
        other.init(3, np.zeros(1))  # the key type is free again


SHAPES = {"vector": (5,), "matrix": (3, 4), "deep": (2, 3, 2), "0-d": (), "long": (300, 7)}


@pytest.mark.parametrize("name", CLASSES)
def test_training_goes_on_with_the_same_bits(tmp_path, name):
    shapes = {"matrix": (3, 4), "long": (300, 7)} if name == "muon" else SHAPES
    random_bits = np.random.default_rng(1)

    def push(*stores):
        for key, shape in shapes.items():
            grad = random_bits.standard_normal(shape).astype(F32)
            for each in stores:
                each.push(key, grad)

    with tensorkv.create() as kv:
        kv.init({key: random_bits.standard_normal(shape).astype(F32) for key, shape in shapes.items()})
        kv.init("unpushed", np.ones((2, 2), F32))
        kv.init("counter", np.zeros(2, np.int64))
        kv.set_optimizer(name, lr=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
        again(kv, tmp_path)
        for _ in range(3):
            push(kv)
        other = again(kv, tmp_path)
        for _ in range(3):
            push(kv, other)
        kv.push("unpushed", np.ones((2, 2), F32))
        other.push("unpushed", np.ones((2, 2), F32))
        assert snapshot(other) == snapshot(kv)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64", "complex128"])
@pytest.mark.parametrize(("name", "numbers"), [("sgd", {"momentum": 0.9}), ("adam", {}), ("adagrad", {})])
def test_state_of_every_float_dtype(tmp_path, dtype, name, numbers):
    kind = getattr(torch, dtype)
    with tensorkv.create() as kv:
        kv.init(["w", "0-d"], [torch.ones(2, 3, dtype=kind), torch.ones((), dtype=kind)])
        kv.init("t", Rows(torch.tensor([1, 4]), torch.ones(2, 3, dtype=kind), 9))
        kv.set_optimizer(name, lr=0.1, **numbers)
        kv.push(["w", "0-d"], [torch.full((2, 3), 0.5, dtype=kind), torch.ones((), dtype=kind)])
        kv.push("t", Rows(torch.tensor([4, 5]), torch.ones(2, 3, dtype=kind), 9))
        other = again(kv, tmp_path)
        for each in (kv, other):
            each.push("w", torch.full((2, 3), 0.25, dtype=kind))
            each.push("t", Rows(torch.tensor([1, 5]), torch.ones(2, 3, dtype=kind), 9))
        assert snapshot(other) == snapshot(kv)


@pytest.mark.parametrize("name", sorted(ROWWISE))
def test_rows_train_on_with_the_same_bits(tmp_path, name):
    with tensorkv.create() as kv:
        kv.init("t", table(ids=range(0, 40, 3), num_rows=10**9))
        kv.init("dense", np.ones((50, 3), F32))
        kv.set_optimizer(name, lr=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
        for ids in [(1, 3, 20), (3, 4), (20, 49)]:
            kv.push("t", table(ids=ids, num_rows=10**9))
            kv.push("dense", table(ids=ids, num_rows=50))
        other = again(kv, tmp_path)
        for each in (kv, other):
            for ids in [(0, 3, 21), (4, 48)]:
                each.push("t", table(ids=ids, num_rows=10**9))
                each.push("dense", table(ids=ids, num_rows=50))
        assert snapshot(other) == snapshot(kv)


def test_numbers_of_single_keys_rescale_and_clip(tmp_path):
    with store("sgd", lr=0.5, momentum=0.9, rescale_grad=1 / 3, clip_gradient=0.1) as kv:
        other = again(kv, tmp_path)
        for each in (kv, other):
            train(each)
        assert snapshot(other) == snapshot(kv)
        assert other.optimizer["rescale_grad"] == 1 / 3
        assert other.optimizer["clip_gradient"] == 0.1
        assert other._engine.optimizer.overrides == {"w": {"lr": 0.25}}


def test_integers_and_vectors_beside_an_optimizer_that_cannot_update_them(tmp_path):
    with tensorkv.create() as kv:
        kv.init({"count": np.zeros(2, np.int64), "bias": np.zeros(3, F32), "w": np.ones((2, 3), F32)})
        kv.init("ids", Rows(np.array([1]), np.ones((1, 2), np.int32), 4))
        kv.set_optimizer("muon")
        kv.push("w", np.ones((2, 3), F32))
        again(kv, tmp_path)


def test_an_updater_stays(tmp_path):
    def double(_, received, stored):
        stored += 2 * received

    with small(1) as kv, small(5) as other:
        kv.set_updater(double)
        kv.save(tmp_path)
        other.set_updater(double)
        other.load(tmp_path)
        other.push("a", np.ones(3, F32))
        assert other.pull("a").tolist() == [3, 3, 3]


def test_assignment_replaces_an_optimizer(tmp_path):
    with small(1) as kv, store() as other:
        kv.save(tmp_path)
        other.load(tmp_path)
        assert other.optimizer is None
        other.push("a", np.full(3, 8, F32))
        assert other.pull("a").tolist() == [8, 8, 8]


def test_the_library_is_kept(tmp_path, library):
    with tensorkv.create() as kv:
        kv.init("w", library.make([1, 2]))
        assert library.read(again(kv, tmp_path).pull("w")).tolist() == [1, 2]


def test_many_small_keys_that_are_pushed_again_and_again(tmp_path):
    keys = [f"k{number}" for number in range(20)]
    grads = [np.full((3, number + 1), number, F32) for number in range(20)]
    with tensorkv.create() as kv:
        kv.init(keys, grads)
        for _ in range(5):
            kv.push(keys, grads)
        other = again(kv, tmp_path)
        kv.load(tmp_path)
        for each in (kv, other):
            each.push(keys, [2 * grad for grad in grads])
        assert snapshot(other) == snapshot(kv)
        assert other.pull("k3").tolist() == [[6] * 4] * 3


def test_nothing_is_shared_after_a_load(tmp_path):
    with store() as kv:
        kv.save(tmp_path)
        kv.load(tmp_path)
        before = snapshot(kv)
        pulled = kv.pull("w")
        pulled += 1
        assert snapshot(kv) == before


@pytest.mark.parametrize("form", [str, Path], ids=["str", "Path"])
def test_forms_of_a_path(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    with small(1) as kv:
        for path in (form(tmp_path / "absolute"), form("relative"), form("deep/er/still")):
            again(kv, path)
        os.symlink("relative", "link")
        again(kv, form("link"))
    assert len(list((tmp_path / "relative").iterdir())) == 2


def test_a_path_that_no_system_has(tmp_path):
    path = tmp_path / ("x" * 300)
    with small(1) as kv:
        with refused(kv, "cannot write"):
            kv.save(path)
        with refused(kv, "cannot read"):
            kv.load(path)


def test_several_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40)
    with store() as kv:
        again(kv, tmp_path)
        files = [file["name"] for file in body_of(tmp_path)["files"]]
        assert len(files) > 4
        assert sorted(os.listdir(tmp_path)) == sorted([*files, "manifest.json"])
        monkeypatch.undo()
        kv.load(tmp_path)
        kv.save(tmp_path)
        assert len(os.listdir(tmp_path)) == 2


def test_more_names_than_a_data_file_takes(tmp_path, monkeypatch):
    with store() as kv:
        monkeypatch.setattr(checkpoint, "HEAD_BYTES", 1000)
        again(kv, tmp_path)
        assert len(body_of(tmp_path)["files"]) > 2
    with tensorkv.create() as kv:
        kv.init("x" * 100_000_001, np.ones(1))
        with refused(kv, str(tmp_path), "header too large"):
            kv.save(tmp_path)
    assert len(os.listdir(tmp_path)) > 2, "the older checkpoint is still there"


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    with small(1) as old, store() as kv:
        old.save(tmp_path)
        before = set(os.listdir(tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_MANIFEST_BYTES", os.path.getsize(tmp_path / "manifest.json"))
            with refused(kv, str(tmp_path), "at most", "save fewer keys"):
                kv.save(tmp_path)
        assert set(os.listdir(tmp_path)) == before
        again(old, tmp_path)


def test_a_save_replaces_an_older_one_and_touches_no_other_file(tmp_path):
    with small(1) as old, small(2) as new, tensorkv.create() as other:
        old.save(tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "data-mine.safetensors").write_text("mine")
        first = set(os.listdir(tmp_path))
        new.save(tmp_path)
        second = set(os.listdir(tmp_path))
        assert first & second == {"manifest.json", "notes.txt", "data-mine.safetensors"}
        assert len(second) == 4
        other.load(tmp_path)
        assert snapshot(other) == snapshot(new)


def test_what_a_crash_left_is_removed(tmp_path):
    for name in ("manifest-0123456789abcdef.tmp", "data-0123456789abcdef-00000.safetensors"):
        (tmp_path / name).write_text("half")
    with small(1) as kv:
        with refused(kv, "no checkpoint"):
            kv.load(tmp_path)
        again(kv, tmp_path)
    assert len(os.listdir(tmp_path)) == 2


# ---------------------------------------------------------------- optimizer states


def trained(values, grads, keys="ab", **numbers):
    kv = tensorkv.create()
    kv.init({key: np.full((2, 2), values, F32) for key in keys})
    kv.init("t", table())
    kv.set_optimizer("adam", **numbers)
    for _ in range(grads):
        kv.push({key: np.ones((2, 2), F32) for key in keys})
        kv.push("t", table(ids=(2, 3)))
    return kv


def test_optimizer_states(tmp_path):
    with trained(1, grads=3, lr=0.5) as kv, trained(1, grads=0) as other:
        kv.set_hyperparameters("a", lr=0.25)
        kv.save_optimizer_states(tmp_path)
        other.load_optimizer_states(tmp_path)
        mine, theirs = snapshot(kv), snapshot(other)
        assert theirs[1:] == mine[1:]
        for (*_, columns, state), (*_, other_columns, other_state) in zip(mine[0], theirs[0], strict=True):
            assert (other_columns, other_state) == (columns, state)
        assert other.pull("a").tolist() == [[1, 1], [1, 1]]
        assert other.info("a").version == 0
        assert other._engine._shard.entry("", "t").value.columns == ["exp_avg", "exp_avg_sq"]
        with trained(1, grads=3, lr=0.5) as same:
            same.load_optimizer_states(tmp_path)
            for each in (kv, same):
                each.push("a", np.ones((2, 2), F32))
                each.push("t", table(ids=(3, 9)))
            assert snapshot(same) == snapshot(kv)


def test_optimizer_states_need_an_optimizer(tmp_path):
    with small(1) as kv:
        with pytest.raises(tensorkv.OptimizerError, match="no optimizer"):
            kv.save_optimizer_states(tmp_path)
        assert os.listdir(tmp_path) == []


def _other_dtype():
    kv = tensorkv.create()
    kv.init({"a": np.zeros((2, 2)), "b": np.zeros((2, 2), F32), "t": table()})
    return kv


def _other_shape():
    kv = tensorkv.create()
    kv.init({"a": np.zeros((2, 2), F32), "b": np.zeros(4, F32), "t": table()})
    return kv


def _dense_for_table():
    kv = tensorkv.create()
    kv.init({"a": np.zeros((2, 2), F32), "b": np.zeros((2, 2), F32), "t": np.zeros((10, 3), F32)})
    return kv


def _int_keys():
    kv = tensorkv.create()
    kv.init(1, np.zeros(2))
    return kv


MISFITS = {
    "missing": (lambda: trained(1, 1, keys="a"), '"b"'),
    "dtype": (_other_dtype, "float64"),
    "shape": (_other_shape, "(4,)"),
    "dense": (_dense_for_table, "rows"),
    "key type": (_int_keys, "not in the store"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_optimizer_states_of_another_store(tmp_path, name):
    make, word = MISFITS[name]
    with trained(1, grads=2) as kv, make() as other:
        kv.save_optimizer_states(tmp_path)
        with refused(other, str(tmp_path), word):
            other.load_optimizer_states(tmp_path)


def test_the_other_kind(tmp_path):
    with store() as kv:
        kv.save(tmp_path / "all")
        kv.save_optimizer_states(tmp_path / "states")
        with refused(kv, "states", "expected store"):
            kv.load(tmp_path / "states")
        with refused(kv, "all", "expected optimizer-states"):
            kv.load_optimizer_states(tmp_path / "all")


# ---------------------------------------------------------------- a fault at every step


class Steps:
    """Count the calls by which a save changes files, and do something at the n-th."""

    def __init__(self, monkeypatch, at=None, fault=None):
        self.log, self._at, self._fault = [], at, fault
        for name in ("open", "fsync", "replace", "unlink", "mkdir", "listdir"):
            self._wrap(monkeypatch, os, name)
        self._wrap(monkeypatch, checkpoint, "open", real=open)

    def _wrap(self, monkeypatch, module, name, real=None):
        real = real or getattr(module, name)

        def call(*args, **options):
            self._step(name, args, before=True)
            result = real(*args, **options)
            if module is checkpoint and "x" in args[1]:
                result = Halting(result, self)
            self._step(name, args, before=False)
            return result

        monkeypatch.setattr(module, name, call, raising=False)

    def _step(self, name, args, before):
        what = f"{name} {'before' if before else 'after'}"
        target = os.readlink(f"/proc/self/fd/{args[0]}") if type(args[0]) is int else os.fspath(args[0])
        self.log.append((what, target))
        if len(self.log) == self._at:
            self._fault()


class Halting:
    """A file whose write stops half-way."""

    def __init__(self, file, steps):
        self._file, self._steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._steps._step("write", (self._file.name,), before=True)
        self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self._file, name)


def _count(tmp_path, prepare):
    """Save once without a fault, and return what happened."""
    folder = tmp_path / "counted" / "deep"
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch, small(2) as new:
        steps = Steps(patch)
        new.save(folder)
    return steps.log


def _fresh(folder):
    pass


def _older(folder):
    with small(1) as old:
        old.save(folder)


def _found(folder):
    with tensorkv.create() as kv:
        try:
            kv.load(folder)
        except CheckpointError:
            return None
        return {1.0: "old", 2.0: "new"}[kv.pull("a")[0].item()] if snapshot(kv) in _BOTH else "something else"


def _both():
    with small(1) as old, small(2) as new:
        return [snapshot(old), snapshot(new)]


_BOTH = _both()

PREPARE = {"fresh": (_fresh, {None, "new"}), "older": (_older, {"old", "new"})}


def die_at_each_step(folders):
    """Save in forked processes, of which each ends one step later than the last; return their exit statuses."""
    new, statuses = small(2), []
    for number, folder in enumerate(folders, 1):
        child = os.fork()
        if not child:
            new._forks = forks.count
            Steps(pytest.MonkeyPatch(), number, lambda: os._exit(77))
            new.save(folder)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return statuses


@pytest.mark.parametrize("name", PREPARE)
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path, name):
    prepare, allowed = PREPARE[name]
    total = len(_count(tmp_path, prepare))
    assert total > 30
    folders = [tmp_path / str(number) / "deep" for number in range(total + 1)]
    for folder in folders:
        prepare(folder)
    assert run(die_at_each_step, folders) == [77] * total + [0]
    seen = []
    for folder in folders:
        seen.append(_found(folder))
        with small(1) as kv:
            assert kv.load(folder, missing_ok=True) == (seen[-1] is not None)
            assert seen[-1] or kv.pull("a").tolist() == [1, 1, 1]
        with small(1) as kv:
            kv.save(folder)
        assert _found(folder) == "old"
        assert len(os.listdir(folder)) == 2
    assert set(seen) == allowed
    assert seen == sorted(seen, key=[None, "old", "new"].index), "once the new is there, it stays"


@pytest.mark.parametrize("name", PREPARE)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_an_io_error_at_any_step(tmp_path, name, code):
    prepare, _ = PREPARE[name]
    log = _count(tmp_path, prepare)
    renamed = next(n for n, (what, _) in enumerate(log, 1) if what == "replace after")
    removing = max(n for n, (what, _) in enumerate(log, 1) if what == "fsync after")

    def fail():
        raise OSError(code, os.strerror(code))

    for number, (what, _) in enumerate(log, 1):
        if what in ("open after", "mkdir after"):
            continue  # an open that fails gives no descriptor, and a directory that is there is what was wanted
        folder = tmp_path / str(number) / "deep"
        prepare(folder)
        with pytest.MonkeyPatch.context() as patch, small(2) as kv:
            before = snapshot(kv)
            Steps(patch, number, fail)
            if number <= removing:
                with pytest.raises(CheckpointError, match="cannot write") as caught:
                    kv.save(folder)
                assert os.strerror(code) in str(caught.value)
                assert str(folder) in str(caught.value)
            else:
                kv.save(folder)
            assert snapshot(kv) == before
        after = "new" if number >= renamed else {"fresh": None, "older": "old"}[name]
        assert _found(folder) == after, log[number - 1]
        if number < renamed:
            assert not folder.exists() or len(os.listdir(folder)) == {"fresh": 0, "older": 2}[name]
        with small(2) as kv:
            kv.save(folder)
        assert len(os.listdir(folder)) == 2
        shutil.rmtree(folder)


def test_an_interrupt_leaves_no_temporary(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    _older(folder)

    def stop():
        raise KeyboardInterrupt

    with small(2) as kv:
        whats = [what for what, _ in _count(tmp_path / "elsewhere", _older)]
        Steps(monkeypatch, whats.index("write before") + 1, stop)
        with pytest.raises(KeyboardInterrupt):
            kv.save(folder)
        monkeypatch.undo()
    assert _found(folder) == "old"
    assert len(os.listdir(folder)) == 2


def test_the_order_of_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 8)
    log = _count(tmp_path, _fresh)
    folder = str(tmp_path / "counted" / "deep")
    done = [(what.partition(" ")[0], target) for what, target in log if what.endswith("after")]
    rename = next(n for n, (what, _) in enumerate(done) if what == "replace")
    flushed = [target for what, target in done[:rename] if what == "fsync"]
    data = {f"{folder}/{file['name']}" for file in body_of(folder)["files"]}
    assert len(data) == 2
    assert data < set(flushed)
    assert len([target for target in flushed if target.endswith(".tmp")]) == 1
    assert flushed[-1] == folder, "the names of the data files are on the disk before the manifest names them"
    assert {str(tmp_path), str(tmp_path / "counted")} < set(flushed), "so are new directories"
    assert ("fsync", folder) in done[rename:]


def test_old_files_go_after_the_new_manifest_is_on_the_disk(tmp_path):
    log = _count(tmp_path, _older)
    whats = [what for what, _ in log]
    last_flush = len(whats) - 1 - whats[::-1].index("fsync after")
    assert whats.index("replace after") < last_flush < whats.index("unlink before")


def test_a_save_that_fails_while_being_described(tmp_path, monkeypatch):
    _older(tmp_path)

    def fail(*_):
        raise ValueError("no such tensor")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save", fail)
    with small(2) as kv, refused(kv, "cannot write", "no such tensor"):
        kv.save(tmp_path)
    monkeypatch.undo()
    assert _found(tmp_path) == "old"


# ---------------------------------------------------------------- where a checkpoint cannot be


def test_a_file_in_the_way(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with small(1) as kv:
        for path, word in ((file, "is a file"), (file / "below", "Not a directory")):
            with refused(kv, str(path), word):
                kv.save(path)
            with refused(kv, str(path)):
                kv.load(path)
    assert file.read_text() == "mine"


FOREIGN = {
    "notes": {"notes.txt": "mine"},
    "manifest": {"manifest.json": '{"name": "an extension"}', "data-0123456789abcdef-00000.safetensors": "x"},
    "empty manifest": {"manifest.json": ""},
    "safetensors": {"model.safetensors": "x"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_directory_is_left_alone(tmp_path, name):
    for file, text in FOREIGN[name].items():
        (tmp_path / file).write_text(text)
    with small(1) as kv:
        with refused(kv, str(tmp_path), "new or empty directory"):
            kv.save(tmp_path)
        with refused(kv, str(tmp_path)):
            kv.load(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == FOREIGN[name]


def test_nothing_there(tmp_path):
    with small(1) as kv:
        with refused(kv, str(tmp_path / "nowhere"), "no such directory"):
            kv.load(tmp_path / "nowhere")
        with refused(kv, str(tmp_path), "no checkpoint here"):
            kv.load(tmp_path)
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- damage


def _files(folder):
    return sorted(folder.iterdir())


def test_every_truncation(tmp_path):
    with store() as kv, small(5) as other:
        kv.save(tmp_path)
        for file in _files(tmp_path):
            whole = file.read_bytes()
            for length in {0, 1, 7, 8, 9, *range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
                file.write_bytes(whole[:length])
                with refused(other, str(tmp_path)):
                    other.load(tmp_path)
            file.write_bytes(whole + b"\n")
            with refused(other, str(tmp_path)):
                other.load(tmp_path)
            file.unlink()
            with refused(other, str(tmp_path)):
                other.load(tmp_path)
            file.write_bytes(whole)
        other.load(tmp_path)
        assert snapshot(other) == snapshot(kv)


def test_every_byte_of_the_manifest(tmp_path):
    with tensorkv.create() as kv, small(5) as other:
        kv.init("é", np.ones(1, F32))
        kv.set_optimizer("sgd", lr=1e-10)
        kv.save(tmp_path)
        file = tmp_path / "manifest.json"
        whole = file.read_bytes()
        before = snapshot(other)
        for at in range(len(whole)):
            # 0x20 changes the case of e in 1e-10 and in é, which JSON reads as the same.
            for flip in (0x01, 0x20, 0xFF):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
                with pytest.raises(CheckpointError, match=str(tmp_path)):
                    other.load(tmp_path)
        assert snapshot(other) == before
        file.write_bytes(whole)
        other.load(tmp_path)


def test_bit_flips_in_data(tmp_path):
    seeded = random.Random(7)
    with store() as kv, small(5) as other:
        kv.save(tmp_path)
        (file,) = tmp_path.glob("data-*")
        whole = file.read_bytes()
        before = snapshot(other)
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[seeded.randrange(len(whole))] ^= 1 << seeded.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged"):
                other.load(tmp_path)
        assert snapshot(other) == before


def test_files_of_another_checkpoint(tmp_path):
    with small(1) as kv:
        kv.save(tmp_path / "a")
        kv.save(tmp_path / "b")
        (ours,), (theirs,) = (tmp_path / "a").glob("data-*"), (tmp_path / "b").glob("data-*")
        theirs.replace(ours.parent / theirs.name)
        ours.unlink()
        with refused(kv, str(ours), "missing"):
            kv.load(tmp_path / "a")
