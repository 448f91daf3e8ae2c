"""The local engine: one process, any number of devices, one Shard."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tensorkv.arrays.arguments import Key, absolute_path
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Codec, Compressor
from tensorkv.errors import ArgumentError
from tensorkv.releases.changes import Changes, with_values
from tensorkv.releases.finder import ChangeFinder
from tensorkv.runtime import shield
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.reduce import Reduce
from tensorkv.shard.releases import HeldRelease
from tensorkv.shard.rules import Assign, Updater
from tensorkv.shard.shard import Lock, Shard, ShardSnapshot
from tensorkv.storage import checkpoint
from tensorkv.storage.durable import open_shard
from tensorkv.storage.manifest import Contents
from tensorkv.storage.wal import Durability

from .base import POLL_S, RENEW_AFTER, Engine, Outs, Reader, ReleaseReader, held_s, no_release
from .call import Call


class ShardReader(Reader):
    """Reads a shard of this process.

    Args:
        shard: to be read.
    """

    protect = staticmethod(shield.defer)

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._shard.entry(verb, key).spec

    def keys(self) -> list[Key]:
        return self._shard.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._shard

    def try_compiled(self, call: Call) -> bool:
        return self._shard.try_compiled(call)

    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        self._shard.pull(keys, outs)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._shard.pull(keys, outs, regions)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._shard.pull_rows(keys, ids)

    def close(self) -> None:
        self._shard.close()


class LocalRelease(ShardReader, ReleaseReader):
    """A release of a store in this process.

    Args:
        shard: of the store.
        finder: of changes between its releases.
        held: the release, which ``reader`` holds.
        reader: who reads.
        lease_s: how long the release stays after it was read last.
    """

    def __init__(self, shard: Shard, finder: ChangeFinder, held: HeldRelease, reader: str, lease_s: float) -> None:
        self._finder = finder
        ShardReader.__init__(self, held.snapshot)
        ReleaseReader.__init__(self, held.name, held.number, held.snapshot.versions)
        self._source, self._reader, self._lease_s = shard, reader, lease_s
        self._renewed = time.monotonic()

    def _renew(self) -> None:
        """Hold the release for longer, if the lease is no longer new."""
        now = time.monotonic()
        if now - self._renewed > self._lease_s * RENEW_AFTER:
            self.protect(self._source.hold_release, self.name, self._reader, held_s(self._lease_s))
            self._renewed = now

    def pull(self, call: Call) -> None:
        self._renew()
        super().pull(call)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._renew()
        super().pull_regions(keys, regions, outs)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        self._renew()
        return super().pull_rows(keys, ids)

    def digest(self) -> str:
        with self._source.comparing(self.name, self._reader, held_s(self._lease_s)):
            return self._finder.digest(self.name, self._shard)

    def changes(self, since: str) -> Changes:
        with self._source.comparing(self.name, self._reader, held_s(self._lease_s)):
            base, found = self._finder.changes(self.name, self._shard, since)
            return Changes(base, self.name, with_values(found, self._shard.pull))

    def close(self) -> None:
        self._source.let_go(self.name, self._reader)


class LocalEngine(ShardReader, Engine):
    """Values in this process; a push is summed and applied before it returns.

    Args:
        on_device: keep each value on the device of its arrays (``"device"``) or on the CPU (``"local"``).
        nonfinite: ``"pass"``, ``"raise"`` or ``"skip"`` updates whose sum has NaN or Inf.
        reduce: whether a push takes the ``"sum"`` or the ``"mean"`` of the parts of a key.
        threads: that sum and update large values (None: as many as cores, at most ``OMP_NUM_THREADS``).
        path: a folder where the store is kept, and opened again by the next that names it (``"local"`` only).
        durability: ``"process"``: what a call has changed outlives the process, ``"disk"``: and the machine's power.
        log_nbytes: how long the log in the folder may grow (None: twice the store, at most 1 GiB).
    """

    capabilities = frozenset({"checkpoint", "optimizer", "releases", "rows", "snapshot", "updater"})

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
            shown = repr(absolute_path("create", path))
            raise ArgumentError(f'create: path is {shown}; a "device" store cannot be in a folder, use "local"')
        else:
            self._shard = self.protect(
                partial(
                    open_shard,
                    absolute_path("create", path),
                    durability=durability,
                    log_nbytes=log_nbytes,
                    nonfinite=nonfinite,
                    reduce=reduce,
                    threads=threads,
                )
            )

        self._finder = ChangeFinder(self._shard)

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        self._shard.init(keys, values, specs)

    def push_parts(self, batch: Batch, priority: int) -> None:
        with self._compressed(batch) as found:
            self._shard.push(found)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        with self._compressed(batch) as found:
            self._shard.pushpull(found, outs)

    @contextmanager
    def together(self) -> Iterator[None]:
        # In the order in which a push takes these locks.
        with self._compressing, self._shard.frozen():
            yield

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
            self._shard.refuse_calls_by_updater()
            self._compressor.change(codec, self._push_owed)

    def _push_owed(self, owed: dict[Key, list[Part]]) -> None:
        # A value that is assigned owes nothing.
        if owed and not self.assigns:
            self._shard.push(Batch("set_gradient_compression", list(owed), list(owed.values())))

    @contextmanager
    def _compressed(self, batch: Batch) -> Iterator[Batch]:
        """Give the batch that the receivers of a compressed one have; if it is pushed, what is left of it is kept."""
        if self._compressor.codec is None:
            yield batch
            return
        batch.refuse_slices("cannot be compressed; set_gradient_compression(None) has parts pushed as they are")
        with self._compressing:
            if self._compressor.codec is None:
                # Another thread has just taken it away.
                yield batch
                return
            self._shard.check(batch)
            entries = [self._shard.entry(batch.verb, key) for key in batch.keys]
            places = [
                (place, worker)
                for place, entry in enumerate(entries)
                if not entry.spec.is_table
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
            versions = [entry.version for entry in entries]
            try:
                yield Batch(batch.verb, batch.keys, parts, batch.counts)
            finally:
                self._compressor.settle(sending, entries, versions)

    def delete(self, keys: Sequence[Key]) -> None:
        # A push by another thread of a key that is made again owes something of its own.
        with self._compressing:
            self._shard.delete(keys)
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
    def assigns(self) -> bool:
        return isinstance(self._shard.rule, Assign)

    @property
    def averages(self) -> bool:
        return self._shard.averages

    @property
    def last_push(self) -> PushResult:
        return self._shard.last_push

    @property
    def skips_steps(self) -> bool:
        return self._shard.skips_steps

    def info(self, keys: Sequence[Key]) -> list[KeyInfo]:
        return [self._shard.entry("info", key).info() for key in keys]

    def stats(self) -> Mapping[str, Any]:
        counts = {"nonfinite": dict(self._shard.nonfinite_counts), **self._compressor.traffic.stats()}
        return counts if self._shard.log is None else {**counts, "wal": self._shard.log.counts}

    @contextmanager
    def contents(self, *, releases: bool = False) -> Iterator[Contents]:
        with self._compressing, self._shard.frozen(releases=releases) as (entries, rule):
            self._shard.check_complete("save")
            saved = self._shard.saved_releases() if releases else None
            yield Contents("store", entries, rule, self._compressor.owed, saved)

    def restore(self, contents: Contents) -> None:
        with self._compressing:
            checkpoint.restore(self._shard, contents)
            self._compressor.owed = dict(contents.owed)

    # ------------------------------------------------------------ snapshots and releases

    def snapshot(self) -> tuple[Reader, Mapping[Key, int]]:
        taken = ShardSnapshot(self._shard, self._shard.freeze())
        return ShardReader(taken), taken.versions

    def publish(self, name: str, keys: Sequence[Key] | None, keep: int | None) -> None:
        self._shard.publish(name, keys, keep)

    def unpublish(self, name: str) -> None:
        self._shard.unpublish(name)

    def releases(self) -> list[tuple[str, int]]:
        return [(held.name, held.number) for held in self._shard.held_releases()]

    def open_release(self, name: str, lease_s: float) -> ReleaseReader:
        reader = secrets.token_hex(8)
        held = self._shard.hold_release(name, reader, held_s(lease_s))
        return LocalRelease(self._shard, self._finder, held, reader, lease_s)

    def wait_release(self, after: str | None, timeout_s: float, lease_s: float) -> ReleaseReader:
        reader, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
        while (held := self.protect(self._shard.hold_newest, after, reader, held_s(lease_s))) is None:
            if time.monotonic() >= deadline:
                raise no_release(after, timeout_s)
            time.sleep(POLL_S)
        return LocalRelease(self._shard, self._finder, held, reader, lease_s)
