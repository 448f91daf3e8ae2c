"""Where a codec gets gradients from: tensors of any kind, or arrays at which the compiled part has looked."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.errors import ValueMismatchError, quote

from .codec import RUN, Codec, Floats
from .layout import Run, WordsLayout, words_layout

COMPRESSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ZEROS: Floats = np.zeros(RUN, np.float32)


class Gradients(Protocol):
    """The gradients of a call."""

    layout: WordsLayout

    def gather(self, run: Run) -> Floats:
        """Return some as float32, flat, as they lie in memory for all; zeros are between them."""


class TensorGradients:
    """Gradients that are tensors on any device.

    Args:
        codec: for which they are.
        verb: for messages.
        keys: of the gradients.
        tensors: the gradients.

    Raises:
        ValueMismatchError: Rows, or a dtype other than float32, float16, bfloat16.
    """

    def __init__(self, codec: Codec, verb: str, keys: Sequence[Key], tensors: Sequence[Any]) -> None:
        self._plain = [_plain(codec, verb, key, each) for key, each in zip(keys, tensors, strict=True)]
        self.layout = words_layout(codec, tuple(each.shape for each in self._plain))

    def gather(self, run: Run) -> Floats:
        """Return some as float32."""
        starts, counts = self.layout.starts, self.layout.counts
        if run.stop - run.first == 1:
            start = starts[run.first]
            piece = self._plain[run.first].reshape(-1)[run.elements.start - start : run.elements.stop - start]
            if len(piece) == run.elements.stop - run.elements.start:
                return piece
        pieces: list[Floats] = []
        for index in range(run.first, run.stop):
            stop = starts[index + 1] if index + 1 < run.stop else run.elements.stop
            pieces += self._plain[index], _ZEROS[: stop - starts[index] - counts[index]]
        found: Floats = np.concatenate(pieces, axis=None)
        return found


def _plain(codec: Codec, verb: str, key: Key, gradient: Any) -> Floats:
    """Return a gradient as a contiguous array of float32."""
    found = "" if isinstance(gradient, torch.Tensor) else "Rows for a dense key; expected an array"
    if not found and gradient.dtype not in COMPRESSED_DTYPES:
        found = f"{str(gradient.dtype).removeprefix('torch.')}; expected float32, float16 or bfloat16"
    if found:
        raise ValueMismatchError(
            f"{verb}({quote(key)}): gradients are compressed ({codec.name}), and this one is {found}"
        )
    if gradient.dtype is not torch.float32 or not gradient.is_cpu:
        gradient = gradient.to("cpu", torch.float32)
    plain: Floats = gradient.detach().resolve_neg().contiguous().numpy()
    return plain


class PlainGradients:
    """Gradients that are sums of arrays in a batch, or pieces of such sums; one object for all calls of some keys.

    Args:
        layout: of their words.
        places: in a batch of the key of each gradient.
        firsts: of each, its first element in the value of the key.
        is_float32: whether all arrays are float32; those that nothing is added to are not copied then.
    """

    def __init__(self, layout: WordsLayout, places: Sequence[int], firsts: Sequence[int], *, is_float32: bool) -> None:
        self.layout, self._is_float32 = layout, is_float32
        # As the compiled part takes pieces: place of the key in the call, first element, how many.
        self._pieces = np.array([places, firsts, layout.counts], np.int64).T.copy()
        self._offsets = 4 * np.array(layout.starts, np.int64)
        self._room: Floats = np.empty(0, np.float32)

    def of(self, batch: Any) -> Gradients:
        """Return the gradients of a batch, as ``shard.native`` has it."""
        return _BatchGradients(self, batch)

    def gather(self, batch: Any, run: Run) -> Floats:
        """Return some gradients of a batch as float32."""
        pieces = self._pieces[run.first : run.stop].tobytes()
        size, start, stop = run.elements.stop - run.elements.start, 0, sum(self.layout.counts[run.first : run.stop])
        if run.stop - run.first == 1:
            start = run.elements.start - self.layout.starts[run.first]
            stop = min(stop, start + size)
            column = batch.part_column(pieces) if self._is_float32 and stop - start == size else None
            if column is not None:
                # The batch holds the array.
                address = int(np.frombuffer(column, np.uint64)[0]) + 4 * start
                return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
        found = self._memory(size)
        if stop - start < size:
            found[:] = 0
        targets = self._offsets[run.first : run.stop] + (found.ctypes.data - 4 * run.elements.start)
        batch.sum_pieces(pieces, [targets.astype(np.uint64).tobytes()], _WIDE, start, stop)
        return found

    def _memory(self, size: int) -> Floats:
        """Return memory for so many elements; what is larger than a cache is not kept."""
        if size > RUN:
            return np.empty(size, np.float32)
        if not len(self._room):
            self._room = np.empty(RUN, np.float32)
        return self._room[:size]


class _BatchGradients:
    """The gradients of one batch; arguments as of ``PlainGradients.gather``."""

    def __init__(self, plain: PlainGradients, batch: Any) -> None:
        self.layout, self._plain, self._batch = plain.layout, plain, batch

    def gather(self, run: Run) -> Floats:
        """Return some as float32."""
        return self._plain.gather(self._batch, run)


# Of ``sum_pieces``: sums of float16 and bfloat16 are float32.
_WIDE = True
