"""The 2-norm of the gradients of a push, with the same bits wherever their elements are.

Squares of 64 elements beside each other are added in a fixed order of double precision; sums of such groups are added
exactly. So the order of groups, and who adds them, does not matter: threads, workers and servers each add their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.rows import Rows

# As in compiled/_kernels.h. Values are divided between owners at multiples of it (``engines.partition``).
GROUP = 64
_LANES = 8
# An exact sum counts in units of the smallest double.
_UNIT = 1074
# Elements that are squared at a time.
_PIECE = 1 << 18


class PushResult(NamedTuple):
    """What a store has found out about the last push.

    Args:
        found_inf: whether a sum had NaN or Inf; None: sums were not looked at.
        grad_norm: the norm of all gradients before they were clipped; None without ``max_grad_norm``.
    """

    found_inf: bool | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class SquareSum:
    """A sum of squares.

    Args:
        exact: the finite part, in units of 2**-1074.
        rest: Inf and NaN; 0 without any.

    >>> (SquareSum.of(torch.tensor([3.0])) + SquareSum.of(torch.tensor([4.0]))).norm()
    5.0
    """

    exact: int = 0
    rest: float = 0.0

    @classmethod
    def of(cls, total: torch.Tensor | Rows, rescale: float = 1.0) -> SquareSum:
        """Return the sum of the squares of a sum of parts times a number.

        Args:
            total: dense, or merged Rows; of any dtype. Groups of elements begin with the first one, of Rows with the
                first one of each row.
            rescale: the number, which is rounded to the precision of sums, as is the product.
        """
        if isinstance(total, Rows):
            width = total.values[:1].numel()
            rows = total.values.reshape(len(total.values), width)
        else:
            rows = total.reshape(1, -1)
        if not (rows.is_floating_point() or rows.is_complex()) or not rows.numel():
            return cls()
        if rows.is_complex():
            rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
        exact, rest, width = 0, 0.0, rows.shape[1]
        step = max(1, _PIECE // width)
        for first in range(0, len(rows), step):
            for start in range(0, width, _PIECE):
                piece = rows[first : first + step, start : start + _PIECE].to(interop.accumulator(rows.dtype))
                own, others = _add_exactly(_groups(piece * rescale if rescale != 1 else piece))
                exact, rest = exact + own, rest + others
        return cls(exact, rest)

    @classmethod
    def of_batch(cls, squares: tuple[bytes, float]) -> SquareSum:
        """Return what the compiled part has added."""
        return cls(int.from_bytes(squares[0], "little"), squares[1])

    def __add__(self, other: SquareSum) -> SquareSum:
        return SquareSum(self.exact + other.exact, self.rest + other.rest)

    def to_plain(self) -> list[Any]:
        """Return what ``from_plain`` reads."""
        return [hex(self.exact), self.rest]

    @classmethod
    def from_plain(cls, data: Any) -> SquareSum:
        """Return what ``to_plain`` was called on."""
        return cls(int(data[0], 16), float(data[1]))

    def norm(self) -> float:
        """Return the root of the sum, which is rounded once before."""
        try:
            return math.sqrt(self.exact / (1 << _UNIT) + self.rest)
        except OverflowError:
            return math.inf


class Clipping(NamedTuple):
    """How the gradients of a push are clipped.

    Args:
        rescale: what sums are multiplied by to be gradients.
        bound: on the norm of all gradients.

    >>> Clipping(1.0, 2.0).factor(0.5), Clipping(1.0, 2.0).factor(float("inf"))
    (1.0, 0.0)
    """

    rescale: float
    bound: float

    def factor(self, norm: float) -> float:
        """Return the factor that brings gradients within the bound, as torch.nn.utils.clip_grad_norm_ has it."""
        factor = self.bound / (norm + 1e-6)
        return 1.0 if factor >= 1 else factor


def _groups(numbers: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the sums of the squares of each group of elements, of rows that each begin one."""
    rows, width = numbers.shape
    wide = numbers.new_zeros((rows, -(-width // GROUP) * GROUP), dtype=torch.float64)
    wide[:, :width] = numbers
    lanes, *others = (wide * wide).view(-1, GROUP // _LANES, _LANES).unbind(1)
    for other in others:
        lanes = lanes + other
    pairs = lanes[:, :4] + lanes[:, 4:]
    sums: np.ndarray[Any, Any] = ((pairs[:, 0] + pairs[:, 2]) + (pairs[:, 1] + pairs[:, 3])).cpu().numpy()
    return sums


def _add_exactly(numbers: np.ndarray[Any, Any]) -> tuple[int, float]:
    """Return the exact sum of those that are finite, in units of 2**-1074, and the sum of the others."""
    finite = np.isfinite(numbers)
    bits = numbers[finite].view(np.uint64)
    exponents = (bits >> np.uint64(52)).astype(np.int64)
    mantissas = (bits & np.uint64((1 << 52) - 1)).astype(np.int64) + ((exponents > 0).astype(np.int64) << 52)
    found, places = np.unique(np.maximum(exponents - 1, 0), return_inverse=True)
    total = 0
    # Of mantissas in halves, whose sums have room.
    for half, shift in ((mantissas >> 26, 26), (mantissas & ((1 << 26) - 1), 0)):
        sums = np.zeros(len(found), np.int64)
        np.add.at(sums, places, half)
        total += sum(int(own) << (int(exponent) + shift) for own, exponent in zip(sums, found, strict=True))
    return total, float(np.sum(numbers[~finite])) if not finite.all() else 0.0
