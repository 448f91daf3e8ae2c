"""Contenders with parameter servers: what each worker does.

All workers push the same gradients. A library is imported only by the contender that uses it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.work import Verb, Work, WrongResultError
from benchmarks.common.work import check as check_exactly
from benchmarks.servers.works import Serving, check
from benchmarks.sync.contenders import Member, MXNet, TensorKV

NAMES = {
    "tensorkv1": "tensorkv, 1 server",
    "tensorkv2": "tensorkv, 2 servers",
    "mxnet1": "MXNet, 1 server",
    "mxnet2": "MXNet, 2 servers",
    "mxnet": "MXNet",
    "process": "a log, process",
    "disk": "a log, disk",
}
_TIMEOUT_S = 40


class Worker(Member):
    """A worker that notes how long each call took."""

    WORK: ClassVar[type[Any]] = Serving

    def __init__(self, work: Work, rank: int | None = None) -> None:
        # The same part in every worker.
        super().__init__(work, 0)
        self.rank = rank
        self.laps: list[float] = []

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self._lap}

    def _lap(self) -> None:
        start = perf_counter()
        self.exchange()
        self.laps.append(perf_counter() - start)

    def renew(self) -> None:
        super().renew()
        self.laps.clear()

    def check(self) -> None:
        """As of a contender; all workers have come to the end of their calls."""
        check(self.work, self.out, self.steps, self.work.parts * self.steps, "the last call")
        steps = self.work.parts * self.steps
        super().renew()
        self.pull()
        check(self.work, self.out, steps, steps, "at the end")

    def found(self) -> dict[str, Any]:
        """Return what there is to tell beyond times."""
        return {"laps_s": self.laps if self.work.calls >= 10 else []}


class Servers(Worker, TensorKV):
    """The store of this project."""

    @staticmethod
    def start() -> dict[str, str]:
        import ray

        return {"ray": ray.__version__, **TensorKV.start()}

    def create(self, port: int, **options: Any) -> Any:
        import tensorkv

        self._name = f"bench{port}"
        if "path" in options:
            # Each work has a store of its own, and so a folder of its own.
            options["path"] += f"-{port}"
        return tensorkv.create("dist_async", name=self._name, timeout_s=_TIMEOUT_S, **options)

    def check(self) -> None:
        super().check()
        last = self.work.keys - 1
        version, steps = self._kv.info(last).version, self.work.parts * self.steps
        if version != steps:
            raise WrongResultError(f"{self.work.name}: key {last} has had {version} updates, expected {steps}")

    def found(self) -> dict[str, Any]:
        return {**super().found(), "wal": self._kv.stats().get("wal")}


class Killer(Servers):
    """A worker whose server is killed; it sends one key after another, since together they would be one large log."""

    def exchange(self) -> None:
        for key, [part], out in zip(range(self.work.keys), self.parts, self.outs, strict=True):
            self._kv.pushpull(key, part, out=out)

    def kill(self) -> float:
        """Kill the server; return the seconds until it has answered a pull of the first key."""
        import ray

        actor = ray.get_actor(f"{self._name}/0", namespace="tensorkv")
        _, pid, *_ = ray.get(actor.place.remote(), timeout=_TIMEOUT_S)
        os.kill(pid, signal.SIGKILL)
        start = perf_counter()
        self._kv.pull(0, out=self.outs[0])
        return perf_counter() - start

    def check(self) -> None:
        for out in self.outs:
            out[:] = np.nan
        self.pull()
        check_exactly(self.work, self.steps, self.scale, self.out)


class Reader(Servers):
    """A worker that pulls what rank 0 has pushed once."""

    def open(self, port: int, **options: Any) -> None:
        super().open(port, **options)
        self._reads = True
        if self.rank == 0:
            self._kv.push(self._keys, self._given)
        self._kv.barrier()

    def choose(self, readers: int) -> None:
        """Let only the first workers read from now on."""
        self._reads = self.rank < readers

    def exchange(self) -> None:
        if self._reads:
            self.pull()

    def timed(self, calls: int) -> list[float]:
        """Read so often; return the seconds of each time."""
        self.laps.clear()
        self.time("pushpull", calls)
        return list(self.laps)

    def check(self) -> None:
        for out in self.outs:
            out[:] = np.nan
        self.pull()
        one = Work(self.work.keys, self.work.shape, 1)
        check_exactly(one, 1, 1, self.out)

    def found(self) -> dict[str, Any]:
        """Return how often the server has written the values out, and how many pulls it has answered."""
        verbs = self._kv.stats()["server_verbs"]
        return {"copies": verbs["pull"]["calls"], "pulls": verbs["wait_for_version"]["calls"]}


class AsyncMXNet(Worker, MXNet):
    """MXNet's own KVStore ``dist_async``, whose servers are processes of their own."""

    TYPE: ClassVar[str] = "dist_async"

    def pull(self) -> None:
        self._kv.pull(self._keys, out=self._given_outs)
        self._mx.nd.waitall()
