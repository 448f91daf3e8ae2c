"""The contract that every engine passes.

A test module of an engine subclasses ``Contract`` and says how to create a store; that is all:

    class TestLocal(Contract):
        TYPE = "local"
"""

import contextlib
import os
import threading
import warnings

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.shard.optimizers import ROWWISE
from tests.support import surroundings

F32 = np.float32


VIEWS = {
    "steps": lambda base: base[::2, ::3],
    "negative steps": lambda base: base[::-2, ::-3],
    "transposed": lambda base: base.T[:6:3, :4:2].T,
    "Fortran order": lambda base: np.asfortranarray(base)[:2, :2],
}

LAYOUTS = {
    "0-d": lambda: np.array(2, F32),
    "empty": lambda: np.zeros((0, 3), F32),
    "strided and flipped": lambda: np.arange(12, dtype=F32).reshape(3, 4)[::2, ::-1],
    "broadcast": lambda: np.broadcast_to(F32(3), (4, 5)),
    "Fortran order": lambda: np.asfortranarray(np.arange(6, dtype=F32).reshape(2, 3)),
    "big-endian": lambda: np.arange(6, dtype=">f4"),
    "NumPy scalar": lambda: np.float64(3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "conjugated": lambda: torch.arange(3).to(torch.complex64).conj(),
    "0-d bool": lambda: torch.ones((), dtype=torch.bool),
}
NO_ARRAYS = {
    "none": lambda: None,
    "text": lambda: "text",
    "int": lambda: 3,
    "float": lambda: 2.5,
    "list": lambda: [1.0, 2.0],
    "array of str": lambda: np.array(["a"]),
    "array of objects": lambda: np.array([object()]),
    "datetime": lambda: np.array([1], "datetime64[s]"),
    "masked": lambda: np.ma.masked_array([1.0], [True]),
    "structured": lambda: np.array([(1, 2.0)], "i4,f4"),
    "longdouble": lambda: np.array([1], np.longdouble),
    "meta": lambda: torch.empty(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "csr": lambda: torch.ones(2, 2).to_sparse_csr(),
    "coo with two sparse dimensions": lambda: torch.ones(2, 2).to_sparse(2),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "a class": lambda: np.ndarray,
    "object": lambda: object(),
}


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def state(kv):
    """Everything that a store holds, as bytes: to see that a failed call changed nothing."""
    held = {}
    for key in kv.keys():
        info = kv.info(key)
        if info.kind == "rows":
            seen = kv.row_sparse_pull(key, row_ids=np.arange(min(info.shape[0], 1000)))
            held[key] = (info, np.asarray(seen.values).tobytes())
        else:
            value = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            kv.pull(key, out=value)
            held[key] = (info, value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return held


def check_neighbours(kv, name, shapes, **numbers):
    """Check that each key has the bits that it has when it is pushed alone, whatever is pushed in the same call."""
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float16]
    dtypes += [torch.complex64] if name in ROWWISE else []
    kinds = [(shape, dtype) for dtype in dtypes for shape in shapes if name != "muon" or len(shape) == 2]
    torch.manual_seed(5)
    first = [torch.randn(shape, dtype=dtype) for shape, dtype in kinds]
    pushed = [[torch.randn(shape, dtype=dtype) * 1e-3 for shape, dtype in kinds] for _ in range(2)]
    keys = [[f"{each}-{index}" for index in range(len(kinds))] for each in ("alone", "together")]
    for own in keys:
        kv.init(own, first)
    kv.set_optimizer(name, **{"lr": 0.01, **numbers})
    for grads in pushed:
        for key, grad in zip(keys[0], grads, strict=True):
            kv.push(key, grad)
        kv.push(keys[1], grads)
    for kind, alone, together in zip(kinds, *map(kv.pull, keys), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True, msg=f"{kind}")


class BaseContract:
    """Tests of the semantics but for updaters; ``TYPE`` and ``OPTIONS`` name the engine."""

    TYPE: str
    OPTIONS: dict = {}
    # Whether updaters of a store's first key run in this process.
    RUNS_UPDATERS = True
    # Rank and number of workers.
    PLACE = (0, 1)

    def create(self, **options):
        return tensorkv.create(self.TYPE, **{**self.OPTIONS, **options})

    @pytest.fixture
    def kv(self):
        with self.create() as store:
            yield store

    # ---------------------------------------------------------------- keys

    @pytest.mark.parametrize("key", ["w", "3", "a/b", "ключ", " ", 3, 0, -7, 2**70], ids=repr)
    def test_str_and_int_are_keys(self, kv, key):
        kv.init(key, ones(2))
        kv.push(key, 5 * ones(2))
        assert kv.pull(key).tolist() == [5, 5]
        assert kv.keys() == [key]
        assert key in kv

    @pytest.mark.parametrize("key", [np.int64(3), np.int32(3), np.uint8(3)], ids=repr)
    def test_numpy_integers_are_ints(self, kv, key):
        kv.init(key, ones(2))
        assert kv.keys() == [3]
        assert type(kv.keys()[0]) is int
        assert kv.pull(3).tolist() == [1, 1]
        assert key in kv

    def test_a_numpy_str_is_a_str(self, kv):
        kv.init(np.str_("w"), ones(1))
        assert type(kv.keys()[0]) is str

    @pytest.mark.parametrize("key", ["", True, False, np.True_, None, 1.0, 2j, b"w", object(), {1, 2}, np.ones(2)])
    def test_other_things_are_no_keys(self, kv, key):
        for call in (kv.init, kv.push):
            with pytest.raises(tensorkv.KeyTypeError):
                call(key, ones(2))
        with pytest.raises(TypeError):
            kv.pull(key)

    def test_one_store_has_one_key_type(self, kv):
        kv.init("3", ones(2))
        with pytest.raises(tensorkv.KeyTypeError, match="keys are str, got int"):
            kv.init(3, ones(2))
        with pytest.raises(tensorkv.KeyTypeError):
            kv.push(3, ones(2))
        with pytest.raises(tensorkv.KeyTypeError):
            kv.pull(3)
        assert 3 not in kv
        assert kv.keys() == ["3"]

    def test_mixed_types_in_one_call(self, kv):
        with pytest.raises(tensorkv.KeyTypeError, match="two types"):
            kv.init(["a", 1], [ones(1), ones(1)])
        assert len(kv) == 0

    # ---------------------------------------------------------------- forms

    def test_key_and_value(self, kv, library):
        kv.init("w", library.make([[1, 2, 3], [4, 5, 6]]))
        kv.push("w", library.make([[6, 5, 4], [3, 2, 1]]))
        assert library.read(kv.pull("w")).tolist() == [[6, 5, 4], [3, 2, 1]]

    def test_parts_are_summed(self, kv, library):
        kv.init("w", library.make([0, 0]))
        kv.push("w", [library.make([1, 2]), library.make([10, 20]), library.make([100, 200])])
        assert library.read(kv.pull("w")).tolist() == [111, 222]

    def test_lists_of_keys(self, kv, library):
        kv.init([5, 7, 9], [library.make([i]) for i in range(3)])
        kv.push([5, 7, 9], [library.make([10]), [library.make([1]), library.make([2])], library.make([30])])
        assert [library.read(x).tolist() for x in kv.pull([9, 5, 7])] == [[30], [10], [3]]

    def test_a_repeated_key_is_summed_also_interleaved(self, kv):
        kv.init(["a", "b"], [ones(1), ones(1)])
        kv.push(["a", "b", "a", "a"], [ones(1), 5 * ones(1), [ones(1), ones(1)], ones(1)])
        assert kv.pull("a").tolist() == [4]
        assert kv.pull("b").tolist() == [5]
        assert kv.info("a").version == 1

    def test_mappings(self, kv):
        kv.init({"a": ones(1), "b": 2 * ones(1)})
        kv.push({"a": [ones(1), ones(1)], "b": 7 * ones(1)})
        out = {"a": np.zeros(1, F32), "b": np.zeros(1, F32)}
        kv.pull(out)
        assert (out["a"].tolist(), out["b"].tolist()) == ([2], [7])
        pushed = kv.pushpull({"a": 4 * ones(1), "b": 5 * ones(1)})
        assert {key: value.tolist() for key, value in pushed.items()} == {"a": [4], "b": [5]}
        kv.pushpull(["a", "b", "a"], [ones(1)] * 3, out=out)
        assert (out["a"].tolist(), out["b"].tolist()) == ([2], [1])
        kv.pushpull({"a": ones(1), "b": ones(1)}, out={"b": out["b"], "a": out["a"]})
        assert (out["a"].tolist(), out["b"].tolist()) == ([1], [1])

    def test_tuples_ranges_and_views_are_lists_too(self, kv):
        values = {0: ones(1), 1: ones(1)}
        kv.init(range(2), (ones(1), ones(1)))
        kv.push((0, 1), [ones(1), ones(1)])
        assert [x.tolist() for x in kv.pull(values.keys())] == [[1], [1]]

    def test_no_keys_at_all(self, kv):
        kv.init([], [])
        kv.push([], [])
        assert kv.pull([]) == []
        kv.pull([], out=[])

    @pytest.mark.parametrize("verb", ["init", "push", "pushpull", "broadcast"])
    def test_unequal_lengths_name_both(self, kv, verb):
        if verb in ("push", "pushpull"):
            kv.init(["a", "b", "c"], [ones(1)] * 3)
        with pytest.raises(ValueError, match=r"3 keys and 2 values"):
            getattr(kv, verb)(["a", "b", "c"], [ones(1), ones(1)])

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

    # ---------------------------------------------------------------- no aliasing

    def test_pushed_arrays_are_free_and_unchanged(self, kv, library):
        kv.init("w", library.make([0, 0]))
        part = library.make([1, 2])
        kv.push("w", part)
        assert library.read(part).tolist() == [1, 2]
        if library.name != "jax":
            part[:] = 9
        assert library.read(kv.pull("w")).tolist() == [1, 2]
        kv.push("w", [part, library.make([5, 5])])
        kv.set_optimizer("sgd", lr=1.0, momentum=0.9, weight_decay=0.1)
        before = library.read(part)
        kv.pushpull("w", part)
        kv.pushpull("w", part)
        assert np.array_equal(library.read(part), before)

    def test_pull_hands_out_no_stored_memory(self, kv, library):
        kv.init("w", library.make([1, 2]))
        first = kv.pull("w")
        if library.name != "jax":
            first[:] = 9
        kept = library.read(first)
        assert library.read(kv.pull("w")).tolist() == [1, 2]
        kv.push("w", library.make([5, 6]))
        assert np.array_equal(library.read(first), kept)

    def test_an_optimizer_keeps_no_pushed_memory(self, kv):
        results = []
        for overwrite in (False, True):
            kv.init(f"w{overwrite}", ones(2))
            kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
            for _ in range(3):
                grad = ones(2)
                kv.push(f"w{overwrite}", grad)
                if overwrite:
                    grad[:] = 1000
            results.append(kv.pull(f"w{overwrite}").tolist())
        assert results[0] == results[1]

    # ---------------------------------------------------------------- pull

    def test_pull_into_one_and_into_several(self, kv):
        kv.init("w", np.array([1, 2], F32))
        a, b, c = np.zeros(2, F32), torch.zeros(2), np.zeros(2)
        assert kv.pull("w", out=a) is None
        kv.pull("w", out=[b, c])
        assert (a.tolist(), b.tolist(), c.tolist()) == ([1, 2], [1, 2], [1, 2])
        d, e = np.zeros(2, F32), np.zeros(2, F32)
        kv.pull(["w", "w"], out=[d, e])
        assert (d.tolist(), e.tolist()) == ([1, 2], [1, 2])

    def test_pull_lists(self, kv):
        kv.init(["a", "b"], [ones(2), 2 * ones(3)])
        a, b1, b2 = np.zeros(2, F32), np.zeros(3, F32), np.zeros(3, F32)
        kv.pull(["a", "b"], out=[a, [b1, b2]])
        assert (a.tolist(), b1.tolist(), b2.tolist()) == ([1, 1], [2, 2, 2], [2, 2, 2])
        first, second = kv.pull(["a", "a"])
        first[:] = 7
        assert second.tolist() == [1, 1]

    @pytest.mark.parametrize("view", VIEWS)
    def test_pull_into_any_strides(self, kv, view):
        kv.init("w", np.array([[1, 2], [3, 4]], F32))
        base = np.full((4, 6), -1, F32)
        out = VIEWS[view](base)[:2, :2]
        touched = int(out.size) if np.shares_memory(out, base) else 0
        kv.pull("w", out=out)
        assert out.tolist() == [[1, 2], [3, 4]]
        assert (base != -1).sum() == touched

    @pytest.mark.parametrize(
        ("value", "out", "fits"),
        [
            ("float32", "float16", True),
            ("float64", "float32", True),
            ("float32", "bfloat16", True),
            ("int64", "int8", True),
            ("int32", "float64", True),
            ("bool", "float32", True),
            ("float32", "complex64", True),
            ("complex128", "complex64", True),
            ("int64", "float32", False),
            ("float32", "int32", False),
            ("complex64", "float32", False),
            ("float32", "bool", False),
        ],
    )
    def test_pull_casts_within_a_family_or_safely(self, kv, value, out, fits):
        kv.init("w", torch.ones(2).to(getattr(torch, value)))
        target = torch.full((2,), 7).to(getattr(torch, out))
        if fits:
            kv.pull("w", out=target)
            assert target.to(torch.complex128).tolist() == [1, 1]
        else:
            before = target.clone()
            with pytest.raises(tensorkv.ValueMismatchError, match=rf"out 0 is {out}"):
                kv.pull("w", out=target)
            assert torch.equal(target, before)

    def test_pull_without_out_gives_what_init_had(self, kv, library):
        for key, dtype in (("h", "float16"), ("f", "float32"), ("i", "int32"), ("b", "bool")):
            kv.init(key, library.make([1, 0], dtype))
            pulled = kv.pull(key)
            assert str(pulled.dtype).removeprefix("torch.") == dtype
            assert library.read(pulled).tolist() == [1, 0]

    def test_like_chooses_the_library(self, kv, library):
        kv.init({"n": ones(2), "t": torch.ones(2)})
        for key in ("n", "t"):
            assert library.read(kv.pull(key, like=library.make([0]))).tolist() == [1, 1]
        assert all(library.read(x).tolist() == [1, 1] for x in kv.pull(["n", "t"], like=library.make([0])))

    def test_like_never_cuts_numbers_down(self, kv):
        jax = pytest.importorskip("jax")
        kv.init("i", np.array([2**40]))
        with pytest.raises(tensorkv.ArrayTypeError, match="jax_enable_x64"):
            kv.pull("i", like=jax.numpy.zeros(1))

    def test_nothing_is_written_when_one_out_is_wrong(self, kv):
        kv.init({"a": ones(2), "b": ones(2)})
        good, read_only = np.zeros(2, F32), np.zeros(2, F32)
        read_only.flags.writeable = False
        for bad in (read_only, np.zeros(3, F32), np.zeros(2, np.int32), "text", None):
            with pytest.raises(tensorkv.TensorKVError):
                kv.pull(["a", "b"], out=[good, bad])
            assert good.tolist() == [0, 0]

    def test_outs_that_overlap(self, kv):
        kv.init("w", ones(4))
        base = np.zeros(6, F32)
        with pytest.raises(tensorkv.ArgumentError, match="overlap"):
            kv.pull("w", out=[base[:4], base[2:]])
        with pytest.raises(tensorkv.ArgumentError, match="overlap"):
            kv.pull("w", out=[base[:4], torch.from_numpy(base)[1:5]])
        assert base.tolist() == [0] * 6
        both = np.zeros(8, F32)
        kv.pull("w", out=[both[::2], both[1::2]])
        assert both.tolist() == [1] * 8

    def test_pull_into_a_parameter(self, kv):
        weight = torch.nn.Parameter(torch.zeros(2))
        kv.init("w", ones(2))
        kv.pull("w", out=weight)
        assert weight.tolist() == [1, 1]
        assert weight.requires_grad

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

    def test_broadcast(self, kv, library):
        value = library.make([1, 2])
        assert library.read(kv.broadcast("a", value)).tolist() == [1, 2]
        out = [np.zeros(2, F32), np.zeros(2, F32)]
        kv.broadcast("b", value, out=out)
        assert [x.tolist() for x in out] == [[1, 2], [1, 2]]
        with pytest.raises(tensorkv.ValueMismatchError):
            kv.broadcast("c", value, out=np.zeros(3, F32))
        assert "c" not in kv

    # ---------------------------------------------------------------- rows

    def test_rows_replace_only_the_rows_they_name(self, kv, library):
        kv.init("w", library.make([[1, 1], [2, 2], [3, 3]]))
        kv.push("w", Rows(library.make([2, 0, 2], "int32"), library.make([[1, 1], [5, 5], [10, 10]]), 3))
        assert library.read(kv.pull("w")).tolist() == [[5, 5], [2, 2], [11, 11]]

    def test_rows_of_several_parts_and_sparse_tensors(self, kv):
        kv.init("w", torch.zeros(4, 1))
        coo = torch.sparse_coo_tensor(
            torch.tensor([[3, 3]]), torch.tensor([[1.0], [2.0]]), (4, 1), check_invariants=True
        )
        kv.push("w", [coo, Rows(np.array([0, 3]), ones(2, 1), 4)])
        assert kv.pull("w").flatten().tolist() == [1, 0, 0, 4]

    def test_rows_beside_a_dense_part(self, kv):
        kv.init("w", np.zeros((3, 1), F32))
        kv.push("w", [Rows(np.array([1]), ones(1, 1), 3), ones(3, 1)])
        assert kv.pull("w").flatten().tolist() == [1, 2, 1]

    def test_rows_beside_a_dense_part_are_not_rounded_before_the_sum(self, kv):
        kv.init("w", np.zeros((2, 1), F32))
        rows = Rows(np.array([0, 0]), np.array([[2048], [1]], np.float16), 2)
        kv.push("w", [rows, np.zeros((2, 1), F32)])
        assert kv.pull("w").flatten().tolist() == [2049, 0]

    def test_row_sparse_pull(self, kv, library):
        kv.init("w", library.make([[1], [2], [3]]))
        rows = kv.row_sparse_pull("w", row_ids=library.make([2, 0, 2], "int32"))
        assert library.read(rows.ids).tolist() == [0, 2]
        assert library.read(rows.values).tolist() == [[1], [3]]
        assert rows.num_rows == 3
        several = kv.row_sparse_pull(["w", "w"], row_ids=[[1], [0, 1]])
        assert [library.read(x.values).tolist() for x in several] == [[[2]], [[1], [2]]]

    def test_row_sparse_pull_into_rows(self, kv):
        kv.init("w", np.array([[1], [2], [3]], F32))
        out = Rows(np.array([], np.int64), np.zeros((0, 1), F32), 3)
        assert kv.row_sparse_pull("w", out=out, row_ids=np.array([2])) is None
        assert (out.ids.tolist(), out.values.tolist()) == ([2], [[3]])

    def test_row_ids_may_be_any_integers(self, kv):
        kv.init("w", np.arange(5, dtype=F32).reshape(5, 1))
        for ids in ([4, 0], (4, 0), range(0, 5, 4), [np.int32(4), np.int64(0)], np.array([4, 0], np.uint8)):
            assert kv.row_sparse_pull("w", row_ids=ids).ids.tolist() == [0, 4]
        assert kv.row_sparse_pull("w", row_ids=[]).values.shape == (0, 1)

    @pytest.mark.parametrize(
        "ids", [[3], [-1], [10**12], [True], [0.5], np.array([0.5]), "text", None, np.array([True])]
    )
    def test_bad_row_ids(self, kv, ids):
        kv.init("w", np.zeros((3, 1), F32))
        with pytest.raises(tensorkv.TensorKVError, match=r'row_sparse_pull\("w"\)'):
            kv.row_sparse_pull("w", row_ids=ids)

    def test_a_table_holds_only_rows_it_has_seen(self, kv):
        kv.init("t", Rows(np.array([5, 2_000_000_000 - 1]), ones(2, 4), 2_000_000_000))
        assert kv.info("t").nbytes == 2 * 4 * 4
        assert kv.info("t").shape == (2_000_000_000, 4)
        assert kv.info("t").kind == "rows"
        kv.push("t", [Rows(np.array([7, 5]), ones(2, 4), 2_000_000_000)] * 2)
        rows = kv.row_sparse_pull("t", row_ids=[5, 6, 7, 1_999_999_999])
        assert rows.values[:, 0].tolist() == [2, 0, 2, 1]
        assert kv.info("t").nbytes == 3 * 4 * 4
        for call in (lambda: kv.pull("t"), lambda: kv.push("t", ones(1, 4))):
            with pytest.raises(tensorkv.ValueMismatchError):
                call()

    @pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
    def test_rows_step_lazily(self, kv, optimizer):
        kv.init("w", ones(4, 2))
        kv.set_optimizer(optimizer, lr=0.1)
        for _ in range(3):
            kv.push("w", Rows(np.array([1, 3]), ones(2, 2), 4))
        value = kv.pull("w")
        assert (value[[0, 2]] == 1).all()
        assert (value[[1, 3]] < 1).all()

    def test_a_sparse_out_is_skipped_with_one_warning(self, kv):
        kv.init("w", ones(2, 2))
        sparse = torch.zeros(2, 2).to_sparse(1)
        dense = np.zeros((2, 2), F32)
        with pytest.warns(tensorkv.SparseOutWarning, match="row_sparse_pull"):
            kv.pull("w", out=[sparse, dense])
        assert (dense == 1).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kv.pull("w", out=sparse)
        with pytest.raises(tensorkv.ArrayTypeError):
            kv.pull("w", out=sparse, ignore_sparse=False)

    # ---------------------------------------------------------------- odd arrays

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_arrays_of_any_layout(self, kv, layout):
        array = LAYOUTS[layout]()
        expected = array.detach().resolve_conj().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        kv.init("w", array)
        kv.push("w", [array, array])
        pulled = kv.pull("w")
        assert pulled.shape == array.shape
        assert np.array_equal(
            np.asarray(pulled), expected | expected if expected.dtype == bool else expected + expected
        )

    def test_read_only_arrays(self, kv):
        array = ones(3)
        array.flags.writeable = False
        kv.init("w", array)
        kv.push("w", [array, array])
        assert kv.pull("w").tolist() == [2, 2, 2]

    @pytest.mark.parametrize("kind", NO_ARRAYS)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_things_that_are_no_arrays(self, kv, kind):
        thing = NO_ARRAYS[kind]()
        kv.init("w", ones(2))
        before = state(kv)
        for call in (lambda: kv.init("x", thing), lambda: kv.push("w", thing), lambda: kv.push("w", [ones(2), thing])):
            with pytest.raises((tensorkv.ArrayTypeError, tensorkv.ArgumentError), match=r'"[wx]"'):
                call()
        assert state(kv) == before

    @pytest.mark.parametrize("name", ["adam", "adafactor"])
    def test_an_update_depends_on_no_other_key(self, kv, name):
        check_neighbours(kv, name, [(8,), (5, 3)])

    @pytest.mark.parametrize("name", ["a device", "float64", "inference mode"])
    def test_what_surrounds_calls_changes_nothing(self, kv, name):
        assert surroundings.run(kv, None, "nadam", surroundings.SURROUNDINGS[name]) == surroundings.expected(
            "nadam", False
        )

    @pytest.mark.parametrize("optimizer", [None, "sgd", "adam", "rmsprop"])
    def test_inference_mode(self, kv, optimizer):
        """A store that is filled in inference mode is the same store."""
        keys = [f"k{i}" for i in range(12)]
        results = []
        for mode in (False, True):
            with self.create() as kv:
                with torch.inference_mode(mode):
                    kv.init([*keys, "big"], [torch.ones(3)] * 12 + [torch.ones(300_000)])
                    if optimizer:
                        kv.set_optimizer(optimizer, lr=0.1)
                    outs = [torch.zeros(3) for _ in keys]
                    for _ in range(4):
                        kv.pushpull(keys, [torch.ones(3)] * 12, out=outs)
                        kv.push(keys[0], torch.ones(3))
                    large = torch.zeros(300_000)
                    kv.pushpull("big", [torch.ones(300_000)] * 3, out=large)
                for _ in range(3):
                    kv.push(keys, [torch.ones(3)] * 12)
                    kv.push(keys[0], torch.ones(3))
                kv.pushpull("big", [torch.ones(300_000)] * 2)
                results.append([x.tolist() for x in (*outs, large[:5], *kv.pull(keys))])
        assert results[0] == results[1]

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
        with pytest.raises(tensorkv.StoreClosedError), kv:
            pass
        assert repr(kv) == f"KVStore({self.TYPE!r}, closed)"

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
        assert repr(kv) == f"KVStore({self.TYPE!r}, 2 keys)"
        kv.set_optimizer("sgd", lr=0.1)
        assert repr(kv) == f"KVStore({self.TYPE!r}, 2 keys, optimizer='sgd')"
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
        kv.set_optimizer("adam", lr=0.1)
        kv.push("a", ones(2))
        kv.save(tmp_path / "checkpoint")
        with self.create() as other:
            other.load(tmp_path / "checkpoint")
            assert state(other) == state(kv)
            for store in (kv, other):
                store.push("a", ones(2))
            assert state(other) == state(kv)

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

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_nonfinite_raise(self, bad):
        with self.create(nonfinite="raise") as kv:
            kv.init(["a", "b", "i"], [ones(2), ones(2), np.ones(2, np.int32)])
            before = state(kv)
            with pytest.raises(tensorkv.NonFiniteError, match=r'push\("b"\)'):
                kv.push(["a", "b"], [5 * ones(2), [ones(2), np.array([1, bad], F32)]])
            assert state(kv) == before
            kv.push("i", np.ones(2, np.int32))
            kv.push("a", 5 * ones(2))
            assert kv.pull("a").tolist() == [5, 5]
            assert kv.stats()["nonfinite"] == {"raised": 1, "skipped": 0}

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
            kv.push(["a", "b"], [5 * ones(2), np.array([1, np.nan], F32)])
            assert (kv.pull("a").tolist(), kv.pull("b").tolist()) == ([5, 5], [1, 1])
            assert kv.info("b").version == 0
            kv.push("r", Rows(np.array([0]), np.array([[np.inf]], F32), 2))
            assert kv.pull("r").tolist() == [[1], [1]]
            assert kv.stats()["nonfinite"] == {"raised": 0, "skipped": 2}
            big = np.array([3e38, 1], F32)
            kv.push("a", [big, big])
            assert kv.pull("a").tolist() == [5, 5], "a sum that overflows counts too"


class Contract(BaseContract):
    """All of the semantics, for engines that run functions of the caller."""

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
