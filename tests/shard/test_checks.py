"""Checks of a push look at every part of every key and change nothing."""

import pytest
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import OptimizerError, ValueMismatchError
from tensorkv.shard import optimizers
from tensorkv.shard.checks import check_push
from tensorkv.shard.entry import Batch, Entry
from tensorkv.shard.rules import Assign, StepOptimizer


def entry(key, value):
    return Entry(key, KeySpec(value.shape, value.dtype, interop.NUMPY, False), value)


ENTRIES = [entry("a", torch.zeros(3)), entry("b", torch.zeros(2, 2))]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([[torch.zeros(3)], [torch.zeros(2, 2), torch.zeros(4)]], r'push\("b"\): part 1 has shape \(4,\)'),
        ([[torch.zeros(3), torch.zeros(3).double()], [torch.zeros(2, 2)]], r'push\("a"\): part 1 is float64'),
        ([[torch.zeros(3)], [Rows(torch.tensor([0]), torch.zeros(1, 3), 2)]], r"part 0 has shape \(2, 3\)"),
        ([[torch.zeros(3)], [Rows(torch.tensor([0]), torch.zeros(1, 2).int(), 2)]], r"part 0 is int32"),
    ],
)
def test_a_part_that_does_not_fit(parts, says):
    with pytest.raises(ValueMismatchError, match=says):
        check_push(Batch("push", ["a", "b"], parts), ENTRIES, Assign())


def test_what_fits():
    rows = Rows(torch.tensor([0]), torch.zeros(1, 2), 2)
    check_push(Batch("push", ["a", "b"], [[torch.zeros(3).half()], [rows, torch.zeros(2, 2)]]), ENTRIES, Assign())


def test_rows_of_a_0d_value_and_of_an_optimizer_that_needs_the_whole():
    single = entry("s", torch.tensor(0.0))
    with pytest.raises(ValueMismatchError):
        check_push(Batch("push", ["s"], [[Rows(torch.tensor([0]), torch.zeros(1), 1)]]), [single], Assign())
    rule = StepOptimizer(optimizers.spec("adafactor", {}))
    rows = Rows(torch.tensor([0]), torch.zeros(1, 2), 2)
    with pytest.raises(OptimizerError, match="Rows"):
        check_push(Batch("push", ["b"], [[rows]]), [ENTRIES[1]], rule)
