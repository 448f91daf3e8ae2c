"""The inits, pushes and pulls of a client: values are cut by server, and put together again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, pack, unpack
from tensorkv.arrays.rows import Rows
from tensorkv.errors import KeyNotFoundError, ValueMismatchError, quote
from tensorkv.shard import reduce
from tensorkv.shard.entry import Batch, Entry, Part
from tensorkv.shard.nonfinite import NonFinitePolicy
from tensorkv.shard.optimizers import ROWWISE
from tensorkv.shard.plan import Column
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import check_push

from ..messages import Init, Pull, PullRows, Push
from .keymap import KeyMap
from .layout import KeyPlacement, Layout, ServerLayout, describe, list_name
from .rpc import ServerReply
from .session import Fill, ServerRequest, Session, SessionPool

Outs = Sequence[Sequence[torch.Tensor]]
# Pulls of more bytes are read from a copy that all readers of a host share.
_CACHED_NBYTES = 64 << 10


class DataClient:
    """What one client pushes and pulls.

    Args:
        sessions: with the servers.
        keymap: of the store.
        same_host: of each server, whether it may be on this host.
        is_sync: whether the sums of several workers are added before they are rounded, in rounds.
        finite: checks sums before they are sent, so that no server refuses what another has applied.
    """

    def __init__(
        self,
        sessions: SessionPool,
        keymap: KeyMap,
        same_host: Sequence[bool],
        *,
        is_sync: bool,
        finite: NonFinitePolicy,
    ) -> None:
        self._sessions, self._keymap, self._same_host, self._is_sync = sessions, keymap, list(same_host), is_sync
        self._finite = finite
        self._pool = Pool()
        self._rounds = RoundNumbers()

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    # ------------------------------------------------------------ init

    def init(self, keys: Sequence[Key], values: Sequence[Part], placements: Sequence[KeyPlacement]) -> None:
        """Create keys with values, of which each server gets its pieces."""
        requests = []
        if any(isinstance(value, Rows) for value in values):
            totals = [rows.merge([value]) if isinstance(value, Rows) else value for value in values]
            for server in sorted({server for each in placements for server in each.servers}):
                mine = [index for index, each in enumerate(placements) if server in each.servers]
                items = [item for i in mine for item in _items(keys[i], placements[i], totals[i], server)]
                message = _init_of(mine, keys, placements)
                requests.append(ServerRequest.of_tensors(server, message, pack(items)))
        else:
            layout, parts = Layout(keys, placements, wide=False), [[value] for value in values]
            columns = None if layout.form is None else layout.form.columns(parts)
            for each in layout.pushed:
                message = _init_of([piece.key for piece in each.pieces], keys, placements)
                fill = self._fill(layout, each, columns, parts)
                requests.append(ServerRequest(each.server, message, each.layout, each.nbytes, fill))
        with self._sessions.take() as session:
            session.send(requests)

    # ------------------------------------------------------------ push

    def push(self, batch: Batch, outs: Outs | None) -> None:
        """Push a batch; with outs, pull its keys."""
        entries = [self._keymap.entry(batch.verb, key) for key in batch.keys]
        check_push(batch, entries, self._keymap.rule)
        if self._finite.checks:
            kept, sums = self._finite.finite_sums(batch, entries, self._sum_of)
            if len(kept) < len(entries):
                self._push_checked(Batch(batch.verb, [entry.key for entry in kept], sums), None)
                self.pull(batch.keys, outs or ())
                return
            batch = Batch(batch.verb, batch.keys, sums)
        self._push_checked(batch, outs)

    def _sum_of(self, entry: Entry, parts: Sequence[Any]) -> Part:
        return self._sum(self._keymap.find("push", entry.key), parts)

    def _push_checked(self, batch: Batch, outs: Outs | None) -> None:
        layout = self._keymap.layout(batch.verb, batch.keys)
        if any(isinstance(part, Rows) for parts in batch.parts for part in parts):
            self._push_rows(batch)
            if outs is not None:
                self.pull(batch.keys, outs)
            return
        parts: Any = batch.parts
        columns = None if layout.form is None else layout.form.columns(parts)
        targets = None if layout.form is None or outs is None else layout.form.targets(outs)
        self._exchange(layout, columns, parts, outs, targets)

    def many(self, keys: Sequence[Key], values: Any, outs: Any) -> list[int] | None:
        """Push raw values and fill raw outs of many keys, if all are plain; None: nothing was done."""
        # True and 1.0 would be found as 1.
        if set(map(type, keys)) not in ({str}, {int}) or (self._finite.checks and values is not None):
            return None
        layout = self._keymap.cached_layout(keys)
        if layout is None:
            if not all(key in self._keymap for key in keys) or len(set(keys)) < len(keys):
                return None
            layout = self._keymap.layout("push", keys)
        form, spec = layout.form, self._keymap.optimizer
        if form is None or layout.has_tables or (spec is not None and spec.name not in ROWWISE):
            return None
        columns = [] if values is None else form.columns(values)
        targets = [] if outs is None else form.targets(outs)
        if columns is None or targets is None:
            return None
        if values is None:
            self._pull_current(layout, keys, outs, targets)
        else:
            self._exchange(layout, columns, (), None if outs is None else (), targets)
        return form.moved(len(columns) + len(targets))

    def _exchange(
        self,
        layout: Layout,
        columns: list[Column] | None,
        parts: Sequence[Any],
        outs: Outs | None,
        targets: list[Column] | None,
    ) -> None:
        """Push dense sums, and fill the outs with the new values."""
        pulls = outs is not None
        requests = []
        for pushed, pulled in zip(layout.pushed, layout.pulled, strict=True):
            fill = self._fill(layout, pushed, columns, parts)
            message = Push(pulls=True, checksum=pulled.checksum) if pulls else Push()
            reply_nbytes = pulled.nbytes if pulls else 0
            requests.append(ServerRequest(pushed.server, message, pushed.layout, pushed.nbytes, fill, reply_nbytes))
        with self._sessions.take() as session:
            replies = self._send_push(session, layout.name if self._is_sync else "", requests)
            for pulled, reply in zip(layout.pulled, replies, strict=True):
                if outs is not None:
                    self._scatter(layout, pulled, reply.payload, outs, targets)

    def _fill(self, layout: Layout, pushed: ServerLayout, columns: list[Column] | None, parts: Sequence[Any]) -> Fill:
        """Return what writes the sums of a server's pieces to the memory of a request."""
        if columns is None or layout.form is None:
            return partial(pushed.gather, parts)
        addresses = [column.addresses for column in columns]
        return partial(pushed.gather_columns, layout.form.dtype, addresses, pool=self._pool)

    def _scatter(
        self, layout: Layout, pulled: ServerLayout, values: torch.Tensor, outs: Outs, targets: list[Column] | None
    ) -> None:
        if targets and layout.form is not None:
            addresses = [target.addresses for target in targets]
            pulled.scatter_columns(layout.form.dtype, values, addresses, self._pool)
        else:
            pulled.scatter(values, outs)

    def _push_rows(self, batch: Batch) -> None:
        placements = [self._keymap.find(batch.verb, key) for key in batch.keys]
        sums = [self._sum(each, parts) for each, parts in zip(placements, batch.parts, strict=True)]
        requests = []
        for server in sorted({server for each in placements for server in each.servers}):
            items: list[Item] = []
            for key, placement, total in zip(batch.keys, placements, sums, strict=True):
                items += _items(key, placement, total, server)
            requests.append(ServerRequest.of_tensors(server, Push(), pack(items)))
        with self._sessions.take() as session:
            self._send_push(session, list_name(batch.keys), requests)

    def _send_push(self, session: Session, name: str, requests: Sequence[ServerRequest]) -> list[ServerReply]:
        """Send a push; in mode sync, to the present round of its list of keys."""
        if not self._is_sync:
            return self._send(session, requests)
        with self._rounds.take(name) as this:
            replies = self._send(session, [_with(each, round=this.to_plain()) for each in requests])
            while late := [index for index, each in enumerate(replies) if "moved" in each.head]:
                if len(late) == len(requests):
                    # The others went on without this worker: it joins their round, on every server.
                    this.move(max(each.head["moved"] for each in replies))
                    fields: dict[str, Any] = {"round": this.to_plain()}
                else:
                    # Other servers have applied it in their round, from which it cannot be taken back.
                    fields = {"round": [name, 0, 0], "late": True}
                servers = [each.server for each in requests]
                again = [_with(requests[index], **fields)._replace(servers=servers) for index in late]
                for index, reply in zip(late, self._send(session, again, retry=True), strict=True):
                    replies[index] = reply
            return replies

    def _sum(self, placement: KeyPlacement, parts: Sequence[Part]) -> Part:
        """Return the sum of the parts of a call, in the dtype in which it travels."""
        dtype = placement.spec.dtype
        wide = interop.accumulator(dtype) if self._is_sync else dtype
        if not all(isinstance(part, Rows) for part in parts):
            dense = [part.to_dense(interop.accumulator(dtype)) if isinstance(part, Rows) else part for part in parts]
            total = torch.empty(placement.spec.shape, dtype=wide, device="cpu")
            reduce.sum_into(total, dense)
            return total
        on_cpu: Any = [part.to("cpu") for part in parts]
        if not self._is_sync:
            return rows.merge(on_cpu, dtype)
        # The server adds the rows of all workers in one order, which is not that of the sums of each.
        ids, values = torch.cat([part.ids for part in on_cpu]), torch.cat([part.values.to(wide) for part in on_cpu])
        return Rows(ids, values, placement.spec.shape[0])

    # ------------------------------------------------------------ pull

    def pull(self, keys: Sequence[Key], outs: Outs) -> None:
        """Fill outs with the present values of keys; keys without outs are skipped."""
        named, wanted = _with_outs(keys, outs)
        if named:
            layout = self._keymap.layout("pull", named)
            targets = None if layout.form is None else layout.form.targets(wanted)
            self._pull_current(layout, named, wanted, targets)

    def pull_snapshot(
        self, keys: Sequence[Key], outs: Outs, snapshot: str, placements: Mapping[Key, KeyPlacement]
    ) -> None:
        """Fill outs with the values of a snapshot, whose keys were placed as given."""
        named, wanted = _with_outs(keys, outs)
        if named:
            layout = Layout(named, [placements[key] for key in named], wide=False)
            targets = None if layout.form is None else layout.form.targets(wanted)
            self._pull(layout, wanted, targets, snapshot)

    def _pull_current(self, layout: Layout, keys: Sequence[Key], outs: Outs, targets: list[Column] | None) -> None:
        """Pull present values; retry once with fresh metadata if another client re-created a key on other servers."""
        try:
            self._pull(layout, outs, targets)
        except (KeyNotFoundError, ValueMismatchError) as error:
            fresh = self._keymap.layout("pull", keys)
            for key, old, new in zip(keys, layout.specs, fresh.specs, strict=True):
                if old != new:
                    raise ValueMismatchError(
                        f"pull({quote(key)}): another client has re-created this key; it was {old.dtype} "
                        f"{tuple(old.shape)} and is {new.dtype} {tuple(new.shape)}; call again, with arrays that fit"
                    ) from error
            self._pull(fresh, outs, targets)

    def _pull(self, layout: Layout, outs: Outs, targets: list[Column] | None, snapshot: str | None = None) -> None:
        requests = []
        for pulled in layout.pulled:
            message, nbytes = Pull(checksum=pulled.checksum, snapshot=snapshot), pulled.nbytes
            request = ServerRequest(pulled.server, message, pulled.keys, reply_nbytes=nbytes)
            if self._same_host[pulled.server] and nbytes > _CACHED_NBYTES and snapshot is None:
                request = request._replace(cached_nbytes=nbytes)
            requests.append(request)
        with self._sessions.take() as session:
            replies = self._send(session, requests)
            for pulled, request, reply in zip(layout.pulled, requests, replies, strict=True):
                self._scatter(layout, pulled, reply.payload, outs, targets)
                while not session.is_intact(pulled.server, reply):
                    (reply,) = self._send(session, [request])
                    self._scatter(layout, pulled, reply.payload, outs, targets)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of present rows; ids are unique and sorted."""
        return self._pull_rows(keys, ids, [self._keymap.find("row_sparse_pull", key) for key in keys])

    def pull_snapshot_rows(
        self, keys: Sequence[Key], ids: Sequence[torch.Tensor], snapshot: str, placements: Mapping[Key, KeyPlacement]
    ) -> list[Rows]:
        """Return copies of rows of a snapshot, whose keys were placed as given."""
        return self._pull_rows(keys, ids, [placements[key] for key in keys], snapshot)

    def _pull_rows(
        self,
        keys: Sequence[Key],
        ids: Sequence[torch.Tensor],
        placements: Sequence[KeyPlacement],
        snapshot: str | None = None,
    ) -> list[Rows]:
        found = [
            torch.empty((len(own), *each.spec.shape[1:]), dtype=each.spec.dtype, device="cpu")
            for each, own in zip(placements, ids, strict=True)
        ]
        requests, masks = [], []
        for server in sorted({server for each in placements for server in each.servers}):
            items, wanted, nbytes = [], [], 0
            for index, (key, placement, own) in enumerate(zip(keys, placements, ids, strict=True)):
                selected = placement.rows_of(server, own.cpu())
                if selected is not None:
                    items.append(Item(key, "ids", selected[0]))
                    wanted.append((index, selected[1]))
                    # Before the rows of each key, as much as it takes to align them.
                    nbytes += found[index].itemsize + len(selected[0]) * found[index][:1].nbytes
            requests.append(ServerRequest.of_tensors(server, PullRows(snapshot=snapshot), pack(items), nbytes))
            masks.append(wanted)
        with self._sessions.take() as session:
            replies = self._send(session, requests)
            for reply, wanted in zip(replies, masks, strict=True):
                items = unpack(reply.head["layout"].encode(), reply.payload.numpy().data)
                for item, (index, mine) in zip(items, wanted, strict=True):
                    self._check_rows(keys[index], item.tensor, found[index][mine])
                    interop.signed(found[index])[mine] = interop.signed(item.tensor)
        return [Rows(own, each, p.spec.shape[0]) for own, each, p in zip(ids, found, placements, strict=True)]

    def _check_rows(self, key: Key, rows: torch.Tensor, expected: torch.Tensor) -> None:
        if rows.dtype is not expected.dtype or rows.shape != expected.shape:
            self._keymap.refresh()
            raise ValueMismatchError(
                f"row_sparse_pull({quote(key)}): another client has re-created this key; call again"
            )

    def _send(self, session: Session, requests: Sequence[ServerRequest], *, retry: bool = False) -> list[ServerReply]:
        try:
            return session.send(requests, retry=retry)
        except (KeyNotFoundError, ValueMismatchError):
            # Another client has deleted or re-created a key.
            self._keymap.refresh()
            raise


def _init_of(indices: Sequence[int], keys: Sequence[Key], placements: Sequence[KeyPlacement]) -> Init:
    """Return the message that creates some of the keys."""
    return Init(**describe([keys[i] for i in indices], [placements[i] for i in indices]))


def _with(request: ServerRequest, **fields: Any) -> ServerRequest:
    return request._replace(message=replace(request.message, **fields))


def _items(key: Key, placement: KeyPlacement, total: Part, server: int) -> list[Item]:
    """Return what a server gets of the sum for a key."""
    if isinstance(total, torch.Tensor):
        piece = placement.slice_of(server, total)
        return [] if piece is None else [Item(key, "sum", piece)]
    selected = placement.rows_of(server, total.ids)
    if selected is None:
        return []
    ids, mine = selected
    return [Item(key, "ids", ids), Item(key, "rows", total.values[mine])]


def _with_outs(keys: Sequence[Key], outs: Outs) -> tuple[list[Key], list[Sequence[torch.Tensor]]]:
    listed = [(key, own) for key, own in zip(keys, outs, strict=False) if own]
    return [key for key, _ in listed], [own for _, own in listed]


class RoundNumbers:
    """The round of each list of keys that this worker pushes in mode sync; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[str, int] = {}
        self._active: dict[str, set[int]] = {}

    @contextmanager
    def take(self, name: str) -> Iterator[_Round]:
        """Yield a round of a list of keys; it is over when the block ends without an error."""
        this = _Round(self, name, self.begin(name, 1))
        try:
            yield this
        except BaseException:
            # The push stays in the round, and the next one replaces it there.
            self.end(name, this.number)
            raise
        with self._lock:
            self._next[name] = max(this.number + 1, self._next.get(name, 1))
        self.end(name, this.number)

    def begin(self, name: str, least: int) -> int:
        """Return the next round that no other thread has."""
        with self._lock:
            active = self._active.setdefault(name, set())
            number = max(least, self._next.get(name, 1))
            while number in active:
                number += 1
            active.add(number)
            return number

    def end(self, name: str, number: int) -> None:
        """Give a round back."""
        with self._lock:
            active = self._active[name]
            active.discard(number)
            if not active:
                del self._active[name]

    def first(self, name: str) -> int:
        """Return the first round to which this worker may still push."""
        with self._lock:
            return min(self._active[name])


class _Round:
    def __init__(self, rounds: RoundNumbers, name: str, number: int) -> None:
        self._rounds, self._name, self.number = rounds, name, number

    def to_plain(self) -> list[Any]:
        """Return what a request says of the round."""
        return [self._name, self.number, self._rounds.first(self._name)]

    def move(self, number: int) -> None:
        """Go to a later round."""
        before, self.number = self.number, self._rounds.begin(self._name, number)
        self._rounds.end(self._name, before)
