"""One rank in a process of its own: answers commands, one JSON object a line, on the socket of its team.

Run as ``python dist_process.py CONTENDER``; the path of the socket is in BENCH_SOCKET, since MPI's starter gives
standard input to one rank only.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from typing import Any

import dist_contenders
import servers_contenders
from dist_works import Training
from peer_process import serve

_CLASSES = dist_contenders.CLASSES | servers_contenders.CLASSES


class Answers:
    """What each command does; a contender lives from ``build`` or ``train`` to ``close``.

    Args:
        name: of the contender.
        rank: of this process.
    """

    def __init__(self, name: str, rank: int) -> None:
        self._class = _CLASSES[name]
        self._rank = rank
        self._contender: Any = None

    def start(self) -> dict[str, Any]:
        """Import the library and join the group, before anything is measured."""
        return {"versions": self._class.start()}

    def build(self, **work: Any) -> dict[str, Any]:
        """Make the arrays of a work."""
        work["shape"] = tuple(work["shape"])
        self._contender = self._class(self._class.WORK(**work), self._rank)
        return {}

    def train(self, kind: str, **work: Any) -> dict[str, Any]:
        """Make the model of a training."""
        from dist_training import TrainingMember

        self._contender = TrainingMember(Training(**work), kind, self._rank)
        return {}

    def open(self, port: int, **options: Any) -> dict[str, Any]:
        self._contender.open(port, **options)
        return {}

    def ready(self, calls: int) -> dict[str, Any]:
        self._contender.ready(calls)
        return {}

    def time(self, calls: int, at: float) -> dict[str, Any]:
        """Begin at a time that all ranks have been told, on the clock that processes of one kernel share."""
        early = at - time.perf_counter()
        if early > 0:
            time.sleep(early)
        self._contender.time("pushpull", calls)
        return {"seconds": time.perf_counter() - at, "late": early < 0}

    def renew(self) -> dict[str, Any]:
        self._contender.renew()
        return {}

    def check(self) -> dict[str, Any]:
        self._contender.check()
        return {}

    def losses(self) -> dict[str, Any]:
        return {"losses": self._contender.losses}

    def tell(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Return what else a contender can tell."""
        return {"told": getattr(self._contender, what)(**arguments)}

    def close(self) -> dict[str, Any]:
        if self._contender is not None:
            self._contender.close()
        self._contender = None
        gc.collect()
        return {}


def _main(name: str) -> None:
    rank = dist_contenders.rank_of_this_process()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["BENCH_SOCKET"])
        with connection.makefile("r") as commands, connection.makefile("w") as replies:
            print(rank, os.getpid(), file=replies, flush=True)
            serve(Answers(name, rank), commands, replies)


if __name__ == "__main__":
    _main(sys.argv[1])
