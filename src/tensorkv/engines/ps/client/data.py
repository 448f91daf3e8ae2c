"""Traffic: pushes and pulls of a client, cut into letters to servers, and put together again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, Packed, pack, unpack
from tensorkv.arrays.rows import Rows
from tensorkv.errors import KeyNotFoundError, ValueMismatchError, quote
from tensorkv.shard import reduce
from tensorkv.shard.entry import Batch, Entry, Part
from tensorkv.shard.nonfinite import FiniteSums
from tensorkv.shard.optimizers import ROWWISE
from tensorkv.shard.plan import Column
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import check_push

from . import layout
from .keymap import Directory
from .layout import Held, Route
from .session import Lane, Lanes, Letter

Outs = Sequence[Sequence[torch.Tensor]]
# Pulls of as many bytes are read from a copy that all readers of a host share.
_SHARED_NBYTES = 64 << 10


class Traffic:
    """What one client pushes and pulls.

    Args:
        lanes: to the servers.
        directory: of keys.
        near: of each server, whether it may be on this host.
        in_step: whether sums of several workers are added before they are rounded.
        finite: looks at sums before they are sent, so that no server refuses what another has taken.
    """

    def __init__(
        self, lanes: Lanes, directory: Directory, near: Sequence[bool], *, in_step: bool, finite: FiniteSums
    ) -> None:
        self._lanes, self._directory, self._near, self._in_step = lanes, directory, list(near), in_step
        self._finite = finite
        self._pool = Pool()
        self._steps = Steps()

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    # ------------------------------------------------------------ push

    def push(self, batch: Batch, outs: Outs | None) -> None:
        """Push a batch; with outs, pull its keys."""
        entries = [self._directory.entry(batch.verb, key) for key in batch.keys]
        check_push(batch, entries, self._directory.rule)
        if self._finite.looks:
            kept, sums = self._finite.sums(batch, entries, self._sum_of)
            if len(kept) < len(entries):
                self._send_out(Batch(batch.verb, [entry.key for entry in kept], sums), None)
                self.pull(batch.keys, outs or ())
                return
            batch = Batch(batch.verb, batch.keys, sums)
        self._send_out(batch, outs)

    def _sum_of(self, entry: Entry, parts: Sequence[Any]) -> Part:
        return self._sum(self._directory.find("push", entry.key), parts)

    def _send_out(self, batch: Batch, outs: Outs | None) -> None:
        route = self._directory.route(batch.verb, batch.keys)
        if any(isinstance(part, Rows) for parts in batch.parts for part in parts):
            self._push_rows(batch)
            if outs is not None:
                self.pull(batch.keys, outs)
            return
        parts: Any = batch.parts
        columns = None if route.form is None else route.form.columns(parts)
        targets = None if route.form is None or outs is None else route.form.targets(outs)
        self._exchange(route, columns, parts, outs, targets)

    def many(self, keys: Sequence[Key], values: Any, outs: Any) -> list[int] | None:
        """Push raw values and fill raw outs of many keys, if all are plain; None: nothing was done."""
        # True and 1.0 would be found as 1.
        if set(map(type, keys)) not in ({str}, {int}) or (self._finite.looks and values is not None):
            return None
        route = self._directory.known_route(keys)
        if route is None:
            if not all(key in self._directory for key in keys) or len(set(keys)) < len(keys):
                return None
            route = self._directory.route("push", keys)
        form, spec = route.form, self._directory.optimizer
        if form is None or route.has_tables or (spec is not None and spec.name not in ROWWISE):
            return None
        columns = [] if values is None else form.columns(values)
        targets = [] if outs is None else form.targets(outs)
        if columns is None or targets is None:
            return None
        if values is None:
            self._fetch(route, keys, outs, targets)
        else:
            self._exchange(route, columns, (), None if outs is None else (), targets)
        return form.moved(len(columns) + len(targets))

    def _exchange(
        self,
        route: Route,
        columns: list[Column] | None,
        parts: Sequence[Any],
        outs: Outs | None,
        targets: list[Column] | None,
    ) -> None:
        pulls = outs is not None
        letters = []
        for share, reply in zip(route.shares, route.replies, strict=True):
            fill = partial(share.gather, parts)
            if columns is not None and route.form is not None:
                addresses = [column.addresses for column in columns]
                fill = partial(layout.gather, share, route.form.dtype, addresses, pool=self._pool)
            words = {"pulls": True, "of": reply.checksum} if pulls else {}
            letters.append(Letter(share.server, words, share.layout, share.nbytes, fill, reply.nbytes if pulls else 0))
        with self._lanes.take() as lane:
            answers = self._push_letters(lane, route.name if self._in_step else "", letters)
            for reply, answer in zip(route.replies, answers, strict=True):
                if outs is not None:
                    self._scatter(route, reply, answer.payload, outs, targets)

    def _scatter(
        self, route: Route, share: layout.Share, values: torch.Tensor, outs: Outs, targets: list[Column] | None
    ) -> None:
        if targets and route.form is not None:
            layout.scatter(share, route.form.dtype, values, [target.addresses for target in targets], self._pool)
        else:
            share.scatter(values, outs)

    def _push_rows(self, batch: Batch) -> None:
        held = [self._directory.find(batch.verb, key) for key in batch.keys]
        sums = [self._sum(each, parts) for each, parts in zip(held, batch.parts, strict=True)]
        letters = []
        for server in sorted({server for each in held for server in each.servers}):
            items: list[Item] = []
            for key, each, total in zip(batch.keys, held, sums, strict=True):
                items += self._items(key, each, total, server)
            letters.append(letter_of(server, {}, pack(items)))
        with self._lanes.take() as lane:
            self._push_letters(lane, layout.list_name(batch.keys), letters)

    def _push_letters(self, lane: Lane, name: str, letters: Sequence[Letter]) -> list[Any]:
        """Send a push; in step, into the round of its list of keys to which this worker has come."""
        if not self._in_step:
            return self._send(lane, "push", letters)
        with self._steps.take(name) as step:
            answers = self._send(lane, "push", [_with(each, step.words()) for each in letters])
            while late := [index for index, each in enumerate(answers) if "moved" in each.head]:
                if len(late) == len(letters):
                    # The others have gone on without this worker: it goes on where they are, on every server.
                    step.move(max(each.head["moved"] for each in answers))
                    words = step.words()
                else:
                    # Other servers have had it in their round, from which it cannot be taken back.
                    words = {"late": True, "step": [name, 0, 0], "fan": [each.server for each in letters]}
                told = self._send(lane, "push", [_with(letters[index], words) for index in late], again=True)
                for index, answer in zip(late, told, strict=True):
                    answers[index] = answer
            return answers

    def _sum(self, held: Held, parts: Sequence[Part]) -> Part:
        dtype = held.spec.dtype
        wide = interop.accumulator(dtype) if self._in_step else dtype
        if not all(isinstance(part, Rows) for part in parts):
            dense = [part.to_dense(interop.accumulator(dtype)) if isinstance(part, Rows) else part for part in parts]
            total = torch.empty(held.spec.shape, dtype=wide, device="cpu")
            reduce.sum_into(total, dense)
            return total
        on_cpu: Any = [part.to("cpu") for part in parts]
        if not self._in_step:
            return rows.merge(on_cpu, dtype)
        # The rows of all workers are to be added in one order, which is not that of the sums of each.
        ids, values = torch.cat([part.ids for part in on_cpu]), torch.cat([part.values.to(wide) for part in on_cpu])
        return Rows(ids, values, held.spec.shape[0])

    def _items(self, key: Key, held: Held, total: Part, server: int) -> list[Item]:
        for owner, start, stop in held.pieces:
            if owner != server:
                continue
            if isinstance(total, torch.Tensor):
                return [Item(key, "sum", total[start:stop] if total.ndim else total)]
            if held.spec.is_table:
                mine, first = total.ids % len(held.pieces) == server, 0
            else:
                mine, first = (total.ids >= start) & (total.ids < stop), start
            return [Item(key, "ids", total.ids[mine] - first), Item(key, "rows", total.values[mine])]
        return []

    # ------------------------------------------------------------ pull

    def pull(
        self,
        keys: Sequence[Key],
        outs: Outs,
        words: Mapping[str, Any] | None = None,
        held: Mapping[Key, Held] | None = None,
    ) -> None:
        """Fill outs with the values of keys, of now or of what ``words`` say, which lay where ``held`` says."""
        listed = [(key, own) for key, own in zip(keys, outs, strict=False) if own]
        if not listed:
            return
        named = [key for key, _ in listed]
        wanted = [own for _, own in listed]
        if held is None:
            route = self._directory.route("pull", named)
        else:
            route = Route(named, [held[key] for key in named], wide=False)
        targets = None if route.form is None else route.form.targets(wanted)
        if held is None:
            self._fetch(route, named, wanted, targets)
        else:
            self._collect(route, named, wanted, targets, words or {})

    def _fetch(self, route: Route, keys: Sequence[Key], outs: Outs, targets: list[Column] | None) -> None:
        """Collect values of now, also of keys that another client has made anew elsewhere, as they were before."""
        try:
            self._collect(route, keys, outs, targets, {})
        except (KeyNotFoundError, ValueMismatchError) as error:
            now = self._directory.route("pull", keys)
            for key, old, new in zip(keys, route.specs, now.specs, strict=True):
                if old != new:
                    raise ValueMismatchError(
                        f"pull({quote(key)}): another client has made this key anew; it was {old.dtype} "
                        f"{tuple(old.shape)} and is {new.dtype} {tuple(new.shape)}; call again, with arrays that fit"
                    ) from error
            self._collect(now, keys, outs, targets, {})

    def _collect(
        self, route: Route, keys: Sequence[Key], outs: Outs, targets: list[Column] | None, words: Mapping[str, Any]
    ) -> None:
        letters = []
        for share in route.replies:
            own: dict[str, Any] = {**words, "of": share.checksum}
            if self._near[share.server] and share.nbytes > _SHARED_NBYTES and "view" not in words:
                own["shares"] = share.nbytes
            letters.append(Letter(share.server, own, share.keys, reply_nbytes=share.nbytes))
        with self._lanes.take() as lane:
            answers = self._send(lane, "pull", letters)
            for share, letter, answer in zip(route.replies, letters, answers, strict=True):
                self._scatter(route, share, answer.payload, outs, targets)
                while not lane.is_whole(share.server, answer):
                    (answer,) = self._send(lane, "pull", [letter])
                    self._scatter(route, share, answer.payload, outs, targets)

    def pull_rows(
        self,
        keys: Sequence[Key],
        ids: Sequence[torch.Tensor],
        words: Mapping[str, Any] | None = None,
        where: Mapping[Key, Held] | None = None,
    ) -> list[Rows]:
        """Return copies of rows; ids are unique and sorted."""
        held = [self._directory.find("row_sparse_pull", key) if where is None else where[key] for key in keys]
        found = [
            torch.empty((len(own), *each.spec.shape[1:]), dtype=each.spec.dtype, device="cpu")
            for each, own in zip(held, ids, strict=True)
        ]
        letters, places = [], []
        for server in sorted({server for each in held for server in each.servers}):
            items, wanted, nbytes = [], [], 0
            for index, (key, each, own) in enumerate(zip(keys, held, ids, strict=True)):
                selected = _selected(each, own.cpu(), server)
                if selected is not None:
                    items.append(Item(key, "ids", selected[0]))
                    wanted.append((index, selected[1]))
                    # Before each, as much as it takes to align it.
                    nbytes += found[index].itemsize + len(selected[0]) * found[index][:1].nbytes
            letters.append(letter_of(server, dict(words or {}), pack(items), nbytes))
            places.append(wanted)
        with self._lanes.take() as lane:
            answers = self._send(lane, "pull_rows", letters)
            for answer, wanted in zip(answers, places, strict=True):
                items = unpack(answer.head["layout"].encode(), answer.payload.numpy().data)
                for item, (index, mine) in zip(items, wanted, strict=True):
                    self._check_rows(keys[index], item.tensor, found[index][mine])
                    interop.signed(found[index])[mine] = interop.signed(item.tensor)
        return [Rows(own, each, h.spec.shape[0]) for own, each, h in zip(ids, found, held, strict=True)]

    def _check_rows(self, key: Key, rows: torch.Tensor, expected: torch.Tensor) -> None:
        if rows.dtype is not expected.dtype or rows.shape != expected.shape:
            self._directory.refresh()
            raise ValueMismatchError(
                f"row_sparse_pull({quote(key)}): another client has made this key anew; call again"
            )

    def _send(self, lane: Lane, verb: str, letters: Sequence[Letter], *, again: bool = False) -> list[Any]:
        try:
            return lane.send(verb, letters, again=again)
        except (KeyNotFoundError, ValueMismatchError):
            # Another client has deleted a key, or made it anew.
            self._directory.refresh()
            raise


class Steps:
    """How far this worker has come with each list of keys that it pushes in step; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[str, int] = {}
        self._under_way: dict[str, set[int]] = {}

    @contextmanager
    def take(self, name: str) -> Iterator[_Step]:
        """Give a round of a list of keys; it is over when the block ends without an error."""
        step = _Step(self, name, self.begin(name, 1))
        try:
            yield step
        except BaseException:
            # The push stays in the round, and the next one takes its place.
            self.end(name, step.number)
            raise
        with self._lock:
            self._next[name] = max(step.number + 1, self._next.get(name, 1))
        self.end(name, step.number)

    def begin(self, name: str, least: int) -> int:
        """Return the next round that no other thread is in."""
        with self._lock:
            here = self._under_way.setdefault(name, set())
            number = max(least, self._next.get(name, 1))
            while number in here:
                number += 1
            here.add(number)
            return number

    def end(self, name: str, number: int) -> None:
        """Leave a round."""
        with self._lock:
            here = self._under_way[name]
            here.discard(number)
            if not here:
                del self._under_way[name]

    def first(self, name: str) -> int:
        """Return the first round to which this worker may still come."""
        with self._lock:
            return min(self._under_way[name])


class _Step:
    def __init__(self, steps: Steps, name: str, number: int) -> None:
        self._steps, self._name, self.number = steps, name, number

    def words(self) -> dict[str, Any]:
        """Return what a request says of it."""
        return {"step": [self._name, self.number, self._steps.first(self._name)]}

    def move(self, number: int) -> None:
        """Go to a later round."""
        before, self.number = self.number, self._steps.begin(self._name, number)
        self._steps.end(self._name, before)


def _with(letter: Letter, words: Mapping[str, Any]) -> Letter:
    return letter._replace(words={**letter.words, **words})


def letter_of(server: int, words: dict[str, Any], packed: Packed, reply_nbytes: int = 0) -> Letter:
    """Return a letter that brings packed tensors."""
    nbytes = sum(len(buffer) for buffer in packed.payload)
    return Letter(server, words, packed.layout, nbytes, partial(_copy, packed.payload), reply_nbytes)


def _copy(buffers: Sequence[Any], room: torch.Tensor) -> None:
    at, memory = 0, room.numpy()
    for buffer in buffers:
        memory[at : at + len(buffer)] = memoryview(buffer)
        at += len(buffer)


def _selected(held: Held, ids: torch.Tensor, server: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the ids that a server knows as its own, and their places; None if it has no piece."""
    for owner, start, stop in held.pieces:
        if owner == server:
            if held.spec.is_table:
                mine, first = ids % len(held.pieces) == server, 0
            else:
                mine, first = (ids >= start) & (ids < stop), start
            return ids[mine] - first, mine
    return None
