"""Passes of the compiled kernel: sums of all parts of all keys, and an optimizer's step with them, in one go.

The kernel takes columns of addresses: one column for each part and each out, one address for each key.
Where the package was installed without a C compiler it is not there; torch does the work then, with the
same bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.runtime import _compat

from .fused import Kernel
from .pool import Job

try:
    from tensorkv.compiled import _native
except ImportError:
    _native = None  # type: ignore[assignment]

if TYPE_CHECKING or _native is not None:
    Batch = _native.Batch
    Cell = _native.Cell
    look = _native.look
else:
    Batch = look = None

    class Cell:
        """A key's value, state and version, which the compiled part reads and writes where it is there."""

        __slots__ = ("is_new", "state", "value", "version")


def _show_libraries() -> bool:
    """Tell the compiled part of array libraries; return whether it can look at their arrays."""
    # Of torch 2.10 and later.
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or api is None:
        return False
    _native.use(np.ndarray, torch.Tensor, torch.nn.Parameter, api, torch.Tensor.is_neg, _compat.increment_version)
    return True


_knows_libraries = _show_libraries()


def can_look() -> bool:
    """Return whether ``look`` is there, and torch has what it needs."""
    return _knows_libraries and _native is not None


# The kernel's number of each dtype. Integers wrap around, so that the signed ones do for the unsigned, too.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int8: 4,
    torch.uint8: 4,
    torch.int16: 5,
    torch.uint16: 5,
    torch.int32: 6,
    torch.uint32: 6,
    torch.int64: 7,
    torch.uint64: 7,
    torch.bool: 8,
}
_TORCH_TYPES = {torch.Tensor, torch.nn.Parameter}
# Elements of at least a cache line.
_ALIGN = 64
# About what a core keeps of what it has just written, shared cache included.
_PAST_CACHE_NBYTES = 8 << 20
# Of the kernel: columns of one pass.
_MAX_COLUMNS = 250
# Of the parts or the outs of one call, so that there is room for both, and for values.
MOST_COLUMNS = 100


@dataclass(slots=True)
class Step:
    """The step of an optimizer that a pass makes with its sums.

    Args:
        kernel: of the optimizer.
        count: how many steps of these keys with this one.
        is_first: whether the state of sgd is new.
        columns: of addresses: of the values, and of each state in the kernel's order.
    """

    kernel: Kernel
    count: float
    is_first: bool
    columns: list[bytes]


@dataclass(slots=True)
class Pass:
    """Keys with as many parts and outs each, as columns.

    Args:
        outs, parts: columns of addresses, as ``column_of`` or ``addresses`` gives them. The outs become the sums, or
            with a step the values.
        counts: number of elements of each key.
        dtype: of all.
        step: to be made with the sums.
    """

    outs: list[bytes]
    parts: list[bytes]
    counts: Sequence[int]
    dtype: torch.dtype
    step: Step | None = None

    def jobs(self, threads: int, *, past_cache: int | None = None) -> list[Job]:
        """Return the work as jobs of about equal size, which may run at the same time.

        Args:
            threads: how many jobs at the most.
            past_cache: how many of the outs, the last ones, to store past the processor's cache (None: all if they
                would not stay there).
        """
        total, itemsize = sum(self.counts), self.dtype.itemsize
        if past_cache is None:
            past_cache = len(self.outs) if leaves_cache(total * itemsize * len(self.outs)) else 0
        counts = array("q", self.counts).tobytes()
        step = (
            None
            if self.step is None
            else (self.step.kernel.packed, self.step.count, self.step.is_first, self.step.columns)
        )
        length = length_of_share(total, threads)
        return [
            partial(
                _native.run_columns,
                DTYPES[self.dtype],
                self.outs,
                self.parts,
                counts,
                past_cache,
                start,
                min(total, start + length),
                step,
            )
            for start in range(0, max(total, 1), length)
        ]


def length_of_share(total: int, threads: int) -> int:
    """Return how many elements a thread does: a multiple of a cache line, which no two of them write then."""
    return max(_ALIGN, -(-total // threads // _ALIGN) * _ALIGN)


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the kernel can read and write these tensors of one key."""
    dtype = tensors[0].dtype
    if _native is None or dtype not in DTYPES or len(tensors) > _MAX_COLUMNS:
        return False
    return all(tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)


def step(
    kernel: Kernel,
    value: torch.Tensor,
    grad: torch.Tensor,
    columns: Sequence[torch.Tensor],
    count: float,
    *,
    is_first: bool,
) -> None:
    """Do ``Kernel.step`` on tensors of one shape, compiled if that can be."""
    tensors = [value, *columns, grad]
    if not is_plain(tensors):
        kernel.step(value, grad, columns, count, is_first=is_first)
        return
    held, parts = [column_of([tensor]) for tensor in tensors[:-1]], [column_of([grad])]
    Pass([], parts, [value.numel()], value.dtype, Step(kernel, count, is_first, held)).jobs(1)[0]()


def can_sum(dtype: torch.dtype) -> bool:
    """Return whether the kernel is there and adds numbers of this dtype as they are, not as float32."""
    return _native is not None and dtype in DTYPES and dtype not in interop.LOW_PRECISION


def leaves_cache(nbytes: int) -> bool:
    """Return whether so many bytes have left a core's cache before anybody reads them."""
    return nbytes > _PAST_CACHE_NBYTES


def column_of(tensors: Sequence[torch.Tensor]) -> bytes:
    """Return the addresses of plain tensors."""
    return array("Q", [tensor.data_ptr() for tensor in tensors]).tobytes()


def column_beside(flat: torch.Tensor, counts: Sequence[int]) -> bytes:
    """Return the addresses of keys that lie side by side in a flat tensor."""
    offsets = np.cumsum([0, *counts[:-1]], dtype=np.uint64) * np.uint64(flat.element_size())
    return (offsets + np.uint64(flat.data_ptr())).tobytes()


def addresses(arrays: Sequence[Any], dtype: torch.dtype, shapes: list[torch.Size], *, writable: bool) -> bytes | None:
    """Return the addresses of arrays of one library; None if one is not of just this dtype and shape.

    Nor are arrays what is asked for whose elements do not lie side by side in the order of C.

    Args:
        arrays: all of NumPy, or all of torch on the CPU; no subclass but ``torch.nn.Parameter``.
        dtype: of every array.
        shapes: of each array.
        writable: whether arrays must be.
    """
    types = set(map(type, arrays))
    if types == {np.ndarray}:
        return _numpy_addresses(arrays, dtype, shapes, writable)
    count = len(arrays)
    if (
        not types <= _TORCH_TYPES
        or [t.is_cpu for t in arrays].count(True) < count
        or [t.layout for t in arrays].count(torch.strided) < count
        or [t.dtype for t in arrays].count(dtype) < count
        or any(t.is_nested for t in arrays)
        or [t.shape for t in arrays] != shapes
        or [t.is_contiguous() for t in arrays].count(True) < count
        or any(map(torch.Tensor.is_neg, arrays))
        or (writable and dtype.is_complex and any(t.is_conj() for t in arrays))
        # The kernel writes inference tensors by their addresses, torch does not write them.
        or (writable and not can_sum(dtype) and any(map(torch.Tensor.is_inference, arrays)))
    ):
        return None
    return column_of(arrays)


def _numpy_addresses(
    arrays: Sequence[Any], dtype: torch.dtype, shapes: list[torch.Size], writable: bool
) -> bytes | None:
    if dtype is torch.bfloat16:
        return None
    like = torch.empty(0, dtype=dtype, device="cpu").numpy()
    if _native is not None:
        return _native.addresses(arrays, np.ndarray, memoryview(like.data).format, shapes, writable)
    flags = [array.flags for array in arrays]
    if (
        any(a.dtype != like.dtype for a in arrays)
        or [a.shape for a in arrays] != shapes
        or not all(f.c_contiguous and (f.writeable or not writable) for f in flags)
    ):
        return None
    return array("Q", [a.__array_interface__["data"][0] for a in arrays]).tobytes()


def moved_by(column: bytes, nbytes: int) -> bytes:
    """Return addresses, all of them further on by so many bytes."""
    return (np.frombuffer(column, np.uint64) + np.uint64(nbytes)).tobytes()


def overlap(columns: Sequence[bytes], nbytes: Sequence[int]) -> bool:
    """Return whether two arrays of these columns share memory.

    Args:
        columns: of addresses.
        nbytes: of each key's arrays.
    """
    starts = np.concatenate([np.frombuffer(column, np.uint64) for column in columns])
    order = np.argsort(starts)
    ends = starts + np.tile(np.asarray(nbytes, np.uint64), len(columns))
    return bool((ends[order][:-1] > starts[order][1:]).any())


def are_apart(parts: Sequence[bytes], outs: Sequence[bytes], nbytes: Sequence[int]) -> bool:
    """Return whether outs may be written before all parts have been read.

    An out may be one of its key's parts; other memory of parts it must not touch.

    Args:
        parts, outs: columns of addresses; the outs share no memory with each other.
        nbytes: of each key's arrays.
    """
    if not outs:
        return True
    sizes = np.asarray(nbytes, np.uint64)
    read = np.stack([np.frombuffer(column, np.uint64) for column in parts])
    written = np.stack([np.frombuffer(column, np.uint64) for column in outs])
    others = ~(read[:, None] == written[None]).any(1)
    starts, ends = read[others], (read + sizes)[others]
    order = np.argsort(starts)
    # The furthest end of what begins before each place.
    reach = np.concatenate([[np.uint64(0)], np.maximum.accumulate(ends[order])])
    before = np.searchsorted(starts[order], (written + sizes).ravel())
    return not bool((reach[before] > written.ravel()).any())
