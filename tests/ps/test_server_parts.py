"""The parts of servers and clients alone: rounds, waits, cuts, gatherings, views, calls, mailboxes, copies, places."""

import itertools
import json
import math
import random
import threading

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.engines.partition import pieces
from tensorkv.engines.ps.server.call import keys_of, read
from tensorkv.engines.ps.server.cut import Cut
from tensorkv.engines.ps.server.memory import Memory
from tensorkv.engines.ps.server.rounds import Rounds
from tensorkv.engines.ps.server.sync_round import Gathering, Pushed
from tensorkv.engines.ps.server.wait import Monitor, Waits
from tensorkv.storage.dedup import Clients
from tensorkv.transport.mailbox import Mailbox, OpenMailboxes
from tensorkv.transport.segment import can_share
from tensorkv.transport.shared_cache import Copies, CopyReader

shares = pytest.mark.skipif(not can_share(), reason="needs memory that processes share")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# ---------------------------------------------------------------- rounds and waits


def test_rounds_that_are_restored_are_as_far_as_they_were():
    clock = Clock()
    rounds = Rounds(3, 5, clock)
    for rank, count in ((0, 4), (1, 2)):
        rounds.seen(rank)
        for _ in range(count):
            rounds.pushed(rank, ["a", 7])
    rounds.move(1, 1)
    rounds.leave(2)
    restored = Rounds(3, 5, clock)
    restored.restore(json.loads(json.dumps(rounds.to_plain())))
    assert restored.read() == rounds.read() == {0: 4, 1: 3, 2: 0}
    assert restored.live() == [0, 1]
    # A round ends with the key that has been pushed most.
    restored.pushed(0, [7])
    assert restored.read()[0] == 5
    restored.lose(1)
    assert restored.dead() == [1]
    restored.restore([])
    assert restored.read() == {0: 0, 1: 0, 2: 0}


def test_a_silent_worker_is_lost_and_comes_back_where_the_slowest_is():
    clock = Clock()
    rounds = Rounds(3, 5, clock)
    assert rounds.live() == [0, 1, 2]
    for rank in (0, 1):
        rounds.seen(rank)
    for _ in range(4):
        rounds.pushed(0, ["a", "b"])
    rounds.pushed(1, ["a"])
    assert rounds.read() == {0: 4, 1: 1, 2: 0}
    assert rounds.behind(0, 2) == [1, 2]
    assert rounds.most_ahead == 4
    clock.now = 6
    rounds.seen(0)
    # Who never came is waited for; who came and is silent is not.
    assert rounds.live() == [0, 2]
    assert rounds.dead() == [1]
    assert rounds.seen(1)
    rounds.move(1, rounds.base_of(1))
    rounds.find(1)
    assert rounds.dead() == []
    rounds.leave(2)
    assert rounds.live() == [0, 1]
    rounds.begin(2, rounds.slowest_but(2))
    assert rounds.live() == [0, 1, 2]
    assert rounds.read()[2] == 1
    rounds.end(1)
    clock.now = 100
    assert rounds.dead() == [0]


def test_waits_end_with_what_is_waited_for_and_changes_end_them():
    monitor, seen = Monitor(patience_s=5), []
    with monitor:
        monitor.be_patient(0.01)
        with pytest.raises(Waits, match="rank 3"):
            monitor.wait_until(lambda: False, lambda: "rank 3")
        monitor.be_patient(None)

    def wait():
        with monitor:
            monitor.wait_until(lambda: bool(seen), lambda: "nothing")
            seen.append("woken")

    thread = threading.Thread(target=wait)
    thread.start()
    with monitor:
        seen.append("changed")
        monitor.changed()
    thread.join()
    assert seen == ["changed", "woken"]
    assert monitor.count >= 1


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
    memory = Memory(Rounds(3, 5, Clock()))
    for number in range(1, 60):
        if chance.random() < 0.5:
            log.append(("apply", json.dumps([random_event(chance) for _ in range(chance.randint(1, 3))])))
        else:
            log.append(("replay", json.dumps(random_request(chance, number))))
        if chance.random() < 0.2:
            # It begins again from a snapshot.
            before, memory = memory, Memory(Rounds(3, 5, Clock()))
            memory.restore(before.last, json.loads(json.dumps(before.describe())))
            assert memory.describe() == before.describe()
        happen(memory, *log[-1])
    replayed = Memory(Rounds(3, 5, Clock()))
    for entry in log:
        happen(replayed, *entry)
    assert (replayed.last, replayed.describe()) == (memory.last, memory.describe())
    assert replayed.rounds.read() == memory.rounds.read()


def happen(memory, how, text):
    plain = json.loads(text)
    if how == "apply":
        memory.apply(plain)
    else:
        memory.replay([plain[0]], plain[1])


def test_an_event_of_a_newer_version_is_refused():
    with pytest.raises(tensorkv.StorageError, match="'moon' that is unknown"):
        Memory(Rounds(1, 5)).apply([["moon", 1]])


# ---------------------------------------------------------------- cuts and gatherings


def test_a_cut_holds_new_requests_and_admits_those_under_way():
    monitor, clients = Monitor(patience_s=0.01), Clients()
    cut = Cut(monitor, clients, 1)
    clients.done([("a.0", 7, {"fan": [0, 1]}), ("b.0", 2, {"fan": [0, 1]}), ("c.0", 2), ("a.0", 3, {"fan": [1, 2]})])
    with monitor:
        # One that comes late says nothing of the newer one; a dead process's request is on its way nowhere.
        assert cut.freeze("x.0", 1, ["a"]) == {"a.0": [7, [0, 1]]}
        with pytest.raises(Waits, match="snapshot"):
            cut.admit("d.0", 1)
        with pytest.raises(Waits, match="another snapshot"):
            cut.freeze("y.0", 1, [])
        with pytest.raises(Waits, match="on their way"):
            cut.settle("x.0", 2, {"d.0": [1, [0, 1]]}, lambda: "too early")
        cut.admit("d.0", 1)
        with pytest.raises(Waits):
            cut.admit("d.0", 2)
        clients.last["d.0"] = 1
        assert cut.settle("x.0", 2, {"d.0": [1, [0, 1]], "e.0": [5, [0]]}, lambda: "seen") == "seen"
        cut.admit("d.0", 2)
        with pytest.raises(tensorkv.SnapshotError, match="late"):
            cut.freeze("x.0", 1, [])
        with pytest.raises(tensorkv.SnapshotError, match="too long"):
            cut.settle("x.0", 3, {}, lambda: "never")
        assert cut.freeze("x.0", 4, []) == {}
        cut._until = 0
        cut.admit("d.0", 3)


def test_a_round_is_gathered_in_the_order_of_ranks():
    applied = []
    gathering = Gathering(
        lambda keys, parts, pushed: applied.append((keys, parts, [(e.client, e.seq) for e in pushed])), {}
    )

    def add(number, rank, pushed, first=None):
        gathering.add("w", ("w",), number, first or number, rank, pushed)

    add(1, 1, Pushed("b", 1, ["from 1"]))
    gathering.close([0, 1], lambda client, seq: True)
    assert gathering.awaited("w", 1, [0, 1]) == [0]
    add(1, 0, Pushed("a", 1, ["too early"]))
    add(1, 0, Pushed("a", 1, ["from 0"]))
    gathering.close([0, 1], lambda client, seq: client != "a")
    assert not applied
    gathering.close([0, 1], lambda client, seq: True)
    assert applied == [(("w",), [["from 0", "from 1"]], [("a", 1), ("b", 1)])]


def test_a_push_is_in_the_round_of_its_number_and_in_no_other():
    applied, closed = [], {}
    gathering = Gathering(lambda keys, parts, pushed: applied.append(parts[0]), closed)

    def add(number, rank, part, first=None, seq=None):
        gathering.add("w", ("w",), number, first or number, rank, Pushed(f"c{rank}", seq or number, [part]))
        gathering.close([0, 1], lambda client, seq: True)

    add(1, 0, "a1")
    # Rank 1 has been lost: this server has closed round 1 without it.
    gathering.close([0], lambda client, seq: True)
    assert (applied, closed, gathering.next("w")) == ([["a1"]], {"w": 1}, 2)
    add(2, 0, "a2")
    assert gathering.awaited("w", 2, [0, 1]) == [1]
    # It comes back, and goes on two rounds later: nobody waits for it in between.
    add(4, 1, "b4")
    assert applied[1:] == [["a2"]]
    add(3, 0, "a3")
    add(4, 0, "a4")
    assert applied[2:] == [["a3"], ["a4", "b4"]]
    # A thread of rank 0 is in round 5 yet, and another one has come to round 6.
    add(6, 0, "a6", first=5)
    add(5, 1, "b5")
    assert gathering.awaited("w", 5, [0, 1]) == [0]
    add(5, 0, "a5")
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
    call = read(b'[["w","sum","float32",[2]],["t","ids","int64",[1]],["t","rows","float32",[1,2]]]')
    assert call.keys == ("w", "t")
    assert call.flat_dtype is None
    assert keys_of(b'["w",3]') == ("w", 3)
    for bad in (b"", b"3", b"[true]", b'[""]', b"[null]", b"[" * 5000):
        with pytest.raises((tensorkv.ArgumentError, tensorkv.KeyTypeError)):
            keys_of(bad)


# ---------------------------------------------------------------- memory that is shared


@shares
def test_a_mailbox_that_moved_leaves_the_old_one_to_the_server():
    box, server = Mailbox(), OpenMailboxes()
    box.take_room(100, 50).fill_(1)
    first = box.describe()
    payload, reply = server.find("a.0", first)
    box.move()
    box.payload.fill_(2)
    reply.fill_(9)
    assert set(payload.tolist()) == {1}
    assert not box.reply.any()
    again, _ = server.find("a.0", box.describe())
    assert set(again.tolist()) == {2}
    # The first message comes late: its memory is gone, or another's.
    server.close_all_but([])
    with pytest.raises(OSError, match="not the"):
        server.find("a.0", first)
    for bad in ([*first[:2], 64, 1 << 40, 64, 1], [*first[:2], 64, -1, 64, 1]):
        with pytest.raises(OSError, match=r"outside|not the|No such"):
            OpenMailboxes().find("a.0", bad)
    box.give_up()


@shares
def test_a_reader_that_is_too_slow_notices():
    copies, reader = Copies(), CopyReader()
    place = copies.make(b"k", 1, 100, lambda room: room.fill_(1))
    assert copies.find(b"k", 1) == place
    assert copies.find(b"k", 2) is None
    values = reader.find(place)
    assert set(values.tolist()) == {1}
    assert reader.is_whole(place)
    for version in range(2, 4):
        copies.make(b"k", version, 100, lambda room: room.fill_(2))
        assert reader.is_whole(place)
    copies.make(b"k", 4, 100, lambda room: room.fill_(3))
    assert set(values.tolist()) == {3}
    assert not reader.is_whole(place)
    # One that is being written is not whole either.
    place = copies.make(b"k", 5, 100, lambda room: None)
    reader.find(place)

    def write(room):
        seen.append(reader.is_whole(place))

    seen = []
    for version in range(6, 9):
        copies.make(b"k", version, 100, write)
    assert seen[-1] is False
    larger = copies.make(b"k", 9, 1000, lambda room: room.fill_(7))
    assert set(reader.find(larger).tolist()) == {7}
    copies.forget(b"k")


def test_no_two_servers_count_their_copies_alike():
    assert len({Copies()._mark for _ in range(20)}) == 20


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
    from tensorkv.engines.ps.client.layout import Held, Route

    for servers, rows in itertools.product([1, 2, 5], [5, 4096]):
        shape = torch.Size((rows, 65))
        spec = KeySpec(shape, torch.float32, NUMPY, False)
        route = Route(["w"], [Held(spec, pieces(shape, [0] * servers))], wide=False)
        value, back = torch.arange(shape.numel(), dtype=torch.float32).view(shape), torch.zeros(shape)
        for share in route.shares:
            room = torch.empty(share.nbytes, dtype=torch.uint8)
            share.gather([[value, value]], room)
            share.scatter(room, [[back]])
        assert torch.equal(back, 2 * value)
        assert np.array_equal(back.numpy(), 2 * value.numpy())
