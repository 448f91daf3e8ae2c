"""Entries describe themselves, read and write rows; batches name their parts."""

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch, Entry, KeyInfo
from tensorkv.shard.table import Table


def entry(value, *, is_table=False, shape=None):
    spec = KeySpec(shape or value.shape, value.dtype, interop.NUMPY, is_table)
    return Entry("w", spec, value)


def test_rows_of_a_dense_value():
    made = entry(torch.arange(6).to(torch.uint32).view(3, 2))
    assert made.read_rows(torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
    made.write_rows(Rows(torch.tensor([1]), torch.tensor([[8, 9]], dtype=torch.uint32), 3))
    assert made.value.tolist() == [[0, 1], [8, 9], [4, 5]]
    assert made.info() == KeyInfo((3, 2), "uint32", "cpu", 0, 24, "dense")


def test_rows_of_a_table():
    made = entry(Table(9, torch.Size([2]), torch.float32), is_table=True, shape=torch.Size([9, 2]))
    made.write_rows(Rows(torch.tensor([4]), torch.ones(1, 2), 9))
    assert made.read_rows(torch.tensor([3, 4])).tolist() == [[0, 0], [1, 1]]
    assert made.info() == KeyInfo((9, 2), "float32", "cpu", 0, 8, "rows")


def test_move_takes_state_of_the_values_shape_along():
    made = entry(torch.ones(2))
    made.state = {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}
    made.move(torch.device("meta"))
    assert made.value.is_meta
    assert made.state["exp_avg"].is_meta
    assert not made.state["step"].is_meta


def test_names_of_parts():
    batch = Batch("push", ["w"], [[]])
    assert batch.name("w") == 'push("w")'
    assert batch.name(3, 1) == "push(3): part 1"
