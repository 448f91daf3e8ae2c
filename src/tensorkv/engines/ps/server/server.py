"""The server of a store: what each request does. It knows no Ray, and has no thread of its own.

A request is a head (plain data), a layout and a payload, as in a record; ``serve`` may be called from many threads.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.errors import ArgumentError, TensorKVError
from tensorkv.runtime.stats import Metrics, clock
from tensorkv.shard.entry import Part
from tensorkv.transport.wire import Reply, Request

from ..messages import keys_of, push_layout
from ..options import PSOptions
from .membership import Membership
from .snapshot import SnapshotBarrier
from .staleness import StalenessClock
from .state import ServerState, contents_of
from .sync_round import PendingPush, SyncRounds
from .tables import ServerTables
from .wait import AwakeClock, Condition, RetryLater


class Server:
    """One server of a store.

    Args:
        options: of the store.
        index: of this server.
        threads: as for ``Shard``.
        comes_back: whether this is a restart, and workers are waiting for it.
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
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.index = options, index
        # Differs after a restart.
        self.incarnation = secrets.token_hex(8)
        # While this process was stopped it could not read heartbeats, so no worker is dead for lack of them.
        awake = AwakeClock(now, options.heartbeat_timeout_s / 2)
        self._staleness = StalenessClock(options.num_workers, options.heartbeat_timeout_s, awake)
        self._tables = ServerTables(self._staleness)
        self._state = ServerState(options, index, threads, self._tables)
        self._condition = Condition()
        self._membership = Membership(
            self._condition, self._tables, self._record, options.num_workers, options.heartbeat_timeout_s, awake
        )
        if comes_back:
            self._membership.recover()
        else:
            self._record(["new"])
        self._snapshot_barrier = SnapshotBarrier(self._condition, self._tables, index, now)
        self._sync_rounds = SyncRounds(self._apply_round, self._tables.lists)
        self._metrics = Metrics()
        self._resent = 0
        self._verbs: dict[str, Callable[[Request, torch.Tensor | None], Reply]] = {
            "push": self._push,
            "pull": self._pull,
            "wait_for_version": self._wait_for_version,
            "pull_rows": self._pull_rows,
            "init": self._init,
            "delete": self._delete,
            "rule": self._rule,
            "restore": self._restore,
            "list": self._list,
            "info": self._info,
            "stats": self._stats,
            "connect": self._connect,
            "claim": self._claim,
            "heartbeat": self._heartbeat,
            "disconnect": self._disconnect,
            "leave": self._leave,
            "barrier": self._barrier,
            "broadcast": self._broadcast,
            "prepare": self._prepare,
            "commit": self._commit,
            "abort": self._abort,
            "drop_snapshot": self._drop_snapshot,
        }

    def serve(self, request: Request, out: torch.Tensor | None = None) -> Reply:
        """Answer a request.

        Args:
            request: from a client.
            out: bytes, in which pulled values are put if they fit, instead of in new memory.

        Returns:
            A reply. Its head has ``"error"`` (class name and message) if the request was refused, and ``"wait_for"``
            if it has to be sent again.
        """
        verb, start = str(request.head.get("verb")), clock()
        try:
            method = self._verbs.get(verb)
            if method is None:
                raise ArgumentError(f"unknown request {verb!r}")
            patience = request.head.get("poll_timeout_s")
            self._condition.set_poll_timeout(None if patience is None else float(patience))
            if verb == "connect" and self._membership.is_closed_to(request.owner):
                return Reply({"ending": True})
            if verb != "disconnect":
                self._membership.heartbeat(request.head)
            reply = method(request, out)
        except RetryLater as waits:
            return Reply({"wait_for": str(waits)})
        except TensorKVError as error:
            return _refusal(type(error).__name__, str(error))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            return _refusal("ArgumentError", f"malformed request: {type(error).__name__}: {error}")
        except (MemoryError, OSError, RuntimeError) as error:
            return _refusal("WorkerError", f"server {self.index} failed: {type(error).__name__}: {error}")
        moved = len(request.payload) + (0 if reply.payload is None else len(reply.payload))
        name = "pushpull" if request.head.get("pulls") else verb
        self._metrics.add(name, start, [name], [moved])
        return reply

    @property
    def is_ending(self) -> bool:
        """Whether the last client has disconnected, and no other is accepted."""
        return self._tables.is_ending

    def owners(self) -> list[str]:
        """Return the clients that are alive."""
        return self._membership.clients()

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
            "resent": self._resent,
            "waits": self._condition.count,
            "waited_s": self._condition.seconds,
        }
        return {**mine, **self._state.stats()}

    def signature(self, request: Request) -> tuple[int, ...] | None:
        """Return the versions of the keys of a pull, which differ when the values do; None: the pull is refused."""
        try:
            with self._condition:
                return self._state.versions(keys_of(request.layout), request.head.get("of"))
        except TensorKVError:
            return None

    def close(self) -> None:
        """Release the values and the folder."""
        with self._condition:
            self._state.shard.close()

    # ------------------------------------------------------------ pushes and pulls

    def _push(self, request: Request, out: torch.Tensor | None) -> Reply:
        keys, pulls = push_layout(request.layout).keys, bool(request.head.get("pulls"))
        staleness, rank = self.options.staleness, request.head.get("rank")
        reply = None
        if self.options.mode == "sync":
            moved = self._push_in_round(request, keys)
            if moved is not None:
                return moved
        else:
            with self._condition:
                if not self._tables.has_applied(request.client, request.seq):
                    # Of a worker whose last push timed out while it waited here.
                    self._wait_for_slow_workers(rank, staleness, "")
                with self._turn(request, keys) as is_new:
                    if is_new:
                        reply = self._state.push(request, out, fill=pulls and staleness is None)
                self._wait_for_slow_workers(rank, staleness, "; this push has been applied")
        if reply is None:
            with self._condition:
                reply = self._state.values(keys, out, request.head) if pulls else Reply({})
        return reply

    def _wait_for_slow_workers(self, rank: int | None, staleness: int | None, then: str) -> None:
        if rank is None or staleness is None:
            return
        describe = self._staleness.describe
        self._condition.wait_for(
            lambda: not self._staleness.behind(rank, staleness),
            lambda: f"{describe(self._staleness.behind(rank, staleness))}, more than {staleness} rounds behind{then}",
        )

    def _push_in_round(self, request: Request, keys: tuple[Key, ...]) -> Reply | None:
        """Hold a push until its round is complete; return a reply if that round is closed, and nothing was done."""
        rank, client, seq = request.head.get("rank"), request.client, request.seq
        describe, rounds = self._staleness.describe, self._sync_rounds
        name, number, first = request.head.get("step") or (json.dumps(keys), None, 0)
        if rank is None:
            raise ArgumentError("push: this client has no rank; in mode sync only workers push")
        with self._condition:
            self._admit(request)
            if not self._is_resent(request) and rounds.refused(client, seq) is None:
                if number is None:
                    number = rounds.next(name)
                elif number < rounds.next(name) and not request.head.get("late"):
                    return Reply({"moved": rounds.next(name)})
                batch = self._state.batch(request)
                self._state.shard.check(batch)
                pushed = PendingPush(client, seq, [parts[0] for parts in batch.parts], _logged(request))
                if request.head.get("late"):
                    # Other servers have applied it in a round that was closed here without it.
                    rounds.apply(keys, {rank: pushed})
                else:
                    rounds.add(name, keys, number, first, rank, pushed)
            self._condition.wait_for(
                lambda: self._has_closed(client, seq),
                lambda: (
                    f"{describe(rounds.missing(name, number or 0, self._staleness.live()))}, which have not pushed yet"
                ),
            )
            refused = rounds.refused(client, seq)
        if refused is not None:
            raise refused
        return None

    def _has_closed(self, client: str, seq: int) -> bool:
        self._sync_rounds.close(self._staleness.live(), self._snapshot_barrier.admits)
        return self._tables.has_applied(client, seq) or self._sync_rounds.refused(client, seq) is not None

    def _apply_round(self, keys: Sequence[Key], parts: Sequence[list[Part]], pushed: Sequence[PendingPush]) -> None:
        with self._tables.together([(each.client, each.seq, each.words) for each in pushed], keys):
            self._state.push_round(keys, parts)
        self._condition.notify_all()

    def _pull(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._wait_for_version(request, out)
        with self._condition:
            return self._state.values(keys_of(request.layout), out, request.head)

    def _wait_for_version(self, request: Request, out: torch.Tensor | None) -> Reply:
        """Reply without values, when the keys have the versions that a pull wants."""
        keys, wanted = keys_of(request.layout), request.head.get("min_version")
        if wanted is not None:
            shard = self._state.shard
            with self._condition:
                self._condition.wait_for(
                    lambda: all(shard.entry("pull", key).version >= wanted for key in keys),
                    lambda: f"version {wanted}, which the keys have not reached yet",
                )
        return Reply({})

    def _pull_rows(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._condition:
            return self._state.rows(request, out)

    # ------------------------------------------------------------ keys and the rule

    def _init(self, request: Request, out: torch.Tensor | None) -> Reply:
        contents = contents_of(request)
        with self._condition:
            self._admit(request)
            if not self._tables.has_applied(request.client, request.seq):
                self._state.shard.check_new([entry.key for entry in contents.entries])
                self._state.set_metadata(request.head["notes"])
            with self._turn(request) as is_new:
                if is_new:
                    self._state.init(contents)
        return Reply({})

    def _delete(self, request: Request, out: torch.Tensor | None) -> Reply:
        keys = request.head["keys"]
        with self._condition, self._turn(request) as is_new:
            if is_new:
                self._state.delete(keys)
        with self._condition:
            self._state.drop_metadata(keys)
        return Reply({})

    def _rule(self, request: Request, out: torch.Tensor | None) -> Reply:
        awaited, shard = request.head.get("awaits"), self._state.shard
        if awaited is not None:
            with self._condition:
                self._condition.wait_for(
                    lambda: shard.optimizer is not None and shard.optimizer.name == awaited,
                    lambda: f"rank 0, which has not set the optimizer {awaited} yet",
                )
            return Reply({})
        with self._turn(request) as is_new:
            if is_new:
                self._state.change_rule(request.head)
        return Reply({})

    def _claim(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._membership.claim(request.owner, int(request.head["number"]), wants=request.head["wants"])
        return Reply({})

    def _restore(self, request: Request, out: torch.Tensor | None) -> Reply:
        contents, notes = contents_of(request), request.head["notes"]
        with self._condition:
            self._admit(request)
            if self._is_resent(request):
                return Reply({})
            keys, before = self._state.shard.keys(), self._state.metadata(notes)
            self._state.set_metadata(notes)
            try:
                with self._turn(request):
                    self._state.restore(contents)
            except BaseException:
                # The keys are still where they were.
                with suppress(TensorKVError):
                    self._state.set_metadata(before)
                raise
            self._state.drop_metadata(keys)
        return Reply({})

    def _list(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply(self._listing())

    def _info(self, request: Request, out: torch.Tensor | None) -> Reply:
        info = self._state.shard.entry("info", request.head["key"]).info()
        return Reply({"version": info.version, "nbytes": info.nbytes, "device": info.device})

    def _listing(self) -> dict[str, Any]:
        return {"incarnation": self.incarnation, **self._state.listing()}

    def _stats(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply(self.stats())

    # ------------------------------------------------------------ clients

    def _connect(self, request: Request, out: torch.Tensor | None) -> Reply:
        head = request.head
        if not head["ranks"]:
            return Reply({"rank": None, **self._listing()})
        rank, over = self._membership.take_rank(request.owner, head.get("wants"))
        return Reply({"rank": rank, "over": over, **self._listing()})

    def _heartbeat(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._membership.remove_idle()
        with self._condition:
            self._state.snapshots.drop_all_but_of(self._membership.clients())
        changes = [self.incarnation, self._state.inits]
        return Reply({"incarnation": self.incarnation, "changes": changes, "dead": self._staleness.dead()})

    def _disconnect(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._membership.disconnect(request.owner)
        with self._condition:
            self._state.snapshots.drop_all_but_of(self._membership.clients())
        if self.index == 0:
            # New clients connect to this server first, and are refused from now on.
            self._membership.end_if_unused()
        alive, dead = self._membership.count()
        return Reply({"clients": alive, "dead_clients": dead})

    def _leave(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._membership.leave(request.head["number"], request.head["rank"])
        return Reply({})

    def _barrier(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._membership.barrier(request.head["number"], request.head["rank"])
        return Reply({})

    def _broadcast(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply({"text": self._membership.broadcast(request.head["number"], request.head["text"])})

    # ------------------------------------------------------------ snapshots

    def _prepare(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._condition:
            return Reply(
                {"fans": self._snapshot_barrier.prepare(request.client, request.seq, self._membership.clients())}
            )

    def _commit(self, request: Request, out: torch.Tensor | None) -> Reply:
        head = request.head

        def take() -> Reply:
            if head.get("states"):
                return self._state.describe()
            return Reply({"keys": self._state.take_snapshot(head["view"], request.owner)})

        with self._condition:
            if head.get("view") in self._state.snapshots:
                # The reply was lost.
                return Reply({"keys": self._state.snapshots.describe(head["view"])})
            found: Reply = self._snapshot_barrier.commit(request.client, request.seq, head["wanted"], take)
            return found

    def _abort(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._condition:
            self._snapshot_barrier.abort(request.client, request.seq)
        return Reply({})

    def _drop_snapshot(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._condition:
            self._state.snapshots.drop(request.head["view"])
        return Reply({})

    # ------------------------------------------------------------ inside

    def _record(self, *events: list[Any]) -> None:
        self._state.remember(events)

    @contextmanager
    def _turn(self, request: Request, keys: Sequence[Key] = ()) -> Iterator[bool]:
        """Hold the lock for a change; yield whether it is new. Keys are those of a push."""
        client, seq = request.client, request.seq
        with self._condition:
            if not self._is_resent(request):
                self._snapshot_barrier.admit(client, seq)
            with self._tables.request(client, seq, _logged(request), keys) as is_new:
                yield is_new
            self._condition.notify_all()

    def _admit(self, request: Request) -> None:
        """Wait until a request may be applied; meanwhile an earlier message of the same request may have been."""
        if not self._tables.has_applied(request.client, request.seq):
            self._snapshot_barrier.admit(request.client, request.seq)

    def _is_resent(self, request: Request) -> bool:
        applied = self._tables.has_applied(request.client, request.seq)
        self._resent += applied
        return applied


def _logged(request: Request) -> dict[str, Any]:
    """Return what is logged of a request besides its id: its servers, and of a push rank and round."""
    fan, rank = request.head.get("fan", ()), request.head.get("rank")
    words: dict[str, Any] = {"fan": list(fan)} if len(fan) > 1 else {}
    if request.head["verb"] == "push":
        words |= {"rank": rank} if rank is not None else {}
        words |= {"step": request.head["step"][:2]} if "step" in request.head else {}
    return words


def _refusal(name: str, message: str) -> Reply:
    return Reply({"error": [name, message]})
