"""Regions: parts of values, as slices of each axis."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch

from tensorkv.errors import ArgumentError, ValueMismatchError, quote, show

from .arguments import Key
from .spec import KeySpec


class Region(NamedTuple):
    """A part of a value.

    Args:
        bounds: of each axis, the first index and the one after the last.
    """

    bounds: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of the part."""
        return torch.Size(stop - start for start, stop in self.bounds)

    def __str__(self) -> str:
        return f"[{', '.join(f'{start}:{stop}' for start, stop in self.bounds)}]"

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Return the part of a value, as a view."""
        return value[tuple(slice(*each) for each in self.bounds)]

    def lies_in(self, spec: KeySpec) -> bool:
        """Return whether a value has this part."""
        if spec.is_table or len(self.bounds) != len(spec.shape):
            return False
        return all(0 <= start <= stop <= size for (start, stop), size in zip(self.bounds, spec.shape, strict=True))

    def common(self, other: Region) -> Region | None:
        """Return the elements that two regions of a value share; None: there are none.

        >>> Region(((0, 4), (0, 2))).common(Region(((3, 9), (0, 1))))
        Region(bounds=((3, 4), (0, 1)))
        """
        pairs = zip(self.bounds, other.bounds, strict=True)
        bounds = tuple((max(first, start), min(last, stop)) for (first, last), (start, stop) in pairs)
        return None if any(first >= last for first, last in bounds) else Region(bounds)

    def within(self, start: int, stop: int) -> tuple[Region, int] | None:
        """Return what some rows of the value hold of the part, and the place of its first row in the part.

        Args:
            start, stop: the first row and the one after the last.

        Returns:
            A region as these rows number themselves; None: they hold nothing of the part.

        >>> Region(((2, 9), (0, 4))).within(5, 20)
        (Region(bounds=((0, 4), (0, 4))), 3)
        """
        if not self.bounds:
            return self, 0
        (mine, end), *rest = self.bounds
        first, last = max(start, mine), min(stop, end)
        if first >= last:
            return None
        return Region(((first - start, last - start), *rest)), first - mine

    @classmethod
    def take(cls, verb: str, key: Key, region: Any, spec: KeySpec) -> Region:
        """Return the part of a value that a caller has named.

        Args:
            verb, key: for messages.
            region: a slice, or a tuple of slices for the first axes; the others are whole.
            spec: of the value.

        Raises:
            ArgumentError: it is something else.
            ValueMismatchError: it does not lie in the value, or the value has no axes.
        """
        name = f"{verb}({quote(key)})"
        if spec.is_table:
            raise ValueMismatchError(
                f"{name}: the key holds rows of a sparse table; use row_sparse_pull(key, row_ids=...) for some of them"
            )
        slices = region if isinstance(region, tuple) else (region,)
        if not all(isinstance(each, slice) for each in slices):
            raise ArgumentError(
                f"{name}: region is {show(region)}; expected a slice for each axis, such as (slice(0, 8), slice(None))"
            )
        shape = tuple(spec.shape)
        if not shape:
            raise ValueMismatchError(f"{name}: the value is 0-d, and has no regions; pull it without region=")
        if len(slices) > len(shape):
            raise ValueMismatchError(f"{name}: region has {len(slices)} slices, the value has the shape {shape}")
        whole = [(0, size) for size in shape[len(slices) :]]
        return cls((*(_bounds(name, axis, each, shape) for axis, each in enumerate(slices)), *whole))

    @classmethod
    def from_json(cls, bounds: Any, spec: KeySpec) -> Region:
        """Return the part that a request has named.

        Raises:
            ArgumentError: it is none of such a value.
        """
        try:
            found = cls(tuple((index(start), index(stop)) for start, stop in bounds))
        except (TypeError, ValueError):
            raise ArgumentError(f"malformed region {show(bounds)}") from None
        if not spec.shape or not found.lies_in(spec):
            raise ArgumentError(f"region {show(bounds)} of a value of shape {tuple(spec.shape)}; call again")
        return found


def _bounds(name: str, axis: int, given: slice, shape: Sequence[int]) -> tuple[int, int]:
    """Return the bounds of a slice of an axis; negative numbers count from its end."""
    size = shape[axis]
    try:
        step = 1 if given.step is None else index(given.step)
        start = 0 if given.start is None else index(given.start)
        stop = size if given.stop is None else index(given.stop)
    except TypeError:
        raise ArgumentError(f"{name}: region has {given} for axis {axis}; expected integers") from None
    if step != 1:
        raise ArgumentError(f"{name}: region has the step {step} for axis {axis}; expected 1")
    first, last = (each + size if each < 0 else each for each in (start, stop))
    if not 0 <= first <= last <= size:
        raise ValueMismatchError(
            f"{name}: region has {start}:{stop} for axis {axis}, which has the size {size} (the value's shape is "
            f"{tuple(shape)})"
        )
    return first, last
