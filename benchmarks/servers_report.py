"""The report of parameter servers, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from report import conditions, ms_text, nbytes_text, quantile, ratio_text, table, times_text
from servers_contenders import NAMES
from servers_works import GOALS, RECOVERY_GOAL_S

_GIVEN = "NumPy arrays, each worker pushes one part; one OpenMP thread a process (as torchrun sets it)"


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole report of one run."""
    lines = ["# Parameter servers: tensorkv and MXNet", "", *conditions(result, _GIVEN, NAMES), ""]
    for section in (_beside, _latency, _durability, _growth, _readers, _recovery, _spreads):
        if found := section(result):
            lines += [*found, ""]
    return "\n".join(lines)


def _beside(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for work in result["works"]:
        found = work["summary"]["ratios"]
        cells = [_p50(work, "tensorkv1"), ratio_text(found.get("mxnet1")), _goal(work["name"])]
        rows.append([_size(work), *cells, _p50(work, "tensorkv2"), ratio_text(found.get("mxnet2"))])
    heads = ["work", "tensorkv, 1 server, ms", "MXNet ÷ tensorkv, 1 server", "goal", "tensorkv, 2 servers, ms",
             "MXNet ÷ tensorkv, 2 servers"]  # fmt: skip
    return rows and [
        "## Beside MXNet",
        "",
        "Push and pull of all keys by both workers at once, from a common start to the end of the slower one. Each "
        "push is a step of the optimizer in the server. Median of MXNet ÷ median of tensorkv; in brackets the least "
        "and the largest ratio of one repetition. Above 1, tensorkv is faster.",
        "",
        *table(heads, rows),
    ]


def _latency(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for work in result["works"]:
        for name, found in work["found"].items():
            if found and work["keys"] == 1:
                rows.append([_size(work), NAMES[name], *(ms_text(found[f"p{share}_ms"]) for share in (50, 90, 99))])
    return rows and [
        "## Single calls",
        "",
        "Milliseconds of one call of one worker, of all calls of both.",
        "",
        *table(["work", "who", "p50, ms", "p90, ms", "p99, ms"], rows),
    ]


def _durability(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for work in result["durability"]:
        summary = work["summary"]
        for name, found in summary["spread"].items():
            mean = summary["of_means"].get(name)
            cells = [ms_text(found["p50_ms"]), ms_text(found["mean_ms"]), ratio_text(summary["ratios"].get(name))]
            cells += ["–" if mean is None else f"**{times_text(mean)}**"]
            cells += [_goal(work["name"]) if name == "process" else "–", _snapshots(work["found"][name])]
            rows.append([_size(work), "memory" if name == "tensorkv1" else name, *cells])
    heads = ["work", "who", "median, ms", "mean, ms", "÷ memory, medians", "÷ memory, means", "goal", "snapshots"]
    return rows and [
        "## Durability",
        "",
        "The same work and one server that keeps nothing (memory), or each push in a log on "
        f"{result['file_system']} before it is answered: safe from the end of the process, or of the machine (disk). "
        "The mean has the snapshots in it that keep the log short; their number is that of the whole work.",
        "",
        *table(heads, rows),
    ]


def _snapshots(journal: Mapping[str, int] | None) -> str:
    return "–" if journal is None else str(journal["snapshots"])


def _growth(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for size, points in by_size(result["growth"]).items():
        for point in points:
            cells = [str(point["workers"]), str(point["servers"]), ms_text(point["ms"])]
            rows.append([size, *cells, f"{point['updates_per_s']:,.0f}"])
    return rows and [
        "## Workers and servers",
        "",
        "All workers at once; an update is a push of all keys by one worker. They and the servers share the cores.",
        "",
        *table(["work", "workers", "servers", "ms", "updates a second"], rows),
    ]


def by_size(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the points of growth for each size of a work.

    >>> by_size([{"name": "growth: 1 × 25M, 1 worker, assign"}])
    {'1 × 25M': [{'name': 'growth: 1 × 25M, 1 worker, assign'}]}
    """
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        sizes.setdefault(_size(point).partition(", ")[0], []).append(point)
    return sizes


def _readers(result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for found in result["readers"]:
        rows = []
        for point in found["points"]:
            times = [1e3 * seconds for seconds in point["times_s"]]
            rows.append([str(point["readers"]), ms_text(median(times)), ms_text(quantile(times, 0.9))])
        lines += [
            "## Readers",
            "",
            f"Readers on one host, each a process, pull one value of {nbytes_text(found['value_nbytes'])} that does "
            f"not change. The server wrote it out {found['copies']} time{'s' if found['copies'] > 1 else ''} for "
            f"{found['pulls']} pulls.",
            "",
            *table(["readers at once", "p50 of a pull, ms", "p90, ms"], rows),
        ]
    return lines


def _recovery(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for found in result["recovery"]:
        sizes = [nbytes_text(found[each]) for each in ("value_nbytes", "log_nbytes")]
        seconds = [f"{each(found['times_s']):.2f}" for each in (median, max)]
        rows.append(["server killed", *sizes, *seconds, f"≤ {RECOVERY_GOAL_S:g}"])
    return rows and [
        "## Recovery",
        "",
        "The server's process is killed (SIGKILL); seconds until it has been started again, has read its snapshot "
        "and its log, and has answered a pull of one key. Every value is compared afterwards.",
        "",
        *table(["work", "values", "log", "median, s", "max, s", "goal, s"], rows),
    ]


def _spreads(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for work in [*result["works"], *result["durability"]]:
        for name, found in work["summary"]["spread"].items():
            rows.append([work["name"], NAMES[name], *(ms_text(found[each]) for each in ("p50_ms", "p90_ms", "max_ms"))])
    heads = ["work", "who", "p50, ms", "p90, ms", "max, ms"]
    return rows and ["## Spread", "", "Milliseconds of one call with all keys.", "", *table(heads, rows)]


def _p50(work: Mapping[str, Any], name: str) -> str:
    found = work["summary"]["spread"].get(name)
    return ms_text(found["p50_ms"]) if found else "–"


def _size(work: Mapping[str, Any]) -> str:
    """The name without what the section says."""
    name: str = work["name"]
    return name.partition(": ")[2]


def _goal(name: str) -> str:
    goal = GOALS.get(name)
    return "–" if goal is None else f"{'≤' if name.startswith('durability') else '≥'} {goal:g}"
