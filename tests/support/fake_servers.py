"""Parameter servers in this process: clients and servers are the real ones, only Ray is played.

What Ray does to messages (it loses requests and replies, is late, brings one twice) is chosen by a test.
"""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as futures_wait
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from tensorkv.engines.ps.client import engine as ray_engine
from tensorkv.engines.ps.client import rpc
from tensorkv.engines.ps.messages import split
from tensorkv.engines.ps.options import PSOptions
from tensorkv.engines.ps.ray import cluster, handle
from tensorkv.engines.ps.ray.actor import ServerActor
from tensorkv.engines.ps.ray.handle import ServerHandle
from tensorkv.engines.ps.server.server import Server
from tensorkv.engines.transport.channel import SocketServer
from tensorkv.engines.transport.network import NetworkServer
from tensorkv.engines.transport.rendezvous import host_id
from tensorkv.store import KVStore
from tests.support.until import LIMIT_S

NONE = "nothing"


def get(future, timeout=None):
    try:
        return future.result(timeout)
    except FutureTimeoutError:
        raise GetTimeoutError("late") from None


def wait(futures, timeout=None):
    done, late = futures_wait(futures, timeout)
    return list(done), list(late)


PLAYED_RAY = SimpleNamespace(get=get, wait=wait, is_initialized=lambda: True)


class Actor:
    """One server, and what happens to its messages.

    Args:
        options: of the store.
        index: of the server.
        pool: threads that answer what comes through Ray.
        fate: given the head of a message, what happens: "nothing", "lose request", "lose reply", or "twice" (a copy of
            it comes again later, with other messages in between).
        near: True: it listens for clients on this host; "network": for those of others; False: only Ray is there.

    """

    def __init__(self, options, index, pool, fate, near):
        self.actor = object.__new__(ServerActor)
        self.actor._server = self.server = Server(options, index, threads=1)
        self.actor._options = options
        self._listen(near)
        self._pool, self.fate = pool, fate
        self._late = []
        self.is_dead = False
        self.fates = {}
        self.paused = threading.Event()
        self.paused.set()
        self.serve = SimpleNamespace(remote=self._remote)
        self.place = SimpleNamespace(remote=lambda: self._pool.submit(self.find_place))

    def _listen(self, near):
        listeners = {
            True: lambda: SocketServer(self._answer_connection),
            "network": lambda: NetworkServer("127.0.0.1", self._answer_connection),
            False: lambda: None,
        }
        self._near, self.listener = near, listeners[near]()
        self.actor._listener = self.listener

    def move(self, near):
        """Listen elsewhere from now on; connections that are open stay."""
        self.listener.close()
        self._listen(near)

    def die(self):
        """End for good."""
        self.is_dead = True
        if self.listener:
            self.listener.close()

    def find_place(self):
        """What the actor's ``place`` returns."""
        if self.is_dead:
            raise ActorDiedError
        address = self.listener and self.listener.address
        addresses = [address, None] if self._near is True else [None, address]
        return [host_id() if self._near is True else "elsewhere", 0, 1, "", "", "played", addresses]

    def _remote(self, *message):
        # Payloads beside a message are the actor's own copies, as Ray's object store makes them.
        message = [part if isinstance(part, bytes) else part.copy() for part in message]
        return self._pool.submit(self._answer_ray, *message)

    def _answer_ray(self, *message):
        if self.is_dead:
            raise ActorDiedError
        try:
            return self._answer(message[0], lambda: self.actor.serve(*message))
        except ConnectionError:
            raise ActorUnavailableError("lost", None) from None

    def _answer_connection(self, message, buffers):
        if self.is_dead:
            raise ConnectionResetError
        return self._answer(message, lambda: self.actor.serve_connection(message, buffers))

    def _answer(self, message, serve):
        fate = self.fate(split(message)[0])
        self.fates[fate] = self.fates.get(fate, 0) + 1
        if fate == "lose request":
            raise ConnectionResetError
        self.paused.wait()
        answer = serve()
        if fate == "twice":
            self._late.append(serve)
        elif self._late and random.random() < 0.5:
            # Comes behind what its client has sent since.
            self._late.pop(0)()
        if fate == "lose reply":
            raise ConnectionResetError
        return answer


class Cluster:
    """Servers, and stores on them; a context manager.

    Args:
        num_servers: how many.
        near: as for ``Actor``.
        weights: how much each server may hold (None: all the same).
        fate: as for ``Actor``.
        options: of the store. No worker is dead for lack of heartbeats before a minute, but see ``silence``.
    """

    def __init__(self, num_servers=1, *, near=True, weights=None, fate=lambda head: NONE, **options):
        self.options = PSOptions(num_servers=num_servers, **{"heartbeat_timeout_s": 60.0, **options})
        self._pool, self._weights = ThreadPoolExecutor(64), weights or [1] * num_servers
        self.actors = [Actor(self.options, index, self._pool, fate, near) for index in range(num_servers)]
        self._stores = []
        self._patches = contextlib.ExitStack()

    @property
    def servers(self):
        return [actor.server for actor in self.actors]

    def __enter__(self):
        self._patches.enter_context(mock.patch.object(rpc, "ray", PLAYED_RAY))
        self._patches.enter_context(mock.patch.object(handle, "ray", PLAYED_RAY))
        self._patches.enter_context(mock.patch.object(cluster, "stop_servers"))
        return self

    def store(self, **own):
        """A new client with options of its own; each is the next rank."""
        places = [actor.find_place() for actor in self.actors]
        servers = [ServerHandle(actor) for actor in self.actors]
        options = replace(self.options, **own)
        engine = ray_engine.PSEngine(servers, options, places, self._weights, LIMIT_S, started=False)
        self._stores.append(KVStore(engine, "dist_async"))
        return self._stores[-1]

    def silence(self, store, seconds=None):
        """Have servers hear no more of a store, and nothing for so long (None: as long as a dead worker)."""
        engine = store._engine
        engine._ending.set()
        engine._heartbeats.join()
        seconds = self.options.heartbeat_timeout_s + 1 if seconds is None else seconds
        for server in self.servers:
            server._membership._last_seen[engine._owner] -= seconds
            if engine.rank < self.options.num_workers:
                server._staleness._workers[engine.rank].last_seen -= seconds

    def drop(self, store):
        """Let go of a store, as its last owner does; return its engine."""
        self._stores.remove(store)
        return store._engine

    def stores(self, count):
        return [self.store() for _ in range(count)]

    def __exit__(self, *_):
        for actor in self.actors:
            actor.paused.set()
        for store in self._stores:
            store.close()
        self._pool.shutdown()
        for actor in self.actors:
            actor.server.close()
            if actor.listener:
                actor.listener.close()
        self._patches.close()

    def fired(self, fate):
        """How often something has happened to a message."""
        return sum(actor.fates.get(fate, 0) for actor in self.actors)


def together(*jobs):
    """Run functions in threads of their own and return what each returns; the first error is raised."""
    results, errors = [None] * len(jobs), []

    def run(index):
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
