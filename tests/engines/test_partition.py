"""Every element has one owner and one place, and chunks give every owner about as much."""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.engines.partition import Runs, borders, cut, lightest, pieces

SHAPES = st.lists(st.integers(0, 2000), max_size=3).map(tuple)


@given(SHAPES, st.integers(1, 9), st.booleans(), st.data())
def test_borders_cover_every_row_once(shape, owners, whole, data):
    lead = data.draw(st.integers(0, owners - 1))
    found = borders(shape, owners, lead, whole=whole)
    assert len(found) == owners + 1
    assert found[0] == 0
    assert found[-1] == (shape[0] if shape else 1)
    assert found == sorted(found)
    if whole or math.prod(shape) < 1 << 18:
        assert found[lead + 1] - found[lead] == found[-1], "one owner"


@pytest.mark.parametrize("shape", [(1_000_000,), (5003, 65), (4096, 1000), (70_000, 3, 5)])
@pytest.mark.parametrize("owners", [2, 3, 8])
def test_large_values_are_divided_where_vectors_end(shape, owners):
    found = borders(shape, owners, 0)
    width = math.prod(shape[1:])
    sizes = [(high - low) * width for low, high in itertools.pairwise(found)]
    assert all(low * width % 64 == 0 for low in found[:-1])
    assert max(sizes) < 1.25 * sum(sizes) / owners


@pytest.mark.parametrize("shape", [(100, 4097), (150, 4097), (64, 4099), (129, 30_001), (200, 2001, 3)])
@pytest.mark.parametrize("owners", [2, 3, 4])
def test_a_few_rows_of_odd_length_are_divided_as_evenly_as_they_can_be(shape, owners):
    ends = np.array(borders(shape, owners, 0))
    # A part is off by less than the 64 rows of a step.
    assert np.abs(np.diff(ends) - shape[0] / owners).max() <= 64
    assert ((ends[1:-1] % 64 == 0) | (ends[1:-1] == shape[0])).all()


def test_what_has_too_few_rows_of_odd_length_goes_where_least_is():
    assert borders((10, 30_001), 4, 2) == [0, 0, 0, 10, 10]
    assert pieces((10, 30_001), [5, 3, 9]) == [(1, 0, 10)]
    assert pieces((100, 4097), [0, 0]) == [(0, 0, 64), (1, 64, 100)]
    assert pieces((100, 4097), [1, 1], weights=[1, 9]) == [(1, 0, 100)]


def test_few_rows_have_one_owner():
    assert borders((3, 10_000_000), 4, 2) == [0, 0, 0, 3, 3]


RUNS = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8, 16])), max_size=12)


@given(st.lists(RUNS, min_size=1, max_size=4), st.sampled_from([256, 1024, 4096]))
def test_chunks_hold_every_element_once_and_in_order(sizes, slot_nbytes):
    own = [(owner, *each) for owner, listed in enumerate(sizes) for each in listed]
    wanted = {key: (count, itemsize) for key, (_, count, itemsize) in enumerate(own)}
    columns = [list(column) for column in zip(*own, strict=True)] or [[]] * 3
    owner, count, itemsize = (np.array(column, np.int64) for column in columns)
    runs = Runs(owner, np.arange(len(own)), np.full(len(own), 10), count, itemsize)
    seen = dict.fromkeys(wanted, 10)
    for chunk in cut(runs, len(sizes), slot_nbytes):
        places = []
        assert chunk.owner.tolist() == sorted(chunk.owner.tolist())
        for key, start, count, offset in zip(chunk.key, chunk.start, chunk.count, chunk.offset, strict=True):
            assert start == seen[key]
            assert count > 0
            seen[key] = start + count
            places.append((offset, offset + count * wanted[key][1]))
            assert offset % 64 == 0
        places.sort()
        assert places
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
        assert places[-1][1] <= max(slot_nbytes, 64 * len(sizes))
    assert seen == {key: 10 + count for key, (count, _) in wanted.items()}


def test_the_lightest_is_the_first_of_equals():
    assert lightest([3, 1, 1]) == 1
