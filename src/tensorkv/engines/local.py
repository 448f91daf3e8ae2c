"""The local engine: one process, any number of devices, one Shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tensorkv.arrays.arguments import Key, folder_path
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Codec, Compressor
from tensorkv.errors import ArgumentError
from tensorkv.runtime import shield
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.reduce import Reduce
from tensorkv.shard.rules import Updater
from tensorkv.shard.shard import Lock, Shard
from tensorkv.shard.table import Table
from tensorkv.storage import checkpoint
from tensorkv.storage.durable import open_shard
from tensorkv.storage.manifest import Contents
from tensorkv.storage.wal import Durability

from .base import Engine, Outs
from .call import Call


class LocalEngine(Engine):
    """Values in this process; a push is summed and applied before it returns.

    Args:
        on_device: keep each value on the device of its arrays (``"device"``) or on the CPU (``"local"``).
        nonfinite: ``"pass"``, ``"raise"`` or ``"skip"`` updates whose sum has NaN or Inf.
        reduce: whether a push takes the ``"sum"`` or the ``"mean"`` of the parts of a key.
        threads: that sum and update large values (None: as many as cores).
        path: a folder where the store is kept, and opened again by the next that names it (``"local"`` only).
        durability: ``"process"``: what a call has changed outlives the process, ``"disk"``: and the machine's power.
        log_nbytes: how long the log in the folder may grow (None: twice the store, at most 1 GiB).
    """

    capabilities = frozenset({"checkpoint", "optimizer", "rows", "snapshot", "updater"})
    protect = staticmethod(shield.defer)

    def __init__(
        self,
        on_device: bool,
        *,
        nonfinite: NonFinite = "pass",
        reduce: Reduce = "sum",
        threads: int | None = None,
        path: str | os.PathLike[str] | None = None,
        durability: Durability = "process",
        log_nbytes: int | None = None,
    ) -> None:
        self._compressor = Compressor()
        self._compressing = Lock()
        if path is None:
            if not isinstance(durability, str) or durability != "process" or log_nbytes is not None:
                raise ArgumentError("create: durability and log_nbytes need a store in a folder; give path=")
            self._shard = Shard(on_device=on_device, nonfinite=nonfinite, reduce=reduce, threads=threads)
        elif on_device:
            raise ArgumentError(
                f'create: path is {folder_path("create", path)!r}; a "device" store cannot be in a folder, use "local"'
            )
        else:
            self._shard = self.protect(
                partial(
                    open_shard,
                    folder_path("create", path),
                    durability=durability,
                    log_nbytes=log_nbytes,
                    nonfinite=nonfinite,
                    reduce=reduce,
                    threads=threads,
                )
            )

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        self._shard.init(keys, values, specs)

    def push_parts(self, batch: Batch, priority: int) -> None:
        with self._compressed(batch) as found:
            self._shard.push(found)

    def pull_into(self, keys: Sequence[Key], outs: Outs, priority: int) -> None:
        self._shard.pull(keys, outs)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        with self._compressed(batch) as found:
            self._shard.pushpull(found, outs)

    def try_compiled(self, call: Call) -> bool:
        return (self._compressor.codec is None or call.verb == "pull") and self._shard.try_compiled(call)

    # ------------------------------------------------------------ compression

    def set_gradient_compression(self, codec: Codec | None, *, simulate: bool) -> None:
        if codec is not None and not simulate:
            raise ArgumentError(
                "set_gradient_compression: this type of store sends nothing; simulate=True compresses each part as if "
                "a worker had sent it"
            )
        if codec is not None and self._shard.log is not None:
            raise ArgumentError("set_gradient_compression: a store in a folder (path=) cannot simulate compression")
        with self._compressing:
            self._compressor.change(codec, self._push_owed)

    def _push_owed(self, owed: dict[Key, list[Part]]) -> None:
        # A value that is assigned owes nothing.
        if owed and (self._shard.optimizer is not None or self._shard.has_updater):
            self._shard.push(Batch("set_gradient_compression", list(owed), list(owed.values())))

    @contextmanager
    def _compressed(self, batch: Batch) -> Iterator[Batch]:
        """Give the batch that the receivers of a compressed one have; if it is pushed, what is left of it is kept."""
        if self._compressor.codec is None:
            yield batch
            return
        with self._compressing:
            self._shard.check(batch)
            places = [
                (place, worker)
                for place, key in enumerate(batch.keys)
                if not self._shard.entry(batch.verb, key).spec.is_table
                for worker in range(len(batch.parts[place]))
            ]
            sending = self._compressor.encode(
                batch.verb,
                [(batch.keys[place], worker) for place, worker in places],
                [batch.parts[place][worker] for place, worker in places],
            )
            parts = [list(own) for own in batch.parts]
            for (place, worker), part in zip(places, sending.decoded(), strict=True):
                parts[place][worker] = part
            yield Batch(batch.verb, batch.keys, parts, batch.counts)
            self._compressor.keep(sending)
            self._compressor.end(sending)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._shard.pull_rows(keys, ids)

    def delete(self, keys: Sequence[Key]) -> None:
        self._shard.delete(keys)
        with self._compressing:
            self._compressor.forget(keys)

    def set_updater(self, updater: Updater | None) -> None:
        self._shard.set_updater(updater)

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        self._shard.set_optimizer(spec)

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        self._shard.set_hyperparameters(numbers, keys)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        return self._shard.optimizer

    @property
    def last_push(self) -> PushResult:
        return self._shard.last_push

    @property
    def skips_steps(self) -> bool:
        return self._shard.skips_steps

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._shard.entry(verb, key).spec

    def info(self, key: Key) -> KeyInfo:
        return self._shard.entry("info", key).info()

    def keys(self) -> list[Key]:
        return self._shard.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._shard

    def stats(self) -> Mapping[str, Any]:
        counts = {"nonfinite": dict(self._shard.nonfinite_counts), **self._compressor.traffic.stats()}
        return counts if self._shard.log is None else {**counts, "wal": self._shard.log.counts}

    @contextmanager
    def contents(self) -> Iterator[Contents]:
        with self._compressing, self._shard.frozen() as (entries, rule):
            yield Contents("store", entries, rule, self._compressor.owed)

    def restore(self, contents: Contents) -> None:
        with self._compressing:
            checkpoint.restore(self._shard, contents)
            self._compressor.owed = dict(contents.owed)

    def snapshot(self) -> tuple[LocalEngine, Mapping[Key, int]]:
        copy = LocalEngine(False)
        with self._shard.frozen() as (entries, _):
            copy._shard.add([entry.copy(value=_copy(entry.value), state={}) for entry in entries])
            return copy, {entry.key: entry.version for entry in entries}

    def close(self) -> None:
        self._shard.close()


def _copy(value: torch.Tensor | Table) -> torch.Tensor | Table:
    return value.copy() if isinstance(value, Table) else value.clone()
