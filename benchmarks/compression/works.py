"""Works of compression: gradients for a codec, and what two hosts exchange over a slow link.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.common.work import Work, short
from benchmarks.sync.works import Exchange, Training

# Gradients of these works are below it, so that 2bit owes less than it and one gradient of any element.
THRESHOLD = 16.0
CODECS: dict[str, dict[str, Any]] = {
    "bf16": {"type": "bf16"},
    "fp16": {"type": "fp16"},
    "int8": {"type": "int8"},
    "2bit": {"type": "2bit", "threshold": THRESHOLD},
    "1bit": {"type": "1bit"},
    "topk": {"type": "topk", "ratio": 0.01},
    "powersgd": {"type": "powersgd", "rank": 2},
}
# Keys, shape, and how many calls are timed together: a large matrix, layers, and many small ones.
_SIZES = [(1, (5000, 5000), 1), (160, (400, 400), 1), (1000, (1000,), 3)]
_QUICK_SIZES = [(1, (300, 300), 1), (16, (40, 40), 1)]


@dataclass(frozen=True)
class Coding(Work):
    """Gradients that one process encodes, and decodes again.

    Args:
        codec: a name in ``CODECS``.
    """

    codec: str = "2bit"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Coding(160, (400, 400), 1).name
        'codec 2bit: 160 of 400×400'
        """
        return f"codec {self.codec}: {super().name.partition(',')[0]}"


@dataclass(frozen=True)
class Link(Exchange):
    """An exchange over links of a limited rate.

    Args:
        rate: as ``tc`` takes it.
    """

    rate: str = "1gbit"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Link(1, (5000, 5000), 2, "sgd", hosts=2).name
        'link 1gbit: one 5000×5000 key, 2 ranks on 2 hosts, SGD'
        """
        return f"link {self.rate}: {super().name}"


@dataclass(frozen=True)
class LinkTraining(Training):
    """A training over links of a limited rate.

    Args:
        rate: as ``tc`` takes it.
    """

    rate: str = "1gbit"

    warm_up: ClassVar[int] = 4

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> LinkTraining(2, 1024, 6).name
        'link 1gbit: training 6.3M parameters, 2 ranks'
        """
        return f"link {self.rate}: training {short(round(self.parameters, -5) or self.parameters)} parameters, 2 ranks"


def codings(*, quick: bool) -> list[Coding]:
    """Return what codecs are measured at."""
    sizes = _QUICK_SIZES if quick else _SIZES
    return [Coding(keys, shape, 1, codec=codec) for keys, shape, _ in sizes for codec in CODECS]


def links(*, quick: bool) -> list[Link]:
    """Return what two hosts exchange."""
    sizes = _QUICK_SIZES if quick else _SIZES
    return [Link(keys, shape, 2, "sgd", hosts=2, calls=calls, warm_up=3) for keys, shape, calls in sizes]


def trainings(*, quick: bool) -> list[LinkTraining]:
    """Return what two hosts train."""
    return [LinkTraining(2, 64, 3) if quick else LinkTraining(2, 2048, 6)]
