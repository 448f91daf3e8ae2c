"""The dist_sync engine: processes and hosts that make the same calls in the same order.

A call is checked here, entered and compared with the other workers' (``order``), and its arrays go through a staging
buffer in shared memory (``allreduce``), over hosts along a chain (``chain``). Each worker has a Shard with the parts of
the values that it updates, in memory that the workers of its host share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, check_flag, check_timeout, plain_number
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows, unchecked_rows
from tensorkv.arrays.slices import Slices, join_slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Codec, Compressor, owed_by
from tensorkv.engines import partition
from tensorkv.engines.base import Engine, Outs
from tensorkv.engines.call import Call
from tensorkv.engines.transport.segment import Segment, aligned
from tensorkv.errors import (
    ArgumentError,
    ForkedStoreError,
    RankDeadError,
    StoreClosedError,
    TensorKVError,
)
from tensorkv.runtime import shield
from tensorkv.runtime.modes import outside_modes
from tensorkv.shard import native
from tensorkv.shard.entry import Batch, Entry, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinite, NonFinitePolicy
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec, State
from tensorkv.shard.reduce import Reduce
from tensorkv.shard.rules import Assign, CallUpdater, Rule, StepOptimizer, Updater
from tensorkv.shard.shard import Shard
from tensorkv.shard.table import Table
from tensorkv.storage import checkpoint
from tensorkv.storage.manifest import Contents, Kind

from . import coded, sparse
from .chain import Chain
from .checkpoint import ShardedCheckpoint, own_state
from .group import ProcessGroup, log
from .host import HostGroup, describe
from .order import CollectiveOrder
from .push import Pushes, raising_failed
from .schedule import PartitionedEntry


def build(*, nonfinite: NonFinite, reduce: Reduce, timeout_s: float, shared_memory: bool) -> DistEngine | None:
    """Return the engine of this worker, None if it is the only one.

    Args:
        nonfinite: ``"pass"``, ``"raise"`` or ``"skip"`` updates whose sum has NaN or Inf.
        reduce: whether a push takes the ``"sum"`` or the ``"mean"`` of all parts of a key.
        timeout_s: how long to wait for another worker, in seconds.
        shared_memory: let the workers of one host share memory; without it they use Gloo.
    """
    options = {"nonfinite": nonfinite, "reduce": reduce}
    group = ProcessGroup(check_timeout(timeout_s), check_flag("shared_memory", shared_memory), options)
    return None if group.size == 1 else DistEngine(group, nonfinite, reduce)


class DistEngine(Engine):
    """Values in the shared memory of each host, updated by its workers in parts.

    Args:
        group: of all workers, more than one.
        nonfinite, reduce: as for ``build``.
    """

    capabilities = frozenset({"checkpoint", "compression", "optimizer", "rows", "updater"})

    def __init__(self, group: ProcessGroup, nonfinite: NonFinite, reduce: Reduce) -> None:
        self._group = group
        self._host = HostGroup(group)
        self._chain = Chain(group, self._host)
        self._shard = Shard(reduce=reduce, threads=1)
        self._order = CollectiveOrder(self._host, self._chain, self._shard)
        self._values: dict[Key, PartitionedEntry] = {}
        # Bytes that each owner updates, and whether the rule has to see whole values.
        self._loads = [0] * self._chain.owners
        self._keeps_whole = self._is_closed = False
        self._policy = NonFinitePolicy(nonfinite, group.all_gather_json)
        self._compressor = Compressor()
        self._checkpoint = ShardedCheckpoint(
            group, self._host, self._chain, self._shard, self._values, self._compressor
        )
        self._pushes = Pushes(
            group, self._host, self._chain, self._order, self._shard, self._values, self._policy, self._compressor
        )

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def num_workers(self) -> int:
        return self._group.size

    @contextmanager
    def collective(self, verb: str) -> Iterator[None]:
        entered = self._host.num_entered
        try:
            yield
        except (StoreClosedError, ForkedStoreError):
            raise
        except Exception as error:
            # A call that an updater makes is inside another call.
            if self._host.num_entered == entered and not self._shard.rule.running:
                shield.run(self._refuse, f"{verb} refused: {error}")
            raise

    def _refuse(self, text: str) -> None:
        """Tell the other workers that this one did not make its call, since its arguments are wrong."""
        if self._host.error is None:
            with self._order.lock, suppress(TensorKVError), self._order.unbroken(text):
                # Calls are compared in order.
                self._pushes.drain()
                self._order.refuse(text)

    @contextmanager
    def _entered(self, text: str) -> Iterator[None]:
        """Do something that all workers do, after everything that was pushed."""
        with self._order.entered(text) as call:
            self._pushes.drain()
            self._order.agree_on_all(call)
            yield

    # ------------------------------------------------------------ init, push, pull

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        self._shard.check_new(keys)
        shapes = [[list(spec.shape), interop.dtype_name(spec.dtype), spec.is_table] for spec in specs]
        text = describe("init", keys=list(keys), values=shapes)
        with self._entered(text):
            partitioned = self._partition(keys, specs, self._allocate(specs))
            for key, value in zip(keys, values, strict=True):
                if isinstance(value, torch.Tensor) and self.rank == 0:
                    partitioned[key].whole.copy_(value)
            self._chain.broadcast([each.whole for each in partitioned.values()])
            self._host.barrier()
            entries: list[Entry] = []
            for key, value, spec in zip(keys, values, specs, strict=True):
                if isinstance(value, Rows):
                    table = sparse.first_table(self._group, key, value)
                    entries.append(Entry(key, replace(spec, init=table.init), table))
                else:
                    entries.append(partitioned[key])
            self._shard.add(entries)
            self._values.update(partitioned)

    def _allocate(self, specs: Sequence[KeySpec]) -> Segment | None:
        """Return shared memory for dense keys; None if there are none."""
        sizes = [aligned(_nbytes(spec)) for spec in specs if not spec.is_table]
        if not sizes:
            return None
        self._pushes.allocate()
        return self._host.allocate(sum(sizes))

    def _partition(
        self, keys: Sequence[Key], specs: Sequence[KeySpec], memory: Segment | None
    ) -> dict[Key, PartitionedEntry]:
        """Give dense keys their places in memory, and owners."""
        if memory is None:
            return {}
        dense = [(key, spec) for key, spec in zip(keys, specs, strict=True) if not spec.is_table]
        sizes = [_nbytes(spec) for _, spec in dense]
        at = 0
        borders = [self._borders(spec.shape, size) for (_, spec), size in zip(dense, sizes, strict=True)]
        found: dict[Key, PartitionedEntry] = {}
        # What one owner sends to another host at a time lies side by side, as far as can be.
        for index in sorted(range(len(dense)), key=lambda index: partition.whose(borders[index])):
            key, spec = dense[index]
            whole = memory.tensor(at, spec.shape, spec.dtype)
            found[key] = PartitionedEntry(key, spec, whole, borders[index], self._chain.owner)
            at += aligned(sizes[index])
        return {key: found[key] for key, _ in dense}

    def _borders(self, shape: Sequence[int], nbytes: int) -> list[int]:
        lead = partition.lightest(self._loads) if nbytes else 0
        borders = partition.borders(shape, self._chain.owners, lead, whole=self._keeps_whole)
        self._add_load(nbytes, borders, 1)
        # One more part, which is empty, for workers that own nothing.
        return [*borders, borders[-1]]

    def _add_load(self, nbytes: int, borders: Sequence[int], sign: int) -> None:
        width = nbytes // borders[-1] if borders[-1] else 0
        for owner in range(self._chain.owners):
            self._loads[owner] += sign * (borders[owner + 1] - borders[owner]) * width

    def try_compiled(self, call: Call) -> bool:
        if not native.can_look():
            return False
        # Only what a codec refuses is raised here; all other calls that cannot be made are parsed, and raise there.
        may_refuse = self._compressor.codec is not None and call.verb != "pull"
        with self.collective(call.verb) if may_refuse else nullcontext(), outside_modes():
            return raising_failed(shield.run_steps, self._order.steps(self._pushes.try_compiled(call)))

    def push_parts(self, batch: Batch, priority: int) -> None:
        self._pushes.push(self._assembled(batch), None, priority)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        self._pushes.push(self._assembled(batch), outs, priority)

    def _assembled(self, batch: Batch) -> Batch:
        """Return a push in which each worker has, of values that are pushed in slices, its own beside zeros.

        All workers learn of the slices of the others first.

        Raises:
            IncompleteValueError, ValueMismatchError: on every worker, if the slices do not make up the value.
        """
        if not batch.has_slices:
            return batch
        if self._compressor.codec is not None:
            batch.refuse_slices("cannot be compressed; set_gradient_compression(None) has parts pushed as they are")
        self._shard.check(batch)
        mine = {
            key: parts[0] for key, parts in zip(batch.keys, batch.parts, strict=True) if isinstance(parts[0], Slices)
        }
        # A worker that has left recognizes the call by its first word, since the end may be cut off.
        with self._entered(describe(batch.verb, slices=list(mine), keys=batch.keys)):
            regions = [[region.bounds for region in own.regions] for own in mine.values()]
            found = self._group.all_gather_json(regions)
        for place, (key, own) in enumerate(mine.items()):
            theirs = [[Region(tuple(map(tuple, each))) for each in bounds[place]] for bounds in found]
            together = join_slices(
                batch.name(key), [Slices(own.whole, own.rows, each, [], own.dtype) for each in theirs]
            )
            if not together.is_complete:
                raise together.incomplete_error(batch.name(key))
        parts: list[list[Any]] = []
        counts = []
        for key, given in zip(batch.keys, batch.parts, strict=True):
            if key in mine:
                # A value of slices is one part, of which rank 0 tells.
                parts.append([mine[key].to(self._values[key].whole.dtype).assembled(-0.0)])
                counts.append(int(self.rank == 0))
            else:
                parts.append(given)
                counts.append(len(given))
        return Batch(batch.verb, batch.keys, parts, counts)

    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        self._pushes.pull(keys, outs)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._pushes.pull(keys, outs, regions)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        with self._order.lock:
            self._order.check()
            self._pushes.settle(keys)
            found = []
            for key, own in zip(keys, ids, strict=True):
                entry = self._shard.entry("row_sparse_pull", key)
                found.append(unchecked_rows(own, self._whole(entry).read_rows(own), entry.spec.shape[0]))
            return found

    def _whole(self, entry: Entry) -> Entry:
        """Return an entry with the whole value."""
        return entry if isinstance(entry.value, Table) else entry.copy(value=self._values[entry.key].whole)

    def delete(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._shard.entry("delete", key)
        text = describe("delete", keys=list(keys))
        with self._entered(text):
            self._shard.delete(keys)
            self._compressor.forget(keys)
            self._forget(keys)

    def _forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            partitioned = self._values.pop(key, None)
            if partitioned is not None:
                self._add_load(partitioned.whole.nbytes, partitioned.borders, -1)
        self._pushes.forget(keys)

    # ------------------------------------------------------------ the update rule

    def set_updater(self, updater: Updater | None) -> None:
        text = describe("set_updater", to="none" if updater is None else getattr(updater, "__name__", "a function"))
        self._change_rule(text, lambda: self._shard.set_updater(updater))

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        StepOptimizer(spec)  # raises before others are told
        text = describe("set_optimizer", **_comparable(spec.to_json()))
        self._change_rule(text, lambda: self._shard.set_optimizer(spec))

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        self._shard.check_hyperparameters(numbers, keys)
        text = describe("set_hyperparameters", numbers=_comparable(numbers), keys=None if keys is None else list(keys))
        with self._entered(text):
            self._shard.set_hyperparameters(numbers, keys)

    def _change_rule(self, text: str, change: Callable[[], None]) -> None:
        with self._entered(text):
            change()
            self._repartition()

    def _repartition(self) -> None:
        """Give values the owners that the present rule asks for; a rule of the same kind keeps owners and state."""
        sees_whole = _sees_whole(self._shard.rule)
        if sees_whole == self._keeps_whole:
            return
        self._keeps_whole = sees_whole
        self._loads = [0] * self._chain.owners
        for entry in self._values.values():
            borders = self._borders(entry.whole.shape, entry.whole.nbytes)
            entry.value = entry.divide(borders, self._chain.owner)
        self._pushes.forget()
        self._host.barrier()

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
        return self._pushes.last_push

    @property
    def skips_steps(self) -> bool:
        return self._policy.skips_steps

    # ------------------------------------------------------------ compression

    def set_gradient_compression(self, codec: Codec | None, *, simulate: bool) -> None:
        if codec is not None and len(self._group.hosts) == 1 and not simulate:
            raise ArgumentError(
                "set_gradient_compression: all workers are on one host and share memory, so that nothing is sent; "
                "simulate=True compresses as between hosts, shared_memory=False has workers send"
            )
        described = None if codec is None else _comparable(codec.to_json())
        with self._entered(describe("set_gradient_compression", params=described, simulate=simulate)):
            owed = self._group.all_gather_json([key for key, _ in self._compressor.owed])
        keys = list(dict.fromkeys(key for own in owed for key in own))
        if self._compressor.codec == codec:
            return
        self._compressor.change(codec, partial(self._push_owed, keys))
        with self._entered("set_gradient_compression"):
            entries = list(self._values.values())
            if codec is not None:
                coded.spread_states(self._group, self._chain, self._host.local_rank, entries)
            elif not self._chain.is_last:
                for entry in entries:
                    entry.state = {}

    def _push_owed(self, keys: Sequence[Key], owed: Mapping[Key, list[Part]]) -> None:
        """Push what this worker owes beside what the others owe."""
        # A value that is assigned owes nothing.
        if not keys or self.assigns:
            return
        parts = [
            owed.get(key) or [torch.zeros(self._values[key].whole.shape, dtype=torch.float32, device="cpu")]
            for key in keys
        ]
        self._pushes.push(Batch("set_gradient_compression", list(keys), parts), None, 0)
        self._pushes.drain()

    # ------------------------------------------------------------ looking

    @property
    def joins_workers(self) -> Literal["sum", "mean", "alone"]:
        return "mean" if self._shard.averages else "sum"

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._shard.entry(verb, key).spec

    def info(self, keys: Sequence[Key]) -> list[KeyInfo]:
        return shield.run(self._info, keys)

    def _info(self, keys: Sequence[Key]) -> list[KeyInfo]:
        with self._order.lock:
            self._pushes.settle(keys)
            return [self._whole(self._shard.entry("info", key)).info() for key in keys]

    def keys(self) -> list[Key]:
        return self._shard.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._shard

    def stats(self) -> Mapping[str, Any]:
        return {
            "nonfinite": dict(self._policy.counts),
            **self._compressor.traffic.stats(),
            "dist": {"hosts": len(self._group.hosts), "sent_nbytes": self._chain.sent_nbytes},
        }

    # ------------------------------------------------------------ checkpoints, the end

    def save(self, path: str, kind: Kind, *, releases: bool = False) -> None:
        with self._entered(describe(_verb("save", kind), path=path)):
            self._checkpoint.save(path, kind)

    def load(self, path: str, kind: Kind, *, missing_ok: bool = False) -> bool:
        options = {"missing_ok": True} if missing_ok else {}
        with self._entered(describe(_verb("load", kind), path=path, **options)):
            if missing_ok and self._checkpoint.is_missing(path):
                return False
            self._take_over(self._checkpoint.read(path, kind))
            return True

    @contextmanager
    def contents(self, *, releases: bool = False) -> Iterator[Contents]:
        with self._entered("Trainer.state_dict"):
            yield self._checkpoint.gather(everywhere=True)
            # Before this, a worker of this host that went on would change the values that others still read.
            self._host.barrier()

    def restore(self, contents: Contents) -> None:
        self._checkpoint.check(contents)
        keys = [entry.key for entry in contents.entries]
        with self._entered(describe("Trainer.load_state_dict", keys=keys)):
            self._take_over(self._checkpoint.broadcast(contents))

    def _take_over(self, contents: Contents) -> None:
        if contents.kind == "optimizer-states":
            self._take_states(contents)
        else:
            self._take_values(contents)
        self._compressor.owed = owed_by(contents.owed, self.rank, self.num_workers)
        self._host.barrier()

    def _take_states(self, contents: Contents) -> None:
        self._shard.restore_states([], contents.rule)
        self._repartition()
        kept = [
            each if isinstance(each.value, Table) else each.copy(state=self._own_state(each, self._values[each.key]))
            for each in contents.entries
        ]
        self._shard.restore_states(kept, None)

    def _take_values(self, contents: Contents) -> None:
        keys, specs = [each.key for each in contents.entries], [each.spec for each in contents.entries]
        # First: without memory, nothing has changed.
        memory = self._allocate(specs)
        self._keeps_whole = _sees_whole(contents.rule or self._shard.rule)
        self._forget(list(self._values) if contents.kind == "store" else keys)
        partitioned = self._partition(keys, specs, memory)
        kept = []
        for each in contents.entries:
            mine = partitioned.get(each.key)
            if mine is None or not isinstance(each.value, torch.Tensor):
                kept.append(each)
                continue
            if self._host.local_rank == 0:
                mine.whole.copy_(each.value)
            mine.version, mine.state = each.version, self._own_state(each, mine)
            kept.append(mine)
        self._values.update(partitioned)
        checkpoint.put(self._shard, replace(contents, entries=kept))

    def _own_state(self, saved: Entry, value: PartitionedEntry) -> State:
        """Return what this worker keeps of a whole key's state, nothing if another host updates the key."""
        updates = self._chain.is_last or self._compressor.codec is not None
        return own_state(saved, value, self._chain.owner) if updates else {}

    def barrier(self) -> None:
        with self._entered("barrier"):
            pass

    def leave(self) -> None:
        self._pushes.leave()

    def agree(self, verb: str, what: Any) -> None:
        with self._entered(describe(verb, what=_comparable(what))):
            pass

    def gather(self, verb: str, mine: bytes) -> list[bytes]:
        with self._entered(verb):
            # torch.frombuffer rejects an empty buffer, so the message gets one more byte.
            found = self._group.all_gather(torch.frombuffer(bytearray(mine + b"."), dtype=torch.uint8))
            return [bytes(each.numpy())[:-1] for each in found]

    def close(self) -> None:
        if not self._is_closed:
            self._shard.refuse_reentry()
        with self._order.lock:
            if not self._is_closed:
                self._close()

    def _close(self) -> None:
        try:
            if self._host.error is None:
                with self._entered("close"):
                    pass
        except RankDeadError as error:
            log.warning("tensorkv: close: %s", error)
        finally:
            self._is_closed = True
            self._pushes.close()
            self._shard.close()
            self._values.clear()
            self._host.close()
            self._group.close()


def _verb(verb: str, kind: Kind) -> str:
    """Return the verb of the store that writes or reads a checkpoint of some kind."""
    return f"{verb}_optimizer_states" if kind == "optimizer-states" else verb


def _sees_whole(rule: Rule) -> bool:
    """Tell whether an update rule has to see whole values."""
    if isinstance(rule, StepOptimizer):
        return rule.optimizer.spec.name not in ROWWISE
    return isinstance(rule, CallUpdater)


def _comparable(data: Any) -> Any:
    """Return numbers in a form in which equal ones look alike: 1, 1.0 and numpy.float32(1)."""
    if isinstance(data, Mapping):
        return {word: _comparable(data[word]) for word in sorted(data)}
    if isinstance(data, list | tuple):
        return [_comparable(each) for each in data]
    number = plain_number(data)
    if isinstance(number, int | float) and not isinstance(number, bool) and number == float(number):
        # Adding 0.0 takes the sign of a zero away.
        return float(number) + 0.0
    return number


def _nbytes(spec: KeySpec) -> int:
    return spec.shape.numel() * spec.dtype.itemsize
