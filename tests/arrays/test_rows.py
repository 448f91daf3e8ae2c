"""Rows: what counts as rows, and how repeated ids are summed."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tensorkv
from tensorkv import ArgumentError, ArrayTypeError, Rows, ValueMismatchError
from tensorkv.arrays import interop, rows
from tensorkv.arrays.rows import is_rows, merge, take_ids, take_rows, unchecked_rows

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint16]
DTYPES += interop.FLOAT8


def coo(ids, values, shape):
    return torch.sparse_coo_tensor(torch.tensor([ids]), values, shape, check_invariants=True)


# ---------------------------------------------------------------- what counts


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_any_integer(library, dtype):
    if library.name == "jax" and dtype == "int64":
        dtype = "int32"
    rows = Rows(library.make([4, 0, 4], dtype), library.make([[1, 2], [3, 4], [5, 6]]), 5)
    assert rows.shape == (5, 2)
    assert rows.dtype == "float32"
    assert rows.nbytes == 24
    merged = rows.merged()
    assert merged.ids.dtype is torch.int64
    assert merged.ids.tolist() == [0, 4]
    assert merged.values.tolist() == [[3, 4], [6, 8]]


def test_empty_rows(library):
    rows = Rows(
        library.make([], "int32"), library.make(np.zeros((0, 3))) if library.name != "torch" else torch.zeros(0, 3), 7
    )
    assert rows.shape == (7, 3)
    assert rows.merged().values.shape == (0, 3)
    assert rows.to_dense().tolist() == [[0.0] * 3] * 7
    assert repr(rows) == "Rows(0 of 7 rows, shape (7, 3), float32)"


def test_rows_of_a_vector_and_of_more_dimensions():
    assert Rows(np.array([1]), np.ones(1), 3).to_dense().tolist() == [0, 1, 0]
    assert Rows(np.array([1]), np.ones((1, 2, 2)), 3).shape == (3, 2, 2)
    assert Rows(np.array([0]), np.ones((1, 0)), 1).to_dense().shape == (1, 0)
    assert Rows(np.zeros(0, int), np.ones((0, 2)), 0).to_dense().shape == (0, 2)


@pytest.mark.parametrize(
    ("ids", "values", "num_rows", "error", "words"),
    [
        ([0.0], np.ones((1, 2)), 3, ArrayTypeError, "ids is [0.0]; expected integers"),
        (np.array([0]), [[1.0]], 3, ArrayTypeError, "values is [[1.0]], not an array"),
        (np.array([0]), None, 3, ArrayTypeError, "values is None"),
        (np.array([0.0]), np.ones((1, 2)), 3, ArrayTypeError, "ids have dtype float64; expected integers"),
        (np.array([True]), np.ones((1, 2)), 3, ArrayTypeError, "ids have dtype bool"),
        (np.array([0], np.uint64), np.ones((1, 2)), 3, ArrayTypeError, "ids have dtype uint64"),
        (np.array([0]), np.array([["a"]]), 3, ArrayTypeError, "values has dtype"),
        (np.array([[0]]), np.ones((1, 2)), 3, ValueMismatchError, "ids have shape (1, 1)"),
        (np.array(0), np.ones((1, 2)), 3, ValueMismatchError, "ids have shape ()"),
        (np.array([0, 1]), np.ones((1, 2)), 3, ValueMismatchError, "values (1, 2)"),
        (np.array([0]), np.array(1.0), 3, ValueMismatchError, "values ()"),
        (np.array([3]), np.ones((1, 2)), 3, ValueMismatchError, "row id 3 is out of range; there are rows 0 to 2"),
        (np.array([1, -1]), np.ones((2, 2)), 3, ValueMismatchError, "row id -1 is out of range"),
        (np.array([0]), np.ones((1, 2)), 0, ValueMismatchError, "row id 0 is out of range"),
        (np.array([0]), np.ones((1, 2)), -1, ArgumentError, "num_rows is -1"),
        (np.array([0]), np.ones((1, 2)), True, ArgumentError, "num_rows is True"),
        (np.array([0]), np.ones((1, 2)), 3.0, ArgumentError, "num_rows is 3.0"),
        (np.array([0]), np.ones((1, 2)), None, ArgumentError, "num_rows is None"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), torch.ones(1, 2), 3, ArrayTypeError, "meta"),
        (torch.zeros(1, dtype=torch.int64), torch.ones(1, 2).to_sparse(), 3, ArrayTypeError, "layout"),
    ],
)
def test_what_is_no_rows(ids, values, num_rows, error, words):
    with pytest.raises(error) as caught:
        Rows(ids, values, num_rows)
    assert words in str(caught.value)


def test_rows_changed_into_nonsense_are_noticed_by_a_push():
    kv = tensorkv.create()
    kv.init("w", np.zeros((3, 1)))
    rows = Rows(np.array([0]), np.ones((1, 1)), 3)
    rows.ids = np.array([7])
    with pytest.raises(ValueMismatchError, match="row id 7 is out of range"):
        kv.push("w", rows)
    assert kv.pull("w").tolist() == [[0]] * 3


# ---------------------------------------------------------------- sparse COO tensors


@pytest.mark.parametrize("coalesced", [False, True])
def test_coo_tensors(coalesced):
    tensor = coo([4, 1, 4], torch.tensor([[1.0], [2.0], [3.0]]), (6, 1)).requires_grad_()
    assert is_rows(tensor)
    rows = take_rows(tensor.coalesce() if coalesced else tensor)
    assert rows.num_rows == 6
    assert not rows.values.requires_grad
    assert rows.ids.tolist() == ([1, 4] if coalesced else [4, 1, 4])
    assert torch.equal(rows.to_dense(), tensor.detach().to_dense())


def test_coo_tensors_of_scalars_and_without_elements():
    assert take_rows(coo([2, 2], torch.tensor([1.0, 2.0]), (3,))).to_dense().tolist() == [0, 0, 3]
    assert take_rows(torch.zeros(4, 2).to_sparse(1)).to_dense().tolist() == [[0, 0]] * 4


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_coo_tensors_that_are_no_rows():
    with pytest.raises(ArrayTypeError, match="2 sparse dimensions; expected one"):
        take_rows(torch.eye(3).to_sparse())
    bad = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    with pytest.raises(ValueMismatchError, match="row id 9 is out of range"):
        take_rows(bad)
    assert not is_rows(torch.eye(3).to_sparse_csr())
    assert not is_rows(np.eye(3))


# ---------------------------------------------------------------- sums


def added(parts, dtype):
    """Return ids and sums, added one by one in the order given, in at least float32, rounded once."""
    wide = torch.float32 if dtype in interop.LOW_PRECISION else dtype
    wide = torch.int16 if dtype is torch.uint16 else wide
    sums = {}
    for ids, values in parts:
        for i, row in zip(ids, values.to(dtype) if dtype is torch.uint16 else values.to(wide), strict=True):
            own = row.view(wide) if dtype is torch.uint16 else row
            sums[i] = sums[i] + own if i in sums else own.clone()
    rows = (
        torch.stack([sums[i] for i in sorted(sums)]) if sums else torch.zeros((0, *parts[0][1].shape[1:]), dtype=wide)
    )
    return sorted(sums), rows.view(dtype) if dtype is torch.uint16 else rows.to(dtype)


@settings(max_examples=150)
@given(
    groups=st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (3,), (17,), (2, 2), (0,)]),
    base=st.sampled_from([0, 2_000_000_000, 2**62]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_are_added_in_the_order_given(groups, dtype, shape, base, seed):
    rng = np.random.default_rng(seed)
    parts = []
    for ids in groups:
        numbers = rng.normal(size=(len(ids), *shape)) * 40 + (0 if dtype.is_floating_point else 100)
        numbers[rng.random(numbers.shape) < 0.2] = -0.0
        values = torch.from_numpy(numbers).abs() if dtype is torch.uint16 else torch.from_numpy(numbers)
        parts.append(
            (
                [base + i for i in ids],
                values.to(torch.int64).to(dtype) if not dtype.is_floating_point else values.to(dtype),
            )
        )
    rows = [Rows(torch.tensor(ids, dtype=torch.int64), values, base + 7) for ids, values in parts]
    copies = [values.clone() for _, values in parts]
    merged = merge(rows)
    ids, expected = added(parts, dtype)
    assert merged.ids.tolist() == ids
    assert merged.num_rows == base + 7
    assert merged.values.dtype is dtype
    assert (
        merged.values.contiguous().view(-1).view(torch.uint8).tolist()
        == expected.contiguous().view(-1).view(torch.uint8).tolist()
    )
    if merged.values.numel():
        merged.values.fill_(1)
    assert all(torch.equal(values, copy) for (_, values), copy in zip(parts, copies, strict=True))


@given(
    array=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=st.floats(-8, 8, width=16)
    ),
    ids=st.data(),
)
@settings(max_examples=50)
def test_to_dense_is_numpys_add_at(array, ids):
    chosen = np.array(ids.draw(st.lists(st.integers(0, 5), min_size=len(array), max_size=len(array))), np.int64)
    expected = np.zeros((6, *array.shape[1:]), np.float32)
    np.add.at(expected, chosen, array)
    assert Rows(chosen, array, 6).to_dense().numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    values = torch.full((9, 1), 1 + 2**-7, dtype=dtype)
    values[0] = 256
    rows = Rows(torch.zeros(9, dtype=torch.int64), values, 1)
    exact = torch.tensor([[256 + 8 * (1 + 2**-7)]])
    assert rows.merged().values.dtype is dtype
    assert torch.equal(rows.merged().values, exact.to(dtype))
    assert torch.equal(merge([rows], torch.float32).values, exact)
    assert torch.equal(rows.to_dense(torch.float32), exact)


def test_integers_wrap_and_bools_are_joined_by_or():
    ids = torch.zeros(2, dtype=torch.int64)
    for dtype, high in [("int8", 127), ("uint8", 255), ("uint16", 65535), ("uint32", 2**32 - 1), ("int64", 2**63 - 1)]:
        values = torch.from_numpy(np.array([[high], [2]], dtype))
        with np.errstate(over="ignore"):
            expected = np.array([high], dtype) + np.array([2], dtype)
        assert merge([Rows(ids, values, 1)]).values.tolist() == [expected.tolist()]
    assert merge([Rows(ids, torch.tensor([[True, False], [True, False]]), 1)]).values.tolist() == [[True, False]]


def test_narrow_integers_are_summed_in_the_values_dtype():
    rows = Rows(torch.zeros(2, dtype=torch.int64), torch.full((2, 1), 100, dtype=torch.int8), 1)
    assert merge([rows], torch.int64).values.tolist() == [[200]]
    assert rows.to_dense(torch.int64).tolist() == [[200]]


def test_a_negative_zero_stays_one_whatever_else_is_repeated():
    values = torch.tensor([[-0.0], [1.0], [2.0], [-0.0], [-0.0]])
    merged = merge([Rows(torch.tensor([0, 1, 1, 2, 2]), values, 3)])
    assert merged.values.signbit().tolist() == [[True], [False], [True]]


# ---------------------------------------------------------------- forms


def test_merged_and_moved_rows_share_nothing_that_is_changed():
    ids, values = torch.tensor([1, 0]), torch.tensor([[1.0], [2.0]])
    merged = Rows(ids, values, 2).merged()
    merged.values.fill_(9)
    merged.ids.fill_(0)
    assert (ids.tolist(), values.tolist()) == ([1, 0], [[1.0], [2.0]])
    assert Rows(ids.numpy(), values.numpy(), 2).to("cpu").values.tolist() == [[1.0], [2.0]]


def test_take_rows_copies_nothing():
    ids, values = np.array([1, 0]), np.ones((2, 3), np.float32)
    rows = take_rows(Rows(ids, values, 2))
    values[:] = 5
    assert rows.values.tolist() == [[5] * 3] * 2
    assert take_rows(rows) is rows


def test_repr():
    rows = Rows(np.array([3, 3]), np.ones((2, 4), np.int16), 2_000_000_000)
    assert repr(rows) == "Rows(2 of 2000000000 rows, shape (2000000000, 4), int16)"
    assert repr(Rows(torch.tensor([0]), torch.ones(1, 2, dtype=torch.bfloat16), 1)).endswith("bfloat16)")


def test_rows_are_compared_by_identity():
    one, other = (Rows(np.array([0]), np.ones((1, 1)), 1) for _ in range(2))
    assert len({one, other, one}) == 2
    assert one != other


# ---------------------------------------------------------------- row ids of a pull


@pytest.mark.parametrize(
    "row_ids",
    [
        [5, 1, 5, 0],
        (5, 1, 0),
        np.array([0, 1, 5, 1], np.int32),
        torch.tensor([5, 0, 1]),
        np.array([5, 1, 0], np.uint16),
    ],
)
def test_row_ids_become_unique_and_sorted(row_ids):
    ids = take_ids(row_ids, 6)
    assert ids.dtype is torch.int64
    assert ids.tolist() == [0, 1, 5]


@pytest.mark.parametrize("row_ids", [[], range(0), np.zeros(0, np.int64)])
def test_no_row_ids(row_ids):
    assert take_ids(row_ids, 6).tolist() == []


@pytest.mark.parametrize("compiled", [True, False])
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), min_size=1))
def test_ids_are_scanned_alike_with_and_without_the_compiled_part(compiled, ids):
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(rows, "_tables", None)
        assert rows._scan(torch.tensor(ids)) == (min(ids), max(ids), ids == sorted(set(ids)))
        every_other = torch.tensor([each for one in ids for each in (one, 0)])[::2]
        assert rows._scan(every_other) == rows._scan(torch.tensor(ids))


def test_row_ids_of_any_size():
    assert take_ids(range(2**62 - 3, 2**62), 2**62).tolist() == [2**62 - 3, 2**62 - 2, 2**62 - 1]


@pytest.mark.parametrize(
    ("row_ids", "error", "words"),
    [
        ([6], ValueMismatchError, "row id 6 is out of range; there are rows 0 to 5"),
        ([-1, 2], ValueMismatchError, "row id -1"),
        ([2**63], ValueMismatchError, "out of range"),
        ([-(2**70)], ValueMismatchError, "out of range"),
        (np.array([1.0]), ArrayTypeError, "row_ids have dtype float64; expected integers"),
        (np.array([True]), ArrayTypeError, "row_ids have dtype bool"),
        (np.array([1], np.uint64), ArrayTypeError, "row_ids have dtype uint64"),
        ([1.0], ArrayTypeError, "row_ids is [1.0]; expected integers"),
        ([True], ArrayTypeError, "row_ids is [True]; expected integers"),
        (None, ArrayTypeError, "row_ids= is missing"),
        ("12", ArrayTypeError, "row_ids is '12'"),
        (3, ArrayTypeError, "row_ids is 3"),
    ],
)
def test_bad_row_ids(row_ids, error, words):
    with pytest.raises(error) as caught:
        take_ids(row_ids, 6)
    assert words in str(caught.value)


def test_rows_on_another_device_start_their_table_alike():
    rows = Rows([], np.zeros((0, 2), np.float32), 9, init="normal", seed=3)
    assert rows.to("cpu").init == rows.merged().init == rows.init
    with tensorkv.create() as kv:
        kv.init({"t": rows.to("cpu")})
        assert kv.row_sparse_pull("t", row_ids=[4]).values.any()


def test_a_part_with_its_ids_on_another_device_is_brought_together():
    class Away(torch.Tensor):
        """Ids on another device."""

        device = property(lambda self: torch.device("cuda"))

        def to(self, device):
            assert device == torch.device("cpu")
            return self.as_subclass(torch.Tensor)

    part = unchecked_rows(torch.tensor([1, 3]).as_subclass(Away), torch.ones(2, 1), 5)
    merged = merge([part], may_share=True)
    assert merged.ids.device == merged.values.device
    assert merged.ids.tolist() == [1, 3]


@pytest.mark.parametrize("parts", [1, 2])
def test_ids_that_change_during_a_call_are_read_once_or_refused(parts):
    """Another thread may overwrite the caller's ids, which are the indices that rows are written to."""
    ids, values = torch.tensor([1, 3]), torch.ones(2, 1)
    rows = unchecked_rows(ids, values, 5)
    merged = merge([rows] * parts, may_share=True)
    ids[1] = 1 << 40
    assert merged.ids.tolist() == [1, 3]
    for wrong in (5, 1 << 40, -1):
        ids[1] = wrong
        with pytest.raises(ValueMismatchError, match=f"row id {wrong} is out of range; there are rows 0 to 4"):
            merge([rows] * parts, may_share=True)
