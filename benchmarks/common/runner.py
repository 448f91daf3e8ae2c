"""The runner: contenders take turns at each work, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.common.contender import Contender
from benchmarks.common.report import ratios, spread
from benchmarks.common.team import Team
from benchmarks.common.venvs import PeerError
from benchmarks.common.work import Verb

# Threads of OpenMP spin for some milliseconds after their last work.
_PAUSE_S = 0.02


class Timed(Protocol):
    """What takes turns."""

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Do ``verb`` with all keys so many times; return the seconds of one."""


class Here:
    """A contender in this process, with the methods of a ``Team``.

    Args:
        make: returns the contender of a work.
    """

    def __init__(self, make: Callable[[Any], Contender]) -> None:
        self.versions: dict[str, str] = {}
        self._make = make
        self._contender: Any = None

    def build(self, work: Any) -> None:
        self._contender = self._make(work)

    def open(self) -> None:
        self._contender.open(0)

    def memory(self) -> dict[str, int]:
        return {}

    def warm_up(self, verb: Verb, calls: int) -> dict[str, int]:
        self.time(verb, calls)
        return {}

    def time(self, verb: Verb, calls: int = 1) -> float:
        self._contender.prepare(verb, calls)
        seconds: float = self._contender.time(verb, calls)
        return seconds

    def renew(self) -> None:
        self._contender.renew()

    def check(self) -> None:
        self._contender.check()

    def close(self) -> None:
        if self._contender is not None:
            self._contender.close()
        self._contender = None
        gc.collect()

    def dismiss(self) -> None:
        pass

    def end(self) -> None:
        self.close()


Runner = Here | Team


class Roster:
    """The contenders of some works, each started when it is first needed; for a ``with`` statement.

    Args:
        launchers: how to start each contender.
        missing: gets the reason for each contender that cannot be started; it is left out from then on.
        versions: gets what contenders have found out.
        fresh: contenders whose processes serve for one work only.
        topic: stands behind the name of a contender that is missing here, and perhaps not elsewhere.
    """

    def __init__(
        self,
        launchers: Mapping[str, Callable[[], Runner]],
        missing: dict[str, str],
        versions: dict[str, str],
        fresh: Sequence[str] = (),
        topic: str = "",
    ) -> None:
        self._launchers, self._fresh, self._topic = launchers, fresh, topic
        self._missing, self._versions = missing, versions
        self._runners: dict[str, Runner] = {}

    def __enter__(self) -> Roster:
        return self

    def __exit__(self, *error: object) -> None:
        for runner in self._runners.values():
            runner.dismiss()
        for name in list(self._runners):
            self._end(name)

    def ready(self, names: Iterable[str], prepare: Callable[[str, Runner], None]) -> dict[str, Runner]:
        """Return the contenders that could be started and prepared, by name.

        Args:
            names: of contenders.
            prepare: called with each one, when all have started.
        """
        able = [name for name in names if not self._missing.keys() & {name, name + self._topic}]
        able = [name for name in able if name in self._launchers and self._try(self._launch, name)]
        able = [name for name in able if self._try(lambda name: prepare(name, self._runners[name]), name)]
        return {name: self._runners[name] for name in able}

    def _try(self, step: Callable[[str], None], name: str) -> bool:
        try:
            step(name)
        except PeerError as error:
            self._missing[name + self._topic] = " ".join(str(error).split())
            self._end(name)
            return False
        return True

    def _launch(self, name: str) -> None:
        if name not in self._runners:
            self._runners[name] = self._launchers[name]()
            self._versions.update(self._runners[name].versions)

    def release(self, names: Iterable[str]) -> None:
        """Let contenders forget their work."""
        for name in names:
            self._runners[name].close()
            if name in self._fresh:
                self._end(name)

    def _end(self, name: str) -> None:
        if name in self._runners:
            self._runners.pop(name).end()


def measure(
    work: Any,
    roster: Roster,
    pairs: Mapping[str, tuple[str, str]],
    reps: int,
    *,
    names: Sequence[str],
    verbs: Sequence[Verb] = ("pushpull",),
    alone: Sequence[Verb] = (),
    others: Mapping[str, Timed] | None = None,
    sent_nbytes: Callable[[], int] | None = None,
    look: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Time contenders at a work, in turns, and check what each has computed.

    Args:
        work: what to do.
        roster: starts the contenders.
        pairs: the ratios that are wanted: for a name, the contender above and the one below the line.
        reps: how many turns each has.
        names: of the contenders.
        verbs: timed one after the other.
        alone: verbs of the first contender alone, timed before the others.
        others: take turns, too, and compute nothing.
        sent_nbytes: returns the bytes that have gone through the network so far.
        look: finds out more of a contender before it forgets the work.

    Returns:
        The work, all raw times in seconds of one call, and what was made of them.

    Raises:
        WrongResultError: a result is wrong.
        PeerError: a contender failed after it had been ready.
    """
    progress(f"{work.name}: making arrays")
    count_sent = sent_nbytes or (lambda: 0)
    memory: dict[str, Any] = {}
    sent: dict[str, float] = {}

    def prepare(name: str, runner: Runner) -> None:
        runner.build(work)
        memory[name] = {"before": runner.memory()}
        runner.open()

    runners = roster.ready(names, prepare)
    times: dict[str, dict[str, list[float]]] = {}
    for verb in (*alone, *verbs):
        able = {names[0]: runners[names[0]]} if verb in alone else runners
        what = f"{work.name}: {verb}"
        progress(f"{what}, warm-up")
        for name, runner in able.items():
            before = count_sent()
            memory[name]["most"] = runner.warm_up(verb, work.warm_up)
            sent[name] = (count_sent() - before) / work.warm_up
            memory[name]["after"] = runner.memory()
            runner.renew()
        beside = {} if verb in alone else others or {}
        times[verb] = _take_turns(what, able | beside, verb, 1 if verb == "first" else work.calls, reps)
        progress(f"{what}, checking results")
        for runner in able.values():
            runner.check()
    found = {name: look(runner) for name, runner in runners.items()} if look else {}
    roster.release(runners)
    return {
        "name": work.name,
        **asdict(work),
        "value_nbytes": work.value_nbytes,
        "times_s": times,
        "memory_nbytes": {name: memory[name] for name in runners if memory[name]["before"]},
        **({"sent_nbytes": sent} if sent_nbytes else {}),
        **({"found": found} if look else {}),
        "summary": {verb: {"spread": spread(own), "ratios": ratios(own, pairs)} for verb, own in times.items()},
    }


def _take_turns(
    what: str, timed: Mapping[str, Timed], verb: Verb, calls: int, reps: int
) -> dict[str, list[float]]:  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in timed}
    for rep in range(reps):
        progress(f"{what}, {rep + 1} of {reps}", step=True)
        # Back and forth, so that none always comes after the same one.
        for name in list(timed)[:: -1 if rep % 2 else 1]:
            if len(timed) > 1:
                time.sleep(_PAUSE_S)
            times[name].append(timed[name].time(verb, calls))
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
