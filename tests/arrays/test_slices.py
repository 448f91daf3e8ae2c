"""DTensors on meshes of processes, and the geometry of slices."""

import itertools

import pytest
import torch

from tensorkv.arrays.regions import Region
from tensorkv.arrays.slices import Slices
from tensorkv.errors import ArgumentError, IncompleteValueError, ValueMismatchError
from tests.support.workers import run


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_dtensors_have_what_the_value_has(mesh):
    count = {1: 5 * 3 + 2, 2: 5 * 9 + 4}[len(mesh)]
    workers = 1
    for size in mesh:
        workers *= size
    for text in run(workers, "tests.arrays.mesh_programs", *mesh):
        assert f"{count} DTensors" in text
        assert f"{count + 1} DTensors pushed" in text


def slices_of(whole, *regions):
    value = torch.arange(whole.numel()).reshape(whole)
    found = [Region(each) for each in regions]
    return Slices(whole, (0, whole[0]), found, [each.of(value) for each in found], value.dtype)


def test_slices_of_any_grid_are_complete_in_any_order():
    chance = torch.Generator().manual_seed(0)

    def cuts(size):
        inner = torch.randint(0, size + 1, (3,), generator=chance).tolist()
        return list(itertools.pairwise(sorted({0, size, *inner})))

    for _ in range(100):
        whole = torch.Size(torch.randint(1, 9, (3,), generator=chance).tolist())
        boxes = list(itertools.product(*map(cuts, whole)))
        order = torch.randperm(len(boxes), generator=chance).tolist()
        together = slices_of(whole)
        assert together.is_empty
        for place in order:
            assert not together.is_complete
            missing = str(together.incomplete_error("pull"))
            together = together.plus(slices_of(whole, boxes[place]))
            assert "lacks [" in missing
        assert together.is_complete
        value = torch.arange(whole.numel()).reshape(whole)
        assert torch.equal(together.assembled(-1), value)
        # As a server has them that holds some rows, before and after they have travelled.
        first, stop = sorted(torch.randint(0, whole[0] + 1, (2,), generator=chance).tolist())
        own = together.within(first, stop)
        there = Slices.from_tensors(*own.to_tensors())
        for each in (own, there):
            assert (each.shape, each.is_complete) == ((stop - first, *whole[1:]), True)
            assert torch.equal(each.assembled(-1), value[first:stop])


def test_an_error_names_what_is_missing():
    some = slices_of(torch.Size([4, 6]), ((0, 2), (0, 3)), ((2, 4), (4, 6)))
    with pytest.raises(IncompleteValueError, match=r"lacks \[0:2, 3:6\], \[2:4, 0:4\] of \(4, 6\)"):
        raise some.incomplete_error("pull")
    many = slices_of(torch.Size([40]), *(((n, n + 1),) for n in range(0, 40, 2)))
    with pytest.raises(IncompleteValueError, match=r"\[7:8\] and 16 more of \(40,\)"):
        raise many.incomplete_error("pull")


@pytest.mark.parametrize(
    ("bounds", "count"),
    [
        ([[[0, 4]], [[0, 4]], [[0, 5]]], 5),
        ([[[0, 4]], [[0, 5]], [[0, 4]]], 4),
        ([[[0, 4]], [[0, 4]], [[3, 2]]], 0),
        ([[[0, 4]], [[0, 4]], [[-1, 2]]], 3),
        ([[[0, 4]], [[0, 4]], [[0, 2]]], 3),
        ([[[0, 4]]], 0),
        ([[0, 4]], 4),
        ([[[0, 4, 1]], [[0, 4, 1]]], 0),
    ],
    ids=str,
)
def test_slices_that_no_client_sends_are_refused(bounds, count):
    with pytest.raises(ArgumentError, match="malformed slices"):
        Slices.from_tensors(torch.tensor(bounds), torch.zeros(count))


def test_slices_of_other_values_do_not_go_together():
    mine = slices_of(torch.Size([4]), ((0, 2),))
    for other in (slices_of(torch.Size([5]), ((2, 4),)), slices_of(torch.Size([4]), ((1, 3),))):
        with pytest.raises(ValueMismatchError):
            mine.plus(other)


def test_what_is_added_to_the_slices_of_others_changes_no_sign():
    nothing = Slices(torch.Size([2]), (0, 2), [], [], torch.complex64).assembled(-0.0)
    assert torch.signbit(torch.view_as_real(nothing)).all()


def test_slices_without_axes_and_overlapping_ones():
    with pytest.raises(IncompleteValueError, match=r"lacks \[\] of \(\)"):
        raise Slices(torch.Size([]), (0, 1), [], [], torch.float32).incomplete_error("pull")
    bounds = torch.tensor([[[0, 4]], [[0, 4]], [[0, 2]], [[1, 3]]])
    with pytest.raises(ArgumentError, match="overlap"):
        Slices.from_tensors(bounds, torch.zeros(4))
