"""A small network learns handwritten digits from compressed gradients, with this store and with MXNet's.

Both have the same data in the same order, the same first weights and the same rule. MXNet's process has no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.contender import Contender
from benchmarks.common.work import Verb

SIZES = (64, 128, 64, 10)
RANKS = 4
LR = 0.5
# Gradients are multiplied by it, so that their largest elements are of about the size of 2bit's threshold.
SCALE = 100
THRESHOLD = 0.5


@dataclass(frozen=True)
class Digits:
    """A training of a multilayer perceptron by four ranks, with SGD.

    Args:
        path: of the data, as ``write`` makes it.
        codec: ``"none"`` or ``"2bit"``.
        epochs: how many.
        batch: images of all ranks together.
    """

    path: str
    codec: str
    epochs: int
    batch: int = 64

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it."""
        return f"digits: {self.epochs} epochs, {self.codec}"


def write(path: Path, epochs: int) -> None:
    """Write the data, first weights, and the order of the images in each epoch."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images, held, labels, held_labels = model_selection.train_test_split(
        (images / 16).astype(np.float32), labels, test_size=0.25, stratify=labels, random_state=0
    )
    rng = np.random.default_rng(0)
    weights = {}
    for layer, (inputs, outputs) in enumerate(pairwise(SIZES)):
        bound = inputs**-0.5
        weights[f"weight{layer}"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        weights[f"bias{layer}"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    orders = np.stack([rng.permutation(len(labels)) for _ in range(epochs)])
    np.savez(path, images=images, labels=labels, held=held, held_labels=held_labels, orders=orders, **weights)


class _Learner(Contender):
    """One way to train; ``accuracies`` are those on held-out images after each epoch."""

    WORK = Digits

    def __init__(self, work: Any, rank: int | None = None) -> None:
        self.work, self.rank = work, rank
        with np.load(work.path) as data:
            self.data: dict[str, Any] = dict(data)
        self.names = [name for name in self.data if name.startswith(("weight", "bias"))]
        self.found: list[float] = []

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self.train}

    def time(self, verb: Verb, calls: int = 1) -> float:
        self.calls()[verb]()
        return 0.0

    def shares(self) -> Sequence[Sequence[Any]]:
        """Return, for each step, what each rank trains on."""
        return [
            np.array_split(order[start : start + self.work.batch], RANKS)
            for order in self.data["orders"]
            for start in range(0, len(order) - self.work.batch + 1, self.work.batch)
        ]

    def train(self) -> None:
        """Train all epochs."""
        steps = self.shares()
        per_epoch = len(steps) // self.work.epochs
        for number, shares in enumerate(steps, 1):
            self.step(shares)
            if number % per_epoch == 0:
                self.found.append(float((self.predict(self.data["held"]) == self.data["held_labels"]).mean()))

    def step(self, shares: Sequence[Any]) -> None:
        """Make one step."""
        raise NotImplementedError

    def predict(self, images: Any) -> Any:
        """Return the digit of each image."""
        raise NotImplementedError

    def accuracies(self) -> list[float]:
        """Return the accuracy after each epoch."""
        return self.found


class Ours(_Learner):
    """A local store that compresses each rank's gradients as if it had sent them."""

    def open(self, port: int, **options: Any) -> None:
        import torch

        import tensorkv

        self._weights = [torch.from_numpy(self.data[name]).clone().requires_grad_() for name in self.names]
        self._kv = tensorkv.create()
        self._kv.init(self.names, [weight.detach() for weight in self._weights])
        self._kv.set_optimizer("sgd", lr=LR, rescale_grad=1 / (SCALE * RANKS))
        if self.work.codec != "none":
            self._kv.set_gradient_compression({"type": self.work.codec, "threshold": THRESHOLD}, simulate=True)

    def _logits(self, images: Any) -> Any:
        import torch

        found = torch.from_numpy(images)
        for layer in range(len(SIZES) - 1):
            found = torch.nn.functional.linear(found, *self._weights[2 * layer : 2 * layer + 2])
            if layer < len(SIZES) - 2:
                found = found.tanh()
        return found

    def step(self, shares: Sequence[Any]) -> None:
        import torch

        parts: list[list[Any]] = [[] for _ in self.names]
        for share in shares:
            labels = torch.from_numpy(self.data["labels"][share])
            loss = SCALE * torch.nn.functional.cross_entropy(self._logits(self.data["images"][share]), labels)
            for own, gradient in zip(parts, torch.autograd.grad(loss, self._weights), strict=True):
                own.append(gradient)
        self._kv.pushpull(self.names, parts, out=[weight.detach() for weight in self._weights])

    def predict(self, images: Any) -> Any:
        return self._logits(images).argmax(1).numpy()

    def sent_nbytes(self) -> int:
        """Return the bytes of all words."""
        nbytes: int = self._kv.stats()["compression"]["sent_nbytes"]
        return nbytes

    def close(self) -> None:
        self._kv.close()


class MXNetLearner(_Learner):
    """MXNet's ``dist_sync``; each rank trains on its share."""

    @staticmethod
    def start() -> dict[str, str]:
        import mxnet

        return {"mxnet": mxnet.__version__}

    def open(self, port: int, **options: Any) -> None:
        import mxnet as mx

        self._mx = mx
        self._weights = [mx.nd.array(self.data[name]) for name in self.names]
        for weight in self._weights:
            weight.attach_grad()
        self._kv = mx.kv.create("dist_sync")
        if self.work.codec != "none":
            self._kv.set_gradient_compression({"type": self.work.codec, "threshold": THRESHOLD})
        self._kv.init(self.names, self._weights)
        self._kv.set_optimizer(mx.optimizer.SGD(learning_rate=LR, rescale_grad=1 / (SCALE * RANKS), wd=0))
        mx.nd.waitall()

    def _logits(self, images: Any) -> Any:
        found = self._mx.nd.array(images)
        for layer in range(len(SIZES) - 1):
            weight, bias = self._weights[2 * layer : 2 * layer + 2]
            found = self._mx.nd.FullyConnected(found, weight, bias, num_hidden=SIZES[layer + 1])
            if layer < len(SIZES) - 2:
                found = found.tanh()
        return found

    def step(self, shares: Sequence[Any]) -> None:
        mx, share = self._mx, shares[self.rank or 0]
        labels = mx.nd.array(self.data["labels"][share])
        with mx.autograd.record():
            logs = mx.nd.log_softmax(self._logits(self.data["images"][share]))
            loss = -SCALE * mx.nd.pick(logs, labels).mean()
        loss.backward()
        self._kv.push(self.names, [weight.grad for weight in self._weights])
        self._kv.pull(self.names, out=self._weights)
        mx.nd.waitall()

    def predict(self, images: Any) -> Any:
        return self._logits(images).asnumpy().argmax(1)

    def close(self) -> None:
        self._kv = None
