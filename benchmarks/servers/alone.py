"""What is measured of this project's servers alone: growth, readers, and a server that is killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common import launch, plot
from benchmarks.common.report import ms_text, nbytes_text, quantile, section
from benchmarks.common.runner import progress
from benchmarks.common.team import Team
from benchmarks.servers.works import RECOVERY_GOAL_S, Serving

# How long any command to workers may take.
REPLY_TIMEOUT_S = 90
_READS = 5
_COLORS = (plot.BLUE, plot.RED, plot.ORANGE, plot.GREEN, "#777777")


def start(name: str, workers: int, member: str = "Servers", **options: Any) -> Team:
    """Start workers of this project's store; options are those of ``tensorkv.create``."""
    path = f"benchmarks.servers.contenders:{member}"
    return launch.torchrun(name, workers, path, options=options, reply_timeout_s=REPLY_TIMEOUT_S)


@contextmanager
def _working(team: Team, work: Serving) -> Iterator[None]:
    """Have a team with a work; check the results at the end."""
    team.build(work)
    team.open()
    yield
    team.check()
    team.close()


@contextmanager
def _started(workers: int, member: str = "Servers", **options: Any) -> Iterator[Team]:
    team = start("tensorkv", workers, member, **options)
    try:
        yield team
    finally:
        team.end()


def wal_stats(team: Team) -> Any:
    """Return the statistics of the write-ahead log; None without one."""
    return team.call("found")[0]["wal"]


def growth(workers: int, works: Sequence[Serving], servers: Sequence[int], reps: int) -> list[dict[str, Any]]:
    """Time the store with so many workers and several numbers of servers."""
    points = []
    with _started(workers) as team:
        for work in works:
            for count in servers:
                progress(f"{work.name}, {count} servers")
                team.options = {"num_servers": count}
                with _working(team, work):
                    team.warm_up("pushpull", work.warm_up)
                    team.renew()
                    times = [team.time("pushpull", work.calls) for _ in range(reps)]
                seconds = median(times)
                points.append(
                    {"name": work.name, "keys": work.keys, "shape": list(work.shape), "workers": workers,
                     "servers": count, "calls": work.calls, "times_s": times, "ms": 1e3 * seconds,
                     "updates_per_s": workers / seconds}
                )  # fmt: skip
    return points


def by_size(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the points of growth for each size of a work.

    >>> by_size([{"name": "growth: 1 × 25M, 1 worker, assign"}])
    {'1 × 25M': [{'name': 'growth: 1 × 25M, 1 worker, assign'}]}
    """
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        sizes.setdefault(point["name"].partition(": ")[2].partition(", ")[0], []).append(point)
    return sizes


def growth_section(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of growth."""
    return section(
        "Workers and servers",
        "All workers at once; an update is a push of all keys by one worker. They and the servers share the cores.",
        ["work", "workers", "servers", "ms", "updates a second"],
        [
            [size, str(point["workers"]), str(point["servers"]), ms_text(point["ms"]), f"{point['updates_per_s']:,.0f}"]
            for size, own in by_size(points).items()
            for point in own
        ],
    )


def draw_growth(axes: Axes, size: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line for each number of servers."""
    for color, count in zip(_COLORS, dict.fromkeys(point["servers"] for point in points), strict=False):
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
    plot.finish(axes)


def readers(work: Serving, numbers: Sequence[int], reps: int) -> dict[str, Any]:
    """Time pulls of a value that does not change, by several numbers of readers at once."""
    points = []
    with _started(work.parts, "Reader") as team, _working(team, work):
        team.warm_up("pushpull", 2)
        [before, *_] = team.call("found")
        for count in numbers:
            progress(f"{work.name}: {count} at once")
            team.call("choose", readers=count)
            # Readers start late where they are many; each is timed from its own start.
            rounds = [team.call("timed", calls=_READS)[:count] for _ in range(reps)]
            points.append({"readers": count, "times_s": [s for found in rounds for times in found for s in times]})
        team.call("choose", readers=work.parts)
        [after, *_] = team.call("found")
    return {
        "name": work.name,
        "value_nbytes": work.value_nbytes,
        "points": points,
        # Since the value was pushed, with the calls before any was timed.
        "copies": after["copies"],
        "pulls": after["pulls"],
        "copies_while_timed": after["copies"] - before["copies"],
    }


def readers_section(found: Mapping[str, Any]) -> list[str]:
    """Return the section of readers."""
    rows = []
    for point in found["points"]:
        times = [1e3 * seconds for seconds in point["times_s"]]
        rows.append([str(point["readers"]), ms_text(median(times)), ms_text(quantile(times, 0.9))])
    return section(
        "Readers",
        f"Readers on one host, each a process, pull one value of {nbytes_text(found['value_nbytes'])} that does not "
        f"change. The server wrote it out {found['copies']} time{'' if found['copies'] == 1 else 's'} for "
        f"{found['pulls']} pulls: readers copy it from where it is.",
        ["readers at once", "p50 of a pull, ms", "p90, ms"],
        rows,
    )


def recovery(work: Serving, folder: str, reps: int, *, spare: bool) -> dict[str, Any]:
    """Kill the server of a durable store; time until a pull is answered; look at every value afterwards."""
    times = []
    progress(f"{work.name}: filling")
    with _started(1, "Killer", durability="process", path=folder, spare=spare) as team, _working(team, work):
        team.ask("time", verb="pushpull", calls=1, at=perf_counter())
        before = wal_stats(team)
        for rep in range(reps):
            progress(f"{work.name}: {rep + 1} of {reps}", step=True)
            times += team.call("kill")
    return {
        "name": work.name,
        "spare": spare,
        "value_nbytes": work.value_nbytes,
        "log_nbytes": before["log_nbytes"],
        "times_s": times,
    }


def recovery_section(works: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of recovery."""
    rows = []
    for found in works:
        sizes = [nbytes_text(found[each]) for each in ("value_nbytes", "log_nbytes")]
        seconds = [f"{each(found['times_s']):.2f}" for each in (median, max)]
        killed = "server killed" + (", with a spare" if found["spare"] else "")
        rows.append([killed, *sizes, *seconds, f"≤ {RECOVERY_GOAL_S:g}"])
    return section(
        "Recovery",
        "The server's process is killed (SIGKILL); seconds until it has been started again, or its spare has taken "
        "over, the snapshot and the log have been read, and a pull of one key has been answered. Every value is "
        "compared afterwards.",
        ["work", "values", "log", "median, s", "max, s", "goal, s"],
        rows,
    )
