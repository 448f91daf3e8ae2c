"""Values in float8 with a scale for each block of 128 x 128 elements, as checkpoints of large models have them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from tensorkv.errors import ArrayTypeError, NonFiniteError, ValueMismatchError, show
from tensorkv.runtime.modes import runs_outside_modes

from . import interop

DTYPE = torch.float8_e4m3fn
SUFFIX = "_scale_inv"
"""After the name of a value, the name of its scales."""
_SIZE = 128
# The largest finite number of the dtype.
_MAX = 448.0


@runs_outside_modes
def quantize_blocks(array: Any) -> tuple[Any, Any]:
    """Round an array to float8_e4m3fn, with a scale for each block of 128 x 128 elements of its last two axes.

    For each block *x*, ``scale_inv = max(abs(x)) / 448`` and ``value = x / scale_inv``, so that the largest element
    becomes the largest number of float8_e4m3fn; a block of zeros has the scale 1. Blocks at the end of an axis may be
    smaller. ``init_tree(dtype="float8_e4m3fn")`` holds an array as these two, under its name and its name with
    ``_scale_inv``.

    Args:
        array: of floating-point numbers, of any library, with at least two axes.

    Returns:
        the values, of the array's shape, in float8_e4m3fn, and the scales in float32, with the last two axes divided
        by 128, rounded up; both of the array's library, on its device.

    Raises:
        ArrayTypeError: not an array of floating-point numbers with two axes.
        NonFiniteError: NaN or Inf, or float64 beyond float32.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3; the names are those of its
    checkpoints.

    >>> import numpy as np
    >>> values, scale_inv = quantize_blocks(np.full((2, 200), 0.5, np.float32))
    >>> values.dtype, values[0, :2].astype(float), scale_inv * 448
    (dtype(float8_e4m3fn), array([448., 448.]), array([[0.5, 0.5]], dtype=float32))
    """
    tensor = _take("quantize_blocks", array).to(torch.float32)
    blocks = _blocks_of(tensor)
    largest = blocks.abs().amax((-3, -1))
    if not torch.isfinite(largest).all():
        raise NonFiniteError("quantize_blocks: the array has NaN or Inf, which leave no scale for its block")
    scale_inv = torch.where(largest > 0, largest / _MAX, 1)
    # A block of the smallest numbers has a scale that is rounded to less than it, or to zero.
    scale_inv = scale_inv.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (blocks / scale_inv[..., :, None, :, None]).clamp(-_MAX, _MAX)
    values = _whole_of(scaled, tensor.shape).to(DTYPE)
    origin = interop.origin(array)
    return interop.give(values, origin), interop.give(scale_inv.contiguous(), origin.for_parts())


@runs_outside_modes
def dequantize_blocks(values: Any, scale_inv: Any, *, dtype: torch.dtype | str = torch.float32) -> Any:
    """Return what ``quantize_blocks`` has rounded: each value times the scale of its block.

    Args:
        values: in float8_e4m3fn, with at least two axes.
        scale_inv: of their blocks.
        dtype: of the result, to which the products, made in float32, are rounded: a dtype of floating-point numbers, or
            its name.

    Returns:
        an array of the library and device of the values.

    Raises:
        ArgumentError: another dtype.
        ArrayTypeError: not arrays with two axes.
        ValueMismatchError: other scales than these values have.

    >>> import numpy as np
    >>> dequantize_blocks(*quantize_blocks(np.array([[1.0, -0.25]], np.float32)))
    array([[ 1.  , -0.25]], dtype=float32)
    """
    wanted = interop.take_dtype("dequantize_blocks", dtype, (*interop.FLOATS, *interop.FLOAT8))
    return interop.give(restore(values, scale_inv, wanted), interop.origin(values))


def restore(values: Any, scale_inv: Any, dtype: torch.dtype) -> torch.Tensor:
    """Do ``dequantize_blocks``, and return a tensor."""
    tensor, scales = _take("dequantize_blocks", values), _take("dequantize_blocks", scale_inv)
    expected = scales_shape(tensor.shape)
    if scales.shape != expected:
        raise ValueMismatchError(
            f"dequantize_blocks: the scales have the shape {tuple(scales.shape)}; "
            f"values of shape {tuple(tensor.shape)} have scales of {tuple(expected)}"
        )
    blocks = _blocks_of(tensor.to(torch.float32)) * scales.to(tensor.device)[..., :, None, :, None]
    return _whole_of(blocks, tensor.shape).to(dtype)


def quantize_sum(name: str, parts: Sequence[Any], *, averages: bool) -> tuple[Any, Any]:
    """Do ``quantize_blocks`` with the sum of some arrays, or with their mean, made in float32.

    Args:
        name: of the call and the key, for messages.
        parts: of one shape.
        averages: whether to take the mean.
    """
    try:
        if len(parts) == 1:
            return quantize_blocks(parts[0])
        first, *others = [_take("quantize_blocks", part).to(torch.float32) for part in parts]
        if any(other.shape != first.shape for other in others):
            raise ValueMismatchError("the parts have different shapes")
        total = reduce(torch.add, others, first)
        if averages:
            interop.divide(total, len(parts))
        return quantize_blocks(interop.give(total, interop.origin(parts[0])))
    except (ArrayTypeError, NonFiniteError, ValueMismatchError) as error:
        raise type(error)(f"{name}: {error}") from None


def empty_pair(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for values of a shape and their scales."""
    values = torch.empty(shape, dtype=DTYPE, device="cpu")
    return values, torch.empty(scales_shape(shape), dtype=torch.float32, device="cpu")


def scales_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the scales of values of a shape."""
    *lead, rows, columns = shape
    return torch.Size((*lead, -(-rows // _SIZE), -(-columns // _SIZE)))


def _take(verb: str, array: Any) -> torch.Tensor:
    try:
        tensor = interop.take(array)
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}: the array {error}") from None
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise ArrayTypeError(f"{verb}: got {show(array)}; expected floating-point numbers with at least two axes")
    return tensor


def _blocks_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix as blocks: (..., block of rows, row, block of columns, column), with zeros after its end."""
    *lead, rows, columns = tensor.shape
    *_, down, across = scales_shape(tensor.shape)
    padded = torch.nn.functional.pad(tensor, (0, across * _SIZE - columns, 0, down * _SIZE - rows))
    return padded.reshape(*lead, down, _SIZE, across, _SIZE)


def _whole_of(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    *lead, rows, columns = shape
    *_, down, size, across, _ = blocks.shape
    return blocks.reshape(*lead, down * size, across * size)[..., :rows, :columns].contiguous()
