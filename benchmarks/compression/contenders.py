"""Contenders of compression: a codec, stores that compress, and the communication hooks of PyTorch's DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common.contender import Contender
from benchmarks.common.work import LR, Verb, WrongResultError, right_slices
from benchmarks.compression.works import CODECS, THRESHOLD, Coding, Link
from benchmarks.sync.contenders import MXNet, TensorKV

NAMES = {
    "none": "tensorkv",
    **{codec: f"tensorkv, {codec}" for codec in CODECS},
    "mxnet": "MXNet",
    "mxnet 2bit": "MXNet, 2bit",
    "ddp": "PyTorch DDP",
    "ddp fp16": "DDP, fp16 hook",
    "ddp powersgd": "DDP, PowerSGD hook",
}


class _Coder(Contender):
    """A codec in this process."""

    WORK = Coding

    def __init__(self, work: Coding, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import torch

        from tensorkv.compression import Compressor, parse, words_layout

        self._codec: Any = parse(CODECS[work.codec])
        self._compressor = Compressor(self._codec)
        self._sources = [(key, 0) for key in range(work.keys)]
        self._gradients = [torch.from_numpy(part) for [part] in self.parts]
        self._layout = words_layout(self._codec, tuple(work.shapes))
        self._flat = np.zeros(self._layout.numel, np.float32)
        self._sending: Any = None
        self.encode()

    def encode(self) -> None:
        """Encode all gradients, with what is owed."""
        sending = self._compressor.encode("push", self._sources, self._gradients)
        self._compressor.keep(sending)
        self._compressor.end(sending)
        self._sending = sending

    def decode(self) -> None:
        """Decode the words of all gradients."""
        for run in self._layout.runs:
            self._layout.decode_sum([self._sending.words], self._flat, run)

    def renew(self) -> None:
        self._flat[:] = np.nan

    def check(self) -> None:
        """What is owed before a push, and its gradient, are what has arrived and what is owed then."""
        owed = [self._compressor.owed[source].residual.copy() for source in self._sources]
        self.encode()
        self.renew()
        self.decode()
        for source, before, [part], arrived in zip(
            self._sources, owed, self.parts, self._layout.views(self._flat), strict=True
        ):
            found = arrived + self._compressor.owed[source].residual
            if not np.allclose(found, before + part, rtol=1e-5, atol=1e-5 * float(np.abs(before + part).max())):
                raise WrongResultError(f"{self.work.name}: key {source[0]} has lost something on the way")


class Encode(_Coder):
    """Encodes."""

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self.encode}


class Decode(_Coder):
    """Decodes."""

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self.decode}


class Copy(Contender):
    """A plain copy of the gradients, for comparison."""

    WORK = Coding

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self.copy}

    def copy(self) -> None:
        """Copy all gradients."""
        for [part], out in zip(self.parts, self.outs, strict=True):
            np.copyto(out, part)

    def renew(self) -> None:
        for out in self.outs:
            out[:] = np.nan

    def check(self) -> None:
        self.renew()
        self.copy()
        for [part], out in zip(self.parts, self.outs, strict=True):
            if not np.array_equal(part, out):
                raise WrongResultError(f"{self.work.name}: a copy differs")


class Compressed(TensorKV):
    """A store with a codec; at the end it pushes what is owed, so that nothing may be missing."""

    WORK = Link

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        params = options.get("params")
        if params is not None:
            self._kv.set_gradient_compression(params)

    def check(self) -> None:
        self._kv.set_gradient_compression(None)
        self.pull()
        super().check()


class PlainMXNet(MXNet):
    """MXNet without compression."""

    WORK = Link


class CompressedMXNet(PlainMXNet):
    """MXNet's 2bit, which does not tell what it owes."""

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        self._kv.set_gradient_compression({"type": "2bit", "threshold": THRESHOLD})

    def exchange(self) -> None:
        # It cannot compress in a pushpull.
        given = next(self._coming)
        self._kv.push(self._keys, given if self.work.keys > 1 else given[0])
        self._kv.pull(self._keys, out=self._given_outs)
        self._mx.nd.waitall()

    def check(self) -> None:
        # Each rank owes less than the threshold and one gradient.
        most = LR * self.work.parts * 2 * THRESHOLD
        for key in range(self.work.keys):
            found = self.out(key).reshape(-1)
            for start, right in right_slices(self.work, key, self.steps, self.scale):
                if not (np.abs(found[start : start + len(right)] - right) <= most).all():
                    raise WrongResultError(f"{self.work.name}: key {key} lacks more than anybody can owe")
