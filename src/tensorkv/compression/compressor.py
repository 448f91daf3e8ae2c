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

from .codec import Codec, Floats, Memory, Words

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
        residual: Floats = np.empty_like(plain)
        if not _add(plain, None if before is None else before.residual, residual):
            raise NonFiniteError(
                f"{verb}({quote(key)}): the gradient{'' if before is None else ', with what is owed of earlier ones,'} "
                f"has NaN or Inf, which {codec.name} cannot compress; nothing has changed"
            )
        if words is None:
            words = np.empty(codec.nbytes(plain.shape), np.uint8)
        memory = {} if before is None else dict(before.memory)
        try:
            with np.errstate(all="ignore"):
                codec.encode(residual, words, memory)
        except NonFiniteError as error:
            raise NonFiniteError(f"{verb}({quote(key)}): {codec.name}: {error}; nothing has changed") from None
        return Sending(source, words, Owed(residual, memory), self.owed.get(source))

    def decode(self, words: Words, shape: Sequence[int]) -> torch.Tensor:
        """Return what words stand for, as float32."""
        return decoded(self._codec, words, shape)

    def keep(self, sendings: Iterable[Sending]) -> None:
        """Count gradients as sent."""
        for each in sendings:
            self.owed[each.source] = each.owed
            self.sent_nbytes += each.words.nbytes
            self.raw_nbytes += each.owed.residual.nbytes

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
        for source in [source for source in self.owed if source[0] in gone]:
            del self.owed[source]

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
            self.owed = {}
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
    # Words may be of any sender, and anything may be their sum.
    with np.errstate(all="ignore"):
        codec.decode(words, out)
    return torch.from_numpy(out)


def _add(gradient: Floats, residual: Floats | None, out: Floats) -> bool:
    """Write the sum; return whether all of it is finite."""
    if _codecs is not None:
        return _codecs.add(gradient, residual, out)
    if residual is None:
        out[...] = gradient
    else:
        np.add(gradient, residual, out=out)
    return bool(np.isfinite(out).all())
