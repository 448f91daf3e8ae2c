"""Both kinds of index against a dict."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkv.shard import index
from tensorkv.shard.index import HashIndex, SortedIndex

ids = st.one_of(st.integers(0, 40), st.integers(0, 2**63 - 1), st.integers(0, 100).map(lambda n: n << 40))


def int64(numbers):
    return torch.tensor(list(numbers), dtype=torch.int64)


@pytest.mark.parametrize("kind", [HashIndex, SortedIndex])
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.lists(ids, unique=True, max_size=60), max_size=12))
def test_places_are_in_the_order_of_coming(kind, steps):
    held, mine = {}, kind()
    for asked in steps:
        places, missing = mine.find(int64(asked))
        assert places.tolist() == [held.get(each, -1) for each in asked]
        assert missing == sum(each not in held for each in asked)
        new = [each for each in asked if each not in held]
        mine.add(int64(new))
        held.update({each: len(held) + place for place, each in enumerate(new)})
        assert len(mine) == len(held)
        assert mine.ids().tolist() == sorted(held)
    assert mine.find(int64(held))[0].tolist() == list(held.values())


@pytest.mark.parametrize("kind", [HashIndex, SortedIndex])
def test_ids_that_do_not_lie_side_by_side(kind):
    mine = kind()
    mine.add(torch.arange(100)[::3])
    assert mine.find(torch.arange(12)[::2])[0].tolist() == [0, -1, -1, 2, -1, -1]


def test_many_ids_are_found_again():
    mine = HashIndex()
    starts = range(0, 200_000, 50_000)
    for start in starts:
        mine.add((torch.arange(start, start + 50_000) * 2**20).flip(0))
    places, missing = mine.find(torch.arange(200_000) * 2**20)
    assert missing == 0
    assert torch.equal(places, torch.cat([torch.arange(start, start + 50_000).flip(0) for start in starts]))
    assert mine.find(torch.arange(1, 200_000) * 2**20 + 1)[1] == 199_999


def test_without_the_compiled_part_ids_are_sorted(monkeypatch):
    assert isinstance(index.new_index(), HashIndex)
    monkeypatch.setattr(index, "_tables", None)
    assert isinstance(index.new_index(), SortedIndex)
