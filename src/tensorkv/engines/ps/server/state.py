"""What a server holds, and how requests become calls of its shard. Nothing waits here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tensorkv import compression
from tensorkv.arrays.arguments import Key, check_keys
from tensorkv.arrays.packing import Item, bytes_of, cut, join_layout, json_keys, pack, unpack
from tensorkv.arrays.rows import Rows, merge
from tensorkv.arrays.slices import Slices, join_slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import SumMemory, Traffic, WordsLayout, words_layout
from tensorkv.errors import ArgumentError, SnapshotError, ValueMismatchError, quote, show
from tensorkv.releases.finder import ChangeFinder
from tensorkv.runtime.recent import Recent
from tensorkv.shard import native
from tensorkv.shard.changes import Publish, RequestIds, SetNotes, ShowRelease, Unpublish
from tensorkv.shard.entry import Batch, Entry, FrozenEntry, Part
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.pool import num_cores
from tensorkv.shard.shard import Shard
from tensorkv.shard.table import Table
from tensorkv.storage import checkpoint, manifest
from tensorkv.storage.changes import Events
from tensorkv.storage.durable import open_shard
from tensorkv.storage.manifest import Contents

from ..messages import (
    Commit,
    Init,
    Push,
    PushLayout,
    Reply,
    Request,
    Restore,
    can_code,
    push_layout,
    words_text,
)
from ..options import PSOptions
from .listing import listed
from .reads import Reads
from .snapshot import HeldSnapshots
from .tables import ServerTables
from .values import REMEMBERED_LAYOUTS, Room, ServedValues

# Within this time a reader whose server was restarted reads on.
_COMES_BACK_S = 60.0


class ServerState:
    """A shard, the metadata of its keys, and snapshots.

    Args:
        options: of the store.
        index: of the server.
        threads: as for ``Shard`` (None: as many as cores, which a host of servers has for them).
        clients: the dedup table, whose request ids are logged with each change.

    Raises:
        StorageError: the folder cannot be opened.
    """

    def __init__(self, options: PSOptions, index: int, threads: int | None, clients: ServerTables, stamp: str) -> None:
        # In mode async clients take the means.
        reduce = options.reduce if options.mode == "sync" else "sum"
        common: dict[str, Any] = {"nonfinite": options.nonfinite, "reduce": reduce, "threads": threads or num_cores()}
        folder = options.folder(index)
        if folder is None:
            self.shard = Shard(**common)
        else:
            durability: Any = options.durability
            self.shard = open_shard(folder, durability=durability, applied=clients, stamp=stamp, **common)
            # Their readers do not know yet that this server was restarted.
            self.shard.releases.hold_all("readers before the restart", _COMES_BACK_S)
        self._clients = clients
        self.traffic = Traffic()
        """Of compressed gradients and pulls."""
        self._live = ServedValues(self.shard, self.traffic)
        self.snapshots = HeldSnapshots(self.shard, options.keep, self.traffic)
        self.reads = Reads(self.shard)
        """Values that clients read where they are."""
        self.changes = ChangeFinder(self.shard, self._place_of)
        """Finds changes between releases."""
        # Of pushes whose parts are all compressed, and memory for these parts.
        self._coded: Recent[bytes, WordsLayout] = Recent(REMEMBERED_LAYOUTS)
        self._sums = SumMemory()
        self.inits = 0
        """How often keys were created, deleted or re-created, or their metadata set."""
        self._index, self._num_servers = index, options.num_servers
        self._rule, self._rule_changes = self.shard.rule, 0

    # ------------------------------------------------------------ pushes and pulls

    def push(self, request: Request[Push], ids: RequestIds, *, fill: bool = True) -> Reply | None:
        """Push what a request brings; return the reply with the new values if it pulls and they are to be filled."""
        pushed, message = push_layout(request.layout), request.message
        pulls = message.pulls and fill
        must_complete = message.must_complete or message.pulls
        room = self._live.room(pushed.keys, request.out, message.checksum, message.pull_dtype) if pulls else None
        coded = self._decoded(request, self._sums)
        # What is written in the pass of the update.
        outs = room if coded is None and message.pull_dtype is None else None
        if coded is not None:
            call = native.Call(None, "push", list(pushed.keys), coded, None, 0)
            if not self.shard.try_compiled(call, requests=ids, scale=message.scale):
                batch = Batch("push", list(pushed.keys), coded)
                self.shard.push(batch, requests=ids, scale=message.scale, must_complete=must_complete)
        elif not self._try_push(pushed, request, outs, ids):
            batch = self._parsed(request)
            if outs is None:
                self.shard.push(batch, requests=ids, scale=message.scale, must_complete=must_complete)
            else:
                self.shard.pushpull(batch, [[each] for each in outs.tensors], requests=ids, scale=message.scale)
        if room is None:
            return None
        return Reply({}, room.payload) if outs is not None else self._live.filled(pushed.keys, room, message.pull_dtype)

    def _try_push(self, pushed: PushLayout, request: Request[Push], room: Room | None, ids: RequestIds) -> bool:
        """Push parts whose layout in the payload is that of their keys' values; return False if nothing was done."""
        found = self._live.layout_of(pushed.keys) if pushed.has_sums else None
        if found is None or request.layout != found.text:
            return False
        verb, outs = ("push", None) if room is None else ("pushpull", room.payload)
        call = native.Call(None, verb, pushed.keys, bytes_of(request.payload), outs, 0, None, False, True)
        return self.shard.try_compiled(call, requests=ids, scale=request.message.scale)

    def _decoded(self, request: Request[Push], memory: SumMemory) -> Any:
        """Return what a push stands for whose parts are all compressed, one part of each key; None: they are not.

        Args:
            request: the push.
            memory: for the parts.
        """
        if request.message.codec is None:
            return None
        pushed, codec = push_layout(request.layout), compression.parse(request.message.codec)
        found = self._coded.get(request.layout)
        if found is None or found.codec != codec:
            if codec is None or not all(key in self.shard for key in pushed.keys):
                return None
            specs = [self.shard.entry("push", key).spec for key in pushed.keys]
            layout = words_layout(codec, tuple(tuple(spec.shape) for spec in specs))
            if words_text(pushed.keys, layout.places) != request.layout or not can_code(specs):
                return None
            self._coded.keep(request.layout, layout, len(pushed.keys), len(self.shard))
            found = layout
        if len(request.payload) != found.nbytes:
            return None
        flat, parts = memory.of(found)
        words = np.frombuffer(request.payload, np.uint8)
        for run in found.runs:
            found.decode_sum([words], flat, run)
        self.traffic.add_received(found.nbytes, found.raw_nbytes)
        return parts

    def batch(self, request: Request[Push]) -> Batch:
        """Return what a request pushes, one part for each key."""
        coded = self._decoded(request, SumMemory())
        return self._parsed(request) if coded is None else Batch("push", list(push_layout(request.layout).keys), coded)

    def _parsed(self, request: Request[Push]) -> Batch:
        """Do as ``batch``, part by part."""
        pushed = push_layout(request.layout)
        specs = [self.shard.entry("push", key).spec for key in pushed.keys]
        codec = compression.parse(request.message.codec)
        parts = pushed.parts(request.payload, specs, codec)
        if codec is not None:
            shapes = [spec.shape for spec in specs if not spec.is_table]
            self.traffic.add_received(
                sum(codec.nbytes(shape) for shape in shapes), 4 * sum(shape.numel() for shape in shapes)
            )
        return Batch("push", list(pushed.keys), [[part] for part in parts])

    def push_round(
        self, keys: Sequence[Key], parts: Sequence[list[Any]], counts: Sequence[int], ids: RequestIds
    ) -> None:
        """Push the parts of a round, which are the sums of so many parts of workers; slices of all workers are one."""
        joined, counted = list(parts), list(counts)
        for place, own in enumerate(parts):
            if any(isinstance(part, Slices) for part in own):
                joined[place], counted[place] = [join_slices(f"push({quote(keys[place])})", own)], 1
        self.shard.push(Batch("push", list(keys), joined, counted), requests=ids, must_complete=True)

    def served(self, snapshot: str | None) -> ServedValues:
        """Return the present values, or those of a snapshot.

        Raises:
            SnapshotError: it is not held any more.
        """
        return self._live if snapshot is None else self.snapshots.find(snapshot)

    # ------------------------------------------------------------ keys and the rule

    def init(self, entries: Sequence[Entry], ids: RequestIds) -> None:
        """Add new keys, whose metadata has been set."""
        self.shard.check_new([entry.key for entry in entries])
        self.shard.add(entries, requests=ids)
        self._forget_layouts()

    def delete(self, keys: Sequence[Key], ids: RequestIds) -> None:
        """Forget keys."""
        self.shard.delete(keys, requests=ids)
        self._clients.forget_keys(keys)
        self._forget_layouts()

    @property
    def rule_changes(self) -> int:
        """What differs when the update rule does."""
        if self.shard.rule is not self._rule:
            self._rule = self.shard.rule
            self._rule_changes += 1
        return self._rule_changes

    def set_rule(self, optimizer: dict[str, Any] | None, ids: RequestIds) -> None:
        """Set an optimizer; None sets assignment."""
        if optimizer is None:
            self.shard.set_updater(None, requests=ids)
        else:
            self.shard.set_optimizer(OptimizerSpec.from_json(optimizer), requests=ids)

    def restore(self, contents: Contents, metadata: Mapping[str, Any], ids: RequestIds) -> None:
        """Take over the contents of a checkpoint, and the metadata of the keys of a store."""
        before = self.shard.keys()
        checkpoint.restore(self.shard, contents, notes=metadata, requests=ids)
        self._clients.forget_keys([key for key in before if key not in self.shard])
        if contents.releases is not None:
            self.snapshots.drop_replaced()
        if contents.kind != "optimizer-states":
            self._forget_layouts()

    def drop_metadata(self, keys: Sequence[Key]) -> None:
        """Drop the metadata of keys that are deleted."""
        gone = [json.dumps(key) for key in keys if key not in self.shard]
        self.set_metadata({name: None for name in gone if name in self.shard.notes})

    def describe_optimizer(self) -> dict[str, Any] | None:
        """Return the optimizer as plain data, None without one."""
        spec = self.shard.optimizer
        return None if spec is None else spec.to_json()

    def listing(self) -> dict[str, Any]:
        """Return the metadata of every key, as ``messages.Init`` has them."""
        with self.shard.frozen() as (entries, _):
            found = [(entry.key, self._metadata_of(entry.key)) for entry in entries]
        return listed([key for key, _ in found], [data for _, data in found])

    def contents(self, releases: bool, *, visible_only: bool) -> Reply:
        """Return everything that the shard holds, in the form of a checkpoint.

        Args:
            releases: with the releases.
            visible_only: with those alone that readers see.
        """
        with self.shard.frozen() as (entries, rule):
            self.shard.check_complete("save")
            saved = self.shard.saved_releases(visible_only=visible_only) if releases else None
            body, tensors = manifest.describe("store", entries, rule, releases=saved)
            packed = pack([Item(name, "tensor", tensor) for name, tensor in tensors.items()])
            metadata = [[entry.key, self._metadata_of(entry.key)] for entry in entries]
            head = {"body": body, "layout": packed.layout.decode(), "metadata": metadata}
            return Reply(head, bytes_of(b"".join(packed.payload)))

    # ------------------------------------------------------------ releases

    def check_new_release(self, name: str, owner: str) -> None:
        """Raise if there was a release of a name, unless a client has begun it and now tries again."""
        if not self.is_begun(name, owner):
            self.shard.releases.check_new(name)

    def add_release(self, message: Commit, name: str, owner: str) -> list[Key] | None:
        """Hold the present values, which are here, as a release that readers do not see yet.

        Returns:
            Which of the keys that the message lists are here; None if it means all.
        """
        keys = self.listed_here(message)
        self.shard.check_complete("publish", keys)
        change = Publish(name, message.number, keys, is_visible=False, owner=owner, attempt=message.attempt)
        self.shard.commit(change)
        return keys

    def listed_here(self, message: Commit) -> list[Key] | None:
        """Return which of the keys that a message lists are here; None if it means all."""
        return None if message.keys is None else [k for k in check_keys("publish", message.keys) if k in self.shard]

    def is_begun(self, name: str, owner: str) -> bool:
        """Return whether a client has begun a release that readers do not see yet."""
        return any((held.name, held.owner) == (name, owner) for held in self.shard.releases.hidden())

    def show_release(self, name: str, keep: int | None, owner: str, ids: RequestIds) -> None:
        """Let readers see a release that a client has begun."""
        if not self.is_begun(name, owner):
            raise SnapshotError(f"publish({quote(name)}): the release was not finished in time; publish again")
        self.shard.commit(ShowRelease(name, keep, requests=ids))

    def keep_releases(self, number: int, names: Sequence[str], ids: RequestIds) -> None:
        """Drop all releases up to a number but those of some names, which server 0 has."""
        releases = self.shard.releases
        for held in releases.hidden():
            # Server 0 has shown those up to the number.
            if held.name in names and held.number <= number:
                self.shard.commit(ShowRelease(held.name))
        others = [held.name for held in releases.lasting() if held.number <= number and held.name not in names]
        if others:
            self.shard.commit(Unpublish(others, requests=ids))

    def drop_unfinished_releases(self, clients: Sequence[str]) -> None:
        """Drop releases that clients which are not among these have begun and not finished."""
        lost = [held.name for held in self.shard.releases.hidden() if held.owner not in clients]
        if lost:
            self.shard.commit(Unpublish(lost))

    def stats(self) -> dict[str, Any]:
        """Return counts of what is held."""
        with self.shard.frozen() as (entries, _):
            nbytes = sum(entry.value.nbytes for entry in entries)
            firsts = sum(self._is_first(entry.key) for entry in entries)
        found: dict[str, Any] = {"keys": len(entries), "first_keys": firsts, "nbytes": nbytes}
        found["snapshots"] = len(self.snapshots)
        found["releases"] = len(self.shard.held_releases())
        found["nonfinite"] = self.shard.nonfinite_counts
        found |= self.traffic.stats()
        return found if self.shard.log is None else {**found, "wal": self.shard.log.counts}

    def _is_first(self, key: Key) -> bool:
        """Return whether the first piece of a key is here, so that servers together count each key once."""
        note = self._metadata_of(key)
        return note is not None and bool(note["pieces"][0][0] == self._index)

    def _place_of(self, entry: FrozenEntry) -> tuple[int, int]:
        """Return where in its value the first element is of what this server holds of a key, and the value's size."""
        numel = math.prod(entry.note["shape"])
        if entry.spec.is_table:
            return 0, numel
        first: int = next(start for server, start, _ in entry.note["pieces"] if server == self._index)
        return first * entry.spec.shape[1:].numel(), numel

    def _metadata_of(self, key: Key) -> Any:
        return self.shard.notes.get(json.dumps(key))

    def _forget_layouts(self) -> None:
        self._live.forget_layouts()
        self._coded.clear()
        self._sums = SumMemory()
        self.inits += 1

    def record(self, events: Sequence[Any]) -> None:
        """Log events, where there is a log, and apply them to the tables."""
        if self.shard.log is None:
            self._clients.apply(events)
        else:
            self.shard.commit(Events(events))

    def check_metadata(self, described: Iterable[Any]) -> None:
        """Raise if metadata of keys is malformed, which all clients are to be told.

        Raises:
            TensorKVError, LookupError, TypeError, ValueError: it is.
        """
        for each in described:
            manifest.restore_spec("", each, is_table=each["table"] is True)
            servers = [server for server, _, _ in each["pieces"]]
            numbers = [each.get("order", 0), *(number for piece in each["pieces"] for number in piece)]
            fits = all(type(number) is int for number in numbers) and len(set(servers)) == len(servers)
            if not fits or self._index not in servers or not all(0 <= each < self._num_servers for each in servers):
                raise ArgumentError(
                    f"malformed metadata {show(each)}; expected the server, first row and end of each piece, and one "
                    f"of server {self._index}"
                )

    def set_metadata(self, notes: Mapping[str, Any]) -> None:
        """Set the metadata of keys; None drops it.

        Not in the change that creates or deletes the keys: metadata without its key means nothing.
        """
        if notes:
            self.shard.commit(SetNotes(notes))
        self.inits += 1


def new_entries(request: Request[Init], shard: Shard, server: int) -> list[Entry]:
    """Check and return the new entries that a request brings, whose metadata were checked.

    Args:
        request: of a client.
        shard: that is to hold them.
        server: its index.

    Raises:
        TensorKVError, LookupError, TypeError, ValueError: they are malformed.
    """
    message = request.message
    kinds, keys, orders = message.kinds, message.keys, message.orders
    specs = [manifest.restore_spec("", kind, is_table=kind["table"] is True) for kind in kinds]
    if len(orders) != len(keys) or not all(type(order) is int for order in orders):
        raise ArgumentError("malformed init; expected the order of each key")
    check_keys("init", keys)
    if not all(type(index) is int and 0 <= index < len(kinds) for index in message.indices):
        raise ArgumentError("malformed init; expected the number of each key's metadata")
    found = [specs[index] for index in message.indices]
    parts = _whole_parts(request, specs, [_shape_on(server, *each) for each in zip(kinds, specs, strict=True)])
    if parts is None:
        pushed = push_layout(request.layout)
        if keys != list(pushed.keys):
            raise ArgumentError("malformed init; expected the keys of the layout")
        parts = pushed.parts(request.payload, found, None)
    entries = [_new_entry(*each) for each in zip(keys, found, parts, strict=True)]
    # The client reuses the memory of this payload for its next request.
    dense = [entry for entry in entries if not entry.spec.is_table]
    for entry, copy in zip(dense, shard.copies([entry.tensor for entry in dense]), strict=True):
        entry.value = copy
    return entries


def _shape_on(server: int, kind: Mapping[str, Any], spec: KeySpec) -> torch.Size:
    """Return the shape of what a server holds of a dense value."""
    _, start, stop = next(piece for piece in kind["pieces"] if piece[0] == server)
    return torch.Size((stop - start, *spec.shape[1:])) if spec.shape else spec.shape


def _whole_parts(
    request: Request[Init], specs: Sequence[KeySpec], shapes: Sequence[torch.Size]
) -> Sequence[Part] | None:
    """Return the values of an init if its layout says what the metadata do; None: it is to be decoded.

    Args:
        request: of a client.
        specs, shapes: of each kind of metadata, and what it has here.
    """
    message, dtypes = request.message, {spec.dtype for spec in specs}
    if len(dtypes) > 1 or torch.bool in dtypes or any(spec.is_table for spec in specs) or not specs:
        return None
    (dtype,) = dtypes
    numels = [shape.numel() for shape in shapes]
    nbytes = sum([numels[index] for index in message.indices]) * dtype.itemsize
    fits = nbytes == len(request.payload) and len(set(message.keys)) == len(message.keys)
    described = [("sum", dtype, shape) for shape in shapes]
    if not fits or join_layout(message.keys, described, message.indices) != request.layout:
        return None
    return cut(bytes_of(request.payload), dtype, [shapes[index] for index in message.indices])


def _new_entry(key: Key, spec: KeySpec, part: Part) -> Entry:
    if isinstance(part, torch.Tensor) and part.dtype is spec.dtype and part.shape == spec.shape and not spec.is_table:
        return Entry(key, spec, part)
    dtype, shape = (part.values.dtype, part.values.shape) if isinstance(part, Rows) else (part.dtype, part.shape)
    fits = dtype is spec.dtype and shape[1:] == spec.shape[1:] and len(shape) == len(spec.shape)
    if not fits or isinstance(part, Rows) is not spec.is_table:
        raise ValueMismatchError(
            f"init({quote(key)}): the value is {dtype} {tuple(shape)}, which differs from its metadata"
        )
    if isinstance(part, Rows):
        held = merge([part], may_share=True)
        return Entry(key, spec, Table.of(replace(held, init=spec.init), "cpu", key))
    return Entry(key, replace(spec, shape=shape), part)


def metadata_of(message: Init) -> dict[str, Any]:
    """Return the metadata of new keys, by the JSON of each."""
    columns = zip(json_keys(message.keys), message.indices, message.orders, strict=True)
    return {name: {**message.kinds[index], "order": order} for name, index, order in columns}


def contents_of(request: Request[Restore]) -> Contents:
    """Check and return the entries that a request brings.

    Raises:
        CheckpointError, LayoutError: the entries are malformed.
    """
    tensors = {str(item.key): item.tensor for item in unpack(request.layout, request.payload)}
    contents = manifest.restore(request.message.body, tensors)
    keys = [entry.key for entry in contents.entries]
    if contents.kind == "store" and request.message.metadata.keys() != set(json_keys(keys)):
        raise ArgumentError("malformed restore; expected the metadata of each key")
    released = [] if contents.releases is None else [each.entries for each in contents.releases.held]
    for entry in {id(each): each for own in (contents.entries, *released) for each in own}.values():
        # The client reuses the memory of this payload for its next request. Tables have copied their rows.
        if isinstance(entry.value, torch.Tensor):
            entry.value = entry.value.clone()
        entry.state = {name: tensor.clone() for name, tensor in entry.state.items()}
    return contents


def released_metadata(contents: Contents) -> list[Any]:
    """Return the metadata of the values of contents that only releases have."""
    held = [] if contents.releases is None else contents.releases.held
    return [each.note for release in held for each in release.entries if isinstance(each, FrozenEntry)]
