"""Works of parameter servers, and what must be there when workers have pushed the same gradients in any order.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.common.work import FIRST, TOLERANCE, Work, WrongResultError, right_slices


@dataclass(frozen=True)
class Serving(Work):
    """Some keys on servers, to each of which every worker pushes the same part, and pulls what there is.

    Args:
        topic: what is asked; stands in front of the name.
    """

    topic: str = ""

    pusher: ClassVar[str] = "worker"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Serving(1, (25_000_000,), 2, "momentum").name
        '1 × 25M, 2 workers, SGD momentum 0.9'
        """
        return f"{self.topic}{': ' if self.topic else ''}{super().name}"


def beside_peers(*, quick: bool) -> list[Serving]:
    """Return what is measured beside peers."""
    if quick:
        return [
            Serving(20, (100,), 2, "momentum", calls=2, topic="MXNet"),
            Serving(1, (2, 3), 2, "momentum", calls=10, topic="MXNet"),
        ]
    return [
        Serving(1, (25_000_000,), 2, "momentum", topic="MXNet"),
        Serving(160, (160_000,), 2, "momentum", topic="MXNet"),
        Serving(1000, (1000,), 2, "momentum", calls=10, topic="MXNet"),
        Serving(1, (2, 3), 2, "momentum", calls=200, topic="MXNet"),
    ]


def durability(*, quick: bool) -> list[Serving]:
    """Return what is measured with servers that keep what they have in a folder."""
    if quick:
        return [Serving(1, (1000,), 2, "momentum", topic="durability")]
    return [
        # Until snapshots come at their steady rate.
        Serving(1, (25_000_000,), 2, "momentum", warm_up=10, topic="durability"),
        Serving(1000, (1000,), 2, "momentum", calls=10, warm_up=60, topic="durability"),
    ]


def growth(workers: int, *, quick: bool) -> list[Serving]:
    """Return what is measured with this many workers, and several numbers of servers."""
    if quick:
        return [Serving(20, (100,), workers, "momentum", calls=2, topic="growth")]
    return [
        Serving(1, (25_000_000,), workers, "momentum", topic="growth"),
        Serving(1000, (1000,), workers, "momentum", calls=10, topic="growth"),
    ]


def recovery(*, quick: bool) -> Serving:
    """Return what a server holds that is killed."""
    return Serving(10, (1000 if quick else 25_000_000,), 1, topic="recovery")


def readers(count: int, *, quick: bool) -> Serving:
    """Return the value that so many workers read."""
    return Serving(1, (100_000 if quick else 25_000_000,), count, topic="readers")


# What one worker has to wait for beside MXNet with as many servers, at least so many times faster; and how many times
# slower than in memory alone a durable store may be.
GOALS = {
    "MXNet: 1 × 25M, 2 workers, SGD momentum 0.9": 4.0,
    "MXNet: 160 × 160k, 2 workers, SGD momentum 0.9": 2.5,
    "MXNet: 1000 × 1000, 2 workers, SGD momentum 0.9": 20.0,
    "MXNet: one 2×3 key, 2 workers, SGD momentum 0.9": 0.7,
    "durability: 1 × 25M, 2 workers, SGD momentum 0.9": 2.0,
    "durability: 1000 × 1000, 2 workers, SGD momentum 0.9": 1.3,
}
RECOVERY_GOAL_S = 15.0


def check(
    work: Serving, outs: Callable[[int], npt.NDArray[Any]], least: int, most: int, who: str = "the last pull"
) -> None:
    """Raise unless pulled values are what the same gradient gives in so many steps.

    All gradients of a key are alike, so the order in which they come changes nothing, nor their momentum. Only how
    many have come before a pull is open: at least those of the worker itself, at most those of all.

    Args:
        work: what was done, by SGD.
        outs: of a key's index, what was pulled.
        least, most: how many steps may have been made.
        who: pulled, for the message.

    Raises:
        WrongResultError: naming the first key that is wrong.
    """
    alone = replace(work, parts=1)
    for key in range(work.keys):
        out = np.asarray(outs(key))
        if out.shape != work.shape or out.dtype != np.float32:
            raise WrongResultError(f"{work.name}: key {key} came out as {out.dtype} of shape {out.shape}")
        slices = zip(right_slices(alone, key, least, 1), right_slices(alone, key, most, 1), strict=True)
        for (start, above), (_, below) in slices:
            piece = out.reshape(-1)[start : start + len(above)]
            # Steps only go down. What was rounded is in proportion to the way.
            rounded = TOLERANCE * (2 * FIRST - below)
            good = (piece >= below - rounded) & (piece <= above + rounded)
            if not good.all():
                at = int(np.argmin(good))
                raise WrongResultError(
                    f"{work.name}: {who}: element {start + at} of key {key} is {piece[at]!r}, expected "
                    f"{below[at]!r} to {above[at]!r}, that is {least} to {most} steps"
                )
