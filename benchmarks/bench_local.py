"""How fast one machine aggregates and updates, beside its peers and beside the limit of its memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import compare
import growth
import machine
import memory
import plots
import report
from peers import MXNET_VENV, PeerError, ProcessPeer, start_mxnet
from works import QUICK, WORKS, Work, WrongResultError

_COPY_NBYTES = 256 << 20
_QUICK_COPY_NBYTES = 1 << 20
_LEAST_REPS = 7

_DESCRIPTION = """\
Measure push + pull and pushpull of a local store beside MXNet's C++ KVStore, plain PyTorch, plain NumPy and the
copy bandwidth of the memory. All take turns in one run, so read ratios rather than milliseconds. Every result is
checked; a wrong one ends the run with exit status 1 and nothing is written."""
_EPILOG = f"""\
Files in --out: local.json (all raw times, versions, machine), local.md (tables), local.png, and with --growth
growth.png. MXNet 1.9.1 gets a virtual environment of its own in {MXNET_VENV.name}/, made when first needed; it needs
python3.11. Without MXNet the tables say why, and the rest is measured.

examples:
  python benchmarks/bench_local.py --quick                    a few seconds: does it work here?
  python benchmarks/bench_local.py --growth --memory          everything
  python benchmarks/bench_local.py --only SGD --reps 21       works with "SGD" in their names"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.quick and options.reps is not None and options.reps < _LEAST_REPS:
        parser.error(f"--reps is {options.reps}; fewer than {_LEAST_REPS} say little (--quick does 2)")
    works = [work for work in (QUICK if options.quick else WORKS) if _is_wanted(work, options.only)]
    if not works:
        names = "\n  ".join(work.name for work in (QUICK if options.quick else WORKS))
        parser.error(f"--only {' '.join(options.only)} fits none of these works:\n  {names}")
    try:
        result = _run(options, works)
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
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where files go (default out/bench)")
    add("--arrays", choices=("numpy", "torch"), default="numpy", help="what tensorkv is given (default numpy)")
    add("--no-mxnet", action="store_true", help="leave MXNet out")
    add("--mxnet-python", metavar="PATH", help=f"a Python that has MXNet (default: that of {MXNET_VENV.name}/)")
    add("--growth", action="store_true", help="also how the cost grows with keys, elements, parts (some minutes)")
    add("--memory", action="store_true", help="also what a push adds to the memory; needs 14 GB")
    add("--quick", action="store_true", help="toy sizes; installs nothing; no result to publish")
    return parser


def _is_wanted(work: Work, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in work.name.lower() for word in only)


def _run(options: argparse.Namespace, works: Sequence[Work]) -> dict[str, Any]:
    reps = options.reps or (2 if options.quick else 11)
    before = machine.load()
    versions = machine.versions()
    missing: dict[str, str] = {}
    mxnet: ProcessPeer | None = None
    try:
        if options.no_mxnet:
            missing["mxnet"] = "left out with --no-mxnet"
        else:
            try:
                mxnet = start_mxnet(options.mxnet_python, may_install=not options.quick)
                versions["mxnet"] = mxnet.versions["version"]
                versions["numpy of mxnet"] = mxnet.versions["numpy"]
            except PeerError as error:
                missing["mxnet"] = " ".join(str(error).split())
        copy = machine.Copy(_QUICK_COPY_NBYTES if options.quick else _COPY_NBYTES)
        names = ("tensorkv", "torch", "numpy")
        measured = []
        for work in works:
            found = compare.measure(work, names, mxnet, copy, reps, options.arrays)
            measured.append({**found, "summary": report.summarize(found)})
        del copy
    finally:
        if mxnet is not None:
            mxnet.end()
    grown = growth.measure(options.arrays, quick=options.quick) if options.growth else []
    held = []
    if options.memory:
        try:
            held = memory.measure(mxnet.python if mxnet else None, quick=options.quick)
        except memory.TooLittleMemoryError as error:
            missing["memory"] = str(error)
    compare.end_progress()
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": machine.git_revision(),
        "quick": options.quick,
        "arguments": {"reps": reps, "only": options.only, "arrays": options.arrays},
        "versions": versions,
        "machine": {**machine.describe(), "load_before": before, "load_after": machine.load()},
        "missing": missing,
        "works": measured,
        "growth": grown,
        "memory": held,
    }


def _write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "local.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = report.markdown(result)
    (out / "local.md").write_text(text)
    plots.comparison(result, out / "local.png")
    written = ["local.json", "local.md", "local.png"]
    if result["growth"]:
        plots.growth(result["growth"], out / "growth.png")
        written.append("growth.png")
    print(text)
    print(f"{', '.join(written)}: {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
