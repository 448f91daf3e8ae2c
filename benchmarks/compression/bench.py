"""How fast codecs are, and what they save where the network is the limit."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import launch, plot
from benchmarks.common.benchmark import Benchmark
from benchmarks.common.hosts import Host, HostsError, hosts, places
from benchmarks.common.report import p50_text, ratio_texts, section, spreads, times_text
from benchmarks.common.runner import Here, Roster, measure, progress
from benchmarks.common.team import Team
from benchmarks.common.venvs import MXNET, PeerError
from benchmarks.common.work import WrongResultError
from benchmarks.compression import works as compression_works
from benchmarks.compression.contenders import NAMES, Copy, Decode, Encode
from benchmarks.compression.digits import RANKS, Digits, Ours, write
from benchmarks.compression.works import CODECS
from benchmarks.sync.works import check_losses

_MEMBERS = "benchmarks.compression.contenders"
_TRAINING = "benchmarks.compression.training"
_DIGITS = "benchmarks.compression.digits"
# For gradients of a mean loss, which are small.
_TRAINING_CODECS: dict[str, dict[str, Any]] = {
    "fp16": CODECS["fp16"],
    "2bit": {"type": "2bit", "threshold": 1e-4},
    "powersgd": CODECS["powersgd"],
}
_HOOKS = {"ddp": "DDP", "ddp fp16": "Fp16DDP", "ddp powersgd": "PowerSGDDDP"}
# A codec is above the line where it saves time.
_LINK_PAIRS = {codec: ("none", codec) for codec in CODECS} | {
    "mxnet": ("mxnet", "none"),
    "mxnet 2bit": ("mxnet 2bit", "2bit"),
}
_TRAINING_PAIRS = {codec: ("none", codec) for codec in _TRAINING_CODECS} | {
    "ddp": ("ddp", "none"),
    "ddp fp16": ("ddp fp16", "fp16"),
    "ddp powersgd": ("ddp powersgd", "powersgd"),
}
_COLORS = {
    "bf16": plot.ORANGE,
    "fp16": plot.RED,
    "int8": plot.GREEN,
    "2bit": plot.BLUE,
    "1bit": "#5dade2",
    "topk": "#8e44ad",
    "powersgd": "#7f8c8d",
}


class CompressionBenchmark(Benchmark):
    """Codecs, and exchanges and trainings over slow links."""

    name = "compression"
    help = "gradient compression: codecs, and a slow link beside MXNet's 2bit and DDP's hooks"
    description = """\
Measure each codec in one process, and then exchanges and steps of training between two hosts whose links carry
1 Gbit/s: without compression, with each codec, and with MXNet's 2bit and the fp16 and PowerSGD hooks of PyTorch's DDP.
The hosts are namespaces of this machine, joined by a switch, which take root. All take turns; every result is checked,
and a wrong one ends the run with exit status 1."""
    epilog = """\
Files in --out: compression.json (all raw times, versions, machine), compression.md (tables), compression.png.

examples:
  sudo python -m benchmarks compression --quick --no-mxnet   toy sizes: does it work here?
  python -m benchmarks compression --only codec              the codecs alone, which need no root"""
    title = "Gradient compression: codecs, and a slow link"
    names = NAMES

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        pass

    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        quick = options.quick
        return {
            "codecs": compression_works.codings(quick=quick),
            "links": compression_works.links(quick=quick),
            "training": compression_works.trainings(quick=quick),
            "digits": [Digits("", codec, 2 if quick else 30) for codec in ("none", "2bit")],
        }

    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        found: dict[str, list[dict[str, Any]]] = {topic: [] for topic in works}
        here: dict[str, Callable[[], Here]] = {
            name: partial(Here, kind) for name, kind in (("encode", Encode), ("decode", Decode), ("copy", Copy))
        }
        pairs = {"encode": ("encode", "copy"), "decode": ("decode", "copy")}
        with Roster(here, self.missing, self.versions) as roster:
            for work in works["codecs"]:
                found["codecs"].append(measure(work, roster, pairs, options.reps, names=list(here)))
        mxnet = self.find_python(MXNET, options)
        found["digits"] = [self._learn(work, mxnet) for work in works["digits"]]
        if not works["links"] and not works["training"]:
            return found
        try:
            with hosts(2) as made:
                for host in made:
                    host.limit((*works["links"], *works["training"])[0].rate)
                with Roster(_links(made, mxnet), self.missing, self.versions, ("mxnet", "mxnet 2bit")) as roster:
                    for work in works["links"]:
                        sent = made[0].sent_nbytes
                        names = list(_links(made, mxnet))
                        found["links"].append(
                            measure(work, roster, _LINK_PAIRS, options.reps, names=names, sent_nbytes=sent)
                        )
                launchers = _trainings(made)
                with Roster(launchers, self.missing, self.versions, tuple(launchers), ", training") as roster:
                    found["training"] = [_train(work, roster, options.reps) for work in works["training"]]
        except HostsError as error:
            self.missing["hosts"] = str(error)
        return found

    def _learn(self, work: Digits, mxnet: str | None) -> dict[str, Any]:
        """Return the accuracies of a training with this store, and with MXNet's, and what was sent."""
        progress(work.name)
        with tempfile.TemporaryDirectory() as folder:
            work = replace(work, path=f"{folder}/digits.npz")
            write(Path(work.path), work.epochs)
            ours = Ours(work)
            ours.open(0)
            ours.train()
            raw_nbytes = RANKS * len(ours.shares()) * sum(4 * ours.data[name].size for name in ours.names)
            sent_nbytes = raw_nbytes if work.codec == "none" else ours.sent_nbytes()
            ours.close()
            accuracies = {"tensorkv": ours.found}
            if mxnet:
                try:
                    accuracies["mxnet"] = _learn_with_mxnet(work, mxnet)
                except PeerError as error:
                    self.missing["mxnet, digits"] = " ".join(str(error).split())
        if not all(each[-1] > (0.9 if work.epochs > 2 else 0.3) for each in accuracies.values()):
            raise WrongResultError(f"{work.name}: nothing was learnt: {accuracies}")
        return {"name": work.name, "codec": work.codec, "accuracies": accuracies, "sent_nbytes": sent_nbytes}

    def given(self, result: Mapping[str, Any]) -> str:
        return "NumPy arrays; one OpenMP thread a process (as torchrun sets it); hosts are namespaces of one machine"

    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        measured = [*result["links"], *result["training"]]
        return [
            _codecs(result["codecs"]),
            _exchanges(result["links"]),
            _steps(result["training"]),
            _learnt(result["digits"]),
            spreads(measured, NAMES),
        ]

    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        drawn = {"compression.png": partial(_draw, result)}
        return drawn | ({"compression-digits.png": partial(_draw_digits, result)} if result["digits"] else {})


def _links(made: Sequence[Host], mxnet: str | None) -> dict[str, Callable[[], Team]]:
    on = places(made)
    launchers: dict[str, Callable[[], Team]] = {
        name: partial(launch.torchrun, name, 2, f"{_MEMBERS}:Compressed", on, options={"params": params})
        for name, params in {"none": None, **CODECS}.items()
    }
    if mxnet:
        for name, member in (("mxnet", "PlainMXNet"), ("mxnet 2bit", "CompressedMXNet")):
            launchers[name] = partial(launch.mxnet, name, 2, mxnet, 2, f"{_MEMBERS}:{member}", on)
    return launchers


def _trainings(made: Sequence[Host]) -> dict[str, Callable[[], Team]]:
    start: Any = partial(launch.torchrun, ranks=2, hosts=places(made))
    launchers: dict[str, Callable[[], Team]] = {"none": partial(start, "none", member=f"{_TRAINING}:Trained")}
    for name, params in _TRAINING_CODECS.items():
        launchers[name] = partial(start, name, member=f"{_TRAINING}:Trained", options={"params": params})
    for name, member in _HOOKS.items():
        launchers[name] = partial(start, name, member=f"{_TRAINING}:{member}")
    return launchers


def _train(work: Any, roster: Roster, reps: int) -> dict[str, Any]:
    """Time steps of training, in turns, and check the losses."""
    names = ["none", *_TRAINING_CODECS, *_HOOKS]
    found = measure(work, roster, _TRAINING_PAIRS, reps, names=names, look=lambda team: team.call("losses"))
    losses = found.pop("found")
    for name, own in losses.items():
        if name in ("none", "ddp"):
            check_losses(work, own, losses.get("ddp", own))
        if not all(math.isfinite(last := ranks[-1]) and last < ranks[0] for ranks in own):
            raise WrongResultError(f"{work.name}: with {NAMES[name]} the loss does not fall")
    return {**found, "parameters": work.parameters, "losses": losses}


def _codecs(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        spread = work["summary"]["pushpull"]["spread"]
        speeds = [f"{work['value_nbytes'] / 1e6 / spread[name]['p50_ms']:.2f}" for name in ("encode", "decode", "copy")]
        rows.append([work["name"], *speeds, *ratio_texts(work, ["encode", "decode"])])
    return section(
        "Codecs",
        "GB/s of float32 in one thread: with the residual, from gradients to words, and from words to float32; beside "
        "a plain copy. Ratios are of times: above 1, the copy is faster.",
        ["work", "encode, GB/s", "decode, GB/s", "copy, GB/s", "encode ÷ copy", "decode ÷ copy"],
        rows,
    )


def _exchanges(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        sent = work["sent_nbytes"]
        ratios = work["summary"]["pushpull"]["ratios"]
        for name in NAMES:
            if name in sent:
                saved = ratio_texts(work, [name])[0] if name in CODECS else "–"
                nbytes = times_text(sent["none"] / sent[name]) if "none" in sent else "–"
                rows.append([work["name"].partition(": ")[2], NAMES[name], p50_text(work, name), saved, nbytes])
        for name, what in (("mxnet", "MXNet ÷ tensorkv"), ("mxnet 2bit", "MXNet, 2bit ÷ tensorkv, 2bit")):
            if name in ratios:
                rows.append([work["name"].partition(": ")[2], what, "–", ratio_texts(work, [name])[0], "–"])
    return section(
        "Exchanges over 1 Gbit/s",
        "Push and pull of all keys by two hosts, a step of SGD each. Saved: the time without compression ÷ the time "
        "with it, or of MXNet ÷ of tensorkv; in brackets the least and the largest ratio of one repetition. Bytes: "
        "those on the cable of the first host in one call, both ways, without compression ÷ with it, headers included.",
        ["work", "who", "p50, ms", "time saved", "bytes saved"],
        rows,
    )


def _steps(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        for name in ("none", *_TRAINING_CODECS, *_HOOKS):
            if name in work["losses"]:
                losses = work["losses"][name][0]
                ratio = "–" if name == "none" else ratio_texts(work, [name])[0]
                cells = [p50_text(work, name), ratio, f"{losses[0]:.4g} → {losses[-1]:.4g}"]
                rows.append([work["name"].partition(": ")[2], NAMES[name], *cells])
    return section(
        "A step of training over 1 Gbit/s",
        "zero_grad, forward, backward and step, SGD with momentum, a batch of 4. For tensorkv, the ratio is the time "
        "without compression ÷ the time with it; for DDP, its time ÷ that of tensorkv with the same codec. Losses of "
        "the first rank, at its first and its last step.",
        ["work", "who", "p50, ms", "ratio", "loss"],
        rows,
    )


def _learn_with_mxnet(work: Digits, python: str) -> list[float]:
    team = launch.mxnet("mxnet", 1, python, RANKS, f"{_DIGITS}:MXNetLearner")
    try:
        team.build(work)
        team.open()
        team.time("pushpull")
        found: list[float] = team.call("accuracies")[0]
        team.dismiss()
    finally:
        team.end()
    return found


def _learnt(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        last = work["accuracies"]
        cells = [f"{last[who][-1]:.4f}" if who in last else "–" for who in ("tensorkv", "mxnet")]
        rows.append([work["name"], f"{work['sent_nbytes'] / 1e6:.2f}", *cells])
    return section(
        "Digits",
        f"A multilayer perceptron learns scikit-learn's handwritten digits with SGD: with tensorkv in one process that "
        f"compresses {RANKS} parts of each batch as if {RANKS} ranks had sent them, with MXNet on {RANKS} ranks. Data "
        "and order are the same. Accuracy on held-out images at the end. Bytes are of tensorkv's gradients, without "
        "headers.",
        ["work", "MB after compression", "accuracy, tensorkv", "accuracy, MXNet"],
        rows,
    )


def _draw_digits(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy with and without 2bit: over the bytes of tensorkv, and of both stores over epochs."""
    figure = plot.new_figure(result, "Handwritten digits: accuracy with and without 2bit", 12, 5)
    over_bytes, over_epochs = figure.subplots(1, 2, sharey=True)
    for work in result["digits"]:
        color = plot.BLUE if work["codec"] == "2bit" else plot.ORANGE
        values = work["accuracies"]["tensorkv"]
        epochs = range(1, len(values) + 1)
        megabytes = [work["sent_nbytes"] / 1e6 * epoch / len(values) for epoch in epochs]
        label = f"tensorkv, {work['codec']}"
        for axes, at in ((over_bytes, megabytes), (over_epochs, epochs)):
            axes.plot(at, values, color=color, linewidth=2, label=label)
        if "mxnet" in work["accuracies"]:
            label = f"MXNet, {work['codec']}"
            over_epochs.plot(epochs, work["accuracies"]["mxnet"], "x", color=color, label=label)
    over_bytes.set_xscale("log")
    over_bytes.set_xlabel("megabytes of gradients after compression, of all parts (log scale)")
    over_epochs.set_xlabel("epoch")
    over_bytes.set_ylabel("share of held-out images classified correctly")
    for axes in (over_bytes, over_epochs):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def _draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the time that each codec saves over a slow link."""
    works = {
        work["name"].partition(": ")[2].partition(", 2 ranks")[0]: {
            codec: ratio for codec, ratio in work["summary"]["pushpull"]["ratios"].items() if codec in _COLORS
        }
        for work in [*result["links"], *result["training"]]
    } or {"nothing was measured": {}}
    figure = plot.new_figure(result, "Time saved by compression over 1 Gbit/s", 11, 2.4 + 1.6 * len(works))
    axes = figure.subplots()
    handles = plot.ratio_bars(axes, works, _COLORS)
    axes.set_xlabel("time without compression ÷ time with it   (right of 1: compression is faster)", fontsize=9)
    figure.legend(
        handles.values(), list(handles), loc="outside lower center", ncols=max(1, len(handles)), frameon=False
    )
    figure.savefig(path, dpi=130)
