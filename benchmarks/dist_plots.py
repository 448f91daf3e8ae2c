"""The plot of processes in step, for a reader who gives it five seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_contenders import NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from plots import label

_COLORS = {
    "mxnet1": "#1b2a6b",
    "mxnet2": "#5b7bd5",
    "gloo": "#f5a623",
    "mpi": "#2a9d8f",
    "ddp": "#d1495b",
    "ddp beside overlap": "#e89aa5",
}
_BAR = 0.2


def ratios(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of every peer to tensorkv, a panel for each number of ranks, and one for several hosts."""
    panels = _panels(result) or {"nothing was measured": []}
    longest = max(1, *(len(works) for works in panels.values()))
    figure = Figure(figsize=(2.5 + 5 * len(panels), 2.4 + 0.95 * longest), layout="constrained")
    found = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axes, (title, works) in zip(found, panels.items(), strict=True):
        _draw(axes, title, works)
        # From top to bottom, as thick as in the other panels.
        axes.set_ylim(longest - 0.5, -0.5)
    ends = [1.0] + [ratio[end] for works in panels.values() for work in works for ratio in _bars(work).values()
                    for end in ("min", "max")]  # fmt: skip
    # With room for what is written behind the bars.
    found[0].set_xlim(min(ends) / 1.3, max(ends) * 4)
    drawn = [peer for peer in _COLORS if any(peer in _bars(work) for works in panels.values() for work in works)]
    handles = [Patch(color=_COLORS[peer], label=NAMES[peer]) for peer in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    quick = "   [quick run at toy sizes]" if result["quick"] else ""
    figure.suptitle(
        f"Processes in step, times faster than a peer: {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores{quick}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _panels(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for work in [*result["works"], *result["training"]]:
        hosts = work.get("hosts", 1)
        title = f"{work['ranks']} ranks on one host" if hosts == 1 else f"between {hosts} hosts"
        panels.setdefault(title, []).append(work)
    return dict(sorted(panels.items(), key=lambda panel: panel[0].startswith("between")))


def _bars(work: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The ratios of a work, by what is drawn for each."""
    summary = work["summary"]
    return {**summary["ratios"], **{f"{peer} beside overlap": it for peer, it in summary["overlap_ratios"].items()}}


def _draw(axes: Axes, title: str, works: Sequence[Mapping[str, Any]]) -> None:
    for index, work in enumerate(works):
        found = _bars(work)
        for place, (peer, ratio) in enumerate(found.items()):
            y = index + (place - (len(found) - 1) / 2) * _BAR
            median = ratio["median"]
            axes.barh(y, median - 1, left=1, height=_BAR, color=_COLORS[peer])
            axes.plot([ratio["min"], ratio["max"]], [y, y], color="#777777", linewidth=1)
            label(axes, f"{median:.2g}×" if median < 10 else f"{median:.0f}×", max(1, ratio["max"]), y, fontsize=8)
        if not found:
            label(axes, "not measured", 1, index, fontsize=8, fontweight="normal", color="#555555")
    axes.set_xscale("log")
    axes.axvline(1, color="#c0392b", linewidth=1.4, linestyle="--", zorder=3)
    axes.set_yticks(range(len(works)), [_short(work) for work in works])
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("time of the peer ÷ time of tensorkv   (right of 1: tensorkv is faster)", fontsize=8.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(work: Mapping[str, Any]) -> str:
    """The name without what the panel says."""
    size, *_, last = work["name"].split(", ")
    if work.get("hosts", 1) > 1:
        return f"{size}\n{work['ranks']} ranks"
    return size.replace(" ", "\n", 1) if size.startswith("training") else f"{size}\n{last}"
