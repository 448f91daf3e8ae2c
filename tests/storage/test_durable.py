"""A store in a folder: the contract, and everything as it was when it is opened again."""

import tempfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import CheckpointError, NonFiniteError, Rows, StorageError, TensorSlice, UpdaterError
from tensorkv.shard import optimizers
from tensorkv.shard.entry import Batch
from tensorkv.shard.shard import Shard
from tensorkv.storage import durable
from tensorkv.storage.folder import Folder
from tensorkv.storage.wal import WriteAheadLog
from tensorkv.testing import Contract
from tests.support.checkpoints import snapshot

F32 = np.float32


class TestDurable(Contract):
    TYPE = "local"

    def create(self, **options):
        # A log that is short enough for snapshots to be made on the way.
        return super().create(path=tempfile.mkdtemp(dir=self.folder), log_nbytes=2000, **options)

    def test_snapshots_are_made_on_the_way(self, kv):
        kv.init("w", np.zeros(100))
        for number in range(8):
            kv.push("w", np.full(100, number, np.float64))
        kv.close()
        assert list(self.folder.rglob("snapshot-*.tkv"))

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path


def shard_of(kv):
    return kv._engine._shard


def add(key, received, stored):
    stored += received


def reopened(kv, path, **options):
    kv.close()
    return tensorkv.create("local", path=path, **options)


def test_an_updater_ends_with_its_process_and_its_values_are_kept(tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init(["w", "t"], [np.zeros(2), Rows(np.array([1]), np.ones((1, 2)), 5)])

    def double(key, received, stored):
        received, stored = (each.values if isinstance(each, Rows) else each for each in (received, stored))
        received *= 2
        stored += received

    kv.set_updater(double)
    pushed = np.ones(2)
    kv.push(["w", "t"], [pushed, Rows(np.array([3, 1]), np.ones((2, 2)), 5)])
    assert pushed.tolist() == [1, 1], "an updater must not see the caller's array"
    kv = reopened(kv, tmp_path)
    assert kv.pull("w").tolist() == [2, 2]
    assert kv.row_sparse_pull("t", row_ids=[1, 3]).values.tolist() == [[3, 3], [2, 2]]
    with pytest.raises(UpdaterError, match="call set_updater again"):
        kv.push("w", pushed)
    kv.set_updater(None)
    kv.push("w", pushed)
    kv = reopened(kv, tmp_path)
    assert kv.pull("w").tolist() == [1, 1]
    kv.close()


def test_a_request_with_an_updater_is_whole_or_not_made(tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init(["a", "b"], [np.zeros(1), np.zeros(1)])
    fail = [True]

    def add(key, received, stored):
        stored += received
        if key == "b" and fail[0]:
            raise ValueError(key)

    kv.set_updater(add)
    shard = shard_of(kv)
    batch = Batch("push", ["a", "b"], [[torch.ones(1, dtype=torch.float64)], [torch.ones(1, dtype=torch.float64)]])
    with pytest.raises(ValueError, match="b"):
        shard.push(batch, requests=[("c", 1)])
    assert not shard.log.applied.last
    assert [value.tolist() for value in kv.pull(["a", "b"])] == [[0], [0]]
    fail[0] = False
    shard.push(batch, requests=[("c", 1)])
    assert shard.log.applied.has_applied("c", 1)
    kv = reopened(kv, tmp_path)
    assert [value.tolist() for value in kv.pull(["a", "b"])] == [[1], [1]]
    assert shard_of(kv).log.applied.last == {"c": 1}
    kv.close()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_sums_that_are_not_finite_do_not_reach_the_log(nonfinite, tmp_path):
    kv = tensorkv.create("local", path=tmp_path, nonfinite=nonfinite)
    kv.init(["a", "b"], [np.zeros(1), np.zeros(1)])
    both = [np.array([np.nan]), np.ones(1)]
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError):
            kv.push(["a", "b"], both)
    else:
        kv.push(["a", "b"], both)
    before = snapshot(kv)
    kv = reopened(kv, tmp_path, nonfinite=nonfinite)
    assert snapshot(kv) == before
    assert kv.pull("b").tolist() == [float(nonfinite == "skip")]
    kv.close()


@pytest.mark.parametrize("name", ["muon", "adafactor", "adam"])
def test_replays_have_the_bits_of_large_steps(name, tmp_path):
    rng = np.random.default_rng(0)
    kv = tensorkv.create("local", path=tmp_path)
    kv.init("w", rng.standard_normal((300, 301)).astype(np.float32))
    kv.set_optimizer(name, lr=0.1)
    for _ in range(5):
        kv.push("w", rng.standard_normal((300, 301)).astype(np.float32))
    before = snapshot(kv)
    kv = reopened(kv, tmp_path)
    assert snapshot(kv) == before
    kv.close()


def test_a_key_that_comes_again_in_another_form(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(durable, "DIGEST_EVERY", 4)
    kv = tensorkv.create("local", path=tmp_path)
    for first in (np.zeros((2, 2)), Rows(np.array([90]), np.ones((1, 2)), 100), np.zeros((2, 2))):
        kv.init("w", first)
        kv.push("w", first)
        kv.delete("w")
    assert not caplog.records
    reopened(kv, tmp_path).close()


@pytest.mark.parametrize("is_table", [True, False])
def test_a_caller_may_change_its_rows_after_a_push(is_table, tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "DIGEST_EVERY", 4)
    kv = tensorkv.create("local", path=tmp_path)
    kv.init("t", Rows(np.array([5]), np.zeros((1, 2)), 9) if is_table else np.zeros((9, 2)))
    kv.set_optimizer("sgd", lr=1.0)
    ids, values = np.array([1, 3]), np.ones((2, 2))
    for step in range(10):
        ids[:], values[:] = [step % 4, 4 + step % 4], step
        kv.push("t", Rows(ids, values, 9))
    ids[:], values[:] = 8, np.nan
    before = kv.row_sparse_pull("t", row_ids=list(range(9))).values.tolist()
    kv = reopened(kv, tmp_path)
    assert kv.row_sparse_pull("t", row_ids=list(range(9))).values.tolist() == before
    kv.close()


def test_a_load_drops_the_hyperparameters_of_keys_that_it_replaces(tmp_path):
    other = tensorkv.create("local")
    other.init("x", np.zeros(1))
    other.set_updater(lambda key, received, stored: None)
    other.save(tmp_path / "saved")
    kv = tensorkv.create("local", path=tmp_path / "store")
    kv.init("w", np.zeros(1))
    kv.set_optimizer("sgd", lr=0.1)
    kv.set_hyperparameters("w", lr=0.2)
    kv.load(tmp_path / "saved")
    kv = reopened(kv, tmp_path / "store")
    assert kv.keys() == ["x"]
    kv.close()


@pytest.mark.parametrize("in_snapshot", [False, True])
def test_an_optimizer_leaves_out_hyperparameters_of_keys_that_are_gone(in_snapshot, tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init(["w", "gone"], [np.zeros(1, F32)] * 2)
    own = optimizers.spec("sgd", {"lr": 0.1})
    own.overrides.update({"w": {"lr": 0.5}, "gone": {"lr": 0.2}})
    kv.delete("gone")
    kv._change_optimizer(own)
    if in_snapshot:
        assert shard_of(kv).log.snapshot(shard_of(kv))
    kv = reopened(kv, tmp_path)
    kv.init("gone", np.zeros(1, F32))
    kv.push(["w", "gone"], [np.ones(1, F32)] * 2)
    assert [kv.pull(key)[0] for key in ("w", "gone")] == [F32(-0.5), F32(-0.1)]
    kv.close()


def test_a_change_whose_request_cannot_be_counted_is_undone(tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init("w", np.zeros(1, F32))
    shard = shard_of(kv)
    with pytest.raises(AttributeError):
        shard.push(Batch("push", ["w"], [[torch.ones(1)]]), requests=[("a", 1, "no dict")])
    for _ in range(2):
        assert (kv.pull("w").tolist(), kv.info("w").version) == ([0], 0)
        assert not shard_of(kv).log.applied.has_applied("a", 1)
        kv = reopened(kv, tmp_path)
    kv.close()


def test_complex_values_that_begin_anywhere(tmp_path):
    kv = tensorkv.create("local", path=tmp_path, log_nbytes=1)
    kv.init(["a", "b"], [np.zeros(1, np.float32), np.full(2, 1 + 2j, np.complex64)])
    kv.push("a", np.ones(1, np.float32))
    kv = reopened(kv, tmp_path)
    assert kv.pull("b").tolist() == [1 + 2j, 1 + 2j]
    kv.close()


def test_opened_in_inference_mode(tmp_path):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init("w", np.zeros(2))
    with torch.inference_mode():
        kv = reopened(kv, tmp_path)
    kv.push("w", np.ones(2))
    assert kv.pull("w").tolist() == [1, 1]
    kv.close()


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("verb", ["load", "load_optimizer_states"])
def test_a_load_that_cannot_be_written_leaves_the_old_state(verb, error, tmp_path, monkeypatch):
    kv = tensorkv.create("local", path=tmp_path / "store")
    kv.init("w", np.zeros(2))
    kv.set_optimizer("adam", lr=0.1)
    kv.push("w", np.ones(2))
    kv.save(tmp_path / "saved")
    kv.save_optimizer_states(tmp_path / "states")
    kv.push("w", np.ones(2))
    before = snapshot(kv)
    with monkeypatch.context() as patch:
        patch.setattr(WriteAheadLog, "_write_snapshot", Mock(side_effect=error))
        with pytest.raises((StorageError, type(error))):
            getattr(kv, verb)(tmp_path / ("saved" if verb == "load" else "states"))
    assert snapshot(kv) == before
    with pytest.raises(CheckpointError):
        kv.load(tmp_path / "nothing")
    assert snapshot(kv) == before
    kv.push("w", np.ones(2))
    after = snapshot(kv)
    kv = reopened(kv, tmp_path / "store")
    assert snapshot(kv) == after
    kv.close()


@pytest.mark.parametrize("releases", [False, True])
def test_a_load_that_cannot_be_written_leaves_the_updater_and_open_releases(releases, tmp_path, monkeypatch):
    with tensorkv.create("local", path=tmp_path / "store") as kv:
        kv.init("w", np.zeros(2))
        kv.set_updater(add)
        for name in "abc":
            kv.push("w", np.ones(2))
            kv.publish(name, keep=1 if name == "b" else None)
            if name == "a":
                dropped = kv.open_release("a", lease_s=1000)
        kept = kv.open_release("b", lease_s=1000)
        kv.save(tmp_path / "saved", releases=releases)
        digests = dropped.digest, kept.digest
        with monkeypatch.context() as patch:
            patch.setattr(WriteAheadLog, "_write_snapshot", Mock(side_effect=OSError("full")))
            with pytest.raises(StorageError, match="nothing has changed"):
                kv.load(tmp_path / "saved")
        kv.push("w", np.ones(2))
        assert kv.pull("w").tolist() == [4, 4]
        # Without its readers it would be dropped now.
        kv.publish("d", keep=1)
        assert [each.name for each in kv.releases()] == ["d"]
        for release, number in ((dropped, 1), (kept, 2)):
            assert release.pull("w").tolist() == [number, number]
        assert (dropped.digest, kept.digest) == digests
        assert kept.changes(since="a").base == "a"
        dropped.close()
        kept.close()
        kv.unpublish("d")
        assert shard_of(kv)._num_frozen == 0


def test_an_updater_stays_after_a_push_that_could_not_be_applied(tmp_path, monkeypatch):
    with tensorkv.create("local", path=tmp_path) as kv:
        kv.init("w", np.zeros(2))
        kv.set_updater(add)
        with monkeypatch.context() as patch:
            patch.setattr("tensorkv.shard.shard._put", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                kv.push("w", np.ones(2))
        kv.push("w", np.ones(2))
        assert kv.pull("w").tolist() == [1, 1]


def test_the_error_of_a_load_that_may_have_reached_the_disk_does_not_deny_it(tmp_path, monkeypatch):
    kv = tensorkv.create("local", path=tmp_path / "store", durability="disk")
    kv.init("w", np.zeros(2))
    kv.save(tmp_path / "saved")
    kv.push("w", np.ones(2))
    with monkeypatch.context() as patch:
        # Of the new segment first, then of the name of the snapshot.
        patch.setattr(Folder, "sync", Mock(side_effect=[None, OSError("failed"), None, None]))
        with pytest.raises(StorageError, match="may count or not; open the store again"):
            kv.load(tmp_path / "saved")
    # What is acknowledged now could be made again upon the values that there were before.
    with pytest.raises(StorageError, match="may count or not"):
        kv.push("w", np.ones(2))
    before = snapshot(kv)
    kv = reopened(kv, tmp_path / "store")
    assert snapshot(kv) == before
    kv.push("w", np.ones(2))
    kv.close()


def test_a_store_that_could_not_be_rolled_back_refuses_calls_and_can_be_closed(tmp_path, monkeypatch):
    kv = tensorkv.create("local", path=tmp_path)
    kv.init("w", np.zeros(2))
    kv.push("w", np.ones(2))
    with monkeypatch.context() as patch:
        for name in ("_run", "_update"):
            patch.setattr(Shard, name, Mock(side_effect=RuntimeError("halfway")))
        patch.setattr(WriteAheadLog, "read", Mock(side_effect=RuntimeError("unreadable")))
        with pytest.raises(RuntimeError, match="unreadable"):
            kv.push("w", np.full(2, 7.0))
    out = np.zeros(2)
    for call in (lambda: kv.pull("w", out=out), lambda: kv.pull(["w"]), lambda: kv.push("w", out)):
        with pytest.raises(StorageError, match="close this store and open it again"):
            call()
    kv = reopened(kv, tmp_path)
    assert kv.pull("w").tolist() == [1, 1]
    kv.close()


def test_slices_and_releases_of_older_values_are_there_again(tmp_path):
    first, second = (TensorSlice(np.ones((2, 2), F32), (at, 0), (4, 2)) for at in (0, 2))
    for _ in range(2):
        with tensorkv.create("local", path=tmp_path / "store", log_nbytes=4096) as kv:
            if "w" not in kv:
                kv.init({"w": np.zeros((4, 2), F32), "b": np.zeros(300, F32)})
                kv.publish("r")
                kv.push("w", first)
            # The log is recycled.
            for number in range(50):
                kv.push("b", np.full(300, number, F32))
            assert kv.stats()["wal"]["snapshots"] > 0
            with pytest.raises(tensorkv.IncompleteValueError):
                kv.pull("w")
    with tensorkv.create("local", path=tmp_path / "store") as kv:
        with kv.open_release("r") as release:
            assert not release.pull("w").any()
        kv.push("w", second)
        assert kv.pull("w").all()


@pytest.mark.parametrize("in_folder", [False, True])
def test_slices_stay_if_an_updater_fails(in_folder, tmp_path):
    failures = [RuntimeError("planted")]

    def add(key, received, stored):
        if key == "b" and failures:
            raise failures.pop()
        stored += received

    def half(at):
        return TensorSlice(np.ones(2, F32), (at,), (4,))

    with tensorkv.create("local", **({"path": tmp_path / "store"} if in_folder else {})) as kv:
        kv.init({"a": np.zeros(4, F32), "b": np.zeros(4, F32)})
        kv.set_updater(add)
        kv.push({"a": half(0), "b": half(0)})
        with pytest.raises(RuntimeError, match="planted"):
            kv.push({"a": half(2), "b": half(2)})
        # The first key was updated, the second one waits for its slice.
        assert kv.pull("a").tolist() == [1, 1, 1, 1]
        with pytest.raises(tensorkv.IncompleteValueError, match=r"lacks \[2:4\]"):
            kv.pull("b")
        kv.push("b", half(2))
        assert kv.pull("b").tolist() == [1, 1, 1, 1]
        assert [kv.info(key).version for key in ("a", "b")] == [1, 1]
