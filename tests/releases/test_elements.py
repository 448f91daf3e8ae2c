"""Elements that differ, and digests: the same with and without the compiled part, for every dtype and bit pattern."""

from unittest import mock

import numpy as np
import pytest
import torch

from tensorkv.compiled import _elements
from tensorkv.releases import elements
from tensorkv.shard.pool import Pool
from tests.support.amount import amount

DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random_bits(rng, numel, dtype):
    """Return a tensor of random bits, NaN payloads, negative zeros and subnormal numbers among them."""
    if dtype is torch.bool:
        return torch.from_numpy(rng.integers(0, 2, numel).astype(bool))
    held = rng.integers(0, 256, numel * dtype.itemsize, np.uint8)
    return elements.as_tensor(held, dtype)


def changed(rng, tensor, share):
    """Return a copy of which about a share of the elements have other bits, and where they are."""
    items = elements.bytes_of(tensor.clone()).reshape(-1, tensor.element_size()).copy()
    places = np.flatnonzero(rng.random(len(items)) < share)
    items[places, rng.integers(tensor.element_size())] ^= 1
    return elements.as_tensor(items.reshape(-1), tensor.dtype).reshape(tensor.shape), places


def both_ways():
    """Run the block with the compiled part, where it is there, and without it."""
    for part in dict.fromkeys([_elements, None]):
        with mock.patch.object(elements, "_elements", part):
            yield


@each_dtype
def test_changes_of_random_bits_are_found_and_lead_to_the_new_bits(dtype):
    rng = np.random.default_rng(1)
    for _ in range(amount(20, 400)):
        numel, first = int(rng.integers(0, 300)), int(rng.integers(0, 1 << 33))
        old = random_bits(rng, numel, dtype)
        new, places = changed(rng, old, rng.choice([0, 0.01, 0.3, 1]))
        results = []
        for _ in both_ways():
            found = elements.find(old, new, first, numel=1 << 40, most=numel)
            assert found.indices.dtype is torch.int64
            assert (found.indices.numpy() == places + first).all()
            digests = [elements.digest(each, first) for each in (old, new)]
            assert elements.add(elements.subtract(digests[0], found.gone), found.come) == digests[1]
            assert (digests[0] == digests[1]) == (len(places) == 0)
            mine = old.clone()
            local = torch.from_numpy(places.astype(np.int32))
            given = found.values.clone()
            gone = elements.exchange(mine, local, given)
            assert (elements.bytes_of(mine) == elements.bytes_of(new)).all()
            assert elements.exchange(mine, local, given) == elements.digest_of_elements(found.values, local)
            assert (elements.bytes_of(mine) == elements.bytes_of(old)).all()
            results.append([digests, found.gone, found.come, gone, elements.bytes_of(found.values).tolist()])
        assert all(each == results[0] for each in results)


@each_dtype
def test_pieces_and_threads_find_what_one_thread_finds(dtype):
    rng = np.random.default_rng(2)
    old = random_bits(rng, 300_001, dtype)
    new, _ = changed(rng, old, 0.01)
    with_threads = Pool(3)
    for _ in both_ways():
        alone = elements.find(old, new, numel=300_001, most=300_001)
        shared = elements.find(old, new, numel=300_001, most=300_001, pool=with_threads)
        assert alone.indices.dtype is torch.int32
        assert all((elements.bytes_of(alone[i]) == elements.bytes_of(shared[i])).all() for i in (0, 1))
        assert alone[2:] == shared[2:]
        assert elements.digest(new) == elements.digest(new, pool=with_threads)
        assert elements.find(old, new, numel=300_001, most=len(alone.indices) - 1, pool=with_threads) is None
        everywhere = elements.find(torch.zeros_like(old), old, numel=300_001, most=300_001)
        mine, given = torch.zeros_like(old), everywhere.values.clone()
        assert elements.exchange(mine, everywhere.indices, given, with_threads) == everywhere.gone
        assert (elements.bytes_of(mine) == elements.bytes_of(old)).all()
    with_threads.close()


def test_more_than_is_worth_finding_is_not_found():
    for _ in both_ways():
        old, new = torch.zeros(1000), torch.ones(1000)
        assert elements.find(old, new, numel=1000, most=999) is None
        assert len(elements.find(old, new, numel=1000, most=1000).indices) == 1000


def test_a_digest_depends_on_places():
    for _ in both_ways():
        values = torch.arange(8.0)
        swapped = values[[1, 0, *range(2, 8)]]
        assert elements.digest(values) != elements.digest(swapped)
        assert elements.digest(values) != elements.digest(values, first=1)
        assert elements.digest(values[:4]) != elements.digest(values[:4], first=1 << 32)


def test_digests_of_many_random_tensors_differ():
    rng = np.random.default_rng(3)
    seen = {elements.digest(random_bits(rng, 4, torch.float32)) for _ in range(20_000)}
    assert len(seen) == 20_000


@pytest.mark.parametrize("indices", [[4], [-1], [0, 2**31 - 1]])
def test_an_index_outside_of_an_array_is_refused_and_nothing_is_written(indices):
    for _ in both_ways():
        for dtype in (torch.int32, torch.int64):
            held, places = torch.zeros(4), torch.tensor(indices, dtype=dtype)
            with pytest.raises(ValueError, match="a place outside of the array"):
                elements.exchange(held, places, torch.ones(len(indices)))
            assert held.tolist() == [0, 0, 0, 0]


def test_the_digest_is_the_one_of_earlier_versions():
    # Files of changes have digests, and others read them.
    for _ in both_ways():
        assert elements.digest(torch.arange(5, dtype=torch.int32)) == 15288156691447580566


@each_dtype
def test_many_tensors_are_done_as_each_by_itself(dtype):
    rng = np.random.default_rng(4)
    sizes = [0, 1, 3, 70_000, 64, 5, 90_000, 0]
    olds = [random_bits(rng, numel, dtype) for numel in sizes]
    news = [changed(rng, old, share)[0] for old, share in zip(olds, [0, 1, 0.5, 0.01, 0, 1, 0.1, 0], strict=True)]
    firsts = [0, 7, 1 << 30, 0, 5, 6, 7, 8]
    with_threads = Pool(3)
    for _ in both_ways():
        for pool in (None, with_threads):
            assert elements.digest_each(news, firsts, pool).tolist() == list(map(elements.digest, news, firsts))
            found = elements.find_each(olds, news, [0] * len(sizes), pool)
            alone = [
                elements.find(old, new, numel=100_000, most=elements.worth_finding(new.numel(), dtype.itemsize))
                for old, new in zip(olds, news, strict=True)
            ]
            assert found.counts.tolist() == [-1 if each is None else len(each.indices) for each in alone]
            whole = [each for each in alone if each is not None]
            assert found.indices.tobytes() == b"".join(bytes(elements.bytes_of(each.indices)) for each in whole)
            assert found.values.tobytes() == b"".join(bytes(elements.bytes_of(each.values)) for each in whole)
            mine = [old.clone() for old, each in zip(olds, alone, strict=True) if each is not None]
            counts = [len(each.indices) for each in whole]
            given = found.values.copy()
            gone = elements.exchange_each(mine, counts, found.indices, given, pool)
            assert gone.tolist() == [each.gone for each in whole]
            expected = [new for new, each in zip(news, alone, strict=True) if each is not None]
            for left, right in zip(mine, expected, strict=True):
                assert (elements.bytes_of(left) == elements.bytes_of(right)).all()
    with_threads.close()


def test_columns_that_do_not_fit_are_refused():
    part = _elements
    if part is None:
        pytest.skip("needs the compiled part")
    held = torch.zeros(4)
    column = [np.array([number], np.uint64) for number in (held.data_ptr(), 4, 4)]
    one, none, out = np.ones(1, np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    for counts, places, indices, values in [
        (one, none, np.array([4], np.int32), np.zeros(1, np.float32)),
        (one, none, np.array([-1], np.int32), np.zeros(1, np.float32)),
        (one * 2, none, np.zeros(1, np.int32), np.zeros(2, np.float32)),
        (one, one * 4, np.zeros(1, np.int32), np.zeros(1, np.float32)),
        (one * (1 << 62), none, np.zeros(1, np.int32), np.zeros(1, np.float32)),
    ]:
        with pytest.raises(ValueError, match="exchange_many"):
            part.exchange_many(*column, counts, places, none, indices, values, out)
    with pytest.raises(ValueError, match="find_many"):
        part.find_many(column[0], *column, none, out, out, out, np.zeros(1, np.int32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="digest_many"):
        part.digest_many(*column[:2], np.array([3], np.uint64), none, out)
    assert held.tolist() == [0, 0, 0, 0]
