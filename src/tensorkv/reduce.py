"""Sum parts: left to right, in slices that stay in cache, without a value-sized temporary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from . import arrays

# 1 MiB of float32: several parts of a slice and its value fit in a core's second-level cache.
SLICE = 1 << 18


def sum_into(out: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Make ``out`` the sum of the parts, added in the order given.

    float16 and bfloat16 are added in float32 and rounded once; integers wrap around as in NumPy;
    bool adds by "or".

    Args:
        out: any shape; must not share memory with a part.
        parts: at least one, of out's shape, of any dtype that ``arrays.may_push`` allows, on any device.

    >>> out = torch.empty(3)
    >>> sum_into(out, [torch.ones(3), torch.ones(3, dtype=torch.float16)])
    >>> out.tolist()
    [2.0, 2.0, 2.0]
    """
    if len(parts) == 1:
        out.copy_(parts[0], non_blocking=True)
        return
    wide = arrays.accumulator(out.dtype)
    direct = wide is out.dtype and all(part.dtype is wide and part.device == out.device for part in parts)
    for piece, *sources in _slices(out, parts):
        if direct:
            acc = arrays.signed(piece)
            torch.add(arrays.signed(sources[0]), arrays.signed(sources[1]), out=acc)
            for source in sources[2:]:
                acc.add_(arrays.signed(source))
        else:
            acc = arrays.signed(sources[0].to(out.device, wide, non_blocking=True, copy=True))
            for source in sources[1:]:
                acc.add_(arrays.signed(source.to(out.device, wide, non_blocking=True)))
            piece.copy_(acc.view(wide))


def total(value: torch.Tensor, parts: Sequence[torch.Tensor], *, may_share: bool = False) -> torch.Tensor:
    """Return the parts' sum as a new tensor like ``value`` (``may_share``: or the only part itself)."""
    if may_share and len(parts) == 1 and parts[0].dtype is value.dtype and parts[0].device == value.device:
        return parts[0]
    out = torch.empty_like(value)
    sum_into(out, parts)
    return out


def sum_many(outs: Sequence[torch.Tensor], parts: Sequence[Sequence[torch.Tensor]]) -> None:
    """Do ``sum_into`` for many small tensors at once, in a few calls of torch for all of them.

    Args:
        outs: CPU tensors, all small.
        parts: per out as many parts as for every other, of the out's dtype, of at least float32.
    """
    signed_outs = [arrays.signed(out) for out in outs]
    for index, sources in enumerate(zip(*parts, strict=True)):
        signed_sources = [arrays.signed(source) for source in sources]
        if index:
            torch._foreach_add_(signed_outs, signed_sources)
        else:
            torch._foreach_copy_(signed_outs, signed_sources)


def is_small(out: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Tell whether ``sum_many`` may take this sum."""
    if not out.is_cpu or out.numel() >= SLICE or out.dtype in arrays.LOW_PRECISION:
        return False
    dtype = out.dtype
    return all(part.dtype is dtype and part.is_cpu for part in parts)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Return how many elements are NaN or Inf."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for (piece,) in _slices(tensor, ()))


def _slices(out: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Cut out and parts alike: flat where all are contiguous, else along the first dimension."""
    tensors = [out, *parts]
    if not out.is_cpu or out.numel() <= SLICE:
        yield tensors
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    length = len(tensors[0])
    step = max(1, SLICE * length // out.numel())
    for start in range(0, length, step):
        yield [tensor[start : start + step] for tensor in tensors]
