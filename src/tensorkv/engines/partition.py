"""Placement: which owner updates which part of which value, and how a call is cut into chunks. Pure functions.

A value is owned in runs of whole rows (of a 1-d value: elements), so that an owner's part is a value of its own
with fewer rows. Small values have one owner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

# Values of fewer elements are not worth dividing.
_WHOLE = 1 << 18
_LINE = 64
# A multiple of the elements that torch's vector loops take at a time.
_VECTOR = 64


def borders(
    shape: Sequence[int], owners: int, lead: int, *, whole: bool = False, weights: Sequence[int] | None = None
) -> list[int]:
    """Return the rows where each owner's part begins, and the number of rows.

    Args:
        shape: of the value; a 0-d value has one row.
        owners: how many there are.
        lead: the owner of a value that is not divided.
        whole: do not divide this value.
        weights: of the owners' parts, positive (None: all are alike).

    >>> borders((1_000_000,), 4, 0)
    [0, 249984, 500032, 750016, 1000000]
    >>> borders((1_000_000,), 2, 0, weights=[3, 1])
    [0, 750016, 1000000]
    >>> borders((2, 3), 4, lead=1)
    [0, 0, 2, 2, 2]
    """
    rows = shape[0] if shape else 1
    numel = math.prod(shape)
    undivided = [0] * (lead + 1) + [rows] * (owners - lead)
    if whole or numel < _WHOLE or rows < owners:
        return undivided
    # torch computes the last few elements of an array otherwise than the rest, and they may round differently:
    # parts end where its vectors end.
    step = _VECTOR // math.gcd(_VECTOR, numel // rows)
    before = [0, *accumulate(weights or [1] * owners)]
    unit = before[-1] * step
    # The nearest multiples of a step.
    found = [min(rows, (rows * weight + unit // 2) // unit * step) for weight in before[:-1]] + [rows]
    return found if any(0 < end < rows for end in found) else undivided


def lightest(loads: Sequence[int], weights: Sequence[int] | None = None) -> int:
    """Return the owner with the least to do, for its weight.

    >>> lightest([5, 3, 3]), lightest([5, 3, 3], [4, 1, 1])
    (1, 0)
    """
    relative = loads if weights is None else [load / weight for load, weight in zip(loads, weights, strict=True)]
    return relative.index(min(relative))


def part_of(tensor: torch.Tensor, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Return what a part of a value has of an optimizer's state: some rows, or all of a tensor such as a counter.

    Args:
        tensor: of the whole value.
        shape: of the whole value.
        start, stop: the part's first row, and the row after its last.

    >>> part_of(torch.arange(4), torch.Size([4]), 1, 3), part_of(torch.tensor(7), torch.Size([4]), 1, 3)
    (tensor([1, 2]), tensor(7))
    """
    return tensor[start:stop] if shape and tensor.shape == shape else tensor


def whose(borders: Sequence[int]) -> int:
    """Return the owner of a value that is not divided; for others, more than there are owners.

    >>> whose([0, 0, 2, 2, 2]), whose([0, 249984, 1000000])
    (1, 3)
    """
    lead = max(0, borders.index(borders[-1]) - 1)
    return len(borders) if borders[lead] else lead


Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Runs:
    """What is updated of each key, as columns, in the order of owners: one run of elements of each owner and key.

    Args:
        owner: who updates it.
        key: index of the key in its call.
        start, count: elements of the flattened value.
        itemsize: bytes of an element on its way.
    """

    owner: Numbers
    key: Numbers
    start: Numbers
    count: Numbers
    itemsize: Numbers


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs that are short enough, as columns: who updates them, and where in a slot their elements lie."""

    owner: Numbers
    key: Numbers
    start: Numbers
    count: Numbers
    offset: Numbers

    def take(self, chosen: Any) -> Pieces:
        """Return some of the pieces; ``chosen`` is anything that indexes an array."""
        return Pieces(self.owner[chosen], self.key[chosen], self.start[chosen], self.count[chosen], self.offset[chosen])


def cut(runs: Runs, owners: int, slot_nbytes: int) -> list[Pieces]:
    """Cut what each owner has to do into chunks, in each of which every owner finds about as much.

    Args:
        runs: with elements.
        owners: how many there are.
        slot_nbytes: the bytes that the pieces of one chunk may take.

    Returns:
        Chunks: pieces in the order of their owners.

    >>> pieces = cut(Runs(*map(np.array, ([0, 1], [0, 0], [0, 100], [100, 80], [4, 4]))), 2, 640)[0]
    >>> pieces.owner.tolist(), pieces.start.tolist(), pieces.count.tolist()
    ([0, 1], [0, 100], [80, 80])
    """
    room = max(_LINE, slot_nbytes // owners // _LINE * _LINE)
    # The runs of an owner lie one after another, each to the end of a line, and are cut where chunks end.
    nbytes = runs.count * runs.itemsize
    places = np.concatenate([[0], np.cumsum((nbytes + _LINE - 1) // _LINE * _LINE)])
    owned = places[np.searchsorted(runs.owner, np.arange(owners + 1))]
    lows = places[:-1] - owned[runs.owner]
    firsts, lasts = lows // room, (lows + nbytes - 1) // room
    run = np.repeat(np.arange(len(lows)), lasts - firsts + 1)
    chunk = np.arange(len(run)) - np.searchsorted(run, run) + firsts[run]
    low = np.maximum(lows[run], chunk * room)
    high = np.minimum((lows + nbytes)[run], (chunk + 1) * room)
    # Of each chunk, how much the owners before fill.
    num_chunks = int(lasts.max(initial=-1)) + 1
    filled = np.clip(np.diff(owned)[:, None] - room * np.arange(num_chunks), 0, room)
    before = np.cumsum(filled, 0) - filled
    owner, itemsize = runs.owner[run], runs.itemsize[run]
    start = runs.start[run] + (low - lows[run]) // itemsize
    offset = before[owner, chunk] + low - chunk * room
    pieces = Pieces(owner, runs.key[run], start, (high - low) // itemsize, offset)
    if num_chunks == 1:
        return [pieces]
    order = np.argsort(chunk, kind="stable")
    borders = np.searchsorted(chunk[order], np.arange(num_chunks + 1))
    return [pieces.take(order[first:stop]) for first, stop in pairwise(borders)]


# ---------------------------------------------------------------- servers


def pieces(
    shape: Sequence[int], loads: Sequence[int], *, whole: bool = False, weights: Sequence[int] | None = None
) -> list[tuple[int, int, int]]:
    """Return which server holds which rows of a value.

    Large values are divided between all servers. Small ones go to the server that holds least; what is there stays
    where it is, so nothing has to be found by its key alone.

    Args:
        shape: of the value; a 0-d value has one row.
        loads: bytes that each server holds already.
        whole: do not divide this value.
        weights: how much each server can hold, compared with the others (None: all the same).

    Returns:
        (server, first row, row after the last) for each piece, in the order of rows.

    >>> pieces((1_000_000,), [0, 0])
    [(0, 0, 500032), (1, 500032, 1000000)]
    >>> pieces((10,), [8, 0])
    [(1, 0, 10)]
    """
    servers = len(loads)
    ends = borders(shape, servers, 0, whole=whole or servers == 1, weights=weights)
    if servers > 1 and ends[1] < ends[-1]:
        return [(server, *rows) for server, rows in enumerate(pairwise(ends)) if rows[0] < rows[1]]
    return [(lightest(loads, weights), 0, shape[0] if shape else 1)]
