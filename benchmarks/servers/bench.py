"""How fast parameter servers are, beside MXNet's; what durability costs, how they grow, and how they come back."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import launch, machine, plot
from benchmarks.common.benchmark import Benchmark, add_redis_options, counts
from benchmarks.common.report import ms_text, p50_text, quantile, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Roster, measure
from benchmarks.common.team import Team
from benchmarks.common.venvs import MXNET, REDIS, PeerError
from benchmarks.servers import alone
from benchmarks.servers import works as servers_works
from benchmarks.servers.alone import REPLY_TIMEOUT_S, by_size, start, wal_stats
from benchmarks.servers.contenders import NAMES
from benchmarks.servers.works import GOALS

PEERS = ("mxnet1", "mxnet2")
CONTENDERS = ("tensorkv1", "tensorkv2", *PEERS)
PAIRS = {peer: (peer, peer.replace("mxnet", "tensorkv")) for peer in PEERS}
# The first keeps its values in memory alone.
DURABILITIES = ("tensorkv1", "process", "disk")
DURABILITY_PAIRS = {level: (level, "tensorkv1") for level in DURABILITIES[1:]}
# Who steps the rows of a table.
TABLE_CLIENTS = ("rows", "embedding", "redis")
TABLE_PAIRS = {name: ("redis", name) for name in TABLE_CLIENTS[:2]}
_COLORS = {"mxnet1": plot.BLUE, "mxnet2": plot.LIGHT_BLUE, "process": plot.GREEN, "disk": plot.ORANGE}


class ServersBenchmark(Benchmark):
    """Push and pull through servers, and what is measured of them alone."""

    name = "servers"
    help = "parameter servers beside MXNet's; tables beside Redis; durability, growth, readers, recovery"
    description = """\
Measure pushpull of a dist_async store, whose servers step by SGD with momentum, beside push and pull of MXNet's
dist_async, all in turns in one run: read ratios rather than milliseconds. Also: rows of a table beside Redis, what
durability costs, more workers and servers, many readers of one value, and how long a killed server is away. Every
result is checked on every worker; a wrong one ends the run with exit status 1 and nothing is written."""
    epilog = f"""\
Files in --out: servers.json (all raw times, versions, machine), servers.md (tables), servers.png. MXNet 1.9.1 gets a
virtual environment of its own in {MXNET.folder}/, created when first needed, and so does the client of Redis in
{REDIS.folder}/. A peer that cannot be started is left out, and the tables say why.

examples:
  python -m benchmarks servers --quick                 half a minute: does it work here?
  python -m benchmarks servers                         everything; some ten minutes
  python -m benchmarks servers --only durability       works with "durability" in their names"""
    title = "Parameter servers: tensorkv, MXNet and Redis"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--workers", type=counts(1, "worker"), metavar="N,N", help="workers of growth (default 1,2,4,8; quick: 1)")
        add("--servers", type=counts(1, "server"), metavar="N,N", help="servers of growth (default 1,2,4; quick: 2)")
        add("--readers", type=counts(1, "reader"), metavar="N,N", help="readers at once (default 1,4,16; quick: 1,2)")
        add_redis_options(parser)
        add("--folder", metavar="DIR", help="where durable servers write (default: the folder for temporary files)")

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        quick = options.quick
        options.workers = options.workers or ((1,) if quick else (1, 2, 4, 8))
        options.servers = options.servers or ((2,) if quick else (1, 2, 4))
        options.readers = options.readers or ((1, 2) if quick else (1, 4, 16))
        return {
            "works": servers_works.beside_peers(quick=quick),
            "tables": servers_works.tables(quick=quick),
            "durability": servers_works.durability(quick=quick),
            "growth": [work for count in options.workers for work in servers_works.growth(count, quick=quick)],
            "readers": [servers_works.readers(max(options.readers), quick=quick)],
            "recovery": servers_works.recoveries(quick=quick),
        }

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        # One server each when quick, so that many processes less have to start.
        names = ("tensorkv1", "mxnet1") if options.quick else CONTENDERS
        levels = DURABILITIES[: 2 if options.quick else 3]
        few = 1 if options.quick else 3
        found: dict[str, Any] = {}
        parent = Path(options.folder).resolve() if options.folder else None
        with _cluster(), tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
            with Roster(self._launchers(options, folder, works), self.missing, self.versions, fresh=PEERS) as roster:
                timed = partial(measure, roster=roster, reps=options.reps)
                found["works"] = [timed(work, pairs=PAIRS, names=names, look=_laps) for work in works["works"]]
                found["tables"] = [timed(work, pairs=TABLE_PAIRS, names=TABLE_CLIENTS) for work in works["tables"]]
                found["durability"] = [
                    with_means(timed(work, pairs=DURABILITY_PAIRS, names=levels, look=wal_stats))
                    for work in works["durability"]
                ]
            found["growth"] = [
                point
                for count in options.workers
                if (own := [work for work in works["growth"] if work.parts == count])
                for point in alone.growth(count, own, options.servers, min(options.reps, 5))
            ]
            found["readers"] = [alone.readers(work, options.readers, few) for work in works["readers"]]
            found["recovery"] = [
                alone.recovery(work, f"{folder}/killed-{number}-{spare}", few, spare=spare)
                for number, work in enumerate(works["recovery"])
                for spare in (False, True)
            ]
            found["file_system"] = machine.file_system(folder)
        return found

    def _launchers(
        self, options: argparse.Namespace, folder: str, works: Mapping[str, Sequence[Any]]
    ) -> dict[str, Callable[[], Team]]:
        launchers: dict[str, Callable[[], Team]] = {
            f"tensorkv{count}": partial(start, f"tensorkv{count}", 2, num_servers=count) for count in (1, 2)
        }
        for level in DURABILITIES[1:]:
            launchers[level] = partial(start, level, 2, durability=level, path=f"{folder}/{level}")
        for name in TABLE_PAIRS:
            launchers[name] = partial(start, name, 1, name.capitalize())
        if works["tables"] and (redis := self.find_redis(options)):
            launchers["redis"] = partial(
                launch.redis,
                "redis",
                redis[0],
                folder,
                redis[1],
                "benchmarks.servers.contenders:Redis",
                reply_timeout_s=REPLY_TIMEOUT_S,
            )
        if mxnet := self.find_python(MXNET, options):
            for name in PEERS:
                launchers[name] = partial(
                    launch.mxnet, name, int(name[-1]), mxnet, 2, "benchmarks.servers.contenders:AsyncMXNet",
                    reply_timeout_s=REPLY_TIMEOUT_S,
                )  # fmt: skip
        return launchers

    def given(self, result: Mapping[str, Any]) -> str:
        return "NumPy arrays, each worker pushes one part; one OpenMP thread a process (as torchrun sets it)"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        works, tables, durability = result["works"], result["tables"], result["durability"]
        return [_beside(works), _latency(works), _tables(tables), _durability(durability, result["file_system"]),
                alone.growth_section(result["growth"]), *map(alone.readers_section, result["readers"]),
                alone.recovery_section(result["recovery"]), spreads([*works, *tables, *durability], NAMES)]  # fmt: skip

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        return {"servers.png": partial(_draw, result)}


@contextmanager
def _cluster() -> Iterator[None]:
    """Have one Ray, in which all stores have their servers, unless RAY_ADDRESS names one already."""
    try:
        import ray

        import tensorkv

        keeper = tensorkv.create("dist_async", name="bench", timeout_s=60)
    except Exception as error:
        raise PeerError(f"no Ray: {type(error).__name__}: {error}") from error
    given = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop("RAY_ADDRESS")
        if given is not None:
            os.environ["RAY_ADDRESS"] = given
        keeper.close()


def _laps(team: Team) -> dict[str, float]:
    """Quantiles of single calls of all workers, where many were made."""
    laps = [1e3 * lap for found in team.call("found") for lap in found["laps_s"]]
    return {f"p{share}_ms": quantile(laps, share / 100) for share in (50, 90, 99)} if laps else {}


def with_means(work: dict[str, Any]) -> dict[str, Any]:
    """Return a measured work with the means of its contenders, and their ratios to memory."""
    means = {name: sum(times) / len(times) for name, times in work["times_s"]["pushpull"].items()}
    for name, spread in work["summary"]["pushpull"]["spread"].items():
        spread["mean_ms"] = 1e3 * means[name]
    of_means = {name: means[name] / means["tensorkv1"] for name in work["summary"]["pushpull"]["ratios"]}
    return {**work, "of_means": of_means}


def _beside(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        one, two = ratio_texts(work, PEERS)
        cells = [p50_text(work, "tensorkv1"), one, _goal(work["name"]), p50_text(work, "tensorkv2"), two]
        rows.append([_size(work), *cells])
    return section(
        "Beside MXNet",
        "Push and pull of all keys by both workers at once, from a common start to the end of the slower one. Each "
        "push is a step of the optimizer in the server. Median of MXNet ÷ median of tensorkv; in brackets the least "
        "and the largest ratio of one repetition. Above 1, tensorkv is faster.",
        ["work", "tensorkv, 1 server, ms", "MXNet ÷ tensorkv, 1 server", "goal", "tensorkv, 2 servers, ms",
         "MXNet ÷ tensorkv, 2 servers"],
        rows,
    )  # fmt: skip


def _latency(works: Sequence[Mapping[str, Any]]) -> list[str]:
    return section(
        "Single calls",
        "Milliseconds of one call of one worker, of all calls of both.",
        ["work", "who", "p50, ms", "p90, ms", "p99, ms"],
        [
            [_size(work), NAMES[name], *(ms_text(found[f"p{share}_ms"]) for share in (50, 90, 99))]
            for work in works
            for name, found in work["found"].items()
            if found and work["keys"] == 1
        ],
    )


def _tables(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        times = [p50_text(work, name) for name in TABLE_CLIENTS]
        rows.append([_size(work), *times, *ratio_texts(work, list(TABLE_PAIRS)), _goal(work["name"])])
    return section(
        "Tables beside Redis",
        "One worker and one server: rows are pulled, and stepped by their gradients, other rows in each call. A layer "
        "of torch does it with `Embedding`. Redis has a string for each row and knows no arrays: its client pulls with "
        "MGET, steps in NumPy, and writes with MSET, over a Unix socket. Above 1, tensorkv is faster.",
        ["work", "pull and push, ms", "Embedding, ms", "Redis, ms", "Redis ÷ pull and push", "Redis ÷ Embedding",
         "goal"],
        rows,
    )  # fmt: skip


def _durability(works: Sequence[Mapping[str, Any]], file_system: str) -> list[str]:
    rows = []
    for work in works:
        for name, found in work["summary"]["pushpull"]["spread"].items():
            mean, wal = work["of_means"].get(name), work["found"][name]
            cells = [ms_text(found["p50_ms"]), ms_text(found["mean_ms"]), *ratio_texts(work, [name])]
            cells += ["–" if mean is None else f"**{times_text(mean)}**"]
            cells += [_goal(work["name"]) if name == "process" else "–", str(wal["snapshots"]) if wal else "–"]
            rows.append([_size(work), "memory" if name == "tensorkv1" else name, *cells])
    return section(
        "Durability",
        "The same work and one server that keeps nothing (memory), or writes each push to a log on "
        f"{file_system} before it answers: safe from the end of the process, or of the machine (disk). "
        "The mean includes the snapshots that keep the log short; their number is that of the whole work.",
        ["work", "who", "median, ms", "mean, ms", "÷ memory, medians", "÷ memory, means", "goal", "snapshots"],
        rows,
    )


def _size(work: Mapping[str, Any]) -> str:
    """Return the name without its topic."""
    name: str = work["name"]
    return name.partition(": ")[2]


def _goal(name: str) -> str:
    goal = GOALS.get(name)
    return "–" if goal is None else f"{'≤' if name.startswith('durability') else '≥'} {goal:g}"


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw ratios to MXNet and the price of durability above, how servers grow below."""
    sizes = by_size(result["growth"])
    figure = plot.new_figure(result, "Parameter servers", 14, 9)
    above, below = figure.subfigures(2, 1)
    for axes, topic, title, what in zip(
        above.subplots(1, 2),
        ("works", "durability"),
        ("Times faster than MXNet with as many servers", "What durability costs"),
        ("time of MXNet ÷ time of tensorkv   (longer is better)", "time with a log ÷ in memory   (shorter is better)"),
        strict=True,
    ):
        works = {_size(work).partition(", ")[0]: work for work in result[topic]}
        goals = {size: GOALS[work["name"]] for size, work in works.items() if work["name"] in GOALS}
        ratios = {size: work["summary"]["pushpull"]["ratios"] for size, work in works.items()}
        handles = plot.ratio_bars(axes, ratios, _COLORS, goals)
        axes.legend(handles.values(), [NAMES.get(name, name) for name in handles], fontsize=8, frameon=False)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(what, fontsize=9)
    panels = below.subplots(1, max(1, len(sizes)), squeeze=False)[0]
    for axes, (size, points) in zip(panels, sizes.items(), strict=False):
        alone.draw_growth(axes, size, points)
    if not sizes:
        plot.label(panels[0], "growth: not measured", 0, 0.5, fontweight="normal")
    figure.savefig(path, dpi=130)
