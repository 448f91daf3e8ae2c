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
from tensorkv.errors import ArgumentError
from tensorkv.runtime import shield
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.reduce import Reduce
from tensorkv.shard.rules import Updater
from tensorkv.shard.shard import Shard
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

    capabilities = frozenset({"optimizer", "updater", "rows", "checkpoint", "snapshot"})
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
        self._shard.push(batch)

    def pull_into(self, keys: Sequence[Key], outs: Outs, priority: int) -> None:
        self._shard.pull(keys, outs)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        self._shard.pushpull(batch, outs)

    def try_compiled(self, call: Call) -> bool:
        return self._shard.try_compiled(call)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._shard.pull_rows(keys, ids)

    def delete(self, keys: Sequence[Key]) -> None:
        self._shard.delete(keys)

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
        counts = {"nonfinite": dict(self._shard.nonfinite_counts)}
        return counts if self._shard.log is None else {**counts, "wal": self._shard.log.counts}

    @contextmanager
    def contents(self) -> Iterator[Contents]:
        with self._shard.frozen() as (entries, rule):
            yield Contents("store", entries, rule)

    def restore(self, contents: Contents) -> None:
        checkpoint.restore(self._shard, contents)

    def snapshot(self) -> tuple[LocalEngine, Mapping[Key, int]]:
        copy = LocalEngine(False)
        with self._shard.frozen() as (entries, _):
            copy._shard.add([entry.copy(value=_copy(entry.value), state={}) for entry in entries])
            return copy, {entry.key: entry.version for entry in entries}

    def close(self) -> None:
        self._shard.close()


def _copy(value: torch.Tensor | Table) -> torch.Tensor | Table:
    return value.copy() if isinstance(value, Table) else value.clone()
