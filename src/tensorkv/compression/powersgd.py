"""powersgd: a matrix as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from tensorkv.errors import ArgumentError, NonFiniteError, show

from .codec import RUN, Codec, Floats, Memory, Words, add_residual

_BASIS = "basis"


@dataclass(frozen=True)
class PowerSGD(Codec):
    """A matrix ``M`` of n rows and m columns as ``P @ Q.T``, of n by rank and m by rank.

    One step of a subspace iteration: ``P`` is an orthonormal basis of ``M @ Q``, with the ``Q`` of the push before, and
    the new ``Q`` is ``M.T @ P``. All dimensions after the first are flattened into one. Vectors, and matrices whose
    factors would not be smaller, are sent whole. Words are ``P``, then ``Q``, as float32.

    Args:
        rank: at least 1.

    Source: T. Vogels, S. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019. There, workers average P and Q; here each one's product is summed, so that workers
    need not be in step.
    """

    name: ClassVar[str] = "powersgd"
    rank: int = 2

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ArgumentError(f"rank is {show(self.rank)}; expected an int of at least 1")

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Return the rows and columns of a matrix that is sent as two factors, None for what is sent whole."""
        rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, 1)
        return (rows, columns) if self.rank * (rows + columns) < rows * columns else None

    def nbytes(self, shape: Sequence[int]) -> int:
        sizes = self._sizes(shape)
        return 4 * (prod(shape) if sizes is None else self.rank * sum(sizes))

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        add_residual(gradient, residual, new_residual)
        sent, sizes = words.view(np.float32), self._sizes(new_residual.shape)
        if sizes is None:
            sent[:] = new_residual.reshape(-1)
            new_residual[...] = 0
            return
        matrix = new_residual.reshape(sizes)
        basis = memory.get(_BASIS)
        if basis is None or basis.shape != (sizes[1], self.rank):
            basis = np.random.default_rng(0).standard_normal((sizes[1], self.rank), np.float32)
        left, right = self._factors(words, sizes)
        left[:] = np.linalg.qr(matrix @ basis)[0]
        right[:] = matrix.T @ left
        for rows, product in _products(left, right):
            matrix[rows] -= product
            if not np.isfinite(matrix[rows]).all():
                raise NonFiniteError("has numbers whose products overflow")
        memory[_BASIS] = right.copy()

    def decode(self, words: Words, out: Floats) -> None:
        sizes = self._sizes(out.shape)
        if sizes is None:
            out.reshape(-1)[:] = words.view(np.float32)
        else:
            matrix = out.reshape(sizes)
            for rows, product in _products(*self._factors(words, sizes)):
                matrix[rows] = product

    def _factors(self, words: Words, sizes: tuple[int, int]) -> tuple[Floats, Floats]:
        rows, columns = sizes
        both = words.view(np.float32)
        left, right = both[: rows * self.rank], both[rows * self.rank :]
        return left.reshape(rows, self.rank), right.reshape(columns, self.rank)


def _products(left: Floats, right: Floats) -> Iterator[tuple[slice, Floats]]:
    """Return the product of two factors, some rows at a time, which stay in a processor's cache."""
    columns = np.ascontiguousarray(right.T)
    count = max(1, RUN // max(1, len(right)))
    for start in range(0, len(left), count):
        rows = slice(start, start + count)
        # Not ``@``, which adds in an order, and with fused operations, that depend on the processor.
        out = left[rows, :1] * columns[0]
        for index in range(1, left.shape[1]):
            out += left[rows, index : index + 1] * columns[index]
        yield rows, out
