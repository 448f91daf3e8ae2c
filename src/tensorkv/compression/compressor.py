"""A codec at work: what is sent of each gradient, and what is still owed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.errors import NonFiniteError, ValueMismatchError, quote

from .codec import RUN, Codec, Floats, Memory, Words
from .layout import Run, WordsLayout, words_layout
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
    """Gradients that were encoded; ``Compressor.keep`` makes them count.

    Args:
        sources: of the gradients.
        layout: of their words.
        words: to be sent.
        owed: of each, after it was sent.
        before: what was owed of each.
    """

    sources: Sequence[Source]
    layout: WordsLayout
    words: Words
    owed: list[Owed]
    before: list[Owed | None]

    def words_of(self, index: int) -> Words:
        """Return the words of one gradient, in whole units of eight bytes."""
        return self.words[self.layout.places[index]]

    def decoded(self) -> list[torch.Tensor]:
        """Return what the words of each gradient stand for, as float32."""
        return self.layout.decoded(self.words)


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

    def encode(self, verb: str, sources: Sequence[Source], gradients: Sequence[Any]) -> Sending:
        """Return the words of gradients, with what is owed of those before them. Nothing counts until ``keep``.

        Args:
            verb: for messages.
            sources: of the gradients.
            gradients: tensors on any device.

        Raises:
            ValueMismatchError: Rows, or a dtype other than float32, float16, bfloat16.
            NonFiniteError: NaN or Inf, in one or in its sum with what is owed.
        """
        plain = [self._plain(verb, key, each) for (key, _), each in zip(sources, gradients, strict=True)]
        layout = words_layout(self._codec, tuple(each.shape for each in plain))
        before = [self.owed.get(source) for source in sources]
        # What a codec leaves of a gradient, and what it remembers.
        left = [self._room(source, each.shape) for source, each in zip(sources, plain, strict=True)]
        memories = [{} if each is None else dict(each.memory) for each in before]
        residuals = [
            None if owed is None or owed.residual.shape != each.shape else owed.residual
            for owed, each in zip(before, plain, strict=True)
        ]
        encoding = _Encoding(layout, np.zeros(layout.nbytes, np.uint8), plain, residuals, left, memories)
        for run in layout.runs:
            try:
                with np.errstate(all="ignore"):
                    encoding.run(run)
            except NonFiniteError as error:
                index = encoding.find_nonfinite(run)
                added = "" if residuals[index] is None else ", with what is owed of earlier ones,"
                raise NonFiniteError(
                    f"{verb}({quote(sources[index][0])}): the gradient{added} {error}, which {self._codec.name} cannot "
                    "compress; nothing has changed"
                ) from None
        return Sending(sources, layout, encoding.words, list(map(Owed, left, memories)), before)

    def _plain(self, verb: str, key: Key, gradient: Any) -> Floats:
        """Return a gradient as a contiguous array of float32."""
        found = "Rows for a dense key" if not isinstance(gradient, torch.Tensor) else None
        if found is None and gradient.dtype not in COMPRESSED_DTYPES:
            found = str(gradient.dtype).removeprefix("torch.")
        if found is not None:
            expected = "an array" if "Rows" in found else "float32, float16 or bfloat16"
            raise ValueMismatchError(
                f"{verb}({quote(key)}): gradients are compressed ({self._codec.name}), and this one is {found}; "
                f"expected {expected}"
            )
        if gradient.dtype is not torch.float32 or not gradient.is_cpu:
            gradient = gradient.to("cpu", torch.float32)
        plain: Floats = gradient.detach().resolve_neg().contiguous().numpy()
        return plain

    def _room(self, source: Source, shape: tuple[int, ...]) -> Floats:
        """Return memory for what will be owed of a gradient."""
        spare = self._spare.pop(source, None)
        return np.empty(shape, np.float32) if spare is None or spare.shape != shape else spare

    def keep(self, sending: Sending) -> None:
        """Count gradients as sent."""
        self.owed.update(zip(sending.sources, sending.owed, strict=True))
        self.traffic.add_sent(sending.layout.nbytes, sending.layout.raw_nbytes)

    def end(self, sending: Sending, *, without: Collection[Key] = ()) -> None:
        """Use the memory of what was owed before gradients that have arrived; ``undo`` is not called for them.

        Args:
            sending: the gradients.
            without: keys whose gradients have not arrived.
        """
        for source, before in zip(sending.sources, sending.before, strict=True):
            if before is not None and source[0] not in without:
                self._spare[source] = before.residual

    def undo(self, sending: Sending, *, keys: Collection[Key] | None = None) -> None:
        """Owe what was owed before gradients were kept which did not arrive, unless others were kept since.

        Args:
            sending: the gradients.
            keys: whose gradients did not arrive (None: none did).
        """
        layout = sending.layout
        for index, (source, owed) in enumerate(zip(sending.sources, sending.owed, strict=True)):
            if keys is not None and source[0] not in keys:
                continue
            before = sending.before[index]
            if self.owed.get(source) is owed:
                if before is None:
                    del self.owed[source]
                else:
                    self.owed[source] = before
            self.traffic.add_sent(-len(sending.words_of(index)), -4 * layout.counts[index])

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


class _Encoding(NamedTuple):
    """Gradients that are being encoded.

    Args:
        layout: of the words.
        words: to be written.
        gradients: contiguous.
        residuals: of each gradient (None: nothing was owed).
        left: memory for what is owed of each.
        memories: of the codec for each, changed in place.
    """

    layout: WordsLayout
    words: Words
    gradients: Sequence[Floats]
    residuals: Sequence[Floats | None]
    left: Sequence[Floats]
    memories: Sequence[Memory]

    def run(self, run: Run) -> None:
        """Encode some."""
        if run.stop - run.first > 1:
            self._run_together(run)
            return
        index, start = run.first, self.layout.starts[run.first]
        gradient, residual, left = self.gradients[index], self.residuals[index], self.left[index]
        if self.layout.codec.unit:
            elements = slice(run.elements.start - start, min(run.elements.stop - start, gradient.size))
            gradient, left = gradient.reshape(-1)[elements], left.reshape(-1)[elements]
            residual = None if residual is None else residual.reshape(-1)[elements]
        words = self.words[run.words][: self.layout.codec.nbytes(gradient.shape)]
        self.layout.codec.encode(gradient, residual, left, words, self.memories[index])

    def _run_together(self, run: Run) -> None:
        """Encode several small gradients, side by side."""
        chosen = range(run.first, run.stop)
        starts = [self.layout.starts[index] - run.elements.start for index in chosen]
        size = run.elements.stop - run.elements.start
        stops = [*starts[1:], size]
        gradients: list[Floats] = []
        residuals: list[Floats] = []
        for index, start, stop in zip(chosen, starts, stops, strict=True):
            count = self.layout.counts[index]
            residual = self.residuals[index]
            gradients += self.gradients[index], _ZEROS[: stop - start - count]
            residuals += _ZEROS[:count] if residual is None else residual, _ZEROS[: stop - start - count]
        left: Floats = np.concatenate(gradients, axis=None)
        has_residuals = any(self.residuals[index] is not None for index in chosen)
        residual = np.concatenate(residuals, axis=None) if has_residuals else None
        self.layout.codec.encode(left, residual, left, self.words[run.words], {})
        for index, start in zip(chosen, starts, strict=True):
            self.left[index].reshape(-1)[:] = left[start : start + self.layout.counts[index]]

    def find_nonfinite(self, run: Run) -> int:
        """Return which gradient of a run a codec has found not to be finite."""
        for index in range(run.first, run.stop - 1):
            gradient, residual = self.gradients[index], self.residuals[index]
            with np.errstate(all="ignore"):
                if not np.isfinite(gradient if residual is None else gradient + residual).all():
                    return index
        return run.stop - 1


_ZEROS: Floats = np.zeros(RUN, np.float32)
