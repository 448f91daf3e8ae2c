"""Server: what is done with what clients ask. No Ray in it, and no thread of its own.

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
from tensorkv.transport.wire import Reply, Request, Settings

from .call import keys_of, read
from .cut import Cut
from .membership import Attendance
from .memory import Memory
from .rounds import Rounds
from .state import Holding, contents_of
from .sync_round import Gathering, Pushed
from .wait import AwakeClock, Monitor, Waits


class Server:
    """One server of a store.

    Args:
        settings: of the store and this server.
        comes_back: whether it was there before, and workers are waiting for it.
        now: a clock in seconds.

    Raises:
        StorageError: its folder cannot be opened.
    """

    def __init__(
        self, settings: Settings, *, comes_back: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        # Tells a server that has begun again from the one that was there before.
        self.incarnation = secrets.token_hex(8)
        # Who has been silent: as long as it could not have heard anybody, nobody has.
        awake = AwakeClock(now, settings.lost_after_s / 2)
        self._rounds = Rounds(settings.num_workers, settings.lost_after_s, awake)
        self._clients = Memory(self._rounds)
        self._holding = Holding(settings, self._clients)
        self._monitor = Monitor()
        self._attendance = Attendance(
            self._monitor, self._clients, self._remember, settings.num_workers, settings.lost_after_s, awake
        )
        if comes_back:
            self._attendance.begin_again()
        else:
            self._remember(["new"])
        self._cut = Cut(self._monitor, self._clients, settings.index, now)
        self._gathering = Gathering(self._apply_round, self._clients.lists)
        self._metrics = Metrics()
        self._resent = 0
        self._verbs: dict[str, Callable[[Request, torch.Tensor | None], Reply]] = {
            "push": self._push,
            "pull": self._pull,
            "await": self._await,
            "pull_rows": self._pull_rows,
            "init": self._init,
            "delete": self._delete,
            "rule": self._rule,
            "restore": self._restore,
            "list": self._list,
            "info": self._info,
            "stats": self._stats,
            "hello": self._hello,
            "claim": self._claim,
            "beat": self._beat,
            "bye": self._bye,
            "leave": self._leave,
            "meet": self._meet,
            "tell": self._tell,
            "freeze": self._freeze,
            "settle": self._settle,
            "thaw": self._thaw,
            "drop": self._drop,
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
                raise ArgumentError(f"a server knows no {verb!r}")
            patience = request.head.get("patience_s")
            self._monitor.be_patient(None if patience is None else float(patience))
            if verb == "hello" and self._attendance.is_closed_to(request.owner):
                return Reply({"ending": True})
            if verb != "bye":
                self._attendance.hear(request.head)
            reply = method(request, out)
        except Waits as waits:
            return Reply({"wait_for": str(waits)})
        except TensorKVError as error:
            return _refusal(type(error).__name__, str(error))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            return _refusal("ArgumentError", f"a request that cannot be read: {type(error).__name__}: {error}")
        except (MemoryError, OSError, RuntimeError) as error:
            return _refusal("WorkerError", f"server {self.settings.index} failed: {type(error).__name__}: {error}")
        moved = len(request.payload) + (0 if reply.payload is None else len(reply.payload))
        name = "pushpull" if request.head.get("pulls") else verb
        self._metrics.add(name, start, [name], [moved])
        return reply

    @property
    def is_ending(self) -> bool:
        """Whether the last client has said goodbye, and nobody else is let in."""
        return self._clients.is_ending

    def owners(self) -> list[str]:
        """Return the processes that are alive and use this server."""
        return self._attendance.clients()

    def stats(self) -> dict[str, Any]:
        """Return counts of what is held, of what was asked, and of workers."""
        rounds = self._rounds
        mine = {
            "verbs": self._metrics.read()["verbs"],
            "clients": len(self._attendance.clients()),
            "live": rounds.live(),
            "here": rounds.here(),
            "dead": rounds.dead(),
            "rounds": list(rounds.read().items()),
            "ahead": rounds.lead(),
            "most_ahead": rounds.most_ahead,
            "pid": os.getpid(),
            "resent": self._resent,
            "waits": self._monitor.count,
            "waited_s": self._monitor.seconds,
        }
        return {**mine, **self._holding.stats()}

    def signature(self, request: Request) -> tuple[int, ...] | None:
        """Return the versions of the keys of a pull, which tell whether their values have changed; None: refused."""
        try:
            with self._monitor:
                return self._holding.versions(keys_of(request.layout), request.head.get("of"))
        except TensorKVError:
            return None

    def close(self) -> None:
        """Let go of the values and the folder."""
        with self._monitor:
            self._holding.shard.close()

    # ------------------------------------------------------------ pushes and pulls

    def _push(self, request: Request, out: torch.Tensor | None) -> Reply:
        keys, pulls = read(request.layout).keys, bool(request.head.get("pulls"))
        staleness, rank = self.settings.staleness, request.head.get("rank")
        reply = None
        if self.settings.mode == "sync":
            moved = self._push_in_step(request, keys)
            if moved is not None:
                return moved
        else:
            with self._monitor:
                if not self._clients.has_applied(request.client, request.seq):
                    # One that did not wait until the end for its last push.
                    self._wait_for_the_slow(rank, staleness, "")
                with self._turn(request, keys) as is_new:
                    if is_new:
                        reply = self._holding.push(request, out, fill=pulls and staleness is None)
                self._wait_for_the_slow(rank, staleness, "; this push has been applied")
        if reply is None:
            with self._monitor:
                reply = self._holding.values(keys, out, request.head) if pulls else Reply({})
        return reply

    def _wait_for_the_slow(self, rank: int | None, staleness: int | None, then: str) -> None:
        if rank is None or staleness is None:
            return
        describe = self._rounds.describe
        self._monitor.wait_until(
            lambda: not self._rounds.behind(rank, staleness),
            lambda: f"{describe(self._rounds.behind(rank, staleness))}, more than {staleness} rounds behind{then}",
        )

    def _push_in_step(self, request: Request, keys: tuple[Key, ...]) -> Reply | None:
        """Hold a push until its round is complete; return a reply if that round is closed, and nothing was done."""
        rank, client, seq = request.head.get("rank"), request.client, request.seq
        describe, gathering = self._rounds.describe, self._gathering
        name, number, first = request.head.get("step") or (json.dumps(keys), None, 0)
        if rank is None:
            raise ArgumentError("push: this client has no rank, and in step only workers push")
        with self._monitor:
            self._admit(request)
            if not self._is_resent(request) and gathering.refused(client, seq) is None:
                if number is None:
                    number = gathering.next(name)
                elif number < gathering.next(name) and not request.head.get("late"):
                    return Reply({"moved": gathering.next(name)})
                batch = self._holding.batch(request)
                self._holding.shard.check(batch)
                pushed = Pushed(client, seq, [parts[0] for parts in batch.parts], _logged(request))
                if request.head.get("late"):
                    # Other servers have it in a round that was closed here without it.
                    gathering.finish(keys, {rank: pushed})
                else:
                    gathering.add(name, keys, number, first, rank, pushed)
            self._monitor.wait_until(
                lambda: self._has_closed(client, seq),
                lambda: (
                    f"{describe(gathering.awaited(name, number or 0, self._rounds.live()))}, which have not pushed yet"
                ),
            )
            refused = gathering.refused(client, seq)
        if refused is not None:
            raise refused
        return None

    def _has_closed(self, client: str, seq: int) -> bool:
        self._gathering.close(self._rounds.live(), self._cut.admits)
        return self._clients.has_applied(client, seq) or self._gathering.refused(client, seq) is not None

    def _apply_round(self, keys: Sequence[Key], parts: Sequence[list[Part]], pushed: Sequence[Pushed]) -> None:
        with self._clients.together([(each.client, each.seq, each.words) for each in pushed], keys):
            self._holding.push_round(keys, parts)
        self._monitor.changed()

    def _pull(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._await(request, out)
        with self._monitor:
            return self._holding.values(keys_of(request.layout), out, request.head)

    def _await(self, request: Request, out: torch.Tensor | None) -> Reply:
        """Answer, without values, when the versions that a pull wants are there."""
        keys, wanted = keys_of(request.layout), request.head.get("min_version")
        if wanted is not None:
            shard = self._holding.shard
            with self._monitor:
                self._monitor.wait_until(
                    lambda: all(shard.entry("pull", key).version >= wanted for key in keys),
                    lambda: f"version {wanted}, which has not come yet",
                )
        return Reply({})

    def _pull_rows(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._monitor:
            return self._holding.rows(request, out)

    # ------------------------------------------------------------ keys and the rule

    def _init(self, request: Request, out: torch.Tensor | None) -> Reply:
        contents = contents_of(request)
        with self._monitor:
            self._admit(request)
            if not self._clients.has_applied(request.client, request.seq):
                self._holding.shard.check_new([entry.key for entry in contents.entries])
                self._holding.take_notes(request.head["notes"])
            with self._turn(request) as is_new:
                if is_new:
                    self._holding.init(contents)
        return Reply({})

    def _delete(self, request: Request, out: torch.Tensor | None) -> Reply:
        keys = request.head["keys"]
        with self._monitor, self._turn(request) as is_new:
            if is_new:
                self._holding.delete(keys)
        with self._monitor:
            self._holding.drop_notes(keys)
        return Reply({})

    def _rule(self, request: Request, out: torch.Tensor | None) -> Reply:
        awaited, shard = request.head.get("awaits"), self._holding.shard
        if awaited is not None:
            with self._monitor:
                self._monitor.wait_until(
                    lambda: shard.optimizer is not None and shard.optimizer.name == awaited,
                    lambda: f"rank 0, which has not set the optimizer {awaited} yet",
                )
            return Reply({})
        with self._turn(request) as is_new:
            if is_new:
                self._holding.change_rule(request.head)
        return Reply({})

    def _claim(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._attendance.claim(request.owner, int(request.head["number"]), wants=request.head["wants"])
        return Reply({})

    def _restore(self, request: Request, out: torch.Tensor | None) -> Reply:
        contents, notes = contents_of(request), request.head["notes"]
        with self._monitor:
            self._admit(request)
            if self._is_resent(request):
                return Reply({})
            keys, before = self._holding.shard.keys(), self._holding.notes(notes)
            self._holding.take_notes(notes)
            try:
                with self._turn(request):
                    self._holding.restore(contents)
            except BaseException:
                # The keys are where they were.
                with suppress(TensorKVError):
                    self._holding.take_notes(before)
                raise
            self._holding.drop_notes(keys)
        return Reply({})

    def _list(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply(self._listing())

    def _info(self, request: Request, out: torch.Tensor | None) -> Reply:
        info = self._holding.shard.entry("info", request.head["key"]).info()
        return Reply({"version": info.version, "nbytes": info.nbytes, "device": info.device})

    def _listing(self) -> dict[str, Any]:
        return {"incarnation": self.incarnation, **self._holding.listing()}

    def _stats(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply(self.stats())

    # ------------------------------------------------------------ clients

    def _hello(self, request: Request, out: torch.Tensor | None) -> Reply:
        head = request.head
        if not head["ranks"]:
            return Reply({"rank": None, **self._listing()})
        rank, over = self._attendance.take_rank(request.owner, head.get("wants"))
        return Reply({"rank": rank, "over": over, **self._listing()})

    def _beat(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._attendance.forget_the_silent()
        with self._monitor:
            self._holding.views.drop_all_but_of(self._attendance.clients())
        changes = [self.incarnation, self._holding.inits]
        return Reply({"incarnation": self.incarnation, "changes": changes, "dead": self._rounds.dead()})

    def _bye(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._attendance.forget(request.owner)
        with self._monitor:
            self._holding.views.drop_all_but_of(self._attendance.clients())
        if self.settings.index == 0:
            # Whoever comes asks this server first: from now on it is told that there is nothing to come to.
            self._attendance.may_end()
        here, silent = self._attendance.count()
        return Reply({"clients": here, "silent": silent})

    def _leave(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._attendance.leave(request.head["number"], request.head["rank"])
        return Reply({})

    def _meet(self, request: Request, out: torch.Tensor | None) -> Reply:
        self._attendance.meet(request.head["number"], request.head["rank"])
        return Reply({})

    def _tell(self, request: Request, out: torch.Tensor | None) -> Reply:
        return Reply({"text": self._attendance.tell(request.head["number"], request.head["text"])})

    # ------------------------------------------------------------ one moment on every server

    def _freeze(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._monitor:
            return Reply({"fans": self._cut.freeze(request.client, request.seq, self._attendance.clients())})

    def _settle(self, request: Request, out: torch.Tensor | None) -> Reply:
        head = request.head

        def look() -> Reply:
            if head.get("states"):
                return self._holding.describe()
            return Reply({"keys": self._holding.view(head["view"], request.owner)})

        with self._monitor:
            if head.get("view") in self._holding.views:
                # The answer was lost.
                return Reply({"keys": self._holding.views.describe(head["view"])})
            found: Reply = self._cut.settle(request.client, request.seq, head["wanted"], look)
            return found

    def _thaw(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._monitor:
            self._cut.thaw(request.client, request.seq)
        return Reply({})

    def _drop(self, request: Request, out: torch.Tensor | None) -> Reply:
        with self._monitor:
            self._holding.views.drop(request.head["view"])
        return Reply({})

    # ------------------------------------------------------------ inside

    def _remember(self, *events: list[Any]) -> None:
        self._holding.remember(events)

    @contextmanager
    def _turn(self, request: Request, keys: Sequence[Key] = ()) -> Iterator[bool]:
        """Hold the lock for a change, of a push's keys; give whether it is new."""
        client, seq = request.client, request.seq
        with self._monitor:
            if not self._is_resent(request):
                self._cut.admit(client, seq)
            with self._clients.request(client, seq, _logged(request), keys) as is_new:
                yield is_new
            self._monitor.changed()

    def _admit(self, request: Request) -> None:
        """Wait until a request may be applied; meanwhile one that was sent before it, of the same number, may be."""
        if not self._clients.has_applied(request.client, request.seq):
            self._cut.admit(request.client, request.seq)

    def _is_resent(self, request: Request) -> bool:
        applied = self._clients.has_applied(request.client, request.seq)
        self._resent += applied
        return applied


def _logged(request: Request) -> dict[str, Any]:
    """Return what is logged of a request besides its number: the servers it goes to, and of a push the rank."""
    fan, rank = request.head.get("fan", ()), request.head.get("rank")
    words: dict[str, Any] = {"fan": list(fan)} if len(fan) > 1 else {}
    if request.head["verb"] == "push":
        words |= {"rank": rank} if rank is not None else {}
        words |= {"step": request.head["step"][:2]} if "step" in request.head else {}
    return words


def _refusal(name: str, message: str) -> Reply:
    return Reply({"error": [name, message]})
