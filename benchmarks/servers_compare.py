"""The comparisons of parameter servers: beside peers, durable beside memory, growth, readers, and a server killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import mean, median
from time import perf_counter
from typing import Any

import dist_compare
import dist_launch
from compare import WARM_UP_CALLS, progress
from dist_compare import Roster
from dist_teams import Team
from report import quantile, ratios, spread
from servers_works import Serving

PEERS = ("mxnet1", "mxnet2")
CONTENDERS = ("tensorkv1", "tensorkv2", *PEERS)
# The first keeps its values in memory alone.
DURABILITIES = ("tensorkv1", "process", "disk")
# How long any command to workers may take.
REPLY_TIMEOUT_S = 90
_READS = 5


def launch(name: str, workers: int, member: str = "servers", **options: Any) -> Team:
    """Start workers of this project's store; options are those of ``tensorkv.create``."""
    return dist_launch.torchrun(name, workers, member, options=options, reply_timeout_s=REPLY_TIMEOUT_S)


# ---------------------------------------------------------------- in turns


def beside_peers(work: Serving, names: Sequence[str], roster: Roster, reps: int) -> dict[str, Any]:
    """Time the store and MXNet at a work, in turns.

    Args:
        work: what to do.
        names: of the contenders, some of ``CONTENDERS``.
        roster: has their teams.
        reps: how many turns each has.

    Raises:
        WrongResultError: somebody's result is wrong.
        PeerError: a team failed after it had been ready.
    """
    found = dist_compare.measure(work, names, roster, reps, look=_laps)
    found["summary"] = summarize(found["times_s"])
    return found


def summarize(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return spreads, and the ratio of each peer to the store with as many servers.

    >>> summarize({"tensorkv1": [1, 2], "mxnet1": [3, 3], "mxnet2": [1, 1]})["ratios"]
    {'mxnet1': {'median': 2.0, 'min': 1.5, 'max': 3.0}}
    """
    found: dict[str, Any] = {}
    for peer in PEERS:
        found |= ratios(times, (peer,), ours=peer.replace("mxnet", "tensorkv"))
    return {"spread": spread(times), "ratios": found}


def durability(work: Serving, names: Sequence[str], roster: Roster, reps: int) -> dict[str, Any]:
    """Time the store with each durability, in turns; as ``beside_peers``, of ``DURABILITIES``."""
    found = dist_compare.measure(work, names, roster, reps, look=_journal)
    found["summary"] = summarize_durability(found["times_s"])
    return found


def summarize_durability(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return spreads with means, and the ratios of each durability to memory, of medians and of means.

    >>> summarize_durability({"tensorkv1": [1, 1, 1], "disk": [1, 1, 4]})["of_means"]
    {'disk': 2.0}
    """
    memory, *kept = DURABILITIES
    found = ratios(times, kept, ours=memory)
    spreads = spread(times)
    for name, own in times.items():
        spreads[name]["mean_ms"] = 1e3 * mean(own)
    of_means = {name: mean(times[name]) / mean(times[memory]) for name in found}
    return {"spread": spreads, "ratios": found, "of_means": of_means}


def _laps(team: Team) -> dict[str, float]:
    """Quantiles of single calls of all workers, where many were made."""
    laps = [1e3 * lap for told in team.ask("tell", what="found") for lap in told["told"]["laps_s"]]
    return {f"p{share}_ms": quantile(laps, share / 100) for share in (50, 90, 99)} if laps else {}


def _journal(team: Team) -> Any:
    return team.ask("tell", what="found")[0]["told"]["journal"]


# ---------------------------------------------------------------- alone


@contextmanager
def _team(start: Callable[[], Team]) -> Any:
    team = start()
    try:
        yield team
    finally:
        team.end()


def growth(workers: int, works: Sequence[Serving], servers: Sequence[int], reps: int) -> list[dict[str, Any]]:
    """Time the store with so many workers and several numbers of servers; as ``beside_peers``."""
    points = []
    with _team(lambda: launch("tensorkv", workers)) as team:
        for work in works:
            for count in servers:
                progress(f"{work.name}, {count} servers")
                team.options = {"num_servers": count}
                times = _alone(team, work, reps)
                seconds = median(times)
                points.append(
                    {"name": work.name, "keys": work.keys, "shape": list(work.shape), "workers": workers,
                     "servers": count, "calls": work.calls, "times_s": times, "ms": 1e3 * seconds,
                     "updates_per_s": workers / seconds}
                )  # fmt: skip
    return points


def _alone(team: Team, work: Serving, reps: int) -> list[float]:
    team.ask("build", **asdict(work))
    team.open()
    team.warm_up(WARM_UP_CALLS)
    team.ask("renew")
    times = [team.time(work.calls) for _ in range(reps)]
    team.ask("check")
    team.ask("close")
    return times


def recovery(work: Serving, folder: str, reps: int) -> dict[str, Any]:
    """Kill the server of a durable store; time until it has answered a pull; look at every value afterwards."""
    times = []
    progress(f"{work.name}: filling")
    with _team(lambda: launch("tensorkv", 1, "mourner", durability="process", path=folder)) as team:
        team.ask("build", **asdict(work))
        team.open()
        team.ask("time", calls=1, at=perf_counter())
        before = _journal(team)
        for rep in range(reps):
            progress(f"{work.name}: {rep + 1} of {reps}", step=True)
            times.append(team.ask("tell", what="kill")[0]["told"])
        team.ask("check")
        team.ask("close")
    return {
        "name": work.name,
        "value_nbytes": work.value_nbytes,
        "log_nbytes": before["log_nbytes"],
        "times_s": times,
    }


def readers(work: Serving, counts: Sequence[int], reps: int) -> dict[str, Any]:
    """Time pulls of a value that does not change, by several numbers of readers at once."""
    points = []
    with _team(lambda: launch("tensorkv", work.parts, "reader")) as team:
        team.ask("build", **asdict(work))
        team.open()
        team.warm_up(2)
        before = team.ask("tell", what="found")[0]["told"]
        for count in counts:
            progress(f"{work.name}: {count} at once")
            team.ask("tell", what="choose", readers=count)
            points.append({"readers": count, "times_s": _read_times(team, count, reps)})
        team.ask("tell", what="choose", readers=work.parts)
        after = team.ask("tell", what="found")[0]["told"]
        team.ask("check")
        team.ask("close")
    return {
        "name": work.name,
        "value_nbytes": work.value_nbytes,
        "points": points,
        # Since the value was pushed, with the calls before any was timed.
        "copies": after["copies"],
        "pulls": after["pulls"],
        "copies_while_timed": after["copies"] - before["copies"],
    }


def _read_times(team: Team, readers: int, reps: int) -> list[float]:
    """The seconds of each pull of each reader."""
    times = []
    for _ in range(reps):
        # Readers are late where they are many; each is timed from its own start.
        replies = team.ask("tell", what="timed", calls=_READS)
        times += [seconds for reply in replies[:readers] for seconds in reply["told"]]
    return times
