"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common.benchmark import Benchmark, add_options, run
from benchmarks.compression.bench import CompressionBenchmark
from benchmarks.hosts.bench import HostsBenchmark
from benchmarks.local.bench import LocalBenchmark
from benchmarks.matrix.bench import MatrixBenchmark
from benchmarks.servers.bench import ServersBenchmark
from benchmarks.sync.bench import SyncBenchmark
from benchmarks.weights.bench import WeightsBenchmark

BENCHMARKS: dict[str, type[Benchmark]] = {
    each.name: each
    for each in (
        LocalBenchmark,
        SyncBenchmark,
        ServersBenchmark,
        HostsBenchmark,
        CompressionBenchmark,
        WeightsBenchmark,
        MatrixBenchmark,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure tensorkv beside its peers.")
    commands = parser.add_subparsers(required=True, metavar="|".join(BENCHMARKS))
    for name, kind in BENCHMARKS.items():
        command = commands.add_parser(
            name,
            help=kind.help,
            description=kind.description,
            epilog=kind.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command)
        kind.add_options(command)
        command.set_defaults(kind=kind, parser=command)
    options = parser.parse_args(argv)
    return run(options.kind(), options.parser, options)


if __name__ == "__main__":
    sys.exit(main())
