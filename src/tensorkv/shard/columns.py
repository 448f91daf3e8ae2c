"""Columns: the arrays of a call on many keys, looked at by the column rather than one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import native


class Column:
    """One array of each key: a part or an out, every one exactly as its key asks for.

    Args:
        addresses: as the compiled kernel takes them.
        arrays: all of NumPy or all of torch, in the order of the keys; None: the pieces of ``flat``.
        flat: the tensor in which all lie side by side, if they do.
        split: makes pieces of it, when somebody asks for them.
    """

    def __init__(
        self,
        addresses: bytes,
        arrays: tuple[Any, ...] | None,
        flat: torch.Tensor | None = None,
        split: Callable[[torch.Tensor], tuple[Any, ...]] | None = None,
    ) -> None:
        self.addresses, self.flat = addresses, flat
        self._arrays, self._split = arrays, split

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays, in the order of the keys."""
        if self._arrays is None and self.flat is not None and self._split is not None:
            self._arrays = self._split(self.flat)
        return self._arrays or ()


class Form:
    """What the arrays of some keys of one dtype must be, to go the short way.

    Args:
        shapes: of each key's value.
        dtype: of all values.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        self.shapes = list(shapes)
        self.dtype = dtype
        self.counts = [shape.numel() for shape in shapes]
        self.nbytes = [count * dtype.itemsize for count in self.counts]
        self._moved: dict[int, list[int]] = {}
        self._apart: tuple[bytes, ...] | None = None

    def columns(self, values: Any, *, writable: bool = False) -> list[Column] | None:
        """Return parts or outs as columns, if every array is exactly what its key asks for."""
        found = []
        transposed = self._transpose(values)
        if len(transposed) > native.MOST_COLUMNS:
            return None
        for column in transposed:
            addresses = native.addresses(column, self.dtype, self.shapes, writable=writable)
            if addresses is None:
                return None
            found.append(Column(addresses, column))
        return found or None

    def flat(self, tensor: torch.Tensor) -> Column:
        """Return arrays that lie side by side in a flat tensor as a column."""
        return Column(native.column_beside(tensor, self.counts), None, tensor, self._split)

    def targets(self, outs: Any) -> list[Column] | None:
        """Return outs as columns if every one can be written and no two share memory."""
        columns = self.columns(outs, writable=True)
        if columns is None or native.overlap([column.addresses for column in columns], self.nbytes):
            return None
        return columns

    def moved(self, count: int) -> list[int]:
        """Return the bytes that a call with so many columns and targets moves for each key."""
        if count not in self._moved:
            self._moved[count] = [count * nbytes for nbytes in self.nbytes]
        return self._moved[count]

    def are_apart(self, parts: Sequence[bytes], outs: Sequence[bytes]) -> bool:
        """Tell whether outs may be written before all parts have been read; asked once for the same arrays."""
        called = (*parts, *outs)
        if self._apart != called:
            if not native.are_apart(parts, outs, self.nbytes):
                return False
            self._apart = called
        return True

    def _split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = torch.split(tensor, self.counts)
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def _transpose(self, values: Any) -> list[tuple[Any, ...]]:
        """Return one tuple per part or out, with the array of each key; an empty list for other forms."""
        if type(values) not in (list, tuple) or len(values) != len(self.shapes):
            return []
        if type(values[0]) not in (list, tuple):
            return [tuple(values)]
        if not set(map(type, values)) <= {list, tuple} or len(set(map(len, values))) > 1:
            return []
        return list(zip(*values, strict=True))
