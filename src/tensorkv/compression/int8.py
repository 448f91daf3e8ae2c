"""int8: an element in a byte, beside a scale for each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from tensorkv.compiled import _codecs

from .codec import Codec, Floats, Memory, Words, add_residual, check_finite

BLOCK = 1024
_MOST = np.float32(127)


@dataclass(frozen=True)
class Int8(Codec):
    """A byte an element, in units of 1/127 of the largest element of its block of 1024 elements.

    With ``s = max(abs(v)) / 127`` over a block, ``q = rint(v / s)`` is sent, which stands for ``q * s``; a block whose
    ``s`` is zero sends zeros. Words are the scales as float32, then the bytes.

    Source: T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016, compares such formats.
    """

    name: ClassVar[str] = "int8"

    def nbytes(self, shape: Sequence[int]) -> int:
        return 4 * _blocks(prod(shape)) + prod(shape)

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        if _codecs is not None:
            check_finite(_codecs.encode_int8(gradient, residual, new_residual, words, 0.0))
            return
        add_residual(gradient, residual, new_residual)
        flat, scales, sent = _split(new_residual, words)
        if not len(flat):
            return
        scales[:] = np.maximum.reduceat(np.abs(flat), range(0, len(flat), BLOCK)) / _MOST
        # A scale of zero divides nothing.
        units = np.repeat(np.where(scales > 0, scales, np.float32(np.inf)), BLOCK)[: len(flat)]
        sent[:] = np.rint(flat / units).clip(-_MOST, _MOST)
        flat -= sent * np.repeat(scales, BLOCK)[: len(flat)]

    def decode(self, words: Words, out: Floats) -> None:
        if _codecs is not None:
            _codecs.decode_int8(words, out, 0.0)
            return
        flat, scales, sent = _split(out, words)
        np.multiply(sent, np.repeat(scales, BLOCK)[: len(flat)], out=flat)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _split(array: Floats, words: Words) -> tuple[Floats, Floats, np.ndarray[tuple[int], np.dtype[np.int8]]]:
    scales = words[: 4 * _blocks(array.size)]
    return array.reshape(-1), scales.view(np.float32), words[len(scales) :].view(np.int8)
