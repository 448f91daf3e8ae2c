"""A codec at work: what is sent of each gradient, and what is still owed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.compiled import _codecs
from tensorkv.errors import NonFiniteError, ValueMismatchError, quote

from .codec import RUN, Codec, Floats, Memory, Words, runs

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
        self.sent_nbytes = self.raw_nbytes = 0
        """How many bytes gradients had on their way, and how many they have as float32."""

    def encode(self, verb: str, source: Source, gradient: Any, words: Words | None = None) -> Sending:
        """Return the words of a gradient, with what is owed of those before it. Nothing counts until ``keep``.

        Args:
            verb: for messages.
            source: of the gradient.
            gradient: a tensor on any device.
            words: memory to write to (None: new memory).

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
        plain: Floats = gradient.detach().to("cpu", torch.float32).contiguous().numpy()
        before = self.owed.get(source)
        if before is not None and before.residual.shape != plain.shape:
            before = None
        spare = self._spare.pop(source, None)
        residual: Floats = np.empty_like(plain) if spare is None or spare.shape != plain.shape else spare
        if words is None:
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

    def decode(self, words: Words, out: Floats) -> None:
        """Write what words stand for."""
        self.decode_sum([words], out)

    def decode_sum(self, words: Sequence[Words], out: Floats) -> None:
        """Write the sum, in this order, of what the words of some arrays stand for."""
        codec, flat = self._codec, out.reshape(-1)
        # Words may be of any sender, and anything may be their sum.
        with np.errstate(all="ignore"):
            if not codec.is_divisible:
                codec.decode(words[0], out)
                part = np.empty_like(out) if len(words) > 1 else out
                for each in words[1:]:
                    codec.decode(each, part)
                    out += part
                return
            part = np.empty(min(RUN, len(flat)), np.float32)
            for run, place in runs(codec, len(flat)):
                codec.decode(words[0][place], flat[run])
                for each in words[1:]:
                    rest = part[: run.stop - run.start]
                    codec.decode(each[place], rest)
                    flat[run] += rest

    def keep(self, sendings: Iterable[Sending]) -> None:
        """Count gradients as sent."""
        for each in sendings:
            self.owed[each.source] = each.owed
            self.sent_nbytes += each.words.nbytes
            self.raw_nbytes += each.owed.residual.nbytes

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
            self.sent_nbytes -= each.words.nbytes
            self.raw_nbytes -= each.owed.residual.nbytes

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

    def stats(self) -> dict[str, Any]:
        """Return what ``KVStore.stats`` tells, nothing before the first push that is compressed."""
        if not self.raw_nbytes:
            return {}
        return {"compression": {"sent_nbytes": self.sent_nbytes, "raw_nbytes": self.raw_nbytes}}

    @property
    def _codec(self) -> Codec:
        if self.codec is None:
            raise RuntimeError("there is no codec")
        return self.codec


def decoded(codec: Codec, words: Words, shape: Sequence[int]) -> torch.Tensor:
    """Return what words stand for, as float32."""
    out: Floats = np.empty(tuple(shape), np.float32)
    Compressor(codec).decode(words, out)
    return torch.from_numpy(out)


def _encode(codec: Codec, gradient: Floats, residual: Floats | None, out: Floats, words: Words, memory: Memory) -> None:
    """Write the words of a gradient and what is owed before it, and to ``out`` what is owed then.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if codec.is_divisible:
        flats = [None if each is None else each.reshape(-1) for each in (gradient, residual, out)]
        for run, place in runs(codec, gradient.size):
            one, other, left = (None if each is None else each[run] for each in flats)
            _encode_run(codec, one, other, left, words[place], memory)
    else:
        _encode_run(codec, gradient, residual, out, words, memory)


def _encode_run(codec: Codec, gradient: Any, residual: Any, out: Any, words: Words, memory: Memory) -> None:
    if not _add(gradient, residual, out):
        raise NonFiniteError("has NaN or Inf")
    codec.encode(out, words, memory)


def _add(gradient: Floats, residual: Floats | None, out: Floats) -> bool:
    """Write the sum; return whether all of it is finite."""
    if _codecs is not None:
        return _codecs.add(gradient, residual, out)
    if residual is None:
        out[...] = gradient
    else:
        np.add(gradient, residual, out=out)
    return bool(np.isfinite(out).all())
