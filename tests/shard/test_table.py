"""Table against a dict of rows, with ids as large as they come."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tensorkv.arrays.rowinit import RowInit
from tensorkv.shard import table
from tensorkv.shard.index import HashIndex, SortedIndex
from tensorkv.shard.table import Columns, Table, fill_with

SIZES = [1, 40, 2_000_000_000, 2**62]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint16, torch.uint64, torch.complex128]
ROW_SHAPES = [(), (3,), (2, 2), (0,)]

seeds = st.integers(0, 2**32 - 1)


def random_rows(seed, count, shape, dtype):
    numbers = np.random.default_rng(seed).integers(0, 200, (count, *shape))
    return torch.from_numpy(numbers).to(dtype)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class TableMachine(RuleBasedStateMachine):
    @initialize(
        size=st.sampled_from(SIZES),
        shape=st.sampled_from(ROW_SHAPES),
        dtype=st.sampled_from(DTYPES),
        init=st.sampled_from([None, RowInit.of(1, {}), RowInit.of("normal", {"std": 3.0}, 5)]),
        index=st.sampled_from([HashIndex, SortedIndex]),
    )
    def make(self, size, shape, dtype, init, index):
        self.size, self.shape = size, shape
        self.init = init if init is None or init.name == "constant" or dtype.is_floating_point else None
        self.table = Table(size, torch.Size(shape), dtype, init=self.init, key="t")
        self.table._index = index()
        # Per column its dtype and fill, and the rows that were written.
        self.columns = {"": (dtype, 0.0, {})}
        self.ids = set()

    def some_ids(self, seed, count):
        rng = np.random.default_rng(seed)
        near = [0, 1, 2, self.size // 2, self.size // 2 + 1, *range(self.size - 4, self.size)]
        pool = sorted({i for i in [*near, *rng.integers(0, self.size, 3).tolist()] if 0 <= i < self.size})
        return rng.permutation(pool)[:count].tolist()

    def expected(self, ids, name):
        dtype, fill, held = self.columns[name]
        zero = fill_with(torch.empty(self.shape, dtype=dtype), fill)

        def absent(i):
            if name or self.init is None:
                return zero
            return self.init.rows("t", torch.tensor([i]), torch.Size(self.shape), dtype)[0]

        rows = [held[i] if i in held else absent(i) for i in ids]
        return torch.stack(rows) if rows else torch.empty((0, *self.shape), dtype=dtype)

    @rule(seed=seeds, count=st.integers(0, 12), which=st.integers(0, 3))
    def write(self, seed, count, which):
        name = list(self.columns)[which % len(self.columns)]
        ids = self.some_ids(seed, count)
        rows = random_rows(seed, len(ids), self.shape, self.columns[name][0])
        self.columns[name][2].update(zip(ids, rows.clone(), strict=True))
        self.table.write(torch.tensor(ids, dtype=torch.int64), rows, name)
        self.ids.update(ids)
        if rows.numel():
            rows.zero_()

    @rule(seed=seeds, count=st.integers(0, 12), repeat=st.booleans())
    def read(self, seed, count, repeat):
        ids = self.some_ids(seed, count)
        ids = ids + ids[:2] if repeat else ids
        for name in self.columns:
            got = self.table.read(torch.tensor(ids, dtype=torch.int64), name)
            assert bits(got) == bits(self.expected(ids, name))
            if got.numel():
                got.fill_(1)

    @precondition(lambda self: self.columns[""][0].is_floating_point or self.columns[""][0].is_complex)
    @rule(name=st.sampled_from(["exp_avg", "sum"]), fill=st.sampled_from([0.0, 0.5, -3.0]))
    def add_column(self, name, fill):
        dtype = self.columns[""][0]
        self.table.add_column(name, dtype, fill)
        self.columns.setdefault(name, (dtype, fill, {}))

    @rule()
    def drop_columns(self):
        self.table.drop_columns()
        self.columns = {"": self.columns[""]}

    @rule()
    def copy_to_rows(self):
        rows = self.table.to_rows()
        assert rows.ids.tolist() == sorted(self.ids)
        assert rows.num_rows == self.size
        assert bits(rows.values) == bits(self.expected(sorted(self.ids), ""))
        rows.ids.zero_()

    @rule()
    def copy(self):
        other = self.table.copy()
        assert (len(other), other.columns, other.init) == (len(self.ids), [], self.init)
        ids = torch.tensor(self.some_ids(5, 12), dtype=torch.int64)
        assert bits(other.read(ids)) == bits(self.table.read(ids))

    @rule()
    def copy_columns(self):
        other = self.table.empty()
        other.take_columns(self.table)
        assert other.columns == self.table.columns
        ids = sorted(self.ids)
        for name in other.columns:
            got = other.read(torch.tensor(ids, dtype=torch.int64), name)
            assert bits(got) == bits(self.expected(ids, name))
            assert other.fill(name) == self.columns[name][1]

    @invariant()
    def table_is_model(self):
        if not hasattr(self, "table"):
            return
        ids = sorted(self.ids)
        assert len(self.table) == len(ids)
        assert self.table.ids.dtype is torch.int64
        assert self.table.ids.tolist() == ids
        assert self.table.columns == [name for name in self.columns if name]
        dtype = self.columns[""][0]
        assert self.table.nbytes == len(ids) * int(np.prod(self.shape)) * dtype.itemsize
        for name in self.columns:
            assert bits(self.table.read(self.table.ids, name)) == bits(self.expected(ids, name))


TableMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20, print_blob=True)
TestTable = TableMachine.TestCase


def test_rows_are_gathered_with_the_same_bits_by_torch(monkeypatch):
    held = Table(10**6, torch.Size([5]), torch.bfloat16, init=RowInit.of("normal", {}), key="t")
    ids = torch.randperm(1000)[:700] * 997
    held.write(ids[:500], torch.randn(500, 5).to(torch.bfloat16))
    compiled = held.read(ids)
    monkeypatch.setattr(table, "_tables", None)
    assert bits(held.read(ids)) == bits(compiled)


def test_rows_are_copies():
    table = Table(10, torch.Size([2]), torch.float32)
    rows = torch.ones(1, 2)
    table.write(torch.tensor([3]), rows)
    rows.fill_(9)
    table.read(torch.tensor([3])).fill_(8)
    table.to_rows().values.fill_(7)
    assert table.read(torch.tensor([3])).tolist() == [[1, 1]]


def test_growth_costs_few_copies_and_little_room():
    table = Table(2_000_000_000, torch.Size([4]), torch.float32)
    grown = []
    right = table._grow

    def grow(needed):
        before = len(table._columns[""])
        right(needed)
        grown.append(len(table._columns[""]) != before)

    table._grow = grow
    for i in range(1000):
        table.write(torch.tensor([i * 1_999_999]), torch.full((1, 4), float(i)))
    assert sum(grown) < 40
    assert len(table._columns[""]) <= 1500
    assert table.read(torch.tensor([1_999_999 * 999])).tolist() == [[999.0] * 4]


def test_a_table_never_has_more_room_than_rows():
    table = Table(20, torch.Size([1]), torch.float32)
    for i in range(20):
        table.write(torch.tensor([i]), torch.tensor([[float(i)]]))
    assert len(table._columns[""]) == 20


def test_a_table_of_no_rows():
    table = Table(0, torch.Size([2]), torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    table.write(none, torch.zeros(0, 2))
    assert (len(table), table.nbytes) == (0, 0)
    assert table.read(none).shape == (0, 2)


def test_rows_are_cast_to_the_column():
    table = Table(5, torch.Size([1]), torch.bfloat16)
    table.write(torch.tensor([1]), torch.tensor([[1.00390625]]))
    got = table.read(torch.tensor([1]))
    assert got.dtype is torch.bfloat16
    assert got.tolist() == [[1.0]]


def test_a_new_column_has_its_default_in_memory_that_is_allocated_already():
    table = Table(100, torch.Size([1]), torch.float64)
    table.write(torch.arange(20), torch.zeros(20, 1, dtype=torch.float64))
    table.add_column("sum", torch.float64, 0.1)
    table.add_column("sum", torch.float64, 5.0)
    table.write(torch.tensor([50]), torch.zeros(1, 1, dtype=torch.float64))
    assert table.read(torch.tensor([3, 50, 99]), "sum").tolist() == [[0.1]] * 3
    assert table.fill("sum") == 0.1


def test_complex_columns_begin_in_both_parts():
    table = Table(9, torch.Size([1]), torch.complex64)
    table.add_column("sum", torch.complex64, 0.5)
    assert table.read(torch.tensor([4]), "sum").tolist() == [[0.5 + 0.5j]]
    assert table.read(torch.tensor([4])).tolist() == [[0j]]


def test_a_default_device_is_not_the_tables():
    with torch.device("meta"):
        table = Table(9, torch.Size([1]), torch.float32)
        for i in (4, 2):
            table.write(torch.tensor([i], device="cpu"), torch.ones(1, 1, device="cpu"))
        got = table.read(torch.tensor([2, 3, 4], device="cpu"))
    assert got.tolist() == [[1], [0], [1]]


@pytest.mark.parametrize("kind", ["dense", "table"])
@given(seed=seeds)
@settings(max_examples=20)
def test_columns_are_the_same_for_dense_values_and_tables(kind, seed):
    rng = np.random.default_rng(seed)
    start = random_rows(seed, 8, (3,), torch.float32)
    value = start.clone()
    if kind == "table":
        value = Table(8, torch.Size([3]), torch.float32)
        value.write(torch.arange(8), start)
    state = {"step": torch.tensor(2.0)}
    columns = Columns(value, state)
    assert columns.names() == []
    ids = torch.from_numpy(np.sort(rng.permutation(8)[:3]))
    assert torch.equal(columns.read_value(ids), start[ids])
    rows = random_rows(seed + 1, 3, (3,), torch.float32)
    columns.write_value(ids, rows)
    columns.write("sum", ids, rows, 0.25)
    assert columns.names() == ["sum"]
    whole = torch.full((8, 3), 0.25)
    whole[ids] = rows
    assert torch.equal(columns.read("sum", torch.arange(8)), whole)
    start[ids] = rows
    assert torch.equal(columns.read_value(torch.arange(8)), start)
    assert state["step"] == 2
