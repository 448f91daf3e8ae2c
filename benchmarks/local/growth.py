"""Growth: how the cost of a call grows with the keys, with the elements of a key, and with the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import plot
from benchmarks.common.report import ms_text, section
from benchmarks.common.runner import Here, progress
from benchmarks.common.work import Rule, Work
from benchmarks.local.contenders import TensorKV

# Enough for a timer that is worth believing, little enough for two minutes in all.
_SECONDS_PER_POINT = 0.3
_QUICK_SECONDS_PER_POINT = 0.01
_MOST_CALLS = 300
_COLORS = {"assign": plot.BLUE, "momentum": plot.RED}
_RULES = {"assign": "assign", "momentum": "SGD with momentum"}


def measure(arrays: str, *, quick: bool) -> list[dict[str, Any]]:
    """Return the lines of the plot: what grows, by which rule, the points and the slope of their upper half."""
    seconds = _QUICK_SECONDS_PER_POINT if quick else _SECONDS_PER_POINT
    rules: tuple[Rule, ...] = ("assign", "momentum")
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
    ours = Here(partial(TensorKV, arrays=arrays))
    ours.build(work)
    try:
        ours.warm_up("pushpull", work.warm_up)
        ours.renew()
        once = ours.time("pushpull")
        calls = int(min(_MOST_CALLS, max(3, seconds / once)))
        times = [ours.time("pushpull") for _ in range(calls)]
        ours.check()
    finally:
        ours.close()
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


def section_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of the report."""
    rows = []
    for line in lines:
        first, last = line["points"][0], line["points"][-1]
        cells = [f"{first['x']:,} → {last['x']:,}", f"{ms_text(first['ms'])} → {ms_text(last['ms'])}"]
        rows.append([line["title"], line["rule"], *cells, f"{line['slope']:.2f}"])
    return section(
        "How the cost grows",
        "Median of `pushpull`. The slope is that of the upper half in a log-log plot: 1 is proportional.",
        ["what grows", "rule", "from → to", "ms", "slope"],
        rows,
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw how the cost of a call grows, the slope written at each line."""
    lines = result["growth"]
    titles = list(dict.fromkeys(line["title"] for line in lines))
    figure = plot.new_figure(result, "Cost of a call (slope of the upper half; 1 is proportional)", 14, 5)
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, title in zip(panels, titles, strict=True):
        own = [line for line in lines if line["title"] == title]
        # The upper of two lines has its slope written above it, the lower one below.
        own.sort(key=lambda line: line["points"][-1]["ms"])
        for line, above in zip(own, (False, True), strict=True):
            xs, ys = ([point[name] for point in line["points"]] for name in ("x", "ms"))
            color = _COLORS[line["rule"]]
            axes.plot(xs, ys, color=color, marker="o", markersize=4.5, linewidth=2, label=_RULES[line["rule"]])
            at, offset, side = (-1, (-8, 9), "right") if above else (-2, (12, -14), "left")
            axes.annotate(
                f"slope {line['slope']:.2f}", (xs[at], ys[at]), offset, textcoords="offset points",
                ha=side, color=color, fontsize=11, fontweight="bold",
            )  # fmt: skip
        low = own[0]["points"]
        axes.plot(
            [low[0]["x"], low[-1]["x"]],
            [low[-1]["ms"] * low[0]["x"] / low[-1]["x"] / 12, low[-1]["ms"] / 12],
            color="#999999", linewidth=1, linestyle=":", label="slope 1",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(title)
        axes.margins(x=0.1)
        if own[0]["points"][-1]["x"] < 100:
            ticks = [point["x"] for point in own[0]["points"]]
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        plot.finish(axes)
    panels[0].set_ylabel("ms of one pushpull (median)")
    fastest = min(point["ms"] for line in lines for point in line["points"])
    panels[0].set_ylim(bottom=fastest / 3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)
