"""Training: the same model, once with PyTorch's DistributedDataParallel and once with a Trainer over a store."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from dist_contenders import open_store
from dist_works import Training
from torch import nn
from works import MOMENTUM, Verb

import tensorkv

_LR = 0.5


class TrainingMember:
    """One rank of a training.

    Args:
        work: what to train.
        kind: ``"ddp"``, ``"tensorkv"`` or ``"overlap"``.
        rank: whose batch.
    """

    def __init__(self, work: Training, kind: str, rank: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(work.layers):
            layers += [nn.Linear(work.width, work.width), nn.ReLU()]
        self._model: nn.Module = nn.Sequential(*layers[:-1])
        batch = torch.Generator().manual_seed(1 + rank)
        self._inputs, self._targets = torch.randn(2, work.batch, work.width, generator=batch)
        self._work, self._kind = work, kind
        self._step: Callable[[], None]
        self._zero: Callable[[], None]
        self._kv: Any = None
        self.losses: list[float] = []

    def open(self, port: int) -> None:
        """Bring the ranks together.

        Args:
            port: free, and the same for every rank.
        """
        if self._kind == "ddp":
            self._model = nn.parallel.DistributedDataParallel(self._model)
            optimizer = torch.optim.SGD(self._model.parameters(), lr=_LR, momentum=MOMENTUM)
            self._zero, self._step = optimizer.zero_grad, optimizer.step  # type: ignore[assignment]
            return
        self._kv = open_store(port)
        more: dict[str, Any] = {"overlap": True} if self._kind == "overlap" else {}
        trainer = tensorkv.Trainer(
            self._model, self._kv, "sgd", lr=_LR, momentum=MOMENTUM, rescale_grad=1 / self._work.ranks, **more
        )
        self._zero, self._step = trainer.zero_grad, trainer.step

    def ready(self, calls: int) -> None:
        """Do before so many steps what is not to be timed: nothing."""

    def time(self, verb: Verb, calls: int = 1) -> None:
        """Take so many steps, which somebody else times."""
        del verb
        for _ in range(calls):
            self._zero()
            loss = (self._model(self._inputs) - self._targets).square().mean()
            loss.backward()
            self._step()
            self.losses.append(loss.item())

    def close(self) -> None:
        """Let go of the store."""
        if self._kv is not None:
            self._kv.close()


def can_overlap() -> bool:
    """Return whether a Trainer can push gradients while others are still computed."""
    return "overlap" in inspect.signature(tensorkv.Trainer).parameters
