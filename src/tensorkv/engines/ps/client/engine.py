"""The engine of a store on parameter servers: what one client does for the verbs of ``KVStore``."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from tensorkv import errors
from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, pack, unpack
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import Codec, Owed, Source, owed_by
from tensorkv.engines.base import Engine, Outs, ReleaseReader
from tensorkv.engines.call import Call
from tensorkv.engines.ps.ray import cluster
from tensorkv.engines.ps.ray.handle import ServerHandle
from tensorkv.engines.ps.ray.metrics import merge_stats
from tensorkv.engines.transport.rendezvous import launched
from tensorkv.errors import (
    ArgumentError,
    KeyNotFoundError,
    OptimizerError,
    PushOutcomeUnknownError,
    ServerDeadError,
    TensorKVError,
    ValueMismatchError,
    WaitTimeoutError,
    WorkerError,
    WorkerMismatchError,
    quote,
)
from tensorkv.runtime import collector, forks, shield
from tensorkv.runtime.modes import outside_modes
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinitePolicy
from tensorkv.shard.norm import PushResult
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec
from tensorkv.shard.rules import StepOptimizer, Updater
from tensorkv.storage import checkpoint
from tensorkv.storage.manifest import Contents, Kind

from .. import messages
from ..options import PSOptions
from .checkpoint import gather, scatter
from .data import DataClient, PlainCall
from .keymap import KeyMap
from .releases import ReleaseClient
from .rpc import ServerConnection, ServerReply, address_for_here, is_far
from .session import ServerRequest, Session, SessionPool
from .snapshot import RemoteSnapshot, SnapshotClient

T = TypeVar("T")

_HEARTBEAT_S = 1.0

# The clients of this process that have not been closed. Each is kept alive by its own heartbeat.
_open: set[PSEngine] = set()


def close_abandoned() -> None:
    """Close the clients of this process whose store was dropped without ``close``."""
    for engine in list(_open):
        if engine.is_abandoned and engine.forks == forks.count:
            engine.close()


class StoreEndingError(ServerDeadError):
    """The last client has closed the store: its servers are ending, and new ones can be started."""


class PSEngine(Engine):
    """A client of parameter servers.

    Args:
        servers: of the store.
        options: of the store, and ``pull_dtype`` and ``reader`` of this client.
        places: of the servers.
        weights: of the servers, how much each can hold, compared with the others.
        timeout_s: how long to wait for servers and other workers.
        started: whether this process has started the Ray cluster.
    """

    capabilities = frozenset({"checkpoint", "compression", "optimizer", "releases", "rows", "snapshot"})

    def __init__(
        self,
        servers: Sequence[ServerHandle],
        options: PSOptions,
        places: Sequence[Any],
        weights: Sequence[int],
        timeout_s: float,
        *,
        started: bool,
    ) -> None:
        self._servers, self._options, self._timeout_s, self._started = list(servers), options, timeout_s, started
        self._hosts = [place[-2] for place in places]
        self._addresses = [address_for_here(place) for place in places]
        self._owner = secrets.token_hex(8)
        self._rank: int | None = None
        # Of each session, its last request to several servers that may have reached only some of them.
        self._given_up: dict[str, int] = {}
        self._sessions = SessionPool(self._make_session)
        self._keymap = KeyMap(weights, self._list, wide=options.mode == "sync", pull_dtype=options.pull_dtype)
        is_sync = options.mode == "sync"
        # In mode sync only the servers know the sums.
        self._nonfinite = NonFinitePolicy("pass" if is_sync else options.nonfinite)
        self._data = DataClient(
            self._sessions,
            self._keymap,
            [address is not None and not is_far(address) for address in self._addresses],
            is_sync=is_sync,
            nonfinite=self._nonfinite,
            averages=options.reduce == "mean",
        )
        self._snapshots = SnapshotClient(self._sessions, self._data, len(servers))
        self._releases = ReleaseClient(self._sessions, self._data, self._snapshots, len(servers))
        self._claiming, self._claims, self._rules = threading.Lock(), 0, 0
        self._ranking = threading.Lock()
        self._all = range(len(servers))
        # A worker that is late, or waits for a slow server, must not be taken for dead.
        self._heartbeat_s = min(_HEARTBEAT_S, options.heartbeat_timeout_s / 4)
        self._rank = self._take_rank()
        self.forks = forks.count
        self._ending, self._ended = threading.Event(), threading.Event()
        self._closing = threading.Lock()
        # Whether some worker may owe something of compressed gradients.
        self._owes = False
        self.is_abandoned = False
        """Whether the store was dropped without ``close``."""
        self._heartbeats = threading.Thread(target=self._send_heartbeats, name="tensorkv-heartbeat", daemon=True)
        self._heartbeats.start()
        try:
            self._keymap.refresh()
        except BaseException:
            self._ending.set()
            raise
        _open.add(self)

    def _make_session(self, number: int) -> Session:
        connections = [
            ServerConnection(self._servers[index], index, host=host, address=address, timeout_s=self._timeout_s)
            for index, (host, address) in enumerate(zip(self._hosts, self._addresses, strict=True))
        ]
        return Session(self._owner, number, connections, self._worker_rank, self._given_up)

    @property
    def _worker_rank(self) -> int | None:
        """The rank, if this client is a worker; None for a reader."""
        return self._rank if self._rank is not None and self._rank < self._options.num_workers else None

    def _take_rank(self, wanted: int | None = None) -> int:
        rank, size = launched(strict=False)
        is_reader = self._options.reader
        if wanted is None and size > 1 and not is_reader:
            wanted = rank
        with self._sessions.take() as session:
            try:
                connect = messages.Connect(wanted_rank=wanted, reader=is_reader)
                told = session.send([ServerRequest(0, connect)])[0].head
            except ServerDeadError as error:
                # It has ended since this process found it.
                raise StoreEndingError(str(error)) from error
        if "ending" in told:
            raise StoreEndingError("create: the last client has just closed this store, and its servers are ending")
        self._barriers, self._broadcasts, self._leaves = told["completed"]
        # This session was made without a rank.
        self._sessions.clear()
        return int(told["rank"])

    def _ensure_worker(self) -> None:
        """Take the rank of a worker that has ended, if there is one: in mode sync only workers push."""
        if self._options.mode != "sync" or self._worker_rank is not None or self._options.reader:
            return
        close_abandoned()
        with self._ranking:
            live = set() if self._worker_rank is not None else set(self._ask(messages.Stats(), [0])[0]["live"])
            for free in sorted(set(range(self._options.num_workers)) - live):
                before, old = self._owner, self._make_session(-2)
                self._owner = secrets.token_hex(8)
                self._sessions.clear()
                try:
                    self._rank = self._take_rank(free)
                except ArgumentError:
                    # That worker has left, and is alive.
                    self._owner = before
                    self._sessions.clear()
                    continue
                # This process goes on where it is, and does not set again what the worker before it has set.
                self._rules = max(self._rules, self._ask(messages.WaitForRule(number=0), [0])[0]["number"])
                old.send([ServerRequest(server, messages.Disconnect()) for server in self._all])
                old.close()
                return

    @property
    def rank(self) -> int:
        return self._rank or 0

    @property
    def num_workers(self) -> int:
        return self._options.num_workers

    # ------------------------------------------------------------ asking servers

    def _ask(self, message: messages.Message, servers: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return the heads of the replies of servers, of all of them by default."""
        requests = [ServerRequest(server, message) for server in (self._all if servers is None else servers)]
        return [reply.head for reply in shield.run(self._send, requests)]

    def _send(self, requests: Sequence[ServerRequest], timeout_s: float | None = None) -> list[ServerReply]:
        with self._sessions.take() as session:
            return session.send(requests, timeout_s=timeout_s)

    def _list(self, known: Sequence[Any], session: Session | None = None) -> list[dict[str, Any]]:
        requests = [ServerRequest(server, messages.ListKeys(known=known[server])) for server in self._all]
        if session is None:
            replies = shield.run(self._send, requests)
        else:
            replies = session.send(requests, timeout_s=self._heartbeat_s)
        return [reply.head for reply in replies]

    def _send_heartbeats(self) -> None:
        """Tell the servers that this client is alive, and refresh the keys when a server has other ones."""
        owner, session, changes = self._owner, self._make_session(-1), None
        while not self._ending.wait(self._heartbeat_s) and not self.is_abandoned:
            if owner != self._owner:
                # This client has taken another rank.
                session.close()
                owner, session = self._owner, self._make_session(-1)
            try:
                # Told each time: a server that was restarted has forgotten it.
                beat = messages.Heartbeat(given_up=[list(each) for each in tuple(self._given_up.items())] or None)
                requests = [ServerRequest(server, beat) for server in self._all]
                replies = session.send(requests, timeout_s=self._heartbeat_s)
                told = [(reply.head["changes"], reply.head["rule"]) for reply in replies]
                if changes != told:
                    # Other clients have created, deleted or re-created keys, or changed the rule.
                    self._keymap.refresh(partial(self._list, session=session))
                    changes = told
            except (TensorKVError, MemoryError, OSError):
                # The next call of the user gets the error.
                continue
        session.close()
        if not self._ending.is_set():
            self._close(by_heartbeat=True)

    # ------------------------------------------------------------ init, push, pull

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        if self._worker_rank not in (0, None) and self._options.num_workers > 1:
            self._wait_for_keys(keys, specs)
            return
        with self._claim():
            self._create(keys, values, specs)

    def init_missing(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        # Any worker does, where ``init`` leaves it to rank 0: it is alone in pushing them, perhaps.
        with self._claim():
            new = [each for each in zip(keys, values, specs, strict=True) if each[0] not in self._keymap]
            if new:
                self._create(*map(list, zip(*new, strict=True)))

    def _create(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        """Create keys; no other client creates any now."""
        self._keymap.check_new(keys)
        incomplete = self._keymap.incomplete(keys)
        if incomplete:
            # Left by an init that did not reach every server; no other init is running now.
            deletes = {server: messages.Delete(keys=own) for server, own in incomplete.items()}
            self._send([ServerRequest(server, delete) for server, delete in deletes.items()])
        with collector.paused():
            placed = self._keymap.place(keys, specs)
        replies = shield.run(self._data.init, keys, values, placed)
        if not self._keymap.add(keys, placed, replies):
            self._keymap.refresh()

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Be the only client that creates or deletes keys, with fresh metadata."""
        with self._claiming:
            self._claims += 1
            try:
                self._ask(messages.Claim(number=self._claims), [0])
                self._keymap.refresh()
                yield
            finally:
                with suppress(TensorKVError):
                    self._ask(messages.Unclaim(number=self._claims), [0])

    def _wait_for_keys(self, keys: Sequence[Key], specs: Sequence[KeySpec]) -> None:
        """Wait until rank 0 has initialised keys; raise at once what it cannot make right."""
        deadline = time.monotonic() + self._timeout_s
        left = dict(zip(keys, specs, strict=True))
        while True:
            # What this client knows of a key may be older than its last init.
            self._keymap.refresh()
            placed = self._keymap.placed
            placed.check_type("init", left)
            for key in [key for key in left if key in placed]:
                spec, theirs = left.pop(key), placed[key].placement.spec
                if (theirs.shape, theirs.dtype, theirs.is_table) != (spec.shape, spec.dtype, spec.is_table):
                    raise ValueMismatchError(
                        f"init({quote(key)}): rank 0's value is {interop.dtype_name(theirs.dtype)} of shape "
                        f"{tuple(theirs.shape)}, here it is {interop.dtype_name(spec.dtype)} of shape "
                        f"{tuple(spec.shape)}"
                    )
            if not left:
                return
            if time.monotonic() > deadline:
                missing = next(iter(left))
                raise WaitTimeoutError(
                    f"init({quote(missing)}): rank 0 has not initialised it in {self._timeout_s:g} s"
                )
            time.sleep(0.01)

    def transfer(self, work: Callable[..., T], *args: Any) -> T:
        # In mode sync a call may wait for other workers, and for a rank with a lock that a handler's call would take.
        return (shield.run if self._options.mode == "sync" else shield.run_here)(work, *args)

    def push_parts(self, batch: Batch, priority: int) -> None:
        self._ensure_worker()
        self._data.push(batch, None)

    def pushpull_into(self, batch: Batch, outs: Outs, priority: int) -> None:
        self._ensure_worker()
        self._data.push(batch, outs)

    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        self._data.pull(keys, outs)

    def try_compiled(self, call: Call) -> bool:
        found = self._data.prepare(call)
        if found is None:
            return False
        with outside_modes():
            self.transfer(self._send_plain, found)
        return True

    def _send_plain(self, call: PlainCall) -> None:
        if call.verb == "pull":
            self._data.pull_plain(call)
        else:
            self._ensure_worker()
            self._data.push_plain(call)

    def pull_regions(self, keys: Sequence[Key], regions: Sequence[Region], outs: Outs) -> None:
        self._data.pull_regions(keys, regions, outs)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        return self._data.pull_rows(keys, ids)

    def delete(self, keys: Sequence[Key]) -> None:
        with self._claim():
            chosen = self._keymap.by_server("delete", keys)
            requests = [ServerRequest(server, messages.Delete(keys=own)) for server, own in chosen.items()]
            sent = self._send(requests)
            replies = {request.server: reply.head for request, reply in zip(requests, sent, strict=True)}
            if not self._keymap.remove(keys, replies):
                self._keymap.refresh()
            # Before another thread can make the keys again and owe something of them.
            self._data.forget(keys)

    # ------------------------------------------------------------ compression

    def set_gradient_compression(self, codec: Codec | None, *, simulate: bool) -> None:
        self._ensure_worker()
        mine = None if codec is None else codec.to_json()
        theirs, keys = self._on_rank_0(lambda: [mine, list({key: None for key, _ in self._data.compressor.owed})])
        if theirs != mine:
            raise WorkerMismatchError(
                f"set_gradient_compression: rank 0 has set {theirs}, rank {self._rank} {mine}; all workers have to set "
                "the same"
            )
        self._data.set_compression(codec, keys)
        self._owes = True

    def _gather_owed(self, token: str) -> dict[Source, Owed]:
        """Return what all workers have sent of what they owe, for a save on rank 0; wait for it."""
        found: dict[Source, Owed] = {}
        for rank in range(self._options.num_workers):
            found |= self._take_owed(token, rank, waits=True)
        self._keep_owed("", 0, {})
        return found

    def _spread_owed(self, owed: Mapping[Source, Owed]) -> str:
        """Send what each other worker owed according to a checkpoint, which rank 0 has read.

        Returns:
            The token with which they take it; "" if no worker owed anything.
        """
        if not owed or self._worker_rank is None:
            return ""
        token, size = secrets.token_hex(8), self._options.num_workers
        for rank in range(1, size):
            self._keep_owed(token, rank, owed_by(owed, rank, size))
        return token

    def _keep_owed(self, token: str, rank: int, owed: Mapping[Source, Owed]) -> None:
        items = []
        for (key, _), each in owed.items():
            items.append(Item(key, "residual", torch.from_numpy(each.residual)))
            items += [Item(key, f"memory/{name}", torch.from_numpy(array)) for name, array in each.memory.items()]
        self._send([ServerRequest.of_tensors(0, messages.KeepOwed(token=token, worker=rank), pack(items))])

    def _take_owed(self, token: str, rank: int, *, waits: bool = False) -> dict[Source, Owed]:
        (reply,) = shield.run(self._send, [ServerRequest(0, messages.TakeOwed(token=token, worker=rank, waits=waits))])
        found: dict[Source, Owed] = {}
        for item in unpack(reply.head["layout"].encode(), b"" if reply.payload is None else reply.payload.numpy().data):
            array = item.tensor.clone().numpy()
            if item.role == "residual":
                found[item.key, rank] = Owed(array, {})
            else:
                found[item.key, rank].memory[item.role.removeprefix("memory/")] = array
        return found

    # ------------------------------------------------------------ the rule

    def set_updater(self, updater: Updater | None) -> None:
        if updater is not None:
            raise ArgumentError(
                "set_updater: a function cannot be sent to servers as data; use set_optimizer, or a store of type "
                '"local" or "dist_sync", which run functions in your process'
            )
        self._set_rule("set_updater", None)

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        self._check_whole(spec)
        self._check_clipping(spec)
        self._set_rule("set_optimizer", spec)

    def _set_rule(self, verb: str, spec: OptimizerSpec | None) -> None:
        """Set an optimizer (None: assignment), or wait until rank 0 has set the rule as often as this worker."""
        if self.decides:
            # One that fails is made again.
            self._send_rule(spec, self._rules + 1)
            self._rules += 1
        else:
            self._rules += 1
            told = self._ask(messages.WaitForRule(number=self._rules))[0]
            name = None if spec is None else spec.name
            if told["number"] == self._rules and told["name"] != name:
                raise WorkerMismatchError(
                    f"{verb}: rank 0 has set {told['name'] or 'assignment'}, this worker sets {name or 'assignment'}; "
                    "all workers set the same rules in the same order"
                )
        self._keymap.refresh()

    def _send_rule(self, spec: OptimizerSpec | None, number: int = 0) -> None:
        """Set an optimizer; the number says how often this client has set the rule in calls that all workers make."""
        described: dict[int, dict[str, Any] | None] = dict.fromkeys(self._all)
        if spec is not None:
            servers_of = {key: self._keymap.find("set_optimizer", key).servers for key in spec.overrides}
            for server in self._all:
                own = {key: numbers for key, numbers in spec.overrides.items() if server in servers_of[key]}
                described[server] = replace(spec, overrides=own).to_json()
        rules = {server: messages.SetRule(optimizer=each, number=number) for server, each in described.items()}
        shield.run(self._send, [ServerRequest(server, rule) for server, rule in rules.items()])

    def change_optimizer(self, spec: OptimizerSpec) -> None:
        self._check_whole(spec)
        self._check_clipping(spec)
        self._send_rule(spec)
        self._keymap.refresh()

    def start_optimizer(self, spec: OptimizerSpec) -> bool:
        # Rank 0 may have set it before another worker looks, so this call is not counted.
        if self.decides:
            is_new = self.optimizer is None
            if is_new:
                self.change_optimizer(spec)
            return is_new
        deadline = time.monotonic() + self._timeout_s
        while (found := self.optimizer) is None:
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"set_optimizer: rank 0 has not set {spec.name} in {self._timeout_s:g} s")
            time.sleep(0.01)
        if found.name != spec.name:
            raise WorkerMismatchError(f"set_optimizer: rank 0 has set {found.name}, this worker sets {spec.name}")
        return True

    def _check_clipping(self, spec: OptimizerSpec) -> None:
        """Raise if gradients are to be clipped by the norm of sums of which no server has all."""
        if spec.max_grad_norm is not None and self._options.mode == "sync" and len(self._servers) > 1:
            raise OptimizerError(
                "max_grad_norm in mode sync needs num_servers=1: each of several servers has only its part of the sums "
                "over workers; use one server, mode async, or dist_sync"
            )

    def _check_whole(self, spec: OptimizerSpec) -> None:
        """Raise if an optimizer needs whole values and one is divided."""
        if spec.name in ROWWISE:
            return
        for key in self._keymap:
            if len(self._keymap.find("set_optimizer", key).pieces) > 1:
                raise OptimizerError(
                    f"{spec.name} needs whole values, and {quote(key)} is divided between servers; call set_optimizer "
                    "before init, so that init keeps values whole"
                )

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        self._keymap.refresh()
        rule = self._keymap.rule
        if not isinstance(rule, StepOptimizer):
            raise OptimizerError("set_hyperparameters: the store has no optimizer; call set_optimizer first")
        chosen: Mapping[int, list[Key] | None] = dict.fromkeys(self._all)
        if keys is not None:
            chosen = self._keymap.by_server("set_hyperparameters", keys)
        self._check_clipping(rule.changed(numbers, keys).optimizer.spec)
        plain = json.loads(json.dumps(numbers, default=float))
        self._send(
            [
                ServerRequest(server, messages.SetHyperparameters(numbers=plain, keys=own))
                for server, own in chosen.items()
            ]
        )
        self._keymap.refresh()

    @property
    def joins_workers(self) -> Literal["sum", "mean", "alone"]:
        if self._options.mode == "async":
            return "alone"
        return self._options.reduce

    @property
    def decides(self) -> bool:
        """Whether this client sets the rule: rank 0 does, or every client where one worker is expected."""
        return self._options.num_workers == 1 or self._rank == 0

    @property
    def optimizer(self) -> OptimizerSpec | None:
        self._keymap.refresh()
        return self._keymap.optimizer

    @property
    def averages(self) -> bool:
        return self._options.reduce == "mean"

    @property
    def last_push(self) -> PushResult:
        return self._data.last_push

    @property
    def skips_steps(self) -> bool:
        return self._options.nonfinite == "skip_step"

    @property
    def has_optimizer(self) -> bool:
        return self._keymap.optimizer is not None

    # ------------------------------------------------------------ looking

    def spec(self, verb: str, key: Key) -> KeySpec:
        return self._keymap.find(verb, key).spec

    def info(self, keys: Sequence[Key]) -> list[KeyInfo]:
        # Another client may have re-created them.
        self._keymap.refresh()
        placements = {key: self._keymap.find("info", key) for key in keys}
        held: dict[int, list[Key]] = {}
        for key, placement in placements.items():
            for server in sorted(set(placement.servers)):
                held.setdefault(server, []).append(key)
        requests = [ServerRequest(server, messages.Info(keys=held[server])) for server in sorted(held)]
        versions: dict[Key, int] = {}
        nbytes = dict.fromkeys(placements, 0)
        for request, reply in zip(requests, shield.run(self._send, requests), strict=True):
            told = zip(held[request.server], reply.head["versions"], reply.head["nbytes"], strict=True)
            for key, version, own in told:
                versions.setdefault(key, version)
                nbytes[key] += own
        return [KeyInfo.of(placements[key].spec, "cpu", versions[key], nbytes[key]) for key in keys]

    def keys(self) -> list[Key]:
        self._keymap.refresh()
        return list(self._keymap)

    def __contains__(self, key: object) -> bool:
        if key not in self._keymap:
            self._keymap.refresh()
        return key in self._keymap

    def stats(self) -> Mapping[str, Any]:
        told = self._ask(messages.Stats())
        merged = merge_stats(told)
        for what, count in self._nonfinite.counts.items():
            merged["nonfinite"][what] += count
        return {
            **merged,
            **self._data.compressor.traffic.stats(),
            "resent": self._sessions.resent,
            "socket_requests": self._sessions.socket_requests,
            "servers": told,
        }

    def dead_workers(self) -> list[int]:
        """Return the ranks of workers whose heartbeats have stopped."""
        dead: list[int] = self._ask(messages.Stats(), [0])[0]["dead"]
        return dead

    # ------------------------------------------------------------ all workers

    def barrier(self) -> None:
        if self._worker_rank is not None:
            self._barriers += 1
            self._ask(messages.Barrier(number=self._barriers), [0])

    def _broadcast(self, text: str) -> str:
        """Return rank 0's text to every worker, as the present broadcast."""
        if self._options.num_workers == 1 or self._worker_rank is None:
            return text
        mine = text if self._rank == 0 else None
        told: str = self._ask(messages.Broadcast(number=self._broadcasts, text=mine), [0])[0]["text"]
        return told

    def leave(self) -> None:
        if self._worker_rank is None or self._options.num_workers == 1:
            return
        self._leaves += 1
        self._ask(messages.Leave(number=self._leaves))

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def contents(self, *, releases: bool = False) -> Iterator[Contents]:
        # Those of other workers come with ``save`` alone, which all of them call.
        is_alone = self._options.num_workers == 1 and self._worker_rank is not None
        owed = self._data.owed(0) if is_alone and self._owes else {}
        yield replace(gather(self._snapshots.contents(releases=releases)), owed=owed)

    def restore(self, contents: Contents) -> None:
        self._load(lambda: contents)

    def _restore(self, contents: Contents) -> None:
        if isinstance(contents.rule, StepOptimizer):
            self._check_clipping(contents.rule.optimizer.spec)
        with self._claim():
            self._send(scatter(contents, self._keymap, len(self._servers)))

    def save(self, path: str, kind: Kind, *, releases: bool = False) -> None:
        rank, token = self._worker_rank, f"save {self._broadcasts + 1}"
        is_shared = rank is not None and self._options.num_workers > 1

        def share() -> None:
            # Also a worker that owes nothing: rank 0 may wait for it.
            if rank is not None and is_shared:
                self._keep_owed(token, rank, self._data.owed(rank))

        def write() -> None:
            owed = self._gather_owed(token) if is_shared and self._owes else {}
            with self.contents(releases=releases) as contents:
                checkpoint.write(path, replace(contents, kind=kind, owed=owed or contents.owed))

        self._on_rank_0(write, share)

    def load(self, path: str, kind: Kind, *, missing_ok: bool = False) -> bool:
        return self._load(lambda: None if missing_ok and checkpoint.is_missing(path) else checkpoint.read(path, kind))

    def _load(self, read: Callable[[], Contents | None]) -> bool:
        """Have rank 0 restore what it reads, and each worker owe what it owed then; return whether it has read any."""
        owed: Mapping[Source, Owed] = {}

        def load() -> str | None:
            nonlocal owed
            contents = read()
            if contents is None:
                return None
            owed = contents.owed
            token = self._spread_owed(owed)
            self._restore(contents)
            return token

        token, rank = self._on_rank_0(load), self._worker_rank
        if token is None:
            return False
        self._keymap.refresh()
        if rank is not None:
            self._owes = self._owes or bool(token)
            others = self._take_owed(token, rank) if token and rank > 0 else {}
            self._data.take_owed(owed_by(owed, 0, self._options.num_workers) if rank == 0 else others)
        return True

    def _on_rank_0(self, call: Callable[[], Any], share: Callable[[], None] = lambda: None) -> Any:
        """Call a function on rank 0; on every worker, return its result, which is plain data, or raise its error.

        A reader calls it for itself. Whatever a worker raises here, this call counts as made there, so that all workers
        go on with the next one.

        Args:
            call: the function.
            share: what every worker does before.
        """
        self._broadcasts += 1
        is_mine = self.decides or self._worker_rank is None
        problem: Exception | None = None
        failed: list[str] | None = None
        result: Any = None
        try:
            share()
            result = call() if is_mine else None
        except Exception as error:
            if not is_mine:
                raise
            # Of whatever kind: the others wait for it.
            problem, text = error, f"rank 0 failed: {type(error).__name__}: {error}"
            failed = errors.encode(error if isinstance(error, TensorKVError) else WorkerError(text))
        failed, result = json.loads(self._broadcast(json.dumps([failed, result])))
        if problem is not None:
            raise problem
        if failed is not None:
            raise errors.decode(failed)
        return result

    def snapshot(self) -> tuple[RemoteSnapshot, Mapping[Key, int]]:
        """Hold the present values of all servers, at one point in time."""
        snapshot = self._snapshots.take()
        return snapshot, snapshot.versions

    def publish(self, name: str, keys: Sequence[Key] | None, keep: int | None) -> None:
        for key in keys or ():
            self._keymap.find("publish", key)
        self._releases.publish(name, keys, keep)

    def unpublish(self, name: str) -> None:
        self._releases.unpublish(name)

    def releases(self) -> list[tuple[str, int]]:
        return self._releases.listed()

    def open_release(self, name: str, lease_s: float) -> ReleaseReader:
        return self._releases.open(name, lease_s)

    def wait_release(self, after: str | None, timeout_s: float, lease_s: float) -> ReleaseReader:
        return shield.run(self._releases.wait, after, timeout_s, lease_s)

    def wait_for(self, keys: Sequence[Key], min_version: int, timeout_s: float) -> None:
        try:
            self._wait_for(keys, min_version, timeout_s)
        except KeyNotFoundError:
            # Another client may have re-created it on another server.
            self._keymap.refresh()
            self._wait_for(keys, min_version, timeout_s)

    def _wait_for(self, keys: Sequence[Key], min_version: int, timeout_s: float) -> None:
        layout = self._keymap.layout("pull", tuple(dict.fromkeys(keys)))
        message = messages.WaitForVersion(min_version=min_version)
        requests = [ServerRequest(each.server, message, each.keys) for each in layout.pushed]
        try:
            shield.run(self._send, requests, timeout_s)
        except PushOutcomeUnknownError as error:
            # Nothing was pushed: the server was not reached, or its word on what it waits for has come too late.
            named = quote(layout.keys[0]) + (", ..." if len(layout.keys) > 1 else "")
            raise WaitTimeoutError(
                f"pull({named}): version {min_version} has not come within {timeout_s:g} s, in which a server has not "
                "answered"
            ) from error

    # ------------------------------------------------------------ the end

    def abandon(self) -> None:
        """Note that the store was dropped, so that the heartbeat or the next ``create`` closes this client.

        The garbage collector calls it, at any point of the program: nothing is sent, and no lock is taken.
        """
        self.is_abandoned = True

    def close(self) -> None:
        self._close(by_heartbeat=False)

    def _close(self, *, by_heartbeat: bool) -> None:
        if not self._closing.acquire(blocking=False):
            # Another thread is closing it, and may be waiting for the heartbeat's thread.
            if not by_heartbeat:
                self._ended.wait()
            return
        try:
            self._ending.set()
            if not by_heartbeat:
                # The garbage collector may run a finalizer that closes a store in the heartbeat's own thread.
                if self._heartbeats is not threading.current_thread():
                    self._heartbeats.join()
                if not self.is_abandoned:
                    close_abandoned()
            self._end()
        finally:
            _open.discard(self)
            self._ended.set()

    def _end(self) -> None:
        left = 1
        # If it fails, there is no server to disconnect from.
        with suppress(TensorKVError):
            left = self._disconnect()
        self._sessions.close()
        self._data.close()
        if left == 0:
            cluster.stop_servers(self._servers)
        cluster.leave(self._started)

    def _disconnect(self) -> int:
        """Disconnect from the servers; return how many other clients use them, or may use them."""
        heads = self._send_disconnect(self._all)
        is_whole = len(heads) == len(self._servers)
        if not is_whole:
            # The values of a dead server are lost, and the other servers are of no use. They stay for live clients that
            # have the store open, and not for dead ones.
            heads = self._send_disconnect(self._all, broken=True)
        # Server 0 decides who was last: the others may have other clients.
        asked = [0] if is_whole else self._all
        left = max((head["clients"] for head in heads[: len(asked)]), default=0)
        deadline = time.monotonic() + self._timeout_s
        # The Ray of the others ends with this process.
        while left and cluster.is_last(self._started) and time.monotonic() < deadline:
            time.sleep(0.05)
            left = max((head["clients"] for head in self._send_disconnect(asked)), default=0)
        if is_whole and not cluster.is_last(self._started):
            # A client without heartbeats may only be busy, and the values end with the servers.
            left += heads[0]["dead_clients"]
        return left

    def _send_disconnect(self, servers: Sequence[int], *, broken: bool = False) -> list[dict[str, Any]]:
        """Disconnect from servers; return the heads of their replies, without servers that have ended for good."""
        with self._sessions.take() as session:
            disconnect = messages.Disconnect(broken=broken)
            outcomes = session.outcomes([ServerRequest(server, disconnect) for server in servers])
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, ServerDeadError):
                raise outcome
        return [outcome.head for outcome in outcomes if isinstance(outcome, ServerReply)]
