"""How fast every form of a call is, with every array library, rule and size, on every engine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.colors import TwoSlopeNorm

from benchmarks.common import launch, machine, plot
from benchmarks.common.benchmark import Benchmark
from benchmarks.common.report import ms_text, ratio_text, section, times_text
from benchmarks.common.runner import Here, Roster, measure
from benchmarks.common.venvs import MPI, MXNET
from benchmarks.common.work import RULES
from benchmarks.matrix import contenders
from benchmarks.matrix.contenders import NAMES
from benchmarks.matrix.works import ARRAYS, ENGINES, FORMS, PUSHERS, Cell, Engine, cells

_COPY_NBYTES = 64 << 20
_REPLY_TIMEOUT_S = 900
# A cell during which the machine did something else is measured again: when one copy took so many times as long as
# another.
_DISTURBED, _MOST_TRIES = 4, 3
_MEMBERS = "benchmarks.matrix.contenders"
_PAIRS = {peer: (peer, "tensorkv") for peer in ("plain", "fused", "gloo", "mpi", "mxnet")}


class MatrixBenchmark(Benchmark):
    """pushpull in every form, with every array library, rule and size, on every engine."""

    name = "matrix"
    help = "every form, array library, rule and size on every engine, each beside a peer"
    description = """\
Measure pushpull over the matrix of engines, sizes, rules, array libraries and forms of a call: the first call of a new
store, repeated calls, and calls with a new random half of the keys each time. Repeated calls take turns with a peer:
plain NumPy or torch, torch.optim's fused step, or Gloo's all_reduce of one flat buffer; lists of NumPy arrays also with
MXNet and MPI. Every result is checked; a wrong one ends the run with exit status 1 and nothing is written."""
    epilog = f"""\
Files in --out: matrix.json (all raw times, versions, machine), matrix.md (tables), matrix.png. The whole matrix has
{len(cells(ENGINES, quick=False)):,} cells and takes some hours and 24 GB of memory; with --keep it can be measured
in several runs. --only takes parts of names such as "local: 2×3, torch, list, AdamW".

examples:
  python -m benchmarks matrix --quick                        toy sizes: does it work here?
  python -m benchmarks matrix --engines local                one engine
  python -m benchmarks matrix --only "2×3, torch"            one size and library, on every engine"""
    title = "Every form, array library, rule and size"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--engines", type=_engines, default=ENGINES, metavar="E,E", help=f"default {','.join(ENGINES)}")
        add("--no-mpi", action="store_true", help="leave MPI out")
        add("--keep", action="store_true", help="keep the other cells that matrix.json in --out has, of earlier runs")

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        return {engine: cells([engine], quick=options.quick) for engine in options.engines}

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        mxnet, mpi = (self.find_python(venv, options) for venv in (MXNET, MPI))
        copy = machine.Copy(_COPY_NBYTES)
        copy.time()
        measured = _earlier(options.out) if options.keep else {}
        here = {"git": machine.git_revision(), "cpu": machine.describe()["cpu"]}
        for engine in options.engines:
            launchers = _launchers(engine, mxnet, mpi)
            # MXNet's servers take an optimizer once.
            fresh = ("mxnet",) if engine != "local" else ()
            with Roster(launchers, self.missing, self.versions, fresh, f", {engine}") as roster:
                for work in works[engine]:
                    names = [name for name in _contenders(work) if name in launchers]
                    for _ in range(_MOST_TRIES):
                        found = measure(
                            work,
                            roster,
                            _PAIRS,
                            options.reps,
                            names=names,
                            alone=("first", "changing") if work.keys > 1 else ("first",),
                            others={"copy": copy},
                        )
                        if not _is_disturbed(found):
                            break
                    measured[work.name] = {**_brief(work, found, copy), **here}
        names = [work.name for work in cells(ENGINES, quick=options.quick)]
        return {"cells": [measured[name] for name in names if name in measured]}

    def given(self, result: Mapping[str, Any]) -> str:
        revisions = sorted({str(each["git"]) for each in result["cells"]})
        runs = "" if len(revisions) == 1 else f"; measured in several runs, of revisions {', '.join(revisions)}"
        return f"arrays of each library; where there are several workers, each has one OpenMP thread{runs}"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        by_engine = _grouped(result["cells"], "engine")
        parts = [
            _forms(engine, arrays, own)
            for engine, found in by_engine.items()
            for arrays, own in _grouped(found, "arrays").items()
        ]
        return [*parts, *(_lists(engine, found) for engine, found in by_engine.items())]

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        return {"matrix.png": partial(_draw, result)}


def _earlier(out: Path) -> dict[str, Any]:
    """Return the cells that earlier runs have measured, by name."""
    path = out / "matrix.json"
    return {each["name"]: each for each in json.loads(path.read_text())["cells"]} if path.exists() else {}


def _engines(text: str) -> tuple[Engine, ...]:
    found = tuple(engine for engine in ENGINES if engine in text.split(","))
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(ENGINES)}")
    return found


def _launchers(engine: Engine, mxnet: str | None, mpi: str | None) -> dict[str, Callable[[], Any]]:
    ranks = PUSHERS[engine]
    if engine == "local":
        kinds = {"tensorkv": contenders.TensorKV, "plain": contenders.Plain, "fused": contenders.Torch}
        launchers: dict[str, Callable[[], Any]] = {name: partial(Here, kind) for name, kind in kinds.items()}
        if mxnet:
            launchers["mxnet"] = partial(launch.alone, "mxnet", f"{_MEMBERS}:MXNet", mxnet)
        return launchers
    kinds = {"tensorkv": "TensorKV", **({"gloo": "Gloo"} if ranks > 1 else {"fused": "Torch", "plain": "Plain"})}
    options = {"reply_timeout_s": _REPLY_TIMEOUT_S}
    launchers = {
        name: partial(launch.torchrun, name, ranks, f"{_MEMBERS}:{kind}", **options) for name, kind in kinds.items()
    }
    if mxnet:
        member = f"{_MEMBERS}:{'SyncMXNet' if engine == 'dist_sync' else 'AsyncMXNet'}"
        launchers["mxnet"] = partial(launch.mxnet, "mxnet", 1, mxnet, ranks, member, **options)
    if mpi and ranks > 1:
        launchers["mpi"] = partial(launch.mpi, "mpi", mpi, ranks, f"{_MEMBERS}:MPI", **options)
    return launchers


def _peer(engine: str, rule: str) -> str:
    """Return the peer beside which every form is measured."""
    return "gloo" if PUSHERS[engine] > 1 else "plain" if rule == "assign" else "fused"


def _peers_text(engine: str) -> str:
    return " or ".join(dict.fromkeys(NAMES[_peer(engine, rule)] for rule in RULES))


def _ratio(each: Mapping[str, Any]) -> float:
    """Return how many times faster than its peer a cell is."""
    median_ratio: float = each["ratios"][_peer(each["engine"], each["rule"])]["median"]
    return median_ratio


def _contenders(work: Cell) -> list[str]:
    names = ["tensorkv", _peer(work.engine, work.rule)]
    if work.arrays == "numpy" and work.form == "list":
        # Servers of MXNet's dist_async end, and its workers wait forever, if no optimizer is set.
        names += ["mxnet"] if (work.engine, work.rule) != ("dist_async", "assign") else []
        names += ["mpi"] if work.rule == "assign" else []
    return names


def _is_disturbed(found: Mapping[str, Any]) -> bool:
    copies = found["times_s"]["pushpull"]["copy"]
    return bool(max(copies) > _DISTURBED * min(copies))


def _brief(work: Cell, found: Mapping[str, Any], copy: machine.Copy) -> dict[str, Any]:
    """Return what a cell's row needs, and raw times."""
    times = found["times_s"]
    once = median(times["pushpull"]["tensorkv"])
    limit_s = work.moved_nbytes * median(times["pushpull"]["copy"]) / copy.moved_nbytes
    # Both halves of the keys are one call of the contender.
    changing = median(times["changing"]["tensorkv"]) / (2 * once) if "changing" in times else None
    return {
        **{name: getattr(work, name) for name in ("name", "engine", "size", "rule", "arrays", "form")},
        "ms": 1e3 * once,
        "first": median(times["first"]["tensorkv"]) / once,
        "changing": changing,
        # Earlier runs came back to the same four choices of half of the keys.
        "halves": "new",
        "disturbed": _is_disturbed(found),
        "limit": once / limit_s,
        "ratios": found["summary"]["pushpull"]["ratios"],
        "times_s": times,
    }


def _grouped(found: Iterable[Mapping[str, Any]], *names: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for each in found:
        key = tuple(each[name] for name in names)
        groups.setdefault(key[0] if len(names) == 1 else key, []).append(each)
    return groups


def _forms(engine: str, arrays: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for (size, rule), own in _grouped(found, "size", "rule").items():
        by_form = {each["form"]: each for each in own}
        rows.append([size, RULES[rule][0], *(_form_text(by_form.get(form)) for form in FORMS)])
    return section(
        f"`{engine}`, {arrays}",
        f"In bold, the median of {_peers_text(engine)} ÷ the median of tensorkv, of repeated calls: above 1, tensorkv "
        "is faster. Behind it, the first call of a new store ÷ a repeated one; then, where there are several keys, a "
        "call with a new random half of the keys ÷ a repeated call with all (*: with one of eight halves, which came "
        f"again and again). Measured on {_cpus_text(found)}.",
        ["work", "rule", *FORMS],
        rows,
    )


def _cpus_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Return what cells were measured on: one processor, or several with their sizes."""
    by_cpu = {cpu: dict.fromkeys(each["size"] for each in own) for cpu, own in _grouped(found, "cpu").items()}
    if len(by_cpu) == 1:
        return str(next(iter(by_cpu)))
    return "; ".join(f"{cpu} ({', '.join(sizes)})" for cpu, sizes in by_cpu.items())


def _form_text(each: Mapping[str, Any] | None) -> str:
    if each is None:
        return "–"
    texts = [f"**{times_text(_ratio(each))}**", times_text(each["first"])]
    if each["changing"] is not None:
        texts.append(times_text(each["changing"]) + ("" if "halves" in each else "*"))
    return " · ".join(texts)


def _lists(engine: str, found: Iterable[Mapping[str, Any]]) -> list[str]:
    own = [each for each in found if each["arrays"] == "numpy" and each["form"] == "list"]
    peers = [name for name in _PAIRS if any(name in each["ratios"] for each in own)]
    return section(
        f"`{engine}`, lists of NumPy arrays, beside every peer",
        "× limit: time of tensorkv ÷ (bytes to move ÷ copy bandwidth), as for one machine. Then the median of the peer "
        "÷ the median of tensorkv; in brackets the least and the largest ratio of one repetition. Measured on "
        f"{_cpus_text(own)}.",
        ["work", "rule", "tensorkv, ms", "× limit", *(f"{NAMES[peer]} ÷ tensorkv" for peer in peers)],
        [
            [
                each["size"],
                RULES[each["rule"]][0],
                ms_text(each["ms"]),
                times_text(each["limit"]),
                *(ratio_text(each["ratios"].get(peer)) for peer in peers),
            ]
            for each in own
        ],
    )


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a heat map for each engine: how many times faster than the peer each cell is."""
    by_engine = _grouped(result["cells"], "engine")
    rows = list(_grouped(result["cells"], "size", "rule"))
    columns = [(arrays, form) for arrays in ARRAYS for form in FORMS]
    figure = plot.new_figure(
        result, "pushpull, times faster than the peer", 3 + 9 * len(by_engine), 3 + 0.3 * len(rows)
    )
    norm = TwoSlopeNorm(0, -4, 6)
    panels = figure.subplots(1, len(by_engine), squeeze=False, sharey=True)[0]
    for axes, (engine, found) in zip(panels, by_engine.items(), strict=True):
        ratios = {(each["size"], each["rule"], each["arrays"], each["form"]): _ratio(each) for each in found}
        plot.heat_map(axes, [[ratios.get((*row, *column)) for column in columns] for row in rows], norm)
        axes.set_xticks(range(len(columns)), [form for _, form in columns], rotation=90, fontsize=8)
        for place, arrays in enumerate(ARRAYS):
            middle = len(FORMS) * (place + 0.5) - 0.5
            axes.annotate(arrays, (middle, -0.7), ha="center", annotation_clip=False, fontsize=9, fontweight="bold")
        axes.set_title(f"{engine}, beside {_peers_text(engine)}", fontsize=11, pad=22)
    panels[0].set_yticks(range(len(rows)), [f"{size}, {RULES[rule][0]}" for size, rule in rows], fontsize=8)
    figure.supxlabel("blue: tensorkv is faster; red: the peer is faster", fontsize=9)
    figure.savefig(path, dpi=110)
