"""Releases on servers that are killed, that restart, and whose publishers die: no reader sees two versions at once."""

import contextlib
import itertools
import os
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import tensorkv
from tensorkv.engines import partition
from tensorkv.engines.ps import messages
from tensorkv.engines.ps.client import releases as client_releases
from tensorkv.engines.ps.client.releases import ReleaseClient
from tensorkv.engines.ps.client.session import Session
from tensorkv.releases import finder
from tensorkv.storage.wal import WriteAheadLog
from tests.support.amount import amount
from tests.support.fake_servers import Cluster
from tests.support.until import LIMIT_S, until

F32 = np.float32
# The requests of a publisher.
PUBLISHING = (messages.Prepare, messages.Commit, messages.ShowRelease, messages.KeepReleases, messages.Abort)
# On several servers, and large enough to be read through shared memory.
SHAPES = {"large": (600, 100), "small": (3,), "other": (40, 5)}


def values(number):
    return {key: np.full(shape, number, F32) for key, shape in SHAPES.items()}


def number_in(pulled):
    """The number that all arrays are full of."""
    found = {float(number) for array in pulled for number in np.unique(array)}
    assert len(found) == 1, f"versions {found} together"
    return found.pop()


class Readers:
    """Threads that read each newest release whole and by changes, until the block ends; a context manager."""

    def __init__(self, stores, *, may_lose=False):
        self.errors, self.seen, self._stop, self._may_lose = [], [], threading.Event(), may_lose
        self._threads = [threading.Thread(target=self._run, args=(kv,)) for kv in stores]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors

    def _run(self, kv):
        mine, base, last = None, None, None
        try:
            while not self._stop.is_set():
                try:
                    release = kv.wait_release(after=last, timeout_s=1)
                except tensorkv.WaitTimeoutError:
                    continue
                try:
                    last, mine, base = self._read(release, last, mine, base)
                except tensorkv.ReleaseNotFoundError:
                    # It had been dropped, and the server that held it for its readers was killed.
                    assert self._may_lose
                    mine = None
        except Exception as error:
            self.errors.append(error)

    def _read(self, release, last, mine, base):
        with release:
            number = float(release.name.partition("-")[2])
            pulled = release.pull(list(SHAPES))
            assert number_in(pulled) == number
            if mine is None:
                mine, base = dict(zip(SHAPES, pulled, strict=True)), release.digest
            else:
                changes = release.changes(since=last)
                mine = tensorkv.apply_changes(mine, changes, base=base)
                assert number_in(mine.values()) == number
                base = changes.digest
                assert base == release.digest
            self.seen.append(number)
            return release.name, mine, base


@contextlib.contextmanager
def pushing(kv):
    """Push all values again and again in a thread, each time other ones, until the block ends."""
    stop = threading.Event()

    def push():
        for number in itertools.count(1):
            kv.push(values(number))
            if stop.is_set():
                return

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def publish_and_read(kv, count):
    """Publish so many releases, and read each: all of its values are of one push."""
    for number in range(count):
        kv.publish(f"step-{number}", keep=1)
        with kv.open_release(f"step-{number}") as release:
            number_in(release.pull(list(SHAPES)))


def publish_all(kv, numbers):
    for number in numbers:
        kv.push(values(number))
        kv.publish(f"step-{number}", keep=2)


@pytest.mark.parametrize("num_servers", [1, 3])
def test_readers_see_whole_releases_while_others_are_published(num_servers):
    with Cluster(num_servers) as cluster:
        kv, *stores = [cluster.store() for _ in range(4)]
        kv.init(values(0))
        with Readers(stores) as readers:
            publish_all(kv, range(1, amount(60, 600)))
            until(lambda: readers.errors or readers.seen.count(amount(60, 600) - 1) == 3)
        assert len(readers.seen) > 10
        assert [each.name for each in kv.releases()] == [f"step-{amount(60, 600) - 2}", f"step-{amount(60, 600) - 1}"]
        # Nothing is left of those that were dropped.
        assert [len(server._state.shard.releases.lasting()) for server in cluster.servers] == [2] * num_servers


def test_a_test_of_mixed_releases_would_see_one():
    """Publishing without the first phase, which holds pushes on all servers, gives releases with halves of pushes."""

    def publish_one_by_one(self, name, keys, keep):
        for server in self.servers:
            time.sleep(0.001)
            self._ask([server], messages.Publish(release=name, keys=keys, keep=keep))

    with Cluster(3) as cluster, mock.patch.object(ReleaseClient, "publish", publish_one_by_one):
        kv, other = cluster.store(), cluster.store()
        kv.init(values(0))
        with pushing(other), pytest.raises(AssertionError, match=r"versions \{.*\} together"):
            publish_and_read(kv, 1000)


def test_pushes_of_others_are_in_a_release_whole_or_not_at_all():
    with Cluster(3) as cluster:
        kv, other = cluster.store(), cluster.store()
        kv.init(values(0))
        with pushing(other):
            publish_and_read(kv, amount(100, 2000))


@pytest.mark.parametrize("lost", range(5))
def test_a_publisher_that_dies_in_the_middle(lost, tmp_path):
    """After any of its requests: the release is there whole, or not at all, and later ones are as ever."""
    with Cluster(3) as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(values(1))
        kv.publish("step-1")
        dying = cluster.store()
        dying.push(values(2))
        sent, real = [], Session.send

        def send(self, requests, **more):
            if isinstance(requests[0].message, PUBLISHING):
                if len(sent) == lost:
                    raise tensorkv.WorkerError("this process has ended")
                sent.append(requests)
            return real(self, requests, **more)

        with (
            mock.patch.object(Session, "send", send),
            pytest.raises(tensorkv.WorkerError, match="has ended"),
        ):
            dying.publish("step-2")
        assert len(sent) == lost
        cluster.silence(dying)
        for server in cluster.servers:
            # As ten seconds later.
            server._snapshot_barrier._until = 0.0
        names = [each.name for each in reader.releases()]
        assert names in (["step-1"], ["step-1", "step-2"])
        reader.save(tmp_path, releases=True)
        with tensorkv.create() as loaded:
            loaded.load(tmp_path)
            assert [each.name for each in loaded.releases()] == names
        for name in names:
            with reader.open_release(name) as release:
                assert number_in(release.pull(list(SHAPES))) == float(name[-1])
        for server in cluster.servers:
            # As with the next heartbeat of others.
            server._drop_snapshots_of_dead_clients()
        kv.push(values(3))
        kv.publish("step-3", keep=1)
        with reader.open_release("step-3") as release:
            assert number_in(release.pull(list(SHAPES))) == 3
            assert release.changes(since="step-1").base is None
        assert [[held.name for held in server._state.shard.releases.lasting()] for server in cluster.servers] == [
            ["step-3"]
        ] * 3


def test_a_release_that_is_shown_on_some_servers_stays_after_a_restart(tmp_path):
    """A reader has opened it, and its publisher died before it told all servers that it is finished."""
    options = {"path": str(tmp_path / "store"), "durability": "process"}
    with Cluster(2, **options) as cluster:
        kv = cluster.store()
        kv.init(values(1))
        with mock.patch.object(ReleaseClient, "_drop_others"):
            kv.publish("step-1")
        assert [len(server._state.shard.releases.hidden()) for server in cluster.servers] == [0, 1]
        kv.open_release("step-1")
    with Cluster(2, **options) as cluster:
        kv = cluster.store()
        kv.push(values(2))
        kv.publish("step-2", keep=1)
        with kv.open_release("step-1") as release:
            assert number_in(release.pull(list(SHAPES))) == 1


def test_a_key_that_another_client_has_deleted_is_not_left_out():
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(values(1))
        kv.pull("small")
        other.delete("small")
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'publish\("small"\)'):
            kv.publish("step-1", keys=["large", "small"])
        assert kv.releases() == []
        kv.publish("step-1", keys=["large"])
        with kv.open_release("step-1") as release:
            assert release.keys() == ["large"]


def test_two_that_publish_at_the_same_time():
    with Cluster(2) as cluster:
        stores = [cluster.store() for _ in range(3)]
        stores[0].init(values(0))

        def publish(number, errors):
            for turn in range(amount(15, 150)):
                try:
                    stores[number].publish(f"step-{turn}" if number else f"own-{turn}", keep=2)
                except tensorkv.ReleaseExistsError:
                    errors.append(turn)

        errors = []
        threads = [threading.Thread(target=publish, args=(number, errors)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Of two with one name one has published it.
        assert sorted(errors) == list(range(amount(15, 150)))
        assert len(stores[0].releases()) == 2
        for each in stores[0].releases():
            with stores[0].open_release(each.name) as release:
                assert number_in(release.pull(list(SHAPES))) == 0


def test_a_lease_ends_and_reading_makes_it_longer():
    with Cluster(2) as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(values(1))
        kv.publish("step-1")
        release = reader.open_release("step-1", lease_s=LIMIT_S)
        short = reader.open_release("step-1", lease_s=0.001)
        for number in (2, 3):
            kv.push(values(number))
            kv.publish(f"step-{number}", keep=1)
        # One reader holds it for longer, so the other may read it as well.
        assert number_in(release.pull(list(SHAPES))) == number_in(short.pull(list(SHAPES))) == 1
        release.close()
        time.sleep(0.01)
        with pytest.raises(tensorkv.ReleaseNotFoundError, match="was dropped"):
            short.pull("large")
        with pytest.raises(tensorkv.ReleaseNotFoundError, match='the release "step-1" was dropped'):
            reader.open_release("step-1")
        assert [each.name for each in reader.releases()] == ["step-3"]


@pytest.mark.parametrize("num_servers", [0, 1])
@pytest.mark.parametrize("verb", ["changes", "digest"])
def test_a_lease_does_not_end_while_its_reader_waits_for_a_comparison(num_servers, verb, monkeypatch):
    now = [0.0]
    opening = tensorkv.create() if num_servers == 0 else Cluster(num_servers)
    with opening as opened:
        kv = opened if num_servers == 0 else opened.store()
        servers = [] if num_servers == 0 else opened.servers
        for shard in [server._state.shard for server in servers] or [kv._engine._shard]:
            shard.releases._now = lambda: now[0]
        kv.init(values(0))
        kv.publish("step-0")
        kv.push(values(1))
        kv.publish("step-1")
        release = kv.open_release("step-1", lease_s=60)
        kv.push(values(2))
        kv.publish("step-2", keep=3)
        took_long = []
        groups = finder._groups

        def long_groups(entries):
            took_long.append(True)
            now[0] += 1000
            for server in servers:
                server._drop_snapshots_of_dead_clients()
            if len(took_long) == 1:
                kv.publish("step-3", keep=1)
            return groups(entries)

        monkeypatch.setattr(finder, "_groups", long_groups)
        if verb == "changes":
            found = release.changes(since="step-0")
            assert found.base == "step-0"
            assert number_in([change.values for change in found]) == 1
        else:
            assert release.digest
        assert took_long
        # From then on it has the whole lease.
        now[0] += 59
        for server in servers:
            server._drop_snapshots_of_dead_clients()
        assert number_in(release.pull(list(SHAPES))) == 1
        now[0] += 1000
        with pytest.raises((tensorkv.ReleaseNotFoundError, tensorkv.SnapshotError)):
            kv.open_release("step-1")


def test_reading_from_one_server_makes_a_lease_longer_on_all(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr("tensorkv.engines.ps.client.releases.time", clock)
    with Cluster(2) as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
        for server in cluster.servers:
            server._state.shard.releases._now = clock.monotonic
        assert [len(server._state.shard.keys()) for server in cluster.servers] == [1, 1]
        kv.publish("step-1")
        release = reader.open_release("step-1", lease_s=60)
        kv.push("b", np.ones(3))
        kv.publish("step-2", keep=1)

        def drop():
            for server in cluster.servers:
                server._drop_snapshots_of_dead_clients()

        for _ in range(10):
            now[0] += 50
            drop()
            release.pull("a")
        assert release.pull("b").tolist() == [0] * 3
        now[0] += 76
        drop()
        with pytest.raises(tensorkv.ReleaseNotFoundError, match="was dropped"):
            release.pull("b")


def test_a_release_whose_lease_ends_during_a_read_stays_until_the_read_ends(monkeypatch):
    """The reader copies it from memory that the next pushes would use again."""
    size, real = 1 << 18, Session.values_in_place
    with Cluster(1) as cluster:
        kv, reader = cluster.store(), cluster.store()
        (server,) = cluster.servers
        kv.init("w", np.zeros(size, F32))
        kv.publish("step-1")
        release = reader.open_release("step-1")
        kv.push("w", np.ones(size, F32))
        kv.publish("step-2", keep=1)
        begun = []

        def take_long(*arguments):
            begun.append(arguments)
            monkeypatch.setattr(server._state.shard.releases, "_now", lambda: time.monotonic() + 1000)
            server._drop_snapshots_of_dead_clients()
            for number in (2, 3, 4):
                kv.push("w", np.full(size, number, F32))
            return real(*arguments)

        monkeypatch.setattr(Session, "values_in_place", take_long)
        assert number_in([release.pull("w")]) == 0
        assert len(begun) == 1
        with pytest.raises(tensorkv.ReleaseNotFoundError, match="was dropped"):
            release.pull("w")
        assert not server._state.shard._num_frozen


@pytest.fixture(scope="module")
def kills():
    pytest.importorskip("ray")
    from tests.ps import test_faults

    return test_faults


@pytest.mark.parametrize("num_servers", [pytest.param(1, marks=pytest.mark.release), 2])
def test_servers_that_are_killed_while_releases_are_published_and_read(kills, num_servers, tmp_path):
    with kills.create(num_servers=num_servers, path=tmp_path / "store") as kv:
        kv.init(values(0))
        stores = [tensorkv.create("dist_async", name=kills.name_of(kv)) for _ in range(2)]
        last = 0
        with Readers(stores, may_lose=True) as readers, kills.Killer(kv, amount(1, 5)) as killer:
            while not killer.is_done:
                last += 1
                kv.push(values(last))
                kv.publish(f"step-{last}", keep=2)
            for _ in range(3):
                last += 1
                kv.push(values(last))
                kv.publish(f"step-{last}", keep=2)
            until(lambda: readers.errors or readers.seen.count(last) == 2)
        assert len(killer.killed) == num_servers * amount(1, 5)
        # A number may be left out: that of a publication in which a server was killed, and which was begun again.
        before, newest = kv.releases()
        assert (before.name, newest.name) == (f"step-{last - 1}", f"step-{last}")
        assert last - 1 <= before.number < newest.number
        for store in stores:
            store.close()


def test_releases_are_there_after_all_processes_have_ended(kills, tmp_path):
    digests = []
    for turn in range(2):
        with kills.create(num_servers=2, path=tmp_path / "store") as kv:
            if turn == 0:
                kv.init(values(0))
                publish_all(kv, range(1, 5))
                kv.delete("other")
                kv.push({"large": values(5)["large"], "small": values(5)["small"]})
                kv.publish("step-5", keep=3)
            assert [each.name for each in kv.releases()] == ["step-3", "step-4", "step-5"]
            with kv.open_release("step-4") as release:
                assert number_in(release.pull(list(SHAPES))) == 4
                digests.append(release.digest)
            with kv.open_release("step-5") as release:
                kinds = {each.key: each.kind for each in release.changes(since="step-4")}
                assert kinds == {"large": "dense", "small": "dense", "other": "deleted"}
            with pytest.raises(tensorkv.ReleaseExistsError):
                kv.publish("step-2")
            for pid in [kills.pid_of(kv, server) for server in (0, 1)]:
                os.kill(pid, signal.SIGKILL)
            with kv.open_release("step-3") as release:
                assert number_in(release.pull(list(SHAPES))) == 3
    assert digests[0] == digests[1]


# ---------------------------------------------------------------- what a review has found


def test_a_second_attempt_takes_all_servers_again():
    """One server has done its part of the first attempt, another one not; and others have pushed in between."""
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init(values(0))
        real, failed = Session.send, []

        def send(self, requests, **more):
            if isinstance(requests[0].message, messages.Commit) and not failed:
                failed.append(real(self, requests[1:], **more))
                # Server 0 was restarted, and knows nothing of the snapshot.
                cluster.servers[0]._snapshot_barrier._owner = None
                kv.push(values(1))
                raise tensorkv.SnapshotError("server 0 was restarted")
            return real(self, requests, **more)

        with mock.patch.object(Session, "send", send):
            kv.publish("step-1")
        assert failed
        with kv.open_release("step-1") as release:
            assert number_in(release.pull(list(SHAPES))) == 1
        kv.push(values(2))


def test_numbers_are_used_once_in_whatever_order_releases_are_shown():
    with Cluster(2) as cluster:
        stores = cluster.stores(2)
        stores[0].init(values(0))
        real, waiting = ReleaseClient._ask, []

        def ask(self, servers, message, timeout_s=None):
            if isinstance(message, messages.ShowRelease) and message.release == "first":
                waiting.append(1)
                stores[1].publish("second")
            return real(self, servers, message, timeout_s)

        with mock.patch.object(ReleaseClient, "_ask", ask):
            stores[0].publish("first")
        assert waiting
        assert [(each.name, each.number) for each in stores[0].releases()] == [("first", 1), ("second", 2)]
        stores[0].unpublish("second")
        stores[0].publish("third")
        with stores[1].wait_release(after="second") as release:
            assert (release.name, release.number) == ("third", 3)


@pytest.mark.parametrize("rows", [300_000, 300_010])
def test_a_key_that_is_made_again_with_nearly_the_same_shape(rows):
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init("v", np.zeros((300_000,), F32))
        kv.publish("a")
        kv.delete("v")
        kv.init("v", np.arange(rows, dtype=F32))
        kv.publish("b")
        with kv.open_release("b") as release:
            changes = release.changes(since="a")
            kinds = sorted(each.kind for each in changes)
            assert kinds == (["dense"] if rows == 300_000 else ["deleted", "dense"])
            found = next(each for each in changes if each.kind == "dense")
            assert (found.values == np.arange(rows, dtype=F32)).all()
            assert changes.digest == release.digest


def test_a_table_without_rows_and_one_whose_rows_are_gone():
    with Cluster(2) as cluster:
        kv = cluster.store()

        def table(*ids):
            return tensorkv.Rows(list(ids), np.ones((len(ids), 2), F32), 9)

        kv.init("t", table())
        kv.publish("a")
        kv.publish("b")
        kv.push("t", table(0, 2))
        kv.publish("c")
        kv.delete("t")
        kv.init("t", table(5))
        kv.publish("d")
        for name, since, kind, ids in [("b", "a", "same", None), ("c", "b", "rows", [0, 2]), ("d", "c", "dense", [5])]:
            with kv.open_release(name) as release:
                (change,) = release.changes(since=since)
            assert change.kind == kind
            assert (change.indices.tolist() if ids else change.indices) == ids
        with kv.open_release("a") as release:
            (change,) = release.changes(since="a")
            assert change.kind == "same"


def test_servers_that_do_not_hold_the_same_releases():
    """As after the death of a publisher before it has told the others what server 0 has dropped."""
    with Cluster(3) as cluster:
        kv = cluster.store()
        kv.init(values(0))
        kv.publish("a")
        kv.push(values(1))
        kv.publish("b")
        for server in cluster.servers[:1]:
            server._state.shard.unpublish("a")
        with kv.open_release("b") as release:
            changes = release.changes(since="a")
            assert changes.base is None
            mine = tensorkv.apply_changes(values(7), changes)
            assert number_in(mine.values()) == 1
            with pytest.raises(tensorkv.ReleaseNotFoundError, match='no release "x" was published'):
                release.changes(since="x")


def test_a_reader_does_not_wait_forever_for_a_release_that_one_server_has_not():
    with Cluster(2) as cluster:
        kv, reader = cluster.stores(2)
        kv.init(values(0))
        kv.publish("a")
        cluster.servers[1]._state.shard.unpublish("a")
        with pytest.raises(tensorkv.WaitTimeoutError):
            reader.wait_release(timeout_s=0.2)
        kv.publish("b")
        assert reader.wait_release().name == "b"


@contextlib.contextmanager
def failing(kind, problem, *, is_sent=True):
    """Expect a block to raise ``problem``, which sending a kind of message does, after it was sent or instead."""
    fired, send = [], Session.send

    def fail(session, requests, **options):
        if not isinstance(requests[0].message, kind):
            return send(session, requests, **options)
        fired.append(requests)
        if is_sent:
            send(session, requests, **options)
        raise problem

    with mock.patch.object(Session, "send", fail), pytest.raises(type(problem)):
        yield fired


def lasting(cluster):
    """The names of the releases of each server."""
    return [[held.name for held in server._state.shard.releases.lasting()] for server in cluster.servers]


def test_an_unpublished_release_is_dropped_by_every_server():
    with Cluster(3) as cluster:
        kv = cluster.store()
        kv.init(values(0))
        for name in "abc":
            kv.publish(name)
        for name, left in (("c", ["a", "b"]), ("a", ["b"]), ("b", [])):
            kv.unpublish(name)
            assert lasting(cluster) == [left] * 3


@pytest.mark.parametrize("keys", [None, ["large", "small"]])
def test_a_publish_whose_replies_are_lost_is_made(keys):
    lost = []

    def fate(head):
        if head["verb"] in ("commit", "show_release") and lost.count(head["verb"]) < 2:
            lost.append(head["verb"])
            return "lose reply"
        return "nothing"

    with Cluster(2, fate=fate) as cluster:
        kv, reader = cluster.stores(2)
        kv.init(values(3))
        kv.publish("a", keys=keys)
        assert sorted(lost) == ["commit"] * 2 + ["show_release"] * 2
        assert lasting(cluster) == [["a"]] * 2
        with reader.open_release("a") as release:
            assert number_in(release.pull(keys or list(SHAPES))) == 3


@pytest.mark.parametrize("is_shown", [False, True])
@pytest.mark.parametrize(
    "problem", [tensorkv.StorageError("no room"), KeyboardInterrupt()], ids=["refused", "interrupted"]
)
def test_a_publish_that_fails_in_its_last_step_leaves_a_whole_release_or_none(problem, is_shown):
    """The servers may have shown the release though the publisher got an error."""
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(values(0))
        with failing(messages.ShowRelease, problem, is_sent=is_shown) as fired:
            kv.publish("a")
        assert len(fired) == 1
        assert lasting(cluster) == [["a"] if is_shown else []] * 2
        if is_shown:
            with other.open_release("a") as release:
                assert number_in(release.pull(list(SHAPES))) == 0
        kv.push(values(1))
        other.publish("b", keep=1)
        assert lasting(cluster) == [["b"]] * 2


def test_a_reader_waits_for_a_server_that_does_not_answer_as_long_as_it_was_told(monkeypatch):
    monkeypatch.setattr(client_releases, "_RENEW_S", 0.2)
    with Cluster(2) as cluster:
        kv, reader = cluster.stores(2)
        kv.init(values(0))
        kv.publish("a")
        reader.wait_release(timeout_s=LIMIT_S).close()
        cluster.actors[1].paused.clear()
        with pytest.raises(tensorkv.WaitTimeoutError, match=r"wait_release: .*0\.5 s"):
            reader.wait_release(timeout_s=0.5)
        cluster.actors[1].paused.set()
        assert number_in(reader.wait_release(timeout_s=LIMIT_S).pull(list(SHAPES))) == 0


@pytest.mark.parametrize(
    "problem", [tensorkv.StorageError("no room"), KeyboardInterrupt()], ids=["refused", "interrupted"]
)
def test_a_publish_that_fails_leaves_nothing_behind(problem):
    """Neither a hidden release nor servers that hold the pushes of all."""
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(values(0))
        with failing(messages.Commit, problem) as fired:
            kv.publish("s1")
        assert len(fired) == 1
        for server in cluster.servers:
            assert server._state.shard.releases.lasting() == []
            assert not server._snapshot_barrier._is_prepared()
        other.publish("s1")
        assert [name for name, _ in kv._engine.releases()] == ["s1"]


def test_a_publish_that_overlaps_a_load_drops_no_release_that_was_loaded(tmp_path):
    """Numbers of loaded releases are smaller than those that were given out since."""
    with Cluster(2) as cluster:
        kv, other = cluster.stores(2)
        kv.init(values(0))
        kv.publish("a")
        kv.publish("b")
        kv.save(tmp_path / "saved", releases=True)
        for number in range(5):
            kv.publish(f"s{number}")
        drop = ReleaseClient._drop_others
        loaded = []

        def load_first(client, told):
            loaded.append(other.load(tmp_path / "saved"))
            drop(client, told)

        with mock.patch.object(ReleaseClient, "_drop_others", load_first):
            kv.publish("late", keep=1)
        assert len(loaded) == 1
        for name in ("a", "b"):
            with kv.open_release(name) as release:
                assert number_in(release.pull(list(SHAPES))) == 0
        kv.save(tmp_path / "again", releases=True)


def test_releases_that_were_not_closed_are_let_go():
    with Cluster(2) as cluster:
        kv, reader = cluster.stores(2)
        kv.init(values(0))
        kv.publish("a")
        for _ in range(5):
            reader.open_release("a", lease_s=0.001)
        kv.push(values(1))
        kv.publish("b", keep=1)
        time.sleep(0.01)
        for server in cluster.servers:
            server._drop_snapshots_of_dead_clients()
            assert not server._state.snapshots._held
            assert [held.name for held in server._state.shard.releases.lasting()] == ["b"]


@pytest.mark.parametrize("num_servers", [1, 2])
def test_the_counters_of_a_store_have_the_number_of_its_releases(num_servers):
    with Cluster(num_servers) as cluster:
        kv = cluster.store()
        kv.init(values(0))
        for number in range(3):
            kv.publish(f"r{number}", keep=2)
        assert kv.stats()["releases"] == 2
        assert [server["releases"] for server in kv.stats()["servers"]] == [2] * num_servers


def test_keys_that_are_given_twice_change_nothing():
    with Cluster(1) as cluster:
        kv = cluster.store()
        kv.init(values(0))
        kv._engine._releases._ask([0], messages.Publish(release="a", keys=["large", "large", "small"]))
        kv.push(values(1))
        with kv.open_release("a") as release:
            assert number_in([release.pull("large"), release.pull("small")]) == 0


@pytest.mark.parametrize("rest", ["same", "few", "all"])
@pytest.mark.parametrize("shape", [(400_000,), (40_000, 10)], ids=str)
def test_a_piece_that_has_changed_as_a_whole(shape, rest):
    with Cluster(2) as cluster:
        kv = cluster.store()
        value = np.arange(400_000, dtype=F32).reshape(shape)
        before = value.copy()
        kv.init({"w": value, "other": value[:3]})
        kv.publish("a")
        (_, _, border), _ = kv._engine._keymap.find("pull", "w").pieces
        mine = kv.pull(["w", "other"])
        value[:border] += 1
        value[border:] += {"same": 0, "few": 0, "all": 1}[rest]
        if rest == "few":
            value[border + 5] = -0.0
        kv.push("w", value)
        kv.publish("b")
        with kv.open_release("b") as release:
            changes = release.changes(since="a")
            again = release.changes(since="a")
            assert [each.kind for each in changes] == ["dense" if rest == "all" else "elements", "same"]
            assert changes[0].values.tobytes() == again[0].values.tobytes()
            weights = dict(zip(["w", "other"], mine, strict=True))
            tensorkv.apply_changes(weights, changes)
            assert weights["w"].tobytes() == value.tobytes()
            assert changes.digest == release.digest
        differ = np.flatnonzero(before.reshape(-1).view(np.uint32) != value.reshape(-1).view(np.uint32))
        assert rest == "all" or np.array_equal(changes[0].indices, differ)


def test_keys_are_told_again_only_when_they_have_changed():
    with Cluster(2) as cluster:
        kv, reader = cluster.stores(2)
        kv.init(values(0))
        told = []
        listening = mock.patch.object(
            Session, "send", lambda *a, _send=Session.send, **k: told.extend(replies := _send(*a, **k)) or replies
        )

        def read(name):
            told.clear()
            with reader.open_release(name) as release:
                heads = [reply.head for reply in told if "changes" in reply.head]
                assert len(heads) == 2
                return [("keys" in head) for head in heads], dict(
                    zip(release.keys(), release.pull(release.keys()), strict=True)
                )

        with listening:
            kv.publish("a")
            assert read("a")[0] == [True, True]
            kv.push(values(1))
            kv.publish("b")
            again, found = read("b")
            assert again == [False, False]
            assert number_in(found.values()) == 1
            kv.init("new", np.full(2, 1, F32))
            kv.publish("c")
            again, found = read("c")
            assert any(again)
            assert list(found) == [*SHAPES, "new"]
            kv.delete("new")
            kv.init("new", np.full((3, 2), 1, F32))
            kv.publish("d")
            again, found = read("d")
            assert any(again)
            assert found["new"].shape == (3, 2)
            kv.publish("e", keys=["small"])
            again, found = read("e")
            assert list(found) == ["small"]
            # An older one, whose keys were others.
            assert list(read("a")[1]) == list(SHAPES)
            assert number_in(read("b")[1].values()) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1), (2, 2)])
def test_saved_releases_go_to_another_number_of_servers(before, after, tmp_path):
    def read(kv):
        found = {}
        for each in kv.releases():
            with kv.open_release(each.name) as release:
                values = {key: release.pull(key).tolist() for key in release.keys() if key != "table"}
                if "table" in release.keys():
                    values["table"] = release.row_sparse_pull("table", row_ids=range(100)).values.tolist()
                found[each] = release.digest, release.versions, values
        return found

    rows = np.arange(0, 100, 3)
    with Cluster(before) as cluster:
        kv = cluster.store()
        kv.init({"large": np.zeros((512, 512), np.float32), "small": np.arange(3), "gone": np.ones(5)})
        kv.init("table", tensorkv.Rows(rows, np.ones((len(rows), 2)), 100))
        kv.publish("one")
        kv.push("large", np.ones((512, 512), np.float32))
        kv.publish("two", keys=["small", "large"])
        kv.push("table", tensorkv.Rows(rows[:5], np.full((5, 2), 7.0), 100))
        kv.delete("gone")
        kv.publish("three")
        kv.publish("dropped")
        kv.unpublish("dropped")
        kv.push("small", np.arange(3) * 2)
        told = read(kv)
        kv.save(tmp_path / "saved", releases=True)
    with Cluster(after) as cluster:
        kv, other = cluster.stores(2)
        kv.init("small", np.zeros(1))
        kv.publish("here")
        kv.load(tmp_path / "saved")
        assert read(kv) == told
        assert read(other) == told
        kv.push({"large": np.full((512, 512), 5, np.float32), "small": np.arange(3) * 3})
        assert read(other) == told
        for name in ("dropped", "here", "one"):
            with pytest.raises(tensorkv.ReleaseExistsError):
                other.publish(name)
        other.publish("four")
        with kv.wait_release(after="three") as release:
            assert release.name == "four"
            kinds = {change.key: change.kind for change in release.changes(since="one")}
            assert kinds == {"large": "dense", "small": "elements", "table": "rows", "gone": "deleted"}
            with kv.open_release("two") as older:
                kinds = {change.key: change.kind for change in older.changes(since="one")}
                assert kinds == {"large": "dense", "small": "same", "table": "deleted", "gone": "deleted"}
        # A second load, and a save of what was loaded.
        kv.save(tmp_path / "again", releases=True)
        kv.load(tmp_path / "saved")
        assert read(kv) == told


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("case", ["at once", "after a heartbeat", "its lease had ended"])
def test_a_reader_does_not_go_on_with_a_loaded_release_of_the_same_name(num_servers, case, tmp_path):
    """It would mix two versions: what was loaded may be of another store."""
    for number in range(2):
        with Cluster(num_servers) as cluster:
            kv, other = cluster.stores(2)
            kv.init({"a": np.full(5, number), "b": np.full((600, 600), number)})
            kv.publish("one")
            if number == 0:
                kv.save(tmp_path / "saved", releases=True)
                continue
            reader = other.open_release("one")
            assert reader.pull("a")[0] == 1
            for server in cluster.servers if case == "its lease had ended" else ():
                server._state.snapshots.drop(reader._reader._name)
            kv.load(tmp_path / "saved")
            for server in cluster.servers if case == "after a heartbeat" else ():
                server._drop_snapshots_of_dead_clients()
            reads = [
                partial(reader.pull, "b"),
                partial(reader.pull, "a"),
                partial(getattr, reader, "digest"),
                partial(reader.pull, "b"),
            ]
            for read in reads:
                with pytest.raises(
                    tensorkv.SnapshotError, match='the release "one" that was open was replaced by load'
                ):
                    read()
            reader.close()
            with other.open_release("one") as again:
                assert again.pull("a")[0] == again.pull("b")[0, 0] == 0


@pytest.mark.parametrize("releases", [False, True])
def test_a_reader_goes_on_after_a_load_that_cannot_be_written(releases, tmp_path):
    with Cluster(2, path=str(tmp_path / "store"), durability="process") as cluster:
        kv, reader = cluster.store(), cluster.store()
        kv.init(values(1))
        kv.publish("step-1")
        kv.push(values(2))
        with reader.open_release("step-1", lease_s=1000) as release:
            digest = release.digest
            kv.publish("step-2", keep=1)
            kv.save(tmp_path / "saved", releases=releases)
            with (
                mock.patch.object(WriteAheadLog, "_write_snapshot", side_effect=OSError("full")),
                pytest.raises(tensorkv.StorageError, match="nothing has changed"),
            ):
                kv.load(tmp_path / "saved")
            kv.push(values(3))
            assert number_in(release.pull(list(SHAPES))) == 1
            assert release.digest == digest
            with reader.open_release("step-2") as newer:
                assert newer.changes(since="step-1").base == "step-1"


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("pull_dtype", ["bf16", "fp16"])
def test_changes_are_exact_for_a_client_whose_pulls_are_rounded(mode, pull_dtype, monkeypatch):
    monkeypatch.setattr(partition, "_WHOLE", 1000)
    rng = np.random.default_rng(0)
    held = {"few": rng.standard_normal(500), "all": rng.standard_normal(500), "half": rng.standard_normal((120, 100))}
    with Cluster(2, mode=mode) as cluster:
        exact, rounded = cluster.store(), cluster.store(pull_dtype=pull_dtype)
        exact.init(held)
        exact.publish("a")
        for name, stop in {"few": 1, "all": 500, "half": 60}.items():
            changed = held[name].copy()
            changed[:stop] += 1
            exact.push(name, changed)
        exact.init("new", rng.standard_normal(50))
        exact.publish("b")
        older, newer, right = exact.open_release("a"), rounded.open_release("b"), exact.open_release("b")
        for name in ("all", "half"):
            assert not np.array_equal(newer.pull(name), right.pull(name)), "the pull was not rounded"
        changes = newer.changes(since="a")
        kinds = {each.key: each.kind for each in changes}
        assert kinds == {"few": "elements", "all": "dense", "half": "elements", "new": "dense"}
        held["new"] = np.zeros(50)
        assert changes.digest == right.digest
        for name, array in tensorkv.apply_changes(held, changes, base=older.digest).items():
            assert np.array_equal(array, right.pull(name)), name
