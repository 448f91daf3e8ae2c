"""How fast one process aggregates and updates, beside its peers and beside the limit of its memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import launch, machine, plot
from benchmarks.common.benchmark import Benchmark
from benchmarks.common.report import ms_text, nbytes_text, p50_text, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Here, Roster, measure
from benchmarks.common.venvs import MXNET
from benchmarks.common.work import VERBS, Work
from benchmarks.local import growth, memory
from benchmarks.local.contenders import NAMES, PlainNumPy, PlainTorch, TensorKV

_COPY_NBYTES = 256 << 20
_QUICK_COPY_NBYTES = 1 << 20
PEERS = ("mxnet", "torch", "numpy")
_PAIRS = {peer: (peer, "tensorkv") for peer in PEERS}
_MXNET = "benchmarks.local.contenders:MXNet"
# Below this, a work is all calls and no memory; its distance to the limit would only stretch the axis.
_TINY_NBYTES = 10_000

WORKS = (
    Work(1, (25_000_000,), 4),
    Work(160, (160_000,), 4),
    Work(1000, (1000,), 2, calls=10),
    Work(1, (2, 3), 1, calls=1000),
    Work(1, (25_000_000,), 4, "momentum"),
    Work(160, (160_000,), 1, "momentum"),
    Work(1000, (1000,), 1, "momentum", calls=10),
)
QUICK = (
    Work(1, (100_000,), 4),
    Work(16, (1600,), 4),
    Work(20, (100,), 2, calls=2),
    Work(1, (2, 3), 1, calls=10),
    Work(1, (100_000,), 4, "momentum"),
    Work(16, (1600,), 1, "momentum"),
    Work(20, (100,), 1, "momentum", calls=2),
)


class LocalBenchmark(Benchmark):
    """Push + pull and pushpull of a ``local`` store."""

    name = "local"
    help = "one process beside MXNet, PyTorch, NumPy and the memory's copy bandwidth"
    description = """\
Measure push + pull and pushpull of a local store beside MXNet's C++ KVStore, plain PyTorch, plain NumPy and the
copy bandwidth of the memory. All take turns in one run, so read ratios rather than milliseconds. Every result is
checked; a wrong one ends the run with exit status 1 and nothing is written."""
    epilog = f"""\
Files in --out: local.json (all raw times, versions, machine), local.md (tables), local.png, and with --growth
growth.png. MXNet 1.9.1 gets a virtual environment of its own in {MXNET.folder}/, created when first needed; it needs
python3.11. Without MXNet the tables say why, and the rest is measured.

examples:
  python -m benchmarks local --quick                    a few seconds: does it work here?
  python -m benchmarks local --growth --memory          everything
  python -m benchmarks local --only SGD --reps 21       works with "SGD" in their names"""
    title = "One machine: tensorkv, its peers and the memory's limit"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--arrays", choices=("numpy", "torch"), default="numpy", help="what tensorkv is given (default numpy)")
        add("--mxnet-python", metavar="PATH", help=f"a Python that has MXNet (default: that of {MXNET.folder}/)")
        add("--growth", action="store_true", help="also how the cost grows with keys, elements, parts (some minutes)")
        add("--memory", action="store_true", help="also what a push adds to the memory; needs 14 GB")

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        return {"works": list(QUICK if options.quick else WORKS)}

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        python = self.find_python(MXNET, options, options.mxnet_python)
        launchers: dict[str, Callable[[], Any]] = {
            "tensorkv": partial(Here, partial(TensorKV, arrays=options.arrays)),
            "torch": partial(Here, PlainTorch),
            "numpy": partial(Here, PlainNumPy),
        }
        if python:
            launchers["mxnet"] = partial(launch.alone, "mxnet", _MXNET, python)
        copy = machine.Copy(_QUICK_COPY_NBYTES if options.quick else _COPY_NBYTES)
        copy.time()
        measured = []
        with Roster(launchers, self.missing, self.versions) as roster:
            for work in works["works"]:
                found = measure(
                    work, roster, _PAIRS, options.reps, names=list(launchers), verbs=VERBS, others={"copy": copy}
                )
                found |= {"moved_nbytes": work.moved_nbytes, "copy_nbytes": copy.moved_nbytes}
                measured.append(found | {"limit": limit(found)})
        del copy
        grown = growth.measure(options.arrays, quick=options.quick) if options.growth else []
        held: list[dict[str, Any]] = []
        if options.memory:
            try:
                held = memory.measure(python, quick=options.quick)
            except memory.TooLittleMemoryError as error:
                self.missing["memory"] = str(error)
        return {"works": measured, "growth": grown, "memory": held}

    def given(self, result: Mapping[str, Any]) -> str:
        return f"tensorkv is given {result['arguments']['arrays']} arrays"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        works = result["works"]
        return [_ratios(works), _limits(works), spreads(works, NAMES), growth.section_of(result["growth"]),
                memory.section_of(result["memory"])]  # fmt: skip

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        drawn: dict[str, Callable[[Path], None]] = {"local.png": partial(_draw, result)}
        return drawn | ({"growth.png": partial(growth.draw, result)} if result["growth"] else {})


def limit(work: Mapping[str, Any]) -> dict[str, Any]:
    """Return the copy bandwidth, the time that it allows for the bytes to move, and our times divided by that."""
    copies = [seconds for verb in VERBS for seconds in work["times_s"][verb]["copy"]]
    bandwidth = work["copy_nbytes"] / median(copies)
    limit_s = work["moved_nbytes"] / bandwidth
    return {
        "copy_gb_per_s": bandwidth / 1e9,
        "limit_ms": 1e3 * limit_s,
        "times_limit": {verb: median(work["times_s"][verb]["tensorkv"]) / limit_s for verb in VERBS},
    }


def _ratios(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [work["name"], f"`{verb}`", p50_text(work, "tensorkv", verb), *ratio_texts(work, PEERS, verb)]
        for work in works
        for verb in VERBS
    ]
    return section(
        "Beside the peers",
        "Median of the peer ÷ median of tensorkv; in brackets the least and the largest ratio of one repetition. "
        "Above 1, tensorkv is faster.",
        ["work", "call", "tensorkv, ms", *(f"{NAMES[peer]} ÷ tensorkv" for peer in PEERS)],
        rows,
    )


def _limits(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        found = work["limit"]
        cells = [nbytes_text(work["moved_nbytes"]), f"{found['copy_gb_per_s']:.1f}", ms_text(found["limit_ms"])]
        cells += [p50_text(work, "tensorkv"), times_text(found["times_limit"]["pushpull"])]
        rows.append([work["name"], *cells])
    return section(
        "Beside the limit of the memory",
        "limit = bytes to move ÷ copy bandwidth of the same minutes. Bytes to move: each part read once, the value "
        "written once (assign), or the value and the momentum read and written once (SGD), each out written once. "
        "What fits into the processor's cache can be below the limit; for tiny arrays the cost is that of a call.",
        ["work", "bytes to move", "copy, GB/s", "limit, ms", "`pushpull`, ms", "`pushpull`, × limit"],
        rows,
    )


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio to MXNet (or to plain torch, if MXNet was not measured) and the distance to the limit."""
    works = {work["name"].replace(", ", "\n", 1): work for work in result["works"]}
    peer = "torch" if "mxnet" in result["missing"] else "mxnet"
    colors = dict(zip(VERBS, (plot.BLUE, plot.ORANGE), strict=True))
    figure = plot.new_figure(result, "tensorkv on one machine", 13, 1.6 + 0.8 * len(works))
    left, right = figure.subplots(1, 2)
    ratios = {
        name: {verb: each["ratios"][peer] for verb, each in work["summary"].items()} for name, work in works.items()
    }
    handles = plot.ratio_bars(left, ratios, colors)
    left.set_title(f"Times faster than {NAMES[peer]}", fontsize=11)
    left.set_xlabel(f"time of {NAMES[peer]} ÷ time of tensorkv   (longer is better)")
    limits = {
        name: {verb: dict.fromkeys(("median", "min", "max"), times) for verb, times in found.items()}
        if work["moved_nbytes"] >= _TINY_NBYTES
        else {}
        for name, work in works.items()
        if (found := work["limit"]["times_limit"])
    }
    plot.ratio_bars(right, {name: found for name, found in limits.items() if found}, colors)
    right.set_title("Distance to the limit of the memory", fontsize=11)
    right.set_xlabel("time of tensorkv ÷ limit (bytes to move ÷ copy bandwidth; shorter is better)")
    figure.legend(handles.values(), list(handles), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
