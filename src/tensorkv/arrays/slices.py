"""TensorSlice: an array that is a part of a value, as a rank of a mesh has it; DTensors are taken as such."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import index
from typing import Any

import torch

from tensorkv.errors import ArgumentError, ArrayTypeError, ValueMismatchError, show

from . import interop
from .regions import Region


class TensorSlice:
    """An array that is a part of a value.

    A pull into it fills it with that part, and no more than that leaves a server. A ``DTensor`` is taken as the part
    that this process has of it.

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
