"""The server of a store: what each request does. It knows no Ray, and has no thread of its own.

A request is a head (plain data), a layout and a payload, as in a record; ``serve`` may be called from many threads.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from tensorkv import errors
from tensorkv.arrays.arguments import Key, check_keys
from tensorkv.arrays.packing import bytes_of, unpack
from tensorkv.errors import (
    ArgumentError,
    OptimizerError,
    PushOutcomeUnknownError,
    SnapshotError,
    TensorKVError,
    WorkerError,
    quote,
)
from tensorkv.runtime import collector
from tensorkv.runtime.stats import Metrics, clock
from tensorkv.shard.changes import RequestIds
from tensorkv.shard.entry import Part
from tensorkv.shard.norm import PushResult
from tensorkv.shard.releases import check_keep, check_name
from tensorkv.shard.shard import ShardSnapshot
from tensorkv.storage.dedup import process_of

from .. import messages
from ..messages import Message, Push, Reply, Request, keys_of, push_layout
from ..options import PSOptions
from ..released import encode_changes
from .membership import Membership
from .snapshot import SnapshotBarrier
from .staleness import StalenessClock
from .state import ServerState, contents_of, metadata_of, new_entries, released_metadata
from .sync_round import PendingPush, SyncRounds
from .tables import ServerTables
from .values import ServedValues
from .wait import AwakeClock, Condition, RetryLater

# A client may ask a release to stay so long.
_LONGEST_LEASE_S = 2e9


class Server:
    """One server of a store.

    Args:
        options: of the store.
        index: of this server.
        threads: as for ``ServerState``.
        comes_back: whether this is a restart, and workers are waiting for it.
        stamp: of its folder, as for ``FolderLock``.
        now: a clock in seconds.

    Raises:
        StorageError: its folder cannot be opened.
    """

    def __init__(
        self,
        options: PSOptions,
        index: int = 0,
        *,
        threads: int | None = None,
        comes_back: bool = False,
        stamp: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.index = options, index
        # Differs after a restart.
        self.incarnation = secrets.token_hex(8)
        # While this process was stopped it could not read heartbeats, so no worker is dead for lack of them.
        awake = AwakeClock(now, options.heartbeat_timeout_s / 2)
        self._staleness = StalenessClock(options.num_workers, options.heartbeat_timeout_s, awake)
        self._tables = ServerTables(self._staleness)
        self._state = ServerState(options, index, threads, self._tables, stamp)
        self._condition = Condition()
        self._membership = Membership(
            self._condition, self._tables, self._record, options.num_workers, options.heartbeat_timeout_s, awake
        )
        if comes_back:
            self._membership.recover()
        else:
            self._record(["new"])
        self._snapshot_barrier = SnapshotBarrier(self._condition, self._tables, index, now)
        self._sync_rounds = SyncRounds(self._apply_round, self._tables.lists, self._tables.refused)
        # Of each client, what was found out about its last push to a round.
        self._results: dict[str, tuple[int, PushResult]] = {}
        # What workers owe, by rank, while it goes from them to a checkpoint or back; and its token.
        self._owed: dict[int, tuple[str, bytes, bytes]] = {}
        self._metrics = Metrics()
        self._resent = 0
        self.is_broken = False
        """Whether another server of the store is dead, so that this one is of no use without a live client."""

    def serve(
        self, head: dict[str, Any], layout: bytes = b"[]", payload: Any = b"", out: torch.Tensor | None = None
    ) -> Reply:
        """Answer a request; nothing in it is trusted.

        Args:
            head, layout, payload: of the request.
            out: bytes, in which pulled values are put if they fit, instead of in new memory.

        Returns:
            A reply. Its head has ``"error"`` (class name and message) if the request was refused, ``"wait_for"`` if it
            has to be sent again (and ``"applied"`` if it is a push that waits afterwards), and ``"spare"`` if another
            server has its folder.
        """
        start = clock()
        if self.is_superseded:
            return Reply({"spare": True})
        try:
            request = messages.decode(head, layout, payload, out)
            reply = self._answer(request)
        except RetryLater as reason:
            is_applied = isinstance(request.message, Push) and self._has_applied(request)
            return Reply({"wait_for": str(reason), **({"applied": True} if is_applied else {})})
        except Exception as error:
            return Reply({"error": errors.encode(self._refusal(head.get("verb"), error))})
        moved = len(payload) + (0 if reply.payload is None else len(reply.payload))
        name = "pushpull" if isinstance(request.message, Push) and request.message.pulls else request.verb
        self._metrics.add(name, start, [name], [moved])
        return reply

    def _refusal(self, verb: Any, error: Exception) -> TensorKVError:
        """Return what a client is told of an error."""
        if isinstance(error, TensorKVError):
            return error
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError | OSError | RuntimeError):
            return WorkerError(f"server {self.index} failed: {text}")
        return ArgumentError(f"malformed request {verb}: {text}")

    def _answer(self, request: Request[Message]) -> Reply:
        sender, message = request.sender, request.message
        self._condition.set_poll_timeout(sender.poll_timeout_s)
        if isinstance(message, messages.Connect) and self._membership.is_closed_to(sender.owner):
            return Reply({"ending": True})
        if not isinstance(message, messages.Disconnect):
            self._membership.heartbeat(sender)
        reply: Reply = getattr(self, f"_{request.verb}")(request)
        return reply

    @property
    def is_superseded(self) -> bool:
        """Whether another process has opened the folder, taking this one for dead, so that the values here are old."""
        log = self._state.shard.log
        return log is not None and log.is_superseded

    @property
    def is_ending(self) -> bool:
        """Whether the last client has disconnected, and no other is accepted."""
        return self._tables.is_ending

    def owners(self) -> list[str]:
        """Return the clients that are alive."""
        return self._membership.clients()

    def mark_dead(self, owner: str) -> None:
        """Count a client as dead before its heartbeat timeout, since its process has ended."""
        self._membership.mark_dead(owner)

    def stats(self) -> dict[str, Any]:
        """Return counters of keys, requests and workers."""
        staleness = self._staleness
        mine = {
            "verbs": self._metrics.read()["verbs"],
            "clients": len(self._membership.clients()),
            "live": staleness.live(),
            "connected": staleness.connected(),
            "dead": staleness.dead(),
            "rounds": list(staleness.rounds().items()),
            "ahead": staleness.spread(),
            "most_ahead": staleness.most_ahead,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "resent": self._resent,
            "waits": self._condition.count,
            "waited_s": self._condition.seconds,
        }
        return {**mine, **self._state.stats()}

    def close(self) -> None:
        """Release the values and the folder."""
        with self._condition:
            self._state.shard.close()

    # ------------------------------------------------------------ pushes

    def _push(self, request: Request[Push]) -> Reply:
        is_sync, number = self.options.mode == "sync", request.message.round
        # A log has it with the push.
        if number is not None and not (is_sync and [type(each) for each in number] == [str, int, int]):
            raise ArgumentError("malformed push; expected the name and numbers of a round, in mode sync only")
        if is_sync:
            return self._push_in_round(request)
        return self._push_at_once(request) if self.options.staleness is None else self._push_bounded(request)

    def _push_at_once(self, request: Request[Push]) -> Reply:
        """Apply a push; a pull in the same request reads the values right after it."""
        keys = push_layout(request.layout).keys
        with self._change(request, keys) as ids:
            reply = self._apply(request, ids) if ids else None
        return reply or self._pushed(request, keys)

    def _apply(self, request: Request[Push], ids: RequestIds, *, fill: bool = True) -> Reply | None:
        """Apply a push; return what ``ServerState.push`` returns."""
        self._check_scale(request.message)
        reply = self._state.push(request, ids, fill=fill)
        if push_layout(request.layout).has_slices:
            # Of other pushes, the client knows what it has checked.
            self._results[request.sender.client] = request.sender.seq, self._state.shard.last_push
        return reply

    def _check_slices(self, request: Request[messages.CheckSlices]) -> Reply:
        items = unpack(request.layout, request.payload)
        with self._condition:
            for item in items:
                self._state.shard.check_slices(item.key, item.tensor, must_complete=request.message.must_complete)
        return Reply({})

    def _check_scale(self, message: Push) -> None:
        """Raise if a client did not know that gradients are to be clipped, by a norm that is not known here."""
        if message.scale is None and self.options.num_servers > 1 and self._state.shard.rule.clipping is not None:
            raise OptimizerError("push: another worker has just set max_grad_norm; push again")

    def _push_bounded(self, request: Request[Push]) -> Reply:
        """Apply a push, and wait until no live worker is too many rounds behind."""
        keys = push_layout(request.layout).keys
        with self._condition:
            if not self._has_applied(request):
                # Of a worker whose last push timed out while it waited here.
                self._wait_for_slow_workers(request.sender.rank)
            with self._change(request, keys) as ids:
                if ids:
                    self._apply(request, ids, fill=False)
            self._wait_for_slow_workers(request.sender.rank)
        return self._pushed(request, keys)

    def _wait_for_slow_workers(self, rank: int | None) -> None:
        staleness, clock = self.options.staleness, self._staleness
        if rank is None or staleness is None:
            return
        self._condition.wait_for(
            lambda: not clock.behind(rank, staleness),
            lambda: f"{clock.describe(clock.behind(rank, staleness))}, more than {staleness} rounds behind",
        )

    def _push_in_round(self, request: Request[Push]) -> Reply:
        """Hold a push until its round is complete; if that round is closed already, reply with the next one."""
        sender, push, rounds = request.sender, request.message, self._sync_rounds
        keys = push_layout(request.layout).keys
        if sender.rank is None:
            raise ArgumentError("push: this client has no rank; in mode sync only workers push")
        name, number, first = push.round or (json.dumps(keys), None, 0)
        with self._condition:
            self._admit(request)
            if not self._is_resent(request) and self._tables.refusal(sender.client, sender.seq) is None:
                next_number = rounds.next(name)
                if number is None:
                    number = next_number
                elif number < next_number and not push.late:
                    return Reply({"moved": next_number})
                with self._refusing(request):
                    pending = self._pending(request)
                if push.late:
                    rounds.apply(keys, {sender.rank: pending})
                else:
                    rounds.add(name, keys, number, first, sender.rank, pending)
            self._condition.wait_for(
                lambda: self._is_round_over(sender.client, sender.seq),
                lambda: f"{self._describe_missing(name, number or 0)}, which have not pushed yet",
            )
            refused = self._tables.refusal(sender.client, sender.seq)
        if refused is not None:
            raise refused
        return self._pushed(request, keys)

    def _pending(self, request: Request[Push]) -> PendingPush:
        batch, counts = self._state.batch(request), request.message.counts
        parts = [parts[0] for parts in batch.parts]
        if counts is not None and [type(count) is int and count > 0 for count in counts] != [True] * len(parts):
            raise ArgumentError("malformed push; expected the number of parts of each key")
        batch.counts = counts or [1] * len(parts)
        self._state.shard.check(batch)
        return PendingPush(request.sender.client, request.sender.seq, parts, _logged(request), counts=counts)

    def _describe_missing(self, name: str, number: int) -> str:
        return self._staleness.describe(self._sync_rounds.missing(name, number, self._staleness.live()))

    def _is_round_over(self, client: str, seq: int) -> bool:
        self._sync_rounds.close(self._staleness.live(), self._snapshot_barrier.admits)
        return self._tables.has_ended(client, seq)

    def _apply_round(self, keys: Sequence[Key], parts: Sequence[list[Part]], pushes: Sequence[PendingPush]) -> None:
        ids = [(each.client, each.seq, each.words) for each in pushes]
        ones = [1] * len(keys)
        counts = [sum(own) for own in zip(*(each.counts or ones for each in pushes), strict=True)]
        self._state.push_round(keys, parts, counts, ids)
        self._tables.add(ids, keys)
        for each in pushes:
            self._results[each.client] = each.seq, self._state.shard.last_push
        self._condition.notify_all()

    def _pushed(self, request: Request[Push], keys: tuple[Key, ...]) -> Reply:
        """Reply to a push that has been applied."""
        with self._condition:
            seq, result = self._results.get(request.sender.client, (0, PushResult()))
            # After a restart it is not known.
            is_told = seq == request.sender.seq and result != PushResult()
            told = {"result": list(result)} if is_told else {}
            if not request.message.pulls:
                return Reply(told)
            message = request.message
            served = self._state.served(None)
            reply = served.values(keys, request.out, message.checksum, message.pull_dtype)
            return Reply({**reply.head, **told}, reply.payload)

    # ------------------------------------------------------------ pulls

    def _pull(self, request: Request[messages.Pull]) -> Reply:
        message = request.message
        with self._condition:
            served = self._state.served(message.snapshot)
            if message.regions is not None:
                return served.regions(request)
            if message.in_place:
                return self._begin_read(request, served)
            return served.values(keys_of(request.layout), request.out, message.checksum, message.pull_dtype)

    def _begin_read(self, request: Request[messages.Pull], served: ServedValues) -> Reply:
        """Reply with where values are, and keep them as they are; with nothing if no other process can open them."""
        keys, message, sender = keys_of(request.layout), request.message, request.sender
        # Raises if the client expects another layout.
        served.layout(keys, message.checksum, None)
        entries = None if message.snapshot is None else self._state.snapshots.entries(message.snapshot, keys)
        places = self._state.reads.begin(keys, sender.client, str(sender.owner), sender.seq, entries)
        if places is None:
            return Reply({"in_place": None})
        return Reply({"in_place": places.segments}, bytes_of(places.table.reshape(-1).view(np.uint8)))

    def _end_read(self, request: Request[messages.EndRead]) -> Reply:
        snapshot, sender = request.message.snapshot, request.sender
        with self._condition:
            held = self._state.reads.end(sender.client, sender.seq)
            if snapshot is not None:
                # What was read is right, even if the snapshot was dropped meanwhile.
                with suppress(SnapshotError) if held else nullcontext():
                    self._state.served(snapshot)
                    held = True
            return Reply({"held": held})

    def _wait_for_version(self, request: Request[messages.WaitForVersion]) -> Reply:
        keys, wanted, shard = keys_of(request.layout), request.message.min_version, self._state.shard

        def older() -> str:
            behind = ((key, shard.entry("pull", key).version) for key in keys)
            return next((f"{quote(key)}, which is at {version}" for key, version in behind if version < wanted), "")

        with self._condition:
            self._condition.wait_for(lambda: not older(), lambda: f"version {wanted} of {older()}")
        return Reply({})

    def _pull_rows(self, request: Request[messages.PullRows]) -> Reply:
        with self._condition:
            return self._state.served(request.message.snapshot).rows(request)

    # ------------------------------------------------------------ keys and the rule

    def _init(self, request: Request[messages.Init]) -> Reply:
        self._state.check_metadata(request.message.kinds)
        with collector.paused():
            entries = new_entries(request, self._state.shard, self.index)
        with self._condition:
            self._admit(request)
            before = self._changes
            if not self._has_applied(request):
                self._state.shard.check_new([entry.key for entry in entries])
                self._state.set_metadata(metadata_of(request.message))
            with self._change(request) as ids:
                if ids:
                    self._state.init(entries, ids)
            return self._changed_from(before, ids)

    def _restore(self, request: Request[messages.Restore]) -> Reply:
        contents = contents_of(request)
        self._state.check_metadata(request.message.metadata.values())
        self._state.check_metadata(released_metadata(contents))
        with self._change(request) as ids:
            if ids:
                self._state.restore(contents, request.message.metadata, ids)
        return Reply({})

    def _delete(self, request: Request[messages.Delete]) -> Reply:
        keys = check_keys("delete", request.message.keys)
        with self._condition:
            self._admit(request)
            before = self._changes
            with self._change(request) as ids:
                if ids:
                    self._state.delete(keys, ids)
            self._state.drop_metadata(keys)
            return self._changed_from(before, ids)

    def _set_rule(self, request: Request[messages.SetRule]) -> Reply:
        optimizer = request.message.optimizer
        with self._change(request) as ids:
            if ids:
                self._state.set_rule(optimizer, ids)
            self._membership.count_rules(request.message.number, None if optimizer is None else optimizer["name"])
        return Reply({})

    def _set_hyperparameters(self, request: Request[messages.SetHyperparameters]) -> Reply:
        numbers, keys = request.message.numbers, request.message.keys
        keys = keys and check_keys("set_hyperparameters", keys)
        with self._change(request) as ids:
            if ids:
                self._state.shard.set_hyperparameters(numbers, keys, requests=ids)
        return Reply({})

    def _wait_for_rule(self, request: Request[messages.WaitForRule]) -> Reply:
        number, name = self._membership.wait_for_rule(request.message.number)
        return Reply({"number": number, "name": name})

    def _list_keys(self, request: Request[messages.ListKeys]) -> Reply:
        # Read before the keys: a change in between has the client ask once more, not miss it.
        changes = self._changes
        told: dict[str, Any] = {"optimizer": self._state.describe_optimizer()}
        if changes != request.message.known:
            told |= {"changes": changes, **self._state.listing()}
        return Reply(told)

    def _changed_from(self, before: list[Any], ids: RequestIds) -> Reply:
        """Return between which ``changes`` a request was applied; nothing of one that was applied before."""
        return Reply({"before": before, "changes": self._changes} if ids else {})

    @property
    def _changes(self) -> list[Any]:
        """What differs when the keys or their metadata do."""
        return [self.incarnation, self._state.inits]

    def _info(self, request: Request[messages.Info]) -> Reply:
        found = [self._state.shard.entry("info", key) for key in request.message.keys]
        return Reply({"versions": [each.version for each in found], "nbytes": [each.value.nbytes for each in found]})

    def _stats(self, request: Request[messages.Stats]) -> Reply:
        return Reply(self.stats())

    # ------------------------------------------------------------ clients

    def _connect(self, request: Request[messages.Connect]) -> Reply:
        message = request.message
        rank, completed = self._membership.take_rank(
            str(request.sender.owner), message.wanted_rank, is_reader=message.reader
        )
        return Reply({"rank": rank, "completed": completed})

    def _heartbeat(self, request: Request[messages.Heartbeat]) -> Reply:
        self._membership.remove_idle()
        self._refuse_given_up(request)
        self._drop_snapshots_of_dead_clients()
        return Reply({"changes": self._changes, "rule": self._state.rule_changes})

    def _refuse_given_up(self, request: Request[messages.Heartbeat]) -> None:
        """Refuse requests that are not sent again, unless they were applied, so that no snapshot waits for them."""
        tables = self._tables
        with self._condition:
            for client, seq in request.message.given_up or ():
                is_own = client.partition(".")[0] == request.sender.owner
                # A push in an open round is applied when the others push.
                if is_own and not tables.has_ended(client, seq) and not self._sync_rounds.holds(client, seq):
                    tables.refused[client] = seq, PushOutcomeUnknownError("its client has given this request up")
                    self._condition.notify_all()

    def _disconnect(self, request: Request[messages.Disconnect]) -> Reply:
        self.is_broken = self.is_broken or request.message.broken
        self._membership.disconnect(str(request.sender.owner))
        self._drop_snapshots_of_dead_clients()
        if self.index == 0:
            # New clients connect to this server first, and are refused from now on.
            self._membership.end_if_unused()
        alive, dead = self._membership.count()
        return Reply({"clients": alive, "dead_clients": dead})

    def _drop_snapshots_of_dead_clients(self) -> None:
        with self._condition:
            clients = self._membership.clients()
            self._state.snapshots.drop_all_but_of(clients)
            self._state.snapshots.drop_expired()
            self._state.reads.drop_all_but_of(clients)
            members = self._tables.members
            self._results = {client: each for client, each in self._results.items() if process_of(client) in members}
            if self.index == 0:
                self._state.drop_unfinished_releases(clients)

    def _claim(self, request: Request[messages.Claim]) -> Reply:
        self._membership.claim(str(request.sender.owner), request.message.number)
        return Reply({})

    def _unclaim(self, request: Request[messages.Unclaim]) -> Reply:
        self._membership.unclaim(str(request.sender.owner), request.message.number)
        return Reply({})

    def _leave(self, request: Request[messages.Leave]) -> Reply:
        self._membership.leave(request.message.number, _rank_of(request))
        return Reply({})

    def _barrier(self, request: Request[messages.Barrier]) -> Reply:
        self._membership.barrier(request.message.number, _rank_of(request))
        return Reply({})

    def _broadcast(self, request: Request[messages.Broadcast]) -> Reply:
        return Reply({"text": self._membership.broadcast(request.message.number, request.message.text)})

    # ------------------------------------------------------------ snapshots

    def _prepare(self, request: Request[messages.Prepare]) -> Reply:
        sender, release = request.sender, request.message.release
        with self._condition:
            if release is not None:
                check_name("publish", release)
            last = self._snapshot_barrier.prepare(sender.client, sender.seq, self._membership.clients())
            if release is not None:
                # Not before: another client may have published it while this one waited.
                self._state.check_new_release(release, str(sender.owner))
            told = {} if release is None else {"number": self._state.shard.releases.next_number}
            return Reply({"last_requests": last, **told})

    def _commit(self, request: Request[messages.Commit]) -> Reply:
        sender, message = request.sender, request.message
        name, release, state = message.snapshot, message.release, self._state

        def take() -> Reply:
            if release is not None:
                return Reply({"keys": state.add_release(message, release, str(sender.owner))})
            if name is None:
                # Which releases there are, server 0 tells.
                return state.contents(message.releases, visible_only=self.index == 0)
            state.snapshots.take(name, str(sender.owner))
            return Reply(state.snapshots.describe(name))

        with self._condition:
            # The reply may have been lost.
            if name is not None and name in state.snapshots:
                return Reply(state.snapshots.describe(name))
            if any((held.name, held.attempt) == (release, message.attempt) for held in state.shard.releases.hidden()):
                return Reply({"keys": state.listed_here(message)})
            taken: Reply = self._snapshot_barrier.commit(sender.client, sender.seq, message.wanted, take)
            return taken

    def _abort(self, request: Request[messages.Abort]) -> Reply:
        with self._condition:
            self._snapshot_barrier.abort(request.sender.client, request.sender.seq)
        return Reply({})

    def _drop_snapshot(self, request: Request[messages.DropSnapshot]) -> Reply:
        with self._condition:
            self._state.snapshots.drop(request.message.snapshot)
        return Reply({})

    # ------------------------------------------------------------ releases

    def _publish(self, request: Request[messages.Publish]) -> Reply:
        message = request.message
        check_name("publish", message.release)
        check_keep("publish", message.keep)
        keys = message.keys and check_keys("publish", message.keys)
        with self._change(request) as ids:
            if ids:
                self._state.shard.publish(message.release, keys, message.keep, requests=ids)
        return Reply({})

    def _show_release(self, request: Request[messages.ShowRelease]) -> Reply:
        check_keep("publish", request.message.keep)
        with self._change(request) as ids:
            if ids:
                owner = str(request.sender.owner)
                self._state.show_release(request.message.release, request.message.keep, owner, ids)
            return self._told_releases()

    def _unpublish(self, request: Request[messages.Unpublish]) -> Reply:
        message, shard = request.message, self._state.shard
        with self._change(request) as ids:
            owner = str(request.sender.owner)
            if ids and (not message.missing_ok or self._state.is_begun(message.release, owner)):
                shard.unpublish(message.release, hidden_ok=message.missing_ok, requests=ids)
            return self._told_releases(shard.releases.numbers.get(message.release, 0))

    def _keep_releases(self, request: Request[messages.KeepReleases]) -> Reply:
        with self._change(request) as ids:
            if ids and request.message.generation == self._state.shard.releases.generation:
                self._state.keep_releases(request.message.number, request.message.releases, ids)
        return Reply({})

    def _told_releases(self, dropped: int = 0) -> Reply:
        """Reply with the releases that stay, and the number up to which others need not keep any but these.

        Args:
            dropped: the number of a release that was dropped, which may be the newest.
        """
        releases = self._state.shard.releases
        held = releases.lasting()
        newest = max([dropped, *(each.number for each in held if each.is_visible)])
        told = {"releases": [each.name for each in held], "number": newest, "generation": releases.generation}
        return Reply(told)

    def _list_releases(self, request: Request[messages.ListReleases]) -> Reply:
        with self._condition:
            held = self._state.shard.held_releases()
            return Reply({"releases": [[each.name, each.number] for each in held]})

    def _wait_for_release(self, request: Request[messages.WaitForRelease]) -> Reply:
        after, shard = request.message.after, self._state.shard
        with self._condition:
            self._condition.wait_for(
                lambda: shard.newest_release(after) is not None,
                lambda: "a release" if after is None else f"a release after {quote(after)}",
            )
            return Reply({"name": shard.newest_release(after)})

    def _open_release(self, request: Request[messages.OpenRelease]) -> Reply:
        message, state = request.message, self._state
        if not 0 < message.lease_s < _LONGEST_LEASE_S:
            raise ArgumentError(f"malformed open_release; expected a lease of at most {_LONGEST_LEASE_S:g} s")
        with self._condition:
            # Server 0 says which ones readers see.
            if self.index > 0:
                state.shard.releases.reveal(message.release)
            generation = state.shard.releases.generation
            if message.generation not in (None, generation):
                raise SnapshotError(
                    f"the release {quote(message.release)} that was open was replaced by load; open it again"
                )
            owner = str(request.sender.owner)
            held = state.snapshots.open_release(message.snapshot, owner, message.release, message.lease_s)
            listing = state.snapshots.describe(message.snapshot, message.known)
            return Reply({"number": held.number, "generation": generation, **listing})

    def _find_changes(self, request: Request[messages.FindChanges]) -> Reply:
        message = request.message
        with self._comparing(message.snapshot, message.release) as opened:
            base, found = self._state.changes.changes(message.release, opened, message.since, unknown_ok=self.index > 0)
            return encode_changes(base, found, request.out)

    def _digests(self, request: Request[messages.Digests]) -> Reply:
        message = request.message
        with self._comparing(message.snapshot, message.release) as opened:
            digests = self._state.changes.digests(message.release, opened)
        return Reply({"keys": list(digests)}, bytes_of(np.array(list(digests.values()), np.uint64).view(np.uint8)))

    @contextmanager
    def _comparing(self, token: str, release: str) -> Iterator[ShardSnapshot]:
        """Give the values of a release that a client has open, while pushes go on."""
        with ExitStack() as stack:
            with self._condition:
                opened = stack.enter_context(self._state.snapshots.comparing(token, release))
            yield opened

    # ------------------------------------------------------------ what workers owe

    def _keep_owed(self, request: Request[messages.KeepOwed]) -> Reply:
        message = request.message
        # Raises if they do not fit together.
        unpack(request.layout, request.payload)
        with self._condition:
            if message.token:
                self._owed[message.worker] = message.token, request.layout, bytes(request.payload)
            else:
                self._owed.clear()
            self._condition.notify_all()
        return Reply({})

    def _take_owed(self, request: Request[messages.TakeOwed]) -> Reply:
        message = request.message
        nothing = message.token, b"[]", b""
        with self._condition:
            if message.waits:
                self._condition.wait_for(
                    lambda: self._has_owed(message) or message.worker not in self._staleness.live(),
                    lambda: f"{self._staleness.describe([message.worker])}, which have not sent their residuals yet",
                )
            _, layout, payload = self._owed[message.worker] if self._has_owed(message) else nothing
        return Reply({"layout": layout.decode()}, bytes_of(bytearray(payload)))

    def _has_owed(self, message: messages.TakeOwed) -> bool:
        return self._owed.get(message.worker, ("",))[0] == message.token

    # ------------------------------------------------------------ each change once

    def _record(self, *events: list[Any]) -> None:
        """Log events, and apply them to the tables."""
        self._state.record(events)

    @contextmanager
    def _change(self, request: Request[Message], keys: Sequence[Key] = ()) -> Iterator[RequestIds]:
        """Hold the lock for a change; yield its request id, or nothing if it was applied before. Keys are of a push."""
        sender = request.sender
        with self._condition:
            if not self._is_resent(request):
                self._snapshot_barrier.admit(sender.client, sender.seq)
            refusal = self._tables.refusal(sender.client, sender.seq)
            if self._has_applied(request):
                yield ()
            elif refusal is not None:
                raise refusal
            else:
                words = _logged(request)
                ids = [(sender.client, sender.seq, words) if words else (sender.client, sender.seq)]
                with self._refusing(request):
                    yield ids
                # Where there is a log, it has counted them with the change.
                self._tables.add(ids, keys)
            self._condition.notify_all()

    @contextmanager
    def _refusing(self, request: Request[Message]) -> Iterator[None]:
        """Note an error of a change in this block, which ends its request here."""
        sender = request.sender
        try:
            yield
        except RetryLater:
            raise
        except Exception as error:
            # Other servers may have applied it, and a snapshot does not wait for it here.
            told = errors.decode(errors.encode(self._refusal(request.verb, error)))
            self._tables.refused[sender.client] = sender.seq, told
            self._condition.notify_all()
            raise

    def _admit(self, request: Request[Message]) -> None:
        """Wait until a request may be applied; meanwhile an earlier message of the same request may have been."""
        if not self._has_applied(request):
            self._snapshot_barrier.admit(request.sender.client, request.sender.seq)

    def _is_resent(self, request: Request[Message]) -> bool:
        has_applied = self._has_applied(request)
        self._resent += has_applied
        return has_applied

    def _has_applied(self, request: Request[Message]) -> bool:
        return self._tables.has_applied(request.sender.client, request.sender.seq)


def _rank_of(request: Request[Message]) -> int:
    rank = request.sender.rank
    if rank is None:
        raise ArgumentError(f"{request.verb}: this client has no rank")
    return rank


def _logged(request: Request[Message]) -> dict[str, Any]:
    """Return what is logged of a request besides its id, by the names that logs have: servers, rank and round."""
    sender, message = request.sender, request.message
    words: dict[str, Any] = {"fan": sender.servers} if sender.servers else {}
    if isinstance(message, Push):
        words |= {} if sender.rank is None else {"rank": sender.rank}
        words |= {} if message.round is None else {"step": message.round[:2]}
    return words
