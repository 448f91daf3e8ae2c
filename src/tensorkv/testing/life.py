"""Closing, forks and threads, what a store tells of itself, and sums that are not finite."""

import contextlib
import os
import threading

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows

from .values import F32, counts_since, ones, state


class LifeContract:
    """Closing, forks and threads, what a store tells of itself, and sums that are not finite."""

    # ---------------------------------------------------------------- life

    def test_verbs_from_several_threads(self, kv):
        kv.init("n", np.zeros(1000))
        # A step of this adds the sum to the value.
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        torn, failures = [], []

        def push():
            try:
                for _ in range(50):
                    kv.push("n", np.ones(1000))
            except Exception as error:
                failures.append(error)

        def pull():
            try:
                for _ in range(50):
                    value = kv.pull("n")
                    if (value != value[0]).any():
                        torn.append(value)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=target) for target in (push, push, push, pull, pull)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert not torn
        assert kv.pull("n").tolist() == [150] * 1000
        assert kv.info("n").version == 150
        assert kv.stats()["verbs"]["push"]["calls"] == 150

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
    def test_a_forked_child_gets_an_error(self, kv):
        kv.init("w", ones(2))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kv.pull("w")
            except tensorkv.ForkedStoreError:
                status = 42
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert kv.pull("w").tolist() == [1, 1]

    def test_close(self):
        kv = self.create()
        kv.init("w", ones(2))
        kv.close()
        kv.close()
        calls = {
            "init": ("x", ones(1)),
            "push": ("w", ones(2)),
            "pull": ("w",),
            "pushpull": ("w", ones(2)),
            "broadcast": ("x", ones(1)),
            "row_sparse_pull": ("w",),
            "set_updater": (None,),
            "set_optimizer": ("sgd",),
            "set_hyperparameters": (),
            "save": ("nowhere",),
            "load": ("nowhere",),
            "save_optimizer_states": ("nowhere",),
            "load_optimizer_states": ("nowhere",),
            "keys": (),
            "info": ("w",),
            "delete": ("w",),
            "is_capable": ("optimizer",),
            "stats": (),
            "barrier": (),
        }
        for verb, arguments in calls.items():
            with pytest.raises(tensorkv.StoreClosedError, match="closed"):
                getattr(kv, verb)(*arguments)
        for name in ("last_push", "optimizer"):
            with pytest.raises(tensorkv.StoreClosedError, match=f"^{name}: this store was closed"):
                getattr(kv, name)
        with pytest.raises(tensorkv.StoreClosedError), kv:
            pass
        assert repr(kv) == f"KVStore({self.TYPE!r}, closed)"

    def test_a_closed_snapshot_is_not_read(self, kv):
        if not kv.is_capable("snapshot"):
            return
        kv.init("w", ones(2))
        snapshot = kv.snapshot()
        snapshot.close()
        for call in (
            lambda: snapshot.pull("w"),
            lambda: snapshot.pull_tree({"w": ones(2)}),
            lambda: snapshot.row_sparse_pull("w", row_ids=[0]),
        ):
            with pytest.raises(tensorkv.SnapshotError, match=r"^\w+: this snapshot was closed; take another"):
                call()
        snapshot.close()
        assert kv.pull("w").tolist() == [1, 1]

    # ---------------------------------------------------------------- introspection

    def test_introspection(self, kv):
        assert kv.type == self.TYPE
        assert (kv.rank, kv.num_workers) == self.PLACE
        kv.init({"a": ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
        assert kv, "a store is true, also an empty one"
        assert (len(kv), kv.keys(), list(kv)) == (2, ["a", "b"], ["a", "b"])
        assert "a" in kv
        assert "c" not in kv
        assert kv.info("b") == tensorkv.KeyInfo((4,), "bfloat16", "cpu", 0, 8, "dense")
        kv.push("a", ones(2, 3))
        assert kv.info("a").version == 1
        assert kv.info(["b", "a", "b"]) == [kv.info("b"), kv.info("a"), kv.info("b")]
        assert kv.info([]) == []
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'^info\("c"\)'):
            kv.info(["a", "c"])
        rank, size = self.PLACE
        place = f"{f'rank {rank} of {size}' if rank < size else 'a reader'}, " if self.TYPE.startswith("dist") else ""
        assert repr(kv) == f"KVStore({self.TYPE!r}, {place}2 keys)"
        kv.set_optimizer("sgd", lr=0.1)
        assert repr(kv) == f"KVStore({self.TYPE!r}, {place}2 keys, optimizer='sgd')"
        assert kv.is_capable("optimizer")
        with pytest.raises(tensorkv.ArgumentError):
            kv.is_capable("flying")
        kv.barrier()

    def test_delete(self, kv):
        kv.init(["a", "b"], [ones(1), ones(1)])
        with pytest.raises(tensorkv.KeyNotFoundError):
            kv.delete(["a", "c"])
        kv.delete("a")
        assert kv.keys() == ["b"]
        kv.init("a", ones(5))
        assert kv.info("a").shape == (5,)

    def test_stats(self, kv):
        kv.init("w", ones(3))
        kv.push("w", [ones(3), ones(3)])
        kv.pull("w")
        stats = kv.stats()
        assert stats["verbs"]["push"]["calls"] == 1
        assert stats["verbs"]["push"]["nbytes"] == 24
        assert stats["keys"]["w"]["pull"] == {"calls": 1, "nbytes": 12}
        assert stats["verbs"]["push"]["seconds"] > 0

    def test_save_and_load(self, kv, tmp_path):
        kv.init({"a": ones(2), "b": torch.arange(3)})
        kv.init("t", Rows(np.array([4]), ones(1, 2), 10**9))
        rows = range(10)
        kv.set_optimizer("adam", lr=0.1)
        kv.push("a", ones(2))
        kv.save(tmp_path / "checkpoint")
        with self.create() as other:
            other.load(tmp_path / "checkpoint")
            assert state(other, rows) == state(kv, rows)
            for store in (kv, other):
                store.push("a", ones(2))
            assert state(other, rows) == state(kv, rows)

    def test_a_checkpoint_that_may_be_missing(self, kv, tmp_path):
        """Not there at all, begun and not finished, there, and damaged."""
        kv.init("a", ones(2))
        folder = tmp_path / "may-be-missing"
        assert kv.load(folder, missing_ok=True) is False
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        kv.barrier()
        assert kv.load(folder, missing_ok=True) is False
        # What a crash in the first save leaves.
        (folder / f"data-{16 * '0'}-00000.safetensors").write_bytes(b"half")
        kv.barrier()
        assert kv.load(folder, missing_ok=True) is False
        with pytest.raises(tensorkv.CheckpointError, match="no checkpoint here"):
            kv.load(folder)
        assert kv.pull("a").tolist() == [1, 1]
        kv.push("a", ones(2) * 5)
        saved = kv.pull("a").tolist()
        kv.save(folder)
        kv.push("a", ones(2) * 7)
        assert kv.load(folder, missing_ok=True) is True
        assert kv.pull("a").tolist() == saved
        kv.barrier()
        (folder / "manifest.json").write_text("{}")
        kv.barrier()
        for missing_ok in (True, False):
            with pytest.raises(tensorkv.CheckpointError):
                kv.load(folder, missing_ok=missing_ok)
        with pytest.raises(tensorkv.ArgumentError, match="missing_ok"):
            kv.load(folder, missing_ok="yes")

    # ---------------------------------------------------------------- NaN and Inf

    def test_nan_and_inf_pass_through(self, kv):
        kv.init("w", ones(2))
        kv.push("w", np.array([np.nan, np.inf], F32))
        assert np.isnan(kv.pull("w")[0])

    def test_nonfinite_raise(self):
        with self.create(nonfinite="raise") as kv:
            kv.init(["a", "b", "i"], [ones(2), ones(2), np.ones(2, np.int32)])
            told = kv.stats()
            for raised, bad in enumerate([np.nan, np.inf, -np.inf], start=1):
                before = state(kv)
                with pytest.raises(tensorkv.NonFiniteError, match=r'push\("b"\)'):
                    kv.push(["a", "b"], [9 * ones(2), [ones(2), np.array([1, bad], F32)]])
                assert state(kv) == before
                kv.push("i", np.ones(2, np.int32))
                kv.push("a", (4 + raised) * ones(2))
                assert kv.pull("a").tolist() == [4 + raised] * 2
                assert counts_since(told, kv) == {"raised": raised, "skipped": 0}

    def test_nonfinite_raise_with_rows_beside(self):
        with self.create(nonfinite="raise") as kv:
            kv.init({"d": ones(2), "r": ones(2, 1)})
            before = state(kv)
            with pytest.raises(tensorkv.NonFiniteError):
                kv.push({"d": 5 * ones(2), "r": Rows(np.array([0]), np.array([[np.nan]], F32), 2)})
            assert state(kv) == before

    @pytest.mark.parametrize("keys", [1, 9])
    def test_hundreds_of_parts_and_outs(self, kv, keys):
        names = list(range(keys))
        kv.init(names, [ones(3)] * keys)
        outs = [[ones(3) for _ in range(300)] for _ in names]
        for _ in range(4):
            kv.pushpull(names, [[ones(3)] * 300] * keys, out=outs)
        assert all(out.tolist() == [300] * 3 for group in outs for out in group)

    def test_many_empty_keys(self, kv):
        names = list(range(9))
        kv.init(names, [ones(0, 2)] * 9)
        for _ in range(5):
            kv.push(names, [ones(0, 2)] * 9)
            kv.pull(names, out=[ones(0, 2) for _ in names])
            kv.pushpull(names, [ones(0, 2)] * 9, out=[ones(0, 2) for _ in names])
        assert kv.info(3).version == 10

    def test_nonfinite_skip(self):
        with self.create(nonfinite="skip") as kv:
            kv.init({"a": ones(2), "b": ones(2), "r": ones(2, 1)})
            told = kv.stats()
            kv.push(["a", "b"], [5 * ones(2), np.array([1, np.nan], F32)])
            assert (kv.pull("a").tolist(), kv.pull("b").tolist()) == ([5, 5], [1, 1])
            assert kv.info("b").version == 0
            kv.push("r", Rows(np.array([0]), np.array([[np.inf]], F32), 2))
            assert kv.pull("r").tolist() == [[1], [1]]
            assert counts_since(told, kv) == {"raised": 0, "skipped": 2}
            big = np.array([3e38, 1], F32)
            kv.push("a", [big, big])
            assert kv.pull("a").tolist() == [5, 5], "a sum that overflows counts too"
