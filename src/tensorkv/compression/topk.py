"""topk: the largest elements alone, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar

import numpy as np

from .codec import Codec, Floats, Memory, Words, add_residual, check_number


@dataclass(frozen=True)
class TopK(Codec):
    """The elements with the largest absolute values, exactly; all others wait.

    Words are the places as int32, rising, then the elements as float32: eight bytes for each. Of elements with one
    absolute value, the first ones are sent.

    Args:
        ratio: of the elements that are sent, in (0, 1]; at least one is.

    Source: A. Aji and K. Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017; S. Stich et
    al., "Sparsified SGD with Memory", NeurIPS 2018.

    Limits: at most 2**31 - 1 elements; above a ratio of one half it sends more bytes than no compression.
    """

    name: ClassVar[str] = "topk"
    ratio: float = 0.01

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, most=1.0)

    def count(self, shape: Sequence[int]) -> int:
        """Return how many elements are sent."""
        numel = prod(shape)
        return min(numel, max(1, ceil(self.ratio * numel)))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * self.count(shape)

    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        add_residual(gradient, residual, new_residual)
        flat, count = new_residual.reshape(-1), self.count(new_residual.shape)
        places, sent = _split(words, count)
        if not count:
            return
        sizes = np.abs(flat)
        least = np.partition(sizes, len(flat) - count)[len(flat) - count]
        above = np.flatnonzero(sizes > least)
        equal = np.flatnonzero(sizes == least)[: count - len(above)]
        places[:] = np.sort(np.concatenate([above, equal]))
        sent[:] = flat[places]
        flat[places] = 0

    def decode(self, words: Words, out: Floats) -> None:
        places, sent = _split(words, self.count(out.shape))
        flat = out.reshape(-1)
        flat[:] = 0
        if len(places) and places.min() >= 0 and places.max() < len(flat):
            flat[places] = sent


def _split(words: Words, count: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], Floats]:
    return words[: 4 * count].view(np.int32), words[4 * count :].view(np.float32)
