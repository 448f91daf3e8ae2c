"""Plots of a run, for a reader who gives them five seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, ORANGE, GREEN, RED, PINK = "#1b2a6b", "#5b7bd5", "#f5a623", "#2a9d8f", "#d1495b", "#e89aa5"
_LINE = "#c0392b"


def new_figure(result: Mapping[str, Any], title: str, width: float, height: float) -> Figure:
    """Return a figure whose title names the machine."""
    figure = Figure(figsize=(width, height), layout="constrained")
    quick = "   [quick run at toy sizes]" if result["quick"] else ""
    machine = result["machine"]
    figure.suptitle(f"{title}\n{machine['cpu']}, {machine['cores']} cores{quick}", fontsize=12, fontweight="bold")
    return figure


def ratio_bars(
    axes: Axes,
    works: Mapping[str, Mapping[str, Mapping[str, float]]],
    colors: Mapping[str, str],
    goals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Draw a group of bars for each work, from 1 to a ratio; return a handle of each kind of bar, for a legend.

    Args:
        axes: where.
        works: label of each work, and its ratios by the name of the bar.
        colors: of each name.
        goals: ratio that a work is to reach, by its label.
    """
    handles: dict[str, Any] = {}
    height = 0.8 / max(1, *(len(found) for found in works.values())) if works else 0.8
    ends = [1.0]
    for index, (work, found) in enumerate(works.items()):
        for place, (name, ratio) in enumerate(found.items()):
            y, median = index + (place - (len(found) - 1) / 2) * height, ratio["median"]
            handles[name] = axes.barh(y, median - 1, left=1, height=height, color=colors[name])
            axes.plot([ratio["min"], ratio["max"]], [y, y], color="#777777", linewidth=1)
            label(axes, f"{median:.2g}×" if median < 10 else f"{median:.0f}×", max(1, ratio["max"]), y, fontsize=8)
            ends += [ratio["min"], ratio["max"]]
        if goals and work in goals and found:
            [handles["goal"]] = axes.plot([goals[work]] * 2, [index - 0.4, index + 0.4], color=_LINE, linewidth=2)
            ends.append(goals[work])
        if not found:
            label(axes, "not measured", 1, index, fontsize=8, fontweight="normal", color="#555555")
    axes.set_xscale("log")
    # With room for the labels behind the bars.
    axes.set_xlim(min(ends) / 1.3, max(ends) * 2.5)
    axes.axvline(1, color=_LINE, linewidth=1.4, linestyle="--", zorder=3)
    axes.set_yticks(range(len(works)), list(works))
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    finish(axes)
    return handles


def heat_map(axes: Axes, ratios: Sequence[Sequence[float | None]], norm: Normalize) -> None:
    """Draw ratios as a table of colored cells; what is None stays empty.

    Args:
        axes: where.
        ratios: of each row, of each column.
        norm: of the ratios' logarithms to base 2.
    """
    table = np.array([[np.nan if ratio is None else np.log2(ratio) for ratio in row] for row in ratios])
    axes.imshow(table, norm=norm, cmap="RdBu", aspect="auto")
    for y, row in enumerate(ratios):
        for x, ratio in enumerate(row):
            if ratio is not None:
                strong = abs(norm(np.log2(ratio)) - 0.5) > 0.35
                text = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
                axes.annotate(
                    text, (x, y), ha="center", va="center", fontsize=6.5, color="white" if strong else "black"
                )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def finish(axes: Axes) -> None:
    """Draw a grid behind what is drawn, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, text: str, x: float, y: float, **style: Any) -> None:
    """Write a text to the right of a place."""
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        **{"fontsize": 9, "fontweight": "bold", **style},
    )  # fmt: skip
