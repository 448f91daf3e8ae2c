"""Parameter servers on a real Ray, whose processes are killed and stopped, and whose replies are lost."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.storage.lock import is_locked
from tests.support.amount import ALL, amount
from tests.support.processes import Program
from tests.support.until import LIMIT_S, until
from tests.support.workers import run

ray = pytest.importorskip("ray")
from tensorkv.engines.ps import messages  # noqa: E402
from tensorkv.engines.ps.client.rpc import ServerConnection  # noqa: E402
from tensorkv.engines.ps.ray import cluster as ray_cluster  # noqa: E402
from tensorkv.engines.ps.ray.observer import observe  # noqa: E402
from tests.support.overdue import overdue  # noqa: E402

F32 = np.float32
PROGRAMS = "tests.ps.ray_programs"
SERVERS, KILLS, KILLS_AT_ONCE = amount(2, 3), amount(1, 15), amount(1, 5)
STOPS = amount(1, 5)
LOSE_REPLIES = json.dumps(
    {"CoreWorkerService.grpc_client.PushTask": {"num_failures": 80, "req_failure_prob": 0, "resp_failure_prob": 30}}
)
names = (f"faulty{number}" for number in itertools.count())
called = {}
pytestmark = pytest.mark.usefixtures("ray_store")


def create(**options):
    name = next(names)
    # Most tests need no spare servers, and each takes the time of a start.
    spare = {"spare": False} if "path" in options else {}
    kv = tensorkv.create("dist_async", name=name, **spare | options)
    called[id(kv)] = name
    return kv


def name_of(kv):
    """The name under which others find a store."""
    return called[id(kv)]


@pytest.fixture
def shared(server_pool):
    """An empty store on two servers, for tests that end no server."""
    name = server_pool.name(num_servers=2)
    with tensorkv.create("dist_async", name=name) as kv:
        called[id(kv)] = name
        yield kv


def count_up(kv):
    """Have each push add to the value."""
    kv.set_optimizer("sgd", lr=1.0, maximize=True)


def one_hot(n, i):
    gradient = np.zeros(n, F32)
    gradient[i] = 1
    return gradient


def pid_of(kv, server):
    """The process of a server, once it is there."""
    found = []

    def is_there():
        with contextlib.suppress(ray.exceptions.RayActorError):
            found.append(kv._engine._servers[server].place(LIMIT_S)[1])
        return found

    until(is_there)
    return found[0]


class Killer:
    """Kills the servers of a store, each again and again as soon as it is there; a context manager.

    Args:
        kv: the store.
        times: how often to kill each.
        at_once: whether to kill all servers at the same time.
    """

    def __init__(self, kv, times, *, at_once=False):
        self._kv, self._times, self.killed = kv, times, []
        servers = range(len(kv._engine._servers))
        groups = [list(servers)] if at_once else [[server] for server in servers]
        self._threads = [threading.Thread(target=self._run, args=(group,)) for group in groups]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        for thread in self._threads:
            thread.join()

    @property
    def is_done(self):
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, group):
        chance = random.Random(group[0])
        for _ in range(self._times):
            pids = [pid_of(self._kv, server) for server in group]
            # Some have just begun to serve, others have been at it for a while.
            time.sleep(chance.choice([0, 0.02, 0.2]))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)


def push_until(kv, done, n, start=0):
    """Push number i adds 1 at i; return how many were acknowledged."""
    i = start
    while not done() and i < n:
        kv.push(["w", "n"], [one_hot(n, i), np.ones(3, F32)])
        i += 1
    return i


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "with spares"])
def test_killed_servers_lose_no_acknowledged_push_and_apply_none_twice(spare, tmp_path):
    n = 300_000
    with create(num_servers=SERVERS, path=tmp_path / "store", spare=spare) as kv:
        count_up(kv)
        kv.init(["w", "n"], [np.zeros(n, F32), np.zeros(3, F32)])
        with Killer(kv, KILLS) as killer:
            count = push_until(kv, lambda: killer.is_done, n)
        assert len(set(killer.killed)) == len(killer.killed) == SERVERS * KILLS
        kv.push(["w", "n"], [one_hot(n, count), np.ones(3, F32)])
        with Killer(kv, KILLS_AT_ONCE, at_once=True) as killer:
            last = push_until(kv, lambda: killer.is_done, n, count + 1)
        assert len(set(killer.killed)) == SERVERS * KILLS_AT_ONCE
        value = kv.pull("w")
        assert set(value[:last].tolist()) == {1}
        assert not value[last:].any()
        assert kv.pull("n").tolist() == [last] * 3
        assert kv.info("n").version == last
        assert kv.stats()["resent"] >= KILLS
        print("pushes", last, "resent", kv.stats()["resent"])
        with pytest.raises(tensorkv.ArgumentError, match=f"num_servers={SERVERS}, not 4"):
            tensorkv.create("dist_async", name=name_of(kv), num_servers=4)
    # The store has ended; its folder is there.
    with pytest.raises(tensorkv.StorageError, match=f"was written by {SERVERS} servers, and num_servers is 4"):
        create(num_servers=4, path=tmp_path / "store")


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_killed_servers_apply_compressed_pushes_once(mode, tmp_path):
    """Each push owes a quarter more, and every second one sends a half."""
    n = 300_000
    with create(num_servers=SERVERS, mode=mode, path=tmp_path / "store") as kv:
        count_up(kv)
        kv.init(["w", "n"], [np.zeros(n, F32), np.zeros(3, F32)])
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        quarters = [np.full(n, 0.25, F32), np.full(3, 0.25, F32)]
        pushed = 0
        with Killer(kv, KILLS) as killer:
            while not killer.is_done or pushed % 2:
                kv.push(["w", "n"], quarters)
                pushed += 1
        assert kv.stats()["resent"] >= KILLS
        assert set(kv.pull("w").tolist()) == set(kv.pull("n").tolist()) == {0.25 * pushed}
        kv.push(["w", "n"], quarters)
        assert set(kv.pull("w").tolist()) == {0.25 * pushed}
        # What is owed is pushed when nothing is compressed any more.
        kv.set_gradient_compression(None)
        assert set(kv.pull("w").tolist()) == set(kv.pull("n").tolist()) == {0.25 * (pushed + 1)}


def pids_with_spare(kv, server=0):
    """The processes of a server and of its spare, as soon as both are there; the one that serves is first."""
    found = kv._engine._servers[server]
    found.place(LIMIT_S)
    pids = {}

    def are_there():
        for actor in found._both():
            with contextlib.suppress(ray.exceptions.RayActorError):
                pids[actor is found.actor] = ray.get(actor.place.remote(), timeout=LIMIT_S)[1]
        return len(pids) == 2

    until(are_there)
    return pids[True], pids[False]


def named_actors(kv):
    return [name for name in ray.util.list_named_actors() if name.startswith(f"{name_of(kv)}/")]


def test_a_spare_that_is_there_already_serves_instead_of_a_killed_server(tmp_path):
    with create(path=tmp_path / "store", spare=True) as kv:
        count_up(kv)
        kv.init("n", np.zeros(3, F32))
        with tensorkv.create("dist_async", name=name_of(kv)) as reader:
            assert reader.pull("n").tolist() == [0] * 3
            for pushes in range(1, 4):
                serving, spare = pids_with_spare(kv)
                os.kill(serving, signal.SIGKILL)
                kv.push("n", np.ones(3, F32))
                assert reader.pull("n").tolist() == [pushes] * 3
                assert [each.stats()["servers"][0]["pid"] for each in (kv, reader)] == [spare] * 2
                with tensorkv.create("dist_async", name=name_of(kv)) as new:
                    assert new.stats()["servers"][0]["pid"] == spare
                seen = observe(name_of(kv))
                until(lambda seen=seen, spare=spare: (seen.stats()["servers"][0] or {}).get("pid") == spare)
            assert kv.info("n").version == 3
        assert len(named_actors(kv)) == 2
    # Both have ended with the store.
    until(lambda: not named_actors(kv))


def test_a_spare_leaves_a_server_alone_that_is_only_stopped(tmp_path):
    with create(path=tmp_path / "store", spare=True) as kv:
        kv.init("n", np.zeros(3, F32))
        serving, _ = pids_with_spare(kv)
        _, spare = kv._engine._servers[0]._both()
        os.kill(serving, signal.SIGSTOP)
        try:
            for _ in range(3):
                assert ray.get(spare.place.remote(), timeout=LIMIT_S)[-1] is None
        finally:
            os.kill(serving, signal.SIGCONT)
        kv.push("n", np.ones(3, F32))
        assert pid_of(kv, 0) == serving


@pytest.mark.parametrize("spare", [True, False], ids=["with a spare", "alone"])
def test_a_server_whose_folder_another_one_has_opened_serves_no_more(spare, tmp_path):
    """As on a file system that has given its lock away, while its host could not be reached."""
    with create(path=tmp_path / "store", spare=spare) as kv:
        count_up(kv)
        kv.init("n", np.zeros(3, F32))
        kv.push("n", np.ones(3, F32))
        old = pids_with_spare(kv)[0] if spare else pid_of(kv, 0)
        lock = tmp_path / "store" / "server-0" / "lock"
        epoch, rest = lock.read_bytes()[:16], lock.read_bytes()[16:]
        # In place: the old one reads it. The kernel's lock stays with the old one until it has ended.
        with lock.open("r+b") as file:
            file.write(b"%016x" % (int(epoch, 16) + 1) + rest)
        assert kv.pull("n").tolist() == [1] * 3
        kv.push("n", np.ones(3, F32))
        assert kv.pull("n").tolist() == [2] * 3
        assert pid_of(kv, 0) != old
        until(lambda: not Path(f"/proc/{old}").exists())


def test_servers_have_a_spare_by_default_if_they_have_a_folder_and_else_none(tmp_path):
    with tensorkv.create("dist_async", name="spared", path=tmp_path / "store"):
        assert len([name for name in ray.util.list_named_actors() if name.startswith("spared/")]) == 2
    for options in ({}, {"path": tmp_path / "store", "spare": False}):
        with create(**options) as kv:
            assert named_actors(kv) == [f"{name_of(kv)}/0"]


def test_adam_goes_on_to_the_bit_after_kills(tmp_path):
    generator = torch.Generator().manual_seed(5)
    kills = amount(1, 3)
    gradients = [torch.randn(301, 7, generator=generator) for _ in range(20 * kills)]
    expected = tensorkv.create("local")
    with create(path=tmp_path / "store", durability="process") as kv:
        for store in (kv, expected):
            store.set_optimizer("adam", lr=0.05, weight_decay=0.01)
            store.init("w", torch.ones(301, 7))
        killed = 0
        for number, gradient in enumerate(gradients):
            if number % 20 == 10:
                os.kill(pid_of(kv, 0), signal.SIGKILL)
                killed += 1
            kv.push("w", gradient)
            expected.push("w", gradient)
        assert killed == kills
        assert kv.pull("w").numpy().tobytes() == expected.pull("w").numpy().tobytes()
        assert kv.info("w").version == len(gradients)


class KillsInPush:
    """Kills servers at a stage of the next push: "before" it is sent, when it was "sent", or when it was "applied".

    Args:
        kv: the store.
        monkeypatch: of the test.
    """

    def __init__(self, kv, monkeypatch):
        self._kv, self._start, self._stage = kv, ServerConnection.start, ""
        self.left = []
        monkeypatch.setattr(ServerConnection, "start", lambda *args, **options: self._begin(*args, **options))

    def plan(self, stage, servers):
        """Kill these servers in the next push."""
        self._stage, self.left = stage, list(servers)

    def _begin(self, connection, head, layout, **options):
        server = connection._index
        if head["verb"] != "push" or server not in self.left:
            self._start(connection, head, layout, **options)
            return
        self.left.remove(server)
        pid = pid_of(self._kv, server)
        if self._stage == "before":
            os.kill(pid, signal.SIGKILL)
        self._start(connection, head, layout, **options)
        if self._stage == "applied":
            # The reply is lost with the server.
            connection._connection.receive(time.monotonic() + LIMIT_S)
        if self._stage != "before":
            os.kill(pid, signal.SIGKILL)


def versions_of(kv, servers):
    """The version of "w" on each of some servers."""
    return [told["versions"][0] for told in kv._engine._ask(messages.Info(keys=["w"]), servers)]


def test_a_clipped_push_is_whole_and_made_once_whenever_servers_are_killed(tmp_path, monkeypatch):
    """Each server scales its part by a factor that depends on the sums of all."""
    generator = torch.Generator().manual_seed(3)
    with create(num_servers=2, path=tmp_path / "store", durability="process") as kv, tensorkv.create() as expected:
        kills = KillsInPush(kv, monkeypatch)
        for store in (kv, expected):
            store.init("w", torch.ones(300_000))
            store.init("t", tensorkv.Rows([1], torch.ones(1, 2), 10**9))
            store.set_optimizer("sgd", lr=1.0, momentum=0.9, max_grad_norm=1.0)
        for version, stage, servers, has_rows in [
            (1, "before", [1], False),
            (2, "applied", [0, 1], True),
            (3, "sent", [0], False),
            (4, "", [], True),
        ]:
            parts = {"w": torch.randn(300_000, generator=generator)}
            if has_rows:
                parts["t"] = tensorkv.Rows([3, 8, 3], torch.randn(3, 2, generator=generator), 10**9)
            kills.plan(stage, servers)
            for store in (kv, expected):
                store.push(parts)
            assert not kills.left
            assert kv.last_push == expected.last_push
            assert torch.equal(kv.pull("w"), expected.pull("w"))
            assert torch.equal(*[each.row_sparse_pull("t", row_ids=[1, 3, 8]).values for each in (kv, expected)])
            assert versions_of(kv, [0, 1]) == [version] * 2
        assert kv.stats()["resent"] >= 4


def wait_timeout(call):
    """Call until it is told what a server waits for; before, the server is being restarted."""
    told = []

    def is_told():
        try:
            call()
        except tensorkv.PushOutcomeUnknownError:
            return False
        except tensorkv.WaitTimeoutError as error:
            told.append(str(error))
        return True

    until(is_told)
    return told[0]


@pytest.mark.parametrize("found", ["another store", *(["nothing"] if ALL else [])])
def test_a_server_that_is_restarted_without_its_folder_waits_for_it(found, tmp_path):
    """As where a lost host had the folder, and the server is restarted on another one."""
    lost, away = tmp_path / "store" / "server-1", tmp_path / "away"
    with ExitStack() as stack:
        kv = stack.enter_context(create(num_servers=2, path=tmp_path / "store"))
        hasty = stack.enter_context(tensorkv.create("dist_async", name=name_of(kv), timeout_s=5))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        kv.init("w", np.zeros(300_000, F32))
        kv.push("w", np.ones(300_000, F32))
        pid = pid_of(kv, 1)
        lost.rename(away)
        if found == "another store":
            with tensorkv.create("local", path=lost) as other:
                other.init("w", np.full(150_016, 7, F32))
        os.kill(pid, signal.SIGKILL)
        what = "is not there" if found == "nothing" else "is that of another store"
        said = f"waiting for server 1: it was restarted on host .*, where its folder {lost} {what}; .* had on host .*"
        assert re.search(said, wait_timeout(lambda: hasty.pull("w")))
        with ThreadPoolExecutor(1) as pool:
            pushed = pool.submit(kv.push, "w", np.ones(300_000, F32))
            with pytest.raises(FutureTimeoutError):
                pushed.result(1)
            if found == "another store":
                lost.rename(tmp_path / "of the other")
            assert not lost.exists()
            away.rename(lost)
            pushed.result(LIMIT_S)
        # What was acknowledged is there, and the push that had to wait is whole.
        assert (kv.pull("w") == 2).all()
        assert kv.info("w").version == 2


def test_a_store_whose_server_waits_for_its_folder_is_closed_and_created_again(tmp_path):
    lost = tmp_path / "store" / "server-0"
    with ExitStack() as stack:
        kv = stack.enter_context(create(path=tmp_path / "store"))
        hasty = stack.enter_context(tensorkv.create("dist_async", name=name_of(kv), timeout_s=5))
        kv.init("w", np.zeros(3, F32))
        pid = pid_of(kv, 0)
        lost.rename(tmp_path / "away")
        os.kill(pid, signal.SIGKILL)
        assert f"its folder {lost} is not there" in wait_timeout(lambda: hasty.pull("w"))
        name = name_of(kv)
    with tensorkv.create("dist_async", name=name, path=tmp_path / "store") as kv:
        assert kv.keys() == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_server_without_a_folder_is_never_restarted_empty(lost, tmp_path, monkeypatch):
    """And the store can be created again by any client once it has been closed everywhere."""
    value = np.arange(600_000, dtype=F32)
    kv = create(num_servers=2)
    name = name_of(kv)
    other = tensorkv.create("dist_async", name=name)
    kv.init("w", value)
    kv.save(tmp_path / "saved")
    os.kill(pid_of(kv, lost), signal.SIGKILL)
    for call in (lambda: kv.pull("w"), lambda: kv.push("w", value), kv.keys):
        with pytest.raises(tensorkv.ServerDeadError, match=f"server {lost}"):
            call()
    # Whoever asks for the store by its name is not given an empty server beside a full one.
    said = pytest.raises(tensorkv.ServerDeadError, match=f"server {lost} .* has ended, and what it held is lost")
    with monkeypatch.context() as patches, said:
        let_pauses_take_long(patches)
        tensorkv.create("dist_async", name=name, num_servers=2)
    kv.close()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(tensorkv.create, "dist_async", name=name, num_servers=2)
        other.close()
        kv = again.result(LIMIT_S)
    with kv:
        assert kv.keys() == []
        kv.load(tmp_path / "saved")
        assert kv.pull("w").tolist() == value.tolist()


def let_pauses_take_long(monkeypatch):
    """Have each pause in which ``create`` waits for servers count as 100 seconds."""
    slept = []
    monkeypatch.setattr(
        ray_cluster,
        "time",
        SimpleNamespace(
            monotonic=lambda: time.monotonic() + 100 * len(slept),
            sleep=lambda seconds: (slept.append(seconds), time.sleep(seconds)),
        ),
    )


def read_numbers(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_killed_workers_leave_whole_pushes(shared, ray_address, tmp_path):
    kv, n, kills = shared, 60_000, amount(2, 10)
    count_up(kv)
    kv.init("w", np.zeros(n, F32))
    file = tmp_path / "acknowledged"
    begun = set()
    chance = random.Random(3)
    # Two at a time, each with numbers of its own; each is killed and followed by another.
    for number in range(0, kills, 2):
        starts = [n // kills * (number + i) for i in range(2)]
        begun.update(starts)
        with contextlib.ExitStack() as stack:
            programs = [
                stack.enter_context(
                    Program(
                        PROGRAMS,
                        "push_set",
                        name_of(kv),
                        n // kills * (number + i + 1),
                        start,
                        1,
                        file,
                        env=ray_address,
                    )
                )
                for i, start in enumerate(starts)
            ]
            for program in programs:
                program.wait_for("ready")
            acknowledged = []
            while not (set(starts) < set(acknowledged) and len(acknowledged) > 10 * len(begun)):
                kv.push("w", np.zeros(n, F32))
                acknowledged = read_numbers(file)
            time.sleep(chance.random() * 0.02)
            for program in programs:
                assert program.process.poll() is None
                program.process.kill()
    value, acknowledged = kv.pull("w"), read_numbers(file)
    assert len(acknowledged) > kills
    assert set(value[acknowledged].tolist()) == {1}
    assert set(value.tolist()) == {0, 1}
    # Of each that was killed, one push may have been applied that it has not heard of.
    assert len(acknowledged) <= int(value.sum()) <= len(acknowledged) + kills


# ---------------------------------------------------------------- stops, and replies that are lost


def test_stopped_servers(tmp_path):
    """Stopped for five seconds, again and again: nothing is lost, nothing is twice."""
    n = 100_000
    with create(num_servers=1, path=tmp_path / "store") as kv:
        count_up(kv)
        kv.init(["w", "n"], [np.zeros(n, F32), np.zeros(3, F32)])
        pid, stops = pid_of(kv, 0), []

        def stop():
            for _ in range(STOPS):
                time.sleep(0.1)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(5)
                stops.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
                os.kill(pid, signal.SIGCONT)

        thread = threading.Thread(target=stop)
        thread.start()
        count = push_until(kv, lambda: not thread.is_alive(), n)
        thread.join()
        assert stops == ["T"] * STOPS
        assert kv.pull("n").tolist() == [count] * 3
        assert kv.pull("w").sum() == count


def test_without_an_answer_in_time_the_outcome_is_unknown_and_the_store_stays_usable():
    with create() as keeper, tensorkv.create("dist_async", name=name_of(keeper)) as kv:
        count_up(keeper)
        keeper.init("n", np.zeros(30_000, F32))
        pid = pid_of(keeper, 0)
        os.kill(pid, signal.SIGSTOP)
        try:
            for push in range(3):
                said = pytest.raises(tensorkv.PushOutcomeUnknownError, match="applied once, or not at all")
                with overdue(attempt_s=0.3), said:
                    kv.push("n", np.full(30_000, 10.0**push, F32))
        finally:
            os.kill(pid, signal.SIGCONT)
        kv.push("n", np.full(30_000, 10.0**3, F32))
        # Each is whole, and was applied once or not at all.
        with keeper.snapshot() as snapshot:
            (found,) = set(snapshot.pull("n").tolist())
            digits = f"{int(found):04d}"
            assert set(digits) <= {"0", "1"}, found
            assert digits[0] == "1"
            assert snapshot.versions["n"] == digits.count("1")


@pytest.mark.parametrize("fault", [{"RAY_testing_rpc_failure": LOSE_REPLIES}, {"LOSE_ANSWERS": "0.3"}])
def test_lost_replies(fault, shared, ray_address, tmp_path):
    """Those that Ray brings, and those to rings in shared memory."""
    kv, n = shared, 240
    count_up(kv)
    kv.init("w", np.zeros(n, F32))
    file = tmp_path / "acknowledged"
    words = ("push_set", name_of(kv), n, 0, 1, file)
    with Program(PROGRAMS, *words, env={**ray_address, **fault, "WANTS_RESENT": "60"}) as program:
        program.wait_for("resent")
        assert read_numbers(file) == list(range(n))
    assert kv.pull("w").tolist() == [1] * n
    assert kv.info("w").version == n


@pytest.mark.release
def test_rays_own_retries_would_apply_pushes_twice_without_request_ids(ray_address):
    """A fault that was planted: it shows that replies are lost, and that it would be noticed."""
    n = 100
    env = {**ray_address, "RAY_testing_rpc_failure": LOSE_REPLIES}
    with Program(PROGRAMS, "rely_on_rays_retries", n, env=env) as program:
        assert int(program.wait_for("version").split()[1]) > n


# ---------------------------------------------------------------- a disk that is full


def test_a_full_disk_is_an_error_and_no_lost_push_is_acknowledged(tmp_path):
    """Files of the server may not grow any more: as on a full disk, a write ends early or fails."""
    folder = tmp_path / "store"
    with create(path=folder) as kv:
        count_up(kv)
        kv.init("w", np.zeros(2000, F32))
        kv.push("w", np.ones(2000, F32))
        pid = pid_of(kv, 0)
        used = sum(each.stat().st_size for each in folder.rglob("log-*"))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (used + 20_000, resource.RLIM_INFINITY))
        acknowledged = 1
        refused = None
        while refused is None:
            try:
                kv.push("w", np.ones(2000, F32))
                acknowledged += 1
            except tensorkv.StorageError as error:
                refused = error
        assert "File too large" in str(refused)
        assert 1 < acknowledged < 10
        # Pulls go on.
        assert set(kv.pull("w").tolist()) == {acknowledged}
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        kv.push("w", np.ones(2000, F32))
        os.kill(pid, signal.SIGKILL)
        assert set(kv.pull("w").tolist()) == {acknowledged + 1}


# ---------------------------------------------------------------- who may have what


def test_two_stores_on_one_path_and_options_that_differ(shared, tmp_path):
    with create(path=tmp_path / "store", num_workers=2) as kv:
        name = name_of(kv)
        with tensorkv.create("dist_async", name=name, path=tmp_path / "store") as same:
            assert same.num_workers == 2
        for options in ({"mode": "sync"}, {"num_servers": 2}, {"num_workers": 3}, {"staleness": 1}, {"keep": 9}):
            with pytest.raises(tensorkv.ArgumentError, match=f"running with {next(iter(options))}="):
                tensorkv.create("dist_async", name=name, **options)
        with pytest.raises(tensorkv.ArgumentError, match="running with path="):
            tensorkv.create("dist_async", name=name, path=tmp_path / "other")
        with pytest.raises(tensorkv.StorageError, match=r"another store has this folder open \(process \d+\)"):
            create(path=tmp_path / "store")
        kv.init("w", np.ones(2))
        assert "w" not in shared


def test_a_create_that_fails_leaves_no_server_behind(tmp_path):
    """Not even one with a spare: each ``create`` tells the reason, and the next one has the folders and the name."""
    folders = [tmp_path / "store" / f"server-{index}" for index in range(3)]
    options = {"num_servers": 3, "path": tmp_path / "store", "name": "with a damaged folder"}
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[1] / "lock").write_text("hello")
    for _ in range(2):
        with pytest.raises(tensorkv.StorageError, match="not the lock file of a store"):
            tensorkv.create("dist_async", **options)
        until(lambda: not any(is_locked(folder) for folder in folders))
    (folders[1] / "lock").unlink()
    with tensorkv.create("dist_async", **options) as kv:
        assert kv.keys() == []


def test_a_cluster_that_others_can_reach_is_refused_without_a_token(ray_store, monkeypatch):
    places = [[*ray_store._engine._servers[0].place(LIMIT_S)]]
    servers = [SimpleNamespace(place=lambda timeout_s: places[0])]
    assert places[0][2], "the servers of a Ray that was started here ask for a token"
    node = {"Alive": True, "NodeManagerAddress": "10.1.2.3", "NodeManagerPort": 1, "ObjectManagerPort": 2}
    nodes = [*ray.nodes(), node]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    # With a token, anywhere.
    assert ray_cluster.places(servers, "store", insecure=False, timeout_s=1) == places
    places[0][2] = 0
    with pytest.raises(tensorkv.ArgumentError, match=r"\(at 10\.1\.2\.3:1, 10\.1\.2\.3:2\) and asks for no token"):
        ray_cluster.places(servers, "store", insecure=False, timeout_s=1)
    assert ray_cluster.places(servers, "store", insecure=True, timeout_s=1) == places
    node["Alive"] = False
    assert ray_cluster.places(servers, "store", insecure=False, timeout_s=1) == places


# ---------------------------------------------------------------- snapshots and versions


def test_snapshots_and_versions_with_two_servers(shared):
    kv, n = shared, 300_000
    with tensorkv.create("dist_async", name=name_of(kv)) as other:
        count_up(kv)
        kv.init(["w", "n"], [np.zeros(n, F32), np.zeros(3, F32)])
        stop, pushes = threading.Event(), []

        def push():
            while not stop.is_set():
                other.push(["w", "n"], [np.ones(n, F32), np.ones(3, F32)])
                pushes.append(1)

        thread = threading.Thread(target=push)
        thread.start()
        try:
            for _ in range(10):
                with kv.snapshot() as view:
                    seen = {*view.pull("w").tolist(), *view.pull("n").tolist()}
                    assert len(seen) == 1
                at_least = int(seen.pop()) + 2
                assert kv.pull("n", min_version=at_least, timeout_s=LIMIT_S)[0] >= at_least
        finally:
            stop.set()
            thread.join()
        assert kv.info("w").version == kv.info("n").version == len(pushes)
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match="version"):
            kv.pull("n", min_version=len(pushes) + 1)


# ---------------------------------------------------------------- workers of all kinds


@contextlib.contextmanager
def two_workers(monkeypatch, **options):
    """The stores of ranks 0 and 1, and a function that has both do something at the same time."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    name = next(names)

    def create_rank(rank):
        monkeypatch.setenv("RANK", str(rank))
        return tensorkv.create("dist_async", name=name, num_workers=2, **options)

    with create_rank(0) as first, create_rank(1) as second, ThreadPoolExecutor(2) as pool:
        monkeypatch.delenv("WORLD_SIZE")
        yield [first, second], lambda do: [each.result(LIMIT_S) for each in [pool.submit(do, rank) for rank in (0, 1)]]


def test_rank_0_looks_for_a_checkpoint_that_may_be_missing(tmp_path, monkeypatch):
    with two_workers(monkeypatch, num_servers=2) as (stores, both):
        paths = [tmp_path / "saved", tmp_path / "nowhere"]
        both(lambda rank: stores[rank].init("w", np.ones(3, F32)))
        assert both(lambda rank: stores[rank].load(paths[rank], missing_ok=True)) == [False, False]
        both(lambda rank: stores[rank].save(paths[rank]))
        both(lambda rank: stores[rank].push("w", np.full(3, 5, F32)))
        assert both(lambda rank: stores[rank].load(paths[rank], missing_ok=True)) == [True, True]
        assert [kv.pull("w").tolist() for kv in stores] == [[1, 1, 1]] * 2


def test_workers_load_a_trainer_s_state_together(monkeypatch):
    """What they have afterwards, and after more steps, is what they had, bit for bit; and if it fails, too."""
    with two_workers(monkeypatch, mode="sync", num_servers=2) as (stores, both):
        models = [torch.nn.Linear(3, 2) for _ in stores]
        trainers = both(lambda rank: tensorkv.Trainer(models[rank], stores[rank], "adam", lr=0.1))
        both(lambda rank: stores[rank].init("other", np.ones(3, F32)))
        stores[1].set_hyperparameters("bias", lr=0.02)

        def train(rank, start):
            for step in range(start, start + 3):
                trainers[rank].zero_grad()
                models[rank](torch.arange(3.0) + step + rank).square().sum().backward()
                trainers[rank].step()
            stores[rank].push("other", np.full(3, step, F32))
            return [each.tolist() for each in models[rank].parameters()]

        at_three = both(lambda rank: train(rank, 0))
        # Each by itself.
        states = [trainer.state_dict() for trainer in trainers]
        at_six = both(lambda rank: train(rank, 3))
        assert at_six[0] == at_six[1] != at_three[0]
        other = stores[0].pull("other").tolist()
        both(lambda rank: trainers[rank].load_state_dict(states[rank]))
        for rank in (0, 1):
            assert [each.tolist() for each in models[rank].parameters()] == at_three[0]
            assert stores[rank].pull("other").tolist() == other
            assert stores[rank].info("weight").version == 0
        assert both(lambda rank: train(rank, 3)) == at_six

        def fail(*_):
            raise tensorkv.CheckpointError("the disk is full")

        def load(rank):
            with pytest.raises(tensorkv.CheckpointError, match="the disk is full"):
                trainers[rank].load_state_dict(states[rank])

        monkeypatch.setattr("tensorkv.engines.ps.client.engine.scatter", fail)
        both(load)
        assert sorted(stores[1].keys()) == ["bias", "other", "weight"]
        both(lambda rank: trainers[rank].refresh())
        assert [each.tolist() for each in models[1].parameters()] == at_six[1]


def test_the_numbers_of_rank_0_s_trainer_count(monkeypatch):
    """For groups from the first push on, for schedulers and ``learning_rate``; the other worker's groups show them."""
    groups = [{"params": "weight", "weight_decay": 0.1}, {"params": "bias", "lr": 0.2}]
    with two_workers(monkeypatch, num_servers=2) as (stores, both):
        models = [torch.nn.Linear(3, 2) for _ in stores]
        trainers = both(lambda rank: tensorkv.Trainer(models[rank], stores[rank], "sgd", lr=0.1, param_groups=groups))
        for trainer in trainers:
            assert [(g["lr"], g["weight_decay"]) for g in trainer.param_groups] == [(0.1, 0.1), (0.2, 0)]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5) for trainer in trainers]
        for rank in (1, 0):
            models[rank](torch.ones(1, 3)).sum().backward()
            trainers[rank].step()
            schedulers[rank].step()
            trainers[rank].step()
            rates = [0.1, 0.2] if rank else [0.05, 0.1]
            for trainer in trainers:
                assert [group["lr"] for group in trainer.param_groups] == rates
        for rank, rates in [(1, [0.05, 0.1]), (0, [0.4, 0.4])]:
            trainers[rank].learning_rate = 0.4
            for trainer in trainers:
                assert [group["lr"] for group in trainer.param_groups] == rates


def test_workers_as_tasks_actors_and_threads_train_together():
    """In step, one of each kind."""
    with create(mode="sync", num_workers=3) as kv:
        name = name_of(kv)
        count_up(kv)
        kv.init("n", np.zeros(2, F32))

        def work(kv):
            for _ in range(3):
                kv.push("n", np.full(2, kv.rank + 1, F32))
            kv.barrier()
            return kv.rank, kv.num_workers

        def work_elsewhere(name):
            import numpy

            import tensorkv

            with tensorkv.create("dist_async", name=name) as kv:
                for _ in range(3):
                    kv.push("n", numpy.full(2, kv.rank + 1, numpy.float32))
                kv.barrier()
                return kv.rank, kv.num_workers

        class Worker:
            def work(self, name):
                return work_elsewhere(name)

        task = ray.remote(num_cpus=0)(work_elsewhere).remote(name)
        actor = ray.remote(num_cpus=0)(Worker).remote()
        found = actor.work.remote(name)
        results = []
        thread = threading.Thread(target=lambda: results.append(work(kv)))
        thread.start()
        results += ray.get([task, found], timeout=LIMIT_S)
        thread.join()
        ray.kill(actor)
        assert sorted(results) == [(0, 3), (1, 3), (2, 3)]
        assert kv.pull("n").tolist() == [18, 18]


def test_workers_of_torchrun_train_together_on_a_ray_that_they_start(monkeypatch):
    environment = dict.fromkeys(("RAY_ADDRESS",), "")
    for text in run(2, PROGRAMS, "train", env=environment):
        assert "trained" in text


def test_a_restarted_server_does_not_wait_for_a_dead_worker(ray_address, tmp_path):
    with create(num_workers=2, mode="sync", path=tmp_path / "store", heartbeat_timeout_s=1.5) as kv:
        count_up(kv)
        kv.init("n", np.zeros(1, F32))
        with Program(PROGRAMS, "silent", name_of(kv), env=ray_address) as program:
            program.wait_for("rank")
        kv.push("n", np.ones(1, F32))
        before, pid = kv.pull("n"), pid_of(kv, 0)
        os.kill(pid, signal.SIGKILL)
        kv.push("n", np.ones(1, F32))
        assert pid_of(kv, 0) != pid
        assert kv.pull("n").tolist() == [before[0] + 1]


def test_a_worker_that_is_killed_is_named_and_its_rank_is_free_again(ray_address):
    # On this host a process that has ended is dead at once, without a heartbeat timeout.
    with create(num_workers=2, heartbeat_timeout_s=2 * LIMIT_S) as kv:
        kv.init("n", np.zeros(1, F32))
        with Program(PROGRAMS, "silent", name_of(kv), env=ray_address) as program:
            assert program.wait_for("rank").split() == ["rank", "1"]
            assert kv._engine.dead_workers() == []
        until(lambda: kv._engine.dead_workers() == [1])
        with tensorkv.create("dist_async", name=name_of(kv)) as follower:
            assert follower.rank == 1
            follower.pull("n")
            assert kv.dead_workers() == []
