"""The inits, pushes and pulls of a client: values are cut by server, and put together again."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays import interop, rows
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, decode_layout, encode_layout, pack, unpack, views
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows, unchecked_rows
from tensorkv.arrays.slices import Slices
from tensorkv.compression import Codec, Compressor, Owed, Sending, Source, Words
from tensorkv.errors import KeyNotFoundError, OptimizerError, ValueMismatchError, WaitTimeoutError, quote
from tensorkv.runtime.recent import Recent
from tensorkv.shard import native, reduce
from tensorkv.shard.entry import Batch, Part
from tensorkv.shard.nonfinite import NonFinitePolicy
from tensorkv.shard.norm import Clipping, PushResult
from tensorkv.shard.optimizers import ROWWISE
from tensorkv.shard.pool import Pool
from tensorkv.shard.rules import Assign, Rule, StepOptimizer, check_push
from tensorkv.storage.changes import slice_items

from ..messages import CheckSlices, EndRead, Init, Pull, PullRows, Push, pulled_dtype, words_item
from .coded import CodedLayout
from .keymap import KeyMap
from .layout import Arrays, KeyPlacement, Layout, PlacedKey, PlacedKeys, ServerLayout, describe, list_name
from .rpc import ServerReply
from .session import ServerRequest, Session, SessionPool

Outs = Sequence[Sequence[torch.Tensor]]
# Lists of keys whose compressed pushes are remembered.
_MAX_CODED = 64
# Values of up to so many bytes are created with room for a reply of the same size.
_MAX_ROOM_NBYTES = 1 << 29


class PlainCall(NamedTuple):
    """A call whose arrays are plain: what ``native.look`` has seen of them, and how its keys lie over servers."""

    batch: native.Batch
    layout: Layout
    verb: str
    scale: float | None
    result: PushResult
    snapshot: str | None

    @property
    def pulls(self) -> bool:
        """Whether outs are filled."""
        return self.verb != "push"


class DataClient:
    """Makes the inits, pushes and pulls of one client.

    Args:
        sessions: with the servers.
        keymap: of the store.
        same_host: of each server, whether it may be on this host.
        is_sync: whether the sums of several workers are added before they are rounded, in rounds.
        nonfinite: checks sums before they are sent, so that no server refuses what another has applied.
        averages: whether a push takes the means of parts.
    """

    def __init__(
        self,
        sessions: SessionPool,
        keymap: KeyMap,
        same_host: Sequence[bool],
        *,
        is_sync: bool,
        nonfinite: NonFinitePolicy,
        averages: bool,
    ) -> None:
        self._sessions, self._keymap, self._same_host, self._is_sync = sessions, keymap, list(same_host), is_sync
        self._nonfinite, self._averages = nonfinite, averages
        self._pool = Pool()
        self._rounds = RoundNumbers()
        self.last_push = PushResult()
        """What was found out about the last push."""
        self.compressor = Compressor()
        """Of the gradients of this worker, by key and server."""
        self._coded: Recent[Layout, CodedLayout] = Recent(_MAX_CODED)
        self._compressing = threading.Lock()

    @property
    def pull_dtype(self) -> str | None:
        """The dtype in which values of float32 and float64 are pulled (None: in their own)."""
        return self._keymap.placed.pull_dtype

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    # ------------------------------------------------------------ compression

    def set_compression(self, codec: Codec | None, keys: Sequence[Key]) -> None:
        """Compress with another codec, after what gradients still owe was pushed.

        Args:
            codec: None: gradients are sent as they are.
            keys: of which rank 0 owes something: in mode sync all workers push these.
        """
        with self._compressing:
            self.compressor.change(codec, partial(self._push_owed, keys))

    def _push_owed(self, keys: Sequence[Key], owed: Mapping[Key, Sequence[torch.Tensor]]) -> None:
        # A value that is assigned owes nothing.
        if isinstance(self._keymap.rule, Assign):
            return
        chosen = list(keys) if self._is_sync else list(owed)
        specs = {key: self._keymap.find("set_gradient_compression", key).spec for key in chosen}
        zeros = {
            key: torch.zeros(spec.shape, dtype=torch.float32, device="cpu")
            for key, spec in specs.items()
            if key not in owed
        }
        parts: list[list[Part]] = [
            [zeros[key] if key in zeros else _joined(owed[key]).to(specs[key].dtype)] for key in chosen
        ]
        if chosen:
            self.push(Batch("set_gradient_compression", chosen, parts), None)

    def owed(self, rank: int) -> dict[Source, Owed]:
        """Return what this worker owes, as of whole values, under its rank."""
        found: dict[Source, Owed] = {}
        with self._compressing:
            # Copies: the pushes of other threads use this memory again.
            pieces = {
                source: Owed(each.residual.copy(), {name: array.copy() for name, array in each.memory.items()})
                for source, each in self.compressor.owed.items()
            }
        for key in dict.fromkeys(key for key, _ in pieces):
            if key not in self._keymap:
                continue
            placement = self._keymap.find("save", key)
            own = [pieces[key, server] for server in placement.servers if (key, server) in pieces]
            if len(own) == len(placement.servers):
                # What a codec remembers of a piece is of no use for a whole.
                residuals, memory = [each.residual for each in own], own[0].memory if len(own) == 1 else {}
                found[key, rank] = Owed(np.concatenate(residuals) if len(own) > 1 else residuals[0], memory)
        return found

    def take_owed(self, owed: Mapping[Source, Owed]) -> None:
        """Owe what a checkpoint says that this worker owes."""
        pieces: dict[Source, Owed] = {}
        for (key, _), each in owed.items():
            placement = self._keymap.find("load", key)
            for server in placement.servers:
                mine = placement.slice_of(server, torch.from_numpy(each.residual))
                if mine is not None:
                    memory = each.memory if len(placement.servers) == 1 else {}
                    pieces[key, server] = Owed(mine.clone().numpy(), memory)
        with self._compressing:
            self.compressor.owed = pieces

    def forget(self, keys: Sequence[Key]) -> None:
        """Drop what is owed of keys that were deleted."""
        with self._compressing:
            self.compressor.forget(keys)

    # ------------------------------------------------------------ init

    def init(
        self, keys: Sequence[Key], values: Sequence[Part], placed: Sequence[PlacedKey]
    ) -> dict[int, dict[str, Any]]:
        """Create keys with values, of which each server gets its pieces; return the replies by server."""
        requests = []
        if any(isinstance(value, Rows) for value in values):
            totals = [rows.merge([value], may_share=True) if isinstance(value, Rows) else value for value in values]
            for server in _servers_of([each.placement for each in placed]):
                mine = [index for index, each in enumerate(placed) if server in each.placement.servers]
                items = [item for i in mine for item in _items(keys[i], placed[i].placement, totals[i], server)]
                message = _init_of(mine, keys, placed)
                requests.append(ServerRequest.of_tensors(server, message, pack(items)))
        else:
            new = PlacedKeys(zip(keys, placed, strict=True))
            parts: Any = new.look(keys, parts=values)
            if parts is values:
                parts = [[value] for value in values]
            for each in new.layout(keys).pushed:
                message = _init_of(each.indices.tolist(), keys, placed)
                fill = partial(each.gather, parts=parts, pool=self._pool)
                # A pushpull of all keys then finds its memory: the first touch of memory costs twenty copies.
                room = each.nbytes if each.nbytes <= _MAX_ROOM_NBYTES else 0
                requests.append(ServerRequest(each.server, message, each.layout, each.nbytes, fill, room))
        with self._sessions.take() as session:
            replies = session.send(requests)
            return {request.server: reply.head for request, reply in zip(requests, replies, strict=True)}

    # ------------------------------------------------------------ calls of plain arrays

    def prepare(self, call: native.Call, placed: PlacedKeys | None = None) -> PlainCall | None:
        """Return what to send for a call if all of its arrays are plain, with its sums checked and scaled.

        Args:
            call: what the caller asked for.
            placed: the keys of a snapshot (None: the present ones).
        """
        if placed is None:
            placed = self._keymap.placed
        pushes = call.verb != "pull"
        if not native.can_look():
            return None
        batch = call.look(placed)
        if batch is None:
            return None
        layout, rule = placed.layout(batch.keys), self._keymap.rule
        if pushes and self.compressor.codec is not None and not self._can_code(layout, rule):
            return None
        takes_all = layout.is_floating and isinstance(rule, StepOptimizer) and rule.optimizer.spec.name in ROWWISE
        if pushes and not isinstance(rule, Assign) and not takes_all:
            # Each value has to be checked.
            return None
        if pushes and self._averages and not (batch.average() if not self._is_sync else layout.is_floating):
            return None
        # Outs that would not stay in the cache are stored past it.
        batch.begin(native.leaves_cache(batch.nbytes))
        if not pushes:
            return PlainCall(batch, layout, call.verb, None, PushResult(), placed.snapshot)
        clipping = self._clipping(rule)
        decided = self._nonfinite.decide_plain(batch, clipping, self._pool)
        if decided is None:
            return None
        scale, result = decided
        return PlainCall(batch, layout, call.verb, None if clipping is None else scale, result, placed.snapshot)

    def _can_code(self, layout: Layout, rule: Rule) -> bool:
        """Return whether nothing has to be decided on gradients that are all compressed."""
        decides = not self._is_sync and (self._nonfinite.checks or rule.clipping is not None)
        return not decides and layout.can_code

    def _clipping(self, rule: Rule) -> Clipping | None:
        """Return how the gradients of a push are clipped here; in mode sync the server does it."""
        return None if self._is_sync else rule.clipping

    def push_plain(self, call: PlainCall) -> None:
        """Push; pull if there are outs."""
        # Of a push that is refused nothing is told.
        self.last_push = PushResult()
        with self._compressing:
            coded, sending = self._encode_plain(call)
        if coded is None or sending is None:
            told = self._exchange(call.layout, call.batch, call.batch if call.pulls else None, call.scale)
        else:
            told = self._exchange_coded(call, coded, sending)
        self.last_push = told or call.result
        call.batch.finish()

    def _encode_plain(self, call: PlainCall) -> tuple[CodedLayout | None, Sending | None]:
        """Return the words of plain gradients, which count as sent, and how they lie; None: they are not compressed."""
        codec = self.compressor.codec
        if codec is None:
            return None, None
        coded = self._coded.get(call.layout)
        if coded is None or coded.words.codec != codec:
            coded = CodedLayout(call.layout, codec)
            self._coded.keep(call.layout, coded, len(coded.sources), len(self._keymap.placed))
        sending = self.compressor.encode_all(call.verb, coded.sources, coded.gradients.of(call.batch))
        self.compressor.keep(sending)
        return coded, sending

    def _exchange_coded(self, call: PlainCall, coded: CodedLayout, sending: Sending) -> PushResult | None:
        """Push the words of plain gradients, and fill the outs with the new values."""
        codec, requests = coded.words.codec.to_json(), []
        for each, pulled in zip(coded.servers, call.layout.pulled, strict=True):
            message = Push(counts=self._counts(call.batch, each.indices), codec=codec)
            if call.pulls:
                message.pulls, message.checksum, message.pull_dtype = True, pulled.checksum, call.layout.pull_dtype
            words = torch.from_numpy(sending.words[each.place])
            reply_nbytes = pulled.nbytes if call.pulls else 0
            requests.append(
                ServerRequest(each.server, message, each.layout, len(words), partial(_fill, words), reply_nbytes)
            )
        try:
            with self._sessions.take() as session:
                replies = self._send_push(session, call.layout.name if self._is_sync else "", requests)
                for pulled, reply in zip(call.layout.pulled, replies, strict=True):
                    if call.pulls:
                        pulled.scatter(reply.payload, call.batch, self._pool)
        except BaseException as error:
            self._settle(sending, error)
            raise
        self._settle(sending)
        if call.pulls:
            self._count_pulled(call.layout)
        return _result_of(replies)

    def _settle(
        self, sending: Sending, error: BaseException | None = None, left_out: Collection[Key] = frozenset()
    ) -> None:
        """Let gradients count as sent if their push was applied, and otherwise owe what was owed before.

        Args:
            sending: the gradients.
            error: that the push has raised.
            left_out: keys that were not pushed.
        """
        with self._compressing:
            if error is not None and not (isinstance(error, WaitTimeoutError) and error.applied):
                self.compressor.undo(sending)
                return
            self.compressor.undo(sending, keys=left_out)
            self.compressor.end(sending, without=left_out)

    def pull_plain(self, call: PlainCall) -> None:
        """Fill outs with values."""
        self._pull(call.layout, call.batch, call.snapshot)
        call.batch.finish()

    # ------------------------------------------------------------ push

    def push(self, batch: Batch, outs: Outs | None) -> None:
        """Push a batch; with outs, pull its keys."""
        placed = self._keymap.having(batch.verb, batch.keys)
        entries = [placed.entry(key) for key in batch.keys]
        check_push(batch, entries, self._keymap.rule, self._averages)
        clipping = self._clipping(self._keymap.rule)
        # Of a push that is refused nothing is told.
        self.last_push = PushResult()
        if batch.has_slices:
            self._push_slices(batch, outs, placed, clipping)
            return
        if self.compressor.codec is not None:
            self._push_coded(batch, outs, placed, clipping)
            return
        if self._is_sync or not (self._nonfinite.checks or self._averages or clipping is not None):
            self.last_push = self._push_checked(batch, outs, placed, None) or PushResult()
            return
        decided = self._nonfinite.decide(
            batch,
            entries,
            self._averages,
            clipping,
            lambda entry, parts, divisor: self._sum(placed[entry.key].placement, parts, divisor),
        )
        chosen = Batch(batch.verb, [entry.key for entry in decided.entries], decided.sums)
        is_whole = len(chosen.keys) == len(batch.keys)
        scale = None if clipping is None else decided.scale
        if chosen.keys:
            self._push_checked(chosen, outs if is_whole else None, placed, scale)
        if not is_whole:
            self.pull(batch.keys, outs or ())
        self.last_push = decided.result

    def _push_checked(
        self, batch: Batch, outs: Outs | None, placed: PlacedKeys, scale: float | None
    ) -> PushResult | None:
        """Push checked parts, with a scale of their gradients; return a server's result if it has checked sums."""
        if any(isinstance(part, Rows) for parts in batch.parts for part in parts):
            told = self._push_rows(batch, placed, scale, must_complete=outs is not None)
            if outs is not None:
                self.pull(batch.keys, outs)
            return told
        parts = placed.look(batch.keys, parts=batch.parts)
        targets = None if outs is None else placed.look(batch.keys, outs=outs)
        return self._exchange(placed.layout(batch.keys), parts, targets, scale)

    def _push_coded(self, batch: Batch, outs: Outs | None, placed: PlacedKeys, clipping: Clipping | None) -> None:
        """Push the words of checked parts, and Rows of tables as they are."""
        placements = [placed[key].placement for key in batch.keys]
        # In mode sync the server takes the means.
        divisors = batch.divisors(self._averages and not self._is_sync)
        totals: dict[Key, Part] = {
            key: self._sum(each, parts, divisor) if each.spec.is_table else reduce.unrounded(each.spec, parts, divisor)
            for key, each, parts, divisor in zip(batch.keys, placements, batch.parts, divisors, strict=True)
        }
        sources, pieces = [], []
        for key, each in zip(batch.keys, placements, strict=True):
            for server in () if each.spec.is_table else each.servers:
                sources.append((key, server))
                pieces.append(_piece(each, server, totals[key]))
        with self._compressing:
            sending = None if self.compressor.codec is None else self.compressor.encode(batch.verb, sources, pieces)
            if sending is not None:
                self.compressor.keep(sending)
        if sending is None:
            # Another thread has just taken the codec away.
            self.push(batch, outs)
            return
        left_out: set[Key] = set()
        try:
            left_out, scale, result = self._decide_coded(batch, placed, totals, sending, clipping)
            keys = [key for key in batch.keys if key not in left_out]
            coded = {source: sending.words_of(index) for index, source in enumerate(sources)}
            codec = sending.layout.codec
            requests = self._item_requests(batch, placed, totals, coded, scale, left_out, codec=codec)
            is_whole = outs is not None and not left_out and len({key for key, _ in sources}) == len(keys)
            told = self._send_coded(keys, requests, outs if is_whole else None, placed) if keys else None
        except BaseException as error:
            self._settle(sending, error, left_out)
            raise
        self._settle(sending, left_out=left_out)
        if outs is not None and not is_whole:
            self.pull(batch.keys, outs)
        self.last_push = told or result

    def _decide_coded(
        self,
        batch: Batch,
        placed: PlacedKeys,
        totals: Mapping[Key, Part],
        sending: Sending,
        clipping: Clipping | None,
    ) -> tuple[set[Key], float | None, PushResult]:
        """Return which keys are left out, a scale of the gradients that arrive, and what the caller is told."""
        if self._is_sync or not (self._nonfinite.checks or clipping is not None):
            return set(), None, PushResult()
        decoded = dict(zip(sending.sources, sending.decoded(), strict=True))
        arrived: list[list[Part]] = []
        for key in batch.keys:
            placement = placed[key].placement
            pieces = [] if placement.spec.is_table else [decoded[key, server] for server in placement.servers]
            # As a shard makes sums, on which it decides.
            arrived.append([_joined(pieces).to(placement.spec.dtype) if pieces else totals[key]])
        entries = [placed.entry(key) for key in batch.keys]
        decided = self._nonfinite.decide(
            Batch(batch.verb, batch.keys, arrived), entries, False, clipping, lambda _, parts, **__: parts[0]
        )
        chosen = {entry.key for entry in decided.entries}
        return set(batch.keys) - chosen, None if clipping is None else decided.scale, decided.result

    def _item_requests(
        self,
        batch: Batch,
        placed: PlacedKeys,
        totals: Mapping[Key, Part],
        coded: Mapping[Source, Words],
        scale: float | None,
        left_out: Collection[Key] = (),
        *,
        codec: Codec | None = None,
        must_complete: bool = False,
    ) -> list[ServerRequest]:
        """Return a push to each server that holds pieces of a batch's keys, with an item for each piece.

        Args:
            batch: whose keys.
            placed: of these keys.
            totals: the sums of their parts.
            coded: the words of pieces that are sent instead, by key and server.
            scale: of the gradients.
            left_out: keys that are not pushed.
            codec: that has made the words.
            must_complete: as of ``Push``.
        """
        described = None if not coded or codec is None else codec.to_json()
        placements = {place: placed[key].placement for place, key in enumerate(batch.keys) if key not in left_out}
        requests = []
        for server in _servers_of(list(placements.values())):
            items: list[Item] = []
            held = [place for place, each in placements.items() if each.piece_of(server) is not None]
            for place in held:
                key = batch.keys[place]
                words = coded.get((key, server))
                if words is None:
                    items += _items(key, placements[place], totals[key], server)
                else:
                    items.append(words_item(key, words))
            counts = self._counts(batch.parts, held)
            message = Push(counts=counts, scale=scale, codec=described, must_complete=must_complete)
            requests.append(ServerRequest.of_tensors(server, message, pack(items)))
        return requests

    def _send_coded(
        self, keys: Sequence[Key], requests: Sequence[ServerRequest], outs: Outs | None, placed: PlacedKeys
    ) -> PushResult | None:
        """Send words; fill outs with the new values, in one trip; return what a server has found out."""
        targets, pulled = None, {}
        if outs is not None:
            targets = placed.look(keys, outs=outs)
            pulled = {each.server: each for each in placed.layout(keys).pulled}
            requests = [
                _with(each, pulls=True, checksum=pulled[each.server].checksum, pull_dtype=placed.pull_dtype)._replace(
                    reply_nbytes=pulled[each.server].nbytes
                )
                for each in requests
            ]
        with self._sessions.take() as session:
            replies = self._send_push(session, list_name(keys) if self._is_sync else "", requests)
            for request, reply in zip(requests, replies, strict=True):
                if targets is not None:
                    pulled[request.server].scatter(reply.payload, targets, self._pool)
        if targets is not None:
            self._count_pulled(placed.layout(keys))
        return _result_of(replies)

    def _counts(self, parts: Arrays | Sequence[Sequence[Part]], chosen: Any) -> list[int] | None:
        """Return how many parts some of the keys have, if servers need it to take means."""
        if not self._averages or not self._is_sync:
            return None
        if isinstance(parts, Sequence):
            counts = np.array([len(each) for each in parts])
        else:
            counts = np.frombuffer(parts.part_counts, np.int64)
        found: list[int] = counts[chosen].tolist()
        return found

    def _exchange(self, layout: Layout, parts: Arrays, outs: Arrays | None, scale: float | None) -> PushResult | None:
        """Push dense sums, and fill the outs with the new values."""
        requests = []
        for pushed, pulled in zip(layout.pushed, layout.pulled, strict=True):
            fill = partial(pushed.gather, parts=parts, pool=self._pool)
            own = self._counts(parts, pushed.indices)
            message = Push(counts=own, scale=scale)
            if outs is not None:
                message.pulls, message.checksum, message.pull_dtype = True, pulled.checksum, layout.pull_dtype
            reply_nbytes = 0 if outs is None else pulled.nbytes
            requests.append(ServerRequest(pushed.server, message, pushed.layout, pushed.nbytes, fill, reply_nbytes))
        with self._sessions.take() as session:
            replies = self._send_push(session, layout.name if self._is_sync else "", requests)
            if outs is not None:
                for pulled, reply in zip(layout.pulled, replies, strict=True):
                    pulled.scatter(reply.payload, outs, self._pool)
                self._count_pulled(layout)
        return _result_of(replies)

    def _push_rows(
        self, batch: Batch, placed: PlacedKeys, scale: float | None, *, must_complete: bool
    ) -> PushResult | None:
        totals = {
            key: self._sum(placed[key].placement, parts) for key, parts in zip(batch.keys, batch.parts, strict=True)
        }
        requests = self._item_requests(batch, placed, totals, {}, scale, must_complete=must_complete)
        with self._sessions.take() as session:
            name = list_name(batch.keys) if self._is_sync else ""
            return _result_of(self._send_push(session, name, requests))

    def _push_slices(self, batch: Batch, outs: Outs | None, placed: PlacedKeys, clipping: Clipping | None) -> None:
        """Push keys of which some have slices; servers update a value when they have been told of all its slices."""
        if self.compressor.codec is not None:
            batch.refuse_slices("cannot be compressed; set_gradient_compression(None) has parts pushed as they are")
        if len(self._same_host) > 1 and (self._nonfinite.skips or clipping is not None):
            batch.refuse_slices('cannot be checked by several servers; with nonfinite="skip" or max_grad_norm use one')
        # In mode sync the server takes the means.
        divisors = batch.divisors(self._averages and not self._is_sync)
        totals: dict[Key, Any] = {
            key: parts[0].to(placed[key].spec.dtype)
            if isinstance(parts[0], Slices)
            else self._sum(placed[key].placement, parts, divisor)
            for key, parts, divisor in zip(batch.keys, batch.parts, divisors, strict=True)
        }
        for key, total in totals.items():
            # Of whole arrays, servers check the sums over workers.
            if isinstance(total, Slices) or not self._is_sync:
                self._nonfinite.check_part(batch.name(key), total)
        requests = self._item_requests(batch, placed, totals, {}, None, must_complete=outs is not None)
        with self._sessions.take() as session:
            if len(requests) > 1:
                # One server may have to refuse what others would apply. In mode sync it knows of this worker's alone.
                complete = outs is not None and not self._is_sync
                self._send(session, self._slice_checks(totals, placed, must_complete=complete))
            name = list_name(batch.keys) if self._is_sync else ""
            self.last_push = _result_of(self._send_push(session, name, requests)) or PushResult()
        if outs is not None:
            self.pull(batch.keys, outs)

    def _slice_checks(
        self, totals: Mapping[Key, Any], placed: PlacedKeys, *, must_complete: bool
    ) -> list[ServerRequest]:
        """Return for each server the question whether it takes the slices of a push."""
        items: dict[int, list[Item]] = {}
        for key, own in totals.items():
            for server, first, stop in placed[key].placement.pieces if isinstance(own, Slices) else ():
                bounds = own.within(first, stop).to_bounds()
                items.setdefault(server, []).append(Item(key, "bounds", bounds))
        message = CheckSlices(must_complete=must_complete)
        return [ServerRequest.of_tensors(server, message, pack(own)) for server, own in items.items()]

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

    def _sum(self, placement: KeyPlacement, parts: Sequence[Part], divisor: int = 1) -> Part:
        """Return the sum of the parts of a call, divided, in the dtype in which it travels."""
        dtype = placement.spec.dtype
        wide = interop.accumulator(dtype) if self._is_sync else dtype
        if not all(isinstance(part, Rows) for part in parts):
            dense = [part.to_dense(interop.accumulator(dtype)) if isinstance(part, Rows) else part for part in parts]
            total = torch.empty(placement.spec.shape, dtype=wide, device="cpu")
            reduce.sum_into(total, dense, divisor)
            return total
        on_cpu: Any = [part if part.values.is_cpu and part.ids.is_cpu else part.to("cpu") for part in parts]  # type: ignore[union-attr]
        if not self._is_sync:
            return rows.merge(on_cpu, dtype, may_share=True, divisor=divisor)
        # The server adds the rows of all workers in one order, which is not that of the sums of each.
        ids, values = torch.cat([part.ids for part in on_cpu]), torch.cat([part.values.to(wide) for part in on_cpu])
        return unchecked_rows(ids, values, placement.spec.shape[0])

    # ------------------------------------------------------------ pull

    def pull(self, keys: Sequence[Key], outs: Outs, placed: PlacedKeys | None = None) -> None:
        """Fill outs with the values of keys; keys without outs are skipped.

        Args:
            keys, outs: of the call.
            placed: the keys of a snapshot (None: the present ones).
        """
        listed = [(key, own) for key, own in zip(keys, outs, strict=False) if own]
        if listed:
            named, wanted = [key for key, _ in listed], [own for _, own in listed]
            if placed is None:
                placed = self._keymap.having("pull", named)
            self._pull(placed.layout(named), placed.look(named, outs=wanted), placed.snapshot)

    def _pull(self, layout: Layout, outs: Arrays, snapshot: str | None) -> None:
        """Pull values; retry once with fresh metadata if another client re-created a key on other servers."""
        try:
            self._pull_once(layout, outs, snapshot)
        except (KeyNotFoundError, ValueMismatchError) as error:
            if snapshot is not None:
                raise
            fresh = self._keymap.layout("pull", layout.keys)
            for key, before, after in zip(layout.keys, layout.placements, fresh.placements, strict=True):
                old, new = before.spec, after.spec
                if old != new:
                    raise ValueMismatchError(
                        f"pull({quote(key)}): another client has re-created this key; it was {old.dtype} "
                        f"{tuple(old.shape)} and is {new.dtype} {tuple(new.shape)}; call again, with arrays that fit"
                    ) from error
            self._pull_once(fresh, outs, None)

    def _pull_once(self, layout: Layout, outs: Arrays, snapshot: str | None) -> None:
        near = [each for each in layout.pulled if self._same_host[each.server] and each.is_read_in_place]
        if layout.pull_dtype is not None:
            near = []
        with self._sessions.take() as session:
            found: dict[int, Any] = {}
            # Before the last reply is here no out is written: the wait for it may fail, or be interrupted.
            asked = [self._pull_request(layout, each, snapshot, in_place=each in near) for each in layout.pulled]
            begun = []
            for each, reply in zip(layout.pulled, self._send(session, asked), strict=True):
                if each not in near:
                    found[each.server] = reply.payload
                elif reply.head["in_place"] is not None:
                    begun.append(each)
                    # A read that was begun is ended also where the memory cannot be opened here.
                    with suppress(OSError):
                        found[each.server] = session.values_in_place(each.server, reply)
            found |= self._pull_copies(session, layout, [each for each in near if each.server not in found], snapshot)
            read = set()
            for each in layout.pulled:
                with suppress(OSError) if each in near else nullcontext():
                    each.scatter(found[each.server], outs, self._pool)
                    read.add(each.server)
            ends = [ServerRequest(each.server, EndRead(snapshot=snapshot)) for each in begun]
            for each, end in zip(begun, session.outcomes(ends) if ends else (), strict=True):
                if isinstance(end, Exception) or not end.head["held"]:
                    read.discard(each.server)
            # They could not be read, or may have been changed meanwhile.
            lost = [each for each in layout.pulled if each.server not in read]
            copies = self._pull_copies(session, layout, lost, snapshot)
            for each in lost:
                each.scatter(copies[each.server], outs, self._pool)
        self._count_pulled(layout)

    def _pull_request(
        self, layout: Layout, pulled: ServerLayout, snapshot: str | None, *, in_place: bool = False
    ) -> ServerRequest:
        message = Pull(checksum=pulled.checksum, pull_dtype=layout.pull_dtype, snapshot=snapshot, in_place=in_place)
        nbytes = 16 * pulled.num_keys if in_place else pulled.nbytes
        return ServerRequest(pulled.server, message, pulled.keys, reply_nbytes=nbytes)

    def _pull_copies(
        self, session: Session, layout: Layout, wanted: Sequence[ServerLayout], snapshot: str | None
    ) -> dict[int, torch.Tensor]:
        """Return copies of values, by server."""
        if not wanted:
            return {}
        replies = self._send(session, [self._pull_request(layout, each, snapshot) for each in wanted])
        return {each.server: reply.payload for each, reply in zip(wanted, replies, strict=True)}

    def _count_pulled(self, layout: Layout) -> None:
        """Count pulled values if they travel in fewer bytes than they have."""
        if layout.pull_dtype is not None:
            nbytes = sum(each.nbytes for each in layout.pulled), sum(each.raw_nbytes for each in layout.pulled)
            with self._compressing:
                self.compressor.traffic.add_received(*nbytes)

    def pull_regions(
        self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs, placed: PlacedKeys | None = None
    ) -> None:
        """Fill outs with parts of the values of keys; ``placed`` is as for ``pull``."""
        if placed is None:
            placed = self._keymap.having("pull", keys)
        placements = [placed[key].placement for key in keys]
        requests, layouts, chosen = [], [], []
        for server in _servers_of(placements):
            found = [each.region_of(server, region) for each, region in zip(placements, regions, strict=True)]
            wanted = [(index, *own) for index, own in enumerate(found) if own is not None and outs[index]]
            if not wanted:
                continue
            layout = encode_layout(
                (keys[index], "region", pulled_dtype(placements[index].spec.dtype, placed.pull_dtype), own.shape)
                for index, own, _ in wanted
            )
            message = Pull(
                checksum=zlib.crc32(layout),
                pull_dtype=placed.pull_dtype,
                snapshot=placed.snapshot,
                regions=[own.bounds for _, own, _ in wanted],
            )
            slots = decode_layout(layout)
            named = json.dumps([keys[index] for index, _, _ in wanted]).encode()
            requests.append(ServerRequest(server, message, named, reply_nbytes=slots[-1].stop))
            layouts.append(slots)
            chosen.append(wanted)
        with self._sessions.take() as session:
            for reply, slots, wanted in zip(self._send(session, requests), layouts, chosen, strict=True):
                for part, (index, own, first) in zip(views(reply.payload, slots), wanted, strict=True):
                    for out in outs[index]:
                        out[first : first + own.shape[0]].copy_(part)
                    if placed.pull_dtype is not None:
                        itemsize = placements[index].spec.dtype.itemsize
                        with self._compressing:
                            self.compressor.traffic.add_received(part.nbytes, part.numel() * itemsize)

    def pull_rows(
        self, keys: Sequence[Key], ids: Sequence[torch.Tensor], placed: PlacedKeys | None = None
    ) -> list[Rows]:
        """Return copies of rows; ids are unique and sorted, ``placed`` is as for ``pull``."""
        if placed is None:
            placed = self._keymap.having("row_sparse_pull", keys)
        placements = [placed[key].placement for key in keys]
        found = [
            torch.empty((len(own), *each.spec.shape[1:]), dtype=each.spec.dtype, device="cpu")
            for each, own in zip(placements, ids, strict=True)
        ]
        requests, chosen = [], []
        for server in _servers_of(placements):
            items, wanted, nbytes = [], [], 0
            for index, (key, placement, own) in enumerate(zip(keys, placements, ids, strict=True)):
                selected = placement.rows_of(server, own.cpu())
                if selected is not None:
                    items.append(Item(key, "ids", selected[0]))
                    wanted.append((index, len(selected[0]), selected[1]))
                    # Before the rows of each key, as much as it takes to align them.
                    nbytes += found[index].itemsize + len(selected[0]) * found[index][:1].nbytes
            message = PullRows(pull_dtype=placed.pull_dtype, snapshot=placed.snapshot)
            requests.append(ServerRequest.of_tensors(server, message, pack(items), nbytes))
            chosen.append(wanted)
        with self._sessions.take() as session:
            replies = self._send(session, requests)
            for reply, wanted in zip(replies, chosen, strict=True):
                items = unpack(reply.head["layout"].encode(), reply.payload.numpy().data)
                for item, (index, count, places) in zip(items, wanted, strict=True):
                    values, target = item.tensor, found[index]
                    kind = pulled_dtype(target.dtype, placed.pull_dtype), (count, *target.shape[1:])
                    if (values.dtype, values.shape) != kind:
                        self._keymap.refresh()
                        raise ValueMismatchError(
                            f"row_sparse_pull({quote(keys[index])}): another client has re-created this key; call again"
                        )
                    if places is None:
                        target.copy_(values)
                    else:
                        interop.signed(target).index_copy_(0, places, interop.signed(values.to(target.dtype)))
                    if placed.pull_dtype is not None:
                        with self._compressing:
                            self.compressor.traffic.add_received(values.nbytes, values.numel() * target.itemsize)
        return [unchecked_rows(own, each, p.spec.shape[0]) for own, each, p in zip(ids, found, placements, strict=True)]

    def _send(self, session: Session, requests: Sequence[ServerRequest], *, retry: bool = False) -> list[ServerReply]:
        try:
            return session.send(requests, retry=retry)
        except (KeyNotFoundError, OptimizerError, ValueMismatchError):
            # Another client has deleted or re-created a key, or changed the rule.
            self._keymap.refresh()
            raise


def _fill(words: torch.Tensor, room: torch.Tensor) -> None:
    room.copy_(words)


def _result_of(replies: Sequence[ServerReply]) -> PushResult | None:
    """Return what a server has found out about a push; several servers do not look at sums in mode sync."""
    told = replies[0].head.get("result") if replies else None
    return None if told is None else PushResult(*told)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a value of its pieces, by server."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


def _piece(placement: KeyPlacement, server: int, total: Part) -> Any:
    """Return what a server gets of a dense sum."""
    return placement.slice_of(server, total) if isinstance(total, torch.Tensor) else total


def _servers_of(placements: Sequence[KeyPlacement]) -> list[int]:
    return sorted({server for each in placements for server in each.servers})


def _init_of(indices: Sequence[int], keys: Sequence[Key], placed: Sequence[PlacedKey]) -> Init:
    """Return the message that creates some of the keys."""
    return Init(**describe([keys[i] for i in indices], [placed[i] for i in indices]))


def _with(request: ServerRequest, **fields: Any) -> ServerRequest:
    return request._replace(message=replace(request.message, **fields))


def _items(key: Key, placement: KeyPlacement, total: Part, server: int) -> list[Item]:
    """Return what a server gets of the sum for a key."""
    if isinstance(total, torch.Tensor):
        piece = placement.slice_of(server, total)
        return [] if piece is None else [Item(key, "sum", piece)]
    if isinstance(total, Slices):
        # Every server that holds some rows learns of all slices.
        rows_held = placement.piece_of(server)
        return [] if rows_held is None else slice_items(key, total.within(*rows_held))
    selected = placement.rows_of(server, total.ids)
    if selected is None:
        return []
    ids, places = selected
    values = total.values if places is None else interop.signed(total.values).index_select(0, places)
    return [Item(key, "ids", ids), Item(key, "rows", values.view(total.values.dtype))]


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
