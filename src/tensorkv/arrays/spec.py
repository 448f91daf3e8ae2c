"""KeySpec: what callers need to know of a key to make an array for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from tensorkv.errors import ArrayTypeError

from . import interop
from .rowinit import RowInit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What callers need to know of a key to make an array for it.

    Args:
        shape, dtype: of the value.
        origin: library and device of new arrays.
        is_table: whether it is a sparse table.
        init: what the rows of a table hold before their first push (None: zeros).
    """

    shape: torch.Size
    dtype: torch.dtype
    origin: interop.Origin
    is_table: bool
    init: RowInit | None = None

    def new(self) -> Any:
        """Return a new array to be filled, of NumPy or torch; None: its library cannot have it."""
        try:
            return interop.empty(self.shape, self.dtype, self.origin)
        except ArrayTypeError:
            return None

    def of(self, origin: interop.Origin) -> KeySpec:
        """Return the same for arrays of another library or device."""
        return replace(self, origin=origin)


def numbered(things: Iterable[T]) -> tuple[list[T], list[int]]:
    """Return the distinct objects, and for each thing the number of its object.

    Most keys share a few specs, and hashing a spec takes longer than what is mostly done with it.

    >>> one, other = (KeySpec(torch.Size([n]), torch.float32, interop.NUMPY, False) for n in (1, 2))
    >>> numbered([one, other, one]) == ([one, other], [0, 1, 0])
    True
    """
    listed = list(things)
    ids = list(map(id, listed))
    objects = dict(zip(ids, listed, strict=True))
    numbers = dict(zip(objects, range(len(objects)), strict=True))
    return list(objects.values()), list(map(numbers.__getitem__, ids))
