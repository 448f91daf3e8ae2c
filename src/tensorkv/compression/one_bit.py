"""1bit: one for what is above a threshold, minus one for all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from tensorkv.compiled import _codecs

from .codec import Codec, Floats, Memory, Words, add_residual, check_finite, check_number


@dataclass(frozen=True)
class OneBit(Codec):
    """One bit an element: plus one or minus one.

    With ``v`` the sum of gradient and residual: ``v > threshold`` sends 1 (code 1), any other ``v`` sends
    -1 (code 0); ``v`` less what is sent is the residual. 32 codes are in a word, eight in each byte, the first one in
    its top bit.

    Args:
        threshold: any number of float32, in the units of the gradient.

    Source: the KVStore of Apache MXNet. F. Seide et al., "1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014, has the idea.

    Limits: every element moves by one in every push. Gradients much smaller than one drown in that: scale the loss up,
    and ``rescale_grad`` down, or use ``2bit``.
    """

    name: ClassVar[str] = "1bit"
    unit: ClassVar[int] = 64
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, above=-np.inf)

    def nbytes(self, shape: Sequence[int]) -> int:
        return -(-prod(shape) // 32) * 4

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        if _codecs is not None:
            check_finite(_codecs.encode_1bit(gradient, residual, new_residual, words, self.threshold))
            return
        add_residual(gradient, residual, new_residual)
        flat = new_residual.reshape(-1)
        above = flat > np.float32(self.threshold)
        words[:] = 0
        packed = np.packbits(above)
        words[: len(packed)] = packed
        flat -= np.where(above, np.float32(1), np.float32(-1))

    def decode(self, words: Words, out: Floats) -> None:
        if _codecs is not None:
            _codecs.decode_1bit(words, out, self.threshold)
            return
        codes = np.unpackbits(words, count=out.size).astype(np.float32)
        out.reshape(-1)[:] = codes * np.float32(2) - np.float32(1)
