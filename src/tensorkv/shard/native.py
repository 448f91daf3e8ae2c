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
from tensorkv.arrays.spec import KeySpec
from tensorkv.compiled import _native
from tensorkv.runtime import _compat
from tensorkv.runtime.stats import Record, clock

from .fused import Kernel
from .pool import Job, length_of_share

if TYPE_CHECKING or _native is not None:
    Batch = _native.Batch
    Call = _native.Call
    Cell = _native.Cell
    SharedReduce = _native.SharedReduce
    ShardFields = _native.ShardFields
    look = _native.look
    place_states = _native.place_states
else:
    Batch = SharedReduce = look = place_states = None

    class Cell:
        """A key's value, state and version, which the compiled part reads and writes where it is there."""

        __slots__ = (
            "borders",
            "digest",
            "frozen",
            "incomplete",
            "is_new",
            "spec",
            "state",
            "value",
            "version",
            "whole",
        )

        def __init__(self) -> None:
            self.state: dict[str, Any] = {}
            self.is_new = False
            self.frozen: Any = None
            self.incomplete: Any = None

    class ShardFields:
        """What the compiled part reads of a shard."""

    class Call:
        """A push, pull or pushpull, as the caller wrote it; subclasses parse it."""

        values: Any = None

        def __init__(
            self,
            record: Record,
            verb: str,
            key: Any,
            value: Any,
            out: Any,
            priority: Any,
            like: Any = None,
            ignore_sparse: bool = False,
            flat: bool = False,
        ) -> None:
            self._record, self._start = record, clock()
            self.verb, self.key, self.value, self.out, self.priority = verb, key, value, out, priority
            self.like, self.ignore_sparse = like, ignore_sparse

        def look(self, entries: Any, shard: Any = None) -> None:
            """Do nothing: without the compiled part no call is plain."""

        run = look

        def end(self) -> Any:
            """Count the call, and return what the verb returns."""
            keys, nbytes, result = self.outcome()
            self._record.add(clock() - self._start, keys, nbytes)
            return result


def _show_libraries() -> bool:
    """Tell the compiled part of array libraries; return whether it can look at their arrays.

    It learns from samples where torch keeps that a tensor is lazily negated. In a version of torch where no one bit
    tells, it asks each tensor.
    """
    # Of torch 2.10 and later.
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or api is None:
        return False
    samples = [np.zeros((2, 3), code) for code in "fdeqlihbQLIHB?"]
    is_neg, increment = torch.Tensor.is_neg, _compat.increment_version
    complexes = [torch.ones(size, 2, dtype=torch.complex64, device="cpu") for size in range(16)]
    conjugated = [tensor.conj() for tensor in complexes]
    tensors = [*complexes, *conjugated, *(tensor.imag for tensor in complexes), torch.nn.Parameter(complexes[0])]
    negated = [tensor.imag for tensor in conjugated]
    types = np.ndarray, torch.Tensor, torch.nn.Parameter
    _native.use(*types, api, is_neg, increment, interop.jax_classes, samples, tensors, negated)
    return True


_knows_libraries = _show_libraries()


# DLPack's codes of the dtypes that the compiled part has.
_DLPACK_CODES = {
    **dict.fromkeys(interop.SIGNED, 0),
    **dict.fromkeys(interop.UNSIGNED, 1),
    **dict.fromkeys(interop.FLOATS, 2),
    torch.bfloat16: 4,
    torch.bool: 6,
}


def describe(spec: KeySpec) -> tuple[int, int, tuple[int, ...]] | None:
    """Return what a ``Cell`` says of a value that is elsewhere; None if the compiled part has no such values."""
    code = None if spec.is_table else _DLPACK_CODES.get(spec.dtype)
    return None if code is None else (code, 8 * spec.dtype.itemsize, tuple(spec.shape))


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
# About what a core keeps of what it has just written, shared cache included.
_PAST_CACHE_NBYTES = 8 << 20
# Of the kernel: columns of one pass.
_MAX_COLUMNS = 250


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


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the kernel can read and write these tensors of one key."""
    dtype = tensors[0].dtype
    if _native is None or dtype not in DTYPES or len(tensors) > _MAX_COLUMNS:
        return False
    return all(
        tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and tensor.data_ptr() % dtype.itemsize == 0
        for tensor in tensors
    )


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


def moved_by(column: bytes, nbytes: int) -> bytes:
    """Return addresses, all of them further on by so many bytes."""
    return (np.frombuffer(column, np.uint64) + np.uint64(nbytes)).tobytes()
