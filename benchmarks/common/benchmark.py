"""One benchmark, from the command line to the files: the part that all of them share."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import machine, report
from benchmarks.common.runner import end_progress
from benchmarks.common.venvs import REDIS, PeerError, Venv
from benchmarks.common.work import WrongResultError

_LEAST_REPS = 7
# Options that say where something is on this machine, which is nobody else's concern.
_PLACES = ("out", "folder", "mxnet_python", "redis_server")


class Benchmark(ABC):
    """What is measured, and how it is written down; one object for each run.

    ``versions`` and ``missing`` are filled during the run: versions of peers, and why a peer was not measured.
    """

    name: ClassVar[str]  # of the command and of the files
    help: ClassVar[str]
    description: ClassVar[str]
    epilog: ClassVar[str]
    title: ClassVar[str]
    names: ClassVar[Mapping[str, str]]  # what contenders are called in tables

    def __init__(self) -> None:
        self.versions = machine.versions()
        self.missing: dict[str, str] = {}

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add options beyond those of every benchmark."""

    @abstractmethod
    def works(self, options: argparse.Namespace) -> dict[str, list[Any]]:
        """Return the works of each topic; complete the options."""

    @abstractmethod
    def run(self, options: argparse.Namespace, works: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Measure works; return what was found, for the result."""

    @abstractmethod
    def given(self, result: Mapping[str, Any]) -> str:
        """Return what contenders work with, for the conditions of the report."""

    @abstractmethod
    def sections(self, result: Mapping[str, Any]) -> list[list[str]]:
        """Return the sections of the report."""

    @abstractmethod
    def plots(self, result: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
        """Return what draws each file."""

    def find_python(self, venv: Venv, options: argparse.Namespace, python: str | None = None) -> str | None:
        """Return an interpreter that has a peer; None if there is none, and ``missing`` says why."""
        if getattr(options, f"no_{venv.name}"):
            self.missing[venv.name] = f"left out with --no-{venv.name}"
            return None
        try:
            return venv.find(python, may_install=not options.quick)
        except PeerError as error:
            self.missing[venv.name] = " ".join(str(error).split())
            return None

    def find_redis(self, options: argparse.Namespace) -> tuple[str, str] | None:
        """Return the server and an interpreter with its client; None if there is none, and ``missing`` says why."""
        if not options.no_redis and shutil.which(options.redis_server) is None:
            self.missing["redis"] = f"there is no {options.redis_server} (--redis-server says where one is)"
            return None
        python = self.find_python(REDIS, options)
        return (options.redis_server, python) if python else None


def add_redis_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that has Redis as a peer."""
    parser.add_argument("--no-redis", action="store_true", help="leave Redis out")
    parser.add_argument(
        "--redis-server", default="redis-server", metavar="PATH", help="the server of Redis (default: on PATH)"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME", help="works whose name contains NAME; may be repeated")
    add("--reps", type=int, metavar="N", help=f"repetitions of each, at least {_LEAST_REPS} (default 11; quick: 2)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="folder for the files (default out/bench)")
    add("--quick", action="store_true", help="toy sizes; installs nothing; no result to publish")
    add("--no-mxnet", action="store_true", help="leave MXNet out")


def counts(least: int, what: str) -> Callable[[str], tuple[int, ...]]:
    """Return the type of an option that takes several numbers, as in ``1,2,4``."""

    def read(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(each) for each in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers separated by commas") from None
        if min(found) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least} {what}, got {min(found)}")
        return found

    return read


def run(benchmark: Benchmark, parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Measure what the options ask for and write the files; return the exit status."""
    if not options.quick and options.reps is not None and options.reps < _LEAST_REPS:
        parser.error(f"--reps is {options.reps}; fewer than {_LEAST_REPS} say little (--quick does 2)")
    options.reps = options.reps or (2 if options.quick else 11)
    arguments = {name: value for name, value in vars(options).items() if name not in ("kind", "parser", *_PLACES)}
    works = benchmark.works(options)
    arguments = {name: getattr(options, name) for name in arguments}
    wanted = {topic: [work for work in own if _is_wanted(work.name, options.only)] for topic, own in works.items()}
    if not any(wanted.values()):
        names = "\n  ".join(dict.fromkeys(work.name for own in works.values() for work in own))
        parser.error(f"--only {' '.join(options.only)} fits none of these works:\n  {names}")
    before = machine.load()
    try:
        found = benchmark.run(options, wanted)
    except (WrongResultError, PeerError) as error:
        end_progress()
        print(f"error: {error}", file=sys.stderr)
        return 1
    end_progress()
    result = {
        "schema": 2,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": machine.git_revision(),
        "quick": options.quick,
        "arguments": arguments,
        "versions": benchmark.versions,
        "machine": {**machine.describe(), "load_before": before, "load_after": machine.load()},
        "missing": benchmark.missing,
        **found,
    }
    _write(benchmark, result, options.out)
    return 0


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def _write(benchmark: Benchmark, result: Mapping[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{benchmark.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    head = [f"# {benchmark.title}", "", *report.conditions(result, benchmark.given(result), benchmark.names), ""]
    sections = [line for section in benchmark.sections(result) if section for line in [*section, ""]]
    text = "\n".join([*head, *sections])
    (out / f"{benchmark.name}.md").write_text(text)
    plots = benchmark.plots(result)
    for file, draw in plots.items():
        draw(out / file)
    print(text)
    print(f"{benchmark.name}.json, {benchmark.name}.md, {', '.join(plots)}: {out}", file=sys.stderr)
