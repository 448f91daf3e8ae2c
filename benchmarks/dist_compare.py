"""The comparison of teams: they take turns at each work, as in ``compare``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compare import WARM_UP_CALLS, progress
from dist_contenders import PEERS
from dist_hosts import Hosts
from dist_teams import Team
from dist_works import Training, check_losses
from peers import PeerError
from report import ratios, spread
from works import Work

_PAUSE_S = 0.02
# Whose processes train, and what they do then.
_TRAINERS = {"tensorkv": "tensorkv", "overlap": "overlap", "gloo": "ddp"}


class Roster:
    """The teams of some ranks, each started when it is first needed.

    Args:
        launchers: how, of each contender.
        missing: is told why a contender is not there; such a contender is left out from then on.
        versions: is told what teams have found out.
        fresh: contenders whose processes serve for one work only.
    """

    def __init__(
        self,
        launchers: Mapping[str, Callable[[], Team]],
        missing: dict[str, str],
        versions: dict[str, str],
        fresh: Sequence[str] = (),
    ) -> None:
        self._launchers, self._fresh = launchers, fresh
        self._missing, self._versions = missing, versions
        self._teams: dict[str, Team] = {}

    def ready(self, names: Iterable[str], prepare: Callable[[str, Team], None], what: str = "") -> dict[str, Team]:
        """Return the teams that live and could be prepared, by name.

        Args:
            names: of contenders.
            prepare: called with each team, when all of them have started.
            what: they are for; put behind the name of one that is missing.
        """
        able = [name for name in names if name in self._launchers and not self._missing.keys() & {name, name + what}]
        able = [name for name in able if self._try(self._launch, name, what)]
        able = [name for name in able if self._try(lambda name: prepare(name, self._teams[name]), name, what)]
        return {name: self._teams[name] for name in able}

    def _try(self, step: Callable[[str], None], name: str, what: str) -> bool:
        try:
            step(name)
        except PeerError as error:
            self._missing[name + what] = " ".join(str(error).split())
            self._end(name)
            return False
        return True

    def _launch(self, name: str) -> None:
        if name not in self._teams:
            self._teams[name] = self._launchers[name]()
            self._versions.update(self._teams[name].versions)

    def release(self, teams: Mapping[str, Team]) -> None:
        """Let teams forget their work."""
        for name, team in teams.items():
            team.ask("close")
            if name in self._fresh:
                self._end(name)

    def _end(self, name: str) -> None:
        if name in self._teams:
            self._teams.pop(name).end()

    def end(self) -> None:
        """End all processes."""
        for team in self._teams.values():
            team.dismiss()
        for name in list(self._teams):
            self._end(name)


def measure(
    work: Work,
    names: Iterable[str],
    roster: Roster,
    reps: int,
    hosts: Hosts | None = None,
    look: Callable[[Team], Any] | None = None,
) -> dict[str, Any]:
    """Time teams at an exchange, in turns, and check what each rank has got.

    Args:
        work: what to do.
        names: of the contenders.
        roster: has their teams.
        reps: how many turns each has.
        hosts: where the ranks are, if not all on this one.
        look: finds out more of a team before it forgets the work.

    Returns:
        The work, all raw times in seconds of one call, and bytes of memory.

    Raises:
        WrongResultError: somebody's result is wrong.
        PeerError: a team failed after it had been ready.
    """
    progress(f"{work.name}: making arrays")
    memory: dict[str, Any] = {}

    def prepare(name: str, team: Team) -> None:
        team.ask("build", **asdict(work))
        memory[name] = {"before": team.memory()}
        team.open()

    teams = roster.ready(names, prepare, ", between hosts" if hosts else "")
    progress(f"{work.name}: warm-up")
    sent: dict[str, float] = {}
    for name, team in teams.items():
        sent[name] = -hosts.sent_nbytes() if hosts else 0
        memory[name]["most"] = team.warm_up(work.warm_up)
        sent[name] = (sent[name] + (hosts.sent_nbytes() if hosts else 0)) / work.warm_up
        memory[name]["after"] = team.memory()
        team.ask("renew")
    times = _take_turns(work.name, teams, work.calls, reps)
    for team in teams.values():
        team.ask("check")
    found = {name: look(team) for name, team in teams.items()} if look else {}
    roster.release(teams)
    return {
        "name": work.name,
        "keys": work.keys,
        "shape": list(work.shape),
        "ranks": work.parts,
        "hosts": getattr(work, "hosts", 1),
        "rule": work.rule,
        "calls": work.calls,
        "value_nbytes": work.value_nbytes,
        "times_s": times,
        "memory_nbytes": {name: memory[name] for name in teams},
        "sent_nbytes": sent,
        "summary": summarize(times),
        **({"found": found} if look else {}),
    }


def train(work: Training, roster: Roster, reps: int) -> dict[str, Any]:
    """Time steps of training, in turns, and compare the losses.

    Raises:
        WrongResultError: the losses differ, or do not fall.
        PeerError: a team failed after it had been ready.
    """
    progress(f"{work.name}: making models")

    def prepare(name: str, team: Team) -> None:
        team.ask("train", kind=_TRAINERS[name], **asdict(work))
        team.open()

    ready = roster.ready(_TRAINERS, prepare, ", training")
    teams = {_TRAINERS[name]: team for name, team in ready.items()}
    for team in teams.values():
        team.warm_up(WARM_UP_CALLS)
    times = _take_turns(work.name, teams, 1, reps)
    losses = {name: [reply["losses"] for reply in team.ask("losses")] for name, team in teams.items()}
    for found in losses.values():
        check_losses(work, found, losses.get("ddp", found))
    roster.release(ready)
    return {
        "name": work.name,
        **asdict(work),
        "parameters": work.parameters,
        "times_s": times,
        "losses": losses,
        "summary": summarize(times),
    }


def summarize(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the spread of each contender, and the ratios of peers to tensorkv.

    >>> summarize({"tensorkv": [1, 2], "gloo": [3, 3]})["ratios"]
    {'gloo': {'median': 2.0, 'min': 1.5, 'max': 3.0}}
    """
    return {
        "spread": spread(times),
        "ratios": ratios(times, (*PEERS, "ddp")),
        "overlap_ratios": ratios(times, ("ddp",), ours="overlap"),
    }


def _take_turns(name: str, teams: Mapping[str, Team], calls: int, reps: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {each: [] for each in teams}
    for rep in range(reps):
        progress(f"{name}: {rep + 1} of {reps}", step=True)
        # Back and forth, so that nobody always comes after the same one.
        for each in list(teams)[:: -1 if rep % 2 else 1]:
            time.sleep(_PAUSE_S)
            times[each].append(teams[each].time(calls))
    progress(f"{name}: checking results")
    return times
