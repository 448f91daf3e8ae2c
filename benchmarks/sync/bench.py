"""How fast processes exchange in lock step, beside peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import launch, plot
from benchmarks.common.benchmark import Benchmark, counts
from benchmarks.common.report import nbytes_text, p50_text, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Roster, measure
from benchmarks.common.venvs import MPI, MXNET
from benchmarks.sync import works as sync_works
from benchmarks.sync.contenders import NAMES
from benchmarks.sync.works import check_losses

PEERS = ("mxnet1", "mxnet2", "gloo", "mpi")
_PAIRS = {peer: (peer, "tensorkv") for peer in PEERS}
_TRAINING_PAIRS = {"ddp": ("ddp", "tensorkv"), "ddp beside overlap": ("ddp", "overlap")}
_MEMBERS = "benchmarks.sync.contenders"
_TRAINING = {
    "tensorkv": "benchmarks.sync.training:Trained",
    "overlap": "benchmarks.sync.training:Overlapped",
    "ddp": "benchmarks.sync.training:DDP",
}
# Of smaller values, other memory of a process is the larger part.
_LEAST_NBYTES = 50e6
_COLORS = {
    "mxnet1": plot.BLUE,
    "mxnet2": plot.LIGHT_BLUE,
    "gloo": plot.ORANGE,
    "mpi": plot.GREEN,
    "ddp": plot.RED,
    "ddp beside overlap": plot.PINK,
}


class SyncBenchmark(Benchmark):
    """Exchanges and training steps of ``dist_sync`` stores."""

    name = "sync"
    help = "processes in lock step beside MXNet, Gloo, MPI and DistributedDataParallel"
    description = """\
Measure pushpull of a dist_sync store beside MXNet's dist_sync, Gloo and MPI all-reduce, and a step of its Trainer
beside PyTorch's DistributedDataParallel. All take turns in one run, so read ratios rather than milliseconds. Every
result is checked on every rank; a wrong one ends the run with exit status 1 and nothing is written."""
    epilog = f"""\
Files in --out: sync.json (all raw times, versions, machine), sync.md (tables), sync.png. MXNet 1.9.1 and MPI get
virtual environments of their own in {MXNET.folder}/ and {MPI.folder}/, created when first needed. A peer that cannot be
started is left out, and the tables say why.

examples:
  python -m benchmarks sync --quick                    a few seconds: does it work here?
  python -m benchmarks sync                            everything
  python -m benchmarks sync --only SGD --ranks 2       works with "SGD" in their names, with 2 ranks"""
    title = "Processes in lock step: tensorkv and its peers"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--ranks", type=counts(2, "ranks"), metavar="N,N", help="ranks on one host (default 2,4; quick: 2)")
        add("--no-mpi", action="store_true", help="leave MPI out")

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        quick = options.quick
        options.ranks = options.ranks or ((2,) if quick else (2, 4))
        return {
            "works": [work for ranks in options.ranks for work in sync_works.exchanges(ranks, quick=quick)],
            "training": [work for ranks in options.ranks for work in sync_works.trainings(ranks, quick=quick)],
        }

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        mxnet, mpi = (self.find_python(venv, options) for venv in (MXNET, MPI))
        measured: list[dict[str, Any]] = []
        trained: list[dict[str, Any]] = []
        for ranks in options.ranks:
            launchers = _launchers(ranks, mxnet, mpi)
            with Roster(launchers, self.missing, self.versions, fresh=("mxnet1", "mxnet2")) as roster:
                for work in works["works"]:
                    if work.parts == ranks:
                        # All-reduce has no optimizer.
                        names = ["tensorkv", *(PEERS[:2] if work.rule == "momentum" else PEERS)]
                        measured.append(measure(work, roster, _PAIRS, options.reps, names=names))
            launchers = {name: partial(launch.torchrun, name, ranks, member) for name, member in _TRAINING.items()}
            # What a process has kept of an earlier work is not to count as memory that was there before.
            fresh = tuple(launchers)
            with Roster(launchers, self.missing, self.versions, fresh, topic=", training") as roster:
                trained += [_train(work, roster, options.reps) for work in works["training"] if work.ranks == ranks]
        return {"works": measured, "training": trained}

    def given(self, result: Mapping[str, Any]) -> str:
        return "NumPy arrays, each rank pushes one part; one OpenMP thread a process (as torchrun sets it)"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        works, training = result["works"], result["training"]
        return [
            _exchanges(works),
            _training(training),
            memory_section(works),
            training_memory_section(training),
            spreads([*works, *training], NAMES),
        ]

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        return {"sync.png": partial(_draw, result)}


def _launchers(ranks: int, mxnet: str | None, mpi: str | None) -> dict[str, Callable[[], Any]]:
    launchers: dict[str, Callable[[], Any]] = {
        "tensorkv": partial(launch.torchrun, "tensorkv", ranks, f"{_MEMBERS}:TensorKV"),
        "gloo": partial(launch.torchrun, "gloo", ranks, f"{_MEMBERS}:Gloo"),
    }
    if mxnet:
        for count in (1, 2):
            name = f"mxnet{count}"
            launchers[name] = partial(launch.mxnet, name, count, mxnet, ranks, f"{_MEMBERS}:MXNet")
    if mpi:
        launchers["mpi"] = partial(launch.mpi, "mpi", mpi, ranks, f"{_MEMBERS}:MPI")
    return launchers


def _train(work: Any, roster: Roster, reps: int) -> dict[str, Any]:
    """Time steps of training, in turns, and compare the losses."""
    found = measure(
        work, roster, _TRAINING_PAIRS, reps, names=list(_TRAINING), look=lambda team: team.call("losses")
    )  # fmt: skip
    losses = found.pop("found")
    for own in losses.values():
        check_losses(work, own, losses.get("ddp", own))
    return {**found, "parameters": work.parameters, "losses": losses}


def _exchanges(works: Sequence[Mapping[str, Any]]) -> list[str]:
    return section(
        "Exchanges",
        "One exchange of all keys, from a common start to the end of the last rank. Median of the peer ÷ median of "
        "tensorkv; in brackets the least and the largest ratio of one repetition. Above 1, tensorkv is faster. "
        "All-reduce has no optimizer, so that it has no rows with SGD.",
        ["work", "tensorkv, ms", *(f"{NAMES[peer]} ÷ tensorkv" for peer in PEERS)],
        [[work["name"], p50_text(work, "tensorkv"), *ratio_texts(work, PEERS)] for work in works],
    )


def _training(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        losses = next(iter(work["losses"].values()), [[]])[0]
        loss = f"{losses[0]:.3g} → {losses[-1]:.3g}" if losses else "–"
        cells = [p50_text(work, name) for name in _TRAINING]
        rows.append([work["name"], *cells, *ratio_texts(work, list(_TRAINING_PAIRS)), loss])
    return section(
        "A step of training",
        "zero_grad, forward, backward and step, with SGD and momentum or with AdamW: `tensorkv.Trainer`, whose store "
        "steps, beside `DistributedDataParallel` with `torch.optim.SGD`, or with `torch.optim.AdamW` in a "
        "`ZeroRedundancyOptimizer`, with their defaults. All have the same losses (checked).",
        ["work", "tensorkv, ms", "tensorkv with overlap, ms", "DDP, ms", "DDP ÷ tensorkv", "DDP ÷ overlap", "loss"],
        rows,
    )


def memory_section(works: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of what an exchange adds to the memory, for works of one large value."""
    rows = []
    for work in works:
        if work["keys"] > 1 or work["value_nbytes"] < _LEAST_NBYTES:
            continue
        for name, found in work["memory_nbytes"].items():
            added = {whose: found["most"][whose] - found["before"][whose] for whose in ("ranks", "helpers")}
            per_rank = added["ranks"] / work["parts"]
            cells = [nbytes_text(per_rank), times_text(per_rank / work["value_nbytes"])]
            rows.append([work["name"], NAMES[name], *cells, times_text(added["helpers"] / work["value_nbytes"])])
    return section(
        "Memory",
        "What an exchange takes beyond the arrays that it is given: the peak, less what was there before "
        "the store was made. Memory that processes share counts once; files such as libraries do not count. "
        "Servers: all of them together.",
        ["work", "who", "a rank", "a rank ÷ values", "servers ÷ values"],
        rows,
    )


def training_memory_section(works: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of what a training takes of each rank's memory."""
    rows = []
    for work in works:
        if work["value_nbytes"] < _LEAST_NBYTES:
            continue
        for name, found in work["memory_nbytes"].items():
            before = found["before"]["ranks"]
            cells = []
            for moment in ("after", "most"):
                per_rank = (found[moment]["ranks"] - before) / work["ranks"]
                cells += [nbytes_text(per_rank), times_text(per_rank / work["value_nbytes"])]
            rows.append([work["name"], NAMES[name], *cells])
    return section(
        "Memory of training",
        "What training takes of a rank beyond the model and its batch, gradients included: at rest after a step, and "
        "at its peak. Memory that processes share counts once; files such as libraries do not count. "
        "DDP with AdamW divides its state over ranks (`ZeroRedundancyOptimizer`).",
        ["work", "who", "at rest", "at rest ÷ parameters", "peak", "peak ÷ parameters"],
        rows,
    )


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of every peer to tensorkv, a panel for each number of ranks."""
    panels: dict[str, dict[str, Any]] = {}
    for work in [*result["works"], *result["training"]]:
        size, *_, last = work["name"].split(", ")
        name = size.replace(" ", "\n", 1) if "ranks" in last else f"{size}\n{last}"
        panels.setdefault(f"{work.get('parts') or work['ranks']} ranks", {})[name] = work["summary"]["pushpull"][
            "ratios"
        ]
    panels = panels or {"nothing was measured": {}}
    longest = max(map(len, panels.values()))
    figure = plot.new_figure(
        result, "Processes in lock step, times faster than a peer", 2.5 + 5 * len(panels), 2.4 + 0.95 * longest
    )
    handles: dict[str, Any] = {}
    for axes, (title, works) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        handles |= plot.ratio_bars(axes, works, _COLORS)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("time of the peer ÷ time of tensorkv   (right of 1: tensorkv is faster)", fontsize=8.5)
    names = [NAMES[peer] for peer in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.savefig(path, dpi=130)
