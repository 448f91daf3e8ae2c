"""Contenders that are measured between hosts alone: what a connection carries, and an actor of Ray that answers."""

from __future__ import annotations

import os
import socket
from typing import Any, ClassVar

from benchmarks.common.work import Work, check
from benchmarks.servers.contenders import Servers
from benchmarks.servers.works import Serving
from benchmarks.sync.contenders import Member

NAMES = {
    "tensorkv": "tensorkv, dist_sync",
    "gloo": "Gloo all_reduce",
    "mxnet_sync": "MXNet, dist_sync",
    "servers": "tensorkv, dist_async",
    "mxnet_async": "MXNet, dist_async",
    "far": "tensorkv, dist_async",
    "near": "tensorkv, server on the worker's host",
    "stream": "one TCP stream",
    "actor": "an actor of Ray",
}


class Assigning(Servers):
    """The store of this project, whose only worker assigns values."""

    def check(self) -> None:
        check(self.work, self.steps, self.scale, self.out)


class _Echo(Member):
    """The parts go to another host, and come back as the results."""

    WORK: ClassVar[type[Any]] = Serving


class Stream(_Echo):
    """One TCP connection: rank 0 sends the bytes of all keys, and rank 1, on another host, sends as many back."""

    def __init__(self, work: Work, rank: int | None = None) -> None:
        # The same part in both.
        super().__init__(work, 0)
        self.rank = rank
        self._buffer = bytearray(work.value_nbytes)

    def open(self, port: int, **options: Any) -> None:
        if self.rank == 0:
            with socket.create_server(("", port)) as listener:
                self._connection, _ = listener.accept()
        else:
            self._connection = _connected((os.environ["MASTER_ADDR"], port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self) -> None:
        if self.rank == 0:
            for [part] in self.parts:
                self._connection.sendall(memoryview(part).cast("B"))
            for out in self.outs:
                self._receive(memoryview(out).cast("B"))
        else:
            received = memoryview(self._buffer)
            self._receive(received)
            self._connection.sendall(received)

    def _receive(self, left: memoryview) -> None:
        while left:
            left = left[self._connection.recv_into(left) or len(left) :]

    def check(self) -> None:
        if self.rank == 0:
            super().check()

    def close(self) -> None:
        self._connection.close()


def _connected(address: tuple[str, int]) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            # The other one does not listen yet.
            continue


class Actor(_Echo):
    """A method of an actor of Ray on another host, which is given all parts and returns them."""

    @staticmethod
    def start() -> dict[str, str]:
        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        return {"ray": ray.__version__}

    def open(self, port: int, **options: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        other = next(each["NodeID"] for each in ray.nodes() if each["NodeID"] != here)
        strategy = NodeAffinitySchedulingStrategy(other, soft=False)
        self._actor = ray.remote(_Answering).options(num_cpus=0, memory=1, scheduling_strategy=strategy).remote()
        self._get = ray.get

    def exchange(self) -> None:
        found = self._get(self._actor.answer.remote([part for [part] in self.parts]))
        for out, value in zip(self.outs, found, strict=True):
            out[...] = value

    def close(self) -> None:
        self._actor = None


class _Answering:
    def answer(self, values: list[Any]) -> list[Any]:
        """Return what came."""
        return values
