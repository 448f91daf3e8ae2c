"""KeySpec: what callers need to know of a key to make an array for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensorkv.errors import ArrayTypeError

from . import interop
from .rowinit import RowInit


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


def numbered(specs: Sequence[KeySpec]) -> tuple[list[KeySpec], list[int]]:
    """Return the objects among some specs, each once, and the number of each spec among them; many keys have few.

    Hashing a spec takes longer than what is mostly done with it, and most equal ones are one object.

    >>> one, other = (KeySpec(torch.Size([n]), torch.float32, interop.NUMPY, False) for n in (1, 2))
    >>> numbered([one, other, one]) == ([one, other], [0, 1, 0])
    True
    """
    objects = {id(spec): spec for spec in specs}
    numbers = {found: number for number, found in enumerate(objects)}
    return list(objects.values()), [numbers[id(spec)] for spec in specs]
