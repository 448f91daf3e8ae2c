"""Contenders with parameter servers: what each worker does.

All workers push the same gradients. A library is imported only by the contender that uses it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import monotonic, perf_counter, sleep
from typing import Any, ClassVar

import numpy as np

from benchmarks.common import redis_client
from benchmarks.common.contender import Contender
from benchmarks.common.work import FIRST, Verb, Work, WrongResultError
from benchmarks.common.work import check as check_exactly
from benchmarks.servers.works import BATCHES, TABLE_LR, Serving, Table, check
from benchmarks.sync.contenders import Member, MXNet, TensorKV

NAMES = {
    "tensorkv1": "tensorkv, 1 server",
    "tensorkv2": "tensorkv, 2 servers",
    "mxnet1": "MXNet, 1 server",
    "mxnet2": "MXNet, 2 servers",
    "mxnet": "MXNet",
    "rows": "tensorkv, pull and push",
    "embedding": "tensorkv, Embedding",
    "redis": "Redis",
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
        self._wait_for_actors()
        os.kill(self._kv.stats()["servers"][0]["pid"], signal.SIGKILL)
        start = perf_counter()
        self._kv.pull(0, out=self.outs[0])
        return perf_counter() - start

    def _wait_for_actors(self) -> None:
        """Wait until the server, and its spare if it has one, have been started."""
        import ray

        until = monotonic() + _TIMEOUT_S
        for name in ray.util.list_named_actors(all_namespaces=True):
            is_there = not name["name"].startswith(f"{self._name}/")
            while not is_there:
                try:
                    ray.get(ray.get_actor(**name).place.remote(), timeout=_TIMEOUT_S)
                    is_there = True
                except ray.exceptions.ActorUnavailableError:
                    # It is being started again.
                    if monotonic() > until:
                        raise
                    sleep(0.05)

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
        pulls = self._kv.stats()["server_verbs"]["pull"]
        return {"copies": pulls["nbytes"] // self.work.value_nbytes, "pulls": pulls["calls"]}


class AsyncMXNet(Worker, MXNet):
    """MXNet's own KVStore ``dist_async``, whose servers are processes of their own."""

    TYPE: ClassVar[str] = "dist_async"

    def pull(self) -> None:
        self._kv.pull(self._keys, out=self._given_outs)
        self._mx.nd.waitall()


class TableClient(Contender):
    """The only worker of a table: pulls the rows of the next batch, and steps them by their gradients."""

    WORK: ClassVar[type[Any]] = Table
    work: Any

    def __init__(self, work: Table, rank: int | None = None) -> None:
        # Each call takes other rows: there are no parts and outs of whole values.
        del rank
        self.work = work
        self.batches = [work.ids(number) for number in range(BATCHES)]
        self.gradients = [work.gradients(ids) for ids in self.batches]
        self.steps = self._done = 0
        self.pulled: Any = None

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self._step_next}

    def _step_next(self) -> None:
        number = self._done % BATCHES
        self.pulled = self.step(self.batches[number], self.gradients[number])
        self._done += 1

    def step(self, ids: Any, gradients: Any) -> Any:
        """Pull rows, and step them; return what was pulled."""
        raise NotImplementedError

    def pull(self, ids: Any) -> Any:
        """Return rows as a NumPy array."""
        raise NotImplementedError

    def renew(self) -> None:
        """Forget what was pulled."""
        self.pulled = None

    def check(self) -> None:
        """Raise ``WrongResultError`` unless the last pull was right, and all rows are."""
        before = self.steps - 1
        ids = np.asarray(self.batches[before % BATCHES])
        self.work.check(np.asarray(self.pulled), ids, before, "the last pull")
        for ids in np.array_split(np.arange(self.work.rows), 20):
            self.work.check(self.pull(ids), ids, self.steps, "at the end")

    def first(self, count: int) -> Any:
        """Return so many rows as they are at first."""
        return np.full((count, self.work.dim), FIRST, np.float32)


class Rows(TableClient):
    """Rows that are pulled from this project's store, and pushed to it."""

    @staticmethod
    def start() -> dict[str, str]:
        return Servers.start()

    def open(self, port: int, **options: Any) -> None:
        import tensorkv

        self._rows = tensorkv.Rows
        self._kv = tensorkv.create("dist_async", name=f"bench{port}", timeout_s=_TIMEOUT_S, **options)
        rows = self.work.rows
        self._kv.init("table", self._rows(np.arange(rows), self.first(rows), rows))
        self._kv.set_optimizer("sgd", lr=TABLE_LR)

    def step(self, ids: Any, gradients: Any) -> Any:
        pulled = self.pull(ids)
        self._kv.push("table", self._rows(ids, gradients, self.work.rows))
        return pulled

    def pull(self, ids: Any) -> Any:
        return self._kv.row_sparse_pull("table", row_ids=ids).values

    def close(self) -> None:
        self._kv.close()


class Embedding(Rows):
    """A layer of torch whose table is in this project's store."""

    def open(self, port: int, **options: Any) -> None:
        super().open(port, **options)
        import torch

        import tensorkv

        self._layer = tensorkv.Embedding(self._kv, "table", self.work.rows, self.work.dim)
        # A layer is given ids in any order.
        order = np.random.default_rng(0).permutation(self.work.batch)
        self.batches = [torch.from_numpy(ids[order]) for ids in self.batches]
        self.gradients = [torch.from_numpy(gradients[order]) for gradients in self.gradients]

    def step(self, ids: Any, gradients: Any) -> Any:
        pulled = self._layer(ids)
        pulled.backward(gradients)
        self._layer.step()
        return pulled.detach()


class Redis(TableClient):
    """A string for each row in Redis, which knows no arrays: the client steps, between MGET and MSET."""

    @staticmethod
    def start() -> dict[str, str]:
        return redis_client.versions()

    def open(self, port: int, **options: Any) -> None:
        self._redis = redis_client.connect()
        for ids in np.array_split(np.arange(self.work.rows), 20):
            self._put(ids, self.first(len(ids)))

    def step(self, ids: Any, gradients: Any) -> Any:
        pulled = self.pull(ids)
        self._put(ids, pulled - np.float32(TABLE_LR) * gradients)
        return pulled

    def pull(self, ids: Any) -> Any:
        found = self._redis.mget([b"%d" % number for number in ids.tolist()])
        return np.frombuffer(b"".join(found), np.float32).reshape(len(ids), -1)

    def _put(self, ids: Any, rows: Any) -> None:
        data, nbytes = rows.tobytes(), rows.shape[1] * rows.itemsize
        starts = range(0, len(data), nbytes)
        pairs = zip(ids.tolist(), starts, strict=True)
        self._redis.mset({b"%d" % number: data[start : start + nbytes] for number, start in pairs})

    def close(self) -> None:
        self._redis.flushall()
        self._redis.close()
