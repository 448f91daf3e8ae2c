"""Clients of servers do with any call what a local store does, bit for bit, whether its arrays are plain or not."""

import contextlib
import math
import time
from unittest import mock

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import TensorSlice
from tensorkv.engines import partition
from tensorkv.shard import native
from tests.support.amount import amount

pytest.importorskip("ray")

from ray.exceptions import GetTimeoutError

from tensorkv.engines.ps.client import data as client_data
from tensorkv.engines.ps.client import layout
from tensorkv.engines.ps.client.coded import CodedLayout
from tensorkv.engines.ps.client.data import DataClient
from tensorkv.engines.ps.client.session import SessionPool
from tensorkv.engines.ps.ray import handle
from tensorkv.engines.ps.server.state import ServerState
from tensorkv.engines.transport import channel
from tests.support.fake_servers import NONE, Cluster, together
from tests.support.overdue import overdue

DTYPES = [
    torch.float32,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint16,
    torch.bool,
    torch.complex64,
]
FLOATS = DTYPES[:5]
SHAPES = [(), (0,), (3,), (2, 3), (400,), (37, 11), (4, 0, 2), (1, 300)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Values of a few hundred elements are divided, and copied by several threads."""
    monkeypatch.setattr(partition, "_WHOLE", 256)
    monkeypatch.setattr(layout, "_PARALLEL_NUMEL", 1000)


class Calls:
    """Random calls of two stores, which must do the same."""

    def __init__(self, seed, stores, dtypes):
        self.rng = np.random.default_rng(seed)
        self.stores = stores
        self.odd = False
        """Whether arrays may have strides and other dtypes."""
        count = int(self.rng.integers(3, 14))
        self.specs = {
            f"k{number}": (dtypes[self.rng.integers(len(dtypes))], SHAPES[self.rng.integers(len(SHAPES))])
            for number in range(count)
        }
        values = [self.array(key) for key in self.specs]
        for kv in stores:
            kv.init(list(self.specs), values)

    def happens(self, chance):
        return self.rng.random() < chance

    def array(self, key, *, is_out=False):
        dtype, shape = self.specs[key]
        numbers = torch.from_numpy(np.asarray(self.rng.normal(size=shape) * 5))
        tensor = numbers > 0 if dtype is torch.bool else numbers.abs().to(dtype)
        if self.odd and self.happens(0.3):
            if dtype is torch.float32:
                tensor = tensor.to(torch.float16)
            if tensor.ndim:
                tensor = torch.stack([tensor, tensor], -1)[..., 0]
        if is_out:
            tensor = tensor * 0
        return tensor if dtype is torch.bfloat16 or self.happens(0.5) else tensor.numpy()

    def arrays(self, key, *, is_out=False):
        if self.happens(0.6):
            return self.array(key, is_out=is_out)
        made = [self.array(key, is_out=is_out) for _ in range(self.rng.integers(1, 4))]
        return made if self.happens(0.7) else tuple(made)

    def make(self):
        """Make a call of each store; return what they have returned, and the outs."""
        verb = ("push", "pull", "pushpull")[self.rng.integers(3)]
        self.odd = self.happens(0.2)
        keys = [str(key) for key in self.rng.permutation(list(self.specs))[: self.rng.integers(1, len(self.specs) + 1)]]
        if self.happens(0.1):
            keys.append(keys[0])
        is_single = self.happens(0.3)
        if is_single:
            keys = keys[:1]
        values = [self.arrays(key) for key in keys]
        has_outs = verb != "push" and self.happens(0.7)
        form = ("list", "tuple", "mapping")[self.rng.integers(3)] if len(set(keys)) == len(keys) else "list"
        has_same_outs = verb == "pushpull" and has_outs and self.happens(0.2)
        results = []
        outs = [self.arrays(key, is_out=True) for key in keys]
        for kv in self.stores:
            own = [copied(each) for each in values]
            filled = own if has_same_outs else [copied(each) for each in outs]
            if is_single:
                arguments = {"key": keys[0], "value": own[0], "out": filled[0]}
            elif form == "mapping":
                pulled = dict(zip(keys, filled, strict=True))
                pairs = dict(zip(keys, own, strict=True))
                arguments = {"key": pulled if verb == "pull" and has_outs else pairs, "out": pulled}
                if verb == "pull":
                    arguments["out"] = None
                    arguments["key"] = pulled if has_outs else keys
            else:
                kind = list if form == "list" else tuple
                arguments = {"key": kind(keys), "value": kind(own), "out": kind(filled)}
            if verb == "pull":
                arguments.pop("value", None)
            if verb == "push" or not has_outs:
                arguments.pop("out", None)
            results.append((getattr(kv, verb)(**arguments), filled))
        return results


def copied(arrays):
    if isinstance(arrays, list | tuple):
        return type(arrays)(copied(each) for each in arrays)
    if isinstance(arrays, np.ndarray):
        return arrays.copy() if arrays.flags.c_contiguous else np.stack([arrays, arrays], -1)[..., 0]
    if arrays.is_contiguous():
        return arrays.clone()
    return torch.stack([arrays, arrays], -1)[..., 0]


def raw(found):
    """Return arrays of any form as types, dtypes and bytes, which are equal where all bits are."""
    if found is None:
        return None
    if isinstance(found, dict):
        return {key: raw(each) for key, each in found.items()}
    if isinstance(found, list | tuple):
        return [raw(each) for each in found]
    tensor = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    flat = tensor.contiguous().view(-1)
    return type(found).__name__, tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist() if len(flat) else []


@contextlib.contextmanager
def prepared(monkeypatch):
    """Count the calls that were plain, and those that were not."""
    counts = {True: 0, False: 0}
    prepare = DataClient.prepare

    def counted(*args, **more):
        found = prepare(*args, **more)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(DataClient, "prepare", counted)
    yield counts


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "without"])
@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("servers", [1, 3])
def test_random_calls(servers, mode, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(native, "can_look", lambda: False)
    with prepared(monkeypatch) as counts:
        for seed in range(amount(6, 30)):
            optimizer = [None, ("sgd", {"lr": 0.1, "momentum": 0.9}), ("adam", {"lr": 0.1})][seed % 3]
            with Cluster(servers, mode=mode) as cluster, tensorkv.create("local") as local:
                stores = [local, cluster.store()]
                if optimizer is not None:
                    for kv in stores:
                        kv.set_optimizer(optimizer[0], **optimizer[1])
                calls = Calls(seed, stores, DTYPES if optimizer is None else FLOATS)
                for _ in range(12):
                    (expected, filled), (found, other) = calls.make()
                    assert raw(found) == raw(expected)
                    assert raw(other) == raw(filled)
                for key in calls.specs:
                    assert raw(stores[1].pull(key)) == raw(local.pull(key)), key
                    assert stores[1].info(key).version == local.info(key).version
    assert (counts[True] > 2 * counts[False]) is (is_compiled and native.can_look())


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_sums_of_workers_are_rounded_once(dtype, large):
    """Whether a worker's own sum is plain or not."""

    def make(value):
        return torch.full((3,), value).to(dtype)

    parts = [[large, 1.0], [0.5, 0.5]]
    with Cluster(2, mode="sync", num_workers=2) as cluster, tensorkv.create("local") as local:
        workers = cluster.stores(2)
        together(*(lambda kv=kv: kv.init(["a", "b"], [make(0), make(0)]) for kv in workers))
        local.init("a", make(0))
        local.push("a", [make(value) for own in parts for value in own])
        for strange in (False, True):
            jobs = []
            for kv, own in zip(workers, parts, strict=True):
                arrays = [make(value) for value in own]
                if strange:
                    arrays[0] = torch.stack([arrays[0]] * 2, -1)[..., 0]
                jobs.append(lambda kv=kv, arrays=arrays: kv.pushpull(["a", "b"], [arrays, arrays]))
            for found in together(*jobs):
                assert raw(found) == [raw(local.pull("a"))] * 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_create_the_keys_of_a_tree_at_the_same_time(mode):
    with Cluster(2, mode=mode, num_workers=2) as cluster:
        workers = cluster.stores(2)
        for turn in range(10):
            # They do not have the same keys, where no worker waits for the other.
            trees = [{f"{turn}": np.full(3, rank + 1, np.float32)} for rank in range(2)]
            if mode == "async":
                trees = [{**tree, f"{turn} of {rank}": np.ones(1)} for rank, tree in enumerate(trees)]
            together(*(lambda kv=kv, tree=tree: kv.push_tree(tree) for kv, tree in zip(workers, trees, strict=True)))
            for kv in workers:
                found = kv.pull(f"{turn}").tolist()
                assert found == [3, 3, 3] if mode == "sync" else found in ([1, 1, 1], [2, 2, 2])
                assert kv.info(f"{turn}").version == (1 if mode == "sync" else 2)
        assert len(workers[0].keys()) == (10 if mode == "sync" else 30)


def test_an_init_that_rank_0_does_not_make_right_is_refused_at_once():
    with Cluster(2, num_workers=2) as cluster:
        first, second = cluster.stores(2)
        first.init({"v": np.zeros(2), "w": np.zeros(2)})
        with pytest.raises(tensorkv.KeyTypeError, match=r"init\(3\): this store's keys are str, got int"):
            second.init(3, np.zeros(2))
        with pytest.raises(tensorkv.ValueMismatchError, match="rank 0's value is float64 of shape"):
            second.init({"new": np.zeros(2), "w": np.zeros(3)})
        # Rank 0 may just have made it.
        second.init("w", np.ones(2))
        assert second.pull("w").tolist() == [0, 0]


def test_an_init_of_a_key_that_rank_0_has_re_created():
    with Cluster(2, num_workers=2) as cluster:
        first, second = cluster.stores(2)
        first.init("w", np.zeros(2))
        second.init("w", np.zeros(2))
        first.delete("w")
        first.init("w", np.zeros(3))
        second.init("w", np.ones(3))
        assert second.pull("w").tolist() == [0, 0, 0]


@pytest.mark.parametrize("fits", [True, False])
def test_the_first_pushpull_of_all_keys_finds_the_memory_of_their_init(fits, monkeypatch):
    made = mock.Mock(wraps=channel.Segment)
    monkeypatch.setattr(channel, "Segment", made)
    values = [np.full(40_000, float(number)) for number in range(4)]
    if not fits:
        monkeypatch.setattr(client_data, "_MAX_ROOM_NBYTES", 0)
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init(list(range(4)), values)
        before = made.call_count
        assert before > 0
        outs = [np.empty(40_000) for _ in values]
        for _ in range(2):
            kv.pushpull(list(range(4)), values, out=outs)
        assert [out[-1] for out in outs] == [0, 1, 2, 3]
        # Each server opens it, too.
        assert made.call_count - before == (0 if fits else 4)


def test_a_key_that_the_optimizer_cannot_update_stops_the_push_on_every_server():
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init(["f", "i"], [np.zeros(3, np.float32), np.zeros(3, np.int64)])
        assert [each["keys"] for each in kv.stats()["servers"]] == [1, 1]
        kv.set_optimizer("sgd", lr=1.0)
        for keys in (["f", "i"], ["i", "f"]):
            with pytest.raises(tensorkv.OptimizerError, match="floating-point"):
                kv.push(keys, [np.ones(3, np.float32 if key == "f" else np.int64) for key in keys])
        assert kv.pull("f").tolist() == [0, 0, 0]


def test_a_key_that_another_client_has_re_created():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        keys = ["a", "b"]
        kv.init(keys, [np.zeros(3, np.float32)] * 2)
        part, out = np.ones(3, np.float32), np.full(3, 7, np.float32)
        kv.push(keys, [part] * 2)
        # Other rows: what this client takes for plain is not what servers have.
        other.delete(keys)
        other.init(keys, [np.zeros(4, np.float32)] * 2)
        for call in (lambda: kv.pushpull(keys, [part] * 2, out=[out, out.copy()]), lambda: kv.pull("a", out=out)):
            with pytest.raises(tensorkv.ValueMismatchError):
                call()
        assert out.tolist() == [7, 7, 7]
        assert other.pull("a").tolist() == [0, 0, 0, 0]
        # On other servers, and otherwise as before.
        other.delete(keys)
        other.init("c", np.zeros(3, np.float32))
        other.init(keys, [np.full(4, 2, np.float32)] * 2)
        assert kv.pull("a").tolist() == [2, 2, 2, 2]
        other.delete([*keys, "c"])
        other.init(keys[::-1], [np.full(4, 3, np.float32)] * 2)
        out = np.zeros(4, np.float32)
        kv.pull("a", out=out)
        assert out.tolist() == [3, 3, 3, 3]


def test_a_snapshot_fills_plain_outs(monkeypatch):
    with prepared(monkeypatch) as counts, Cluster(2) as cluster:
        kv = cluster.store()
        values = {"a": np.arange(3.0), "b": torch.arange(400)}
        kv.init(values)
        with kv.snapshot() as snapshot:
            kv.push(values, None)
            kv.push({"a": np.zeros(3)})
            counts.clear()
            counts.update({True: 0, False: 0})
            outs = [np.zeros(3), torch.zeros(400, dtype=torch.int64)]
            before = outs[1]._version
            snapshot.pull(["a", "b"], out=outs)
            assert outs[1]._version > before
            assert raw(outs) == raw(list(values.values()))
            assert raw(snapshot.pull(["a", "b"])) == raw(list(values.values()))
            assert counts == {True: 2 * native.can_look(), False: 2 * (not native.can_look())}


def test_a_pushpull_that_cannot_read_a_part_writes_no_out():
    with Cluster() as cluster:
        kv = cluster.store()
        kv.init(["a", "b"], [np.zeros(4), np.zeros(4)])
        whole, part = np.full(4, 7.0), np.full(2, 7.0)
        cluster.actors[0].fate = lambda head: "lose request" if head["verb"] == "pull" else NONE
        with overdue(), pytest.raises(tensorkv.PushOutcomeUnknownError):
            kv.pushpull(["a", "b"], [np.ones(4), np.ones(4)], out=[whole, TensorSlice(part, (0,), (4,))])
        assert (whole.tolist(), part.tolist()) == ([7] * 4, [7] * 2)
        cluster.actors[0].fate = lambda head: NONE
        kv.pull(["a", "b"], out=[whole, TensorSlice(part, (0,), (4,))])
        assert (whole.tolist(), part.tolist()) == ([1] * 4, [1] * 2)


def test_empty_lists():
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init("a", np.zeros(3))
        assert kv.pushpull([], []) == []
        assert kv.pull([]) == []
        kv.push([], [])
        kv.push((), ())
        assert kv.info("a").version == 0


def test_keys_are_described_together():
    names = [f"k{number}" for number in range(40)]
    with Cluster(3) as cluster:
        kv, other = cluster.stores(2)
        # One is on every server.
        numels = [600 if name == "k7" else 2 for name in names]
        kv.init(names, [np.zeros(numel) for numel in numels])
        assert len(set(kv._engine._keymap.find("info", "k7").servers)) == 3
        kv.push(names[5:], [np.ones(numel) for numel in numels[5:]])
        backwards = names[::-1]
        with mock.patch.object(other._engine, "_send", wraps=other._engine._send) as send:
            found = other.info(backwards)
        # The keys that there are, and what is asked.
        assert [len(each.args[0]) for each in send.call_args_list] == [3, 3]
        assert [info.version for info in found] == [1] * 35 + [0] * 5
        assert [info.nbytes for info in found] == [numel * 8 for numel in numels[::-1]]
        assert found == [other.info(name) for name in backwards]


def test_a_rule_is_learnt_though_another_thread_deletes_a_key_meanwhile():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(["a", "b"], [np.zeros(3)] * 2)
        other.keys()
        keymap = other._engine._keymap

        def ask(known):
            kv.set_optimizer("sgd", lr=0.5)
            replies = other._engine._list(known)
            # The other thread has refreshed before the optimizer was set.
            with mock.patch.object(keymap, "refresh"):
                other.delete("b")
            return replies

        keymap.refresh(ask)
        assert keymap.optimizer is not None
        assert keymap.optimizer.name == "sgd"
        assert other.keys() == ["a"]


def test_a_client_knows_the_keys_that_it_has_created(monkeypatch):
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init("a", np.zeros(3))
        with mock.patch.object(ServerState, "listing", side_effect=AssertionError("nothing else has changed")):
            kv.init(["b", "c"], [np.zeros(400), np.zeros(3)])
            assert kv.keys() == ["a", "b", "c"]
            kv.push("b", np.ones(400))
            placed = kv._engine._keymap.placed
            kv.init("d", np.zeros(5))
            # What was found out of the others is known still.
            assert kv._engine._keymap.placed.layout(["b"]) is placed.layout(["b"])
            kv.delete("c")
            assert kv.keys() == ["a", "b", "d"]
            kv.delete("d")
            with pytest.raises(tensorkv.KeyNotFoundError):
                kv.pull("d")
            kv.init("c", np.zeros(3))
        assert other.keys() == ["a", "b", "c"]
        assert other.pull("b").tolist() == [1] * 400
        # Keys that other clients have created since the last listing are not missed.
        data = kv._engine._data
        init = data.init

        def init_after_another(*args):
            there = other._engine
            there._data.init(
                ["x"], [torch.ones(3, dtype=torch.float64)], there._keymap.place(["x"], [kv._engine.spec("", "a")])
            )
            return init(*args)

        other.keys()
        monkeypatch.setattr(data, "init", init_after_another)
        kv.init("d", np.zeros(3))
        assert set(kv.keys()) == {"a", "b", "c", "d", "x"}


class SlowReply:
    """A reply that Ray fetches from another host; a get that times out gives up what it has of it."""

    SECONDS = 0.25

    def __init__(self):
        self.since = None

    def get(self, ref, timeout):
        assert ref is self
        if self.since is not None and time.monotonic() - self.since >= self.SECONDS:
            return "reply"
        self.since = None
        time.sleep(timeout)
        if timeout >= self.SECONDS:
            return "reply"
        raise GetTimeoutError

    def wait(self, refs, timeout):
        self.since = self.since or time.monotonic()
        time.sleep(timeout)
        done = time.monotonic() - self.since >= self.SECONDS
        return (refs, []) if done else ([], refs)


def test_a_large_reply_through_ray_arrives_though_the_wait_for_it_is_looked_at(monkeypatch):
    """Interrupts and deadlines are checked while Ray fetches; that must not have it begin again."""
    slow = SlowReply()
    monkeypatch.setattr(handle, "ray", slow)
    assert handle.get(slow, 60) == "reply"
    never = SlowReply()
    never.SECONDS = math.inf
    monkeypatch.setattr(handle, "ray", never)
    with pytest.raises(GetTimeoutError):
        handle.get(never, 0.3)


def test_the_same_compression_in_another_store_is_worked_out_once(monkeypatch):
    made = []
    monkeypatch.setattr(client_data, "CodedLayout", lambda *args: made.append(args) or CodedLayout(*args))
    for _ in range(2):
        with Cluster() as cluster:
            kv = cluster.store()
            kv.init("w", np.zeros(9, np.float32))
            kv.set_gradient_compression({"type": "1bit"})
            for _ in range(3):
                kv.push("w", np.ones(9, np.float32))
    assert len(made) == 2


def test_sessions_that_were_lent_when_the_pool_was_cleared_are_not_lent_again():
    """Their requests have the old rank."""
    pool = SessionPool(lambda number: mock.Mock(number=number, is_idle=True, resent=0, socket_requests=0))
    with pool.take() as old:
        pool.clear()
        old.close.assert_not_called()
    old.close.assert_called_once()
    with pool.take() as session:
        assert session.number == 1
    with pool.take() as again:
        assert again is session


def test_sessions_that_were_interrupted_are_let_go_and_still_count():
    made = []

    def make(number):
        made.append(mock.Mock(number=number, is_idle=True, resent=1, socket_requests=2))
        return made[-1]

    def interrupted():
        with pool.take() as session:
            session.is_idle = False
            raise KeyboardInterrupt

    pool = SessionPool(make)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    with pool.take() as idle:
        pass
    with pool.take() as again:
        assert again is idle
        assert (pool.resent, pool.socket_requests) == (4, 8)
    assert pool._open == {idle}
    pool.clear()
    with pool.take() as session:
        # Servers remember the last request of each session.
        assert session.number == 4
    pool.close()
    assert not pool._open
    assert [session.number for session in made] == [0, 1, 2, 3, 4]
    assert (pool.resent, pool.socket_requests) == (5, 10)
    for session in made:
        session.close.assert_called_once()
