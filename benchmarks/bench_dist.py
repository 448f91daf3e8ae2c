"""How fast processes exchange in step, beside peers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import compare
import dist_compare
import dist_launch
import dist_plots
import dist_report
import dist_training
import dist_works
import machine
from dist_compare import Roster
from dist_contenders import PEERS
from dist_hosts import Hosts, HostsError
from dist_works import Exchange, Training
from peers import MPI_VENV, MXNET_VENV, PeerError, start_mpi, start_mxnet
from works import WrongResultError

_LEAST_REPS = 7
_HOSTS = 2
_PER_HOST = (1, 2)

_DESCRIPTION = """\
Measure pushpull of a dist_sync store beside MXNet's dist_sync, Gloo and MPI all-reduce, and a step of its Trainer
beside PyTorch's DistributedDataParallel. All take turns in one run, so read ratios rather than milliseconds. Every
result is checked on every rank; a wrong one ends the run with exit status 1 and nothing is written."""
_EPILOG = f"""\
Files in --out: dist.json (all raw times, versions, machine), dist.md (tables), dist.png. MXNet 1.9.1 and MPI get
virtual environments of their own in {MXNET_VENV.name}/ and {MPI_VENV.name}/, made when first needed. Who cannot be
started is left out, and the tables say why.

examples:
  python benchmarks/bench_dist.py --quick                    a few seconds: does it work here?
  python benchmarks/bench_dist.py --hosts                    everything; --hosts needs root
  python benchmarks/bench_dist.py --only SGD --ranks 2       works with "SGD" in their names, with 2 ranks"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.ranks = options.ranks or ((2,) if options.quick else (2, 4))
    if not options.quick and options.reps is not None and options.reps < _LEAST_REPS:
        parser.error(f"--reps is {options.reps}; fewer than {_LEAST_REPS} say little (--quick does 2)")
    works = _works(options)
    wanted = [work for work in works if _is_wanted(work.name, options.only)]
    if not wanted:
        names = "\n  ".join(work.name for work in works)
        parser.error(f"--only {' '.join(options.only)} fits none of these works:\n  {names}")
    try:
        result = _run(options, wanted)
    except (WrongResultError, PeerError) as error:
        compare.end_progress()
        print(f"error: {error}", file=sys.stderr)
        return 1
    _write(result, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME", help="works whose name contains NAME; may be repeated")
    add("--reps", type=int, metavar="N", help=f"repetitions of each, at least {_LEAST_REPS} (default 11; quick: 2)")
    add("--ranks", type=_ranks, metavar="N,N", help="numbers of ranks on one host (default 2,4; quick: 2)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where files go (default out/bench)")
    add("--no-mxnet", action="store_true", help="leave MXNet out")
    add("--no-mpi", action="store_true", help="leave MPI out")
    add("--hosts", action="store_true", help="also between two hosts, made of network namespaces; needs root")
    add("--quick", action="store_true", help="toy sizes; installs nothing; no result to publish")
    return parser


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers with commas between them") from None
    if min(ranks) < 2:
        raise argparse.ArgumentTypeError(f"an exchange takes 2 ranks, not {min(ranks)}")
    return ranks


def _works(options: argparse.Namespace) -> list[Exchange | Training]:
    works: list[Exchange | Training] = []
    for ranks in options.ranks:
        works += dist_works.exchanges(ranks, quick=options.quick)
        works.append(dist_works.training(ranks, quick=options.quick))
    if options.hosts:
        for per_host in _PER_HOST:
            works += dist_works.exchanges_between_hosts(_HOSTS * per_host, _HOSTS, quick=options.quick)
    return works


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def _run(options: argparse.Namespace, works: Sequence[Exchange | Training]) -> dict[str, Any]:
    reps = options.reps or (2 if options.quick else 11)
    before = machine.load()
    versions, missing = machine.versions(), dict[str, str]()
    pythons = _find_pythons(options, versions, missing)
    measured: list[dict[str, Any]] = []
    trained: list[dict[str, Any]] = []
    for ranks in options.ranks:
        roster = Roster(_launchers(ranks, pythons), missing, versions, fresh=("mxnet1", "mxnet2"))
        try:
            for work in works:
                if isinstance(work, Training) and work.ranks == ranks:
                    trained.append(dist_compare.train(work, roster, reps))
                elif isinstance(work, Exchange) and (work.parts, work.hosts) == (ranks, 1):
                    names = PEERS[:2] if work.rule == "sgd" else PEERS
                    measured.append(dist_compare.measure(work, ("tensorkv", *names), roster, reps))
        finally:
            roster.end()
    far = [work for work in works if isinstance(work, Exchange) and work.hosts > 1]
    if far:
        measured += _run_between_hosts(far, reps, missing, versions)
    compare.end_progress()
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": machine.git_revision(),
        "quick": options.quick,
        "arguments": {"reps": reps, "only": options.only, "ranks": options.ranks, "hosts": options.hosts},
        "versions": versions,
        "machine": {**machine.describe(), "load_before": before, "load_after": machine.load()},
        "missing": missing,
        "works": measured,
        "training": trained,
    }


def _find_pythons(options: argparse.Namespace, versions: dict[str, str], missing: dict[str, str]) -> dict[str, str]:
    """Return the interpreters of the peers that need one of their own."""
    pythons: dict[str, str] = {}
    for name, start in {"mxnet": start_mxnet, "mpi": start_mpi}.items():
        if getattr(options, f"no_{name}"):
            missing[name] = f"left out with --no-{name}"
            continue
        try:
            found = start(may_install=not options.quick)
        except PeerError as error:
            missing[name] = " ".join(str(error).split())
            continue
        versions["mpi4py" if name == "mpi" else name] = found.versions["version"]
        versions[f"numpy of {name}"] = found.versions["numpy"]
        pythons[name] = found.python
        found.end()
    return pythons


def _launchers(ranks: int, pythons: dict[str, str]) -> dict[str, Any]:
    launchers: dict[str, Any] = {name: partial(dist_launch.torchrun, name, ranks) for name in ("tensorkv", "gloo")}
    if dist_training.can_overlap():
        launchers["overlap"] = launchers["tensorkv"]
    if "mxnet" in pythons:
        launchers |= {f"mxnet{count}": partial(dist_launch.mxnet, count, pythons["mxnet"], ranks) for count in (1, 2)}
    if "mpi" in pythons:
        launchers["mpi"] = partial(dist_launch.mpi, pythons["mpi"], ranks)
    return launchers


def _run_between_hosts(
    works: Sequence[Exchange], reps: int, missing: dict[str, str], versions: dict[str, str]
) -> list[dict[str, Any]]:
    measured = []
    names = ("tensorkv", "gloo")
    for ranks in dict.fromkeys(work.parts for work in works):
        try:
            with Hosts() as hosts:
                start = partial(dist_launch.torchrun_on_hosts, ranks=ranks, hosts=hosts.places())
                roster = Roster({name: partial(start, name) for name in names}, missing, versions)
                try:
                    own = [work for work in works if work.parts == ranks]
                    measured += [dist_compare.measure(work, names, roster, reps, hosts) for work in own]
                finally:
                    roster.end()
        except HostsError as error:
            missing["hosts"] = str(error)
            break
    return measured


def _write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "dist.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = dist_report.markdown(result)
    (out / "dist.md").write_text(text)
    dist_plots.ratios(result, out / "dist.png")
    print(text)
    print(f"dist.json, dist.md, dist.png: {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
