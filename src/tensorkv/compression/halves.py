"""fp16 and bf16: each element in half of the bytes, rounded; what rounding takes away is sent later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import torch

from tensorkv.compiled import _codecs

from .codec import Codec, Floats, Memory, Words, add_residual, check_finite


class _Half(Codec):
    """An element in a dtype of two bytes, as near as it gets; beyond its range, the largest number of that sign."""

    unit: ClassVar[int] = 4
    dtype: ClassVar[torch.dtype]

    def nbytes(self, shape: Sequence[int]) -> int:
        return 2 * prod(shape)

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        most = torch.finfo(self.dtype).max
        if _codecs is not None:
            check_finite(getattr(_codecs, f"encode_{self.name}")(gradient, residual, new_residual, words, most))
            return
        add_residual(gradient, residual, new_residual)
        left = torch.from_numpy(new_residual)
        sent = torch.from_numpy(words.view(np.int16)).view(self.dtype).view(new_residual.shape)
        sent.copy_(left.clamp(-most, most))
        left -= sent.float()


@dataclass(frozen=True)
class Float16(_Half):
    """IEEE half precision: 11 bits of precision, numbers up to 65504, down to 6e-8.

    Source: P. Micikevicius et al., "Mixed Precision Training", ICLR 2018.

    Limits: what is below 3e-8 is rounded to zero, and waits in the residual until it has added up.
    """

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16

    def decode(self, words: Words, out: Floats) -> None:
        if _codecs is not None:
            _codecs.decode_fp16(words, out, 0.0)
            return
        out.reshape(-1)[:] = words.view(np.float16)


@dataclass(frozen=True)
class BFloat16(_Half):
    """The top half of a float32: its range, 8 bits of precision.

    Source: D. Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", arXiv 1905.12322.
    """

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def decode(self, words: Words, out: Floats) -> None:
        if _codecs is not None:
            _codecs.decode_bf16(words, out, 0.0)
            return
        # NumPy has no such dtype.
        np.left_shift(words.view(np.uint16), np.uint32(16), out=out.reshape(-1).view(np.uint32), dtype=np.uint32)
