"""Works of publishing weights, and what readers must hold after each version.

Needs NumPy alone, so that the process of a peer without torch can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.work import Floats, WrongResultError, count, short

# Bars: of the first contender, or of its changes.
PUBLISH_GOAL_MS = 5.0
VISIBLE_GOAL_MS = 5.0
PULL_GOAL_COPIES = 1.5
CHANGES_GOAL = 10.0
PAUSE_GOAL = 1 / 5
# Elements repeat after so many, a prime number: what lands in the wrong place is noticed.
_PATTERN = 97


@dataclass(frozen=True)
class Publishing:
    """Weights of which each version changes some elements, and readers that follow.

    Args:
        keys: how many.
        shape: of each key's value, float32.
        readers: how many.
        changed: the share of elements that a version changes, at random places.
        calls: 1; there is one version in a call.
        warm_up: how many versions are published before any is timed.
    """

    keys: int
    shape: tuple[int, ...]
    readers: int
    changed: float
    calls: int = 1
    warm_up: int = 3

    rule: ClassVar[str] = "assign"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Publishing(50, (1_000_000,), 3, 0.01).name
        '50 × 1M, 1 % changed, 3 readers'
        """
        changed = "all" if self.changed == 1 else f"{100 * self.changed:g} %"
        readers = f"{self.readers} reader{'' if self.readers == 1 else 's'}"
        return f"{self.keys:,} × {short(count(self.shape))}, {changed} changed, {readers}"

    @property
    def value_nbytes(self) -> int:
        """Of all keys' values together."""
        return 4 * self.keys * count(self.shape)

    def first(self) -> list[Floats]:
        """Return the first version, with memory that has been touched."""
        numbers = np.arange(count(self.shape), dtype=np.float32) % _PATTERN
        return [(numbers + key).reshape(self.shape) for key in range(self.keys)]

    def change(self, values: list[Floats], version: int) -> None:
        """Make a version of the one before it, in place."""
        if self.changed == 1:
            for value in values:
                value += 1
            return
        chance = np.random.default_rng(version)
        total, numel = self.keys * count(self.shape), count(self.shape)
        places = np.unique(chance.integers(total, size=round(self.changed * total)))
        borders = np.searchsorted(places, numel * np.arange(self.keys + 1))
        for key, value in enumerate(values):
            own = places[borders[key] : borders[key + 1]] - key * numel
            value.reshape(-1)[own] = (own % _PATTERN + version).astype(np.float32) / 128

    def check(self, values: list[Any], version: int) -> None:
        """Raise ``WrongResultError`` unless values are a version, bit by bit."""
        right = self.first()
        for number in range(1, version + 1):
            self.change(right, number)
        for key, (value, expected) in enumerate(zip(values, right, strict=True)):
            found = np.asarray(value)
            if found.tobytes() != expected.tobytes():
                at = int(np.argmax((found != expected).reshape(-1)))
                raise WrongResultError(
                    f"{self.name}: element {at} of key {key} is {found.reshape(-1)[at]!r} in version {version}, "
                    f"expected {expected.reshape(-1)[at]!r}"
                )


def publishings(*, quick: bool) -> list[Publishing]:
    """Return what is measured."""
    if quick:
        return [Publishing(20, (100,), 2, share, warm_up=1) for share in (0.01, 1.0)]
    return [
        Publishing(50, (1_000_000,), 1, 1.0),
        Publishing(50, (1_000_000,), 3, 1.0),
        Publishing(50, (1_000_000,), 1, 0.01),
        Publishing(50, (1_000_000,), 3, 0.01),
        Publishing(5000, (10_000,), 3, 0.01),
    ]
