"""A codec at work: what is sent of each gradient, and what is still owed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.errors import NonFiniteError, ValueMismatchError, quote

from .codec import Codec, Floats, Memory, Words, runs
from .traffic import Traffic

COMPRESSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Owed(NamedTuple):
    """What of one gradient was not sent.

    Args:
        residual: of the gradient's shape.
        memory: of the codec.
    """

    residual: Floats
    memory: Memory


# A key, and whose or which part of its gradient it is.
Source = tuple[Key, int]


@dataclass(slots=True)
class Sending:
    """A gradient that was encoded; ``Compressor.keep`` makes it count.

    Args:
        source: of the gradient.
        words: to be sent.
        owed: after it was sent.
        before: what was owed.
    """

    source: Source
    words: Words
    owed: Owed
    before: Owed | None


class Compressor:
    """A codec, and what is owed of each gradient. Its user calls it from one thread at a time.

    Args:
        codec: None: nothing is compressed.
    """

    def __init__(self, codec: Codec | None = None) -> None:
        self.codec = codec
        self.owed: dict[Source, Owed] = {}
        """What was not sent, of every gradient that was pushed; from a checkpoint also without a codec."""
        # Memory for what is owed next, since new memory costs as much time as a codec.
        self._spare: dict[Source, Floats] = {}
        self.traffic = Traffic()
        """Of gradients, whose raw bytes are those of float32."""

    def encode(self, verb: str, source: Source, gradient: Any) -> Sending:
        """Return the words of a gradient, with what is owed of those before it. Nothing counts until ``keep``.

        Args:
            verb: for messages.
            source: of the gradient.
            gradient: a tensor on any device.

        Raises:
            ValueMismatchError: Rows, or a dtype other than float32, float16, bfloat16.
            NonFiniteError: NaN or Inf, in it or in its sum with what is owed.
        """
        codec, key = self._codec, source[0]
        if not isinstance(gradient, torch.Tensor):
            raise ValueMismatchError(
                f"{verb}({quote(key)}): gradients are compressed ({codec.name}), and this one is Rows for a dense key; "
                "expected an array"
            )
        if gradient.dtype not in COMPRESSED_DTYPES:
            raise ValueMismatchError(
                f"{verb}({quote(key)}): gradients are compressed ({codec.name}), and this one is "
                f"{str(gradient.dtype).removeprefix('torch.')}; expected float32, float16 or bfloat16"
            )
        plain: Floats = gradient.detach().to("cpu", torch.float32).resolve_neg().contiguous().numpy()
        before = self.owed.get(source)
        if before is not None and before.residual.shape != plain.shape:
            before = None
        spare = self._spare.pop(source, None)
        residual: Floats = np.empty_like(plain) if spare is None or spare.shape != plain.shape else spare
        words = np.empty(codec.nbytes(plain.shape), np.uint8)
        memory = {} if before is None else dict(before.memory)
        try:
            with np.errstate(all="ignore"):
                _encode(codec, plain, None if before is None else before.residual, residual, words, memory)
        except NonFiniteError as error:
            what = "the gradient" if before is None else "the gradient, with what is owed of earlier ones,"
            raise NonFiniteError(
                f"{verb}({quote(key)}): {what} {error}, which {codec.name} cannot compress; nothing has changed"
            ) from None
        return Sending(source, words, Owed(residual, memory), self.owed.get(source))

    def runs(self, shape: Sequence[int]) -> Iterable[tuple[slice, slice]]:
        """Return the runs of an array's elements that are decoded alone, and where in its words each lies."""
        numel = prod(shape)
        if self._codec.is_divisible:
            return runs(self._codec, numel)
        return [(slice(0, numel), slice(0, self._codec.nbytes(shape)))]

    def decode_sum(self, words: Sequence[Words], out: Floats, run: slice) -> None:
        """Write the sum, in this order, of what words stand for, to a run of an array."""
        codec, first = self._codec, out
        if codec.is_divisible:
            first = out.reshape(-1)[run]
        # Words may be of any sender, and anything may be their sum.
        with np.errstate(all="ignore"):
            codec.decode(words[0], first)
            part = np.empty_like(first) if len(words) > 1 else first
            for each in words[1:]:
                codec.decode(each, part)
                first += part

    def keep(self, sendings: Iterable[Sending]) -> None:
        """Count gradients as sent."""
        for each in sendings:
            self.owed[each.source] = each.owed
            self.traffic.add_sent(each.words.nbytes, each.owed.residual.nbytes)

    def end(self, sendings: Iterable[Sending]) -> None:
        """Use the memory of what was owed before gradients that have arrived; ``undo`` is not called for them."""
        for each in sendings:
            if each.before is not None:
                self._spare[each.source] = each.before.residual

    def undo(self, sendings: Iterable[Sending]) -> None:
        """Owe what was owed before gradients were kept which did not arrive, unless others were kept since."""
        for each in sendings:
            if self.owed.get(each.source) is each.owed:
                if each.before is None:
                    del self.owed[each.source]
                else:
                    self.owed[each.source] = each.before
            self.traffic.add_sent(-each.words.nbytes, -each.owed.residual.nbytes)

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop what is owed of keys that were deleted."""
        gone = set(keys)
        for held in (self.owed, self._spare):
            for source in [source for source in held if source[0] in gone]:
                del held[source]

    def change(self, codec: Codec | None, push: Callable[[dict[Key, list[Any]]], None]) -> None:
        """Use another codec, after what gradients still owe was pushed; the same codec goes on.

        Args:
            codec: None: nothing is compressed from now on.
            push: takes, for each key, what is left of its gradients, in the order of their sources; there may be none.
                If it raises, nothing has changed.
        """
        if codec == self.codec:
            return
        if self.codec is not None:
            left: dict[Key, list[Any]] = {}
            for (key, _), owed in sorted(self.owed.items(), key=lambda each: each[0][1]):
                left.setdefault(key, []).append(torch.from_numpy(owed.residual))
            push(left)
            self.owed, self._spare = {}, {}
        self.codec = codec

    @property
    def _codec(self) -> Codec:
        if self.codec is None:
            raise RuntimeError("there is no codec")
        return self.codec


def owed_by(owed: Mapping[Source, Owed], rank: int, size: int) -> dict[Source, Owed]:
    """Return what one of some workers owes of what workers owed when a checkpoint was saved, perhaps more of them.

    Each goes on with its own; rank 0 also owes what those owe that are no longer there.
    """
    found = {(key, worker): each for (key, worker), each in owed.items() if worker == rank}
    for (key, worker), each in owed.items() if rank == 0 else ():
        if worker >= size:
            before = found.get((key, 0))
            residual = each.residual if before is None else np.asarray(before.residual + each.residual)
            found[key, 0] = Owed(residual, {} if before is None else before.memory)
    return found


def decoded(codec: Codec, words: Words, shape: Sequence[int]) -> torch.Tensor:
    """Return what words stand for, as float32."""
    out: Floats = np.empty(tuple(shape), np.float32)
    compressor = Compressor(codec)
    for run, place in compressor.runs(shape):
        compressor.decode_sum([words[place]], out, run)
    return torch.from_numpy(out)


def _encode(
    codec: Codec, gradient: Floats, residual: Floats | None, owed: Floats, words: Words, memory: Memory
) -> None:
    """Do as ``Codec.encode``, run by run if they are encoded alone."""
    if not codec.is_divisible:
        codec.encode(gradient, residual, owed, words, memory)
        return
    flat, left = gradient.reshape(-1), owed.reshape(-1)
    before = None if residual is None else residual.reshape(-1)
    for run, place in runs(codec, gradient.size):
        codec.encode(flat[run], None if before is None else before[run], left[run], words[place], memory)
