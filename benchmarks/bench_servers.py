"""How fast parameter servers are, beside MXNet's; what durability costs, how they grow, and how they come back."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import compare
import dist_launch
import machine
import servers_compare
import servers_plots
import servers_report
import servers_works
from dist_compare import Roster
from peers import MXNET_VENV, PeerError, start_mxnet
from servers_works import Serving
from works import WrongResultError

_LEAST_REPS = 7

_DESCRIPTION = """\
Measure pushpull of a dist_async store, whose servers step by SGD with momentum, beside push and pull of MXNet's
dist_async, all in turns in one run: read ratios rather than milliseconds. Also: what durability costs, more workers
and servers, many readers of one value, and how long a killed server is away. Every result is checked on every worker;
a wrong one ends the run with exit status 1 and nothing is written."""
_EPILOG = f"""\
Files in --out: servers.json (all raw times, versions, machine), servers.md (tables), servers.png. MXNet 1.9.1 gets a
virtual environment of its own in {MXNET_VENV.name}/, made when first needed. Who cannot be started is left out, and the
tables say why.

examples:
  python benchmarks/bench_servers.py --quick                 half a minute: does it work here?
  python benchmarks/bench_servers.py                         everything; some ten minutes
  python benchmarks/bench_servers.py --only durability       works with "durability" in their names"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.quick and options.reps is not None and options.reps < _LEAST_REPS:
        parser.error(f"--reps is {options.reps}; fewer than {_LEAST_REPS} say little (--quick does 2)")
    plan = _plan(options)
    wanted = {topic: [work for work in works if _is_wanted(work.name, options.only)] for topic, works in plan.items()}
    if not any(wanted.values()):
        names = "\n  ".join(dict.fromkeys(work.name for works in plan.values() for work in works))
        parser.error(f"--only {' '.join(options.only)} fits none of these works:\n  {names}")
    try:
        with _cluster():
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
    add("--workers", type=_counts, metavar="N,N", help="workers of growth (default 1,2,4,8; quick: 1)")
    add("--servers", type=_counts, metavar="N,N", help="servers of growth (default 1,2,4; quick: 2)")
    add("--readers", type=_counts, metavar="N,N", help="readers at once (default 1,4,16; quick: 1,2)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where files go (default out/bench)")
    add("--folder", metavar="DIR", help="where durable servers keep what they have (default: among temporary files)")
    add("--no-mxnet", action="store_true", help="leave MXNet out")
    add("--quick", action="store_true", help="toy sizes; installs nothing; no result to publish")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers with commas between them") from None
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{min(counts)} is not at least 1")
    return counts


def _plan(options: argparse.Namespace) -> dict[str, list[Serving]]:
    """Return the works of each topic; complete the options."""
    quick = options.quick
    options.reps = options.reps or (2 if quick else 11)
    options.workers = options.workers or ((1,) if quick else (1, 2, 4, 8))
    options.servers = options.servers or ((2,) if quick else (1, 2, 4))
    options.readers = options.readers or ((1, 2) if quick else (1, 4, 16))
    return {
        "works": servers_works.beside_peers(quick=quick),
        "durability": servers_works.durability(quick=quick),
        "growth": [work for count in options.workers for work in servers_works.growth(count, quick=quick)],
        "readers": [servers_works.readers(max(options.readers), quick=quick)],
        "recovery": [servers_works.recovery(quick=quick)],
    }


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


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


def _run(options: argparse.Namespace, wanted: dict[str, list[Serving]]) -> dict[str, Any]:
    before = machine.load()
    versions, missing = machine.versions(), dict[str, str]()
    found: dict[str, list[dict[str, Any]]] = {}
    # One server each, so that many processes less have to start.
    contenders = ("tensorkv1", "mxnet1") if options.quick else servers_compare.CONTENDERS
    levels = servers_compare.DURABILITIES[: 2 if options.quick else 3]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
        roster = Roster(_launchers(options, folder, versions, missing), missing, versions, fresh=servers_compare.PEERS)
        try:
            found["works"] = [
                servers_compare.beside_peers(work, contenders, roster, options.reps) for work in wanted["works"]
            ]
            found["durability"] = [
                servers_compare.durability(work, levels, roster, options.reps) for work in wanted["durability"]
            ]
        finally:
            roster.end()
        found["growth"] = _growth(options, wanted["growth"])
        few = 1 if options.quick else 3
        found["readers"] = [servers_compare.readers(work, options.readers, few) for work in wanted["readers"]]
        found["recovery"] = [servers_compare.recovery(work, f"{folder}/killed", few) for work in wanted["recovery"]]
        file_system = machine.file_system(folder)
    compare.end_progress()
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": machine.git_revision(),
        "quick": options.quick,
        "arguments": {name: getattr(options, name) for name in ("reps", "only", "workers", "servers", "readers")},
        "versions": versions,
        "machine": {**machine.describe(), "load_before": before, "load_after": machine.load()},
        "file_system": file_system,
        "missing": missing,
        **found,
    }


def _launchers(
    options: argparse.Namespace, folder: str, versions: dict[str, str], missing: dict[str, str]
) -> dict[str, Any]:
    launch = servers_compare.launch
    launchers: dict[str, Any] = {
        f"tensorkv{count}": partial(launch, f"tensorkv{count}", 2, num_servers=count) for count in (1, 2)
    }
    for level in ("process", "disk"):
        launchers[level] = partial(launch, level, 2, durability=level, path=f"{folder}/{level}")
    if options.no_mxnet:
        missing["mxnet"] = "left out with --no-mxnet"
        return launchers
    try:
        mxnet = start_mxnet(may_install=not options.quick)
    except PeerError as error:
        missing["mxnet"] = " ".join(str(error).split())
        return launchers
    versions["mxnet"], versions["numpy of mxnet"] = mxnet.versions["version"], mxnet.versions["numpy"]
    mxnet.end()
    for name in servers_compare.PEERS:
        launchers[name] = partial(
            dist_launch.mxnet, int(name[-1]), mxnet.python, 2, "async_mxnet",
            reply_timeout_s=servers_compare.REPLY_TIMEOUT_S,
        )  # fmt: skip
    return launchers


def _growth(options: argparse.Namespace, works: Sequence[Serving]) -> list[dict[str, Any]]:
    points = []
    for count in options.workers:
        own = [work for work in works if work.parts == count]
        if own:
            points += servers_compare.growth(count, own, options.servers, min(options.reps, 5))
    return points


def _write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "servers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = servers_report.markdown(result)
    (out / "servers.md").write_text(text)
    servers_plots.draw(result, out / "servers.png")
    print(text)
    print(f"servers.json, servers.md, servers.png: {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
