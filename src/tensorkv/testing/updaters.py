"""Update functions of the caller."""

import numpy as np
import pytest
import torch

import tensorkv

from .values import F32, ones


class UpdaterContract:
    """Update functions of the caller."""

    def test_an_updater_changes_stored_in_place(self, kv, library):
        calls = []

        def update(key, received, stored):
            calls.append((key, type(received), type(stored)))
            stored += received * 2

        kv.init(3, library.make([1, 1]))
        kv.set_updater(update)
        kv.push(3, [library.make([1, 2]), library.make([1, 2])])
        assert library.read(kv.pull(3)).tolist() == [5, 9]
        expected = torch.Tensor if library.name == "torch" else np.ndarray
        assert calls == [(3, expected, expected)] * self.RUNS_UPDATERS
        kv.set_updater(None)
        kv.push(3, library.make([0, 0]))
        assert library.read(kv.pull(3)).tolist() == [0, 0]

    def test_an_updater_that_raises_leaves_its_key(self, kv):
        def update(key, received, stored):
            stored += received
            if key == "b":
                raise RuntimeError("from the updater")

        kv.init({"a": ones(2), "b": ones(2)})
        kv.set_updater(update)
        with pytest.raises(RuntimeError, match="from the updater"):
            kv.push(["a", "b"], [ones(2), ones(2)])
        assert kv.pull("a").tolist() == [2, 2]
        assert kv.pull("b").tolist() == [1, 1]
        assert kv.info("b").version == 0
        kv.push("a", ones(2))
        assert kv.pull("a").tolist() == [3, 3]

    @pytest.mark.parametrize("count", [2, 600_000])
    def test_a_pushpull_whose_updater_raises_writes_no_out(self, kv, count):
        def update(key, received, stored):
            if key == "b":
                raise RuntimeError("from the updater")

        kv.init({"a": ones(count), "b": ones(count)})
        kv.set_updater(update)
        outs = [np.full(count, 7, F32), np.full(count, 7, F32)]
        with pytest.raises(RuntimeError, match="from the updater"):
            kv.pushpull(["a", "b"], [ones(count), ones(count)], out=outs)
        assert all((out == 7).all() for out in outs)

    @pytest.mark.parametrize("verb", ["push", "pull", "pushpull", "init", "delete", "set_updater", "close"])
    def test_an_updater_cannot_call_its_store(self, kv, verb):
        arguments = {"init": ("new", ones(2)), "set_updater": (None,), "pull": ("w",), "delete": ("w",), "close": ()}

        def update(key, received, stored):
            getattr(kv, verb)(*arguments.get(verb, ("w", ones(2))))

        kv.init("w", ones(2))
        kv.set_updater(update)
        with pytest.raises(tensorkv.UpdaterError, match="updater"):
            kv.push("w", ones(2))
        assert kv.pull("w").tolist() == [1, 1]
        assert kv.keys() == ["w"]

    def test_an_updater_that_returns_a_new_array(self, kv):
        kv.init("w", ones(2))
        kv.set_updater(lambda key, received, stored: stored + received)
        with pytest.raises(tensorkv.UpdaterError, match="in place"):
            kv.push("w", ones(2))
        kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
        kv.push("w", ones(2))
        assert kv.pull("w").tolist() == [2, 2]

    def test_an_updater_keeps_no_stored_memory(self, kv):
        kept = []
        kv.init("w", ones(2))
        kv.set_updater(lambda key, received, stored: kept.extend([received, stored]))
        kv.push("w", ones(2))
        for array in kept:
            array[:] = 99
        assert kv.pull("w").tolist() == [1, 1]

    def test_an_updater_with_a_learned_rate_leaves_no_graph(self, kv):
        rate = torch.nn.Parameter(torch.tensor(0.5))
        kv.init("w", torch.ones(2))
        kv.set_updater(lambda key, received, stored: stored.sub_(received * rate))
        kv.push("w", torch.ones(2))
        kv.pull("w", out=(out := torch.zeros(2, dtype=torch.float64)))
        assert out.tolist() == [0.5, 0.5]
        assert not out.requires_grad
        kv.set_updater(None)
        strided = torch.ones(2, 2)[:, 0]
        kv.push("w", [strided, strided])
        assert kv.pull("w").tolist() == [2, 2]

    def test_an_updater_takes_no_first_value(self, kv):
        kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'"w"\): no such key.*: call init_tree first'):
            kv.push_tree({"w": ones(2)})
        assert kv.keys() == []
