"""A codec at work: what is sent of each gradient, and what is still owed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.errors import NonFiniteError, quote

from .codec import Codec, Floats, Memory, Words
from .gradients import Gradients, TensorGradients
from .layout import Run, WordsLayout
from .traffic import Traffic


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
        self._spare: dict[Source, Owed] = {}
        self.traffic = Traffic()
        """Of gradients, whose raw bytes are those of float32."""

    def encode(self, verb: str, sources: Sequence[Source], tensors: Sequence[Any]) -> Sending:
        """Return the words of gradients, with what is owed of those before them. Nothing counts until ``keep``.

        Args:
            verb: for messages.
            sources: of the gradients.
            tensors: the gradients, on any device.

        Raises:
            ValueMismatchError: Rows, or a dtype other than float32, float16, bfloat16.
            NonFiniteError: NaN or Inf, in one or in its sum with what is owed.
        """
        return self.encode_all(verb, sources, TensorGradients(self._codec, verb, [key for key, _ in sources], tensors))

    def encode_all(self, verb: str, sources: Sequence[Source], gradients: Gradients) -> Sending:
        """Do as ``encode`` with gradients from elsewhere."""
        layout = gradients.layout
        before = [self.owed.get(source) for source in sources]
        residuals = [
            None if owed is None or owed.residual.shape != shape else owed.residual
            for owed, shape in zip(before, layout.shapes, strict=True)
        ]
        owed = [self._room(source, shape) for source, shape in zip(sources, layout.shapes, strict=True)]
        if not layout.codec.unit:
            owed = [
                Owed(room.residual, {} if each is None else dict(each.memory))
                for room, each in zip(owed, before, strict=True)
            ]
        sending = Sending(sources, layout, np.zeros(layout.nbytes, np.uint8), owed, before)
        with np.errstate(all="ignore"):
            for run in layout.runs:
                gradient = gradients.gather(run)
                try:
                    _encode(sending, run, gradient, residuals)
                except NonFiniteError as error:
                    index = _find_nonfinite(layout, run, gradients.gather(run), residuals)
                    added = "" if residuals[index] is None else ", with the residual of earlier ones,"
                    raise NonFiniteError(
                        f"{verb}({quote(sources[index][0])}): the gradient{added} {error}, which {self._codec.name} "
                        "cannot compress; nothing has changed"
                    ) from None
        return sending

    def _room(self, source: Source, shape: Sequence[int]) -> Owed:
        """Return memory for what will be owed of a gradient."""
        spare = self._spare.pop(source, None)
        return Owed(np.empty(shape, np.float32), {}) if spare is None or spare.residual.shape != shape else spare

    def keep(self, sending: Sending, *, without: Collection[Key] = ()) -> None:
        """Count gradients as sent.

        Args:
            sending: the gradients.
            without: keys whose gradients were sent and changed nothing: what was owed of them before still is.
        """
        pairs = zip(sending.sources, sending.owed, strict=True)
        self.owed.update((source, owed) for source, owed in pairs if source[0] not in without)
        self.traffic.add_sent(sending.layout.nbytes, sending.layout.raw_nbytes)

    def end(self, sending: Sending, *, without: Collection[Key] = ()) -> None:
        """Use the memory of what was owed before gradients that have arrived; ``undo`` is not called for them.

        Args:
            sending: the gradients.
            without: keys whose gradients have not arrived.
        """
        for source, before in zip(sending.sources, sending.before, strict=True):
            if before is not None and source[0] not in without:
                self._spare[source] = before

    def settle(self, sending: Sending, entries: Sequence[Any], versions: Sequence[int]) -> None:
        """Count gradients as sent that have come to an update.

        Of others what was owed before still is: sums with NaN or Inf may have been left out, and an updater may have
        failed after it had updated some of the keys.

        Args:
            sending: the gradients.
            entries: of the keys of the call, as they are now.
            versions: before the call.
        """
        pairs = zip(entries, versions, strict=True)
        unchanged = {entry.key for entry, version in pairs if entry.version == version}
        if len(unchanged) < len(entries):
            self.keep(sending, without=unchanged)
            self.end(sending, without=unchanged)

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
                It is called while nothing is compressed; if it raises, nothing has changed.
        """
        if codec == self.codec:
            return
        if self.codec is not None:
            left: dict[Key, list[Any]] = {}
            for (key, _), owed in sorted(self.owed.items(), key=lambda each: each[0][1]):
                left.setdefault(key, []).append(torch.from_numpy(owed.residual))
            # What is owed is pushed as it is.
            before, self.codec = self.codec, None
            try:
                push(left)
            except BaseException:
                self.codec = before
                raise
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


def _encode(sending: Sending, run: Run, gradient: Floats, residuals: Sequence[Floats | None]) -> None:
    """Encode some gradients.

    Args:
        sending: whose words and what is owed are written.
        run: which gradients.
        gradient: these, flat.
        residuals: of all gradients (None: nothing was owed).
    """
    layout, words = sending.layout, sending.words[run.words]
    codec, first, start = layout.codec, run.first, run.elements.start
    if run.stop - first > 1:
        residual = None
        if any(residuals[index] is not None for index in range(first, run.stop)):
            residual = np.zeros(len(gradient), np.float32)
            for index in range(first, run.stop):
                if (own := residuals[index]) is not None:
                    at = layout.starts[index] - start
                    residual[at : at + own.size] = own.reshape(-1)
        left: Floats = np.empty(len(gradient), np.float32)
        codec.encode(gradient, residual, left, words, {})
        for index in range(first, run.stop):
            at = layout.starts[index] - start
            sending.owed[index].residual.reshape(-1)[:] = left[at : at + layout.counts[index]]
        return
    owed, whole = sending.owed[first], residuals[first]
    if not codec.unit:
        codec.encode(gradient.reshape(layout.shapes[first]), whole, owed.residual, words, owed.memory)
        return
    piece = slice(start - layout.starts[first], min(run.elements.stop - layout.starts[first], layout.counts[first]))
    size = piece.stop - piece.start
    residual = None if whole is None else whole.reshape(-1)[piece]
    codec.encode(gradient[:size], residual, owed.residual.reshape(-1)[piece], words[: codec.nbytes((size,))], {})


def _find_nonfinite(layout: WordsLayout, run: Run, gradient: Floats, residuals: Sequence[Floats | None]) -> int:
    """Return which gradient of a run a codec has found not to be finite."""
    for index in range(run.first, run.stop - 1):
        at, residual = layout.starts[index] - run.elements.start, residuals[index]
        own = gradient[at : at + layout.counts[index]]
        if not np.isfinite(own if residual is None else own + residual.reshape(-1)).all():
            return index
    return run.stop - 1
