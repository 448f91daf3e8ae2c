"""The parts of servers and clients alone: staleness, waits, snapshots, layouts, channels, caches, placements."""

import gc
import itertools
import json
import math
import random
import threading

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.arrays import interop
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.partition import pieces
from tensorkv.engines.ps.messages import keys_of, push_layout
from tensorkv.engines.ps.server import tables as server_tables
from tensorkv.engines.ps.server.reads import Reads
from tensorkv.engines.ps.server.snapshot import SnapshotBarrier
from tensorkv.engines.ps.server.staleness import StalenessClock
from tensorkv.engines.ps.server.sync_round import PendingPush, SyncRounds
from tensorkv.engines.ps.server.tables import ServerTables
from tensorkv.engines.ps.server.wait import Condition, RetryLater
from tensorkv.engines.transport import shared_values
from tensorkv.engines.transport.channel import OpenSharedBuffers, SharedBuffers
from tensorkv.engines.transport.segment import can_share
from tensorkv.engines.transport.shared_values import OpenValues
from tensorkv.shard import optimizers
from tensorkv.shard.entry import Batch
from tensorkv.shard.shard import Shard
from tensorkv.storage.dedup import AppliedRequests

shares = pytest.mark.skipif(not can_share(), reason="needs tables that processes share")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# ---------------------------------------------------------------- rounds and waits


def test_rounds_that_are_restored_are_as_far_as_they_were():
    clock = Clock()
    staleness = StalenessClock(3, 5, clock)
    for rank, count in ((0, 4), (1, 2)):
        staleness.heartbeat(rank)
        for _ in range(count):
            staleness.count_push(rank, ["a", 7])
    staleness.set_base(1, 1)
    staleness.leave(2)
    restored = StalenessClock(3, 5, clock)
    restored.restore(json.loads(json.dumps(staleness.to_plain())))
    assert restored.rounds() == staleness.rounds() == {0: 4, 1: 3, 2: 0}
    assert restored.live() == [0, 1]
    # A round ends with the key that has been pushed most.
    restored.count_push(0, [7])
    assert restored.rounds()[0] == 5
    restored.mark_dead(1)
    assert restored.dead() == [1]
    restored.restore([])
    assert restored.rounds() == {0: 0, 1: 0, 2: 0}


def test_a_worker_without_heartbeats_is_dead_and_rejoins_at_the_slowest_round():
    clock = Clock()
    staleness = StalenessClock(3, 5, clock)
    assert staleness.live() == [0, 1, 2]
    for rank in (0, 1):
        staleness.heartbeat(rank)
    for _ in range(4):
        staleness.count_push(0, ["a", "b"])
    staleness.count_push(1, ["a"])
    assert staleness.rounds() == {0: 4, 1: 1, 2: 0}
    assert staleness.behind(0, 2) == [1, 2]
    assert staleness.most_ahead == 4
    clock.now = 6
    staleness.heartbeat(0)
    # Rounds wait for a worker that never connected, not for one whose heartbeats stopped.
    assert staleness.live() == [0, 2]
    assert staleness.dead() == [1]
    assert staleness.heartbeat(1)
    staleness.set_base(1, staleness.base_for_revival(1))
    staleness.revive(1)
    assert staleness.dead() == []
    staleness.leave(2)
    assert staleness.live() == [0, 1]
    staleness.start(2, staleness.slowest_but(2))
    assert staleness.live() == [0, 1, 2]
    assert staleness.rounds()[2] == 1
    staleness.disconnect(1)
    clock.now = 100
    assert staleness.dead() == [0]


def test_waits_end_with_what_is_waited_for_and_changes_end_them():
    condition, seen = Condition(poll_timeout_s=5), []
    with condition:
        condition.set_poll_timeout(0.01)
        with pytest.raises(RetryLater, match="rank 3"):
            condition.wait_for(lambda: False, lambda: "rank 3")
        condition.set_poll_timeout(None)

    def wait():
        with condition:
            condition.wait_for(lambda: bool(seen), lambda: "nothing")
            seen.append("woken")

    thread = threading.Thread(target=wait)
    thread.start()
    with condition:
        seen.append("changed")
        condition.notify_all()
    thread.join()
    assert seen == ["changed", "woken"]
    assert condition.count >= 1


def test_a_round_stays_when_its_keys_are_deleted():
    staleness = StalenessClock(1, 5, Clock())
    for _ in range(3):
        staleness.count_push(0, ["a", 7])
    staleness.count_push(0, ["b"])
    staleness.forget_keys(["a", 7, "unknown"])
    restored = StalenessClock(1, 5, Clock())
    restored.restore(json.loads(json.dumps(staleness.to_plain())))
    for clock in (staleness, restored):
        assert json.loads(json.dumps(clock.to_plain())) == [[0, 0, False, [["b", 1]], 3]]
        assert clock.rounds() == {0: 3}
        # One that is behind the others does not end a round before it has as many pushes.
        for count in (3, 3, 4):
            clock.count_push(0, ["b"])
            assert clock.rounds() == {0: count}


# ---------------------------------------------------------------- what is remembered


def random_event(chance):
    owner, rank, number = chance.choice("abcd"), chance.randrange(3), chance.randrange(1, 5)
    start, base = [number, 0, 1], chance.choice([None, number])
    return chance.choice(
        [
            ["member", owner],
            ["rank", rank, owner, start, base],
            ["rank", 7, owner, start, None],
            ["base", rank, number],
            ["gone", owner],
            ["bye", owner],
            ["leave", rank],
            ["all_left", number],
            ["met", number],
            ["text", number * 40, f"text {number}"],
            ["rules", number, chance.choice(["sgd", None])],
            ["claim", owner, number],
            ["unclaim", owner, number],
            *[[["ending"], ["new"]][chance.random() < 0.5]] * (chance.random() < 0.2),
        ]
    )


def random_request(chance, number):
    words = chance.choice([{}, {"fan": [0, 2]}, {"rank": chance.randrange(3)}, {"rank": 1, "step": ["l", number]}])
    return [chance.choice("abcd") + ".0", number, words], chance.sample(["w", 3, "b"], 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_log_and_a_snapshot_lead_to_the_same_tables(seed):
    """Whatever happens, in whatever state: a server that is restarted remembers what it did."""
    chance, log = random.Random(seed), []
    tables = ServerTables(StalenessClock(3, 5, Clock()))
    for number in range(1, 60):
        if chance.random() < 0.5:
            log.append(("apply", json.dumps([random_event(chance) for _ in range(chance.randint(1, 3))])))
        else:
            log.append(("replay", json.dumps(random_request(chance, number))))
        if chance.random() < 0.2:
            # It begins again from a snapshot.
            before, tables = tables, ServerTables(StalenessClock(3, 5, Clock()))
            tables.restore(before.last, json.loads(json.dumps(before.describe())))
            assert tables.describe() == before.describe()
        happen(tables, *log[-1])
    replayed = ServerTables(StalenessClock(3, 5, Clock()))
    for entry in log:
        happen(replayed, *entry)
    assert (replayed.last, replayed.describe()) == (tables.last, tables.describe())
    assert replayed.staleness.rounds() == tables.staleness.rounds()


def happen(tables, how, text):
    plain = json.loads(text)
    if how == "apply":
        tables.apply(plain)
    else:
        tables.replay([plain[0]], plain[1])


@pytest.mark.parametrize("ends", ["bye", "gone", "new"])
def test_clients_that_ended_long_ago_are_forgotten(ends, monkeypatch):
    monkeypatch.setattr(server_tables, "_KEPT_CLIENTS", 3)
    tables = ServerTables(StalenessClock(1, 5))
    tables.apply([["member", "stays"]])
    tables.replay([["stays.0", 1, {"fan": [0, 1]}]], ["w"])
    for number in range(50):
        owner = f"o{number}"
        tables.apply([["member", owner]])
        for session in range(2):
            tables.replay([[f"{owner}.{session}", 1, {"fan": [0, 1]}]], ["w"])
            tables.refused[f"{owner}.{session}"] = (1, tensorkv.StorageError("full"))
        tables.apply([[ends] if ends == "new" else [ends, owner]])
        # The last ones may still send a request again.
        assert all(tables.has_applied(f"o{last}.1", 1) for last in range(max(0, number - 2), number + 1))
        if ends != "new":
            assert tables.has_applied("stays.0", 1)
    for table in (tables.last, tables.fans, tables.refused, tables.idle, tables.disconnected):
        assert len(table) <= 14


def test_a_client_that_was_idle_and_is_back_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(server_tables, "_KEPT_CLIENTS", 3)
    tables = ServerTables(StalenessClock(1, 5))
    tables.replay([["a.0", 1]], ["w"])
    tables.apply([["member", "a"], ["gone", "a"], ["member", "a"]])
    tables.apply([["gone", f"o{number}"] for number in range(50)])
    assert tables.has_applied("a.0", 1)


def test_an_event_of_a_newer_version_is_refused():
    with pytest.raises(tensorkv.StorageError, match="unknown event 'moon'"):
        ServerTables(StalenessClock(1, 5)).apply([["moon", 1]])


# ---------------------------------------------------------------- snapshots and rounds


def test_a_snapshot_barrier_holds_new_requests_and_admits_those_under_way():
    condition, clients = Condition(poll_timeout_s=0.01), AppliedRequests()
    barrier = SnapshotBarrier(condition, clients, 1)
    clients.add([("a.0", 7, {"fan": [0, 1]}), ("b.0", 2, {"fan": [0, 1]}), ("c.0", 2), ("a.0", 3, {"fan": [1, 2]})])
    with condition:
        # One that comes late says nothing of the newer one; a dead process's request is on its way nowhere.
        assert barrier.prepare("x.0", 1, ["a"]) == {"a.0": [7, [0, 1]]}
        with pytest.raises(RetryLater, match="snapshot"):
            barrier.admit("d.0", 1)
        with pytest.raises(RetryLater, match="another snapshot"):
            barrier.prepare("y.0", 1, [])
        with pytest.raises(RetryLater, match="on their way"):
            barrier.commit("x.0", 2, {"d.0": [1, [0, 1]]}, lambda: "too early")
        barrier.admit("d.0", 1)
        with pytest.raises(RetryLater):
            barrier.admit("d.0", 2)
        clients.last["d.0"] = 1
        assert barrier.commit("x.0", 2, {"d.0": [1, [0, 1]], "e.0": [5, [0]]}, lambda: "seen") == "seen"
        barrier.admit("d.0", 2)
        with pytest.raises(tensorkv.SnapshotError, match="late"):
            barrier.prepare("x.0", 1, [])
        with pytest.raises(tensorkv.SnapshotError, match="too long"):
            barrier.commit("x.0", 3, {}, lambda: "never")
        # Others have taken snapshots meanwhile.
        for number in range(2000):
            barrier.prepare(f"y.{number}", 1, [])
            barrier.abort(f"y.{number}", 2)
            barrier.prepare("z.0", number + 1, [])
            barrier.abort("z.0", number + 1)
        for owner in ("y.1999", "y.1100", "z.0"):
            with pytest.raises(tensorkv.SnapshotError, match="late"):
                barrier.prepare(owner, 1, [])
        assert len(barrier._ended) < 2000
        assert barrier.prepare("x.0", 4, []) == {}
        barrier._until = 0
        barrier.admit("d.0", 3)


def test_a_round_is_gathered_in_the_order_of_ranks():
    applied = []
    sync_rounds = SyncRounds(
        lambda keys, parts, pushed: applied.append((keys, parts, [(e.client, e.seq) for e in pushed])), {}, {}
    )

    def add(number, rank, pushed, first=None):
        sync_rounds.add("w", ("w",), number, first or number, rank, pushed)

    add(1, 1, PendingPush("b", 1, ["from 1"]))
    sync_rounds.close([0, 1], lambda client, seq: True)
    assert sync_rounds.missing("w", 1, [0, 1]) == [0]
    add(1, 0, PendingPush("a", 1, ["too early"]))
    add(1, 0, PendingPush("a", 1, ["from 0"]))
    sync_rounds.close([0, 1], lambda client, seq: client != "a")
    assert not applied
    sync_rounds.close([0, 1], lambda client, seq: True)
    assert applied == [(("w",), [["from 0", "from 1"]], [("a", 1), ("b", 1)])]


def test_a_late_copy_of_a_push_that_was_replaced_is_left_out():
    applied = []
    sync_rounds = SyncRounds(lambda keys, parts, pushed: applied.append(parts[0]), {}, {})

    def add(name, part, seq, number=1):
        sync_rounds.add(name, (name,), number, 1, 0, PendingPush("a", seq, [part]))

    add("w", "timed out", 1)
    add("w", "pushed instead", 2)
    add("w", "timed out", 1)
    # Of another list of keys, too: the client has gone on.
    add("v", "timed out", 1)
    # It is sent again, to the next round, and leaves the one before it to what it had replaced.
    add("w", "pushed instead", 2, number=2)
    sync_rounds.close([0], lambda client, seq: True)
    assert applied == [["timed out"], ["pushed instead"]]


def test_pushes_that_were_replaced_are_not_all_kept():
    sync_rounds = SyncRounds(lambda *_: None, {}, {})
    pushes = [PendingPush("a", seq, [torch.zeros(3)]) for seq in range(1, 9)]
    for push in pushes:
        sync_rounds.add("w", ("w",), 1, 1, 0, push)
    assert [push.replaced for push in pushes] == [None] * 7 + [pushes[6]]


def test_a_push_is_in_the_round_of_its_number_and_in_no_other():
    applied, closed = [], {}
    sync_rounds = SyncRounds(lambda keys, parts, pushed: applied.append(parts[0]), closed, {})

    def add(number, rank, part, first=None, seq=None):
        sync_rounds.add("w", ("w",), number, first or number, rank, PendingPush(f"c{rank}", seq or number, [part]))
        sync_rounds.close([0, 1], lambda client, seq: True)

    add(1, 0, "a1")
    # Rank 1 has been lost: this server has closed round 1 without it.
    sync_rounds.close([0], lambda client, seq: True)
    assert (applied, closed, sync_rounds.next("w")) == ([["a1"]], {"w": 1}, 2)
    add(2, 0, "a2")
    assert sync_rounds.missing("w", 2, [0, 1]) == [1]
    # It comes back, and goes on two rounds later: nobody waits for it in between.
    add(4, 1, "b4")
    assert applied[1:] == [["a2"]]
    add(3, 0, "a3")
    add(4, 0, "a4")
    assert applied[2:] == [["a3"], ["a4", "b4"]]
    # A thread of rank 0 is in round 5 yet, and another one has come to round 6.
    add(6, 0, "a6", first=5)
    add(5, 1, "b5")
    assert sync_rounds.missing("w", 5, [0, 1]) == [0]
    add(5, 0, "a5", seq=7)
    add(6, 1, "b6")
    assert applied[4:] == [["a5", "b5"], ["a6", "b6"]]
    # One that timed out is in its round again when the one that took its place goes elsewhere.
    add(7, 0, "late", seq=70)
    add(7, 0, "again", seq=71)
    add(8, 0, "again", seq=71, first=7)
    add(7, 1, "b7")
    add(8, 1, "b8")
    assert applied[6:] == [["late", "b7"], ["again", "b8"]]
    assert closed == {"w": 8}


# ---------------------------------------------------------------- calls


def test_layouts_of_pushes():
    call = push_layout(b'[["w","sum","float32",[2]],["t","ids","int64",[1]],["t","rows","float32",[1,2]]]')
    assert call.keys == ("w", "t")
    assert not call.has_sums
    assert push_layout(b'[["w","sum","float32",[2]],["n","sum","int64",[1]]]').has_sums
    assert keys_of(b'["w","b"]') == ("w", "b")
    assert keys_of(b"[3,-1]") == (3, -1)
    for bad in (b"", b"3", b'["w",3]', b"[true]", b'[""]', b"[null]", b"[" * 5000):
        with pytest.raises((tensorkv.ArgumentError, tensorkv.KeyTypeError)):
            keys_of(bad)


# ---------------------------------------------------------------- tables that is shared


@shares
def test_new_buffers_leave_the_old_ones_to_the_server():
    buffers, server = SharedBuffers(), OpenSharedBuffers()
    old = buffers.allocate(100, 50).fill_(1)
    first = buffers.describe()
    payload, reply = server.find(first)
    buffers.replace(old).fill_(2)
    reply.fill_(9)
    assert set(payload.tolist()) == {1}
    assert not buffers.receive(None, 50, math.inf).any()
    again, _ = server.find(buffers.describe())
    assert set(again.tolist()) == {2}
    # The first message comes late: its memory is gone, or another's.
    with pytest.raises(OSError, match="not the"):
        server.find(first)
    name, nbytes, *_ = buffers.describe()
    for bad in ([name, nbytes, 1 << 40, 1], [name, nbytes, -1, 1], [name, nbytes, 1, 1 << 40], [name, nbytes, 1, -1]):
        with pytest.raises(OSError, match="outside"):
            OpenSharedBuffers().find(bad)
    buffers.close()


# ---------------------------------------------------------------- values that are read where they are


def filled_shard(**values):
    shard = Shard(threads=1)
    tensors = [torch.as_tensor(value) for value in values.values()]
    shard.init(list(values), tensors, [KeySpec(each.shape, each.dtype, interop.NUMPY, False) for each in tensors])
    return shard


def push_to(shard, key, value):
    shard.push(Batch("push", [key], [[torch.as_tensor(value)]]))


def read_by(reader, places, shard, keys):
    values = reader.find(places.segments, places.table)
    return [values.tensor(i, e.spec.shape, e.spec.dtype) for i, e in enumerate(shard.entry("pull", k) for k in keys)]


@shares
@pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])
def test_what_is_read_in_place_stays_until_the_read_ends(optimizer):
    keys = ["a", "empty", "b"]
    shard = filled_shard(a=np.arange(5000, dtype=np.float32), empty=np.ones((0, 3)), b=np.full((7, 9), 2.0))
    if optimizer is not None:
        shard.set_optimizer(optimizers.spec(optimizer, {"lr": 1.0}))
    reads, reader = Reads(shard), OpenValues()
    before = [shard.entry("pull", key).value.clone() for key in keys]
    places = reads.begin(keys, "p.0", "p", 1)
    seen = read_by(reader, places, shard, keys)
    for _ in range(3):
        for key in keys:
            push_to(shard, key, np.ones_like(shard.entry("pull", key).value.numpy()))
        assert all(torch.equal(own, first) for own, first in zip(seen, before, strict=True))
    assert not torch.equal(shard.entry("pull", "a").value, before[0])
    assert reads.end("p.0", 2)
    # Only then is the memory used again, and it is the same that this reader has open.
    new = [shard.entry("pull", key).value.clone() for key in keys]
    seen_new = read_by(reader, reads.begin(keys, "p.0", "p", 3), shard, keys)
    assert all(torch.equal(own, each) for own, each in zip(seen_new, new, strict=True))
    push_to(shard, "b", np.zeros((7, 9)))
    assert not torch.equal(seen[2], before[2])
    assert reads.end("p.0", 4)
    assert not reads.end("p.0", 5)
    shard.close()


@shares
def test_a_late_copy_of_an_older_read_does_not_end_what_a_newer_one_reads():
    """The values that a client was told last stay as they are until it says that it has read them."""
    shard = filled_shard(a=np.zeros(5000, np.float32))
    reads, reader = Reads(shard), OpenValues()

    def begun(seq):
        return read_by(reader, reads.begin(["a"], "p.0", "p", seq), shard, ["a"])[0]

    def push_twice(number):
        for each in (number, number + 1):
            push_to(shard, "a", np.full(5000, each, np.float32))

    seen = begun(1)
    push_twice(1)
    # The same request once more is told the same.
    assert torch.equal(begun(1), torch.zeros(5000))
    push_twice(3)
    assert torch.equal(seen, torch.zeros(5000))
    # The reply to the first end was lost, and the client has gone on.
    assert reads.end("p.0", 2)
    seen = begun(3)
    assert reads.begin(["a"], "p.0", "p", 1) is None
    assert not reads.end("p.0", 2)
    push_twice(5)
    assert torch.equal(seen, torch.full((5000,), 4.0))
    assert reads.end("p.0", 4)
    # Nobody would end this one.
    assert reads.begin(["a"], "p.0", "p", 3) is None
    assert shard.entry("pull", "a").frozen is None
    shard.close()


@shares
def test_a_read_that_was_given_up_is_not_held():
    clock, shard = Clock(), filled_shard(a=np.zeros(100))
    reads = Reads(shard, clock)
    reads.begin(["a"], "p.0", "p", 1)
    reads.begin(["a"], "q.0", "q", 1)
    reads.drop_all_but_of(["q"])
    assert not reads.end("p.0", 2)
    clock.now = 1000.0
    reads.drop_all_but_of(["q"])
    assert not reads.end("q.0", 2)
    assert shard.entry("pull", "a").frozen is None
    shard.close()


@shares
def test_memory_of_values_that_are_gone_is_freed():
    shard = filled_shard(a=np.zeros(100), b=np.ones(100))
    reads = Reads(shard)
    segments = reads._memory._segments
    places = reads.begin(["a", "b"], "p.0", "p", 1)
    reads.end("p.0", 2)
    assert len(segments) == 1
    shard.delete(["a"])
    assert len(segments) == 1
    shard.delete(["b"])
    gc.collect()
    assert len(segments) == 0
    with pytest.raises(OSError, match=r"shared|such file"):
        OpenValues().find(places.segments, places.table)
    shard.close()


@shares
def test_values_outside_of_their_memory_are_not_read():
    shard = filled_shard(a=np.zeros(100))
    places = Reads(shard).begin(["a"], "p.0", "p", 1)
    reader = OpenValues()
    assert len(reader.find(places.segments, places.table).addresses(np.array([800]))) == 1
    for offset in (-8, 64, 1 << 40):
        with pytest.raises(OSError, match="outside"):
            reader.find(places.segments, np.array([[0], [offset]])).addresses(np.array([800]))
    shard.close()


def test_without_memory_values_are_not_read_in_place(monkeypatch, caplog):
    def refuse(nbytes):
        raise OSError("no memory")

    monkeypatch.setattr(shared_values, "Segment", refuse)
    shard = filled_shard(a=np.zeros(100))
    reads = Reads(shard)
    assert reads.begin(["a"], "p.0", "p", 1) is None
    assert "no memory" in caplog.text
    assert shard.entry("pull", "a").frozen is None
    shard.close()


# ---------------------------------------------------------------- places


def resnet50():
    yield "conv1", (64, 3, 7, 7)
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        inputs = 64 if stage == 0 else width * 2
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1", (width, inputs, 1, 1)
            yield f"{name}.conv2", (width, width, 3, 3)
            yield f"{name}.conv3", (width * 4, width, 1, 1)
            if block == 0:
                yield f"{name}.down", (width * 4, inputs, 1, 1)
            for number, size in enumerate([width] * 4 + [width * 4] * 2):
                yield f"{name}.bn{number}", (size,)
            inputs = width * 4
    yield "fc.weight", (1000, 2048)
    yield "fc.bias", (1000,)


def transformer():
    width, layers = 2048, 16
    yield "tokens", (50_304, width)
    for layer in range(layers):
        yield from ((f"{layer}.{name}", (width, width)) for name in "qkvo")
        yield f"{layer}.up", (4 * width, width)
        yield f"{layer}.down", (width, 4 * width)
        yield from ((f"{layer}.norm{number}", (width,)) for number in range(4))


def place(shapes, servers):
    loads, found = [0] * servers, {}
    for key, shape in sorted(shapes, key=lambda item: -math.prod(item[1])):
        found[key] = pieces(shape, loads)
        covered = 0
        for server, start, stop in found[key]:
            assert start == covered
            covered = stop
            loads[server] += (stop - start) * math.prod(shape[1:]) * 4
        assert covered == shape[0]
    return loads, found


@pytest.mark.parametrize("model", [resnet50, transformer])
@pytest.mark.parametrize("servers", range(2, 17))
def test_servers_hold_about_as_much(model, servers):
    shapes = list(model())
    loads, _ = place(shapes, servers)
    assert sum(loads) == sum(4 * math.prod(shape) for _, shape in shapes)
    assert max(loads) <= 1.15 * sum(loads) / servers


def test_every_element_of_a_divided_value_is_sent_once():
    from tensorkv.arrays.interop import NUMPY
    from tensorkv.arrays.spec import KeySpec
    from tensorkv.engines.ps.client.layout import KeyPlacement, Layout
    from tensorkv.shard.pool import Pool

    for servers, rows in itertools.product([1, 2, 5], [5, 4096]):
        shape = torch.Size((rows, 65))
        spec = KeySpec(shape, torch.float32, NUMPY, False)
        pool = Pool(1)
        layout = Layout(["w"], [KeyPlacement(spec, pieces(shape, [0] * servers))], wide=False)
        value, back = torch.arange(shape.numel(), dtype=torch.float32).view(shape), torch.zeros(shape)
        for each in layout.pushed:
            room = torch.empty(each.nbytes, dtype=torch.uint8)
            each.gather(room, [[value, value]], pool)
            each.scatter(room, [[back]], pool)
        assert torch.equal(back, 2 * value)
        assert np.array_equal(back.numpy(), 2 * value.numpy())
