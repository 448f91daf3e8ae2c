"""2bit: what is at least a threshold is sent as that threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from tensorkv.compiled import _codecs

from .codec import Codec, Floats, Memory, Words, add_residual, check_finite, check_number

# Four codes in a byte, the first one on top.
_SHIFTS = np.array([6, 4, 2, 0], np.uint8)


@dataclass(frozen=True)
class TwoBit(Codec):
    """Two bits an element: plus or minus a threshold, or nothing.

    With ``v`` the sum of gradient and residual: ``v >= threshold`` sends ``threshold`` (code 11),
    ``v <= -threshold`` sends ``-threshold`` (code 10), and any other ``v`` sends nothing (code 00); ``v`` less what is
    sent is the residual. 16 codes are in a word of 32 bits, four in each byte, the first one in its top bits.

    Args:
        threshold: above 0, in the units of the gradient.

    Source: the KVStore of Apache MXNet, whose words are the same. N. Strom, "Scalable Distributed DNN Training Using
    Commodity GPU Cloud Computing", Interspeech 2015, has the idea.

    Limits: elements far above the threshold take many pushes to be sent; far below it, the value moves rarely.
    """

    name: ClassVar[str] = "2bit"
    unit: ClassVar[int] = 32
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    def nbytes(self, shape: Sequence[int]) -> int:
        return -(-prod(shape) // 16) * 4

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        if _codecs is not None:
            check_finite(_codecs.encode_2bit(gradient, residual, new_residual, words, self.threshold))
            return
        add_residual(gradient, residual, new_residual)
        flat, threshold = new_residual.reshape(-1), np.float32(self.threshold)
        above, below = flat >= threshold, flat <= -threshold
        codes = np.zeros(4 * len(words), np.uint8)
        codes[: len(flat)] = 3 * above + 2 * below
        words[:] = np.bitwise_or.reduce(codes.reshape(-1, 4) << _SHIFTS, axis=1)
        flat -= np.where(above, threshold, np.where(below, -threshold, np.float32(0)))

    def decode(self, words: Words, out: Floats) -> None:
        if _codecs is not None:
            _codecs.decode_2bit(words, out, self.threshold)
            return
        threshold = np.float32(self.threshold)
        codes = (words[:, None] >> _SHIFTS & 3).reshape(-1)[: out.size]
        out.reshape(-1)[:] = np.array([0, 0, -threshold, threshold], np.float32)[codes]
