"""The wire format between clients and servers: a head of plain data, a layout, and the bytes of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.packing import Slot

_SIZES = struct.Struct("<II")
_ALIGN = 16


class Reply(NamedTuple):
    """What a server answers: plain data, and the layout and bytes of tensors."""

    head: dict[str, Any]
    payload: torch.Tensor | None = None


def join(head: Mapping[str, Any], layout: bytes = b"[]", payload: Any = b"") -> bytes:
    """Return head, layout and a small payload as one message.

    >>> split(join({"verb": "pull"}, b'["w"]'))[:2]
    ({'verb': 'pull'}, b'["w"]')
    """
    text = json.dumps(head, separators=(",", ":")).encode()
    if len(payload):
        # The payload is to begin where every dtype may.
        text += b" " * (-(_SIZES.size + len(text) + len(layout)) % _ALIGN)
    return b"".join([_SIZES.pack(len(text), len(layout)), text, layout, payload])


def split(message: bytes) -> tuple[dict[str, Any], bytes, memoryview]:
    """Return what ``join`` has joined; the payload shares the message's memory."""
    words, layout = _SIZES.unpack_from(message)
    start = _SIZES.size + words
    view = memoryview(message)
    return json.loads(message[_SIZES.size : start]), message[start : start + layout], view[start + layout :]


class Room:
    """ServerTables for the values of some keys, side by side.

    Args:
        places: of each value.
        out: bytes to use, if there are enough; else new ones are made.
    """

    def __init__(self, places: Sequence[Slot], out: torch.Tensor | None = None) -> None:
        self._places = places
        nbytes = places[-1].stop if places else 0
        fits = out is not None and len(out) >= nbytes
        self.payload: torch.Tensor = out[:nbytes] if fits else torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # type: ignore[index]

    @property
    def flat(self) -> torch.Tensor | None:
        """All values as one tensor, if they are of one dtype."""
        dtypes = {place.dtype for place in self._places}
        return self.payload.view(dtypes.pop()) if len(dtypes) == 1 else None

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Each value."""
        return [self.payload[p.start : p.stop].view(p.dtype).view(p.shape) for p in self._places]
