"""Slices: parts of values, as the ranks of a mesh have them. Callers give TensorSlices and DTensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, pairwise, product
from operator import index
from typing import Any

import torch

from tensorkv.errors import ArgumentError, ArrayTypeError, IncompleteValueError, ValueMismatchError, show

from . import interop
from .regions import Region

# Missing slices that a message names.
_NAMED = 4


class TensorSlice:
    """An array that is a part of a value.

    A pull into it fills it with that part, and no more than that leaves a server. A push of slices updates the value
    when together they cover each of its elements exactly once. Until then the value cannot be read. A ``DTensor``
    stands for its local shard; of a shard that several processes have, the first of them pushes it.

    Args:
        array: of any library, as an out of ``pull`` may be.
        offsets: where the part begins in the value, on each axis.
        global_shape: of the whole value.

    Raises:
        ArrayTypeError: not an array.
        ArgumentError: offsets or shape that are not integers, one for each axis of the array.
        ValueMismatchError: the part does not lie in a value of this shape.

    >>> import numpy as np, tensorkv
    >>> kv = tensorkv.create()
    >>> kv.init("w", np.arange(6.0).reshape(3, 2))
    >>> mine = np.zeros((2, 2))
    >>> kv.pull("w", out=TensorSlice(mine, offsets=(1, 0), global_shape=(3, 2)))
    >>> mine
    array([[2., 3.],
           [4., 5.]])
    >>> kv.push("w", TensorSlice(-mine, offsets=(1, 0), global_shape=(3, 2)))
    >>> kv.pull("w")
    Traceback (most recent call last):
    tensorkv.errors.IncompleteValueError: pull("w"): the value is incomplete; a push lacks [0:1, 0:2] of (3, 2)
    >>> kv.push("w", TensorSlice(mine[:1], offsets=(0, 0), global_shape=(3, 2)))
    >>> kv.pull("w")
    array([[ 2.,  3.],
           [-2., -3.],
           [-4., -5.]])
    """

    def __init__(self, array: Any, offsets: Sequence[int], global_shape: Sequence[int]) -> None:
        try:
            shape, _ = interop.shape_and_dtype(array)
        except ArrayTypeError as error:
            raise ArrayTypeError(f"TensorSlice: the array {error}") from None
        try:
            firsts, whole = tuple(map(index, offsets)), tuple(map(index, global_shape))
        except TypeError:
            raise ArgumentError(
                f"TensorSlice: offsets is {show(offsets)}, global_shape {show(global_shape)}; expected integers"
            ) from None
        if not len(firsts) == len(whole) == len(shape) > 0:
            raise ArgumentError(
                f"TensorSlice: the array has the shape {tuple(shape)}, offsets is {firsts}, global_shape {whole}; "
                "expected as many numbers in each, and at least one"
            )
        self.array, self.offsets, self.global_shape = array, firsts, whole
        self._bounds = tuple((first, first + size) for first, size in zip(firsts, shape, strict=True))
        if any(first < 0 or stop > size for (first, stop), size in zip(self._bounds, whole, strict=True)):
            raise ValueMismatchError(
                f"TensorSlice: an array of shape {tuple(shape)} at {firsts} does not lie in a value of shape {whole}"
            )

    @property
    def region(self) -> Region:
        """The part of the value."""
        return Region(self._bounds)

    def __repr__(self) -> str:
        return f"TensorSlice({show(self.array)}, offsets={self.offsets}, global_shape={self.global_shape})"


@dataclass(slots=True)
class Slices:
    """What a push has of some slices of one value, of which the receiver may hold some rows.

    Args:
        whole: the shape of the value.
        rows: the first row that the receiver holds, and the one after the last; a 0-d value has one row.
        regions: where each slice lies in the value.
        values: what each slice has of these rows.
        dtype: of the values, if there are none.
        memory: of what the receiver holds of the value, in which the slices are at their places (None: they are
            somewhere else).
    """

    whole: torch.Size
    rows: tuple[int, int]
    regions: list[Region]
    values: list[torch.Tensor]
    dtype: torch.dtype
    memory: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of what the receiver holds of the value."""
        first, stop = self.rows
        return torch.Size((stop - first, *self.whole[1:])) if self.whole else self.whole

    @property
    def nbytes(self) -> int:
        """The bytes of the slices."""
        return sum(each.nbytes for each in self.values)

    @property
    def is_complete(self) -> bool:
        """Whether the slices, which do not overlap, are all of the value."""
        return bool(self.regions) and self._numel() == self.whole.numel()

    @property
    def is_empty(self) -> bool:
        """Whether the slices have no element of the value."""
        return self._numel() == 0

    def _numel(self) -> int:
        return sum(region.shape.numel() for region in self.regions)

    def plus(self, other: Slices) -> Slices:
        """Return these slices and others of the same value.

        Raises:
            ValueMismatchError: they are of a value of another shape or dtype, or a slice overlaps one of these.
        """
        mine, others = (self.whole, self.rows, self.dtype), (other.whole, other.rows, other.dtype)
        if mine != others:
            raise ValueMismatchError(
                f"a slice is {interop.dtype_name(other.dtype)} of a value of shape {tuple(other.whole)}, another one "
                f"{interop.dtype_name(self.dtype)} of {tuple(self.whole)}"
            )
        for region in other.regions:
            common = next(filter(None, (before.common(region) for before in self.regions)), None)
            if common is not None:
                raise ValueMismatchError(
                    f"the slice {region} overlaps at {common} one that has come; slices have each element once, and "
                    "those of the next push may follow when these are all there"
                )
        regions, values = self.regions + other.regions, self.values + other.values
        return Slices(self.whole, self.rows, regions, values, self.dtype, self.memory)

    def incomplete_error(self, name: str) -> IncompleteValueError:
        """Return an error that names what is missing.

        Args:
            name: of the call that needs all of the value, for the message.
        """
        gaps = list(map(str, self._gaps()))
        more = f" and {len(gaps) - _NAMED} more" if len(gaps) > _NAMED else ""
        return IncompleteValueError(
            f"{name}: the value is incomplete; a push lacks {', '.join(gaps[:_NAMED])}{more} of {tuple(self.whole)}"
        )

    def _gaps(self) -> Iterator[Region]:
        """Return boxes that cover what is missing; the axes are cut where a slice begins or ends."""
        if not self.whole:
            yield Region(())
            return
        axes = [
            list(pairwise(sorted({0, size, *(end for region in self.regions for end in region.bounds[axis])})))
            for axis, size in enumerate(self.whole)
        ]
        for firsts in product(*axes[:-1]):
            free = [last for last in axes[-1] if not self._has((*firsts, last))]
            # Neighbours along the last axis are one box.
            while free:
                start, stop = free.pop(0)
                while free and free[0][0] == stop:
                    stop = free.pop(0)[1]
                yield Region((*firsts, (start, stop)))

    def _has(self, box: tuple[tuple[int, int], ...]) -> bool:
        return any(region.common(Region(box)) is not None for region in self.regions)

    def within(self, first: int, stop: int) -> Slices:
        """Return the same slices for the receiver of some rows; these slices have all rows."""
        cuts = [region.within(first, stop) for region in self.regions]
        values = [
            value[:0] if cut is None else value if not region.bounds else value[cut[1] : cut[1] + cut[0].shape[0]]
            for region, value, cut in zip(self.regions, self.values, cuts, strict=True)
        ]
        return Slices(self.whole, (first, stop), self.regions, values, self.dtype)

    def to(self, dtype: torch.dtype) -> Slices:
        """Return the same slices in a dtype."""
        return Slices(self.whole, self.rows, self.regions, [value.to(dtype) for value in self.values], dtype)

    def placed(self, memory: torch.Tensor) -> Slices:
        """Return the same slices at their places in memory of the shape and dtype of what the receiver holds."""
        values = []
        for region, own in zip(self.regions, self.values, strict=True):
            cut = region.within(*self.rows)
            values.append(own if cut is None else cut[0].of(memory).copy_(own))
        return Slices(self.whole, self.rows, self.regions, values, self.dtype, memory)

    def assembled(self, filling: float) -> torch.Tensor:
        """Return what the receiver holds of the value as a new tensor, with a number where no slice is."""
        memory = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        (torch.view_as_real(memory) if memory.is_complex() else memory).fill_(filling)
        self.placed(memory)
        return memory

    def to_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two tensors: ``to_bounds``, and all elements."""
        flat = [own.cpu().reshape(-1) for own in self.values]
        if len(flat) == 1:
            (values,) = flat
        else:
            values = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device="cpu")
        return self.to_bounds(), values

    def to_bounds(self) -> torch.Tensor:
        """Return the bounds of the value, of the rows and of each slice."""
        sizes = tuple((0, size) for size in self.whole)
        bounds = [sizes, (self.rows, *sizes[1:]) if sizes else sizes, *(region.bounds for region in self.regions)]
        table = torch.tensor(bounds, dtype=torch.int64, device="cpu")
        return table.reshape(len(bounds), len(sizes), 2)

    @classmethod
    def from_bounds(cls, bounds: torch.Tensor, dtype: torch.dtype) -> Slices:
        """Return slices without their values, of which ``to_bounds`` has returned the bounds.

        Raises:
            ArgumentError: they are malformed.
        """
        fits = bounds.ndim == 3 and bounds.shape[0] >= 2 and bounds.shape[2] == 2 and bounds.dtype is torch.int64
        if not fits:
            raise ArgumentError("malformed slices; expected the bounds of a value, of rows of it, and of slices")
        whole, held, *rest = [tuple((first, stop) for first, stop in each) for each in bounds.tolist()]
        shape = torch.Size(size for _, size in whole)
        regions = [Region(each) for each in rest]
        for each in (Region(held), *regions):
            if any(not 0 <= first <= stop <= size for (first, stop), size in zip(each.bounds, shape, strict=True)):
                raise ArgumentError(f"malformed slices; {each} does not lie in {tuple(shape)}")
        if any(each.common(other) is not None for each, other in combinations(regions, 2)):
            raise ArgumentError("malformed slices; some overlap")
        return cls(shape, held[0] if held else (0, 1), regions, [], dtype)

    @classmethod
    def from_tensors(cls, bounds: torch.Tensor, values: torch.Tensor) -> Slices:
        """Return what ``to_tensors`` was called on; it shares the memory of the values.

        Raises:
            ArgumentError: they are malformed.
        """
        found, at = cls.from_bounds(bounds, values.dtype), 0
        flat = values.reshape(-1)
        for region in found.regions:
            cut = region.within(*found.rows)
            own = torch.Size((0, *region.shape[1:])) if cut is None else cut[0].shape
            if at + own.numel() > len(flat):
                raise ArgumentError(f"malformed slices; {len(flat)} elements, expected more")
            found.values.append(flat[at : at + own.numel()].view(own))
            at += own.numel()
        if at != len(flat):
            raise ArgumentError(f"malformed slices; {len(flat)} elements, expected {at}")
        return found


def join_slices(name: str, parts: Sequence[Any]) -> Slices:
    """Return the parts of a value as one that has the slices of all.

    Args:
        name: of the call and the key, for messages.
        parts: of which at least one is slices.

    Raises:
        ArgumentError: there are whole arrays among them.
        ValueMismatchError: they overlap, or are of other values.
    """
    slices = [part for part in parts if isinstance(part, Slices)]
    if len(slices) < len(parts):
        raise ArgumentError(f"{name}: got slices of the value and whole arrays; expected one or the other")
    try:
        return reduce(Slices.plus, slices)
    except ValueMismatchError as error:
        raise ValueMismatchError(f"{name}: {error}") from None


def empty_whole(array: Any) -> Any:
    """Return a new array of the shape and dtype of the value of which an array is a slice; others as they are."""
    local, own = local_part(array)
    if local is array:
        return array
    _, dtype = interop.shape_and_dtype(local)
    return interop.empty(
        torch.Size(array.shape if own is None else own.global_shape), dtype, interop.origin(local).for_parts()
    )


def take_slice(array: Any) -> Slices | None:
    """Return the slice of a value that an array is; None: it is not a slice.

    Of a ``DTensor`` that several processes have the same part of, the first one has it, and the others have nothing.

    Raises:
        ArrayTypeError: as ``local_part``, or its array is not one that a store can take.
    """
    local, own = local_part(array)
    if own is None and local is array:
        return None
    value = interop.clean(interop.take(local))
    whole = torch.Size(array.shape if own is None else own.global_shape)
    regions = [Region(tuple((0, size) for size in whole)) if own is None else own.region]
    if value.shape != regions[0].shape:
        raise ArrayTypeError(f"is a slice whose array has the shape {tuple(value.shape)} now; make another slice of it")
    if not isinstance(array, TensorSlice) and not _is_first_replica(array):
        regions = []
    rows = (0, whole[0] if whole else 1)
    return Slices(whole, rows, regions, [value] if regions else [], value.dtype)


def _is_first_replica(array: Any) -> bool:
    replicate = sys.modules["torch.distributed.tensor"].Replicate
    pairs = zip(array.placements, array.device_mesh.get_coordinate(), strict=True)
    return not any(type(placement) is replicate and place for placement, place in pairs)


def local_part(array: Any) -> tuple[Any, TensorSlice | None]:
    """Return an array of this process, and which part of a value it is; None: it is the whole.

    Raises:
        ArrayTypeError: a DTensor that is neither divided nor replicated, or of which this process has nothing.
    """
    if isinstance(array, TensorSlice):
        return array.array, array
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(array, distributed.DTensor):
        return array, None
    mesh, coordinate = array.device_mesh, array.device_mesh.get_coordinate()
    if coordinate is None:
        raise ArrayTypeError("is a DTensor on a mesh of other processes")
    bounds = [(0, size) for size in array.shape]
    for axis_of_mesh, placement in enumerate(array.placements):
        if type(placement) is distributed.Replicate:
            continue
        if type(placement) is not distributed.Shard:
            raise ArrayTypeError(f"is a DTensor with the placement {placement!r}; expected Shard and Replicate")
        # As torch.chunk cuts: pieces of one size, the last of which may be smaller, and then none.
        first, stop = bounds[placement.dim]
        size = -(-(stop - first) // mesh.size(axis_of_mesh))
        begin = min(first + size * coordinate[axis_of_mesh], stop)
        bounds[placement.dim] = (begin, min(begin + size, stop))
    with torch.no_grad():
        local = array.to_local()
    shape = tuple(stop - first for first, stop in bounds)
    if tuple(local.shape) != shape:
        raise ArrayTypeError(f"is a DTensor of which this process has the shape {tuple(local.shape)}, expected {shape}")
    if shape == tuple(array.shape):
        return local, None
    return local, TensorSlice(local, [first for first, _ in bounds], array.shape)
