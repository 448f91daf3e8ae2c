"""One small key, assigned from one plain array: copied straight in and straight out.

At a few bytes the price of a call is what Python does around the copy. This is the general way without all
that cannot apply: one part, of the key's own dtype, NumPy's or torch's on the CPU. Whatever is out of the
ordinary is left to the general way, which also words the errors.

The compiled function copies and counts while it holds the interpreter's lock, so neither another thread nor a
signal handler comes in between; without it everything goes the general way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .entry import Entry

try:
    from tensorkv.runtime import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Larger values gain nothing here, and want threads.
_SMALL = 1 << 14


class Door:
    """A small dense value as torch and as NumPy see it; ``address`` is None where there is no way in."""

    __slots__ = ("address", "dtype", "nbytes", "shape", "tensor")

    def __init__(self, value: Any) -> None:
        self.tensor = value
        self.address: int | None = None
        small = isinstance(value, torch.Tensor) and value.is_cpu and value.numel() <= _SMALL
        if small and value.dtype is not torch.bfloat16 and value.is_contiguous():
            array = value.numpy()
            self.address, self.dtype, self.shape, self.nbytes = value.data_ptr(), array.dtype, value.shape, value.nbytes


def exchange(shard: Any, lock: Any, rule: Any, entry: Entry, value: Any, out: Any) -> int | None:
    """Assign an array to a value and copy the value to an out.

    Args:
        shard, lock, rule: nothing is done while somebody holds the shard's lock, or once it has another rule.
        entry: of the key.
        value, out: the caller's arrays; None for a pull or a push alone.

    Returns:
        Bytes moved, or None when nothing was done.
    """
    door: Any = entry.door
    if door is None or door.tensor is not entry.value:
        door = entry.door = Door(entry.value)
    if door.address is None or _native is None:
        return None
    if not ((value is None or _fits(value, door)) and (out is None or (_fits(out, door) and _is_writable(out)))):
        return None
    if value is not None:
        value = _side_by_side(value)
    source, target = _memory(value), _memory(out)
    if not _native.exchange(lock, rule, shard, entry, door.tensor, door.address, door.nbytes, source, target):
        return None
    if type(target) is int:
        # Autograd has to know that the array is not what it was.
        torch.autograd.graph.increment_version(out)
    return int(door.nbytes * ((value is not None) + (out is not None)))


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


def _side_by_side(array: Any) -> Any:
    """Return an array whose elements lie in memory as they count, itself if they do already."""
    if type(array) is np.ndarray:
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return array.contiguous().resolve_conj().resolve_neg()


def _memory(array: Any) -> Any:
    """Return what the compiled function reads or writes: a buffer, an address, or None."""
    return array.data_ptr() if type(array) is torch.Tensor else array


def _is_writable(out: Any) -> bool:
    if type(out) is np.ndarray:
        return bool(out.flags.carray)
    return bool(out.is_contiguous()) and not (out.is_conj() or out.is_neg() or out.is_inference())
