"""Sum parts, or take their mean: left to right, in slices that stay in cache, without a value-sized temporary."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import ArgumentError, show

from . import native
from .pool import Job

# 2 MiB of float32: long enough to stream well, short enough to be in cache when the next step needs it.
SLICE = 1 << 19

# Up to here a sum costs more in calls than in bytes.
_SMALL = 1 << 13

_local = threading.local()

Reduce = Literal["sum", "mean"]


def averages(name: Any) -> bool:
    """Return whether a store's option ``reduce`` asks for means.

    Raises:
        ArgumentError: neither ``"sum"`` nor ``"mean"``.
    """
    if not isinstance(name, str) or name not in ("sum", "mean"):
        raise ArgumentError(f'reduce is {show(name)}; expected "sum" or "mean"')
    return name == "mean"


def sum_into(out: torch.Tensor, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
    """Make ``out`` the sum of the parts, added in the order given and then divided.

    Floats of fewer bits are added in float32 and rounded once; integers wrap around as in NumPy;
    bool adds by "or".

    Args:
        out: any shape; shares no memory with a part, unless it is one, element for element.
        parts: at least one, of out's shape, of any dtype that ``arrays.may_push`` allows, on any device.
        divisor: of the sum, before it is rounded; not 1 for floating-point and complex numbers only.

    >>> out = torch.empty(3)
    >>> sum_into(out, [torch.ones(3), torch.ones(3, dtype=torch.float16)])
    >>> out.tolist()
    [2.0, 2.0, 2.0]
    """
    for piece, *sources in cut([out, *parts]):
        sum_piece(piece, sources, divisor)


def sum_piece(out: torch.Tensor, parts: Sequence[torch.Tensor], divisor: int = 1) -> None:
    """Do ``sum_into`` for one slice."""
    # A non-blocking copy to the CPU could be read before it has arrived, and one from pinned memory go on when the
    # caller changes the part.
    ahead = out.is_cuda and not any(part.is_cpu and part.is_pinned() for part in parts)
    if len(parts) == 1 and divisor == 1:
        out.copy_(parts[0], non_blocking=ahead)
        return
    wide = interop.accumulator(out.dtype)
    first, *others = [interop.signed(part.to(out.device, wide, non_blocking=ahead)) for part in parts]
    # Out may be one of the others, which has to be read first.
    directly = wide is out.dtype and not any(part.data_ptr() == out.data_ptr() for part in parts[2:])
    into = interop.signed(out if directly else scratch(out, wide))
    if others:
        torch.add(first, others[0], out=into)
    else:
        into.copy_(first)
    for part in others[1:]:
        into.add_(part)
    if divisor != 1:
        interop.divide(into, divisor)
    if not directly:
        out.copy_(into.view(wide))


def copies(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], threads: int) -> list[Job]:
    """Return jobs that make each first tensor the second, all of which may run at the same time."""
    plain: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    jobs: list[Job] = []
    for pair in pairs:
        if native.is_plain(pair):
            plain.setdefault(pair[0].dtype, []).append(pair)
        else:
            jobs += [partial(out.copy_, value) for out, value in cut(pair)]
    for dtype, members in plain.items():
        outs, values = (native.column_of(column) for column in zip(*members, strict=True))
        jobs += native.Pass([outs], [values], [out.numel() for out, _ in members], dtype).jobs(threads)
    return jobs


def total(
    value: torch.Tensor, parts: Sequence[torch.Tensor], *, may_share: bool = False, divisor: int = 1
) -> torch.Tensor:
    """Return the parts' sum, divided, as a new tensor like ``value`` (``may_share``: or the only part itself)."""
    is_same = parts[0].dtype is value.dtype and parts[0].device == value.device
    if may_share and len(parts) == 1 and divisor == 1 and is_same:
        return parts[0]
    out = torch.empty_like(value)
    sum_into(out, parts, divisor)
    return out


def unrounded(spec: KeySpec, parts: Sequence[Any], divisor: int = 1) -> Any:
    """Return the sum of dense parts of a key, divided, in the dtype that sums are made in.

    An only part is returned as it is, and so are Rows among the parts, which the caller refuses.
    """
    rows = [part for part in parts if not isinstance(part, torch.Tensor)]
    if rows or (len(parts) == 1 and divisor == 1):
        return (rows or parts)[0]
    out = torch.empty(spec.shape, dtype=interop.accumulator(spec.dtype), device="cpu")
    with torch.no_grad():
        sum_into(out, parts, divisor)
    return out


def sum_many(outs: Sequence[torch.Tensor], parts: Sequence[Sequence[torch.Tensor]]) -> None:
    """Do ``sum_into`` for many small tensors at once, in a few calls of torch; the last one writes every out.

    Args:
        outs: CPU tensors, all small.
        parts: per out as many parts as for every other, of the out's dtype, of at least float32.
    """
    columns = [[interop.signed(part) for part in column] for column in zip(*parts, strict=True)]
    totals: Sequence[torch.Tensor] = columns[0]
    if len(columns) > 1:
        totals = torch._foreach_add(columns[0], columns[1])
        for column in columns[2:]:
            torch._foreach_add_(totals, column)
    torch._foreach_copy_([interop.signed(out) for out in outs], list(totals))


def is_small(out: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Return whether ``sum_many`` may take this sum."""
    if not out.is_cpu or out.numel() > _SMALL or out.dtype in interop.LOW_PRECISION:
        return False
    dtype = out.dtype
    return all(part.dtype is dtype and part.is_cpu for part in parts)


def scratch(like: torch.Tensor, dtype: torch.dtype, purpose: str = "sum") -> torch.Tensor:
    """Return a contiguous tensor of a shape, good until this thread's next call for the purpose and dtype."""
    numel = like.numel()
    if not like.is_cpu or numel > SLICE:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    held: dict[str, torch.Tensor] = _local.__dict__
    name = f"{purpose} {dtype}"
    if name not in held or len(held[name]) < numel:
        held[name] = torch.empty(numel, dtype=dtype, device="cpu")
    return held[name][:numel].view(like.shape)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Return how many elements are NaN or Inf."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # torch has none of these functions for float8.
    wide = torch.float32 if tensor.dtype in interop.FLOAT8 else tensor.dtype
    return sum(piece.numel() - int(torch.isfinite(piece.to(wide)).sum()) for (piece,) in cut([tensor]))


def cut(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Cut tensors of one shape alike: flat where all are contiguous, else along the first dimension."""
    first = tensors[0]
    # Where numbers are converted, each part of a slice has a copy of its own.
    convert = first.dtype in interop.LOW_PRECISION or any(tensor.dtype is not first.dtype for tensor in tensors)
    size = max(1, SLICE // 4) if convert else SLICE
    if not first.is_cpu or first.numel() <= size:
        yield list(tensors)
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    length = len(tensors[0])
    step = max(1, size * length // first.numel())
    for start in range(0, length, step):
        yield [tensor[start : start + step] for tensor in tensors]
