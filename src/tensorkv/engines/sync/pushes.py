"""Pushes and pulls of a dist store, from the checked batch to the exchange.

A push without an updater lays its parts out in a stage of its own and leaves the rest to the background. A pushpull,
and everything else that has to see its end, goes through a small stage that all calls share and stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.rows import Rows
from tensorkv.errors import TensorKVError
from tensorkv.shard import reduce
from tensorkv.shard.entry import Batch, Entry, Part
from tensorkv.shard.plan import Column
from tensorkv.shard.rules import check_outs
from tensorkv.shard.shard import Shard
from tensorkv.shard.table import Table

from . import sparse
from .allreduce import AllReduce
from .background import PushQueue
from .chain import HEAD_TEXT, Chain, Presence
from .group import ProcessGroup
from .host import ENTRIES, HostGroup, describe, fingerprint
from .nonfinite import Guard
from .order import CollectiveOrder
from .schedule import (
    RING,
    SLOT_NBYTES,
    SLOT_NBYTES_OVER_HOSTS,
    SMALL_NBYTES,
    Arrays,
    PartitionedValue,
    Schedule,
    StagingBuffer,
)

# Calls whose outs are larger together do not find them in the cache afterwards.
_PAST_CACHE_NBYTES = 4 << 20
# So many lists of keys are remembered, and as many as together name each key so often.
_REMEMBERED_ROUTES, _REMEMBERED_NAMES = 256, 4
# What these stages may take together: so many times the values, and at least so many bytes.
_MOST_STAGES, _LEAST_STAGES_NBYTES = 4, 64 << 20

Outs = Sequence[Sequence[torch.Tensor]]


class Pushes:
    """What one worker has pushed, and how it goes on its way.

    Args:
        group: of all workers.
        host: of this worker's host.
        chain: to other hosts.
        order: of this worker's collective calls.
        shard: what it updates.
        held: whole values, by key.
        guard: against NaN and Inf; None: they pass.
    """

    def __init__(
        self,
        group: ProcessGroup,
        host: HostGroup,
        chain: Chain,
        order: CollectiveOrder,
        shard: Shard,
        held: Mapping[Key, PartitionedValue],
        guard: Guard | None,
    ) -> None:
        self._group, self._host, self._chain, self._order = group, host, chain, order
        self._shard, self._held, self._guard = shard, held, guard
        self._routes: dict[tuple[Key, ...], Schedule] = {}
        # How many keys the routes name together.
        self._named = 0
        # What all pushpulls share, and all small pushes.
        self._stage: StagingBuffer | None = None
        self._small: StagingBuffer | None = None
        self._slot_nbytes = SLOT_NBYTES if len(group.hosts) == 1 else SLOT_NBYTES_OVER_HOSTS
        self._pending: dict[Key, AllReduce] = {}
        # Texts of calls by their marks, where an entry or a head may have no room for the whole.
        self._texts: dict[bytes, str] = {}
        self._queue = PushQueue(host, chain)

    # ------------------------------------------------------------ push

    def push(self, batch: Batch, outs: Outs | None, priority: int) -> None:
        """Push a batch; with outs, pull its keys."""
        self._shard.check(batch)
        kinds = [sparse.kind(parts) for parts in batch.parts]
        text = _text("push" if outs is None else "pushpull", batch.keys, kinds)
        with self._order.entered(text) as number:
            if any(kinds):
                problem, filled = self._push_mixed(number, text, batch, kinds), False
            else:
                problem, filled = self._push_dense(number, text, batch.keys, batch.parts, outs, priority)
        # Not inside the call: an updater that raises does not end the store.
        if problem is not None:
            raise problem
        if outs is not None and not filled:
            self.pull(batch.keys, outs)

    def _push_dense(
        self,
        number: int,
        text: str,
        keys: Sequence[Key],
        groups: Sequence[Sequence[Part]],
        outs: Outs | None,
        priority: int,
    ) -> tuple[Exception | None, bool]:
        """Push dense parts; return what went wrong without ending the store, and whether outs were filled."""
        entries = [self._shard.entry("push", key) for key in keys]
        dtypes = [self._held[key].value.dtype for key in keys]
        parts = Arrays.of([sparse.dense(entry, group) for entry, group in zip(entries, groups, strict=True)], dtypes)
        later = outs is None and self._may_be_later
        exchange = self._exchange(number, text, keys, entries, own_stage=later)
        if later:
            self._push_later(exchange, parts, keys, priority)
            return None, False
        self.drain()
        exchange.run(parts, self._order.who(number, text))
        exchange.wait_for_values()
        problem = self._problem(exchange, entries, text)
        plain = None if outs is None or problem is not None else Arrays.of(outs, dtypes)
        if outs is None or plain is None or plain.bases is None:
            return problem, False
        exchange.copy_out(plain, sum([out.nbytes for group in outs for out in group]) > _PAST_CACHE_NBYTES)
        return None, True

    @property
    def _may_be_later(self) -> bool:
        """Whether nothing can go wrong with a push that its caller would have to hear of."""
        return not self._shard.has_updater and self._guard is None

    def _push_later(self, exchange: AllReduce, parts: Arrays, keys: Sequence[Key], priority: int) -> None:
        # Pushes of one key are applied in the order in which they were made.
        for earlier in {id(each): each for key in keys if (each := self._pending.get(key))}.values():
            self._queue.wait_for(earlier)
        for chunk in range(exchange.count):
            exchange.pack(chunk, parts)
        for key in keys:
            self._pending[key] = exchange
        self._queue.add(exchange, priority)

    def _push_mixed(self, number: int, text: str, batch: Batch, kinds: Sequence[bool]) -> Exception | None:
        """Push keys of which some came as Rows alone."""
        self.drain()
        self._remember(text)
        self._order.who(number, text)()
        self._order.all_agree(text)
        pairs = list(zip(batch.keys, batch.parts, kinds, strict=True))
        rest = [(key, parts) for key, parts, is_rows in pairs if not is_rows]

        def push_rest() -> Exception | None:
            inner = _text("push", [key for key, _ in rest], [])
            number = self._host.enter(fingerprint(inner), inner)
            keys, groups = [key for key, _ in rest], [parts for _, parts in rest]
            problem, _ = self._push_dense(number, inner, keys, groups, None, 0)
            # One thread at a time may step an optimizer, and this one goes on with the Rows.
            self._queue.wait_for(None)
            return problem

        rows: dict[Key, Any] = {key: parts for key, parts, is_rows in pairs if is_rows}
        return self._push_rows(text, batch.verb, rows, push_rest if rest else None)

    def _push_rows(
        self, text: str, verb: str, parts: Mapping[Key, Sequence[Rows]], rest: Callable[[], Exception | None] | None
    ) -> Exception | None:
        """Push Rows, every worker doing the same with what all have given; before them, the rest of the call."""
        entries = {key: self._shard.entry(verb, key) for key in parts}
        merged = {key: sparse.gather(self._group, entries[key], own, text) for key, own in parts.items()}
        self._host.barrier(text)
        problem = None if self._guard is None else self._guard.sift(verb, merged)
        if rest is not None and problem is None:
            problem = rest()
        if problem is not None:
            return problem
        failed: list[tuple[int, Exception]] = []
        taken = [entries[key] for key in merged]
        for index, (entry, total) in enumerate(zip(taken, merged.values(), strict=True)):
            try:
                self._take_rows(entry, total)
            except Exception as error:
                failed.append((index, error))
        self._host.barrier(text)
        self._spread_rows(merged, text)
        return self._raised(failed, taken, text)

    def _take_rows(self, entry: Entry, merged: Rows) -> None:
        if isinstance(entry.value, Table):
            self._shard.rule.apply_rows(entry, merged)
            return
        updates = self._chain.is_last and self._host.local_rank < self._chain.owners
        owner = self._host.local_rank if updates else self._chain.owners
        sparse.apply(self._shard.rule, entry, self._held[entry.key], owner, merged)

    def _spread_rows(self, merged: Mapping[Key, Rows], text: str) -> None:
        """Copy the rows that the last host has updated to the others."""
        if len(self._group.hosts) > 1:
            writes = self._host.local_rank == 0 and not self._chain.is_last
            for key, rows in merged.items():
                if key in self._held:
                    source = self._group.hosts[-1][0]
                    sparse.copy_rows(self._group, self._held[key], rows.ids, source, writes, text)
            self._host.barrier(text)

    def _problem(self, exchange: AllReduce, entries: Sequence[Entry], text: str) -> Exception | None:
        """Return, on every worker, what an updater has raised on one, or that a sum was refused."""
        if self._guard is not None and exchange.refusal is not None:
            return exchange.refusal
        return self._raised(exchange.failed, entries, text)

    def _raised(
        self, mine_failed: Sequence[tuple[int, Exception]], entries: Sequence[Entry], text: str
    ) -> Exception | None:
        """Return, on every worker, what an updater has raised on one; its key counts no update."""
        if not self._shard.has_updater:
            for _, problem in mine_failed:
                raise problem
            return None
        mine = [[key, type(error).__name__, str(error)[:1000]] for key, error in mine_failed]
        found = self._group.all_gather_json(mine, text)
        failed = [(rank, *each) for rank, own in enumerate(found) for each in own]
        own = {key for key, _ in mine_failed}
        for key in {key for _, key, _, _ in failed} - own:
            entries[key].version -= 1
        if mine_failed:
            return mine_failed[0][1]
        if failed:
            rank, key, kind, message = failed[0]
            return sparse.raised_elsewhere(rank, entries[key].key, kind, message)
        return None

    # ------------------------------------------------------------ the short way

    def many(self, keys: Sequence[Key], values: Any, outs: Any, priority: int) -> list[int] | None:
        """Do a call that names the keys of an earlier one; None: it is to go the general way."""
        route = self._routes.get(tuple(keys)) if set(map(type, keys)) in ({str}, {int}) else None
        if route is None or route.form is None or not self._may_be_later:
            return None
        form = route.form
        columns = [] if values is None else form.columns(values)
        targets = [] if outs is None else form.targets(outs)
        if columns is None or targets is None:
            return None
        with self._order.lock:
            self._order.check()
            entries = [self._shard.entry("push", key) for key in keys]
            if not columns:
                self.settle(keys)
                route.fill(targets)
            elif not self._push_columns(route, keys, entries, columns, targets, priority):
                return None
        return form.moved(len(columns) + len(targets))

    def _push_columns(
        self,
        route: Schedule,
        keys: Sequence[Key],
        entries: Sequence[Entry],
        columns: Sequence[Column],
        targets: Sequence[Column],
        priority: int,
    ) -> bool:
        try:
            for entry in entries:
                self._shard.rule.check(entry, by_rows=False)
        except TensorKVError:
            return False
        verb = "pushpull" if targets else "push"
        if verb not in route.texts:
            route.texts[verb] = _text(verb, keys, [])
        text, parts = route.texts[verb], Arrays.of_columns(columns)
        with self._order.entered(text) as number:
            exchange = self._exchange(number, text, keys, entries, own_stage=not targets)
            if not targets:
                self._push_later(exchange, parts, keys, priority)
                return True
            self.drain()
            exchange.run(parts, self._order.who(number, text))
            exchange.wait_for_values()
            past = sum(route.form.nbytes) * len(targets) > _PAST_CACHE_NBYTES  # type: ignore[union-attr]
            exchange.copy_out(Arrays.of_columns(targets), past)
        return True

    # ------------------------------------------------------------ pull

    def pull(self, keys: Sequence[Key], outs: Outs) -> None:
        """Copy values out, after this worker's earlier pushes of these keys."""
        with self._order.lock:
            self._order.check()
            check_outs([self._shard.entry("pull", key) for key in keys], outs)
            self.settle(keys)
            pairs = [(out, self._held[key].value) for key, group in zip(keys, outs, strict=True) for out in group]
            with torch.no_grad():
                for job in reduce.copies(pairs, 1):
                    job()

    def settle(self, keys: Sequence[Key]) -> None:
        """Wait for this worker's earlier pushes of some keys."""
        for exchange in {id(each): each for key in keys if (each := self._pending.get(key))}.values():
            self._queue.wait_for(exchange)
            exchange.wait_for_values()
        # Only now: whoever is interrupted while waiting asks again.
        for key in keys:
            self._pending.pop(key, None)

    def drain(self) -> None:
        """Wait for all of this worker's earlier pushes."""
        self._queue.wait_for(None)
        self.settle(list(self._pending))

    # ------------------------------------------------------------ what the others push

    def serve(self, number: int, text: str, verb: str, keys: Sequence[Key], presence: Presence) -> Exception | None:
        """Take part in a dense push without parts of this worker's."""
        entries = [self._shard.entry(verb, key) for key in keys]
        later = verb == "push" and self._may_be_later
        exchange = self._exchange(number, text, keys, entries, own_stage=later)
        exchange.run(None, lambda: presence)
        if later:
            # Nothing beyond, since this worker takes calls in their order.
            self._chain.report(-1, text)
        return self._problem(exchange, entries, text)

    def serve_rows(
        self, text: str, verb: str, keys: Sequence[Key], kinds: Sequence[bool], rest: Callable[[], Exception | None]
    ) -> Exception | None:
        """Take part in a push of Rows without parts of this worker's; ``rest`` does what is dense in it."""
        self._order.all_agree(text)
        chosen = [key for key, is_rows in zip(keys, kinds, strict=True) if is_rows]
        parts = {key: [sparse.nothing(self._shard.entry(verb, key))] for key in chosen}
        return self._push_rows(text, verb, parts, rest if len(chosen) < len(keys) else None)

    def text_of(self, mark: bytes, text: str) -> str:
        """Return the whole text of a call that this worker has made as well, else what there was room for."""
        return self._texts.get(mark, text)

    # ------------------------------------------------------------ routes

    def _exchange(
        self, number: int, text: str, keys: Sequence[Key], entries: Sequence[Entry], *, own_stage: bool
    ) -> AllReduce:
        route = self._route(tuple(keys))
        self._remember(text)
        first = 0
        if own_stage and route.is_small:
            if self._small is None:
                self._agree_first(number, text)
                self._small = StagingBuffer(self._host, ENTRIES, SMALL_NBYTES, text)
            stage, first = self._small, self._small.turn
            stage.turn = (first + 1) % stage.slots
            if stage.users[first] is not None:
                self._queue.wait_for(stage.users[first])
        elif own_stage:
            if route.own_stage is None:
                self._make_room(route)
                self._agree_first(number, text)
                route.own_stage = StagingBuffer(self._host, max(1, len(route.chunks)), route.slot_nbytes, text)
            else:
                # Its slots are filled again only when what was laid out before has been taken.
                self._queue.wait_for(route.own_stage)
            stage = route.own_stage
        else:
            if self._stage is None:
                self._agree_first(number, text)
                self._stage = StagingBuffer(self._host, RING, self._slot_nbytes, text)
            stage = self._stage
        rule = self._shard.rule
        exchange = AllReduce(self._host, self._chain, route, stage, number, text, entries, rule, self._guard, first)
        if stage is self._small:
            stage.users[first] = exchange
        return exchange

    def _remember(self, text: str) -> None:
        if len(text) > HEAD_TEXT:
            self._texts[fingerprint(text)] = text

    def _agree_first(self, number: int, text: str) -> None:
        # Memory is shared by workers that make the same call, and calls are compared in order.
        self._queue.wait_for(None)
        self._host.agree_early(number, text)

    def _route(self, keys: tuple[Key, ...]) -> Schedule:
        route = self._routes.pop(keys, None)
        if route is not None:
            self._routes[keys] = route
            return route
        # Every worker makes the same calls, and so forgets the same route.
        while len(self._routes) >= _REMEMBERED_ROUTES and self._named > _REMEMBERED_NAMES * len(self._held):
            oldest = next(iter(self._routes))
            self.settle(oldest)
            self._drop(oldest)
        route = Schedule([self._held[key] for key in keys], self._host, self._chain.owners, self._slot_nbytes)
        self._routes[keys] = route
        self._named += len(keys)
        return route

    def _make_room(self, route: Schedule) -> None:
        """Drop the routes that were used least lately until there is room for another one's stage."""
        values = sum(
            each.value.numel() * interop.accumulator(each.value.dtype).itemsize for each in self._held.values()
        )
        most = max(_LEAST_STAGES_NBYTES, _MOST_STAGES * values)
        staged = {keys: each.stage_nbytes for keys, each in self._routes.items() if each.own_stage is not None}
        room = most - route.stage_nbytes - sum(staged.values())
        for keys, nbytes in staged.items():
            if room >= 0:
                break
            self.settle(keys)
            self._drop(keys)
            room += nbytes

    def forget(self, keys: Sequence[Key] | None = None) -> None:
        """Drop the routes of some keys, or all, when nothing is on its way any more."""
        if self._small is not None:
            # What has used a slot refers to values.
            self._small.users = [None] * self._small.slots
        gone = None if keys is None else set(keys)
        for called in [each for each in self._routes if gone is None or not gone.isdisjoint(each)]:
            self._drop(called)

    def _drop(self, called: tuple[Key, ...]) -> None:
        if len(self._texts) > 4 * _REMEMBERED_ROUTES:
            self._texts.clear()
        self._named -= len(called)
        stage = self._routes.pop(called).own_stage
        if stage is not None:
            self._host.forget(stage.segment)

    def close(self) -> None:
        """End the background thread and let go of the memory."""
        self._queue.close()
        self._routes.clear()
        self._pending.clear()
        self._stage = self._small = None


def _text(verb: str, keys: Sequence[Key], kinds: Sequence[bool]) -> str:
    return describe(verb, keys=list(keys), rows=list(kinds)) if any(kinds) else describe(verb, keys=list(keys))
