"""How fast hosts exchange and serve, beside peers on the same hosts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import launch, plot
from benchmarks.common.benchmark import Benchmark, counts
from benchmarks.common.hosts import Host, HostsError, hosts, places
from benchmarks.common.ray_hosts import RayCluster
from benchmarks.common.report import nbytes_text, p50_text, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Roster, measure
from benchmarks.common.team import Team
from benchmarks.common.venvs import MXNET
from benchmarks.hosts import works as hosts_works
from benchmarks.hosts.contenders import NAMES

_SYNC = "benchmarks.sync.contenders"
_SERVERS = "benchmarks.servers.contenders"
_HOSTS = "benchmarks.hosts.contenders"
# Values, which Ray passes through its object store, and as many that come back.
_OBJECT_STORE_NBYTES = 1 << 30
_SYNC_PAIRS = {peer: (peer, "tensorkv") for peer in ("gloo", "mxnet_sync")}
_SERVERS_PAIRS = {"mxnet_async": ("mxnet_async", "servers")}
_FAR_PAIRS = {peer: (peer, "far") for peer in ("stream", "actor")} | {"near": ("far", "near")}
_COLORS = {
    "gloo": plot.ORANGE,
    "mxnet_sync": plot.BLUE,
    "mxnet_async": plot.BLUE,
    "stream": plot.GREEN,
    "actor": plot.RED,
}


class HostsBenchmark(Benchmark):
    """Exchanges and servers between hosts."""

    name = "hosts"
    help = "several hosts: both engines beside Gloo, MXNet, Ray and TCP, in namespaces of this machine"
    description = """\
Measure pushpull between hosts: of a dist_sync store beside Gloo and MXNet's dist_sync, of a dist_async store with a
server on each host beside MXNet's dist_async, and of one worker whose server is on another host beside one TCP stream
and an actor of Ray that returns what it is given. The hosts are namespaces of this machine, joined by a switch, which
take root. All take turns; every result is checked, and a wrong one ends the run with exit status 1."""
    epilog = """\
Files in --out: hosts.json (all raw times, versions, machine), hosts.md (tables), hosts.png.

examples:
  sudo python -m benchmarks hosts --quick --no-mxnet   toy sizes: does it work here?
  sudo python -m benchmarks hosts --hosts 2            two hosts only
  sudo python -m benchmarks hosts --only "another host"   one worker, and a server elsewhere"""
    title = "Several hosts: tensorkv and its peers"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--hosts", type=counts(2, "hosts"), metavar="N,N", help="numbers of hosts (default 2,3; quick: 2)"
        )

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        quick = options.quick
        options.hosts = options.hosts or ((2,) if quick else (2, 3))
        return {
            "sync": [work for count in options.hosts for work in hosts_works.exchanges(count, quick=quick)],
            "servers": [work for count in options.hosts for work in hosts_works.servings(count, quick=quick)],
            "far": hosts_works.far(quick=quick),
        }

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        mxnet = self.find_python(MXNET, options)
        found: dict[str, list[dict[str, Any]]] = {topic: [] for topic in works}
        try:
            for count in options.hosts:
                with hosts(count) as made:
                    for ranks in dict.fromkeys(work.parts for work in works["sync"] if work.hosts == count):
                        own = [work for work in works["sync"] if (work.hosts, work.parts) == (count, ranks)]
                        found["sync"] += self._run_sync(own, made, mxnet, options.reps)
                    own = [work for work in works["servers"] if work.parts == count]
                    far = works["far"] if count == options.hosts[0] else []
                    if own or far:
                        with RayCluster(made, _OBJECT_STORE_NBYTES) as cluster:
                            found["servers"] += self._run_servers(own, made, cluster, mxnet, options.reps)
                            found["far"] += self._run_far(far, made, cluster, options.reps)
        except HostsError as error:
            self.missing["hosts"] = str(error)
        return found

    def _run_sync(
        self, works: Sequence[Any], made: Sequence[Host], mxnet: str | None, reps: int
    ) -> list[dict[str, Any]]:
        ranks, on = works[0].parts, places(made)
        launchers: dict[str, Callable[[], Team]] = {
            "tensorkv": partial(launch.torchrun, "tensorkv", ranks, f"{_SYNC}:TensorKV", on),
            "gloo": partial(launch.torchrun, "gloo", ranks, f"{_SYNC}:Gloo", on),
        }
        if mxnet:
            launchers["mxnet_sync"] = partial(launch.mxnet, "mxnet_sync", len(made), mxnet, ranks, f"{_SYNC}:MXNet", on)
        topic = f", {ranks} ranks on {len(made)} hosts"
        with Roster(launchers, self.missing, self.versions, ("mxnet_sync",), topic) as roster:
            names = list(launchers)
            sent = made[0].sent_nbytes
            return [measure(work, roster, _SYNC_PAIRS, reps, names=names, sent_nbytes=sent) for work in works]

    def _run_servers(
        self, works: Sequence[Any], made: Sequence[Host], cluster: RayCluster, mxnet: str | None, reps: int
    ) -> list[dict[str, Any]]:
        count, on = len(made), places(made)
        launchers: dict[str, Callable[[], Team]] = {
            "servers": partial(
                launch.torchrun,
                "servers",
                count,
                f"{_SERVERS}:Servers",
                on,
                cluster.environment,
                options={"num_servers": count},
            )
        }
        if mxnet:
            launchers["mxnet_async"] = partial(
                launch.mxnet, "mxnet_async", count, mxnet, count, f"{_SERVERS}:AsyncMXNet", on
            )
        with Roster(launchers, self.missing, self.versions, ("mxnet_async",), f", {count} hosts") as roster:
            return [measure(work, roster, _SERVERS_PAIRS, reps, names=list(launchers)) for work in works]

    def _run_far(
        self, works: Sequence[Any], made: Sequence[Host], cluster: RayCluster, reps: int
    ) -> list[dict[str, Any]]:
        first, second = places(made)[:2]
        here: Any = partial(launch.torchrun, hosts=[first], environment=cluster.environment)
        launchers: dict[str, Callable[[], Team]] = {
            name: partial(
                here, name, 1, f"{_HOSTS}:Assigning", options={"placement": {"server-0": {"node": host.name}}}
            )
            for name, host in (("far", made[1]), ("near", made[0]))
        }
        launchers["stream"] = partial(launch.torchrun, "stream", 2, f"{_HOSTS}:Stream", [first, second])
        launchers["actor"] = partial(here, "actor", 1, f"{_HOSTS}:Actor")
        with Roster(launchers, self.missing, self.versions, topic=", another host") as roster:
            return [measure(work, roster, _FAR_PAIRS, reps, names=list(launchers)) for work in works]

    def given(self, result: Mapping[str, Any]) -> str:
        return (
            "NumPy arrays, each rank pushes one part; one OpenMP thread a process (as torchrun sets it); hosts are "
            "namespaces of one machine"
        )

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        every = [work for topic in ("sync", "servers", "far") for work in result[topic]]
        return [_sync(result["sync"]), _servers(result["servers"]), _far(result["far"]), spreads(every, NAMES)]

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        return {"hosts.png": partial(_draw, result)}


def _sync(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        sent = [work["sent_nbytes"].get(name) for name in ("tensorkv", "gloo")]
        sent_texts = ["–" if nbytes is None else nbytes_text(nbytes) for nbytes in sent]
        rows.append([work["name"], p50_text(work, "tensorkv"), *ratio_texts(work, list(_SYNC_PAIRS)), *sent_texts])
    return section(
        "In lock step",
        "One exchange of all keys, from a common start to the end of the last rank. Median of the peer ÷ median of "
        "tensorkv; in brackets the least and the largest ratio of one repetition. Above 1, tensorkv is faster. MXNet "
        "has a server on each host. Sent: bytes on the cable of the first host in one call, both ways together.",
        ["work", "tensorkv, ms", "Gloo all_reduce ÷ tensorkv", "MXNet ÷ tensorkv", "tensorkv sent", "Gloo sent"],
        rows,
    )


def _servers(works: Sequence[Mapping[str, Any]]) -> list[str]:
    return section(
        "A server on each host",
        "Push and pull of all keys by a worker on each host at once, to the end of the slowest. Each push is a step of "
        "the optimizer. Above 1, tensorkv is faster.",
        ["work", "tensorkv, ms", "MXNet ÷ tensorkv"],
        [[work["name"], p50_text(work, "servers"), *ratio_texts(work, list(_SERVERS_PAIRS))] for work in works],
    )


def _far(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        near = work["summary"]["pushpull"]["ratios"].get("near")
        rows.append(
            [
                work["name"],
                p50_text(work, "far"),
                *ratio_texts(work, ["stream", "actor"]),
                "–" if near is None else times_text(near["median"]),
            ]
        )
    return section(
        "One worker, and its server on another host",
        "A push and a pull of all keys. One TCP stream carries the same bytes to the other host and back, and does "
        "nothing else: what is below 1 there is what the store costs. An actor of Ray is given all arrays in one call "
        "and returns them. Above 1, tensorkv is faster. The last column is the time ÷ that of a server on the host of "
        "the worker.",
        ["work", "tensorkv, ms", "TCP ÷ tensorkv", "actor ÷ tensorkv", "another host ÷ same host"],
        rows,
    )


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of every peer to tensorkv, a panel for each topic."""
    panels = {
        "In lock step": {work["name"].rpartition(",")[0]: work for work in result["sync"]},
        "A server on each host": {
            work["name"].replace(": ", "\n").rpartition(",")[0]: work for work in result["servers"]
        },
        "One worker, its server on another host": {
            work["name"].partition(": ")[2].partition(",")[0]: work for work in result["far"]
        },
    }
    longest = max(1, *map(len, panels.values()))
    figure = plot.new_figure(result, "Several hosts, times faster than a peer", 18, 2.4 + 0.6 * longest)
    handles: dict[str, Any] = {}
    for axes, (title, works) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ratios = {
            name: {peer: each for peer, each in work["summary"]["pushpull"]["ratios"].items() if peer in _COLORS}
            for name, work in works.items()
        }
        handles |= plot.ratio_bars(axes, ratios, _COLORS)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("time of the peer ÷ time of tensorkv   (right of 1: tensorkv is faster)", fontsize=8.5)
    names = [NAMES[peer] for peer in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.savefig(path, dpi=130)
