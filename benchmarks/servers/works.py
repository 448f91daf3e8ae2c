"""Works of parameter servers, and what must be there when workers have pushed the same gradients in any order.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.common.work import FIRST, TOLERANCE, Floats, Work, WrongResultError, right_slices, short


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


def recoveries(*, quick: bool) -> list[Serving]:
    """Return what servers hold that are killed."""
    return [Serving(10, (numel,), 1, topic="recovery") for numel in ([1000] if quick else [1000, 25_000_000])]


def readers(count: int, *, quick: bool) -> Serving:
    """Return the value that so many workers read."""
    return Serving(1, (1_000_000 if quick else 25_000_000,), count, topic="readers")


# How many batches of rows take turns. Steps are multiples of a power of 2, so that the right rows have no rounding.
BATCHES = 20
TABLE_LR = 2.0**-10


@dataclass(frozen=True)
class Table:
    """A table of which a worker pulls some rows and steps them by SGD, other rows in each call.

    Args:
        rows: how many the table has.
        dim: elements of a row, float32.
        batch: how many rows a call pulls and steps.
        calls: how many calls are timed together as one repetition.
        warm_up: how many calls are made before any is timed.
    """

    rows: int
    dim: int
    batch: int
    calls: int = BATCHES
    warm_up: int = BATCHES

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> Table(200_000, 64, 4096).name
        'tables: 4096 of 200k rows of 64, SGD'
        """
        return f"tables: {self.batch} of {short(self.rows)} rows of {self.dim}, SGD"

    @property
    def value_nbytes(self) -> int:
        """Of the whole table."""
        return 4 * self.rows * self.dim

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """Return the rows of a batch, in rising order, none twice."""
        return np.sort(np.random.default_rng(number).permutation(self.rows)[: self.batch])

    def gradients(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Return the gradients of rows, the same in each batch: multiples of 1/8."""
        return (((ids[:, None] + np.arange(self.dim)) % 97 + 1) / 8).astype(np.float32)

    def check(self, found: npt.NDArray[Any], ids: npt.NDArray[np.int64], calls: int, who: str) -> None:
        """Raise unless rows are what so many calls leave.

        Args:
            found: the rows.
            ids: which ones they are.
            calls: how many calls there were before, batch after batch.
            who: pulled, for the message.

        Raises:
            WrongResultError: naming the first row that is wrong.
        """
        steps = np.zeros(self.rows, np.float32)
        for number in range(min(calls, BATCHES)):
            steps[self.ids(number)] += len(range(number, calls, BATCHES))
        right = np.float32(FIRST) - np.float32(TABLE_LR) * steps[ids][:, None] * self.gradients(ids)
        if found.shape != right.shape or found.dtype != right.dtype:
            raise WrongResultError(f"{self.name}: {who}: {found.dtype} of shape {found.shape}")
        wrong = np.flatnonzero((found != right).any(axis=1))
        if wrong.size:
            at = wrong[0]
            raise WrongResultError(f"{self.name}: {who}: row {ids[at]} is {found[at]}, expected {right[at]}")


def tables(*, quick: bool) -> list[Table]:
    """Return what is measured of tables beside peers."""
    if quick:
        return [Table(1000, 4, 100, calls=2, warm_up=2)]
    return [Table(200_000, 64, 4096), Table(200_000, 64, 256), Table(200_000, 8, 4096)]


# What one worker has to wait for beside MXNet with as many servers, at least so many times faster; and how many times
# slower than in memory alone a durable store may be.
GOALS = {
    "MXNet: 1 × 25M, 2 workers, SGD momentum 0.9": 4.0,
    "MXNet: 160 × 160k, 2 workers, SGD momentum 0.9": 2.5,
    "MXNet: 1000 × 1000, 2 workers, SGD momentum 0.9": 20.0,
    "MXNet: one 2×3 key, 2 workers, SGD momentum 0.9": 0.7,
    "tables: 4096 of 200k rows of 64, SGD": 5.0,
    "tables: 256 of 200k rows of 64, SGD": 5.0,
    "tables: 4096 of 200k rows of 8, SGD": 5.0,
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
