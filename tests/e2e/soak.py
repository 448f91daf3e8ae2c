"""Kill durable shards and disturb random programs for as long as you like, and report: ``make soak MINUTES=30``.

The programs of the tests run with seeds of their own: durable shards two at a time, over both durabilities, every way
to be killed and two optimizers; between them, disturbed programs on every engine. Where hosts can be made of namespaces
(as root), a worker uses servers on two of them all along, of which one crashes, hangs or loses its cable in between,
and counts at the end what has come of its pushes. All along, a store is published as fast as can be, with a server
killed every 20 seconds, and four processes read its releases. The first wrong state ends it with exit status 1 and the
command that shows it again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.storage.test_durable_kills import finish, start
from tests.support import workers
from tests.support.away import FAULTS, HostsInUse
from tests.support.hosts import CAN_MAKE
from tests.support.published import WeightsInUse

KILLS = 200
# Disturbed programs between two pairs of killed ones: engine, how many at a time, options, workers.
DISTURBED = [
    ("local", 20, [], 1),
    ("local", 10, ["path=kept"], 1),
    ("device", 10, [], 1),
    ("dist_sync", 5, [], 2),
    ("dist_sync", 3, [], 3),
    ("dist_async", 4, ["num_servers=2", "path=kept"], 1),
    ("dist_async", 4, ["num_servers=3"], 1),
]
RUNS = list(itertools.product(("process", "disk"), ("time", "calls", "seams"), ("sgd", "adam")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, default 10")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first program, default: the time")
    parser.add_argument("--out", type=Path, default=Path("out/soak.json"), help="the report, default out/soak.json")
    options = parser.parse_args()
    report = {"seed": options.seed, "seconds": 0.0, "runs": {}, "disturbed": Counter(), "hosts": {}, "weights": {}}
    began = time.monotonic()
    status, seed = 0, options.seed
    disturbed, faults = itertools.cycle(DISTURBED), itertools.cycle(FAULTS)
    with ExitStack() as stack:
        weights = stack.enter_context(WeightsInUse(random.Random(seed)))
        used = stack.enter_context(HostsInUse(random.Random(seed))) if CAN_MAKE else None
        for pair in itertools.cycle(zip(RUNS[::2], RUNS[1::2], strict=True)):
            if status or time.monotonic() - began > 60 * options.minutes:
                break
            if used is not None:
                used.disturb(next(faults))
                report["hosts"] = {"faults": used.faults}
            status = run(pair, seed, report) or disturb(*next(disturbed), seed, report)
            seed += 20
            write(report, began, options.out)
            if weights.errors:
                break
            programs = sum(report["disturbed"].values())
            print(f"{report['seconds']:8.0f} s, {total(report)} kills, {programs} disturbed programs", flush=True)
        if used is not None:
            try:
                report["hosts"] |= used.end()
            except AssertionError as error:
                print(f"wrong: python -m tests.e2e.soak --seed {options.seed} (hosts)\n{error}")
                status = 1
            write(report, began, options.out)
        try:
            report["weights"] = weights.end()
        except AssertionError as error:
            print(f"wrong: python -m tests.support.published {options.minutes}\n{error}")
            status = 1
        write(report, began, options.out)
    show(report)
    return status


def write(report, began, out):
    report["seconds"] = round(time.monotonic() - began, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def run(pair, seed, report):
    """Run two programs at a time; return 1 if what one of them found is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        programs = [
            start(folder, seed + index, KILLS, durability, how, optimizer)
            for index, (durability, how, optimizer) in enumerate(pair)
        ]
        for index, ((durability, how, optimizer), (status, found, text)) in enumerate(
            zip(pair, finish(programs), strict=True)
        ):
            if status:
                words = f"{seed + index} {KILLS} {durability} {how} {optimizer}"
                print(f"wrong: python -m tests.storage.kills FOLDER {words}\n{text}")
                return 1
            counts = report["runs"].setdefault(f"{durability}, {how}, {optimizer}", Counter())
            counts.update({name: each for name, each in found.items() if isinstance(each, int)})
    return 0


def disturb(engine, count, options, size, seed, report):
    """Run disturbed programs; return 1 if one of them finds a difference, an untyped error or a hang."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            workers.run(
                size,
                "tests.e2e.disturbed",
                engine,
                seed,
                count,
                *options,
                env={"DISTURBED_FOLDER": folder},
            )
        except AssertionError as error:
            words = f"{engine} {seed} {count} {' '.join(options)}"
            print(f"wrong: python -m tests.e2e.disturbed {words} ({size} workers)\n{error}")
            return 1
    report["disturbed"][" ".join([engine, *options, f"{size} workers"])] += count
    return 0


def total(report):
    return sum(counts["kills"] for counts in report["runs"].values())


def show(report):
    names = ["kills", "in the middle", "resent, known", "pushes", "stores"]
    print("\n| run | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for run_name, counts in report["runs"].items():
        print(f"| {run_name} | " + " | ".join(str(counts[name]) for name in names) + " |")
    if report["hosts"]:
        print(f"\nhosts: {json.dumps(report['hosts'])}")
    print(f"\nweights: {json.dumps(report['weights'])}")


if __name__ == "__main__":
    sys.exit(main())
