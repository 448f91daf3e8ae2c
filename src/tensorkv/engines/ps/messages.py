"""What the layout of a request says, decoded once for all requests that have the same layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from tensorkv.arrays.arguments import Key, check_key
from tensorkv.arrays.packing import decode_layout, unpack
from tensorkv.arrays.rows import Rows
from tensorkv.errors import ArgumentError
from tensorkv.shard.entry import Part


@dataclass(frozen=True, slots=True)
class PushLayout:
    """The keys of a push, and how their parts lie in its payload.

    Args:
        keys: in order, each once.
        flat_dtype: of all parts, if they are dense and of one dtype; else None.
        layout: of the request.
    """

    keys: tuple[Key, ...]
    flat_dtype: torch.dtype | None
    layout: bytes

    def flat(self, payload: torch.Tensor) -> torch.Tensor | None:
        """Return a payload as one flat tensor, if its parts have one dtype."""
        if self.flat_dtype is None or len(payload) != decode_layout(self.layout)[-1].stop:
            return None
        return payload.view(self.flat_dtype)

    def parts(self, payload: Any, num_rows: Sequence[int]) -> list[Part]:
        """Return one part for each key; they share the payload's memory.

        Args:
            payload: of the request.
            num_rows: of each key's value.

        Raises:
            LayoutError, ValueMismatchError: the payload does not fit the layout, or the rows.
        """
        items = iter(unpack(self.layout, payload))
        found: list[Part] = []
        for item, count in zip(items, num_rows, strict=False):
            found.append(Rows(item.tensor, next(items).tensor, count) if item.role == "ids" else item.tensor)
        return found


@lru_cache(maxsize=256)
def push_layout(layout: bytes) -> PushLayout:
    """Decode the layout of a push.

    Raises:
        LayoutError, ArgumentError: the layout is malformed.
    """
    found = decode_layout(layout)
    roles = [place.role for place in found]
    keys = tuple(place.key for place in found if place.role != "rows")
    pairs = list(pairwise(found))
    fits = all((a.role == "ids") == (b.role == "rows" and a.key == b.key) for a, b in pairs)
    if not keys or not fits or set(roles) - {"sum", "ids", "rows"} or roles[0] == "rows" or roles[-1] == "ids":
        raise ArgumentError("malformed push layout; expected sums, or pairs of ids and rows")
    if len(set(keys)) < len(keys):
        raise ArgumentError("duplicate key in a push layout")
    dtypes = {place.dtype for place in found}
    flat = dtypes.pop() if set(roles) == {"sum"} and len(dtypes) == 1 else None
    return PushLayout(keys, flat, layout)


@lru_cache(maxsize=256)
def keys_of(text: bytes) -> tuple[Key, ...]:
    """Decode the list of keys of a pull.

    >>> keys_of(b'["w", "b"]')
    ('w', 'b')
    """
    try:
        listed = json.loads(text)
        return tuple(check_key("pull", key) for key in listed)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(f"invalid key list: {error}") from None
