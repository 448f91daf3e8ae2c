"""Works of processes in lock step: what they exchange, and what they train.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.common.work import Work, WrongResultError, short

# All ways of training compute the same in another order; in so many steps, rounding does not grow beyond that.
_LOSS_TOLERANCE = 1e-5
_COMPARED_STEPS = 20


@dataclass(frozen=True)
class Exchange(Work):
    """Some keys to each of which every rank pushes one part, and pulls the result.

    Args:
        hosts: on how many hosts the ranks are, neighbours together.
    """

    hosts: int = 1

    pusher: ClassVar[str] = "rank"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Exchange(1, (25_000_000,), 2, hosts=2).name
        '1 × 25M, 2 ranks on 2 hosts, assign'
        """
        name = super().name
        return name if self.hosts == 1 else name.replace(" ranks,", f" ranks on {self.hosts} hosts,")


@dataclass(frozen=True)
class Training:
    """Steps of a multilayer perceptron on a batch so small that the exchange of gradients is what takes time.

    Args:
        ranks: how many train, each on a batch of its own.
        width: features of each layer.
        layers: how many.
        batch: samples of each rank.
        optimizer: ``"sgd"``, with momentum, or ``"adamw"``.
    """

    ranks: int
    width: int
    layers: int
    batch: int = 4
    optimizer: str = "sgd"

    calls: ClassVar[int] = 1
    warm_up: ClassVar[int] = 6

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Training(2, 2048, 6).name
        'training 25.2M parameters, 2 ranks'
        >>> Training(2, 2048, 6, optimizer="adamw").name
        'training 25.2M parameters, 2 ranks, AdamW'
        """
        size = short(round(self.parameters, -5) or self.parameters)
        return f"training {size} parameters, {self.ranks} ranks{', AdamW' if self.optimizer == 'adamw' else ''}"

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return self.layers * (self.width + 1) * self.width

    @property
    def value_nbytes(self) -> int:
        """Of all parameters together."""
        return 4 * self.parameters


def exchanges(ranks: int, *, quick: bool) -> list[Exchange]:
    """Return what this many ranks of one host are measured at."""
    if quick:
        return [
            Exchange(1, (100_000,), ranks),
            Exchange(16, (1600,), ranks),
            Exchange(20, (100,), ranks, calls=2),
            Exchange(1, (2, 3), ranks, calls=10),
            Exchange(1, (100_000,), ranks, "momentum"),
            Exchange(16, (1600,), ranks, "momentum"),
        ]
    return [
        Exchange(1, (25_000_000,), ranks),
        Exchange(160, (160_000,), ranks),
        Exchange(1000, (1000,), ranks, calls=10),
        Exchange(1, (2, 3), ranks, calls=200),
        Exchange(1, (25_000_000,), ranks, "momentum"),
        Exchange(160, (160_000,), ranks, "momentum"),
    ]


def trainings(ranks: int, *, quick: bool) -> list[Training]:
    """Return what this many ranks train."""
    width, layers = (64, 3) if quick else (2048, 6)
    return [Training(ranks, width, layers, optimizer=optimizer) for optimizer in ("sgd", "adamw")]


def check_losses(work: Training, losses: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> None:
    """Raise unless two ways of training have the same losses, as far as both have gone, and these fall.

    Args:
        work: what was trained.
        losses: of each rank, of each step.
        right: those of a way that is trusted.

    Raises:
        WrongResultError: naming the first step that differs.
    """
    for rank, (ours, theirs) in enumerate(zip(losses, right, strict=True)):
        for step, (found, expected) in enumerate(zip(ours[:_COMPARED_STEPS], theirs, strict=False)):
            if not abs(found - expected) <= _LOSS_TOLERANCE * abs(expected):
                raise WrongResultError(
                    f"{work.name}: the loss of rank {rank} at step {step} is {found!r}, expected {expected!r}"
                )
        if not theirs[-1] < theirs[0]:
            raise WrongResultError(f"{work.name}: the loss of rank {rank} went from {theirs[0]!r} to {theirs[-1]!r}")
