"""Works: what is measured, with inputs and right results that every process can make by itself.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rule = Literal["assign", "sgd"]
Verb = Literal["push", "push+pull", "pushpull"]

VERBS: tuple[Verb, ...] = ("push+pull", "pushpull")
# Small enough that no element stops changing in float32 after some thousand steps, large enough to see one step.
LR = 0.001
MOMENTUM = 0.9
FIRST = 0.5
TOLERANCE = 1e-4

# A prime number of different elements: what lands in the wrong place is noticed.
_PATTERN = 97
_SHIFTS = 13
_SLICE = 1 << 20


class WrongResultError(Exception):
    """A contender's result is not what it has to be; its times mean nothing."""


@dataclass(frozen=True)
class Work:
    """Some keys of one shape, and what one call does to all of them.

    Args:
        keys: how many.
        shape: of each key's value, float32.
        parts: how many parts are pushed to each key.
        rule: the sum replaces the value, or is the gradient of a step of SGD with momentum.
        calls: how many calls are timed together as one repetition.
        warm_up: how many calls are made before any is timed.
    """

    keys: int
    shape: tuple[int, ...]
    parts: int
    rule: Rule = "assign"
    calls: int = 1
    warm_up: int = 6

    # Who pushes a part, in the name.
    pusher: ClassVar[str] = "part"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it."""
        parts = f"{self.parts} {self.pusher}{'' if self.parts == 1 else 's'}"
        rule = "assign" if self.rule == "assign" else f"SGD momentum {MOMENTUM}"
        if len(self.shape) > 1:
            size = "×".join(map(str, self.shape)) + (" key" if self.keys == 1 else "")
            return f"{'one' if self.keys == 1 else f'{self.keys:,} of'} {size}, {parts}, {rule}"
        return f"{self.keys} × {short(self.elements)}, {parts}, {rule}"

    @property
    def elements(self) -> int:
        """Of one key's value."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def value_nbytes(self) -> int:
        """Of all keys' values together."""
        return 4 * self.keys * self.elements

    @property
    def moved_nbytes(self) -> int:
        """Bytes that must cross between memory and processor for a push and a pull of all keys.

        Each part is read once and each out written once. Assignment writes the value; a step reads and
        writes the value and its momentum.
        """
        update = 1 if self.rule == "assign" else 4
        return (self.parts + update + 1) * self.value_nbytes


def short(count: int) -> str:
    """Return a count as people say it.

    >>> [short(count) for count in (1, 1000, 65_536, 160_000, 25_000_000)]
    ['1', '1000', '65,536', '160k', '25M']
    """
    if count >= 1_000_000 and count % 100_000 == 0:
        return f"{count / 1e6:g}M"
    if count >= 10_000 and count % 1000 == 0:
        return f"{count // 1000}k"
    return str(count) if count < 10_000 else f"{count:,}"


def make_parts(work: Work, only: int | None = None) -> list[list[Floats]]:
    """Return the parts of each key: multiples of 1/8, so that the right sum has no rounding.

    Args:
        work: what they are for.
        only: the index of the one part of each key to make; None makes all.
    """
    ramp = np.arange(_PATTERN, dtype=np.float32)
    wanted = range(work.parts) if only is None else (only,)
    return [[_repeat((ramp + 1 + part + key % _SHIFTS) / 8, work) for part in wanted] for key in range(work.keys)]


def first_values(work: Work) -> list[Floats]:
    """Return what the keys are initialised with."""
    return [np.full(work.shape, FIRST, np.float32)] * work.keys


def new_outs(work: Work) -> list[Floats]:
    """Return arrays for the results, touched once, so that their memory is there."""
    return [np.zeros(work.shape, np.float32) for _ in range(work.keys)]


def check(work: Work, steps: int, scale: int, outs: Callable[[int], npt.NDArray[Any]]) -> None:
    """Raise unless the pulled values are what they have to be.

    Args:
        work: what was done.
        steps: how many updates each key has had, by the parts as they were made.
        scale: by what the parts have been multiplied since; 1 for SGD.
        outs: of a key's index, what was pulled.

    Raises:
        WrongResultError: naming the first key that is wrong.
    """
    for key in range(work.keys):
        out = np.asarray(outs(key))
        if out.shape != work.shape or out.dtype != np.float32:
            raise WrongResultError(f"{work.name}: key {key} came out as {out.dtype} of shape {out.shape}")
        for start, right in right_slices(work, key, steps, scale):
            piece = out.reshape(-1)[start : start + len(right)]
            good = piece == right if work.rule == "assign" else is_near(piece, right, steps)
            if not good.all():
                at = int(np.argmin(good))
                raise WrongResultError(
                    f"{work.name}: element {start + at} of key {key} is {piece[at]!r}, expected {right[at]!r}"
                )


def is_near(found: npt.NDArray[Any], right: Floats, steps: int) -> npt.NDArray[np.bool_]:
    """Tell of each element whether it can be what float32 makes of so many steps of SGD.

    The bound is of the terms, the first value and the way from it: where they cancel, the result is next to nothing,
    and the roundings are still those of the terms. Each step rounds the value once; the constants, in float32 too,
    and the roundings of the momentum, ten times as large in what they lead to, count like 32 more. Far below what a
    missing step changes.

    >>> right = np.array([0.0, -1.0], np.float32)
    >>> is_near(np.array([2e-7, -1.00001], np.float32), right, 409).tolist()
    [True, True]
    >>> is_near(np.array([1.25e-3, -1.00125], np.float32), right, 409).tolist()
    [False, False]
    """
    terms = FIRST + np.abs(FIRST - right.astype(np.float64))
    relative = min(TOLERANCE, (steps + 32) * float(np.finfo(np.float32).eps) / 2)
    return np.asarray(np.abs(found.astype(np.float64) - right) <= relative * terms)


def right_slices(work: Work, key: int, steps: int, scale: int) -> Iterator[tuple[int, Floats]]:
    """Yield the right result of a key in pieces that start at multiples of the pattern's length.

    Args:
        work, steps, scale: as for ``check``.
        key: its index.
    """
    ramp = np.arange(_PATTERN, dtype=np.float64)
    shifts = [1 + part + key % _SHIFTS for part in range(work.parts)]
    total = scale * (len(shifts) * ramp + sum(shifts)) / 8
    if work.rule == "sgd":
        # The gradient is the same at every step, so the momentum is a geometric series of it.
        grown: float = sum((1 - MOMENTUM**step) / (1 - MOMENTUM) for step in range(1, steps + 1))
        total = FIRST - LR * grown * total
    length = _PATTERN * max(1, min(_SLICE, work.elements) // _PATTERN + 1)
    right = np.tile(np.asarray(total, np.float32), length // _PATTERN)
    for start in range(0, work.elements, length):
        yield start, right[: work.elements - start]


def _repeat(pattern: npt.NDArray[np.floating[Any]], work: Work) -> Floats:
    whole = np.empty(work.elements, np.float32)
    fits = work.elements // _PATTERN * _PATTERN
    whole[:fits].reshape(-1, _PATTERN)[...] = pattern
    whole[fits:] = pattern[: work.elements - fits]
    return whole.reshape(work.shape)
