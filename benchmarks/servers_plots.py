"""The plot of parameter servers, for a reader who gives it five seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import label
from servers_contenders import NAMES
from servers_report import by_size
from servers_works import GOALS

_COLORS = {"mxnet1": "#1b2a6b", "mxnet2": "#5b7bd5", "process": "#2a9d8f", "disk": "#f5a623"}
_SERVERS = ("#1b2a6b", "#d1495b", "#f5a623", "#2a9d8f", "#777777")
_GOAL = "#c0392b"
_BAR = 0.36


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw ratios to MXNet and the price of durability above, how servers grow below."""
    sizes = by_size(result["growth"])
    figure = Figure(figsize=(14, 9), layout="constrained")
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2)
    _draw_ratios(
        left, result["works"], "Times faster than MXNet with as many servers", "time of MXNet ÷ time of tensorkv"
    )
    _draw_ratios(right, result["durability"], "What durability costs", "time with a log ÷ time in memory", best=-1)
    panels = below.subplots(1, max(1, len(sizes)), squeeze=False)[0]
    for axes, (size, points) in zip(panels, sizes.items(), strict=False):
        _draw_growth(axes, size, points)
    if not sizes:
        label(panels[0], "growth: not measured", 0, 0.5, fontweight="normal")
    quick = "   [quick run at toy sizes]" if result["quick"] else ""
    figure.suptitle(
        f"Parameter servers: {result['machine']['cpu']}, {result['machine']['cores']} cores{quick}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _draw_ratios(axes: Axes, works: Sequence[Mapping[str, Any]], title: str, what: str, best: int = 1) -> None:
    drawn: dict[str, Any] = {}
    ends = [1.0]
    for index, work in enumerate(works):
        found = work["summary"]["ratios"]
        for place, (name, ratio) in enumerate(found.items()):
            y = index + (place - (len(found) - 1) / 2) * _BAR
            drawn[name] = axes.barh(y, ratio["median"] - 1, left=1, height=_BAR, color=_COLORS[name])
            axes.plot([ratio["min"], ratio["max"]], [y, y], color="#777777", linewidth=1)
            label(axes, f"{ratio['median']:.2g}×", max(1, ratio["max"]), y, fontsize=8)
            ends += [ratio["min"], ratio["max"]]
        goal = GOALS.get(work["name"])
        if goal is not None and found:
            [line] = axes.plot([goal, goal], [index - _BAR, index + _BAR], color=_GOAL, linewidth=2)
            drawn["goal"] = line
            ends.append(goal)
        if not found:
            label(axes, "not measured", 1, index, fontsize=8, fontweight="normal", color="#555555")
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 1.3, max(ends) * 2)
    axes.axvline(1, color="#555555", linewidth=1.2, linestyle="--", zorder=3)
    names = [work["name"].rpartition(": ")[2].split(", ")[0] for work in works]
    axes.set_yticks(range(len(works)), names)
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{what}   ({'longer' if best > 0 else 'shorter'} is better)", fontsize=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    if drawn:
        axes.legend(drawn.values(), [NAMES.get(name, name) for name in drawn], fontsize=8, frameon=False)
    _finish(axes)


def _draw_growth(axes: Axes, size: str, points: Sequence[Mapping[str, Any]]) -> None:
    for color, count in zip(_SERVERS, dict.fromkeys(point["servers"] for point in points), strict=False):
        own = [point for point in points if point["servers"] == count]
        axes.plot(
            [point["workers"] for point in own], [point["updates_per_s"] for point in own], marker="o", color=color,
            linewidth=2, label=f"{count} server{'' if count == 1 else 's'}",
        )  # fmt: skip
    workers = sorted({point["workers"] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(workers, [str(count) for count in workers])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"{size}: updates a second, of all workers together", fontsize=11)
    axes.set_xlabel("workers at once")
    axes.legend(fontsize=8, frameon=False)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
