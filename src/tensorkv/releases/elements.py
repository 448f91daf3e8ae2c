"""Elements of flat tensors that differ bit by bit: finding them, writing them, and digests of tensors.

The digest of a tensor is the sum, modulo 2^64, of a hash of each element and its place. So it can be carried forward
from a version to the next by the elements that differ alone, and pieces of a value can be digested by themselves. It
detects mistakes, not attacks: the hash is not a cryptographic one.

All functions do the same, bit by bit, with and without the compiled part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tensorkv.arrays.packing import raw_bytes
from tensorkv.compiled import _elements
from tensorkv.shard.native import column_of
from tensorkv.shard.pool import WORTH_A_THREAD, Pool

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

_MASK = (1 << 64) - 1
# Elements that NumPy hashes, or compares, at a time.
_BLOCK = 1 << 16


class Difference(NamedTuple):
    """The elements of a flat tensor that differ from those of another one.

    Args:
        indices: of the elements, increasing; int32, or int64 where that is too small.
        values: of the elements, in the dtype of the tensor.
        gone, come: digests of these elements in the other tensor, and in this one.
    """

    indices: torch.Tensor
    values: torch.Tensor
    gone: int
    come: int


def add(*digests: int) -> int:
    """Return the digest of elements together.

    >>> add(3, 2**64 - 1)
    2
    """
    return sum(digests) & _MASK


def subtract(digest: int, gone: int) -> int:
    """Return a digest without some of its elements.

    >>> subtract(2, 3) == 2**64 - 1
    True
    """
    return (digest - gone) & _MASK


def digest(tensor: torch.Tensor, first: int = 0, pool: Pool | None = None) -> int:
    """Return the digest of a contiguous CPU tensor.

    Args:
        tensor: of any shape and dtype.
        first: the place of its first element in the value that it is a piece of.
        pool: threads that share the work.

    >>> values = torch.arange(10)
    >>> digest(values) == add(digest(values[:4]), digest(values[4:], first=4))
    True
    """
    itemsize, held = tensor.element_size(), bytes_of(tensor)
    ranges = _ranges(tensor.numel(), pool)
    if pool is not None and len(ranges) > 1:
        flat = tensor.detach().reshape(-1)
        return add(*_run_all(pool, [partial(digest, flat[each], first + each.start) for each in ranges]))
    if _elements is not None:
        found: int = _elements.digest(held, itemsize, first)
        return found
    words, per_item = _words(held, itemsize), max(1, itemsize // 4)
    blocks = [words[at : at + _BLOCK] for at in range(0, len(words), _BLOCK)]
    starts = [first * per_item + at for at in range(0, len(words), _BLOCK)]
    places = [
        np.arange(start, start + len(block), dtype=np.uint64) for start, block in zip(starts, blocks, strict=True)
    ]
    return add(*map(_hash_sum, blocks, places))


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of indices into a value of so many elements."""
    return torch.int32 if numel <= 1 << 31 else torch.int64


def find(
    old: torch.Tensor, new: torch.Tensor, first: int = 0, *, numel: int, most: int, pool: Pool | None = None
) -> Difference | None:
    """Return the elements of a contiguous CPU tensor whose bits differ from those of another.

    Args:
        old, new: tensors of one dtype and shape.
        first: the place of their first element in the value that they are a piece of.
        numel: of that value.
        most: how many elements are worth finding.
        pool: threads that share the work.

    Returns:
        None if more differ.

    >>> find(torch.zeros(5), torch.tensor([0, -0.0, 0, 7, 0]), numel=5, most=5)[:2]
    (tensor([1, 3], dtype=torch.int32), tensor([-0., 7.]))
    """
    ranges = _ranges(new.numel(), pool)
    if pool is not None and len(ranges) > 1:
        before, after = old.detach().reshape(-1), new.detach().reshape(-1)
        jobs = [partial(find, before[each], after[each], first + each.start, numel=numel) for each in ranges]
        # Where a range has more than its share, all have, or the others have less.
        pieces = _run_all(pool, [partial(job, most=most // len(jobs)) for job in jobs])
        if all(piece is None for piece in pieces):
            return None
        again = [partial(job, most=most) for job, piece in zip(jobs, pieces, strict=True) if piece is None]
        rest = iter(_run_all(pool, again))
        return _joined([next(rest) if piece is None else piece for piece in pieces], most)
    itemsize, places_as = new.element_size(), index_dtype(numel)
    most = min(most, new.numel())
    if _elements is None:
        return _find(old, new, first, places_as, most)
    indices = torch.empty(most, dtype=places_as, device="cpu")
    values = torch.empty(most, dtype=new.dtype, device="cpu")
    found = _elements.find(
        bytes_of(old), bytes_of(new), itemsize, first, bytes_of(indices), bytes_of(values), places_as.itemsize
    )
    if found is None:
        return None
    count, gone, come = found
    # Copies, which let go of the rest of the memory.
    return Difference(indices[:count].clone(), values[:count].clone(), gone, come)


def digest_of_elements(values: torch.Tensor, indices: torch.Tensor) -> int:
    """Return the digest of elements, given by themselves, that are at some places.

    >>> values = torch.arange(10)
    >>> digest_of_elements(values[4:6], torch.tensor([4, 5])) == digest(values[4:6], first=4)
    True
    """
    return _hash_at(bytes_of(values), values.element_size(), indices)


def exchange(tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, pool: Pool | None = None) -> int:
    """Exchange some elements of a contiguous CPU tensor with others, bit by bit.

    Args:
        tensor: that is changed.
        indices: of the elements, each once; int32 or int64.
        values: of its dtype, as many; becomes what the tensor had.
        pool: threads that share the work.

    Returns:
        The digest of what the tensor had.

    Raises:
        ValueError: an index outside of the tensor; nothing has changed, unless a pool shares the work.

    >>> target, values = torch.zeros(4), torch.tensor([5.0])
    >>> exchange(target, torch.tensor([2]), values) == digest(torch.zeros(1), first=2)
    True
    >>> target, values
    (tensor([0., 0., 5., 0.]), tensor([0.]))
    """
    ranges = _ranges(len(indices), pool)
    if pool is not None and len(ranges) > 1:
        return add(*_run_all(pool, [partial(exchange, tensor, indices[each], values[each]) for each in ranges]))
    itemsize = tensor.element_size()
    if _elements is not None:
        held, places = bytes_of(tensor), bytes_of(indices)
        found: int = _elements.exchange(held, itemsize, places, indices.element_size(), bytes_of(values))
        return found
    rows = indices.numpy().astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < tensor.numel():
        raise ValueError("a place outside of the array")
    items, others = _items(tensor), _items(values)
    kept = items[rows]
    items[rows], others[:] = others, kept
    return _hash_at(kept.reshape(-1), itemsize, indices)


def _joined(found: Sequence[Difference | None], most: int) -> Difference | None:
    """Return what was found in pieces that follow one another as one; None if it is more than is worth finding."""
    whole = [each for each in found if each is not None]
    if len(whole) < len(found) or sum(each.indices.numel() for each in whole) > most:
        return None
    indices, values = torch.cat([each.indices for each in whole]), torch.cat([each.values for each in whole])
    return Difference(indices, values, add(*(each.gone for each in whole)), add(*(each.come for each in whole)))


def _ranges(numel: int, pool: Pool | None) -> Sequence[slice]:
    """Return slices of about equal size that cover so many elements, one for each thread if that is worth it."""
    count = 1 if pool is None else max(1, min(pool.threads, numel // WORTH_A_THREAD))
    borders = [numel * place // count for place in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(borders)]


def _run_all(pool: Pool, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Return what jobs return, which the threads of a pool run."""
    found: dict[int, T] = {}
    pool.run([partial(_run_one, found, place, job) for place, job in enumerate(jobs)])
    return [found[place] for place in range(len(jobs))]


def _run_one(found: dict[int, T], place: int, job: Callable[[], T]) -> None:
    found[place] = job()


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return the memory of a contiguous CPU tensor as bytes."""
    return np.asarray(raw_bytes(tensor), np.uint8)


def as_tensor(held: Bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as a flat tensor, which shares their memory if that begins where its dtype may."""
    whole = held if held.ctypes.data % 16 == 0 else held.copy()
    return torch.as_strided(torch.from_numpy(whole), (len(whole),), (1,)).view(dtype)


# ---------------------------------------------------------------- many tensors


class Found(NamedTuple):
    """The elements of some flat tensors that differ from those of others.

    Args:
        counts: how many of each tensor, int64; -1 where more differ than are worth finding.
        gone, come: digests of what they were and of what they are, of each tensor, uint64.
        indices: int32 as bytes, one tensor's after the other's.
        values: as bytes, likewise.
    """

    counts: npt.NDArray[np.int64]
    gone: npt.NDArray[np.uint64]
    come: npt.NDArray[np.uint64]
    indices: Bytes
    values: Bytes


def join_bytes(parts: Iterable[Bytes | None]) -> Bytes:
    """Return bytes one after another; those that are None are left out.

    >>> join_bytes([np.array([1], np.uint8), None, np.array([2, 3], np.uint8)]).tolist()
    [1, 2, 3]
    """
    return np.concatenate([np.empty(0, np.uint8), *(part for part in parts if part is not None)])


def worth_finding(numel: int, itemsize: int, index_size: int = 4) -> int:
    """Return how many elements that differ take no more bytes, with their indices, than all elements."""
    return numel * itemsize // (index_size + itemsize)


def digest_each(
    tensors: Sequence[torch.Tensor], firsts: Sequence[int], pool: Pool | None = None
) -> npt.NDArray[np.uint64]:
    """Return ``digest`` of each of some tensors; threads of a pool share the work.

    >>> pair = [torch.zeros(3), torch.ones(2)]
    >>> digest_each(pair, [0, 7]).tolist() == [digest(pair[0]), digest(pair[1], first=7)]
    True
    """
    parts = _shares(tensors, pool)
    if pool is not None and len(parts) > 1:
        return np.concatenate(_run_all(pool, [partial(digest_each, tensors[each], firsts[each]) for each in parts]))
    digests = np.empty(len(tensors), np.uint64)
    if _elements is None:
        digests[:] = [digest(tensor, first) for tensor, first in zip(tensors, firsts, strict=True)]
    else:
        addresses, numels, itemsizes = _columns(tensors)
        _elements.digest_many(addresses, numels, itemsizes, np.array(firsts, np.uint64), digests)
    return digests


def find_each(
    olds: Sequence[torch.Tensor], news: Sequence[torch.Tensor], firsts: Sequence[int], pool: Pool | None = None
) -> Found:
    """Do as ``find`` for each of some pairs of tensors, which are pieces of values of at most 2^31 elements.

    >>> found = find_each([torch.zeros(9), torch.zeros(2)], [torch.arange(9) // 8.0, torch.ones(2)], [0, 0])
    >>> found.counts.tolist(), found.indices.view(np.int32).tolist()
    ([1, -1], [8])
    """
    shares = _shares(news, pool)
    if pool is not None and len(shares) > 1:
        jobs = [partial(find_each, olds[each], news[each], firsts[each]) for each in shares]
        return Found(*(np.concatenate(each) for each in zip(*_run_all(pool, jobs), strict=True)))
    counts, gone, come = np.empty(len(news), np.int64), *np.zeros((2, len(news)), np.uint64)
    if _elements is None:
        parts = []
        for place, (old, new, first) in enumerate(zip(olds, news, firsts, strict=True)):
            most = worth_finding(new.numel(), new.element_size())
            found = find(old, new, first, numel=first + new.numel(), most=most)
            counts[place] = -1 if found is None else len(found.indices)
            if found is not None:
                gone[place], come[place] = found.gone, found.come
                parts.append(found)
        indices, values = (join_bytes(bytes_of(part[place]) for part in parts) for place in (0, 1))
        return Found(counts, gone, come, indices, values)
    addresses, numels, itemsizes = _columns(news)
    most = numels * itemsizes // (4 + itemsizes)
    indices, values = np.empty(int(4 * most.sum()), np.uint8), np.empty(int((itemsizes * most).sum()), np.uint8)
    used = _elements.find_many(
        _addresses(olds), addresses, numels, itemsizes, np.array(firsts, np.uint64), counts, gone, come, indices, values
    )
    # Copies, which let go of the rest of the memory.
    return Found(counts, gone, come, indices[: used[0]].copy(), values[: used[1]].copy())


def exchange_each(
    tensors: Sequence[torch.Tensor], counts: Sequence[int], indices: Bytes, values: Bytes, pool: Pool | None = None
) -> npt.NDArray[np.uint64]:
    """Do as ``exchange`` for each of some tensors.

    Args:
        tensors: that are changed.
        counts: how many elements of each.
        indices: int32 as bytes, one tensor's after the other's.
        values: as bytes, likewise; becomes what the tensors had.
        pool: threads that share the work.

    Raises:
        ValueError: an index outside of its tensor.
    """
    gone = np.zeros(len(tensors), np.uint64)
    addresses, numels, itemsizes = _columns(tensors)
    columns = ExchangeColumns.of(numels, itemsizes, counts)
    if _elements is not None:
        return exchange_columns(addresses, columns, indices, values, pool)
    for place, tensor in enumerate(tensors):
        index_place, value_place, count = (int(each[place]) for each in columns[2:])
        own = as_tensor(indices[index_place : index_place + 4 * count], torch.int32)
        others = values[value_place : value_place + count * tensor.element_size()]
        exchanged = as_tensor(others.copy(), tensor.dtype)
        gone[place] = exchange(tensor, own, exchanged)
        others[:] = bytes_of(exchanged)
    return gone


class ExchangeColumns(NamedTuple):
    """What is exchanged in each of some tensors.

    Args:
        numels, itemsizes: of the tensors.
        index_places, value_places: where the indices and values of each begin, in bytes.
        counts: how many elements of each.
    """

    numels: npt.NDArray[np.uint64]
    itemsizes: npt.NDArray[np.uint64]
    index_places: npt.NDArray[np.uint64]
    value_places: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]

    @classmethod
    def of(
        cls, numels: npt.NDArray[np.uint64], itemsizes: npt.NDArray[np.uint64], counts: Sequence[int]
    ) -> ExchangeColumns:
        """Return the columns for int32 indices and values that lie one tensor's after the other's."""
        lengths = np.array(counts, np.uint64)
        index_places = np.cumsum(4 * lengths) - 4 * lengths
        return cls(numels, itemsizes, index_places, np.cumsum(itemsizes * lengths) - itemsizes * lengths, lengths)


def can_exchange_columns() -> bool:
    """Return whether ``exchange_columns`` is there."""
    return _elements is not None


def exchange_columns(
    addresses: npt.NDArray[np.uint64], columns: ExchangeColumns, indices: Bytes, values: Bytes, pool: Pool | None
) -> npt.NDArray[np.uint64]:
    """Do ``exchange_each`` at addresses; needs the compiled part."""
    gone = np.zeros(len(addresses), np.uint64)
    numels, itemsizes, index_places, value_places, counts = columns

    def run(own: slice) -> None:
        _elements.exchange_many(
            addresses[own],
            numels[own],
            itemsizes[own],
            counts[own],
            index_places[own],
            value_places[own],
            indices,
            values,
            gone[own],
        )

    shares = _shares_of(numels, pool)
    if pool is None or len(shares) == 1:
        run(slice(None))
    else:
        _run_all(pool, [partial(run, own) for own in shares])
    return gone


def _shares(tensors: Sequence[torch.Tensor], pool: Pool | None) -> Sequence[slice]:
    """Return slices of some tensors that have about as many elements each, one for each thread if that is worth it."""
    return _shares_of([tensor.numel() for tensor in tensors], pool)


def _shares_of(numels: Sequence[int] | npt.NDArray[np.uint64], pool: Pool | None) -> Sequence[slice]:
    if pool is None or len(numels) < 2:
        return [slice(0, len(numels))]
    ends = np.cumsum(numels)
    count = max(1, min(pool.threads, int(ends[-1]) // WORTH_A_THREAD))
    wanted = [int(ends[-1]) * place // count for place in range(1, count)]
    borders = sorted({0, *np.searchsorted(ends, wanted, side="right").tolist(), len(numels)})
    return [slice(start, stop) for start, stop in pairwise(borders)]


def _columns(tensors: Sequence[torch.Tensor]) -> tuple[npt.NDArray[np.uint64], ...]:
    numels = np.array([tensor.numel() for tensor in tensors], np.uint64)
    return _addresses(tensors), numels, np.array([tensor.element_size() for tensor in tensors], np.uint64)


def _addresses(tensors: Sequence[torch.Tensor]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(column_of(tensors), np.uint64)


# ---------------------------------------------------------------- without the compiled part


def _items(tensor: torch.Tensor) -> Bytes:
    """Return the bytes of each element in a row."""
    return bytes_of(tensor).reshape(-1, tensor.element_size())


def _words(held: Bytes, itemsize: int) -> npt.NDArray[np.uint32]:
    """Return what is hashed of elements: their words of 32 bits, or shorter numbers."""
    if itemsize < 4:
        return held.view(np.uint8 if itemsize == 1 else np.uint16).astype(np.uint32)
    return np.frombuffer(held.tobytes(), np.uint32)


def _hash_sum(words: npt.NDArray[np.uint32], places: npt.NDArray[np.uint64]) -> int:
    """Return the sum of the hashes of words that are at some places.

    The finalizer of MurmurHash3 (Appleby, 2011), and a second hash made of it in the upper half.
    """
    low, high = places.astype(np.uint32), (places >> np.uint64(32)).astype(np.uint32)
    x = words ^ (low * np.uint32(0x9E3779B1)) ^ (high * np.uint32(0x7FEB352D))
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    y = x * np.uint32(0x27D4EB2F)
    y ^= y >> np.uint32(15)
    return (int(x.sum(dtype=np.uint64)) + (int(y.sum(dtype=np.uint64)) << 32)) & _MASK


def _hash_at(held: Bytes, itemsize: int, indices: torch.Tensor) -> int:
    """Return the digest of elements at some places."""
    per_item = max(1, itemsize // 4)
    firsts = np.multiply(indices.numpy(), per_item, dtype=np.uint64, casting="unsafe")
    places = np.add.outer(firsts, np.arange(per_item, dtype=np.uint64)).reshape(-1)
    return _hash_sum(_words(held, itemsize), places)


def _find(old: torch.Tensor, new: torch.Tensor, first: int, places_as: torch.dtype, most: int) -> Difference | None:
    before, after, itemsize = _items(old), _items(new), new.element_size()
    found: list[npt.NDArray[np.intp]] = []
    count = 0
    for at in range(0, len(after), _BLOCK):
        block = slice(at, at + _BLOCK)
        differing = np.flatnonzero((before[block] != after[block]).any(axis=1)) + at
        count += len(differing)
        if count > most:
            return None
        found.append(differing)
    places = np.concatenate(found) if found else np.empty(0, np.intp)
    indices = torch.from_numpy(places + first).to(places_as)
    gone, come = (_hash_at(each[places].reshape(-1), itemsize, indices) for each in (before, after))
    return Difference(indices, new.detach().reshape(-1)[torch.from_numpy(places)], gone, come)
