"""Training: the same model with PyTorch's DistributedDataParallel and with a Trainer over a store."""

from __future__ import annotations

from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import nn

import tensorkv
from benchmarks.common.work import MOMENTUM, Verb
from benchmarks.sync.contenders import Gloo, open_store
from benchmarks.sync.works import Training

# Names and numbers of the optimizers, as both a Trainer and torch.optim take them.
_NUMBERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.5, "momentum": MOMENTUM},
    "adamw": {"lr": 1e-4, "weight_decay": 0.01},
}


class Trained:
    """One rank of a training with a Trainer whose store steps.

    Args:
        work: what to train.
        rank: whose batch.
    """

    WORK: ClassVar[type[Any]] = Training
    OPTIONS: ClassVar[dict[str, Any]] = {}

    def __init__(self, work: Training, rank: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(work.layers):
            layers += [nn.Linear(work.width, work.width), nn.ReLU()]
        self._model: nn.Module = nn.Sequential(*layers[:-1])
        batch = torch.Generator().manual_seed(1 + rank)
        self._inputs, self._targets = torch.randn(2, work.batch, work.width, generator=batch)
        self._work = work
        self._optimizer: Any = None
        self._kv: Any = None
        self._losses: list[float] = []

    @staticmethod
    def start() -> dict[str, str]:
        """As of a contender."""
        return {}

    def open(self, port: int) -> None:
        """Bring the ranks together.

        Args:
            port: free, and the same for every rank.
        """
        self._kv = open_store(port)
        name = self._work.optimizer
        numbers = {"rescale_grad": 1 / self._work.ranks, **_NUMBERS[name]}
        self._optimizer = tensorkv.Trainer(self._model, self._kv, name, **numbers, **self.OPTIONS)

    def prepare(self, verb: Verb, calls: int) -> None:
        """Do nothing before so many steps."""

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Take so many steps; return the seconds of one."""
        del verb
        start = perf_counter()
        for _ in range(calls):
            self._optimizer.zero_grad()
            loss = (self._model(self._inputs) - self._targets).square().mean()
            loss.backward()
            self._optimizer.step()
            self._losses.append(loss.item())
        return (perf_counter() - start) / calls

    def renew(self) -> None:
        """Do nothing: each step gives a new loss."""

    def check(self) -> None:
        """Do nothing: losses of all contenders are compared with each other at the end."""

    def losses(self) -> list[float]:
        """Return the loss of each step."""
        return self._losses

    def close(self) -> None:
        """Close the store."""
        if self._kv is not None:
            self._kv.close()


class Overlapped(Trained):
    """The same with gradients that are pushed while others are still computed."""

    OPTIONS: ClassVar[dict[str, Any]] = {"overlap": True}


class DDP(Trained):
    """DistributedDataParallel with its defaults; ``torch.optim.SGD``, or AdamW with its state divided over ranks."""

    DDP_OPTIONS: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def start() -> dict[str, str]:
        return Gloo.start()

    def open(self, port: int) -> None:
        del port  # the group has met at one of its own
        self._model = nn.parallel.DistributedDataParallel(self._model, **self.DDP_OPTIONS)
        params, numbers = self._model.parameters(), _NUMBERS[self._work.optimizer]
        if self._work.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(params, **numbers)
        else:
            # Its import warns of torch's own use of torch.jit.
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self._optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, **numbers)
