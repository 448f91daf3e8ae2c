"""Update rules on entries, without a store around them."""

import pytest
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import OptimizerError, UpdaterError, ValueMismatchError
from tensorkv.shard.entry import Batch, Entry
from tensorkv.shard.optimizers import spec
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import Assign, CallUpdater, StepOptimizer, check_push

POOL = Pool(2)


def entry(value, library="torch", key="w"):
    return Entry(key, KeySpec(value.shape, value.dtype, interop.Origin(library), False), value)


def test_assign_many_and_few():
    entries = [entry(torch.zeros(3)), entry(torch.zeros(2)), entry(torch.zeros(1).half())]
    Assign().apply(entries, [[torch.ones(3)] * 2, [torch.ones(2)], [torch.ones(1)] * 2], POOL)
    assert [e.value.tolist() for e in entries] == [[2, 2, 2], [1, 1], [2]]
    assert [e.version for e in entries] == [1, 1, 1]


def test_a_value_stays_where_it_is():
    held = entry(torch.zeros(3))
    place = held.value.data_ptr()
    for rule in (Assign(), CallUpdater(lambda k, r, s: s.add_(r)), StepOptimizer(spec("sgd", {"lr": 1.0}))):
        rule.apply([held], [[torch.ones(3)]], POOL)
    assert held.value.data_ptr() == place
    assert held.version == 3


def test_an_updater_sees_a_copy():
    held = entry(torch.ones(3))

    def update(key, received, stored):
        stored.mul_(5)
        assert held.value.tolist() == [1, 1, 1]
        raise ZeroDivisionError

    rule = CallUpdater(update)
    with pytest.raises(ZeroDivisionError):
        rule.apply([held], [[torch.ones(3)]], POOL)
    assert held.value.tolist() == [1, 1, 1]
    assert not rule.running


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_an_updater_on_rows(library):
    held = entry(torch.zeros(4, 2), library)

    def update(key, received, stored):
        assert isinstance(received, Rows)
        assert received.ids.tolist() == stored.ids.tolist() == [1, 3]
        stored.values += received.values
        received.ids[:] = 0

    CallUpdater(update).apply_rows(held, Rows(torch.tensor([1, 3]), torch.ones(2, 2), 4))
    assert held.value[:, 0].tolist() == [0, 1, 0, 1]


def test_an_updater_on_rows_with_a_learned_rate_leaves_no_graph():
    held, rate = entry(torch.ones(4, 2)), torch.nn.Parameter(torch.tensor(0.5))

    def update(key, received, stored):
        stored.values.sub_(received.values * rate)

    CallUpdater(update).apply_rows(held, Rows(torch.tensor([1, 3]), torch.ones(2, 2), 4))
    assert held.value[:, 0].tolist() == [1, 0.5, 1, 0.5]
    assert not held.value.requires_grad


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("field", ["ids", "values"])
def test_an_updater_on_rows_that_assigns_instead_of_changing_in_place(library, field):
    held = entry(torch.ones(4, 2), library)
    rule = CallUpdater(lambda key, received, stored: setattr(stored, field, getattr(stored, field) * 1))
    with pytest.raises(UpdaterError, match=rf'updater\("w"\) assigned stored\.{field}; .*in place'):
        rule.apply_rows(held, Rows(torch.tensor([1, 3]), torch.ones(2, 2), 4))
    assert held.version == 0
    assert held.value.tolist() == [[1, 1]] * 4


def test_an_updater_that_resizes_its_copy_does_no_harm():
    held = entry(torch.ones(3))
    CallUpdater(lambda k, r, s: s.resize_(5).fill_(7)).apply([held], [[torch.ones(3)]], POOL)
    assert held.value.tolist() == [7, 7, 7]


def test_a_step_checks_before_it_changes():
    rule = StepOptimizer(spec("adam", {}))
    with pytest.raises(OptimizerError, match="int64"):
        rule.check(entry(torch.ones(2, dtype=torch.int64)), by_rows=False)
    rule.check(entry(torch.ones(2)), by_rows=True)


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (("sgd", {"lr": 0.1}), ("sgd", {"lr": 0.1, "momentum": 0.9})),
        (("adam", {}), ("adam", {"amsgrad": True})),
    ],
)
def test_rows_while_a_part_of_the_state_is_switched_off(off, on):
    """The state that is not in use stays whole, for when it is used again."""
    held = entry(torch.ones(4000, 2))
    whole, rows = torch.ones(4000, 2), Rows(torch.tensor([1]), torch.ones(1, 2), 4000)
    for name, numbers in (on, off, on):
        rule = StepOptimizer(spec(name, numbers))
        rule.apply([held], [[whole]], POOL)
        rule.apply_rows(held, rows)
        assert all(tensor.shape in ((), (4000, 2)) for tensor in held.state.values())


ENTRIES = [entry(torch.zeros(3), "numpy", "a"), entry(torch.zeros(2, 2), "numpy", "b")]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([[torch.zeros(3)], [torch.zeros(2, 2), torch.zeros(4)]], r'push\("b"\): part 1 has shape \(4,\)'),
        ([[torch.zeros(3), torch.zeros(3).double()], [torch.zeros(2, 2)]], r'push\("a"\): part 1 is float64'),
        ([[torch.zeros(3)], [Rows(torch.tensor([0]), torch.zeros(1, 3), 2)]], r"part 0 has shape \(2, 3\)"),
        ([[torch.zeros(3)], [Rows(torch.tensor([0]), torch.zeros(1, 2).int(), 2)]], r"part 0 is int32"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(parts, says):
    with pytest.raises(ValueMismatchError, match=says):
        check_push(Batch("push", ["a", "b"], parts), ENTRIES, Assign())


def test_parts_that_fit():
    rows = Rows(torch.tensor([0]), torch.zeros(1, 2), 2)
    check_push(Batch("push", ["a", "b"], [[torch.zeros(3).half()], [rows, torch.zeros(2, 2)]]), ENTRIES, Assign())


def test_rows_of_a_0d_value_and_of_an_optimizer_that_needs_the_whole_are_refused():
    single = entry(torch.tensor(0.0), key="s")
    with pytest.raises(ValueMismatchError):
        check_push(Batch("push", ["s"], [[Rows(torch.tensor([0]), torch.zeros(1), 1)]]), [single], Assign())
    rule = StepOptimizer(spec("adafactor", {}))
    rows = Rows(torch.tensor([0]), torch.zeros(1, 2), 2)
    with pytest.raises(OptimizerError, match="Rows"):
        check_push(Batch("push", ["b"], [[rows]]), [ENTRIES[1]], rule)
