"""One small key, assigned from one plain array: copied straight in and straight out.

At a few bytes the price of a call is what Python does around the copy. This is the general way without all
that cannot apply: one part, of the key's own dtype, NumPy's or torch's on the CPU. Whatever is out of the
ordinary is left to the general way, which also words the errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .entry import Entry

# Larger values gain nothing here, and want threads.
_SMALL = 1 << 14


class Door:
    """A small dense value as torch and as NumPy see it; ``array`` is None where there is no way in."""

    __slots__ = ("array", "dtype", "nbytes", "shape", "tensor")

    def __init__(self, value: Any) -> None:
        self.tensor = value
        self.array: np.ndarray[Any, Any] | None = None
        small = isinstance(value, torch.Tensor) and value.is_cpu and value.numel() <= _SMALL
        if small and value.dtype is not torch.bfloat16:
            self.array = value.numpy()
            self.dtype, self.shape, self.nbytes = self.array.dtype, self.array.shape, self.array.nbytes


def exchange(entry: Entry, value: Any, out: Any) -> int | None:
    """Assign an array to a value and copy the value to an out.

    Args:
        entry: of the key.
        value, out: the caller's arrays; None for a pull or a push alone.

    Returns:
        Bytes moved, or None when nothing was done.
    """
    door: Any = entry.door
    if door is None or door.tensor is not entry.value:
        door = entry.door = Door(entry.value)
    if door.array is None or not (
        (value is None or _fits(value, door)) and (out is None or (_fits(out, door) and _is_writable(out)))
    ):
        return None
    moved = 0
    if value is not None:
        if type(value) is np.ndarray:
            np.copyto(door.array, value)
        else:
            door.tensor.copy_(value)
        entry.version += 1
        moved = door.nbytes
    if out is not None:
        if type(out) is np.ndarray:
            np.copyto(out, door.array)
        else:
            out.copy_(door.tensor)
        moved += door.nbytes
    return moved


def _fits(array: Any, door: Door) -> bool:
    if type(array) is np.ndarray:
        return bool(array.dtype is door.dtype and array.shape == door.shape)
    return (
        type(array) is torch.Tensor
        and array.dtype is door.tensor.dtype
        and array.is_cpu
        and array.layout is torch.strided
        and not array.requires_grad
        and not array.is_nested
        and array.shape == door.shape
    )


def _is_writable(out: Any) -> bool:
    if type(out) is np.ndarray:
        return bool(out.flags.carray)
    return bool(out.is_contiguous()) and not (out.is_conj() or out.is_neg() or out.is_inference())
