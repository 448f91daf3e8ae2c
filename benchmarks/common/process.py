"""A contender in a process of its own: answers commands, one JSON object a line, on the socket of its team.

Run as ``python -m benchmarks.common.process MODULE:CLASS`` with the interpreter that has the contender's library. The
path of the socket is in BENCH_SOCKET, since MPI's starter gives standard input to one rank only.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import socket
import sys
import time
from typing import Any, TextIO

from benchmarks.common.work import WrongResultError

# A sleeper wakes so much too late at most, on a quiet machine.
_WAKE_S = 0.001


class Answers:
    """What each command does; a contender lives from ``build`` to ``close``.

    Args:
        member: module and class of the contender.
        rank: of this process; None if it is alone.
    """

    def __init__(self, member: str, rank: int | None) -> None:
        self._class: Any = pkgutil.resolve_name(member)
        self._rank = rank
        self._contender: Any = None

    def start(self) -> dict[str, Any]:
        """Import the library and join the group, before anything is measured."""
        return {"versions": self._class.start()}

    def build(self, **work: Any) -> dict[str, Any]:
        """Make the arrays of a work."""
        if "shape" in work:
            work["shape"] = tuple(work["shape"])
        self._contender = self._class(self._class.WORK(**work), self._rank)
        return {}

    def open(self, port: int, **options: Any) -> dict[str, Any]:
        self._contender.open(port, **options)
        return {}

    def prepare(self, verb: Any, calls: int) -> dict[str, Any]:
        self._contender.prepare(verb, calls)
        return {}

    def time(self, verb: Any, calls: int, at: float | None = None) -> dict[str, Any]:
        """Do calls, from a time that all ranks have been told, on the clock that processes of one kernel share."""
        if at is None:
            return {"seconds": calls * self._contender.time(verb, calls), "late": False}
        early = at - time.perf_counter()
        if early > _WAKE_S:
            time.sleep(early - _WAKE_S)
        while time.perf_counter() < at:
            pass
        self._contender.time(verb, calls)
        return {"seconds": time.perf_counter() - at, "late": early < 0}

    def renew(self) -> dict[str, Any]:
        self._contender.renew()
        return {}

    def check(self) -> dict[str, Any]:
        self._contender.check()
        return {}

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call another method of the contender and return its result."""
        return {"result": getattr(self._contender, method)(**arguments)}

    def memory(self) -> dict[str, Any]:
        """Return resident bytes: now, and the most since the last call. Linux only."""
        found = {"rss": resident_nbytes(), "peak": peak_nbytes()}
        forget_peak()
        return found

    def close(self) -> dict[str, Any]:
        if self._contender is not None:
            self._contender.close()
        self._contender = None
        gc.collect()
        return {}


def resident_nbytes(pid: int | None = None) -> int:
    """Return the bytes that a process has in memory (None: this one). Linux only."""
    return _status("VmRSS", pid)


def peak_nbytes() -> int:
    """Return the most bytes that this process had in memory since ``forget_peak``. Linux only."""
    return _status("VmHWM", None)


def forget_peak() -> None:
    """Reset what ``peak_nbytes`` returns.

    ``ru_maxrss`` would also count what making arrays took, and the peak of the process that started this one.
    """
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")


def _status(field: str, pid: int | None) -> int:
    with open(f"/proc/{pid or 'self'}/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _rank_of_this_process() -> int | None:
    """Return what the starter has put into torchrun's variable, or into that of MPICH."""
    rank = os.environ.get("RANK") or os.environ.get("PMI_RANK")
    return int(rank) if rank else None


def _serve(answers: Answers, commands: TextIO, replies: TextIO) -> None:
    for line in commands:
        command = json.loads(line)
        try:
            reply = getattr(answers, command.pop("do"))(**command)
        except WrongResultError as error:
            reply = {"wrong": str(error)}
        except Exception as error:  # the caller is another process, which has to learn of every error
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _main(member: str) -> None:
    rank = _rank_of_this_process()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["BENCH_SOCKET"])
        with connection.makefile("r") as commands, connection.makefile("w") as replies:
            print(rank or 0, file=replies, flush=True)
            _serve(Answers(member, rank), commands, replies)


if __name__ == "__main__":
    _main(sys.argv[1])
