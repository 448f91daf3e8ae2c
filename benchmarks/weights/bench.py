"""How fast weights come from a publisher to its readers, beside files in memory, Ray's objects and Redis."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import launch, machine, plot
from benchmarks.common.benchmark import Benchmark, add_redis_options
from benchmarks.common.report import ms_text, nbytes_text, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Roster, measure
from benchmarks.common.team import Team
from benchmarks.common.venvs import PeerError
from benchmarks.weights.contenders import NAMES
from benchmarks.weights.works import (
    CHANGES_GOAL,
    PAUSE_GOAL,
    PUBLISH_GOAL_MS,
    PULL_GOAL_COPIES,
    VISIBLE_GOAL_MS,
    Publishing,
    publishings,
)

_MEMBERS = {
    "pull": "Pulling",
    "changes": "Changes",
    "torch": "TorchFiles",
    "safetensors": "Safetensors",
    "ray": "RayObjects",
}
_CONTENDERS = (*_MEMBERS, "redis")
_PAIRS = {name: (name, "pull") for name in _CONTENDERS if name != "pull"}
_COLORS = {
    "changes": plot.RED,
    "torch": plot.ORANGE,
    "safetensors": plot.GREEN,
    "ray": plot.BLUE,
    "redis": plot.LIGHT_BLUE,
}
# Versions of the largest work that Ray holds at a time, and some more.
_OBJECT_STORE_NBYTES = 1 << 30
_REPLY_TIMEOUT_S = 120


class WeightsBenchmark(Benchmark):
    """A publisher of weights, and readers that follow it."""

    name = "weights"
    help = "weights that one process publishes and others read, beside files, Ray's objects and Redis"
    description = """\
One process publishes versions of 50 million weights, of which all or 1 % have changed, and readers on the same host
take each of them over into arrays of their own. A dist_async store, whose readers pull whole releases or what has
changed, takes turns with torch.save and safetensors in /dev/shm, with ray.put and ray.get, and with Redis. Every
element of every reader is checked; a wrong one ends the run with exit status 1."""
    epilog = """\
Files in --out: weights.json (all raw times, versions, machine), weights.md (tables), weights.png.

examples:
  python -m benchmarks weights --quick                 half a minute: does it work here?
  python -m benchmarks weights --only "1 % changed"    works with "1 % changed" in their names"""
    title = "Weights: tensorkv, files in memory, Ray and Redis"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_redis_options(parser)

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        return {"works": publishings(quick=options.quick)}

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        redis = self.find_redis(options)
        found = []
        with _cluster(), tempfile.TemporaryDirectory(prefix="bench-") as folder:
            for readers in dict.fromkeys(work.readers for work in works["works"]):
                own = [work for work in works["works"] if work.readers == readers]
                launchers: dict[str, Callable[[], Team]] = {
                    name: partial(_start, name, readers, member) for name, member in _MEMBERS.items()
                }
                if redis:
                    server, python = redis
                    launchers["redis"] = partial(
                        launch.redis, "redis", server, folder, python, "benchmarks.weights.contenders:Redis",
                        ranks=1 + readers, reply_timeout_s=_REPLY_TIMEOUT_S,
                    )  # fmt: skip
                with Roster(launchers, self.missing, self.versions) as roster:
                    found += [self._measure(work, roster, options.reps) for work in own]
        return {"works": found}

    def _measure(self, work: Publishing, roster: Roster, reps: int) -> dict[str, Any]:
        copy = {"copy": machine.Copy(work.value_nbytes)}
        return measure(work, roster, _PAIRS, reps, names=_CONTENDERS, others=copy, look=_look)

    def given(self, result: Mapping[str, Any]) -> str:
        return "NumPy arrays; publisher, readers and servers share the cores; one OpenMP thread a process"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        works = result["works"]
        return [_whole(works), _phases(works), _bars(works), _memory(works), spreads(works, NAMES)]

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        return {"weights.png": partial(_draw, result)}


def _start(name: str, readers: int, member: str) -> Team:
    path = f"benchmarks.weights.contenders:{member}"
    return launch.torchrun(name, 1 + readers, path, reply_timeout_s=_REPLY_TIMEOUT_S)


@contextmanager
def _cluster() -> Iterator[None]:
    """Have one Ray, in which the store has its server, unless RAY_ADDRESS names one already."""
    given = os.environ.get("RAY_ADDRESS")
    try:
        import ray

        started = given is None
        if started:
            ray.init(
                object_store_memory=_OBJECT_STORE_NBYTES, include_dashboard=False, configure_logging=False,
                log_to_driver=False,
            )  # fmt: skip
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    except Exception as error:
        raise PeerError(f"no Ray: {type(error).__name__}: {error}") from error
    try:
        yield
    finally:
        if started:
            os.environ.pop("RAY_ADDRESS")
            ray.shutdown()


def _look(team: Team) -> dict[str, Any]:
    """Return what publisher and readers have found out, in milliseconds and bytes: of times, all and medians."""
    publisher, *readers = team.call("found")
    told = publisher["stamps_s"]
    seen = [stamps for reader in readers for stamps in zip(told, reader["stamps_s"], strict=True)]
    times = {
        "push": [pushed - start for start, pushed, _ in told],
        "publish": [published - pushed for _, pushed, published in told],
        "visible": [mine[0] - pushed for (_, pushed, _), mine in seen],
        "fetch": [fetched - seen_at for _, (seen_at, fetched, _) in seen],
        "pause": [done - fetched for _, (_, fetched, done) in seen],
    }
    return {
        "phases_ms": {name: [1e3 * each for each in own] for name, own in times.items()},
        "p50_ms": {name: 1e3 * median(own) for name, own in times.items()},
        "received_nbytes": max(reader["received_nbytes"] for reader in readers),
        "publisher_peak_nbytes": publisher["peak_nbytes"],
        "reader_peak_nbytes": max(reader["peak_nbytes"] for reader in readers),
        "kept_nbytes": publisher["kept_nbytes"],
    }


def _whole(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        own = work["summary"]["pushpull"]["spread"]["pull"]["p50_ms"]
        rows.append([work["name"], ms_text(own), *ratio_texts(work, list(_PAIRS))])
    return section(
        "From the publisher to all readers",
        "From the moment at which the publisher hands its values over to the moment at which the last reader has them "
        "in arrays of its own. Median of the peer ÷ median of tensorkv, pull; in brackets the least and the largest "
        "ratio of one repetition. Above 1, pulling whole releases is faster.",
        ["work", "tensorkv, pull, ms", *(f"{NAMES[name]} ÷ pull" for name in _PAIRS)],
        rows,
    )


def _phases(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        for name, found in work["found"].items():
            phases = [ms_text(found["p50_ms"][each]) for each in ("push", "publish", "visible", "fetch", "pause")]
            rows.append([work["name"], NAMES[name], *phases, nbytes_text(found["received_nbytes"])])
    return section(
        "Phases",
        "Medians in milliseconds. Push: the values are handed over, where that is apart from publishing. Visible: from "
        "the start of publishing to the moment at which a waiting reader has heard of it. Fetch: what a reader does "
        "beside its own work. Pause: while it does this, its weights are not to be used.",
        ["work", "who", "push", "publish", "visible", "fetch", "pause", "received by a reader"],
        rows,
    )


def _bars(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        found = work["found"]
        if not {"pull", "changes"} <= set(found):
            continue
        pull, changes = found["pull"], found["changes"]
        copies = pull["p50_ms"]["pause"] / work["summary"]["pushpull"]["spread"]["copy"]["p50_ms"]
        pause = changes["p50_ms"]["pause"] / pull["p50_ms"]["pause"]
        bytes_of_change = work["changed"] * work["value_nbytes"]
        is_few = work["changed"] < 1
        rows.append(
            [
                work["name"],
                f"{ms_text(pull['p50_ms']['publish'])} (≤ {PUBLISH_GOAL_MS:g})",
                f"{ms_text(pull['p50_ms']['visible'])} (≤ {VISIBLE_GOAL_MS:g})",
                f"{times_text(copies)} (≤ {PULL_GOAL_COPIES:g})" if work["readers"] == 1 else times_text(copies),
                f"{times_text(changes['received_nbytes'] / bytes_of_change)} (≤ {CHANGES_GOAL:g})" if is_few else "–",
                f"{times_text(pause)} (≤ {PAUSE_GOAL:g})" if is_few else "–",
            ]
        )
    return section(
        "Goals",
        "Of tensorkv. A plain copy is `copy_` of torch with its default threads, while nothing else runs; readers of "
        "one work pull at the same time.",
        ["work", "publish, ms", "visible, ms", "pull ÷ a plain copy", "changes ÷ changed bytes", "pause ÷ pull"],
        rows,
    )


def _memory(works: Sequence[Mapping[str, Any]]) -> list[str]:
    return section(
        "Memory",
        "The most that the publisher and a reader had beyond their own arrays and libraries, with memory that they "
        "share with others; and what is kept outside of both: by the server of tensorkv or Redis with their programs, "
        "in files, in the object store of Ray.",
        ["work", "who", "publisher", "reader", "kept"],
        [
            [
                work["name"],
                NAMES[name],
                *(nbytes_text(found[each]) for each in ("publisher_peak_nbytes", "reader_peak_nbytes", "kept_nbytes")),
            ]
            for work in works
            for name, found in work["found"].items()
        ],
    )


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of every peer to pulls of whole releases, and the pauses of readers."""
    works = result["works"]
    figure = plot.new_figure(result, "Weights from one publisher to its readers", 14, 2.4 + 0.9 * max(1, len(works)))
    left, right = figure.subplots(1, 2)
    whole = {
        work["name"]: {peer: each for peer, each in work["summary"]["pushpull"]["ratios"].items() if peer in _COLORS}
        for work in works
    }
    handles = plot.ratio_bars(left, whole, _COLORS)
    left.set_title("Until the last reader has a version", fontsize=11)
    left.set_xlabel("time of the peer ÷ time of tensorkv, pull   (right of 1: pull is faster)", fontsize=8.5)
    pauses = {
        work["name"]: {
            peer: dict.fromkeys(
                ("median", "min", "max"), each["p50_ms"]["pause"] / work["found"]["pull"]["p50_ms"]["pause"]
            )
            for peer, each in work["found"].items()
            if peer in _COLORS
        }
        for work in works
    }
    plot.ratio_bars(right, pauses, _COLORS)
    right.set_title("Pause of a reader", fontsize=11)
    right.set_xlabel("pause with the peer ÷ pause with tensorkv, pull", fontsize=8.5)
    names = [NAMES[peer] for peer in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.savefig(path, dpi=130)
