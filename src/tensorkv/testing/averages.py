"""Moving averages of values, which an optimizer with ``ema`` keeps."""

from functools import partial

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows

from .values import F32, ones, state

OPTIMIZERS = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 0.1, "amsgrad": True},
    "adamw": {"lr": 0.1, "weight_decay": 0.1},
    "adagrad": {"lr": 0.1, "initial_accumulator_value": 0.5},
    "rmsprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
    "nadam": {"lr": 0.1},
    "adafactor": {"lr": 0.1},
}


def set_optimizer(kv, name, **numbers):
    kv.set_optimizer("sgd" if name == "momentum" else name, **OPTIMIZERS[name], **numbers)


def averaged(average, value, keep):
    """One step of an average, as the semantics define it."""
    return average + (value.to(average.dtype) - average) * (1 - keep)


# NAdam comes to NaN in float16.
check_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


class AverageContract:
    """Moving averages of values, which an optimizer with ``ema`` keeps."""

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_averages_follow_the_values(self, kv, name, dtype):
        dtype = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(5)

        def some():
            rows = [*range(1, 10), 3000]
            return {f"k{n}": torch.randn(count, 3, generator=generator).to(dtype) for n, count in enumerate(rows)}

        kv.init(some())
        set_optimizer(kv, name, ema=0.9)
        keys = kv.keys()
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        expected = {key: value.to(wide) for key, value in zip(keys, kv.pull(keys), strict=True)}
        for step in range(4):
            # Some keys alone, some together, with one part and with two.
            pushed = keys if step != 2 else keys[:1]
            for key, value in kv.pushpull(
                {key: [grad] * (1 + step % 2) for key, grad in some().items() if key in pushed}
            ).items():
                expected[key] = averaged(expected[key], value, 0.9)
            if step == 1:
                kv.set_hyperparameters("k3", lr=0.05)
        for key, average in zip(keys, kv.pull_ema(keys), strict=True):
            assert average.dtype is dtype
            check_same(average, expected[key].to(dtype))
        wide_outs = {key: torch.zeros_like(average) for key, average in expected.items()}
        assert kv.pull_ema(wide_outs) is None
        for key in keys:
            check_same(wide_outs[key], expected[key])

    def test_small_steps_of_low_precision_add_up(self, kv):
        kv.init("h", torch.ones(4, dtype=torch.bfloat16))
        kv.set_optimizer("sgd", lr=0.0625, ema=0.999)
        for _ in range(100):
            kv.push("h", torch.ones(4, dtype=torch.bfloat16))
            kv.push("h", -torch.ones(4, dtype=torch.bfloat16))
        out = torch.zeros(4)
        kv.pull_ema("h", out=out)
        assert (out < 0.999).all()

    def test_averages_are_pulled_in_every_form(self, kv, library):
        kv.init({"a": library.make([0, 0]), "b": library.make([[4]])})
        kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        kv.push("a", library.make([-1, -2]))
        assert library.read(kv.pull_ema("a")).tolist() == [0.5, 1]
        # A key that was not updated has its value.
        a, b = map(library.read, kv.pull_ema(["a", "b"]))
        assert (a.tolist(), b.tolist()) == ([0.5, 1], [[4]])
        assert isinstance(kv.pull_ema("a", like=torch.empty(0)), torch.Tensor)
        outs = [np.zeros(2), np.zeros(2, F32)]
        assert kv.pull_ema("a", out=outs) is None
        assert [out.tolist() for out in outs] == [[0.5, 1]] * 2
        rows = kv.pull_ema("a", row_ids=[1])
        assert (library.read(rows.ids).tolist(), library.read(rows.values).tolist()) == ([1], [1])
        assert library.read(kv.pull_ema("a")).tolist() == [0.5, 1]
        assert library.read(kv.pull("a")).tolist() == [1, 2]

    @pytest.mark.parametrize("name", ["sgd", "adam", "nadam"])
    @pytest.mark.parametrize("is_table", [True, False])
    def test_averages_of_rows_that_a_push_names(self, kv, name, is_table):
        start = np.arange(8, dtype=F32).reshape(4, 2)
        kv.init("t", Rows(np.arange(3), start[:3], 4) if is_table else start)
        kv.set_optimizer(name, lr=0.5, ema=0.75)
        expected = torch.from_numpy(start.copy())
        if is_table:
            expected[3] = 0
        for ids in ([1, 3], [1], [0, 1]):
            kv.push("t", Rows(np.array(ids), ones(len(ids), 2), 4))
            value = torch.from_numpy(np.array(kv.row_sparse_pull("t", row_ids=ids).values))
            expected[ids] = averaged(expected[ids], value, 0.75)
        found = kv.pull_ema("t", row_ids=range(4))
        assert np.array_equal(found.values, expected.numpy())
        if is_table:
            with pytest.raises(tensorkv.ValueMismatchError, match="pull_ema"):
                kv.pull_ema("t")

    def test_averages_of_rows_that_start_by_a_rule(self, kv):
        kv.init("t", Rows(np.array([], int), np.zeros((0, 2), F32), 9, init=3.0))
        kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        kv.push("t", Rows(np.array([4]), ones(1, 2), 9))
        assert kv.pull_ema("t", row_ids=[4, 5]).values[:, 0].tolist() == [2.5, 3]

    def test_averages_are_saved_and_loaded(self, kv, tmp_path):
        half = torch.ones(5, dtype=torch.float16)
        kv.init({"w": torch.ones(3, 2), "h": half, "n": torch.ones(1)})
        kv.init("t", Rows(np.array([1]), ones(1, 2), 9))
        kv.set_optimizer("adam", lr=0.1, ema=0.9)

        def step():
            kv.push({"w": torch.ones(3, 2), "h": half})
            kv.push("t", Rows(np.array([1, 2]), ones(2, 2), 9))

        def read():
            outs = {"w": torch.zeros(3, 2), "h": torch.zeros(5), "n": torch.zeros(1)}
            kv.pull_ema(outs)
            return [out.tolist() for out in outs.values()], kv.pull_ema("t", row_ids=[0, 1, 2]).values.tolist()

        step()
        kv.save(tmp_path / "store")
        before = read()
        step()
        after = read()
        assert before != after
        kv.load(tmp_path / "store")
        assert read() == before
        assert kv.optimizer["ema"] == 0.9
        step()
        assert read() == after

    def test_averages_end_and_begin_again(self, kv):
        kv.init("w", np.zeros(1))
        kv.set_optimizer("sgd", lr=1.0)
        kv.push("w", -ones(1))
        with pytest.raises(tensorkv.OptimizerError, match="pull_ema: the store keeps no averages"):
            kv.pull_ema("w")
        kv.set_hyperparameters(ema=0.5)
        assert kv.pull_ema("w").tolist() == [1]
        kv.push("w", -ones(1))
        assert kv.pull_ema("w").tolist() == [1.5]
        kv.set_hyperparameters(ema=0.75)
        kv.push("w", -ones(1))
        assert kv.pull_ema("w").tolist() == [1.5 + 0.25 * 1.5]
        kv.set_hyperparameters(ema=None)
        kv.push("w", -ones(1))
        kv.set_hyperparameters(ema=0.5)
        assert kv.pull_ema("w").tolist() == [4]

    @pytest.mark.parametrize("ema", [1, -0.1, 1.5, "a", True, float("nan"), (0.9,)])
    def test_numbers_that_average_nothing(self, kv, ema):
        kv.init("w", ones(2))
        before = state(kv)
        with pytest.raises(tensorkv.OptimizerError, match="ema is"):
            kv.set_optimizer("sgd", lr=0.1, ema=ema)
        assert state(kv) == before
        kv.set_optimizer("sgd", lr=0.1, ema=0)
        with pytest.raises(tensorkv.OptimizerError, match="ema"):
            kv.set_hyperparameters("w", ema=0.5)
        for key in ("x", 3, None):
            with pytest.raises((tensorkv.KeyNotFoundError, tensorkv.KeyTypeError)):
                kv.pull_ema(key)
