"""The comparison: contenders take turns at each work, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import contenders
from machine import Copy
from peers import ProcessPeer
from works import VERBS, Verb, Work

# The store lays small keys out anew when a call has come a few times; that is not to be timed.
WARM_UP_CALLS = 6
# Threads of OpenMP spin for some milliseconds after their last work.
_PAUSE_S = 0.02


class Runner(Protocol):
    """A contender with a work, in this process or in another."""

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Do ``verb`` with all keys so many times; return the seconds of one."""

    def renew(self) -> None:
        """Make sure that old results are not right any more."""

    def check(self) -> None:
        """Raise unless the outs are right."""

    def close(self) -> None:
        """Let go of the work."""


def measure(
    work: Work, names: Sequence[str], mxnet: ProcessPeer | None, copy: Copy, reps: int, arrays: str
) -> dict[str, Any]:
    """Time every contender at a work, in turns, and check what each has computed.

    Args:
        work: what to do.
        names: of the contenders that run in this process.
        mxnet: the peer in another process.
        copy: takes its turn, too; gives the limit.
        reps: how many turns each has.
        arrays: what tensorkv is given, ``"numpy"`` or ``"torch"``.

    Returns:
        The work and all raw times in seconds of one call.

    Raises:
        WrongResultError: somebody's result is wrong.
    """
    progress(f"{work.name}: making arrays")
    runners: dict[str, Runner] = {}
    try:
        for name in names:
            runners[name] = contenders.build(name, work, arrays)
        if mxnet is not None:
            runners["mxnet"] = mxnet
            mxnet.build(work)
        times = {verb: _measure_verb(work, verb, runners, copy, reps) for verb in VERBS}
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()
    return {
        "name": work.name,
        "keys": work.keys,
        "shape": list(work.shape),
        "parts": work.parts,
        "rule": work.rule,
        "calls": work.calls,
        "value_nbytes": work.value_nbytes,
        "moved_nbytes": work.moved_nbytes,
        "copy_nbytes": copy.moved_nbytes,
        "times_s": times,
    }


def _measure_verb(work: Work, verb: Verb, runners: dict[str, Runner], copy: Copy, reps: int) -> dict[str, list[float]]:
    progress(f"{work.name}: {verb}, warm-up")
    for runner in runners.values():
        runner.time(verb, WARM_UP_CALLS)
        runner.renew()
    copy.time()
    times: dict[str, list[float]] = {name: [] for name in (*runners, "copy")}
    for rep in range(reps):
        progress(f"{work.name}: {verb}, {rep + 1} of {reps}", step=True)
        # Back and forth, so that nobody always comes after the same one.
        for name in list(times)[:: -1 if rep % 2 else 1]:
            time.sleep(_PAUSE_S)
            times[name].append(copy.time() if name == "copy" else runners[name].time(verb, work.calls))
    progress(f"{work.name}: {verb}, checking results")
    for runner in runners.values():
        runner.check()
    return times


def progress(line: str, *, step: bool = False) -> None:
    """Say what is going on: in place on a terminal, elsewhere line by line and without single steps."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
    elif not step:
        print(line, file=sys.stderr, flush=True)


def end_progress() -> None:
    """Leave the line that ``progress`` writes."""
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
