"""A contender in a process of its own: answers commands on stdin, one JSON object a line, on stdout.

Run as ``python peer_process.py NAME`` with the interpreter that has the contender's library.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import contenders
import numpy as np
from works import Work, WrongResultError


class Answers:
    """What each command does; a contender lives from one ``build`` to the next or to ``close``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._contender: Any = None

    def hello(self) -> dict[str, Any]:
        """Import the library, before anything is measured."""
        module = __import__(self._name)
        return {"version": module.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}

    def build(self, **work: Any) -> dict[str, Any]:
        self.close()
        work["shape"] = tuple(work["shape"])
        self._contender = contenders.build(self._name, Work(**work))
        return {}

    def time(self, verb: Any, calls: int) -> dict[str, Any]:
        return {"seconds": self._contender.time(verb, calls)}

    def renew(self) -> dict[str, Any]:
        self._contender.renew()
        return {}

    def check(self) -> dict[str, Any]:
        self._contender.check()
        return {}

    def memory(self) -> dict[str, Any]:
        """Return resident bytes: now, and the most since the last call. Linux only."""
        found = {"rss": _status("VmRSS"), "peak": _status("VmHWM")}
        # ru_maxrss would also count what making the arrays took, and the peak of the process that started this one.
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        return found

    def close(self) -> dict[str, Any]:
        if self._contender is not None:
            self._contender.close()
        self._contender = None
        return {}


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def serve(answers: Any, commands: TextIO, replies: TextIO) -> None:
    """Answer until there are no more commands."""
    for line in commands:
        command = json.loads(line)
        try:
            reply = getattr(answers, command.pop("do"))(**command)
        except WrongResultError as error:
            reply = {"wrong": str(error)}
        except Exception as error:  # the asker is another process, which has to hear of everything
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    # Libraries print to stdout when they like; the replies go where none of them can write.
    with os.fdopen(os.dup(1), "w") as private:
        os.dup2(2, 1)
        serve(Answers(sys.argv[1]), sys.stdin, private)
