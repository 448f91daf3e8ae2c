"""Init, push, pushpull and broadcast: what is stored, and what is refused and changes nothing."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows

from .values import F32, counts_since, ones, state, workers_of_a_sum


class WriteContract:
    """Init, push, pushpull and broadcast: what is stored, and what is refused and changes nothing."""

    # ---------------------------------------------------------------- init

    def test_init_copies(self, kv, library):
        array = library.make([1, 2])
        kv.init("w", array)
        if library.name != "jax":
            array[:] = 9
        assert library.read(kv.pull("w")).tolist() == [1, 2]

    def test_init_twice(self, kv):
        kv.init("w", ones(2))
        with pytest.raises(tensorkv.KeyExistsError, match='"w"'):
            kv.init("w", 2 * ones(2))
        assert kv.pull("w").tolist() == [1, 1]

    def test_init_is_all_or_nothing(self, kv):
        kv.init("b", ones(1))
        for bad in ({"a": ones(1), "b": ones(1)}, {"a": ones(1), "c": "no array"}):
            with pytest.raises(tensorkv.TensorKVError):
                kv.init(bad)
        assert kv.keys() == ["b"]

    def test_a_key_twice_in_one_init(self, kv):
        with pytest.raises(tensorkv.KeyExistsError, match="twice"):
            kv.init(["a", "a"], [ones(1), ones(1)])
        assert len(kv) == 0

    # ---------------------------------------------------------------- push

    def test_unknown_keys_name_the_nearest(self, kv):
        kv.init(["weight", "bias"], [ones(1), ones(1)])
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'push\("wieght"\).*did you mean "weight"'):
            kv.push("wieght", ones(1))
        with pytest.raises(KeyError):
            kv.pull("other")

    @pytest.mark.parametrize("bad", [ones(2, 3), ones(3), ones(3, 2, 1), np.float32(1)])
    def test_a_shape_that_differs(self, kv, bad):
        kv.init(["v", "w"], [ones(3, 2), ones(3, 2)])
        before = state(kv)
        with pytest.raises(tensorkv.ValueMismatchError, match=r'push\("w"\): part 1 has shape .* \(3, 2\)'):
            kv.push(["v", "w"], [7 * ones(3, 2), [ones(3, 2), bad]])
        assert state(kv) == before

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("float64", "float32"),
            ("float64", "bfloat16"),
            ("int32", "float32"),
            ("bool", "int32"),
            ("float32", "int64"),
            ("complex64", "float32"),
            ("float32", "complex64"),
            ("int64", "int32"),
            ("int16", "uint16"),
            ("uint8", "int8"),
            ("complex128", "complex64"),
            ("int32", "bool"),
        ],
    )
    def test_a_dtype_that_would_lose_numbers(self, kv, part, value):
        kv.init("w", torch.ones(2).to(getattr(torch, value)))
        before = state(kv)
        with pytest.raises(tensorkv.ValueMismatchError, match=rf"part 0 is {part}.*{value}"):
            kv.push("w", torch.ones(2).to(getattr(torch, part)))
        assert state(kv) == before

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("float16", "float32"),
            ("bfloat16", "float32"),
            ("float32", "bfloat16"),
            ("float32", "float64"),
            ("float16", "bfloat16"),
            ("int8", "int32"),
            ("uint8", "int16"),
            ("uint8", "uint32"),
            ("complex64", "complex128"),
        ],
    )
    def test_a_dtype_that_fits(self, kv, part, value):
        kv.init("w", torch.ones(2).to(getattr(torch, value)))
        kv.push("w", [torch.full((2,), 3).to(getattr(torch, part))] * 2)
        pulled = kv.pull("w")
        assert str(pulled.dtype) == f"torch.{value}"
        assert pulled.to(torch.complex128).tolist() == [6, 6]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_low_precision_is_summed_in_float32_and_rounded_once(self, kv, dtype):
        dtype = getattr(torch, dtype)
        small = torch.finfo(dtype).eps / 4
        parts = [torch.ones(2).to(dtype)] + [torch.full((2,), small).to(dtype)] * 8
        kv.init("w", torch.zeros(2, dtype=dtype))
        kv.push("w", parts)
        wide = torch.zeros(2)
        for part in parts:
            wide += part.float()
        assert torch.equal(kv.pull("w"), wide.to(dtype))
        narrow = sum(parts[1:], parts[0])
        assert not torch.equal(narrow, wide.to(dtype)), "the numbers do not show the difference"

    def test_the_sum_is_left_to_right(self, kv):
        rng = np.random.default_rng(0)
        parts = [(rng.standard_normal(1000) * 10.0 ** rng.integers(-4, 5)).astype(F32) for _ in range(7)]
        expected = parts[0].copy()
        for part in parts[1:]:
            expected += part
        assert not np.array_equal(expected, sum(parts[::-1][1:], parts[-1])), "the order makes no difference here"
        kv.init("w", ones(1000))
        kv.push("w", parts)
        assert np.array_equal(kv.pull("w"), expected)
        kv.init(["x", "y"], [ones(1000), ones(1000)])
        kv.push(["x", "y"], [parts, parts])
        assert all(np.array_equal(x, expected) for x in kv.pull(["x", "y"]))

    def test_integers_wrap_and_bool_adds_by_or(self, kv):
        kv.init({"i": np.zeros(1, np.int8), "u": np.zeros(1, np.uint16), "b": np.zeros(2, bool)})
        kv.push("i", [np.array([127], np.int8), np.array([1], np.int8)])
        kv.push("u", [np.array([65535], np.uint16), np.array([2], np.uint16)])
        kv.push("b", [np.array([True, False]), np.array([True, False])])
        assert kv.pull("i").tolist() == [-128]
        assert kv.pull("u").tolist() == [1]
        assert kv.pull("b").tolist() == [True, False]

    @pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
    def test_bools_of_any_byte_are_kept_as_0_and_1(self, kv, library):
        odd, even = (library(np.array(numbers, np.uint8).view(bool)) for numbers in ([255, 0, 1, 3], [2, 0, 0, 254]))
        empty, table = np.zeros(4, bool), np.zeros((2, 4), bool)
        kv.init({"a": odd, "b": empty, "c": empty, "d": empty, "e": empty, "r": table})
        kv.push("b", odd)
        kv.push("c", [odd, even])
        kv.push(["d", "e"], [odd, [even, odd]])
        kv.push("r", Rows(np.array([1]), odd.reshape(1, 4), 2))
        for key in "abcder":
            found = torch.from_numpy(np.asarray(kv.pull(key))).view(torch.uint8)
            assert found.reshape(-1)[-4:].tolist() == [1, 0, 1, 1], key

    # ---------------------------------------------------------------- means

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
    def test_a_mean_is_the_sum_divided_once(self, dtype):
        dtype = getattr(torch, dtype)
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        torch.manual_seed(3)
        parts = [torch.randn(70, 3, dtype=wide).to(dtype) for _ in range(3)]
        with self.create(reduce="mean") as kv:
            kv.init({"a": torch.zeros(70, 3, dtype=dtype), "b": torch.zeros(70, 3, dtype=dtype)})
            strided = [part.t().contiguous().t() for part in parts]
            for key, given in (("a", parts), ("b", strided)):
                for count in (3, 1):
                    total = sum((part.to(wide) for part in given[1:count]), given[0].to(wide, copy=True))
                    numbers = torch.view_as_real(total) if wide.is_complex else total
                    numbers /= count * workers_of_a_sum(kv)
                    assert torch.equal(kv.pushpull(key, given[:count]), total.to(dtype)), (key, count)
            pulled = kv.pushpull(["a", "b"], [parts, parts[:1]])
            assert torch.equal(pulled[1], kv.pushpull("b", parts[:1]))
            assert torch.equal(pulled[0], kv.pushpull("a", parts))

    def test_an_optimizer_steps_on_the_mean(self):
        with self.create(reduce="mean") as kv:
            kv.init(["w", "r"], [np.zeros(2, F32), np.zeros((2, 1), F32)])
            kv.set_optimizer("sgd", lr=1.0)
            workers = workers_of_a_sum(kv)
            for _ in range(2):
                kv.push("w", [workers * np.array([1, 8], F32), workers * np.array([3, 0], F32)])
            assert kv.pull("w").tolist() == [-4, -8]
            part = Rows(np.array([1]), workers * np.array([[6]], F32), 2)
            kv.push("r", [part, Rows(np.array([], np.int64), np.zeros((0, 1), F32), 2)])
            assert kv.pull("r").tolist() == [[0], [-3]], "a mean of Rows is over all parts"

    @pytest.mark.parametrize("dtype", ["int32", "bool"])
    def test_there_is_no_mean_of_integers(self, dtype):
        with self.create(reduce="mean") as kv:
            kv.init(["w", "n"], [ones(2), np.ones(2, dtype)])
            before = state(kv)
            for part in (np.ones(2, dtype), [np.ones(2, dtype)] * 2, Rows(np.array([0]), np.ones(1, dtype), 2)):
                with pytest.raises(tensorkv.ValueMismatchError, match=rf'push\("n"\): a mean of {dtype}.*reduce="sum"'):
                    kv.push(["w", "n"], [5 * ones(2), part])
            assert state(kv) == before

    def test_other_words_for_reduce(self):
        for bad in ("max", 1):
            with pytest.raises(tensorkv.ArgumentError, match=r"reduce is .*mean"):
                self.create(reduce=bad)

    # ---------------------------------------------------------------- whole steps and norms

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_step_is_skipped_whole(self, bad):
        with self.create(nonfinite="skip_step") as kv:
            kv.init({"a": ones(3), "b": ones(2), "n": np.ones(2, np.int32), "r": ones(2, 1)})
            kv.init("t", Rows(np.array([7]), ones(1, 2), 50))
            rows, poison = Rows(np.array([1]), ones(1, 1), 2), np.array([1, bad], F32)
            before = state(kv)
            told = kv.stats()
            calls = [
                (["a", "b", "n"], [5 * ones(3), [ones(2), poison], np.ones(2, np.int32)]),
                (["b", "a", "r"], [poison, 5 * ones(3), rows]),
                (["r", "b"], [Rows(np.array([0, 1]), np.array([[bad], [2]], F32), 2), 5 * ones(2)]),
                (["t", "a"], [Rows(np.array([3]), np.array([[bad, 0]], F32), 50), 5 * ones(3)]),
                (["t", "r"], [Rows(np.array([3]), ones(1, 2), 50), Rows(np.array([0]), np.array([[bad]], F32), 2)]),
            ]
            for keys, parts in calls:
                kv.push(keys, parts)
                assert kv.last_push.found_inf is True
                assert state(kv) == before, keys
            assert counts_since(told, kv) == {"raised": 0, "skipped": 12}
            out = [np.zeros(3, F32), np.zeros(2, F32)]
            kv.pushpull(["a", "b"], [5 * ones(3), poison], out=out)
            assert [each.tolist() for each in out] == [[1, 1, 1], [1, 1]]
            for keys, parts in [(["a", "b"], [5 * ones(3), 6 * ones(2)]), (["r", "n"], [rows, np.ones(2, np.int32)])]:
                kv.push(keys, parts)
                assert kv.last_push == (False, None)
            assert [kv.pull(key).flatten().tolist() for key in "abrn"] == [[5, 5, 5], [6, 6], [1, 1], [1, 1]]
            assert kv.info("a").version == 1

    def test_a_skipped_step_leaves_the_optimizer_as_it_was(self):
        with self.create(nonfinite="skip_step") as kv, self.create() as other:
            for store in (kv, other):
                store.init({"a": ones(70), "b": ones(5)})
                store.set_optimizer("adam", lr=0.1)
            good, bad = {"a": 3 * ones(70), "b": ones(5)}, {"a": np.full(70, np.inf, F32), "b": ones(5)}
            for parts in (bad, good, bad, bad, good):
                kv.push(parts)
                assert kv.last_push.found_inf is (parts is bad)
            other.push(good)
            other.push(good)
            assert state(kv) == state(other)

    @pytest.mark.parametrize("name", ["sgd", "adam", "nadam"])
    def test_gradients_are_clipped_by_the_norm_of_all_keys(self, name):
        torch.manual_seed(4)
        shapes = {"a": (70, 3), "b": (5,), "c": (), "e": (0, 2)}
        params = {key: torch.nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}
        with self.create() as kv:
            kv.init({key: param.detach().clone() for key, param in params.items()})
            kv.set_optimizer(name, lr=0.1, max_grad_norm=2.0, rescale_grad=0.5)
            assert kv.optimizer["max_grad_norm"] == 2
            assert kv.last_push == (None, None)
            right = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam}[name]
            optimizer = right(params.values(), lr=0.1)
            for size in (1.0, 0.01, 30.0):
                parts = {key: [size * torch.randn(shape) for _ in range(2)] for key, shape in shapes.items()}
                for key, param in params.items():
                    param.grad = (parts[key][0] + parts[key][1]) * 0.5
                norm = torch.nn.utils.clip_grad_norm_(params.values(), 2.0)
                optimizer.step()
                kv.push(parts)
                assert kv.last_push.found_inf is False
                assert kv.last_push.grad_norm == pytest.approx(float(norm), rel=1e-6)
                for key, param in params.items():
                    torch.testing.assert_close(kv.pull(key), param.detach(), rtol=1e-5, atol=1e-6)

    def test_a_norm_is_exact(self):
        parts = np.array([3e-30, 1, 2.0**-12, 3e15], F32), np.array([4, 2.0**-40], F32)
        total = sum(Fraction(float(each)) ** 2 for part in parts for each in part)
        with self.create() as kv:
            kv.init({"a": ones(4), "b": ones(2)})
            kv.set_optimizer("sgd", lr=0.0, max_grad_norm=1.0)
            kv.push({"a": parts[0], "b": parts[1]})
            assert kv.last_push.grad_norm == math.sqrt(float(total))

    def test_rows_are_in_the_norm(self):
        with self.create() as kv:
            kv.init({"d": np.zeros(2, F32), "r": np.zeros((3, 1), F32), "t": Rows([1], np.zeros((1, 1), F32), 50)})
            kv.set_optimizer("sgd", lr=1.0, max_grad_norm=1.0)
            rows = Rows([2, 0, 2], np.array([[1], [-4], [3]], F32), 3)
            kv.push({"r": rows, "t": Rows([40], np.array([[2]], F32), 50), "d": np.array([8, 0], F32)})
            assert kv.last_push.grad_norm == 10
            factor = F32(1 / (10 + 1e-6))
            assert kv.pull("r").tolist() == [[4 * factor], [0], [-4 * factor]]
            assert kv.row_sparse_pull("t", row_ids=[40]).values.tolist() == [[-2 * factor]]
            assert kv.pull("d").tolist() == [-8 * factor, 0]
            kv.push("r", rows)
            assert kv.last_push.grad_norm == math.sqrt(32)

    def test_dense_keys_and_tables_in_one_pushpull(self):
        with self.create(nonfinite="skip_step") as kv, tensorkv.create("local", nonfinite="skip_step") as local:
            outs = {id(store): [np.zeros((3, 2), F32), np.zeros(2, F32)] for store in (kv, local)}
            for store in (kv, local):
                store.init({"w": ones(3, 2), "b": ones(2)})
                store.init("t", Rows(np.array([1]), ones(1, 2), 100))
                store.set_optimizer("adam", lr=0.1, max_grad_norm=0.5)
            rng = np.random.default_rng(4)
            for step in range(4):
                w, b, rows = (rng.standard_normal(shape).astype(F32) for shape in ((3, 2), 2, (2, 2)))
                if step == 2:
                    rows[1, 0] = np.inf
                for store in (kv, local):
                    w_out, b_out = outs[id(store)]
                    parts = [w, [b, b], Rows(np.array([1, 40 + step]), rows, 100)]
                    assert store.pushpull(["w", "b", "t"], parts, out=[w_out, [b_out], []]) is None
                    assert store.last_push.found_inf is (step == 2)
                if step == 2:
                    assert kv.info("t").nbytes == local.info("t").nbytes == 3 * 8
                else:
                    assert kv.last_push == local.last_push
                    assert kv.last_push.grad_norm > 0.5
                for mine, other in zip(outs[id(kv)], outs[id(local)], strict=True):
                    assert np.array_equal(mine, other)
            pulled = [store.row_sparse_pull("t", row_ids=range(100)).values for store in (kv, local)]
            assert np.array_equal(*pulled)
            for mine, key in zip(outs[id(kv)], ("w", "b"), strict=True):
                assert np.array_equal(mine, kv.pull(key))
            assert [kv.info(key).version for key in ("w", "b", "t")] == [3] * 3
            with pytest.raises(tensorkv.ValueMismatchError, match="row_sparse_pull"):
                kv.pushpull(["w", "t"], [w, Rows(np.array([1]), ones(1, 2), 100)])
            assert kv.info("w").version == 3

    def test_an_empty_list_of_outs_pulls_nothing(self, kv):
        kv.init({"a": ones(2), "b": ones(2)})
        out = np.zeros(2, F32)
        assert kv.pushpull(["a", "b"], [2 * ones(2), 3 * ones(2)], out=[[], out]) is None
        assert (out.tolist(), kv.pull("a").tolist()) == ([3, 3], [2, 2])
        assert kv.pushpull("a", 4 * ones(2), out=[]) is None
        assert kv.pull("a").tolist() == [4, 4]
        with pytest.raises(tensorkv.ArgumentError, match="empty list"):
            kv.pull("a", out=[])

    def test_norms_and_sums_that_are_not_finite(self):
        grads = {"a": np.array([3, np.inf], F32), "b": np.array([4], F32)}
        for nonfinite, found in {"pass": True, "skip": True, "skip_step": True}.items():
            with self.create(nonfinite=nonfinite) as kv:
                kv.init({"a": ones(2), "b": ones(1)})
                kv.set_optimizer("sgd", lr=1.0, max_grad_norm=2.0)
                kv.push(grads)
                assert kv.last_push.found_inf is found
                values = [kv.pull(key).tolist() for key in "ab"]
                if nonfinite == "pass":
                    # As with clip_grad_norm_: a finite gradient times 0, and Inf times 0.
                    assert (kv.last_push.grad_norm, values[1]) == (math.inf, [1])
                    assert np.isnan(kv.pull("a")[1])
                    kv.push({"a": np.array([3, np.nan], F32), "b": grads["b"]})
                    assert kv.last_push.found_inf
                    assert np.isnan([kv.last_push.grad_norm, kv.pull("b")[0]]).all()
                elif nonfinite == "skip":
                    assert (kv.last_push.grad_norm, values) == (4, [[1, 1], [1 - 4 * F32(2 / (4 + 1e-6))]])
                else:
                    assert values == [[1, 1], [1]]
        with self.create(nonfinite="raise") as kv:
            kv.init({"a": ones(2), "b": ones(1)})
            kv.set_optimizer("sgd", lr=1.0, max_grad_norm=2.0)
            kv.push({"a": np.zeros(2, F32)})
            assert kv.last_push == (False, 0)
            before = state(kv)
            with pytest.raises(tensorkv.NonFiniteError, match=r'push\("a"\)'):
                kv.push(grads)
            assert kv.last_push == (None, None)
            assert state(kv) == before

    def test_a_change_of_hyperparameters_leaves_what_is_known_of_the_last_push(self):
        with self.create(nonfinite="skip") as kv:
            kv.init("w", ones(1))
            kv.set_optimizer("sgd", lr=1.0)
            kv.push("w", np.array([np.nan], F32))
            kv.set_hyperparameters(lr=0.5)
            assert kv.last_push.found_inf is True

    def test_a_bound_on_the_norm_is_a_number_of_the_optimizer(self, tmp_path):
        with self.create() as kv:
            kv.init("w", np.zeros(2, F32))
            for bad in (0, -1.0, math.inf, "1"):
                with pytest.raises(tensorkv.OptimizerError, match="max_grad_norm is"):
                    kv.set_optimizer("sgd", lr=1.0, max_grad_norm=bad)
            kv.set_optimizer("sgd", lr=1.0)
            kv.set_hyperparameters(max_grad_norm=5)
            with pytest.raises(tensorkv.OptimizerError, match="max_grad_norm"):
                kv.set_hyperparameters("w", max_grad_norm=1.0)
            kv.save(tmp_path / "saved")
            kv.set_hyperparameters(max_grad_norm=None)
            kv.push("w", np.array([6, 8], F32))
            assert kv.pull("w").tolist() == [-6, -8]
            assert kv.last_push == (None, None)
            kv.load(tmp_path / "saved")
            kv.push("w", np.array([6, 8], F32))
            assert kv.pull("w").tolist() == pytest.approx([-3, -4])
            assert kv.last_push == (False, 10)
            kv.set_updater(None)
            for push in (kv.push, kv.pushpull):
                push("w", np.array([6, 8], F32))
                assert kv.last_push == (None, None)

    # ---------------------------------------------------------------- update

    def test_an_optimizer_steps_on_the_sum(self, kv):
        kv.init("w", ones(2))
        kv.set_optimizer("sgd", lr=0.5, rescale_grad=0.5, clip_gradient=1.0)
        kv.push("w", [np.array([1, 8], F32), np.array([1, 8], F32)])
        assert kv.pull("w").tolist() == [0.5, 0.5]

    def test_hyperparameters_change_while_running(self, kv):
        kv.init({"a": ones(1), "b": ones(1)})
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_hyperparameters(lr=0.5, keys="a")
        kv.push(["a", "b"], [ones(1), ones(1)])
        assert [x.tolist() for x in kv.pull(["a", "b"])] == [[0.5], [0]]
        kv.set_hyperparameters(lr=0.25, rescale_grad=2.0)
        kv.push(["a", "b"], [ones(1), ones(1)])
        assert [x.tolist() for x in kv.pull(["a", "b"])] == [[0], [-0.5]]
        assert (kv.optimizer["lr"], kv.optimizer["rescale_grad"]) == (0.25, 2.0)

    def test_hyperparameters_of_keys_by_pattern_function_and_list(self, kv):
        names = ["0.weight", "0.bias", "1.weight", "1.bias", "head[0]", "*"]
        kv.init(names, [np.zeros(1, F32) for _ in names])
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_hyperparameters(["1.weight", "*.bias"], lr=2.0)
        kv.set_hyperparameters(lambda key: key.startswith("0"), weight_decay=0.0, lr=4.0)
        kv.set_hyperparameters("*", lr=8.0)  # a key of exactly this name
        kv.set_hyperparameters("head[[]?]", lr=16.0)
        kv.push(names, [ones(1) for _ in names])
        rates = dict(zip(names, [-float(x[0]) for x in kv.pull(names)], strict=True))
        assert rates == {"0.weight": 4, "0.bias": 4, "1.weight": 2, "1.bias": 2, "head[0]": 16, "*": 8}

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ("*.bais", r'set_hyperparameters\("\*.bais"\): the pattern matches no key; similar keys are "0.bias"'),
            (["0.bias", "?"], r'set_hyperparameters\("\?"\): the pattern matches no key; the keys are "0.weight", '),
            ("head[0]", r'set_hyperparameters\("head\[0\]"\): the pattern matches no key'),
            ("0.Bias", r'set_hyperparameters\("0.Bias"\): no such key'),
            (lambda key: False, "set_hyperparameters: the function .* returns true for no key; the keys are"),
        ],
        ids=["pattern", "second pattern", "brackets", "name", "function"],
    )
    def test_a_choice_of_keys_that_chooses_nothing(self, kv, keys, message):
        kv.init({"0.weight": np.zeros(1, F32), "0.bias": np.zeros(1, F32)})
        kv.set_optimizer("sgd", lr=1.0)
        with pytest.raises(tensorkv.KeyNotFoundError, match=message):
            kv.set_hyperparameters(keys, lr=2.0)
        kv.push("0.bias", ones(1))
        assert kv.pull("0.bias").tolist() == [-1]

    def test_patterns_are_for_str_keys(self, kv):
        kv.init({3: np.zeros(1, F32), 4: np.zeros(1, F32)})
        kv.set_optimizer("sgd", lr=1.0)
        with pytest.raises(tensorkv.KeyNotFoundError, match="matches no key"):
            kv.set_hyperparameters("*", lr=2.0)
        kv.set_hyperparameters([lambda key: key > 3], lr=2.0)
        kv.push([3, 4], [ones(1), ones(1)])
        assert [x.tolist() for x in kv.pull([3, 4])] == [[-1], [-2]]

    # ---------------------------------------------------------------- pushpull, broadcast

    def test_pushpull_is_push_then_pull(self, kv, library):
        kv.init(["a", "b"], [library.make([0, 0]), library.make([0, 0])])
        pulled = kv.pushpull(["a", "b"], [[library.make([1, 2])] * 3, library.make([4, 5])])
        assert [library.read(x).tolist() for x in pulled] == [[3, 6], [4, 5]]

    def test_pushpull_in_place(self, kv):
        kv.init("w", np.zeros(2, F32))
        parts = [np.array([1, 2], F32), np.array([10, 20], F32)]
        kv.pushpull("w", parts, out=parts)
        assert [part.tolist() for part in parts] == [[11, 22], [11, 22]]

    def test_pushpull_into_the_parts_of_other_keys(self, kv):
        kv.init(["a", "b"], [np.zeros(2, F32), np.zeros(2, F32)])
        x, y = np.array([1, 2], F32), np.array([3, 4], F32)
        kv.pushpull(["a", "b"], [x, y], out=[y, x])
        assert (x.tolist(), y.tolist()) == ([3, 4], [1, 2])

    def test_pushpull_into_a_shifted_part(self, kv):
        kv.init("w", np.zeros(4, F32))
        base = np.arange(5, dtype=F32)
        kv.pushpull("w", [base[:4], ones(4)], out=base[1:])
        assert base.tolist() == [0, 1, 2, 3, 4]

    def test_a_bad_out_stops_the_push_too(self, kv):
        kv.init("w", ones(2))
        before = state(kv)
        with pytest.raises(tensorkv.ValueMismatchError):
            kv.pushpull("w", 5 * ones(2), out=np.zeros(3, F32))
        assert state(kv) == before

    def test_a_pushpull_that_cannot_return_its_arrays_changes_nothing(self, kv, monkeypatch):
        jax = pytest.importorskip("jax")
        ml_dtypes = pytest.importorskip("ml_dtypes")
        jax.config.update("jax_enable_x64", True)
        try:
            kv.init(["d", "i"], [jax.numpy.zeros(2, "float64"), jax.numpy.zeros(2, "int64")])
        finally:
            jax.config.update("jax_enable_x64", False)
        kv.init("h", np.zeros(2, ml_dtypes.bfloat16))
        kv.init("w", ones(2))
        one, half = np.ones(2), np.ones(2, ml_dtypes.bfloat16)
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        calls = {
            r'^pushpull\("d"\): the value is float64, .*jax_enable_x64': lambda: kv.pushpull("d", one),
            r'^pushpull\("i"\): the value is int64, .*jax_enable_x64': lambda: kv.pushpull(
                ["w", "i"], [ones(2), one.astype(int)]
            ),
            r'^pushpull\("h"\): the value is bfloat16, .*ml_dtypes': lambda: kv.pushpull_tree(
                {"w": ones(2), "h": half}
            ),
        }
        for said, call in calls.items():
            for _ in range(3):
                with pytest.raises(tensorkv.ArrayTypeError, match=said):
                    call()
        assert {key: kv.info(key).version for key in kv.keys()} == {"d": 0, "i": 0, "h": 0, "w": 0}
        kv.pushpull("d", one, out=one)
        assert one.tolist() == [1, 1]

    def test_broadcast(self, kv, library):
        value = library.make([1, 2])
        assert library.read(kv.broadcast("a", value)).tolist() == [1, 2]
        out = [np.zeros(2, F32), np.zeros(2, F32)]
        kv.broadcast("b", value, out=out)
        assert [x.tolist() for x in out] == [[1, 2], [1, 2]]
        with pytest.raises(tensorkv.ValueMismatchError):
            kv.broadcast("c", value, out=np.zeros(3, F32))
        assert "c" not in kv
