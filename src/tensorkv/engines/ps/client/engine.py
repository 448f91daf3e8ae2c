"""The Ray engine: parameter servers, each an actor with a shard; workers anywhere in the cluster."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tensorkv import errors
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, pack
from tensorkv.arrays.rows import Rows, merge
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.base import Engine, Outs
from tensorkv.engines.ps.ray import cluster, server_stats
from tensorkv.errors import (
    ArgumentError,
    OptimizerError,
    ServerLostError,
    TensorKVError,
    ValueMismatchError,
    WaitTimeoutError,
    quote,
)
from tensorkv.runtime import forks, shield
from tensorkv.shard.entry import Batch, Entry, KeyInfo, Part
from tensorkv.shard.nonfinite import FiniteSums
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec
from tensorkv.shard.rules import Assign, StepOptimizer, Updater
from tensorkv.shard.table import Table
from tensorkv.storage import manifest
from tensorkv.storage.manifest import Kind
from tensorkv.transport.rendezvous import host_id
from tensorkv.transport.segment import can_share
from tensorkv.transport.wire import Settings

from . import checkpoint, layout
from .data import Traffic, letter_of
from .keymap import Directory
from .layout import Held
from .rpc import Answer, Link
from .session import Lane, Lanes, Letter
from .snapshot import Moment, Moments

_BEAT_S = 1.0

# The clients of this process that have not been closed. Each is kept alive by its own heartbeat.
_open: set[RayEngine] = set()


def close_abandoned() -> None:
    """Close the clients of this process whose store has been dropped, before anything depends on who is there."""
    for engine in list(_open):
        if engine.is_abandoned and engine.forks == forks.count:
            engine.close()


class StoreEndingError(ServerLostError):
    """A store that its last client has closed: its servers end now, and others can be started."""


class RayEngine(Engine):
    """A client of parameter servers.

    Args:
        actors: the servers.
        settings: of the store; of each server but for its index and folder.
        places: of the servers.
        timeout_s: how long to wait for servers and other workers.
        started: whether this process has started the Ray cluster.
    """

    capabilities = frozenset({"optimizer", "rows", "checkpoint", "snapshot"})

    def __init__(
        self, actors: Sequence[Any], settings: Settings, places: Sequence[Any], timeout_s: float, *, started: bool
    ) -> None:
        self._actors, self._settings, self._timeout_s, self._started = list(actors), settings, timeout_s, started
        self._near = [can_share() and place[0] == host_id() for place in places]
        self._owner = secrets.token_hex(8)
        self._rank: int | None = None
        self._lanes = Lanes(self._make_lane)
        self._directory = Directory(len(actors), self._list, wide=settings.mode == "sync")
        in_step = settings.mode == "sync"
        # In step, sums are known to the servers alone.
        self._finite = FiniteSums("pass" if in_step else settings.nonfinite)
        self._traffic = Traffic(self._lanes, self._directory, self._near, in_step=in_step, finite=self._finite)
        self._moment = Moments(self._lanes, self._traffic, len(actors))
        self._claiming, self._claims = threading.Lock(), 0
        self._ranking = threading.Lock()
        self._all = range(len(actors))
        # One that is late, or waits for a slow server, is not to be taken for lost.
        self._beat_s = min(_BEAT_S, settings.lost_after_s / 4)
        self._rank = self._take_rank()
        self.forks = forks.count
        self._ending, self._ended = threading.Event(), threading.Event()
        self._closing = threading.Lock()
        self.is_abandoned = False
        """Whether the store was dropped without ``close``."""
        self._beating = threading.Thread(target=self._beat, name="tensorkv-beat", daemon=True)
        self._beating.start()
        try:
            self._directory.refresh()
        except BaseException:
            self._ending.set()
            raise
        _open.add(self)

    def _make_lane(self, number: int) -> Lane:
        links = [
            Link(
                actor,
                index,
                shares_memory=self._near[index],
                timeout_s=self._timeout_s,
            )
            for index, actor in enumerate(self._actors)
        ]
        return Lane(self._owner, number, links, self._counted_rank)

    @property
    def _counted_rank(self) -> int | None:
        """The rank, if rounds wait for this worker."""
        return self._rank if self._rank is not None and self._rank < self._settings.num_workers else None

    def _take_rank(self, wanted: int | None = None) -> int:
        if wanted is None and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
            wanted = int(os.environ["RANK"])
        with self._lanes.take() as lane:
            words = {"ranks": True, "wants": wanted}
            try:
                told = lane.send("hello", [Letter(0, words)])[0].head
            except ServerLostError as error:
                # It has ended since this process has found it.
                raise StoreEndingError(str(error)) from error
        if "ending" in told:
            raise StoreEndingError("create: the last client has just closed this store, and its servers are ending")
        self._meetings, self._texts, self._leaves = told["over"]
        # The lane was made without a rank.
        self._lanes.clear()
        return int(told["rank"])

    def _become_worker(self) -> None:
        """Take the rank of a worker that is gone, if there is one: in step only workers push."""
        if self._settings.mode != "sync" or self._counted_rank is not None:
            return
        close_abandoned()
        with self._ranking:
            live = set() if self._counted_rank is not None else set(self._ask("stats", {}, [0])[0]["live"])
            for free in sorted(set(range(self._settings.num_workers)) - live):
                before, old = self._owner, self._make_lane(-2)
                self._owner = secrets.token_hex(8)
                self._lanes.clear()
                try:
                    self._rank = self._take_rank(free)
                except ArgumentError:
                    # It has left, and is alive.
                    self._owner = before
                    self._lanes.clear()
                    continue
                old.send("bye", [Letter(server, {}) for server in self._all])
                return

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self._rank or 0

    @property
    def num_workers(self) -> int:
        """How many workers push."""
        return self._settings.num_workers

    # ------------------------------------------------------------ asking servers

    def _ask(self, verb: str, words: Mapping[str, Any], servers: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Ask servers for plain data."""
        letters = [Letter(server, dict(words)) for server in (self._all if servers is None else servers)]
        return [answer.head for answer in shield.run(self._send, verb, letters)]

    def _send(self, verb: str, letters: Sequence[Letter], timeout_s: float | None = None) -> list[Answer]:
        with self._lanes.take() as lane:
            return lane.send(verb, letters, timeout_s=timeout_s)

    def _list(self, lane: Lane | None = None) -> list[dict[str, Any]]:
        if lane is None:
            return self._ask("list", {})
        letters = [Letter(server, {}) for server in self._all]
        return [answer.head for answer in lane.send("list", letters, timeout_s=self._beat_s)]

    def _beat(self) -> None:
        """Tell the servers that this worker is alive, and hear who is not."""
        owner, lane, changes = self._owner, self._make_lane(-1), None
        while not self._ending.wait(self._beat_s):
            if self.is_abandoned:
                self._close(by_heartbeat=True)
                return
            if owner != self._owner:
                # It has another rank.
                owner, lane = self._owner, self._make_lane(-1)
            try:
                answers = lane.send("beat", [Letter(server, {}) for server in self._all], timeout_s=self._beat_s)
                if changes != [answer.head["changes"] for answer in answers]:
                    # Keys that others have made, deleted or made anew.
                    self._directory.refresh(partial(self._list, lane))
                    changes = [answer.head["changes"] for answer in answers]
            except TensorKVError:
                # Whoever calls next hears of it.
                continue

    # ------------------------------------------------------------ init, push, pull

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        if self._counted_rank not in (0, None) and self._settings.num_workers > 1:
            self._wait_for_keys(keys, specs)
            return
        with self._claim():
            self._directory.check_new(keys)
            leftovers = self._directory.leftovers(keys)
            if leftovers:
                # Of an init that did not reach every server; nobody else is at one now.
                self._change("delete", {server: {"keys": own} for server, own in leftovers.items()})
            held = self._directory.place(keys, specs)
            letters = [self._init_letter(server, keys, values, held) for server in self._all]
            with self._lanes.take() as lane:
                lane.send("init", [letter for letter in letters if letter is not None])
        self._directory.refresh()

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Be the only one that makes or deletes keys, and know those that there are."""
        with self._claiming:
            self._claims += 1
            try:
                self._ask("claim", {"wants": True, "number": self._claims}, [0])
                self._directory.refresh()
                yield
            finally:
                with suppress(TensorKVError):
                    self._ask("claim", {"wants": False, "number": self._claims}, [0])

    def _init_letter(
        self, server: int, keys: Sequence[Key], values: Sequence[Part], held: Sequence[Held]
    ) -> Letter | None:
        entries, notes = [], {}
        for key, value, each in zip(keys, values, held, strict=True):
            piece = self._piece(server, value, each)
            if piece is not None:
                shape = each.spec.shape if isinstance(piece, Table) else piece.shape
                entries.append(Entry(key, replace(each.spec, shape=shape), piece))
                notes[json.dumps(key)] = layout.to_note(each)
        if not entries:
            return None
        body, tensors = manifest.describe("store", entries, Assign())
        items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
        return letter_of(server, {"body": body, "notes": notes}, pack(items))

    def _piece(self, server: int, value: Part, held: Held) -> torch.Tensor | Table | None:
        """Return what of a new value a server gets."""
        if isinstance(value, Rows):
            merged = merge([value])
            mine = merged.ids % len(self._actors) == server
            return Table.of(Rows(merged.ids[mine], merged.values[mine], merged.num_rows), "cpu")
        for owner, start, stop in held.pieces:
            if owner == server:
                return value[start:stop] if value.ndim else value
        return None

    def _wait_for_keys(self, keys: Sequence[Key], specs: Sequence[KeySpec]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not all(key in self._directory for key in keys):
            if time.monotonic() > deadline:
                missing = next(key for key in keys if key not in self._directory)
                raise WaitTimeoutError(
                    f"init({quote(missing)}): rank 0 has not initialised it in {self._timeout_s:g} s"
                )
            time.sleep(0.01)
            self._directory.refresh()
        for key, spec in zip(keys, specs, strict=True):
            theirs = self._directory.find("init", key).spec
            if (theirs.shape, theirs.dtype, theirs.is_table) != (spec.shape, spec.dtype, spec.is_table):
                raise ValueMismatchError(
                    f"init({quote(key)}): rank 0's value is {theirs.dtype} {tuple(theirs.shape)}, here it is "
                    f"{spec.dtype} {tuple(spec.shape)}"
                )

    def push_parts(self, batch: Batch, priority: int) -> None:
        self._become_worker()
        self._traffic.push(batch, None)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        self._become_worker()
        self._traffic.push(batch, outs)

    def pull_into(self, keys: Sequence[Key], outs: Outs, priority: int) -> None:
        self._traffic.pull(keys, outs)

    def many(self, keys: Sequence[Key], values: Any, outs: Any, priority: int) -> list[int] | None:
        if values is not None:
            self._become_worker()
        return self._traffic.many(keys, values, outs)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._traffic.pull_rows(keys, ids)

    def delete(self, keys: Sequence[Key]) -> None:
        with self._claim():
            held = [self._directory.find("delete", key) for key in keys]
            self._change(
                "delete",
                {
                    server: {"keys": [key for key, each in zip(keys, held, strict=True) if server in each.servers]}
                    for server in {server for each in held for server in each.servers}
                },
            )
        self._directory.refresh()

    def _change(self, verb: str, words: Mapping[int, Mapping[str, Any]]) -> None:
        """Have servers change something, all of them in one request."""
        with self._lanes.take() as lane:
            lane.send(verb, [Letter(server, dict(own)) for server, own in sorted(words.items())])

    # ------------------------------------------------------------ the rule

    def set_updater(self, updater: Updater | None) -> None:
        if updater is not None:
            raise ArgumentError(
                "set_updater: a function cannot travel to servers as data; use set_optimizer, or a store of type "
                '"local" or "dist_sync", which run functions in your process'
            )
        if self._decides:
            self._change("rule", {server: {"optimizer": None} for server in self._all})
        self._directory.refresh()

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        self._check_whole(spec)
        if self._decides:
            self._change("rule", {server: {"optimizer": spec.to_json()} for server in self._all})
        else:
            self._ask("rule", {"awaits": spec.name})
        self._directory.refresh()

    def _check_whole(self, spec: OptimizerSpec) -> None:
        """Refuse an optimizer that needs whole values where one is divided."""
        if spec.name in ROWWISE:
            return
        for key in self._directory.names():
            if len(self._directory.find("set_optimizer", key).pieces) > 1:
                raise OptimizerError(
                    f"{spec.name} needs whole values, and {quote(key)} is divided between servers; call set_optimizer "
                    "before init, which then divides nothing"
                )

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        self._directory.refresh()
        rule = self._directory.rule
        if not isinstance(rule, StepOptimizer):
            raise OptimizerError("set_hyperparameters: the store has no optimizer; call set_optimizer first")
        held = {key: self._directory.find("set_hyperparameters", key) for key in keys or ()}
        rule.changed(numbers, keys)
        plain = json.loads(json.dumps(numbers, default=float))
        servers = {server for each in held.values() for server in each.servers} if keys is not None else set(self._all)
        self._change(
            "rule",
            {
                server: {
                    "numbers": plain,
                    "keys": None if keys is None else [key for key in keys if server in held[key].servers],
                }
                for server in servers
            },
        )
        self._directory.refresh()

    @property
    def _decides(self) -> bool:
        """Whether what this client says of the rule counts: rank 0's, or everybody's where one worker is expected."""
        return self._settings.num_workers == 1 or self._rank == 0

    @property
    def optimizer(self) -> OptimizerSpec | None:
        self._directory.refresh()
        return self._directory.optimizer

    # ------------------------------------------------------------ looking

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._directory.find(verb, key).spec

    def info(self, key: Key) -> KeyInfo:
        held = self._directory.find("info", key)
        told = self._ask("info", {"key": key}, sorted(set(held.servers)))
        shape, dtype = tuple(held.spec.shape), str(held.spec.dtype).removeprefix("torch.")
        kind = "rows" if held.spec.is_table else "dense"
        return KeyInfo(shape, dtype, "cpu", told[0]["version"], sum(each["nbytes"] for each in told), kind)

    def keys(self) -> list[Key]:
        self._directory.refresh()
        return self._directory.names()

    def __contains__(self, key: object) -> bool:
        if key not in self._directory:
            self._directory.refresh()
        return key in self._directory

    def stats(self) -> Mapping[str, Any]:
        told = self._ask("stats", {})
        merged = server_stats.merge(told)
        for what, count in self._finite.counts.items():
            merged["nonfinite"][what] += count
        return {**merged, "resent": self._lanes.resent, "rung": self._lanes.rung, "servers": told}

    def dead_workers(self) -> list[int]:
        """Return the ranks of workers that were here and have been silent for too long."""
        dead: list[int] = self._ask("stats", {}, [0])[0]["dead"]
        return dead

    # ------------------------------------------------------------ all workers

    def barrier(self) -> None:
        if self._counted_rank is not None:
            self._meetings += 1
            self._ask("meet", {"number": self._meetings}, [0])

    def broadcast_text(self, text: str) -> str:
        if self._settings.num_workers == 1 or self._counted_rank is None:
            return text
        self._texts += 1
        mine = text if self._rank == 0 else None
        told: str = self._ask("tell", {"number": self._texts, "text": mine}, [0])[0]["text"]
        return told

    def leave(self) -> None:
        if self._counted_rank is None or self._settings.num_workers == 1:
            return
        self._leaves += 1
        self._ask("leave", {"number": self._leaves})

    # ------------------------------------------------------------ checkpoints

    def save(self, path: str, kind: Kind) -> None:
        self._first(lambda: checkpoint.save(self._moment.states(), path, kind))

    def load(self, path: str, kind: Kind) -> None:
        self._first(lambda: self._load(path, kind))
        self._directory.refresh()

    def _load(self, path: str, kind: Kind) -> None:
        with self._claim():
            letters = checkpoint.load(path, kind, self._directory, len(self._actors))
            with self._lanes.take() as lane:
                lane.send("restore", letters)

    def _first(self, do: Callable[[], Any]) -> None:
        """Have rank 0 do something, and tell everybody how it went; a reader acts for itself."""
        problem: TensorKVError | None = None
        if self._decides or self._counted_rank is None:
            try:
                do()
            except TensorKVError as error:
                problem = error
        mine = None if problem is None else [type(problem).__name__, str(problem)]
        told = json.loads(self.broadcast_text(json.dumps(mine)))
        if problem is not None:
            raise problem
        if told is not None:
            raise getattr(errors, told[0])(told[1])

    def snapshot(self) -> tuple[Moment, Mapping[Key, int]]:
        """Hold what all servers have at one moment."""
        moment = self._moment.take()
        return moment, moment.versions

    def wait_for(self, keys: Sequence[Key], min_version: int, timeout_s: float) -> None:
        """Return when every key has had so many updates."""
        route = self._directory.route("pull", list(dict.fromkeys(keys)))
        letters = [Letter(share.server, {"min_version": min_version}, share.keys) for share in route.shares]
        shield.run(self._send, "await", letters, timeout_s)

    # ------------------------------------------------------------ the end

    def abandon(self) -> None:
        """Note that the store was dropped, for the heartbeat or the next ``create`` to close this client.

        The garbage collector calls it, in the middle of anything: nothing is sent, and no lock is taken.
        """
        self.is_abandoned = True

    def close(self) -> None:
        self._close(by_heartbeat=False)

    def _close(self, *, by_heartbeat: bool) -> None:
        if not self._closing.acquire(blocking=False):
            # Another thread is closing it, and this one may be what it waits for.
            if not by_heartbeat:
                self._ended.wait()
            return
        try:
            self._ending.set()
            if not by_heartbeat:
                self._beating.join()
                if not self.is_abandoned:
                    close_abandoned()
            self._end()
        finally:
            _open.discard(self)
            self._ended.set()

    def _end(self) -> None:
        left = 1
        # Where it fails, there is nobody to say goodbye to.
        with suppress(TensorKVError):
            left = self._say_goodbye()
        self._lanes.close()
        self._traffic.close()
        if left == 0:
            cluster.stop_servers(self._actors)
        cluster.leave(self._started)

    def _say_goodbye(self) -> int:
        """Tell the servers that this client goes; return how many others use them, or may do so."""
        heads = self._bye(self._all)
        is_whole = len(heads) == len(self._actors)
        if not is_whole:
            # What a lost server held is gone, and the others are of no use. They stay for those who have the store
            # open still, and for nobody who is silent.
            heads = self._bye(self._all, broken=True)
        # Whoever comes or goes is known to server 0: the others may not agree on who was last.
        asked = [0] if is_whole else self._all
        left = max((head["clients"] for head in heads[: len(asked)]), default=0)
        deadline = time.monotonic() + self._timeout_s
        # Their Ray ends with this process.
        while left and cluster.is_last(self._started) and time.monotonic() < deadline:
            time.sleep(0.05)
            left = max((head["clients"] for head in self._bye(asked)), default=0)
        if is_whole and not cluster.is_last(self._started):
            # Whoever is silent may be busy, and what servers hold is gone with them.
            left += heads[0]["silent"]
        return left

    def _bye(self, servers: Sequence[int], **words: Any) -> list[dict[str, Any]]:
        """Tell servers that this client goes; return what they answer, those left out that have ended for good."""
        with self._lanes.take() as lane:
            outcomes = lane.outcomes("bye", [Letter(server, words) for server in servers])
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, ServerLostError):
                raise outcome
        return [outcome.head for outcome in outcomes if isinstance(outcome, Answer)]
