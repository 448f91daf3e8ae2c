"""Works: what is measured, with inputs and right results that every process can make by itself.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rule = Literal["assign", "sgd", "momentum", "adamw", "adagrad"]
Verb = Literal["push", "push+pull", "pushpull", "first", "changing"]

VERBS: tuple[Verb, ...] = ("push+pull", "pushpull")
# Small enough that no element stops changing in float32 after some thousand steps, large enough to see one step.
LR = 0.001
MOMENTUM = 0.9
ADAM_EPS = 1e-8
# What each rule is called in tables, and which optimizer it is, with which options, for tensorkv and for torch.optim.
RULES: dict[Rule, tuple[str, str, dict[str, float]]] = {
    "assign": ("assign", "", {}),
    "sgd": ("SGD", "sgd", {"lr": LR}),
    "momentum": (f"SGD momentum {MOMENTUM}", "sgd", {"lr": LR, "momentum": MOMENTUM}),
    # Without decay it is MXNet's Adam, too.
    "adamw": ("AdamW", "adamw", {"lr": LR, "weight_decay": 0.0}),
    "adagrad": ("Adagrad", "adagrad", {"lr": LR}),
}
# Tensors that a step reads or writes, beside the parts: the value, and the optimizer's state.
_STEP_TENSORS: dict[Rule, int] = {"assign": 1, "sgd": 2, "momentum": 4, "adamw": 6, "adagrad": 4}
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
        rule: the sum replaces the value, or is the gradient of a step of an optimizer.
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
        rule = RULES[self.rule][0]
        if len(self.shape) > 1:
            size = "×".join(map(str, self.shape)) + (" key" if self.keys == 1 else "")
            return f"{'one' if self.keys == 1 else f'{self.keys:,} of'} {size}, {parts}, {rule}"
        return f"{self.keys} × {short(self.elements)}, {parts}, {rule}"

    @property
    def elements(self) -> int:
        """Of one key's value."""
        return count(self.shape)

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of each key's value."""
        return [self.shape] * self.keys

    @property
    def value_nbytes(self) -> int:
        """Of all keys' values together."""
        return 4 * sum(map(count, self.shapes))

    @property
    def moved_nbytes(self) -> int:
        """Bytes that must cross between memory and processor for a push and a pull of all keys.

        Each part is read once and each out written once. Assignment writes the value; a step reads and
        writes the value and the optimizer's state.
        """
        return (self.parts + _STEP_TENSORS[self.rule] + 1) * self.value_nbytes


def count(shape: tuple[int, ...]) -> int:
    """Return the elements of a shape."""
    return math.prod(shape)


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


def make_parts(work: Work, wanted: Sequence[int]) -> list[list[Floats]]:
    """Return parts of each key: multiples of 1/8, so that the right sum has no rounding.

    Args:
        work: what they are for.
        wanted: indices of the parts.
    """
    ramp = np.arange(_PATTERN, dtype=np.float32)
    return [
        [_repeat((ramp + 1 + part + key % _SHIFTS) / 8, shape) for part in wanted]
        for key, shape in enumerate(work.shapes)
    ]


def first_values(work: Work) -> list[Floats]:
    """Return what the keys are initialised with."""
    values = {shape: np.full(shape, FIRST, np.float32) for shape in set(work.shapes)}
    return [values[shape] for shape in work.shapes]


def new_outs(work: Work) -> list[Floats]:
    """Return arrays for the results, touched once, so that their memory is there."""
    return [np.zeros(shape, np.float32) for shape in work.shapes]


def check(work: Work, steps: int, scale: int, outs: Callable[[int], npt.NDArray[Any]]) -> None:
    """Raise unless the pulled values are what they have to be.

    Args:
        work: what was done.
        steps: how many updates each key has had, by the parts as they were made.
        scale: by what the parts have been multiplied since; 1 for a step.
        outs: of a key's index, what was pulled.

    Raises:
        WrongResultError: naming the first key that is wrong.
    """
    # Of thousands of small keys, many have the same result.
    known: dict[tuple[tuple[int, ...], int], list[tuple[int, Floats]]] = {}
    for key, shape in enumerate(work.shapes):
        out = np.asarray(outs(key))
        if out.shape != shape or out.dtype != np.float32:
            raise WrongResultError(f"{work.name}: key {key} came out as {out.dtype} of shape {out.shape}")
        slices: Iterable[tuple[int, Floats]] = right_slices(work, key, steps, scale)
        if count(shape) < _SLICE:
            kind = shape, key % _SHIFTS
            slices = known[kind] if kind in known else known.setdefault(kind, list(slices))
        for start, right in slices:
            piece = out.reshape(-1)[start : start + len(right)]
            good = piece == right if work.rule == "assign" else is_near(piece, right, steps)
            if not good.all():
                at = int(np.argmin(good))
                raise WrongResultError(
                    f"{work.name}: element {start + at} of key {key} is {piece[at]!r}, expected {right[at]!r}"
                )


def is_near(found: npt.NDArray[Any], right: Floats, steps: int) -> npt.NDArray[np.bool_]:
    """Tell of each element whether it can be what float32 makes of so many steps of an optimizer.

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
    right = np.asarray(_right_patterns(work.rule, work.parts, steps, scale)[key % _SHIFTS], np.float32)
    elements = count(work.shapes[key])
    length = _PATTERN * max(1, min(_SLICE, elements) // _PATTERN + 1)
    right = np.tile(right, length // _PATTERN)
    for start in range(0, elements, length):
        yield start, right[: elements - start]


@lru_cache(maxsize=4)
def _right_patterns(rule: Rule, parts: int, steps: int, scale: int) -> npt.NDArray[np.float64]:
    """Return what becomes of each shift of the pattern, in float64."""
    ramp, shifts = np.arange(_PATTERN, dtype=np.float64), np.arange(_SHIFTS)[:, None]
    total = scale * (parts * (ramp + 1 + shifts) + parts * (parts - 1) / 2) / 8
    if rule == "assign":
        return total
    # The gradient is the same at every step. It makes the momentum a geometric series, and Adam's two means,
    # corrected for their start, the gradient and its square.
    counts = np.arange(1, steps + 1)
    if rule == "sgd":
        way = steps * total
    elif rule == "momentum":
        way = np.sum((1 - MOMENTUM**counts) / (1 - MOMENTUM)) * total
    elif rule == "adamw":
        way = steps * total / (np.abs(total) + ADAM_EPS)
    else:
        way = np.sum(1 / np.sqrt(counts)) * np.sign(total)
    return FIRST - LR * way


def _repeat(pattern: npt.NDArray[np.floating[Any]], shape: tuple[int, ...]) -> Floats:
    whole = np.empty(count(shape), np.float32)
    fits = whole.size // _PATTERN * _PATTERN
    whole[:fits].reshape(-1, _PATTERN)[...] = pattern
    whole[fits:] = pattern[: whole.size - fits]
    return whole.reshape(shape)
