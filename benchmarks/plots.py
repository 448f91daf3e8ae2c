"""Plots of a run, for a reader who gives them five seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from works import VERBS

_COLORS = {"push+pull": "#1b2a6b", "pushpull": "#f5a623", "assign": "#1b2a6b", "sgd": "#d1495b"}
_RULES = {"assign": "assign", "sgd": "SGD with momentum"}
_BAR = 0.38
# Below this, a work is all calls and no memory; its distance to the limit would only stretch the axis.
_TINY_NBYTES = 10_000


def comparison(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio to MXNet (or to plain torch, if MXNet was not measured) and the distance to the limit."""
    works = result["works"]
    peer = "torch" if "mxnet" in result["missing"] else "mxnet"
    figure = Figure(figsize=(13, 1.6 + 0.8 * len(works)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_ratios(left, works, peer)
    _draw_limits(right, works)
    left.set_yticks(range(len(works)), [work["name"].replace(", ", "\n", 1) for work in works])
    # From top to bottom, with room above for what the dashed lines are.
    left.set_ylim(len(works) - 0.5, -0.85)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    quick = "   [quick run at toy sizes]" if result["quick"] else ""
    figure.suptitle(
        f"tensorkv on one machine: {result['machine']['cpu']}, {result['machine']['cores']} cores{quick}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _draw_ratios(axes: Axes, works: Sequence[Mapping[str, Any]], peer: str) -> None:
    farthest = 1.0
    for place, verb in enumerate(VERBS):
        found = [work["summary"][verb]["ratios"][peer] for work in works]
        ys = [index + (place - 0.5) * _BAR for index in range(len(works))]
        medians = [each["median"] for each in found]
        around = [
            [max(0.0, each["median"] - each["min"]) for each in found],
            [max(0.0, each["max"] - each["median"]) for each in found],
        ]
        axes.barh(ys, medians, height=_BAR, color=_COLORS[verb], label=verb)
        axes.errorbar(medians, ys, xerr=around, fmt="none", ecolor="#777777", elinewidth=1, capsize=2.5)
        for y, each in zip(ys, found, strict=True):
            label(axes, f"{each['median']:.1f}×", max(each["median"], each["max"]), y)
        farthest = max([farthest, *(each["max"] for each in found)])
    finish(axes, farthest, f"as fast as {NAMES[peer]}")
    axes.set_title(f"Times faster than {NAMES[peer]}\nmedian; whiskers: least and largest of a repetition", fontsize=11)
    axes.set_xlabel(f"time of {NAMES[peer]} ÷ time of tensorkv   (longer is better)")


def _draw_limits(axes: Axes, works: Sequence[Mapping[str, Any]]) -> None:
    farthest = 1.0
    for place, verb in enumerate(VERBS):
        for index, work in enumerate(works):
            y = index + (place - 0.5) * _BAR
            if work["moved_nbytes"] < _TINY_NBYTES:
                text = f"a call's cost alone: {1e3 * work['summary'][verb]['spread']['tensorkv']['p50_ms']:.0f} µs"
                label(axes, text, 0, y, fontweight="normal", color="#555555")
                continue
            times = work["summary"]["times_limit"][verb]
            axes.barh(y, times, height=_BAR, color=_COLORS[verb])
            label(axes, f"{times:.1f}×", times, y)
            farthest = max(farthest, times)
    finish(axes, farthest, "the limit")
    axes.set_title("Distance to the limit of the memory\n1× = bytes to move ÷ copy bandwidth", fontsize=11)
    axes.set_xlabel("time of tensorkv ÷ limit   (shorter is better)")


def label(axes: Axes, text: str, x: float, y: float, **style: Any) -> None:
    """Write a text to the right of a place."""
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        **{"fontsize": 9, "fontweight": "bold", **style},
    )  # fmt: skip


def finish(axes: Axes, farthest: float, line: str) -> None:
    """Draw the line at 1, say what it is, and leave room for labels."""
    axes.axvline(1, color="#c0392b", linewidth=1.4, linestyle="--", zorder=3)
    axes.annotate(
        line, (1, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
        va="top", fontsize=8.5, color="#c0392b",
    )  # fmt: skip
    axes.set_xlim(0, farthest * 1.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def growth(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how the cost of a call grows, the slope written at each line."""
    titles = list(dict.fromkeys(line["title"] for line in lines))
    figure = Figure(figsize=(14, 5), layout="constrained")
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
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms of one pushpull (median)")
    fastest = min(point["ms"] for line in lines for point in line["points"])
    panels[0].set_ylim(bottom=fastest / 3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("How the cost of one call grows (slope of the upper half; 1 is proportional)", fontweight="bold")
    figure.savefig(path, dpi=130)
