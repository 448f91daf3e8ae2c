"""Growth: how the cost of a call grows with the keys, with the elements of a key, and with the parts."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from compare import WARM_UP_CALLS, progress
from contenders import TensorKV
from works import Rule, Work

# Enough for a timer that is worth believing, little enough for two minutes in all.
_SECONDS_PER_POINT = 0.3
_QUICK_SECONDS_PER_POINT = 0.01
_MOST_CALLS = 300


def measure(arrays: str, *, quick: bool) -> list[dict[str, Any]]:
    """Return the lines of the plot: what grows, by which rule, the points and the slope of their upper half."""
    seconds = _QUICK_SECONDS_PER_POINT if quick else _SECONDS_PER_POINT
    rules: tuple[Rule, ...] = ("assign", "sgd")
    return [_line(title, rule, axis, arrays, seconds) for title, axis in _axes(quick).items() for rule in rules]


def _axes(quick: bool) -> dict[str, list[tuple[int, tuple[int, int, int]]]]:
    """For each thing that grows: the sizes, and keys, elements and parts at each."""
    most = 2 if quick else 5
    keys = [10**power for power in range(most + 1)]
    elements = [10**power for power in range(4 if quick else 9)]
    parts = [1, 2, 4] if quick else [1, 2, 4, 8, 16]
    per_part = 10_000 if quick else 4_000_000
    return {
        "keys of 1000 elements": [(count, (count, 1000, 2)) for count in keys],
        "elements of one key": [(count, (1, count, 2)) for count in elements],
        f"parts of {per_part:,} elements": [(count, (1, per_part, count)) for count in parts],
    }


def _line(
    title: str, rule: Rule, axis: Sequence[tuple[int, tuple[int, int, int]]], arrays: str, seconds: float
) -> dict[str, Any]:
    points = []
    for x, (keys, elements, parts) in axis:
        progress(f"growth, {title}, {rule}: {x:,}")
        points.append({"x": x, **_point(Work(keys, (elements,), parts, rule), arrays, seconds)})
    return {"title": title, "rule": rule, "points": points, "slope": slope(points)}


def _point(work: Work, arrays: str, seconds: float) -> dict[str, Any]:
    ours = TensorKV(work, arrays)
    try:
        ours.time("pushpull", WARM_UP_CALLS)
        ours.renew()
        once = ours.time("pushpull")
        calls = int(min(_MOST_CALLS, max(3, seconds / once)))
        times = [ours.time("pushpull") for _ in range(calls)]
        ours.check()
    finally:
        ours.close()
        del ours
        gc.collect()
    return {"ms": 1e3 * median(times), "fastest_ms": 1e3 * min(times), "calls": calls}


def slope(points: Sequence[dict[str, Any]]) -> float:
    """Return the slope of the least-squares line through the upper half of the points, in logarithms.

    >>> round(slope([{"x": x, "ms": 5 * x} for x in (1, 10, 100, 1000)]), 6)
    1.0
    """
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    xs = [math.log(point["x"]) for point in upper]
    ys = [math.log(point["ms"]) for point in upper]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / across
