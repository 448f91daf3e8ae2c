"""Servers and their clients without Ray: each push counts once, rounds are whole, snapshots are of one moment."""

import contextlib
import json
import random
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows, TensorSlice, compression
from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.packing import Item, pack, raw_bytes
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines import partition
from tensorkv.engines.ps import messages
from tensorkv.engines.ps.messages import Reply
from tensorkv.engines.ps.options import PSOptions
from tensorkv.engines.ps.server.server import Server
from tensorkv.engines.ps.server.snapshot import SnapshotBarrier
from tensorkv.engines.transport import channel, network
from tensorkv.shard import native, optimizers
from tensorkv.shard.entry import Entry
from tensorkv.shard.rules import Assign
from tensorkv.storage import manifest
from tensorkv.storage.durable import open_shard
from tensorkv.storage.record import Record
from tensorkv.storage.wal import WriteAheadLog
from tests.support.amount import amount

pytest.importorskip("ray")

from tensorkv.engines.ps.client import engine as ray_engine
from tensorkv.engines.ps.client import rpc
from tensorkv.engines.ps.client.engine import close_abandoned
from tensorkv.engines.ps.client.rpc import ServerConnection
from tensorkv.engines.ps.ray import cluster as ray_cluster
from tests.support.fake_servers import NONE, Cluster, together
from tests.support.overdue import overdue
from tests.support.until import LIMIT_S, until

F32 = np.float32


@pytest.fixture
def small_pieces(monkeypatch):
    """Values of a few hundred elements are divided."""
    monkeypatch.setattr(partition, "_WHOLE", 256)


def one_hot(n, i):
    gradient = np.zeros(n, F32)
    gradient[i] = 1
    return gradient


def count_up(kv):
    """Have each push add to the value."""
    kv.set_optimizer("sgd", lr=1.0, maximize=True)


def test_servers_hold_by_their_weights(small_pieces, tmp_path):
    """Large values and small ones; the bits, a checkpoint and another number of servers do not know of it."""
    values = {"large": np.random.default_rng(0).normal(size=(1000, 7)).astype(F32)}
    values |= {f"small{index}": np.full(64, index, F32) for index in range(12)}
    gradients = {key: value[::-1].copy() for key, value in values.items()}
    with Cluster(3, weights=[100, 50, 1]) as cluster, tensorkv.create("local") as alone:
        kv = cluster.store()
        for each in (kv, alone):
            each.init(values)
            each.set_optimizer("adamw", lr=0.1)
            found = each.pushpull(gradients)
        first, second, third = [server["nbytes"] for server in kv.stats()["servers"]]
        assert first == pytest.approx(2 * second, rel=0.1)
        assert third < second / 5
        kv.save(tmp_path / "checkpoint")
        for key, value in found.items():
            np.testing.assert_array_equal(kv.pull(key), value)
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.load(tmp_path / "checkpoint")
        for key, value in found.items():
            np.testing.assert_array_equal(kv.pull(key), value)


# ---------------------------------------------------------------- what holds over a restart


def asked(server, verb, client=0, seq=0, **words):
    """What a server answers at once."""
    head = {
        "verb": verb,
        "owner": f"o{client}",
        "client": f"o{client}.0",
        "rank": client,
        "seq": seq,
        "poll_timeout_s": 0,
    }
    return server.serve({**head, **words}).head


def test_a_server_that_is_restarted_knows_what_it_has_promised(tmp_path):
    options = PSOptions(num_workers=3, path=str(tmp_path), durability="process")
    server = Server(options)
    newcomer = {"rank": None, "wanted_rank": None}
    for client in range(3):
        told = asked(server, "connect", client, **newcomer)
        assert (told["rank"], told["completed"]) == (client, (0, 0, 0))
    assert asked(server, "broadcast", 0, number=1, text="said once") == {"text": "said once"}
    for client in range(3):
        reply = asked(server, "barrier", client, number=1)
        assert ("wait_for" in reply) is (client < 2)
    asked(server, "claim", 1, number=1)
    asked(server, "leave", 1, number=1)
    asked(server, "disconnect", 2)
    for _ in range(2):
        server.close()
        server = Server(options, comes_back=True)
        # Who was told nothing yet is told it; who was at the barrier need not come again.
        assert asked(server, "broadcast", 1, number=1, text=None) == {"text": "said once"}
        assert asked(server, "barrier", 1, number=1) == {}
        assert "ranks [0]" in asked(server, "barrier", 1, number=2)["wait_for"]
        assert "another client" in asked(server, "claim", 0, number=1)["wait_for"]
        # Rank 1 has left, rank 2 has closed the store.
        told = asked(server, "stats", 0)
        assert (told["live"], told["dead"]) == ([0], [])
    # A new worker gets the rank that is free, and is told how far the others are.
    told = asked(server, "connect", 5, **newcomer)
    assert (told["rank"], told["completed"]) == (2, (1, 1, 0))
    assert asked(server, "disconnect", 0) == {"clients": 2, "dead_clients": 0}
    # Another store in the folder has nothing to do with these.
    server.close()
    server = Server(options)
    assert asked(server, "connect", 7, **newcomer)["completed"] == (0, 0, 0)
    assert "wait_for" in asked(server, "broadcast", 7, rank=0, number=1, text=None)
    assert asked(server, "disconnect", 7) == {"clients": 0, "dead_clients": 0}
    # It ends, also if it is restarted first.
    server.close()
    server = Server(options, comes_back=True)
    assert asked(server, "connect", 8, **newcomer) == {"ending": True}
    server.close()


@pytest.mark.parametrize("event", [["leave", 2], ["base", 2, 3], ["rank", 2, "o2", [0, 0, 0], 3], ["bye", "o2"]])
def test_a_folder_can_be_opened_with_fewer_workers(event, tmp_path):
    options = {"path": str(tmp_path), "durability": "process"}
    server = Server(PSOptions(num_workers=3, **options))
    assert asked(server, "connect", 2, rank=None, wanted_rank=2)["rank"] == 2
    server._record(event)
    server.close()
    server = Server(PSOptions(num_workers=1, **options))
    told = asked(server, "stats", rank=None)
    assert (told["live"], told["rounds"]) == ([0], [(0, 0)])
    server.close()


def test_readers_of_a_server_that_is_restarted_read_on(tmp_path):
    options = PSOptions(path=str(tmp_path), durability="process")
    server = Server(options)
    for name in ("first", "second"):
        assert "error" not in asked(server, "publish", release=name, seq=len(name), keep=1)
    # ``first`` was dropped, and nobody has told that it was read.
    server.close()
    server = Server(options, comes_back=True)
    assert "error" not in asked(server, "publish", release="third", seq=9, keep=1)
    opened = [asked(server, "open_release", release=name, snapshot=name, lease_s=60.0) for name in ("first", "second")]
    assert opened[0]["error"][0] == "ReleaseNotFoundError"
    assert opened[1]["number"] == 2
    assert asked(server, "list_releases")["releases"] == [["third", 3]]
    server.close()


def test_keys_stay_where_an_earlier_version_has_placed_them(tmp_path, monkeypatch):
    values = {f"w{number}": np.full(10, number, np.float32) for number in range(6)}
    options = {"path": str(tmp_path), "durability": "process"}
    with monkeypatch.context() as patched, Cluster(2, **options) as cluster:
        patched.setattr(partition, "lightest", lambda loads, weights: 1)
        cluster.store().init(list(values), list(values.values()))
    with Cluster(2, **options) as cluster:
        kv = cluster.store()
        assert [each["keys"] for each in kv.stats()["servers"]] == [0, 6]
        kv.push("w3", np.ones(10, np.float32))
        kv.init("new", np.zeros(10, np.float32))
        assert [each["keys"] for each in kv.stats()["servers"]] == [1, 6]
        for key, value in values.items():
            assert (kv.pull(key) == (1 if key == "w3" else value)).all()


# ---------------------------------------------------------------- each push counts once


# A payload that travels behind its message cannot be read twice.
FAULTS = [
    (fault, near)
    for fault in ("lose request", "lose reply", "twice")
    for near in (True, "network", False)
    if (fault, near) != ("twice", "network")
]


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_server_that_only_ray_reaches_is_reached_by_ray(is_silent, monkeypatch):
    """A firewall lets Ray through, and refuses or drops the connection of a client of another host."""
    if is_silent:
        monkeypatch.setattr(network, "connect", mock.Mock(side_effect=TimeoutError))
    with Cluster(near="network") as cluster, socket.create_server(("127.0.0.1", 0)) as closed:
        address = ["127.0.0.1", closed.getsockname()[1], "key"]
        closed.close()
        monkeypatch.setattr(cluster.actors[0].listener, "address", address)
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        kv.push("w", np.ones(100_000, F32))
        assert (kv.pull("w") == 1).all()
        assert kv.stats()["socket_requests"] == 0


@pytest.mark.parametrize("first", [True, "network"])
def test_a_server_that_has_moved_is_reached_where_it_is(first):
    """From the client's host to another one, and back; the request that finds it out is not lost."""
    fates = iter(["lose reply"])
    with Cluster(near=first, fate=lambda head: next(fates, NONE) if head["verb"] == "push" else NONE) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        count_up(kv)
        cluster.actors[0].move("network" if first is True else True)
        for _ in range(3):
            kv.push("w", np.ones(100_000, F32))
        before = kv.stats()["socket_requests"]
        assert (kv.pull("w") == 3).all()
        assert kv.stats()["socket_requests"] > before


@pytest.mark.parametrize(("fault", "near"), FAULTS)
@pytest.mark.parametrize("num_servers", [1, 3])
def test_each_push_counts_once(fault, near, num_servers, small_pieces):
    n, workers, chance = 20_000, 3, random.Random(7)

    def fate(head):
        return fault if head["verb"] == "push" and chance.random() < 0.4 else NONE

    with Cluster(num_servers, near=near, fate=fate) as cluster:
        stores = cluster.stores(workers)
        count_up(stores[0])
        stores[0].init("w", np.zeros(n, F32))
        stores[0].init("n", np.zeros(4, F32))

        def work(rank):
            for i in range(rank, 120, workers):
                stores[rank].push(["w", "n"], [one_hot(n, i), np.ones(4, F32)])
                seen = stores[rank].pull("w")
                assert seen[i] == 1

        together(*[partial(work, rank) for rank in range(workers)])
        assert stores[0].pull("w").tolist() == [1] * 120 + [0] * (n - 120)
        assert stores[0].pull("n").tolist() == [120] * 4
        assert stores[0].info("w").version == 120
        assert cluster.fired(fault) > 20


def serve_twice_after_a_snapshot(cluster, request, *others):
    """Have a request, its resent copy and other requests wait until a snapshot has been taken; return the replies."""
    server = cluster.servers[0]
    taker = {"owner": request[0]["owner"], "client": "taker", "seq": 1}
    server.serve({"verb": "prepare", **taker})
    jobs = [partial(server.serve, *each) for each in (request, request, *others)]
    wanted = server.stats()["waits"] + len(jobs)

    def abort():
        until(lambda: server.stats()["waits"] == wanted)
        server.serve({"verb": "abort", **taker})

    return [reply.head for reply in together(*jobs, abort)[:-1]]


def push_of(kv, rank, number, value):
    words = {"verb": "push", "owner": kv._engine._owner, "client": f"{kv._engine._owner}.7", "rank": rank}
    record = pack([Item("n", "sum", torch.tensor([float(value)]))])
    return {**words, "seq": number}, record.layout, record.payload[0]


def test_a_push_in_mode_sync_that_is_resent_during_a_snapshot_counts_once():
    with Cluster(mode="sync", num_workers=2) as cluster:
        stores = cluster.stores(2)
        together(*[partial(count_up, kv) for kv in stores])
        together(*[partial(kv.init, "n", np.zeros(1, F32)) for kv in stores])
        first, second = stores
        assert serve_twice_after_a_snapshot(cluster, push_of(first, 0, 1, 1), push_of(second, 1, 1, 10)) == [{}] * 3
        # Rank 0 has no push in the next round yet.
        assert "wait_for" in cluster.servers[0].serve(*push_of(second, 1, 2, 100)).head
        assert first.pull("n").tolist() == [11]


def test_a_snapshot_does_not_wait_for_a_request_that_a_server_has_refused():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        keys = [f"k{number}" for number in range(4)]
        kv.init(keys, [np.zeros(3, F32) for _ in keys])
        other.delete("k3")
        # The client does not know yet: one server has no such key, the other one applies the push.
        with pytest.raises(tensorkv.KeyNotFoundError):
            kv.push(keys, [np.ones(3, F32) for _ in keys])
        applied = {key for key in keys[:3] if other.pull(key).any()}
        assert 0 < len(applied) < 3
        with other.snapshot() as snapshot:
            assert snapshot.keys() == keys[:3]
            assert {key for key in keys[:3] if snapshot.pull(key).any()} == applied


@pytest.mark.parametrize(("mode", "step"), [("async", "push"), ("sync", "batch")])
@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("torch has none"), OSError("no device")])
def test_a_snapshot_does_not_wait_for_a_push_that_has_failed_on_a_server(mode, step, error, small_pieces):
    with Cluster(2, mode=mode) as cluster:
        kv, other = cluster.stores(2)
        kv.init("w", np.zeros(600, F32))
        failing = mock.patch.object(cluster.servers[1]._state, step, mock.Mock(side_effect=error))
        with failing, pytest.raises(tensorkv.WorkerError, match=f"server 1 failed: .*{error}"):
            kv.push("w", np.ones(600, F32))
        with other.snapshot() as snapshot:
            assert sorted(set(snapshot.pull("w").tolist())) == [0, 1]
        kv.push("w", np.full(600, 2, F32))
        assert sorted(set(other.pull("w").tolist())) == [2]


def test_a_snapshot_does_not_wait_for_a_push_whose_round_one_server_has_refused(small_pieces):
    with Cluster(2, mode="sync") as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(600, F32))
        refuse = mock.Mock(side_effect=tensorkv.StorageError("the disk is full"))
        said = pytest.raises(tensorkv.StorageError, match="the round was refused: the disk is full")
        with mock.patch.object(cluster.servers[1]._state, "push_round", refuse), said:
            kv.push("w", np.ones(600, F32))
        with kv.snapshot() as snapshot:
            assert sorted(set(snapshot.pull("w").tolist())) == [0, 1]


def test_an_init_that_is_resent_during_a_snapshot_is_made_once():
    with Cluster() as cluster:
        kv = cluster.store()
        made, serve = [], cluster.servers[0].serve

        def keep_init(head, layout, payload, out):
            if head["verb"] != "init":
                return serve(head, layout, payload, out)
            made.append((head, layout, bytes(payload)))
            return Reply({})

        with mock.patch.object(cluster.servers[0], "serve", keep_init):
            kv.init("n", np.zeros(1, F32))
        # One of them has made it, and tells what has changed by it.
        assert sorted(map(len, serve_twice_after_a_snapshot(cluster, made[0]))) == [0, 2]
        assert kv.pull("n").tolist() == [0]


def test_a_server_that_forgets_requests_is_noticed(monkeypatch):
    monkeypatch.setattr("tensorkv.storage.dedup.AppliedRequests.has_applied", lambda self, client, seq: False)
    chance = random.Random(7)

    def fate(head):
        return "lose reply" if head["verb"] == "push" and chance.random() < 0.4 else NONE

    with Cluster(fate=fate) as cluster:
        kv = cluster.store()
        count_up(kv)
        kv.init("n", np.zeros(1, F32))
        for _ in range(50):
            kv.push("n", np.ones(1, F32))
        assert kv.pull("n")[0] > 50


def lost_when_killed(folder):
    """Push, and after each acknowledgement look at what a kill would leave; return how many were lost."""
    lost = 0
    with Cluster(path=str(folder / "store"), durability="process") as cluster:
        kv = cluster.store()
        count_up(kv)
        kv.init("n", np.zeros(3, F32))
        for count in range(1, 11):
            kv.push("n", np.ones(3, F32))
            copy = folder / f"copy{count}"
            shutil.copytree(folder / "store" / "server-0", copy)
            with contextlib.closing(open_shard(str(copy))) as shard:
                value = torch.empty(3)
                shard.pull(["n"], [[value]])
                assert set(value.tolist()) <= {count, count - 1}
                lost += count - int(value[0])
                assert list(shard.log.applied.last.values())
    return lost


def test_what_is_acknowledged_is_kept(tmp_path):
    assert lost_when_killed(tmp_path) == 0


def test_a_push_that_is_acknowledged_before_it_is_logged_is_noticed(tmp_path, monkeypatch):
    real, late = WriteAheadLog.append, []

    def append(self, record):
        if record.head["verb"] == "push":
            # As long as the request is under way, its memory is its own.
            late.append(Record(record.head, record.layout, [bytes(part) for part in record.payload]))
            record = late.pop(0) if len(late) > 1 else None
        if record is not None:
            real(self, record)

    monkeypatch.setattr(WriteAheadLog, "append", append)
    assert lost_when_killed(tmp_path) == 10


def test_threads_of_a_client_count_apart():
    """Each thread's requests have numbers of their own, from the first one on."""
    for _ in range(40):
        with Cluster() as cluster:
            kv = cluster.store()
            count_up(kv)
            kv.init("n", np.zeros(1, F32))
            start = threading.Barrier(8)

            def work(kv=kv, start=start):
                start.wait()
                for _ in range(3):
                    kv.push("n", np.ones(1, F32))

            together(*[work] * 8)
            assert kv.pull("n")[0] == 24


def test_sessions_made_at_the_same_time_have_different_numbers():
    from tensorkv.engines.ps.client.session import SessionPool

    def make(number):
        time.sleep(0.01)
        made.append(number)
        return type("Session", (), {"is_idle": True, "close": lambda self: None})()

    made = []
    sessions, start = SessionPool(make), threading.Barrier(6)

    def take():
        start.wait()
        with sessions.take():
            time.sleep(0.1)

    together(*[take] * 6)
    assert sorted(made) == list(range(6))


# ---------------------------------------------------------------- bounded staleness


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_worker_is_further_ahead_than_the_bound(staleness):
    rounds, workers = 12, 3
    with Cluster(num_workers=workers, staleness=staleness) as cluster:
        stores = cluster.stores(workers)
        count_up(stores[0])
        stores[0].init("n", np.zeros(1, F32))
        done = [0] * workers
        leads = []

        def work(rank):
            chance = random.Random(rank)
            for _ in range(rounds):
                time.sleep(chance.random() * 0.004 * rank)
                stores[rank].push("n", np.ones(1, F32))
                done[rank] += 1
                leads.append(done[rank] - min(done))

        together(*[partial(work, rank) for rank in range(workers)])
        assert server_stats(cluster)["most_ahead"] <= staleness + 1
        # A worker's own count is behind by what it has not heard of yet.
        assert max(leads) <= staleness + 1
        assert stores[0].pull("n")[0] == rounds * workers


def server_stats(cluster):
    """What server 0 tells of itself."""
    return cluster.servers[0].serve({"verb": "stats", "owner": "test", "client": "test.0", "seq": 1}).head


def test_repeated_pushes_after_a_timeout_do_not_exceed_the_staleness_bound():
    with Cluster(num_workers=2, staleness=1) as cluster:
        fast, slow = cluster.stores(2)
        fast.init("n", np.zeros(1, F32))
        count_up(fast)
        fast.push("n", np.ones(1, F32))
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=r"ranks \[1\].*has been applied"):
            fast.push("n", np.ones(1, F32))
        for _ in range(3):
            with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=r"ranks \[1\]") as told:
                fast.push("n", np.ones(1, F32))
            assert "has been applied" not in str(told.value)
        assert fast.pull("n")[0] == 2
        stats = server_stats(cluster)
        assert stats["most_ahead"] == 2
        assert stats["waits"] >= 4
        assert stats["waited_s"] > 0
        slow.push("n", np.ones(1, F32))
        assert fast.pull("n")[0] == 3


def test_a_push_that_timed_out_says_whether_every_server_has_applied_it():
    """Server 0 waits after it has applied the second push, server 1 before that."""
    with Cluster(2, num_workers=2, staleness=0) as cluster:
        fast, _ = cluster.stores(2)
        fast.init(["a", "b"], [np.zeros(1, F32)] * 2)
        count_up(fast)
        for keys, is_applied in [("b", True), (["a", "b"], False), ("a", False)]:
            with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=r"ranks \[1\]") as told:
                fast.push(keys, [np.ones(1, F32)] * len(keys) if isinstance(keys, list) else np.ones(1, F32))
            assert told.value.applied is is_applied
            assert ("has been applied" in str(told.value)) is is_applied
        assert fast.pull(["a", "b"]) == [1, 1]


@pytest.mark.parametrize("is_plain", [True, False])
def test_what_a_compressed_push_leaves_is_owed_if_it_was_applied_before_it_timed_out(is_plain, monkeypatch):
    if not is_plain:
        monkeypatch.setattr(native, "can_look", lambda: False)
    with Cluster(num_workers=2, staleness=1) as cluster:
        fast, _ = cluster.stores(2)
        fast.init("n", np.zeros(1, F32))
        count_up(fast)
        fast.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        fast.push("n", np.full(1, 0.4, F32))
        assert fast.pull("n")[0] == 0
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError) as told:
            fast.push("n", np.full(1, 0.3, F32))
        assert told.value.applied
        assert fast.pull("n")[0] == 0.5
        # Of 0.7 half was sent, and 0.2 is still owed.
        owed = fast._engine._data.owed(0)
        assert owed["n", 0].residual.item() == pytest.approx(0.2)
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError) as told:
            fast.push("n", np.full(1, 0.4, F32))
        assert not told.value.applied
        assert fast._engine._data.owed(0)["n", 0].residual.item() == pytest.approx(0.2)


def test_a_push_without_an_answer_after_a_wait_has_an_unknown_outcome(monkeypatch):
    pushes = []

    def fate(head):
        if head["verb"] != "push":
            return NONE
        pushes.append(head["seq"])
        if len(pushes) == 1:
            return NONE
        asked(cluster.servers[0], "abort", 9, 1, rank=None)
        return "lose reply"

    monkeypatch.setattr(rpc._Call, "is_overdue", property(lambda call: call.attempts == 2))
    with Cluster(fate=fate) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(1, F32))
        asked(cluster.servers[0], "prepare", 9, 1, rank=None)
        with pytest.raises(tensorkv.PushOutcomeUnknownError, match="applied once, or not at all"):
            kv.push("w", np.ones(1, F32))
        assert len(pushes) == 2
        assert kv.info("w").version == 1


# ---------------------------------------------------------------- in step


DTYPES = ["float32", "float16", "bfloat16", "float64", "int32"]
OPTIMIZERS = [None, ("sgd", {"lr": 0.3, "momentum": 0.9}), ("adam", {"lr": 0.1}), ("adagrad", {"lr": 0.2})]


def bits(kv, keys):
    found = []
    for key in keys:
        info = kv.info(key)
        if info.kind == "rows":
            rows = kv.row_sparse_pull(key, row_ids=np.arange(info.shape[0]))
            found.append(raw_bytes(rows.values).tobytes())
        else:
            found.append(raw_bytes(kv.pull(key)).tobytes())
    return found


class Program:
    """Random values, and what each worker pushes in each round."""

    def __init__(self, seed, workers):
        self.chance = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.optimizer = self.chance.choice(OPTIMIZERS)
        self.values = {}
        for number in range(self.chance.randint(1, 4)):
            self.values[f"k{number}"] = self.value()
        self.rounds = [self.round(workers) for _ in range(self.chance.randint(1, 4))]

    def dense(self, shape, dtype):
        if dtype.is_floating_point:
            return (torch.randn(shape, generator=self.torch) * 3).to(dtype)
        return torch.randint(-9, 9, shape, generator=self.torch).to(dtype)

    def value(self):
        dtype = getattr(torch, self.chance.choice(DTYPES if self.optimizer is None else DTYPES[:4]))
        shape = self.chance.choice([(), (3,), (700,), (40, 16), (9, 2), (0,)])
        if len(shape) == 2 and self.chance.random() < 0.3:
            return self.rows(shape, dtype, distinct=True)
        return self.dense(shape, dtype)

    def rows(self, shape, dtype, distinct=False):
        count = self.chance.randint(1, shape[0])
        ids = torch.randperm(shape[0], generator=self.torch)[:count]
        if not distinct:
            ids = torch.randint(shape[0], (count,), generator=self.torch)
        return Rows(ids, self.dense((count, *shape[1:]), dtype), shape[0])

    def part(self, value):
        if isinstance(value, Rows):
            return self.rows(value.shape, value.values.dtype)
        if value.ndim == 2 and self.chance.random() < 0.3:
            return self.rows(value.shape, value.dtype)
        return self.dense(value.shape, value.dtype)

    def round(self, workers):
        keys = sorted(self.chance.sample(list(self.values), self.chance.randint(1, len(self.values))))
        return keys, [[self.part(self.values[key]) for key in keys] for _ in range(workers)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_servers", [1, 3])
def test_in_step_gives_the_bits_of_one_store(workers, num_servers, small_pieces):
    for seed in range(amount(8, 40)):
        program = Program(1000 * workers + seed, workers)
        near = (True, "network", False)[seed % 3]
        with Cluster(num_servers, near=near, mode="sync", num_workers=workers) as cluster:
            stores = cluster.stores(workers)
            local = tensorkv.create("local")
            for kv in (stores[0], local):
                if program.optimizer is not None:
                    kv.set_optimizer(program.optimizer[0], **program.optimizer[1])
                kv.init(list(program.values), list(program.values.values()))
            for keys, parts in program.rounds:
                together(*[partial(kv.push, keys, own) for kv, own in zip(stores, parts, strict=True)])
                local.push(keys, [[own[i] for own in parts] for i in range(len(keys))])
                wanted = bits(local, program.values)
                for kv in stores:
                    assert bits(kv, program.values) == wanted, f"seed {seed}"


@pytest.mark.parametrize("fault", ["lose request", "lose reply", "twice"])
def test_in_step_with_faults_gives_the_bits_of_one_store(fault, small_pieces):
    fired = 0
    for seed in range(amount(6, 12)):
        program, chance = Program(seed, 3), random.Random(seed)

        def fate(head, chance=chance):
            return fault if head["verb"] == "push" and chance.random() < 0.4 else NONE

        with Cluster(2, mode="sync", num_workers=3, fate=fate) as cluster:
            stores = cluster.stores(3)
            local = tensorkv.create("local")
            for kv in (stores[0], local):
                kv.init(list(program.values), list(program.values.values()))
            for keys, parts in program.rounds:
                together(*[partial(kv.push, keys, own) for kv, own in zip(stores, parts, strict=True)])
                local.push(keys, [[own[i] for own in parts] for i in range(len(keys))])
                assert bits(stores[0], program.values) == bits(local, program.values)
            fired += cluster.fired(fault)
    assert fired > 12


def test_a_round_closes_without_one_that_leaves_is_closed_or_is_dead():
    with Cluster(2, mode="sync", num_workers=4) as cluster:
        stores = cluster.stores(4)
        count_up(stores[0])
        stores[0].init("n", np.zeros(600, F32))
        push = [partial(kv.push, "n", np.ones(600, F32)) for kv in stores]
        together(*push)
        assert stores[0].pull("n")[0] == 4
        stores[3].close()
        together(*push[:3])
        assert stores[0].pull("n")[0] == 7
        cluster.silence(stores[2])
        together(*push[:2])
        assert stores[0].pull("n")[0] == 9
        assert stores[0]._engine.dead_workers() == [2]
        # It comes back, and is waited for again.
        stores[2].pull("n")
        together(*push[:3])
        assert stores[0].pull("n").tolist() == [12] * 600


def test_a_timeout_names_the_missing_ranks_and_the_push_does_no_harm():
    """A push whose wait times out stays in its round, and its memory is not used for the next request."""
    n = 40_000
    with Cluster(2, mode="sync", num_workers=2) as cluster:
        first, second = cluster.stores(2)
        first.init(["a", "b"], [np.zeros(n, F32), np.zeros(n, F32)])
        said = r"push timed out after .* waiting for ranks \[1\].*not pushed yet"
        with overdue():
            with pytest.raises(tensorkv.WaitTimeoutError, match=said):
                first.push("a", np.full(n, 3, F32))
            with pytest.raises(tensorkv.WaitTimeoutError):
                first.push("b", np.full(n, 100, F32))
        second.push("a", np.full(n, 4, F32))
        assert set(second.pull("a").tolist()) == {7}


def test_a_worker_that_waits_for_a_slow_server_tells_the_others_that_it_is_alive():
    beats = threading.Semaphore(0)

    def fate(head):
        if head["verb"] == "heartbeat" and head["rank"] == 1:
            beats.release()
        return NONE

    with Cluster(2, mode="sync", num_workers=2, fate=fate) as cluster:
        cluster.store()
        cluster.actors[1].paused.clear()
        creating = threading.Thread(target=cluster.store)
        creating.start()
        # It cannot be ready before that server has answered.
        assert all(beats.acquire() for _ in range(3))
        assert creating.is_alive()
        cluster.actors[1].paused.set()
        creating.join()


def test_a_worker_that_comes_again_is_waited_for_again():
    with Cluster(2, mode="sync", num_workers=2) as cluster:
        first, second = cluster.stores(2)
        count_up(first)
        first.init("n", np.zeros(600, F32))
        second.close()
        second = cluster.store()
        assert second.rank == 1
        slow = threading.Timer(0.4, lambda: second.push("n", np.ones(600, F32)))
        slow.start()
        first.push("n", np.ones(600, F32))
        assert first.pull("n").tolist() == [2] * 600
        slow.join()


def test_rounds_of_two_lists_of_keys_with_one_checksum():
    """The CRC-32 of "plumless" is that of "buckeroo"."""
    arrived = threading.Semaphore(0)

    def fate(head):
        if head["verb"] == "push":
            arrived.release()
        return NONE

    with Cluster(mode="sync", num_workers=2, fate=fate) as cluster, ThreadPoolExecutor(4) as pool:
        first, second = cluster.stores(2)
        first.init(["plumless", "buckeroo"], [np.zeros(1, F32), np.zeros(1, F32)])
        pushes = [(first, "plumless", 1), (second, "buckeroo", 20), (first, "buckeroo", 10), (second, "plumless", 2)]
        waiting = []
        for kv, key, number in pushes:
            waiting.append(pool.submit(kv.push, key, np.full(1, number, F32)))
            assert arrived.acquire(timeout=LIMIT_S)
        for each in waiting:
            each.result()
        assert [first.pull(key).tolist() for key in ("plumless", "buckeroo")] == [[3], [30]]


def test_a_round_that_fails_fails_for_everybody(monkeypatch):
    with Cluster(mode="sync", num_workers=2) as cluster:
        stores = cluster.stores(2)
        stores[0].init("n", np.zeros(1, F32))
        real = cluster.servers[0]._state.push_round

        def fail(keys, parts, counts, requests):
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(cluster.servers[0]._state, "push_round", fail)

        def refused(kv):
            with pytest.raises(tensorkv.WorkerError, match="a kernel failed"):
                kv.push("n", np.ones(1, F32))

        together(*[partial(refused, kv) for kv in stores])
        monkeypatch.setattr(cluster.servers[0]._state, "push_round", real)
        together(*[partial(kv.push, "n", np.full(1, 5, F32)) for kv in stores])
        assert stores[0].pull("n")[0] == 10


def test_a_mean_of_a_round_is_over_the_parts_of_all_workers(small_pieces):
    with Cluster(2, mode="sync", num_workers=2, reduce="mean") as cluster:
        stores = cluster.stores(2)
        with tensorkv.create("local", reduce="mean") as local:
            values = {"large": torch.zeros(300), "half": torch.zeros(5, dtype=torch.float16), "few": torch.zeros(9, 1)}
            for store in (*stores, local):
                store.init(values)
                store.set_optimizer("sgd", lr=1.0)
            generator = torch.Generator().manual_seed(1)
            # The first worker has several parts, since those of one are added before those of several workers.
            parts = {
                key: [torch.randn(each.shape, generator=generator).to(each.dtype) for _ in range(4)]
                for key, each in values.items()
            }
            rows = [Rows([2, 1, 2], torch.randn(3, 1, generator=generator), 9) for _ in range(4)]
            for keys in (["large", "half"], ["half"]):
                given = {key: parts[key] for key in keys}
                mine = [{key: own[:3] for key, own in given.items()}, {key: own[3:] for key, own in given.items()}]
                together(*[partial(kv.push, own) for kv, own in zip(stores, mine, strict=True)])
                local.push(given)
            together(partial(stores[0].push, "few", rows[:3]), partial(stores[1].push, "few", rows[3:]))
            local.push("few", rows)
            for key in values:
                assert torch.equal(stores[0].pull(key), local.pull(key)), key


@pytest.mark.parametrize("num_servers", [1, 3])
def test_a_client_decides_on_all_servers_before_it_pushes(small_pieces, num_servers):
    """In mode async the sums are those of one client, which knows the norm and what is not finite."""
    options = {"nonfinite": "skip_step", "reduce": "mean"}
    with Cluster(num_servers, **options) as cluster, tensorkv.create("local", **options) as local:
        kv = cluster.store()
        shapes = {"large": (700,), "b": (3, 2), "half": (9,)}
        generator = torch.Generator().manual_seed(2)
        for store in (kv, local):
            store.init(
                {
                    key: torch.zeros(shape, dtype=torch.float16 if key == "half" else torch.float32)
                    for key, shape in shapes.items()
                }
            )
            store.init("t", Rows([1], torch.zeros(1, 2), 10**9))
            store.set_optimizer("adam", lr=0.1, max_grad_norm=1.0, rescale_grad=0.3)
        for turn in range(6):
            parts = {key: [torch.randn(shape, generator=generator) for _ in range(2)] for key, shape in shapes.items()}
            parts["half"] = [part.half() for part in parts["half"]]
            if turn % 2:
                parts["t"] = Rows([5, 8, 5], torch.randn(3, 2, generator=generator), 10**9)
            if turn in (2, 3):
                parts["large"][1][650] = float("inf")
            for store in (kv, local):
                store.push(parts)
            assert kv.last_push == local.last_push
            assert kv.last_push.found_inf is (turn in (2, 3))
            for key in shapes:
                assert torch.equal(kv.pull(key), local.pull(key)), key
                assert kv.info(key).version == local.info(key).version
            assert torch.equal(*[each.row_sparse_pull("t", row_ids=[1, 5, 8]).values for each in (kv, local)])


def test_a_server_decides_on_a_round(small_pieces):
    options = {"nonfinite": "skip_step", "reduce": "mean"}
    with Cluster(mode="sync", num_workers=2, **options) as cluster, tensorkv.create("local", **options) as local:
        stores = cluster.stores(2)
        for store in (*stores, local):
            store.init({"w": torch.zeros(700), "b": torch.zeros(3)})
            store.set_optimizer("adam", lr=0.1, max_grad_norm=1.0)
        generator = torch.Generator().manual_seed(2)
        for turn in range(4):
            parts = {
                key: [torch.randn(n, generator=generator) for _ in range(2)] for key, n in {"w": 700, "b": 3}.items()
            }
            if turn == 1:
                parts["b"][1][2] = float("nan")
            mine = [{key: own[rank] for key, own in parts.items()} for rank in range(2)]
            if turn < 3:
                together(*[partial(kv.push, own) for kv, own in zip(stores, mine, strict=True)])
                local.push(parts)
            else:
                together(*[partial(kv.pushpull, own) for kv, own in zip(stores, mine, strict=True)])
                local.push(parts)
            for kv in stores:
                assert kv.last_push == local.last_push
                assert all(torch.equal(kv.pull(key), local.pull(key)) for key in "wb")
        assert local.info("w").version == stores[0].info("w").version == 3


def test_a_change_of_the_rule_waits_for_rank_0_and_for_no_more_than_it():
    with Cluster(2, num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        first, second = cluster.stores(2)
        changes = [
            lambda kv: kv.set_optimizer("sgd", lr=1.0),
            lambda kv: kv.set_optimizer("sgd", lr=0.5),
            lambda kv: kv.set_updater(None),
        ]
        for change in changes:
            waiting = pool.submit(change, second)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
            change(first)
            waiting.result()
            assert first.optimizer == second.optimizer
        # Rank 0 does not wait for the others: what they wait for may be gone.
        for change in changes:
            change(first)
        for change in changes:
            change(second)
        assert second.optimizer is None
        first.set_optimizer("sgd", lr=1.0)
        with pytest.raises(tensorkv.WorkerMismatchError, match="rank 0 has set sgd, this worker sets adam"):
            second.set_optimizer("adam")


@pytest.mark.parametrize("has_set", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reader_that_takes_a_rank_counts_the_rules_that_were_set(rank, has_set):
    with Cluster(2, mode="sync", num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        stores = cluster.stores(3)
        stores[0].init("w", np.zeros(3, F32))
        stores[0].set_optimizer("sgd", lr=1.0)
        stores[1].set_optimizer("sgd", lr=1.0)
        if has_set:
            stores[2].set_optimizer("sgd", lr=1.0)
        cluster.drop(stores.pop(rank))
        worker, reader = stores
        pushing = pool.submit(reader.push, "w", np.ones(3, F32))
        until(lambda: reader.rank == rank)
        worker.push("w", np.ones(3, F32))
        pushing.result(LIMIT_S)
        first, second = sorted(stores, key=lambda kv: kv.rank)
        waiting = pool.submit(second.set_optimizer, "adam")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        first.set_optimizer("adam")
        waiting.result(LIMIT_S)


def test_a_rule_that_rank_0_could_not_set_is_not_counted():
    with Cluster(2, num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        first, second = cluster.stores(2)
        planted = mock.patch.object(type(first._engine), "_send_rule", side_effect=tensorkv.StorageError("planted"))
        with planted, pytest.raises(tensorkv.StorageError, match="planted"):
            first.set_optimizer("sgd", lr=1.0)
        first.set_optimizer("sgd", lr=1.0)
        second.set_optimizer("sgd", lr=1.0)
        waiting = pool.submit(second.set_optimizer, "adam")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        first.set_optimizer("adam")
        waiting.result(LIMIT_S)


def test_rules_that_a_trainer_sets_are_not_counted():
    """Rank 0 may have set one before another worker looks, and changes its numbers alone."""
    sgd = optimizers.spec("sgd", {"lr": 1.0})
    with Cluster(2, num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        first, second = cluster.stores(2)
        started = pool.submit(second._start_optimizer, sgd)
        with pytest.raises(TimeoutError):
            started.result(0.1)
        assert first._start_optimizer(sgd)
        assert started.result()
        assert not first._start_optimizer(sgd)
        first._change_optimizer(optimizers.spec("sgd", {"lr": 2.0}))
        waiting = pool.submit(second.set_optimizer, "adam")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        first.set_optimizer("adam")
        waiting.result()
        with pytest.raises(tensorkv.WorkerMismatchError, match="rank 0 has set adam, this worker sets sgd"):
            second._start_optimizer(sgd)


def test_a_client_that_does_not_know_of_a_bound_on_the_norm(small_pieces):
    """A push of which no server knows the norm is refused by each, once."""
    with Cluster(2, num_workers=2) as cluster:
        first, second = cluster.stores(2)
        first.init("w", np.zeros(300, F32))
        first.set_optimizer("sgd", lr=1.0)
        assert second.optimizer["max_grad_norm"] is None
        with mock.patch.object(type(second._engine._keymap), "refresh"):
            first._engine._ask(messages.SetHyperparameters(numbers={"max_grad_norm": 1.0}))
            for _ in range(2):
                with pytest.raises(tensorkv.OptimizerError, match="has just set max_grad_norm; push again"):
                    second.push("w", np.ones(300, F32))
        assert not first.pull("w").any()
        with pytest.raises(tensorkv.OptimizerError, match="push again"):
            second.push("w", np.ones(300, F32))
        second.push("w", np.ones(300, F32))
        assert second.last_push.grad_norm == np.sqrt(300)
        assert np.allclose(first.pull("w"), -1 / np.sqrt(300))
        # Without a push of its own, a client learns of it with its next heartbeat.
        first._engine._ask(messages.SetHyperparameters(numbers={"max_grad_norm": 2.0}))
        until(lambda: second._engine._keymap.rule.clipping.bound == 2.0)


def test_several_servers_do_not_clip_the_sums_of_workers(tmp_path):
    with tensorkv.create("local") as local:
        local.init("w", np.zeros(1, F32))
        local.set_optimizer("sgd", lr=1.0, max_grad_norm=1.0)
        local.save(tmp_path / "saved")
    with Cluster(2, mode="sync") as cluster:
        kv = cluster.store()
        for call in (
            lambda: kv.set_optimizer("sgd", lr=1.0, max_grad_norm=1.0),
            lambda: kv.set_hyperparameters(max_grad_norm=1.0),
            lambda: kv.load(tmp_path / "saved"),
        ):
            with pytest.raises(tensorkv.OptimizerError, match="max_grad_norm in mode sync needs num_servers=1"):
                call()
            kv.set_optimizer("sgd", lr=1.0)
        assert kv.keys() == []


def test_a_push_with_wrong_counts_is_refused():
    server = Server(PSOptions(mode="sync", reduce="mean"))
    bad = [[], [0], [True], [1, 1], [1.5]]
    metadata = {
        "kinds": [
            {
                "dtype": "float32",
                "library": "numpy",
                "device": None,
                "table": False,
                "shape": [1],
                "pieces": [[0, 0, 1]],
            }
        ]
    }
    packed = pack([Item("w", "sum", torch.ones(1))])
    head = {
        "verb": "init",
        "owner": "o",
        "client": "o.0",
        "rank": 0,
        "seq": 1,
        "keys": ["w"],
        "indices": [0],
        "orders": [0],
    }
    payload = b"".join(map(bytes, packed.payload))
    assert server.serve({**head, **metadata}, packed.layout, payload).head.get("error") is None
    for counts in bad:
        push = {
            "verb": "push",
            "owner": "o",
            "client": "o.0",
            "rank": 0,
            "seq": 2,
            "round": ["w", 1, 1],
            "counts": counts,
        }
        assert "number of parts of each key" in str(server.serve(push, packed.layout, payload).head["error"])


@pytest.mark.parametrize("rank", [-1, 2, 99])
@pytest.mark.parametrize("owner", ["o", None])
def test_a_push_of_a_rank_that_there_is_not_is_refused(owner, rank):
    """Nobody waits for such a worker at a barrier."""
    with Cluster(num_workers=2) as cluster:
        server = cluster.servers[0]
        cluster.store().init("w", np.zeros(1, F32))
        packed = pack([Item("w", "sum", torch.ones(1))])
        push = {"verb": "push", "owner": owner, "client": "o.0", "rank": rank, "seq": 1}
        said = f"invalid rank {rank}; expected an int below num_workers=2"
        assert said in server.serve(push, packed.layout, b"".join(map(bytes, packed.payload))).head["error"][1]
        assert server._staleness.live() == [0, 1]


def test_a_client_that_is_removed_as_idle_while_it_sends_a_request_is_added_again():
    class Members(dict):
        removed = 0

        def __contains__(self, owner):
            found = super().__contains__(owner)
            if not self.removed:
                # Another thread does this right after.
                self.removed += found
                self.pop(owner, None)
            return found

    server = Server(PSOptions(num_workers=2))
    for client in (0, 1):
        asked(server, "connect", client, rank=None, wanted_rank=client)
    members = server._tables.members = Members(server._tables.members)
    assert "error" not in asked(server, "stats", 1)
    assert members.removed == 1
    assert dict(members) == {"o0": 0, "o1": 1}


def test_barriers_and_who_is_missing():
    with Cluster(2, num_workers=2) as cluster:
        first, second = cluster.stores(2)
        said = r"ranks \[1\], which have not reached the barrier"
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=said):
            first.barrier()
        second.barrier()
        order = []

        def late():
            time.sleep(0.1)
            order.append("late")
            second.barrier()

        together(late, lambda: (first.barrier(), order.append("first")))
        assert order == ["late", "first"]
        second.close()
        # One that follows a worker that is gone meets the others where they are.
        second = cluster.store()
        assert (second.rank, second._engine._barriers) == (1, 2)
        together(first.barrier, second.barrier)


@pytest.mark.parametrize(("step", "value"), [("_push_coded", 1), ("_decide_coded", 0.5)])
@pytest.mark.parametrize("codec", [None, {"type": "2bit", "threshold": 4.0}])
def test_another_thread_changes_the_codec_during_a_push(codec, step, value, monkeypatch):
    """A gradient is pushed as it is, or decoded as it was encoded."""
    with Cluster(1) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(6, F32))
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        made = getattr(kv._engine._data, step)

        def change(*args):
            monkeypatch.undo()
            kv.set_gradient_compression(codec)
            return made(*args)

        monkeypatch.setattr(kv._engine._data, step, change)
        kv.push("w", np.ones(12, F32)[::2])
        assert kv._engine._data.compressor.codec == (codec and compression.parse(codec))
        if codec is not None and step == "_push_coded":
            value = 0
        assert kv.pull("w").tolist() == [value] * 6


@pytest.mark.parametrize("verb", ["save", "load", "set_gradient_compression"])
def test_whatever_fails_on_rank_0_is_raised_on_every_worker(verb, tmp_path, monkeypatch):
    with Cluster(2, num_workers=2) as cluster:
        first, second = cluster.stores(2)
        first.init("n", np.ones(600, F32))
        first.save(tmp_path)
        second.save(tmp_path)
        call = {"set_gradient_compression": lambda kv: kv.set_gradient_compression({"type": "2bit"})}.get(
            verb, lambda kv: getattr(kv, verb)(tmp_path)
        )
        failing = mock.MagicMock(side_effect=RuntimeError("not enough memory"))
        failing.__iter__ = failing
        with monkeypatch.context() as patch:
            patch.setattr(ray_engine.checkpoint, "write", failing)
            patch.setattr(ray_engine.checkpoint, "read", failing)
            patch.setattr(first._engine._data.compressor, "owed", failing)
            with pytest.raises(RuntimeError, match="not enough memory"):
                call(first)
        with overdue(), pytest.raises(tensorkv.WorkerError, match="rank 0 failed: RuntimeError: not enough memory"):
            call(second)
        call(first)
        with overdue():
            call(second)


@pytest.mark.parametrize("late", [0, 1], ids=["rank 0 is late", "rank 1 is late"])
@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("verb", ["save", "load", "load missing_ok", "set_gradient_compression", "barrier", "leave"])
def test_a_call_of_all_workers_that_timed_out_counts_as_made(verb, is_compressed, late, tmp_path):
    def call(kv):
        match verb:
            case "set_gradient_compression":
                kv.set_gradient_compression({"type": "2bit"})
            case "barrier" | "leave":
                getattr(kv, verb)()
            case _:
                getattr(kv, verb.split()[0])(tmp_path / "first", **dict.fromkeys(verb.split()[1:], True))

    with Cluster(2, num_workers=2) as cluster:
        workers = cluster.stores(2)
        workers[0].init("n", np.ones(600, F32))
        if is_compressed:
            together(*(partial(kv.set_gradient_compression, {"type": "2bit", "threshold": 0.25}) for kv in workers))
            together(*(partial(kv.push, "n", np.full(600, kv.rank + 0.125, F32)) for kv in workers))
        together(*(partial(kv.save, tmp_path / "first") for kv in workers))
        with contextlib.suppress(tensorkv.WaitTimeoutError), overdue():
            call(workers[1 - late])
        with contextlib.suppress(tensorkv.WaitTimeoutError), overdue():
            call(workers[late])
        # Both go on with the next calls, which meet.
        together(*(partial(kv.save, tmp_path / "second") for kv in workers))
        together(*(kv.barrier for kv in workers))
        together(*(partial(kv.load, tmp_path / "second") for kv in workers))
        engines = [kv._engine for kv in workers]
        assert len({(each._barriers, each._broadcasts) for each in engines}) == 1
        owed = [each._data.owed(rank) for rank, each in enumerate(engines)]
        # Another codec begins with what is owed being pushed.
        assert all(map(bool, owed)) == is_compressed or verb == "set_gradient_compression"


def test_a_reader_saves_and_loads_by_itself(tmp_path):
    with Cluster(2, num_workers=2) as cluster:
        first, _, reader = cluster.stores(3)
        first.init("n", np.ones(600, F32))
        reader.save(tmp_path / "checkpoint")
        first.push("n", np.full(600, 2, F32))
        assert first.pull("n")[0] == 2
        reader.load(tmp_path / "checkpoint")
        assert first.pull("n").tolist() == [1] * 600


@pytest.mark.parametrize("near", [True, "network", False])
@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("part", ["everything", "states"])
def test_loaded_values_do_not_share_memory_with_the_next_request(part, num_servers, near, tmp_path):
    keys = [f"k{number}" for number in range(6)]
    grads = dict.fromkeys(keys, np.ones(100_000, F32))
    with Cluster(num_servers, near=near) as cluster, tensorkv.create("local") as local:
        kv = cluster.store()
        for store in (kv, local):
            store.init({key: np.full(100_000, number, F32) for number, key in enumerate(keys)})
            store.set_optimizer("sgd", lr=0.1, momentum=0.9)
            store.push(grads)
        if part == "everything":
            kv.save(tmp_path)
            kv.load(tmp_path)
        else:
            kv.save_optimizer_states(tmp_path)
            kv.load_optimizer_states(tmp_path)
        for number, key in enumerate(keys):
            for store in (kv, local):
                store.push(key, np.full(100_000, number + 0.5, F32))
            for got, right in zip(kv.pull(keys), local.pull(keys), strict=True):
                assert np.array_equal(got, right)


def test_a_rule_that_stays_keeps_the_numbers_of_single_keys(tmp_path):
    """A checkpoint of a store with an updater brings no rule."""
    keys = [f"k{number}" for number in range(8)]
    with tensorkv.create("local") as saved, Cluster(3) as cluster:
        saved.init({key: np.ones(3, F32) for key in keys})
        saved.set_updater(lambda key, received, stored: None)
        saved.save(tmp_path)
        kv = cluster.store()
        kv.init({key: np.zeros(3, F32) for key in keys})
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_hyperparameters(keys, lr=0.0)
        kv.load(tmp_path)
        kv.push({key: np.ones(3, F32) for key in keys})
        assert [pulled.tolist() for pulled in kv.pull(keys)] == [[1, 1, 1]] * 8


def test_a_failed_load_keeps_the_placement_of_keys_and_a_successful_one_replaces_it(tmp_path, monkeypatch):
    with Cluster(2) as cluster:
        (kv,) = cluster.stores(1)
        kv.init(["a", "b"], [np.full(3, 1, F32), np.full(5, 2, F32)])
        kv.save(tmp_path / "small")
        kv.delete(["a", "b"])
        # The other way round, they go to other servers.
        kv.init(["b", "a", "c"], [np.full(9, 3, F32), np.full(4, 4, F32), np.full(2, 5, F32)])

        def fail(contents, metadata, requests):
            raise tensorkv.StorageError("the disk is full")

        for each in cluster.servers:
            monkeypatch.setattr(each._state, "restore", fail)
        with pytest.raises(tensorkv.StorageError, match="full"):
            kv.load(tmp_path / "small")
        for client in (kv, cluster.store()):
            assert [client.pull(key).tolist() for key in "abc"] == [[4] * 4, [3] * 9, [5] * 2]
        monkeypatch.undo()
        kv.load(tmp_path / "small")
        assert [kv.pull(key).tolist() for key in "ab"] == [[1] * 3, [2] * 5]
        assert sorted(name for each in cluster.servers for name in each._state.shard.notes) == ['"a"', '"b"']


@pytest.mark.parametrize("in_folder", [False, True])
def test_servers_forget_keys_and_clients_that_are_gone(in_folder, tmp_path):
    options = {"path": str(tmp_path / "store"), "durability": "process"} if in_folder else {}
    options["num_workers"] = 2

    def check(server, clients):
        assert [dict(worker.counts) for worker in server._staleness._workers.values()] == [{"w": 4}, {"w": 1}]
        assert server._staleness.rounds() == {0: 4, 1: 1}
        assert len(server._results) == clients

    with tensorkv.create("local") as saved, Cluster(**options) as cluster:
        saved.init("w", np.zeros(4, F32))
        saved.save(tmp_path / "saved")
        kv, other = cluster.stores(2)
        kv.init(["w", "loaded"], [np.zeros(4, F32)] * 2)
        for _ in range(3):
            kv.push(["w", "loaded"], [np.ones(4, F32)] * 2)
        for number in range(5):
            kv.init(f"k{number}", np.zeros(4, F32))
            kv.push(f"k{number}", np.ones(4, F32))
            kv.delete(f"k{number}")
        kv.load(tmp_path / "saved")
        for each in (kv, other):
            each.push("w", TensorSlice(np.ones(4, F32), (0,), (4,)))
        check(cluster.servers[0], 2)
        cluster.drop(other).close()
        check(cluster.servers[0], 1)
        cluster.drop(kv).close()
        check(cluster.servers[0], 0)
    if in_folder:
        server = Server(PSOptions(**options), comes_back=True)
        check(server, 0)
        server.close()


@pytest.mark.parametrize(("step", "found"), [("_write_snapshot", [1, 1]), ("_remove_replaced", [2, 2, 2])])
def test_a_server_that_is_killed_in_a_load_has_all_of_it_or_nothing(step, found, tmp_path, monkeypatch):
    options = {"durability": "process"}
    do = getattr(WriteAheadLog, step)

    def copy_folder(*arguments):
        shutil.copytree(tmp_path / "store", tmp_path / "killed")
        return do(*arguments)

    with Cluster(path=str(tmp_path / "store"), **options) as cluster, tensorkv.create("local") as saved:
        saved.init("w", np.full(3, 2, F32))
        saved.save(tmp_path / "saved")
        kv = cluster.store()
        kv.init(["w", "gone"], [np.ones(2, F32)] * 2)
        monkeypatch.setattr(WriteAheadLog, step, copy_folder)
        kv.load(tmp_path / "saved")
        monkeypatch.undo()
    with Cluster(path=str(tmp_path / "killed"), **options) as cluster:
        kv = cluster.store()
        assert kv.pull("w").tolist() == found
        kv.push("w", np.zeros(len(found), F32))
        assert kv.keys() == (["w", "gone"] if len(found) == 2 else ["w"])
        assert len(cluster.servers[0]._state.shard.notes) == len(kv.keys())


@pytest.mark.parametrize("keys", [["n"], [f"k{i}" for i in range(20)]])
def test_a_pull_finds_keys_that_another_client_has_re_created_on_other_servers(keys):
    with Cluster(2) as cluster:
        first, second = cluster.stores(2)
        for kv in (first, second):
            kv._engine._ending.set()
            kv._engine._heartbeats.join()
        values = [np.full(50, i, F32) for i in range(len(keys))]
        first.init(keys, values)
        outs = [np.empty(50, F32) for _ in keys]
        first.pull(keys, out=outs)
        before = first.stats()["servers"]
        second.delete(keys)
        # It goes where there is room.
        second.init("large", np.zeros(1_000, F32))
        for key, value in zip(reversed(keys), reversed(values), strict=True):
            second.init(key, value + 1)
        second.delete("large")
        assert [each["nbytes"] for each in before] != [each["nbytes"] for each in first.stats()["servers"]]
        first.pull(keys, out=outs)
        assert [out[0] for out in outs] == [i + 1 for i in range(len(keys))]
        # Of another shape, it is an error, and the outs are as they were.
        second.delete(keys[0])
        second.init(keys[0], np.zeros(49, F32))
        with pytest.raises(tensorkv.ValueMismatchError):
            first.pull(keys, out=outs)
        assert outs[0][0] == 1


def test_what_is_told_of_a_key_that_another_client_has_re_created_on_another_server():
    with Cluster(2) as cluster:
        first, second = cluster.stores(2)
        for kv in (first, second):
            kv._engine._ending.set()
            kv._engine._heartbeats.join()
        first.init("w", np.zeros(3, F32))
        assert first.info("w").shape == (3,)
        second.delete("w")
        # It goes to the other server, where there is room.
        second.init("large", np.zeros(1_000, F32))
        second.init("w", np.zeros(5, F32))
        second.push("w", np.ones(5, F32))
        with pytest.raises(tensorkv.ValueMismatchError):
            first.pull("w", out=np.empty(3, F32), min_version=1)
        assert first.pull("w", min_version=1).tolist() == [1] * 5
        second.delete("w")
        second.delete("large")
        second.init("w", np.zeros(2, F32))
        found = first.info("w")
        assert (found.shape, found.version, found.nbytes) == ((2,), 0, 8)
        second.delete("w")
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'info\("w"\): no such key'):
            first.info("w")


def test_servers_end_with_the_last_client_and_not_while_another_may_only_be_busy():
    with Cluster(2, num_workers=3) as cluster:
        first, busy, last = cluster.stores(3)
        cluster.silence(busy)
        assert first.dead_workers() == [1]
        first.close()
        last.close()
        ray_cluster.stop_servers.assert_not_called()
        again = cluster.store()
        busy.close()
        ray_cluster.stop_servers.assert_not_called()
        again.close()
        ray_cluster.stop_servers.assert_called_once()
        # Whoever comes now would lose the servers.
        with pytest.raises(tensorkv.ServerDeadError, match="the last client has just closed this store"):
            cluster.store()
    # Nobody is waited for who has been silent for two minutes.
    with Cluster(2, num_workers=3) as cluster:
        gone, last = cluster.stores(2)
        cluster.silence(gone, 121)
        last.close()
        ray_cluster.stop_servers.assert_called_once()


def test_a_store_that_is_dropped_is_closed():
    with Cluster(2, num_workers=2) as cluster:
        kv, other = cluster.stores(2)
        kv.init("w", np.ones(3, F32))
        with kv.snapshot() as moment:
            engine = cluster.drop(kv)
            del kv
            # Who reads a snapshot still uses the store.
            assert moment.pull("w").tolist() == [1, 1, 1]
            assert not engine.is_abandoned
        del moment
        assert engine.is_abandoned
        assert engine._ended.wait(LIMIT_S)
        engine._heartbeats.join()
        assert other.stats()["clients"] == 1
        assert other.dead_workers() == []
        ray_cluster.stop_servers.assert_not_called()
        assert cluster.store().rank == 0
        # Others do not wait until its heartbeat has noticed.
        last = cluster.drop(other)
        del other
        close_abandoned()
        assert last._ended.is_set()


def test_a_snapshot_that_is_dropped_makes_room_for_the_next_one():
    with Cluster(2, keep=1) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(3, F32))
        for _ in range(3):
            moment = kv.snapshot()
            with pytest.raises(tensorkv.SnapshotError):
                kv.snapshot()
            assert moment.pull("w").tolist() == [0, 0, 0]
            del moment


def test_a_reader_that_pushes_takes_the_rank_of_a_worker_that_has_ended():
    """As in a notebook, where the cell that creates the store was run again."""
    with Cluster(2, mode="sync", num_workers=1) as cluster:
        first, second = cluster.stores(2)
        first.init("w", np.zeros(3, F32))
        assert (first.rank, second.rank) == (0, 1)
        with pytest.raises(tensorkv.ArgumentError, match="only workers push"):
            second.push("w", np.ones(3, F32))
        assert (second.rank, first.stats()["clients"]) == (1, 2)
        cluster.drop(first)
        del first
        second.push("w", np.ones(3, F32))
        assert second.rank == 0
        assert second.pushpull("w", np.full(3, 2, F32)).tolist() == [2, 2, 2]
        second.pushpull(["w"], [np.full(3, 3, F32)])
        assert second.stats()["clients"] == 1
        second.barrier()


def test_a_worker_that_is_started_again_gets_the_rank_of_the_one_that_was_killed(monkeypatch):
    """It comes before the other counts as lost; a rank whose worker lives is not given to a second one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with Cluster(2, num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        killed = cluster.store()
        with pytest.raises(tensorkv.ArgumentError, match="rank 1 is taken by a live worker"):
            cluster.store()
        cluster.silence(killed, 0)
        again = pool.submit(cluster.store)
        until(lambda: cluster.servers[0]._membership._wants_rank_since)
        assert cluster.servers[0].stats()["dead"] == []
        cluster.silence(killed)
        assert again.result(LIMIT_S).rank == 1


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_readers_that_a_launcher_has_started_take_no_rank_of_a_worker(mode, monkeypatch):
    """As ranks of an inference engine, which begin before all workers are there."""
    with Cluster(2, num_workers=2, mode=mode) as cluster:
        monkeypatch.setenv("WORLD_SIZE", "2")
        readers = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            readers.append(cluster.store(reader=True))
        assert [kv.rank for kv in readers] == [2, 3]
        monkeypatch.setenv("RANK", "0")
        worker = cluster.store()
        assert worker.rank == 0
        worker.init("w", np.zeros(3, F32))
        readers[1].close()
        assert cluster.store(reader=True).rank == 3
        if mode == "sync":
            with pytest.raises(tensorkv.ArgumentError, match="only workers push"):
                readers[0].push("w", np.ones(3, F32))
        assert readers[0].rank == 2
        assert readers[0].pull("w").tolist() == [0, 0, 0]


def test_after_a_dead_server_the_others_stay_for_live_clients_alone():
    with Cluster(3, num_workers=3) as cluster:
        first, silent, last = cluster.stores(3)
        cluster.silence(silent)
        assert first.dead_workers() == [1]
        cluster.actors[1].die()
        first.close()
        ray_cluster.stop_servers.assert_not_called()
        # They end as soon as no client sends heartbeats, even if none disconnects.
        assert [actor.server.is_broken for actor in cluster.actors] == [True, False, True]
        last.close()
        ray_cluster.stop_servers.assert_called_once()


def test_finding_servers_waits_until_all_are_there_or_the_store_has_ended(monkeypatch):
    options = PSOptions(num_servers=2).of_store()
    there = {0: SimpleNamespace(options="first"), 1: SimpleNamespace()}
    looks, comes_at = [], []

    def get(name, index):
        looks.append(index)
        if len(looks) in comes_at:
            there[1] = second
        return there.get(index)

    def ask(actor, method, name, timeout_s):
        assert method == "options"
        if actor.options == "ending":
            there.clear()
            raise tensorkv.ServerDeadError("it has just ended")
        return options

    monkeypatch.setattr(ray_cluster, "_get", get)
    monkeypatch.setattr(ray_cluster, "_ask", ask)
    servers, found = ray_cluster.find_servers("s", LIMIT_S)
    assert ([server.actor for server in servers], found) == ([there[0], there[1]], PSOptions(num_servers=2))
    second = there.pop(1)
    with pytest.raises(tensorkv.ServerDeadError, match=r"server 1 of 2 has ended.*close it everywhere, then create"):
        ray_cluster.find_servers("s", 0.1)
    # It comes late, or the first one ends while it is waited for.
    looks[:], comes_at[:] = [], [6]
    assert ray_cluster.find_servers("s", LIMIT_S)[0][1].actor is second
    there[0].options = "ending"
    assert ray_cluster.find_servers("s", LIMIT_S) is None


# ---------------------------------------------------------------- snapshots


def test_a_snapshot_has_every_key_that_it_names(small_pieces):
    """Also one that another client has just created, or deleted and created again."""
    with Cluster(2) as cluster:
        first, second = cluster.stores(2)
        first.init(["a", "b"], [np.zeros(3, F32), np.zeros(3, F32)])
        look = first._engine._snapshots._take

        def after_others(words):
            second.delete("b")
            second.init(["b", "c"], [np.ones(600, F32), np.ones((40, 16), F32)])
            return look(words)

        with mock.patch.object(first._engine._snapshots, "_take", after_others), first.snapshot() as moment:
            second.delete("c")
            assert moment.keys() == ["a", "b", "c"] == list(moment.versions)
            assert [moment.pull(key).shape for key in moment.keys()] == [(3,), (600,), (40, 16)]


def push_all(stores, stop, n):
    def work(kv):
        count = 0
        while not stop.is_set():
            kv.push(["w", "n"], [np.ones(n, F32), np.ones(3, F32)])
            count += 1
        # Those who are in step would wait for it.
        kv._engine.leave()
        return count

    return [partial(work, kv) for kv in stores]


def halves(num_servers, is_enough, mode="async", near=True, n=3000):
    """Take snapshots under pushes until enough is seen; return how many differ, and those with half of an update.

    Args:
        num_servers, mode, near: of the cluster.
        is_enough: given both, tells whether to end; after the limit it ends all the same.
        n: elements of a value.
    """
    seen, torn, stop = [], [], threading.Event()
    with Cluster(num_servers, near=near, mode=mode, num_workers=3 if mode == "sync" else 1) as cluster:
        stores = cluster.stores(3)
        count_up(stores[0])
        stores[0].init(["w", "n"], [np.zeros(n, F32), np.zeros(3, F32)])
        reader = cluster.store()

        def read():
            end = time.monotonic() + LIMIT_S
            try:
                while not is_enough(len(set(seen)), torn) and time.monotonic() < end:
                    with reader.snapshot() as view:
                        values = {*view.pull("w").tolist(), *view.pull("n").tolist()}
                        seen.append(min(values))
                        torn.extend([values] * (len(values) > 1))
                        assert set(view.pull("w").tolist()) == values or len(values) > 1
            finally:
                stop.set()

        together(read, *push_all(stores, stop, n))
        assert seen == sorted(seen)
        assert stores[0].stats()["snapshots"] == 0
    return len(set(seen)), torn


@pytest.mark.parametrize("num_servers", [1, 2, 3])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_snapshot_never_shows_half_of_an_update(num_servers, mode, small_pieces):
    count, torn = halves(num_servers, lambda count, torn: count > 60, mode)
    assert not torn
    assert count > 60


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_cut_that_is_none_is_noticed(mode, small_pieces, monkeypatch):
    monkeypatch.setattr("tensorkv.engines.ps.server.snapshot.SnapshotBarrier.admits", lambda self, client, seq: True)
    _, torn = halves(3, lambda count, torn: torn, mode)
    assert torn


def test_a_cut_that_does_not_wait_for_requests_in_flight_is_noticed(small_pieces, monkeypatch):
    real = SnapshotBarrier.commit
    monkeypatch.setattr(
        SnapshotBarrier, "commit", lambda self, owner, seq, wanted, take: real(self, owner, seq, {}, take)
    )
    _, torn = halves(3, lambda count, torn: torn)
    assert torn


def test_snapshots_of_several_clients_at_the_same_time(small_pieces):
    with Cluster(3) as cluster:
        stores = cluster.stores(3)
        count_up(stores[0])
        stores[0].init("w", np.zeros(600, F32))

        def read(kv):
            for _ in range(15):
                with kv.snapshot() as view:
                    assert len(set(view.pull("w").tolist())) == 1
                kv.push("w", np.ones(600, F32))

        together(*[partial(read, kv) for kv in stores + stores[:1]])
        assert stores[0].pull("w").tolist() == [60] * 600


def test_half_of_a_dead_workers_push_does_not_end_snapshots(small_pieces):
    with Cluster(2) as cluster:
        kv = cluster.store()
        count_up(kv)
        kv.init("w", np.zeros(600, F32))
        dying = cluster.store()
        # The second server never hears of it.
        cluster.actors[1].fate = lambda head: "lose request" if head["verb"] == "push" else NONE
        with overdue(), pytest.raises(tensorkv.PushOutcomeUnknownError):
            dying.push("w", np.ones(600, F32))
        assert [server._state.shard.entry("pull", "w").version for server in cluster.servers] == [1, 0]
        cluster.silence(dying)
        with kv.snapshot() as view:
            assert sorted(set(view.pull("w").tolist())) == [0, 1]


def test_two_threads_that_release_an_abandoned_snapshot_take_the_next_one():
    class Abandoned(list):
        def __len__(self):
            # Another thread takes what there is right after.
            found = super().__len__()
            self.clear()
            return found

    with Cluster() as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(1, F32))
        kv._engine._snapshots.abandoned = Abandoned(["another's"])
        with kv.snapshot() as snapshot:
            assert snapshot.keys() == ["w"]


def test_snapshots_go_on_after_a_push_that_only_some_servers_have_got(small_pieces):
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        count_up(kv)
        kv.init("w", np.zeros(600, F32))
        cluster.actors[1].fate = lambda head: "lose request" if head["verb"] == "push" else NONE
        with overdue(), pytest.raises(tensorkv.PushOutcomeUnknownError):
            kv.push("w", np.ones(600, F32))
        cluster.actors[1].fate = lambda head: NONE
        for store in (other, kv):
            with store.snapshot() as view:
                assert sorted(set(view.pull("w").tolist())) == [0, 1]
        kv.push("w", np.ones(600, F32))
        assert sorted(set(kv.pull("w").tolist())) == [1, 2]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_snapshots_go_on_after_a_push_that_was_interrupted_between_two_servers(mode, small_pieces):
    """The second server never hears of the push of a worker that lives on."""
    with Cluster(2, mode=mode) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(600, F32))
        start = ServerConnection.start

        def interrupted(connection, head, layout, **more):
            if head["verb"] == "push" and connection._index == 1:
                until(lambda: cluster.servers[0]._state.shard.entry("pull", "w").version == 1)
                raise KeyboardInterrupt
            start(connection, head, layout, **more)

        with mock.patch.object(ServerConnection, "start", interrupted), pytest.raises(KeyboardInterrupt):
            kv.push("w", np.ones(600, F32))
        with kv.snapshot() as view:
            assert sorted(set(view.pull("w").tolist())) == [0, 1]
        kv.push("w", np.full(600, 2, F32))
        assert set(kv.pull("w").tolist()) == {2}


def test_a_late_copy_of_a_request_that_was_given_up_is_refused():
    with Cluster() as cluster:
        server = cluster.servers[0]
        cluster.store().init("w", np.zeros(1, F32))
        packed = pack([Item("w", "sum", torch.ones(1))])
        push = {"verb": "push", "owner": "o0", "client": "o0.0", "rank": None}

        def pushed(seq):
            return server.serve({**push, "seq": seq}, packed.layout, b"".join(map(bytes, packed.payload))).head

        # Nobody gives up what others have sent.
        asked(server, "heartbeat", 1, rank=None, given_up=[["o0.0", 3]])
        assert pushed(3) == {}
        asked(server, "heartbeat", 0, rank=None, given_up=[["o0.0", 4]])
        assert pushed(4)["error"] == ["PushOutcomeUnknownError", "its client has given this request up"]
        assert pushed(5) == {}
        # It was applied, and is answered as before.
        asked(server, "heartbeat", 0, rank=None, given_up=[["o0.0", 5]])
        assert pushed(5) == {}
        assert server._state.shard.entry("pull", "w").version == 2


def test_a_snapshot_shows_keys_that_were_deleted_or_re_created_since(small_pieces):
    with Cluster(2, keep=2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(["w", "v", "t"], [np.arange(600, dtype=F32), np.ones(3), Rows(np.array([2]), np.ones((1, 2)), 9)])
        with kv.snapshot() as view:
            other.push(["w", "t"], [np.zeros(600, F32), Rows(np.array([2, 3]), np.zeros((2, 2)), 9)])
            other.delete(["w", "v"])
            other.init("v", np.zeros((2, 2), np.int32))
            kv.keys()
            assert view.pull("w").tolist() == list(range(600))
            assert view.pull("v").tolist() == [1, 1, 1]
            assert view.row_sparse_pull("t", row_ids=[2, 3]).values.tolist() == [[1, 1], [0, 0]]
            with kv.snapshot() as second:
                assert second.pull("v").tolist() == [[0, 0], [0, 0]]
                with pytest.raises(tensorkv.KeyNotFoundError):
                    second.pull("w")
                with pytest.raises(tensorkv.SnapshotError, match="keep"):
                    other.snapshot()
        with kv.snapshot(), kv.snapshot():
            pass


def test_pulls_wait_for_versions():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
        other.push("a", np.ones(3))
        said = r'pull timed out after .* waiting for version 2 of "a", which is at 1'
        with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=said):
            kv.pull("a", min_version=2)
        timer = threading.Timer(0.2, lambda: other.push(["a", "b"], [np.ones(3), np.ones(3)]))
        timer.start()
        assert kv.pull(["a", "b"], min_version=1)[1].tolist() == [1, 1, 1]
        timer.join()


def test_a_pull_of_a_version_times_out_though_no_server_answers():
    def fate(head):
        return "lose request" if head["verb"] == "wait_for_version" else NONE

    with Cluster(2, fate=fate) as cluster:
        kv = cluster.store()
        kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
        out = np.full(3, 7.0)
        for key, outs, said in [("a", out, r'pull\("a"\)'), (["a", "b"], [out, out + 1], r'pull\("a", \.\.\.\)')]:
            said += ": version 1 has not come within 60 s, in which a server has not answered"
            with overdue(), pytest.raises(tensorkv.WaitTimeoutError, match=said):
                kv.pull(key, out=outs, min_version=1)
        assert out.tolist() == [7, 7, 7]


# ---------------------------------------------------------------- keys that other clients make and delete


@pytest.mark.parametrize("near", [True, "network", False])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_re_created_key_is_never_read_with_its_old_shape(near, num_servers, small_pieces):
    """Of the same bytes, of fewer, of more, of none; small values, and those that come in shared copies.

    None of them can be pulled into the out, in case that a heartbeat has told a client of it.
    """
    news = [
        lambda n: np.ones((n, 2), F32),
        lambda n: np.ones(2 * n, np.int32),
        lambda n: np.ones(2 * n, np.int64),
        lambda n: np.ones(3, F32),
        lambda n: Rows(np.array([1]), np.ones((1, 2), F32), 2 * n),
    ]
    for n in (8, 50_000):
        with Cluster(num_servers, near=near) as cluster:
            kv, third, other = cluster.stores(3)
            for new in news:
                other.init("w", np.full(2 * n, 7, F32))
                out = np.zeros(2 * n, F32)
                # They know it as it is now.
                assert kv.keys() == third.keys() == ["w"]
                kv.pull("w", out=out)
                third.pushpull("w", np.full(2 * n, 7, F32), out=out)
                other.delete("w")
                other.init("w", new(n))
                out[:] = -1
                with pytest.raises((tensorkv.ValueMismatchError, tensorkv.KeyNotFoundError)):
                    kv.pull("w", out=out)
                with pytest.raises((tensorkv.ValueMismatchError, tensorkv.KeyNotFoundError)):
                    third.pushpull("w", np.zeros(2 * n, F32), out=out)
                assert set(out.tolist()) == {-1}
                if isinstance(new(n), np.ndarray):
                    # They have learnt of it.
                    assert kv.pull("w").tolist() == third.pull("w").tolist() == new(n).tolist()
                other.delete("w")


def test_clients_learn_in_time_of_re_created_keys():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init("w", np.zeros(3))
        other.delete("w")
        other.init("w", np.ones((2, 2)))
        until(lambda: kv._engine.spec("pull", "w").shape == (2, 2))
        out = np.zeros((2, 2))
        kv.pull("w", out=out)
        assert out.tolist() == [[1, 1], [1, 1]]


def test_two_clients_that_make_the_same_key(small_pieces):
    for _ in range(25):
        with Cluster(3) as cluster:
            stores = cluster.stores(3)
            start = threading.Barrier(4)
            won = []

            def make(kv, number, start=start, won=won):
                start.wait()
                try:
                    kv.init(["small", "w"], [np.full(3, number), np.full(900, number)])
                    won.append(number)
                except tensorkv.KeyExistsError:
                    assert kv.pull("w")[0] != number

            together(*[partial(make, kv, number) for number, kv in enumerate([*stores, stores[0]])])
            assert len(won) == 1
            for kv in stores:
                assert {*kv.pull("w").tolist(), *kv.pull("small").tolist()} == set(won)


def test_an_init_that_did_not_reach_every_server_can_be_repeated(small_pieces):
    with Cluster(2) as cluster:
        kv, hasty = cluster.stores(2)
        kv.keys()
        cluster.actors[1].fate = lambda head: "lose request" if head["verb"] == "init" else NONE
        with overdue(), pytest.raises(tensorkv.PushOutcomeUnknownError):
            hasty.init("w", np.full(600, 1, F32))
        cluster.actors[1].fate = lambda head: NONE
        assert "w" not in kv
        with pytest.raises(tensorkv.KeyNotFoundError):
            kv.pull("w")
        kv.init("w", np.full(600, 2, F32))
        assert set(kv.pull("w").tolist()) == {2}


# ---------------------------------------------------------------- malformed requests


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint64, torch.float32])
@pytest.mark.parametrize("key", ["t", "d"])
def test_ids_of_another_dtype_than_int64_are_refused(key, dtype, tmp_path):
    """Compiled code reads ids as int64, and so does a replay of the log."""
    ids = torch.arange(2).to(dtype)
    pushed = pack([Item(key, "ids", ids), Item(key, "rows", torch.ones(2, 2))])
    head = {"owner": None, "client": "x", "seq": 1}
    with Cluster(path=str(tmp_path), durability="process") as cluster:
        kv, server = cluster.store(), cluster.servers[0]
        kv.init({"t": Rows(np.array([0]), np.ones((1, 2), F32), 9), "d": np.zeros((9, 2), F32)})
        for verb, packed in [("push", pushed), ("pull_rows", pack([Item(key, "ids", ids)]))]:
            reply = server.serve({"verb": verb, **head}, packed.layout, b"".join(packed.payload))
            name, text = reply.head["error"]
            assert name == "ValueMismatchError"
            assert f'"{key}"' in text
            assert str(dtype).removeprefix("torch.") in text
        assert kv.info(key).version == 0
    with Cluster(path=str(tmp_path), durability="process") as cluster:
        assert cluster.store().info(key).version == 0


@pytest.mark.parametrize("verb", ["push", "pull_rows"])
def test_ids_that_are_not_a_list_are_refused(verb):
    with Cluster() as cluster:
        cluster.store().init("t", Rows(np.array([0]), np.ones((1, 2), F32), 9))
        ids = [Item("t", "ids", torch.zeros(1, 2, dtype=torch.int64))]
        packed = pack([*ids, Item("t", "rows", torch.ones(1, 2))] if verb == "push" else ids)
        head = {"verb": verb, "owner": None, "client": "x", "seq": 1}
        name, _ = cluster.servers[0].serve(head, packed.layout, b"".join(packed.payload)).head["error"]
        assert name == "ValueMismatchError"


OF_W = {"shape": [2], "dtype": "float32", "library": "numpy", "device": None, "table": False, "pieces": [[0, 0, 2]]}


def pushed(*keys, **fields):
    return {"verb": "push", **fields}, pack([Item(key, "sum", torch.ones(2)) for key in keys])


def new_keys(*keys, **fields):
    head = {"verb": "init", "kinds": [{**OF_W, **fields}], "keys": list(keys)}
    return {**head, "indices": [0] * len(keys), "orders": list(range(len(keys)))}, pushed(*keys)[1]


def loaded(metadata):
    entry = Entry(1, KeySpec(torch.Size([2]), torch.float32, NUMPY, False), torch.full((2,), 5.0))
    body, tensors = manifest.describe("store", [entry], Assign())
    items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
    return {"verb": "restore", "body": json.loads(json.dumps(body)), "metadata": metadata}, pack(items)


SGD = {"name": "sgd", "numbers": {"lr": 1.0}, "rescale_grad": 1.0, "clip_gradient": None}
NO_PAYLOAD = pack([])
UNFIT = {
    "round without numbers": pushed(1, round=["x"]),
    "round of a number that is text": pushed(1, round=["x", "y", 0]),
    "round whose name is a list": pushed(1, round=[["x"], 1, 0]),
    "round in mode async": pushed(1, round=["x", 1, 0]),
    "keys of two types": new_keys("a", 3),
    "empty key": new_keys(""),
    "no pieces": new_keys(2, pieces=[]),
    "pieces elsewhere": new_keys(2, pieces=[[1, 0, 2]]),
    "two pieces here": new_keys(2, pieces=[[0, 0, 1], [0, 1, 2]]),
    "piece whose rows are text": new_keys(2, pieces=[[0, "0", 2]]),
    "hyperparameters of a bool": ({"verb": "set_hyperparameters", "numbers": {"lr": 2.0}, "keys": [True]}, NO_PAYLOAD),
    "hyperparameters of a float": ({"verb": "set_hyperparameters", "numbers": {"lr": 2.0}, "keys": [1.0]}, NO_PAYLOAD),
    "rule for a bool": (
        {"verb": "set_rule", "number": 1, "optimizer": {**SGD, "overrides": [[True, {"lr": 2.0}]]}},
        NO_PAYLOAD,
    ),
    "deleted bool": ({"verb": "delete", "keys": [True]}, NO_PAYLOAD),
    "published bool": ({"verb": "publish", "release": "r", "keys": [True]}, NO_PAYLOAD),
    "load without metadata": loaded({}),
    "load with metadata of another key": loaded({"2": {**OF_W, "order": 0}}),
    "load with malformed metadata": loaded({"1": {"order": 0}}),
    "load with a malformed order": loaded({"1": {**OF_W, "order": "first"}}),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_messages_that_a_log_could_not_be_read_with_are_refused(unfit, tmp_path):
    head, packed = UNFIT[unfit]
    is_empty = head["verb"] == "init" and 2 not in head["keys"]
    options = {"path": str(tmp_path), "durability": "process"}
    with Cluster(**options) as cluster:
        kv, server = cluster.store(), cluster.servers[0]
        if not is_empty:
            kv.init(1, np.ones(2, F32))
            kv.set_optimizer("sgd", lr=1.0)
        sender = {"owner": kv._engine._owner, "client": f"{kv._engine._owner}.x", "seq": 1}
        reply = server.serve(json.loads(json.dumps({**head, **sender})), packed.layout, b"".join(packed.payload))
        assert "error" in reply.head
        log = server._state.shard.log
        # Nothing of it is found in a snapshot, either.
        assert log.snapshot(server._state.shard)
        check_unchanged(cluster.store(), [] if is_empty else [1])
    with Cluster(**options) as cluster:
        check_unchanged(cluster.store(), [] if is_empty else [1])


def check_unchanged(kv, keys):
    assert kv.keys() == keys
    assert kv.stats()["servers"][0]["keys"] == len(keys)
    assert kv.releases() == []
    for key in keys:
        assert kv.pull(key).tolist() == [1, 1]
        assert (kv.info(key).version, kv.optimizer["lr"]) == (0, 1.0)


LAYOUTS = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'["w"]',
    b'[["w"]]',
    b'[["w","sum","float32",[600]]]',
    b'[["w","sum","float32",[-600]]]',
    b'[["w","sum","float32",[1e400]]]',
    b'[["w","sum","float32",[4,150]]]',
    b'[["w","sum","int64",[300]]]',
    b'[["w","sum","object",[600]]]',
    b'[["w","sum","float32",[99999999999999999999]]]',
    b'[["w","sum","float32",[600]],["w","sum","float32",[600]]]',
    b'[["w","ids","int64",[2]],["w","rows","float32",[2]]]',
    b'[["w","rows","float32",[2]]]',
    b'[["w","ids","int64",[2]]]',
    b'[["t","ids","int64",[2]],["t","rows","float32",[2,2]]]',
    b'[["t","ids","float64",[2]],["t","rows","float32",[2,2]]]',
    b'[["t","sum","float32",[9,2]]]',
    b'[["nothing","sum","float32",[600]]]',
    b'[[null,"sum","float32",[600]]]',
    b'[[["w"],"sum","float32",[600]]]',
    b'[[3,"sum","float32",[600]]]',
]


def nonsense(chance, types=()):
    """A value that may stand anywhere in a head, of one of some types, or of any."""
    values = [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1.5,
        float("inf"),
        float("nan"),
        "",
        "w",
        "x" * 5000,
        [],
        ["w"],
        [[1]],
        {},
        {"w": [1, [0]]},
        {"a": None},
        [None] * 3,
        {"kind": "store", "keys": [], "update": "assign"},
    ]
    return chance.choice([each for each in values if type(each) in types] or values)


SENDER_FIELDS = ["owner", "client", "seq", "rank", "servers", "poll_timeout_s", "no such field"]


def contents(server):
    """Return everything that a server holds, and which client may create and delete keys."""
    reply = server._state.contents(True, visible_only=False)
    return reply.head, reply.payload.numpy().tobytes(), server._tables.claimant


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_nonsense_is_an_error_and_changes_nothing_else(mode, tmp_path):
    chance = random.Random(3)
    refused = 0
    with Cluster(2, mode=mode, path=str(tmp_path), durability="process") as cluster:
        kv = cluster.store()
        kv.init(["w", "t"], [np.arange(600, dtype=F32), Rows(np.array([2]), np.ones((1, 2), F32), 9)])
        # A heartbeat drops releases that nobody finishes.
        cluster.silence(kv, 0)
        server = cluster.servers[kv._engine._keymap.find("pull", "w").servers[0]]
        reading = {
            "pull",
            "pull_rows",
            "end_read",
            "push",
            "take_owed",
            "list",
            "info",
            "stats",
            "heartbeat",
            "wait_for_version",
            "connect",
            "commit",
            "digests",
            "find_changes",
        }
        before = contents(server)
        for number in range(3000):
            verb = chance.choice([*sorted(messages.VERBS), "nothing", None])
            head = {"verb": verb, "owner": "x", "client": f"x.{number}", "seq": 1, "poll_timeout_s": 0}
            own = [each.name for each in fields(messages.VERBS[verb])] if verb in messages.VERBS else []
            for name in own:
                # What has the wrong type is refused at once.
                types = messages._TYPES[messages.VERBS[verb]][name] if chance.random() < 0.9 else ()
                head[name] = nonsense(chance, types)
            for name in chance.sample(SENDER_FIELDS, chance.choice([0, 0, 0, 1, 2])):
                head[name] = nonsense(chance)
            if verb in (
                "restore",
                "prepare",
                "leave",
                "disconnect",
                "claim",
                "broadcast",
                "barrier",
            ):
                # Such as would be obeyed are no nonsense.
                head["seq"] = nonsense(chance) if chance.random() < 0.5 else None
                head["rank"] = chance.choice(["x", -1, 7, [0]])
            if verb == "delete":
                head["keys"] = ["w", *chance.choice([[None], ["nothing"], [3], ["t", [1]]])]
            elif verb == "publish":
                head["release"] = f"r{number}"
            payload = chance.choice([b"", b"x", bytes(2400), bytes(16), b"\xff" * 40, b"\xff" * 32])
            reply = server.serve(head, chance.choice(LAYOUTS), payload)
            refused += "error" in reply.head
            if "error" in reply.head:
                assert reply.head["error"][0] in dir(tensorkv.errors), reply.head
                assert contents(server) == before, head
            else:
                assert verb in reading or "wait_for" in reply.head or reply.payload is None
                # Some are no nonsense, such as a push of zeros.
                before = contents(server)
        assert refused > 1500
        server._condition.set_poll_timeout(None)
        if mode == "async":
            kv.push("w", np.full(600, 5, F32))
            assert set(kv.pull("w").tolist()) == {5}
        assert kv.row_sparse_pull("t", row_ids=[2, 3]).values.tolist() == [[1, 1], [0, 0]]
        assert (sorted(kv.keys()), kv.optimizer) == (["t", "w"], None)


@pytest.fixture
def on_alarm():
    """Sets the handler of an alarm that comes soon."""
    before = signal.getsignal(signal.SIGALRM)

    def set_alarm(handler):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("near", [True, "network", False])
def test_a_handler_pushes_while_a_push_waits_for_its_server(near, on_alarm):
    with Cluster(near=near) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(3, F32))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        [actor] = cluster.actors
        seen = []

        def handle(*_):
            actor.paused.set()
            seen.append(kv.pushpull("w", np.ones(3, F32)).tolist())

        actor.paused.clear()
        on_alarm(handle)
        kv.push("w", np.full(3, 2, F32))
        assert seen in ([[1.0] * 3], [[3.0] * 3])
        assert kv.pull("w").tolist() == [3.0] * 3
        assert kv.info("w").version == 2


@pytest.mark.parametrize("near", [True, "network", False])
def test_a_handler_ends_a_push_that_waits_for_its_server(near, on_alarm):
    """Its TimeoutError is not one of the connection, after which the push would be sent again."""
    with Cluster(near=near) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(3, F32))
        [actor] = cluster.actors

        def handle(*_):
            raise TimeoutError("of the handler")

        actor.paused.clear()
        on_alarm(handle)
        with pytest.raises(TimeoutError, match="of the handler"):
            kv.push("w", np.ones(3, F32))
        actor.paused.set()
        assert kv.stats()["resent"] == 0
        kv.push("w", np.full(3, 2, F32))
        until(lambda: kv.info("w").version == 2)
        assert set(kv.pull("w").tolist()) <= {1.0, 2.0}


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_pull_that_waits_for_another_server_has_written_no_out_when_it_is_interrupted(
    has_memory, on_alarm, monkeypatch
):
    """Though the first server's values are read where they are, at once."""

    def handle(*_):
        raise TimeoutError("of the handler")

    with Cluster(2) as cluster:
        near, far = cluster.actors
        far.move("network")
        kv = cluster.store()
        value = np.arange(1 << 20, dtype=F32)
        kv.init("w", value)
        if not has_memory:
            monkeypatch.setattr(near.server._state.reads, "begin", lambda *_: None)
        out = np.zeros(1 << 20, F32)
        far.paused.clear()
        on_alarm(handle)
        with pytest.raises(TimeoutError, match="of the handler"):
            kv.pull("w", out=out)
        far.paused.set()
        assert not out.any()
        kv.pull("w", out=out)
        assert np.array_equal(out, value)


def test_values_that_were_not_held_while_they_were_read_are_pulled_again(monkeypatch):
    with Cluster(2) as cluster:
        kv = cluster.store()
        value = np.arange(1 << 20, dtype=F32)
        kv.init("w", value)
        pulls = []
        for actor in cluster.actors:
            monkeypatch.setattr(actor, "fate", lambda head: pulls.append(head["verb"]) or NONE)
        monkeypatch.setattr(cluster.servers[1]._state.reads, "end", lambda *_: False)
        out = np.zeros(1 << 20, F32)
        kv.pull("w", out=out)
        assert np.array_equal(out, value)
        assert [verb for verb in pulls if verb in ("pull", "end_read")].count("pull") == 3
        # The server is asked again if it has not answered to the end, too.
        monkeypatch.setattr(cluster.servers[1]._state.reads, "end", mock.Mock(side_effect=OSError("failed")))
        out[:] = 0
        kv.pull("w", out=out)
        assert np.array_equal(out, value)


def test_interrupted_pulls_keep_no_memory():
    def mapped():
        with open("/proc/self/maps") as lines:
            return sum("memfd:tensorkv" in line for line in lines)

    def interrupt(self):
        finish(self)
        raise KeyboardInterrupt

    finish = ServerConnection.finish
    with Cluster() as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        kv.pull("w")
        before = mapped()
        for _ in range(10):
            with mock.patch.object(ServerConnection, "finish", interrupt), pytest.raises(KeyboardInterrupt):
                kv.pull("w")
        # The last error may still refer to what was being read. Servers notice by themselves that a client has gone.
        until(lambda: mapped() <= before + 1)


def test_a_push_that_is_resent_without_memory_for_it_travels_with_its_message(monkeypatch):
    pushes = []

    def fate(head):
        if head["verb"] != "push" or pushes.append(head) or len(pushes) > 1:
            return NONE
        monkeypatch.setattr(channel, "Segment", mock.Mock(side_effect=OSError("no memory")))
        return "lose reply"

    with Cluster(fate=fate) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        kv.push("w", np.arange(100_000, dtype=F32))
        assert kv.info("w").version == 1
        assert kv.pull("w").tolist() == list(range(100_000))
        assert ["buffers" in head for head in pushes] == [True, False]


@pytest.mark.parametrize(
    "buffers",
    [
        [],
        [1, 2, 3],
        [1, 2, 3, 4],
        ["/etc/passwd#00", 10, 0, 1],
        ["/nowhere#00", 64, 0, 1],
        ["/dev/null#", 0, 0, 0],
        {"a": 1},
        "text",
        ["/proc/self/fd/0#", -1, -1, 1 << 60],
    ],
)
def test_invalid_buffers_are_refused(buffers):
    from tensorkv.engines.ps.messages import join

    with Cluster() as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(3))
        head = {"verb": "pull", "owner": "x", "client": "x.1", "seq": 1, "buffers": buffers}
        assert cluster.actors[0].actor.serve_connection(join(head, b'["w"]'), channel.OpenSharedBuffers()) == b""
        assert kv.pull("w").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ({"dtype": "float64"}, {}),
        ({"dtype": "float99"}, {}),
        ({"shape": [3, 1]}, {}),
        ({"shape": "3"}, {}),
        ({"table": True}, {}),
        ({"pieces": [[0, 0]]}, {}),
        ({"pieces": [[0, 0, "3"]]}, {}),
        ({"library": "abacus"}, {}),
        ({}, {"keys": []}),
        ({}, {"keys": ["m"]}),
        ({}, {"keys": ["n", "n"]}),
        ({}, {"keys": 3}),
        ({}, {"indices": []}),
        ({}, {"indices": [7]}),
        ({}, {"indices": ["x"]}),
        ({}, {"indices": [-1]}),
        ({}, {"indices": [False]}),
        ({}, {"indices": [0.0]}),
        ({}, {"orders": []}),
        ({}, {"orders": ["first"]}),
        ({}, {"orders": [0, 1]}),
    ],
)
def test_a_malformed_init_changes_nothing(kind, columns):
    good = {"dtype": "float32", "shape": [3], "table": False, "pieces": [[0, 0, 3]], "library": "numpy", "device": None}
    with Cluster() as cluster:
        kv, (server,) = cluster.store(), cluster.servers
        packed = pack([Item("n", "sum", torch.ones(3))])
        head = {"verb": "init", "owner": "x", "client": "x.1", "keys": ["n"], "indices": [0], "orders": [0]}
        bad = {**head, "kinds": [{**good, **kind}], **columns, "seq": 1}
        assert "error" in server.serve(bad, packed.layout, b"".join(packed.payload)).head
        assert kv.keys() == []
        assert not server._state.shard.notes
        # What is wrong is what was changed.
        fine = {**head, "kinds": [good], "seq": 2}
        assert set(server.serve(fine, packed.layout, b"".join(packed.payload)).head) == {"before", "changes"}
        assert kv.pull("n").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "regions",
    [
        [[[0, 4], [0, 2]]],
        [[[2, 1], [0, 2]]],
        [[[-1, 2], [0, 2]]],
        [[[0, 2]]],
        [[[0, 2], [0, 2], [0, 1]]],
        [[]],
        [],
        [[[0, 2], [0, 2]]] * 2,
        [[[0, "2"], [0, 2]]],
        [[[0, 1.5], [0, 2]]],
        [[0, 2]],
        ["ab"],
        [None],
    ],
    ids=str,
)
def test_a_malformed_region_is_refused(regions):
    with Cluster() as cluster:
        kv, (server,) = cluster.store(), cluster.servers
        kv.init("w", np.ones((3, 2), F32))
        head = {"verb": "pull", "owner": "x", "client": "x.1"}
        told = server.serve({**head, "regions": regions, "seq": 1}, b'["w"]', b"").head["error"]
        assert told[0] == "ArgumentError"
        assert "region" in told[1]
        fine = server.serve({**head, "regions": [[[1, 3], [0, 1]]], "seq": 2}, b'["w"]', b"")
        assert bytes(fine.payload) == np.ones(2, F32).tobytes()
        told = server.serve({**head, "regions": [[[1, 3], [0, 1]]], "checksum": 3, "seq": 3}, b'["w"]', b"").head
        assert told["error"][0] == "ValueMismatchError"


@pytest.mark.parametrize("pull_dtype", [None, "bf16"])
def test_no_more_than_a_region_leaves_a_server(pull_dtype, monkeypatch):
    replies = []
    with Cluster(3, pull_dtype=pull_dtype) as cluster:
        for server in cluster.servers:
            serve = server.serve
            monkeypatch.setattr(
                server, "serve", lambda *a, _serve=serve, **k: replies.append(_serve(*a, **k)) or replies[-1]
            )
        kv = cluster.store()
        value = np.arange(600_000, dtype=F32).reshape(300_000, 2) % 128
        kv.init("w", value)
        assert len(kv._engine._keymap.find("pull", "w").servers) == 3
        for start, stop, asked in ((0, 10, 1), (95_000, 205_000, 3), (299_999, 300_000, 1), (7, 7, 0)):
            replies.clear()
            assert np.array_equal(kv.pull("w", region=(slice(start, stop), slice(1, 2))), value[start:stop, 1:])
            assert len(replies) == asked
            assert sum(map(len, (each.payload for each in replies))) == (stop - start) * (
                4 if pull_dtype is None else 2
            )


def test_keys_are_listed_again_only_when_they_have_changed():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(["a", "b"], [np.zeros(3), np.zeros((2, 2), F32)])
        kv.keys()
        listings = [server._state for server in cluster.servers]
        with mock.patch.object(type(listings[0]), "listing", side_effect=AssertionError("nothing has changed")):
            assert kv.keys() == ["a", "b"]
        other.init("c", np.zeros(3))
        assert kv.keys() == ["a", "b", "c"]
        other.delete("a")
        assert kv.keys() == ["b", "c"]
        other.init("a", np.zeros(5))
        assert kv.keys() == ["b", "c", "a"]
        assert kv.info("a").shape == (5,)
        # A restarted server starts counting at zero.
        for server in cluster.servers:
            server.incarnation = "another"
        assert kv.keys() == ["b", "c", "a"]


def test_a_server_that_cannot_open_the_clients_memory_is_asked_through_ray(monkeypatch):
    with Cluster() as cluster:
        monkeypatch.setattr(channel.OpenSharedBuffers, "find", mock.Mock(side_effect=OSError("another PID namespace")))
        actor = cluster.actors[0].actor
        through_ray = mock.Mock(wraps=actor.serve)
        monkeypatch.setattr(actor, "serve", through_ray)
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        kv.push("w", np.ones(100_000, F32))
        assert set(kv.pull("w").tolist()) == {1}
        assert kv.info("w").version == 1
        verbs = [messages.split(call.args[0])[0]["verb"] for call in through_ray.mock_calls]
        assert {"init", "push", "pull"}.issubset(verbs)


def test_a_restarted_server_is_found_where_it_listens_now():
    fates = []
    with Cluster(fate=lambda head: fates.pop() if fates and head["verb"] == "push" else NONE) as cluster:
        kv, (actor,) = cluster.store(), cluster.actors
        kv.init("w", np.zeros(3, F32))
        kv.push("w", np.ones(3, F32))
        actor.listener.close()
        actor.actor._listener = actor.listener = channel.SocketServer(actor._answer_connection)
        fates.append("lose request")
        kv.push("w", np.full(3, 2, F32))
        assert kv.pull("w").tolist() == [2, 2, 2]
        told = kv.stats()
        assert told["resent"] == 1
        # Of the pushes, none went through Ray.
        assert told["socket_requests"] >= 4


def test_close_while_others_work():
    """Whoever works meanwhile is done, or told that the store is closed."""
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init("w", np.zeros(100_000, F32))
        ended = []

        def work():
            try:
                while True:
                    kv.push("w", np.ones(100_000, F32))
                    assert set(kv.pull("w").tolist()) <= {0, 1}
            except tensorkv.StoreClosedError:
                ended.append(1)

        together(work, work, work, lambda: (time.sleep(0.2), kv.close()))
        assert len(ended) == 3
