"""Rows, and arrays with unusual layouts, dtypes and surroundings."""

import itertools
import warnings

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows

from . import surroundings
from .values import (
    DTYPES,
    F32,
    FIRST_ROWS,
    FLOAT8,
    LAYOUTS,
    NO_ARRAYS,
    can_hold,
    check_neighbours,
    extremes,
    kind_of,
    ones,
    raw,
    state,
)


class ArrayContract:
    """Rows, and arrays with unusual layouts, dtypes and surroundings."""

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

    @pytest.mark.parametrize("name", list(FIRST_ROWS))
    def test_rows_start_as_init_says(self, kv, tmp_path, name):
        """With the same bits in every type of store, after a checkpoint, and beside rows that were pushed."""
        init, numbers, dtype, bits = FIRST_ROWS[name]
        kv.init(name, Rows([], torch.zeros(0, 5, dtype=dtype), 10**12, init=init, **numbers))
        ids = [0, 7, 10**12 - 1]
        first = kv.row_sparse_pull(name, row_ids=ids).values
        assert first.view(torch.uint8).numpy().tobytes().hex() == bits
        assert kv.info(name).nbytes == 0
        kv.set_optimizer("sgd", lr=0.5)
        kv.push(name, Rows(np.array([7]), torch.ones(1, 5, dtype=dtype), 10**12))
        kv.save(tmp_path / "started")
        with self.create() as other:
            other.load(tmp_path / "started")
            for store in (kv, other):
                rows = store.row_sparse_pull(name, row_ids=ids).values
                assert torch.equal(rows[[0, 2]], first[[0, 2]])
                assert torch.equal(rows[1], first[1] - torch.full((5,), 0.5, dtype=dtype))
                assert store.info(name).nbytes == 5 * dtype.itemsize

    def test_tables_of_one_seed_start_differently(self, kv):
        none = np.zeros((0, 4), F32)
        kv.init({"users": Rows([], none, 9, init="normal"), "items": Rows([], none, 9, init="normal")})
        users, items = kv.row_sparse_pull(["users", "items"], row_ids=[range(9), range(9)])
        assert not np.isin(users.values, items.values).any()

    def test_rows_that_are_given_beside_init(self, kv):
        kv.init("t", Rows([3, 1, 3], ones(3, 2), 5, init=-1.0))
        assert kv.row_sparse_pull("t", row_ids=range(5)).values[:, 0].tolist() == [-1, 1, -1, 2, -1]
        with pytest.raises(tensorkv.ArgumentError, match=r'push\("t"\): part 0 has init='):
            kv.push("t", Rows([3], ones(1, 2), 5, init=-1.0))
        assert kv.info("t").version == 0

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
    def test_inference_mode(self, optimizer):
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

    # ---------------------------------------------------------------- dtypes

    def test_which_dtypes_a_part_may_have(self, kv):
        """Each pair of dtypes, as the table of the contract has them."""
        low = (*FLOAT8, torch.float16, torch.bfloat16, torch.float32)
        kv.init([str(dtype) for dtype in DTYPES], [torch.zeros(4, dtype=dtype) for dtype in DTYPES])
        for value, dtype in itertools.product(DTYPES, DTYPES):
            key, part = str(value), extremes(dtype)
            fits = kind_of(dtype) == kind_of(value) and (can_hold(value, dtype) or (dtype in low and value in low))
            if dtype is value or (fits and value not in FLOAT8):
                kv.push(key, part)
                assert torch.equal(raw(kv.pull(key)), raw(part.to(value))), (dtype, value)
            else:
                before = raw(kv.pull(key))
                with pytest.raises(tensorkv.ValueMismatchError, match="part 0 is"):
                    kv.push(key, part)
                assert torch.equal(raw(kv.pull(key)), before), (dtype, value)

    def test_which_dtypes_an_out_may_have(self, kv):
        """Each pair of dtypes, as the table of the contract has them."""
        kv.init([str(dtype) for dtype in DTYPES], [extremes(dtype) for dtype in DTYPES])
        for value, dtype in itertools.product(DTYPES, DTYPES):
            key, out = str(value), torch.ones(4).to(dtype)
            fits = kind_of(dtype) == kind_of(value) or can_hold(dtype, value)
            if dtype is value or (fits and value not in FLOAT8 and dtype not in FLOAT8):
                kv.pull(key, out=out)
                assert torch.equal(raw(out), raw(extremes(value).to(dtype))), (value, dtype)
            else:
                with pytest.raises(tensorkv.ValueMismatchError, match="out 0 is"):
                    kv.pull(key, out=out)
                assert torch.equal(raw(out), raw(torch.ones(4).to(dtype))), (value, dtype)

    # ---------------------------------------------------------------- float8

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
    def test_float8_keeps_every_bit(self, kv, library, name):
        bits, dtype = torch.arange(254, dtype=torch.uint8).repeat(3, 1), getattr(torch, name)
        value = bits.view(dtype)
        if library.name != "torch":
            value = bits.numpy().view(np.dtype(getattr(pytest.importorskip("ml_dtypes"), name)))
        if library.name == "jax":
            value = pytest.importorskip("jax.numpy").asarray(value)
        kv.init(["w", "large"], [value, torch.zeros(700, 500, dtype=dtype)])
        assert kv.info("w").dtype == name
        got = kv.pull("w")
        assert type(got) is type(value)
        for each in (got, *kv.pull(["w"])):
            found = each.view(torch.uint8) if library.name == "torch" else np.array(each).view(np.uint8)
            assert np.array_equal(found, bits)
        # Without the scale of a block such numbers mean little.
        for wide in (torch.float16, torch.float32, torch.uint8):
            with pytest.raises(tensorkv.ValueMismatchError, match=f"{name}; give an out of the same dtype"):
                kv.pull("w", out=torch.empty(3, 254, dtype=wide))
        out = torch.zeros(2, 4, dtype=dtype)
        kv.pull("w", out=out, region=(slice(1, 3), slice(2, 6)))
        assert torch.equal(out.view(torch.uint8), bits[1:3, 2:6])

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
    def test_float8_is_summed_in_float32(self, kv, name):
        dtype, chance = getattr(torch, name), torch.Generator().manual_seed(1)
        kv.init({"w": torch.zeros(700, 500, dtype=dtype), "s": torch.zeros((), dtype=dtype)})
        parts = [torch.randn(700, 500, generator=chance).to(dtype) for _ in range(3)]
        kv.push({"w": parts, "s": torch.tensor(3.0).to(dtype)})
        expected = (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype)
        assert torch.equal(kv.pull("w").view(torch.uint8), expected.view(torch.uint8))
        assert kv.pull("s").item() == 3
        got = kv.pushpull("w", parts[1])
        assert torch.equal(got.view(torch.uint8), parts[1].view(torch.uint8))
        kv.push("w", Rows(np.array([699, 3, 3]), torch.ones(3, 500).to(dtype), 700))
        rows = kv.row_sparse_pull("w", row_ids=[3, 4, 699]).values.float()
        assert rows[0].eq(2).all()
        assert torch.equal(rows[1], parts[1][4].float())
        assert rows[2].eq(1).all()
        kv.init("wide", torch.zeros(700, 500))
        kv.push("wide", parts[0])
        assert torch.equal(kv.pull("wide"), parts[0].float())

    def test_float8_is_not_stepped_and_nothing_is_rounded_to_it(self, kv):
        kv.init("w", torch.ones(3, dtype=torch.float8_e5m2))
        for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool):
            part = torch.ones(3).to(dtype)
            with pytest.raises(tensorkv.ValueMismatchError, match="float8_e5m2"):
                kv.push("w", part)
        kv.set_optimizer("sgd", lr=1.0)
        with pytest.raises(tensorkv.OptimizerError, match="float8_e5m2"):
            kv.push("w", torch.ones(3, dtype=torch.float8_e5m2))
        assert kv.pull("w").tolist() == [1, 1, 1]
