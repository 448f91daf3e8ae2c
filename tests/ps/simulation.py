"""A simulated cluster: real servers and real clients, with a clock, messages, threads and disks that a seed decides.

No Ray, no waiting: one thread runs at a time, and time passes when all of them wait. A run is a program of several
clients, and faults: servers that are killed and restarted or stand still, clients that are killed or stand still,
messages that are lost, late or delivered twice. ``World.check`` looks at what was promised.
"""

import contextlib
import heapq
import itertools
import json
import random
import threading
from types import SimpleNamespace
from unittest import mock

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from tensorkv import errors
from tensorkv.engines.ps.client import engine as ray_engine
from tensorkv.engines.ps.client import rpc, snapshot
from tensorkv.engines.ps.messages import split
from tensorkv.engines.ps.options import PSOptions
from tensorkv.engines.ps.ray import actor as ray_actor
from tensorkv.engines.ps.ray import cluster, handle
from tensorkv.engines.ps.ray.handle import ServerHandle
from tensorkv.engines.ps.server.server import Server
from tensorkv.storage import durable
from tensorkv.storage.record import Record
from tensorkv.store import KVStore

# So long may a client stand still, and is certainly not taken for lost.
LONG_SILENCE_S = 2.5


# What a launcher has set for a simulated process: threads of several make stores at the same time.
of_thread = threading.local()


def launched(*, strict=True):
    """Return rank and number of workers of the simulated process whose thread this is."""
    return getattr(of_thread, "place", (0, 1))


class BrokenPromiseError(AssertionError):
    """A promise that was not kept."""


class _Ended(BaseException):
    """Ends a simulated thread wherever it waits."""


# ---------------------------------------------------------------- time and threads


class Future:
    """An answer that comes later."""

    def __init__(self, world):
        self._world, self.is_done, self._answer, self._error = world, False, None, None
        self.waiters = []

    def set(self, answer=None, error=None):
        if not self.is_done:
            self.is_done, self._answer, self._error = True, answer, error
            for thread in self.waiters:
                self._world.wake(thread)

    def result(self):
        if self._error is not None:
            raise self._error
        return self._answer


class Event:
    def __init__(self, world):
        self._future = Future(world)
        self._world = world

    def set(self):
        self._future.set()

    def is_set(self):
        return self._future.is_done

    def wait(self, timeout=None):
        self._world.wait(self._future, timeout)
        return self._future.is_done


class Thread:
    """A real thread that runs only while it is told to."""

    def __init__(self, world, target, process):
        self._world, self._target, self.process = world, target, process
        self.go, self.done, self.waits = threading.Lock(), Future(world), 0
        self.go.acquire()
        self.error = None
        process.threads.append(self)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        self._world.at(0, lambda: self._world.resume(self))

    def join(self, timeout=None):
        self._world.wait(self.done, timeout)

    def is_alive(self):
        return not self.done.is_done

    def _run(self):
        self.go.acquire()
        try:
            if not self.process.is_dead:
                self._target()
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self.done.set()
        self._world.back.release()


class Process:
    """A client's process: its threads stand still, and end, together."""

    def __init__(self, name):
        self.name, self.threads, self.is_dead, self.still_until, self.was_still = name, [], False, 0.0, 0.0


class Loop:
    """The one thread that decides who runs, and when."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.now = 1000.0
        self._heap, self._order = [], itertools.count()
        self.back = threading.Lock()
        self.back.acquire()
        self.current = None

    def at(self, delay_s, do):
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), do))

    def step(self):
        self.now, _, do = heapq.heappop(self._heap)
        do()

    def resume(self, thread):
        if thread.done.is_done:
            return
        if thread.process.still_until > self.now and not thread.process.is_dead:
            self.at(thread.process.still_until - self.now, lambda: self.resume(thread))
            return
        before, self.current = self.current, thread
        thread.go.release()
        self.back.acquire()
        self.current = before

    def wake(self, thread):
        number = thread.waits
        self.at(0, lambda: thread.waits == number and self.resume(thread))

    def wait(self, future, timeout):
        """Let others run until a future is set, or for so long."""
        thread = self.current
        if thread.process.is_dead:
            raise _Ended
        thread.waits += 1
        if future is None or not future.is_done:
            if future is not None:
                future.waiters.append(thread)
            if timeout is not None:
                number = thread.waits
                self.at(timeout, lambda: thread.waits == number and self.resume(thread))
            self.back.release()
            thread.go.acquire()
            thread.waits += 1
            if future is not None and thread in future.waiters:
                future.waiters.remove(thread)
        if thread.process.is_dead:
            raise _Ended

    def sleep(self, seconds):
        self.wait(None, max(seconds, 0.1))

    def get(self, future, timeout=None):
        """What ``ray.get`` is to a client."""
        self.wait(future, timeout)
        if not future.is_done:
            raise GetTimeoutError("late")
        return future.result()

    def wait_for_one(self, futures, timeout):
        """What ``ray.wait`` is to a client."""
        self.wait(futures[0], timeout)
        return [each for each in futures if each.is_done], [each for each in futures if not each.is_done]


# ---------------------------------------------------------------- disks


class Disk:
    """A write-ahead log that is kept here, as far as a shard uses one."""

    is_superseded = False

    def __init__(self, disks, path, *_):
        self.path, self._kept = path, disks.setdefault(path, {"snapshot": [], "log": []})
        self.lsn = self.nbytes = 0
        self.counts = {"records": 0, "nbytes": 0, "snapshots": 0, "failed_snapshots": 0}

    @staticmethod
    def _copy(record):
        # Values that are read are changed where they lie.
        return Record(json.loads(json.dumps(record.head)), record.layout, [bytearray(b"".join(record.payload))])

    def append(self, record):
        self._kept["log"].append(self._copy(record))

    def undo(self):
        self._kept["log"].pop()

    def is_due(self, state_nbytes):
        return len(self._kept["log"]) > 25

    def snapshot(self, records):
        self._kept.update(snapshot=[self._copy(each) for each in records], log=[])
        return True

    begin_snapshot = snapshot

    def read(self):
        yield from ((self._copy(each), True) for each in self._kept["snapshot"])
        yield from ((self._copy(each), False) for each in self._kept["log"])

    def begin(self):
        pass

    wait_for_snapshot = close = begin


# ---------------------------------------------------------------- servers


class Actor:
    """One server and its messages."""

    def __init__(self, world, index):
        self.world, self.index = world, index
        self.serve = SimpleNamespace(remote=self._send)
        self.server, self._parked, self._under_way = None, [], set()
        self.is_ended, self.still_until, self.life = False, 0.0, 0
        self.start(comes_back=False)

    def start(self, *, comes_back):
        if not self.is_ended:
            options, world = self.world.options, self.world
            self.server = Server(options, self.index, threads=1, comes_back=comes_back, now=lambda: world.now)
            if comes_back:
                self.world.forget(self.server)
            self.world.watch(self)

    def kill(self, down_s):
        """End as by ``kill -9``, and begin again later, if there is a folder; return whether it ran."""
        if self.server is None:
            return False
        self._end(ActorUnavailableError("killed", None))
        self.world.at(down_s, lambda: self.start(comes_back=True))
        return True

    def stop(self):
        """End for good."""
        self.is_ended = True
        if self.server is not None:
            self._end(ActorDiedError())

    def _end(self, error):
        self.server.close()
        self.server, self.life = None, self.life + 1
        for future in [*self._under_way, *[each[2] for each in self._parked]]:
            future.set(error=error)
        self._parked.clear()
        self._under_way.clear()

    def _send(self, message, payload=None):
        world = self.world
        if world.current.process.is_dead:
            raise _Ended
        future = Future(world)
        fate = world.fate()
        self._under_way.add(future)
        if fate == "lose request":
            world.at(world.delay(), lambda: future.set(error=ActorUnavailableError("lost", None)))
            return future
        head, layout, inline = split(message)
        payload = bytes(inline if payload is None else payload)
        delay_s = world.delay() + world.sent(self, head)
        world.at(delay_s, lambda: self._arrive(head, layout, payload, future, fate == "lose reply"))
        if fate == "twice":
            copy = Future(world)
            world.at(world.delay() + world.delay(), lambda: self._arrive(head, layout, payload, copy, False))
        return future

    def _arrive(self, head, layout, payload, future, is_lost):
        world = self.world
        if self.is_ended:
            future.set(error=ActorDiedError())
        elif self.server is None:
            future.set(error=ActorUnavailableError("down", None))
        elif self.still_until > world.now:
            world.at(
                self.still_until - world.now + world.chance.random() * 0.01,
                lambda: self._arrive(head, layout, payload, future, is_lost),
            )
        else:
            patience = min(1.0, head.pop("poll_timeout_s", 1.0))
            request = {**head, "poll_timeout_s": 0}, layout, payload
            self._parked.append((world.now + patience, request, future, is_lost))
            self._look()
            if any(each[2] is future for each in self._parked):
                world.at(patience, self._look)

    def _look(self):
        """Answer what can be answered; an answer may be what another request waits for."""
        if self.server is None or self.still_until > self.world.now:
            if self.server is not None:
                self.world.at(self.still_until - self.world.now, self._look)
            return
        progress = True
        while progress:
            progress = False
            # The newest first: the others have been looked at before.
            for each in reversed(list(self._parked)):
                until, request, future, is_lost = each
                reply = self.server.serve(*request)
                if "wait_for" in reply.head and until > self.world.now + 1e-9:
                    continue
                self._parked = [other for other in self._parked if other is not each]
                progress = progress or "wait_for" not in reply.head
                self._reply(ray_actor.through_ray(reply), future, is_lost)

    def _reply(self, answer, future, is_lost):
        error = ActorUnavailableError("lost", None) if is_lost else None
        self.world.at(self.world.delay(), lambda: self._delivered(answer, future, error))

    def _delivered(self, answer, future, error):
        self._under_way.discard(future)
        future.set(answer, error)


# ---------------------------------------------------------------- the world


class World(Loop):
    """Servers, clients and faults of one seed.

    Args:
        seed: decides everything.
        num_clients: of the store.
        faults: how many, of servers and clients.
        kinds: of faults: "kill", "kill in push" and "still" are of servers, "client killed" and "client still" of
            clients.
        forget: what a server that is restarted forgets, to see that it is noticed.
        options: of the store.
    """

    def __init__(self, seed, *, num_clients, faults, kinds, forget=lambda server: None, **options):
        super().__init__(seed)
        self.seed, self.forget = seed, forget
        self.options = PSOptions(**{"heartbeat_timeout_s": 5.0, **options})
        self.disks, self.tokens = {}, itertools.count()
        self.processes = [Process(f"client {number}") for number in range(num_clients)]
        self.stores = [None] * num_clients
        self.log, self.problems = [], []
        self.open = set()
        self.ended = None
        self.messages = 0
        self.loss = self.chance.choice([0.0, 0.0, 0.03])
        self.slow = self.chance.choice([0.0, 0.02, 0.1])
        self.rounds = {}
        self.applied, self.returned = {}, {}
        first = self.chance.choice([20, 60, 150])
        self.faults = sorted((self.chance.randrange(8, 8 + first), self.chance.choice(kinds)) for _ in range(faults))
        self.happened = []
        self._patches = contextlib.ExitStack()

    # ------------------------------------------------------------ chance

    def delay(self):
        if self.chance.random() < self.slow:
            return self.chance.random() * 2
        return 0.001 + self.chance.random() * 0.01

    def fate(self):
        if self.chance.random() >= self.loss:
            return None
        return self.chance.choice(["lose request", "lose reply", "twice"])

    def sent(self, actor, head):
        """Count a message, with which a fault may come; return how late it is for that reason."""
        self.messages += 1
        if not self.faults or self.faults[0][0] > self.messages:
            return 0.0
        kind = self.faults[0][1]
        if kind == "kill in push":
            # The others have it already, and one of them ends, while this server has to wait for it.
            others = [each for each in self.actors if each is not actor and each.index in head.get("servers", ())]
            if head["verb"] != "push" or not others:
                return 0.0
            self.faults.pop(0)
            self.at(0.02 + self.chance.random() * 0.1, lambda: self.strike(kind, self.chance.choice(others)))
            return 0.5 + self.chance.random() * 3
        self.faults.pop(0)
        self.at(self.chance.random() * 0.03, lambda: self.strike(kind, self.chance.choice(self.actors)))
        return 0.0

    def strike(self, kind, actor):
        struck = actor.index
        if kind in ("kill", "kill in push"):
            if not actor.kill(self.chance.choice([0.05, 0.3, 3.0]) * (0.5 + self.chance.random())):
                return
        elif kind == "still":
            actor.still_until = self.now + self.chance.random() * 10
        else:
            # Who has not come yet is waited for, dead or not.
            choices = self.processes if kind == "client still" else self.open - {self.processes[0]}
            choices = [process for process in self.processes if process in choices]
            if not choices:
                return
            process = self.chance.choice(choices)
            struck = process.name
            if kind == "client killed":
                process.is_dead = True
                self.open.discard(process)
                for thread in process.threads:
                    self.at(0, lambda thread=thread: self.resume(thread))
            else:
                process.still_until = self.now + self.chance.random() * 10
                process.was_still = max(process.was_still, process.still_until - self.now)
        self.happened.append((round(self.now - 1000, 3), kind, struck))

    # ------------------------------------------------------------ what is watched

    def watch(self, actor):
        """Note each change of a server's values."""
        holding, index = actor.server._state, actor.index
        push_round, push = holding.push_round, holding.push

        def watched_round(keys, parts, counts, ids):
            push_round(keys, parts, counts, ids)
            self.rounds.setdefault(index, []).append((tuple(keys), [(client, seq) for client, seq, *_ in ids]))

        def watched_push(request, ids, **options):
            reply = push(request, ids, **options)
            rank = request.sender.rank
            self.applied[index, rank] = self.applied.get((index, rank), 0) + 1
            return reply

        holding.push_round, holding.push = watched_round, watched_push

    def stop_servers(self, actors):
        """What a client does that takes itself for the last one."""
        still_open = {process.name for process in self.open if not process.is_dead}
        if still_open:
            self.problems.append(f"the servers were ended, and {sorted(still_open)} have not closed")
        self.values()
        self.ended = self.now
        for actor in self.actors:
            actor.stop()

    def values(self):
        """Remember what servers hold."""
        self.final = {}
        for actor in self.actors:
            shard = durable.open_shard(self.options.path + f"/server-{actor.index}")
            for entry in shard._entries.values():
                self.final[entry.key] = entry.value.clone()

    def _tick(self):
        """What the thread does that watches a server."""
        for actor in self.actors:
            if actor.server is not None and actor.still_until <= self.now:
                actor.server.stats()
        self.at(1.0, self._tick)

    # ------------------------------------------------------------ a run

    def __enter__(self):
        def namespace(**names):
            return SimpleNamespace(**names)

        enter = self._patches.enter_context
        clock = namespace(monotonic=lambda: self.now, sleep=self.sleep, time=lambda: self.now)
        enter(
            mock.patch.object(rpc, "ray", namespace(get=self.get, wait=self.wait_for_one, is_initialized=lambda: True))
        )
        enter(mock.patch.object(rpc, "time", clock))
        enter(mock.patch.object(handle, "ray", rpc.ray))
        enter(mock.patch.object(handle, "time", clock))
        enter(mock.patch.object(rpc, "_RESTART_PAUSE_S", 0.3))
        enter(mock.patch.object(ray_engine, "time", clock))
        threads = namespace(
            **{name: getattr(threading, name) for name in threading.__all__},
        )
        threads.Event = lambda: Event(self)
        threads.Thread = lambda target, **_: Thread(self, target, self.current.process)
        threads.current_thread = lambda: self.current
        # Stores of clients that were killed are no concern of the next world.
        enter(mock.patch.object(ray_engine, "_open", set()))
        enter(mock.patch.object(ray_engine, "threading", threads))
        token = namespace(token_hex=lambda nbytes: f"{next(self.tokens):0{2 * nbytes}x}")
        enter(mock.patch.object(ray_engine, "secrets", token))
        enter(mock.patch.object(snapshot, "secrets", token))
        enter(mock.patch.object(ray_engine, "launched", launched))
        enter(mock.patch.object(cluster, "stop_servers", self.stop_servers))
        enter(mock.patch.object(durable, "WriteAheadLog", lambda *more: Disk(self.disks, *more)))
        self.at(1.0, self._tick)
        self.actors = [Actor(self, index) for index in range(self.options.num_servers)]
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.is_dead = True
        for process in self.processes:
            for thread in process.threads:
                while thread._thread.is_alive() and not thread.done.is_done:
                    self.resume(thread)
                thread._thread.join(10)
        for actor in self.actors:
            actor.stop()
        self._patches.close()

    def create(self, number, rank=None):
        """Make the store of a client, in a thread of its process."""
        places = [["elsewhere", 0, 1, "", "", "elsewhere", [None, None]]] * len(self.actors)
        of_thread.place = (0, 1) if rank is None else (rank, 2)
        servers = [ServerHandle(actor) for actor in self.actors]
        engine = ray_engine.PSEngine(servers, self.options, places, [1] * len(places), 90.0, started=False)
        self.stores[number] = KVStore(engine, "dist_async")
        self.open.add(self.processes[number])
        return self.stores[number]

    def close(self, number):
        """Close the store of a client."""
        # From here on nobody else needs to wait for it.
        self.open.discard(self.processes[number])
        self.stores[number].close()

    def spawn(self, number, program):
        """Run a program in a client's process."""
        Thread(self, program, self.processes[number]).start()

    def run(self, limit_s=400.0):
        """Let time pass until every program has ended."""
        programs = [process.threads[0] for process in self.processes]
        end = self.now + limit_s
        while not all(thread.done.is_done for thread in programs):
            if self.now > end:
                waiting = [thread.process.name for thread in programs if not thread.done.is_done]
                self.problems.append(f"{waiting} still wait after {limit_s:g} s")
                break
            self.step()
        for thread in [thread for process in self.processes for thread in process.threads]:
            if thread.error is not None and not self.may_fail(thread.error):
                self.problems.append(f"{thread.process.name}: {type(thread.error).__name__}: {thread.error}")

    def may_fail(self, error):
        """Tell whether an error is what comes of a worker that was taken for lost, and others went on without."""
        lost = any(process.was_still > LONG_SILENCE_S or process.is_dead for process in self.processes)
        return lost and isinstance(error, errors.WaitTimeoutError)

    def check(self):
        """Raise what was promised and not kept."""
        if self.problems:
            raise BrokenPromiseError(
                f"seed {self.seed}, {self.options.mode}, {self.happened}: " + "; ".join(self.problems)
            )
