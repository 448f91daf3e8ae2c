"""Promises of servers over restarts and pauses, in simulated clusters of thousands of seeds."""

import os

import numpy as np
import pytest

from tests.support.amount import amount

pytest.importorskip("ray")

from tensorkv.errors import ServerDeadError, SnapshotError
from tests.ps.simulation import LONG_SILENCE_S, BrokenPromiseError, World

SEEDS = int(os.environ.get("TENSORKV_SEEDS", amount(8, 20)))
FIRST = int(os.environ.get("TENSORKV_FIRST_SEED", "0"))


class Job:
    """A random program for each client of a world, and what has come of it."""

    def __init__(self, world, steps, verbs):
        self.world, chance = world, world.chance
        self.clients = world.options.num_workers
        self.keys = [f"k{number}" for number in range(world.options.num_servers)]
        self.size = steps * self.clients
        self.told, self.entered = {}, {}
        self.pushed = {}
        self.num_snapshots = 0
        self.script = [chance.choice(verbs) for _ in range(steps)]
        # Who leaves early; rank 0 has things to tell until the end.
        self.ends = [steps] + [chance.choice([steps, steps, chance.randrange(steps)]) for _ in range(self.clients - 1)]
        self.pace = [chance.choice([0.05, 0.3, 1.0]) for _ in range(self.clients)]
        self.is_done = [False] * self.clients

    def program(self, rank):
        def run():
            world, chance = self.world, self.world.chance
            world.sleep(chance.random() * 0.5)
            try:
                kv = world.create(rank, rank)
            except ServerDeadError:
                if world.ended is None:
                    raise
                # The others have done without it, and closed.
                return
            kv.set_optimizer("sgd", lr=1.0, maximize=True)
            kv.init(self.keys, [np.zeros(self.size) for _ in self.keys])
            for step in range(self.ends[rank]):
                if chance.random() < 0.7:
                    world.sleep(chance.random() * self.pace[rank])
                getattr(self, self.script[step])(kv, rank, step)
            self.is_done[rank] = True
            world.close(rank)

        return run

    def look(self):
        """What a reader does: it looks at snapshots as long as the workers work."""
        self.world.sleep(1.0)
        try:
            kv = self.world.create(self.clients, self.clients)
        except ServerDeadError:
            # It comes after the last worker has closed, and there is nothing left to look at.
            return
        while not all(process.threads[0].done.is_done for process in self.world.processes[:-1]):
            self.world.sleep(0.2)
            if kv.keys():
                self.snapshot(kv, self.clients, None)
        self.world.close(self.clients)

    def push(self, kv, rank, step):
        index = step * self.clients + rank
        one = np.zeros(self.size)
        one[index] = 1
        self.pushed[index] = "sent"
        kv.push(self.keys, [one] * len(self.keys))
        self.pushed[index] = "returned"
        self.check_staleness(rank)

    def is_reliable(self, rank):
        """Whether no server has had a reason to consider a worker dead."""
        process = self.world.processes[rank]
        return not process.is_dead and process.was_still < LONG_SILENCE_S

    def check_staleness(self, rank):
        bound, applied = self.world.options.staleness, self.world.applied
        if bound is None:
            return
        for other in range(self.clients):
            if other == rank or self.is_done[other] or not self.is_reliable(other) or not self.is_reliable(rank):
                continue
            for server in range(len(self.keys)):
                ahead = applied.get((server, rank), 0) - applied.get((server, other), 0)
                if ahead > bound:
                    raise BrokenPromiseError(
                        f"rank {rank} is {ahead} rounds ahead of {other} on server {server}, bound {bound}"
                    )

    def tell(self, kv, rank, step):
        text = kv._engine._on_rank_0(lambda: f"step {step} of {rank}")
        if text != f"step {step} of 0":
            raise BrokenPromiseError(f"rank {rank} was told {text!r} at step {step}")

    def barrier(self, kv, rank, step):
        self.entered[rank] = step
        kv.barrier()
        for other in range(self.clients):
            if self.is_done[other] or not self.is_reliable(other) or self.ends[other] <= step:
                continue
            if self.entered.get(other, -1) < step:
                raise BrokenPromiseError(f"rank {rank} went through the barrier of step {step} before {other} came")

    def snapshot(self, kv, rank, step):
        try:
            with kv.snapshot() as moment:
                values = np.stack([moment.pull(key) for key in self.keys if key in moment.keys()] or [[]])
        except SnapshotError:
            return
        self.num_snapshots += 1
        for index in np.flatnonzero((values != values[0]).any(0)):
            if self.is_reliable(index % self.clients):
                raise BrokenPromiseError(
                    f"a snapshot of rank {rank} shows push {index} on some servers: {values[:, index]}"
                )

    def check(self, *, same_rounds):
        world = self.world
        if world.ended is None and all(self.is_reliable(number) for number in range(len(world.processes))):
            world.problems.append("nobody has ended the servers")
        if world.ended is None:
            world.values()
        values = np.stack([world.final[key].numpy() for key in self.keys])
        for index, how in self.pushed.items():
            wanted = {1} if how == "returned" else {0, 1}
            if not set(values[:, index]) <= wanted:
                world.problems.append(f"push {index} ({how}) was applied {values[:, index]} times")
        if same_rounds and self.has_different_rounds() and all(self.is_reliable(rank) for rank in range(self.clients)):
            world.problems.append("servers have made different rounds")

    def has_different_rounds(self):
        """Tell whether not every server has put the same pushes together."""
        made = self.world.rounds
        rounds = [[sorted(each[1]) for each in made.get(server, [])] for server in range(len(self.keys))]
        return any(each != rounds[0] for each in rounds)


MODES = {"async": {}, "staleness": {"staleness": 1}, "sync": {"mode": "sync"}}
FAULTS = {
    "none": (),
    "killed": ("kill", "kill in push"),
    "still": ("still",),
    "clients": ("client still", "client killed"),
    "all": ("kill", "kill in push", "still", "client still", "client killed"),
}


VERBS = ("push", "push", "push", "tell", "barrier", "snapshot")


def simulate(seed, mode, kinds, *, verbs=VERBS, steps=6, faults=None, same_rounds=True, **more):
    settings = MODES[mode]
    clients = 2 + seed % 2
    world = World(
        seed,
        num_clients=clients + seed % 3 % 2,
        faults=min(len(kinds), 1) * (1 + seed % 5) if faults is None else faults,
        kinds=kinds,
        num_servers=1 + (seed // 2) % 3,
        num_workers=clients,
        path="/disk",
        durability="process",
        **settings,
        **more,
    )
    with world:
        job = Job(world, steps + seed % 5, verbs)
        for rank in range(clients):
            world.spawn(rank, job.program(rank))
        if len(world.processes) > clients:
            world.spawn(clients, job.look)
        world.run()
        job.check(same_rounds=same_rounds)
        world.check()
    return job


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", FAULTS)
def test_promises_hold(mode, kinds):
    jobs = [simulate(seed, mode, FAULTS[kinds]) for seed in range(FIRST, FIRST + SEEDS)]
    struck = {kind for job in jobs for _, kind, _ in job.world.happened}
    # A few seeds, given to find a fault, need not have everything.
    if SEEDS >= 8:
        assert struck == set(FAULTS[kinds])
        assert sum(job.num_snapshots for job in jobs) > SEEDS


def test_rounds_stay_equal_on_servers_even_if_one_considers_a_worker_dead(monkeypatch):
    """A server that stood still closes rounds without those whom it has not heard; others have waited for them."""
    monkeypatch.setattr("tensorkv.engines.ps.server.server.AwakeClock", lambda now, limit_s: now)
    different = 0
    for seed in range(FIRST, FIRST + amount(20, 40)):
        job = simulate(seed, "sync", ("still",), verbs=("push",), steps=10, faults=4, same_rounds=False)
        different += job.has_different_rounds()
    assert different > 1


# ---------------------------------------------------------------- the simulation notices what is forgotten


def forget_clients(server):
    server._tables.members.clear()
    server._membership._last_seen.clear()


# In which mode, with which verbs, and what a server forgets.
FORGOTTEN = {
    "rounds": ("staleness", ("push",), lambda server: server._staleness.restore([])),
    "clients": ("async", VERBS, forget_clients),
    "texts": ("async", ("tell",), lambda server: server._tables.texts.clear()),
    "requests on their way to other servers": (
        "async",
        ("push", "snapshot"),
        lambda server: server._tables.fans.clear(),
    ),
    "requests": ("async", ("push",), lambda server: server._tables.last.clear()),
}


def is_noticed(mode, kinds, **more):
    for seed in range(200):
        try:
            simulate(seed, mode, kinds, **more)
        except BrokenPromiseError:
            return True
    return False


@pytest.mark.release
@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_a_restarted_server_forgets_is_noticed(what):
    mode, verbs, forget = FORGOTTEN[what]
    assert is_noticed(mode, FAULTS["killed"], forget=forget, verbs=verbs, faults=8)


@pytest.mark.release
def test_a_server_that_counts_its_own_pause_as_missing_heartbeats_is_noticed(monkeypatch):
    monkeypatch.setattr("tensorkv.engines.ps.server.server.AwakeClock", lambda now, limit_s: now)
    assert is_noticed("sync", ("still",))
