"""The dist engine: processes and hosts in step.

Every worker makes the same calls in the same order. A call is checked here, entered for comparison with the
others' (``meeting``), and its arrays go through the stage (``exchange``), over hosts too (``chain``). Each worker
has a Shard that holds the parts of the values which it updates, in memory that the workers of its host share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import RLock
from typing import Any

import torch

from .. import arrays, placement, reduce, rows
from ..columns import Column
from ..entry import Batch, Entry, KeyInfo, KeySpec, Part
from ..errors import RankLostError, TensorKVError, WorkerError, WorkerMismatchError
from ..keys import Key
from ..manifest import Contents, Kind
from ..optim import ROWWISE, OptimizerSpec
from ..rows import Rows
from ..rules import StepOptimizer, Updater
from ..shard import Shard
from ..table import Table
from . import archive, sparse
from .background import Background
from .chain import Chain
from .exchange import Exchange
from .group import Group, check_timeout, log
from .local import LocalEngine
from .meeting import LEFT, REFUSED, describe, fingerprint, meet
from .route import RING, SLOT_NBYTES, Arrays, Held, Route, Stage
from .segment import aligned

# Calls whose outs are larger together do not find them in the cache afterwards.
_PAST_CACHE_NBYTES = 4 << 20


def build(*, timeout_s: float = 60.0, shared_memory: bool = True) -> LocalEngine | DistEngine:
    """Return the engine of this worker; with one worker alone, the local engine.

    Args:
        timeout_s: how long another worker may take to come to the same call.
        shared_memory: let workers of one host meet in shared memory; without it they use Gloo.
    """
    group = Group(check_timeout(timeout_s), bool(shared_memory))
    return LocalEngine(False) if group.size == 1 else DistEngine(group)


class DistEngine:
    """Values in the shared memory of each host, updated by its workers in parts.

    Args:
        group: of all workers, more than one.
    """

    capabilities = frozenset({"optimizer", "updater", "rows", "checkpoint"})

    def __init__(self, group: Group) -> None:
        self._group = group
        self._meeting = meet(group)
        self._chain = Chain(group, self._meeting)
        self._shard = Shard(threads=1)
        self._held: dict[Key, Held] = {}
        self._loads = [0] * self._chain.owners
        self._routes: dict[tuple[Key, ...], Route] = {}
        self._stage: Stage | None = None
        self._pending: dict[Key, Exchange] = {}
        self._background = Background(self._meeting, in_order=len(group.hosts) > 1)
        self._lock = RLock()
        self._entered = False
        self.rank, self.num_workers = group.rank, group.size

    # ------------------------------------------------------------ calls that all workers make

    @contextmanager
    def _call(self, text: str) -> Iterator[int]:
        """Enter a call; what goes wrong inside it ends the store for every worker."""
        with self._lock:
            self._meeting.check()
            number = self._meeting.enter(fingerprint(text), text)
            self._entered = True
            try:
                yield number
            except (TensorKVError, MemoryError):
                raise
            except BaseException as error:
                how = f"{type(error).__name__}: {error}"
                self._meeting.stop(WorkerError(f"{text[:200]}: rank {self.rank} broke off: {how}"))
                raise

    def _together(self, number: int, text: str) -> None:
        """Return when every worker has entered this call; they must all take part."""
        self._drain()
        present = self._meeting.agree(number, text)
        if len(present) < self._meeting.size:
            gone = [rank for worker, rank in enumerate(self._meeting.ranks) if worker not in present]
            raise self._meeting.stop(
                WorkerMismatchError(f"{text}: rank {gone[0]} has left; until all have, others may push and pull only")
            )
        self._chain.agree(number, fingerprint(text), text)
        self._meeting.barrier(text)

    def refuse(self, verb: str, error: Exception) -> None:
        """Tell the others that this worker did not make its call, since what it was given does not fit."""
        if self._entered or self._meeting.error is not None:
            return
        with self._lock, suppress(TensorKVError):
            number = self._meeting.enter(REFUSED, f"{verb} refused: {error}")
            self._meeting.pass_over(number)

    def begin(self) -> None:
        """Forget whether this worker's last call was entered."""
        self._entered = False

    # ------------------------------------------------------------ init, push, pull

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        self._shard.check_new(keys)
        shapes = [[list(spec.shape), arrays.dtype_name(spec.dtype), spec.is_table] for spec in specs]
        text = describe("init", keys=list(keys), values=shapes)
        with self._call(text) as number:
            self._together(number, text)
            held = self._allot(keys, specs, text)
            for key, value in zip(keys, values, strict=True):
                if isinstance(value, torch.Tensor) and self.rank == 0:
                    held[key].value.copy_(value)
            self._chain.spread([each.value for each in held.values()], text)
            self._meeting.barrier(text)
            entries = []
            for key, value, spec in zip(keys, values, specs, strict=True):
                if isinstance(value, Rows):
                    entries.append(Entry(key, spec, sparse.first_table(self._group, value, text)))
                else:
                    entries.append(Entry(key, spec, held[key].part(self._part)))
            self._shard.add(entries)
            self._held.update(held)

    @property
    def _part(self) -> int:
        """The owner whose parts this worker updates; one that no owner has, if it updates none."""
        return self._meeting.me if self._meeting.me < self._chain.owners else self._chain.owners

    def _allot(self, keys: Sequence[Key], specs: Sequence[KeySpec], text: str) -> dict[Key, Held]:
        """Give dense keys memory and owners."""
        dense = [(key, spec) for key, spec in zip(keys, specs, strict=True) if not spec.is_table]
        sizes = [aligned(spec.shape.numel() * spec.dtype.itemsize) for _, spec in dense]
        if not dense:
            return {}
        memory, at = self._meeting.share(sum(sizes), 0, text), 0
        held = {}
        for (key, spec), size in zip(dense, sizes, strict=True):
            value = memory.tensor(at, spec.shape, spec.dtype)
            held[key] = Held(value, self._borders(value))
            at += size
        return held

    def _borders(self, value: torch.Tensor) -> list[int]:
        optimizer = self._shard.optimizer
        whole = self._shard.has_updater or (optimizer is not None and optimizer.name not in ROWWISE)
        lead = placement.lightest(self._loads) if value.numel() else 0
        borders = placement.borders(value.shape, self._chain.owners, lead, whole=whole)
        width = value.nbytes // borders[-1] if borders[-1] else 0
        for owner in range(self._chain.owners):
            self._loads[owner] += (borders[owner + 1] - borders[owner]) * width
        # One more part, which is empty, for workers that own nothing.
        return [*borders, borders[-1]]

    def push(self, batch: Batch, priority: int) -> None:
        self._push(batch, None, priority)

    def pushpull(self, batch: Batch, outs: Sequence[Sequence[torch.Tensor]], priority: int) -> None:
        self._push(batch, outs, priority)

    def _push(self, batch: Batch, outs: Sequence[Sequence[torch.Tensor]] | None, priority: int) -> None:
        self._shard.check(batch)
        kinds = [sparse.kind(parts) for parts in batch.parts]
        text = self._text("push" if outs is None else "pushpull", batch.keys, kinds)
        with self._call(text) as number:
            if any(kinds):
                problem = self._push_mixed(number, text, batch, kinds)
            else:
                problem = self._push_dense(number, text, batch.keys, batch.parts, outs, priority)
        # Not inside the call: an updater that raises does not end the store.
        if problem is not None:
            raise problem
        if outs is not None and any(kinds):
            self.pull(batch.keys, outs, priority)

    def many(self, keys: Sequence[Key], values: Any, outs: Any) -> list[int] | None:
        """Do a call that names the keys of an earlier one; None: it is to go the general way."""
        route = self._routes.get(tuple(keys)) if set(map(type, keys)) in ({str}, {int}) else None
        if route is None or route.form is None or self._shard.has_updater:
            return None
        form = route.form
        columns = [] if values is None else form.columns(values)
        targets = [] if outs is None else form.targets(outs)
        if columns is None or targets is None:
            return None
        with self._lock:
            entries = [self._shard.entry("push", key) for key in keys]
            if not columns:
                self._meeting.check()
                self._settle(keys)
                route.fill(targets)
            elif not self._push_columns(route, keys, entries, columns, targets):
                return None
        return form.moved(len(columns) + len(targets))

    def _push_columns(
        self,
        route: Route,
        keys: Sequence[Key],
        entries: Sequence[Entry],
        columns: Sequence[Column],
        targets: Sequence[Column],
    ) -> bool:
        try:
            for entry in entries:
                self._shard.rule.check(entry, by_rows=False)
        except TensorKVError:
            return False
        verb = "pushpull" if targets else "push"
        if verb not in route.texts:
            route.texts[verb] = self._text(verb, keys, [False])
        text = route.texts[verb]
        parts = Arrays.of_columns(columns)
        with self._call(text) as number:
            exchange = self._exchange(number, text, keys, entries, own_stage=not targets)
            who = self._who(number, text)
            if not targets:
                self._push_later(exchange, parts, who, keys, 0)
                return True
            self._drain()
            apart = exchange.count == 1 or self._are_apart(route, columns, targets)
            past = sum(route.form.nbytes) * len(targets) > _PAST_CACHE_NBYTES  # type: ignore[union-attr]
            exchange.run(parts, Arrays.of_columns(targets) if apart else None, who, past)
            if not apart:
                exchange.wait_for_values()
                route.fill(targets)
        return True

    def _are_apart(self, route: Route, columns: Sequence[Column], targets: Sequence[Column]) -> bool:
        parts, outs = ([each.addresses for each in group] for group in (columns, targets))
        return route.form is not None and route.form.are_apart(parts, outs)

    def _who(self, number: int, text: str) -> Callable[[], list[int]]:
        def who() -> list[int]:
            present = self._meeting.agree(number, text)
            self._chain.greet(number, fingerprint(text), text)
            return present

        return who

    def _push_mixed(self, number: int, text: str, batch: Batch, kinds: Sequence[bool]) -> Exception | None:
        self._drain()
        self._meeting.agree(number, text)
        for key, parts, is_rows in zip(batch.keys, batch.parts, kinds, strict=True):
            if is_rows:
                entry = self._shard.entry(batch.verb, key)
                total = rows.merge(parts, arrays.accumulator(entry.spec.dtype))  # type: ignore[arg-type]
                self._take_rows(entry, total, text)
        self._meeting.barrier(text)
        rest = [index for index, is_rows in enumerate(kinds) if not is_rows]
        if not rest:
            return None
        keys, groups = [batch.keys[i] for i in rest], [batch.parts[i] for i in rest]
        inner = self._text("push", keys, [False] * len(keys))
        return self._push_dense(self._meeting.enter(fingerprint(inner), inner), inner, keys, groups, None, 0)

    def _take_rows(self, entry: Entry, total: Rows | None, text: str) -> None:
        merged = sparse.gather(self._group, entry, total, text)
        if isinstance(entry.value, Table):
            self._shard.rule.apply_rows(entry, merged)
            return
        held = self._held[entry.key]
        owner = self._part if self._chain.is_last else self._chain.owners
        sparse.apply(self._shard.rule, entry, held, owner, merged)
        self._meeting.barrier(text)
        if len(self._group.hosts) > 1:
            writes = self._meeting.me == 0 and not self._chain.is_last
            sparse.copy_rows(self._group, held, merged.ids, self._group.hosts[-1][0], writes, text)
            self._meeting.barrier(text)

    def _push_dense(
        self,
        number: int,
        text: str,
        keys: Sequence[Key],
        groups: Sequence[Sequence[Part]],
        outs: Sequence[Sequence[torch.Tensor]] | None,
        priority: int,
    ) -> Exception | None:
        entries = [self._shard.entry("push", key) for key in keys]
        held = [self._held[key] for key in keys]
        dtypes = [each.value.dtype for each in held]
        parts = Arrays.of([sparse.dense(entry, group) for entry, group in zip(entries, groups, strict=True)], dtypes)
        later = outs is None and not self._shard.has_updater
        exchange = self._exchange(number, text, keys, entries, own_stage=later)

        who = self._who(number, text)
        if later:
            self._push_later(exchange, parts, who, keys, priority)
            return None
        self._drain()
        ready = None if outs is None else Arrays.of(outs, dtypes)
        direct = ready is not None and ready.bases is not None
        if direct and exchange.count > 1:
            direct = reduce.are_apart(parts.groups, outs)  # type: ignore[arg-type]
        past = outs is not None and sum([out.nbytes for group in outs for out in group]) > _PAST_CACHE_NBYTES
        exchange.run(parts, ready if direct else None, who, past)
        problem = self._report(exchange, entries, text)
        if outs is not None and not direct and problem is None:
            exchange.wait_for_values()
            self._copy(keys, outs)
        return problem

    def _push_later(
        self, exchange: Exchange, parts: Arrays, who: Callable[[], list[int]], keys: Sequence[Key], priority: int
    ) -> None:
        # Pushes of one key are applied in the order in which they were made.
        for earlier in {id(each): each for key in keys if (each := self._pending.get(key))}.values():
            if earlier.route is not exchange.route:
                self._background.wait_for(earlier)
        for chunk in range(exchange.count):
            exchange.lay_out(chunk, parts)
        for key in keys:
            self._pending[key] = exchange
        self._background.add(exchange, who, priority)

    def _exchange(
        self, number: int, text: str, keys: Sequence[Key], entries: Sequence[Entry], *, own_stage: bool
    ) -> Exchange:
        route = self._route(tuple(keys))
        if own_stage:
            if route.own_stage is None:
                slots = max(1, len(route.chunks))
                route.own_stage = Stage(self._meeting, slots, route.slot_nbytes, text)
            else:
                # Its slots are filled again only when what was laid out before has been taken.
                self._background.wait_for(route.own_stage)
            stage = route.own_stage
        else:
            if self._stage is None:
                self._stage = Stage(self._meeting, RING, SLOT_NBYTES, text)
            stage = self._stage
        return Exchange(self._meeting, self._chain, route, stage, number, text, entries, self._shard.rule)

    def _route(self, keys: tuple[Key, ...]) -> Route:
        route = self._routes.get(keys)
        if route is None:
            route = Route([self._held[key] for key in keys], self._meeting, self._chain.owners)
            self._routes[keys] = route
        return route

    def _report(self, exchange: Exchange, entries: Sequence[Entry], text: str) -> Exception | None:
        """Return on every worker what an updater has raised on one."""
        if not self._shard.has_updater:
            return None
        mine = [[key, type(error).__name__, str(error)[:1000]] for key, error in exchange.failed]
        said = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        found = self._group.gather(said, text)
        failed = [(rank, *each) for rank, own in enumerate(found) for each in json.loads(bytes(own.numpy()))]
        for rank, key, _, _ in failed:
            if rank != self.rank:
                entries[key].version -= 1
        if exchange.failed:
            return exchange.failed[0][1]
        if failed:
            rank, key, kind, message = failed[0]
            return sparse.raised_elsewhere(rank, entries[key].key, kind, message)
        return None

    def pull(self, keys: Sequence[Key], outs: Sequence[Sequence[torch.Tensor]], priority: int) -> None:
        with self._lock:
            self._meeting.check()
            for key in keys:
                self._shard.entry("pull", key)
            self._settle(keys)
            self._copy(keys, outs)

    def _copy(self, keys: Sequence[Key], outs: Sequence[Sequence[torch.Tensor]]) -> None:
        pairs = [(out, self._held[key].value) for key, group in zip(keys, outs, strict=True) for out in group]
        with torch.no_grad():
            for job in reduce.copies(pairs, 1):
                job()

    def _settle(self, keys: Sequence[Key]) -> None:
        """Wait for this worker's earlier pushes of some keys."""
        for exchange in {id(each): each for key in keys if (each := self._pending.pop(key, None))}.values():
            self._background.wait_for(exchange)
            exchange.wait_for_values()

    def _drain(self) -> None:
        """Wait for all of this worker's earlier pushes."""
        self._settle(list(self._pending))

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        with self._lock:
            self._meeting.check()
            self._settle(keys)
            found = []
            for key, own in zip(keys, ids, strict=True):
                entry = self._shard.entry("row_sparse_pull", key)
                whole = entry.value if isinstance(entry.value, Table) else self._held[key].value
                found.append(Rows(own, Entry(key, entry.spec, whole).read_rows(own), entry.spec.shape[0]))
            return found

    def leave(self) -> None:
        """Push no more until every worker has left; serve the others meanwhile."""
        with self._lock:
            self._drain()
            if len(self._group.hosts) > 1:
                raise WorkerError("leave: not yet over several hosts; give every worker as many batches")
            while True:
                number = self._meeting.enter(LEFT, "leave")
                self._entered = True
                present = self._meeting.agree(number, "leave")
                if not present:
                    return
                self._serve(number, self._meeting.text(present[0], number), present)

    def _serve(self, number: int, text: str, present: list[int]) -> None:
        verb, _, rest = text.partition(" ")
        if verb not in ("push", "pushpull"):
            raise self._meeting.stop(
                WorkerMismatchError(f"rank {self.rank} has left; the others may push and pull only, not {text[:200]}")
            )
        try:
            called = json.loads(rest)
        except ValueError:
            raise self._meeting.stop(WorkerError("leave: the others push too many keys in one call")) from None
        keys, kinds = called["keys"], called.get("rows") or [False] * len(called["keys"])
        if any(kinds):
            self._drain()
            for key, is_rows in zip(keys, kinds, strict=True):
                if is_rows:
                    self._take_rows(self._shard.entry("push", key), None, text)
            self._meeting.barrier(text)
            return
        entries = [self._shard.entry("push", key) for key in keys]
        later = verb == "push" and not self._shard.has_updater
        exchange = self._exchange(number, text, keys, entries, own_stage=later)
        exchange.run(None, None, lambda: present, False)
        self._report(exchange, entries, text)

    def _text(self, verb: str, keys: Sequence[Key], kinds: Sequence[bool]) -> str:
        return describe(verb, keys=list(keys), rows=list(kinds)) if any(kinds) else describe(verb, keys=list(keys))

    def delete(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._shard.entry("delete", key)
        text = describe("delete", keys=list(keys))
        with self._call(text) as number:
            self._together(number, text)
            self._shard.delete(keys)
            self._forget(keys)

    def _forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._held.pop(key, None)
        self._drop_routes(lambda called: not set(keys).isdisjoint(called))

    def _drop_routes(self, is_gone: Callable[[tuple[Key, ...]], bool]) -> None:
        for called in [each for each in self._routes if is_gone(each)]:
            stage = self._routes.pop(called).own_stage
            if stage is not None:
                self._meeting.forget(stage.segment)

    # ------------------------------------------------------------ the update rule

    def set_updater(self, updater: Updater | None) -> None:
        text = describe("set_updater", to="none" if updater is None else getattr(updater, "__name__", "a function"))
        self._change_rule(text, lambda: self._shard.set_updater(updater))

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        StepOptimizer(spec)  # raises before others are told
        text = describe("set_optimizer", **spec.to_json())
        self._change_rule(text, lambda: self._shard.set_optimizer(spec))

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        self._shard.check_hyperparameters(numbers, keys)
        text = describe("set_hyperparameters", numbers=numbers, keys=None if keys is None else list(keys))
        with self._call(text) as number:
            self._together(number, text)
            self._shard.set_hyperparameters(numbers, keys)

    def _change_rule(self, text: str, change: Callable[[], None]) -> None:
        with self._call(text) as number:
            self._together(number, text)
            change()
            self._divide_anew(text)

    def _divide_anew(self, text: str) -> None:
        """Give values the owners that the present rule asks for."""
        self._loads = [0] * self._chain.owners
        changed = False
        for key, held in self._held.items():
            borders = self._borders(held.value)
            changed = changed or borders != held.borders
            held.borders = borders
            self._shard.entry("set_optimizer", key).value = held.part(self._part)
        if changed:
            self._drop_routes(lambda _: True)
        self._meeting.barrier(text)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        return self._shard.optimizer

    # ------------------------------------------------------------ looking

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._shard.entry(verb, key).spec

    def info(self, key: Key) -> KeyInfo:
        with self._lock:
            self._settle([key])
            entry = self._shard.entry("info", key)
            whole = entry.value if isinstance(entry.value, Table) else self._held[key].value
            return Entry(key, entry.spec, whole, entry.version).info()

    def keys(self) -> list[Key]:
        return self._shard.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._shard

    def stats(self) -> Mapping[str, Any]:
        return {"dist": {"hosts": len(self._group.hosts), "sent_nbytes": self._chain.sent_nbytes}}

    # ------------------------------------------------------------ checkpoints, the end

    def save(self, path: str, kind: Kind) -> None:
        text = describe("save", path=path, kind=kind)
        with self._call(text) as number:
            self._together(number, text)
            archive.save(self._group, self._meeting, self._chain, self._shard, self._held, path, kind)

    def load(self, path: str, kind: Kind) -> None:
        text = describe("load", path=path, kind=kind)
        with self._call(text) as number:
            self._together(number, text)
            contents = archive.read(self._group, self._shard, path, kind)
            if kind == "optimizer-states":
                self._take_states(contents, text)
            else:
                self._become(contents, text)
            self._meeting.barrier(text)

    def _take_states(self, contents: Contents, text: str) -> None:
        self._shard.restore_states([], contents.rule)
        self._divide_anew(text)
        kept = [
            each
            if archive.is_table(each)
            else replace(each, state=archive.own_state(each, self._held[each.key], self._part))
            for each in contents.entries
        ]
        self._shard.restore_states(kept, None)

    def _become(self, contents: Contents, text: str) -> None:
        self._shard.restore([], contents.rule)
        self._forget(list(self._held))
        self._loads = [0] * self._chain.owners
        held = self._allot([each.key for each in contents.entries], [each.spec for each in contents.entries], text)
        kept = []
        for each in contents.entries:
            mine = held.get(each.key)
            if mine is None or not isinstance(each.value, torch.Tensor):
                kept.append(each)
                continue
            if self._meeting.me == 0:
                mine.value.copy_(each.value)
            kept.append(replace(each, value=mine.part(self._part), state=archive.own_state(each, mine, self._part)))
        self._held.update(held)
        self._shard.restore(kept, None)

    def barrier(self) -> None:
        with self._call("barrier") as number:
            self._together(number, "barrier")

    def close(self) -> None:
        try:
            if self._meeting.error is None:
                with self._call("close") as number:
                    self._together(number, "close")
        except RankLostError as error:
            log.warning("tensorkv: close: %s", error)
        finally:
            self._background.close()
            self._shard.close()
            self._held.clear()
            self._routes.clear()
            self._stage = None
            self._meeting.close()
            self._group.close()
