"""How the words of many gradients lie one after another, and which of them are encoded together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from tensorkv.runtime.recent import Recent

from .codec import RUN, Codec, Floats, Words

# The words of each gradient begin at a multiple of this, where every dtype may begin.
_ALIGN = 8
_REMEMBERED_LAYOUTS = 64


class Run(NamedTuple):
    """What is encoded at a time: a gradient, a piece of a large one, or several small ones one after another.

    Args:
        first, stop: of the gradients.
        elements: where they lie in memory that is laid out for all gradients.
        words: where their words lie.
    """

    first: int
    stop: int
    elements: slice
    words: slice


class WordsLayout:
    """How the words of gradients lie.

    Small gradients that a codec can divide lie side by side, padded to whole words, so that one call encodes many. What
    their words stand for is the same as if each was encoded by itself.

    Args:
        codec: of the words.
        shapes: of the gradients.
    """

    def __init__(self, codec: Codec, shapes: Sequence[Sequence[int]]) -> None:
        self.codec, self.shapes = codec, shapes
        self.counts = [prod(shape) for shape in shapes]
        self.starts: list[int] = []
        """The first element of each gradient in memory for all of them."""
        self.places: list[slice] = []
        """The words of each gradient, and what aligns those of the next."""
        self.numel = self.nbytes = 0
        for shape, count in zip(shapes, self.counts, strict=True):
            self.starts.append(self.numel)
            self.numel += count + self._padding(count)
            stop = self.nbytes + _aligned(codec.nbytes(shape))
            self.places.append(slice(self.nbytes, stop))
            self.nbytes = stop
        self.raw_nbytes = 4 * sum(self.counts)
        """The bytes of the gradients as float32."""
        self.runs: list[Run] = []
        """In the order of the gradients."""
        self._cut_runs()

    def _padding(self, count: int) -> int:
        return -count % self.codec.unit if self.codec.unit else 0

    def _cut_runs(self) -> None:
        first = 0
        while first < len(self.shapes):
            stop, start = first + 1, self.starts[first]
            if not self.codec.unit or self.counts[first] > RUN:
                self._cut(first)
            else:
                while stop < len(self.shapes) and self._end(stop) - start <= RUN:
                    stop += 1
                # Their words are whole.
                words = slice(self.places[first].start, self.places[stop - 1].stop)
                self.runs.append(Run(first, stop, slice(start, self._end(stop - 1)), words))
            first = stop

    def _end(self, index: int) -> int:
        return self.starts[index] + self.counts[index] + self._padding(self.counts[index])

    def _cut(self, index: int) -> None:
        """Add the runs of a gradient that has some of its own."""
        at, start, count = self.places[index].start, self.starts[index], self.counts[index]
        if not self.codec.unit:
            words = slice(at, at + self.codec.nbytes(self.shapes[index]))
            self.runs.append(Run(index, index + 1, slice(start, start + count), words))
            return
        for begin in range(0, count, RUN):
            size = min(RUN, count - begin)
            words = slice(at, at + self.codec.nbytes((size,)))
            self.runs.append(Run(index, index + 1, slice(start + begin, start + begin + size), words))
            at = words.stop

    def views(self, flat: Floats) -> list[Floats]:
        """Return the gradients in memory for all of them."""
        return [
            flat[start : start + count].reshape(shape)
            for start, count, shape in zip(self.starts, self.counts, self.shapes, strict=True)
        ]

    def decoded(self, words: Words) -> list[torch.Tensor]:
        """Return what the words of each gradient stand for, as float32."""
        flat: Floats = np.empty(self.numel, np.float32)
        for run in self.runs:
            self.decode_sum([words], flat, run)
        return [torch.from_numpy(each) for each in self.views(flat)]

    def decode_sum(self, words: Sequence[Words], flat: Floats, run: Run) -> None:
        """Write the sum, in this order, of what words stand for.

        Args:
            words: of all gradients, from each sender.
            flat: memory for all gradients.
            run: which of them.
        """
        first = flat[run.elements]
        if not self.codec.unit:
            first = first.reshape(self.shapes[run.first])
        # Words may be of any sender, and anything may be their sum.
        with np.errstate(all="ignore"):
            self.codec.decode(words[0][run.words], first)
            part = np.empty_like(first) if len(words) > 1 else first
            for each in words[1:]:
                self.codec.decode(each[run.words], part)
                first += part


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def words_layout(codec: Codec, shapes: tuple[tuple[int, ...], ...]) -> WordsLayout:
    """Return the layout of words.

    >>> from tensorkv.compression.two_bits import TwoBit
    >>> layout = words_layout(TwoBit(), ((3,), (100_000,), ()))
    >>> layout.places[2], len(layout.runs)
    (slice(25008, 25016, None), 4)
    """
    layout = _remembered.get((codec, shapes))
    if layout is None:
        layout = WordsLayout(codec, shapes)
        _remembered.keep((codec, shapes), layout, len(shapes))
    return layout


_remembered: Recent[tuple[Codec, tuple[tuple[int, ...], ...]], WordsLayout] = Recent(_REMEMBERED_LAYOUTS)


class SumMemory:
    """Memory for the sums of a call, used again by the next one."""

    def __init__(self) -> None:
        self._flat: Floats = np.empty(0, np.float32)
        self._views: Recent[WordsLayout, list[list[torch.Tensor]]] = Recent(_REMEMBERED_LAYOUTS)

    def of(self, layout: WordsLayout) -> tuple[Floats, list[list[torch.Tensor]]]:
        """Return memory for all sums, and the sum of each key in it, as the only part of that key."""
        if layout.numel > len(self._flat):
            self._flat = np.empty(layout.numel, np.float32)
            self._views.clear()
        views = self._views.get(layout)
        if views is None:
            views = [[torch.from_numpy(each)] for each in layout.views(self._flat)]
            # A tensor takes as much as several keys elsewhere.
            self._views.keep(layout, views, 4 * len(views))
        return self._flat, views


def decoded(codec: Codec, words: Sequence[Words], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return what the words of each gradient stand for, as float32.

    Args:
        codec: of the words.
        words: of each gradient, with what aligned those of the next.
        shapes: of the gradients.
    """
    together = np.concatenate([np.empty(0, np.uint8), *words]) if len(words) != 1 else words[0]
    return words_layout(codec, tuple(tuple(shape) for shape in shapes)).decoded(together)
