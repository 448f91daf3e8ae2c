"""Contenders of processes in lock step: what each rank does."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.contender import Contender, one_or_list
from benchmarks.common.work import Verb, Work, count, first_values
from benchmarks.local.contenders import set_mxnet_rule, set_rule
from benchmarks.sync.works import Exchange

NAMES = {
    "tensorkv": "tensorkv",
    "overlap": "tensorkv, overlap",
    "mxnet1": "MXNet, 1 server",
    "mxnet2": "MXNet, 2 servers",
    "mxnet": "MXNet",
    "gloo": "Gloo all_reduce",
    "mpi": "MPI Allreduce",
    "ddp": "PyTorch DDP",
    "ddp beside overlap": "PyTorch DDP, beside overlap",
}
# What a program sends at once that does not want to wait for each of many small arrays.
_BUCKET_NBYTES = 25_000_000


class Member(Contender):
    """One rank of a contender; ``open`` brings it together with the others."""

    WORK: ClassVar[type[Any]] = Exchange

    def exchange(self) -> None:
        """Push all keys' parts and pull all results, and return when everything is done."""
        raise NotImplementedError

    def pull(self) -> None:
        """Pull all keys, and return when everything is done."""
        raise NotImplementedError

    def calls(self) -> dict[Verb, Callable[[], None]]:
        return {"pushpull": self.exchange}


class TensorKV(Member):
    """The store of this project."""

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        self._keys = one_or_list(work, list(range(work.keys)))
        self._given = one_or_list(work, self.parts)
        self._given_outs = one_or_list(work, self.outs)
        self._kv: Any = None

    @staticmethod
    def start() -> dict[str, str]:
        import tensorkv  # noqa: F401 - takes a while, and is not to be measured

        return {}

    def create(self, port: int, **options: Any) -> Any:
        """Return a new store; arguments as for ``open``."""
        return open_store(port)

    def open(self, port: int, **options: Any) -> None:
        self._kv = self.create(port, **options)
        self._kv.init(list(range(self.work.keys)), first_values(self.work))
        set_rule(self._kv, self.work.rule)
        self._kv.barrier()

    def exchange(self) -> None:
        self._kv.pushpull(self._keys, self._given, out=self._given_outs)

    def pull(self) -> None:
        self._kv.pull(self._keys, out=self._given_outs)

    def close(self) -> None:
        if self._kv is not None:
            self._kv.close()


def open_store(port: int) -> Any:
    """Return a new store of all ranks, which meet at a port of their own."""
    import tensorkv

    os.environ["MASTER_PORT"] = str(port)
    return tensorkv.create("dist_sync")


class MXNet(Member):
    """MXNet's own KVStore ``dist_sync``, whose servers are processes of their own.

    A pull of MXNet also writes into the array that was pushed last, so each call gets arrays of its own.
    """

    TYPE: ClassVar[str] = "dist_sync"

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import mxnet as mx

        self._mx = mx
        self.outs = [mx.nd.zeros(shape) for shape in work.shapes]
        self._keys = one_or_list(work, list(range(work.keys)))
        self._given: list[list[Any]] = []
        self._given_outs = one_or_list(work, self.outs)
        self._kv: Any = None
        self.prepare("pushpull", 1)

    @staticmethod
    def start() -> dict[str, str]:
        import mxnet

        return {"mxnet": mxnet.__version__, "numpy of mxnet": np.__version__}

    def open(self, port: int, **options: Any) -> None:
        del port  # the scheduler has one since it was started
        mx = self._mx
        self._kv = mx.kv.create(self.TYPE)
        self._kv.init(list(range(self.work.keys)), [mx.nd.array(value) for value in first_values(self.work)])
        set_mxnet_rule(self._kv, self.work.rule)
        mx.nd.waitall()

    def prepare(self, verb: Verb, calls: int) -> None:
        while len(self._given) < calls:
            self._given.append([self._mx.nd.empty(shape) for shape in self.work.shapes])
        for given in self._given[:calls]:
            for array, [part] in zip(given, self.parts, strict=True):
                array[:] = part
        self._mx.nd.waitall()
        self._coming = iter(self._given)

    def exchange(self) -> None:
        given = next(self._coming)
        # Of two ways to the same result, the one that is faster in MXNet.
        if self.work.keys > 1:
            self._kv.pushpull(self._keys, given, out=self._given_outs)
        else:
            self._kv.push(self._keys, given[0])
            self._kv.pull(self._keys, out=self._given_outs)
        self._mx.nd.waitall()

    def renew(self) -> None:
        super().renew()
        self._mx.nd.waitall()

    def out(self, key: int) -> Any:
        return self.outs[key].asnumpy()

    def close(self) -> None:
        self._kv = None


class Gloo(Member):
    """``all_reduce`` of torch.distributed; many keys go as buckets, all of them under way at once."""

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import torch

        parts = [torch.from_numpy(part) for [part] in self.parts]
        outs = [torch.from_numpy(out) for out in self.outs]
        self._buckets = []
        for place in buckets(work):
            # The only key of a bucket is summed where its result is wanted.
            shapes = work.shapes[place.start : place.stop]
            bucket = outs[place.start] if work.keys == 1 else torch.empty(sum(map(count, shapes)))
            pieces = bucket.view(-1).split(list(map(count, shapes)))
            views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
            self._buckets.append((bucket, views, parts[place.start : place.stop], outs[place.start : place.stop]))

    @staticmethod
    def start() -> dict[str, str]:
        import torch.distributed

        torch.distributed.init_process_group("gloo")
        return {}

    def exchange(self) -> None:
        import torch

        waits = []
        for bucket, views, parts, _ in self._buckets:
            torch._foreach_copy_(views, parts)
            waits.append(torch.distributed.all_reduce(bucket, async_op=True))
        for wait, (bucket, views, _, outs) in zip(waits, self._buckets, strict=True):
            wait.wait()
            if bucket is not outs[0]:
                torch._foreach_copy_(outs, views)


class MPI(Member):
    """``Allreduce`` of mpi4py; many keys go as buckets."""

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        from mpi4py import MPI as mpi  # noqa: N811 - a module with the name of a class

        self._world = mpi.COMM_WORLD
        self._buckets = []
        for place in buckets(work):
            parts = [part.reshape(-1) for [part] in self.parts[place.start : place.stop]]
            outs = [out.reshape(-1) for out in self.outs[place.start : place.stop]]
            sizes = [part.size for part in parts]
            given, total = (parts[0], outs[0]) if work.keys == 1 else np.empty((2, sum(sizes)), "f4")
            self._buckets.append((given, total, parts, outs, np.split(total, np.cumsum(sizes)[:-1])))

    @staticmethod
    def start() -> dict[str, str]:
        import mpi4py
        from mpi4py import MPI as mpi  # noqa: N811 - a module with the name of a class

        name, _, version = mpi.Get_library_version().splitlines()[0].partition(":")
        found = {"mpi4py": mpi4py.__version__, "numpy of mpi": np.__version__}
        return found | {name.split()[0].lower(): version.strip()}

    def exchange(self) -> None:
        for given, total, parts, outs, views in self._buckets:
            if given is not parts[0]:
                np.concatenate(parts, out=given)
            self._world.Allreduce(given, total)
            if total is not outs[0]:
                for out, view in zip(outs, views, strict=True):
                    out[...] = view


def buckets(work: Work) -> list[range]:
    """Return runs of keys that go together.

    >>> buckets(Work(5, (3_000_000,), 2))
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    starts, held = [0], 0
    for key, shape in enumerate(work.shapes):
        nbytes = 4 * count(shape)
        if held and held + nbytes > _BUCKET_NBYTES:
            starts.append(key)
            held = 0
        held += nbytes
    return [range(start, stop) for start, stop in pairwise([*starts, work.keys])]
